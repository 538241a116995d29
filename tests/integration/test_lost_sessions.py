"""What nobody can bring back ends in a clear error, on streams and for waiting callers."""

import asyncio
import json

from tests.served import serving

BODY = {"messages": [{"role": "user", "content": "x"}]}


async def waiting(worker, count=1):
    while await worker.queue.depth() < count:
        await asyncio.sleep(0.01)


async def test_a_queued_session_that_redis_loses_is_an_error_for_all_who_wait(
    redis_url, store, worker
):
    """After FLUSHALL a stream ends with one error event and [DONE], a plain caller with a 410."""
    async with serving(redis_url) as client:
        url = "/v1/chat/completions"
        stream = asyncio.create_task(client.post(url, json={**BODY, "stream": True}))
        plain = asyncio.create_task(client.post(url, json=BODY))
        await waiting(worker, 2)
        await store.redis.flushall()
        answer, other = await asyncio.gather(stream, plain)
    events = [e for e in answer.text.split("\n\n") if "data: " in e]
    assert events[-1] == "data: [DONE]"
    error = json.loads(events[-2].split("data: ")[1])["error"]
    assert error["code"] == "events_expired"
    assert len(events) == 3
    assert other.status_code == 410


async def test_a_session_that_outlives_every_worker_ends_with_an_error(redis_url, store, worker):
    """With no worker left, whoever runs the gateway's upkeep ends what waits, queued or begun."""
    async with serving(redis_url, queue_timeout_seconds=1) as client:
        url = "/v1/chat/completions"
        begun = asyncio.create_task(
            client.post(url, json={**BODY, "session_id": "begun", "stream": True})
        )
        await waiting(worker)
        [claimed] = await worker.claim()
        await worker.say(claimed, "half a ")
        queued = asyncio.create_task(client.post(url, json={**BODY, "session_id": "queued"}))
        await worker.fleet.leave(worker.id)
        first, second = await asyncio.gather(begun, queued)
        state = (await client.get("/v1/sessions/begun")).json()
    assert '"half a "' in first.text
    assert first.text.count('"queue_timeout"') == first.text.count("data: [DONE]") == 1
    assert second.status_code == 503
    assert second.json()["error"]["code"] == "queue_timeout"
    assert (state["status"], state["usage"]["completion_tokens"]) == ("failed", 1)
    assert state["error"]["code"] == "queue_timeout"
