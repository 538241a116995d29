import asyncio
import contextlib
import time

import pytest

from gateway import channel as channels
from gateway import relay as relays
from gateway import sse
from gateway.channel import TAIL, Viewer
from gateway.relay import Relay
from gateway.render import ChunkRenderer
from shared import keys
from shared.errors import UnbrokenError
from shared.presence import Presence
from shared.protocol import (
    Delta,
    Finished,
    GenerationRequest,
    Message,
    SamplingParams,
    TextPart,
    Usage,
    encode_event,
)
from shared.queue import Claimed, SessionQueue, Submission
from shared.session_log import RING_BYTES, Append, SessionLog
from shared.store import Store, connect
from shared.tasks import stop
from tests.scripted import HELD_MS

MODEL_TEXT = [f"token {n} \n" for n in range(1000)]


class Pipe:
    """A client's connection: keeps what is written to it, and can be full or broken."""

    def __init__(self):
        self.body, self.writes = b"", 0
        self.error = None
        self.room = asyncio.Event()
        self.room.set()
        self.written = asyncio.Event()

    def push(self, data):
        if self.error:
            raise self.error
        if not self.room.is_set():
            return self.write(data)
        self._take(data)
        return None

    async def write(self, data):
        await self.room.wait()
        self._take(data)

    def _take(self, data):
        self.body += data
        self.writes += 1
        self.written.set()

    async def until(self, text):
        """Wait until this is the end of what was written."""
        while not self.body.endswith(text):
            self.written.clear()
            await self.written.wait()


class Stage:
    """A relay, and the worker's side of sessions: `begin("s")`, `say("s", "text")`."""

    def __init__(self, redis_url):
        self.store, self.writer = Store(connect(redis_url)), Store(connect(redis_url))
        self.log = SessionLog(self.writer)
        self.queue = SessionQueue(self.writer, kept_seconds=60, watch_ms=60_000)
        self.presence = Presence(self.store, watch_ms=60_000)
        bell = Store(connect(redis_url))
        self.relay = Relay(bell, SessionLog(self.store), self.presence)
        self.leases, self.next, self.tasks = {}, {}, []

    async def begin(self, session_id="s"):
        request = GenerationRequest((Message("user", (TextPart("x"),)),), SamplingParams())
        new = Submission(session_id, "", "d", "m", "fp", False, request)
        await self.queue.submit(new, 10_000)
        [claimed] = (await self.queue.claim("w", 1)).sessions
        await self.writer.redis.zincrby(keys.LEASES, HELD_MS, session_id)
        self.leases[session_id], self.next[session_id] = claimed.lease, 1

    async def say(self, session_id="s", *texts):
        first = self.next[session_id]
        events = [encode_event(Delta(0, (1,), text)) for text in texts]
        self.next[session_id] += len(events)
        await self.log.append([Append(session_id, self.leases[session_id], first, events)])

    async def finish(self, session_id="s"):
        last = Append(session_id, self.leases[session_id], self.next[session_id], [])
        end = Finished(("stop",), Usage(1, 1))
        await self.log.finish(last, end, status="finished", usage=end.usage, kept_seconds=60)

    async def expected(self, session_id="s"):
        """Return the whole stream of a session, made from its log."""
        entries = await self.log.read(session_id, -1, 200_000)
        frames = await self.frames(session_id)
        return frames.render(0, [entry.data for entry in entries])[0]

    async def frames(self, session_id="s", *, include_usage=False):
        record = await self.log.record(session_id)
        renderer = ChunkRenderer(session_id, record, include_usage=include_usage)
        return sse.Frames(session_id, renderer)

    async def watch(self, session_id="s", after=-1, *, pipe=None, seen=None, idle=60, frames=None):
        """Begin to deliver a session; returns the client's pipe and the task."""
        pipe = pipe or Pipe()
        frames = frames or await self.frames(session_id)
        viewer = Viewer(pipe, frames, after, after if seen is None else seen, idle)
        task = asyncio.create_task(self.relay.deliver(session_id, viewer))
        self.tasks.append(task)
        return pipe, task

    async def close(self):
        await stop(*self.tasks)
        await self.relay.close()
        await self.store.close()
        await self.writer.close()


@pytest.fixture
async def stage(redis_url):
    stage = Stage(redis_url)
    stage.relay.start()
    yield stage
    await stage.close()


