"""Fetches the bytes of images and videos: `data:` URLs, and http(s) without a way into our network.

A client's URL is resolved once, every address is checked, and the connection goes to a checked
address, so that neither a redirect nor a second DNS answer leads elsewhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
from collections.abc import Sequence
from functools import lru_cache

import httpx

from shared import data_url
from shared.errors import UnbrokenError
from shared.protocol import MediaRef
from shared.settings import WorkerSettings
from worker import media_guard

log = logging.getLogger("unbroken.media")

MAX_REDIRECTS = 3
MAX_ADDRESSES = 3  # of one host, tried in turn
REDIRECTS = frozenset({301, 302, 303, 307, 308})
USER_AGENT = "unbroken-worker"
PORTS = {"http": 80, "https": 443}
MAX_FRAME_FILES = 1024
UNREACHABLE = (
    "The media URL could not be read: its host does not answer in time, or is not allowed."
)
"""One message for what is blocked, unknown, refused or silent: none of them tells about the others,
so that nobody can map our network with it."""


async def fetch(
    ref: MediaRef, settings: WorkerSettings, param: str | None = None
) -> bytes | list[bytes]:
    """Fetch what a message refers to.

    Args:
        ref: the reference.
        settings: size limit, timeout, and the hosts that are allowed.
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
        raise UnbrokenError("media_unreachable", UNREACHABLE, param) from None


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
    try:
        texts = data_url.split(ref.url, frames=ref.kind == "video").texts
        if data_url.decoded_size(texts) > max_bytes + 2 * len(texts):
            raise _too_large(max_bytes)
        if len(texts) > MAX_FRAME_FILES:
            raise _invalid(f"The data: URL has more than {MAX_FRAME_FILES} frames.")
        files = [data_url.decode(text) for text in texts]
    except data_url.DataUrlError as error:
        raise _invalid(f"The data: URL {error}.") from None
    _check_size(sum(map(len, files)), max_bytes)
    return files if is_frame_list(ref) else files[0]


def is_frame_list(ref: MediaRef) -> bool:
    """Tell whether a `data:` URL is a list of frames."""
    return ref.kind == "video" and ref.url[:15].lower() == "data:video/jpeg"


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
        named = parsed.scheme in PORTS and bool(parsed.host)  # decodes the host
        valid = parsed.port is None or 0 < parsed.port < 2**16
    except (httpx.InvalidURL, ValueError):
        raise _invalid("The media URL is not valid.") from None
    if not valid:
        raise _invalid("The media URL is not valid.")
    if not named:
        raise _invalid("A media URL must begin with http:// or https:// and name a host.")
    if parsed.userinfo:
        raise _invalid("A media URL must not hold a user name or a password.")
    return parsed


async def _get(url: httpx.URL, settings: WorkerSettings) -> bytes | httpx.URL:
    """Return the body, or where the server redirects to."""
    host = url.raw_host.decode("ascii").strip("[]")
    try:
        rule = _rule(settings.media_allowed_hosts)
        addresses = await media_guard.resolve(host, url.port or PORTS[url.scheme], rule)
    except media_guard.BlockedError:
        raise _unreachable() from None
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
                break
    raise _unreachable()


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


@lru_cache(maxsize=8)
def _rule(setting: str) -> media_guard.AllowedHosts:
    return media_guard.AllowedHosts(setting)


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


def _unreachable(message: str = UNREACHABLE) -> UnbrokenError:
    return UnbrokenError("media_unreachable", message)
