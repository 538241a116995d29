"""A value of the wrong shape in Redis fails the session that it belongs to, and nothing else."""

import asyncio

import pytest

from shared import keys
from shared.errors import UnbrokenError
from shared.fleet import Fleet
from shared.overdue import Overdue
from shared.presence import Presence
from shared.session_log import Append, SessionLog
from tests.served import serving
from tests.shapes import BROKEN, field, submit_broken

HELLO = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}


def nothing(pipe, sid):
    """Change nothing."""


@pytest.mark.parametrize(
    "name", [n for n in BROKEN if not n.startswith(("request", "job", "retry"))]
)
async def test_a_gateway_answers_and_goes_on(redis_url, worker, store, name):
    """Whoever reads the broken session gets an error with its shape; others see nothing of it."""
    async with serving(redis_url) as client:
        await submit_broken(store, "broken", "org/tiny", BROKEN[name])
        for path in ("/v1/sessions/broken", "/v1/chat/completions/broken"):
            answer = await client.get(path)
            assert answer.status_code in (200, 404, 409, 500), answer.text
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        await client.post("/v1/cancel/broken")
        body = {**HELLO, "session_id": "sound"}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            claimed = []
            while "sound" not in [c.session_id for c in claimed]:
                claim = await worker.queue.claim(worker.id, 8)
                claimed += claim.sessions
            sound = next(c for c in claimed if c.session_id == "sound")
            worker._next["sound"] = 1
            await worker.say(sound, "whole")
            await worker.finish(sound)
            text = (await response.aread()).decode()
        assert "whole" in text
        assert text.endswith("data: [DONE]\n\n")


async def test_a_log_that_becomes_a_string_ends_its_own_stream_only(redis_url, worker, store):
    """With two streams open, the one whose log breaks ends with an error; the other goes on."""
    async with serving(redis_url) as client:

        async def read(sid):
            body = {**HELLO, "session_id": sid}
            return (await client.post("/v1/chat/completions", json=body)).text

        tasks = {sid: asyncio.create_task(read(sid)) for sid in ("bad", "good")}
        claimed = {}
        while len(claimed) < 2:
            claimed |= {c.session_id: c for c in await worker.claim(2)}
        for session in claimed.values():
            await worker.say(session, "first")
        while client.services.relay.followed < 2:
            await asyncio.sleep(0.01)
        await store.redis.set(keys.events("bad"), "nonsense", ex=60)
        batch = [Append(*claimed[sid], 2, [b'["d",0,[1],"second"]']) for sid in ("bad", "good")]
        assert await worker.log.append(batch) == [-2, 2]
        worker._next["good"] = 3
        await asyncio.wait_for(tasks["bad"], 10)
        await worker.finish(claimed["good"])
        bad, good = await asyncio.gather(*tasks.values())
        assert '"error"' in bad
        assert bad.endswith("data: [DONE]\n\n")
        assert [word in good for word in ("first", "second", '"error"')] == [True, True, False]


async def test_a_broken_record_costs_the_others_no_lease(store, worker):
    """Claim, renew and append go on for the rest of the batch where one record is no hash."""
    for sid in ("a", "b"):
        await submit_broken(store, sid, "org/tiny", nothing)
    await submit_broken(store, "c", "org/tiny", BROKEN["record is a list"])
    claim = await worker.queue.claim(worker.id, 8)
    leases = {c.session_id: c.lease for c in claim.sessions}
    assert set(leases) == {"a", "b"}
    assert not await store.redis.exists(keys.session("c"))
    await store.redis.delete(keys.session("b"))
    await store.redis.set(keys.session("b"), "x", ex=60)
    assert await worker.queue.renew(leases) == ["b"]
    batch = [Append(sid, lease, 1, [b"x"]) for sid, lease in leases.items()]
    assert await worker.log.append(batch) == [1, -1]
    await store.redis.zadd(keys.LEASES, {"b": 1})
    await store.redis.hset(keys.CONTACT, "since", 0)  # Redis has long been there
    await worker.queue.claim(worker.id, 8)  # its lease ran out
    assert await store.redis.zrange(keys.LEASES, 0, -1) == [b"a"]
    assert not await store.redis.exists(keys.session("b"))


async def test_a_broken_session_hides_no_unwatched_and_no_overdue_one(store, worker, monkeypatch):
    """The sweeps over the queue reach the sound session behind the broken one."""
    await submit_broken(store, "bad", "org/tiny", BROKEN["record is a list"])
    await submit_broken(store, "odd", "org/tiny", field("response", "nonsense"))
    await submit_broken(store, "good", "org/tiny", nothing)
    for sid in ("bad", "odd", "good"):
        await store.redis.delete(keys.watch(sid))
    presence = Presence(store, watch_ms=60_000)
    assert await presence.unwatched(["bad", "odd", "good"]) == ["bad", "odd", "good"]
    overdue = Overdue(worker.queue, 0.001)
    monkeypatch.setattr(overdue._contact, "heard", lambda: True)
    await asyncio.sleep(0.01)  # what is overdue must have waited
    await overdue.sweep()
    assert (await worker.log.record("good")).status == "failed"


async def test_nonsense_of_one_worker_hides_no_other(store, worker):
    """A register entry that cannot be read is left out."""
    await store.redis.set(keys.worker("evil"), "nonsense", ex=60)
    await store.redis.zadd(keys.WORKERS, {"evil": 1, b"\xff": 2})
    assert [w.id for w in await Fleet(store).live()] == [worker.id]


async def test_nonsense_in_signals_is_a_request_to_cancel_or_nothing(store):
    """A cancel flag counts whatever it says; one of the wrong type is none."""
    presence = Presence(store, watch_ms=60_000)
    await store.redis.set(keys.cancel("a"), b"\xff\xfe", ex=60)
    await store.redis.rpush(keys.cancel("b"), "x")
    await store.redis.expire(keys.cancel("b"), 60)
    found = await presence.signals(["a", "b"])
    assert (found["a"].cancel, found["b"].cancel) == ("requested", None)


async def test_what_is_no_log_and_no_record_is_said(store):
    """Reading gives one clear error, of the session and without what stands there."""
    log = SessionLog(store)
    await store.redis.set(keys.events("s"), "secret", ex=60)
    await store.redis.set(keys.session("s"), "secret", ex=60)
    for call in (log.read("s", -1), log.record("s")):
        with pytest.raises(UnbrokenError) as caught:
            await call
        assert caught.value.code == "generation_failed"
        assert "secret" not in caught.value.message
