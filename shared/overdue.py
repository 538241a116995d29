"""Ends sessions that no worker takes, so that nobody waits for ever, also where no worker lives."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from redis.exceptions import ResponseError

from shared.errors import UnbrokenError
from shared.metrics import FAILURES
from shared.presence import Contact

if TYPE_CHECKING:
    from shared.queue import SessionQueue

log = logging.getLogger("unbroken.overdue")

LOOK_SECONDS = 1.0


class Overdue:
    """Fails sessions that wait for a worker for too long. Every gateway and worker has one.

    After an outage of Redis, workers get a moment to renew their leases and to claim.

    Args:
        queue: the session queue.
        timeout_seconds: how long a session may wait since it was queued, given back, or lost its
            worker.
    """

    def __init__(self, queue: SessionQueue, timeout_seconds: float) -> None:
        self._queue, self._timeout = queue, timeout_seconds
        self._contact = Contact(gap_seconds=3 * LOOK_SECONDS)
        self._next = 0.0

    async def sweep(self) -> None:
        """Look for such sessions, at most once a second."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_SECONDS
        found = await self._queue.overdue(self._timeout)
        if self._contact.heard():
            for session_id in found:
                await self._give_up(session_id)

    async def _give_up(self, session_id: str) -> None:
        try:
            if await self._queue.give_up(session_id, self._timeout):
                FAILURES.labels("queue_timeout").inc()
                log.warning("no worker took a session", extra={"session": session_id})
        except (ResponseError, UnbrokenError) as error:  # one that is broken hides no others
            log.warning("cannot end", extra={"session": session_id, "why": str(error)[:80]})
