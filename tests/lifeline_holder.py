"""A process that is a worker to others: registered, with a lifeline and the leases of what it took.

Started as `python -m tests.lifeline_holder REDIS_URL WORKER_ID SESSIONS`.
"""

from __future__ import annotations

import asyncio
import sys

from shared import keys
from shared.fleet import Fleet, WorkerInfo
from shared.queue import SessionQueue
from shared.store import Store, connect
from worker.lifeline import Lifeline

LEASE_MS = 3_600_000
"""So long that no test sees it run out."""


async def hold(url: str, worker_id: str, sessions: int) -> None:
    """Claim sessions, say so, and go on until killed."""
    store = Store(connect(url, retries=100))
    running = asyncio.create_task(Lifeline(store.redis, worker_id).run())
    await Fleet(store).announce(WorkerInfo(worker_id, "ready", "m"))
    queue = SessionQueue(store, kept_seconds=60, watch_ms=60_000)
    for claimed in (await queue.claim(worker_id, sessions)).sessions:
        await store.redis.zincrby(keys.LEASES, LEASE_MS, claimed.session_id)
    sys.stdout.write("holding\n")
    sys.stdout.flush()
    await running


if __name__ == "__main__":
    asyncio.run(hold(sys.argv[1], sys.argv[2], int(sys.argv[3])))
