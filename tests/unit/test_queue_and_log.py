import asyncio

import msgspec
import pytest

from shared import keys
from shared.overdue import Overdue
from shared.protocol import (
    Delta,
    Failed,
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
from shared.queue import (
    CONTACT_MS,
    LEASE_MS,
    SILENCE_MS,
    Claimed,
    SessionQueue,
    Submission,
)
from shared.session_log import FENCED, LOG_LOST, Append, SessionLog


@pytest.fixture
def queue(store):
    return SessionQueue(store, kept_seconds=60, watch_ms=60_000)


@pytest.fixture
def log(store):
    return SessionLog(store)


def submission(session_id="s1", owner="", text="hello"):
    request = GenerationRequest((Message("user", (TextPart(text),)),), SamplingParams())
    return Submission(session_id, owner, request.digest(), "m", "fp", False, request)


def delta(n):
    return encode_event(Delta(0, (n,), f"t{n}"))


async def expire_lease(store, session_id):
    """Let a lease run out now, as Redis' clock sees it."""
    await store.redis.zadd(keys.LEASES, {session_id: 1})


async def test_submit_writes_record_event_zero_and_queue_place(queue, log):
    """A submitted session has its record, its first event and a place in the queue."""
    outcome, created = await queue.submit(submission(), 10)
    record = await log.record("s1")
    assert (outcome, record.status, record.created, record.last) == (
        "created",
        "queued",
        created,
        0,
    )
    assert [decode_event(e.data) for e in await log.read("s1", -1)] == [Started(1)]
    assert await queue.position("s1") == 0


async def test_submit_again_attaches_and_queues_nothing(queue):
    """The same body under the same id attaches, as a retried request does."""
    await queue.submit(submission(), 10)
    outcome, _ = await queue.submit(submission(), 10)
    assert outcome == "attached"
    assert await queue.depth() == 1


async def test_simultaneous_submits_create_one_session(queue):
    """Of many simultaneous submissions of one id, one creates and the others attach."""
    outcomes = await asyncio.gather(*(queue.submit(submission(), 10) for _ in range(20)))
    assert sorted(o for o, _ in outcomes) == ["attached"] * 19 + ["created"]


async def test_submit_refuses_another_body_or_owner(queue):
    """A used id with another body conflicts; another owner learns nothing of it."""
    await queue.submit(submission(), 10)
    assert (await queue.submit(submission(text="other"), 10))[0] == "conflict"
    assert (await queue.submit(submission(owner="x"), 10)) == ("foreign", 0)


async def test_submit_refuses_beyond_the_queue_bound_and_leaves_nothing(queue, log):
    """A full queue refuses a session without a trace of it, and still lets the known attach."""
    await queue.submit(submission("a"), 1)
    assert (await queue.submit(submission("b"), 1))[0] == "full"
    assert await log.record("b") is None
    assert (await queue.submit(submission("a"), 1))[0] == "attached"


async def test_claim_takes_the_oldest_first_and_each_once(queue):
    """Two claims share the waiting sessions in order of their arrival."""
    for name in "abc":
        await queue.submit(submission(name), 10)
    first = await queue.claim("w1", 2)
    second = await queue.claim("w2", 2)
    assert [c.session_id for c in first.sessions] == ["a", "b"]
    assert first.waiting == 1
    assert [c.session_id for c in second.sessions] == ["c"]


async def test_each_choice_takes_a_slot(queue):
    """A worker gets sessions until their choices fill it; the last one's may be too many."""
    for name, choices in (("a", 1), ("b", 3), ("c", 1), ("d", 2)):
        new = submission(name)
        sampling = SamplingParams(max_tokens=4, n=choices)
        request = msgspec.structs.replace(new.request, sampling=sampling)
        await queue.submit(new._replace(request=request), 10)
    claims = [await queue.claim("w1", free) for free in (0, 3, 3)]
    assert [[c.session_id for c in claim.sessions] for claim in claims] == [
        [],
        ["a", "b"],
        ["c", "d"],
    ]
    assert [claim.choices for claim in claims] == [[], [1, 3], [1, 2]]


async def test_claim_passes_the_bell_on_while_sessions_wait(queue, store):
    """A claim that leaves sessions behind rings for the next idle worker."""
    queue.model = "m"
    for name in "ab":
        await queue.submit(submission(name), 10)
    await queue.wait_for_work(1)
    await queue.claim("w1", 1)
    assert await store.redis.llen(keys.work_bell("m")) == 1


async def test_a_worker_gets_sessions_of_its_model_only(queue, store):
    """Sessions of other models stay, also when they come back, and ring for theirs."""
    for name in ("a", "b", "c"):
        await queue.submit(submission(name)._replace(model="mine" if name == "c" else "m"), 10)
    queue.model = "mine"
    claim = await queue.claim("w1", 5)
    assert ([c.session_id for c in claim.sessions], claim.waiting) == (["c"], 2)
    assert await store.redis.llen(keys.work_bell("mine")) == 1  # from its submission
    assert (await queue.claim("w1", 5)).sessions == []
    queue.model = "m"
    await queue.wait_for_work(1)
    [dead, other] = (await queue.claim("w2", 5)).sessions
    await expire_lease(store, "a")
    await queue.release(other)
    await store.redis.delete(keys.work_bell("m"))
    queue.model = "mine"
    assert (await queue.claim("w1", 5)).sessions == []
    queue.model = "m"
    assert await store.redis.llen(keys.work_bell("m")) == 1
    assert [c.session_id for c in (await queue.claim("w2", 5)).sessions] == [dead.session_id, "b"]


async def test_an_expired_lease_frees_the_session_at_its_old_place(queue, store):
    """A dead worker's session is claimed again before younger ones, with a higher epoch."""
    await queue.submit(submission("old"), 10)
    [dead] = (await queue.claim("w1", 1)).sessions
    await queue.submit(submission("young"), 10)
    assert (await queue.claim("w2", 0)).sessions == []
    await expire_lease(store, "old")
    [taken] = (await queue.claim("w2", 1)).sessions
    assert taken.session_id == "old"
    assert int(taken.lease.split(":")[1]) > int(dead.lease.split(":")[1])


async def test_claim_tells_when_the_next_lease_runs_out(queue):
    """An idle worker learns how long the oldest lease still holds."""
    await queue.submit(submission(), 10)
    await queue.claim("w1", 1)
    expiry = (await queue.claim("w2", 1)).next_expiry_ms
    assert 0 < expiry <= LEASE_MS


async def test_renew_keeps_a_lease_and_reports_lost_ones(queue, store):
    """Renewing moves our leases on and names those that are another's or gone."""
    for name in "ab":
        await queue.submit(submission(name), 10)
    leases = dict((await queue.claim("w1", 2)).sessions)
    await expire_lease(store, "a")
    await queue.claim("w2", 1)
    before = await store.redis.zscore(keys.LEASES, "b")
    assert await queue.renew({**leases, "never": "w1:1"}) == ["a", "never"]
    assert await store.redis.zscore(keys.LEASES, "b") >= before


async def test_renew_revives_an_expired_lease_that_nobody_took(queue, store):
    """A worker that slept too long keeps its session if no other claimed it meanwhile."""
    await queue.submit(submission(), 10)
    leases = dict((await queue.claim("w1", 1)).sessions)
    await expire_lease(store, "s1")
    assert await queue.renew(leases) == []
    assert (await queue.claim("w2", 1)).sessions == []


async def test_release_puts_a_session_back_without_blame(queue, log):
    """A session given back waits again, its attempt is not counted, and its lease is void."""
    await queue.submit(submission(), 10)
    [mine] = (await queue.claim("w1", 1)).sessions
    assert await queue.attempt(mine)
    assert await queue.release(mine)
    record = await log.record("s1")
    assert (record.status, record.attempts, record.claims) == ("queued", 0, 0)
    assert not await queue.release(mine)
    assert await log.append([Append(*mine, 1, [delta(1)])]) == [FENCED]


async def test_release_with_blame_counts_the_attempt_once(queue, log):
    """A session whose engine died under it has one attempt more, whether it was counted or not."""
    await queue.submit(submission(), 10)
    for attempts, counted in ((1, False), (2, True)):
        [mine] = (await queue.claim("w1", 1)).sessions
        if counted:
            await queue.attempt(mine)
        await queue.release(mine, blameless=False)
        assert (await log.record("s1")).attempts == attempts


async def test_attempts_count_from_the_engines_begin_while_the_log_does_not_grow(queue, log, store):
    """A session that is claimed is not blamed; nor is one whose workers die between its tokens."""
    await queue.submit(submission(), 10)
    for n in range(1, 6):
        [mine] = (await queue.claim("w1", 1)).sessions
        assert (await log.record("s1")).attempts == 0
        for _ in range(2):  # said twice, counted once
            assert await queue.attempt(mine)
        assert (await log.record("s1")).attempts == 1
        await log.append([Append(*mine, n, [delta(n)])])
        await expire_lease(store, "s1")
    for claims in range(1, 4):
        await queue.claim("w1", 1)
        record = await log.record("s1")
        assert (record.attempts, record.claims) == (0, claims)
        await expire_lease(store, "s1")
    for attempts in range(1, 4):
        [mine] = (await queue.claim("w1", 1)).sessions
        await queue.attempt(mine)
        assert (await log.record("s1")).attempts == attempts
        await expire_lease(store, "s1")
    await queue.claim("w1", 0)
    assert not await queue.attempt(mine)  # it is nobody's now


async def test_after_an_outage_workers_renew_before_others_take_their_sessions(queue, store):
    """Leases that ran out while Redis was away are given to nobody until their workers came."""
    await queue.submit(submission(), 10)
    leases = dict((await queue.claim("w1", 1)).sessions)
    await queue.renew(leases)
    await store.redis.hincrbyfloat(keys.CONTACT, "last", -2 * SILENCE_MS)  # as after an outage
    await expire_lease(store, "s1")
    claim = await queue.claim("w2", 1)
    assert claim.sessions == []
    assert 0 < claim.next_expiry_ms <= CONTACT_MS
    await queue.renew({})  # an idle worker's: Redis is back
    assert (await queue.claim("w2", 1)).sessions == []
    assert await queue.renew(leases) == []  # its worker's, at last
    await store.redis.hincrbyfloat(keys.CONTACT, "since", -CONTACT_MS)  # some time later
    assert (await queue.claim("w2", 1)).sessions == []
    await expire_lease(store, "s1")
    assert [c.session_id for c in (await queue.claim("w2", 1)).sessions] == ["s1"]


async def test_what_could_not_begin_has_waited_all_along(queue, store):
    """A session that a worker cannot begin waits since before; one given back waits since now."""
    await queue.submit(submission(), 10)
    [mine] = (await queue.claim("w1", 1)).sessions
    await queue.release(mine, waited=True)
    since = await store.redis.hget(keys.session("s1"), "enqueued")
    assert await store.redis.hget(keys.session("s1"), "waiting") == since
    [mine] = (await queue.claim("w1", 1)).sessions
    await asyncio.sleep(0.002)  # another moment of Redis' clock
    await queue.release(mine)
    assert await store.redis.hget(keys.session("s1"), "waiting") > since


async def test_begin_notes_what_a_session_is_generated_from(queue, log, store):
    """The first tokens' media must stay the same; another engine makes the session inexact."""
    await queue.submit(submission(), 10)
    [one] = (await queue.claim("w1", 1)).sessions
    assert await queue.begin(one, "fp1", "h1", 7, exact=True) == "begun"
    assert await queue.begin(one, "fp2", "h2", 7, exact=True) == "begun"  # nothing generated yet
    await log.append([Append(*one, 1, [delta(1)])])
    await expire_lease(store, "s1")
    [two] = (await queue.claim("w2", 1)).sessions
    assert await queue.begin(one, "fp2", "h2", 7, exact=True) == "lost"
    assert await queue.begin(two, "fp2", "other", 7, exact=True) == "media_changed"
    assert await queue.begin(two, "fp2", "h2", 7, exact=True) == "begun"
    record = await log.record("s1")
    assert (record.exact, record.takeovers, record.prompt_tokens) == (True, 1, 7)
    assert await queue.begin(two, "fp3", "h2", 7, exact=True) == "begun"
    assert not (await log.record("s1")).exact


async def test_an_inexact_continuation_is_noted(queue, log):
    """A worker that continues by another rounding says so, and nobody takes it back."""
    await queue.submit(submission(), 10)
    [mine] = (await queue.claim("w1", 1)).sessions
    await queue.begin(mine, "fp", "", 7, exact=False)
    assert (await log.record("s1")).exact  # not continued yet
    await log.append([Append(*mine, 1, [delta(1)])])
    await queue.begin(mine, "fp", "", 7, exact=False)
    await queue.begin(mine, "fp", "", 7, exact=True)
    assert not (await log.record("s1")).exact


async def test_append_numbers_events_and_accepts_a_repeat_once(queue, log):
    """The same append sent again, as after a lost reply, changes nothing."""
    await queue.submit(submission(), 10)
    [mine] = (await queue.claim("w1", 1)).sessions
    batch = [Append(*mine, 1, [delta(1), delta(2)])]
    assert await log.append(batch) == [2]
    assert await log.append(batch) == [2]
    longer = [Append(*mine, 2, [delta(2), delta(3)])]
    assert await log.append(longer) == [3]
    entries = await log.read("s1", -1)
    assert [e.index for e in entries] == [0, 1, 2, 3]
    assert [decode_event(e.data).text for e in entries[1:]] == ["t1", "t2", "t3"]


async def test_append_refuses_a_gap_and_a_stranger_but_serves_the_others(queue, log):
    """A refused session of a batch does not hinder the others of the batch."""
    for name in "abc":
        await queue.submit(submission(name), 10)
    a, b, c = (await queue.claim("w1", 3)).sessions
    stranger = Claimed(b.session_id, "w9:1")
    batch = [Append(*a, 5, [delta(5)]), Append(*stranger, 1, [delta(1)]), Append(*c, 1, [delta(1)])]
    assert await log.append(batch) == [LOG_LOST, FENCED, 1]
    assert [e.index for e in await log.read("a", -1)] == [0]
    assert [e.index for e in await log.read("b", -1)] == [0]


async def test_append_never_recreates_a_lost_log(queue, log, store):
    """A log that vanished is not begun again in the middle."""
    await queue.submit(submission(), 10)
    [mine] = (await queue.claim("w1", 1)).sessions
    await store.redis.delete(keys.events("s1"))
    assert await log.append([Append(*mine, 1, [delta(1)])]) == [LOG_LOST]
    assert not await store.redis.exists(keys.events("s1"))


async def test_a_fenced_worker_can_not_write_after_a_takeover(queue, log, store):
    """Once another worker has the session, the old one neither appends nor finishes."""
    await queue.submit(submission(), 10)
    [old] = (await queue.claim("w1", 1)).sessions
    await expire_lease(store, "s1")
    [new] = (await queue.claim("w2", 1)).sessions
    end = Finished(("stop",), Usage())
    assert await log.append([Append(*old, 1, [delta(1)])]) == [FENCED]
    args = {"status": "finished", "usage": Usage(), "kept_seconds": 60}
    assert not await log.finish(Append(*old, 1, []), end, **args)
    assert await log.append([Append(*new, 1, [delta(1)])]) == [1]


async def test_finish_ends_once_with_its_text_and_cleans_up(queue, log, store):
    """The last text and the end arrive together; a repeat is accepted; the request is gone."""
    await queue.submit(submission(), 10)
    [mine] = (await queue.claim("w1", 1)).sessions
    end = Finished(("stop",), Usage(3, 1))
    args = {"status": "finished", "usage": Usage(3, 1), "kept_seconds": 60}
    for _ in range(2):
        assert await log.finish(Append(*mine, 1, [delta(1)]), end, **args)
    events = [decode_event(e.data) for e in await log.read("s1", -1)]
    assert events == [Started(1), Delta(0, (1,), "t1"), end]
    record = await log.record("s1")
    assert (record.status, record.last, record.usage) == ("finished", 2, Usage(3, 1))
    left = {k.decode() for k in await store.redis.keys("*s1")}
    assert left == {keys.session("s1"), keys.events("s1")}
    assert 0 < await store.redis.ttl(keys.events("s1")) <= 60


async def test_cancel_of_a_queued_session_ends_it_for_good(queue, log):
    """A queued session ends at once as cancelled, never starts, and a retry only attaches."""
    await queue.submit(submission(), 10)
    assert await queue.cancel("s1", "", "requested") == "cancelled"
    assert await queue.cancel("s1", "", "requested") == "cancelled"
    assert (await queue.claim("w1", 1)).sessions == []
    assert (await queue.submit(submission(), 10))[0] == "attached"
    last = decode_event((await log.read("s1", -1))[-1].data)
    assert (last.cancelled, (await log.record("s1")).status) == ("requested", "cancelled")


async def test_cancel_flags_a_running_session_and_ignores_strangers(queue):
    """A running session is flagged for its worker; another owner's cancel finds nothing."""
    await queue.submit(submission(owner="me"), 10)
    await queue.claim("w1", 1)
    assert await queue.cancel("s1", "you", "requested") == "missing"
    assert await queue.cancel("s1", "me", "requested") == "cancelling"
    assert await queue.cancel("none", "me", "requested") == "missing"


async def test_cancel_ends_a_session_whose_worker_is_dead(queue, log, store):
    """A session whose lease ran out ends at once; the old worker can write nothing behind it."""
    await queue.submit(submission(), 10)
    [dead] = (await queue.claim("w1", 1)).sessions
    await expire_lease(store, "s1")
    assert await queue.cancel("s1", "", "requested") == "cancelled"
    assert await log.append([Append(*dead, 2, [delta(2)])]) == [FENCED]
    assert (await queue.claim("w2", 1)).sessions == []
    assert [e.index for e in await log.read("s1", -1)] == [0, 1]


async def test_a_cancelled_session_that_waits_again_has_its_usage(queue, log, store):
    """What was generated before a worker died or gave the session back is counted at its end."""
    for name, ended in (("released", "cancelled"), ("dead", "cancelled"), ("late", "failed")):
        await queue.submit(submission(name), 10)
        [mine] = (await queue.claim("w1", 1)).sessions
        await queue.begin(mine, "fp", "", 7, exact=True)
        thought = encode_event(Delta(0, (2, 3), "t", "reasoning"))
        await log.append([Append(*mine, 1, [delta(1), thought])])
        if name == "released":
            await queue.release(mine)
        else:
            await expire_lease(store, name)
        if ended == "failed":
            assert await queue.give_up(name, 5)
        else:
            assert await queue.cancel(name, "", "requested") == "cancelled"
        record = await log.record(name)
        assert (record.status, record.usage, record.last) == (ended, Usage(7, 3, 2), 3)


async def test_a_session_that_no_worker_takes_fails(queue, log, store):
    """A session that waited too long since it was queued, or given back, ends with an error."""
    for name in ("new", "old", "running"):
        await queue.submit(submission(name), 10)
    taken = {c.session_id: c for c in (await queue.claim("w1", 3)).sessions}
    await queue.release(taken["new"])  # waits since now
    await queue.release(taken["old"])
    await store.redis.hset(keys.session("old"), "waiting", "1000")
    await store.redis.zadd(keys.QUEUE, {"new": 1, "old": 1, "running": 1})
    assert sorted(await queue.overdue(5)) == ["new", "old", "running"]
    ended = [await queue.give_up(name, 5) for name in ("new", "old", "running")]
    assert ended == [False, True, False]
    last = decode_event((await log.read("old", -1))[-1].data)
    assert last == Failed("queue_timeout", "No worker took the session within 5 seconds.")
    assert not await queue.give_up("old", 5)
    await queue.claim("w2", 0)
    assert await queue.overdue(5) == ["new", "running"]


async def test_an_overdue_session_is_ended_after_an_outage_only_when_nobody_came(queue, log, store):
    """The first looks after a silence of Redis end nothing: workers have to renew first."""
    await queue.submit(submission(), 10)
    await store.redis.hset(keys.session("s1"), "waiting", "1000")
    await store.redis.zadd(keys.QUEUE, {"s1": 1})
    overdue = Overdue(queue, 5)
    await overdue.sweep()
    assert (await log.record("s1")).status == "queued"
    while (await log.record("s1")).status == "queued":
        await asyncio.sleep(0.05)
        await overdue.sweep()
    assert (await log.record("s1")).status == "failed"


async def test_a_failure_is_told_even_when_the_log_is_lost(queue, log, store):
    """A session without its log cannot finish, but it can fail, so that nobody waits for ever."""
    await queue.submit(submission(), 10)
    [mine] = (await queue.claim("w1", 1)).sessions
    await store.redis.delete(keys.events("s1"))
    rest = {"usage": Usage(), "kept_seconds": 60}
    end = Finished(("stop",), Usage())
    assert not await log.finish(Append(*mine, 1, []), end, status="finished", **rest)
    failure = Failed("generation_failed", "lost")
    assert await log.finish(Append(*mine, 1, []), failure, status="failed", **rest)
    assert (await log.record("s1")).status == "failed"
    assert [e.index for e in await log.read("s1", -1)] == [1]


def test_digest_ignores_nothing_but_the_order_of_keys():
    """Equal requests have equal digests, and a changed character changes it."""
    assert submission().digest == submission().digest
    assert submission().digest != submission(text="hello!").digest
