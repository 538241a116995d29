"""Transports for httpx2 and httpx under which the OpenAI SDK's streams survive lost connections.

One file to copy: `OpenAI(http_client=httpx2.Client(transport=ResumingTransport()))`.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import anyio  # both libraries stand on it

_LIBRARIES: list[Any] = [import_module(name) for name in ("httpx2", "httpx") if find_spec(name)]

if TYPE_CHECKING:
    from httpx2 import AsyncBaseTransport, AsyncByteStream, BaseTransport, SyncByteStream
else:  # a subclass of both libraries' classes serves the clients of both

    def _both(name: str) -> type:
        return type(name, tuple(getattr(library, name) for library in _LIBRARIES), {})

    BaseTransport, AsyncBaseTransport = _both("BaseTransport"), _both("AsyncBaseTransport")
    SyncByteStream, AsyncByteStream = _both("SyncByteStream"), _both("AsyncByteStream")

_LOST = tuple(e for lib in _LIBRARIES for e in (lib.NetworkError, lib.RemoteProtocolError))
_BROKEN = (*_LOST, *(lib.TimeoutException for lib in _LIBRARIES))
_RETRYABLE = {408, 425, 429, 500, 502, 503, 504}
_MISSING = 404  # what a stream goes on from: a server that lost its data may yet get it back
_STANDING_SECONDS = 1.0  # a resumed stream that stood so long was no failed attempt
_EVENT_END = re.compile(rb"\r?\n\r?\n")
_ID = re.compile(rb"^id: ?([^\r\n]+)", re.MULTILINE)
_DONE = re.compile(rb"^data: ?\[DONE\]", re.MULTILINE)


class _Call:
    """One chat request over all its attempts: what to send, and what to pass on."""

    def __init__(self, request: Any, library: Any, key: str) -> None:
        self._request, self._library = request, library
        self._last_id = self._held = b""
        self.done = self.closed = False
        self.tries = 0  # in a row, since something came or stood
        self.cause: Any = None  # the first error since then
        self._opened: float | None = None  # when the stream that is read was accepted
        request.headers["idempotency-key"] = key
        request.headers["accept-encoding"] = "identity"  # events are told apart as they come

    def request(self, origin: str | None) -> Any:
        """Return the next attempt: the original until an event has come, then a resume."""
        old, body = self._request, self._request.content
        made_anew = {"host", "content-length", "transfer-encoding"}
        headers = {name: value for name, value in old.headers.items() if name not in made_anew}
        if self._last_id:
            headers["last-event-id"], body = self._last_id.decode(), b""
        url = self._library.URL(origin).join(old.url.raw_path.decode()) if origin else old.url
        return type(old)("POST", url, headers=headers, content=body, extensions=old.extensions)

    def feed(self, data: bytes) -> bytes:
        """Take bytes; return those up to the last event with an id, or up to `[DONE]`.

        Half an event, and events without an id, come again after a resume: they are held back.
        """
        held, safe, start = self._held + data, 0, 0
        while end := _EVENT_END.search(held, start):
            event, start = held[start : end.end()], end.end()
            if found := _ID.search(event):
                self._last_id, safe = found[1], start
            elif _DONE.search(event):
                self.done, safe = True, start
        self._held = held[safe:]
        if safe:
            self.tries, self.cause = 0, None
        return held[:safe]

    def opened(self) -> None:
        """Note that a stream has begun."""
        self._opened = time.monotonic()

    def failed(self, error: Exception | None = None) -> None:
        """Forget what will come again; without an error, the stream has ended before its time."""
        self._held = b""
        opened, self._opened = self._opened, None
        if opened is not None and time.monotonic() - opened >= _STANDING_SECONDS:
            self.tries, self.cause = 0, None
        early = self._library.RemoteProtocolError("No [DONE] came.", request=self._request)
        self.cause = self.cause or error or early


class _Resumer:
    """What both transports share, written once for both: see `_now`.

    Args:
        transport: sends the requests; by default a plain one of the client's library.
        max_retries: attempts in a row that bring no event and no stream that stands for a second,
            before the first error is raised.
        backoff: seconds before the second attempt; doubles with each, less up to half by chance.
        max_backoff: what it doubles to, seconds. A `Retry-After` (up to 120 s) may exceed it.
        fallbacks: origins (`https://other:3000`) of more gateways on the same Redis, tried in
            turn. They get the API key too.
    """

    _names: tuple[str, str, str]
    _sleep: Any

    def __init__(
        self,
        transport: Any = None,
        *,
        max_retries: int = 8,
        backoff: float = 0.25,
        max_backoff: float = 8.0,
        fallbacks: tuple[str, ...] = (),
    ) -> None:
        self._base, self._max_retries = transport, max_retries
        self._backoff, self._max_backoff = backoff, max_backoff
        self._origins, self._turn = (None, *fallbacks), 0
        self._unanswered: dict[bytes, list[str]] = {}  # keys that the SDK's own retries take up

    async def _handle(self, request: Any) -> Any:
        library = next(lib for lib in _LIBRARIES if isinstance(request, lib.Request))
        if self._base is None:
            limits = library.Limits(max_connections=1000, max_keepalive_connections=100)
            self._base = getattr(library, self._names[0])(limits=limits)
        if request.method != "POST" or not request.url.path.endswith("/chat/completions"):
            return await self._send(request)
        if len(self._unanswered) > 256:
            self._unanswered.clear()
        caller = f"{request.url} {request.headers.get('authorization')} ".encode()
        same = hashlib.sha256(caller + request.content).digest()
        keys = self._unanswered.get(same, [])
        asked_again = request.headers.get("x-stainless-retry-count", "0") != "0"
        key = request.headers.get("idempotency-key") or (keys.pop() if asked_again and keys else "")
        call, response = _Call(request, library, key or str(uuid.uuid4())), None
        try:
            response = await self._first(call)
        finally:
            if response is None or response.status_code in _RETRYABLE:
                unanswered = self._unanswered.setdefault(same, [])
                unanswered.append(request.headers["idempotency-key"])
        if _is_stream(response):
            call.opened()
            response.stream = _Stream(self, call, response.stream)
        return response

    async def _send(self, request: Any) -> Any:
        return await _result(getattr(self._base, self._names[1])(request))

    async def _first(self, call: _Call) -> Any:
        while True:
            try:
                return await self._send(call.request(self._origin()))
            except _LOST as error:
                call.failed(error)
            await self._pause(call)

    async def resume(self, call: _Call, asked_seconds: float = 0) -> Any:
        """Return the stream that goes on after the last event."""
        while True:
            await self._pause(call, asked_seconds)
            try:
                response = await self._send(call.request(self._origin()))
            except _BROKEN:
                continue
            if _is_stream(response) and not call.closed:
                call.opened()
                return response.stream
            await _result(getattr(response, self._names[2])())
            if response.status_code not in _RETRYABLE and response.status_code != _MISSING:
                call.tries = self._max_retries  # a later answer would be no better
            asked = response.headers.get("retry-after", "")
            asked_seconds = min(float(asked), 120) if asked.isdigit() else 0

    def _origin(self) -> str | None:
        return self._origins[self._turn % len(self._origins)]

    async def _pause(self, call: _Call, asked_seconds: float = 0) -> None:
        spent = call.tries >= self._max_retries
        if not spent:
            longest = min(self._max_backoff, self._backoff * 2**call.tries)
            await _result(self._sleep(max(asked_seconds, longest * random.uniform(0.5, 1))))
            call.tries += 1
            self._turn += 1
        if spent or call.closed:
            raise call.cause


def _is_stream(response: Any) -> bool:
    kind = response.headers.get("content-type", "").partition(";")[0]
    encoding = response.headers.get("content-encoding", "identity")
    fits = (response.status_code, kind, encoding) == (200, "text/event-stream", "identity")
    return fits and "x-session-id" in response.headers


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _now(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine under which nothing is awaited, as over a synchronous transport."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("A synchronous transport has waited.")


class ResumingTransport(_Resumer, BaseTransport):
    """For `httpx2.Client` and `httpx.Client`: goes on with a chat stream that broke."""

    _names = ("HTTPTransport", "handle_request", "close")
    _sleep = staticmethod(time.sleep)

    def handle_request(self, request: Any) -> Any:
        """Send a request; raises what the library raises, the first error once tries are spent."""
        request.read()
        return _now(self._handle(request))

    def close(self) -> None:
        """Close the connections."""
        if self._base:
            self._base.close()


class AsyncResumingTransport(_Resumer, AsyncBaseTransport):
    """For `httpx2.AsyncClient` and `httpx.AsyncClient`: the same."""

    _names = ("AsyncHTTPTransport", "handle_async_request", "aclose")
    _sleep = staticmethod(anyio.sleep)

    async def handle_async_request(self, request: Any) -> Any:
        """Send a request; raises what the library raises, the first error once tries are spent."""
        await request.aread()
        return await self._handle(request)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._base:
            await self._base.aclose()


class _Stream(SyncByteStream, AsyncByteStream):
    """What the client reads, over as many connections as it takes."""

    def __init__(self, transport: _Resumer, call: _Call, inner: Any) -> None:
        self._transport, self._call, self._inner = transport, call, inner

    def __iter__(self) -> Iterator[bytes]:
        while not self._call.done:
            try:
                for data in self._inner:
                    yield self._call.feed(data)
                self._call.failed()
            except _BROKEN as error:
                self._call.failed(error)
            self._inner.close()
            if not self._call.done:
                self._inner = _now(self._transport.resume(self._call))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while not self._call.done:
            try:
                async for data in self._inner:
                    yield self._call.feed(data)
                self._call.failed()
            except _BROKEN as error:
                self._call.failed(error)
            await self._inner.aclose()
            if not self._call.done:
                self._inner = await self._transport.resume(self._call)

    def close(self) -> None:
        self._call.closed = True
        self._inner.close()

    async def aclose(self) -> None:
        self._call.closed = True
        await self._inner.aclose()
