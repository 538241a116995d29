"""What a worker does with sessions that it cannot run, or shall run no longer."""

import asyncio
import types

import pytest
from redis.exceptions import ResponseError

from shared import keys
from shared.errors import UnbrokenError
from shared.fleet import Fleet, WorkerInfo
from shared.presence import Presence
from shared.protocol import (
    Delta,
    GenerationRequest,
    Message,
    SamplingParams,
    TextPart,
    decode_event,
)
from shared.queue import SessionQueue, Submission
from shared.session_log import SessionLog
from shared.store import Store, connect
from worker import consumer, handover, intake
from worker.balance import SLACK, Balance
from worker.consumer import LeasedWorker
from worker.engine.messages import OUT_OF_MEMORY, Output, Piece, Prompt
from worker.events import NO_MEMORY
from worker.intake import AT_ONCE
from worker.parts import FREE_CLAIMS, Parts
from worker.publisher import Publisher
from worker.pulse import Pulse

TOKENS = 40
READY = types.SimpleNamespace(fingerprint="fp", exact=True, model="m")


class ScriptedEngine:
    """Says the tokens 1, 2, … of each sequence, one a step, from behind what it has already."""

    def __init__(self):
        self.state = types.SimpleNamespace(ready=READY)
        self.on_step_end, self.running, self._handles = lambda: None, {}, 0
        self.going = asyncio.Event()
        self.going.set()

    def new_handle(self):
        self._handles += 1
        return self._handles

    def add(self, message, sink, on_begin):
        on_begin()
        self.running[message.handle] = [sink, len(message.generated)]

    def abort(self, handle):
        self.running.pop(handle, None)

    def cancel(self, handle, _reason):
        self.abort(handle)

    def blames(self, _handle):
        return True

    async def run(self):
        while True:
            await self.going.wait()
            self.step()
            await asyncio.sleep(0.005)

    def step(self):
        for handle, [sink, count] in list(self.running.items()):
            token, last = count + 1, count + 1 == TOKENS
            if last:
                del self.running[handle]
            else:
                self.running[handle][1] = token
            piece = Piece((token,), f"{token} ", "content")
            finish = "length" if last else None
            sink(Output(handle, (piece,), finish, completion_tokens=token))
        self.on_step_end()


class NarrowEngine(ScriptedEngine):
    """Has memory for so many tokens of a run; `short` counts the runs that lacked more."""

    def __init__(self, tokens=0):
        super().__init__()
        self.tokens, self.short = tokens, 0

    def add(self, message, sink, on_begin):
        super().add(message, sink, on_begin)
        self.running[message.handle].append(len(message.generated) + self.tokens)

    def step(self):
        for handle, [sink, count, most] in list(self.running.items()):
            if count == most:
                self.short += 1
                del self.running[handle]
                sink(Output(handle, error=(OUT_OF_MEMORY, "none")))
            else:
                self.running[handle][1] = count + 1
                piece = Piece((count + 1,), f"{count + 1} ", "content")
                finish = "length" if count + 1 == TOKENS else None
                if finish:
                    del self.running[handle]
                sink(Output(handle, (piece,), finish, completion_tokens=count + 1))
        self.on_step_end()


