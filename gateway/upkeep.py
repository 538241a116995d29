"""What a gateway does beside serving: archives ended sessions, cancels unwatched ones that wait."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from shared import keys
from shared.archive import (
    PURGE_BATCH,
    SETTLE_SECONDS,
    hold_seconds,
    is_whole,
)
from shared.presence import SWEEP_SECONDS
from shared.session_log import Entry, SessionLog, SessionRecord
from shared.store import UNAVAILABLE
from shared.tasks import stop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.history import ArchiveThread
    from shared.overdue import Overdue
    from shared.presence import Sweeper
    from shared.store import Store

log = logging.getLogger("unbroken.upkeep")

POLL_SECONDS = 0.5
TAKEN = 16
"""Sessions taken from the outbox at once."""

RETAKE_SECONDS = 10
"""After so long what was taken and not written is taken again."""

MAX_BACKOFF = 60.0
PURGE_SECONDS = 60


class Archiver:
    """Moves ended sessions from the outbox into the archive, and removes old rows.

    Any number may run: they share the outbox, and writing a session twice changes nothing.

    Args:
        store: the Redis client.
        archive: where to; its thread is used for writing alone.
        kept_seconds: how long Redis keeps an ended session that is archived.
        archive_seconds: how long the archive keeps it.
    """

    def __init__(
        self, store: Store, archive: ArchiveThread, *, kept_seconds: int, archive_seconds: int
    ) -> None:
        self._store, self._log, self._archive = store, SessionLog(store), archive
        self._kept, self._archive_seconds = kept_seconds, archive_seconds
        self._purge_at = 0.0

    async def run(self) -> None:
        """Archive until cancelled; a failure costs time, and nothing else."""
        backoff = POLL_SECONDS
        while True:
            try:
                more = await self.step() == TAKEN
                backoff = POLL_SECONDS
            except UNAVAILABLE as error:
                log.warning("can not archive, will try again", extra={"error": str(error)})
                more, backoff = False, min(backoff * 2, MAX_BACKOFF)
            except Exception:
                log.exception("archiving failed")
                more, backoff = False, MAX_BACKOFF
            await asyncio.sleep(0 if more else backoff)

    async def step(self) -> int:
        """Archive what is due, and remove what is old from time to time; returns how many it took.

        Raises:
            ArchiveError: the rest stays in the outbox, and is due again after `RETAKE_SECONDS`.
        """
        now, *ids = await self._store.run("outbox", [keys.OUTBOX], [TAKEN, RETAKE_SECONDS])
        for session_id in ids:
            await self._try_to_keep(session_id.decode(), now)
        if time.monotonic() >= self._purge_at:
            before = now - self._archive_seconds
            while await self._archive.call(lambda a: a.purge(before)) == PURGE_BATCH:
                pass
            self._purge_at = time.monotonic() + min(PURGE_SECONDS, self._archive_seconds)
        return len(ids)

    async def _try_to_keep(self, session_id: str, now: int) -> None:
        try:
            await self._keep(session_id, now)
        except UNAVAILABLE:  # an ArchiveError is one
            raise
        except Exception:  # one session that breaks something must not hold up the others
            log.exception("session can not be archived", extra={"session": session_id})
            await self._store.redis.zrem(keys.OUTBOX, session_id)

    async def _keep(self, session_id: str, now: int) -> None:
        record = await self._log.record(session_id)
        entries = await self._entries(session_id) if record else []
        if record is None or not is_whole(record, entries) or self._is_late(record, now):
            log.error("session can not be archived", extra={"session": session_id})
            await self._store.redis.zrem(keys.OUTBOX, session_id)
            return
        if record.response is None or record.response.store:
            await self._archive.call(lambda archive: archive.put(session_id, record, entries))
            if await self._is_deleted(session_id, record):  # while it was copied
                await self._archive.call(lambda archive: archive.remove(session_id))
        left = max(SETTLE_SECONDS, (record.ended or 0) + self._kept - now)
        async with self._store.redis.pipeline(transaction=False) as pipe:
            pipe.zrem(keys.OUTBOX, session_id)
            pipe.expire(keys.session(session_id), left)
            pipe.expire(keys.events(session_id), left)
            await pipe.execute()
        log.info("archived", extra={"session": session_id})

    async def _is_deleted(self, session_id: str, record: SessionRecord) -> bool:
        note = await self._store.redis.get(keys.deleted(session_id))
        return note is not None and float(note) == record.enqueued

    def _is_late(self, record: SessionRecord, now: int) -> bool:
        """Tell whether Redis may forget the session before whoever reads now would see its row."""
        return now > (record.ended or 0) + hold_seconds(self._kept) - SETTLE_SECONDS

    async def _entries(self, session_id: str) -> list[Entry]:
        entries: list[Entry] = []
        while page := await self._log.read(session_id, entries[-1].index if entries else -1):
            entries += page
        return entries


class Upkeep:
    """The tasks of one gateway process.

    Args:
        sweeper: looks for unwatched sessions.
        overdue: looks for sessions that no worker takes.
        archiver: None where sessions are not archived.
        threads: the archive's threads, closed at the end.
    """

    def __init__(
        self,
        sweeper: Sweeper,
        overdue: Overdue,
        archiver: Archiver | None,
        threads: tuple[ArchiveThread, ...],
    ) -> None:
        self._sweeper, self._overdue = sweeper, overdue
        self._archiver, self._threads = archiver, threads
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin."""
        for looker in (self._sweeper, self._overdue):
            self._tasks.append(asyncio.create_task(_repeat(looker.sweep), name="sweep"))
        if self._archiver:
            self._tasks.append(asyncio.create_task(self._archiver.run(), name="archive"))

    async def close(self) -> None:
        """Stop, and close the archive."""
        await stop(*self._tasks)
        for thread in self._threads:
            await thread.close()


async def _repeat(step: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await step()
        except UNAVAILABLE:
            pass  # those who serve requests say so
        except Exception:
            log.exception("sweep failed")
        await asyncio.sleep(SWEEP_SECONDS)
