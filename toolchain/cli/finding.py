"""The verbs that look and tell: recipes, inspect, doctor, completion; and import, for what another tool made."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from toolchain.cli.flags import PATH, common, complete_recipe, open_screen, work_flag
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
    """Say what the folder of a model, or a GGUF file, is, and whether and how scalellm takes it.

    \b
    Examples:
      scalellm inspect ./Llama-2-13B-chat-AWQ
      scalellm inspect llama-3.2-1b.Q4_0.gguf
    """
    from toolchain.stages.inspect import inspect as look

    screen = open_screen(json_output, verbose)
    found = look(path)
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
@work_flag("Where artifacts live; every one found there is checked.")
@common
def doctor(work: Path, json_output: bool, verbose: int) -> None:
    """Check this machine and the artifacts on it; say what is missing and what to type.

    \b
    Example:
      scalellm doctor
    """
    from toolchain.stages.doctor import examine

    screen = open_screen(json_output, verbose)
    findings = examine(work)
    screen.emit([vars(finding) for finding in findings])
    marks = {(True, True): "ok", (True, False): "ok", (False, True): "missing", (False, False): "-"}
    rows = [
        (marks[f.ok, f.needed], f.name, f.text if f.ok or not f.hint else f"{f.text}   try: {f.hint}") for f in findings
    ]
    screen.table("", ("", "what", "found"), rows)
    sys.exit(0 if all(finding.ok or not finding.needed for finding in findings) else 1)


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
