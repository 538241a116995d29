"""`POST /v1/chat/completions`: a new generation, an attached or a resumed one; streaming or not."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from gateway import sse
from gateway.admission import parse_json, read_body
from gateway.openai import ChatCompletionRequest, ChatRequest, parse_chat
from gateway.render import ChunkRenderer, CompletionBuilder
from shared.errors import UnbrokenError
from shared.protocol import Finished, GenerationRequest, Terminal, decode_event
from shared.queue import Submission

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.sse import Cursor
    from gateway.state import Services
    from shared.fleet import WorkerInfo
    from shared.session_log import SessionRecord

log = logging.getLogger("unbroken.chat")
router = APIRouter()

PARSE_IN_THREAD_BYTES = 2**18
NOT_FOUND = "There is no such session."

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
    body = await read_body(request, services.settings.max_body_bytes)
    header = request.headers.get("last-event-id") or request.query_params.get("last_event_id")
    if cursor := sse.parse_cursor(header):
        return await resume(services, owner, cursor, body)
    if len(body) > PARSE_IN_THREAD_BYTES:
        chat = await asyncio.to_thread(_parse, body, services)
    else:
        chat = _parse(body, services)
    session_id = _session_id(request, chat, owner)
    record = await _submit(services, owner, session_id, chat)
    if chat.stream:
        usage = chat.include_usage
        return _stream(services, session_id, record, after=-1, include_usage=usage)
    try:
        answer = await sse.while_connected(request.receive, _collect(services, session_id, record))
    except sse.Disconnected:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(answer, headers={"x-session-id": session_id})


def _parse(body: bytes, services: Services) -> ChatRequest:
    return parse_chat(parse_json(body), services.settings)


def _session_id(request: Request, chat: ChatRequest, owner: str) -> str:
    """Choose the session's id: the client's, one that its `Idempotency-Key` names, or a new one."""
    if chat.session_id:
        return chat.session_id
    if key := request.headers.get("idempotency-key"):
        return f"chatcmpl-{hashlib.sha256(f'{owner}:{key}'.encode()).hexdigest()[:32]}"
    return f"chatcmpl-{secrets.token_hex(16)}"


async def _submit(
    services: Services, owner: str, session_id: str, chat: ChatRequest
) -> SessionRecord:
    """Queue the session, or attach to it; returns its record."""
    try:
        worker = _choose(await services.models.ready(), chat.model, services)
    except UnbrokenError as error:
        # An attach needs no worker: whoever has the session may read it while none is ready.
        known = await services.log.record(session_id)
        same = known is not None and (known.owner, known.digest) == (owner, chat.digest)
        if known is None or not same or error.code != "model_not_ready":
            raise
        return known
    generation = chat.generation
    if not chat.seed_given:
        sampling = msgspec.structs.replace(generation.sampling, seed=secrets.randbits(62))
        generation = GenerationRequest(generation.messages, sampling)
    new = Submission(
        session_id=session_id,
        owner=owner,
        digest=chat.digest,
        model=worker.model,
        fingerprint=worker.fingerprint,
        include_usage=chat.include_usage,
        request=generation,
    )
    outcome, _created = await services.queue.submit(new, services.settings.max_queue)
    _refuse(outcome)
    log.info("session %s", outcome, extra={"session": session_id})
    record = await services.log.record(session_id)
    if record is None:
        raise UnbrokenError("events_expired", "The session is no longer kept.")
    return record


def _choose(ready: list[WorkerInfo], model: str | None, services: Services) -> WorkerInfo:
    """Pick the model that answers: the named one where it is served, else the one there is."""
    named = next((worker for worker in ready if worker.model == model), None)
    if named is None and services.settings.strict_model:
        if not model:
            raise UnbrokenError("invalid_value", "'model' is required.", "model")
        raise UnbrokenError("model_not_found", "No worker serves this model.", "model")
    return named or ready[0]


def _refuse(outcome: str) -> None:
    if outcome == "full":
        raise UnbrokenError("queue_full", "Too many requests are waiting.", retry_after=2)
    if outcome == "foreign":
        raise UnbrokenError("session_not_found", NOT_FOUND, "session_id")
    if outcome == "conflict":
        raise UnbrokenError(
            "session_id_in_use", "This session id is in use with another body.", "session_id"
        )


async def owned_record(services: Services, session_id: str, owner: str) -> SessionRecord:
    """Return a session's record.

    Raises:
        UnbrokenError: `session_not_found`, also for somebody else's session.
    """
    record = await services.log.record(session_id)
    if record is None or record.owner != owner:
        raise UnbrokenError("session_not_found", NOT_FOUND, "session_id")
    return record


async def resume(services: Services, owner: str, cursor: Cursor, body: bytes) -> Response:
    """Stream what follows `cursor`; a body, where there is one, must name the same session."""
    include_usage: bool | None = None
    if body.strip():
        parsed = parse_json(body)
        named = parsed.get("session_id") if isinstance(parsed, dict) else None
        if named is not None and named != cursor.session_id:
            raise UnbrokenError(
                "invalid_value", "'session_id' and Last-Event-ID disagree.", "session_id"
            )
        options = parsed.get("stream_options") if isinstance(parsed, dict) else None
        if isinstance(options, dict):
            include_usage = options.get("include_usage") is True
    record = await owned_record(services, cursor.session_id, owner)
    if cursor.index > record.last:
        raise UnbrokenError(
            "invalid_value", "Last-Event-ID is beyond the session's end.", "Last-Event-ID"
        )
    if cursor.index < record.last and not await services.log.read(
        cursor.session_id, cursor.index, count=1
    ):
        raise UnbrokenError("events_expired", "These events are no longer kept.", "Last-Event-ID")
    log.info("resume", extra={"session": cursor.session_id, "index": cursor.index})
    usage = record.include_usage if include_usage is None else include_usage
    return _stream(services, cursor.session_id, record, after=cursor.index, include_usage=usage)


def _stream(
    services: Services, session_id: str, record: SessionRecord, *, after: int, include_usage: bool
) -> Response:
    renderer = ChunkRenderer(session_id, record, include_usage=include_usage)
    seen_end = record.has_ended and after == record.last
    # Whoever has seen the end may still miss what follows it: read the end again, do not send it.
    start = after - 1 if seen_end else after
    frames = _frames(services, session_id, renderer, start, after, include_usage=include_usage)
    return sse.EventStreamResponse(frames, {"x-session-id": session_id})


async def _frames(
    services: Services,
    session_id: str,
    renderer: ChunkRenderer,
    start: int,
    seen: int,
    *,
    include_usage: bool,
) -> AsyncIterator[bytes]:
    """Yield the frames of the events above `seen`, reading above `start`, up to `[DONE]`."""
    try:
        follow = services.relay.follow(session_id, start, services.settings.keepalive_seconds)
        async for entries in follow:
            out = [] if entries else [sse.KEEP_ALIVE]
            for entry in entries:
                event = decode_event(entry.data)
                if entry.index > seen:
                    out.append(sse.frame(session_id, entry.index, renderer.chunk(event)))
                if isinstance(event, Terminal):
                    if include_usage and isinstance(event, Finished):
                        out.append(sse.bare_frame(renderer.usage_chunk(event.usage)))
                    yield b"".join([*out, sse.DONE])
                    return
            yield b"".join(out)
    except UnbrokenError as error:  # too late for a status
        yield sse.bare_frame(msgspec.json.encode(error.body())) + sse.DONE


async def _collect(services: Services, session_id: str, record: SessionRecord) -> dict[str, Any]:
    """Follow a session to its end and return the whole completion."""
    builder = CompletionBuilder(session_id, record)
    async for entries in services.relay.follow(session_id, -1, services.settings.keepalive_seconds):
        for entry in entries:
            answer = builder.add(decode_event(entry.data))
            if answer is not None:
                return answer
    raise UnbrokenError("internal_error", "The session has no end.")
