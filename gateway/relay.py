"""`Relay`: follows the logs of all the sessions that this process's clients read.

One doorbell subscription and one command connection serve them all. A ring names the sessions that
have new events; one XREAD fetches them; each follower keeps only its place. A ring may get lost, so
a sweep reads all followed sessions once a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING

from shared import keys
from shared.errors import UnbrokenError
from shared.presence import REFRESH_SECONDS
from shared.session_log import PAGE, Entry
from shared.store import UNAVAILABLE
from shared.tasks import stop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from shared.presence import Presence
    from shared.session_log import SessionLog
    from shared.store import Store

log = logging.getLogger("unbroken.relay")

SWEEP_SECONDS = 1.0
VANISHED_SWEEPS = 3
"""Sweeps in a row that find no record of a followed session before its followers are told."""

OUTAGE_SECONDS = 0.5
"""Pause before Redis is asked again after it failed."""

TAIL = 256
"""Events kept in memory per followed session; a follower further behind reads Redis by itself."""


class _Channel:
    """The newest events of one followed session, shared by all its followers."""

    def __init__(self) -> None:
        self.followers = 0
        self.tail: deque[Entry] = deque(maxlen=TAIL)
        self.last: int | None = None  # index up to which the hub has read; None: not begun
        self.missing = 0
        self.gone = False
        self._changed = asyncio.Event()

    def since(self, after: int) -> list[Entry] | None:
        """Return the known events above `after`, or None where only Redis has them."""
        if self.last is None or after > self.last:
            return None if self.last is None else []
        if after == self.last:
            return []
        first = self.tail[0].index if self.tail else self.last + 1
        if after + 1 < first:
            return None
        return [self.tail[i] for i in range(after + 1 - first, len(self.tail))]

    def extend(self, entries: list[Entry]) -> None:
        self.tail.extend(entries)
        self.last = entries[-1].index
        self.notify()

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, seconds: float) -> bool:
        """Wait for news; False if there is none for so long."""
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True


class Relay:
    """The reading side of all live sessions in this process.

    Args:
        store: the command connection.
        bell: a client of its own for the subscription, whose connection blocks.
        session_log: the logs.
        presence: told every second whom clients watch.
    """

    def __init__(
        self, store: Store, bell: Store, session_log: SessionLog, presence: Presence
    ) -> None:
        self._store, self._bell = store, bell
        self._log, self._presence = session_log, presence
        self._channels: dict[str, _Channel] = {}
        self._rung: set[str] = set()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to listen."""
        for loop in (self._listen, self._pump, self._sweep, self._refresh_presence):
            self._tasks.append(asyncio.create_task(_restarting(loop), name=loop.__name__))

    async def close(self) -> None:
        """Stop listening, and close the subscription's client."""
        await stop(*self._tasks)
        await self._bell.close()

    async def follow(
        self, session_id: str, after: int, idle_seconds: float
    ) -> AsyncIterator[list[Entry]]:
        """Yield the session's events above index `after`, in order, as they come, without end.

        An empty list says that nothing came for `idle_seconds`. The caller stops at the terminal
        event. Counts as watching while it is iterated.

        Raises:
            UnbrokenError: `events_expired`, where events after `after` are no longer kept.
        """
        channel = self._channels.setdefault(session_id, _Channel())
        channel.followers += 1
        try:
            while True:
                entries = channel.since(after)
                if entries is None:
                    try:
                        entries = await self._catch_up(session_id, after, channel)
                    except UNAVAILABLE:  # the client keeps waiting; Redis will be back
                        await asyncio.sleep(OUTAGE_SECONDS)
                        yield []
                        continue
                if entries:
                    if entries[0].index != after + 1:
                        raise _expired()
                    after = entries[-1].index
                    yield entries
                elif channel.gone:
                    raise _expired()
                elif not await channel.changed(idle_seconds):
                    yield []
        finally:
            channel.followers -= 1
            if channel.followers == 0 and self._channels.get(session_id) is channel:
                del self._channels[session_id]

    async def _catch_up(self, session_id: str, after: int, channel: _Channel) -> list[Entry]:
        """Read from Redis; at the log's end, let the hub go on from there."""
        entries = await self._log.read(session_id, after)
        if channel.last is None and len(entries) < PAGE:
            channel.last = entries[-1].index if entries else after
            self._ring(session_id)  # what was appended since the read
        return entries

    def _ring(self, *session_ids: str) -> None:
        self._rung.update(session_ids)
        self._wake.set()

    async def _listen(self) -> None:
        async with self._bell.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            await pubsub.subscribe(keys.EVENT_BELL)
            async for message in pubsub.listen():
                rung = [s for s in message["data"].decode().split(",") if s in self._channels]
                if rung:
                    self._ring(*rung)

    async def _pump(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            rung, self._rung = self._rung, set()
            try:
                await self._read(rung)
            except UNAVAILABLE:
                self._rung |= rung
                await asyncio.sleep(OUTAGE_SECONDS)
                self._wake.set()

    async def _read(self, session_ids: set[str]) -> None:
        """Fetch the new events of these sessions, and hand them to their channels."""
        positions: dict[str, int] = {}
        for session_id in session_ids:
            channel = self._channels.get(session_id)
            if channel is not None and channel.last is not None:
                positions[session_id] = channel.last
        for session_id, entries in (await self._log.read_many(positions)).items():
            channel = self._channels.get(session_id)
            if channel is None or channel.last != positions[session_id]:
                continue  # left, or begun anew, while we read
            channel.missing = 0
            channel.extend(entries)
            if len(entries) == PAGE:
                self._ring(session_id)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            sessions = list(self._channels)
            with contextlib.suppress(*UNAVAILABLE):
                async with self._store.redis.pipeline(transaction=False) as pipe:
                    for session_id in sessions:
                        pipe.exists(keys.session(session_id))
                    found = await pipe.execute()
                self._mark_missing(sessions, found)
            self._ring(*self._channels)

    def _mark_missing(self, sessions: list[str], found: list[int]) -> None:
        for session_id, exists in zip(sessions, found, strict=True):
            channel = self._channels.get(session_id)
            if channel is None:
                continue
            channel.missing = 0 if exists else channel.missing + 1
            if channel.missing >= VANISHED_SWEEPS:
                channel.gone = True
                channel.notify()

    async def _refresh_presence(self) -> None:
        while True:
            with contextlib.suppress(*UNAVAILABLE):
                await self._presence.watching(list(self._channels))
            await asyncio.sleep(REFRESH_SECONDS)


def _expired() -> UnbrokenError:
    return UnbrokenError("events_expired", "These events are no longer kept.")


async def _restarting(loop: object) -> None:
    """Run one of the relay's loops; a lost connection starts it again, a bug is logged first."""
    while True:
        try:
            await loop()  # type: ignore[operator]
        except UNAVAILABLE as error:
            log.warning("redis unavailable", extra={"error": type(error).__name__})
        except Exception:
            log.exception("relay loop failed")
        await asyncio.sleep(OUTAGE_SECONDS)