class SlowEngine(ScriptedEngine):
    """Begins a sequence only when it is told to."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def add(self, message, sink, on_begin):
        self.waiting.append(lambda: super(SlowEngine, self).add(message, sink, on_begin))

    def begin(self):
        """Begin all that wait."""
        waiting, self.waiting = self.waiting, []
        for add in waiting:
            add()


class ScriptedPrompts:
    """Prepares any prompt; `failures` are raised before."""

    def __init__(self):
        self.failures, self.begun = [], []

    async def build(self, _request, *, begun=False):
        self.begun.append(begun)
        if self.failures:
            raise self.failures.pop()
        return Prompt([1, 2, 3]), ()


class Worker:
    """A real `LeasedWorker` with a scripted engine."""

    def __init__(self, name, url, engine):
        self.store, self.bell = Store(connect(url)), Store(connect(url, socket_timeout=90))
        self.queue = SessionQueue(self.store, kept_seconds=60, watch_ms=60_000, model="m")
        bell = SessionQueue(self.bell, kept_seconds=60, watch_ms=60_000, model="m")
        self.engine, self.prompts = engine, ScriptedPrompts()
        self.publisher = Publisher(SessionLog(self.store), kept_seconds=60)
        self.engine.on_step_end = self.publisher.flush
        self.consumer = LeasedWorker(
            worker_id=name,
            store=self.store,
            bell=bell,
            queue=self.queue,
            presence=Presence(self.store, watch_ms=60_000),
            parts=Parts(
                log=SessionLog(self.store),
                queue=self.queue,
                publisher=self.publisher,
                prompts=self.prompts,
                engine=self.engine,
            ),
            slots=32,
            pulse=Pulse(),
        )
        self.consumer.can_claim.set()

    def start(self):
        self.publisher.start()
        coroutines = (self.consumer.async_run(), self.engine.run())
        self.tasks = [asyncio.ensure_future(c) for c in coroutines]

    async def stop(self):
        await self.consumer.drain(0)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.publisher.close()
        await self.store.close()
        await self.bell.close()


@pytest.fixture
async def make(redis_url):
    """Make a worker, to be started."""
    made = []

    def make(name="w1", engine=ScriptedEngine):
        made.append(Worker(name, redis_url, engine()))
        return made[-1]

    yield make
    for worker in made:
        await worker.stop()


@pytest.fixture
def log(store):
    return SessionLog(store)


async def submit(queue, *names, choices=1):
    sampling = SamplingParams(n=choices)
    request = GenerationRequest((Message("user", (TextPart("x"),)),), sampling)
    for name in names:
        await queue.submit(Submission(name, "", request.digest(), "m", "fp", False, request), 100)


async def ended(log, session_id):
    """Wait for a session's end; returns its record and its text."""
    while not (record := await log.record(session_id)).has_ended:
        await asyncio.sleep(0.02)
    events = [decode_event(entry.data) for entry in await log.read_all(session_id)]
    return record, "".join(event.text for event in events if isinstance(event, Delta))


WHOLE = "".join(f"{n} " for n in range(1, TOKENS + 1))


async def test_what_a_worker_cannot_prepare_now_is_tried_again(make, log):
    """A processor without room, or away for a moment, gives sessions back instead of failing."""
    worker = make()
    for code in ("unavailable", "model_not_ready"):
        worker.prompts.failures.append(UnbrokenError(code, "not now"))
    worker.start()
    await submit(worker.queue, "s")
    record, text = await ended(log, "s")
    assert (record.status, text, record.claims) == ("finished", WHOLE, 1)


@pytest.mark.parametrize("command", ["begin", "request"])
async def test_an_error_of_redis_that_stays_is_not_tried_for_ever(make, log, command):
    """A session of which Redis refuses something again and again ends as failed."""
    worker = make()

    async def refuse(*_args, **_options):
        raise ResponseError("ERR this does not pass")

    setattr(worker.queue, command, refuse)
    worker.start()
    await submit(worker.queue, "s")
    record, _text = await ended(log, "s")
    assert (record.status, record.attempts) == ("failed", 3)


async def test_a_stopping_worker_hands_over_a_few_sessions_at_a_time(make, log, store, monkeypatch):
    """Each goes on elsewhere, as far as there is room, and the others run on meanwhile."""
    monkeypatch.setattr(handover, "WAIT_SECONDS", 60)  # on the slowest machine, none goes unasked
    old, new = make("old"), make("new")
    names = [f"s{n}" for n in range(12)]
    old.engine.going.clear()  # it takes its time
    old.start()
    await submit(old.queue, *names)
    while len(old.engine.running) < len(names):
        await asyncio.sleep(0.01)
    for _ in range(5):
        old.engine.step()
    for name in names:  # what it writes itself is no sign of another's progress
        while (await log.record(name)).last < 5:
            await asyncio.sleep(0.005)
    new.engine.going.clear()  # it claims, and says nothing yet
    new.start()
    draining = asyncio.create_task(old.consumer.drain(60, [len(names) - 2]))
    while len(new.engine.running) < handover.AT_ONCE:
        await asyncio.sleep(0.005)
    assert len(old.engine.running) == len(names) - handover.AT_ONCE
    new.engine.going.set()
    while len(old.engine.running) > 2:
        await asyncio.sleep(0.01)
    old.engine.going.set()
    await draining
    for name in names:
        record, text = await ended(log, name)
        assert (record.status, text) == ("finished", WHOLE)
    taken = await asyncio.gather(*(store.redis.hget(keys.session(n), "ended_by") for n in names))
    assert sum(lease.startswith(b"old") for lease in taken) == 2  # for want of room elsewhere


