"""Prompts that take long: one that kills its workers, and many that a frozen worker leaves."""

import asyncio
import os
import signal

import httpx
import pytest

from shared import keys
from shared.session_log import SessionLog
from shared.store import Store, connect
from tests.conftest import TEST_ENV
from tests.stack import Stack, wait_until
from worker.intake import AT_ONCE

pytestmark = pytest.mark.timeout(500)  # three workers start, and three of them again
WORKERS, ATTEMPTS, TOKENS, NEIGHBOURS, ORPHANS = 3, 3, 160, 6, 10
CHUNK, PACE = 32, 20
"""A prompt of thousands of tokens is computed for seconds, so that each kill falls into it."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory, demo_model):
    """Three workers that this test kills in the middle of a prompt."""
    env = {**TEST_ENV, "PREFILL_CHUNK_TOKENS": str(CHUNK), "MAX_STEPS_PER_SECOND": str(PACE)}
    env["MAX_ATTEMPTS"] = str(ATTEMPTS)
    folder = tmp_path_factory.mktemp("poison") / "data"
    with Stack(folder, workers=WORKERS, env=env) as running:
        yield running


def neighbour(number, **more):
    question = {"role": "user", "content": f"Tell me of {number} rivers."}
    settings = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 1.0, "seed": number}
    return {"messages": [question], **settings, **more}


def text(answer):
    return answer.json()["choices"][0]["message"]


async def computing(store, attempts):
    """Wait until an engine computes the poison's prompt for so-manieth time; returns the worker."""
    while True:
        record = keys.session("poison")
        tried, lease, status = await store.redis.hmget(record, "attempts", "lease", "status")
        assert status in (None, b"queued", b"running"), status
        if int(tried or 0) == attempts and lease:
            return lease.decode().split(":")[0]
        await asyncio.sleep(0.005)


def kill(stack, worker_id):
    """SIGKILL the worker that gave itself this id."""
    logs = sorted((stack.folder / "logs").glob("worker*.log"))
    index = next(i for i, log in enumerate(logs) if f'"worker": "{worker_id}"' in log.read_text())
    pid = stack.pid("workers", index)
    os.kill(pid, signal.SIGKILL)
    return pid


async def test_a_prompt_that_kills_its_workers_does_not_take_the_fleet_with_it(stack):
    """After `MAX_ATTEMPTS` dead processes it ends with a clear error; all others are whole."""
    store = Store(connect(stack.redis_url, retries=10))
    async with httpx.AsyncClient(base_url=stack.url, timeout=300, trust_env=False) as client:

        def ask(body):
            return asyncio.ensure_future(client.post("/v1/chat/completions", json=body))

        bodies = [neighbour(n) for n in range(NEIGHBOURS)]
        undisturbed = await asyncio.gather(*map(ask, bodies))
        others = [ask({**b, "session_id": f"other{n}"}) for n, b in enumerate(bodies)]
        for n in range(NEIGHBOURS):
            while int(await store.redis.hget(keys.session(f"other{n}"), "last") or 0) < 5:
                await asyncio.sleep(0.01)
        prompt = {"role": "user", "content": "river glass " * 400}
        poison = ask({"messages": [prompt], "max_tokens": 8, "session_id": "poison"})
        killed = [
            kill(stack, await computing(store, attempts)) for attempts in range(1, ATTEMPTS + 1)
        ]
        answer = await poison
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert (error["code"], error["message"]) == (
            "generation_failed",
            f"The generation failed {ATTEMPTS} times.",
        )
        assert [text(a) for a in await asyncio.gather(*others)] == [text(a) for a in undisturbed]
        log = SessionLog(store)
        record = await log.record("poison")
        assert (record.status, record.attempts, record.last) == ("failed", ATTEMPTS, 1)
        assert len(set(killed)) == ATTEMPTS
        taken = [(await log.record(f"other{n}")).takeovers for n in range(NEIGHBOURS)]
        assert sum(taken) > 0  # the kills hit some of them
        wait_until(lambda: Stack.workers_seen(stack.url) == WORKERS, "the fleet is whole", 120)
        assert text(await ask(neighbour(0, max_tokens=8)))
    await store.close()


async def holders(store, names):
    """Return the worker that holds each of these sessions; None for one that waits or has ended."""
    async with store.redis.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hget(keys.session(name), "lease")
        leases = await pipe.execute()
    return [lease.decode().split(":")[0] if lease else None for lease in leases]


async def test_what_a_frozen_worker_leaves_is_shared_with_the_one_that_wakes(stack):
    """Its successor takes no more than it begins soon, so the one that wakes has a part again."""
    store, names = Store(connect(stack.redis_url, retries=10)), [f"o{n}" for n in range(ORPHANS)]
    pids = [worker["pid"] for worker in stack.state["workers"]]
    async with httpx.AsyncClient(base_url=stack.url, timeout=300, trust_env=False) as client:
        for pid in pids[1:]:
            os.kill(pid, signal.SIGSTOP)  # so that the first has all
        try:
            asked = []
            for number, name in enumerate(names):
                prompt = {"role": "user", "content": f"{number} " + "river glass " * 150}
                body = neighbour(number, messages=[prompt], max_tokens=1000, session_id=name)
                asked.append(asyncio.ensure_future(client.post("/v1/chat/completions", json=body)))
            for name in names:
                while int(await store.redis.hget(keys.session(name), "last") or 0) < 1:
                    await asyncio.sleep(0.01)
            [first] = set(await holders(store, names))
            os.kill(pids[1], signal.SIGCONT)
            os.kill(pids[0], signal.SIGSTOP)
            while not (others := {*await holders(store, names)} - {first, None}):
                await asyncio.sleep(0.01)
            os.kill(pids[0], signal.SIGCONT)
            for name in names:
                while (await SessionLog(store).record(name)).takeovers < 1:
                    await asyncio.sleep(0.01)
            found = await holders(store, names)
            for name in names:
                await client.post(f"/v1/cancel/{name}")
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        [second] = others
        assert found.count(second) >= AT_ONCE
        assert found.count(first) > 1
        assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
    await store.close()
