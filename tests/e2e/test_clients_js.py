"""Clients in JavaScript under the resuming fetch, through cuts, kills and restarts."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.client_kit import (
    DONE,
    PROGRAM_SECONDS,
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
from tests.stack import clean_environment

SOURCES = Path(__file__).with_name("js")
QUICK = {"backoffMs": 10, "maxBackoffMs": 50, "maxRetries": 30}

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(shutil.which("npm") is None, reason="node and npm are not installed"),
]


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


async def read(js, client, url, **job):
    """Run `read.mjs`; returns what it printed."""
    argument = json.dumps({"client": client, "url": url, "options": QUICK, **job})
    return json.loads(
        await output_of("node", "read.mjs", argument, cwd=js, env=clean_environment())
    )


def text_of(chunks):
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    return "".join(d.get("reasoning_content") or d.get("content") or "" for d in deltas)


async def replay(gateway, session):
    """Return a session's bytes after its first event, over a plain connection."""
    async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as client:
        header = {"last-event-id": f"{session}:0"}
        return (await client.post("/v1/chat/completions", headers=header)).text


@pytest.mark.timeout(330)
async def test_cut_streams_reach_openai_node_whole(js, gateway, producer):
    """Cut at random bytes, the SDK sees each chunk once, the bytes of an undisturbed replay."""
    async with CutProxy(gateway.port, budgets(11)) as proxy:
        results = await read(js, "openai", proxy.url, streams=4)
    assert proxy.cuts >= 25
    assert len(producer.sessions) == 4
    for chunks in results:
        again = await replay(gateway, chunks[0]["id"])
        lines = [line[6:] for line in again.split("\n") if line.startswith("data: {")]
        assert chunks[1:] == [json.loads(line) for line in lines]
        assert text_of(chunks) == producer.text


async def test_cut_streams_reach_a_page_byte_for_byte(js, gateway, producer):
    """A plain fetch with a Request object gets the very bytes of a replay."""
    async with CutProxy(gateway.port, budgets(12)) as proxy:
        results = await read(js, "fetch", proxy.url, streams=3)
    assert proxy.cuts >= 20
    assert len(producer.sessions) == 3
    for result in results:
        session = result["text"].split("\n")[0][4:].rpartition(":")[0]
        again = await replay(gateway, session)
        assert result["text"].partition("\n\n")[2].replace(": keep-alive\n", "") == again
        assert (result["status"], result["url"]) == (200, f"{proxy.url}/v1/chat/completions")


@pytest.mark.parametrize("client", ["ai", "langchain"])
async def test_cut_streams_reach_other_libraries_whole(js, gateway, producer, client):
    """The Vercel AI SDK and LangChain.js get whole texts from one generation each."""
    async with CutProxy(gateway.port, budgets(13)) as proxy:
        results = await read(js, client, proxy.url, streams=3)
    assert proxy.cuts >= 20
    assert len(producer.sessions) == 3
    for result in results:
        assert result["content"] == "".join(producer.texts[3:])
        assert result.get("reasoning") in (None, "".join(producer.texts[:3]))


class Program:
    """`read.mjs` under way."""

    @classmethod
    async def start(cls, js, client, url, **job):
        """Start it, and wait until it says that it has read something."""
        self = cls()
        argument = json.dumps({"client": client, "url": url, "options": QUICK, **job})
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(
            *["node", "read.mjs", argument],
            cwd=js, env=clean_environment(), stdin=pipe, stdout=pipe, stderr=pipe,
        )  # fmt: skip
        assert await self.process.stderr.readline() == b"reached\n"
        return self

    async def result(self, word: bytes = b"") -> dict:
        """Write a word to it and wait for what it prints."""
        try:
            out, _ = await asyncio.wait_for(self.process.communicate(word), PROGRAM_SECONDS)
        finally:
            if self.process.returncode is None:
                self.process.kill()
        return json.loads(out)


async def test_a_gateway_killed_and_started_again_is_not_noticed(js, mortal, producer):
    """SIGKILL in the middle of a stream, a start on the same port, and the SDK sees no seam."""
    producer.gate.clear()
    options = {**QUICK, "maxRetries": 200}
    program = await Program.start(js, "openai", mortal.url, tellAfter=8, options=options)
    await asyncio.to_thread(mortal.kill)
    await asyncio.to_thread(mortal.start)
    producer.gate.set()
    [chunks] = await program.result()
    assert text_of(chunks) == producer.text
    assert len(producer.sessions) == 1


