"""One stack under Docker for all tests of this folder; they run by `tests/compose/run` alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

import run
from tests.compose.kit import Compose, Load

if not os.environ.get("COMPOSE_STAGE"):
    collect_ignore_glob = ["*"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test time for containers to start."""
    for item in items:
        item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip is told to look into, if it holds a torch; else an empty one."""
    pip = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    found = subprocess.run(pip, capture_output=True, text=True).stdout.strip()
    if found and any(Path(found).glob("torch-*")):
        return Path(found)
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="session")
def built(wheels: Path) -> Iterator[Compose]:
    """The project with its images built; whatever is left of it is removed at the end."""
    compose = Compose(int(os.environ.get("COMPOSE_PORT") or run.free_port()), wheels)
    keep = bool(os.environ.get("COMPOSE_KEEP"))  # for whoever works on these tests
    if not keep:
        compose("down", "--volumes", "--remove-orphans", "--timeout=5")
    began = time.monotonic()
    compose("build", seconds=900)
    print(f"\nimages built in {time.monotonic() - began:.0f} s")
    yield compose
    if not keep:
        compose("down", "--volumes", "--remove-orphans", "--timeout=5")


@pytest.fixture(scope="session")
def compose(built: Compose) -> Compose:
    """The stack: a proxy, two gateways, two workers, Redis; tests leave it as they found it."""
    began = time.monotonic()
    try:
        built("up", "--detach", "--wait", "--no-build", "--wait-timeout=400", seconds=420)
    except AssertionError as error:
        pytest.fail(f"{error}\n{built.logs()}", pytrace=False)
    print(f"\nstack up in {time.monotonic() - began:.0f} s")
    return built


@pytest.fixture(scope="session")
def expected(compose: Compose) -> dict[int, str]:
    """The text of each prompt when nothing disturbs it."""
    texts: dict[int, str] = {}
    with Load(compose.url, texts, threads=5, rounds=1) as load:
        pass
    assert load.finished == 5
    return texts


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the containers' logs after a failure."""
    report = yield
    stack = getattr(item, "funcargs", {}).get("compose")
    if report.failed and stack is not None and shutil.which("docker"):
        report.sections.append(("logs of the containers", stack.logs()))
    return report
