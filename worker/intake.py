"""How many sessions a worker takes at a time: no more than its engine begins soon.

A worker that dies or freezes leaves many sessions at once. If the first to come took all of them,
it would compute one prompt after the other, while another, or the one that wakes, had none.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

AT_ONCE = 4
"""Sessions that may be on their way, however slow the engine is: one is prepared while another is
computed."""

RECENT_SECONDS = 0.25
"""As many as an engine has begun within this time may be on their way to it."""

PATIENCE_SECONDS = 1.0
"""A session that is prepared for longer (its media come slowly) does not keep others out."""

REFUSED_SECONDS = 5.0
"""For so long a worker leaves a session to others that it had no memory for."""


class Intake:
    """The sessions that were claimed, and that the engine has not begun; and some to be left."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        """Set when a session leaves the way to the engine; cleared by whoever waits for that."""
        self._prepared: dict[str, float] = {}  # since when (monotonic)
        self._sent: set[str] = set()  # to the engine
        self._begun: deque[float] = deque()
        self._refused: dict[str, float] = {}  # until when (monotonic)

    def take(self, session_id: str) -> None:
        """Count a session that was just claimed, and is to be prepared."""
        self._sent.discard(session_id)
        self._prepared[session_id] = time.monotonic()

    def send(self, session_id: str) -> None:
        """Take note that a session waits for the engine now, for however long."""
        if self._prepared.pop(session_id, None) is not None:
            self._sent.add(session_id)

    def begin(self, session_id: str) -> None:
        """Take note that the engine has begun a session; a second time changes nothing."""
        if session_id in self._sent:
            self._sent.remove(session_id)
            self._begun.append(time.monotonic())
            self.changed.set()

    def leave(self, session_id: str) -> None:
        """Take note that a session has left the worker, begun or not."""
        self._prepared.pop(session_id, None)
        self._sent.discard(session_id)
        self.changed.set()

    def refuse(self, session_id: str) -> None:
        """Leave a session to other workers for a while."""
        self._refused[session_id] = time.monotonic() + REFUSED_SECONDS

    def refused(self) -> list[str]:
        """Return the sessions that are to be left to others now."""
        now = time.monotonic()
        self._refused = {sid: until for sid, until in self._refused.items() if until > now}
        return list(self._refused)

    def room(self) -> int:
        """Return how many more may be claimed now; never below 0."""
        now = time.monotonic()
        while self._begun and self._begun[0] <= now - RECENT_SECONDS:
            self._begun.popleft()
        waits = sum(at > now - PATIENCE_SECONDS for at in self._prepared.values())
        return max(0, max(AT_ONCE, len(self._begun)) - waits - len(self._sent))
