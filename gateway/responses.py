"""`/v1/responses`: the same sessions as Responses, whose streams the OpenAI SDKs can resume."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from gateway import meter, sse
from gateway.admission import parse_json, read_body
from gateway.channel import Viewer
from gateway.chat import PARSE_IN_THREAD_BYTES
from gateway.patience import patiently, reached
from gateway.responses_parse import ResponsesRequest, parse_response
from gateway.responses_render import ResponseBuilder, ResponseFrames, in_its_names
from gateway.submission import chosen_id, say_watched, submit
from shared import metrics
from shared.archive import OUTBOX_SECONDS
from shared.errors import UnbrokenError, invalid
from shared.tasks import stop

if TYPE_CHECKING:
    from gateway.connection import Connection
    from gateway.state import Services
    from shared.session_log import SessionRecord

log = logging.getLogger("unbroken.responses")
router = APIRouter()

CANCEL_SECONDS = 5.0
"""How long a cancel waits for the end; it comes even so, if the worker has died, a little later."""

_BODY_DOC = {
    "requestBody": {
        "content": {"application/json": {"schema": ResponsesRequest.model_json_schema()}}
    }
}


@router.post("/v1/responses", openapi_extra=_BODY_DOC)
async def create(request: Request) -> Response:
    """Make a Response: a stream of events, the whole of it, or (`background`) its beginning.

    A known `Idempotency-Key` with the same body attaches.
    """
    services: Services = request.app.state.services
    owner = services.auth.owner(request)
    settings = services.settings
    body = await read_body(request, settings.max_body_bytes, settings.body_timeout_seconds)
    if len(body) > PARSE_IN_THREAD_BYTES:
        asked = await asyncio.to_thread(lambda: parse_response(parse_json(body), settings))
    else:
        asked = parse_response(parse_json(body), settings)
    named = chosen_id(request, asked, owner, "resp_")
    session_id = named or f"resp_{secrets.token_hex(16)}"
    try:
        record = await submit(services, owner, session_id, asked, may_exist=named is not None)
    except UnbrokenError as error:
        raise in_its_names(error) from None
    if asked.stream:
        return _stream(services, session_id, record)
    if asked.response and asked.response.background:
        return _json(session_id, await _as_it_stands(services, session_id, record))
    try:
        work = services.drain.in_time(_follow(services, session_id, record))
        builder = await sse.while_connected(request.receive, work)
    except sse.Disconnected:
        return Response(status_code=499)  # nobody reads it
    if builder.error:
        raise builder.error
    return _json(session_id, builder.final)


@router.get("/v1/responses/{response_id}")
async def retrieve(response_id: str, request: Request) -> Response:
    """Return a Response as it stands; with `stream=true` its events, behind `starting_after`."""
    services: Services = request.app.state.services
    owner = services.auth.owner(request)
    if _flag(request, "stream"):
        return await patiently(lambda: _resume(services, response_id, owner, request))
    record = await _stored(services, response_id, owner)
    if _starting_after(request) >= 0:
        raise invalid("starting_after", "needs 'stream=true'")
    return _json(response_id, await _as_it_stands(services, response_id, record))


async def _resume(services: Services, response_id: str, owner: str, request: Request) -> Response:
    """Stream what follows the sequence number that the client has reached."""
    record = await _stored(services, response_id, owner)
    after = _starting_after(request)
    record, known = await _check_place(services, response_id, record, after)
    if after >= 0:
        meter.resumed()
        log.info("resume", extra={"session": response_id, "number": after})
    return _stream(services, response_id, record, after, known)


@router.post("/v1/responses/{response_id}/cancel")
async def cancel(response_id: str, request: Request) -> Response:
    """Cancel a Response, queued or running, and return it; an ended one stays as it is."""
    services: Services = request.app.state.services
    owner = services.auth.owner(request)
    record = await _owned(services, response_id, owner)
    await _cancel(services, response_id, owner, record)
    return _json(response_id, await _as_it_stands(services, response_id, record))


@router.delete("/v1/responses/{response_id}")
async def delete(response_id: str, request: Request) -> dict[str, Any]:
    """Remove a Response and all that is kept of it; one that has not ended is cancelled first."""
    services: Services = request.app.state.services
    owner = services.auth.owner(request)
    record = await _owned(services, response_id, owner)
    await _cancel(services, response_id, owner, record)
    outcome = await services.queue.delete(response_id, owner, OUTBOX_SECONDS)
    if outcome in ("queued", "running"):
        raise UnbrokenError("unavailable", "The response has not stopped yet.", retry_after=2)
    await services.log.forget(response_id)
    log.info("deleted", extra={"session": response_id})
    return {"id": response_id, "object": "response", "deleted": True}


async def _owned(services: Services, response_id: str, owner: str) -> SessionRecord:
    """Return the record of a session that was made as a Response.

    Raises:
        UnbrokenError: `session_not_found`, also for somebody else's.
    """
    known = sse.SESSION_ID.fullmatch(response_id)
    record = await services.log.record(response_id) if known else None
    if record is None or record.owner != owner or record.response is None:
        raise _not_found()
    return record


async def _stored(services: Services, response_id: str, owner: str) -> SessionRecord:
    """Return the record of a Response that can be retrieved.

    Raises:
        UnbrokenError: `session_not_found`, also where `store` was false.
    """
    record = await _owned(services, response_id, owner)
    if not (record.response and record.response.store):
        raise _not_found()
    return record


def _not_found() -> UnbrokenError:
    return UnbrokenError("session_not_found", "There is no such response.", "response_id")


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise invalid(name, "must be true or false")
    return value in ("true", "1")


def _starting_after(request: Request) -> int:
    """Return the sequence number that the client has reached; -1 where it says none."""
    values = request.query_params.getlist("starting_after")
    if not values:
        return -1
    if len(values) > 1 or not re.fullmatch(r"[0-9]{1,12}", values[0]):
        raise invalid("starting_after", "must be a sequence number")
    return int(values[0])


async def _check_place(
    services: Services, response_id: str, record: SessionRecord, after: int
) -> tuple[SessionRecord, int]:
    """Check that the events can be read, and that there is one with the number `after`.

    Returns the newest record, and the index of an entry that the log has, not before that event's.

    Raises:
        UnbrokenError: `invalid_value` or `unavailable`, where there is none (see `reached`);
            `events_expired`.
    """
    builder = ResponseBuilder(response_id, record)

    async def look() -> tuple[SessionRecord, int]:
        newest = await _owned(services, response_id, record.owner)
        await _read(services, response_id, builder)
        return newest, builder.number - 1

    # Each entry of the log has one number at least, and the first has two.
    if after <= record.last + 1:
        await _read(services, response_id, builder, entries=1)
    else:
        record = await reached(after, "starting_after", look)
    await say_watched(services, response_id, record)
    return record, max(record.last, builder.index)


async def _read(
    services: Services, response_id: str, builder: ResponseBuilder, entries: int | None = None
) -> None:
    """Let the builder take the log as far as it goes, or so many entries.

    Raises:
        UnbrokenError: `events_expired`, where its beginning is no longer kept.
    """
    options = {} if entries is None else {"count": entries}
    while page := await services.log.read(response_id, builder.index, **options):
        if page[0].index != builder.index + 1:
            break
        builder.take_all(page)
        if entries is not None:
            return
    if builder.index < 0:
        raise UnbrokenError("events_expired", "These events are no longer kept.")


async def _as_it_stands(
    services: Services, response_id: str, record: SessionRecord
) -> dict[str, Any]:
    builder = ResponseBuilder(response_id, record)
    await _read(services, response_id, builder)
    return builder.final or builder.response("queued" if record.status == "queued" else None)


async def _follow(services: Services, response_id: str, record: SessionRecord) -> ResponseBuilder:
    """Follow a Response to its end."""
    builder = ResponseBuilder(response_id, record)
    idle_seconds = services.settings.keepalive_seconds
    async for entries in services.relay.follow(response_id, -1, idle_seconds):
        builder.take_all(entries)
        meter.delivered(response_id, builder.index + 1 - len(entries), len(entries))
        if builder.final:
            break
    return builder


async def _cancel(services: Services, response_id: str, owner: str, record: SessionRecord) -> None:
    """Cancel, and wait a while for the end."""
    if record.has_ended:
        return
    status = await services.queue.cancel(response_id, owner, "requested")
    log.info("cancel requested", extra={"session": response_id, "status": status})
    if status == "cancelling":
        ending = asyncio.ensure_future(_follow(services, response_id, record))
        await asyncio.wait({ending}, timeout=CANCEL_SECONDS)
        await stop(ending)


def _stream(
    services: Services,
    response_id: str,
    record: SessionRecord,
    after: int = -1,
    known: int = -1,
) -> Response:
    """Answer with the events above the sequence number `after`.

    All entries are read, from the first on, since what an event says depends on those before. The
    log has all of them up to index `known`.
    """
    frames = ResponseFrames(ResponseBuilder(response_id, record), after)

    async def source(connection: Connection) -> None:
        idle_seconds = services.settings.keepalive_seconds
        viewer = Viewer(connection, frames, -1, known, idle_seconds)
        with services.drain.streaming(connection), metrics.STREAMS.track_inprogress():
            await services.relay.deliver(response_id, viewer)

    headers = {"x-session-id": response_id}
    return sse.EventStreamResponse(source, headers, frames.render_error)


def _json(response_id: str, response: dict[str, Any] | None) -> Response:
    return JSONResponse(response, headers={"x-session-id": response_id})
