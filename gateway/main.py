"""The gateway's composition root: app factory, lifespan, error answers, request ids."""

from __future__ import annotations

import contextlib
import logging
import secrets
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from gateway import chat, health, sessions
from gateway.admission import ReadyModels
from gateway.auth import Authenticator
from gateway.relay import Relay
from gateway.state import Services
from shared import logs
from shared.errors import UnbrokenError
from shared.fleet import Fleet
from shared.presence import Presence
from shared.queue import SessionQueue
from shared.session_log import SessionLog
from shared.settings import GatewaySettings
from shared.store import LOST, UNAVAILABLE, Store, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("unbroken.gateway")

RETRY_SECONDS = 2
GRACE_SECONDS = 5


class RequestIds:
    """ASGI middleware around everything: each answer bears `x-request-id`, each log line too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        logs.request_id.set(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def _answer(error: UnbrokenError) -> JSONResponse:
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else None
    return JSONResponse(error.body(), status_code=error.kind.status, headers=headers)


async def _on_unbroken(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UnbrokenError)  # noqa: S101 - registered for this class
    return _answer(error)


async def _on_http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class
    codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
    code = codes.get(error.status_code, "invalid_request")
    answer = _answer(UnbrokenError(code, str(error.detail)))
    answer.headers.update(error.headers or {})
    return answer


async def _on_invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for this class
    first = error.errors()[0]
    return _answer(UnbrokenError("invalid_value", str(first["msg"]), str(first["loc"][-1])))


async def _on_unavailable(_request: Request, error: Exception) -> JSONResponse:
    log.warning("redis unavailable", extra={"error": type(error).__name__})
    message = (
        "The store is unavailable for now." if isinstance(error, LOST) else "The store is full."
    )
    return _answer(UnbrokenError("unavailable", message, retry_after=RETRY_SECONDS))


async def _on_bug(_request: Request, _error: Exception) -> JSONResponse:
    return _answer(UnbrokenError("internal_error", "The server failed unexpectedly."))


def make_services(settings: GatewaySettings) -> Services:
    """Make the gateway's parts; nothing connects yet."""
    store, bell = Store(connect(settings.redis_url)), Store(connect(settings.redis_url))
    watch_ms = int(settings.cancel_after_disconnect_seconds * 1000)
    session_log = SessionLog(store)
    return Services(
        settings=settings,
        store=store,
        auth=Authenticator(settings.api_keys),
        log=session_log,
        queue=SessionQueue(store, kept_seconds=settings.sessions_ttl_seconds, watch_ms=watch_ms),
        relay=Relay(store, bell, session_log, Presence(store, watch_ms=watch_ms)),
        models=ReadyModels(Fleet(store)),
    )


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    log.info("startup", extra={"port": services.settings.port})
    if services.auth.is_open:
        log.warning("no API keys are set: whoever reaches this address may use it")
    services.relay.start()
    yield
    await services.relay.close()
    await services.store.close()
    log.info("stopped")


def create_app(settings: GatewaySettings) -> FastAPI:
    """Make the FastAPI application; its services stand in `app.state.services`."""
    app = FastAPI(
        title="Unbroken",
        description="OpenAI-compatible chat streams that never break.",
        lifespan=_lifespan,
    )
    app.state.services = make_services(settings)
    for module in (chat, sessions, health):
        app.include_router(module.router)
    app.add_exception_handler(UnbrokenError, _on_unbroken)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    for kind in UNAVAILABLE:
        app.add_exception_handler(kind, _on_unavailable)
    app.add_exception_handler(Exception, _on_bug)
    return app


def main() -> None:
    """Serve HTTP as this process."""
    settings = GatewaySettings()
    logs.configure(settings.log_level)
    uvicorn.run(
        RequestIds(create_app(settings)),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
    )


if __name__ == "__main__":
    main()
