"""The OpenAI SDKs for Python under the resuming transport, through cuts, kills and restarts."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys

import httpx
import httpx2
import openai
import pytest

from clients.python.unbroken_transport import AsyncResumingTransport, ResumingTransport
from tests.client_kit import (
    DONE,
    STREAM,
    CutProxy,
    Held,
    Producer,
    Script,
    budgets,
    chunk,
    examples,
    output_of,
    status,
)
from tests.gateway_process import GatewayProcess
from tests.stack import ROOT, clean_environment

ASK = {
    "model": "any",
    "messages": [{"role": "user", "content": "Tell me."}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
QUICK = {"backoff": 0.01, "max_backoff": 0.05, "max_retries": 30}
OPENAI_2 = ["openai==2.54.0"]
LANGCHAIN = ["langchain-openai==1.6.7", "langchain-core==1.7.2", "openai==3.54.0"]

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def gateway(redis_server, tmp_path_factory):
    """A gateway that the tests of this file share."""
    process = GatewayProcess(redis_server, tmp_path_factory.mktemp("gateway"))
    yield process
    process.kill()


@pytest.fixture
def mortal(redis_url, tmp_path):
    """A gateway for a test that kills it."""
    process = GatewayProcess(redis_url, tmp_path)
    yield process
    process.kill()


@pytest.fixture
async def producer(redis_url):
    async with Producer(redis_url) as producer:
        yield producer


@pytest.fixture(scope="session")
def packages():
    """Install requirements into a folder of their own, kept between runs; returns the folder."""

    def install(requirements):
        name = hashlib.sha256(f"{sys.version}{requirements}".encode()).hexdigest()[:12]
        folder = ROOT / ".cache" / "clients" / f"python-{name}"
        if not (folder / "complete").exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target"]
            subprocess.run([*pip, str(folder), *requirements], check=True, timeout=300)
            (folder / "complete").touch()
        return folder

    return install


def sdk(url, library=httpx2, key="none", **options):
    """Return a synchronous client of the SDK over our transport."""
    transport = ResumingTransport(**{**QUICK, **options})
    http = library.Client(transport=transport, timeout=20)
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http)


def read(client, **more):
    """Return all chunks of a stream as the SDK hands them out, and the key that was sent."""
    with client.chat.completions.create(**{**ASK, **more}) as stream:
        chunks = [chunk.model_dump() for chunk in stream]
        return chunks, stream.response.request.headers["idempotency-key"]


def undisturbed(gateway, key):
    """Return the same session's chunks over a plain connection."""
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        again = client.chat.completions.create(**ASK, extra_headers={"idempotency-key": key})
        return [chunk.model_dump() for chunk in again]


def text_of(chunks):
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    return "".join(d.get("reasoning_content") or d.get("content") or "" for d in deltas)


