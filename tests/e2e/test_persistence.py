"""`PERSIST_SESSIONS=1` on the real stack: what ended is read again after everything was lost."""

import asyncio
import sqlite3

import httpx
import redis

from shared import keys
from shared.settings import GatewaySettings
from tests.stack import Stack, keys_without_ttl, wait_until

ASK = {
    "messages": [{"role": "user", "content": "Say something."}],
    "ignore_eos": True,
    "max_tokens": 40,
    "temperature": 0.9,
}
STREAM = {**ASK, "stream": True}


def outbox_is_empty(stack):
    with redis.Redis.from_url(stack.redis_url) as client:
        return not client.exists(keys.OUTBOX)


async def everything(url, live):
    """Return all that a client can read of the session `kept`."""
    middle = live[: live.index(b"id: kept:7\n")]
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        place = {"last-event-id": "kept:6"}
        rest = await client.post("/v1/chat/completions", headers=place)
        assert middle + rest.content == live
        conflict = await client.post(
            "/v1/chat/completions", json={**ASK, "session_id": "kept", "temperature": 0.1}
        )
        assert conflict.json()["error"]["code"] == "session_id_in_use"
        calls = [
            await client.post("/v1/chat/completions", json={**STREAM, "session_id": "kept"}),
            await client.get("/v1/sessions/kept/events", headers=place),
            await client.get("/v1/chat/completions/kept"),
            await client.get("/v1/sessions/kept"),
            await client.post("/v1/cancel/kept"),
        ]
    assert calls[0].content == live
    return [(call.status_code, call.content) for call in calls]


async def test_sessions_are_read_after_a_restart_of_everything(tmp_path, demo_model):
    """With Redis emptied and all parts started anew, each route gives the same bytes as before."""
    env = {"PERSIST_SESSIONS": "1", "TORCH_DTYPE": "float64"}
    folder = tmp_path / "data"
    with Stack(folder, env=env) as stack:
        async with httpx.AsyncClient(base_url=stack.url, timeout=60, trust_env=False) as client:
            answer = await client.post(
                "/v1/chat/completions", json={**STREAM, "session_id": "kept"}
            )
        live = answer.content
        before = await everything(stack.url, live)
        await asyncio.to_thread(wait_until, lambda: outbox_is_empty(stack), "it is archived")
        assert keys_without_ttl(stack.redis_url) == []
        with redis.Redis.from_url(stack.redis_url) as client:
            client.flushall()
    assert (folder / GatewaySettings(_env_file=None).sessions_db_path.split("/")[-1]).exists()
    with Stack(folder, gateways=2, env=env) as again:
        for gateway in again.gateways:
            assert await everything(gateway["url"], live) == before
        with redis.Redis.from_url(again.redis_url) as client:
            assert not client.exists(keys.session("kept"))


async def test_a_gateway_that_dies_loses_no_session(tmp_path, demo_model):
    """What ended while no gateway lived is archived by the next one."""
    env = {"PERSIST_SESSIONS": "1", "TORCH_DTYPE": "float64"}
    with Stack(tmp_path / "data", env=env) as stack:
        lock = sqlite3.connect(tmp_path / "data" / "sessions.db", isolation_level=None)
        wait_until(lambda: lock.execute("PRAGMA user_version").fetchone() == (1,), "the schema")
        lock.execute("BEGIN IMMEDIATE")  # nothing is archived before the gateway dies
        async with httpx.AsyncClient(base_url=stack.url, timeout=60, trust_env=False) as client:
            got = await client.post("/v1/chat/completions", json={**STREAM, "session_id": "kept"})
        with redis.Redis.from_url(stack.redis_url) as client:
            assert client.ttl(keys.events("kept")) > 3600  # it waits for its row
        old = stack.kill("gateways")
        lock.execute("ROLLBACK")
        lock.close()
        await asyncio.to_thread(stack.wait_restarted, "gateways", old)
        await asyncio.to_thread(wait_until, lambda: outbox_is_empty(stack), "it is archived", 30)
        with redis.Redis.from_url(stack.redis_url) as client:
            client.delete(keys.session("kept"), keys.events("kept"))
        await asyncio.to_thread(wait_until, lambda: stack.workers_seen(stack.url), "it serves")
        async with httpx.AsyncClient(base_url=stack.url, timeout=60, trust_env=False) as client:
            kept = await client.get("/v1/sessions/kept/events")
        assert kept.content == got.content
