"""What workers hold comes back when Redis loses it: whole, once, and never over newer state."""

import asyncio
import time

import pytest

from shared import keys
from shared.presence import CONTACT_SECONDS, Presence
from shared.protocol import (
    Delta,
    Finished,
    GenerationRequest,
    Message,
    SamplingParams,
    Started,
    TextPart,
    Usage,
    decode_event,
    encode_event,
)
from shared.queue import SessionCopy, SessionQueue, Submission
from shared.session_log import FENCED, Append, SessionLog
from worker import pulse as pulse_module
from worker.publisher import Ending, Publisher
from worker.pulse import Pulse

REQUEST = GenerationRequest((Message("user", (TextPart("x"),)),), SamplingParams())
NEW = Submission("s", "me", REQUEST.digest(), "m", "fp", True, REQUEST)
END = Ending(Finished(("stop",), Usage(1, 2)), "finished", Usage(1, 2))


def delta(n):
    return encode_event(Delta(0, (n,), f"{n} "))


@pytest.fixture
def queue(store):
    return SessionQueue(store, kept_seconds=60, watch_ms=60_000)


@pytest.fixture
def log(store):
    return SessionLog(store)


@pytest.fixture
async def publisher(log, queue):
    publisher = Publisher(log, kept_seconds=60, restore=queue.restore)
    publisher.start()
    yield publisher
    await publisher.close()


async def running(queue, log, count=3):
    """A running session with some events; returns its copy, as its worker holds it."""
    await queue.submit(NEW, 10)
    [mine] = (await queue.claim("w1", 1)).sessions
    await queue.attempt(mine)
    await queue.begin(mine, "engine", "", 5, exact=True)
    record, request = await log.record("s"), await queue.request("s")
    events = [encode_event(Started(1)), *(delta(n) for n in range(1, count + 1))]
    await log.append([Append(*mine, 1, events[1:])])
    return SessionCopy(mine, record, request, events)


async def texts(log):
    entries = await log.read_all("s")
    assert [e.index for e in entries] == list(range(len(entries)))
    return [e.text for e in map(decode_event, (e.data for e in entries)) if isinstance(e, Delta)]


async def test_a_session_that_redis_forgot_is_as_it_was(queue, log, store):
    """After FLUSHALL a copy brings back record, request, log, lease and watcher, also twice."""
    copy = await running(queue, log)
    before = await log.record("s")
    await store.redis.flushall()
    for _ in range(2):
        assert await queue.restore(copy)
    assert await log.record("s") == before
    assert await texts(log) == ["1 ", "2 ", "3 "]
    assert await queue.request("s") == copy.request
    assert await queue.renew(dict([copy.claimed])) == []
    await store.redis.hset(keys.CONTACT, "since", 0)
    assert await store.redis.exists(keys.watch("s"), keys.job("s")) == 2
    assert await log.append([Append(*copy.claimed, 4, [delta(4)])]) == [4]
    await store.redis.zadd(keys.LEASES, {"s": 1})  # and it can be taken over, as any other
    [other] = (await queue.claim("w2", 1)).sessions
    assert other.session_id == "s"
    assert not await queue.restore(copy)


async def test_a_log_that_lost_its_tail_is_mended(queue, log, store):
    """What a failover lost of the log comes back; what is there stays as it is."""
    copy = await running(queue, log)
    await store.redis.xdel(keys.events("s"), "4-0", "3-0")
    await store.redis.delete(keys.events("s"))
    await store.redis.xadd(keys.events("s"), {"e": copy.events[0]}, id="1-0")
    await store.redis.hset(keys.session("s"), "last", 0)
    assert await queue.restore(copy)
    assert await texts(log) == ["1 ", "2 ", "3 "]
    assert (await log.record("s")).last == 3


