"""What nobody can bring back ends in a clear error, on streams and for waiting callers."""

import asyncio
import json

from shared import keys
from shared.protocol import decode_request
from tests.served import serving

BODY = {"messages": [{"role": "user", "content": "x"}]}


async def waiting(worker, count=1):
    while await worker.queue.depth() < count:
        await worker.announce()  # which holds for seconds, and requests may take longer
        await asyncio.sleep(0.01)


async def test_a_queued_session_that_redis_loses_is_an_error_for_all_who_wait(
    redis_url, store, worker
):
    """After FLUSHALL a stream ends with one error event and [DONE], a plain caller with a 410."""
    async with serving(redis_url) as client:
        url = "/v1/chat/completions"
        plain = asyncio.create_task(client.post(url, json=BODY))
        await waiting(worker)
        async with client.stream("POST", url, json={**BODY, "stream": True}) as answer:
            parts = answer.aiter_text()
            text = await anext(parts)  # what is lost before is no stream yet: a plain 410
            await store.redis.flushall()
            text += "".join([part async for part in parts])
        other = await plain
    events = [e for e in text.split("\n\n") if "data: " in e]
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
        await waiting(worker)
        await worker.fleet.leave(worker.id)
        await store.redis.zadd(keys.LEASES, {"begun": 1})  # it runs out
        first, second = await asyncio.gather(begun, queued)
        state = (await client.get("/v1/sessions/begun")).json()
    assert '"half a "' in first.text
    assert first.text.count('"queue_timeout"') == first.text.count("data: [DONE]") == 1
    assert second.status_code == 503
    assert second.json()["error"]["code"] == "queue_timeout"
    assert (state["status"], state["usage"]["completion_tokens"]) == ("failed", 1)
    assert state["error"]["code"] == "queue_timeout"


async def test_a_post_sent_again_after_a_loss_begins_the_same_text(redis_url, store, worker):
    """Without a seed of the client's, id and body make it: whoever wins, the text is the same."""
    seeds = {}
    async with serving(redis_url) as client:
        for name in ("mine", "mine", "another"):
            await store.redis.flushall()
            await worker.announce()
            body = {**BODY, "session_id": name}
            post = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await waiting(worker)
            request = decode_request(await worker.queue.request(name))
            seeds.setdefault(name, set()).add(request.sampling.seed)
            await worker.finish((await worker.claim())[0])
            assert (await post).status_code == 200
    assert len(seeds["mine"]) == 1
    assert seeds["mine"] != seeds["another"]
