"""Which hosts media may come from: every address of a host is checked before it is asked.

By default a host must lie on the public internet with all its addresses. `MEDIA_ALLOWED_HOSTS`
narrows that to a list, whose hosts may also be private.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Union

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

NAT64 = ipaddress.ip_network("64:ff9b::/96")
NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")
AZURE_HOST = ipaddress.ip_address("168.63.129.16")  # looks public, answers virtual machines only

RESOLVERS = 16
_resolvers = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="resolve")
"""Threads of their own: names that resolve slowly must not hold up other work."""


class BlockedError(Exception):
    """The host is unknown, or one of its addresses is not allowed; which of them is nobody's."""


class AllowedHosts:
    """The rule for hosts.

    Args:
        setting: names, `*.names`, addresses and networks, separated by commas; `*` is every host
            on the public internet, and so is an empty setting.

    Raises:
        ValueError: an entry is none of these.
    """

    def __init__(self, setting: str) -> None:
        entries = [entry.strip().lower().rstrip(".") for entry in setting.split(",")]
        entries = [entry for entry in entries if entry] or ["*"]
        self._public = "*" in entries
        self._names: set[str] = set()
        self._suffixes: list[str] = []
        self._networks: list[Network] = []
        for entry in entries:
            if entry.startswith("*."):
                self._suffixes.append(entry[1:])
            elif entry != "*" and (network := _network(entry)) is not None:
                self._networks.append(network)
            elif entry != "*":
                if "/" in entry or ":" in entry:
                    raise ValueError(f"MEDIA_ALLOWED_HOSTS: '{entry}' is no host and no network")
                self._names.add(entry)

    def allow(self, host: str, address: str) -> bool:
        """Tell whether `address`, one of the addresses of `host`, may be asked."""
        name = host.lower().rstrip(".")
        if name in self._names or name.endswith(tuple(self._suffixes)):
            return True
        try:
            ip = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if any(ip in network for network in self._networks):
            return True
        return self._public and is_public(address)


def _network(entry: str) -> Network | None:
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return None


async def resolve(host: str, port: int, rule: AllowedHosts) -> list[str]:
    """Look a host up, once; every address must be allowed, because any could be the next answer.

    Raises:
        BlockedError: it has no address, or one that is not allowed.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.run_in_executor(_resolvers, look_up, host, port)
    except (OSError, UnicodeError):
        raise BlockedError from None
    addresses = list(dict.fromkeys(found))
    if not addresses or not all(rule.allow(host, address) for address in addresses):
        raise BlockedError
    return addresses


def look_up(host: str, port: int) -> list[str]:
    """Return a host's addresses (blocking)."""
    return [str(e[4][0]) for e in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Tell whether an IP address is outside of every private, local or reserved network."""
    try:
        ip: Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in NAT64_LOCAL:
            return False
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    if ip == AZURE_HOST or ip.is_multicast or ip.is_reserved:
        return False
    return ip.is_global
