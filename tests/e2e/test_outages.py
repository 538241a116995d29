"""Redis is away for long under real workers: all survive, say so, and go on with the same text."""

import asyncio
import json
import os
import signal
import time
from contextlib import asynccontextmanager

import httpx
import pytest

from shared import keys
from shared.session_log import SessionLog
from shared.store import Store, connect
from tests.own_redis import OwnRedis
from tests.stack import Stack

pytestmark = pytest.mark.timeout(400)
AWAY_SECONDS = 20
LONG, SHORT = 400, 80  # tokens: through both outages, and to an end within the first
PACE = {"MAX_STEPS_PER_SECOND": "8"}
CHAT = "/v1/chat/completions"


@pytest.fixture
def redis(tmp_path):
    redis = OwnRedis(tmp_path)
    yield redis
    redis.kill()


def body(tokens, **more):
    return {
        "messages": [{"role": "user", "content": "Go on."}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 1.0,
        "seed": 11,
        "presence_penalty": 0.3,
        "stream": True,
        **more,
    }


REQUESTS = {
    "long": body(LONG),
    "greedy": body(LONG, temperature=0),
    "short": body(SHORT, n=2),
}


def texts(answer):
    """Return each choice's text by channel, of a stream that has ended once, and well."""
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines.count("[DONE]") == 1
    assert lines[-1] == "[DONE]"
    found = {}
    for chunk in map(json.loads, lines[:-1]):
        for choice in chunk["choices"]:
            for name in ("reasoning_content", "content"):
                key = choice["index"], name
                found[key] = found.get(key, "") + (choice["delta"].get(name) or "")
    return found


async def events(store, session_id):
    return int(await store.redis.hget(keys.session(session_id), "last") or 0)


async def grown(store, session_id, count):
    while await events(store, session_id) < count:
        await asyncio.sleep(0.05)


async def ready(client):
    try:
        return (await client.get("/ready")).status_code
    except httpx.TimeoutException:
        return None


@asynccontextmanager
async def away(client):
    """Redis is away in the block, and for `AWAY_SECONDS`; the gateway says so, and when it is back.

    A new request is refused meanwhile, to be sent again later.
    """
    end = time.monotonic() + AWAY_SECONDS
    yield
    while (status := await ready(client)) != 503:
        assert time.monotonic() < end, status
        await asyncio.sleep(0.2)
    answer = await client.post(CHAT, json=body(1, stream=False))
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
    await asyncio.sleep(max(0.0, end - time.monotonic()))


async def test_sessions_outlive_a_redis_that_is_away_for_long(redis, stack, make_stack):
    """Frozen, then killed, for 20 s each: what ran goes on where it ran, with the same text."""
    async with httpx.AsyncClient(base_url=stack.url, timeout=120, trust_env=False) as client:
        posts = [client.post(CHAT, json=request) for request in REQUESTS.values()]
        answers = await asyncio.gather(*posts)
        undisturbed = dict(zip(REQUESTS, map(texts, answers), strict=True))
    with make_stack(workers=2, env={"REDIS_URL": redis.url, **PACE}) as running:
        pids = [part["pid"] for part in (*running.state["workers"], *running.gateways)]
        store = Store(connect(redis.url, retries=10))
        async with httpx.AsyncClient(base_url=running.url, timeout=200, trust_env=False) as client:
            posts = {
                name: asyncio.create_task(client.post(CHAT, json={**request, "session_id": name}))
                for name, request in REQUESTS.items()
            }
            for name in REQUESTS:
                await grown(store, name, 20)
            async with away(client):
                os.kill(redis.process.pid, signal.SIGSTOP)
            os.kill(redis.process.pid, signal.SIGCONT)
            await grown(store, "long", await events(store, "long") + 10)
            assert await ready(client) == 200
            async with away(client):
                redis.kill()
            redis.start()
            back = time.monotonic()
            answers = {name: texts(await post) for name, post in posts.items()}
            assert time.monotonic() - back < AWAY_SECONDS + 20
            assert await ready(client) == 200
        assert answers == undisturbed
        log = SessionLog(store)
        for name in REQUESTS:
            record, entries = await log.record(name), await log.read_all(name)
            assert [entry.index for entry in entries] == list(range(record.last + 1))
            assert (record.status, record.exact) == ("finished", True)
            assert (record.takeovers, record.claims) == (0, 1), name  # nobody took it meanwhile
        await store.close()
        assert pids == [part["pid"] for part in (*running.state["workers"], *running.gateways)]
        assert Stack.workers_seen(running.url) == 2
