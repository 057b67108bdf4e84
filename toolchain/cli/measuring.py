"""The verbs that measure: bench, with compare and schema."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import PATH, common, complete_recipe, open_screen, work_flag

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.measuring.report import Report
    from toolchain.measuring.statistics import Ratio
    from toolchain.stages.bench import Asked, Door, Load, Provenance

_KINDS = ("triton-grpc", "triton-http", "openai-chat", "openai-completions", "predict")
_URLS = {"triton-grpc": "127.0.0.1:8001", "triton-http": "http://127.0.0.1:8000", "predict": "http://127.0.0.1:2345"}
_RUN_LIMIT = click.IntRange(1, 100_000)


def _numbers(_ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[float, ...]:
    """``"512,1K,3.5K"`` -> (512.0, 1024.0, 3584.0): K is 1024."""
    found = []
    for word in text.split(",") if text else ():
        digits, scale = (word.strip()[:-1], 1024) if word.strip().lower().endswith("k") else (word, 1)
        try:
            number = float(digits) * scale
        except ValueError:
            number = 0.0
        if not 0 < number < 1e9:
            raise click.BadParameter(f"{word.strip()!r} is not a number above 0", param=param)
        found.append(number)
    return tuple(found)


@click.group(invoke_without_command=True)
@click.option("--url", "urls", multiple=True, help="Where a service is, one --url each. [default: the recipe's]")
@click.option("--door", type=click.Choice(_KINDS), default="triton-grpc", show_default=True, help="How to ask it.")
@click.option("--name", help="The model's name there. [default: tensorrt_llm_bls, or OpenAI's first]")
@click.option("--tokenizer", type=PATH, metavar="DIR", help="The model's folder. [default: the recipe's engine]")
@click.option("-r", "--recipe", metavar="FILE|NAME", shell_complete=complete_recipe, help="The recipe that is served.")
@click.option("--device", "target", metavar="DEVICE", help="The device that serves.")
@work_flag()
@click.option(
    "--lengths", callback=_numbers, default="512,1K,2K,3.5K", show_default=True, help="Prompt lengths in tokens."
)
@click.option(
    "--prompts", "file", type=PATH, metavar="FILE", help="Take prompts from JSONL or ShareGPT's JSON instead."
)
@click.option("--output-tokens", type=_RUN_LIMIT, help="[default: what a prompt leaves of 4096]")
@click.option("--ignore-eos", is_flag=True, help="Generate exactly so many, also past the end of the text.")
@click.option("--concurrency", callback=_numbers, help="Closed loop: so many in flight, one run each. [default: 1]")
@click.option("--rate", callback=_numbers, help="Open loop: so many requests a second (Poisson), one run each.")
@click.option(
    "--pattern",
    type=click.Choice(["one-at-a-time", "staggered", "simultaneous"]),
    default="simultaneous",
    show_default=True,
    help="How several services are asked.",
)
@click.option("--stagger", "stagger_s", type=float, metavar="SECONDS", help="Between services that are staggered.")
@click.option("--requests", type=_RUN_LIMIT, default=30, show_default=True, help="For each service and run.")
@click.option("--warmup", type=click.IntRange(0, 1000), default=3, show_default=True)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of prompts and arrival times. Change it to measure a server again that keeps prompts in its cache.",
)
@click.option("--extra", default="", metavar="JSON", help="More fields of an HTTP request's body.")
@click.option("--api-key", envvar="SCALELLM_BENCH_KEY", default="", help="Sent as a bearer token, and never written.")
@click.option("--title", help="What the report is called. [default: the recipe's name, or the address]")
@click.option("--simulated", is_flag=True, help="The engine only pretends to compute: such a report has no score.")
@click.option("-o", "--out", type=PATH, default=Path("report.json"), show_default=True, metavar="FILE")
@common
@click.pass_context
def bench(ctx: click.Context, /, json_output: bool, verbose: int, out: Path, **given: Any) -> None:
    """Measure a running service: time to first token, inter-token latency, throughput, request by request.

    A closed loop (--concurrency) keeps so many requests in flight; an open loop (--rate) sends at random times of a
    fixed mean, and latencies count from those times even when the server is behind. Failed requests are counted and
    named. The report holds the conditions and every request's times; `scalellm bench compare` puts two side by side.

    \b
    Examples:
      scalellm bench --recipe tiny --lengths 512 --output-tokens 64 --concurrency 1,4,16
      scalellm bench --door openai-chat --url http://127.0.0.1:8080/v1 --tokenizer /models/llama --rate 2
      scalellm bench compare ours.json theirs.json
    """
    if ctx.invoked_subcommand is not None:
        return
    from toolchain.measuring.report import write
    from toolchain.stages import bench as stage

    screen = open_screen(json_output, verbose)
    folder, known = _known(given)
    if folder is None:
        raise click.UsageError("Name the model's folder (--tokenizer) or the recipe (--recipe), to count tokens.")
    doors, asked = _doors(given), _asked(given)
    tokens = stage.Tokens.load(folder, chat=given["door"] == "openai-chat")
    report = stage.bench(doors, asked, tokens, known, screen)
    write(report, out)
    _show(screen, report, out)
    if any(not one.summary()["succeeded"] for one in report.runs):
        sys.exit(6)


def _known(given: dict[str, Any]) -> tuple[Path | None, Provenance]:
    """(the tokenizer's folder, what is known of the services)."""
    from dataclasses import asdict

    from toolchain.device import device as named
    from toolchain.engine import Engine
    from toolchain.pipeline.job import folder_of
    from toolchain.recipe import load_recipe
    from toolchain.stages.bench import Provenance
    from toolchain.variant import for_device

    folder, device, passport, text = given["tokenizer"], given["target"], None, None
    title = given["title"] or ", ".join(given["urls"]) or _URLS.get(given["door"], "")
    device = named(device).name if device else None
    if given["recipe"]:
        recipe = load_recipe(given["recipe"])
        own = for_device(recipe, device).device if device else None
        engine = Engine.open(folder_of(recipe, given["work"], own) / "engine")
        folder, device = folder or engine.path, engine.passport.device
        passport, text, title = asdict(engine.passport), engine.stamp.recipe, given["title"] or recipe.name
    return folder, Provenance(title, given["simulated"], device, passport, text)


def _doors(given: dict[str, Any]) -> list[Door]:
    import json

    from toolchain.measuring.doors import first_model
    from toolchain.stages.bench import Door

    kind = given["door"]
    urls = given["urls"] or _urls(kind, given["recipe"])
    if not urls:
        raise click.UsageError(f"Say where the service is: --url http://127.0.0.1:8080/v1 --door {kind}")
    try:
        extra = json.loads(given["extra"] or "{}")
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="--extra") from None
    if not isinstance(extra, dict) or (extra and kind == "triton-grpc"):
        raise click.BadParameter("a JSON object, and only for HTTP", param_hint="--extra")
    if kind == "predict" and given["ignore_eos"]:
        raise click.BadParameter("/predict has no such field", param_hint="--ignore-eos")
    return [
        Door(
            kind,
            url,
            given["name"] or (first_model(url, given["api_key"]) if kind.startswith("openai") else "tensorrt_llm_bls"),
            given["ignore_eos"],
            extra,
            given["api_key"],
        )
        for url in urls
    ]