async def test_a_fallback_takes_over_from_a_killed_gateway(
    js, mortal, producer, redis_url, tmp_path
):
    """With another gateway named, a killed one need not come back."""
    other = await asyncio.to_thread(GatewayProcess, redis_url, tmp_path)
    try:
        producer.gate.clear()
        options = {**QUICK, "fallbacks": [other.url]}
        program = await Program.start(js, "openai", mortal.url, tellAfter=8, options=options)
        await asyncio.to_thread(mortal.kill)
        producer.gate.set()
        [chunks] = await program.result()
    finally:
        other.kill()
    assert text_of(chunks) == producer.text


async def test_it_gives_up_with_the_first_error(js, mortal, producer):
    """When no attempt succeeds, the error that broke the stream is thrown after so many tries."""
    producer.gate.clear()
    async with CutProxy(mortal.port) as proxy:
        options = {**QUICK, "maxRetries": 3}
        program = await Program.start(js, "openai", proxy.url, tellAfter=8, options=options)
        before = proxy.connections
        await asyncio.to_thread(mortal.kill)
        result = await program.result()
    assert result == {"error": "TypeError", "message": "terminated"}
    assert proxy.connections - before == 3


@pytest.mark.parametrize(("leave", "ended"), [("abort", "AbortError"), ("cancel", "")])
async def test_leaving_stops_the_retries(js, mortal, producer, leave, ended):
    """Whoever aborts, or cancels the body, during an outage is rid of the stream at once."""
    producer.gate.clear()
    async with CutProxy(mortal.port) as proxy:
        options = {**QUICK, "maxRetries": 100_000}
        program = await Program.start(js, "leave", proxy.url, leave=leave, options=options)
        await asyncio.to_thread(mortal.kill)
        while proxy.connections < 4:
            await asyncio.sleep(0.01)
        assert await program.result(b"leave\n") == [{"ended": ended}]
        assert program.process.returncode == 0


def contents(result):
    return [c["choices"][0]["delta"]["content"] for c in result[0]]


async def test_a_clean_close_without_done_is_a_break(js):
    """A proxy that ends a stream politely is not believed; what has no id is not shown twice."""
    first = STREAM + chunk(0, "a") + b": keep-alive\n" + chunk(9, "u", event_id=False)
    second = STREAM + chunk(1, "b") + chunk(9, "u", event_id=False) + DONE
    async with Script(first, second) as server:
        assert contents(await read(js, "openai", server.url)) == ["a", "b", "u"]
    (one, body), (two, empty) = server.requests
    assert "last-event-id" not in one
    assert json.loads(body)["stream"] is True
    assert (two["last-event-id"], empty) == ("s:0", b"")
    assert two["authorization"] == one["authorization"]


async def test_before_the_first_id_the_same_request_is_sent_again(js):
    """Without an id to resume from, the body goes out again under the same Idempotency-Key."""
    async with Script(b"", STREAM + b"id: s:0\nda", STREAM + chunk(0, "a") + DONE) as server:
        assert contents(await read(js, "openai", server.url)) == ["a"]
    [key] = {headers["idempotency-key"] for headers, _ in server.requests}
    assert len(key) == 32
    assert len({body for _, body in server.requests}) == 1
    assert len(server.requests) == 3


async def test_retry_after_is_obeyed_on_a_resume(js):
    """A gateway that asks for a second of patience gets it."""
    busy = status("503 Unavailable", "retry-after: 1")
    async with Script(STREAM + chunk(0, "a"), busy, STREAM + DONE) as server:
        assert contents(await read(js, "openai", server.url)) == ["a"]
    assert server.times[2] - server.times[1] >= 1


async def test_a_resume_that_stands_is_no_failed_attempt(js):
    """Who waits for an event over connections that stand goes on, however often they break."""
    answers = STREAM + chunk(0, "a"), Held(STREAM), STREAM + chunk(1, "b") + DONE
    async with Script(*answers) as server:
        options = {**QUICK, "maxRetries": 1}
        assert contents(await read(js, "openai", server.url, options=options)) == ["a", "b"]


