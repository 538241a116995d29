"""Streams through the proxy, and what kills them: each container's process dies from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest

from tests.compose.kit import (
    ENDED_BY_ITSELF,
    TOKENS,
    Compose,
    Load,
    PlainStream,
    docker,
    docker_succeeds,
    wait_until,
)


def restarts(container: str) -> int:
    return int(docker("inspect", "--format={{.RestartCount}}", container))


def test_the_sdk_streams_text_and_images_through_the_proxy(compose: Compose, expected) -> None:
    """The same prompts give the same texts again, streamed and whole, of text and of images."""
    with Load(compose.url, expected, threads=5, rounds=1) as load:
        pass
    assert load.finished == 5
    assert len(set(expected.values())) == 5, "each prompt has a text of its own"


def test_nothing_is_buffered_on_the_way(compose: Compose) -> None:
    """The first event is here long before the last one is made."""
    stream = PlainStream(compose.url, tokens=3000).read(events=2)
    session = stream.ids[0].partition(":")[0]
    with urllib.request.urlopen(f"{compose.url}/v1/sessions/{session}") as answer:
        status = json.load(answer)
    compose.cancel(session)
    assert status["status"] in ("queued", "running")


def test_the_proxy_shows_no_metrics_and_gives_errors_their_shape(compose: Compose) -> None:
    """Internal figures stay inside; errors of the proxy have a body that SDKs can read."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{compose.url}/metrics")
    assert refused.value.code == 404
    assert set(json.load(refused.value)["error"]) == {"message", "type", "param", "code"}
    assert refused.value.headers["x-request-id"]


def speak(compose: Compose, text: str) -> bytes:
    """Return what the proxy answers to some bytes, until it closes the connection."""
    host = ("127.0.0.1", int(compose.url.rpartition(":")[2]))
    with socket.create_connection(host, timeout=60) as connection:
        with contextlib.suppress(ConnectionError):  # it may be told before it has said all
            connection.sendall(text.encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    ("request_line", "header", "code"),
    [
        ("GET /%6Detrics HTTP/1.1", "a", "not_found"),
        ("GET /v1/models HTTP/1.1", "x" * 35_000, "headers_too_large"),
    ],
    ids=["hidden metrics", "long headers"],
)
def test_what_is_refused_has_a_body_that_sdks_can_read(
    compose: Compose, request_line: str, header: str, code: str
) -> None:
    """However a path is written; headers beyond the gateways' limit are theirs to refuse."""
    text = f"{request_line}\r\nHost: a\r\nConnection: close\r\nX: {header}\r\n\r\n"
    head, _, body = speak(compose, text).partition(b"\r\n\r\n")
    assert json.loads(body)["error"]["code"] == code, head
    assert b"application/json" in head


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("nonsense\r\n\r\n", b"400"),
        (f"GET / HTTP/1.1\r\nHost: a\r\nX: {'x' * 90_000}", b"400"),
        ("GET / HTTP/1.1\r\nHost: a\r\n", b"408"),
    ],
    ids=["no HTTP", "endless headers", "slow headers"],
)
def test_what_is_no_request_holds_no_connection(compose: Compose, text: str, status: bytes) -> None:
    """The proxy says so, and closes: at once, or when the time for headers is over."""
    assert speak(compose, text).split()[1] == status


@pytest.mark.parametrize("service", ["gateway", "worker", "redis"])
def test_streams_survive_a_killed_process(compose: Compose, expected, service: str) -> None:
    """Under the resuming transport nobody notices that a container's process was killed."""
    victim, pid = compose.containers(service)[0], compose.pids(service)[0]
    before = restarts(victim)
    with Load(compose.url, expected, threads=6, retries=6) as load:
        load.wait_flowing()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: restarts(victim) > before, "Docker starts it again", 120)
        load.wait_flowing(TOKENS)
    assert load.finished >= 6
    compose.wait_healthy(service, {"redis": 1}.get(service, 2))


