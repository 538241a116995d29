"""The publisher writes each session's events in order, once, whatever Redis does."""

import asyncio

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from shared.protocol import (
    CallDelta,
    Delta,
    Finished,
    GenerationRequest,
    Message,
    SamplingParams,
    TextPart,
    Usage,
    decode_event,
)
from shared.queue import Claimed, SessionQueue, Submission
from shared.session_log import SessionLog
from worker.publisher import BATCH_EVENTS, Ending, Publisher


class Flaky(SessionLog):
    """The real log, whose next calls fail: before they reach Redis, or after."""

    def __init__(self, store):
        super().__init__(store)
        self.lose_calls = self.lose_replies = self.break_calls = 0
        self.sizes = []
        self.reply = asyncio.Event()  # replies wait for it
        self.reply.set()

    async def append(self, batch):
        if self.lose_calls:
            self.lose_calls -= 1
            raise RedisConnectionError("lost call")
        if self.break_calls:
            self.break_calls -= 1
            raise RuntimeError("a bug")
        self.sizes.append(sum(len(item.events) for item in batch))
        replies = await super().append(batch)
        await self.reply.wait()
        if self.lose_replies:
            self.lose_replies -= 1
            raise RedisConnectionError("lost reply")
        return replies


@pytest.fixture
def log(store):
    return Flaky(store)


@pytest.fixture
async def publisher(log):
    publisher = Publisher(log, kept_seconds=60)
    publisher.start()
    yield publisher
    await publisher.close()


@pytest.fixture
async def claim(store):
    queue = SessionQueue(store, kept_seconds=60, watch_ms=60_000)

    async def claim(*names):
        request = GenerationRequest((Message("user", (TextPart("x"),)),), SamplingParams())
        for name in names:
            await queue.submit(
                Submission(name, "", request.digest(), "m", "fp", False, request), 100
            )
        return (await queue.claim("w", len(names))).sessions

    return claim


END = Ending(Finished(("stop",), Usage(1, 2)), "finished", Usage(1, 2))


def delta(n, ids=None):
    return Delta(0, (n,) if ids is None else ids, f"{n} ")


async def texts(log, session_id):
    entries, after = [], -1
    while page := await log.read(session_id, after):
        entries += page
        after = page[-1].index
    assert [e.index for e in entries] == list(range(len(entries)))
    events = [decode_event(e.data) for e in entries]
    texts = (getattr(e, "text", getattr(e, "arguments", None)) for e in events)
    return [text for text in texts if text is not None]


@pytest.mark.parametrize("fault", ["lose_calls", "lose_replies", "break_calls"])
async def test_lost_calls_and_replies_lose_and_repeat_nothing(log, publisher, claim, fault):
    """A lost call, a lost reply, even a bug: the log has each event once, in order."""
    [mine] = await claim("a")
    writer = publisher.open(mine, 1, lambda: None)
    setattr(log, fault, 3)
    for n in range(40):
        writer.write(delta(n))
        publisher.flush()
        await asyncio.sleep(0)
    assert await writer.finish(END)
    assert await texts(log, "a") == [f"{n} " for n in range(40)]


async def test_what_gathers_during_a_call_goes_out_together(log, publisher, claim):
    """Events of all sessions written meanwhile share the next append."""
    claims = await claim("a", "b", "c")
    writers = [publisher.open(c, 1, lambda: None) for c in claims]
    for n in range(20):
        for writer in writers:
            writer.write(delta(n))
    publisher.flush()
    assert await asyncio.gather(*(w.finish(END) for w in writers)) == [True] * 3
    assert len(log.sizes) <= 1  # all of it went out with the finishes, or in one append
    assert [len(await texts(log, name)) for name in "abc"] == [20] * 3


async def test_a_fenced_session_is_lost_and_the_others_go_on(log, publisher, claim):
    """Losing one lease tells that session's job, once, and harms no other."""
    [mine, other] = await claim("a", "b")
    lost = []
    gone = publisher.open(Claimed("a", "stranger:1"), 1, lambda: lost.append("a"))
    going = publisher.open(other, 1, lambda: lost.append("b"))
    for writer in (gone, going):
        writer.write(delta(1))
    publisher.flush()
    assert await going.finish(END)
    assert not await gone.finish(END)
    assert lost == ["a"]
    assert await texts(log, "a") == []
    assert mine.session_id == "a"


@pytest.mark.parametrize("event", [Delta(0, (), "-1 "), CallDelta(0, (), 0, "-1 ")])
async def test_a_backlog_is_not_cut_inside_a_token(log, publisher, claim, event):
    """A delta without ids, of text or of a call, goes out with the one that holds its token."""
    [mine] = await claim("a")
    writer = publisher.open(mine, 1, lambda: None)
    for n in range(BATCH_EVENTS - 1):
        writer.write(delta(n))
    writer.write(event)  # would be the last of a full batch
    writer.write(delta(-2))
    writer.write(delta(-3))
    assert len(writer.batch().events) == BATCH_EVENTS - 1
    assert await writer.finish(END)
    assert len(await texts(log, "a")) == BATCH_EVENTS + 2


async def test_a_job_that_is_cancelled_between_call_and_reply_ends_nothing(log, publisher, claim):
    """What was pending then is for the successor: no end without it gets into the log."""
    [mine] = await claim("a")
    writer = publisher.open(mine, 1, lambda: None)
    log.reply.clear()
    writer.write(delta(1))
    publisher.flush()
    while not log.sizes:
        await asyncio.sleep(0.01)
    writer.write(delta(2))
    job = asyncio.create_task(writer.finish(END))
    await asyncio.sleep(0)
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
    writer.close()
    log.reply.set()
    [other] = await claim("b")
    assert await publisher.open(other, 1, lambda: None).finish(END)
    assert await texts(log, "a") == ["1 "]
    assert (await log.record("a")).status == "running"
