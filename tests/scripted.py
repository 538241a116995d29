"""A worker without a model, for tests of everything around it: real leases, scripted text."""

from __future__ import annotations

from shared import keys
from shared.fleet import Fleet, WorkerInfo
from shared.protocol import Delta, Failed, Finished, Usage, encode_event
from shared.queue import Claimed, SessionQueue
from shared.session_log import Append, SessionLog
from shared.store import Store

HELD_MS = 60_000
"""How long announcements and leases last: nobody renews them, however slow the machine is."""


class ScriptedWorker:
    """Claims sessions and writes what the test says, through the real scripts."""

    def __init__(self, store: Store, worker_id: str = "scripted", model: str = "org/tiny") -> None:
        self.id, self.model, self.store = worker_id, model, store
        self.log = SessionLog(store)
        self.queue = SessionQueue(store, kept_seconds=60, watch_ms=60_000, model=model)
        self.fleet = Fleet(store)
        self._next: dict[str, int] = {}
        self.load: dict[str, float] = {}  # more of what it says of itself

    async def announce(self, state="ready", reason="", **more) -> None:
        known = {"context_length": 128, "fingerprint": "fp_test", "since": 1, **self.load, **more}
        await self.fleet.announce(WorkerInfo(self.id, state, self.model, reason, **known))
        await self.store.redis.pexpire(keys.worker(self.id), HELD_MS)

    async def claim(self, count: int = 1) -> list[Claimed]:
        claim = await self.queue.claim(self.id, count)
        for claimed in claim.sessions:
            await self.store.redis.zincrby(keys.LEASES, HELD_MS, claimed.session_id)
            record = await self.log.record(claimed.session_id)
            self._next[claimed.session_id] = record.last + 1
        return claim.sessions

    async def next(self) -> Claimed:
        """Wait for a session, and claim it; stays announced meanwhile."""
        while True:
            await self.announce()
            if claims := await self.claim():
                return claims[0]
            await self.queue.wait_for_work(0.2)

    async def say(self, claimed: Claimed, text: str, channel="content") -> int:
        """Append one delta; returns what `append` answers."""
        index = self._next[claimed.session_id]
        event = encode_event(Delta(0, (index,), text, channel))
        [last] = await self.log.append([Append(*claimed, index, [event])])
        self._next[claimed.session_id] = max(last + 1, index)
        return last

    def rewind(self, claimed: Claimed) -> None:
        """Go back by one delta, which is to be said again."""
        self._next[claimed.session_id] -= 1

    async def finish(self, claimed: Claimed, reason="stop") -> bool:
        index = self._next[claimed.session_id]
        usage = Usage(7, index - 1)
        event = Finished((reason,), usage)
        return await self.log.finish(
            Append(*claimed, index, []), event, status="finished", usage=usage, kept_seconds=60
        )

    async def fail(self, claimed: Claimed, code: str, message: str, param=None) -> bool:
        index = self._next[claimed.session_id]
        return await self.log.finish(
            Append(*claimed, index, []),
            Failed(code, message, param),
            status="failed",
            usage=Usage(),
            kept_seconds=60,
        )


class ArchivingWorker(ScriptedWorker):
    """A scripted worker that knows `PERSIST_SESSIONS`."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.log = SessionLog(store, archived=True)
        self.queue = SessionQueue(
            store, kept_seconds=60, watch_ms=60_000, archived=True, model=self.model
        )
