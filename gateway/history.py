"""`History`: session logs from Redis, and from the archive where Redis has no more."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from shared import keys
from shared.archive import Archive, ArchiveError
from shared.session_log import PAGE, Entry, SessionLog, SessionRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.store import Store

T = TypeVar("T")
log = logging.getLogger("unbroken.history")


class ArchiveThread:
    """An archive and the one thread that uses it, so that a slow disk holds up no stream."""

    def __init__(self, path: str) -> None:
        self._archive = Archive(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="archive")

    async def call(self, work: Callable[[Archive], T]) -> T:
        """Run `work` in the thread.

        Raises:
            ArchiveError: the archive can not be used for now.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, self._archive)

    async def close(self) -> None:
        """Wait for what is under way, then close the file."""
        await self.call(Archive.close)
        self._thread.shutdown(wait=False)


class History(SessionLog):
    """A `SessionLog` whose sessions outlive Redis.

    An event has the same index and the same bytes in both places, so a reader may begin in one and
    go on in the other.

    Args:
        store: the Redis client.
        archive: where ended sessions are kept; None: nowhere.
    """

    def __init__(self, store: Store, archive: ArchiveThread | None) -> None:
        super().__init__(store)
        self._archive = archive

    async def record(self, session_id: str) -> SessionRecord | None:
        """Return the session's record, live or archived, or None where it is unknown.

        Raises:
            ArchiveError: Redis has none, and the archive can not be read for now.
        """
        return await super().record(session_id) or await self.archived(session_id)

    async def archived(self, session_id: str) -> SessionRecord | None:
        """Return the record that the archive has, or None.

        Raises:
            ArchiveError: it can not be read for now.
        """
        return await self._ask(lambda archive: archive.record(session_id), None)

    async def read(self, session_id: str, after: int, count: int = PAGE) -> list[Entry]:
        """Return up to `count` events with an index above `after` (-1: from the first).

        Raises:
            ArchiveError: Redis has none, and the archive can not be read for now.
        """
        entries = await super().read(session_id, after, count)
        if self._archive is None or (entries and entries[0].index == after + 1):
            return entries
        last = await self._store.redis.hget(keys.session(session_id), "last")  # type: ignore[misc]
        if last is not None and int(last) <= after:
            return entries  # nothing new yet
        nothing: list[Entry] = []
        kept = await self._ask(lambda archive: archive.read(session_id, after, count), nothing)
        return kept or entries

    async def forget(self, session_id: str) -> None:
        """Remove the session from the archive.

        Raises:
            ArchiveError: it can not be written for now.
        """
        await self._ask(lambda archive: archive.remove(session_id), None)

    async def _ask(self, question: Callable[[Archive], T], without: T) -> T:
        if self._archive is None:
            return without
        try:
            return await self._archive.call(question)
        except ArchiveError as error:
            log.warning("archive unreadable", extra={"error": str(error)})
            raise