async def test_of_two_copies_the_newer_one_stays(queue, log, store):
    """A worker whose session was taken over loses to the one that took it, whoever comes first."""
    old = await running(queue, log)
    await store.redis.zadd(keys.LEASES, {"s": 1})
    [taken] = (await queue.claim("w2", 1)).sessions
    new = old._replace(claimed=taken, events=[*old.events, delta(4)])
    for first, second in ((old, new), (new, old)):
        await store.redis.flushall()
        await queue.restore(first)
        await queue.restore(second)
        assert await texts(log) == ["1 ", "2 ", "3 ", "4 "]
        assert await log.append([Append(*old.claimed, 4, [delta(9)])]) == [FENCED]
        assert await log.append([Append(*new.claimed, 5, [delta(5)])]) == [5]


async def test_what_was_begun_anew_gives_way_to_what_clients_have_seen(queue, log, store):
    """After FLUSHALL a repeated POST may even be claimed first: the first generation goes on."""
    copy = await running(queue, log)
    await store.redis.flushall()
    await queue.submit(NEW, 10)
    [taken] = (await queue.claim("w2", 1)).sessions
    anew = SessionCopy(taken, await log.record("s"), copy.request, copy.events[:1])
    await log.append([Append(*taken, 1, [delta(9)])])
    for _ in range(2):
        assert await queue.restore(copy)
        assert await texts(log) == ["1 ", "2 ", "3 "]
        assert await log.append([Append(*taken, 2, [delta(9)])]) == [FENCED]
        assert not await queue.restore(anew)
        assert await queue.renew(dict([taken])) == ["s"]
    assert await log.append([Append(*copy.claimed, 4, [delta(4)])]) == [4]


async def test_a_copy_replaces_no_ended_session_and_no_stranger(queue, log, store):
    """An ended session stays ended; another owner's or another request's is not touched."""
    copy = await running(queue, log)
    await log.finish(
        Append(*copy.claimed, 4, []), END.event, status="finished", usage=Usage(), kept_seconds=9
    )
    assert not await queue.restore(copy)
    assert (await log.record("s")).status == "finished"
    await store.redis.flushall()
    await queue.submit(NEW._replace(owner="you"), 10)
    assert not await queue.restore(copy)
    await store.redis.flushall()
    await queue.submit(NEW, 10)  # the same client came again: it is this session
    assert await queue.restore(copy)
    assert await texts(log) == ["1 ", "2 ", "3 "]
    assert (await queue.claim("w2", 1)).sessions == []


async def test_a_deleted_session_is_not_brought_back(queue, log, store):
    """Deleted after its end, a session stays so for a worker that was cut off; a new one may be."""
    copy = await running(queue, log)
    end = Append(*copy.claimed, 4, [])
    await log.finish(end, END.event, status="finished", usage=Usage(), kept_seconds=9)
    assert await queue.delete("s", "me", 60) == "deleted"
    assert not await queue.restore(copy)
    assert await log.record("s") is None
    await queue.submit(NEW, 10)  # the id is used again
    [mine] = (await queue.claim("w2", 1)).sessions
    again = copy._replace(claimed=mine, record=await log.record("s"), events=copy.events[:1])
    await store.redis.delete(keys.session("s"))
    assert await queue.restore(again)


def test_copies_are_believed_no_longer_than_ended_sessions_are_kept(monkeypatch):
    """A worker that was cut off for longer may hold a session of whose end nothing is left."""
    now = 100.0
    monkeypatch.setattr(pulse_module.time, "monotonic", lambda: now)
    pulse, long = Pulse(10.0), Pulse(7200.0)
    steady = []
    for _ in range(20):
        now += 1.0
        steady.append((pulse.steady, long.steady))
    assert steady == [(True, True)] * 12 + [(False, True)] * 8


async def test_a_writer_goes_on_after_flushall(queue, log, store, publisher):
    """Redis emptied again and again under a running session: its log is whole at the end."""
    await queue.submit(NEW, 10)
    [mine] = (await queue.claim("w1", 1)).sessions
    lost = []
    writer = publisher.open(mine, 1, lambda: lost.append(1))
    record, request = await log.record("s"), await queue.request("s")
    writer.keep(record, request, [encode_event(Started(1))])
    for n in range(60):
        writer.write(Delta(0, (n,), f"{n} "))
        publisher.flush()
        if n % 20 == 10:
            await store.redis.flushall()
        await asyncio.sleep(0)
    await store.redis.flushall()
    assert await writer.finish(END)
    assert (await texts(log), lost) == ([f"{n} " for n in range(60)], [])
    assert (await log.record("s")).status == "finished"


