"""Who is watching a session, and which sessions are to be cancelled.

Presence is an expiring key that every watcher's gateway renews; there is no counter that a crash
could leave wrong.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from redis.exceptions import ResponseError

from shared import keys
from shared.errors import UnbrokenError
from shared.protocol import ResponseParams

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from shared.protocol import CancelReason
    from shared.queue import SessionQueue
    from shared.store import Store

log = logging.getLogger("unbroken.presence")

REFRESH_SECONDS = 1.0
"""How often a gateway says again which sessions its clients watch."""

MARGIN_MS = 1200
"""How much longer than asked a watch key lives: one refresh, and the delay of one."""

SWEEP_SECONDS = 0.25
SWEEP_SESSIONS = 1000
"""Waiting sessions looked at in one sweep; a longer queue takes more sweeps."""

GAP_SECONDS = 0.7
"""A silence of Redis beyond this may have kept gateways from saying who watches."""

CONTACT_SECONDS = 3.0
"""How long Redis must have answered without such a gap before a missing key means absence."""


def watch_ttl_ms(watch_ms: int) -> int:
    """Return a watch key's life for sessions that go on unwatched for `watch_ms`; 0: no keys."""
    return watch_ms + MARGIN_MS if watch_ms else 0


class Contact:
    """For how long Redis has answered this process without a gap.

    Watch keys also expire while Redis is away, or cannot be reached; when it is back, gateways need
    a moment to write them again.

    Args:
        gap_seconds: a longer silence is a gap.
    """

    def __init__(self, gap_seconds: float = GAP_SECONDS) -> None:
        self._gap = gap_seconds
        self._since = self._last = float("-inf")

    def heard(self) -> bool:
        """Note an answer; tells whether what is missing from it is really missing."""
        now = time.monotonic()
        if now - self._last > self._gap:
            self._since = now
        self._last = now
        return now - self._since >= CONTACT_SECONDS


class Signals(NamedTuple):
    """What a worker learns of one session: a cancel request, and whether it may be watched."""

    cancel: CancelReason | None
    watched: bool


class Presence:
    """Reads and writes the watch and cancel keys.

    Args:
        store: the Redis client.
        watch_ms: how long a session goes on after the last sign of a watcher; 0 for ever.
    """

    def __init__(self, store: Store, *, watch_ms: int) -> None:
        self._redis, self._ttl_ms = store.redis, watch_ttl_ms(watch_ms)
        self._contact = Contact()

    async def watching(self, session_ids: Collection[str]) -> None:
        """Say that clients watch these sessions now. An ended session's key merely expires."""
        if not session_ids or not self._ttl_ms:
            return
        async with self._redis.pipeline(transaction=False) as pipe:
            for session_id in session_ids:
                pipe.execute_command(*self.sign(session_id))
            await pipe.execute()

    def sign(self, session_id: str) -> tuple[str, ...]:
        """Return the command with which `watching` says it; empty where no key is kept."""
        px = str(self._ttl_ms)
        return ("SET", keys.watch(session_id), "1", "PX", px) if self._ttl_ms else ()

    async def signals(self, session_ids: Sequence[str]) -> dict[str, Signals]:
        """Return each session's signals, in one round trip."""
        if not session_ids:
            return {}
        names = [keys.cancel(s) for s in session_ids] + [keys.watch(s) for s in session_ids]
        names += [keys.job(s) for s in session_ids]  # without it, Redis has lost the session
        values = await self._redis.mget(names)
        in_doubt = not self._contact.heard() or not self._ttl_ms
        count = len(session_ids)
        return {
            session_id: Signals(
                ("abandoned" if cancel == b"abandoned" else "requested") if cancel else None,
                watched is not None or job is None or in_doubt,
            )
            for session_id, cancel, watched, job in zip(
                session_ids,
                values[:count],
                values[count : 2 * count],
                values[2 * count :],
                strict=True,
            )
        }

    async def unwatched(self, session_ids: Sequence[str]) -> list[str]:
        """Return those of the sessions that nobody watches, as far as that can be known now.

        Without those that need nobody: see `SessionRecord.runs_unwatched`.
        """
        values = await self._redis.mget([keys.watch(s) for s in session_ids]) if session_ids else []
        alone = [s for s, value in zip(session_ids, values, strict=True) if value is None]
        if not alone:
            return []
        async with self._redis.pipeline(transaction=False) as pipe:
            for session_id in alone:
                pipe.hget(keys.session(session_id), "response")
            responses = await pipe.execute(raise_on_error=False)
        return [s for s, raw in zip(alone, responses, strict=True) if not _is_background(raw)]

    async def may_sweep(self) -> bool:
        """Tell whether it is this process's turn to look for unwatched sessions that wait."""
        if not self._ttl_ms:
            return False
        px = int(SWEEP_SECONDS * 800)
        ours = await self._redis.set(keys.SWEEP, "1", nx=True, px=px)
        return self._contact.heard() and bool(ours)


def _is_background(response: object) -> bool:
    """Tell whether a record's field `response` is that of a session in the background."""
    if not response or not isinstance(response, bytes):
        return False
    try:
        return msgspec.json.decode(response, type=ResponseParams).background
    except msgspec.MsgspecError:
        return False


class Sweeper:
    """Cancels sessions that nobody watches while they still wait for a worker.

    Every gateway and worker has one, so that it does not matter who lives; one sweeps at a time.
    """

    def __init__(self, store: Store, queue: SessionQueue, presence: Presence) -> None:
        self._redis, self._queue, self._presence = store.redis, queue, presence
        self._first = 0

    async def sweep(self) -> None:
        """Look at the next part of the queue; to be repeated every `SWEEP_SECONDS`."""
        if not await self._presence.may_sweep():
            return
        last = self._first + SWEEP_SESSIONS - 1
        raw = await self._redis.zrange(keys.QUEUE, self._first, last)
        found = [s.decode(errors="replace") for s in raw]
        self._first = last + 1 if len(found) == SWEEP_SESSIONS else 0
        for session_id in await self._presence.unwatched(found):
            try:
                if await self._queue.abandon(session_id):
                    log.info("cancel", extra={"session": session_id, "reason": "abandoned"})
            except (ResponseError, UnbrokenError) as error:  # one that is broken hides no others
                log.warning("cannot cancel", extra={"session": session_id, "why": str(error)[:80]})
