"""A gateway under uvloop, which somebody may have: what reaches below asyncio works too."""

import asyncio
from pathlib import Path

import pytest

from gateway import connection as connections
from shared.store import Store, connect
from tests.gateway_process import GatewayProcess
from tests.integration.test_redis_restart import read_stream
from tests.scripted import ScriptedWorker
from tests.served import serving

uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")


async def stream_and_lose_redis(redis_url):
    """Stream a session whose relay loses both connections in the middle; returns its events."""
    store = Store(connect(redis_url))
    worker = ScriptedWorker(store)
    await worker.announce()
    async with serving(redis_url) as client:
        reading = asyncio.create_task(read_stream(str(client.base_url), "s"))
        claimed = await worker.next()
        wires = client.services.relay._wires
        for n in range(40):
            await worker.say(claimed, f"{n} ")
            if n == 20:
                lost = dict(wires)
                for wire in lost.values():
                    wire.abort()
                while any(wires.get(name) in (None, wire) for name, wire in lost.items()):
                    await asyncio.sleep(0.01)
        await worker.finish(claimed)
        events = await reading
    await store.close()
    return events


def test_streams_are_whole_under_uvloop(redis_url, monkeypatch):
    """The same stream, over the same short way to the socket, on the other event loop."""
    cycles = []
    whole = connections.uvicorn_cycle
    monkeypatch.setattr(
        connections, "uvicorn_cycle", lambda send: cycles.append(whole(send)) or cycles[-1]
    )
    loop = uvloop.new_event_loop()
    try:
        events = loop.run_until_complete(stream_and_lose_redis(redis_url))
    finally:
        loop.close()
    ids = [event.split("\n")[0] for event in events if event.startswith("id:")]
    assert ids == [f"id: s:{n}" for n in range(42)]
    assert [type(cycle.transport).__module__.partition(".")[0] for cycle in cycles] == ["uvloop"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is loaded")
def test_a_gateway_takes_no_other_loop_because_it_is_there(redis_url, tmp_path):
    """With uvloop installed, as it is here, the gateway's own program runs on asyncio."""
    gateway = GatewayProcess(redis_url, tmp_path)
    try:
        maps = Path(f"/proc/{gateway.process.pid}/maps").read_text()
    finally:
        gateway.stop()
    assert "httptools" in maps
    assert "uvloop" not in maps
