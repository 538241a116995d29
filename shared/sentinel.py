"""Redis behind Sentinels: connections that ask for the master each time they are made."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError

SCHEMES = ("redis+sentinel", "rediss+sentinel")
DEFAULT_PORT = 26379
ANSWER_SECONDS = 1.0
"""How long a Sentinel may take before the next one is asked."""


class Sentinels(NamedTuple):
    """The Sentinels of one master, asked in turn.

    Args:
        addresses: host and port of each.
        service: the master's name among them.
        options: username, password and TLS for connections to them.
    """

    addresses: tuple[tuple[str, int], ...]
    service: str
    options: dict[str, Any]

    async def master(self) -> tuple[str, int]:
        """Return the master's host and port.

        Raises:
            RedisConnectionError: no Sentinel answers and knows it.
        """
        for host, port in self.addresses:
            client: Redis = Redis(
                host=host,
                port=port,
                socket_timeout=ANSWER_SECONDS,
                socket_connect_timeout=ANSWER_SECONDS,
                **self.options,
            )
            try:
                words = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)
                found = await client.execute_command(*words)  # type: ignore[no-untyped-call]
            except (RedisError, OSError):
                continue
            finally:
                await client.aclose()
            if found:
                return found[0].decode(), int(found[1])
        raise RedisConnectionError(f"No Sentinel names a master '{self.service}'.")


class _ToMaster(AbstractConnection):
    """A connection whose address is looked up before each attempt to open it."""

    host: str
    port: int

    def __init__(self, *, sentinels: Sentinels, **options: Any) -> None:
        super().__init__(**options)
        self._sentinels = sentinels

    async def locate(self) -> None:
        """Ask for the address."""
        self.host, self.port = await self._sentinels.master()

    async def _connect(self) -> None:
        await self.locate()
        await super()._connect()  # type: ignore[no-untyped-call,safe-super]

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read a reply; a master that has become a replica is as good as gone."""
        try:
            return await super().read_response(*args, **options)
        except ReadOnlyError:
            await self.disconnect()
            raise RedisConnectionError("The master has become a replica.") from None


class MasterConnection(_ToMaster, Connection):
    """To the master, without TLS."""


class MasterSSLConnection(_ToMaster, SSLConnection):
    """To the master and its Sentinels with TLS."""


async def locate(connection: object) -> None:
    """Give a connection that nobody has opened the address where it would be opened."""
    if isinstance(connection, _ToMaster):
        await connection.locate()


def parse(url: str) -> tuple[type[AbstractConnection], dict[str, Any]]:
    """Return the connection class and its options for a URL with one of `SCHEMES`.

    The form is `redis+sentinel://user:password@host:port,host:port/service/database`. Options of
    connections may follow as a query (`ssl_ca_certs=…`); `sentinel_username` and
    `sentinel_password` are for the Sentinels.

    Raises:
        ValueError: it names no host or no service.
    """
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    service, _, database = parts.path.strip("/").partition("/")
    if not hosts or not service:
        raise ValueError("REDIS_URL: redis+sentinel://…@host:port,host:port/service/0 is expected.")
    user, _, password = login.partition(":")
    query = dict(parse_qsl(parts.query))
    secrets = {
        name: query.pop(f"sentinel_{name}")
        for name in ("username", "password")
        if f"sentinel_{name}" in query
    }
    tls = parts.scheme == SCHEMES[1]
    options: dict[str, Any] = {
        "username": unquote(user) or None,
        "password": unquote(password) or None,
        "db": int(database or 0),
        **query,
        "sentinels": Sentinels(
            tuple(_address(host) for host in hosts.split(",")),
            unquote(service),
            {**secrets, **query, **({"ssl": True} if tls else {})},
        ),
    }
    return (MasterSSLConnection if tls else MasterConnection), options


def _address(text: str) -> tuple[str, int]:
    found = urlsplit(f"//{text}")
    return found.hostname or "", found.port or DEFAULT_PORT
