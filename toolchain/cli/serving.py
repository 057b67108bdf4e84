"""The verbs around a running server: serve, infer."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import click

from toolchain.cli import doors
from toolchain.cli.flags import PATH, common, complete_recipe, open_screen, work_flag


@click.command()
@click.option("-r", "--recipe", metavar="FILE|NAME", shell_complete=complete_recipe, help="The recipe that was built.")
@click.option("--repository", type=PATH, metavar="DIR", help="Serve this Triton repository instead of a recipe's.")
@click.option(
    "--device", "target", metavar="DEVICE", help="Of several devices that the recipe was built for, this one."
)
@work_flag()
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
    "--allow-unverified",
    is_flag=True,
    help="Serve an engine whose answers must be verified first and were not, or were found wrong.",
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
@click.option("--log", type=PATH, metavar="FILE", help="Triton's log. [default: triton.log beside the repository]")
@click.option("--gateway/--no-gateway", default=False, help="Also OpenAI's API and FEDML's /predict, before Triton.")
@click.option("--gateway-port", "port", type=doors.PORT, default=8080, show_default=True, help="OpenAI's API.")
@click.option("--model-name", metavar="NAME", help="What the gateway's clients call it. [default: the recipe's name]")
@click.option("--max-queue", type=click.IntRange(0), default=64, show_default=True, help="Waiting; more get 429.")
@click.option(
    "--drain",
    "drain_s",
    type=click.FloatRange(1, 86400),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="How long requests at work may take once it is told to end.",
)
@doors.ports_flags
@common
def serve(
    recipe: str | None,
    repository: Path | None,
    target: str | None,
    work: Path,
    host: str | None,
    http_port: int | None,
    grpc_port: int | None,
    metrics_port: int | None,
    server: Literal["auto", "bundled", "path", "container"],
    allow_unverified: bool,
    start_timeout_s: float,
    log: Path | None,
    gateway: bool,
    drain_s: float,
    json_output: bool,
    verbose: int,
    **front_flags: Any,
) -> None:
    """Launch Triton Inference Server on a built repository, watch it, and stop it cleanly on Ctrl-C.

    A recipe with services: N gets N servers; each next one has all its ports 10 higher. A repository of a TensorRT-LLM
    engine is served by the Triton of its own release: on PATH inside NVIDIA's image, or that image in a container.
    An engine of another recipe, GPU or TensorRT-LLM is refused, with the command that builds the right one.

    \b
    Examples:
      scalellm serve --recipe tiny
      scalellm serve --repository /models/llama --http-port 9000
      scalellm serve --recipe tiny --gateway
    """
    from dataclasses import replace

    from toolchain.admission import Asked, admit
    from toolchain.pipeline.job import folder_of
    from toolchain.recipe import Serve, load_recipe
    from toolchain.stages import serve as stage
    from toolchain.variant import for_device

    if gateway and log:
        raise click.UsageError("--log goes without --gateway, which reads what the engine writes beside triton.log.")
    screen = open_screen(json_output, verbose)
    settings, loaded = Serve(), None
    if recipe is not None:
        loaded = load_recipe(recipe)
        device = for_device(loaded, target).device if target else None
        settings, repository = loaded.serve, repository or folder_of(loaded, work, device) / "repository"
    if repository is None:
        raise click.UsageError("Name a recipe (--recipe) or a repository (--repository).")
    own = server in ("auto", "path")
    admission = admit(repository, Asked(recipe or "", loaded, target, allow_unverified, own))
    for note in admission.notes:
        screen.note(f"note: {note}")
    ports = stage.Ports(
        http=http_port or settings.http_port,
        grpc=grpc_port or settings.grpc_port,
        metrics=metrics_port or settings.metrics_port,
    )
    address, front = host or settings.host, None
    if gateway:  # then --host is the gateway's, and Triton itself is reached from this machine only
        front = doors.front(repository, ports, host=address, work=work, **front_flags)
        address = "127.0.0.1"
    with ExitStack() as opened:

        def on_ready(info: stage.ServingInfo) -> None:
            screen.serving(replace(info, unverified=admission.unverified))
            if front and not front.is_open:
                opened.enter_context(front.open(screen))

        code = stage.serve(
            repository,
            host=address,
            ports=ports,
            server=server,
            progress=screen,
            on_ready=on_ready,
            log=log,
            start_timeout_s=start_timeout_s,
            exit_timeout_s=round(drain_s),
        )
    sys.exit(code)


@click.command()
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
@common
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

    screen = open_screen(json_output, verbose)
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
