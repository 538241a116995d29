"""The Redis client: timeouts, retries that survive a restart, and the atomic scripts."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff
from redis.commands.core import AsyncScript
from redis.connection import HiredisRespSerializer
from redis.exceptions import (
    BusyLoadingError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared import sentinel
from shared.express import Express
from shared.metrics import REDIS_SECONDS

LUA = Path(__file__).parent / "lua"
LOST = (RedisConnectionError, RedisTimeoutError, BusyLoadingError, OSError)
"""What a client sees while Redis is away or restarting: worth another try."""

REFUSALS = ("MISCONF", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "BUSY", "UNBLOCKED")
"""Codes by which Redis says that it takes no writes for now; redis-py has no classes for them."""


class RefusedError(RedisError):
    """Redis takes no writes for now: its disk is full, its replicas are gone, or the like."""


def is_wrong_type(error: Exception) -> bool:
    """Tell whether a command failed because a key holds another kind of value than it should."""
    # Out of a pipeline, redis-py puts the command before the server's words.
    return isinstance(error, ResponseError) and "WRONGTYPE " in str(error)


UNAVAILABLE: tuple[type[Exception], ...] = (*LOST, OutOfMemoryError, ReadOnlyError, RefusedError)
"""What makes Redis unable to take a write for now, but not a bug of ours."""

FAILED: tuple[type[Exception], ...] = (*UNAVAILABLE, RedisError)
"""Everything that a command can fail with."""


def connect(url: str, *, retries: int = 3, socket_timeout: float = 5.0) -> Redis:
    """Make a client (it connects on first use).

    Args:
        url: `redis://`, `rediss://` (TLS), `unix://` or `redis+sentinel://` (see
            `shared.sentinel`), with password and database.
        retries: attempts after a lost connection, with jitter, at most half a second apart.
        socket_timeout: seconds; must exceed the `BLOCK` of any blocking command.
    """
    options: dict[str, Any] = {
        "socket_timeout": socket_timeout,
        "socket_connect_timeout": 2.0,
        "health_check_interval": 15,
        "retry": Retry(
            EqualJitterBackoff(cap=0.5, base=0.02),
            retries,
            supported_errors=(RedisConnectionError, RedisTimeoutError, OSError),  # type: ignore[arg-type]
        ),
        "retry_on_error": [RedisConnectionError, RedisTimeoutError, BusyLoadingError],
    }
    if not url.startswith("unix:"):
        options["socket_keepalive"] = True
    if url.startswith(sentinel.SCHEMES):
        kind, found = sentinel.parse(url)
        pool = ConnectionPool(connection_class=kind, **{**options, **found})
    else:
        pool = ConnectionPool.from_url(url, **options)
    kind = pool.connection_class
    pool.connection_class = type(f"Packing{kind.__name__}", (_Packing, kind), {})
    return Redis.from_pool(pool)


class _Packing:
    """What connections do in C here: redis-py's own way costs an append to 32 sessions 0.3 ms."""

    _serializer = HiredisRespSerializer()

    def pack_command(self, *args: Any) -> list[bytes]:
        """Return a command as it goes over the wire."""
        packed: list[bytes] = self._serializer.pack(*args)
        return packed


class Outage:
    """Logs an outage of Redis once, and its end.

    Args:
        log: where to.
        what: what fails meanwhile.
    """

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log, self._what = log, what
        self._since: float | None = None

    def begins(self, error: Exception) -> None:
        """Take note of a failure."""
        if self._since is None:
            self._since = time.monotonic()
            extra = {"error": type(error).__name__, "why": str(error)[:80]}
            self._log.warning("%s; trying again", self._what, extra=extra)

    def over(self) -> None:
        """Take note of a success."""
        if self._since is not None:
            seconds = round(time.monotonic() - self._since, 1)
            self._log.warning("redis is back", extra={"seconds": seconds})
            self._since = None


class Store:
    """One process's Redis client with the project's scripts, loaded where the server lacks them.

    Args:
        redis: a client made by `connect`.
    """

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self._scripts: dict[str, AsyncScript] = {
            path.stem: redis.register_script(path.read_text()) for path in LUA.glob("*.lua")
        }
        self._express = Express(redis)

    async def run(self, script: str, keys: list[str], args: list[Any]) -> Any:
        """Run the script `shared/lua/<script>.lua`; returns what Redis replies, as bytes and ints.

        Raises:
            RefusedError: Redis takes no writes for now.
            RedisError: the connection is lost for good, or the script failed.
        """
        try:
            with REDIS_SECONDS.labels(script).time():
                return await self._scripts[script](keys=keys, args=args)
        except ResponseError as error:
            if str(error).startswith(REFUSALS):
                raise RefusedError(str(error)) from None
            raise

    async def express(self, script: str, keys: list[str], args: list[Any]) -> Any:
        """Run a script in half the time, as `run` does; it may be run twice, and returns no null.

        Raises:
            RefusedError: Redis takes no writes for now.
            RedisError: the connection is lost for good, or the script failed.
        """
        with REDIS_SECONDS.labels(script).time():
            reply = await self._express.run(self._scripts[script].sha, keys, args)
        return await self.run(script, keys, args) if reply is None else reply

    async def close(self) -> None:
        """Close all connections."""
        self._express.close()
        await self.redis.aclose()
