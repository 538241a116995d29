"""Fetches the bytes of images and videos: `data:` URLs, and http(s) without a way into our network.

A client's URL is resolved once, every address is checked, and the connection goes to a checked
address, so that neither a redirect nor a second DNS answer leads elsewhere.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import ipaddress
import logging
import socket
import ssl
from collections.abc import Sequence
from functools import lru_cache
from typing import Union
from urllib.parse import unquote

import httpx

from shared.errors import UnbrokenError
from shared.protocol import MediaRef
from shared.settings import WorkerSettings

log = logging.getLogger("unbroken.media")

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]

MAX_REDIRECTS = 3
MAX_ADDRESSES = 3  # of one host, tried in turn
REDIRECTS = frozenset({301, 302, 303, 307, 308})
USER_AGENT = "unbroken-worker"
BASE64_STEP = 1 << 20  # decoded at a time, so that other threads get the GIL in between
NAT64 = ipaddress.ip_network("64:ff9b::/96")
AZURE_HOST = ipaddress.ip_address("168.63.129.16")  # looks public, answers virtual machines only


async def fetch(
    ref: MediaRef, settings: WorkerSettings, param: str | None = None
) -> bytes | list[bytes]:
    """Fetch what a message refers to.

    Args:
        ref: the reference.
        settings: size limit, timeout, and whether private hosts are allowed.
        param: the request field, for error messages.

    Returns:
        The file; for `data:video/jpeg;base64,f1,f2,…` the frames' files.

    Raises:
        UnbrokenError: `media_unreachable`, `invalid_media` or `request_too_large`.
    """
    scheme = ref.url.partition(":")[0].strip().lower()
    try:
        if scheme == "data":
            return await asyncio.to_thread(_decode_data_url, ref, settings.max_media_bytes)
        if scheme not in ("http", "https"):
            raise _invalid("A media URL must begin with http://, https:// or data:.")
        download = _download(ref.url.strip(), settings)
        return await asyncio.wait_for(download, settings.media_timeout_seconds)
    except UnbrokenError as error:
        raise UnbrokenError(error.code, error.message, param) from None
    except asyncio.TimeoutError:
        raise UnbrokenError(
            "media_unreachable",
            f"The media was not received within {settings.media_timeout_seconds:g} seconds.",
            param,
        ) from None


def content_hash(data: bytes | Sequence[bytes]) -> str:
    """Identify fetched media: the hex SHA-256 of the bytes, or of the frames' lengths and bytes."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256()
    for frame in data:
        digest.update(len(frame).to_bytes(8, "big"))
        digest.update(frame)
    return digest.hexdigest()


def _decode_data_url(ref: MediaRef, max_bytes: int) -> bytes | list[bytes]:
    header, comma, body = ref.url.partition(",")
    fields = [field.strip().lower() for field in header.strip()[len("data:") :].split(";")]
    if not comma or "base64" not in fields[1:]:
        raise _invalid("A data: URL must look like data:<type>;base64,<data>.")
    if len(body) // 4 * 3 > max_bytes * 1.1:  # some room for white space and commas
        raise _too_large(max_bytes)
    if ref.kind == "video" and fields[0] == "video/jpeg":
        frames = [_decode_base64(part) for part in body.split(",") if part.strip()]
        if not frames:
            raise _invalid("The data: URL has no frames.")
        _check_size(sum(map(len, frames)), max_bytes)
        return frames
    data = _decode_base64(body)
    _check_size(len(data), max_bytes)
    return data


def _decode_base64(text: str) -> bytes:
    """Decode leniently: white space, percent-encoding, the URL alphabet, missing padding."""
    if "%" in text:
        text = unquote(text)
    text = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    if not text:
        raise _invalid("The data: URL is empty.")
    text += "=" * (-len(text) % 4)
    try:
        steps = range(0, len(text), BASE64_STEP)
        return b"".join(base64.b64decode(text[i : i + BASE64_STEP], validate=True) for i in steps)
    except (binascii.Error, ValueError):
        raise _invalid("The data: URL is not valid base64.") from None


