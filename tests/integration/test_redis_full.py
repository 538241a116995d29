"""Redis at the end of its memory: new work is refused, what runs waits, and goes on."""

import asyncio

import httpx
import pytest
import redis
from redis.exceptions import OutOfMemoryError

from shared import keys
from shared.session_log import SessionLog
from shared.store import Store, connect
from tests.gateway_process import GatewayProcess
from tests.integration.test_redis_restart import generate, read_stream
from tests.scripted import ScriptedWorker
from worker.publisher import Publisher

BODY = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
def memory(redis_url):
    """The test's Redis, whose memory can be taken away: `memory("1")`, and given back."""
    with redis.Redis.from_url(redis_url) as client:
        yield lambda maximum: client.config_set("maxmemory", maximum)
        client.config_set("maxmemory", "0")


@pytest.fixture
async def worker(redis_url):
    """A worker, and the publisher through which it writes as a real one does."""
    store = Store(connect(redis_url))
    worker = ScriptedWorker(store)
    worker.redis = store.redis
    worker.publisher = Publisher(SessionLog(store), kept_seconds=60)
    worker.publisher.start()
    yield worker
    await worker.publisher.close()
    await store.close()


async def test_a_full_redis_refuses_new_work_and_loses_nothing(redis_url, memory, worker, tmp_path):
    """503 with Retry-After for a new chat; a running stream waits, can be resumed, and is whole."""
    gateway, ticks = GatewayProcess(redis_url, tmp_path), asyncio.Semaphore(0)
    try:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=10, trust_env=False) as client:
            await worker.announce()
            reading = asyncio.create_task(read_stream(gateway.url, "s"))
            claimed = await worker.next()
            writing = asyncio.create_task(generate(worker.publisher, claimed, ticks.acquire))
            for _ in range(20):
                ticks.release()
            while (await worker.log.record("s")).last < 20:
                await asyncio.sleep(0.01)
            memory("1")
            for streams in (True, False):
                body = BODY | {"stream": streams}
                refused = await client.post("/v1/chat/completions", json=body)
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "unavailable"
                assert int(refused.headers["retry-after"]) > 0
            key = keys.worker(worker.id)
            await worker.redis.pexpire(key, 3000)
            with pytest.raises(OutOfMemoryError):
                await worker.announce()
            assert await worker.redis.pttl(key) > 3000
            for _ in range(
                99
            ):  # all but the last: its end would be let through, and the rest with it
                ticks.release()
            again = {"last-event-id": "s:5"}
            async with client.stream("POST", "/v1/chat/completions", headers=again) as resumed:
                assert resumed.status_code == 200
                lines = resumed.aiter_lines()
                assert await anext(lines) == "id: s:6"
            assert (await worker.log.record("s")).last == 20
            memory("0")
            ticks.release()
            assert await writing
            ids = [e.split("\n")[0] for e in await reading if e.startswith("id:")]
            assert ids == [f"id: s:{n}" for n in range(len(ids))]
            assert len(ids) == 122
            new = BODY | {"stream": True}
            async with client.stream("POST", "/v1/chat/completions", json=new) as accepted:
                assert accepted.status_code == 200
    finally:
        gateway.stop()
