"""The verbs around a model at work: deploy, undeploy, run."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from toolchain.cli import doors
from toolchain.cli.asking import ask, asked_flags, prompt_of
from toolchain.cli.flags import PATH, common, host_flag, open_screen, place_flags
from toolchain.cli.model_endpoint import endpoint_of, replicate
from toolchain.cli.model_flags import build, home_flag, named
from toolchain.errors import EndpointError

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.registry import Card
    from toolchain.registry.deployment import Deployment

_POLL_S = 0.2


@click.command()
@named
@click.option("--local", is_flag=True, help="One server of this machine, without replicas that stand in for another.")
@click.option("--deployment", "file", type=PATH, metavar="FILE", help="A DEPLOYMENT.yaml whose recipes name the model.")
@click.option("--replicas", type=click.IntRange(1, 64), help="Of the endpoint, without --deployment. [default: 2]")
@click.option("--port", type=doors.PORT, default=2345, show_default=True, help="For /predict, /v1, /v2 and /ready.")
@click.option(
    "--grpc-port", type=doors.PORT, default=8001, show_default=True, help="KServe over gRPC; not with --local."
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Bind to this address.")
@doors.keys_flag
@click.option("--insecure-open", is_flag=True, help="Let other machines in without any API key.")
@click.option(
    "--server", type=click.Choice(["auto", "bundled", "path", "container"]), default="auto", show_default=True
)
@click.option("--allow-unverified", is_flag=True, help="Also an engine that failed or was never verified.")
@click.option("--start-timeout", "start_timeout_s", type=float, default=600, show_default=True, metavar="SECONDS")
@click.option("--detach", is_flag=True, help="Return once it answers, and leave it running.")
@host_flag
@place_flags()
@common
def deploy(
    name: str,
    home: Path,
    local: bool,
    file: Path | None,
    replicas: int | None,
    grpc_port: int,
    detach: bool,
    json_output: bool,
    verbose: int,
    **flags: Any,
) -> None:
    """Build what is stale of a model, or take what was pulled, and serve it: an endpoint over several replicas.

    One that is lost costs no client its answer. With --local, one Triton and a gateway. /predict is FEDML's, /v1 is
    OpenAI's API, /v2 is KServe's (with --local it is at Triton's own port), and /ready says 202 while it loads and then
    200. Ctrl-C stops it.

    \b
    Examples:
      scalellm model deploy -n llama --replicas 2
      scalellm model deploy -n llama --deployment DEPLOYMENT.yaml --detach
      scalellm model deploy -n llama --local --port 8080
    """
    from toolchain.registry import card as cards
    from toolchain.registry import deployment

    screen = open_screen(json_output, verbose)
    if (local or file) and replicas:
        raise click.UsageError(f"--replicas does not go with {'--local' if local else '--deployment'}.")
    if local and file:
        raise click.UsageError("--deployment does not go with --local.")
    if not local and flags["server"] != "auto":
        raise click.UsageError("--server goes with --local.")
    card = cards.read(home, name)
    asked = None if local else endpoint_of(card, file, replicas or 2, flags["host"], flags["port"], grpc_port)
    if deployment.deployed(card):
        raise deployment.busy(card)
    if detach:
        _detached(screen, card)
        return
    with deployment.hold(card) as record:
        place = {flag: flags.pop(flag) for flag in ("on", "quantize_on", "max_ram", "max_vram")}
        build(screen, card, **place)
        if asked is None:
            code = _serve(screen, card, record, **flags)
        else:
            code = replicate(screen, card, record, asked, **flags)
    sys.exit(code)


def _serve(
    screen: Screen,
    card: Card,
    record: Any,
    *,
    port: int,
    keys: Path | None,
    server: Literal["auto", "bundled", "path", "container"],
    allow_unverified: bool,
    start_timeout_s: float,
    **listen: Any,
) -> int:
    """Serve a model that is built until it is told to stop. -> the exit code."""
    import os
    from dataclasses import replace

    from toolchain.admission import Asked, admit
    from toolchain.registry.deployment import Deployment
    from toolchain.servers.triton.ports import free_ports
    from toolchain.stages import serve as stage

    asked = Asked(card.spoken, card.recipe, None, allow_unverified, server in ("auto", "path"))
    admission, ports = admit(card.repository, asked), free_ports()
    for note in admission.notes:
        screen.note(f"note: {note}")
    front = doors.front(
        card.repository,
        ports,
        work=card.home,  # where the API keys are
        keys=keys,
        port=port,
        predict_port=port,
        no_predict=False,
        **listen,
    )
    urls, tritons = front.listen.urls, [one.http_url for one in front.settings.upstreams]
    found = Deployment(os.getpid(), False, urls["/predict"], urls["OpenAI"], tuple(tritons), str(front.log))
    waiting = set(tritons)

    def on_ready(info: stage.ServingInfo) -> None:
        waiting.discard(info.http_url)
        if not waiting:
            record(replace(found, ready=True))
            _announce(screen, card, replace(found, ready=True), admission.unverified)

    with front.opened():
        record(found)
        return stage.serve(
            card.repository,
            host="127.0.0.1",
            ports=ports,
            server=server,
            progress=screen,
            on_ready=on_ready,
            start_timeout_s=start_timeout_s,
        )


def _announce(screen: Screen, card: Card, found: Deployment, unverified: str = "", *, detached: bool = False) -> None:
    screen.emit({"name": card.name, **vars(found), "unverified": unverified})
    screen.say(f"{card.name} is deployed (pid {found.pid}).")
    page, kserve = found.openai.removesuffix("v1"), " ".join(found.triton)
    for what, text in (("/predict", found.predict), ("OpenAI", found.openai), ("page", page), ("KServe", kserve)):
        screen.say(f"  {what:<8} {text}")
    if unverified:
        screen.say(f"NOT VERIFIED: {unverified}")
    body = '{"text": "Hello"}'
    screen.say(f"Try:\n  curl {found.predict} -d '{body}'\n  scalellm model run -n {card.name} 'Hello'")
    screen.say(f"It goes on until: scalellm model undeploy -n {card.name}" if detached else "Ctrl-C stops it.")


def _detached(screen: Screen, card: Card) -> None:
    """Run the same command without --detach in a process of its own, and wait until it answers."""
    from toolchain import runner
    from toolchain.registry import deployment

    words = [word for word in sys.argv[1:] if word not in ("--detach", "--json")]
    log = deployment.log_file(card)
    process = runner.detach([sys.executable, "-m", "toolchain.cli", *words], log=log)
    screen.note(f"note: its output goes to {log}")
    while process.poll() is None:
        found = deployment.deployed(card)
        if found and found.pid == process.pid and found.ready:
            _announce(screen, card, found, detached=True)
            return
        time.sleep(_POLL_S)
    raise EndpointError(
        f"{card.name} was not deployed (exit code {process.returncode}):\n{runner.tail(log, 8)}",
        hint=shlex.join(["scalellm", *words]),
    )


@click.command()
@named
@common
def undeploy(name: str, home: Path, json_output: bool, verbose: int) -> None:
    """Stop a deployment: requests in flight finish first.

    \b
    Example:
      scalellm model undeploy -n llama
    """
    from toolchain.registry import deployment
    from toolchain.registry.card import read

    screen = open_screen(json_output, verbose)
    stopped = deployment.stop(read(home, name))
    screen.emit({"name": name, "stopped": stopped})
    screen.say(f"stopped: {name}" if stopped else f"{name} is not deployed")


@click.command()
@click.option("-n", "--name", required=True, metavar="NAME", help="A model that is deployed.")
@home_flag
@asked_flags
@common
def run(
    name: str,
    prompt: str | None,
    max_tokens: int | None,
    temperature: float | None,
    key: str,
    home: Path,
    json_output: bool,
    verbose: int,
) -> None:
    """Ask a model that is deployed here; the answer comes as it is made. Without PROMPT, standard input is the prompt.

    \b
    Examples:
      scalellm model run -n llama "Name three rivers of France."
      scalellm model run -n llama --max-tokens 64 --temperature 0 < question.txt
    """
    from toolchain.measuring.doors import Door
    from toolchain.registry import deployment
    from toolchain.registry.card import read

    screen = open_screen(json_output, verbose)
    card = read(home, name)
    found = deployment.deployed(card)
    if found is None or not found.ready:
        why = "is not deployed" if found is None else "is not ready yet"
        raise EndpointError(f"{name} {why}", hint=f"scalellm model deploy -n {name} --local")
    if not found.predict:
        raise EndpointError(f"{name}: its deployment has no /predict", hint="scalellm endpoint list")
    given = {"max_tokens": max_tokens, "temperature": temperature}  # None leaves the choice to the gateway
    ask(screen, name, Door("predict", found.predict, name, extra=given, key=key), prompt_of(prompt))
