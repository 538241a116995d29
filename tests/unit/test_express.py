"""The short way to Redis, and what happens where it does not lead there."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import pytest
import redis.asyncio
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared import keys
from shared.session_log import FENCED, LOG_LOST, Append, SessionLog
from shared.store import Store, connect
from tests.own_redis import OwnRedis

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Writer:
    """One session whose log is appended to."""

    def __init__(self, url: str, socket_timeout: float = 5.0) -> None:
        self.store = Store(connect(url, socket_timeout=socket_timeout))
        self.log, self.next = SessionLog(self.store), 1

    async def begin(self) -> None:
        redis = self.store.redis
        await redis.hset(keys.session("s"), mapping={"lease": "mine", "last": 0})
        await redis.xadd(keys.events("s"), {"e": b"begin"}, id="1-0")
        for key in (keys.session("s"), keys.events("s")):
            await redis.expire(key, 60)

    async def append(self) -> None:
        """Append one event, which must succeed."""
        event = b"event %d" % self.next
        assert await self.log.append([Append("s", "mine", self.next, [event])]) == [self.next]
        self.next += 1

    async def events(self) -> list[bytes]:
        return [entry.data for entry in await self.log.read("s", 0, 100)]

    async def evals(self) -> list[str]:
        """Return the ids of the connections that ran a script last."""
        clients = await self.store.redis.client_list()
        return [client["id"] for client in clients if client["cmd"] == "evalsha"]


@pytest.fixture
async def writer(redis_url: str) -> AsyncIterator[Writer]:
    writer = Writer(redis_url)
    await writer.begin()
    yield writer
    await writer.store.close()


async def test_appends_share_one_connection_which_nothing_else_uses(writer: Writer) -> None:
    """After the script is loaded, all appends go over the same connection, in order."""
    await writer.append()  # the usual way, which loads the script
    await writer.append()
    used = set(await writer.evals())
    for _ in range(5):
        await writer.append()
    assert set(await writer.evals()) == used
    assert await writer.events() == [b"event %d" % n for n in range(1, 8)]


async def test_simultaneous_appends_get_their_own_replies(writer: Writer) -> None:
    """Replies are told apart when several calls are under way, refusals among them."""
    await writer.append()
    foreign, gap = Append("s", "other", 2, [b"x"]), Append("s", "mine", 9, [b"x"])
    mine = Append("s", "mine", 2, [b"event 2"])
    calls = (writer.log.append([item]) for item in (foreign, mine, gap, foreign))
    assert await asyncio.gather(*calls) == [[FENCED], [2], [LOG_LOST], [FENCED]]
    assert await writer.events() == [b"event 1", b"event 2"]


async def test_a_cut_connection_is_opened_again(writer: Writer) -> None:
    """An append after a cut, and one that a cut meets, are in the log once."""
    await writer.append()
    for _ in range(20):
        await writer.append()
        for client in await writer.evals():
            await writer.store.redis.execute_command("CLIENT", "KILL", "ID", client)
        await writer.append()
        cutting = writer.store.redis.execute_command("CLIENT", "KILL", "TYPE", "normal")
        await asyncio.gather(writer.append(), cutting, return_exceptions=False)
    assert await writer.events() == [b"event %d" % n for n in range(1, writer.next)]


async def test_scripts_that_the_server_forgot_are_loaded_again(writer: Writer) -> None:
    """A flushed script cache, as a new server's, does not fail an append."""
    await writer.append()
    await writer.store.redis.script_flush()
    await writer.append()
    await writer.append()


async def test_what_the_server_refuses_is_raised_as_the_usual_way_does(writer: Writer) -> None:
    """An error of the server reaches the caller as redis-py's, not as a value."""
    await writer.append()
    with pytest.raises(RedisError, match="script"):
        await writer.store.express("append", ["one key"], ["too", "few"])
    await writer.append()


async def test_a_frozen_server_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    """A server that does not answer is given up after the client's timeout, and used again."""
    server = OwnRedis(tmp_path)
    writer = Writer(server.url, socket_timeout=0.5)
    try:
        await wait_for(writer)
        await writer.begin()
        await writer.append()
        await writer.append()
        server.process.send_signal(signal.SIGSTOP)
        with pytest.raises(RedisTimeoutError):
            await writer.append()
        server.process.send_signal(signal.SIGCONT)
        await writer.append()
        server.kill()
        with pytest.raises((RedisError, OSError)):
            await writer.append()
    finally:
        await writer.store.close()
        server.process.send_signal(signal.SIGCONT)
        server.kill()


async def wait_for(writer: Writer) -> None:
    """Wait until the server answers."""
    for _ in range(200):
        try:
            await writer.store.redis.ping()
        except (redis.asyncio.RedisError, OSError):
            await asyncio.sleep(0.02)
        else:
            return
    raise TimeoutError
