"""The verb ``gateway`` and its keys; and what ``serve --gateway`` starts beside the server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from toolchain.cli.flags import PATH, common, complete_recipe, open_screen, size, work_flag

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.gateway.run import Listen
    from toolchain.gateway.settings import Model, Settings, Upstream
    from toolchain.stages.serve import Ports

Function = TypeVar("Function", bound=Callable[..., Any])
PORT = click.IntRange(1, 65535)
_KEYS = "gateway-keys.json"


def keys_flag(function: Function) -> Function:
    """``--keys``: the file of hashed API keys."""
    return click.option(
        "--keys", type=PATH, metavar="FILE", help=f"The file of API keys. [default: {_KEYS} in the work folder]"
    )(function)


def ports_flags(function: Function) -> Function:
    """Where a gateway listens and whom it lets in; the same for ``gateway`` and ``serve``."""
    function = click.option(
        "--insecure-open", is_flag=True, help="Let other machines at the gateway without any API key."
    )(function)
    function = click.option("--tls-key", type=PATH, metavar="FILE", help="The certificate's private key, PEM.")(
        function
    )
    function = click.option(
        "--tls-cert", type=PATH, metavar="FILE", help="Certificate with its chain, PEM: the gateway serves HTTPS."
    )(function)
    function = click.option("--no-page", is_flag=True, help="No page at /: only the API.")(function)
    function = click.option("--no-predict", is_flag=True, help="No /predict: only OpenAI's API.")(function)
    function = click.option(
        "--predict-port", type=PORT, default=2345, show_default=True, help="FEDML's POST /predict and GET /ready."
    )(function)
    return keys_flag(function)


@click.group(invoke_without_command=True)
@click.option("-r", "--recipe", metavar="FILE|NAME", shell_complete=complete_recipe, help="The recipe that is served.")
@click.option("--repository", type=PATH, metavar="DIR", help="Of this Triton repository instead of a recipe's.")
@click.option(
    "--device", "target", metavar="DEVICE", help="Of several devices that the recipe was built for, this one."
)
@click.option(
    "--triton", "tritons", multiple=True, metavar="URL", help="A Triton's HTTP address; several share the requests."
)
@click.option(
    "--triton-metrics", "metrics", multiple=True, metavar="URL", help="Its metrics, in the order of --triton."
)
@click.option("--tokenizer", type=PATH, metavar="DIR", help="The model's tokenizer, without a recipe or repository.")
@click.option("--model-name", metavar="NAME", help="What clients call the model. [default: the recipe's name]")
@click.option("--max-seq-len", type=click.IntRange(1), help="The engine's, without a recipe or repository.")
@work_flag()
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Bind to this address.")
@click.option("--port", type=PORT, default=8080, show_default=True, help="OpenAI's API.")
@ports_flags
@click.option("--max-body", callback=size, default="4MiB", show_default=True, metavar="SIZE", help="Of one request.")
@click.option(
    "--max-running", type=click.IntRange(0), default=0, help="At the engines at once. [default: what they take]"
)
@click.option("--max-queue", type=click.IntRange(0), default=64, show_default=True, help="Waiting; more get 429.")
@click.option("--request-timeout", "request_s", type=float, default=1800, show_default=True, metavar="SECONDS")
@click.option(
    "--fedml-compat",
    type=click.Choice(["json", "repr"]),
    default="json",
    show_default=True,
    help="How /predict answers; repr: a Python repr inside a JSON text, as FEDML's old template did.",
)
@click.option("--log-prompts", is_flag=True, help="Write what clients send into the log.")
@common
@click.pass_context
def gateway(context: click.Context, /, json_output: bool, verbose: int, **flags: Any) -> None:
    """Speak OpenAI's API and FEDML's /predict in front of one or more running Tritons.

    \b
    Examples:
      scalellm gateway --recipe tiny
      scalellm gateway --triton http://10.0.0.5:8000 --triton http://10.0.0.6:8000 --model-name llama --tokenizer DIR
      scalellm gateway keys add alice
    """
    context.obj = flags
    if context.invoked_subcommand is not None:
        return
    from toolchain.stages import gateway as stage

    screen = open_screen(json_output, verbose)
    stage.require_libraries()
    model, upstreams = _behind(**flags)
    settings = settings_of(model, upstreams, **flags)

    def on_ready(listen: Listen) -> None:
        urls = {**listen.urls, **_page(listen, settings)}
        screen.emit({**{door.strip("/").lower(): url for door, url in urls.items()}, "model": model.name})
        announce(screen, listen, settings)

    stage.gateway(settings, listen_of(**flags), on_ready=on_ready)


@gateway.group()
def keys() -> None:
    """API keys: hashed in a file; each is shown once, when it is made.

    \b
    Examples:
      scalellm gateway keys add alice --requests-per-minute 60
      scalellm gateway keys list
    """


@keys.command("add")
@click.argument("name")
@click.option("--requests-per-minute", type=click.FloatRange(0, min_open=True), help="[default: no limit]")
@click.option("--concurrent", type=click.IntRange(1), help="Requests at work at a time. [default: no limit]")
@work_flag("Where the file of keys lies.")
@keys_flag
@common
def add_key(
    name: str,
    requests_per_minute: float | None,
    concurrent: int | None,
    work: Path,
    keys: Path | None,
    json_output: bool,
    verbose: int,
) -> None:
    """Make a key and print it, once.

    \b
    Example:
      scalellm gateway keys add alice --requests-per-minute 60 --concurrent 8
    """
    from toolchain.gateway import keys as rooms

    screen = open_screen(json_output, verbose)
    secret = rooms.add(keys or work / _KEYS, name, requests_per_minute=requests_per_minute, concurrent=concurrent)
    screen.emit({"name": name, "key": secret})
    screen.say(secret)
    screen.note("This is the only time that it is shown. Clients send it as: Authorization: Bearer KEY")


@keys.command("remove")
@click.argument("name")
@work_flag("Where the file of keys lies.")
@keys_flag
@common
def remove_key(name: str, work: Path, keys: Path | None, json_output: bool, verbose: int) -> None:
    """Forget a key. A running gateway refuses it from then on.

    \b
    Example:
      scalellm gateway keys remove alice
    """
    from toolchain.gateway import keys as rooms

    screen = open_screen(json_output, verbose)
    rooms.remove(keys or work / _KEYS, name)
    screen.emit({"removed": name})
    screen.say(f"removed: {name}")


@keys.command("list")
@work_flag("Where the file of keys lies.")
@keys_flag
@common
def list_keys(work: Path, keys: Path | None, json_output: bool, verbose: int) -> None:
    """Names, dates and limits of the keys.

    \b
    Example:
      scalellm gateway keys list
    """
    from toolchain.gateway import keys as rooms

    screen = open_screen(json_output, verbose)
    found = rooms.read(keys or work / _KEYS)
    screen.emit([{name: value for name, value in vars(key).items() if name != "sha256"} for key in found])
    for key in found:
        rate = f"{key.requests_per_minute:g} requests a minute" if key.requests_per_minute else "any rate"
        most = f"{key.concurrent} at a time" if key.concurrent else "any number at a time"
        screen.say(f"{key.name}  made {key.created}, {rate}, {most}")
    if not found:
        screen.say("There are no keys.")


@click.command()
@click.argument("url", metavar="URL")
@click.option("--predict", metavar="URL", help="FEDML's door, such as http://127.0.0.1:2345/predict.")
@click.option("--kserve-http", metavar="URL", help="Triton's own, such as http://127.0.0.1:8000.")
@click.option("--kserve-grpc", metavar="HOST:PORT", help="Triton's own, such as 127.0.0.1:8001.")
@click.option("--tokenizer", type=PATH, metavar="DIR", help="The model's folder: its chat template is compared too.")
@click.option("--key", envvar="SCALELLM_API_KEY", help="An API key of the gateway. [env: SCALELLM_API_KEY]")
@common
def conformance(
    url: str,
    predict: str | None,
    kserve_http: str | None,
    kserve_grpc: str | None,
    tokenizer: Path | None,
    key: str | None,
    json_output: bool,
    verbose: int,
) -> None:
    """Ask a running service the same at every door, and say what holds. Ends with 7 where something does not.

    URL is OpenAI's API as the gateway prints it. Long requests are cancelled on the way, and the gateway's /status must
    then say that the KV cache is as free as before: other clients at the same time can make that check fail.

    \b
    Examples:
      scalellm conformance http://127.0.0.1:8080/v1 --tokenizer MODEL_DIR
      scalellm conformance http://127.0.0.1:8080/v1 --predict http://127.0.0.1:2345/predict --kserve-grpc 127.0.0.1:8001
    """
    from functools import partial

    from toolchain.chat import ChatTemplate
    from toolchain.endpoint import Endpoint
    from toolchain.errors import RejectedError
    from toolchain.measuring import conformance_doors as ways
    from toolchain.stages import conformance as stage

    screen = open_screen(json_output, verbose)
    url = url.rstrip("/")
    model = ways.model_at(f"{url}/models", key)
    asked: list[ways.Door] = [ways.Json("OpenAI", f"{url}/completions", model, key)]
    classic = ways.Json("/predict", predict, model, key) if predict else None
    if classic:
        asked.append(classic)
    beside = stage.Beside(
        chat=ways.Json("chat", f"{url}/chat/completions", model, key),
        predict=classic,
        template=ChatTemplate.of(tokenizer) if tokenizer else None,
        kv_blocks=partial(ways.kv_blocks_at, f"{url.removesuffix('/v1')}/status", key),
    )
    if kserve_http:
        asked.append(ways.Kserve(Endpoint(kserve_http, "", key=key or ""), "http"))
    if kserve_grpc:
        asked.append(ways.Kserve(Endpoint("", kserve_grpc, key=key or ""), "grpc"))
    found = []
    for finding in stage.conformance(asked, beside):
        found.append(finding)
        screen.say(f"{'ok    ' if finding.passed else 'FAILED'}  {finding.check}" + _indented(finding.detail))
    failed = sum(not finding.passed for finding in found)
    checks = [vars(finding) for finding in found]
    screen.emit({"doors": [door.name for door in asked], "failed": failed, "checks": checks})
    screen.say(f"{failed} of {len(found)} checks failed" if failed else f"all {len(found)} checks hold")
    sys.exit(RejectedError.exit_code if failed else 0)


def _indented(detail: str) -> str:
    return f"\n        {detail}" if detail else ""


@dataclass
class Front:
    """A gateway in front of the Tritons that this process serves: checked, not yet open."""

    settings: Settings
    listen: Listen
    log: Path
    is_open: bool = False

    @contextmanager
    def open(self, screen: Screen) -> Iterator[None]:
        """For the length of a ``with`` block; says where."""
        with self.opened():
            announce(screen, self.listen, self.settings)
            yield

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The same without a word."""
        from toolchain.gateway.run import freeze
        from toolchain.stages import gateway as stage

        self.is_open = True
        with stage.background(self.settings, self.listen, log=self.log):
            freeze()
            yield


