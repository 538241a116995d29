"""A worker without a model: claims all sessions, and appends a delta to each at a steady rate.

The sessions are appended to in groups, one script call per group and tick, as a worker's engine
step does; the groups' ticks are spread evenly. The text of a delta is the time at which its append
began (seconds of the monotonic clock). Told in JSON lines what to do; says `ready`, then `claimed`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time

import msgspec

from shared.fleet import ANNOUNCE_SECONDS, Fleet, WorkerInfo
from shared.protocol import Delta, encode_event
from shared.queue import RENEW_SECONDS, Claimed, SessionQueue
from shared.session_log import Append, SessionLog
from shared.store import Store, connect


class Plan(msgspec.Struct):
    """Sessions to wait for, how many share a tick, ticks per second; `padding` enlarges deltas."""

    redis_url: str
    streams: int
    batch: int
    rate: float
    padding: int = 0


class Producer:
    """The worker."""

    def __init__(self, plan: Plan) -> None:
        store = Store(connect(plan.redis_url))
        self.plan, self.fleet, self.log = plan, Fleet(store), SessionLog(store)
        self.queue = SessionQueue(store, kept_seconds=60, watch_ms=60_000)
        self.info = WorkerInfo(
            f"bench-{secrets.token_hex(4)}", "ready", "org/tiny", fingerprint="fp_bench", since=1
        )

    async def announce(self) -> None:
        """Stay registered."""
        while True:
            await self.fleet.announce(self.info)
            await asyncio.sleep(ANNOUNCE_SECONDS)

    async def claim_all(self) -> list[Claimed]:
        """Claim as many sessions as the plan says."""
        claimed: list[Claimed] = []
        while len(claimed) < self.plan.streams:
            more = (await self.queue.claim(self.info.id, self.plan.streams)).sessions
            claimed += more
            if more:  # until `renew` does it, which begins once all are there
                await self.queue.renew({c.session_id: c.lease for c in claimed})
            await asyncio.sleep(0.01)
        return sorted(claimed)

    async def renew(self, sessions: list[Claimed]) -> None:
        """Keep the leases of these sessions."""
        leases = {claimed.session_id: claimed.lease for claimed in sessions}
        while True:
            if lost := await self.queue.renew(leases):
                raise RuntimeError(f"{len(lost)} leases lost")
            await asyncio.sleep(RENEW_SECONDS)

    async def produce(self, sessions: list[Claimed], phase: float) -> None:
        """Append to these sessions for ever."""
        period = 1 / self.plan.rate
        begin, index = time.monotonic() + phase, 1
        while True:
            await asyncio.sleep(max(0, begin + index * period - time.monotonic()))
            text = f"{time.monotonic():.6f}"
            event = encode_event(Delta(0, (index,), text + " " * self.plan.padding))
            batch = [Append(*claimed, index, [event]) for claimed in sessions]
            last = await self.log.append(batch)
            if last != [index] * len(batch):
                raise RuntimeError(f"appends refused: {set(last)}")
            index += 1


async def main() -> None:
    """Do what the plan on stdin says, until stdin closes."""
    loop = asyncio.get_running_loop()
    producer = Producer(msgspec.json.decode(sys.stdin.readline(), type=Plan))
    tasks = [asyncio.create_task(producer.announce())]
    print(json.dumps("ready"), flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    claimed = await producer.claim_all()
    size = producer.plan.batch
    groups = [claimed[i : i + size] for i in range(0, len(claimed), size)]
    for i, group in enumerate(groups):
        phase = i / len(groups) / producer.plan.rate
        tasks.append(asyncio.create_task(producer.renew(group)))
        tasks.append(asyncio.create_task(producer.produce(group, phase)))
    print(json.dumps("claimed"), flush=True)
    tasks.append(asyncio.create_task(asyncio.to_thread(sys.stdin.readline)))
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks[:-1]:
        if task.done():
            task.result()


if __name__ == "__main__":
    asyncio.run(main())
