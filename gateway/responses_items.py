"""The items of a Response's output, and the events that tell of one while it is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from gateway.render import call_identity, scores_json
from shared.protocol import CallDelta, Delta, ScoredDelta

if TYPE_CHECKING:
    from collections.abc import Iterator

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ItemEvent = tuple[str, dict[str, Any]]
"""A type, and what the event says beside its type and number."""


class Item(ABC):
    """An output item that is being written.

    Args:
        item_id: its id.
        index: its place in the output.
    """

    def __init__(self, item_id: str, index: int) -> None:
        self.id, self.index = item_id, index
        self.texts: list[str] = []

    @property
    def text(self) -> str:
        """What was written so far."""
        return "".join(self.texts)

    @property
    def added(self) -> ItemEvent:
        """The event that begins it."""
        return "response.output_item.added", {
            "output_index": self.index,
            "item": self.json("in_progress", empty=True),
        }

    def done(self, status: ItemStatus) -> ItemEvent:
        """Return the event that ends it."""
        return "response.output_item.done", {"output_index": self.index, "item": self.json(status)}

    @abstractmethod
    def takes(self, event: Delta | CallDelta) -> bool:
        """Tell whether a delta belongs to it."""

    @abstractmethod
    def opening(self) -> Iterator[ItemEvent]:
        """Yield the events before its first text."""

    @abstractmethod
    def delta(self, event: Any) -> ItemEvent:
        """Return the event for more text, of a delta that it `takes`."""

    @abstractmethod
    def closing(self, status: ItemStatus) -> Iterator[ItemEvent]:
        """Yield the events behind its last text."""

    @abstractmethod
    def json(self, status: ItemStatus, *, empty: bool = False) -> dict[str, Any]:
        """Return the item as it stands, or without its text."""


class TextItem(Item):
    """A reasoning or a message, with one part of text."""

    def __init__(self, event: Delta, response_id: str, index: int) -> None:
        self.channel = event.channel
        self.is_reasoning = event.channel == "reasoning"
        self.scores: list[dict[str, Any]] = []
        item_id = f"{'rs' if self.is_reasoning else 'msg'}_{response_id.removeprefix('resp_')}"
        # More than one item of a kind: each has an id of its own.
        super().__init__(item_id + (f"_{index}" if index > 1 else ""), index)

    def takes(self, event: Delta | CallDelta) -> bool:
        """Tell whether a delta belongs to it: a text of its channel."""
        return isinstance(event, Delta) and event.channel == self.channel

    def opening(self) -> Iterator[ItemEvent]:
        """Yield the events before its first text."""
        yield self.added
        yield "response.content_part.added", {**self._place, "part": self._part("")}

    def delta(self, event: Delta) -> ItemEvent:
        """Return the event for more text."""
        self.texts.append(event.text)
        scores = event.scores if isinstance(event, ScoredDelta) and not self.is_reasoning else ()
        new = [scores_json(one) for one in scores]
        self.scores += new
        return f"{self._event}.delta", {**self._place, "delta": event.text, **self._more(new)}

    def closing(self, status: ItemStatus) -> Iterator[ItemEvent]:
        """Yield the events behind its last text."""
        text = self.text
        yield f"{self._event}.done", {**self._place, "text": text, **self._more(self.scores)}
        yield "response.content_part.done", {**self._place, "part": self._part(text)}
        yield self.done(status)

    def json(self, status: ItemStatus, *, empty: bool = False) -> dict[str, Any]:
        """Return the item as it stands, or without its part."""
        head: dict[str, Any]
        if self.is_reasoning:
            head = {"id": self.id, "type": "reasoning", "status": status, "summary": []}
        else:
            head = {"id": self.id, "type": "message", "status": status, "role": "assistant"}
        return {**head, "content": [] if empty else [self._part(self.text)]}

    @property
    def _event(self) -> str:
        """How the types of its text's events begin."""
        return "response.reasoning_text" if self.is_reasoning else "response.output_text"

    @property
    def _place(self) -> dict[str, Any]:
        """What its text's events say of where they belong."""
        return {"item_id": self.id, "output_index": self.index, "content_index": 0}

    def _more(self, scores: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the text's events say beside the text; of its tokens no bytes, as OpenAI."""
        return {} if self.is_reasoning else {"logprobs": [_without_bytes(one) for one in scores]}

    def _part(self, text: str) -> dict[str, Any]:
        """Return its only content part."""
        if self.is_reasoning:
            return {"type": "reasoning_text", "text": text}
        scores = self.scores if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}


class CallItem(Item):
    """A call of a function, whose text is its arguments."""

    def __init__(self, event: CallDelta, response_id: str, index: int) -> None:
        super().__init__(f"fc_{response_id.removeprefix('resp_')}_{index}", index)
        self.call, self.name = event.call, event.name
        self.call_id = call_identity(response_id, event.choice, event.call)

    def takes(self, event: Delta | CallDelta) -> bool:
        """Tell whether a delta belongs to it; one without text belongs to any item."""
        if isinstance(event, Delta):
            return not event.text
        return event.call == self.call

    def opening(self) -> Iterator[ItemEvent]:
        """Yield the event before its arguments."""
        yield self.added

    def delta(self, event: CallDelta | Delta) -> ItemEvent:
        """Return the event for more of its arguments; log probabilities of calls are not told."""
        text = event.arguments if isinstance(event, CallDelta) else event.text
        self.texts.append(text)
        return "response.function_call_arguments.delta", {**self._place, "delta": text}

    def closing(self, status: ItemStatus) -> Iterator[ItemEvent]:
        """Yield the events behind its arguments."""
        end = {**self._place, "name": self.name, "arguments": self.text}
        yield "response.function_call_arguments.done", end
        yield self.done(status)

    def json(self, status: ItemStatus, *, empty: bool = False) -> dict[str, Any]:
        """Return the item as it stands, or without its arguments."""
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self.call_id,
            "name": self.name,
            "arguments": "" if empty else self.text,
        }

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}


def _without_bytes(scores: dict[str, Any]) -> dict[str, Any]:
    top = [{"token": one["token"], "logprob": one["logprob"]} for one in scores["top_logprobs"]]
    return {"token": scores["token"], "logprob": scores["logprob"], "top_logprobs": top}
