"""KServe's version 2 over gRPC, as Triton speaks it: state, metadata, and answers on ``ModelStreamInfer``.

Several requests on one stream are answered side by side, told apart by their ids; one that fails ends no other. Closing
or cancelling the stream cancels what is still at work. The service is the one that tritonclient ships.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from starlette.requests import Request as HttpRequest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from toolchain import __version__
from toolchain.errors import EndpointError
from toolchain.gateway.failures import ApiError
from toolchain.gateway.kserve import DECOUPLED, EXTENSIONS, SERVER, responses, status_of
from toolchain.gateway.kserve_contract import VERSION, Contract
from toolchain.gateway.service import Service, for_the_log, too_late
from toolchain.gateway.visit import Visit

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""HTTP status -> gRPC's; all others are INTERNAL."""
_WAITING = 64
"""Responses that wait for a client to take them; then the engines' answers wait."""
_STRICT = "triton_grpc_error"
"""Metadata with which a client wants the first failure to end the stream with gRPC's own status."""
_LOOK_S = 0.1
_DRAIN_S = 30


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """What is not here is refused as not implemented: shared memory, loading of models, tracing."""

    def __init__(self, service: Service, contract: Contract) -> None:
        self._service, self._contract = service, contract

    async def ServerLive(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self._service.pool.ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._named(context, request.name, request.version)
        return service_pb2.ModelReadyResponse(ready=self._service.pool.ready)

    async def ServerMetadata(self, _request: Any, context: Any) -> Any:  # noqa: N802
        await self._keyed(context)
        return service_pb2.ServerMetadataResponse(name=SERVER, version=__version__, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._keyed(context)
        await self._named(context, request.name, request.version)
        return json_format.ParseDict(self._contract.metadata, service_pb2.ModelMetadataResponse())

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._keyed(context)
        await self._named(context, request.name, request.version)
        return service_pb2.ModelConfigResponse(config=self._contract.config)

    async def RepositoryIndex(self, _request: Any, context: Any) -> Any:  # noqa: N802
        await self._keyed(context)
        state = "READY" if self._service.pool.ready else "UNAVAILABLE"
        index = service_pb2.RepositoryIndexResponse()
        index.models.add(name=self._contract.name, version=VERSION, state=state)
        return index

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._keyed(context)
        await self._named(context, request.model_name, request.model_version)
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"ModelInfer RPC {DECOUPLED}")

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        await self._keyed(context)
        stream = _Stream(self._service, self._contract, context)
        try:
            async for response in stream.responses(requests):
                yield response
        finally:
            await stream.close()
        if stream.failure is not None:
            await _refuse(context, stream.failure)

    async def _keyed(self, context: Any) -> None:
        """Ends the call where its key is not known."""
        try:
            self._service.doorkeeper.admit(_headers(context).get("authorization"), counted=False)
        except ApiError as error:
            await _refuse(context, error)

    async def _named(self, context: Any, name: str, version: str) -> None:
        """Ends the call where it is for another model."""
        try:
            self._contract.check(name, version)
        except ApiError as error:
            await _refuse(context, error)


class _Stream:
    """One ``ModelStreamInfer``."""

    def __init__(self, service: Service, contract: Contract, context: Any) -> None:
        self._service, self._contract = service, contract
        self._headers, self._peer = _headers(context), context.peer()
        self._strict = self._headers.get(_STRICT) == "true"
        self._queue: asyncio.Queue[Any] = asyncio.Queue(_WAITING)
        self._tasks: set[asyncio.Task[None]] = set()
        self.failure: ApiError | None = None
        """What ends the stream itself."""

    async def responses(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Until the client has no more requests and all are answered."""
        self._start(self._read(requests))
        while self._tasks or not self._queue.empty():
            response = await self._queue.get()
            if self.failure is not None:
                return
            if response is not None:
                yield response

    async def close(self) -> None:
        """Cancels what is still at work."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(self._counted(work)))

    async def _counted(self, work: Coroutine[Any, Any, None]) -> None:
        """A task that, when it ends by itself, wakes whoever waits for responses, who looks whether there is more."""
        await work
        task = asyncio.current_task()
        assert task is not None
        self._tasks.discard(task)
        await self._put(None)

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        async for request in requests:
            self._start(self._answer(request))

    async def _put(self, response: Any) -> None:
        if self.failure is not None:
            return
        try:
            async with asyncio.timeout(self._service.settings.timeouts.write_s):
                await self._queue.put(response)
        except TimeoutError:
            self._end(ApiError(504, "the client does not take its answers", kind="server_error"))

    def _end(self, failure: ApiError) -> None:
        """Of the whole stream, without what still waits."""
        self.failure = failure
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    async def _answer(self, request: Any) -> None:
        """One request, from its key to its last response."""
        visit = Visit(self._service, self._as_http(request.id), "kserve_grpc")
        status = 499
        why: str | None = "client gone"
        try:
            visit.key = self._service.doorkeeper.admit(self._headers.get("authorization"))
            async with asyncio.timeout_at(visit.deadline):
                await self._give(request, visit)
            status, why = 200, None
        except Exception as error:
            failure = too_late() if isinstance(error, TimeoutError) else self._service.failure(visit, error)
            status, why = failure.status, for_the_log(failure)
            await self._fail(request, failure)
        finally:
            visit.end(status, why)

    async def _give(self, request: Any, visit: Visit) -> None:
        wanted = self._contract.of_tensors(request)
        if self._service.settings.log_prompts:
            visit.facts["body"] = json.dumps(dict(wanted.inputs))
        visit.facts["stream"] = True
        async for outputs in responses(self._service, visit, wanted):
            await self._put(self._contract.tensors_of(wanted, outputs))
        if wanted.empty_final:
            await self._put(self._contract.tensors_of(wanted, {}))

    async def _fail(self, request: Any, failure: ApiError) -> None:
        if self._strict:
            self._end(failure)
        answer = service_pb2.ModelInferResponse(id=request.id)
        await self._put(service_pb2.ModelStreamInferResponse(error_message=failure.message, infer_response=answer))

    def _as_http(self, request_id: str) -> HttpRequest:
        """What a visit reads of one: whose it is."""
        kind, _, where = self._peer.partition(":")
        host = where.rpartition(":")[0] if kind in ("ipv4", "ipv6") else where
        headers = [(b"x-request-id", request_id.encode(errors="replace"))] if request_id else []
        return HttpRequest({"type": "http", "headers": headers, "client": (host, 0)})


class Door:
    """The server, started and stopped as uvicorn's are."""

    def __init__(self, service: Service) -> None:
        assert service.settings.kserve is not None
        self.started = self.should_exit = self.force_exit = False
        contract, most = Contract.read(service.settings.kserve), service.settings.limits.max_body_bytes
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", most),
            ("grpc.max_send_message_length", -1),
        ]
        self._server = grpc.aio.server(options=options)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(service, contract), self._server)

    def bind(self, host: str, port: int, certificate: tuple[Path, Path] | None) -> None:
        """``certificate``: PEM files of the chain and its key. Raises EndpointError for a port that is not free."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if certificate is None:
                self._server.add_insecure_port(address)
            else:
                chain, key = (file.read_bytes() for file in certificate)
                self._server.add_secure_port(address, grpc.ssl_server_credentials([(key, chain)]))
        except RuntimeError as error:
            raise EndpointError(
                f"the gateway cannot listen on {address}: {error}",
                hint="stop what listens there, or choose another port",
            ) from error

    async def serve(self) -> None:
        """Until it is told to end; then what is at work may finish."""
        await self._server.start()
        self.started = True
        while not self.should_exit:
            await asyncio.sleep(_LOOK_S)
        ending = asyncio.create_task(self._server.stop(_DRAIN_S))
        while not ending.done() and not self.force_exit:
            await asyncio.wait({ending}, timeout=_LOOK_S)
        await self._server.stop(None)
        await ending


def _headers(context: Any) -> Mapping[str, str]:
    return {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}


async def _refuse(context: Any, error: ApiError) -> None:
    code: Callable[[int], Any] = _CODES.get
    await context.abort(code(status_of(error)) or grpc.StatusCode.INTERNAL, error.message)
