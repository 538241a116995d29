"""Renders a session's events as those of the Responses API, and as one Response.

Everything follows from the log and the session's record, the sequence numbers included, so any
gateway gives the same bytes for the same event at any time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from gateway import meter
from gateway.render import failure
from gateway.responses_items import CallItem, Item, ItemStatus, TextItem
from gateway.sse import DONE
from shared import metrics
from shared.errors import UnbrokenError
from shared.protocol import CallDelta, Delta, Failed, Finished, Started, decode_event

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shared.protocol import Event, Usage
    from shared.session_log import Entry, SessionRecord

ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "cancelled", "failed"]
ResponseEvent = dict[str, Any]

_encode = msgspec.json.Encoder().encode

ERROR_CODES = {
    "invalid_media": "invalid_image",
    "media_changed": "invalid_image",
    "media_unreachable": "failed_to_download_image",
    "queue_full": "rate_limit_exceeded",
}
"""The Responses API's own codes, where one fits better than `invalid_prompt`, `server_error`."""


NAMES = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens"}
"""What a chat's parameters are called in a request for a Response."""


def in_its_names(error: UnbrokenError) -> UnbrokenError:
    """Return an error about a parameter under the name that a Response's caller gave it.

    A place within the messages is left out: items of the input need not become one message each.
    """
    field = (error.param or "").partition("[")[0]
    name = NAMES.get(field)
    if name is None:
        return error
    message = error.message.replace(f"'{field}'", f"'{name}'")
    return UnbrokenError(error.code, message, name, error.retry_after)


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return the `usage` object of a Response."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def error_json(error: UnbrokenError) -> dict[str, Any]:
    """Return the `error` object of a failed Response."""
    other = "invalid_prompt" if error.kind.status < 500 else "server_error"
    return {
        "code": ERROR_CODES.get(error.code, other),
        "message": error.message,
        "param": error.param,
        "type": error.kind.type,
    }


