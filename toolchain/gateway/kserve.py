"""KServe's version 2 over HTTP, as Triton speaks it: state, metadata, ``generate`` and ``generate_stream``.

For what stands in front of more than one Triton, so that clients written for one need not know. The same keys, limits
and logs as at the other doors. Source: https://github.com/triton-inference-server/server docs/protocol/ and its
extension_generate.md, read 2026-11; what Triton refuses of a decoupled model (``infer``) is refused here too.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from toolchain import __version__
from toolchain.gateway.answers import read_event
from toolchain.gateway.connection import EventStream
from toolchain.gateway.failures import ApiError, UpstreamError, broken
from toolchain.gateway.kserve_contract import VERSION, Contract, Wanted
from toolchain.gateway.service import Service, too_late
from toolchain.gateway.visit import Visit

SERVER = "scalellm"
EXTENSIONS = ("model_configuration", "generate", "model_repository")
DECOUPLED = "doesn't support models with decoupled transaction policy"
_NOT_ONE = (
    "generate expects model to produce exactly 1 response, use generate stream for model that generates various number "
    "of responses"
)


async def responses(service: Service, visit: Visit, wanted: Wanted) -> AsyncIterator[dict[str, Any]]:
    """The outputs of one request as they come, as Triton would send them. Raises ApiError, UpstreamError."""
    await visit.enter(wanted.asked)
    flow = await service.pool.start(wanted.asked)
    visit.flows.append(flow)
    ends = 0
    try:
        async for event in flow:
            visit.see(read_event(event, service.model), whole=not wanted.streaming)
            ends += "finish_reason" in event
            if outputs := wanted.outputs_of(event):
                yield outputs
        if "finish_reason" in flow.outputs and ends < wanted.answers:
            raise UpstreamError("the answer ended early")
    except UpstreamError as error:
        flow.failed(error)
        raise
    flow.close()


def status_of(error: ApiError) -> int:
    """Triton calls a server without room unavailable."""
    return 503 if error.status == 429 and error.code == "overloaded" else error.status


def refusal(error: ApiError) -> Response:
    """Triton's error object with its HTTP status."""
    return JSONResponse({"error": error.message}, status_of(error), error.headers())


def add(app: FastAPI, service: Service, contract: Contract) -> None:
    """The paths under ``/v2``."""
    door = _Door(service, contract)
    app.add_api_route("/v2", door.server, methods=["GET"])
    app.add_api_route("/v2/health/live", door.live, methods=["GET"])
    app.add_api_route("/v2/health/ready", door.ready, methods=["GET"])
    app.add_api_route("/v2/repository/index", door.index, methods=["POST"])
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        app.add_api_route(path, door.metadata, methods=["GET"])
        app.add_api_route(f"{path}/ready", door.model_ready, methods=["GET"])
        app.add_api_route(f"{path}/config", door.config, methods=["GET"])
        app.add_api_route(f"{path}/infer", door.infer, methods=["POST"])
        app.add_api_route(f"{path}/generate", door.generate, methods=["POST"])
        app.add_api_route(f"{path}/generate_stream", door.generate_stream, methods=["POST"])
    app.add_api_route("/v2/{rest:path}", door.unknown, methods=["GET", "POST"], include_in_schema=False)


class _Door:
    """What the paths do."""

    def __init__(self, service: Service, contract: Contract) -> None:
        self._service, self._contract = service, contract

    async def server(self, http: Request) -> Response:
        told = {"name": SERVER, "version": __version__, "extensions": list(EXTENSIONS)}
        return self._guarded(http, lambda: told)

    async def live(self) -> Response:
        return Response()

    async def ready(self) -> Response:
        return Response(status_code=200 if self._service.pool.ready else 400)

    async def model_ready(self, name: str, version: str = "") -> Response:
        try:
            self._contract.check(name, version)
        except ApiError as error:
            return refusal(error)
        return await self.ready()

    async def index(self, http: Request) -> Response:
        state = "READY" if self._service.pool.ready else "UNAVAILABLE"
        return self._guarded(http, lambda: [{"name": self._contract.name, "version": VERSION, "state": state}])

    async def metadata(self, http: Request, name: str, version: str = "") -> Response:
        return self._guarded(http, lambda: self._contract.metadata, name, version)

    async def config(self, http: Request, name: str, version: str = "") -> Response:
        return self._guarded(http, lambda: self._contract.config_json, name, version)

    async def infer(self, http: Request, name: str, version: str = "") -> Response:
        def refuse() -> Any:
            raise ApiError(400, f"HTTP end point {DECOUPLED}")

        return self._guarded(http, refuse, name, version)

    async def unknown(self, rest: str) -> Response:
        return refusal(ApiError(404, f"/v2/{rest}: this endpoint does not have it"))

    async def generate(self, http: Request, name: str, version: str = "") -> Response:
        async def work(found: dict[str, Any], visit: Visit) -> Response:
            self._contract.check(name, version)
            wanted = self._contract.of_json(found)
            answers = [outputs async for outputs in responses(self._service, visit, wanted)]
            if len(answers) != 1:
                raise ApiError(500, _NOT_ONE, kind="server_error")
            return Response(_json(self._contract.json_of(wanted, answers[0])), media_type="application/json")

        return await self._service.visit(http, "kserve", work, refusal)

    async def generate_stream(self, http: Request, name: str, version: str = "") -> Response:
        refuse: list[Callable[[ApiError], Response]] = [refusal]

        async def work(found: dict[str, Any], visit: Visit) -> Response:
            self._contract.check(name, version)
            wanted = self._contract.of_json(found)
            refuse[:] = [_refused_event]  # what the engine refuses comes as an event, though with a status of its own
            outputs = responses(self._service, visit, wanted)
            first = await anext(outputs, None)
            visit.facts["stream"] = True
            return EventStream(
                self._events(visit, wanted, first, outputs),
                deadline=visit.deadline,
                write_s=self._service.settings.timeouts.write_s,
                late=_event({"error": too_late().message}),
                on_end=lambda why: visit.end(200, why),
            )

        return await self._service.visit(http, "kserve", work, lambda error: refuse[0](error))

    async def _events(
        self, visit: Visit, wanted: Wanted, first: Mapping[str, Any] | None, rest: AsyncIterator[dict[str, Any]]
    ) -> AsyncGenerator[bytes, None]:
        try:
            if first is not None:
                yield _event(self._contract.json_of(wanted, first))
            async for outputs in rest:
                yield _event(self._contract.json_of(wanted, outputs))
        except (UpstreamError, ApiError) as error:
            visit.facts["error"] = str(error)
            told = error if isinstance(error, ApiError) else broken(f"the answer ends here: {error}")
            yield _event({"error": told.message})

    def _guarded(
        self, http: Request, answer: Callable[[], Any], name: str | None = None, version: str = ""
    ) -> Response:
        try:
            self._service.doorkeeper.admit(http.headers.get("authorization"))
            if name is not None:
                self._contract.check(name, version)
            return JSONResponse(answer())
        except ApiError as error:
            return refusal(error)


def _refused_event(error: ApiError) -> Response:
    return Response(_event({"error": error.message}), status_of(error), error.headers(), media_type="text/event-stream")


def _event(found: Mapping[str, Any]) -> bytes:
    return b"data: " + _json(found) + b"\n\n"


def _json(found: Mapping[str, Any]) -> bytes:
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
