"""The verbs that look and tell: recipes, inspect, doctor, completion; and import, for what another tool made."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from toolchain.cli.flags import PATH, common, complete_recipe, open_job, open_screen, work_flag
from toolchain.errors import PlanError, ScalellmError


@click.group(invoke_without_command=True)
@common
@click.pass_context
def recipes(ctx: click.Context, json_output: bool, verbose: int) -> None:
    """List the recipes that are at hand; `show` prints one, `schema` prints the JSON Schema.

    \b
    Examples:
      scalellm recipes
      scalellm recipes show rtx4090 > mine.yaml
    """
    if ctx.invoked_subcommand is not None:
        return
    from toolchain.recipe import available, load_recipe

    screen = open_screen(json_output, verbose)
    found = {}
    for name, path in available().items():
        try:
            found[name] = (path, load_recipe(str(path)))
        except ScalellmError as error:
            screen.note(f"{path}: {error.message}")
    screen.emit({name: {"path": path, **loaded.model_dump(mode="json")} for name, (path, loaded) in found.items()})
    screen.table(
        "",
        ("recipe", "device", "weights", "kv", "services", "what for"),
        [
            (name, r.device, r.quantization.weights, r.kv_cache.dtype, str(r.services), r.description)
            for name, (_, r) in found.items()
        ],
    )


@recipes.command("show")
@click.argument("name", shell_complete=complete_recipe)
def recipes_show(name: str) -> None:
    """Print a recipe's text, to start your own from."""
    from toolchain.recipe import load_recipe

    click.echo(load_recipe(name).text, nl=False)


@recipes.command("schema")
def recipes_schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from toolchain.recipe import schema

    click.echo(json.dumps(schema(), indent=2))


@click.command()
@click.argument("path", metavar="DIR|FILE", type=PATH)
@common
def inspect(path: Path, json_output: bool, verbose: int) -> None:
    """Say what the folder of a model, a GGUF file, an engine, a repository or a TensorRT-LLM checkpoint is.

    Of a model: whether and how scalellm takes it. Of an engine: for which GPU, release and limits it was built and from
    what, whether its answers were verified, and where its files say something else.

    \b
    Examples:
      scalellm inspect scalellm-work/rtx4090/engine
      scalellm inspect ./Llama-2-13B-chat-AWQ
      scalellm inspect llama-3.2-1b.Q4_0.gguf
    """
    from toolchain.stages.inspect import Sheet
    from toolchain.stages.inspect import inspect as look

    screen = open_screen(json_output, verbose)
    found = look(path)
    if isinstance(found, Sheet):
        screen.emit(found.to_json())
        screen.sheet(found)
        return
    screen.emit({**vars(found), "identity": vars(found.identity)})
    screen.inspection(found)


@click.command("import")
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("out", metavar="OUT", type=PATH)
@click.option("--tokenizer", type=PATH, metavar="DIR", help="Take the tokenizer's files from this folder.")
@common
def import_(source: Path, out: Path, tokenizer: Path | None, json_output: bool, verbose: int) -> None:
    """Turn a model that another tool wrote into a checkpoint of the unified layout, without rounding it again.

    SRC is a folder of AutoAWQ, GPTQ, compressed-tensors or pickled weights, or a GGUF file. Interrupted work continues.

    \b
    Examples:
      scalellm import ./Llama-2-13B-chat-GPTQ ./imported
      scalellm import llama-3.2-1b.Q4_0.gguf ./imported
    """
    from toolchain.pipeline import import_model
    from toolchain.quantizers.foreign import open_foreign
    from toolchain.stages.adopt import spoken

    screen = open_screen(json_output, verbose)
    model = open_foreign(source)
    if model is None:
        raise PlanError(f"{source}: needs no import", hint=f"scalellm build --recipe RECIPE --model {source}")
    state = import_model(model, out, screen, tokenizer)
    action = "kept" if state.fresh else "made"
    recipe = spoken(model.scheme)
    screen.emit({"folder": out, "action": action, "recipe": recipe})
    screen.say(f"import: {'up to date, kept' if state.fresh else 'made'} ({out})")
    screen.say(f"Next: scalellm build --recipe RECIPE --model {out}   # the recipe says {recipe}")


@click.command()
@click.option(
    "-r",
    "--recipe",
    metavar="FILE|NAME",
    shell_complete=complete_recipe,
    help="Hold this recipe's plan against the machine that is to build its engine.",
)
@click.option("-m", "--model", metavar="DIR|ORG/NAME", help="With --recipe: use this model instead of the recipe's.")
@click.option("--device", metavar="DEVICE", help="With --recipe: plan for this device instead of the recipe's.")
@click.option(
    "--on",
    default="local",
    show_default=True,
    metavar="local|container|ssh:HOST",
    help="With --recipe: where the engine will be built.",
)
@work_flag("Where artifacts live; without --recipe every one found there is checked.")
@common
def doctor(
    recipe: str | None, model: str | None, device: str | None, on: str, work: Path, json_output: bool, verbose: int
) -> None:
    """Check this machine and the artifacts on it, or a machine against a recipe; say what to type.

    The exit code is 1 when something fails that is needed; warnings do not change it.

    \b
    Examples:
      scalellm doctor
      scalellm doctor --recipe rtx4090
      scalellm doctor --recipe t4 --on ssh:gpu-box --json
    """
    from toolchain.stages import doctor as stage

    screen = open_screen(json_output, verbose)
    if recipe is None:
        findings = stage.examine(work)
    else:
        target = stage.target_of(on)
        job = open_job(screen, recipe, model, work, target=device)
        here = stage.look(stage.Target("local"), job.folder, job.plan.release)
        there = stage.look(target, job.folder, job.plan.release) if target.host else here
        files = (file for name in job.names for file in job.path(name).rglob("*"))
        present = sum(file.stat().st_size for file in files if file.is_file())
        findings = stage.preflight(job.plan, job.peaks, target, there, here, present_bytes=present)
    screen.emit([finding.to_json() for finding in findings])
    screen.findings(findings)
    sys.exit(1 if any(finding.level == "fail" for finding in findings) else 0)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    \b
    Example:
      eval "$(scalellm completion bash)"
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:  # pragma: no cover - click knows the three shells above
        raise click.UsageError(f"No completion for {shell}.")
    click.echo(kind(click.get_current_context().find_root().command, {}, "scalellm", "_SCALELLM_COMPLETE").source())