async def test_a_session_that_ends_while_it_is_to_be_handed_over_has_ended(make, log, monkeypatch):
    """A stopping worker that asks Redis how far a session is may find that it ended meanwhile."""
    worker = make()
    worker.engine.going.clear()
    worker.start()
    await submit(worker.queue, "s")
    while not worker.engine.running:
        await asyncio.sleep(0.01)
    ask = worker.queue.lasts

    async def ask_slowly(session_ids):
        worker.engine.going.set()
        while worker.consumer.running:
            await asyncio.sleep(0.01)
        return await ask(session_ids)

    monkeypatch.setattr(worker.queue, "lasts", ask_slowly)
    monkeypatch.setattr(handover, "REDIS_SECONDS", 20)
    await worker.consumer.drain(20, [4])
    record, text = await ended(log, "s")
    assert (record.status, text) == ("finished", WHOLE)


async def test_a_drain_ends_jobs_that_swallow_a_cancellation(make, log, store):
    """A job that is caught where redis-py swallows it costs a second, and its session is free."""
    worker, swallowed = make(), asyncio.Event()

    async def connect_slowly(_session_id):
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if swallowed.is_set():
                    raise
                swallowed.set()

    worker.consumer._parts.log.read_all = connect_slowly
    worker.start()
    await submit(worker.queue, "s")
    while not any(job._writer for job in worker.consumer._jobs.values()):
        await asyncio.sleep(0.01)
    await asyncio.wait_for(worker.consumer.drain(0), 5)
    assert swallowed.is_set()
    assert (await log.record("s")).status == "queued"
    assert await store.redis.zcard(keys.LEASES) == 0


async def test_the_engines_begin_is_counted_and_progress_forgotten(make, log, store):
    """A run is an attempt once the engine has begun it; an end leaves the count of one run."""
    worker = make()
    worker.engine.going.clear()
    worker.start()
    await submit(worker.queue, "s")
    while (await log.record("s")).attempts == 0:
        await asyncio.sleep(0.01)
    worker.engine.going.set()
    record, text = await ended(log, "s")
    assert (record.attempts, record.claims, text) == (1, 1, WHOLE)


async def test_what_kills_workers_before_their_engines_begin_is_found_out_alone(make, log, store):
    """After two such deaths, sessions are prepared one at a time, and each run is an attempt."""
    worker, preparing, going = make(), [], asyncio.Event()
    build = worker.prompts.build

    async def build_slowly(request, **options):
        preparing.append(request)
        await going.wait()
        return await build(request, **options)

    worker.prompts.build = build_slowly
    await submit(worker.queue, "a", "b")
    for _ in range(FREE_CLAIMS):
        assert len((await worker.queue.claim("dead", 2)).sessions) == 2
        await store.redis.zadd(keys.LEASES, {"a": 1, "b": 1})
    worker.start()
    while not preparing:
        await asyncio.sleep(0.005)
    await submit(worker.queue, "c")  # which nobody suspects: it waits for no turn
    while len(preparing) < 2:
        await asyncio.sleep(0.005)
    attempts = {name: (await log.record(name)).attempts for name in "abc"}
    assert sorted(attempts.values()) == [0, 0, 1]
    assert attempts["c"] == 0
    going.set()
    for name in "abc":
        record, text = await ended(log, name)
        assert (record.status, text) == ("finished", WHOLE)


async def suspects(worker, store, *names):
    """Queue sessions whose workers died so often that each is tried in a turn of its own."""
    await submit(worker.queue, *names)
    for _ in range(FREE_CLAIMS):
        assert len((await worker.queue.claim("dead", len(names))).sessions) == len(names)
        await store.redis.zadd(keys.LEASES, dict.fromkeys(names, 1))


async def test_a_turn_lasts_until_the_engine_has_said_something(make, log, store):
    """What waits for its turn is no attempt: a worker that dies then counts for one alone."""
    worker = make()
    worker.engine.going.clear()
    await suspects(worker, store, "a", "b", "c")
    worker.start()
    while not worker.engine.running:
        await asyncio.sleep(0.005)
    await submit(worker.queue, "d")
    while len(worker.engine.running) < 2:
        await asyncio.sleep(0.005)
    assert len(worker.prompts.begun) == 2
    assert sorted([(await log.record(name)).attempts for name in "abc"]) == [0, 0, 1]
    worker.engine.going.set()
    for name in "abcd":
        assert (await ended(log, name))[1] == WHOLE