@pytest.fixture
async def quiet(redis_url, monkeypatch):
    """A stage whose relay never sweeps: only rings bring events."""
    monkeypatch.setattr(relays, "SWEEP_SECONDS", 3600)
    stage = Stage(redis_url)
    stage.relay.start()
    yield stage
    await stage.close()


@contextlib.contextmanager
def unheard():
    """Let nobody hear what rings meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "EVENT_BELL", "nobody:hears:")
        yield


def frame_end(text):
    """Return how the frame of a delta with this text ends."""
    return (
        b'"content":%s},"logprobs":null,"finish_reason":null}]}\n\n'
        % (encode_event(Delta(0, (), text))[10:-11])
    )


def heard(stage):
    """Keep the payloads of rings in `stage.rings`, and pass them on."""
    stage.rings, whole = [], stage.relay._on_bell

    def on_bell(messages):
        stage.rings += [m[2] for m in messages if m[0] == b"message"]
        whole(messages)

    stage.relay._wires["bell"]._on_push = on_bell


async def knows_its_log(stage):
    """Check that the events kept in memory for whoever comes next are those of the log."""
    [channel] = stage.relay._channels.values()
    assert channel.since(0) == [entry.data for entry in await stage.log.read("s", 0)]


async def settled(stage):
    """Wait until every viewer is written to by the hub."""
    while True:
        await asyncio.sleep(0.01)
        channels = stage.relay._channels.values()
        live = sum(len(c.viewers) for ch in channels for c in ch._crowds.values())
        if live == sum(channel.followers for channel in channels):
            return


async def test_a_session_is_delivered_from_its_log_and_then_live(stage):
    """A viewer gets what there is, what is appended, and the end; each event once."""
    await stage.begin()
    await stage.say("s", "early")
    pipe, task = await stage.watch()
    await pipe.until(frame_end("early"))
    for text in ("a", "b", "c"):
        await stage.say("s", text)
        await pipe.until(frame_end(text))
    await stage.finish()
    await task
    assert pipe.body == await stage.expected()
    assert pipe.body.endswith(sse.DONE)
    assert not stage.relay._channels


async def test_no_task_wakes_for_an_event(stage):
    """Live events are written by the hub: the viewer's own task stays where it is."""
    await stage.begin()
    pipe, task = await stage.watch()
    await settled(stage)
    waits_for = task._fut_waiter
    for text in ("a", "b"):
        await stage.say("s", text)
        await pipe.until(frame_end(text))
    assert task._fut_waiter is waits_for
    await stage.finish()
    await task


async def test_a_thousand_viewers_of_a_session_share_its_rendering(stage, monkeypatch):
    """Events are rendered once for all whose bytes are alike, and everyone gets them all."""
    await stage.begin()
    watched = [await stage.watch(frames=await stage.frames("s")) for _ in range(1000)]
    odd, odd_task = await stage.watch(frames=await stage.frames("s", include_usage=True))
    await settled(stage)
    rendered = []
    whole = sse.Frames.render
    monkeypatch.setattr(sse.Frames, "render", lambda *a: rendered.append(1) or whole(*a))
    await stage.say("s", "once")
    await asyncio.gather(*(pipe.until(frame_end("once")) for pipe, _ in watched))
    await odd.until(b'"usage":null}\n\n')
    assert len(rendered) == 2
    await stage.finish()
    await asyncio.gather(odd_task, *(task for _, task in watched))
    assert {pipe.body for pipe, _ in watched} == {await stage.expected()}
    assert b'"total_tokens":2' in odd.body


async def test_a_client_that_does_not_read_costs_nobody_and_misses_nothing(stage):
    """A full connection gets one write and no more; its neighbour goes on; later it catches up."""
    await stage.begin()
    slow, slow_task = await stage.watch()
    fast, fast_task = await stage.watch()
    await settled(stage)
    slow.room.clear()
    before = slow.writes
    for n in range(0, 4 * TAIL, 16):
        await stage.say("s", *MODEL_TEXT[n : n + 16])
        await fast.until(frame_end(MODEL_TEXT[n + 15]))
    assert slow.writes == before
    [channel] = stage.relay._channels.values()
    assert len(channel._tail) <= 2 * TAIL
    slow.room.set()
    await slow.until(frame_end(MODEL_TEXT[4 * TAIL - 1]))
    await stage.say("s", "live again")
    await slow.until(frame_end("live again"))
    await stage.finish()
    await asyncio.gather(slow_task, fast_task)
    assert slow.body == fast.body == await stage.expected()


