"""Redis dies in the middle of everything, and comes back with what it had."""

import asyncio
import json

import httpx
import pytest

from gateway import patience
from shared.protocol import Delta, Finished, Usage
from shared.session_log import SessionLog
from shared.store import Store, connect
from tests.gateway_process import GatewayProcess
from tests.own_redis import OwnRedis
from tests.scripted import ScriptedWorker
from tests.served import serving
from worker.publisher import Ending, Publisher

pytestmark = pytest.mark.timeout(90)
STREAMS, TOKENS = 50, 120


@pytest.fixture
def own_redis(tmp_path):
    redis = OwnRedis(tmp_path)
    yield redis
    redis.kill()


async def generate(publisher, claimed, ticks):
    """Write one session as a job does, token by token."""
    writer = publisher.open(claimed, 1, lambda: None)
    for n in range(TOKENS):
        await ticks()
        writer.write(Delta(0, (n,), f"{n} "))
        publisher.flush()
    usage = Usage(1, TOKENS)
    return await writer.finish(Ending(Finished(("stop",), usage), "finished", usage))


async def read_stream(url, session_id):
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        answer = await client.post("/v1/chat/completions", json={**body, "session_id": session_id})
    lines = [line for line in answer.text.split("\n") if not line.startswith(":")]
    return [event for event in "\n".join(lines).split("\n\n") if event]


async def test_fifty_streams_go_on_when_redis_is_killed_and_restarted(own_redis, tmp_path):
    """All of 50 running streams are whole after a SIGKILL of Redis; no client reconnects."""
    gateways = [GatewayProcess(own_redis.url, tmp_path) for _ in range(2)]
    store = Store(connect(own_redis.url, retries=10))
    worker = ScriptedWorker(store)
    publisher = Publisher(SessionLog(store), kept_seconds=60)
    publisher.start()
    try:
        await worker.announce()
        readers = [
            asyncio.create_task(read_stream(gateways[n % 2].url, f"s{n}")) for n in range(STREAMS)
        ]
        claims = []
        while len(claims) < STREAMS:
            claims += await worker.claim(STREAMS)
            await worker.queue.wait_for_work(0.1)
        written = [
            asyncio.create_task(generate(publisher, c, lambda: asyncio.sleep(0.02))) for c in claims
        ]
        log = SessionLog(store)
        while not await log.read("s7", TOKENS // 4):
            await asyncio.sleep(0.01)
        own_redis.kill()
        await asyncio.sleep(0.5)  # the outage itself, longer than a write takes
        own_redis.start()
        assert await asyncio.gather(*written) == [True] * STREAMS
        for n, events in enumerate(await asyncio.gather(*readers)):
            ids = [e.split("\n")[0] for e in events if e.startswith("id:")]
            assert ids == [f"id: s{n}:{i}" for i in range(TOKENS + 2)], events
            texts = [json.loads(e.split("data: ")[1]) for e in events[1:-2]]
            joined = "".join(t["choices"][0]["delta"]["content"] for t in texts)
            assert joined == "".join(f"{i} " for i in range(TOKENS))
            assert events[-1] == "data: [DONE]"
    finally:
        await publisher.close()
        await store.close()
        for gateway in gateways:
            gateway.stop()


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/chat/completions"), ("GET", "/v1/sessions/s/events")]
)
async def test_a_resume_waits_for_a_redis_that_is_soon_back(own_redis, method, path, monkeypatch):
    """Who comes back during a restart is answered with its stream, not with a 503."""
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 20)  # a busy machine starts it slowly
    store = Store(connect(own_redis.url, retries=10))
    worker = ScriptedWorker(store)
    await worker.announce()
    async with serving(own_redis.url) as client:
        reader = asyncio.create_task(read_stream(str(client.base_url), "s"))
        claimed = await worker.next()
        await worker.say(claimed, "word")
        await worker.finish(claimed)
        await reader
        own_redis.kill()
        place = {"last-event-id": "s:1"}
        resumed = asyncio.create_task(client.request(method, path, headers=place))
        done, _ = await asyncio.wait({resumed}, timeout=0.5)
        assert not done
        own_redis.start()
        answer = await resumed
    assert (answer.status_code, answer.text[:9]) == (200, "id: s:2\nd")
    assert answer.text.endswith("data: [DONE]\n\n")
    await store.close()


async def test_a_response_resumed_waits_for_a_redis_that_is_soon_back(own_redis, monkeypatch):
    """`starting_after` has the patience that `Last-Event-ID` has."""
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 20)
    store = Store(connect(own_redis.url, retries=10))
    worker = ScriptedWorker(store)
    await worker.announce()
    async with serving(own_redis.url) as client:
        body = {"input": "x", "background": True}
        made = (await client.post("/v1/responses", json=body)).json()["id"]
        await worker.finish(await worker.next())
        own_redis.kill()
        url = f"/v1/responses/{made}?stream=true&starting_after=1"
        resumed = asyncio.create_task(client.get(url))
        done, _ = await asyncio.wait({resumed}, timeout=0.5)
        assert not done
        own_redis.start()
        answer = await resumed
    assert answer.status_code == 200
    assert answer.text.endswith("data: [DONE]\n\n")
    await store.close()