class ResponseBuilder:
    """Takes a session's events in order, from the first on, and makes those of its Response.

    Args:
        session_id: also the response's id.
        record: gives `created`, `model`, and what the request asked for.
    """

    def __init__(self, session_id: str, record: SessionRecord) -> None:
        assert record.response is not None  # noqa: S101 - the routes look for it first
        self.id, self._record, self._params = session_id, record, record.response
        self._output: list[dict[str, Any]] = []  # the finished items
        self._item: Item | None = None
        self.number = 0
        """The sequence number that comes next."""
        self.index = -1
        """The last event taken."""
        self.final: dict[str, Any] | None = None
        """The Response as it ended."""
        self.error: UnbrokenError | None = None
        """What it failed with."""

    def take(self, event: Event) -> list[ResponseEvent]:
        """Take the next event; returns the one or more that it becomes."""
        self.index += 1
        if isinstance(event, (Delta, CallDelta)):
            return self._add(event)
        if isinstance(event, Started):
            queued = self._params.background
            return [
                self._event("response.created", self.response("queued" if queued else None)),
                self._event("response.in_progress", self.response()),
            ]
        if isinstance(event, Failed):
            self.error = in_its_names(failure(event))
            return [*self._close("incomplete"), self._end("failed", error=error_json(self.error))]
        return self._finish(event)

    def take_all(self, entries: Iterable[Entry]) -> None:
        """Take entries of the log for what they add to the Response."""
        for entry in entries:
            self.take(decode_event(entry.data))

    def response(self, status: ResponseStatus | None = None) -> dict[str, Any]:
        """Return the Response as it stands: by default `in_progress`, with what there is so far."""
        open_items = [self._item.json("in_progress")] if self._item else []
        return self._response(status or "in_progress", [*self._output, *open_items])

    def _finish(self, event: Finished) -> list[ResponseEvent]:
        usage = usage_json(event.usage)
        if event.cancelled:
            session = {"status": "cancelled", "reason": event.cancelled}
            return [
                *self._close("incomplete"),
                self._end("cancelled", usage=usage, session=session),
            ]
        if "length" in event.reasons:
            why = {"reason": "max_output_tokens"}
            return [
                *self._close("incomplete"),
                self._end("incomplete", usage=usage, incomplete_details=why),
            ]
        return [*self._close("completed"), self._end("completed", usage=usage)]

    def _add(self, event: Delta | CallDelta) -> list[ResponseEvent]:
        """Add to the open item, or begin one where the text is not for it."""
        events: list[ResponseEvent] = []
        item = self._item
        if item is None or not item.takes(event):
            events += self._close("completed")
            place = len(self._output)
            kind = CallItem if isinstance(event, CallDelta) else TextItem
            self._item = item = kind(event, self.id, place)  # type: ignore[arg-type]
            events += [self._number(*one) for one in item.opening()]
        return [*events, self._number(*item.delta(event))]

    def _close(self, status: ItemStatus) -> list[ResponseEvent]:
        """End the open item, if there is one."""
        if self._item is None:
            return []
        item, self._item = self._item, None
        self._output.append(item.json(status))
        return [self._number(*one) for one in item.closing(status)]

    def _end(self, status: ResponseStatus, **fields: Any) -> ResponseEvent:
        self.final = {**self._response(status, self._output), **fields}
        # The SDKs know no `response.cancelled`; the Response inside says what happened.
        kind = "incomplete" if status == "cancelled" else status
        return self._event(f"response.{kind}", self.final)

    def _event(self, kind: str, response: dict[str, Any]) -> ResponseEvent:
        return self._number(kind, {"response": response})

    def _number(self, kind: str, body: dict[str, Any]) -> ResponseEvent:
        self.number += 1
        return {"type": kind, "sequence_number": self.number - 1, **body}

    def _response(self, status: ResponseStatus, output: Sequence[dict[str, Any]]) -> dict[str, Any]:
        params = self._params
        choice = params.tool_choice
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._record.created,
            "completed_at": None,
            "status": status,
            "background": params.background,
            "store": params.store,
            "model": self._record.model,
            "output": list(output),
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "metadata": params.metadata,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "frequency_penalty": params.frequency_penalty,
            "presence_penalty": params.presence_penalty,
            "max_output_tokens": params.max_output_tokens,
            "parallel_tool_calls": params.parallel_tool_calls,
            "tool_choice": msgspec.json.decode(choice) if choice.startswith("{") else choice,
            "tools": msgspec.json.decode(params.tools),
            "text": {"format": msgspec.json.decode(params.format)},
            "reasoning": {"effort": params.effort or None, "summary": None},
            "truncation": "disabled",
            "top_logprobs": params.top_logprobs,
            "instructions": None,
            "previous_response_id": None,
            "max_tool_calls": None,
            "service_tier": "default",
            "prompt_cache_key": None,
            "safety_identifier": None,
            "user": None,
        }


class ResponseFrames:
    """Renders the entries of one session's log as server-sent events, from the first entry on.

    A later event needs what stood in the earlier ones, so each client has frames of its own.

    Args:
        builder: at the beginning of the log.
        starting_after: the sequence number that the client has reached; -1 for none.
    """

    def __init__(self, builder: ResponseBuilder, starting_after: int) -> None:
        self._builder, self._after = builder, starting_after

    @property
    def identity(self) -> ResponseFrames:
        """These frames alone: the place they have reached is one client's."""
        return self

    def render(self, first: int, events: Sequence[bytes], seen: int = -1) -> tuple[bytes, bool]:
        """Return the frames of the entries from index `first` on, and whether the session ends.

        Entries that it had before are passed over, as are those behind a gap. Those up to index
        `seen` may give no frames: that depends on their sequence numbers.

        Raises:
            msgspec.ValidationError: an event is not of this version.
        """
        del seen
        meter.delivered(self._builder.id, first, len(events))
        out: list[bytes] = []
        for index, data in enumerate(events, first):
            if index != self._builder.index + 1:
                continue
            taken = self._builder.take(decode_event(data))
            out += [event_frame(e) for e in taken if e["sequence_number"] > self._after]
        ended = self._builder.final is not None
        return b"".join([*out, DONE] if ended else out), ended

    def render_error(self, error: UnbrokenError) -> bytes:
        """Return how a stream ends that cannot go on: an error, which the SDKs raise."""
        metrics.ERRORS.labels(error.code).inc()
        number = max(self._builder.number, self._after + 1)
        body = error.body()["error"]
        event = {**body, "type": "error", "sequence_number": number, "error": body}
        return event_frame(event) + DONE


def event_frame(event: ResponseEvent) -> bytes:
    """Return an event as it is sent: its type is also the event's name."""
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), _encode(event))