def test_a_plain_client_resumes_by_hand_at_another_gateway(compose: Compose) -> None:
    """After a kill, `Last-Event-ID` through the proxy gives the rest, and no more."""
    tokens, pids = 200, compose.pids("gateway")
    whole = PlainStream(compose.url, tokens).read()
    left = PlainStream(compose.url, tokens).read(events=10)
    broken = PlainStream(compose.url, tokens).take(events=5)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    broken.read()
    assert whole.done
    assert not broken.done
    for stream in (left, broken):
        resumed = wait_until(
            lambda after=stream.ids[-1]: _resume(compose, after), "it resumes", 120
        )
        assert resumed.read().done
        session = stream.ids[0].partition(":")[0]
        ids = stream.ids + resumed.ids
        assert ids == [f"{session}:{n}" for n in range(len(ids))]
        assert stream.text + resumed.text == whole.text
    compose.wait_healthy("gateway", 2)


def _resume(compose: Compose, after: str) -> PlainStream | None:
    stream = PlainStream(compose.url, after=after)
    if stream.status != 200:
        stream.read()  # an error's body; it closes the connection
        return None
    return stream


def test_a_gateway_that_hangs_is_left_out_and_replaced(compose: Compose, expected) -> None:
    """The proxy gives it nothing new; its health command ends it, and its streams go on."""
    victim = compose.containers("gateway")[0]
    before = restarts(victim)
    with Load(compose.url, expected, threads=6, retries=6) as load:
        load.wait_flowing()
        compose.program(victim).suspend()
        wait_until(lambda: compose.gateways_in_use() == 1, "the proxy leaves it out", 60)
        wait_until(lambda: restarts(victim) > before, "Docker starts it again", 120)
        load.wait_flowing(TOKENS)
    compose.wait_healthy("gateway", 2)


def test_a_stopped_container_ends_by_itself(compose: Compose) -> None:
    """SIGTERM reaches the program in each image, which closes what it has open, and ends."""
    for service in ("gateway", "worker"):
        container = compose.containers(service)[0]
        docker("stop", "--time=60", container)
        code = docker("inspect", "--format={{.State.ExitCode}}", container).strip()
        assert code in ENDED_BY_ITSELF, service
        log = subprocess.run(["docker", "logs", container], capture_output=True, text=True)
        assert '"message": "stopped"' in log.stderr, service
        docker("start", container)
        compose.wait_healthy(service, 2)


def test_the_models_are_listed_through_the_proxy(compose: Compose) -> None:
    """Any gateway tells what the workers serve."""
    with openai.OpenAI(base_url=f"{compose.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list().data] == ["demo"]


def test_keys_come_from_a_folder_of_the_host(compose: Compose, tmp_path: Path) -> None:
    """`KEYS_DIR` and `API_KEYS_FILE` close a gateway, which sees a changed file at once."""
    tmp_path.chmod(0o755)
    keys = tmp_path / "clients"
    keys.write_text("sk-first\n")
    env = {**compose.env, "KEYS_DIR": str(tmp_path), "API_KEYS_FILE": "/keys/clients"}
    argv = ["compose", *compose.options, "run", "--rm", "--detach", "--no-deps", "gateway"]
    container = docker(*argv, env=env).split()[-1]
    asks = (
        "import urllib.request as u, sys;"
        "u.urlopen(u.Request('http://127.0.0.1:3000/v1/status',"
        " headers={'authorization': 'Bearer ' + sys.argv[1]}))"
    )

    def admitted(key: str) -> bool:
        return docker_succeeds("exec", container, "python", "-c", asks, key)

    try:
        wait_until(lambda: admitted("sk-first"), "the gateway is up", 60)
        assert not admitted("sk-second")
        new = tmp_path / "new"
        new.write_text("sk-second\n")
        new.replace(keys)  # as editors do
        wait_until(lambda: admitted("sk-second"), "the file is read again", 30)
        assert not admitted("sk-first")
    finally:
        docker_succeeds("rm", "--force", container)
