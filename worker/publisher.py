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
from shared.queue import Claimed, SessionCopy
from shared.session_log import FENCED, LOG_LOST, REFUSED, Append
from shared.store import FAILED, UNAVAILABLE, Outage
from shared.tasks import stop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from shared.protocol import Event, Status
    from shared.session_log import SessionLog, SessionRecord

log = logging.getLogger("unbroken.publisher")

MAX_BACKOFF = 1.0
NO_IDS = re.compile(rb'\["[dpt]",\d+,\[\],')
"""A delta, of text or of a call, whose token stands in the next one: the two go out together, or a
successor would draw the token again behind half of its text."""

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
        self.record: SessionRecord | None = None
        self._request = b""
        self._written: list[bytes] = []  # the log, as far as it is confirmed

    def keep(self, record: SessionRecord, request: bytes, written: Sequence[bytes]) -> None:
        """Hold what it takes to write the session again, should Redis lose it.

        To be called before anything is written.
        """
        self.record, self._request, self._written = record, request, list(written)

    def copy(self) -> SessionCopy | None:
        """Return the session as far as it is confirmed, or None where not all of it is here."""
        if self.record is None or len(self._written) != self.first:
            return None
        claimed = Claimed(self.session_id, self.lease)
        return SessionCopy(claimed, self.record, self._request, self._written)

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

    def doubt(self) -> None:
        """Find out whether the session is another's, or Redis has lost it: then write it again."""
        if not self.ended.done():
            self._publisher.doubted[self.session_id] = self
            self._publisher.wake()

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
        """Take note that the first `count` pending events are in the log."""
        if self.ended.done():  # closed meanwhile: an end sent now would lack what was pending
            return
        self._written += self.pending[:count]
        del self.pending[:count]
        self.first += count
        if self.pending or self.ending:
            self._publisher.dirty[self.session_id] = self


class Publisher:
    """The one task that writes to Redis for all sessions of this worker.

    Args:
        session_log: the logs.
        kept_seconds: how long an ended session stays in Redis.
        restore: writes a session again that Redis may have lost; tells whether it is ours. Without
            it, a session that Redis lost is lost.
        is_steady: whether our copies of sessions can be the newest there are.
    """

    def __init__(
        self,
        session_log: SessionLog,
        *,
        kept_seconds: int,
        restore: Callable[[SessionCopy], Awaitable[bool]] | None = None,
        is_steady: Callable[[], bool] = lambda: True,
    ) -> None:
        self.dirty: dict[str, SessionWriter] = {}
        self.doubted: dict[str, SessionWriter] = {}
        self._log, self._kept = session_log, kept_seconds
        self._restore, self._is_steady = restore, is_steady
        self._wake = asyncio.Event()
        self._outage = Outage(log, "redis takes no writes")
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
            self.wake()

    def wake(self) -> None:
        """Have the task look at what there is to do."""
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            backoff = 0.05
            while self.dirty or self.doubted:
                writers, self.dirty = list(self.dirty.values()), {}
                try:
                    sent = await self._resolve_doubts()
                    sent = await self._send(writers) if sent else self._put_back(writers)
                except Exception:  # a bug must not leave streams hanging on a renewed lease
                    log.exception("publishing failed")
                    sent = self._put_back(writers)
                if sent:
                    backoff = 0.05
                    self._outage.over()
                else:
                    await asyncio.sleep(backoff)
                    backoff = min(backoff * 2, MAX_BACKOFF)

    def _doubt(self, writer: SessionWriter) -> None:
        """Ask whose the session is now, unless we were away for so long that it is not ours."""
        if writer.ended.done():
            return
        if self._restore and self._is_steady() and writer.copy():
            self.doubted[writer.session_id] = writer
        else:
            writer.lose("lease")

    async def _resolve_doubts(self) -> bool:
        """Write doubted sessions again where they are ours; returns False while Redis is away."""
        while self.doubted:
            session_id, writer = next(iter(self.doubted.items()))
            copy = None if writer.ended.done() else writer.copy()
            try:
                if self._restore and copy and await self._restore(copy):
                    log.warning("session written again", extra={"session": session_id})
                    self.dirty[session_id] = writer
                else:
                    writer.lose("lease")
            except UNAVAILABLE as error:
                return self._retry([], error)
            except FAILED as error:  # its own keys are at fault, and must not hold up the others
                log.exception("a session cannot be written again", exc_info=error)
                writer.lose("unreadable")
            self.doubted.pop(session_id, None)
        return True

    async def _send(self, writers: list[SessionWriter]) -> bool:
        """Append for all, end those that end; puts back what failed and returns False then."""
        writers = [w for w in writers if not w.ended.done()]
        ending = [w for w in writers if w.ending and len(w.pending) <= BATCH_EVENTS]
        going = [w for w in writers if w.pending and w not in ending]
        calls = (self._append(going), *map(self._finish, ending))
        results = await asyncio.gather(*calls, return_exceptions=True)  # none may outlive this
        for result in results:
            if isinstance(result, BaseException):
                raise result
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
                self._doubt(writer)
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
            self._doubt(writer)
        elif not writer.ended.done():
            writer.ended.set_result(True)
        return True

    def _retry(self, writers: list[SessionWriter], error: Exception) -> bool:
        if isinstance(error, UNAVAILABLE):
            self._outage.begins(error)
        else:
            log.error("redis refused, will write again", exc_info=error)
        return self._put_back(writers)

    def _put_back(self, writers: list[SessionWriter]) -> bool:
        for writer in writers:
            if not writer.ended.done():
                self.dirty[writer.session_id] = writer
        return False
