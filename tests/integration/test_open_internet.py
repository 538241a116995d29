"""What a client can hold up: headers, bodies and streams that are too large or too slow."""

import asyncio
import json
import time

import pytest

from tests.scripted import ScriptedWorker
from tests.served import serving

POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


async def raw(client, *parts, pause=0.0):
    """Send bytes as they are; returns status and body of what comes back before the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        answer = await reader.read()
    except ConnectionError:
        return None, None
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if head:
        assert b"x-request-id: req_" in head
    return (int(head.split()[1]), json.loads(body).get("error")) if head else (None, None)


async def test_large_headers_are_431(redis_url):
    """A long URL, many headers and a header without an end are refused alike."""
    async with serving(redis_url, max_header_bytes=2048) as client:
        end = b"host: x\r\n\r\n"
        for request in (
            [b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\n" + end],
            [b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 600 + end],
            [b"GET / HTTP/1.1\r\nx: ", *[b"a" * 500] * 8],
        ):
            status, error = await raw(client, *request)
            assert (status, error["code"]) == (431, "headers_too_large")
        fits = await client.get("/health", headers={"x": "a" * 1500})
        assert fits.status_code == 200
        for _ in range(3):  # the count begins anew with each request of a connection
            assert (await client.get("/health", headers={"x": "a" * 1500})).status_code == 200


async def test_what_is_no_http_is_400_in_our_shape(redis_url):
    """Garbage gets an error in the contract's shape."""
    async with serving(redis_url) as client:
        for garbage in (
            b"\x16\x03\x01\x02\x00\r\n\r\n",
            b"GET / FTP/9\r\n\r\n",
            b"BREW / HTTP/1.1\r\n\r\n",
        ):
            status, error = await raw(client, garbage)
            assert (status, error["code"]) == (400, "invalid_request")


async def test_slow_headers_are_408(redis_url):
    """A head that drips is given up; a connection on which nothing comes is closed."""
    async with serving(redis_url, header_timeout_seconds=0.3) as client:
        status, error = await raw(client, b"GET / HTTP/1.1\r\n", b"a: b\r\n")
        assert (status, error["code"]) == (408, "request_timeout")
        assert await raw(client) == (None, None)
        began = time.monotonic()
        with pytest.raises(json.JSONDecodeError):  # behind the first answer stands the second
            await raw(client, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET / HT")
        assert time.monotonic() - began < 4


async def test_slow_and_large_bodies(redis_url):
    """A body that drips is a 408, one over the limit a 413 before all of it has come."""
    async with serving(redis_url, body_timeout_seconds=0.3, max_body_bytes=4096) as client:
        status, error = await raw(
            client, POST + b"connection: close\r\ncontent-length: 100\r\n\r\n", b"{"
        )
        assert (status, error["code"]) == (408, "request_timeout")
        announced = POST + b"connection: close\r\ncontent-length: 99999999\r\n\r\n"
        status, error = await raw(client, announced)
        assert (status, error["code"]) == (413, "request_too_large")
        chunked = POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        status, error = await raw(client, chunked, b"1800\r\n" + b" " * 0x1800 + b"\r\n")
        assert (status, error["code"]) == (413, "request_too_large")


async def test_a_client_that_takes_nothing_is_disconnected(redis_url, store):
    """A stalled reader is cut off after a while; another reader of the session is not."""
    worker = ScriptedWorker(store)
    await worker.announce()
    async with serving(redis_url, stalled_client_seconds=0.5) as client:
        body = json.dumps(
            {"messages": [{"role": "user", "content": "x"}], "stream": True, "session_id": "s"}
        ).encode()
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", client.base_url.port, limit=1024
        )
        writer.write(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        await reader.readuntil(b"\r\n\r\n")
        reader._transport.pause_reading()
        while not (claimed := await worker.claim()):
            pass
        async with client.stream("GET", "/v1/sessions/s/events") as good:
            lines = good.aiter_lines()
            streams = client.services.relay
            count = 0
            while next(iter(streams._channels.values())).followers > 1:
                await worker.say(claimed[0], "y" * 60_000)
                count += 1
                seen = 0
                while not seen:
                    seen = (await anext(lines)).count("y" * 1000)
                assert count < 1000
            await worker.finish(claimed[0])
            rest = [line async for line in lines]
            assert "data: [DONE]" in rest
        writer.close()


async def test_a_client_that_leaves_while_it_sends_is_no_bug_of_ours(redis_url, caplog):
    """Its connection breaks in the middle of the body: that is counted as 499, and no error."""
    counted = 'http_request_method="POST",http_response_status_code="499"'
    async with serving(redis_url) as client:
        _reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(POST + b"content-length: 1000\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        while counted not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.01)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
