"""A master, a replica and three Sentinels, all real; the master is killed."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

import run
from shared import sentinel, wire
from shared.store import FAILED, Store, connect

pytestmark = pytest.mark.timeout(90)  # a failover that is tried twice takes its time

PASSWORD, GUARD = "geheim#1", "wache"


class Group:
    """The processes: `servers[0]` begins as the master."""

    def __init__(self, folder):
        self.folder, self.processes = folder, {}
        self.ports = [run.free_port() for _ in range(5)]
        master, replica, *guards = self.ports
        common = 'bind 127.0.0.1\nsave ""\ndaemonize no\n'
        data = f'{common}requirepass "{PASSWORD}"\nmasterauth "{PASSWORD}"\n'
        self.start(master, data)
        self.start(replica, f"{data}replicaof 127.0.0.1 {master}\n")
        for guard in guards:
            self.start(
                guard,
                f"{common}requirepass {GUARD}\nsentinel sentinel-pass {GUARD}\n"
                f"sentinel monitor talk 127.0.0.1 {master} 2\n"
                f'sentinel auth-pass talk "{PASSWORD}"\n'
                "sentinel down-after-milliseconds talk 1500\n"
                "sentinel failover-timeout talk 4000\n",
                "--sentinel",
            )
        hosts = ",".join(f"127.0.0.1:{port}" for port in guards)
        self.url = (
            f"redis+sentinel://:{PASSWORD.replace('#', '%23')}@127.0.0.1:1,{hosts}/talk/0"
            f"?sentinel_password={GUARD}"
        )

    def start(self, port, conf, *arguments):
        folder = self.folder / str(port)
        folder.mkdir()
        (folder / "redis.conf").write_text(f"port {port}\n{conf}")
        with (folder / "log").open("wb") as log:
            self.processes[port] = subprocess.Popen(
                [run.find_redis(sys.executable), "redis.conf", *arguments],
                cwd=folder,
                stdout=log,
                stderr=log,
            )

    def kill(self, port):
        self.processes[port].kill()
        self.processes[port].wait()


@pytest.fixture
def group(tmp_path):
    group = Group(tmp_path)
    yield group
    for port in group.processes:
        group.kill(port)


async def eventually(step):
    """Repeat a coroutine function until it neither fails nor returns something false."""
    while True:
        with contextlib.suppress(*FAILED):
            if result := await step():
                return result
        await asyncio.sleep(0.05)


async def test_clients_follow_the_master(group):
    """After a failover both kinds of connection lead to the new master, and writes go on."""
    store = Store(connect(group.url, retries=2))
    master, replica, *_guards = group.ports

    async def replicated():
        info = await store.redis.info("replication")
        return info["connected_slaves"] == 1 and info["slave0"]["state"] == "online"

    async def ready_to_fail_over():
        guards = await guard.execute_command("SENTINEL", "MASTER", "talk")
        facts = dict(zip(guards[::2], guards[1::2], strict=True))
        return (facts[b"num-other-sentinels"], facts[b"num-slaves"]) == (b"2", b"1")

    guard = connect(f"redis://:{GUARD}@127.0.0.1:{group.ports[-1]}/0")
    await eventually(replicated)
    await eventually(ready_to_fail_over)
    assert await store.redis.set("before", "1", ex=60)
    assert await store.redis.wait(1, 5000) == 1
    bare = await wire.connect(store.redis, lambda _: None)
    assert await bare.call("GET", "before") == b"1"
    group.kill(master)
    with pytest.raises(RedisConnectionError):
        await asyncio.wait_for(bare.closed, 20)
    await eventually(lambda: store.redis.set("after", "2", ex=60))
    again = await eventually(lambda: wire.connect(store.redis, lambda _: None))
    assert await again.call("MGET", "before", "after") == [b"1", b"2"]
    assert (await store.redis.info("server"))["tcp_port"] == replica
    again.abort()
    await store.close()
    await guard.aclose()


async def test_a_demoted_master_is_left(redis_url):
    """A reply that says `READONLY` costs the connection: the next one asks who is master."""
    store = Store(connect(redis_url))
    await store.redis.config_set("replica-read-only", "yes")
    login = redis_url.rpartition("@")[0].partition("//")[2]
    host, _, port = redis_url.rpartition("@")[2].partition("/")[0].partition(":")
    kind, options = sentinel.parse(f"redis+sentinel://{login}@{host}:{port}/any/0")
    asked = []

    class Asked(kind):
        async def locate(self):
            asked.append(True)
            self.host, self.port = host, int(port)

    connection = Asked(**options)
    try:
        await store.redis.slaveof("127.0.0.1", 1)
        await connection.connect()
        await connection.send_command("SET", "x", "1", "EX", "9")
        with pytest.raises(RedisConnectionError, match="replica"):
            await connection.read_response()
        assert not connection.is_connected
        await connection.connect()
        assert len(asked) == 2
    finally:
        await connection.disconnect()
        await store.redis.slaveof()
        await store.close()


async def test_nobody_knows_the_master():
    """Where no Sentinel answers, it is a lost connection like any other."""
    store = connect("redis+sentinel://127.0.0.1:1,127.0.0.1:2/talk", retries=0)
    with pytest.raises(RedisConnectionError, match="Sentinel"):
        await store.ping()
    await store.aclose()


@pytest.mark.parametrize(
    ("url", "kind", "expected"),
    [
        ("redis+sentinel://h/talk", "MasterConnection", (None, None, 0, (("h", 26379),))),
        (
            "rediss+sentinel://u%40:p%2F@h:1,[::1]:2/talk/3",
            "MasterSSLConnection",
            ("u@", "p/", 3, (("h", 1), ("::1", 2))),
        ),
    ],
)
def test_urls(url, kind, expected):
    """Users, passwords, several hosts and the database stand in the URL."""
    found, options = sentinel.parse(url)
    sentinels = options["sentinels"]
    values = (options["username"], options["password"], options["db"], sentinels.addresses)
    assert (found.__name__, values, sentinels.service) == (kind, expected, "talk")
    assert bool(sentinels.options.get("ssl")) == (kind == "MasterSSLConnection")


@pytest.mark.parametrize("url", ["redis+sentinel://h", "redis+sentinel:///talk"])
def test_a_url_without_service_or_host_is_refused(url):
    """The mistake is named at the start."""
    with pytest.raises(ValueError, match="REDIS_URL"):
        connect(url)
