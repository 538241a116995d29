"""Which workers live, and what each one serves: expiring records that the workers renew."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import msgspec

from shared import keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared.store import Store

ANNOUNCE_SECONDS = 1.0


class WorkerInfo(msgspec.Struct, frozen=True):
    """What a worker says of itself. `reason` explains every state but `ready`.

    Of its `slots`, the `running` sessions have `taken` some: one for each choice.
    `tokens_per_second` are those of the last second; `cache_usage` is a share, 0 to 1.
    `defaults` are the sampling parameters that its model's authors set; no token of the model
    stands for more than `token_bytes` bytes of text (0: not known).
    """

    id: str
    state: Literal["loading", "ready", "failed", "draining"]
    model: str
    reason: str = ""
    context_length: int = 0
    fingerprint: str = ""
    since: int = 0
    running: int = 0
    taken: int = 0
    slots: int = 0
    pid: int = 0
    tokens_per_second: float = 0.0
    cache_usage: float = 0.0
    defaults: dict[str, float] = {}
    token_bytes: int = 0


_decoder = msgspec.json.Decoder(WorkerInfo)


class Fleet:
    """The register of live workers."""

    def __init__(self, store: Store) -> None:
        self._store, self._redis = store, store.redis

    async def announce(self, info: WorkerInfo) -> None:
        """Say that a worker lives, and what it does; to be repeated every `ANNOUNCE_SECONDS`.

        Raises:
            OutOfMemoryError: Redis is full; a worker that it knows stays registered nevertheless.
        """
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.pexpire(keys.worker(info.id), keys.WORKER_TTL_MS)
            pipe.set(keys.worker(info.id), msgspec.json.encode(info), px=keys.WORKER_TTL_MS)
            pipe.zadd(keys.WORKERS, {info.id: time.time()})
            pipe.zremrangebyrank(keys.WORKERS, 0, -10_001)
            pipe.expire(keys.WORKERS, keys.LIVE_TTL)
            await pipe.execute()

    async def leave(self, worker_id: str) -> None:
        """Take a worker off the register."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.delete(keys.worker(worker_id))
            pipe.zrem(keys.WORKERS, worker_id)
            await pipe.execute()

    async def live(self) -> list[WorkerInfo]:
        """Return the live workers; forgets those whose record has expired."""
        ids: list[bytes] = await self._redis.zrange(keys.WORKERS, 0, -1)
        if not ids:
            return []
        values = await self._redis.mget([keys.worker(i.decode(errors="replace")) for i in ids])
        gone = [i for i, value in zip(ids, values, strict=True) if value is None]
        if gone:
            await self._redis.zrem(keys.WORKERS, *gone)
        return _parsed(values)

    async def ids(self) -> list[str]:
        """Return the ids of all registered workers; some may have died lately."""
        return [i.decode(errors="replace") for i in await self._redis.zrange(keys.WORKERS, 0, -1)]

    async def infos(self, worker_ids: Sequence[str]) -> list[WorkerInfo]:
        """Return what these workers say of themselves, those of them that live."""
        if not worker_ids:
            return []
        return _parsed(await self._redis.mget([keys.worker(i) for i in worker_ids]))

    async def lifelines(self, worker_ids: Sequence[str]) -> tuple[list[str], set[str]]:
        """Return the ids of all registered workers, and which of these hold their lifelines."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zrange(keys.WORKERS, 0, -1)
            pipe.pubsub_numsub(*map(keys.lifeline, worker_ids))
            known, counts = await pipe.execute()
        held = {i for i, (_, count) in zip(worker_ids, counts, strict=True) if count}
        return [i.decode(errors="replace") for i in known], held

    async def bury(self, worker_id: str) -> int:
        """Let the leases of a worker without a lifeline run out now; returns how many did."""
        args = [worker_id, keys.lifeline(worker_id), keys.SESSION, keys.WORK_BELL, keys.LIVE_TTL]
        return int(await self._store.run("bury", [keys.LEASES], args))


def _parsed(values: Sequence[bytes | None]) -> list[WorkerInfo]:
    found = [_parse(value) for value in values if value is not None]
    return [worker for worker in found if worker is not None]


def _parse(value: bytes) -> WorkerInfo | None:
    """Read what a worker says of itself; what is not readable says nothing of the others."""
    try:
        return _decoder.decode(value)
    except msgspec.MsgspecError:
        return None
