"""What is granted to a client that comes back for its stream: time for Redis and for the log."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

from shared.errors import UnbrokenError, invalid
from shared.store import LOST

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from shared.session_log import SessionRecord

REWRITE_SECONDS = 5.0
"""How long a live session's log may take to reach a place that a client has seen: a Redis that was
killed comes back without its last moments, which the session's worker writes again."""

REWRITE_EVENTS = 10_000
"""How far behind such a place the log may be: no Redis loses more, so that is no place at all."""

RETRY_SECONDS = 2
"""When to come back for a place that has not been written again in time."""

PATIENCE_SECONDS = 3.0
PATIENCE_STEP = 0.05
"""How long a resume waits for a Redis that is away, and between two tries: a restart is most often
shorter than what a 503 makes clients wait."""

T = TypeVar("T")


async def patiently(work: Callable[[], Awaitable[T]]) -> T:
    """Do what a client needs to go on with its stream, again while Redis is away for a moment."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return await work()
        except LOST:
            if time.monotonic() > until:
                raise
        await asyncio.sleep(PATIENCE_STEP)


async def reached(
    place: int, param: str, look: Callable[[], Awaitable[tuple[SessionRecord, int]]]
) -> SessionRecord:
    """Wait until a session's log has a place that a client says it has seen.

    Args:
        place: an index or a sequence number.
        param: what the client calls it.
        look: returns the record as it is, and the last place that the log has.

    Raises:
        UnbrokenError: `invalid_value`, where the session has ended before that place, or is
            nowhere near it; `unavailable`, where the session lives and has not come there in time.
    """
    until = time.monotonic() + REWRITE_SECONDS
    while True:
        record, last = await look()
        if place <= last:
            return record
        if record.has_ended or place - last > REWRITE_EVENTS:
            raise invalid(param, "is beyond the session's end")
        if time.monotonic() > until:
            raise UnbrokenError(
                "unavailable",
                f"The session's log has not come to this '{param}' again yet.",
                param,
                RETRY_SECONDS,
            )
        await asyncio.sleep(REWRITE_SECONDS / 50)