def front(repository: Path, ports: Ports, model_name: str | None = None, **flags: Any) -> Front:
    """What ``serve --gateway`` starts; ``model_name``: instead of the recipe's.

    Raises ScalellmError for what could not be served or would be unsafe.
    """
    from toolchain.gateway.run import check
    from toolchain.stages import gateway as stage

    stage.require_libraries()
    settings = settings_of(stage.model_of_repository(repository, model_name), _local(repository, ports), **flags)
    listen = listen_of(**flags)
    check(settings, listen)
    return Front(settings, listen, repository.resolve().parent / "gateway.log")


def _local(repository: Path, ports: Ports) -> tuple[Upstream, ...]:
    """The Tritons that ``scalellm serve`` starts on this machine: one for each of the repository's services."""
    from toolchain.gateway.settings import Upstream
    from toolchain.repository import Repository
    from toolchain.stages.serve import ports_of, status_file

    places = ports_of(ports, Repository.open(repository).services)
    root = "http://127.0.0.1"
    return tuple(
        Upstream(f"{root}:{place.http}", f"{root}:{place.metrics}/metrics", status_file(repository, place))
        for place in places
    )


def _behind(
    recipe: str | None,
    repository: Path | None,
    target: str | None,
    tritons: tuple[str, ...],
    metrics: tuple[str, ...],
    tokenizer: Path | None,
    model_name: str | None,
    max_seq_len: int | None,
    work: Path,
    **_others: Any,
) -> tuple[Model, tuple[Upstream, ...]]:
    """The model and the Tritons that the flags name."""
    from toolchain.gateway.settings import Upstream
    from toolchain.pipeline.job import folder_of
    from toolchain.recipe import Serve, load_recipe
    from toolchain.stages import gateway as stage
    from toolchain.stages.serve import Ports
    from toolchain.variant import for_device

    serve = Serve()
    if recipe is not None:
        loaded = load_recipe(recipe)
        device = for_device(loaded, target).device if target else None
        serve, repository = loaded.serve, repository or folder_of(loaded, work, device) / "repository"
    if not tritons and repository is None:
        raise click.UsageError("Name a recipe (--recipe) or the Tritons (--triton URL).")
    if repository is not None:
        model = stage.model_of_repository(repository, model_name)
    elif model_name is None:
        raise click.UsageError("--triton without a recipe or repository needs --model-name.")
    else:
        model = stage.model_of_tokenizer(tokenizer, model_name, max_seq_len)
    if len(metrics) > len(tritons):
        raise click.UsageError("--triton-metrics goes with --triton.")
    if repository is not None and not tritons:
        return model, _local(repository, Ports(serve.http_port, serve.grpc_port, serve.metrics_port))
    padded = [*metrics, *[None] * (len(tritons) - len(metrics))]
    return model, tuple(Upstream(url.rstrip("/"), one) for url, one in zip(tritons, padded, strict=True))


