"""The gateway's composition root: app factory, lifespan, error answers, request ids."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import sys
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from gateway import chat, health, meter, page, responses, sessions
from gateway.admission import ReadyModels
from gateway.auth import Authenticator
from gateway.connection import SERVER_SEND
from gateway.drain import Drain
from gateway.history import ArchiveThread, History
from gateway.limits import RateLimits
from gateway.relay import Relay
from gateway.server import guarded
from gateway.state import Services
from gateway.upkeep import Archiver, Upkeep
from shared import logs, metrics
from shared.archive import hold_seconds
from shared.errors import UnbrokenError
from shared.fleet import Fleet
from shared.overdue import Overdue
from shared.presence import Presence, Sweeper
from shared.queue import SessionQueue
from shared.settings import GatewaySettings
from shared.store import LOST, UNAVAILABLE, Store, connect

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("unbroken.gateway")

RETRY_SECONDS = 2
LAST_SECONDS = 2
"""What the last answers may take after the drain time."""


class RequestIds:
    """ASGI middleware around everything: each answer bears `x-request-id`, each log line too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = logs.new_request_id()
        logs.request_id.set(request_id)
        measured = meter.RequestMeter()
        meter.current.set(measured)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-gateway-id"] = page.GATEWAY_ID
            measured.sent(message)
            await send(message)

        scope[SERVER_SEND] = send
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            del scope[SERVER_SEND]  # a cycle: the server's `send` knows the scope
            measured.end(scope)


def _answer(error: UnbrokenError) -> JSONResponse:
    metrics.ERRORS.labels(error.code).inc()
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    if error.kind.status == 409:  # the SDKs try these again by themselves, to no avail
        headers["x-should-retry"] = "false"
    return JSONResponse(error.body(), status_code=error.kind.status, headers=headers)


async def _on_unbroken(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UnbrokenError)  # noqa: S101 - registered for this class
    return _answer(error)


async def _on_left(_request: Request, _error: Exception) -> Response:
    """Take note that the client left while it sent its body: nobody reads this."""
    return Response(status_code=499)


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
    kept, archived = settings.sessions_ttl_seconds, settings.persist_sessions
    presence = Presence(store, watch_ms=watch_ms)
    queue = SessionQueue(
        store,
        kept_seconds=hold_seconds(kept) if archived else kept,
        watch_ms=watch_ms,
        archived=archived,
    )
    threads = [ArchiveThread(settings.sessions_db_path) for _ in range(2 if archived else 0)]
    history = History(store, threads[0] if archived else None)
    archiver = None
    if archived:
        archive_seconds = settings.archive_ttl_seconds
        archiver = Archiver(store, threads[1], kept_seconds=kept, archive_seconds=archive_seconds)
    models = ReadyModels(Fleet(store))
    return Services(
        settings=settings,
        store=store,
        auth=Authenticator(settings.api_keys, settings.api_keys_file),
        log=history,
        presence=presence,
        queue=queue,
        relay=Relay(bell, history, presence),
        models=models,
        upkeep=Upkeep(
            Sweeper(store, queue, presence),
            Overdue(queue, settings.queue_timeout_seconds),
            archiver,
            tuple(threads),
        ),
        drain=Drain(settings.drain_seconds),
        probe=meter.Probe(store, queue, models),
        limits=RateLimits(store),
    )


def allow_origins(app: FastAPI, origins: str) -> None:
    """Let pages of these origins call; headers are free, since a page knows no key of ours."""
    allowed = [origin.strip().rstrip("/") for origin in origins.split(",") if origin.strip()]
    if allowed:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Session-Id", "Last-Event-ID", "X-Request-Id", "Retry-After"],
            max_age=600,
        )


def tune_garbage_collection() -> None:
    """Keep the collector's pauses out of the streams' latency.

    What start-up made lives as long as the process: it is never looked at again. The young are
    looked at in portions of a millisecond. A pass over all objects takes as long as hundreds of
    events; it is due after some 15,000 streams, whose cyclic garbage is about 20 MB by then.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000, 5, 600)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    log.info("startup", extra={"host": services.settings.host, "port": services.settings.port})
    if services.auth.is_open:
        log.warning("no API keys are set: whoever reaches this address may use it")
    services.relay.start()
    services.upkeep.start()
    yield
    await services.upkeep.close()
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
    allow_origins(app, settings.cors_origins)
    for module in (chat, responses, sessions, health, meter, page):
        app.include_router(module.router)
    app.add_exception_handler(UnbrokenError, _on_unbroken)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_left)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    for kind in UNAVAILABLE:
        app.add_exception_handler(kind, _on_unavailable)
    app.add_exception_handler(Exception, _on_bug)
    return app


class Server(uvicorn.Server):
    """uvicorn, whose shutdown begins with leaving the clients: see `gateway.drain`."""

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, leave the clients, and end."""
        self._drain.begin()
        await super().shutdown(sockets)


def main() -> None:
    """Serve HTTP as this process, on asyncio's own event loop whatever else is installed."""
    settings = GatewaySettings()
    logs.configure(settings.log_level)
    app = create_app(settings)
    tune_garbage_collection()
    config = uvicorn.Config(
        RequestIds(app),
        loop="asyncio",
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds) + LAST_SECONDS,
        http=guarded(settings),
        server_header=False,
    )
    services: Services = app.state.services
    server = Server(config, services.drain)
    with contextlib.suppress(KeyboardInterrupt):  # the signal that ended it, raised again
        server.run()
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    main()
