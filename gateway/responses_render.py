"""Renders a session's events as those of the Responses API, and as one Response.

Everything follows from the log and the session's record, the sequence numbers included, so any
gateway gives the same bytes for the same event at any time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from gateway import meter
from gateway.render import failure
from gateway.sse import DONE
from shared import metrics
from shared.protocol import Delta, Failed, Finished, Started, decode_event

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shared.errors import UnbrokenError
    from shared.protocol import Channel, Event, Usage
    from shared.session_log import Entry, SessionRecord

ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "cancelled", "failed"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseEvent = dict[str, Any]

_encode = msgspec.json.Encoder().encode

ERROR_CODES = {
    "invalid_media": "invalid_image",
    "media_changed": "invalid_image",
    "media_unreachable": "failed_to_download_image",
    "queue_full": "rate_limit_exceeded",
}
"""The Responses API's own codes, where one fits better than `invalid_prompt`, `server_error`."""


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


class Item:
    """An output item that is being written: a reasoning or a message, with one part of text."""

    def __init__(self, channel: Channel, response_id: str, index: int) -> None:
        self.channel, self.index = channel, index
        self.is_reasoning = channel == "reasoning"
        self.id = f"{'rs' if self.is_reasoning else 'msg'}_{response_id.removeprefix('resp_')}"
        if index > 1:  # of more than one item of a kind
            self.id += f"_{index}"
        self.texts: list[str] = []

    @property
    def event(self) -> str:
        """How the types of its text's events begin."""
        return "response.reasoning_text" if self.is_reasoning else "response.output_text"

    @property
    def place(self) -> dict[str, Any]:
        """What its text's events say of where they belong."""
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}

    @property
    def more(self) -> dict[str, Any]:
        """What the text's events say beside the text."""
        return {} if self.is_reasoning else {"logprobs": []}

    def part(self, text: str) -> dict[str, Any]:
        """Return its only content part."""
        if self.is_reasoning:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def json(self, status: ItemStatus, *content: dict[str, Any]) -> dict[str, Any]:
        """Return the item."""
        head: dict[str, Any]
        if self.is_reasoning:
            head = {"id": self.id, "type": "reasoning", "status": status, "summary": []}
        else:
            head = {"id": self.id, "type": "message", "status": status, "role": "assistant"}
        return {**head, "content": [*content]}


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
        if isinstance(event, Delta):
            return [*self._turn_to(event.channel), self._delta(event)]
        if isinstance(event, Started):
            queued = self._params.background
            return [
                self._event("response.created", self.response("queued" if queued else None)),
                self._event("response.in_progress", self.response()),
            ]
        if isinstance(event, Failed):
            self.error = failure(event)
            return [*self._close("incomplete"), self._end("failed", error=error_json(self.error))]
        return self._finish(event)

    def take_all(self, entries: Iterable[Entry]) -> None:
        """Take entries of the log for what they add to the Response."""
        for entry in entries:
            self.take(decode_event(entry.data))

    def response(self, status: ResponseStatus | None = None) -> dict[str, Any]:
        """Return the Response as it stands: by default `in_progress`, with what there is so far."""
        open_items = []
        if self._item:
            part = self._item.part("".join(self._item.texts))
            open_items.append(self._item.json("in_progress", part))
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

    def _turn_to(self, channel: Channel) -> list[ResponseEvent]:
        """Begin an item where the text is not for the one that is open."""
        if self._item and self._item.channel == channel:
            return []
        closing = self._close("completed")
        self._item = item = Item(channel, self.id, len(self._output))
        added = {"output_index": item.index, "item": item.json("in_progress")}
        return [
            *closing,
            self._number("response.output_item.added", added),
            self._number("response.content_part.added", {**item.place, "part": item.part("")}),
        ]

    def _delta(self, event: Delta) -> ResponseEvent:
        assert self._item is not None  # noqa: S101 - `_turn_to` has opened it
        self._item.texts.append(event.text)
        body = {**self._item.place, "delta": event.text, **self._item.more}
        return self._number(f"{self._item.event}.delta", body)

    def _close(self, status: ItemStatus) -> list[ResponseEvent]:
        """End the open item, if there is one."""
        if self._item is None:
            return []
        item, self._item = self._item, None
        text = "".join(item.texts)
        done = item.json(status, item.part(text))
        self._output.append(done)
        return [
            self._number(f"{item.event}.done", {**item.place, "text": text, **item.more}),
            self._number("response.content_part.done", {**item.place, "part": item.part(text)}),
            self._number("response.output_item.done", {"output_index": item.index, "item": done}),
        ]

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
            "tool_choice": params.tool_choice,
            "tools": [],
            "text": {"format": {"type": "text"}},
            "reasoning": {"effort": None, "summary": None},
            "truncation": "disabled",
            "top_logprobs": 0,
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
