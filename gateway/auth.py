"""API keys: who is calling, whose a session is, and what each key may use."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from shared.errors import UnbrokenError

if TYPE_CHECKING:
    from starlette.requests import Request

log = logging.getLogger("unbroken.auth")

OPEN = ""
"""The owner of every session on a server without keys."""

LOOK_SECONDS = 1.0
"""How often at most the file of keys is looked at."""


class KeyLimits(msgspec.Struct, frozen=True):
    """What one key may use; None: without a bound."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_sessions: int | None = None


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of the file: the key or its SHA-256, a name for people, and limits."""

    key: str | None = None
    sha256: str | None = None
    name: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_sessions: int | None = None


class KeyFileError(ValueError):
    """The file of keys is not readable; the text says where, never what stands there."""


Keys = dict[bytes, KeyLimits]
"""SHA-256 of each key, and its limits."""


def parse_keys(text: str) -> Keys:
    """Read a file of keys: each line a plain key, or a JSON object; `#` begins a comment line.

    Raises:
        KeyFileError: a line is neither.
    """
    keys: Keys = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        try:
            entry = msgspec.json.decode(line, type=_Line) if line[0] == "{" else _Line(key=line)
        except msgspec.DecodeError:
            raise KeyFileError(f"line {number} is no valid entry") from None
        keys[_digest(entry, number)] = _limits(entry, number)
    return keys


def _digest(entry: _Line, number: int) -> bytes:
    if entry.sha256 is not None and entry.key is None:
        if re.fullmatch(r"[0-9a-fA-F]{64}", entry.sha256):
            return bytes.fromhex(entry.sha256)
    elif entry.key and entry.sha256 is None and not re.search(r"\s", entry.key):
        return hashlib.sha256(entry.key.encode()).digest()
    raise KeyFileError(f"line {number} needs either a key without white space, or its sha256")


def _limits(entry: _Line, number: int) -> KeyLimits:
    limits = KeyLimits(
        entry.requests_per_minute, entry.tokens_per_minute, entry.concurrent_sessions
    )
    if any(value is not None and value < 1 for value in msgspec.structs.astuple(limits)):
        raise KeyFileError(f"line {number} has a limit below 1")
    return limits


class Authenticator:
    """Checks bearer tokens.

    Args:
        api_keys: the accepted keys, separated by commas.
        keys_file: a file of more keys, read again when it changes; without both the server is open.

    Raises:
        KeyFileError: the file cannot be read.
    """

    def __init__(self, api_keys: str, keys_file: str = "") -> None:
        given = [key.strip() for key in api_keys.split(",") if key.strip()]
        self._given: Keys = {hashlib.sha256(k.encode()).digest(): KeyLimits() for k in given}
        self._file = Path(keys_file) if keys_file else None
        self._keys, self._looked_at = self._given, time.monotonic()
        self._stamp: tuple[int, int, int] | None = None
        self._by_owner: dict[str, KeyLimits] = {}
        try:
            self._load()
        except OSError:
            raise KeyFileError("API_KEYS_FILE cannot be read") from None

    @property
    def is_open(self) -> bool:
        """Tell whether anybody may call."""
        return self._file is None and not self._given

    def owner(self, request: Request) -> str:
        """Return the caller's identity: a hash of the key, never the key.

        Raises:
            UnbrokenError: `invalid_api_key`.
        """
        if self.is_open:
            return OPEN
        self._refresh()
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else ""
        digest = hashlib.sha256(given.encode()).digest()
        matches = [hmac.compare_digest(digest, key) for key in self._keys]  # all, in constant time
        if not any(matches):
            raise UnbrokenError("invalid_api_key", "The API key is missing or wrong.")
        return _owner(digest)

    def limits(self, owner: str) -> KeyLimits | None:
        """Return the limits of an owner's key; None where it has none."""
        limits = self._by_owner.get(owner)
        return None if limits == KeyLimits() else limits

    def _refresh(self) -> None:
        """Read the file again if it has changed; a bad one leaves the keys as they are."""
        if self._file is None or time.monotonic() - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        try:
            self._load()
        except (OSError, KeyFileError) as error:
            why = str(error) if isinstance(error, KeyFileError) else type(error).__name__
            log.error("the file of keys is not usable", extra={"error": why})  # noqa: TRY400

    def _load(self) -> None:
        keys = self._given
        if self._file is not None:
            stat = os.stat(self._file)  # noqa: PTH116  # a stub of Path.stat hides st_ino's type
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if stamp == self._stamp:
                return
            try:
                text = self._file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise KeyFileError("it is no UTF-8 text") from None
            finally:
                self._stamp = stamp  # a bad file is said once, not with every request
            keys = {**self._given, **parse_keys(text)}
            log.info("keys read", extra={"count": len(keys)})
        self._keys = keys
        self._by_owner = {_owner(digest): limits for digest, limits in keys.items()}


def _owner(digest: bytes) -> str:
    return digest.hex()[:32]