async def _download(url: str, settings: WorkerSettings) -> bytes:
    """Follow redirects by hand, so that each target is checked."""
    target = _parse(url)
    for _ in range(MAX_REDIRECTS + 1):
        answer = await _get(target, settings)
        if isinstance(answer, bytes):
            return answer
        try:
            target = _parse(str(target.join(answer)))
        except (httpx.InvalidURL, ValueError):
            raise _unreachable("The media URL redirects to no valid URL.") from None
    raise _unreachable(f"The media URL redirects more than {MAX_REDIRECTS} times.")


def _parse(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
        named = parsed.scheme in ("http", "https") and bool(parsed.host)  # decodes the host
    except (httpx.InvalidURL, ValueError):
        raise _invalid("The media URL is not valid.") from None
    if not named:
        raise _invalid("A media URL must begin with http:// or https:// and name a host.")
    return parsed


async def _get(url: httpx.URL, settings: WorkerSettings) -> bytes | httpx.URL:
    """Return the body, or where the server redirects to."""
    addresses = await _resolve(url, allow_private=settings.allow_private_media_hosts)
    async with httpx.AsyncClient(
        trust_env=False,
        verify=_tls(),
        timeout=settings.media_timeout_seconds,
        headers={"user-agent": USER_AGENT, "accept-encoding": "identity"},
    ) as client:
        for address in addresses[:MAX_ADDRESSES]:
            try:
                return await _get_from(client, url, address, settings.max_media_bytes)
            except httpx.ConnectError as error:
                log.info("no connection for media: %s", type(error).__name__)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                log.info("no media: %s", type(error).__name__)
                raise _unreachable("The media URL could not be read.") from None
    raise _unreachable("The media URL's host could not be reached.")


async def _get_from(
    client: httpx.AsyncClient, url: httpx.URL, address: str, max_bytes: int
) -> bytes | httpx.URL:
    """Ask one address of the host, under the host's name (header and certificate)."""
    request = client.build_request(
        "GET",
        url.copy_with(host=address),
        headers={"host": url.netloc.decode("ascii")},
        extensions={"sni_hostname": url.raw_host.decode("ascii")},
    )
    response = await client.send(request, stream=True)
    try:
        if response.status_code in REDIRECTS and "location" in response.headers:
            return httpx.URL(response.headers["location"])
        if response.status_code != 200:
            raise _unreachable(f"The media URL's server answered {response.status_code}.")
        # What is unpacked here could be a thousand times what was sent.
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _unreachable("The media URL's server sent compressed content unasked.")
        length = response.headers.get("content-length", "")
        if length.isascii() and length.isdigit():
            _check_size(int(length), max_bytes)
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            _check_size(len(body), max_bytes)
        return bytes(body)
    finally:
        await response.aclose()


async def _resolve(url: httpx.URL, *, allow_private: bool) -> list[str]:
    """Look the host up; every address must be allowed, because any could be the next answer."""
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            url.raw_host.decode("ascii").strip("[]"), port, type=socket.SOCK_STREAM
        )
    except (OSError, UnicodeError):
        raise _unreachable("The media URL's host is not known.") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private and not all(is_public(address) for address in addresses):
        raise _unreachable("The media URL's host is not on the public internet.")
    return addresses


def is_public(address: str) -> bool:
    """Tell whether an IP address is outside of every private, local or reserved network."""
    try:
        ip: Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    if ip == AZURE_HOST or ip.is_multicast or ip.is_reserved:
        return False
    return ip.is_global


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> UnbrokenError:
    return UnbrokenError("request_too_large", f"The media is larger than {max_bytes} bytes.")


def _invalid(message: str) -> UnbrokenError:
    return UnbrokenError("invalid_media", message)


def _unreachable(message: str) -> UnbrokenError:
    return UnbrokenError("media_unreachable", message)