async def test_rings_that_come_together_reach_a_full_connection_in_one_piece(quiet):
    """What several rings of a session bring at once is one write, of which nothing gets lost."""
    await quiet.begin()
    slow, task = await quiet.watch()
    await settled(quiet)
    bell, together = quiet.relay._wires["bell"], []
    bell._on_push = together.extend
    texts = [f"text {n}" for n in range(relays.RINGS + 2)]
    for text in texts:
        await quiet.say("s", text)
    while len(together) < len(texts):
        await asyncio.sleep(0.01)
    slow.room.clear()
    quiet.relay._on_bell(together)
    bell._on_push = quiet.relay._on_bell
    slow.room.set()
    await slow.until(frame_end(texts[-1]))
    await quiet.finish()
    await task
    assert slow.body == await quiet.expected()


async def test_the_first_of_many_rings_do_not_wait_for_the_last(quiet, monkeypatch):
    """Of what comes at once, a few sessions at a time are rendered and written."""
    names, pipes, tasks = [f"s{n}" for n in range(2 * relays.RINGS)], [], []
    for name in names:
        await quiet.begin(name)
        pipe, task = await quiet.watch(name)
        pipes.append(pipe)
        tasks.append(task)
    await settled(quiet)
    bell, together, order = quiet.relay._wires["bell"], [], []
    bell._on_push = together.extend
    for name in names:
        await quiet.say(name, "x")
    while len(together) < len(names):
        await asyncio.sleep(0.01)
    render, take = sse.Frames.render, Pipe._take
    monkeypatch.setattr(sse.Frames, "render", lambda *a: (order.append("r"), render(*a))[1])
    monkeypatch.setattr(Pipe, "_take", lambda *a: (order.append("w"), take(*a))[1])
    quiet.relay._on_bell(together)
    bell._on_push = quiet.relay._on_bell
    assert "".join(order) == ("r" * relays.RINGS + "w" * relays.RINGS) * 2
    await asyncio.gather(*map(quiet.finish, names), *tasks)


async def test_a_connection_that_breaks_while_it_is_written_to_disturbs_nobody(stage):
    """A write's exception ends that client's stream, and reaches neither hub nor neighbours."""
    await stage.begin()
    await stage.begin("t")
    broken, broken_task = await stage.watch()
    same, same_task = await stage.watch()
    other, other_task = await stage.watch("t")
    await settled(stage)
    broken.error = OSError("broken pipe")
    await stage.say("s", "x")
    await stage.say("t", "y")
    with pytest.raises(OSError, match="broken pipe"):
        await broken_task
    await same.until(frame_end("x"))
    await other.until(frame_end("y"))
    await stage.finish()
    await stage.finish("t")
    await asyncio.gather(same_task, other_task)


async def test_an_event_of_another_version_fails_its_stream_only(stage):
    """What cannot be rendered is an error of that session's viewers; the hub goes on."""
    await stage.begin()
    await stage.begin("t")
    _, task = await stage.watch()
    other, other_task = await stage.watch("t")
    await settled(stage)
    await stage.log.append([Append("s", stage.leases["s"], 1, [b'["z",1]'])])
    with pytest.raises(ValueError, match="Invalid value"):
        await task
    await stage.say("t", "fine")
    await other.until(frame_end("fine"))
    await stage.finish("t")
    await other_task


async def test_a_lost_ring_costs_a_sweep(stage):
    """Events whose ring nobody heard come with the next sweep."""
    await stage.begin()
    pipe, _ = await stage.watch()
    await settled(stage)
    with unheard():
        await stage.say("s", "quiet")
    await pipe.until(frame_end("quiet"))


async def test_a_ring_brings_the_events_themselves(quiet):
    """What is appended, and the end, reach a live viewer without another look into Redis."""
    await quiet.begin()
    pipe, task = await quiet.watch()
    await settled(quiet)
    quiet.relay._wires.pop("hub")
    await quiet.say("s", "a", "b")
    await quiet.say("s", "c\nd")
    await pipe.until(frame_end("c\nd"))
    await quiet.finish()
    await task
    assert pipe.body == await quiet.expected()


