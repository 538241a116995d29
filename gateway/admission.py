"""What is let in: the size of a body, and whether a model is there to answer."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgspec

from shared.errors import UnbrokenError

if TYPE_CHECKING:
    from starlette.requests import Request

    from shared.fleet import Fleet, WorkerInfo

CACHE_SECONDS = 0.5
RETRY_SECONDS = 5


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """Read a request's body, chunked or not.

    Raises:
        UnbrokenError: `request_too_large`, as soon as more than `limit` bytes are known of;
            `request_timeout`, where it has not come within `seconds`.
    """
    try:
        return await asyncio.wait_for(_read_body(request, limit), seconds)
    except asyncio.TimeoutError:
        raise UnbrokenError("request_timeout", "The request body came too slowly.") from None


async def _read_body(request: Request, limit: int) -> bytes:
    error = UnbrokenError("request_too_large", f"The request body exceeds {limit} bytes.")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise error
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise error
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """Parse a body.

    Raises:
        UnbrokenError: `invalid_request`, where it is no JSON.
    """
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise UnbrokenError("invalid_request", "The request body is not valid JSON.") from None


class ReadyModels:
    """The gateway's view of the fleet, at most half a second old."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._workers: list[WorkerInfo] = []
        self._read_at = float("-inf")

    async def workers(self) -> list[WorkerInfo]:
        """Return the live workers in any state."""
        if time.monotonic() - self._read_at > CACHE_SECONDS:
            self._workers = await self._fleet.live()
            self._read_at = time.monotonic()
        return self._workers

    async def ready(self) -> list[WorkerInfo]:
        """Return the workers that serve a model, one for each model, the oldest first.

        Raises:
            UnbrokenError: `model_not_ready`, with the reason that the workers give.
        """
        return [workers[0] for workers in await self.serving()]

    async def serving(self) -> list[list[WorkerInfo]]:
        """Return all workers that are ready, those of one model together, the oldest first.

        Raises:
            UnbrokenError: `model_not_ready`, with the reason that the workers give.
        """
        workers = await self.workers()
        models: dict[str, list[WorkerInfo]] = {}
        for worker in sorted(workers, key=lambda w: (w.since, w.id)):
            if worker.state == "ready":
                models.setdefault(worker.model, []).append(worker)
        if models:
            return list(models.values())
        raise UnbrokenError("model_not_ready", _why(workers), retry_after=RETRY_SECONDS)


def _why(workers: list[WorkerInfo]) -> str:
    """Say why no worker serves: one that still loads gives more hope than one that failed."""
    for worker in workers:
        if worker.state == "loading":
            return f"The model is not ready yet: {worker.reason}."
    for worker in workers:
        if worker.state == "failed":
            return f"The model could not be loaded: {worker.reason}"
    return "No worker is running."
