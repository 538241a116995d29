"""API keys: who is calling, and whose a session is."""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from shared.errors import UnbrokenError

if TYPE_CHECKING:
    from starlette.requests import Request

OPEN = ""
"""The owner of every session on a server without keys."""


class Authenticator:
    """Checks bearer tokens.

    Args:
        api_keys: the accepted keys, separated by commas; empty leaves the server open.
    """

    def __init__(self, api_keys: str) -> None:
        self._keys = [key.strip().encode() for key in api_keys.split(",") if key.strip()]

    @property
    def is_open(self) -> bool:
        """Tell whether anybody may call."""
        return not self._keys

    def owner(self, request: Request) -> str:
        """Return the caller's identity: a hash of the key, never the key.

        Raises:
            UnbrokenError: `invalid_api_key`.
        """
        if self.is_open:
            return OPEN
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip().encode() if scheme.lower() == "bearer" else b""
        matches = [hmac.compare_digest(given, key) for key in self._keys]  # all, in constant time
        if not any(matches):
            raise UnbrokenError("invalid_api_key", "The API key is missing or wrong.")
        return hashlib.sha256(given).hexdigest()[:32]
