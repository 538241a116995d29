"""`POST /v1/chat/completions`: a new generation, an attached or a resumed one; streaming or not."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from gateway import meter, sse
from gateway.admission import parse_json, read_body
from gateway.channel import Viewer
from gateway.openai import ChatCompletionRequest, ChatRequest, parse_chat
from gateway.patience import patiently, reached
from gateway.render import ChunkRenderer, CompletionBuilder
from gateway.submission import NOT_FOUND, chosen_id, say_watched, submit
from shared import metrics
from shared.errors import UnbrokenError, invalid
from shared.protocol import decode_event

if TYPE_CHECKING:
    from gateway.connection import Connection
    from gateway.sse import Cursor
    from gateway.state import Services
    from shared.session_log import SessionRecord

log = logging.getLogger("unbroken.chat")
router = APIRouter()

PARSE_IN_THREAD_BYTES = 2**18

_BODY_DOC = {
    "requestBody": {
        "content": {"application/json": {"schema": ChatCompletionRequest.model_json_schema()}}
    }
}


@router.post("/v1/chat/completions", openapi_extra=_BODY_DOC)
async def chat_completions(request: Request) -> Response:
    """Answer a chat: a stream of chunks, or one completion.

    With `Last-Event-ID` (or `?last_event_id=`) the stream of that session goes on after that event;
    the body may then be empty. A known `session_id` or `Idempotency-Key` with the same body
    attaches.
    """
    services: Services = request.app.state.services
    owner = services.auth.owner(request)
    settings = services.settings
    body = await read_body(request, settings.max_body_bytes, settings.body_timeout_seconds)
    if cursor := cursor_of(request):
        return await patiently(lambda: resume(services, owner, cursor, body))
    if len(body) > PARSE_IN_THREAD_BYTES:
        chat = await asyncio.to_thread(_parse, body, services)
    else:
        chat = _parse(body, services)
    named = chosen_id(request, chat, owner)
    session_id = named or f"chatcmpl-{secrets.token_hex(16)}"
    record = await submit(services, owner, session_id, chat, may_exist=named is not None)
    if chat.stream:
        usage = chat.include_usage
        return _stream(services, session_id, record, after=-1, include_usage=usage)
    return await answer_whole(request, session_id, record)


async def answer_whole(request: Request, session_id: str, record: SessionRecord) -> Response:
    """Follow a session to its end, while the caller is there, and answer with its completion."""
    services: Services = request.app.state.services
    try:
        work = services.drain.in_time(_collect(services, session_id, record))
        answer = await sse.while_connected(request.receive, work)
    except sse.Disconnected:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(answer, headers={"x-session-id": session_id})


def _parse(body: bytes, services: Services) -> ChatRequest:
    return parse_chat(parse_json(body), services.settings)


def cursor_of(request: Request) -> Cursor | None:
    """Return the place that the client has reached: the header wins, which browsers renew.

    Raises:
        UnbrokenError: `invalid_value`, where it is malformed or contradicts itself.
    """
    for given in (
        request.headers.getlist("last-event-id"),
        request.query_params.getlist("last_event_id"),
    ):
        values = {value for value in given if value}
        if len(values) > 1:
            raise UnbrokenError("invalid_value", "Last-Event-ID comes twice.", "Last-Event-ID")
        if values:
            return sse.parse_cursor(values.pop())
    return None


async def owned_record(services: Services, session_id: str, owner: str) -> SessionRecord:
    """Return a session's record.

    Raises:
        UnbrokenError: `session_not_found`, also for somebody else's session.
    """
    known = sse.SESSION_ID.fullmatch(session_id)
    record = await services.log.record(session_id) if known else None
    if record is None or record.owner != owner:
        raise UnbrokenError("session_not_found", NOT_FOUND, "session_id")
    return record


async def check_place(
    services: Services, session_id: str, record: SessionRecord, after: int
) -> SessionRecord:
    """Check that the log can be read from behind event `after` on; returns the newest record.

    Raises:
        UnbrokenError: `invalid_value` or `unavailable`, where it has no such event (see `reached`);
            `events_expired`, where what follows is no longer kept.
    """

    async def look() -> tuple[SessionRecord, int]:
        newest = await owned_record(services, session_id, record.owner)
        return newest, newest.last

    if after > record.last:
        record = await reached(after, "Last-Event-ID", look)
    if after < record.last:
        following = await services.log.read(session_id, after, count=1)
        if not following or following[0].index != after + 1:
            raise UnbrokenError(
                "events_expired", "These events are no longer kept.", "Last-Event-ID"
            )
    await say_watched(services, session_id, record)
    return record


async def resume(services: Services, owner: str, cursor: Cursor, body: bytes) -> Response:
    """Stream what follows `cursor`; a body, where there is one, must name the same session."""
    include_usage: bool | None = None
    if body.strip():
        parsed = parse_json(body)
        named = parsed.get("session_id") if isinstance(parsed, dict) else None
        if named is not None and named != cursor.session_id:
            raise invalid("session_id", "and Last-Event-ID disagree")
        options = parsed.get("stream_options") if isinstance(parsed, dict) else None
        if isinstance(options, dict):
            include_usage = options.get("include_usage") is True
    record = await owned_record(services, cursor.session_id, owner)
    record = await check_place(services, cursor.session_id, record, cursor.index)
    meter.resumed()
    log.info("resume", extra={"session": cursor.session_id, "index": cursor.index})
    usage = record.include_usage if include_usage is None else include_usage
    return _stream(services, cursor.session_id, record, after=cursor.index, include_usage=usage)


def _stream(
    services: Services, session_id: str, record: SessionRecord, *, after: int, include_usage: bool
) -> Response:
    """Answer with the session's events above `after`, and what follows the last one."""
    renderer = ChunkRenderer(session_id, record, include_usage=include_usage)
    frames = sse.Frames(session_id, renderer)
    seen_end = record.has_ended and after == record.last
    # Whoever has seen the end may still miss what follows it: read the end again, do not send it.
    start = after - 1 if seen_end else after

    async def source(connection: Connection) -> None:
        idle_seconds = services.settings.keepalive_seconds
        viewer = Viewer(connection, frames, start, after, idle_seconds)
        with services.drain.streaming(connection), metrics.STREAMS.track_inprogress():
            await services.relay.deliver(session_id, viewer)

    return sse.EventStreamResponse(source, {"x-session-id": session_id})


async def _collect(services: Services, session_id: str, record: SessionRecord) -> dict[str, Any]:
    """Follow a session to its end and return the whole completion."""
    builder = CompletionBuilder(session_id, record)
    async for entries in services.relay.follow(session_id, -1, services.settings.keepalive_seconds):
        if entries:
            meter.delivered(session_id, entries[0].index, len(entries))
        for entry in entries:
            answer = builder.add(decode_event(entry.data))
            if answer is not None:
                return answer
    raise UnbrokenError("internal_error", "The session has no end.")
