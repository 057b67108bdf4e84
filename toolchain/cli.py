"""The command ``scalellm``: every verb and every flag. The only file that prints errors, reads the environment, exits.

Imports of stages happen inside the verbs, so that ``scalellm --help`` answers at once. Flags say where and how to run;
the recipe says what.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from toolchain import __version__
from toolchain.errors import ScalellmError

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.pipeline import Job, Result, State

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Path = click.Path(path_type=Path)


def _work_flag(help_text: str = "Where artifacts live.") -> Callable[[_Function], _Function]:
    """``--work``, the same for every verb that reads or makes artifacts."""
    return click.option(
        "-w",
        "--work",
        type=_Path,
        default=Path("scalellm-work"),
        show_default=True,
        envvar="SCALELLM_WORK",
        metavar="DIR",
        help=help_text,
    )


def _common(function: _Function) -> _Function:
    """``--json`` and ``-v``, which every verb takes."""
    function = click.option("--json", "json_output", is_flag=True, help="Print one JSON object on standard output.")(
        function
    )
    return click.option("-v", "--verbose", count=True, help="Say more, on standard error.")(function)


def _recipe_flags(function: _Function) -> _Function:
    """``--recipe``, ``--model`` and ``--work``, which every verb that makes something takes."""
    for option in reversed(
        [
            click.option(
                "-r",
                "--recipe",
                required=True,
                metavar="FILE|NAME",
                shell_complete=_complete_recipe,
                help="A recipe file, or the name of one in ./, ./recipes or the shipped recipes.",
            ),
            click.option("-m", "--model", metavar="DIR|ORG/NAME", help="Use this model instead of the recipe's."),
            _work_flag(),
        ]
    ):
        function = option(function)
    return function


def _stage_flags(function: _Function) -> _Function:
    """What every verb takes that makes artifacts or says why it would."""
    explained = click.option("--explain", is_flag=True, help="Only say what is stale and why.")(_common(function))
    return _recipe_flags(explained)


def _size(_ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    from toolchain.units import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param=param) from error


def _place_flags(function: _Function) -> _Function:
    """``--device``, ``--max-ram`` and ``--max-vram``: where weights are quantized. They change no artifact's key."""
    for option in (
        click.option(
            "--max-vram", callback=_size, metavar="SIZE", help="Take no more of the GPU's memory, such as 14GiB."
        ),
        click.option("--max-ram", callback=_size, metavar="SIZE", help="Quantize within this memory, such as 8GiB."),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="auto|cpu|cuda[:N]",
            help="Where to quantize; auto: the GPU if torch sees one.",
        ),
    ):
        function = option(function)
    return function


def _complete_recipe(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from toolchain.recipe import available

    return [name for name in available() if name.startswith(incomplete)]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start here:  scalellm recipes  |  scalellm build --recipe rtx4090.yaml --model DIR  |  make serve",
)
@click.version_option(__version__, prog_name="scalellm")
def verbs() -> None:
    """Put an LLM on the GPU that you have: one YAML recipe becomes a running, measured service.

    The stages: plan, quantize, build, package, serve. `build` runs whatever is stale before it and emits the Triton
    model repository.
    """


@verbs.command()
@_recipe_flags
@_common
def plan(recipe: str, model: str | None, work: Path, json_output: bool, verbose: int) -> None:
    """Say what will be done and why, and whether it fits. Needs no GPU and makes nothing.

    \b
    Example:
      scalellm plan --recipe t4
    """
    screen = _screen(json_output, verbose)
    job = _job(screen, recipe, model, work)
    screen.emit(job.plan.to_json())
    screen.plan(job.plan, job.source)


@verbs.command()
@_stage_flags
@_place_flags
def quantize(**flags: Any) -> None:
    """Quantize the model, a layer at a time, into the unified Hugging Face layout.

    Interrupted work continues at the layer in hand.

    \b
    Examples:
      scalellm quantize --recipe rtx4090 --model ./Llama-2-13b-chat-hf
      scalellm quantize --recipe rtx4090 --max-ram 4GiB --device cpu
    """
    _run("checkpoint", **flags)


