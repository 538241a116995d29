"""Streams through the proxy, and what kills them: each container's process dies from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request

import openai
import pytest

from tests.compose.kit import ENDED_BY_ITSELF, TOKENS, Compose, Load, PlainStream, docker
from tests.stack import wait_until


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
    stream = PlainStream(compose.url).read(events=2)
    session = stream.ids[0].partition(":")[0]
    with urllib.request.urlopen(f"{compose.url}/v1/sessions/{session}") as answer:
        status = json.load(answer)
    assert status["status"] in ("queued", "running")


def test_the_proxy_shows_no_metrics_and_gives_errors_their_shape(compose: Compose) -> None:
    """Internal figures stay inside; errors of the proxy have a body that SDKs can read."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{compose.url}/metrics")
    assert refused.value.code == 404
    assert set(json.load(refused.value)["error"]) == {"message", "type", "param", "code"}
    assert refused.value.headers["x-request-id"]


@pytest.mark.parametrize("service", ["gateway", "worker", "redis"])
def test_streams_survive_a_killed_process(compose: Compose, expected, service: str) -> None:
    """Under the resuming transport nobody notices that a container's process was killed."""
    victim, pid = compose.containers(service)[0], compose.pids(service)[0]
    before = restarts(victim)
    with Load(compose.url, expected, threads=6) as load:
        load.wait_flowing()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: restarts(victim) > before, "Docker starts it again", 60)
        load.wait_flowing(TOKENS)
    assert load.finished >= 6
    compose.wait_healthy(service, {"redis": 1}.get(service, 2))


def test_a_plain_client_resumes_by_hand_at_another_gateway(compose: Compose) -> None:
    """After a kill, `Last-Event-ID` through the proxy gives the rest, and no more."""
    tokens, pids = 400, compose.pids("gateway")
    whole = PlainStream(compose.url, tokens).read()
    left = PlainStream(compose.url, tokens).read(events=10)
    broken = PlainStream(compose.url, tokens).take(events=5)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    broken.read()
    assert whole.done
    assert not broken.done
    for stream in (left, broken):
        resumed = wait_until(lambda after=stream.ids[-1]: _resume(compose, after), "it resumes", 60)
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


def test_a_gateway_that_hangs_is_left_out(compose: Compose, expected) -> None:
    """The proxy gives up a gateway that does not answer, and its streams go on at another one."""
    with Load(compose.url, expected, threads=6) as load:
        load.wait_flowing()
        victim = compose.containers("gateway")[0]
        docker("pause", victim)
        try:
            load.wait_flowing(TOKENS)
        finally:
            docker("unpause", victim)
    compose.wait_healthy("gateway", 2)


def test_a_stopped_container_ends_by_itself(compose: Compose) -> None:
    """SIGTERM reaches the program in each image, which closes what it has open, and ends."""
    for service in ("gateway", "worker"):
        container = compose.containers(service)[0]
        docker("stop", "--time=30", container)
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