def _urls(kind: str, recipe: str | None) -> list[str]:
    """Where `serve` puts a recipe's services, or Triton and /predict by default; empty for others."""
    from toolchain.recipe import load_recipe
    from toolchain.stages.serve import Ports, ports_of

    if not recipe or not kind.startswith("triton"):
        return [_URLS[kind]] if kind in _URLS else []
    loaded = load_recipe(recipe)
    where = loaded.serve
    host = "127.0.0.1" if where.host == "0.0.0.0" else where.host
    places = ports_of(Ports(where.http_port, where.grpc_port, where.metrics_port), loaded.services)
    return [f"{host}:{one.grpc}" if kind == "triton-grpc" else f"http://{host}:{one.http}" for one in places]


def _asked(given: dict[str, Any]) -> Asked:
    from toolchain.stages.bench import Asked

    return Asked(
        loads=tuple(_loads(given)),
        lengths=tuple(int(one) for one in given["lengths"]),
        output_tokens=given["output_tokens"],
        file=given["file"],
        requests=given["requests"],
        warmup=given["warmup"],
        pattern=given["pattern"],
        stagger_s=given["stagger_s"],
        seed=given["seed"],
    )


def _loads(given: dict[str, Any]) -> list[Load]:
    from toolchain.stages.bench import Load

    rates = [Load(kind="open", rate_per_s=one, seed=given["seed"]) for one in given["rate"]]
    many = given["concurrency"] or (() if rates else (1.0,))
    if any(one != int(one) for one in many):
        raise click.BadParameter("whole numbers", param_hint="--concurrency")
    return [Load(kind="closed", concurrency=int(one)) for one in many] + rates