async def test_a_session_that_waits_for_its_turn_can_be_cancelled(make, log, store):
    """It ends at once, and untried, while the one before it is still being prepared."""
    worker, going = make(), asyncio.Event()
    build = worker.prompts.build

    async def build_slowly(request, **options):
        await going.wait()
        return await build(request, **options)

    worker.prompts.build = build_slowly
    await suspects(worker, store, "a", "b")
    worker.start()
    waiting = None
    while waiting is None:
        await asyncio.sleep(0.005)
        attempts = {name: (await log.record(name)).attempts for name in "ab"}
        waiting = next(
            (n for n in "ab" if sorted(attempts.values()) == [0, 1] and not attempts[n]), None
        )
    await worker.queue.cancel(waiting, "", "requested")
    record, _ = await ended(log, waiting)
    assert (record.status, record.attempts) == ("cancelled", 0)
    going.set()
    [other] = {"a", "b"} - {waiting}
    assert (await ended(log, other))[1] == WHOLE


async def test_an_output_that_cannot_be_written_ends_its_session(make, log):
    """Half a character, which no event can hold, fails that session at once; others go on."""
    worker = make()
    worker.start()
    worker.engine.going.clear()
    await submit(worker.queue, "bad", "good")
    while len(worker.engine.running) < 2:
        await asyncio.sleep(0.005)
    handle, (sink, _) = next(iter(worker.engine.running.items()))
    sink(Output(handle, (Piece((1,), "\ud83d", "content"),), completion_tokens=1))
    worker.engine.going.set()
    ends = [await ended(log, name) for name in ("bad", "good")]
    assert sorted(record.status for record, _ in ends) == ["failed", "finished"]
    assert worker.engine.running == {}


async def test_the_form_of_a_session_with_tokens_is_not_tried_again(make, log):
    """Its first worker tries it; a successor that goes on behind tokens does not."""
    first, second = make("w1"), make("w2")
    first.start()
    await submit(first.queue, "s")
    while not (await log.record("s")) or (await log.record("s")).last < 3:
        await asyncio.sleep(0.005)
    first.engine.going.clear()
    await first.consumer.drain(0)
    second.start()
    _, text = await ended(log, "s")
    assert text == WHOLE
    assert (first.prompts.begun, second.prompts.begun) == ([False], [True])


async def orphans(worker, store, *names):
    """Leave behind sessions of a worker that has died."""
    await submit(worker.queue, *names)
    assert len((await worker.queue.claim("dead", len(names))).sessions) == len(names)
    await store.redis.zadd(keys.LEASES, dict.fromkeys(names, 1))


async def test_what_a_dead_worker_left_is_shared_out(make, log, store, monkeypatch):
    """One takes what it begins soon; one that comes later finds the rest, and all end well."""
    monkeypatch.setattr(intake, "PATIENCE_SECONDS", 3600)
    first, later = (make(name, SlowEngine) for name in ("w1", "w2"))
    names = [f"s{n:02}" for n in range(3 * AT_ONCE)]
    await orphans(first, store, *names)
    for worker in (first, later):
        worker.start()
        while len(worker.engine.waiting) < AT_ONCE or worker.consumer._intake.room():
            await asyncio.sleep(0.005)
    assert await first.queue.depth() == AT_ONCE
    assert [w.consumer.running for w in (first, later)] == [AT_ONCE, AT_ONCE]
    first.engine.going.clear()
    first.engine.begin()  # which makes room, long before any of them ends
    while len(first.engine.waiting) < AT_ONCE:
        await asyncio.sleep(0.005)
    first.engine.going.set()
    for worker in (first, later):
        worker.engine.begin()
    for name in names:
        assert (await ended(log, name))[1] == WHOLE


async def test_a_batch_is_full_of_choices_not_of_sessions(make):
    """What would only wait for a row is left to a worker that has one."""
    first, second = make("w1"), make("w2")
    for worker in (first, second):
        worker.engine.going.clear()
    await submit(first.queue, *"abcde", choices=8)
    first.start()
    while len(first.engine.running) < 32:
        await asyncio.sleep(0.005)
    second.start()
    while len(second.engine.running) < 8:
        await asyncio.sleep(0.005)
    assert (first.consumer.running, first.consumer.taken) == (4, 32)
    assert (second.consumer.running, second.consumer.taken) == (1, 8)