async def test_a_cancelled_sessions_end_comes_with_its_ring(quiet):
    """The end of a session that waits for a worker is in the ring of its cancel."""
    await quiet.begin()
    await quiet.queue.release(Claimed("s", quiet.leases["s"]))
    pipe, task = await quiet.watch()
    await settled(quiet)
    quiet.relay._wires.pop("hub")
    assert await quiet.queue.cancel("s", "", "requested") == "cancelled"
    await task
    assert pipe.body == await quiet.expected()


@pytest.mark.parametrize("size", [RING_BYTES - 100, RING_BYTES + 1])
async def test_a_ring_without_its_events_sends_the_hub_to_the_log(quiet, size):
    """Events that are too many for a ring are read from the log, at once and in order."""
    await quiet.begin()
    pipe, _ = await quiet.watch()
    await settled(quiet)
    heard(quiet)
    await quiet.say("s", "small", "x" * size)
    await quiet.say("s", "small again")
    await pipe.until(frame_end("small again"))
    assert pipe.body == await quiet.expected()
    assert max(map(len, quiet.rings)) <= RING_BYTES + 8


async def test_after_a_lost_ring_the_next_one_fetches_both(quiet):
    """A ring for events that do not follow the last known one makes the hub read the log."""
    await quiet.begin()
    pipe, _ = await quiet.watch()
    await settled(quiet)
    await quiet.say("s", "x", "y", "z")
    await pipe.until(frame_end("z"))
    with unheard():
        await quiet.say("s", "a")
    await quiet.say("s", "b")
    await pipe.until(frame_end("b"))
    assert pipe.body == await quiet.expected()
    await knows_its_log(quiet)


async def test_rings_and_the_hub_may_overtake_each_other(quiet):
    """An event that came by both ways, in whatever order, is written once."""
    await quiet.begin()
    pipe, _ = await quiet.watch()
    await settled(quiet)
    wire, rung = quiet.relay._wires["bell"], []
    wire._on_push = rung.extend
    for text in ("a", "b"):
        await quiet.say("s", text)
    quiet.relay._ring(*quiet.relay._channels.values())
    await pipe.until(frame_end("b"))
    while len(rung) < 2:
        await asyncio.sleep(0.001)
    wire._on_push = quiet.relay._on_bell
    wire._on_push(rung[::-1])
    await knows_its_log(quiet)
    await quiet.say("s", "c")
    await pipe.until(frame_end("c"))
    assert pipe.body == await quiet.expected()


async def test_events_appended_before_the_subscription_are_read_at_once(quiet):
    """Who joins while the bell is being connected misses nothing, and waits for no sweep."""
    await quiet.begin()
    while "bell" not in quiet.relay._wires:
        await asyncio.sleep(0.001)
    quiet.relay._wires.pop("bell")
    pipe, _ = await quiet.watch()
    await settled(quiet)
    while quiet.relay._reading:
        await asyncio.sleep(0.001)
    await quiet.say("s", "early")
    bell = asyncio.create_task(quiet.relay._keep_bell())
    await pipe.until(frame_end("early"))
    await stop(bell)


async def test_a_repeated_append_rings_only_for_what_is_new(quiet):
    """A call repeated after a lost reply, with more behind it, is delivered once."""
    await quiet.begin()
    pipe, _ = await quiet.watch()
    await settled(quiet)
    heard(quiet)
    events = [encode_event(Delta(0, (1,), text)) for text in ("a", "b", "c")]
    for count in (2, 2, 3):
        await quiet.log.append([Append("s", quiet.leases["s"], 1, events[:count])])
    await pipe.until(frame_end("c"))
    assert pipe.body == await quiet.expected()
    assert [ring.partition(b"\n")[0] for ring in quiet.rings] == [b"1", b"3"]


async def test_a_gateway_hears_only_what_its_clients_follow(quiet):
    """Rings of other sessions do not reach this process, nor those of one that nobody follows."""
    for session_id in ("s", "t"):
        await quiet.begin(session_id)
    pipe, task = await quiet.watch()
    await settled(quiet)
    redis = quiet.writer.redis
    assert await redis.pubsub_channels() == [keys.event_bell("s").encode()]
    await quiet.say("t", "elsewhere")
    await quiet.say("s", "here")
    await pipe.until(frame_end("here"))
    await stop(task)
    while await redis.pubsub_channels():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("kind", ["pubsub", "normal"])
