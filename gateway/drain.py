"""`Drain`: how a gateway that was asked to stop leaves its clients."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeVar

from shared.errors import UnbrokenError
from shared.tasks import stop

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from gateway.connection import Connection

log = logging.getLogger("unbroken.drain")

T = TypeVar("T")

LEAVE_SECONDS = 0.3
"""How long open streams go on, so that those about to end need not move to another gateway."""

STALLED_SECONDS = 2.0
"""How long a broken-off client may take to read what is already written to it."""

RETRY_SECONDS = 1


class Streaming:
    """Notes a stream while its block runs; a class, since thousands of them are held at a time.

    Args:
        streams: where to note it.
        connection: where it goes.
        is_late: its request was under way when the others were broken off.
    """

    __slots__ = ("_connection", "_is_late", "_streams")

    def __init__(
        self,
        streams: dict[Connection, asyncio.Task[None] | None],
        connection: Connection,
        *,
        is_late: bool,
    ) -> None:
        self._streams, self._connection, self._is_late = streams, connection, is_late

    def __enter__(self) -> None:
        task = self._streams[self._connection] = asyncio.current_task()
        if self._is_late:
            asyncio.get_running_loop().call_soon(_close, self._connection, task)

    def __exit__(self, *_exc: object) -> None:
        del self._streams[self._connection]


class Drain:
    """The open streams and the waiting callers of one process, and their end.

    Streams are broken off behind a whole event: their clients come back at once, to a gateway that
    stays, and lose nothing. Who waits for a whole completion is answered while there is time.

    Args:
        seconds: how long callers may wait after `begin`.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._streams: dict[Connection, asyncio.Task[None] | None] = {}
        self._late = asyncio.Event()
        self._leaving = False

    def begin(self) -> None:
        """Begin to leave; new connections are no longer accepted."""
        log.info("drain", extra={"streams": len(self._streams)})
        loop = asyncio.get_running_loop()
        loop.call_later(LEAVE_SECONDS, self._break_off)
        loop.call_later(LEAVE_SECONDS + STALLED_SECONDS, self._abort)
        loop.call_later(self._seconds, self._late.set)

    def streaming(self, connection: Connection) -> Streaming:
        """Note that the current task streams to a connection, while the block runs."""
        return Streaming(self._streams, connection, is_late=self._leaving)

    async def in_time(self, work: Awaitable[T]) -> T:
        """Await `work`, but not longer than this process lives.

        Raises:
            UnbrokenError: `unavailable`, where it takes too long.
        """
        task = asyncio.ensure_future(work)
        late = asyncio.ensure_future(self._late.wait())
        try:
            await asyncio.wait({task, late}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            await stop(task, late)
        message = "The gateway is shutting down; the generation goes on."
        raise UnbrokenError("unavailable", message, retry_after=RETRY_SECONDS)

    def _break_off(self) -> None:
        self._leaving = True
        for connection, task in tuple(self._streams.items()):
            _close(connection, task)

    def _abort(self) -> None:
        for connection in self._streams:
            connection.abort()


def _close(connection: Connection, task: asyncio.Task[None] | None) -> None:
    if not connection.close() and task is not None:
        task.cancel()  # the server breaks the connection of a response that fails
