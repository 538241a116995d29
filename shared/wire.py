"""A bare connection to Redis for the hot paths: replies go to callbacks, not to tasks.

redis-py stays the client for everything else; this one takes its addresses and credentials from it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import hiredis
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection
from redis.exceptions import ConnectionError as RedisConnectionError

from shared import sentinel

if TYPE_CHECKING:
    from redis.asyncio import Redis

Handler = Callable[[Any], None]

CONNECT_SECONDS = 2.0
_NOTHING = object()


def pack(*words: bytes | str | int) -> bytes:
    """Return a command as it goes over the wire."""
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]
    return packed


class Wire(asyncio.Protocol):
    """An open connection.

    Args:
        on_push: gets what is no reply to a command, such as a subscription's messages: all that
            came at once, in a list.
    """

    def __init__(self, on_push: Handler) -> None:
        self._on_push = on_push
        self._handlers: deque[Handler] = deque()
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)
        self._transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.heard = time.monotonic()
        """When bytes last came."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin (asyncio)."""
        # uvloop's transports are none of asyncio's classes, but do what those do.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Hand on the replies in the data (asyncio)."""
        self.heard = time.monotonic()
        self._reader.feed(data)
        pushed = []
        while (reply := self._reader.gets()) is not _NOTHING:
            if self._handlers:
                self._handlers.popleft()(reply)
            else:
                pushed.append(reply)
        if pushed:
            self._on_push(pushed)

    def connection_lost(self, error: Exception | None) -> None:
        """End (asyncio)."""
        if not self.closed.done():
            self.closed.set_exception(error or RedisConnectionError("Redis closed the connection."))
            self.closed.exception()  # whoever waits for it gets it all the same

    def send(self, commands: bytes, *handlers: Handler) -> None:
        """Send packed commands; their replies go to these handlers, else to `on_push`."""
        if self._transport is not None and not self._transport.is_closing():
            self._handlers.extend(handlers)
            self._transport.write(commands)

    async def call(self, *words: bytes | str | int) -> Any:
        """Send a command and return its reply.

        Raises:
            RedisConnectionError: Redis refuses, or is gone.
        """
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.send(pack(*words), lambda r: None if reply.done() else reply.set_result(r))
        await asyncio.wait({reply, self.closed}, return_when=asyncio.FIRST_COMPLETED)
        if self.closed.done():
            await self.closed
        if isinstance(reply.result(), Exception):
            raise RedisConnectionError(f"Redis refuses {words[0]!r}: {reply.result()}")
        return reply.result()

    def abort(self) -> None:
        """Close the connection without ado."""
        if self._transport is not None:
            self._transport.abort()


async def connect(redis: Redis, on_push: Handler) -> Wire:
    """Open a connection to the server of a client, with its credentials and database.

    Raises:
        RedisConnectionError: Redis refuses.
        OSError: it cannot be reached.
    """
    settings = redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    await sentinel.locate(settings)
    loop, wire = asyncio.get_running_loop(), Wire(on_push)
    if isinstance(settings, UnixDomainSocketConnection):
        opening = loop.create_unix_connection(lambda: wire, settings.path)
    else:
        tls = settings.ssl_context.get() if isinstance(settings, SSLConnection) else None
        opening = loop.create_connection(lambda: wire, settings.host, settings.port, ssl=tls)
    try:
        await asyncio.wait_for(_open(opening, wire, settings), CONNECT_SECONDS)
    except asyncio.TimeoutError:
        wire.abort()
        raise RedisConnectionError("Redis does not answer.") from None
    except BaseException:
        wire.abort()
        raise
    return wire


async def _open(opening: Any, wire: Wire, settings: Any) -> None:
    await opening
    if settings.username or settings.password:
        user = [settings.username] if settings.username else []
        await wire.call("AUTH", *user, settings.password or "")
    if settings.db:
        await wire.call("SELECT", settings.db)
