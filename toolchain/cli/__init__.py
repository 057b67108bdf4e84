"""The command ``scalellm``: every verb and every flag. The only room that prints errors, reads the environment, exits.

One file a kind of verb; imports of stages happen inside the verbs, so that ``scalellm --help`` answers at once. Flags
say where and how to run; the recipe says what.
"""

from __future__ import annotations

import shlex
import sys

import click

from toolchain import __version__
from toolchain.cli import (
    choosing,
    deploying,
    doors,
    endpoint,
    finding,
    ledger,
    making,
    measuring,
    model,
    model_doors,
    model_packages,
    money,
    serving,
    verifying,
)
from toolchain.errors import ScalellmError


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start here:  scalellm recipes  |  scalellm build --recipe rtx4090.yaml --model DIR  |  make serve",
)
@click.version_option(__version__, prog_name="scalellm")
def verbs() -> None:
    """Put an LLM on the GPU that you have: one YAML recipe becomes a running, measured service.

    The stages: plan, quantize, convert, build, package, serve. `build` runs whatever is stale before it and emits the
    Triton model repository.
    """


for _verb in (
    *(choosing.init, choosing.plan, making.commands, making.quantize, making.convert, making.build, making.package),
    *(serving.serve, serving.infer, doors.gateway, deploying.deploy, endpoint.endpoint),
    *(doors.conformance, model.model),
    *(verifying.verify, measuring.bench, money.score),
    *(serving.serve, serving.infer, doors.gateway, deploying.deploy, doors.conformance, model.model),
    *(verifying.verify, measuring.bench, money.score, ledger.ledger),
    *(finding.recipes, finding.inspect, finding.import_, finding.doctor, finding.completion),
):
    verbs.add_command(_verb)

for _verb in (model_packages.package, model_packages.push, model_packages.pull):
    model.model.add_command(_verb)
for _verb in (model_doors.deploy, model_doors.undeploy, model_doors.run):
    model.model.add_command(_verb)


def _interrupted(argv: list[str]) -> str:
    """What to say after Ctrl-C: for a verb that makes artifacts, the command that continues."""
    verb = argv[1:2] if argv[:1] == ["model"] else argv[:1]
    if not {"quantize", "convert", "build", "package", "verify", "push", "pull", "deploy"} & set(verb):
        return "interrupted"
    return f"interrupted; finished work is kept. Continue with:\n  {shlex.join(['scalellm', *argv])}"


def main() -> None:
    """The entry point: runs a verb, turns our errors into a message and their exit code."""
    try:
        verbs.main(prog_name="scalellm", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo(_interrupted(sys.argv[1:]), err=True)
        sys.exit(130)
    except ScalellmError as error:
        from toolchain.console import Screen

        Screen(json_output="--json" in sys.argv).error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(141)
