"""A gateway in the test's own event loop, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import httpx
import uvicorn

from gateway.main import RequestIds, create_app
from gateway.server import guarded
from shared.settings import GatewaySettings


@contextlib.asynccontextmanager
async def serving(redis_url: str, **settings) -> AsyncIterator[httpx.AsyncClient]:
    """Run a gateway with these settings; gives a client of it."""
    listening = socket.create_server(("127.0.0.1", 0))  # held from here on: nobody else gets it
    port = listening.getsockname()[1]
    app = create_app(GatewaySettings(_env_file=None, redis_url=redis_url, port=port, **settings))
    config = uvicorn.Config(
        RequestIds(app),
        port=port,
        log_config=None,
        timeout_graceful_shutdown=1,
        http=guarded(app.state.services.settings),
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None
    task = asyncio.create_task(server.serve([listening]))
    while not server.started:
        assert not task.done()
        await asyncio.sleep(0.01)
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False)
    client.services = app.state.services
    client.routes = {*app.openapi()["paths"], "/", "/metrics", "/docs", "/openapi.json"}
    try:
        async with client:
            yield client
    finally:
        server.should_exit = True
        await task
