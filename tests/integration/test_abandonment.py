import asyncio
import contextlib
import itertools
import time

import pytest

from shared import keys, presence
from shared.presence import MARGIN_MS, SWEEP_SESSIONS, Presence, Sweeper
from shared.protocol import GenerationRequest, Message, SamplingParams, TextPart, decode_event
from shared.queue import SessionQueue, Submission
from shared.session_log import SessionLog
from tests.scripted import ScriptedWorker
from tests.served import serving

CHAT = "/v1/chat/completions"
STREAM = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
WATCH_MS = 60_000


@pytest.fixture
def log(store):
    return SessionLog(store)


@pytest.fixture
def queue(store):
    return SessionQueue(store, kept_seconds=60, watch_ms=WATCH_MS)


class Clock:
    """The clock by which a process judges its contact with Redis."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(presence, "time", clock)
    return clock


async def in_contact(clock, *processes):
    """Let these processes have heard of Redis for long enough."""
    for _ in range(20):
        clock.now += 0.25
        for process in processes:
            await process.may_sweep()
    await processes[0]._redis.delete(keys.SWEEP)


def submission(session_id, owner="me"):
    request = GenerationRequest((Message("user", (TextPart("x"),)),), SamplingParams())
    return Submission(session_id, owner, request.digest(), "m", "fp", False, request)


async def status_of(log, session_id):
    return (await log.record(session_id)).status


async def test_a_waiting_session_that_nobody_watches_is_cancelled(store, queue, log, clock):
    """It ends as abandoned where it waits, whoever its owner; a watched one stays."""
    watch = Presence(store, watch_ms=WATCH_MS)
    for name in ("left", "kept"):
        await queue.submit(submission(name), 9)
    await store.redis.delete(keys.watch("left"))
    await in_contact(clock, watch)
    await Sweeper(store, queue, watch).sweep()
    assert (await status_of(log, "left"), await status_of(log, "kept")) == ("cancelled", "queued")
    [_, last] = await log.read("left", -1)
    assert decode_event(last.data).cancelled == "abandoned"
    assert [c.session_id for c in (await queue.claim("w", 9)).sessions] == ["kept"]


async def test_a_viewer_who_comes_back_in_time_saves_the_session(store, queue, log):
    """Between the look at the key and the cancel somebody may have come back: that counts."""
    await queue.submit(submission("s"), 9)
    assert not await queue.abandon("s")
    await store.redis.delete(keys.watch("s"))
    await Presence(store, watch_ms=WATCH_MS).watching(["s"])
    assert not await queue.abandon("s")
    await store.redis.delete(keys.watch("s"))
    assert (await queue.submit(submission("s"), 9))[0] == "attached"
    assert not await queue.abandon("s")
    assert await status_of(log, "s") == "queued"
    await store.redis.delete(keys.watch("s"))
    assert await queue.abandon("s")


async def test_an_ended_session_is_never_touched(store, queue, log):
    """A finished session has no watch key, and is as it was after any sweep."""
    worker = ScriptedWorker(store, model="m")
    await queue.submit(submission("s"), 9)
    [claimed] = await worker.claim()
    await worker.finish(claimed)
    before = await store.redis.hgetall(keys.session("s"))
    assert not await queue.abandon("s")
    assert not await queue.abandon("unknown")
    assert await store.redis.hgetall(keys.session("s")) == before
    assert not await store.redis.exists(keys.session("unknown"))


async def test_zero_disables_it(store, clock):
    """With 0 there is no watch key, every session counts as watched, and nobody sweeps."""
    queue, watch = SessionQueue(store, kept_seconds=60, watch_ms=0), Presence(store, watch_ms=0)
    await queue.submit(submission("s"), 9)
    await queue.submit(submission("s"), 9)
    await watch.watching(["s"])
    assert not await store.redis.exists(keys.watch("s"))
    await in_contact(clock, watch)
    assert (await watch.signals(["s"]))["s"].watched
    await Sweeper(store, queue, watch).sweep()
    assert await queue.position("s") == 0


async def test_after_silence_of_redis_a_missing_key_is_no_absence(store, queue, clock):
    """Keys expire while Redis is away; gateways get some time to say again who watches."""
    watch = Presence(store, watch_ms=WATCH_MS)
    await queue.submit(submission("s"), 9)
    await store.redis.delete(keys.watch("s"))
    assert (await watch.signals(["s"]))["s"].watched, "just started"
    await in_contact(clock, watch)
    clock.now += 0.05
    assert not (await watch.signals(["s"]))["s"].watched
    clock.now += presence.GAP_SECONDS + 0.1
    assert (await watch.signals(["s"]))["s"].watched, "just back"
    await Sweeper(store, queue, watch).sweep()
    assert await queue.position("s") == 0
    await in_contact(clock, watch)
    assert not (await watch.signals(["s"]))["s"].watched


async def test_of_many_processes_one_sweeps_at_a_time(store, clock):
    """The second to ask is refused, until the first one's turn is over."""
    one, two = (Presence(store, watch_ms=WATCH_MS) for _ in range(2))
    await in_contact(clock, one, two)
    assert await one.may_sweep()
    assert not await two.may_sweep()
    while await store.redis.exists(keys.SWEEP):
        await asyncio.sleep(0.01)
    assert await two.may_sweep()


