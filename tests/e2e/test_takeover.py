"""Workers are killed, frozen and restarted under many streams: a log has one writer at a time."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter

import pytest

from benchmarks._chaos_cases import make_cases
from benchmarks._chaos_clients import Client
from benchmarks._chaos_faults import Faults
from benchmarks._chaos_stack import Stack
from benchmarks._chaos_verdict import judge, read_log, runs_of
from benchmarks.chaos import undisturbed
from shared import keys
from shared.protocol import Delta, Finished, Usage, encode_event
from shared.queue import Claimed, SessionQueue
from shared.session_log import FENCED, Append, SessionLog
from shared.store import Store, connect
from tests.conftest import TEST_ENV

pytestmark = pytest.mark.timeout(
    600
)  # stacks' workers start again: a minute each on a busy machine
CASES, TOKENS, KILLS = 8, 120, 100


@pytest.fixture(scope="module")
def stack(tmp_path_factory, demo_model):
    """Two gateways and two workers that these tests may kill."""
    folder = tmp_path_factory.mktemp("takeover") / "data"
    env = {**TEST_ENV, "MAX_BATCH_SIZE": "64"}
    running = Stack(folder, gateways=2, workers=2, env=env)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture
async def store(stack):
    store = Store(connect(stack.state["redis"]["url"], retries=10))
    yield store
    await store.close()


class Load:
    """Clients that stream without a pause, and the undisturbed truth about what they read."""

    def __init__(self, stack, store, tokens=TOKENS, clients=8):
        self._store, self.stack = store, stack
        self.cases = make_cases(CASES, tokens, seed=1)
        self.clients = [Client(n, stack.urls, self.cases, seed=1) for n in range(clients)]
        self.faults = Faults(stack, store.redis, self.clients, seed=1)
        self._stop = asyncio.Event()

    async def __aenter__(self):
        self.truths = await undisturbed(self.cases, self.stack.urls, self._store)
        self._tasks = [asyncio.create_task(client.run(self._stop)) for client in self.clients]
        return self

    async def __aexit__(self, *_exc):
        self._stop.set()
        await asyncio.gather(*self._tasks)
        for client in self.clients:
            await client.close()

    @property
    def streams(self):
        return [stream for client in self.clients for stream in client.streams]

    async def until_token(self, token, rng):
        """Wait until a stream, chosen by chance, has come so far, or to its end."""
        while not (running := self.faults.streams()):
            await asyncio.sleep(0.005)
        stream = rng.choice(running)
        while len(stream.times) < token and not stream.whole:
            await asyncio.sleep(0.005)

    async def busiest(self):
        """Wait until a worker may be hit, since another one is ready; returns the busiest."""
        while not (able := await self.faults.able("worker")):
            await asyncio.sleep(0.05)
        return max([(len(await self.faults.hit_by(part)), part.pid, part) for part in able])[2]

    async def assert_all_whole(self):
        """Assert that every stream and every log is what it would have been; returns the logs."""
        logs = {s.session_id: await read_log(self._store, s.session_id) for s in self.streams}
        for stream in self.streams:
            found = judge(stream, logs[stream.session_id], self.truths[stream.case])
            assert found.is_whole, (stream.session_id, found)
        return logs


async def lasts(store, streams):
    """Return the last index of each of these streams' logs that has text and no end."""
    found = {}
    for stream in streams:
        key = keys.session(stream.session_id)
        status, last = await store.redis.hmget(key, "status", "last")
        if status in (b"running", b"queued") and int(last) > 0:
            found[stream.session_id] = int(last)
    return found


async def test_100_sessions_killed_at_random_tokens_go_on_with_the_same_text(stack, store):
    """Text, images, sampled, with penalties: a successor begins at the very next index."""
    rng, killed = random.Random(3), []
    async with Load(stack, store, clients=48) as load:
        while len(killed) < KILLS:
            await load.until_token(rng.randint(2, TOKENS // 3), rng)
            await load.faults.hit("worker SIGKILL", await load.busiest())
            killed += (await lasts(store, load.faults.done[-1].hit)).items()
    await load.assert_all_whole()
    lines = list(stack.worker_logs())
    runs, kills = runs_of(lines), Counter(session for session, _ in killed)
    dropped = Counter(line["session"] for line in lines if line["message"] == "session dropped")
    for session, last in killed:
        assert last + 1 in runs[session][1:], (session, last, runs[session])
    for session, count in kills.items():
        assert len(runs[session]) - 1 <= count + dropped[session], (session, runs[session])
    assert len({last for _, last in killed}) > KILLS // 4  # at random places indeed


async def test_a_frozen_worker_is_fenced_off_and_drops_its_work(stack, store):
    """What wakes after a take-over appends nothing, by the script's word, and lets go."""
    async with Load(stack, store, tokens=600, clients=4) as load:
        streams = []
        while not streams:
            part = await load.busiest()
            streams = [s for s in await load.faults.hit_by(part) if len(s.times) > 5]
            await asyncio.sleep(0.01)
        part.signal(signal.SIGSTOP)
        try:
            sid = min(streams, key=lambda s: len(s.times)).session_id
            key = keys.session(sid)
            frozen = (await store.redis.hget(key, "lease")).decode()
            assert frozen.startswith(f"{part.name}:")
            while (await store.redis.hget(key, "lease")).decode().startswith(frozen):
                await asyncio.sleep(0.02)
            while (await store.redis.hget(key, "status")) == b"queued":
                await asyncio.sleep(0.02)
            await assert_refused(store, sid, frozen)
        finally:
            part.signal(signal.SIGCONT)
        while not any(
            line["message"] == "session dropped" and line["session"] == sid
            for line in stack.worker_logs()
        ):
            await asyncio.sleep(0.1)
    await load.assert_all_whole()
    assert len(runs_of(stack.worker_logs())[sid]) >= 2


async def assert_refused(store, session_id, lease):
    """Assert that an old lease can neither append, nor end, nor give back the session."""
    log, record = SessionLog(store), await SessionLog(store).record(session_id)
    late = Append(session_id, lease, record.last + 1, [encode_event(Delta(0, (1,), "late"))])
    assert await log.append([late]) == [FENCED]
    end, usage = Finished(("stop",), Usage()), Usage()
    assert not await log.finish(late, end, status="finished", usage=usage, kept_seconds=60)
    queue = SessionQueue(store, kept_seconds=60, watch_ms=60_000)
    assert not await queue.release(Claimed(session_id, lease))
    assert await queue.renew({session_id: lease}) == [session_id]
    for entry in await log.read(session_id, record.last):
        assert b"late" not in entry.data


async def test_a_rolling_restart_under_load_loses_nothing(stack, store):
    """All workers and all gateways are stopped, one after the other, while clients stream."""
    async with Load(stack, store) as load:
        for kind in ("worker", "gateway"):
            for number in (1, 2):
                [part] = [p for p in stack.parts() if (p.kind, p.number) == (kind, number)]
                while await load.faults.target(kind) is None:
                    await asyncio.sleep(0.1)
                assert part.signal(signal.SIGTERM)
                while part.lives():
                    await asyncio.sleep(0.05)
        while await load.faults.target("gateway") is None:
            await asyncio.sleep(0.1)
    await load.assert_all_whole()
