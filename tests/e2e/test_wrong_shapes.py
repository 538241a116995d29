"""A real worker survives sessions whose values in Redis have the wrong shape."""

import asyncio

import httpx
import pytest

from shared.store import Store, connect
from tests.shapes import BROKEN, submit_broken

HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


@pytest.fixture
async def store(stack):
    store = Store(connect(stack.redis_url))
    yield store
    await store.close()


async def test_each_broken_session_ends_and_nothing_else_does(stack, store):
    """Every broken session ends with an error; the worker lives, and a sound one is answered."""
    pid = stack.pid("workers")
    async with httpx.AsyncClient(base_url=stack.url, timeout=25, trust_env=False) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def ends(sid):
            answer = await client.get(f"/v1/sessions/{sid}/events")
            if answer.status_code == 200:
                assert answer.text.endswith("data: [DONE]\n\n"), (sid, answer.text)
                return '"error"' in answer.text
            return answer.status_code in (404, 410, 500)  # 410: its first events went with its log

        for number, change in enumerate(BROKEN.values()):
            await submit_broken(store, f"broken-{number}", model, change)
        results = await asyncio.gather(*(ends(f"broken-{n}") for n in range(len(BROKEN))))
        # What only counts attempts, or orders the queue, breaks nothing.
        survived = {name for name, ended in zip(BROKEN, results, strict=True) if not ended}
        assert survived <= {"attempts", "enqueued", "epoch"}, survived
        answer = await client.post("/v1/chat/completions", json=HELLO)
        assert answer.status_code == 200
    assert stack.pid("workers") == pid
