"""Who watches, on the real stack: sessions outlive their viewers for as long as configured."""

import asyncio
import contextlib
import signal
import time

import httpx
import pytest
import redis.asyncio

from shared import keys

WATCHED_FOR = 3.0
LATEST = WATCHED_FOR + 7.0
"""The time itself, at most a second and a bit for the last renewal, and what busy machines need."""

LONG = {
    "messages": [{"role": "user", "content": "Go on and on."}],
    "ignore_eos": True,
    "stream": True,
    "temperature": 1.5,
    "seed": 1,
    "max_tokens": 8000,
}


@pytest.fixture(scope="module")
def viewed(tmp_path_factory, demo_model):
    """Two gateways and one worker that runs one session at a time; parts that die come back."""
    from tests.conftest import TEST_ENV
    from tests.stack import Stack

    env = {
        **TEST_ENV,
        "CANCEL_AFTER_DISCONNECT_SECONDS": str(WATCHED_FOR),
        "MAX_BATCH_SIZE": "1",
        "CONTEXT_LENGTH": "8192",
    }
    folder = tmp_path_factory.mktemp("viewed") / "data"
    with Stack(folder, gateways=2, env=env) as running:
        yield running


@pytest.fixture
async def clients(viewed):
    """One client for each gateway; whatever a test leaves running is cancelled."""
    async with contextlib.AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(
                httpx.AsyncClient(base_url=g["url"], timeout=60, trust_env=False)
            )
            for g in viewed.gateways
        ]
        yield made
        async with redis.asyncio.from_url(viewed.redis_url) as raw:
            async for key in raw.scan_iter(keys.SESSION + "*"):
                with contextlib.suppress(httpx.HTTPError):
                    await made[1].post(f"/v1/cancel/{key.decode().removeprefix(keys.SESSION)}")


@contextlib.asynccontextmanager
async def watching(client, session_id, **more):
    """Follow a new session, and know that its first event has come."""
    body = {**LONG, "session_id": session_id, **more}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.aiter_lines()
        assert await lines.__anext__() == f"id: {session_id}:0"
        yield lines


async def ended_after(viewed, session_id, since):
    """Wait until a session ended; returns the seconds since then, and its reason."""
    async with redis.asyncio.from_url(viewed.redis_url) as raw:
        while await raw.hget(keys.session(session_id), "status") in (b"queued", b"running"):
            await asyncio.sleep(0.02)
        seconds = time.monotonic() - since
        [(_, last)] = await raw.xrevrange(keys.events(session_id), count=1)
        return seconds, last[b"e"].decode()


async def status(client, session_id):
    return (await client.get(f"/v1/sessions/{session_id}")).json()["status"]


async def running(client, session_id):
    while await status(client, session_id) == "queued":
        await asyncio.sleep(0.02)


def kill_gateway(viewed, index):
    """Kill a gateway; returns its process id and the time."""
    return viewed.kill("gateways", index), time.monotonic()


async def test_leaving_is_noticed(viewed, clients):
    """A running session ends as abandoned, the configured time after its viewer left."""
    async with watching(clients[0], "left"):
        await running(clients[1], "left")
        since = time.monotonic()
    seconds, last = await ended_after(viewed, "left", since)
    assert "abandoned" in last
    assert WATCHED_FOR - 0.1 < seconds < LATEST


async def test_a_killed_gateway_is_noticed(viewed, clients):
    """When the gateway of the only viewer is SIGKILLed, nothing keeps the session longer."""
    with contextlib.suppress(httpx.HTTPError):
        async with watching(clients[0], "killed") as lines:
            await running(clients[1], "killed")
            old, since = kill_gateway(viewed, 0)
            async for _ in lines:
                pass
    seconds, last = await ended_after(viewed, "killed", since)
    viewed.wait_restarted("gateways", old, 0)
    assert "abandoned" in last
    assert WATCHED_FOR - 1.1 < seconds < LATEST


async def test_coming_back_on_another_gateway_saves_the_session(viewed, clients):
    """A viewer whose gateway died, and who resumes elsewhere in time, has the rest of the text."""
    seen = []
    with contextlib.suppress(httpx.HTTPError):
        async with watching(clients[0], "saved", max_tokens=3000) as lines:
            await running(clients[1], "saved")
            old, since = kill_gateway(viewed, 0)
            seen = [line async for line in lines]
    last = next((line[4:] for line in reversed(seen) if line.startswith("id: ")), "saved:0")
    await asyncio.sleep(WATCHED_FOR - 2 - (time.monotonic() - since))
    header = {"last-event-id": last}
    got = await clients[1].post("/v1/chat/completions", headers=header, timeout=60)
    viewed.wait_restarted("gateways", old, 0)
    assert got.text.startswith(f"id: saved:{int(last.rpartition(':')[2]) + 1}\n")
    assert '"finish_reason":"length"' in got.text
    assert time.monotonic() - since > WATCHED_FOR
    assert await status(clients[1], "saved") == "finished"


async def test_a_waiting_session_is_cancelled_while_the_worker_is_busy(viewed, clients):
    """What waits needs no worker to be found abandoned; what runs and is watched stays."""
    async with watching(clients[0], "busy"):
        await running(clients[0], "busy")
        async with watching(clients[1], "waiting"):
            assert await status(clients[1], "waiting") == "queued"
            since = time.monotonic()
        seconds, last = await ended_after(viewed, "waiting", since)
        assert "abandoned" in last
        assert WATCHED_FOR - 0.1 < seconds < LATEST
        assert await status(clients[1], "busy") == "running"


async def test_an_outage_of_redis_is_no_absence(viewed, clients):
    """Watch keys that run out while Redis hangs cost nobody who is still there their session."""
    async with watching(clients[0], "through", max_tokens=2500) as lines:
        await running(clients[1], "through")
        viewed.kill("redis", number=signal.SIGSTOP)
        await asyncio.sleep(WATCHED_FOR + 2)  # longer than the keys live
        viewed.kill("redis", number=signal.SIGCONT)
        tail = [line async for line in lines][-6:]
    assert any('"finish_reason":"length"' in line for line in tail)
