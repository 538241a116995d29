"""A stack under `docker compose`, and load on it, for tests that kill and replace its parts."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx2
import openai

from clients.python.unbroken_transport import ResumingTransport
from tests.media_samples import encode, picture
from tests.oracle import image_part, text_part
from tests.stack import ROOT, clean_environment, wait_until

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


def docker(*argv: str, env: dict[str, str] | None = None, seconds: float = 120) -> str:
    """Run a docker command; returns what it printed, fails with what it complained of."""
    done = subprocess.run(
        ["docker", *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, f"docker {' '.join(argv)}\n{done.stdout}{done.stderr}"[-6000:]
    return done.stdout


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

    def containers(self, service: str) -> list[str]:
        """Return the ids of a service's running containers."""
        return self("ps", "--quiet", service).split()

    def pids(self, service: str) -> list[int]:
        """Return the host's ids of the main processes of a service's containers."""
        form = "--format={{.State.Pid}}"
        return [int(pid) for pid in docker("inspect", form, *self.containers(service)).split()]

    def health(self, container: str) -> str:
        """Return what Docker says of a container: running or not, healthy or not."""
        form = "--format={{.State.Status}} {{if .State.Health}}{{.State.Health.Status}}{{end}}"
        return docker("inspect", form, container).strip()

    def wait_healthy(self, service: str, count: int) -> None:
        """Wait until so many containers of a service are healthy, and no other one runs."""

        def healthy() -> bool:
            found = [self.health(c) for c in self.containers(service)]
            return found == ["running healthy"] * count

        wait_until(healthy, f"{count} healthy {service}s", 240)

    def logs(self) -> str:
        """Return the ends of all logs."""
        return self("logs", "--tail=40", "--no-color")


class Load:
    """Clients of the OpenAI SDK over the resuming transport, one after another per thread.

    Args:
        url: of the proxy.
        expected: the undisturbed text of each prompt; empty to find it out.
        threads: how many streams at once.
        rounds: generations per thread; None for as many as there is time for until `stop`.
    """

    def __init__(
        self, url: str, expected: dict[int, str], threads: int = 6, rounds: int | None = None
    ) -> None:
        self.expected, self.finished, self.chunks = expected, 0, [0] * threads
        self.wrong: list[str] = []
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

    def wait_flowing(self, more: int = 20) -> None:
        """Wait until each stream has got so many chunks more than now."""
        goal = [count + more for count in self.chunks]

        def flowing() -> bool:
            assert not self.wrong, self.wrong[:3]
            return all(count >= least for count, least in zip(self.chunks, goal, strict=True))

        wait_until(flowing, "all streams flow", 150)

    def _run(self, number: int) -> None:
        done = 0
        transport = ResumingTransport(backoff=0.05, max_backoff=0.5, max_retries=80)
        client = openai.OpenAI(
            base_url=f"{self._url}/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx2.Client(transport=transport, timeout=60),
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
