"""The error taxonomy: one row per code, with its HTTP status and whether a retry can help."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """What the world sees of an error code: HTTP status, OpenAI `type`, and retryability."""

    status: int
    type: str
    retryable: bool = False


INVALID = "invalid_request_error"
SERVER = "server_error"

KINDS: dict[str, Kind] = {
    "invalid_request": Kind(400, INVALID),
    "invalid_value": Kind(400, INVALID),
    "unsupported_parameter": Kind(400, INVALID),
    "invalid_media": Kind(400, INVALID),
    "media_unreachable": Kind(400, INVALID),
    "media_changed": Kind(400, INVALID),
    "context_length_exceeded": Kind(400, INVALID),
    "invalid_api_key": Kind(401, "authentication_error"),
    "session_not_found": Kind(404, INVALID),
    "model_not_found": Kind(404, INVALID),
    "not_found": Kind(404, INVALID),
    "method_not_allowed": Kind(405, INVALID),
    "session_id_in_use": Kind(409, INVALID),
    "in_progress": Kind(409, INVALID),
    "events_expired": Kind(410, INVALID),
    "request_too_large": Kind(413, INVALID),
    "request_timeout": Kind(408, INVALID, retryable=True),
    "headers_too_large": Kind(431, INVALID),
    "rate_limit_exceeded": Kind(429, "rate_limit_error", retryable=True),
    "queue_full": Kind(429, "rate_limit_error", retryable=True),
    "internal_error": Kind(500, SERVER),
    "generation_failed": Kind(500, SERVER),
    "queue_timeout": Kind(503, SERVER, retryable=True),
    "model_not_ready": Kind(503, SERVER, retryable=True),
    "unavailable": Kind(503, SERVER, retryable=True),
}


class UnbrokenError(Exception):
    """An error that a client sees, in the contract's shape.

    Args:
        code: a key of `KINDS`.
        message: one or two sentences for the caller; never a path, an address or a key.
        param: the request field at fault, as the client would write it.
        retry_after: seconds, for retryable codes.
    """

    def __init__(
        self, code: str, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param
        self.kind = KINDS[code]
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the answer's JSON: `{"error": {"message", "type", "param", "code"}}`."""
        return {
            "error": {
                "message": self.message[:2000],
                "type": self.kind.type,
                "param": self.param and self.param[:200],
                "code": self.code,
            }
        }


def invalid(param: str, why: str) -> UnbrokenError:
    """Return the 400 for a field that is not what it must be."""
    return UnbrokenError("invalid_value", f"'{param}' {why}.", param)