async def test_a_long_queue_is_swept_in_parts(store, queue, clock):
    """One sweep looks at a bounded number; the next ones at the rest, then at the start again."""
    watch = Presence(store, watch_ms=WATCH_MS)
    await in_contact(clock, watch)
    sweeper = Sweeper(store, queue, watch)
    await store.redis.zadd(keys.QUEUE, {f"s{n:05}": n for n in range(2 * SWEEP_SESSIONS + 5)})
    await store.redis.expire(keys.QUEUE, 60)
    seen = []
    watch.unwatched = lambda ids: asyncio.sleep(0, seen.append(ids) or [])
    for _ in range(4):
        await store.redis.delete(keys.SWEEP)
        await sweeper.sweep()
    assert [len(ids) for ids in seen] == [SWEEP_SESSIONS, SWEEP_SESSIONS, 5, SWEEP_SESSIONS]
    assert list(itertools.chain(*seen[:3])) == [f"s{n:05}" for n in range(2 * SWEEP_SESSIONS + 5)]


async def test_the_watch_key_outlives_its_renewal_by_the_configured_time(store, queue):
    """Submit, renewal and attachment set it to the configured time and the margin of a renewal."""
    watch = Presence(store, watch_ms=2000)
    queue = SessionQueue(store, kept_seconds=60, watch_ms=2000)
    steps = (
        lambda: queue.submit(submission("s"), 9),
        lambda: watch.watching(["s"]),
        lambda: queue.submit(submission("s"), 9),
    )
    for step in steps:
        await step()
        assert 2000 < await store.redis.pttl(keys.watch("s")) <= 2000 + MARGIN_MS
        await store.redis.pexpire(keys.watch("s"), 100)


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_gateway_alone_cancels_what_its_viewers_left(redis_url, store, log, claimed):
    """With no worker free, or none at all, a waiting session ends a second after its time."""
    worker = ScriptedWorker(store)
    await worker.announce()
    settings = {"cancel_after_disconnect_seconds": 1}
    async with serving(redis_url, **settings) as client, contextlib.AsyncExitStack() as stack:
        if claimed:  # by a worker that is busy for ever: another session waits behind it
            body = {**STREAM, "session_id": "busy"}
            await stack.enter_async_context(client.stream("POST", CHAT, json=body))
            await worker.claim()
        while not client.services.presence._contact.heard():
            await asyncio.sleep(0.1)
        body = {**STREAM, "session_id": "s"}
        async with client.stream("POST", CHAT, json=body) as response:
            async for _ in response.aiter_bytes():
                break
            left = time.monotonic()
        while await status_of(log, "s") == "queued":
            await asyncio.sleep(0.01)
        assert 0.9 < time.monotonic() - left < 12
        assert (await client.get("/v1/sessions/s")).json()["cancel_reason"] == "abandoned"
        if claimed:
            assert await status_of(log, "busy") == "running"


async def test_a_waiting_session_stays_while_somebody_watches(redis_url, store, log):
    """A stream, or a caller that waits for the whole, keeps its session in the queue."""
    worker = ScriptedWorker(store)
    await worker.announce()
    async with serving(redis_url, cancel_after_disconnect_seconds=0.5) as client:
        while not client.services.presence._contact.heard():
            await asyncio.sleep(0.1)
        bodies = ({**STREAM, "session_id": "a"}, {**STREAM, "session_id": "b", "stream": False})
        tasks = [asyncio.create_task(client.post(CHAT, json=body)) for body in bodies]
        while await worker.queue.depth() < len(tasks):
            await asyncio.sleep(0.01)
        await asyncio.sleep(3)  # longer than an unwatched session lives
        assert await status_of(log, "a") == await status_of(log, "b") == "queued"
        for claimed in await worker.claim(2):
            await worker.finish(claimed)
        assert {response.status_code for response in await asyncio.gather(*tasks)} == {200}


async def test_a_gateway_with_zero_says_nothing_of_viewers(redis_url, store):
    """`CANCEL_AFTER_DISCONNECT_SECONDS=0` writes no watch keys, so none can expire."""
    worker = ScriptedWorker(store)
    worker.queue = SessionQueue(store, kept_seconds=60, watch_ms=0, model=worker.model)
    await worker.announce()
    async with serving(redis_url, cancel_after_disconnect_seconds=0) as client:
        async with client.stream("POST", CHAT, json={**STREAM, "session_id": "s"}) as response:
            async for _ in response.aiter_bytes():
                break
            await asyncio.sleep(1.2)  # a gateway renews presence every second
            assert not await store.redis.exists(keys.watch("s"))
        assert (await client.get("/v1/sessions/s")).json()["status"] == "queued"
