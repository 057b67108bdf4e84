"""The verb that measures: bench."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli import reporting
from toolchain.cli.flags import PATH, common, complete_recipe, open_screen, work_flag

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.measuring.report import Report
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
@click.option("--report", "page", type=PATH, metavar="FILE", help="Draw it, too: .html, .svg or .png.")
@common
@click.pass_context
def bench(ctx: click.Context, /, json_output: bool, verbose: int, out: Path, page: Path | None, **given: Any) -> None:
    """Measure a running service: time to first token, inter-token latency, throughput, request by request.

    A closed loop (--concurrency) keeps so many requests in flight; an open loop (--rate) sends at random times of a
    fixed mean, and latencies count from those times even when the server is behind. Failed requests are counted and
    named. The report holds the conditions and every request's times, and the memory of a server on this machine.
    `scalellm bench report` draws it, and `scalellm bench compare` puts two side by side.

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
    if page is not None:
        reporting.check_place(page)
    folder, known = _known(given)
    if folder is None:
        raise click.UsageError("Name the model's folder (--tokenizer) or the recipe (--recipe), to count tokens.")
    doors, asked = _doors(given), _asked(given)
    tokens = stage.Tokens.load(folder, chat=given["door"] == "openai-chat")
    report = stage.bench(doors, asked, tokens, known, screen)
    write(report, out)
    if page is not None:
        reporting.draw([report], page)
    _show(screen, report, out, page)
    if any(not one.summary()["succeeded"] for one in report.runs):
        sys.exit(6)


def _known(given: dict[str, Any]) -> tuple[Path | None, Provenance]:
    """(the tokenizer's folder, what is known of the services)."""
    from dataclasses import asdict

    from toolchain.device import device as named
    from toolchain.engine import Engine
    from toolchain.pipeline.job import folder_of
    from toolchain.pipeline.predicting import prediction_of
    from toolchain.recipe import load_recipe
    from toolchain.stages.bench import Provenance
    from toolchain.variant import for_device

    folder, device, passport, text, predicted = given["tokenizer"], given["target"], None, None, None
    title = given["title"] or ", ".join(given["urls"]) or _URLS.get(given["door"], "")
    device = named(device).name if device else None
    if given["recipe"]:
        recipe = load_recipe(given["recipe"])
        own = for_device(recipe, device).device if device else None
        engine = Engine.open(folder_of(recipe, given["work"], own) / "engine")
        folder, device = folder or engine.path, engine.passport.device
        passport, text, title = asdict(engine.passport), engine.stamp.recipe, given["title"] or recipe.name
        predicted = prediction_of(engine, recipe.path)
    return folder, Provenance(title, given["simulated"], device, passport, text, predicted)


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


def _show(screen: Screen, report: Report, out: Path, page: Path | None) -> None:
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
    screen.say(f"Report: {out}" + (f"   drawn: {page}" if page else ""))
    screen.emit({"report": str(out), "drawn": str(page) if page else None, "runs": shown})


_LATENCIES = (("time to first token", "ttft_s"), ("inter-token latency", "itl_s"), ("end to end", "e2e_s"))


def _cells(found: dict[str, float] | None) -> list[str]:
    from toolchain.units import milliseconds

    names = ("min", "p50", "p90", "p99", "max")
    return ["-" if found is None else milliseconds(found[name]) for name in names]


def _rates(found: dict[str, Any]) -> str:
    failed = f", {found['failed']} FAILED" if found["failed"] else ""
    kept = found["draft_acceptance"]
    drafts = "" if kept is None else f", {100 * kept:.0f} % of drafted tokens accepted"
    return f"{found['tokens_per_s']:.1f} tokens/s, {found['requests_per_s']:.2f} requests/s{drafts}{failed}"


for _more in (reporting.schema, reporting.compare, reporting.report):
    bench.add_command(_more)
