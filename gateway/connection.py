"""A client's open response body, and how the hub writes to it without a task.

The public way is ASGI's `send`, run by hand: it needs a task only where it has to wait. Beneath the
server that the gateway ships with, the bytes go straight to the socket's transport, which is what
that `send` does with them; whatever is not as it is known there goes the public way.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Send

SERVER_SEND = "gateway.send"
"""Where a request's scope holds the server's own `send`: the outermost middleware puts it there, so
that a stream's events need not pass through wrappers that look at a response's start alone."""

TRANSPORT = ("write", "close", "abort")
"""What a connection asks of the server's transport."""


class _Rest:
    """What is left of a call that has begun and waits: awaiting it goes on where it stands."""

    __slots__ = ("_steps", "_waits_for")

    def __init__(self, steps: Generator[Any, Any, None], waits_for: Any) -> None:
        self._steps, self._waits_for = steps, waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        waits_for = self._waits_for
        while True:
            try:
                try:
                    answer = yield waits_for
                except BaseException as error:  # noqa: BLE001 - whatever it is, it is the call's
                    waits_for = self._steps.throw(error)
                else:
                    waits_for = self._steps.send(answer)
            except StopIteration:
                return


class Connection:
    """A client's open response body; the response has been started.

    Args:
        send: the server's ASGI `send`, past middleware that does not look at bodies.
    """

    __slots__ = ("_cycle", "_send")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._cycle = uvicorn_cycle(send)

    def push(self, data: bytes) -> Awaitable[None] | None:
        """Write now, without a task; for a caller that cannot wait.

        Returns what is left to await where the server does not take it all at once, which is how
        it treats a client that reads too slowly. Until that is done, nothing else may be written.
        """
        cycle = self._cycle
        if not data:
            return None  # an empty chunk would end the body
        if cycle is not None and not (cycle.flow.write_paused or cycle.disconnected):
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            return None
        message = {"type": "http.response.body", "body": data, "more_body": True}
        steps = self._send(message).__await__()
        try:
            waits_for = next(steps)
        except StopIteration:
            return None
        return _Rest(steps, waits_for)

    async def write(self, data: bytes) -> None:
        """Write, and wait until the server has taken it."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def close(self) -> bool:
        """Break the connection off behind what was written, without the end of the response.

        The client sees that something is missing, and the request ends as if the client had left.
        Returns False where the server gives no way to do it.
        """
        if self._cycle is not None:
            self._cycle.transport.close()
        return self._cycle is not None

    def abort(self) -> None:
        """Break the connection, whatever the client has yet to read; see `close`."""
        if self._cycle is not None:
            self._cycle.transport.abort()


def uvicorn_cycle(send: Callable[..., Any]) -> Any:
    """Return what `send` belongs to, if it is uvicorn's and sends the body in chunks; else None."""
    cycle: Any = getattr(send, "__self__", None)
    if type(cycle).__module__ != "uvicorn.protocols.http.httptools_impl":
        return None
    known = (
        getattr(cycle, "chunked_encoding", None) is True
        and getattr(cycle, "response_started", None) is True
        and getattr(cycle, "response_complete", None) is False
        and getattr(cycle, "disconnected", None) in (True, False)
        and isinstance(getattr(getattr(cycle, "flow", None), "write_paused", None), bool)
        and all(callable(getattr(getattr(cycle, "transport", None), m, None)) for m in TRANSPORT)
        and cycle.scope.get("method") != "HEAD"
    )
    return cycle if known else None
