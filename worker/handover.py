"""How a stopping worker's sessions go on elsewhere: a few at a time, while it runs the others."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from shared.store import FAILED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shared.queue import SessionQueue
    from worker.job import SessionJob

AT_ONCE = 1
"""Sessions on their way for each worker that could take them: most of their time is prefill."""

WAIT_SECONDS = 3.0
"""How long the next session runs on here while one makes no progress elsewhere."""

REDIS_SECONDS = 1.0

LOOK_SECONDS = 0.02


async def hand_over(
    jobs: Mapping[str, SessionJob], queue: SessionQueue, free_slots: Sequence[int], seconds: float
) -> None:
    """Give running sessions back one after the other, each as soon as another one goes on.

    All at once would wait for each other: a successor prepares and prefills one prompt at a time.
    Those for which there is no room elsewhere stay.

    Args:
        jobs: the running sessions by id; they leave this mapping as they end.
        queue: where they go.
        free_slots: the room of each live worker that may take some.
        seconds: how long it may take; what is left then is still in `jobs`.
    """
    end = time.monotonic() + seconds
    given: set[str] = set()
    under_way: dict[str, tuple[int, float]] = {}  # session: its last index, and when it was given
    while time.monotonic() < end:
        left = [session_id for session_id in jobs if session_id not in given]
        left = left[: sum(free_slots) - len(given)]
        going = left[: max(0, AT_ONCE * len(free_slots) - len(under_way))]
        lasts = await _lasts(queue, [*under_way, *going])
        for session_id in going:
            given.add(session_id)
            if job := jobs.get(session_id):  # None: it ended while Redis was asked
                under_way[session_id] = lasts.get(session_id, 0), time.monotonic()
                job.hand_over()
        if not under_way and not left:
            return
        await asyncio.sleep(LOOK_SECONDS)
        lasts = await _lasts(queue, list(under_way))
        for session_id, (before, since) in list(under_way.items()):
            grown = session_id not in jobs and lasts.get(session_id, before + 1) > before
            if grown or time.monotonic() - since > WAIT_SECONDS:
                del under_way[session_id]


async def _lasts(queue: SessionQueue, session_ids: list[str]) -> dict[str, int]:
    """Return the last index of each session that runs or waits; none while Redis is away."""
    with contextlib.suppress(*FAILED, asyncio.TimeoutError):
        return await asyncio.wait_for(queue.lasts(session_ids), REDIS_SECONDS)
    return dict.fromkeys(session_ids, -1)