async def test_resumes_that_break_at_once_are_failed_attempts(js):
    """A server that accepts each resume and brings nothing is given up."""
    async with Script(STREAM + chunk(0, "a"), STREAM, STREAM, STREAM + DONE) as server:
        options = {**QUICK, "maxRetries": 2}
        result = await read(js, "openai", server.url, options=options)
    assert result == {"error": "TypeError", "message": "The stream ended before [DONE]."}
    assert len(server.requests) == 3


async def test_a_session_that_is_missing_may_come_back(js):
    """A server that has lost the session for a moment is asked again."""
    lost = status("404 Not Found")
    async with Script(STREAM + chunk(0, "a"), lost, STREAM + chunk(1, "b") + DONE) as server:
        assert contents(await read(js, "openai", server.url)) == ["a", "b"]


async def test_a_refused_resume_is_final(js):
    """When the session is gone, the error of the break is thrown at once."""
    async with Script(STREAM + chunk(0, "a"), status("410 Gone"), STREAM + DONE) as server:
        result = await read(js, "openai", server.url)
    assert result == {"error": "TypeError", "message": "The stream ended before [DONE]."}
    assert len(server.requests) == 2


async def test_the_sdks_own_retry_attaches_to_the_first_request(js):
    """A retry that the SDK makes bears the key of the attempt that a proxy answered with 504."""
    async with Script(status("504 Gateway Timeout"), STREAM + chunk(0, "a") + DONE) as server:
        assert contents(await read(js, "openai", server.url, maxRetries=1)) == ["a"]
    assert len({headers["idempotency-key"] for headers, _ in server.requests}) == 1


@pytest.mark.parametrize("client", ["openai", "ai", "langchain"])
async def test_keep_alives_disturb_nobody(js, redis_url, tmp_path, client):
    """A comment between any two events changes nothing for clients as they come."""
    gateway = await asyncio.to_thread(
        GatewayProcess, redis_url, tmp_path, {"KEEPALIVE_SECONDS": "0.05"}
    )
    try:
        async with Producer(redis_url, 8, 0.15) as producer, CutProxy(gateway.port) as proxy:
            plain, resuming = await asyncio.gather(
                read(js, client, proxy.url, resume=False), read(js, client, proxy.url)
            )
        for [result] in (plain, resuming):
            content = result["content"] if isinstance(result, dict) else text_of(result)
            expected = producer.text if client == "openai" else "".join(producer.texts[3:])
            assert content == expected
        assert proxy.seen.count(b": keep-alive\n") >= 10
    finally:
        gateway.kill()


@pytest.mark.parametrize("title", examples("js"))
async def test_the_documented_examples_run(js, gateway, producer, title):
    """Each example of the README prints the whole answer over a connection that is cut."""
    code = examples("js")[title]
    assert "http://127.0.0.1:3000" in code
    program = js / f"example-{hashlib.sha256(code.encode()).hexdigest()[:8]}.mjs"
    async with CutProxy(gateway.port, budgets(14, 3000)) as proxy:
        program.write_text(code.replace("http://127.0.0.1:3000", proxy.url))
        got = await output_of("node", program, cwd=js, env=clean_environment())
    if "console.log" in code:  # a line for each piece
        expected = "\n".join(["", "", "", "", *producer.texts[3:], "", ""])
    else:
        expected = "".join(producer.texts[3:])
    assert got == expected
    assert proxy.cuts >= 1


def test_the_types_describe_the_module(js):
    """A strict TypeScript program that uses the module compiles, and a wrong option does not."""
    program = """
        import { resumingFetch } from "./unbroken-fetch.js";
        const plain: typeof fetch = resumingFetch();
        const tuned = resumingFetch(plain, { maxRetries: 3, fallbacks: ["https://other"] });
        // @ts-expect-error there is no such option
        resumingFetch(tuned, { retries: 3 });
    """
    (js / "types.ts").write_text(program)
    argv = ["node_modules/.bin/tsc", "--noEmit", "--strict", "--target", "es2022"]
    argv += ["--module", "nodenext", "--lib", "es2022,dom", "types.ts"]
    done = subprocess.run(argv, cwd=js, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_lock_names_no_registry():
    """The lock pins versions and hashes, and leaves the place to fetch them from to the user."""
    packages = json.loads((SOURCES / "package-lock.json").read_text())["packages"]
    assert not [name for name, package in packages.items() if "resolved" in package]
    assert all("integrity" in package for name, package in packages.items() if name)
