"""Sessions beside their chat: look at one, fetch its completion, follow it, cancel it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway import meter, signing, sse
from gateway.auth import OPEN
from gateway.chat import _stream, answer_whole, check_place, cursor_of, owned_record
from gateway.patience import patiently
from gateway.render import failure, usage_json
from shared.errors import UnbrokenError
from shared.protocol import Failed, Finished, decode_event
from shared.store import UNAVAILABLE

if TYPE_CHECKING:
    from gateway.sse import Cursor
    from gateway.state import Services
    from shared.session_log import SessionRecord

log = logging.getLogger("unbroken.sessions")
router = APIRouter()

COME_BACK = b": unavailable for now\nretry: 2000\n"
"""For an EventSource, which gives up for ever on any status but 200: it comes back."""


@router.post("/v1/cancel/{session_id}")
async def cancel(session_id: str, request: Request) -> dict[str, str]:
    """Cancel a session, queued or running, from any gateway; repeating it changes nothing."""
    services: Services = request.app.state.services
    owner = services.auth.owner(request)
    status: str = "missing"
    if sse.SESSION_ID.fullmatch(session_id):
        status = await services.queue.cancel(session_id, owner, "requested")
    if status == "missing":
        archived = await owned_record(services, session_id, owner)
        status = archived.status
    log.info("cancel requested", extra={"session": session_id, "status": status})
    return {"session_id": session_id, "status": status}


@router.get("/v1/sessions/{session_id}")
async def session(session_id: str, request: Request) -> dict[str, Any]:
    """Tell a session's status, times (Unix seconds), usage, last index and place in the queue."""
    services: Services = request.app.state.services
    record = await owned_record(services, session_id, services.auth.owner(request))
    waits = record.status == "queued"
    return {
        "session_id": session_id,
        "object": "session",
        "status": record.status,
        "model": record.model,
        "created": record.created,
        "started": record.started,
        "ended": record.ended,
        "last_index": record.last,
        "worker": record.worker,
        "queue_position": await services.queue.position(session_id) if waits else None,
        "usage": usage_json(record.usage) if record.usage else None,
        "exact": record.exact,
        "takeovers": record.takeovers,
        **await _how_it_ended(services, session_id, record),
    }


async def _how_it_ended(
    services: Services, session_id: str, record: SessionRecord
) -> dict[str, Any]:
    """Return why a session was cancelled, and how it failed, as its last event says."""
    reason = error = None
    if record.status in ("cancelled", "failed"):
        for entry in await services.log.read(session_id, record.last - 1, count=1):
            event = decode_event(entry.data)
            if isinstance(event, Finished):
                reason = event.cancelled
            elif isinstance(event, Failed):
                error = failure(event).body()["error"]
    return {"cancel_reason": reason, "error": error}


@router.get("/v1/chat/completions/{session_id}")
async def retrieve(session_id: str, request: Request) -> Response:
    """Return a session's whole completion once it ended, or the error it failed with."""
    services: Services = request.app.state.services
    record = await owned_record(services, session_id, services.auth.owner(request))
    if not record.has_ended:
        raise UnbrokenError("in_progress", f"The session is {record.status}.", "session_id")
    return await answer_whole(request, session_id, record)


@router.get("/v1/sessions/{session_id}/events")
async def events(session_id: str, request: Request) -> Response:
    """Stream a session to an `EventSource`: from its start, or from behind the last event seen.

    204, which ends its reconnecting, once it has seen the last event.
    """
    services: Services = request.app.state.services
    cursor = cursor_of(request)
    if cursor and cursor.session_id != session_id:
        raise UnbrokenError("invalid_value", "Last-Event-ID is another session's.", "Last-Event-ID")
    try:

        async def answer() -> Response:
            owner = await _reader(services, session_id, request)
            return await _events(services, owner, session_id, cursor)

        return await (patiently(answer) if cursor else answer())
    except Exception as error:
        passing = getattr(error, "code", None) == "unavailable" or isinstance(error, UNAVAILABLE)
        if not passing or request.headers.get("accept") != "text/event-stream":
            raise
        return Response(COME_BACK, headers=sse.HEADERS)


async def _reader(services: Services, session_id: str, request: Request) -> str:
    """Return whose sessions the caller may read: by key, or by the URL's signature."""
    query = request.query_params
    if "signature" not in query:
        return services.auth.owner(request)
    known = sse.SESSION_ID.fullmatch(session_id)
    record = await services.log.record(session_id) if known else None
    owner = None if record is None else record.owner
    secret = services.settings.stream_url_secret
    signing.check(secret, owner, session_id, query.get("expires", ""), query["signature"])
    return owner or OPEN


@router.post("/v1/sessions/{session_id}/stream_url")
async def stream_url(session_id: str, request: Request) -> dict[str, str | int]:
    """Give a URL under which this session's events can be read without a key, for a while."""
    services: Services = request.app.state.services
    owner = services.auth.owner(request)
    await owned_record(services, session_id, owner)
    secret = services.settings.stream_url_secret
    if not secret:
        raise UnbrokenError("not_found", "This server signs no stream URLs.")
    expires = int(time.time()) + services.settings.stream_url_ttl_seconds
    return {"url": signing.stream_url(secret, owner, session_id, expires), "expires": expires}


async def _events(
    services: Services, owner: str, session_id: str, cursor: Cursor | None
) -> Response:
    record = await owned_record(services, session_id, owner)
    after = cursor.index if cursor else -1
    if record.has_ended and after == record.last:
        return Response(status_code=204, headers={"x-session-id": session_id})
    record = await check_place(services, session_id, record, after)
    if cursor:
        meter.resumed()
    return _stream(services, session_id, record, after=after, include_usage=record.include_usage)
