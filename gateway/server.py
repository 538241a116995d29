"""What uvicorn's HTTP/1.1 protocol lacks on the open internet: bounds on what a client may hold up.

Too large or too slow headers get an answer in the contract's shape; a client that takes nothing of
what is sent to it is disconnected.
"""

from __future__ import annotations

import http
import json
import logging
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shared import metrics
from shared.errors import UnbrokenError
from shared.logs import new_request_id

if TYPE_CHECKING:
    import asyncio

    from shared.settings import GatewaySettings

log = logging.getLogger("unbroken.server")

LINGER_SECONDS = 1.0

NOT_HTTP = UnbrokenError("invalid_request", "This is no valid HTTP request.")
TOO_LARGE = UnbrokenError("headers_too_large", "The request's line and headers are too large.")
TOO_SLOW = UnbrokenError("request_timeout", "The request's headers came too slowly.")


class _HeadersTooLarge(Exception):  # noqa: N818 - passes through the parser
    """Ends the parser's work."""


class GuardedProtocol(HttpToolsProtocol):
    """One connection. Made by uvicorn; the limits are class attributes, see `guarded`."""

    # Python shares the names of an object's attributes between objects only up to thirty of them:
    # without slots of our own each connection would take 1.5 KB more.
    __slots__ = (
        "_begun",
        "_fault",
        "_head_bytes",
        "_in_head",
        "_patience",
        "_received",
        "_refused",
        "_stall",
        "_unsent",
    )

    max_header_bytes: int
    header_seconds: float
    stalled_seconds: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head, self._begun, self._refused = True, False, False
        self._head_bytes = self._received = 0
        self._fault = NOT_HTTP
        self._patience: asyncio.TimerHandle | None = None  # for the headers
        self._stall: asyncio.TimerHandle | None = None  # for the client to take something
        self._unsent = 0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the headers."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; headers without an end must not gather."""
        if self._refused:
            return
        if self._in_head:
            self._received += len(data)
        super().data_received(data)
        if self._in_head and self._received > self.max_header_bytes:
            self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._in_head, self._begun, self._head_bytes = True, True, 0
        if self._patience is None:
            self._expect_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """End the wait for the headers."""
        self._in_head, self._received = False, 0
        if self._patience:
            self._patience.cancel()
            self._patience = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End a request: what comes next is another one's head."""
        super().on_message_complete()
        self._in_head, self._begun = True, False

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's text is not ours
        """Answer what could not be parsed."""
        self._refuse(self._fault)

    def pause_writing(self) -> None:
        """Begin to wait for the client to take something."""
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._stall = self.loop.call_later(self.stalled_seconds, self._check_stall)

    def resume_writing(self) -> None:
        """End that wait."""
        if self._stall:
            self._stall.cancel()
        super().resume_writing()

    def _check_stall(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left < self._unsent:
            self._unsent = left
            self._stall = self.loop.call_later(self.stalled_seconds, self._check_stall)
        else:
            log.info("a client takes nothing and is disconnected")
            self.transport.abort()

    def _expect_head(self) -> None:
        self._patience = self.loop.call_later(self.header_seconds, self._lose_patience)

    def _lose_patience(self) -> None:
        if self._begun:
            self._refuse(TOO_SLOW)
        else:
            self.transport.close()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.max_header_bytes:
            self._fault = TOO_LARGE
            raise _HeadersTooLarge

    def _refuse(self, error: UnbrokenError) -> None:
        """Answer with an error and close; at once where an answer is under way."""
        self._cancel_timers()
        if self.transport.is_closing() or self._refused:
            return
        self._refused = True
        if self.cycle is None or self.cycle.response_complete:
            metrics.ERRORS.labels(error.code).inc()
            body = json.dumps(error.body()).encode()
            status = error.kind.status
            line = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
            head = f"content-type: application/json\r\nx-request-id: {new_request_id()}\r\n"
            self.transport.write(
                f"{line}{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            # What still arrives would make the kernel drop the answer if we closed now.
            self.transport.write_eof()
            self.loop.call_later(LINGER_SECONDS, self.transport.abort)
        elif self.transport.get_write_buffer_size():  # it may never drain
            self.transport.abort()
        else:
            self.transport.close()

    def _cancel_timers(self) -> None:
        for timer in (self._patience, self._stall):
            if timer:
                timer.cancel()


def guarded(settings: GatewaySettings) -> type[GuardedProtocol]:
    """Return the protocol with these limits."""

    class Guarded(GuardedProtocol):
        max_header_bytes = settings.max_header_bytes
        header_seconds = settings.header_timeout_seconds
        stalled_seconds = settings.stalled_client_seconds

    return Guarded