@pytest.mark.parametrize("library", [httpx2, httpx], ids=["httpx2", "httpx"])
async def test_cut_streams_reach_the_sdk_whole(gateway, producer, library):
    """Cut at random bytes, headers included, the SDK sees each chunk once, from one generation."""
    async with CutProxy(gateway.port, budgets(1)) as proxy:
        with sdk(proxy.url, library) as client:
            reads = [asyncio.to_thread(read, client) for _ in range(4)]
            results = await asyncio.gather(*reads)
    assert proxy.cuts >= 25
    assert len(producer.sessions) == 4
    for chunks, key in results:
        assert text_of(chunks) == producer.text
        assert chunks == await asyncio.to_thread(undisturbed, gateway, key)
        assert chunks[-1]["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize("library", [httpx2, httpx], ids=["httpx2", "httpx"])
async def test_cut_streams_reach_the_async_sdk_whole(gateway, producer, library):
    """The asynchronous SDK, with either library, sees the same as the synchronous one."""
    async with CutProxy(gateway.port, budgets(2)) as proxy:
        http = library.AsyncClient(transport=AsyncResumingTransport(**QUICK), timeout=20)
        url = f"{proxy.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http) as client:

            async def read_one():
                async with await client.chat.completions.create(**ASK) as stream:
                    chunks = [chunk.model_dump() async for chunk in stream]
                return chunks, stream.response.request.headers["idempotency-key"]

            results = await asyncio.gather(*(read_one() for _ in range(4)))
    assert proxy.cuts >= 25
    assert len(producer.sessions) == 4
    for chunks, key in results:
        assert chunks == await asyncio.to_thread(undisturbed, gateway, key)
        assert text_of(chunks) == producer.text


OPENAI_2_PROGRAM = """
import httpx, json, openai, sys
from clients.python.unbroken_transport import ResumingTransport
http = httpx.Client(transport=ResumingTransport(backoff=0.01, max_backoff=0.05, max_retries=30))
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", http_client=http)
texts = []
for _ in range(4):
    stream = client.chat.completions.create(**json.loads(sys.argv[2]))
    deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    texts.append("".join(getattr(d, "reasoning_content", "") or d.content or "" for d in deltas))
print(json.dumps([openai.__version__, texts]))
"""


@pytest.mark.timeout(330)
async def test_openai_2_sees_cut_streams_whole(gateway, producer, packages):
    """The SDK of the generation before, which stands on httpx, gets whole texts too."""
    env = python_env(packages(OPENAI_2))
    async with CutProxy(gateway.port, budgets(3)) as proxy:
        argv = [sys.executable, "-c", OPENAI_2_PROGRAM, proxy.url, json.dumps(ASK)]
        version, texts = json.loads(await output_of(*argv, cwd=ROOT, env=env))
    assert version.startswith("2.")
    assert texts == [producer.text] * 4
    assert proxy.cuts >= 15
    assert len(producer.sessions) == 4


def python_env(*folders):
    path = os.pathsep.join([*map(str, folders), str(ROOT)])
    return {**clean_environment(), "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}


async def reach(client, count):
    """Open a stream in a thread; returns its first chunks and a task that reads the rest."""
    stream = await asyncio.to_thread(client.chat.completions.create, **ASK)
    first = [await asyncio.to_thread(next, stream) for _ in range(count)]
    return stream, first, asyncio.create_task(asyncio.to_thread(list, stream))


async def test_a_gateway_killed_and_started_again_is_not_noticed(mortal, producer):
    """SIGKILL in the middle of a stream, a start on the same port, and the SDK sees no seam."""
    producer.gate.clear()
    with sdk(mortal.url, max_retries=200) as client:
        _stream, first, rest = await reach(client, 8)
        await asyncio.to_thread(mortal.kill)
        await asyncio.to_thread(mortal.start)
        producer.gate.set()
        chunks = [c.model_dump() for c in [*first, *await rest]]
    assert text_of(chunks) == producer.text
    assert len(producer.sessions) == 1


async def test_a_fallback_takes_over_from_a_killed_gateway(mortal, producer, redis_url, tmp_path):
    """With another gateway named, a killed one need not come back."""
    other = await asyncio.to_thread(GatewayProcess, redis_url, tmp_path)
    try:
        producer.gate.clear()
        with sdk(mortal.url, fallbacks=(other.url,)) as client:
            _stream, first, rest = await reach(client, 8)
            await asyncio.to_thread(mortal.kill)
            producer.gate.set()
            chunks = [c.model_dump() for c in [*first, *await rest]]
    finally:
        other.kill()
    assert text_of(chunks) == producer.text


async def test_it_gives_up_with_the_first_error(mortal, producer):
    """When no attempt succeeds, the error that broke the stream is raised after so many tries."""
    producer.gate.clear()
    async with CutProxy(mortal.port) as proxy:
        with sdk(proxy.url, max_retries=3) as client:
            _stream, first, rest = await reach(client, 8)
            before = proxy.connections
            await asyncio.to_thread(mortal.kill)
            with pytest.raises(openai.APIConnectionError) as raised:
                await rest
        assert len(first) == 8
        assert type(raised.value.__cause__) in (httpx2.ReadError, httpx2.RemoteProtocolError)
        assert proxy.connections - before == 3


async def test_closing_the_stream_stops_the_retries(mortal, producer):
    """A stream that its owner closes during an outage is not tried again."""
    producer.gate.clear()
    async with CutProxy(mortal.port) as proxy:
        with sdk(proxy.url, max_retries=1000, backoff=0.02) as client:
            stream, _first, rest = await reach(client, 8)
            await asyncio.to_thread(mortal.kill)
            while proxy.connections < 4:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(stream.close)
            with pytest.raises(openai.APIConnectionError):
                await asyncio.wait_for(rest, 10)  # all its attempts would take longer


def contents(client):
    return [c.choices[0].delta.content for c in client.chat.completions.create(**ASK)]


async def test_a_clean_close_without_done_is_a_break(redis_url):
    """A proxy that ends a stream politely is not believed; what has no id is not shown twice."""
    first = STREAM + chunk(0, "a") + b": keep-alive\n" + chunk(9, "u", event_id=False)
    second = STREAM + chunk(1, "b") + chunk(9, "u", event_id=False) + DONE
    async with Script(first, second) as server:
        with sdk(server.url) as client:
            assert await asyncio.to_thread(contents, client) == ["a", "b", "u"]
    (one, body), (two, empty) = server.requests
    assert "last-event-id" not in one
    assert json.loads(body)["stream"] is True
    assert (two["last-event-id"], empty) == ("s:0", b"")
    assert two["authorization"] == one["authorization"]


async def test_before_the_first_id_the_same_request_is_sent_again(redis_url):
    """Without an id to resume from, the body goes out again under the same Idempotency-Key."""
    async with Script(b"", STREAM + b"id: s:0\nda", STREAM + chunk(0, "a") + DONE) as server:
        with sdk(server.url) as client:
            assert await asyncio.to_thread(contents, client) == ["a"]
    [key] = {headers["idempotency-key"] for headers, _ in server.requests}
    assert len(key) == 36
    assert len({body for _, body in server.requests}) == 1
    assert len(server.requests) == 3


async def test_retry_after_is_obeyed_on_a_resume(redis_url):
    """A gateway that asks for a second of patience gets it."""
    busy = status("503 Unavailable", "retry-after: 1")
    async with Script(STREAM + chunk(0, "a"), busy, STREAM + DONE) as server:
        with sdk(server.url) as client:
            assert await asyncio.to_thread(contents, client) == ["a"]
    assert server.times[2] - server.times[1] >= 1


async def test_a_resume_that_stands_is_no_failed_attempt(redis_url):
    """Who waits for an event over connections that stand goes on, however often they break."""
    answers = STREAM + chunk(0, "a"), Held(STREAM), STREAM + chunk(1, "b") + DONE
    async with Script(*answers) as server:
        with sdk(server.url, max_retries=1) as client:
            assert await asyncio.to_thread(contents, client) == ["a", "b"]


async def test_resumes_that_break_at_once_are_failed_attempts(redis_url):
    """A server that accepts each resume and brings nothing is given up."""
    async with Script(STREAM + chunk(0, "a"), STREAM, STREAM, STREAM + DONE) as server:
        with sdk(server.url, max_retries=2) as client, pytest.raises(openai.APIConnectionError):
            await asyncio.to_thread(contents, client)
    assert len(server.requests) == 3


async def test_a_session_that_is_missing_may_come_back(redis_url):
    """A server that has lost the session for a moment is asked again."""
    lost = status("404 Not Found")
    async with Script(STREAM + chunk(0, "a"), lost, STREAM + chunk(1, "b") + DONE) as server:
        with sdk(server.url) as client:
            assert await asyncio.to_thread(contents, client) == ["a", "b"]


async def test_a_refused_resume_is_final(redis_url):
    """When the session is gone, the error of the break is raised at once."""
    async with Script(STREAM + chunk(0, "a"), status("410 Gone"), STREAM + DONE) as server:
        with sdk(server.url) as client, pytest.raises(openai.APIConnectionError) as raised:
            await asyncio.to_thread(contents, client)
    assert isinstance(raised.value.__cause__, httpx2.RemoteProtocolError)
    assert len(server.requests) == 2


async def test_a_request_that_is_never_answered_ends_with_the_first_error(redis_url):
    """A lost connection and then refused ones: the loss is what the caller hears of."""
    async with Script(b"") as server:
        client = sdk(server.url, max_retries=2).with_options(max_retries=0)
        with client, pytest.raises(openai.APIConnectionError) as raised:
            await asyncio.to_thread(contents, client)
    assert isinstance(raised.value.__cause__, httpx2.RemoteProtocolError)


async def test_the_sdks_own_retries_attach_to_their_first_requests(redis_url):
    """Of two equal requests that a proxy answers with 504, each retry bears a key of its own."""
    busy, answer = status("504 Gateway Timeout"), STREAM + chunk(0, "a") + DONE
    async with Script(busy, busy, answer, answer, answer) as server:
        with sdk(server.url) as client:
            reads = [asyncio.to_thread(contents, client) for _ in range(2)]
            assert await asyncio.gather(*reads) == [["a"], ["a"]]
            await asyncio.to_thread(contents, client)
    keys = [headers["idempotency-key"] for headers, _ in server.requests]
    assert sorted(keys[:2]) == sorted(keys[2:4])
    assert len(set(keys)) == 3  # a later request, equal as it is, is a new one


KEEP_ALIVE_PROGRAM = """
import sys
from langchain_openai import ChatOpenAI
llm = ChatOpenAI(model="any", base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
sys.stdout.write("".join(part.content for part in llm.stream("Tell me.")))
"""


@pytest.fixture
def slow_gateway(redis_url, tmp_path):
    """A gateway that sends a keep-alive twenty times a second."""
    process = GatewayProcess(redis_url, tmp_path, {"KEEPALIVE_SECONDS": "0.05"})
    yield process
    process.kill()


@pytest.fixture
async def slow_producer(redis_url):
    async with Producer(redis_url, count=8, pause=0.25) as producer:
        yield producer


def plain(url):
    """Read with the SDK as it comes."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return text_of([c.model_dump() for c in client.chat.completions.create(**ASK)])


def resuming(url):
    """Read with the SDK over our transport."""
    with sdk(url) as client:
        return text_of(read(client)[0])


@pytest.mark.parametrize("reader", [plain, resuming])
async def test_keep_alives_do_not_disturb_the_sdk(slow_gateway, slow_producer, reader):
    """A comment between any two events changes nothing for the SDK, whatever transport it has."""
    async with CutProxy(slow_gateway.port) as proxy:
        assert await asyncio.to_thread(reader, proxy.url) == slow_producer.text
    assert proxy.seen.count(b": keep-alive\n") >= 10


@pytest.mark.timeout(330)
async def test_keep_alives_do_not_disturb_langchain(slow_gateway, slow_producer, packages):
    """LangChain's text is whole among keep-alives."""
    env = python_env(packages(LANGCHAIN))
    async with CutProxy(slow_gateway.port) as proxy:
        argv = [sys.executable, "-c", KEEP_ALIVE_PROGRAM, proxy.url]
        got = await output_of(*argv, cwd=ROOT, env=env)
    assert got == "".join(slow_producer.texts[3:])  # it leaves the reasoning out
    assert proxy.seen.count(b": keep-alive\n") >= 10


@pytest.mark.timeout(330)
@pytest.mark.parametrize("title", examples("python"))
async def test_the_documented_examples_run(gateway, producer, packages, title):
    """Each example of the README prints the whole answer over a connection that is cut."""
    code = examples("python")[title]
    assert "http://127.0.0.1:3000" in code
    extra = [packages(LANGCHAIN)] if "langchain" in code else []
    env = python_env(*extra, ROOT / "clients" / "python")
    async with CutProxy(gateway.port, budgets(4, 3000)) as proxy:
        argv = [sys.executable, "-c", code.replace("http://127.0.0.1:3000", proxy.url)]
        got = await output_of(*argv, cwd=ROOT, env=env)
    assert got == "".join(producer.texts[3:])  # without the reasoning
    assert proxy.cuts >= 1
