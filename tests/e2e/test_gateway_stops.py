"""A gateway is stopped or killed under its clients: they go on elsewhere, and nobody is left."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import time

import httpx
import httpx2
import openai
import pytest

from clients.python.unbroken_transport import AsyncResumingTransport
from tests.client_kit import Producer
from tests.gateway_process import GatewayProcess

pytestmark = pytest.mark.timeout(60)
BODY = {"messages": [{"role": "user", "content": "Tell me."}]}
DRAIN_SECONDS = 15
AT_ONCE = DRAIN_SECONDS - 5
"""Seconds of silence at most, on a busy machine too: far less than what waits for the drain."""


@pytest.fixture(scope="module")
def other(redis_server, tmp_path_factory):
    """The gateway that stays."""
    process = GatewayProcess(redis_server, tmp_path_factory.mktemp("other"))
    yield process
    process.kill()


@pytest.fixture
def drain():
    """How long the first gateway may drain, seconds."""
    return DRAIN_SECONDS


@pytest.fixture
def gateways(redis_url, other, tmp_path, drain):
    """Two gateways, the first of which a test may stop or kill."""
    one = GatewayProcess(redis_url, tmp_path, {"DRAIN_SECONDS": str(drain)})
    yield one, other
    one.kill()


@pytest.fixture
async def producer(redis_url):
    async with Producer(redis_url) as producer:
        producer.gate.clear()
        yield producer


async def read(gateways, signal_at, number, producer):
    """Read a stream through the SDK and the transport; signal the first gateway in the middle.

    Returns the text and the longest silence, in seconds, since the signal.
    """
    one, two = gateways
    transport = AsyncResumingTransport(fallbacks=(two.url,))
    http = httpx2.AsyncClient(transport=transport, timeout=20)
    text, silence, last = "", 0.0, 0.0
    async with openai.AsyncOpenAI(
        base_url=f"{one.url}/v1", api_key="none", http_client=http
    ) as sdk:
        stream = await sdk.chat.completions.create(model="any", stream=True, **BODY)
        seen = 0
        async for chunk in stream:
            now = time.monotonic()
            silence, last = max(silence, now - last if last else 0.0), now if last else 0.0
            delta = chunk.choices[0].delta
            text += getattr(delta, "reasoning_content", None) or delta.content or ""
            seen += 1
            if seen == signal_at:
                one.process.send_signal(number)
                last = time.monotonic()
                producer.gate.set()
    return text, silence


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_sdk_goes_on_at_another_gateway(gateways, producer, number):
    """Streams of a gateway that is stopped or killed go on at the other: whole, at once."""
    producer.texts *= 10  # long enough not to end within the grace
    readers = [read(gateways, 8, number, producer) for _ in range(4)]
    for text, silence in await asyncio.gather(*readers):
        assert text == producer.text
        assert silence <= AT_ONCE
    gateways[0].process.wait(DRAIN_SECONDS)  # nothing keeps it, once its streams have left


async def read_until_it_breaks(client, producer, gateway):
    """Stop the gateway behind the tenth event; return all bytes that came, and the last id."""
    data = b""
    body = {**BODY, "stream": True}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for part in answer.aiter_bytes():
                data += part
                if data.count(b"\n\n") >= 10 and not producer.gate.is_set():
                    gateway.process.terminate()
                    producer.gate.set()
    except httpx.RemoteProtocolError:
        return data, re.findall(rb"^id: (\S+)$", data, re.MULTILINE)[-1].decode()
    raise AssertionError("the answer has an end")


async def test_a_stopping_gateway_breaks_off_behind_a_whole_event(gateways, producer):
    """What a client has read is whole frames, and then an end that is no end of the answer."""
    one, two = gateways
    producer.texts *= 20
    async with httpx.AsyncClient(base_url=one.url, timeout=20, trust_env=False) as client:
        data, last = await read_until_it_breaks(client, producer, one)
        assert data.endswith(b"\n\n")
        assert b"[DONE]" not in data
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")
        session, url = last.rpartition(":")[0], f"{two.url}/v1/chat/completions"
        rest = await client.post(url, headers={"last-event-id": last})
        whole = await client.post(url, headers={"last-event-id": f"{session}:0"})
    behind_the_first = data.partition(b"\n\n")[2]
    assert behind_the_first + rest.content == whole.content


async def test_a_waiting_caller_is_answered_within_the_drain_time(gateways, producer):
    """A stopping gateway stays for the answer of who waits for a whole completion."""
    one, _ = gateways
    async with httpx.AsyncClient(base_url=one.url, timeout=30, trust_env=False) as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=BODY))
        while not producer.sessions:
            await asyncio.sleep(0.01)
        one.process.terminate()
        while True:  # it is on its way out: nobody can come in
            try:
                socket.create_connection(("127.0.0.1", one.port), 1).close()
            except ConnectionRefusedError:
                break
            await asyncio.sleep(0.01)
        producer.gate.set()
        message = (await asked).json()["choices"][0]["message"]
    assert message["reasoning_content"] + message["content"] == producer.text
    one.process.wait(DRAIN_SECONDS)


@pytest.mark.parametrize("drain", [2])
async def test_a_caller_who_waits_too_long_is_told_to_come_back(gateways, producer):
    """After the drain time it gets a 503 with `Retry-After`, and finds its session again."""
    one, two = gateways
    body = {**BODY, "session_id": "patience"}
    async with httpx.AsyncClient(timeout=20, trust_env=False) as client:
        asked = asyncio.create_task(client.post(f"{one.url}/v1/chat/completions", json=body))
        while not producer.sessions:
            await asyncio.sleep(0.01)
        one.process.terminate()
        answer = await asked
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert answer.headers["retry-after"] == "1"
        one.process.wait(20)
        producer.gate.set()
        again = await client.post(f"{two.url}/v1/chat/completions", json=body)
    message = again.json()["choices"][0]["message"]
    assert message["reasoning_content"] + message["content"] == producer.text
    assert producer.sessions == ["patience"]


async def test_a_client_that_does_not_read_holds_up_no_stop(gateways, producer):
    """A stream whose client takes nothing any more does not keep a stopping gateway."""
    one, _ = gateways
    producer.texts = ["x" * 100_000] * 200
    producer.gate.set()
    with socket.create_connection(("127.0.0.1", one.port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = b'{"stream": true, "messages": [{"role": "user", "content": "x"}]}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
        client.sendall(head % len(body) + body)
        while len(producer.sessions) < 1 or producer.worker._next[producer.sessions[0]] < 150:
            await asyncio.sleep(0.02)
        one.process.terminate()
        began = time.monotonic()
        await asyncio.to_thread(one.process.wait, 20)
        assert time.monotonic() - began < AT_ONCE
