"""What the tests of `/v1/responses` share: how events are read, and what a whole stream is."""

from __future__ import annotations

import json
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

EVENT = TypeAdapter(ResponseStreamEvent)
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}
NAMES = {"reasoning": "response.reasoning_text", "message": "response.output_text"}


def parse(data: bytes) -> list[dict[str, Any]]:
    """Return a stream's events; each is named by its type, and `[DONE]` comes once, at the end."""
    *frames, rest = data.replace(b": keep-alive\n", b"").decode().split("\n\n")
    assert rest == ""
    assert frames.pop() == "data: [DONE]"
    events = []
    for frame in frames:
        name, line = frame.split("\n")
        events.append(json.loads(line.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def check_whole(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Check that these are the events of one whole Response, in order; return it as it ended."""
    for event in events:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert [e["type"] for e in events if e["type"] in TERMINAL] == [events[-1]["type"]]
    rest, done = events[2:-1], []
    while rest:
        item, rest = _take_item(rest, len(done))
        done.append(item)
    final = events[-1]["response"]
    Response.model_validate(final, strict=True)
    assert final["output"] == done
    names = {(e["response"]["id"], e["response"]["created_at"]) for e in (*events[:2], events[-1])}
    assert len(names) == 1
    assert len({item["id"] for item in done}) == len(done)
    return final


def _take_item(
    events: list[dict[str, Any]], index: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Check the life of the item that begins here; return it as it ended, and the other events."""
    added, part, *rest = events
    item, kind = added["item"], added["item"]["type"]
    assert (added["type"], added["output_index"]) == ("response.output_item.added", index)
    assert (item["status"], item["content"]) == ("in_progress", [])
    assert part["type"] == "response.content_part.added"
    assert part["part"]["text"] == ""
    text = ""
    while rest[0]["type"] == f"{NAMES[kind]}.delta":
        text += rest[0]["delta"]
        _check_place(rest.pop(0), item["id"], index)
    text_done, part_done, item_done, *rest = rest
    assert text_done["type"] == f"{NAMES[kind]}.done"
    assert part_done["type"] == "response.content_part.done"
    assert item_done["type"] == "response.output_item.done"
    for event in (part, text_done, part_done):
        _check_place(event, item["id"], index)
    assert text_done["text"] == part_done["part"]["text"] == text
    ended = item_done["item"]
    assert (item_done["output_index"], ended["id"]) == (index, item["id"])
    assert ended["content"] == [part_done["part"]]
    assert ended["status"] in ("completed", "incomplete")
    return ended, rest


def _check_place(event: dict[str, Any], item_id: str, index: int) -> None:
    place = event["item_id"], event["output_index"], event["content_index"]
    assert place == (item_id, index, 0)


def text_of(response: dict[str, Any], kind: str = "message") -> str:
    """Return the text of a Response's items of one kind."""
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == kind
        for part in item["content"]
    )


def without_names(response: dict[str, Any]) -> dict[str, Any]:
    """Return a Response without what tells it from another one to the same request.

    What it could reuse of its prompt depends on where it ran, and after what.
    """
    output = [{**item, "id": ""} for item in response["output"]]
    usage = {**(response["usage"] or {}), "input_tokens_details": None}
    return {**response, "id": "", "created_at": 0, "output": output, "usage": usage}
