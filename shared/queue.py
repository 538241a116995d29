"""The queue of sessions: submit, claim, renew, give back, cancel; in arq's wire format."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
from arq.jobs import serialize_job
from redis.exceptions import ResponseError

from shared import keys, logs
from shared.metrics import CANCELS
from shared.presence import watch_ttl_ms
from shared.protocol import Failed, Finished, Started, Usage, encode_event, encode_request
from shared.session_log import SessionLog, record_fields, tally
from shared.store import is_wrong_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shared.protocol import CancelReason, Event, GenerationRequest, ResponseParams, Status
    from shared.session_log import SessionRecord
    from shared.store import Store

JOB_FUNCTION = "run_session"
LEASE_MS = 2500
RENEW_SECONDS = 0.5
SILENCE_MS = 1200
"""Longest pause between two workers' renewals that is no outage: no lease can run out in one."""

CONTACT_MS = 2000
"""How long Redis must be back before leases count as run out: their workers renew until then."""

LOOKED_AT = 4096
"""Waiting sessions that a claim looks through for those of its model."""

job_serializer = msgspec.json.encode
job_deserializer = msgspec.json.decode

Outcome = Literal["created", "attached", "conflict", "foreign", "full"]


class Submission(NamedTuple):
    """A session to queue. `digest` identifies its body, `owner` the API key that sent it."""

    session_id: str
    owner: str
    digest: str
    model: str
    fingerprint: str
    include_usage: bool
    request: GenerationRequest
    response: ResponseParams | None = None


class Claimed(NamedTuple):
    """A session taken from the queue, and the lease (`worker:epoch`) to write it under."""

    session_id: str
    lease: str


class SessionCopy(NamedTuple):
    """All that a worker knows of a session that it runs: enough to write it again."""

    claimed: Claimed
    record: SessionRecord
    request: bytes
    events: Sequence[bytes]


class Claim(NamedTuple):
    """What a claim gave: sessions, how many still wait, and ms until a lease runs out (or None).

    `choices` are the sessions': as many slots does each take.
    """

    sessions: list[Claimed]
    waiting: int
    next_expiry_ms: int | None
    choices: list[int]


