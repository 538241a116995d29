"""Where a stream changes its worker, or finds none: stop strings, a lone worker's stop, no worker.

Real workers get real signals; texts are compared with undisturbed ones.
"""

import asyncio
import json
import os
import random
import signal

import httpx
import pytest

from shared import keys
from shared.protocol import Generated, Terminal, decode_event
from shared.session_log import SessionLog
from shared.store import Store, connect
from tests.stack import Stack, wait_until

pytestmark = pytest.mark.timeout(300)
CHAT = "/v1/chat/completions"
PACE, TOKENS = 25, 110
HELD = 0.3, 0.9
"""What of a text is a stop string: it is held back for some sixty tokens, two seconds."""

LAST_TOKEN = 12
"""Characters of one token at most: where it reaches into a stop string, all of it is held back."""


def body(session_id=None, **more):
    request = {
        "messages": [{"role": "user", "content": "Tell me of rivers."}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 1.0,
        "seed": 8,
        "presence_penalty": 0.4,
        **more,
    }
    return {**request, "session_id": session_id} if session_id else request


class Driver:
    """A client of a stack's gateway, and a look into its Redis."""

    def __init__(self, stack):
        self.stack = stack
        self.store = Store(connect(stack.redis_url, retries=10))
        self.log = SessionLog(self.store)
        self.http = httpx.AsyncClient(base_url=stack.url, timeout=120, trust_env=False)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_exc):
        await self.http.aclose()
        await self.store.close()

    def ask(self, *args, **more):
        return asyncio.create_task(self.http.post(CHAT, json=body(*args, **more)))

    async def events(self, session_id):
        return [decode_event(entry.data) for entry in await self.log.read_all(session_id)]

    async def text(self, session_id):
        """Return the text of a session's log so far."""
        events = await self.events(session_id)
        return "".join(event.text for event in events if isinstance(event, Generated))

    async def grown(self, session_id, events):
        """Wait until a session's log has so many events."""
        while int(await self.store.redis.hget(keys.session(session_id), "last") or 0) < events:
            await asyncio.sleep(0.01)

    async def kill_worker_of(self, session_id):
        """SIGKILL the worker that runs a session."""
        record = await self.log.record(session_id)
        assert record.status == "running"
        info = json.loads(await self.store.redis.get(keys.worker(record.worker)))
        os.kill(info["pid"], signal.SIGKILL)

    async def assert_contiguous(self, session_id, takeovers):
        """Assert that a log runs without a gap to its only end, with so many changes of writer."""
        entries, record = await self.log.read_all(session_id), await self.log.record(session_id)
        assert [entry.index for entry in entries] == list(range(record.last + 1))
        ends = [isinstance(decode_event(entry.data), Terminal) for entry in entries]
        assert ends == [False] * record.last + [True]
        assert record.takeovers == takeovers


def said(answer):
    """Return an answer's text, its finish reason and its usage."""
    [choice] = answer.json()["choices"]
    text = (choice["message"]["reasoning_content"] or "") + (choice["message"]["content"] or "")
    return text, choice["finish_reason"], answer.json()["usage"]["completion_tokens"]


async def test_a_stop_string_is_found_over_the_seam(make_stack):
    """Killed while text waits to be known as a stop string, or not to be one: nothing changes."""
    stack = make_stack(workers=2, env={"MAX_STEPS_PER_SECOND": str(PACE)})
    stack.wait_until_ready()
    rng = random.Random(4)
    async with Driver(stack) as driver:
        whole, _, _ = said(await driver.ask())
        begin, end = (int(share * len(whole)) for share in HELD)
        string = whole[begin:end]
        for name, stop in (("stops", string), ("goes-on", string[:-1] + "\0")):
            wait_until(lambda: Stack.workers_seen(stack.url) == 2, "two workers serve", 100)
            undisturbed = said(await driver.ask(stop=[stop]))
            assert undisturbed[0] == (whole[:begin] if name == "stops" else whole)
            answer = driver.ask(name, stop=[stop])
            while len(await driver.text(name)) < begin - LAST_TOKEN:
                await asyncio.sleep(0.01)
            await asyncio.sleep(rng.uniform(0.2, 1))  # somewhere in the held text
            known = await driver.text(name)
            assert begin - LAST_TOKEN <= len(known) <= begin
            await driver.kill_worker_of(name)
            assert said(await answer) == undisturbed
            await driver.assert_contiguous(name, takeovers=1)


async def test_a_lone_worker_that_is_stopped_ends_what_it_can(make_stack):
    """What is short ends within `DRAIN_SECONDS`; the rest is queued, and the next start ends it."""
    env = {"MAX_STEPS_PER_SECOND": str(PACE), "DRAIN_SECONDS": "2"}
    stack = make_stack(env=env)
    stack.wait_until_ready()
    async with Driver(stack) as driver:
        undisturbed = [said(await driver.ask(max_tokens=n)) for n in (TOKENS // 4, 2 * TOKENS)]
        old = stack.pid("workers")
        long = driver.ask("long", max_tokens=2 * TOKENS)
        await driver.grown("long", 5)
        short = driver.ask("short", max_tokens=TOKENS // 4)
        await driver.grown("short", 5)
        os.kill(old, signal.SIGTERM)
        assert [said(await short), said(await long)] == undisturbed
        assert stack.pid("workers") != old
        await driver.assert_contiguous("short", takeovers=0)
        await driver.assert_contiguous("long", takeovers=1)


async def test_streams_end_with_an_error_when_every_worker_is_gone(make_stack):
    """After `QUEUE_TIMEOUT_SECONDS`, begun or not; a worker that wakes then adds nothing."""
    env = {"MAX_STEPS_PER_SECOND": str(PACE), "QUEUE_TIMEOUT_SECONDS": "2"}
    stack = make_stack(env=env)
    stack.wait_until_ready()
    async with Driver(stack) as driver:
        undisturbed = said(await driver.ask())
        begun = driver.ask("begun", stream=True)
        await driver.grown("begun", 10)
        frozen = stack.kill("workers", 0, signal.SIGSTOP)
        try:
            queued = driver.ask("queued")
            stream, answer = (await begun).text, await queued
        finally:
            os.kill(frozen, signal.SIGCONT)
        assert stream.count('"queue_timeout"') == stream.count("data: [DONE]") == 1
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout")
        wait_until(lambda: Stack.workers_seen(stack.url) == 1, "the worker serves again")
        assert said(await driver.ask()) == undisturbed
        for name in ("begun", "queued"):
            await driver.assert_contiguous(name, takeovers=0)
