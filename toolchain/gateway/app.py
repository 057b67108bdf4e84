"""The doors: which path speaks how. FastAPI draws the schema (``/openapi.json``); bodies are checked in ``bodies``.

Two applications over one service: OpenAI's API, and FEDML's ``/predict``, which its users know on a port of its own.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from openai.types import Model as ModelObject
from starlette.exceptions import HTTPException

from toolchain import __version__
from toolchain.gateway import asking
from toolchain.gateway.answers import Answer, Chat, Completion, PlainText, Predict, usage
from toolchain.gateway.bodies import Asked, ChatBody, CompletionBody, PredictBody, read_body
from toolchain.gateway.failures import ApiError, invalid
from toolchain.gateway.metrics import CONTENT_TYPE
from toolchain.gateway.service import Service, error_response
from toolchain.gateway.settings import Model
from toolchain.gateway.visit import Visit

EMPTY_INPUT = "The input is empty: send some text."
"""What ``/predict`` answers to an empty text; FEDML's own template has such a sentence too."""
_JSON_ACCEPTS = ("application/json", "*/*", "application/*", "text/event-stream")


def openai_app(service: Service) -> FastAPI:
    """``/v1/...``, ``/health``, ``/ready``, ``/metrics``."""
    app = _app("scalellm gateway")
    _add_models(app, service)
    _add_state(app, service)
    doors = _Doors(service)

    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatBody, service), responses=_FAILURES)
    async def chat_completions(http: Request) -> Response:
        return await service.visit(http, "chat", doors.chat)

    @app.post("/v1/completions", openapi_extra=_takes(CompletionBody, service), responses=_FAILURES)
    async def completions(http: Request) -> Response:
        return await service.visit(http, "completions", doors.completion)

    return app


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models(http: Request) -> Response:
        return _guarded(service, http, lambda: {"object": "list", "data": [_model(service.settings.model)]})

    @app.get("/v1/models/{name:path}", responses=_FAILURES)
    async def model(http: Request, name: str) -> Response:
        def found() -> dict[str, Any]:
            check_model(name, service.settings.model)
            return _model(service.settings.model)

        return _guarded(service, http, found)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "No Triton behind this gateway generates."}})
    async def ready() -> Response:
        if service.pool.ready:
            return JSONResponse({"status": "ready"})
        why = {triton.upstream.http_url: triton.why_down for triton in service.pool.tritons}
        return JSONResponse({"status": "not ready", "why": why}, 503)

    @app.get("/metrics")
    async def metrics(http: Request) -> Response:
        try:
            service.doorkeeper.admit(http.headers.get("authorization"))
        except ApiError as error:
            return error_response(error)
        tritons = service.pool.tritons
        texts = await asyncio.gather(*(triton.metrics() for triton in tritons))
        urls = [triton.upstream.http_url for triton in tritons]
        return Response(service.metrics.text(dict(zip(urls, texts, strict=True))), media_type=CONTENT_TYPE)


def predict_app(service: Service) -> FastAPI:
    """``/predict`` and ``/ready`` as FEDML's inference containers have them."""
    app = _app("scalellm /predict")
    doors = _Doors(service)

    @app.post("/predict", openapi_extra=_takes(PredictBody, service), responses=_FAILURES)
    async def predict(http: Request) -> Response:
        return await service.visit(http, "predict", doors.predict)

    @app.get("/ready", responses={202: {"description": "Still loading."}})
    async def ready() -> Response:
        if service.pool.ready:
            return JSONResponse({"status": "Success"})
        return JSONResponse({"status": "Loading"}, 202)

    return app


