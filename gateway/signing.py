"""Signed stream URLs: they let a browser's `EventSource`, which sends no key, read one session."""

from __future__ import annotations

import hashlib
import hmac
import re
import time

from shared.errors import UnbrokenError

DENIED = "The stream's URL has expired, or is not valid."


def sign(secret: str, owner: str, session_id: str, expires: int) -> str:
    """Return the signature for reading a session until `expires` (Unix seconds)."""
    text = f"stream\n{owner}\n{session_id}\n{expires}"
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def stream_url(secret: str, owner: str, session_id: str, expires: int) -> str:
    """Return the path and query under which anybody may read the session's events."""
    signature = sign(secret, owner, session_id, expires)
    return f"/v1/sessions/{session_id}/events?expires={expires}&signature={signature}"


def check(secret: str, owner: str | None, session_id: str, expires: str, signature: str) -> None:
    """Check a signature; `owner` is None for a session that does not exist.

    Raises:
        UnbrokenError: `invalid_api_key`, whatever is wrong.
    """
    until = int(expires) if re.fullmatch(r"[0-9]{1,12}", expires) else 0
    expected = sign(secret, owner or "", session_id, until)
    good = hmac.compare_digest(expected.encode(), signature.encode())
    if not secret or owner is None or not good or until < time.time():
        raise UnbrokenError("invalid_api_key", DENIED)