@verbs.command()
@_stage_flags
@_place_flags
def build(**flags: Any) -> None:
    """Plan, quantize, build the engine and emit the Triton model repository; skip what is fresh.

    \b
    Examples:
      scalellm build --recipe rtx4090.yaml --model ./Llama-2-13b-chat-hf
      scalellm build --recipe tiny --explain
    """
    _run("repository", **flags)


@verbs.command()
@_stage_flags
def package(recipe: str, model: str | None, work: Path, explain: bool, json_output: bool, verbose: int) -> None:
    """Emit the Triton model repository of a finished engine. Refuses where the engine is missing or stale.

    \b
    Example:
      scalellm package --recipe tiny
    """
    screen = _screen(json_output, verbose)
    job = _job(screen, recipe, model, work)
    engine = next(state for state in job.states() if state.name == "engine")
    if not engine.fresh and not explain:
        from toolchain.errors import ArtifactError

        raise ArtifactError(
            f"{engine.folder}: the engine is not up to date: {'; '.join(engine.reasons)}",
            hint=f"scalellm build --recipe {recipe}",
        )
    _run_job(screen, job, "repository", explain)


@verbs.command()
@click.option("-r", "--recipe", metavar="FILE|NAME", shell_complete=_complete_recipe, help="The recipe that was built.")
@click.option("--repository", type=_Path, metavar="DIR", help="Serve this Triton repository instead of a recipe's.")
@_work_flag()
@click.option("--host", metavar="ADDRESS", help="Bind to this address. [default: the recipe's, else 127.0.0.1]")
@click.option("--http-port", type=click.IntRange(1, 65535), help="[default: the recipe's, else 8000]")
@click.option("--grpc-port", type=click.IntRange(1, 65535), help="[default: the recipe's, else 8001]")
@click.option("--metrics-port", type=click.IntRange(1, 65535), help="[default: the recipe's, else 8002]")
@click.option(
    "--server",
    type=click.Choice(["auto", "bundled", "path", "container"]),
    default="auto",
    show_default=True,
    help="nvidia-pytriton's tritonserver, the one on PATH, or NVIDIA's container.",
)
@click.option(
    "--start-timeout",
    "start_timeout_s",
    type=float,
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="Give up when the server does not answer by then.",
)
@_common
def serve(
    recipe: str | None,
    repository: Path | None,
    work: Path,
    host: str | None,
    http_port: int | None,
    grpc_port: int | None,
    metrics_port: int | None,
    server: Literal["auto", "bundled", "path", "container"],
    start_timeout_s: float,
    json_output: bool,
    verbose: int,
) -> None:
    """Launch Triton Inference Server on a built repository, watch it, and stop it cleanly on Ctrl-C.

    \b
    Examples:
      scalellm serve --recipe tiny
      scalellm serve --repository /models/llama --http-port 9000
    """
    from toolchain.recipe import Serve, load_recipe
    from toolchain.stages import serve as stage

    screen = _screen(json_output, verbose)
    settings = Serve()
    if recipe is not None:
        loaded = load_recipe(recipe)
        settings, repository = loaded.serve, repository or work / loaded.name / "repository"
    if repository is None:
        raise click.UsageError("Name a recipe (--recipe) or a repository (--repository).")
    ports = stage.Ports(
        http=http_port or settings.http_port,
        grpc=grpc_port or settings.grpc_port,
        metrics=metrics_port or settings.metrics_port,
    )
    code = stage.serve(
        repository,
        host=host or settings.host,
        ports=ports,
        server=server,
        progress=screen,
        on_ready=screen.serving,
        start_timeout_s=start_timeout_s,
    )
    sys.exit(code)