class _Doors:
    """What the paths do with a JSON body."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._model, self._limits = service.settings.model, service.settings.limits

    async def chat(self, found: dict[str, Any], visit: Visit) -> Response:
        body = read_body(ChatBody, found)
        check_model(body.model, self._model)
        request = await asking.of_chat(body, self._model, self._limits)
        return await self._openai(visit, body, [request], Chat(self._model))

    async def completion(self, found: dict[str, Any], visit: Visit) -> Response:
        body = read_body(CompletionBody, found)
        check_model(body.model, self._model)
        requests = asking.of_completion(body, self._model, self._limits)
        return await self._openai(visit, body, requests, Completion(self._model))

    async def predict(self, found: dict[str, Any], visit: Visit) -> Response:
        """FEDML's classic body; the newer ones are OpenAI's, where the model need not be named."""
        if "messages" in found:
            return await self.chat({"model": self._model.name, **found}, visit)
        if "prompt" in found:
            return await self.completion({"model": self._model.name, **found}, visit)
        body = read_body(PredictBody, found)
        as_file = visit.http.headers.get("accept", "*/*").split(",")[0].split(";")[0].strip() not in _JSON_ACCEPTS
        shape = PlainText() if as_file else Predict(as_repr=self._service.settings.fedml_compat == "repr")
        if not body.text.strip():
            return self._empty(shape, as_file)
        request = await asking.of_predict(body, self._model, self._limits)
        if body.stream and not as_file:
            return await self._service.stream(visit, [request], shape)
        if not as_file:
            return await self._service.whole(visit, [request], shape)
        response = await self._service.whole(visit, [request], shape, "text/plain; charset=utf-8")
        response.headers["Content-Disposition"] = 'attachment; filename="generated.txt"'
        return response

    async def _openai(
        self, visit: Visit, body: Asked, requests: list[asking.Request], shape: Chat | Completion
    ) -> Response:
        options = body.stream_options
        if not body.stream:
            if options is not None:
                raise invalid("stream_options: only together with stream", "stream_options")
            return await self._service.whole(visit, requests, shape)
        include_usage = bool(options and options.include_usage)
        return await self._service.stream(visit, requests, shape, include_usage=include_usage)

    @staticmethod
    def _empty(shape: Predict, as_file: bool) -> Response:
        answers = [Answer(EMPTY_INPUT)]
        media_type = "text/plain; charset=utf-8" if as_file else "application/json"
        return Response(shape.whole(answers, usage(answers)), media_type=media_type)


def check_model(name: str, model: Model) -> None:
    """Raises ApiError (404) for another model's name."""
    if name != model.name:
        raise ApiError(
            404,
            f"the model {name!r} does not exist here; this server has {model.name!r}",
            param="model",
            code="model_not_found",
        )


def _model(model: Model) -> dict[str, Any]:
    found = ModelObject(id=model.name, created=model.created, object="model", owned_by="scalellm")
    return found.model_dump(exclude_unset=True)


def _guarded(service: Service, http: Request, answer: Any) -> Response:
    try:
        service.doorkeeper.admit(http.headers.get("authorization"))
        return JSONResponse(answer())
    except ApiError as error:
        return error_response(error)


def _app(title: str) -> FastAPI:
    app = FastAPI(title=title, version=__version__, docs_url=None, redoc_url=None)

    async def refuse(_http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = {404: "there is no such path here", 405: "this path does not take this method"}
        return error_response(ApiError(error.status_code, text.get(error.status_code, str(error.detail))))

    app.add_exception_handler(HTTPException, refuse)
    return app


def _takes(body: type[Any], service: Service) -> dict[str, Any]:
    """The request's schema, for ``/openapi.json``: the body itself is read by us, whatever its Content-Type says."""
    schema = body.model_json_schema()
    if "model" in schema["properties"]:
        schema["properties"]["model"]["enum"] = [service.settings.model.name]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema)}}}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references, since each path has a schema of its own."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(one) for one in node]
        if not isinstance(node, dict):
            return node
        reference = node.get("$ref", "")
        if reference.startswith("#/$defs/"):
            return resolve(definitions[reference.removeprefix("#/$defs/")])
        return {name: resolve(value) for name, value in node.items()}

    return dict(resolve(schema))


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
    for status, text in {
        400: "The request is wrong, or asks for what is not supported.",
        401: "No valid API key.",
        403: "Asked by a page of another site.",
        404: "No such model.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        429: "Too many requests.",
        502: "The engine's server failed at this request.",
        503: "No engine is there to answer.",
        504: "The request took too long.",
    }.items()
}
