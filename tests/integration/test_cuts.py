"""However often a client is cut off, wherever it comes back: the stream is whole."""

import asyncio
import itertools
import json
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.store import Store, connect
from tests.gateway_process import GatewayProcess
from tests.scripted import ScriptedWorker

pytestmark = pytest.mark.timeout(120)
numbers = itertools.count()
RUNS = 200


@pytest.fixture(scope="module")
def gateways(redis_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gateways")
    running = [GatewayProcess(redis_server, folder) for _ in range(2)]
    yield running
    for gateway in running:
        gateway.stop()


async def post(gateway, headers, body=b""):
    """Send a POST; returns the connection after the response's headers."""
    host = urlsplit(gateway.url)
    reader, writer = await asyncio.open_connection(host.hostname, host.port)
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host.netloc}"]
    lines += [f"Content-Length: {len(body)}", *headers, "", ""]
    writer.write("\r\n".join(lines).encode() + body)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    return reader, writer


async def read_chunks(reader, limit):
    """Undo the chunked encoding until the end, or until `limit` bytes of the body have come."""
    body = b""
    while len(body) < limit:
        size = int(await reader.readuntil(b"\r\n"), 16)
        if size == 0:
            return body, True
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    return body[:limit], False


def whole_events(data):
    """Return the complete events of a cut stream."""
    events = data.split(b"\n\n")
    return [event.lstrip(b"\n") + b"\n\n" for event in events[:-1]]


def last_id(events):
    ids = [line[4:] for e in events for line in e.split(b"\n") if line.startswith(b"id: ")]
    return ids[-1].decode() if ids else None


async def produce(worker, texts, pauses):
    while not (claims := await worker.claim()):
        await worker.queue.wait_for_work(1)
    for text, pause in zip(texts, itertools.cycle(pauses), strict=False):
        await asyncio.sleep(pause)
        await worker.say(claims[0], text)
    await worker.finish(claims[0])


async def follow_with_cuts(gateways, session_id, cuts):
    """Read the session to its end, cut after so many bytes each time; return the events."""
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    request = json.dumps({**body, "session_id": session_id}).encode()
    events = []
    for which, limit in itertools.chain(cuts, itertools.repeat((0, 10**9))):
        cursor = last_id(events)
        headers = [f"Last-Event-ID: {cursor}"] if cursor else []
        reader, writer = await post(gateways[which], headers, b"" if cursor else request)
        data, ended = await read_chunks(reader, limit)
        writer.transport.abort()
        events += whole_events(data)
        if ended:
            return events
    raise AssertionError


async def one_run(redis_url, gateways, texts, pauses, cuts):
    store = Store(connect(redis_url))
    try:
        worker = ScriptedWorker(store)
        await worker.announce()
        session_id = f"cut-{next(numbers)}"
        producer = asyncio.create_task(produce(worker, texts, pauses))
        got = await follow_with_cuts(gateways, session_id, cuts)
        await producer
        whole = await follow_with_cuts(gateways, session_id, [(1, 10**9)])
        return session_id, got, whole
    finally:
        await store.close()


CUTS = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 1500)), max_size=8)
TEXTS = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=12)
PAUSES = st.lists(st.sampled_from([0, 0, 0.001, 0.004]), min_size=1, max_size=4)


@settings(
    max_examples=RUNS,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(texts=TEXTS, pauses=PAUSES, cuts=CUTS)
def test_a_stream_cut_anywhere_is_whole(redis_url, gateways, texts, pauses, cuts):
    """Cut at random bytes and resumed on random gateways, the events are those of a whole one."""
    sid, got, whole = asyncio.run(one_run(redis_url, gateways, texts, pauses, cuts))
    assert got == whole
    ids = [e.split(b"\n")[0] for e in got if e.startswith(b"id: ")]
    assert ids == [b"id: %s:%d" % (sid.encode(), n) for n in range(len(texts) + 2)]
    assert [e for e in got if b"[DONE]" in e] == [b"data: [DONE]\n\n"] == got[-1:]
    assert sum(b'"finish_reason":"stop"' in e for e in got) == 1
    deltas = [json.loads(e.split(b"data: ", 1)[1]) for e in got[1:-2]]
    assert [d["choices"][0]["delta"]["content"] for d in deltas] == texts
