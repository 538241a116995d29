"""What the gateway measures: requests, first tokens, resumes; and `GET /metrics`.

Nothing here runs once per token: streams are measured at their first event and at their end.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from shared import metrics
from shared.store import FAILED

if TYPE_CHECKING:
    from starlette.types import Message, Scope

    from gateway.admission import ReadyModels
    from gateway.state import Services
    from shared.queue import SessionQueue
    from shared.store import Store

router = APIRouter()

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
STATES = ("loading", "ready", "failed", "draining")
PROBE_SECONDS = 1.0
"""How long a scrape waits for Redis."""


class RequestMeter:
    """Measures one HTTP request, and the generation that it begins, if any."""

    __slots__ = ("_began", "_model", "_session_id", "_status", "_whole")

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._status, self._whole = 0, False
        self._model = self._session_id = ""

    def sent(self, message: Message) -> None:
        """Look at a message of the answer; a stream's events do not come by here."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
        else:
            self._whole = not message.get("more_body", False)

    def begins(self, session_id: str, model: str) -> None:
        """Note that the request has begun a session."""
        self._session_id, self._model = session_id, model
        _awaited[session_id] = self

    def first_token(self) -> None:
        """Note that the session's first text has come."""
        seconds = time.monotonic() - self._began
        metrics.TIME_TO_FIRST_TOKEN.labels(self._model).observe(seconds)

    def end(self, scope: Scope) -> None:
        """Note the end of the request."""
        seconds = time.monotonic() - self._began
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        metrics.HTTP_SECONDS.labels(method, route, str(self._status)).observe(seconds)
        if self._session_id:
            _awaited.pop(self._session_id, None)
            if self._whole and self._status == 200:
                metrics.E2E_LATENCY.labels(self._model).observe(seconds)


current: contextvars.ContextVar[RequestMeter | None] = contextvars.ContextVar("meter", default=None)
_awaited: dict[str, RequestMeter] = {}  # sessions whose first token is still to come


def submitted(outcome: str, session_id: str, model: str) -> None:
    """Note how a submission of the current request came out."""
    if outcome == "attached":
        metrics.RESUMES.labels("attach").inc()
    elif outcome == "created" and (meter := current.get()) is not None:
        meter.begins(session_id, model)


def resumed() -> None:
    """Note that a stream goes on behind an event that its client has."""
    metrics.RESUMES.labels("resume").inc()


def delivered(session_id: str, first: int, count: int) -> None:
    """Note that events `first`, … were rendered; cheap, and of use for the first tokens only."""
    if first <= 1 < first + count and (meter := _awaited.pop(session_id, None)) is not None:
        meter.first_token()


def burst(since: float, events: int) -> None:
    """Note that the hub has handed out events that came, or were asked for, at a monotonic time."""
    metrics.RELAY_LAG.observe(time.monotonic() - since)
    metrics.RELAY_EVENTS.inc(events)


@router.get("/metrics", include_in_schema=False)
async def exposition(request: Request) -> Response:
    """Return all metrics of this process in Prometheus' text format."""
    services: Services = request.app.state.services
    await services.probe.look()
    metrics.FOLLOWED.set(services.relay.followed)
    return Response(generate_latest(metrics.GATEWAY), media_type=CONTENT_TYPE_LATEST)


class Probe:
    """Asks Redis for what all gateways share, when somebody scrapes; one question at a time."""

    def __init__(self, store: Store, queue: SessionQueue, models: ReadyModels) -> None:
        self._redis, self._queue, self._models = store.redis, queue, models
        self._asking: asyncio.Task[None] | None = None

    async def look(self) -> None:
        """Refresh the shared gauges; without an answer in time they say that there is none."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(), name="probe")
        await asyncio.wait({self._asking}, timeout=PROBE_SECONDS)
        if not self._asking.done():
            _nothing_known()

    async def _ask(self) -> None:
        began = time.monotonic()
        try:
            depth = await self._queue.depth()
            metrics.REDIS_SECONDS.labels("ping").observe(time.monotonic() - began)
            live = await self._models.workers()
            memory: dict[str, float] = await self._redis.info("memory")
        except FAILED:
            _nothing_known()
            return
        metrics.REDIS_UP.set(1)
        metrics.QUEUE_DEPTH.set(depth)
        metrics.REDIS_MEMORY.set(memory["used_memory"])
        metrics.REDIS_MEMORY_LIMIT.set(memory["maxmemory"])
        for state in STATES:
            metrics.WORKERS.labels(state).set(sum(w.state == state for w in live))


def _nothing_known() -> None:
    metrics.REDIS_UP.set(0)
    for gauge in (metrics.QUEUE_DEPTH, metrics.REDIS_MEMORY, metrics.REDIS_MEMORY_LIMIT):
        gauge.set(math.nan)
    for state in STATES:
        metrics.WORKERS.labels(state).set(math.nan)
