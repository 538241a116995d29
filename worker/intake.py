"""How many sessions a worker takes at a time: no more than its engine begins soon.

A worker that dies or freezes leaves many sessions at once. If the first to come took all of them,
it would compute one prompt after the other, while another, or the one that wakes, had none.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

AT_ONCE = 4
"""Sessions that may be on their way to the engine, however slow it is: preparing one and computing
another go side by side."""

RECENT_SECONDS = 0.25
"""As many as an engine has begun within this time may be on their way to it."""

PATIENCE_SECONDS = 1.0
"""A session that is longer on its way (slow media, a busy engine) does not keep others out: what
nobody else has taken by then is taken here."""


class Intake:
    """The sessions that were claimed, and that the engine has not begun."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        """Set when a session leaves the way to the engine; cleared by whoever waits for that."""
        self._claimed: dict[str, float] = {}  # session -> when (monotonic), the oldest first
        self._begun: deque[float] = deque()

    def take(self, session_id: str) -> None:
        """Count a session that was just claimed."""
        self._claimed.pop(session_id, None)
        self._claimed[session_id] = time.monotonic()

    def begin(self, session_id: str) -> None:
        """Take note that the engine has begun a session; a second time changes nothing."""
        if self._claimed.pop(session_id, None) is not None:
            self._begun.append(time.monotonic())
            self.changed.set()

    def leave(self, session_id: str) -> None:
        """Take note that a session has left the worker, begun or not."""
        self._claimed.pop(session_id, None)
        self.changed.set()

    def room(self) -> int:
        """Return how many more may be claimed now; never below 0."""
        now = time.monotonic()
        while self._begun and self._begun[0] <= now - RECENT_SECONDS:
            self._begun.popleft()
        on_their_way = sum(at > now - PATIENCE_SECONDS for at in self._claimed.values())
        return max(0, max(AT_ONCE, len(self._begun)) - on_their_way)

    def opens_in(self) -> float:
        """Return after how many seconds there is more room, if nothing changes until then."""
        now = time.monotonic()
        waits = (at + PATIENCE_SECONDS - now for at in self._claimed.values())
        return min((wait for wait in waits if wait > 0), default=0.0)
