"""Writes the logs of all running sessions: one append call at a time, for the whole batch.

While a call is under way, or Redis is away, new events gather and go out with the next call.
A session's events are numbered when they are written, so a repeated call appends nothing twice.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, NamedTuple

from shared.protocol import Usage, encode_event
from shared.session_log import FENCED, LOG_LOST, REFUSED, Append
from shared.store import FAILED, UNAVAILABLE
from shared.tasks import stop

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.protocol import Event, Status
    from shared.queue import Claimed
    from shared.session_log import SessionLog

log = logging.getLogger("unbroken.publisher")

MAX_BACKOFF = 1.0
NO_IDS = re.compile(rb'\["d",\d+,\[\],')
"""A delta whose token stands in the next one: the two go out together, or a successor would draw
the token again behind half of its text."""

BATCH_EVENTS = 256
"""Events of one session in one append: what gathered while Redis was away goes out in pieces."""


class Ending(NamedTuple):
    """How a session ends: its terminal event and what the record keeps."""

    event: Event
    status: Status
    usage: Usage = Usage()


class SessionWriter:
    """The writing end of one session's log, valid while the worker holds its lease.

    Args:
        publisher: the process's publisher.
        claimed: the session and its lease.
        first: the index of the next event.
        on_lost: called once when the log turns out to be another's or gone.
    """

    def __init__(
        self, publisher: Publisher, claimed: Claimed, first: int, on_lost: Callable[[], None]
    ) -> None:
        self.session_id, self.lease = claimed
        self.first, self.pending = first, list[bytes]()
        self.ending: Ending | None = None
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._publisher, self._on_lost = publisher, on_lost

    def write(self, event: Event) -> None:
        """Put an event behind the others; it goes out with the publisher's next call."""
        self.pending.append(encode_event(event))
        self._publisher.dirty[self.session_id] = self

    async def finish(self, ending: Ending) -> bool:
        """Write the terminal event and end the session; returns False if it is no longer ours."""
        self.ending = ending
        self._publisher.dirty[self.session_id] = self
        self._publisher.flush()
        return await self.ended

    def close(self) -> None:
        """Write nothing more, whatever is pending."""
        self.pending.clear()
        if self._publisher.dirty.get(self.session_id) is self:
            del self._publisher.dirty[self.session_id]
        if not self.ended.done():
            self.ended.set_result(False)

    def lose(self, why: str) -> None:
        """Drop everything: the session belongs to another worker, or is gone."""
        if not self.ended.done():
            log.warning("session lost", extra={"session": self.session_id, "why": why})
            self.close()
            self._on_lost()

    def batch(self) -> Append:
        """Return the pending events as one append, or as many as fit in one."""
        cut = min(len(self.pending), BATCH_EVENTS)
        if cut < len(self.pending):
            while cut > 1 and NO_IDS.match(self.pending[cut - 1]):
                cut -= 1
        return Append(self.session_id, self.lease, self.first, self.pending[:cut])

    def confirm(self, count: int) -> None:
        """Forget the first `count` pending events: they are in the log."""
        del self.pending[:count]
        self.first += count
        if self.pending or self.ending:
            self._publisher.dirty[self.session_id] = self


class Publisher:
    """The one task that writes to Redis for all sessions of this worker.

    Args:
        session_log: the logs.
        kept_seconds: how long an ended session stays in Redis.
    """

    def __init__(self, session_log: SessionLog, *, kept_seconds: int) -> None:
        self.dirty: dict[str, SessionWriter] = {}
        self._log, self._kept = session_log, kept_seconds
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.create_task(self._run(), name="publisher")

    async def close(self) -> None:
        """Stop writing; what is pending stays unwritten."""
        if self._task:
            await stop(self._task)

    def open(self, claimed: Claimed, first: int, on_lost: Callable[[], None]) -> SessionWriter:
        """Begin to write a session's log at index `first`."""
        return SessionWriter(self, claimed, first, on_lost)

    def flush(self) -> None:
        """Send what was written since; called once per engine step."""
        if self.dirty:
            self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            backoff = 0.05
            while self.dirty:
                writers, self.dirty = list(self.dirty.values()), {}
                try:
                    sent = await self._send(writers)
                except Exception:  # a bug must not leave streams hanging on a renewed lease
                    log.exception("publishing failed")
                    sent = self._put_back(writers)
                if sent:
                    backoff = 0.05
                else:
                    await asyncio.sleep(backoff)
                    backoff = min(backoff * 2, MAX_BACKOFF)

    async def _send(self, writers: list[SessionWriter]) -> bool:
        """Append for all, end those that end; puts back what failed and returns False then."""
        ending = [w for w in writers if w.ending and len(w.pending) <= BATCH_EVENTS]
        going = [w for w in writers if w.pending and w not in ending]
        results = await asyncio.gather(self._append(going), *map(self._finish, ending))
        return all(results)

    async def _append(self, writers: list[SessionWriter]) -> bool:
        if not writers:
            return True
        batch = [writer.batch() for writer in writers]
        try:
            replies = await self._log.append(batch)
        except FAILED as error:
            return self._retry(writers, error)
        for writer, item, last in zip(writers, batch, replies, strict=True):
            if last in (FENCED, LOG_LOST):
                writer.lose("lease" if last == FENCED else "log")
            elif last == REFUSED:
                self.dirty[writer.session_id] = writer
            else:
                writer.confirm(len(item.events))
        return REFUSED not in replies

    async def _finish(self, writer: SessionWriter) -> bool:
        ending, last = writer.ending, writer.batch()
        assert ending is not None  # noqa: S101 - _send picked it for its ending
        try:
            done = await self._log.finish(
                last,
                ending.event,
                status=ending.status,
                usage=ending.usage,
                kept_seconds=self._kept,
            )
        except FAILED as error:
            return self._retry([writer], error)
        if not done:
            writer.lose("lease")
        elif not writer.ended.done():
            writer.ended.set_result(True)
        return True

    def _retry(self, writers: list[SessionWriter], error: Exception) -> bool:
        kind = type(error).__name__
        if isinstance(error, UNAVAILABLE):
            log.warning("redis unavailable, will write again", extra={"error": kind})
        else:
            log.error("redis refused, will write again", exc_info=error)
        return self._put_back(writers)

    def _put_back(self, writers: list[SessionWriter]) -> bool:
        for writer in writers:
            if not writer.ended.done():
                self.dirty[writer.session_id] = writer
        return False
