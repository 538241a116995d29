"""`Pulse`: whether this process has run without a pause since Redis last confirmed its leases.

A worker that was frozen may hold copies of sessions that others have carried on, or ended, since.
"""

from __future__ import annotations

import asyncio
import time

from shared.queue import LEASE_MS

BEAT_SECONDS = 0.2
PAUSE_SECONDS = LEASE_MS / 1000
"""A pause as long as a lease: others may have taken our sessions meanwhile. In a shorter one they
have only if our lifeline broke too: then `restore.lua` refuses our older copy."""

TRUST_SECONDS = 600.0
"""Longest outage of Redis after which our copies of sessions are believed; notes of deleted
sessions are kept as long."""


class Pulse:
    """Tells whether our copies of sessions can be the newest ones there are.

    Args:
        kept_seconds: how long an ended session stays in Redis: a worker that was cut off for longer
            may hold a copy of one that has ended elsewhere, and of which nothing is left.
    """

    def __init__(self, kept_seconds: float = TRUST_SECONDS) -> None:
        self._trust = min(TRUST_SECONDS, kept_seconds + PAUSE_SECONDS)
        self._beat = self._confirmed = time.monotonic()
        self._paused = False

    async def run(self) -> None:
        """Beat until cancelled; it waits for nothing but time."""
        while True:
            self._look()
            await asyncio.sleep(BEAT_SECONDS)

    def confirm(self, asked: float) -> None:
        """Take note that Redis confirmed our leases when asked at `asked` (monotonic seconds)."""
        self._look()
        if time.monotonic() - asked < PAUSE_SECONDS:
            self._confirmed, self._paused = asked, False

    @property
    def steady(self) -> bool:
        """Whether our leases cannot have run out while Redis could be reached by us."""
        self._look()
        return not self._paused and time.monotonic() - self._confirmed < self._trust

    def _look(self) -> None:
        now = time.monotonic()
        self._paused = self._paused or now - self._beat > PAUSE_SECONDS
        self._beat = now