async def test_slow_media_keep_nobody_out(make, store, monkeypatch):
    """A worker whose sessions wait for their media takes others after a moment."""
    monkeypatch.setattr(intake, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(consumer, "PAUSE_SECONDS", 0.05)
    worker, media = make(), asyncio.Event()
    build, waiting = worker.prompts.build, []

    async def build_slowly(request, **options):
        waiting.append(request)
        await media.wait()
        return await build(request, **options)

    worker.prompts.build = build_slowly
    await orphans(worker, store, *(f"s{n:02}" for n in range(3 * AT_ONCE)))
    worker.start()
    while len(waiting) < 3 * AT_ONCE:
        await asyncio.sleep(0.005)


def fill(worker):
    """Take all its room: sessions wait for its engine, and will be taken off by hand."""
    for number in range(AT_ONCE):
        worker.consumer._intake.take(f"x{number}")
        worker.consumer._intake.send(f"x{number}")


async def blocked(store, count):
    """Wait until so many workers wait for the bell."""
    while (await store.redis.info("clients"))["blocked_clients"] != count:
        await asyncio.sleep(0.005)


async def test_a_worker_without_room_passes_the_ring_on(make, log, store, monkeypatch):
    """Whoever has waited longest hears the bell; if its room is gone by then, the next one does."""
    monkeypatch.setattr(consumer, "IDLE_SECONDS", 60)
    first, second = make("w1"), make("w2")
    first.start()
    await blocked(store, 1)
    second.start()
    await blocked(store, 2)
    fill(first)
    await submit(first.queue, "s")
    _, text = await asyncio.wait_for(ended(log, "s"), 10)
    assert text == WHOLE
    assert (await store.redis.hget(keys.session("s"), "ended_by")).startswith(b"w2")


async def test_a_worker_without_room_frees_what_a_dead_one_left(make, log, store):
    """The session waits for whoever has room first, instead of for this worker's."""
    worker = make()
    await orphans(worker, store, "s")
    fill(worker)
    worker.start()
    while (await log.record("s")).status != "queued":
        await asyncio.sleep(0.005)
    assert worker.consumer.running == 0


async def test_workers_without_room_do_not_ring_for_each_other(make, log, store, monkeypatch):
    """Each asks once and waits for room of its own, so a full fleet does not spin."""
    monkeypatch.setattr(consumer, "PAUSE_SECONDS", 60)
    workers, claims = [make("w1"), make("w2")], {"w1": 0, "w2": 0}
    await submit(workers[0].queue, "s")

    def count(queue):
        claim = queue.claim

        async def counted(worker_id, *args):
            claims[worker_id] += 1
            return await claim(worker_id, *args)

        monkeypatch.setattr(queue, "claim", counted)

    for worker in workers:
        count(worker.queue)
        fill(worker)
        worker.start()
    while 0 in claims.values():
        await asyncio.sleep(0.005)
    for _ in range(100):  # as many turns as a ring would take to go around
        assert await store.redis.llen(keys.work_bell("m")) == 1
    assert claims == {"w1": 1, "w2": 1}
    workers[0].consumer._intake.leave("x0")
    assert (await ended(log, "s"))[1] == WHOLE
    assert claims["w2"] == 1


async def load(worker, others, taken):
    """Have a worker run some choices, and know what others do that are registered."""
    worker.consumer._leases["x"], worker.consumer._choices["x"] = "lease", taken
    fleet = Fleet(worker.store)
    for name, count in others.items():
        await fleet.announce(WorkerInfo(name, "ready", "m", taken=count))
        await worker.store.redis.expire(keys.worker(name), 60)  # as if it went on saying so
    while worker.consumer._balance.is_heavy(taken) != (taken > min(others.values()) + SLACK):
        await asyncio.sleep(0.005)


async def test_who_has_fewer_sessions_comes_first(make, log, store, monkeypatch):
    """The bell wakes whoever has waited longest; it leaves the session to the lighter worker."""
    monkeypatch.setattr(consumer, "IDLE_SECONDS", 60)
    monkeypatch.setattr(consumer, "FIRST_SECONDS", 10)
    heavy, light = make("w1"), make("w2")
    heavy.start()
    await blocked(store, 1)
    light.start()
    await blocked(store, 2)
    await load(heavy, {"w2": 0}, SLACK + 1)
    await submit(heavy.queue, "s")
    await ended(log, "s")
    assert (await store.redis.hget(keys.session("s"), "ended_by")).startswith(b"w2")


@pytest.mark.parametrize(("taken", "others"), [(SLACK + 1, {"w2": 0}), (SLACK, {"w2": 0, "w3": 9})])
async def test_what_lighter_workers_leave_is_taken(make, log, store, taken, others):
    """One that is full of long prompts, or dead, keeps nobody waiting."""
    heavy = make("w1")
    heavy.start()
    await blocked(store, 1)
    await load(heavy, others, taken)
    names = [f"s{number}" for number in range(2 * AT_ONCE)]
    await submit(heavy.queue, *names)
    for name in names:
        assert (await ended(log, name))[1] == WHOLE


@pytest.mark.parametrize(("state", "model"), [("loading", "m"), ("draining", "m"), ("ready", "n")])
async def test_who_cannot_take_a_session_is_not_compared_with(store, state, model):
    """Nor is a worker with itself."""
    fleet, balance = Fleet(store), Balance("w1", Fleet(store))
    await fleet.announce(WorkerInfo("w1", "ready", "m", taken=0))
    await fleet.announce(WorkerInfo("w2", state, model, taken=0))
    await balance.look("m")
    assert not balance.is_heavy(30)
    await fleet.announce(WorkerInfo("w3", "ready", "m", taken=20))
    await balance.look("m")
    assert balance.is_heavy(30)
    assert not balance.is_heavy(20 + SLACK)


async def test_what_a_worker_has_no_memory_for_goes_on_at_another(make, log, store, monkeypatch):
    """It is given back at once, and the one that lacked memory leaves it to others."""
    monkeypatch.setattr(intake, "REFUSED_SECONDS", 600)
    narrow = make("narrow", lambda: NarrowEngine(5))
    narrow.start()
    await submit(narrow.queue, "s")
    while not narrow.engine.short or (await log.record("s")).status != "queued":
        await asyncio.sleep(0.005)
    await submit(narrow.queue, "t")  # it claims still, if not what it refuses
    while narrow.engine.short < 2:
        await asyncio.sleep(0.005)
    wide = make("wide")
    wide.start()
    for name in "st":
        record, text = await ended(log, name)
        assert (record.status, text, record.takeovers) == ("finished", WHOLE, 1)
        assert (await store.redis.hget(keys.session(name), "ended_by")).startswith(b"wide")
    assert narrow.engine.short == 2


async def test_a_session_that_no_worker_has_memory_for_ends_with_a_clear_error(
    make, log, monkeypatch
):
    """After `MAX_ATTEMPTS` without a token it fails, as one that may be sent again."""
    monkeypatch.setattr(intake, "REFUSED_SECONDS", 0.05)
    worker = make("narrow", NarrowEngine)
    worker.start()
    await submit(worker.queue, "s")
    record, text = await ended(log, "s")
    assert (record.status, record.attempts, worker.engine.short, text) == ("failed", 3, 3, "")
    [*_, last] = [decode_event(entry.data) for entry in await log.read_all("s")]
    assert (last.code, last.message) == ("unavailable", NO_MEMORY)


async def test_memory_for_a_part_at_a_time_is_enough(make, log, monkeypatch):
    """Each run that brings tokens is no failed attempt, however many there are."""
    monkeypatch.setattr(intake, "REFUSED_SECONDS", 0.0)
    worker = make("narrow", lambda: NarrowEngine(8))
    worker.start()
    await submit(worker.queue, "s")
    record, text = await ended(log, "s")
    assert (record.status, text, worker.engine.short) == ("finished", WHOLE, 4)


async def test_who_refuses_a_session_leaves_the_bell_to_others(store):
    """A claim passes over what is refused, says that it waits, and rings for whoever has room."""
    queue = SessionQueue(store, kept_seconds=60, watch_ms=60_000, model="m")
    await submit(queue, "a", "b")
    await store.redis.delete(keys.work_bell("m"))
    claim = await queue.claim("w1", 4, ["a"])
    assert ([c.session_id for c in claim.sessions], claim.waiting) == (["b"], 1)
    assert await store.redis.llen(keys.work_bell("m")) == 1
    assert [c.session_id for c in (await queue.claim("w2", 4)).sessions] == ["a"]
