"""What all tests share: a real Redis, the demo model, and whole stacks."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path

import pytest
import redis

import run
from shared.store import Store, connect
from tests.stack import ROOT, Stack, keys_without_ttl, wait_until

MAY_LIVE_FOR_EVER: dict[str, str] = {}
"""Key names that need no TTL, with the reason."""

TEST_ENV = {
    "TORCH_DTYPE": "float64",  # equal tokens whatever the batch: no near ties
    "MEDIA_ALLOWED_HOSTS": "*,127.0.0.1,localhost",  # the tests' media server is on loopback
}


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of our own for the whole run, with a password; its URL."""
    folder = tmp_path_factory.mktemp("redis")
    port, password = run.free_port(), secrets.token_hex(16)
    conf = run.REDIS_CONF.format(port=port, password=password)
    (folder / "redis.conf").write_text(conf + "appendonly no\n")
    with (folder / "redis.log").open("wb") as log:
        argv = [run.find_redis(sys.executable), "redis.conf"]
        server = subprocess.Popen(argv, cwd=folder, stdout=log, stderr=log)
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    try:
        wait_until(lambda: _answers(url), "Redis answers")
        yield url
    finally:
        server.terminate()
        server.wait(10)


def _answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.exceptions.ConnectionError:
        return False


@pytest.fixture
def redis_url(redis_server: str) -> Iterator[str]:
    """The URL of an empty Redis. After the test, each key that is left must have a TTL."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    yield redis_server
    forever = set(keys_without_ttl(redis_server)) - MAY_LIVE_FOR_EVER.keys()
    assert not forever, f"keys without a TTL: {sorted(forever)}"


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[Store]:
    """A client of that Redis with the project's scripts."""
    store = Store(connect(redis_url))
    yield store
    await store.close()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the demo model with random weights; built if it is not there."""
    from worker.demo_model import ensure_demo_model

    return ensure_demo_model(ROOT / run.FAST_MODEL)


@pytest.fixture(scope="session")
def truthful_model() -> Path:
    """The folder of the trained demo model, which takes minutes; `run.py test` builds it before."""
    from worker.demo_model import ensure_demo_model

    return ensure_demo_model(ROOT / run.DEMO_MODEL, "trained")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[Stack]:
    """One gateway and one worker with the demo model in float64; shared, so do not kill parts."""
    with Stack(tmp_path_factory.mktemp("stack") / "data", env=TEST_ENV) as running:
        yield running
        assert keys_without_ttl(running.redis_url) == []


@pytest.fixture(scope="session")
def stack2(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[Stack]:
    """Two gateways and two workers with the demo model in float64; shared, as `stack` is."""
    folder = tmp_path_factory.mktemp("stack2") / "data"
    with Stack(folder, gateways=2, workers=2, env=TEST_ENV) as running:
        yield running
        assert keys_without_ttl(running.redis_url) == []


@pytest.fixture
def make_stack(tmp_path: Path, demo_model: Path) -> Iterator[Callable[..., Stack]]:
    """Start a stack for one test alone: `make_stack(gateways=2, env={…})`; stopped at its end."""
    made: list[Stack] = []

    def make(*, env: dict[str, str] | None = None, **options: int | str) -> Stack:
        folder = tmp_path / f"data{len(made)}"
        made.append(Stack(folder, env={**TEST_ENV, **(env or {})}, **options))
        return made[-1]

    yield make
    for running in made:
        running.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of the stacks that a failed test used."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Stack):
                report.sections.append((f"logs of {name}", value.logs()))
    return report