@verbs.command()
@click.argument("text")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--protocol", type=click.Choice(["http", "grpc"]), default="http", show_default=True)
@click.option("--stream", is_flag=True, help="Print tokens as they come.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--http-port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--grpc-port", type=click.IntRange(1, 65535), default=8001, show_default=True)
@click.option("--triton-model", default="tensorrt_llm_bls", show_default=True, help="The Triton model to ask.")
@click.option("--temperature", type=float, help="Above 0 samples; without it the likeliest token is taken.")
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--seed", type=int)
@click.option("--repetition-penalty", type=float)
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be given several times.")
@click.option("--timeout", "timeout_s", type=float, default=120, show_default=True, metavar="SECONDS")
@_common
def infer(
    text: str,
    max_tokens: int,
    protocol: Literal["http", "grpc"],
    stream: bool,
    host: str,
    http_port: int,
    grpc_port: int,
    triton_model: str,
    stop: tuple[str, ...],
    timeout_s: float,
    json_output: bool,
    verbose: int,
    **sampling: Any,
) -> None:
    """Ask a running server to continue TEXT; says when the first token came.

    \b
    Examples:
      scalellm infer "The capital of France is" --stream
      scalellm infer "[INST] Who are you? [/INST]" --protocol grpc --max-tokens 100
    """
    from toolchain.endpoint import Endpoint
    from toolchain.units import format_seconds

    screen = _screen(json_output, verbose)
    endpoint = Endpoint(f"http://{host}:{http_port}", f"{host}:{grpc_port}", model=triton_model)
    if stop:
        sampling["stop_words"] = list(stop)
    pieces, ttft_s, seconds = [], 0.0, 0.0
    for chunk in endpoint.generate(
        text, max_tokens=max_tokens, protocol=protocol, stream=stream, timeout_s=timeout_s, **sampling
    ):
        seconds = chunk.received_at_s - chunk.sent_at_s
        if chunk.text:
            ttft_s = ttft_s or seconds
            pieces.append(chunk.text)
            if not json_output:
                click.echo(chunk.text, nl=False)
    screen.say()
    answer = {"text": "".join(pieces), "protocol": protocol, "stream": stream, "model": triton_model}
    screen.emit({**answer, "ttft_s": ttft_s if stream else None, "seconds": seconds})
    took = format_seconds(seconds)
    screen.say(
        f"[{protocol}, streamed: first token after {format_seconds(ttft_s)}, all after {took}]"
        if stream
        else f"[{protocol}: the whole answer after {took}; --stream shows the first token's time]"
    )


@verbs.group(invoke_without_command=True)
@_common
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

    screen = _screen(json_output, verbose)
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
@click.argument("name", shell_complete=_complete_recipe)
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


@verbs.command()
@_work_flag("Where artifacts live; every one found there is checked.")
@_common
def doctor(work: Path, json_output: bool, verbose: int) -> None:
    """Check this machine and the artifacts on it; say what is missing and what to type.

    \b
    Example:
      scalellm doctor
    """
    from toolchain.stages.doctor import examine

    screen = _screen(json_output, verbose)
    findings = examine(work)
    screen.emit([vars(finding) for finding in findings])
    marks = {(True, True): "ok", (True, False): "ok", (False, True): "missing", (False, False): "-"}
    rows = [
        (marks[f.ok, f.needed], f.name, f.text if f.ok or not f.hint else f"{f.text}   try: {f.hint}") for f in findings
    ]
    screen.table("", ("", "what", "found"), rows)
    sys.exit(0 if all(finding.ok or not finding.needed for finding in findings) else 1)


@verbs.command()
@click.argument("path", metavar="DIR|FILE", type=_Path)
@_common
def inspect(path: Path, json_output: bool, verbose: int) -> None:
    """Say what the folder of a model, or a GGUF file, is, and whether and how scalellm takes it.

    \b
    Examples:
      scalellm inspect ./Llama-2-13B-chat-AWQ
      scalellm inspect llama-3.2-1b.Q4_0.gguf
    """
    from toolchain.stages.inspect import inspect as look

    screen = _screen(json_output, verbose)
    found = look(path)
    screen.emit({**vars(found), "identity": vars(found.identity)})
    screen.inspection(found)


