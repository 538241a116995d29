"""An engine dies or hangs, Redis is emptied, media change, a session is poison: what is left."""

import asyncio
import functools
import http.server
import json
import os
import signal
import threading

import httpx
import psutil
import pytest

from shared import keys
from shared.protocol import GenerationRequest, Message, SamplingParams, TextPart
from shared.queue import SessionQueue, Submission
from shared.session_log import SessionLog
from shared.store import Store, connect
from tests.conftest import TEST_ENV
from tests.media_samples import encode, picture
from tests.oracle import text_part
from tests.stack import Stack, alive, wait_until

pytestmark = pytest.mark.timeout(400)
TOKENS = 300


@pytest.fixture(scope="module")
def stack(tmp_path_factory, demo_model):
    """A gateway and two workers whose parts these tests may break."""
    env = {**TEST_ENV, "STEP_TIMEOUT_SECONDS": "5"}
    with Stack(tmp_path_factory.mktemp("broken") / "data", workers=2, env=env) as running:
        yield running


@pytest.fixture
async def store(stack):
    store = Store(connect(stack.redis_url, retries=10))
    yield store
    await store.close()


@pytest.fixture
async def client(stack):
    async with httpx.AsyncClient(base_url=stack.url, timeout=120, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder behind a web server, and its URL."""
    folder = tmp_path_factory.mktemp("images")
    handler = functools.partial(_Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args):
        pass


def body(**more):
    return {
        "messages": [{"role": "user", "content": "Go on."}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 1.0,
        "seed": 5,
        "frequency_penalty": 0.4,
        **more,
    }


def engine_of(stack, worker):
    """Return the pid of a worker's engine process."""
    children = psutil.Process(stack.pid("workers", worker)).children(recursive=True)
    return next(child.pid for child in children if child.name() == "engine")


async def owner(stack, store, session_id):
    """Return the index of the worker that runs a session."""
    while not (lease := await store.redis.hget(keys.session(session_id), "lease")):
        await asyncio.sleep(0.02)
    name = lease.decode().split(":")[0]
    logs = sorted((stack.folder / "logs").glob("worker*.log"))
    return next(i for i, log in enumerate(logs) if f'"worker": "{name}"' in log.read_text())


async def grown(store, session_id, events=20):
    while int(await store.redis.hget(keys.session(session_id), "last") or 0) < events:
        await asyncio.sleep(0.01)


def message(answer):
    return [choice["message"] for choice in answer.json()["choices"]]


def counted(answer):
    """Return the usage but for what was reused, which depends on where it ran."""
    usage = answer.json()["usage"]
    return {name: value for name, value in usage.items() if name != "prompt_tokens_details"}


async def begin(client, store, session_id, **more):
    """Start a long session; returns the task that waits for its answer, once it has some tokens."""
    request = body(session_id=session_id, **more)
    task = asyncio.create_task(client.post("/v1/chat/completions", json=request))
    await grown(store, session_id)
    return task


@pytest.mark.parametrize("fault", ["killed", "frozen"])
async def test_an_engine_that_dies_or_hangs_costs_its_sessions_only_time(
    stack, store, client, fault
):
    """The worker gives them back at once, another goes on with the same text, the engine is new."""
    undisturbed = await client.post("/v1/chat/completions", json=body(n=2))
    wait_until(lambda: Stack.workers_seen(stack.url) == 2, "two workers are ready")
    task = await begin(client, store, fault, n=2)
    worker = await owner(stack, store, fault)
    pid, engine = stack.pid("workers", worker), engine_of(stack, worker)
    os.kill(engine, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    answer = await task
    assert message(answer) == message(undisturbed)
    assert counted(answer) == counted(undisturbed)
    state = (await client.get(f"/v1/sessions/{fault}")).json()
    assert (state["exact"], state["takeovers"]) == (True, 1)
    assert (stack.pid("workers", worker), alive(engine)) == (pid, False)
    wait_until(lambda: Stack.workers_seen(stack.url) == 2, "the engine is back", 100)


async def test_a_killed_worker_is_missed_whatever_its_lease_says(stack, store, client):
    """Its connection is closed with it: another goes on, though the lease stands for an hour."""
    undisturbed = await client.post("/v1/chat/completions", json=body())
    wait_until(lambda: Stack.workers_seen(stack.url) == 2, "two workers are ready", 100)
    task = await begin(client, store, "missed")
    worker = await owner(stack, store, "missed")
    pid = stack.kill("workers", worker, signal.SIGSTOP)  # it renews no more
    now, _micros = await store.redis.time()
    await store.redis.zadd(keys.LEASES, {"missed": (now + 3600) * 1000}, xx=True)
    os.kill(pid, signal.SIGKILL)
    answer = await task
    assert message(answer) == message(undisturbed)
    assert (await client.get("/v1/sessions/missed")).json()["takeovers"] == 1
    wait_until(lambda: Stack.workers_seen(stack.url) == 2, "the worker is back", 100)


async def test_running_sessions_survive_an_emptied_redis(store, client):
    """FLUSHALL under a stream: its client sees nothing of it, and the log is whole."""
    undisturbed = await client.post("/v1/chat/completions", json=body())
    task = await begin(client, store, "emptied", stream=True)
    await store.redis.flushall()
    await grown(store, "emptied", 60)
    await store.redis.flushall()
    chunks = [line[6:] for line in (await task).text.splitlines() if line.startswith("data: ")]
    assert chunks[-1] == "[DONE]"
    deltas = [c["choices"][0]["delta"] for c in map(json.loads, chunks[:-1]) if c["choices"]]
    [expected] = message(undisturbed)
    for name in ("reasoning_content", "content"):
        assert "".join(d.get(name) or "" for d in deltas) == (expected[name] or "")
    log = SessionLog(store)
    record, entries = await log.record("emptied"), await log.read_all("emptied")
    assert [e.index for e in entries] == list(range(record.last + 1))
    assert (record.status, record.takeovers) == ("finished", 0)


async def test_an_image_that_changed_ends_a_session_that_is_taken_over(
    stack, store, client, images
):
    """The same image is continued exactly; another one under the same URL is `media_changed`."""
    folder, url = images
    content = [text_part("Look."), {"type": "image_url", "image_url": {"url": f"{url}/a.png"}}]
    request = {"messages": [{"role": "user", "content": content}]}
    (folder / "a.png").write_bytes(encode(picture()))
    undisturbed = await client.post("/v1/chat/completions", json=body(**request))
    for name, changes in (("same", False), ("changed", True)):
        wait_until(lambda: Stack.workers_seen(stack.url) == 2, "two workers are ready", 100)
        task = await begin(client, store, name, **request)
        if changes:
            (folder / "a.png").write_bytes(encode(picture(width=80)))
        worker = await owner(stack, store, name)
        os.kill(engine_of(stack, worker), signal.SIGKILL)
        answer = await task
        if changes:
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "media_changed"
        else:
            assert message(answer) == message(undisturbed)


async def test_a_session_that_kills_its_workers_is_given_up(stack, store, client):
    """After `MAX_ATTEMPTS` workers that died with it, a real worker ends it with a clear error."""
    request = GenerationRequest((Message("user", (TextPart("x"),)),), SamplingParams(max_tokens=4))
    model = (await client.get("/v1/models")).json()["data"][0]["id"]
    queue = SessionQueue(store, kept_seconds=60, watch_ms=60_000)
    pids = [worker["pid"] for worker in stack.state["workers"]]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for name in ("poison", "unlucky"):
            await queue.submit(Submission(name, "", "d", model, "fp", False, request), 10)
        for _ in range(3):
            claims = {c.session_id: c for c in (await queue.claim("dead", 2)).sessions}
            assert len(claims) == 2
            await queue.attempt(claims["poison"])
            await queue.release(claims["unlucky"])
            now, _micros = await store.redis.time()
            await store.redis.delete(keys.CONTACT)  # frozen workers say nothing of Redis
            await store.redis.zadd(keys.LEASES, {"poison": now * 1000 - 1})
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    log = SessionLog(store)
    ended = {}
    for name in ("poison", "unlucky"):
        while not (ended.setdefault(name, record := await log.record(name)) and record.has_ended):
            await asyncio.sleep(0.05)
        ended[name] = record.status
    assert ended == {"poison": "failed", "unlucky": "finished"}
    state = (await client.get("/v1/sessions/poison")).json()
    assert state["error"]["message"] == "The generation failed 3 times."
