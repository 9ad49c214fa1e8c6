"""The HTTP application: routes, errors in OpenAI's shape, limits."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from sinkstream import __version__
from sinkstream.serve import completions, responses, session_routes
from sinkstream.serve.access import BodyLimit, Keys
from sinkstream.serve.errors import INTERNAL, APIError, invalid
from sinkstream.serve.http import Owner, Served, check_host
from sinkstream.serve.schemas import ErrorBody, HealthBody, TokenizeRequest
from sinkstream.serve.service import MB, Service, model_name

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"

log = logging.getLogger(__name__)


def create_app(service: Service, keys: Sequence[str] = (), hosts: Sequence[str] | None = LOOPBACK) -> FastAPI:
    """The application of a service, which is started and stopped with it.

    Parameters
    ----------
    keys : sequence of str
        API keys that are accepted; none: no key is asked for.
    hosts : sequence of str or None
        Names of the server in the Host header, so that no web page reaches it under a name of its own; None: any.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(
        title="sinkstream",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(check_host)],
        responses={code: {"model": ErrorBody, "description": "OpenAI's error object"} for code in ("4XX", "5XX")},
    )
    app.state.service, app.state.keys, app.state.hosts = service, Keys(keys, service.settings.rate), hosts
    app.add_middleware(BodyLimit, limit=service.settings.body_mb * MB)
    app.include_router(completions.router)
    app.include_router(responses.router)
    app.include_router(session_routes.router)
    _add_plain_routes(app)
    _add_errors(app)
    return app


def _add_plain_routes(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """A page to talk, which asks nobody but this server."""
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=HealthBody, responses={503: {"model": HealthBody, "description": "not healthy"}})
    def health(service: Served, require: Literal["any", "all"] = "any") -> Response:
        """Whether requests are answered: by a replica, or, where all are required, by as many as there should be."""
        found = service.health()
        return JSONResponse(found.body(), status_code=found.code(require))

    @app.get("/v1/models")
    async def models(who: Owner, service: Served) -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, who: Owner, service: Served) -> dict[str, Any]:
        """The model of this name."""
        if name != model_name(service.loaded):
            raise APIError(404, f"model {name!r} is not known", code="model_not_found", param="model")
        return _model(service)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, who: Owner, service: Served) -> dict[str, Any]:
        """Token ids of a text, or of messages as the chat template writes them."""
        if (body.text is None) == (body.messages is None):
            raise invalid("give either text or messages", "text")
        tokenizer = service.loaded.tokenizer
        assert tokenizer is not None, "a service has a tokenizer"
        if body.messages is not None:
            text = service.template.render([m.plain() for m in body.messages], reply=True)
            ids = service.template.encode(text)
        else:
            ids = tokenizer(body.text, add_special_tokens=body.add_special_tokens)["input_ids"]
        return {"tokens": ids, "count": len(ids), "cap": service.settings.cap}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics(who: Owner, service: Served) -> Response:
        """Figures for Prometheus."""
        return Response(service.figures(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": model_name(service.loaded),
        "object": "model",
        "created": service.started,
        "owned_by": "sinkstream",
        "cap": service.settings.cap,
    }


def _furthest(errors: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Place and message of the first error; of a field of several types, what is wrong with the type that fits best."""
    if errors[0]["type"] == "json_invalid":
        return "", errors[0]["msg"]
    places = [[str(part) for part in error["loc"] if not _is_type(part)] for error in errors]
    same = [i for i, place in enumerate(places) if place[: len(places[0])] == places[0]]
    best = max(same, key=lambda i: len(places[i]))
    return ".".join(places[best]), errors[best]["msg"]


def _is_type(part: str | int) -> bool:
    """Whether a part of an error's place names a type of several and not a field."""
    return part == "body" or (isinstance(part, str) and (part.removeprefix("constrained-") == "str" or "[" in part))


def _add_errors(app: FastAPI) -> None:
    def response(error: APIError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> JSONResponse:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def wrong_body(request: Request, error: RequestValidationError) -> JSONResponse:
        place, said = _furthest(error.errors())
        message = f"{place or 'the body'}: {said}"
        return response(invalid(message, place or None, "invalid_request"))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
        found = APIError(error.status_code, str(error.detail), code=codes.get(error.status_code, "http_error"))
        return JSONResponse(found.body(), status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return response(APIError(500, INTERNAL, code="internal_error"))