@verbs.command("import")
@click.argument("source", metavar="SRC", type=_Path)
@click.argument("out", metavar="OUT", type=_Path)
@click.option("--tokenizer", type=_Path, metavar="DIR", help="Take the tokenizer's files from this folder.")
@_common
def import_(source: Path, out: Path, tokenizer: Path | None, json_output: bool, verbose: int) -> None:
    """Turn a model that another tool wrote into a checkpoint of the unified layout, without rounding it again.

    SRC is a folder of AutoAWQ, GPTQ, compressed-tensors or pickled weights, or a GGUF file. Interrupted work continues.

    \b
    Examples:
      scalellm import ./Llama-2-13B-chat-GPTQ ./imported
      scalellm import llama-3.2-1b.Q4_0.gguf ./imported
    """
    from toolchain.errors import PlanError
    from toolchain.pipeline import import_model
    from toolchain.quantizers.foreign import open_foreign
    from toolchain.stages.adopt import spoken

    screen = _screen(json_output, verbose)
    model = open_foreign(source)
    if model is None:
        raise PlanError(f"{source}: needs no import", hint=f"scalellm build --recipe RECIPE --model {source}")
    state = import_model(model, out, screen, tokenizer)
    action = "kept" if state.fresh else "made"
    recipe = spoken(model.scheme)
    screen.emit({"folder": out, "action": action, "recipe": recipe})
    screen.say(f"import: {'up to date, kept' if state.fresh else 'made'} ({out})")
    screen.say(f"Next: scalellm build --recipe RECIPE --model {out}   # the recipe says {recipe}")


@verbs.command()
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
    click.echo(kind(verbs, {}, "scalellm", "_SCALELLM_COMPLETE").source())


def _screen(json_output: bool, verbose: int) -> Screen:
    from toolchain.console import Screen

    screen = Screen(json_output=json_output, verbose=verbose)
    click.get_current_context().find_root().obj = screen
    return screen


def _job(screen: Screen, recipe: str, model: str | None, work: Path, **place: Any) -> Job:
    from toolchain.pipeline import Job
    from toolchain.quantizers.place import Place
    from toolchain.recipe import load_recipe

    return Job(load_recipe(recipe), model, work, screen, Place(**place))


def _run(
    until: str,
    recipe: str,
    model: str | None,
    work: Path,
    explain: bool,
    json_output: bool,
    verbose: int,
    **place: Any,
) -> None:
    screen = _screen(json_output, verbose)
    _run_job(screen, _job(screen, recipe, model, work, **place), until, explain)


def _run_job(screen: Screen, job: Job, until: str, explain: bool) -> None:
    """Make what is stale up to ``until``, or with ``explain`` only say what that would be."""
    from toolchain.pipeline import NAMES

    if explain:
        states = [state for state in job.states() if NAMES.index(state.name) <= NAMES.index(until)]
        screen.emit([{**vars(state), "stage": state.stage} for state in states])
        for state in states:
            screen.say(_explain(state))
        return
    for warning in job.plan.warnings:
        screen.note(f"note: {warning}")
    for decision in job.plan.decisions:
        screen.detail(f"plan: {decision.name} = {decision.value}: {decision.reason}")
    results = job.run(until, on_result=lambda result: screen.say(_report(result)))
    screen.emit(
        {
            "recipe": job.recipe.name,
            "artifacts": {
                r.state.name: {"folder": r.state.folder, "action": r.action, "seconds": r.seconds, "key": r.key}
                for r in results
            },
        }
    )
    if all(result.action == "kept" for result in results):
        screen.say("Nothing to do: everything is up to date.")
    if until == "repository":
        screen.say(f"Next: scalellm serve --recipe {job.spoken} --work {job.work}")


def _explain(state: State) -> str:
    if state.fresh:
        return f"{state.stage}: up to date ({state.folder})"
    verb = "to do" if state.reasons == ("there is none yet",) else "again"
    return f"{state.stage}: {verb}, {'; '.join(state.reasons)}"


def _report(result: Result) -> str:
    from toolchain.units import format_seconds

    if result.action == "kept":
        return f"{result.state.name}: up to date, kept ({result.state.folder})"
    why = "" if result.state.reasons == ("there is none yet",) else f" because {'; '.join(result.state.reasons)}"
    return f"{result.state.name}: made in {format_seconds(result.seconds)}{why} ({result.state.folder})"


def _interrupted(argv: list[str]) -> str:
    """What to say after Ctrl-C: for a verb that makes artifacts, the command that continues."""
    if not {"quantize", "build", "package"} & set(argv[:1]):
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


if __name__ == "__main__":
    main()
