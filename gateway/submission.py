"""How a chat becomes a session: a new one, or the one that has its id already."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from typing import TYPE_CHECKING

import msgspec
from redis.exceptions import OutOfMemoryError

from gateway import meter
from gateway.fit import check_fits, with_defaults
from gateway.limits import cost
from shared.archive import ArchiveError
from shared.errors import UnbrokenError, invalid
from shared.queue import Submission

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.openai import ChatRequest
    from gateway.state import Services
    from shared.fleet import WorkerInfo
    from shared.session_log import SessionRecord

log = logging.getLogger("unbroken.chat")

NOT_FOUND = "There is no such session."


def chosen_id(
    request: Request, chat: ChatRequest, owner: str, prefix: str = "chatcmpl-"
) -> str | None:
    """Return the session's id where the client chose it, by name or by `Idempotency-Key`."""
    if chat.session_id:
        return chat.session_id
    if key := request.headers.get("idempotency-key"):
        return f"{prefix}{hashlib.sha256(f'{owner}:{key}'.encode()).hexdigest()[:32]}"
    return None


async def submit(
    services: Services, owner: str, session_id: str, chat: ChatRequest, *, may_exist: bool
) -> SessionRecord:
    """Queue the session, or attach to it; returns its record.

    The archive is asked first: an id that it knows must not begin anew. While it can not be asked,
    a session that Redis has can be attached to, and an id of the client's begins nothing.

    Raises:
        UnbrokenError: no model is ready, the queue is full, the id is in use with another body.
        ArchiveError: whether the id is in use can not be known for now.
    """
    archived, unreadable = await _archived(services, session_id) if may_exist else (None, None)
    if archived:
        return _attach(archived, owner, chat)
    try:
        worker, chat = _suited(await services.models.serving(), chat, services)
    except UnbrokenError:
        # An attach needs no worker: whoever has the session may read it while none is ready.
        known = await services.log.record(session_id) if may_exist else None
        if known is None:
            raise
        await say_watched(services, session_id, _attach(known, owner, chat))
        return known
    new = _submission(session_id, owner, chat, worker)
    bound = 0 if unreadable else services.settings.max_queue
    charged = await _admit(services, owner, new, may_exist=may_exist)
    outcome, _created = await services.queue.submit(new, bound)
    if charged and outcome not in ("created", "attached"):  # another POST of it was not charged
        await services.limits.refund(owner, session_id, charged)
    if unreadable and outcome == "full":
        raise unreadable
    _refuse(outcome)
    if chat.stream or not (chat.response and chat.response.background):  # else nobody waits
        meter.submitted(outcome, session_id, worker.model)
    log.info("session %s", outcome, extra={"session": session_id})
    record = await services.log.record(session_id)
    if record is None:
        raise UnbrokenError("events_expired", "The session is no longer kept.")
    return record


async def _admit(services: Services, owner: str, new: Submission, *, may_exist: bool) -> int:
    """Charge the caller's key, if it has limits, for a session that is new; returns the tokens."""
    limits = services.auth.limits(owner)
    if limits is None or (may_exist and await services.log.record(new.session_id)):
        return 0
    tokens = cost(new.request)
    charged = await services.limits.admit(owner, limits, new.session_id, tokens)
    return tokens if charged else 0


async def _archived(
    services: Services, session_id: str
) -> tuple[SessionRecord | None, ArchiveError | None]:
    try:
        return await services.log.archived(session_id), None
    except ArchiveError as error:
        return None, error


async def say_watched(services: Services, session_id: str, record: SessionRecord) -> None:
    """Say at once that somebody watches: whoever comes back late must not have come in vain.

    A Redis that is full refuses this, but can be read: that is no reason to send a reader away.
    """
    if not record.has_ended:
        with contextlib.suppress(OutOfMemoryError):
            await services.presence.watching([session_id])


def _attach(known: SessionRecord, owner: str, chat: ChatRequest) -> SessionRecord:
    """Return the record if the session is this caller's and has this body, as `submit.lua` does."""
    if known.owner != owner:
        _refuse("foreign")
    if known.digest != chat.digest:
        _refuse("conflict")
    return known


def _submission(session_id: str, owner: str, chat: ChatRequest, worker: WorkerInfo) -> Submission:
    generation = chat.generation
    if not chat.seed_given:
        seed = _seed(owner, session_id, chat.digest)
        sampling = msgspec.structs.replace(generation.sampling, seed=seed)
        generation = msgspec.structs.replace(generation, sampling=sampling)
    return Submission(
        session_id=session_id,
        owner=owner,
        digest=chat.digest,
        model=worker.model,
        fingerprint=worker.fingerprint,
        include_usage=chat.include_usage,
        request=generation,
        response=chat.response,
    )


def _seed(owner: str, session_id: str, digest: str) -> int:
    """Draw a seed, always the same one for this session and this body.

    Redis may lose a session while a worker runs it. A POST that is sent again may then begin it
    anew before that worker has written it again, and must begin the same text.
    """
    drawn = hashlib.sha256(json.dumps([owner, session_id, digest]).encode()).digest()
    return int.from_bytes(drawn[:8], "big") >> 2


def _suited(
    serving: list[list[WorkerInfo]], chat: ChatRequest, services: Services
) -> tuple[WorkerInfo, ChatRequest]:
    """Pick the model that answers; returns the request with that model's defaults."""
    worker = _choose([workers[0] for workers in serving], chat.model, services)
    check_fits(chat, next(workers for workers in serving if workers[0] is worker))
    return worker, with_defaults(chat, worker)


def _choose(ready: list[WorkerInfo], model: str | None, services: Services) -> WorkerInfo:
    """Pick the model that answers: the named one where it is served, else the one there is."""
    named = next((worker for worker in ready if worker.model == model), None)
    if named is None and services.settings.strict_model:
        if not model:
            raise invalid("model", "is required")
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
