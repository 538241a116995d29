"""The short way to Redis for a script that runs at each step of a worker's engine.

redis-py takes 0.25 ms from the call to the first byte and as much again behind the reply, in Python
that the engine could use; a bare connection with a callback takes little of either.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.wire import connect, pack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio import Redis

    from shared.wire import Wire

STALE_SECONDS = 15.0
"""A connection that was silent for so long may be dead without knowing: it is opened anew."""


class Express:
    """Runs scripts over one bare connection, opened on first use.

    Whatever it cannot do plainly it leaves to the usual way, so a script may run twice.

    Args:
        redis: the client whose server, credentials and timeout it takes.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._timeout: float | None = redis.connection_pool.connection_kwargs.get("socket_timeout")
        self._wire: Wire | None = None
        self._opening = asyncio.Lock()
        self._waiting: set[asyncio.Future[Any]] = set()

    async def run(self, sha: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """Run a script that the server has loaded.

        Returns None where the connection is lost or Redis refuses: try it the usual way.

        Raises:
            RedisTimeoutError: Redis did not answer for the client's `socket_timeout`.
        """
        wire = self._wire
        if wire is None or wire.closed.done() or time.monotonic() - wire.heard > STALE_SECONDS:
            wire = await self._open()
        if wire is None:
            return None
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.add(reply)
        wire.send(
            pack("EVALSHA", sha, len(keys), *keys, *args),
            lambda answer: None if reply.done() else reply.set_result(answer),
        )
        try:
            answer = await asyncio.wait_for(reply, self._timeout)
        except asyncio.TimeoutError:
            wire.abort()
            raise RedisTimeoutError("Redis does not answer.") from None
        finally:
            self._waiting.discard(reply)
        if isinstance(answer, Exception):
            wire.abort()  # it may be that of a server which is no longer the right one
            return None
        return answer

    def close(self) -> None:
        """Close the connection; what waits for an answer gets none."""
        if self._wire is not None:
            self._wire.abort()

    async def _open(self) -> Wire | None:
        """Open the connection, once for all who want it; None where that fails."""
        async with self._opening:
            wire = self._wire
            if wire is not None and not wire.closed.done():
                if time.monotonic() - wire.heard <= STALE_SECONDS:
                    return wire
                wire.abort()
            try:
                wire = self._wire = await connect(self._redis, _ignore)
            except (RedisError, OSError):
                return None
            wire.closed.add_done_callback(lambda _: self._give_up())
            return wire

    def _give_up(self) -> None:
        for reply in self._waiting:
            if not reply.done():
                reply.set_result(None)


def _ignore(_push: object) -> None:
    pass
