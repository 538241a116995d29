"""What happens to the stack in a chaos run: faults at random moments, and whom they hit."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
from redis.exceptions import RedisError

from shared import keys
from shared.fleet import WorkerInfo
from worker.lifeline import LOOK_SECONDS, MISSES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio import Redis

    from benchmarks._chaos_clients import Client, Stream
    from benchmarks._chaos_stack import Part, Stack

PAUSES = (0.5, 1.5)
"""Seconds from one fault to the next, as they are drawn."""

LONGEST_PAUSE = 1.9
"""Whatever asking whom to hit may take: a fault that is not chosen by then is a cut of clients."""

FREEZE_SECONDS = {"worker": (3.0, 5.0), "gateway": (0.5, 2.5), "redis": (0.5, 3.0)}

KINDS = {
    "worker SIGKILL": 4,
    "worker SIGTERM": 3,
    "worker SIGSTOP": 2,
    "gateway SIGKILL": 2,
    "gateway SIGTERM": 2,
    "gateway SIGSTOP": 1,
    "redis SIGKILL": 1,
    "redis SIGSTOP": 1,
    "client cut": 3,
}
"""Each kind of fault, and how often it is drawn among the others."""

QUIET_SHARE = 0.5
QUIET_SECONDS = {"worker": 4.5, "gateway": 2.0, "redis": 2.0}
"""For so long (beside the outage) a share of the faults stays the only one of those that it hit, so
that their silence has one cause: meanwhile only connections of others are cut."""


@dataclass
class Fault:
    """One fault. Times are monotonic seconds; `outage` is how long its part was not there."""

    kind: str
    at: float
    outage: float = 0.0
    hit: list[Stream] = field(default_factory=list)


class Faults:
    """Draws faults and injects them.

    No worker is hit while no other one is ready, and no gateway while no other one answers: what
    then happens is silence until one is back, whose length says nothing.

    Args:
        stack: what to hit.
        redis: a client of its Redis that survives restarts.
        clients: whose streams are hit.
        seed: of all that is drawn.
    """

    def __init__(self, stack: Stack, redis: Redis, clients: Sequence[Client], seed: int) -> None:
        self._stack, self._redis, self._clients = stack, redis, clients
        self._rng = random.Random(seed)
        self._frozen: set[int] = set()
        self._gone: set[str] = set()  # workers' names: Redis knows them for seconds after their end
        self._tasks: set[asyncio.Task[None]] = set()
        self._quiet_until = 0.0  # monotonic
        self.done: list[Fault] = []

    async def run(self, seconds: float) -> None:
        """Inject faults for so long, one at least every two seconds, and wait for their ends."""
        last = time.monotonic()
        end = last + seconds
        while (due := last + self._rng.uniform(*PAUSES)) < end:
            await asyncio.sleep(due - time.monotonic())
            if time.monotonic() < self._quiet_until:
                self._cut_a_bystander()
            else:
                await self._inject(last + LONGEST_PAUSE)
            last = self.done[-1].at
        await asyncio.gather(*self._tasks)

    async def _inject(self, deadline: float) -> None:
        """Inject a fault that is possible now, or cut clients if none is found by the deadline."""
        choosing = asyncio.create_task(self._choose())
        await asyncio.wait({choosing}, timeout=deadline - time.monotonic())
        if not choosing.done():
            choosing.cancel()  # it is not waited for: what it finds comes too late
            self._cut_some()
        elif choice := choosing.result():
            await self.hit(*choice)
        else:
            self._cut_some()

    async def _choose(self) -> tuple[str, Part, list[Stream]] | None:
        """Draw one of the kinds that are possible now; None is a cut, which always is."""
        kinds = list(KINDS)
        while True:
            kind = self._rng.choices(kinds, [KINDS[k] for k in kinds])[0]
            if kind == "client cut":
                return None
            part = await self.target(kind.split()[0])
            if part is not None:
                return kind, part, await self.hit_by(part)
            kinds = [k for k in kinds if k.split()[0] != kind.split()[0]]

    def _cut_some(self) -> None:
        running = [s for s in self.streams() if s.times]
        self._cut(self._rng.sample(running, min(len(running), self._rng.randint(1, 4))))

    def _cut(self, hit: list[Stream]) -> None:
        self.done.append(Fault("client cut", time.monotonic(), hit=hit))
        for stream in hit:
            stream.cut = True

    def _cut_a_bystander(self) -> None:
        """Cut a stream that the last fault did not hit, or one of those if it hit them all."""
        last = next(fault for fault in reversed(self.done) if fault.kind != "client cut")
        running = [stream for stream in self.streams() if stream.times]
        spared = set(map(id, last.hit))
        others = [stream for stream in running if id(stream) not in spared]
        hit = self._rng.sample(others or running, 1) if running else []
        self._cut(hit)

    def streams(self) -> list[Stream]:
        """Return the streams that are read now."""
        return [c.current for c in self._clients if c.current is not None]

    async def target(self, kind: str) -> Part | None:
        """Return a part that may be hit now, or None; rather one on which streams depend."""
        able = await self.able(kind)
        if not able or kind == "redis":
            return able[0] if able else None
        weights = [1 + len(await self.hit_by(part)) for part in able]
        return self._rng.choices(able, weights)[0]

    async def able(self, kind: str) -> list[Part]:
        """Return the parts that may be hit now; none where the last one would be."""
        parts = [p for p in self._stack.parts() if p.kind == kind and p.pid not in self._frozen]
        if kind == "redis":
            return parts if await self._redis_answers() else []
        if kind == "gateway":
            able = [p for p in parts if await _listens(p.port)]
        else:
            ready = await self._ready_workers()
            able = [p for p in parts if p.name in ready - self._gone]
        return able if len(able) > 1 else []

    async def _redis_answers(self) -> bool:
        try:
            return bool(await asyncio.wait_for(self._redis.ping(), 0.2))
        except (RedisError, OSError, asyncio.TimeoutError):
            return False

    async def _ready_workers(self) -> set[str]:
        """Return the ids of the workers that say that they are ready."""
        try:
            ids = await asyncio.wait_for(self._redis.zrange(keys.WORKERS, 0, -1), 0.5)
            names = [i.decode() for i in ids]
            found = await self._redis.mget([keys.worker(n) for n in names]) if names else []
        except (RedisError, OSError, asyncio.TimeoutError):
            return set()
        infos = [msgspec.json.decode(value, type=WorkerInfo) for value in found if value]
        return {info.id for info in infos if info.state == "ready"}

    async def hit(self, kind: str, part: Part, before: list[Stream] | None = None) -> None:
        """Inject a fault of a kind, and note whom it hits.

        Args:
            kind: one of `KINDS`, but no cut.
            part: what to signal.
            before: who depended on it just now, if that was asked already.
        """
        number = getattr(signal, kind.split()[1])
        if before is None:
            before = await self.hit_by(part)
        fault = Fault(kind, time.monotonic())
        if not part.signal(number):
            self._cut_some()
            return
        self.done.append(fault)
        if number != signal.SIGSTOP:
            self._gone.add(part.name)
        else:
            self._frozen.add(part.pid)
            fault.outage = self._rng.uniform(*FREEZE_SECONDS[part.kind])
            self._begin(self._thaw(part, fault))
        if kind == "redis SIGKILL":
            self._begin(self._time_outage(fault))
        # Who stops gives its sessions away at once; a dead or frozen worker's leases still stand.
        fault.hit = before if number == signal.SIGTERM else await self.hit_by(part)
        if self._rng.random() < QUIET_SHARE:
            self._quiet_until = fault.at + fault.outage + QUIET_SECONDS[part.kind]

    def _begin(self, work: object) -> None:
        task = asyncio.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)

    async def _thaw(self, part: Part, fault: Fault) -> None:
        await asyncio.sleep(fault.at + fault.outage - time.monotonic())
        part.signal(signal.SIGCONT)
        self._frozen.discard(part.pid)
        fault.outage = time.monotonic() - fault.at

    async def _time_outage(self, fault: Fault) -> None:
        """Note when Redis answers again."""
        answers = False
        while not answers:
            await asyncio.sleep(0.01)
            answers = await self._redis_answers()
        fault.outage = time.monotonic() - fault.at

    async def hit_by(self, part: Part) -> list[Stream]:
        """Return the streams that depend on a part now."""
        streams = self.streams()
        if part.kind == "redis":
            return streams
        if part.kind == "gateway":
            return [s for s in streams if s.port == part.port]
        patience = LOOK_SECONDS * MISSES / 2  # a dead worker's leases stand that long at least
        known = [s for s in streams if s.session_id]
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for stream in known:
                    pipe.hget(keys.session(stream.session_id), "lease")
                leases = await asyncio.wait_for(pipe.execute(), patience)
        except (RedisError, OSError, asyncio.TimeoutError):
            return []
        mine = f"{part.name}:".encode()
        return [
            s for s, lease in zip(known, leases, strict=True) if (lease or b"").startswith(mine)
        ]


async def _listens(port: int) -> bool:
    """Whether somebody takes connections there, and answers."""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 0.5)
    except (OSError, asyncio.TimeoutError):
        return False
    try:
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        return bool(await asyncio.wait_for(reader.readline(), 0.5))
    except (OSError, asyncio.TimeoutError):
        return False
    finally:
        writer.close()