class SessionQueue:
    """The gateway's and the worker's view of the queue.

    Args:
        store: the Redis client with the scripts.
        kept_seconds: how long an ended session stays in Redis.
        watch_ms: how long a session goes on with nobody watching; 0 for ever.
        archived: sessions that end here are put into the outbox, for an archive to keep.
        model: what a worker's claims are for; empty for any. May be set later.
    """

    def __init__(
        self,
        store: Store,
        *,
        kept_seconds: int,
        watch_ms: int,
        archived: bool = False,
        model: str = "",
    ) -> None:
        self.model = model
        self._store, self._kept, self._archived = store, kept_seconds, archived
        self._watch_ttl_ms = watch_ttl_ms(watch_ms)

    async def submit(self, new: Submission, max_queue: int) -> tuple[Outcome, int]:
        """Queue a session, or attach to the one that has its id.

        Returns the outcome and the session's creation time (Unix seconds; 0 where there is none).
        Safe to repeat: the second call attaches. With `max_queue` 0 it attaches, or answers `full`.
        """
        sid, choices = new.session_id, new.request.sampling.n
        names = [keys.session(sid), keys.events(sid), keys.request(sid), keys.job(sid)]
        names += [keys.watch(sid), keys.QUEUE, keys.work_bell(new.model)]
        args: list[Any] = [sid, new.owner, new.digest, new.model, new.fingerprint, choices]
        args += [max_queue, keys.LIVE_TTL, self._first_watch_ms(new), int(new.include_usage)]
        args += [encode_request(new.request), _job(sid), encode_event(Started(choices))]
        args.append(msgspec.json.encode(new.response) if new.response else b"")
        outcome, created = await self._store.run("submit", names, args)
        return outcome.decode(), int(created)

    def _first_watch_ms(self, new: Submission) -> int:
        """Return for how long a new session counts as watched."""
        lasting = self._watch_ttl_ms and new.response is not None and new.response.background
        return keys.LIVE_TTL * 1000 if lasting else self._watch_ttl_ms

    async def claim(self, worker_id: str, free_slots: int, refused: Iterable[str] = ()) -> Claim:
        """Put sessions with an expired lease back, then lease of our model until no slot is free.

        Each choice takes a slot; the last session may take more than there are. Those `refused` are
        left to others.
        """
        waiting, expiry, *found = await self._store.run(
            "claim",
            [keys.QUEUE, keys.LEASES, keys.CONTACT],
            [
                *(worker_id, free_slots, LEASE_MS, keys.LIVE_TTL, keys.SESSION),
                *(self.model, keys.WORK_BELL, LOOKED_AT, SILENCE_MS, CONTACT_MS, *refused),
            ],
        )
        sessions = [Claimed(sid.decode(), lease.decode()) for sid, lease, _ in found]
        choices = [count for _, _, count in found]
        return Claim(sessions, waiting, expiry if expiry >= 0 else None, choices)

    async def renew(self, leases: Mapping[str, str]) -> list[str]:
        """Prolong the leases `{session_id: lease}`; returns the sessions whose lease is lost.

        To be called every `RENEW_SECONDS`, also without leases: it tells all that Redis is there.
        """
        names = [keys.LEASES, keys.CONTACT]
        args: list[Any] = [LEASE_MS, keys.LIVE_TTL, keys.SESSION, keys.EVENTS]
        args += [keys.REQUEST, keys.JOB, SILENCE_MS]
        for pair in leases.items():
            args += pair
        return [sid.decode() for sid in await self._store.run("renew", names, args)]

    async def begin(
        self, claimed: Claimed, engine: str, media: str, prompt_tokens: int, *, exact: bool
    ) -> Literal["begun", "lost", "media_changed"]:
        """Note what a session is generated from, or compare it with what it was begun with.

        Args:
            claimed: the session and our lease.
            engine: the fingerprint of our engine.
            media: the content hashes of the request's media.
            prompt_tokens: the length of the prompt.
            exact: our engine continues as an undisturbed run would.
        """
        args = [claimed.lease, engine, int(exact), media, prompt_tokens]
        reply = await self._store.run("begin", [keys.session(claimed.session_id)], args)
        return {1: "begun", 0: "lost"}.get(reply, "media_changed")  # type: ignore[return-value]

    async def attempt(self, claimed: Claimed) -> bool:
        """Count this run as an attempt: the engine begins it. False where it is not ours."""
        names = [keys.session(claimed.session_id)]
        return bool(await self._store.run("attempt", names, [claimed.lease]))

    async def restore(self, copy: SessionCopy) -> bool:
        """Write a running session again, as far as Redis has lost it.

        Returns False where it is another's, or has ended. Safe to repeat.
        """
        (sid, lease), record = copy.claimed, copy.record
        names = [keys.session(sid), keys.events(sid), keys.request(sid), keys.job(sid)]
        names += [keys.watch(sid), keys.LEASES, keys.QUEUE, keys.deleted(sid)]
        fields = record_fields(record)
        args: list[Any] = [sid, lease, lease.rpartition(":")[2], record.owner, record.digest]
        args += [LEASE_MS, keys.LIVE_TTL, self._watch_ttl_ms, copy.request, _job(sid)]
        args += [record.enqueued, len(fields), *fields, *copy.events]
        return bool(await self._store.run("restore", names, args))

    async def release(
        self, claimed: Claimed, *, blameless: bool = True, waited: bool = False
    ) -> bool:
        """Give a session back to its old place; False where the lease is no longer ours.

        Args:
            claimed: the session and our lease.
            blameless: this run does not count as an attempt.
            waited: it could not begin here, and has waited for a worker all along.
        """
        names = [keys.session(claimed.session_id), keys.QUEUE, keys.LEASES]
        args = [claimed.session_id, claimed.lease, keys.LIVE_TTL, int(blameless), keys.WORK_BELL]
        args.append(int(not waited))
        return bool(await self._store.run("release", names, args))

    async def cancel(
        self, session_id: str, owner: str, reason: CancelReason
    ) -> Status | Literal["missing", "cancelling"]:
        """Cancel a session: at once where it waits, by its worker where it runs.

        Returns `missing` for an unknown session or another's, `cancelling` for a running one, else
        the status it ended with.
        """
        return await self._cancel(session_id, owner, reason)  # type: ignore[return-value]

    async def abandon(self, session_id: str) -> bool:
        """Cancel a session as abandoned, unless somebody watches it; tells whether it took that."""
        return await self._cancel(session_id, "", "abandoned") in ("cancelled", "cancelling")

    async def overdue(self, timeout_seconds: float, count: int = 256) -> list[str]:
        """Name sessions that may have waited for a worker for so long."""
        args = [int(timeout_seconds * 1000), count]
        return [
            s.decode() for s in await self._store.run("overdue", [keys.QUEUE, keys.LEASES], args)
        ]

    async def give_up(self, session_id: str, timeout_seconds: float) -> bool:
        """Fail a session if it has waited for a worker for so long; tells whether it had."""
        return await self._end(session_id, "", "overdue", timeout_seconds) == "dequeued"

    async def _cancel(self, session_id: str, owner: str, reason: CancelReason) -> str:
        reply = await self._end(session_id, owner, reason)
        if reply == "dequeued":
            CANCELS.labels(reason).inc()
            return "cancelled"
        return reply

    async def _end(
        self,
        session_id: str,
        owner: str,
        reason: CancelReason | Literal["overdue"],
        timeout_seconds: float = 0,
    ) -> str:
        """End a session that waits, with the tokens that its log holds; see `cancel.lua`."""
        names = [keys.session(session_id), keys.events(session_id), keys.request(session_id)]
        names += [keys.job(session_id), keys.watch(session_id), keys.cancel(session_id), keys.QUEUE]
        names += [keys.OUTBOX, keys.LEASES]
        last, usage = 0, Usage()
        while True:
            terminal: Event = _timed_out(timeout_seconds)
            if reason != "overdue":
                terminal = Finished((), usage, reason)
            args: list[Any] = [session_id, owner, keys.event_bell(session_id), reason]
            args += [keys.LIVE_TTL, self._kept, encode_event(terminal), msgspec.json.encode(usage)]
            args += [int(self._archived), last, int(timeout_seconds * 1000)]
            reply: bytes = await self._store.run("cancel", names, args)
            if reply != b"uncounted":
                return reply.decode()
            log = SessionLog(self._store)
            record, entries = await log.record(session_id), await log.read_all(session_id)
            last = record.last if record else 0
            usage = tally(entries, record.prompt_tokens if record else 0)

    async def delete(self, session_id: str, owner: str, note_seconds: int) -> str:
        """Remove an ended session from Redis; another process that copies it now will learn so.

        Returns `deleted`, `missing` for an unknown session or another's, or the status of one that
        has not ended.

        Args:
            session_id: the session.
            owner: whose it must be.
            note_seconds: how long a note of the removal is kept.
        """
        names = [keys.session(session_id), keys.events(session_id), keys.watch(session_id)]
        names += [keys.OUTBOX, keys.deleted(session_id)]
        reply: bytes = await self._store.run("delete", names, [session_id, owner, note_seconds])
        return reply.decode()

    async def wait_for_work(self, seconds: float) -> None:
        """Return when the work bell rings or after `seconds`. Needs a connection of its own."""
        await self._store.redis.blpop(
            [keys.work_bell(self.model)],
            timeout=seconds,  # type: ignore[arg-type]
        )  # type: ignore[misc]

    async def request(self, session_id: str) -> bytes | None:
        """Return the queued request's encoding, None where it is gone, b"" where it is none."""
        try:
            data: bytes | None = await self._store.redis.get(keys.request(session_id))
        except ResponseError as error:
            if is_wrong_type(error):
                return b""
            raise
        return data

    async def discard(self, claimed: Claimed) -> None:
        """Remove a claimed session whose record is not readable; its followers see it vanish."""
        sid = claimed.session_id
        names = (keys.session(sid), keys.events(sid), keys.request(sid), keys.job(sid))
        async with self._store.redis.pipeline(transaction=True) as pipe:
            pipe.delete(*names, keys.watch(sid), keys.cancel(sid))
            pipe.zrem(keys.LEASES, sid)
            await pipe.execute()

    async def lasts(self, session_ids: Sequence[str]) -> dict[str, int]:
        """Return the last index of each of these sessions that has not ended."""
        if not session_ids:
            return {}
        async with self._store.redis.pipeline(transaction=False) as pipe:
            for session_id in session_ids:
                pipe.hmget(keys.session(session_id), ["status", "last"])
            found = await pipe.execute()
        live = (b"queued", b"running")
        return {
            session_id: int(last)
            for session_id, (status, last) in zip(session_ids, found, strict=True)
            if status in live
        }

    async def depth(self) -> int:
        """Count the sessions that wait."""
        return int(await self._store.redis.zcard(keys.QUEUE))

    async def position(self, session_id: str) -> int | None:
        """Return the session's place in the queue, 0 for the next, or None where it waits not."""
        rank: int | None = await self._store.redis.zrank(keys.QUEUE, session_id)
        return rank


def _job(session_id: str) -> bytes:
    """Encode the arq job that runs a session; its log lines bear the HTTP request's id too."""
    now, of = int(time.time() * 1000), {"request_id": logs.request_id.get()}
    job: bytes = serialize_job(
        JOB_FUNCTION, (session_id,), of, None, now, serializer=job_serializer
    )
    return job


def _timed_out(seconds: float) -> Failed:
    return Failed("queue_timeout", f"No worker took the session within {seconds:g} seconds.")
