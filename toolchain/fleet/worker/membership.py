"""A worker's life in its endpoint: the checks before it registers, its state, its drain. The Dynamo side."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from toolchain.admission import passport_of
from toolchain.engine import Passport
from toolchain.errors import ArtifactError, EndpointError
from toolchain.fleet.plane import Plane
from toolchain.fleet.worker.bulletin import Bulletin
from toolchain.fleet.worker.dialect import dialect
from toolchain.fleet.worker.drafted import Drafted
from toolchain.fleet.worker.worker import Adapter, LostError, Spec, make_triton
from toolchain.gateway.settings import Timeouts
from toolchain.gateway.triton import make_session
from toolchain.repository import Repository

TOKENIZER = Path("tensorrt_llm_bls", "1", "tokenizer")
_START_S = 120.0
"""Until the Triton, which has generated a token when the worker is started, does so for the worker."""
_LOOK_S = 0.3
_POLL_S = 0.05
_END_S = 1.0
"""For Dynamo to end, after nothing runs any more."""


def checked_passport(repository: Path, fingerprint: str) -> Passport:
    """The passport of the engine that the worker is to offer. Raises ArtifactError where it has none, or is of another
    model than the endpoint's: a request that is continued elsewhere must find the same tokens and weights.
    """
    passport = passport_of(repository)
    if passport is None:
        raise ArtifactError(f"{repository}: its engine has no passport", hint="scalellm build --recipe RECIPE")
    if fingerprint and identity(passport) != fingerprint:
        raise ArtifactError(
            f"{repository}: an engine of another model ({identity(passport)}) than the endpoint's ({fingerprint})",
            hint="an endpoint's recipes must all name the same model",
        )
    return passport


def identity(passport: Passport) -> str:
    """What two engines must share so that one can go on where the other stopped: the model's fingerprint, the size of
    its vocabulary, and its end ids.
    """
    return f"{passport.model or passport.architecture}/{passport.vocab_size}/{sorted(passport.eos_token_ids)}"


async def serve(spec: Spec) -> None:
    """Until SIGTERM or SIGINT. Raises ScalellmError."""
    repository = Path(spec.repository)
    passport = checked_passport(repository, spec.fingerprint)
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    timeouts = Timeouts()
    async with make_session(timeouts) as session:
        triton = make_triton(
            spec.triton_url, session, timeouts, metrics_url=spec.metrics_url, status_file=spec.status_file
        )
        await _first_token(triton, asked)
        if not asked.is_set():
            parameters = Repository.open(repository).parameters
            drafted = Drafted(triton, parameters) if parameters.get("tensorrt_llm_draft_model_name") else None
            ends, spoken = frozenset(passport.eos_token_ids), dialect(parameters)
            adapter = Adapter(triton, ends, spoken=spoken, drafted=drafted, replica=spec.replica)
            await _offer(spec, adapter, Bulletin(spec.state, adapter), passport, asked)
    Bulletin(spec.state).tell("ended")


async def _first_token(triton: Any, asked: asyncio.Event) -> None:
    until = asyncio.get_running_loop().time() + _START_S
    while not await triton.probe() and not asked.is_set():
        if asyncio.get_running_loop().time() > until:
            raise EndpointError(f"{triton.upstream.http_url} generates nothing: {triton.why_down}")
        await asyncio.sleep(_LOOK_S)


async def _offer(spec: Spec, adapter: Adapter, bulletin: Bulletin, passport: Passport, asked: asyncio.Event) -> None:
    """Registered for as long as the Triton generates; returns after the drain."""
    plane = Plane.open(Path(spec.discovery), spec.endpoint)
    runtime = plane.runtime()
    endpoint = runtime.endpoint(plane.path)
    from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
    from dynamo.llm.exceptions import EngineShutdown

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for item in adapter.generate(request, context):
                yield item
        except LostError as error:
            raise EngineShutdown(str(error)) from None

    async def on_change(up: bool) -> None:
        if asked.is_set():
            return
        await (endpoint.register_endpoint_instance() if up else endpoint.unregister_endpoint_instance())
        bulletin.tell("ready" if up else "down", adapter.triton.why_down if not up else "")

    await register_model(
        ModelInput.Tokens,
        ModelType.Chat,
        endpoint,
        spec.endpoint,
        spec.endpoint,
        worker_type=WorkerType.Aggregated,
        skip_model_assets=True,  # the gateway has the tokenizer, and a path here means nothing on another host
    )
    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate))
    looking = asyncio.create_task(adapter.look_after(on_change))
    bulletin.tell("ready")
    telling = asyncio.create_task(bulletin.keep())
    waiting = asyncio.create_task(asked.wait())
    await asyncio.wait({serving, looking, waiting}, return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, looking):
        if task.done() and not asked.is_set():
            task.result()
    bulletin.tell("draining")
    await _drain(endpoint, adapter, spec.drain_s)
    looking.cancel()
    telling.cancel()
    runtime.shutdown()
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_END_S):
            await serving


async def _drain(endpoint: Any, adapter: Adapter, drain_s: float) -> None:
    with contextlib.suppress(Exception):  # it may have been taken back already
        await endpoint.unregister_endpoint_instance()
    loop = asyncio.get_running_loop()
    for until in (loop.time() + drain_s, loop.time() + drain_s + 2):
        while adapter.running and loop.time() < until:
            await asyncio.sleep(_POLL_S)
        adapter.leaving.set()
