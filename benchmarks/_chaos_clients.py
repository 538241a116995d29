"""The clients of the chaos run: streams over the resuming transport, with all they saw."""

from __future__ import annotations

import asyncio
import random
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import msgspec

from clients.python.unbroken_transport import AsyncResumingTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Cases = list[dict[str, Any]]

PATH = "/v1/chat/completions"
READ_SECONDS = 30
GIVE_UP_SECONDS = 300
"""A stream that is not whole so long after its first request has waited for ever."""

EVENT = re.compile(rb"(?:^id: ?\S*:(\d+)\n)?(?:^retry: .*\n)?^data: ?(.*)\n\n", re.MULTILINE)


@dataclass
class Attempt:
    """One request of a stream: when it was sent (monotonic seconds), to which port, what came.

    `answered` is when its headers came, `ended` when its body broke off; 0 where they did not.
    """

    at: float
    port: int
    outcome: str = "open"
    answered: float = 0.0
    ended: float = 0.0

    @property
    def accepted(self) -> bool:
        """Whether a stream began."""
        return self.outcome.startswith("200")


@dataclass
class Stream:
    """One stream: what was asked, and all that its client saw. Times are monotonic seconds."""

    case: int
    session_id: str = ""
    port: int = 0  # of the gateway it was last sent to
    began: float = 0.0
    times: list[float] = field(default_factory=list)  # of each event
    lost: int = 0  # events that were skipped
    repeated: int = 0  # events that came twice
    texts: dict[tuple[int, str], str] = field(default_factory=dict)
    finishes: int = 0  # frames that name a finish reason
    dones: int = 0
    usage: dict[str, Any] | None = None
    errors: list[str] = field(default_factory=list)
    cut: bool = False  # asked to break its connection
    cuts: int = 0
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether it came to its end."""
        return self.dones > 0

    def trail(self) -> list[str]:
        """Say when, in seconds since its last event, which port was asked, and what came of it."""
        last = self.times[-1] if self.times else self.began
        late = [a for a in self.attempts if max(a.at, a.ended) >= last]
        return [f"{a.at - last:+.1f}..{a.ended - last:+.1f} :{a.port} {a.outcome}" for a in late]

    def feed(self, data: bytes, now: float) -> None:
        """Take bytes, which the transport hands out in whole events."""
        for index, payload in EVENT.findall(data):
            if payload == b"[DONE]":
                self.dones += 1
                continue
            if index:
                self._place(int(index), now)
            self._read(msgspec.json.decode(payload))

    def _place(self, index: int, now: float) -> None:
        missing = index - len(self.times)
        self.repeated += missing < 0
        self.lost += max(0, missing)
        self.times += [now] * (missing + 1)

    def _read(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.errors.append(str(chunk["error"].get("code")))
            return
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            for channel in ("reasoning_content", "content"):
                if text := choice["delta"].get(channel):
                    key = (choice["index"], channel)
                    self.texts[key] = self.texts.get(key, "") + text
        self.finishes += any(choice["finish_reason"] for choice in chunk["choices"])


class _Wire(httpx.AsyncBaseTransport):
    """The plain transport beneath a client: tells where it is connected, and breaks on demand."""

    def __init__(self, rng: random.Random) -> None:
        self._inner = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=2))
        self._rng = rng
        self.stream: Stream | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert self.stream is not None
        self.stream.port = request.url.port or 0
        attempt = Attempt(time.monotonic(), self.stream.port)
        self.stream.attempts.append(attempt)
        try:
            response = await self._inner.handle_async_request(request)
        except httpx.TransportError as error:
            attempt.outcome, attempt.ended = type(error).__name__, time.monotonic()
            raise
        attempt.outcome, attempt.answered = str(response.status_code), time.monotonic()
        response.stream = _Breakable(response.stream, self.stream, self._rng, attempt)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Breakable(httpx.AsyncByteStream):
    def __init__(self, inner: Any, stream: Stream, rng: random.Random, attempt: Attempt) -> None:
        self._inner, self._stream, self._rng, self._attempt = inner, stream, rng, attempt

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for data in self._inner:
                if self._stream.cut:  # in the middle of what came, wherever that is
                    self._stream.cut = False
                    self._stream.cuts += 1
                    yield data[: self._rng.randrange(len(data) + 1)]
                    raise httpx.ReadError("cut")
                yield data
        except httpx.TransportError as error:
            self._attempt.outcome += f" {type(error).__name__}"
            raise
        finally:
            self._attempt.ended = time.monotonic()

    async def aclose(self) -> None:
        await self._inner.aclose()


class Client:
    """One client: a stream after the other, until it is told to stop.

    Args:
        number: begins at another gateway than its neighbours, and draws other cases.
        urls: the gateways.
        cases: the bodies to choose from.
        seed: of its choices.
    """

    def __init__(self, number: int, urls: list[str], cases: Cases, seed: int) -> None:
        turn = number % len(urls)
        self._url, *others = urls[turn:] + urls[:turn]
        self._cases, self._rng = cases, random.Random(f"{seed} {number}")
        self._wire = _Wire(self._rng)
        transport = AsyncResumingTransport(self._wire, fallbacks=tuple(others))
        self._http = httpx.AsyncClient(transport=transport, timeout=READ_SECONDS)
        self.streams: list[Stream] = []

    @property
    def current(self) -> Stream | None:
        """The stream that is read now."""
        return self.streams[-1] if self.streams and not self.streams[-1].whole else None

    async def run(self, stop: asyncio.Event) -> None:
        """Read streams until told to stop, the last one to its end."""
        while not stop.is_set():
            await self.read(self._rng.randrange(len(self._cases)))

    async def read(self, case: int) -> Stream:
        """Read one stream, asking again as an SDK does; its key finds the same session again."""
        stream = self._wire.stream = Stream(case, began=time.monotonic())
        self.streams.append(stream)
        headers = {"idempotency-key": uuid.uuid4().hex}
        while not stream.whole:
            if time.monotonic() - stream.began > GIVE_UP_SECONDS:
                stream.errors.append("gave up")
                break
            try:
                await self._attempt(stream, self._cases[case], headers)
            except httpx.TransportError as error:
                if stream.times:  # the transport gave up: a client without more patience has lost
                    stream.errors.append(type(error).__name__)
                    break
                await asyncio.sleep(0.2)
        return stream

    async def _attempt(self, stream: Stream, body: dict[str, Any], headers: dict[str, str]) -> None:
        async with self._http.stream(
            "POST", self._url + PATH, json=body, headers=headers
        ) as response:
            if response.status_code != 200:
                await response.aread()
                if response.status_code < 500 and response.status_code != 429:
                    raise SystemExit(f"{response.status_code}: {response.text}")
                await asyncio.sleep(0.2)
                return
            stream.session_id = response.headers["x-session-id"]
            async for data in response.aiter_bytes():
                stream.feed(data, time.monotonic())

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()
