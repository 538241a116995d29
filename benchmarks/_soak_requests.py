"""What the clients of the soak ask, and what each of their requests must come to."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks._chaos_cases import WORDS

Body = dict[str, Any]
UNREACHABLE = "http://127.0.0.1:9/x.png"


class WrongEndError(Exception):
    """A request did not come to what it must; the message says how."""


def require(holds: object, what: str) -> None:
    """Raise `WrongEndError` unless it holds."""
    if not holds:
        raise WrongEndError(what)


def question(rng: random.Random) -> str:
    """Return a text of 3 to 60 words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 60)))


def image(rng: random.Random) -> str:
    """Return a picture of random size and noise, as a data URL."""
    shape = (rng.randint(8, 40) * 4, rng.randint(8, 40) * 4, 3)
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 255, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def asked(content: Any, rng: random.Random, **fields: Any) -> Body:
    """Return a request with parameters of its own."""
    body = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": rng.randint(1, 40),
        "temperature": rng.choice([0, 0.7, 1.2]),
        "ignore_eos": rng.random() < 0.5,
    }
    if rng.random() < 0.3:
        body |= {"top_p": 0.9, "frequency_penalty": 0.5, "stop": ["the end"]}
    return {**body, **fields}


def with_image(url: str, rng: random.Random, **fields: Any) -> Body:
    """Return a request with a picture before its text."""
    part = {"type": "image_url", "image_url": {"url": url}}
    return asked([part, {"type": "text", "text": question(rng)}], rng, **fields)


class Reader:
    """Reads one stream: its chunks, whether its end came, and its error."""

    def __init__(self) -> None:
        self.chunks = self.dones = self.ends = 0
        self.error: Body | None = None
        self.status = ""

    async def read(
        self,
        client: httpx.AsyncClient,
        body: Body,
        at: int = -1,
        then: Callable[[str], Coroutine[Any, Any, object]] | None = None,
    ) -> str:
        """Stream to the end; at chunk `at` call `then`, which leaves if it returns something.

        Returns the session's id.
        """
        url = "/v1/chat/completions"
        async with client.stream("POST", url, json={**body, "stream": True}) as answer:
            require(answer.status_code == 200, f"status {answer.status_code}")
            session = answer.headers["x-session-id"]
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    self._take(line[6:])
                    if then is not None and self.chunks == at and await then(session):
                        break
        return session

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.dones += 1
            return
        chunk = json.loads(data)
        self.chunks += 1
        self.error = chunk.get("error", self.error)
        self.status = (chunk.get("session") or {}).get("status", self.status)
        self.ends += any(choice["finish_reason"] for choice in chunk.get("choices", ()))

    def check_whole(self) -> None:
        """Require one end, one `[DONE]` and no error."""
        require((self.ends, self.dones, self.error) == (1, 1, None), f"stream: {vars(self)}")


async def streamed(client: httpx.AsyncClient, body: Body) -> None:
    """Read a stream to its end."""
    reader = Reader()
    await reader.read(client, body)
    reader.check_whole()


async def whole(client: httpx.AsyncClient, body: Body) -> None:
    """Get a whole answer."""
    answer = await client.post("/v1/chat/completions", json=body)
    require(answer.status_code == 200, f"status {answer.status_code}: {answer.text[:200]}")
    require(len(answer.json()["choices"]) == body.get("n", 1), "choices are missing")


async def cancelled(client: httpx.AsyncClient, body: Body) -> None:
    """Cancel a stream while it runs; it ends well, and soon."""

    async def cancel(session: str) -> None:
        await client.post(f"/v1/cancel/{session}")

    reader = Reader()
    await reader.read(client, body, 3, cancel)
    reader.check_whole()
    require(reader.chunks < 300, "the cancel came to nothing")


async def left(client: httpx.AsyncClient, body: Body) -> None:
    """Leave a stream in its middle, and cancel it from elsewhere."""

    async def leave(_session: str) -> bool:
        return True

    session = await Reader().read(client, body, 3, leave)
    answer = await client.post(f"/v1/cancel/{session}")
    require(answer.status_code == 200, f"cancel: {answer.status_code}")


async def refused(client: httpx.AsyncClient, body: Body) -> None:
    """Ask for what is a 400, whole."""
    answer = await client.post("/v1/chat/completions", json=body)
    require(answer.status_code == 400, f"status {answer.status_code}, not 400")


async def refused_late(client: httpx.AsyncClient, body: Body) -> None:
    """Ask for the same as a stream: an error is its last event."""
    reader = Reader()
    await reader.read(client, body)
    require(reader.error is not None, "no error came")
    require(reader.dones == 1, f"{reader.dones} ends")


Kind = tuple[int, Callable[[random.Random], Body], Callable[..., Coroutine[Any, Any, None]]]

BROKEN = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n and no more").decode()
LONG = {"max_tokens": 400, "ignore_eos": True}
KINDS: dict[str, Kind] = {  # how often, what, and how it must end
    "text": (6, lambda rng: asked(question(rng), rng), streamed),
    "text, whole": (3, lambda rng: asked(question(rng), rng), whole),
    "image": (5, lambda rng: with_image(image(rng), rng), streamed),
    "choices, logprobs": (
        2,
        lambda rng: asked(question(rng), rng, n=3, logprobs=True, top_logprobs=5),
        whole,
    ),
    "cancelled": (3, lambda rng: asked(question(rng), rng, **LONG), cancelled),
    "left": (2, lambda rng: with_image(image(rng), rng, **LONG), left),
    "broken image": (2, lambda rng: with_image(BROKEN, rng), refused),
    "broken image, streamed": (1, lambda rng: with_image(BROKEN, rng), refused_late),
    "unreachable image": (1, lambda rng: with_image(UNREACHABLE, rng), refused),
    "over-long": (1, lambda rng: asked("word " * 12_000, rng), refused),
}