async def test_lost_connections_are_opened_anew(stage, kind):
    """When Redis drops its connections, the bell or the hub, the stream goes on."""
    await stage.begin()
    pipe, _ = await stage.watch()
    await settled(stage)
    wires = dict(stage.relay._wires)
    await stage.writer.redis.client_kill_filter(_type=kind, skipme=True)
    while (name := "bell" if kind == "pubsub" else "hub") and (
        stage.relay._wires.get(name) in (None, wires[name])
    ):
        await asyncio.sleep(0.01)
    for text in ("a", "b"):
        await stage.say("s", text)
        await pipe.until(frame_end(text))
    assert pipe.body == await stage.expected()


async def test_a_connection_that_falls_silent_is_opened_anew(stage, monkeypatch):
    """A Redis that no longer answers is left for a new connection; quiet ones are pinged."""
    monkeypatch.setattr(relays, "SWEEP_SECONDS", 0.1)  # a machine that stops for a while
    monkeypatch.setattr(relays, "SILENCE_SECONDS", 2.0)  # shall look like no silence of Redis
    await stage.begin()
    pipe, _ = await stage.watch()
    await settled(stage)
    first = dict(stage.relay._wires)
    await asyncio.sleep(2.2)  # longer than the limit: pings keep both alive
    assert dict(stage.relay._wires) == first
    first["hub"].data_received = lambda _data: None
    first["hub"]._transport.pause_reading()
    while stage.relay._wires.get("hub") in (None, first["hub"]):
        await asyncio.sleep(0.05)
    await stage.say("s", "heard")
    await pipe.until(frame_end("heard"))


async def test_a_vanished_session_is_told_within_sweeps(stage):
    """A followed session that Redis has lost ends with `events_expired`."""
    await stage.begin()
    _, task = await stage.watch()
    await settled(stage)
    await stage.writer.redis.flushall()
    with pytest.raises(UnbrokenError) as raised:
        await task
    assert raised.value.code == "events_expired"


async def test_trimmed_events_are_an_error_never_a_gap(stage):
    """Where events behind a viewer are gone, it is told; nothing is skipped."""
    await stage.begin()
    await stage.say("s", *MODEL_TEXT[:10])
    await stage.writer.redis.xtrim(keys.events("s"), minid="5-0", approximate=False)
    pipe, task = await stage.watch()
    with pytest.raises(UnbrokenError) as raised:
        await task
    assert raised.value.code == "events_expired"
    assert pipe.body == b""


async def test_a_gap_in_what_the_hub_reads_is_an_error_never_skipped(stage):
    """Should the log jump while it is followed, its viewers are told."""
    await stage.begin()
    pipe, task = await stage.watch()
    await settled(stage)
    body = pipe.body
    event = encode_event(Delta(0, (1,), "far"))
    await stage.writer.redis.xadd(keys.events("s"), {"e": event}, id="9-0")
    with pytest.raises(UnbrokenError) as raised:
        await task
    assert raised.value.code == "events_expired"
    assert pipe.body == body


async def test_a_long_log_is_replayed_in_pages(stage):
    """A replay holds a page at a time, and waits for a client that is slower."""
    await stage.begin()
    count = 3000
    for n in range(0, count, 500):
        await stage.say("s", *(MODEL_TEXT[i % 1000] for i in range(n, n + 500)))
    await stage.finish()
    pipe = Pipe()
    pipe.room.clear()
    reads = []
    whole = stage.relay._log.read
    stage.relay._log.read = lambda *a: reads.append(a) or whole(*a)
    _, task = await stage.watch(pipe=pipe)
    while not reads:
        await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0.001)
    assert len(reads) == 1
    pipe.room.set()
    await task
    assert len(reads) >= count / relays.CATCH_UP
    assert pipe.body == await stage.expected()


class Clock:
    """The clock by which a connection is silent for long."""

    def __init__(self):
        self.now = time.monotonic()

    def monotonic(self):
        return self.now


