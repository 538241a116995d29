"""An engine that gets no more memory, or is killed for it: its sessions go on at another worker."""

import asyncio
import json
import os
from pathlib import Path

import httpx
import psutil
import pytest

from shared import keys
from shared.session_log import SessionLog
from shared.store import Store, connect
from tests.conftest import TEST_ENV
from tests.stack import Stack, alive, wait_until

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(not hasattr(psutil, "RLIMIT_DATA"), reason="no prlimit on this system"),
]
CGROUP = Path("/sys/fs/cgroup/memory")
TOKENS, CHOICES = 160, 4


@pytest.fixture(scope="module")
def stack(tmp_path_factory, demo_model):
    """A gateway and two workers, whose engines these tests leave without memory."""
    with Stack(tmp_path_factory.mktemp("memory") / "data", workers=2, env=TEST_ENV) as running:
        yield running


@pytest.fixture
def group():
    """A control group that may use 1 MB more than what is in it already."""
    folder = CGROUP / f"unbroken-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(2**20))
    except OSError:
        pytest.skip("this system lets us limit no memory of a group")
    yield folder
    wait_until(lambda: not (folder / "cgroup.procs").read_text(), "the group is empty")
    folder.rmdir()


def body(words, **more):
    prompt = "river " * words
    settings = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 1.0, "seed": 5}
    return {"messages": [{"role": "user", "content": prompt}], "n": CHOICES, **settings, **more}


def engines(stack):
    """Return the engine process of each worker, by the worker's id."""
    found = {}
    for index, log in enumerate(sorted((stack.folder / "logs").glob("worker*.log"))):
        worker = psutil.Process(stack.pid("workers", index))
        children = worker.children(recursive=True)
        engine = next(child for child in children if child.name() == "engine")
        line = next(line for line in log.read_text().splitlines() if '"worker": "' in line)
        found[json.loads(line)["worker"]] = engine
    return found


def spent(engine):
    """Return the bytes that RLIMIT_DATA counts."""
    lines = Path(f"/proc/{engine.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


# Words of a prompt whose answer needs more of the cache than any before, and than may lie about.
@pytest.mark.parametrize(("by", "words"), [("the kernel", 300), ("a limit", 640)])
async def test_an_engine_without_memory_costs_its_sessions_only_time(stack, request, by, words):
    """Another worker goes on with the same text, in one log, and both serve in the end."""
    group = request.getfixturevalue("group") if by == "the kernel" else None
    store = Store(connect(stack.redis_url, retries=10))
    async with httpx.AsyncClient(base_url=stack.url, timeout=300, trust_env=False) as client:
        wait_until(lambda: Stack.workers_seen(stack.url) == 2, "two workers are ready", 100)
        name = by.replace(" ", "-")
        asked = asyncio.ensure_future(
            client.post("/v1/chat/completions", json=body(words, session_id=name))
        )
        record = keys.session(name)
        while int(await store.redis.hget(record, "last") or 0) < 20:
            await asyncio.sleep(0.01)
        first = (await store.redis.hget(record, "lease")).decode().split(":")[0]
        engine = engines(stack)[first]
        if group:
            (group / "cgroup.procs").write_text(str(engine.pid))
        else:
            before = engine.rlimit(psutil.RLIMIT_DATA)
            engine.rlimit(psutil.RLIMIT_DATA, (spent(engine) + 2**20, before[1]))
        answer = await asked
        ended = (await store.redis.hget(record, "ended_by")).decode().split(":")[0]
        state = (await client.get(f"/v1/sessions/{name}")).json()
        assert answer.status_code == 200
        assert state["takeovers"] >= 1
        if group:
            assert not alive(engine.pid)
        else:
            assert (alive(engine.pid), ended == first) == (True, False)
            engine.rlimit(psutil.RLIMIT_DATA, before)
        log = SessionLog(store)
        entries = await log.read_all(name)
        assert [e.index for e in entries] == list(range((await log.record(name)).last + 1))
        wait_until(lambda: Stack.workers_seen(stack.url) == 2, "both workers serve", 100)
        undisturbed = await client.post("/v1/chat/completions", json=body(words))
        texts = [[c["message"] for c in a.json()["choices"]] for a in (answer, undisturbed)]
        assert texts[0] == texts[1]
        assert answer.json()["usage"]["completion_tokens"] == TOKENS * CHOICES
    await store.close()
