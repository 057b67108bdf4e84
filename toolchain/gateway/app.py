"""The doors: which path speaks how. FastAPI draws the schema (``/openapi.json``); bodies are checked in ``bodies``.

Two applications over one service: OpenAI's API, and FEDML's ``/predict``, which its users know on a port of its own; or
one application for both, where they have the same port.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from openai.types import Model as ModelObject
from starlette.exceptions import HTTPException

from toolchain import __version__
from toolchain.gateway import asking, page, schema
from toolchain.gateway.answers import Answer, Chat, Completion, Piece, PlainText, Predict, usage
from toolchain.gateway.bodies import Asked, ChatBody, CompletionBody, PredictBody, read_body
from toolchain.gateway.failures import ApiError, invalid
from toolchain.gateway.kv import drafts_of
from toolchain.gateway.metrics import CONTENT_TYPE
from toolchain.gateway.service import Service, error_response
from toolchain.gateway.settings import Model
from toolchain.gateway.status import Observer, Status
from toolchain.gateway.visit import Visit

EMPTY_INPUT = "The input is empty: send some text."
"""What ``/predict`` answers to an empty text; FEDML's own template has such a sentence too."""
_JSON_ACCEPTS = ("application/json", "*/*", "application/*", "text/event-stream")


def openai_app(service: Service) -> FastAPI:
    """``/v1/...``, ``/health``, ``/ready``, ``/status``, ``/metrics``, and the page at ``/``."""
    app = _app("scalellm gateway")
    _add_openai(app, service)
    _add_ready(app, service)
    return app


def predict_app(service: Service) -> FastAPI:
    """``/predict`` and ``/ready`` as FEDML's inference containers have them, and OpenAI's bodies at the paths of its
    newer ones.
    """
    app = _app("scalellm /predict")
    _add_predict(app, service)
    return app


def shared_app(service: Service) -> FastAPI:
    """Everything at one port; ``/ready`` is FEDML's there."""
    app = _app("scalellm endpoint")
    _add_openai(app, service)
    _add_predict(app, service)
    return app


def _add_openai(app: FastAPI, service: Service) -> None:
    _add_models(app, service)
    _add_state(app, service)
    _add_status(app, service)
    if service.settings.page:
        page.add(app)
    _add_kserve(app, service)
    doors, names = _Doors(service), service.model.names

    @app.post("/v1/chat/completions", openapi_extra=schema.body_of(ChatBody, names), responses=schema.CHAT)
    async def chat_completions(http: Request) -> Response:
        return await service.visit(http, "chat", doors.chat)

    @app.post("/v1/completions", openapi_extra=schema.body_of(CompletionBody, names), responses=schema.COMPLETION)
    async def completions(http: Request) -> Response:
        return await service.visit(http, "completions", doors.completion)


def _add_kserve(app: FastAPI, service: Service) -> None:
    if service.settings.kserve is None:
        return
    from toolchain.gateway import kserve
    from toolchain.gateway.kserve_contract import Contract

    kserve.add(app, service, Contract.read(service.settings.kserve))


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=schema.MODELS)
    async def models(http: Request) -> Response:
        return _guarded(service, http, lambda: {"object": "list", "data": _models(service.model)})

    @app.get("/v1/models/{name:path}", responses=schema.MODEL)
    async def model(http: Request, name: str) -> Response:
        def found() -> dict[str, Any]:
            check_model(name, service.model)
            return next(one for one in _models(service.model) if one["id"] == name)

        return _guarded(service, http, found)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses=schema.METRICS)
    async def metrics(http: Request) -> Response:
        try:
            service.doorkeeper.admit(http.headers.get("authorization"))
        except ApiError as error:
            return error_response(error)
        up = [triton.upstream for triton in service.pool.tritons if triton.up]
        drafts = {upstream.http_url: drafts_of(upstream.status_file) for upstream in up}
        return Response(service.metrics.text(await service.pool.metrics(), drafts), media_type=CONTENT_TYPE)


def _add_status(app: FastAPI, service: Service) -> None:
    observer = Observer(service)

    @app.get("/status", response_model=Status, responses={401: schema.FAILURES[401]})
    async def status(http: Request) -> Status | Response:
        try:
            service.doorkeeper.admit(http.headers.get("authorization"), counted=False)
        except ApiError as error:
            return error_response(error)
        return await observer.look()


