"""A stack under `docker compose`, and load on it, for tests that kill and replace its parts."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil

from clients.python.unbroken_transport import ResumingTransport
from tests import stack
from tests.media_samples import encode, picture
from tests.oracle import image_part, text_part
from tests.stack import ROOT, clean_environment

PROJECT = "unbroken-test"  # as tests/compose/override.yml names it
FILES = ("docker-compose.yml", "docker-compose.cpu.yml", "tests/compose/override.yml")
TOKENS = 150
ENDED_BY_ITSELF = ("0", "143")
"""Exit codes after SIGTERM, which uvicorn raises again once all is closed; 137 is SIGKILL's."""

PROMPTS: list[Any] = [
    "Hello!",
    "Tell me a story about the sea.",
    "Count to ten.",
    [image_part(encode(picture())), text_part("What colour is it?")],
    [image_part(encode(picture(color=(20, 200, 40)), "JPEG")), text_part("And this one?")],
]


def wait_until(holds: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    """Poll, as `tests.stack.wait_until` does, but at a rate at which asking Docker is no load."""
    return stack.wait_until(holds, what, seconds, every=0.3)


def say(what: str) -> None:
    """Tell how far a long test is, and when."""
    print(f"\n{time.strftime('%H:%M:%S', time.gmtime())} {what}", flush=True)


def docker(*argv: str, env: dict[str, str] | None = None, seconds: float = 120) -> str:
    """Run a docker command; returns what it printed, fails with what it complained of."""
    done = subprocess.run(
        ["docker", *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, f"docker {' '.join(argv)}\n{done.stdout}{done.stderr}"[-6000:]
    return done.stdout


def docker_succeeds(*argv: str) -> bool:
    """Tell whether a docker command ends with 0."""
    return subprocess.run(["docker", *argv], capture_output=True, timeout=120).returncode == 0


class Compose:
    """The project of the tests.

    Args:
        port: where the proxy is published.
        wheels: a folder with a torch for CPUs; empty where pip finds one by itself.
        files: more compose files.
    """

    def __init__(self, port: int, wheels: Path, files: tuple[str, ...] = ()) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.options = [*(f"--file={name}" for name in (*FILES, *files)), "--env-file=.env.example"]
        self.env = {**clean_environment(), "PORT": str(port), "WHEELS": str(wheels)}
        self.env |= {"GATEWAYS": "2", "WORKERS": "2", "COMPOSE_PROGRESS": "plain"}

    def __call__(self, *argv: str, seconds: float = 180) -> str:
        """Run `docker compose` with an unedited `.env.example`."""
        return docker("compose", *self.options, *argv, env=self.env, seconds=seconds)

    def containers(self, service: str, form: str = "{{.ID}}") -> list[str]:
        """Return the ids of a service's running containers, or what else Docker tells of each."""
        labels = (f"project={PROJECT}", f"service={service}")  # `compose ps` takes ten times longer
        filters = [f"--filter=label=com.docker.compose.{label}" for label in labels]
        return docker("ps", "--no-trunc", *filters, f"--format={form}").splitlines()

    def pids(self, service: str) -> list[int]:
        """Return the host's ids of the main processes of a service's containers."""
        form = "--format={{.State.Pid}}"
        return [int(pid) for pid in docker("inspect", form, *self.containers(service)).split()]

    def program(self, container: str) -> psutil.Process:
        """Return the program that a container's init runs."""
        init = int(docker("inspect", "--format={{.State.Pid}}", container))
        return psutil.Process(init).children()[0]

    def cancel(self, session: str) -> None:
        """Cancel a session."""
        asked = urllib.request.Request(f"{self.url}/v1/cancel/{session}", method="POST")
        urllib.request.urlopen(asked, timeout=60).close()

    def gateways_in_use(self) -> int:
        """Return how many gateways the proxy gives requests to."""
        [proxy] = self.containers("proxy")
        told = docker("exec", proxy, "wget", "-q", "-O-", "http://127.0.0.1:8405/metrics")
        up = r'^haproxy_server_status\{proxy="gateways",server="[^"]+",state="UP"\} 1$'
        return len(re.findall(up, told, re.MULTILINE))

    def health(self, service: str) -> list[str]:
        """Return what Docker says of each running container of a service."""
        return self.containers(service, "{{.Status}}")

    def healthy(self, service: str, count: int) -> bool:
        """Tell whether so many containers of a service are healthy, and no other one runs."""
        found = self.health(service)
        return len(found) == count and all("(healthy)" in status for status in found)

    def wait_healthy(self, service: str, count: int) -> None:
        """Wait until so many containers of a service are healthy, and no other one runs."""
        wait_until(lambda: self.healthy(service, count), f"{count} healthy {service}s")

    def logs(self) -> str:
        """Return the ends of all logs."""
        return self("logs", "--tail=40", "--no-color")


class Load:
    """Clients of the OpenAI SDK over the resuming transport, one after another per thread.

    What nobody has begun to answer (a 5xx) the SDK asks again by itself.

    Args:
        url: of the proxy.
        expected: the undisturbed text of each prompt; empty to find it out.
        threads: how many generations at once.
        rounds: generations per thread; None for as many as there is time for until the block ends.
        whole: how many of the threads ask for whole completions, which no transport can resume.
        retries: how often the SDK asks again; 2 is its own default.
    """

    def __init__(
        self,
        url: str,
        expected: dict[int, str],
        threads: int = 6,
        rounds: int | None = None,
        whole: int = 0,
        retries: int = 2,
    ) -> None:
        self.expected, self.finished, self.chunks = expected, 0, [0] * threads
        self.wrong: list[str] = []
        self._whole, self._retries = whole, retries
        self._url, self._rounds, self._end = url, rounds, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(threads)]

    def __enter__(self) -> Load:  # noqa: PYI034 - Python 3.10 has no Self
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._rounds is None or self.wrong:
            self._end.set()
        for thread in self._threads:
            thread.join(240)
        assert not any(thread.is_alive() for thread in self._threads), "a stream never ended"
        assert not self.wrong, self.wrong[:3]

    def wait(self, holds: Callable[[], Any], what: str, seconds: float = 300) -> None:
        """Wait until something holds; fails at once where a client has seen a fault."""

        def held() -> Any:
            assert not self.wrong, self.wrong[:3]
            return holds()

        wait_until(held, what, seconds)

    def wait_flowing(self, more: int = 20) -> None:
        """Wait until each stream has got so many chunks more than now."""
        goal = [count + more for count in self.chunks]
        flowing = lambda: all(n >= least for n, least in zip(self.chunks, goal, strict=True))  # noqa: E731
        self.wait(flowing, "all streams flow")

    def _run(self, number: int) -> None:
        done = 0
        transport = ResumingTransport(backoff=0.05, max_backoff=0.5, max_retries=80)
        client = openai.OpenAI(
            base_url=f"{self._url}/v1",
            api_key="none",
            max_retries=self._retries,
            http_client=httpx2.Client(transport=transport, timeout=240),
        )
        with client:
            while not self._end.is_set() and done != self._rounds:
                index = (number + done) % len(PROMPTS)
                try:
                    text = self._generate(client, number, index)
                except Exception as error:  # noqa: BLE001 - whatever a client sees is the result
                    self.wrong.append(f"prompt {index}: {error!r}")
                    return
                if text != self.expected.setdefault(index, text):
                    self.wrong.append(f"prompt {index}: {text!r} not {self.expected[index]!r}")
                done += 1
                self.finished += 1

    def _generate(self, client: openai.OpenAI, number: int, index: int) -> str:
        if number < self._whole:
            return self._complete(client, number, index)
        text, tokens = "", 0
        for chunk in client.chat.completions.create(**request(index)):
            self.chunks[number] += 1
            for choice in chunk.choices:
                delta = choice.delta.model_dump()
                text += delta.get("reasoning_content") or delta.get("content") or ""
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
        assert tokens == TOKENS, f"{tokens} tokens"
        return text

    def _complete(self, client: openai.OpenAI, number: int, index: int) -> str:
        asked = request(index)
        del asked["stream"], asked["stream_options"]
        completion = client.chat.completions.create(**asked)
        self.chunks[number] += completion.usage.completion_tokens
        message = completion.choices[0].message.model_dump()
        return (message.get("reasoning_content") or "") + (message.get("content") or "")


def request(index: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Return a streamed request for a prompt."""
    return {
        "model": "any",
        "messages": [{"role": "user", "content": PROMPTS[index]}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens,
        "seed": 7,
        "extra_body": {"ignore_eos": True},
    }


class PlainStream:
    """A stream over one bare connection, which does not come back by itself."""

    def __init__(self, url: str, tokens: int = TOKENS, after: str = "") -> None:
        asked = request(0, tokens)
        body = {**asked, **asked.pop("extra_body")}
        self._client = httpx2.Client(timeout=30)
        self._answer = self._client.send(
            self._client.build_request(
                "POST",
                f"{url}/v1/chat/completions",
                json=None if after else body,
                headers={"last-event-id": after} if after else {},
            ),
            stream=True,
        )
        self.status = self._answer.status_code
        self._lines = self._answer.iter_lines()
        self.ids: list[str] = []
        self.text, self.done, self._id = "", False, ""

    def take(self, events: int | None = None) -> PlainStream:
        """Read so many events with an id, or all until the stream ends or breaks."""
        try:
            for line in self._lines:
                self._take(line)
                if events is not None and len(self.ids) >= events:
                    break
        except (httpx2.RemoteProtocolError, httpx2.ReadError):
            pass
        return self

    def read(self, events: int | None = None) -> PlainStream:
        """Read on, as `take` does, and leave."""
        self.take(events)
        self._answer.close()
        self._client.close()
        return self

    def _take(self, line: str) -> None:
        if line.startswith("id: "):
            self._id = line[4:]
        elif line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            self.ids += [self._id] if self._id else []  # it counts once its data is here
            self._id = ""
            for choice in json.loads(line[6:])["choices"]:
                delta = choice["delta"]
                self.text += delta.get("reasoning_content") or delta.get("content") or ""
