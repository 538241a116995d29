"""The Redis client: what its connections send, of whichever kind they are."""

from __future__ import annotations

import pytest
from redis.asyncio.connection import Connection

from shared.store import connect

URLS = {
    "plain": "redis://:p@127.0.0.1:1/0",
    "TLS": "rediss://127.0.0.1:1/0",
    "unix": "unix:///tmp/none.sock",
    "Sentinel": "redis+sentinel://127.0.0.1:1/main/0",
}


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
@pytest.mark.parametrize(
    "command",
    [
        ("EVALSHA", "0" * 40, 2, "a", "b", b"\x00\r\n", "Grüße", -7, 0.25),
        ("CONFIG GET", "max*"),
        ("SET", "key", b"x" * 20_000, "EX", 3),
        ("PING",),
    ],
)
async def test_commands_go_over_the_wire_as_redis_py_packs_them(url, command):
    """Whatever the connection, packing in C gives the bytes of the library's own way."""
    connection = connect(url).connection_pool.make_connection()
    expected = b"".join(Connection().pack_command(*command))
    assert b"".join(connection.pack_command(*command)) == expected
    assert len(connection.pack_command(*command)) == 1  # which the library's way splits
