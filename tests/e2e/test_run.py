"""`run.py`: starts all, says so, starts again what dies, and leaves nothing behind."""

from __future__ import annotations

import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis

from tests.conftest import TEST_ENV
from tests.stack import STOP_SECONDS, Stack, alive, family, wait_until

pytestmark = pytest.mark.timeout(180)  # stacks start in these tests


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[Stack]:
    """A stack whose parts these tests may kill."""
    with Stack(tmp_path_factory.mktemp("run") / "data", env=TEST_ENV) as running:
        yield running


def assert_all_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(map(alive, pids)), f"none of {pids} is left", 10)


def ask(url: str) -> str:
    """Have a few tokens generated; the answer waits for a worker that is being started again."""
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}

    def answer() -> str:
        try:
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=90)
        except httpx.TransportError:
            return ""  # the gateway is being started again
        return (
            reply.json()["choices"][0]["message"]["reasoning_content"] if reply.is_success else ""
        )

    return wait_until(answer, "an answer", 90)


def ended(stack: Stack) -> tuple[int, str]:
    """Wait for a stack that cannot start; return its exit code and what it printed."""
    seen: set[int] = set()
    while stack.process.poll() is None:
        seen.update(family(stack.process.pid))
        time.sleep(0.05)
    assert_all_gone(list(seen))
    return stack.process.returncode, stack.output


def test_it_says_where_it_listens_and_how_to_try(own_stack: Stack) -> None:
    """A person reads the address and a command to copy; a program reads `run.json`."""
    state = own_stack.state
    url = state["gateways"][0]["url"]
    assert f"\nready {url}\n" in own_stack.output
    assert f"{url}/#control={state['control']}\n" in own_stack.output
    assert f"curl -N {url}/v1/chat/completions" in own_stack.output
    assert state["gateways"] == [{"pid": state["gateways"][0]["pid"], "url": url}]
    assert [set(worker) for worker in state["workers"]] == [{"pid"}]
    pids = [state["redis"]["pid"], state["gateways"][0]["pid"], state["workers"][0]["pid"]]
    assert all(map(alive, pids))
    assert len(set(pids)) == 3


def test_redis_is_ours_alone(own_stack: Stack) -> None:
    """Redis listens on loopback, asks for the password, writes its log; secrets are private."""
    url = own_stack.redis_url
    with redis.Redis.from_url(url) as client:
        config = client.config_get("*")
        assert config["bind"] == "127.0.0.1"
        assert config["appendonly"] == "yes"
        assert config["appendfsync"] == "everysec"
        assert config["maxmemory-policy"] == "noeviction"
    port = client.connection_pool.connection_kwargs["port"]
    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    for secret in (own_stack.folder / "run.json", own_stack.folder / "redis" / "redis.conf"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    command = Path(f"/proc/{own_stack.pid('redis')}/cmdline")
    assert client.connection_pool.connection_kwargs["password"] not in command.read_text()


@pytest.mark.parametrize("kind", ["gateways", "workers", "redis"])
def test_a_killed_part_comes_back(own_stack: Stack, kind: str) -> None:
    """A part that dies runs again at the same address, and `run.json` tells its new pid."""
    before = own_stack.state
    relatives = family(own_stack.pid(kind))
    killed = own_stack.kill(kind)
    own_stack.wait_restarted(kind, killed)
    assert_all_gone(relatives)
    after = own_stack.state
    assert after["redis"]["url"] == before["redis"]["url"]
    assert after["gateways"][0]["url"] == before["gateways"][0]["url"]
    assert len(ask(own_stack.url)) > 0


def test_a_data_folder_serves_one_stack(own_stack: Stack, tmp_path: Path) -> None:
    """A second stack on the same folder would destroy the first one's Redis: it does not start."""
    second = Stack(own_stack.folder, output_file=tmp_path / "second.out")
    code, output = ended(second)
    assert code == 1
    assert "another run.py uses" in output
    assert alive(own_stack.pid("redis"))


def test_stopping_leaves_nothing(make_stack: Callable[..., Stack]) -> None:
    """Whoever stops a ready stack gets exit code 0, and neither process nor `run.json` is left."""
    stack = make_stack()
    stack.wait_until_ready()
    pids = family(stack.process.pid)
    assert len(pids) >= 5
    assert stack.stop(signal.SIGTERM) == 0
    assert_all_gone(pids)
    assert not (stack.folder / "run.json").exists()


def test_stopping_while_it_starts_leaves_nothing(make_stack: Callable[..., Stack]) -> None:
    """Nobody has to wait for a stack before stopping it."""
    stack = make_stack()
    wait_until((stack.folder / "run.json").exists, "the first part runs", 60)
    wait_until(lambda: stack.state["gateways"], "the last part runs", 60)
    pids = family(stack.process.pid)
    assert stack.stop(signal.SIGINT) == 0
    assert_all_gone(pids)
    assert "\nready " not in stack.output


def test_killing_run_py_leaves_nothing(make_stack: Callable[..., Stack]) -> None:
    """Even SIGKILL, which run.py cannot see, leaves no orphan, and the folder is free at once."""
    stack = make_stack()
    wait_until((stack.folder / "run.json").exists, "the first part runs", 60)
    wait_until(lambda: stack.state["gateways"], "the last part runs", 60)
    wait_until(lambda: len(family(stack.pid("workers"))) > 1, "the engine's process", 60)
    pids = family(stack.process.pid)
    stack.process.kill()
    stack.process.wait(STOP_SECONDS)
    assert_all_gone(pids)


def test_a_broken_model_is_reported(make_stack: Callable[..., Stack], tmp_path: Path) -> None:
    """A folder without a model: the reason, the worker's last log lines, exit code 1."""
    (tmp_path / "empty").mkdir()
    code, output = ended(make_stack(model=str(tmp_path / "empty")))
    assert code == 1
    assert "could not be loaded" in output
    assert "The end of " in output
    assert '"logger": "unbroken' in output


def test_a_part_that_cannot_start_is_reported(make_stack: Callable[..., Stack]) -> None:
    """A worker with impossible settings: who failed, its last log lines, exit code 1."""
    code, output = ended(make_stack(env={"MAX_BATCH_SIZE": "-1"}))
    assert code == 1
    assert "worker-1 ended with exit code 1 before it was ready" in output
    assert "max_batch_size" in output


def test_a_port_in_use_is_reported(make_stack: Callable[..., Stack]) -> None:
    """Nothing starts where the gateway could not listen; the message names port and option."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stack = make_stack(port=port)
        code, output = ended(stack)
    assert code == 1
    assert f"port {port}" in output
    assert "--port" in output
    assert not (stack.folder / "run.json").exists()


def test_a_missing_model_folder_is_reported(make_stack: Callable[..., Stack]) -> None:
    """A path that does not exist is no repository id to look for in the network."""
    code, output = ended(make_stack(model="./no/such/folder"))
    assert code == 1
    assert "no such folder" in output