async def test_silence_is_filled_and_events_put_it_off(quiet, monkeypatch):
    """A keep-alive comes after so long without a write, again and again, and only then."""
    clock = Clock()
    for module in (channels, relays):
        monkeypatch.setattr(module, "time", clock)
    await quiet.begin()
    pipe, _ = await quiet.watch(idle=0.05)
    await settled(quiet)
    [crowd] = next(iter(quiet.relay._channels.values()))._crowds.values()
    [viewer] = crowd.viewers
    for n in range(8):
        clock.now += 0.04
        timer = viewer._timer
        while viewer._timer is timer:  # until it has looked whether a keep-alive is due
            await asyncio.sleep(0.001)
        await quiet.say("s", MODEL_TEXT[n])
        await pipe.until(frame_end(MODEL_TEXT[n]))
    assert sse.KEEP_ALIVE not in pipe.body
    for count in (1, 2):
        clock.now += 0.05
        await pipe.until(sse.KEEP_ALIVE * count)
    await quiet.say("s", "after")
    await pipe.until(frame_end("after"))


async def test_a_client_that_is_ahead_of_the_hub_gets_each_event_once(stage):
    """Whoever resumes behind an event that the hub has not read yet does not get it again."""
    await stage.begin()
    await stage.watch()
    await settled(stage)
    [channel] = stage.relay._channels.values()
    stage.relay._wires.pop("hub")  # as if it were slow
    with unheard():
        await stage.say("s", "a", "b")
    ahead, _ = await stage.watch(after=2)
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert channel.last == 0
    hub = asyncio.create_task(stage.relay._keep_hub())
    await stage.say("s", "c")
    await ahead.until(frame_end("c"))
    assert ahead.body.count(b"id: s:") == 1
    hub.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await hub


async def test_the_seen_end_is_read_again_but_not_sent(stage):
    """Whoever has seen the last event gets what follows it, also beside a hub that lags."""
    await stage.begin()
    await stage.say("s", "x")
    await stage.watch()
    await settled(stage)
    stage.relay._wires.pop("hub")
    with unheard():
        await stage.finish()
    pipe, task = await stage.watch(after=1, seen=2)
    await task
    assert pipe.body == sse.DONE


async def test_who_leaves_watches_no_more(stage):
    """A stream that is cancelled, live or stuck, leaves no channel behind: nobody watches."""
    await stage.begin()
    _, live = await stage.watch()
    stuck, stuck_task = await stage.watch()
    await settled(stage)
    stuck.room.clear()
    await stage.say("s", "x")
    await settled_but(stage, 1)
    for task in (live, stuck_task):
        task.cancel()
    ends = await asyncio.gather(live, stuck_task, return_exceptions=True)
    assert [type(end) for end in ends] == [asyncio.CancelledError] * 2
    assert not stage.relay._channels


async def settled_but(stage, count):
    """Wait until all viewers but so many are written to by the hub."""
    while True:
        await asyncio.sleep(0.01)
        for channel in stage.relay._channels.values():
            live = sum(len(crowd.viewers) for crowd in channel._crowds.values())
            if channel.followers > count and live == channel.followers - count:
                return


async def test_followers_and_viewers_share_a_session(stage):
    """A caller that gathers events follows the same session as those it is written to."""
    await stage.begin()
    pipe, task = await stage.watch()
    indexes = []

    async def gather():
        async for entries in stage.relay.follow("s", -1, 5):
            indexes.extend(entry.index for entry in entries)
            if indexes[-1:] == [3]:
                return

    gathering = asyncio.create_task(gather())
    await settled_but(stage, 1)
    await stage.say("s", "a", "b")
    await pipe.until(frame_end("b"))
    await stage.finish()
    await asyncio.gather(gathering, task)
    assert indexes == [0, 1, 2, 3]


async def test_presence_is_renewed_for_all_who_are_followed(stage):
    """Every followed session's watch key comes back within a second or so."""
    for n in range(70):
        await stage.begin(f"s{n}")
        await stage.watch(f"s{n}")
    await stage.writer.redis.delete(*(keys.watch(f"s{n}") for n in range(70)))
    names = [keys.watch(f"s{n}") for n in range(70)]
    while await stage.writer.redis.exists(*names) < 70:
        await asyncio.sleep(0.05)


async def test_while_redis_is_away_clients_wait(redis_url):
    """Without Redis a stream is silent but for keep-alives: no error, no end."""
    stage = Stage(redis_url)
    await stage.begin()
    frames = await stage.frames()
    away = Stage("redis://127.0.0.1:1/0")
    away.relay.start()
    pipe, task = await away.watch(frames=frames, idle=0.2)
    await pipe.until(sse.KEEP_ALIVE * 2)
    assert not task.done()
    await away.close()
    await stage.close()