def _add_ready(app: FastAPI, service: Service) -> None:
    @app.get("/ready", responses={503: {"description": "No Triton behind this gateway generates."}})
    async def ready() -> Response:
        if service.pool.ready:
            up = [name for name, reason in service.pool.states.items() if not reason]
            return JSONResponse({"status": "ready", "engines": up})
        why = {name: reason for name, reason in service.pool.states.items() if reason}
        return JSONResponse({"status": "not ready", "why": why}, 503)


def _add_predict(app: FastAPI, service: Service) -> None:
    doors = _Doors(service)

    @app.post("/predict", openapi_extra=schema.body_of(PredictBody, service.model.names), responses=schema.PREDICT)
    async def predict(http: Request) -> Response:
        return await service.visit(http, "predict", doors.predict)

    @app.post("/chat/completions", include_in_schema=False)
    async def unnamed_chat(http: Request) -> Response:
        return await service.visit(http, "chat", doors.unnamed_chat)

    @app.post("/completions", include_in_schema=False)
    async def unnamed_completions(http: Request) -> Response:
        return await service.visit(http, "completions", doors.unnamed_completion)

    @app.get("/ready", responses={202: {"description": "Still loading."}})
    async def ready() -> Response:
        if service.pool.ready:
            return JSONResponse({"status": "Success"})
        return JSONResponse({"status": "Loading"}, 202)


class _Doors:
    """What the paths do with a JSON body."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limits = service.settings.limits

    @property
    def _model(self) -> Model:
        return self._service.model

    async def chat(self, found: dict[str, Any], visit: Visit) -> Response:
        body = read_body(ChatBody, found)
        check_model(body.model, self._model)
        request = await asking.of_chat(body, self._model, self._limits)
        return await self._openai(visit, body, [request], Chat(replace(self._model, name=body.model)))

    async def completion(self, found: dict[str, Any], visit: Visit) -> Response:
        body = read_body(CompletionBody, found)
        check_model(body.model, self._model)
        requests = asking.of_completion(body, self._model, self._limits)
        return await self._openai(visit, body, requests, Completion(replace(self._model, name=body.model)))

    async def unnamed_chat(self, found: dict[str, Any], visit: Visit) -> Response:
        return await self.chat({"model": self._model.name, **found}, visit)

    async def unnamed_completion(self, found: dict[str, Any], visit: Visit) -> Response:
        return await self.completion({"model": self._model.name, **found}, visit)

    async def predict(self, found: dict[str, Any], visit: Visit) -> Response:
        """FEDML's classic body; the newer ones are OpenAI's, where the model need not be named."""
        if "messages" in found:
            return await self.unnamed_chat(found, visit)
        if "prompt" in found:
            return await self.unnamed_completion(found, visit)
        body = read_body(PredictBody, found)
        check_model(body.model or self._model.name, self._model)
        as_file = visit.http.headers.get("accept", "*/*").split(",")[0].split(";")[0].strip() not in _JSON_ACCEPTS
        shape = PlainText() if as_file else Predict(as_repr=self._service.settings.fedml_compat == "repr")
        if not body.text.strip():
            return self._empty(shape, as_file, streamed=bool(body.stream))
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
    def _empty(shape: Predict, as_file: bool, *, streamed: bool) -> Response:
        if streamed and not as_file:
            told = shape.piece(Piece(0, EMPTY_INPUT)) + shape.closing(None)
            return Response(told, media_type="text/event-stream")
        answers = [Answer(EMPTY_INPUT)]
        media_type = "text/plain; charset=utf-8" if as_file else "application/json"
        return Response(shape.whole(answers, usage(answers)), media_type=media_type)


def check_model(name: str, model: Model) -> None:
    """Raises ApiError (404) for a name that is neither the model's nor one of its adapters'."""
    if name not in model.names:
        raise ApiError(
            404,
            f"the model {name!r} does not exist here; this server has {', '.join(map(repr, model.names))}",
            param="model",
            code="model_not_found",
        )


def _models(model: Model) -> list[dict[str, Any]]:
    """The model, and each of its adapters."""
    found = [ModelObject(id=name, created=model.created, object="model", owned_by="scalellm") for name in model.names]
    return [one.model_dump(exclude_unset=True) for one in found]


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
