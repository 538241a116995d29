"""Values of the wrong shape in Redis, put there in the very moment in which a session is queued."""

from __future__ import annotations

from shared import keys
from shared.protocol import GenerationRequest, Message, SamplingParams, TextPart
from shared.queue import SessionQueue, Submission

ORG = GenerationRequest((Message("user", (TextPart("Hi"),)),), SamplingParams(max_tokens=4, seed=1))


def replace(name, write):
    """Return a change that puts another kind of value where `name(session_id)` points."""

    def change(pipe, sid):
        pipe.delete(name(sid))
        write(pipe, name(sid))
        pipe.expire(name(sid), 60)

    return change


def field(name, value):
    """Return a change of one field of the record."""
    return lambda pipe, sid: pipe.hset(keys.session(sid), name, value)


def a_string(pipe, name):
    pipe.set(name, "nonsense")


def a_list(pipe, name):
    pipe.rpush(name, "nonsense")


def a_hash(pipe, name):
    pipe.hset(name, "non", "sense")


def bytes_of(value):
    return lambda pipe, name: pipe.set(name, value)


def an_entry(value):
    """Return a change that appends an entry to the log, and says so in the record."""

    def change(pipe, sid):
        pipe.xadd(keys.events(sid), value, id="2-0")
        pipe.hset(keys.session(sid), "last", 1)

    return change


BROKEN = {
    "record is a string": replace(keys.session, a_string),
    "record is a list": replace(keys.session, a_list),
    "last": field("last", "many"),
    "enqueued": field("enqueued", "soon"),
    "epoch": field("epoch", "x"),
    "attempts": field("attempts", "x"),
    "choices": field("choices", b"\xff\xfe"),
    "created": field("created", "yesterday"),
    "request is a list": replace(keys.request, a_list),
    "request is no JSON": replace(keys.request, bytes_of(b"\x80\x04pickle")),
    "request has another form": replace(keys.request, bytes_of(b'{"messages": 3}')),
    "job is a hash": replace(keys.job, a_hash),
    "job is no JSON": replace(keys.job, bytes_of(b"\x80\x04pickle")),
    "retry counter is a list": replace(lambda sid: keys.RETRY + sid, a_list),
    "log is a string": replace(keys.events, a_string),
    "log entry is no event": an_entry({"e": "nonsense"}),
    "log entry has another type": an_entry({"e": '["d","x",1,2]'}),
    "log entry has another field": an_entry({"x": "nonsense"}),
}


class _AndThen:
    """A store whose scripts run in one transaction with a change."""

    def __init__(self, store, change):
        self._store, self._change = store, change

    async def run(self, script, names, args):
        async with self._store.redis.pipeline(transaction=True) as pipe:
            await self._store._scripts[script](keys=names, args=args, client=pipe)
            self._change(pipe)
            return (await pipe.execute())[0]


async def submit_broken(store, sid, model, change, owner=""):
    """Queue a session whose values are changed before anybody can see it."""
    there = _AndThen(store, lambda pipe: change(pipe, sid))
    queue = SessionQueue(there, kept_seconds=60, watch_ms=60_000)
    new = Submission(sid, owner, "digest", model, "fp", False, ORG)
    outcome, _ = await queue.submit(new, 1000)
    assert outcome == "created"