def settings_of(
    model: Model,
    upstreams: tuple[Upstream, ...],
    *,
    work: Path,
    keys: Path | None,
    max_body: int = 4 * 2**20,
    max_running: int = 0,
    max_queue: int = 64,
    request_s: float = 1800,
    fedml_compat: Any = "json",
    log_prompts: bool = False,
    no_page: bool = False,
    kserve: Path | None = None,
    **_others: Any,
) -> Settings:
    from toolchain.gateway.settings import Limits, Settings, Timeouts

    return Settings(
        model,
        upstreams,
        timeouts=Timeouts(request_s=request_s),
        limits=Limits(max_body_bytes=max_body, max_running=max_running, max_queue=max_queue),
        keys=keys or work / _KEYS,
        fedml_compat=fedml_compat,
        log_prompts=log_prompts,
        page=not no_page,
        kserve=kserve,
    )


def listen_of(
    *,
    host: str,
    port: int,
    predict_port: int,
    no_predict: bool,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    insecure_open: bool = False,
    grpc_port: int | None = None,
    **_others: Any,
) -> Listen:
    from toolchain.gateway.run import Listen

    return Listen(host, port, None if no_predict else predict_port, tls_cert, tls_key, insecure_open, grpc_port)


def announce(screen: Screen, listen: Listen, settings: Settings) -> None:
    name = settings.model.name
    screen.say(f"The gateway is open for the model {name}.")
    for door, url in {**listen.urls, **_page(listen, settings)}.items():
        screen.say(f"  {door:<11} {url}")
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'
    screen.say(f"Try:\n  curl {listen.urls['OpenAI']}/chat/completions -d '{body}'\nCtrl-C stops it.")


def _page(listen: Listen, settings: Settings) -> dict[str, str]:
    return {"page": listen.urls["OpenAI"].removesuffix("v1")} if settings.page else {}