def _show(screen: Screen, report: Report, out: Path) -> None:
    """A table of each run, by service and together, with its red flags, and where the report is."""
    shown = []
    for run in report.runs:
        asked, services = run.conditions, run.conditions.services
        title = f"{asked.input_tokens or 'mixed'} tokens in, {asked.output_tokens or 'mixed'} out, {asked.load}"
        for service in [None, *range(services)] if services > 1 else [None]:
            found = run.summary(service)
            whose = f", {asked.pattern}, {services} services" if services > 1 else ""
            whose = whose if service is None else f", service {service + 1}"
            rows = [(name, *_cells(found[key])) for name, key in _LATENCIES]
            screen.table(title + whose, ("", "min", "p50", "p90", "p99", "max"), rows)
            screen.say(_rates(found))
        for flag in run.flags():
            screen.say(f"RED FLAG: {flag}")
        for reason, count in run.errors().items():
            screen.say(f"failed {count} times: {reason}")
        screen.say()
        shown.append({"conditions": asked.model_dump(), "summary": run.summary(), "flags": run.flags()})
    screen.say(f"Report: {out}")
    screen.emit({"report": str(out), "runs": shown})


_LATENCIES = (("time to first token", "ttft_s"), ("inter-token latency", "itl_s"), ("end to end", "e2e_s"))


def _cells(found: dict[str, float] | None) -> list[str]:
    names = ("min", "p50", "p90", "p99", "max")
    return ["-" if found is None else _ms(found[name]) for name in names]


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _rates(found: dict[str, Any]) -> str:
    failed = f", {found['failed']} FAILED" if found["failed"] else ""
    return f"{found['tokens_per_s']:.1f} tokens/s, {found['requests_per_s']:.2f} requests/s{failed}"


@bench.command()
@common
def schema(json_output: bool, verbose: int) -> None:
    """Print the JSON Schema of report.json."""
    import json

    from toolchain.measuring.report import schema as made

    click.echo(json.dumps(made(), indent=2))


@bench.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option(
    "--other-prompts",
    is_flag=True,
    help="Role-play prompts of the same lengths may be of another --seed: for one server that was measured twice.",
)
@common
def compare(a: Path, b: Path, other_prompts: bool, json_output: bool, verbose: int) -> None:
    """Ratios of two reports, B over A, with 95 % bootstrap intervals; refused when they were not asked the same."""
    from dataclasses import asdict

    from toolchain.measuring.compare import compare as compared
    from toolchain.measuring.report import read

    screen = open_screen(json_output, verbose)
    reports = read(a), read(b)
    found = compared(*reports, other_prompts=other_prompts)
    for one in found:
        asked = one.conditions
        rows = [
            (line.quantity, _value(line.quantity, line.a), _value(line.quantity, line.b), *_ratio(line.ratio))
            for line in one.lines
        ]
        title = f"{asked.input_tokens or 'mixed'} in, {asked.output_tokens or 'mixed'} out, {asked.load}"
        screen.table(title, ("", f"A: {reports[0].title}", f"B: {reports[1].title}", "B / A", "95 %"), rows)
    lines = [{"conditions": one.conditions.model_dump(), "lines": [asdict(x) for x in one.lines]} for one in found]
    screen.emit({"a": str(a), "b": str(b), "runs": lines})


def _value(quantity: str, value: float) -> str:
    return f"{value:.1f}" if quantity.startswith("tokens") else _ms(value)


def _ratio(ratio: Ratio) -> tuple[str, str]:
    same = "" if ratio.differs else "   no difference shown"
    return f"{ratio.value:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}{same}"