async def test_a_worker_that_was_frozen_writes_nothing_again(queue, log, store):
    """A copy that may be stale is dropped: the session may have gone on, and ended, elsewhere."""
    publisher = Publisher(log, kept_seconds=60, restore=queue.restore, is_steady=lambda: False)
    publisher.start()
    copy = await running(queue, log)
    lost = asyncio.Event()
    writer = publisher.open(copy.claimed, 4, lost.set)
    writer.keep(copy.record, copy.request, copy.events)
    await store.redis.flushall()
    writer.write(Delta(0, (4,), "4 "))
    publisher.flush()
    await lost.wait()
    assert await log.record("s") is None
    await publisher.close()


def test_a_pulse_tells_a_pause_until_redis_has_confirmed_the_leases(monkeypatch):
    """A pause as long as a lease makes copies doubtful, until Redis confirms the leases again."""
    now = 100.0
    monkeypatch.setattr(pulse_module.time, "monotonic", lambda: now)
    pulse = Pulse()
    now += 2.0
    assert pulse.steady
    asked, now = now, now + 5.0  # frozen while the answer was on its way
    pulse.confirm(asked)
    assert not pulse.steady
    pulse.confirm(now)
    assert pulse.steady
    for _ in range(700):
        now += 1.0
        steady = pulse.steady
    assert not steady  # an outage of many minutes


async def test_nobody_is_abandoned_because_redis_was_emptied(queue, store):
    """A missing watch key means nothing while the session itself is missing too."""
    await queue.submit(NEW, 10)
    await queue.claim("w1", 1)
    presence = Presence(store, watch_ms=60_000)
    began = time.monotonic()
    while time.monotonic() - began < CONTACT_SECONDS + 0.2:
        assert (await presence.signals(["s"]))["s"].watched
        await asyncio.sleep(0.05)
    await store.redis.flushall()
    assert (await presence.signals(["s"]))["s"].watched
    await queue.submit(NEW, 10)
    await store.redis.delete(keys.watch("s"))
    assert not (await presence.signals(["s"]))["s"].watched


async def test_a_full_redis_costs_no_lease_and_lets_a_session_end(queue, log, store):
    """With memory used up, appends are refused, leases are kept, and an end gets through."""
    copy = await running(queue, log)
    await store.redis.config_set("maxmemory", "1")
    try:
        before = await store.redis.zscore(keys.LEASES, "s")
        with pytest.raises(Exception, match=r"maxmemory|OOM"):
            await queue.submit(NEW._replace(session_id="other"), 10)
        await asyncio.sleep(0.005)  # a later expiry
        assert await queue.renew(dict([copy.claimed])) == []
        assert await store.redis.zscore(keys.LEASES, "s") > before
        end = Append(*copy.claimed, 4, [delta(4)])
        args = {"status": "finished", "usage": Usage(), "kept_seconds": 9}
        assert await log.finish(end, END.event, **args)
    finally:
        await store.redis.config_set("maxmemory", "0")
    assert await texts(log) == ["1 ", "2 ", "3 ", "4 "]


async def test_a_broken_session_holds_up_no_other(queue, log, store, publisher):
    """One whose log has become something else is lost; the others of its worker are written."""
    copy = await running(queue, log)
    await queue.submit(NEW._replace(session_id="t"), 10)
    [sound] = (await queue.claim("w1", 1)).sessions
    lost = []
    broken = publisher.open(copy.claimed, len(copy.events), lambda: lost.append("s"))
    broken.keep(copy.record, copy.request, copy.events)
    await store.redis.delete(keys.events("s"))
    await store.redis.set(keys.events("s"), "nonsense", ex=60)
    broken.write(Delta(0, (9,), "9 "))
    publisher.flush()
    going = publisher.open(sound, 1, lambda: lost.append("t"))
    assert await going.finish(END)
    while not lost:
        await asyncio.sleep(0.01)
    assert lost == ["s"]
