"""How a log becomes the events of a Response, and a body a request."""

from __future__ import annotations

import itertools
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.responses_parse import parse_response
from gateway.responses_render import ResponseBuilder, ResponseFrames, event_frame
from gateway.sse import DONE
from shared.errors import KINDS, UnbrokenError
from shared.protocol import (
    CallDelta,
    Delta,
    Failed,
    Finished,
    MediaPart,
    ResponseParams,
    Scored,
    ScoredDelta,
    Started,
    TextPart,
    TokenScores,
    Usage,
    encode_event,
)
from shared.session_log import SessionRecord
from shared.settings import GatewaySettings
from tests.responses_kit import TERMINAL, check_whole, parse, text_of

ID = "resp_0123456789abcdef"
RECORD = SessionRecord(
    owner="", digest="", model="org/tiny", fingerprint="fp", choices=1, status="running", last=0,
    created=7, enqueued=7.5, response=ResponseParams(background=True, metadata={"a": "b"}),
)  # fmt: skip
SETTINGS = GatewaySettings(_env_file=None)

TEXTS = st.lists(st.tuples(st.sampled_from(["reasoning", "content"]), st.text(max_size=9)))
ENDS = st.sampled_from(
    [
        Finished(("stop",), Usage(3, 4, 2, 1)),
        Finished(("length",), Usage(3, 4, 2, 1)),
        Finished((), Usage(), "requested"),
        Finished(("stop",), Usage(3, 4), "abandoned"),
        Failed("invalid_media", "It is broken.", "input[0]"),
    ]
)


def log_of(texts, end):
    deltas = [Delta(0, (n,), text, channel) for n, (channel, text) in enumerate(texts)]
    return [encode_event(event) for event in (Started(1), *deltas, end)]


def frames(starting_after=-1, record=RECORD):
    return ResponseFrames(ResponseBuilder(ID, record), starting_after)


def whole(log):
    data, ended = frames().render(0, log)
    assert ended
    return data


def events_of(texts, end):
    return parse(whole(log_of(texts, end)))


@settings(deadline=None, max_examples=40)
@given(texts=TEXTS, end=ENDS)
def test_any_log_gives_a_whole_response(texts, end):
    """Whatever order thoughts and answers come in, each item has its full life and all the text."""
    final = check_whole(events_of(texts, end))
    for channel, kind in (("reasoning", "reasoning"), ("content", "message")):
        assert text_of(final, kind) == "".join(text for c, text in texts if c == channel)


@settings(deadline=None)
@given(texts=TEXTS, end=ENDS, cuts=st.lists(st.integers(0, 12)), data=st.data())
def test_numbers_and_bytes_do_not_depend_on_how_the_log_is_read(texts, end, cuts, data):
    """Read in any pieces, from any number on, events are those of a stream read in one piece."""
    log = log_of(texts, end)
    events = [event_frame(e) for e in parse(whole(log))]
    after = data.draw(st.integers(-1, len(events) - 1))
    reader, got = frames(after), b""
    places = sorted({0, *(cut for cut in cuts if cut < len(log)), len(log)})
    for first, until in itertools.pairwise(places):
        part, ended = reader.render(first, log[first:until])
        got += part
    assert ended
    assert got == b"".join([*events[after + 1 :], DONE])


def test_an_entry_given_twice_is_rendered_once():
    """Pages that overlap, or leave a gap, do not change what comes out."""
    log = log_of([("content", "a"), ("content", "b")], Finished(("stop",), Usage()))
    reader = frames()
    got = reader.render(0, log[:2])[0] + reader.render(3, log[3:])[0] + reader.render(1, log[1:])[0]
    assert got == whole(log)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["reasoning", "content"]), max_size=20))
def test_each_entry_has_a_number_and_the_first_has_two(channels):
    """A number up to the log's last index + 1 exists for certain, without looking."""
    builder = ResponseBuilder(ID, RECORD)
    for index, event in enumerate([Started(1), *(Delta(0, (1,), "x", c) for c in channels)]):
        builder.take(event)
        assert builder.number >= index + 2


def test_a_thought_and_an_answer_are_two_items_in_the_documented_order():
    """The whole order of events of a thinking model's answer, one by one."""
    texts = [("reasoning", "Let "), ("reasoning", "me."), ("content", "42")]
    events = events_of(texts, Finished(("stop",), Usage(3, 4, 2)))
    text = ["output_item.added", "content_part.added"]
    done = ["content_part.done", "output_item.done"]
    thought = [*text, *["reasoning_text.delta"] * 2, "reasoning_text.done", *done]
    answer = [*text, "output_text.delta", "output_text.done", *done]
    names = ["created", "in_progress", *thought, *answer, "completed"]
    assert [e["type"] for e in events] == [f"response.{name}" for name in names]
    assert events[2]["item"] == {
        "id": "rs_0123456789abcdef", "type": "reasoning", "status": "in_progress",
        "summary": [], "content": [],
    }  # fmt: skip
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert events[10]["part"] == part
    assert events[11]["logprobs"] == []
    assert [e["response"]["status"] for e in (*events[:2], events[-1])] == [
        "queued", "in_progress", "completed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("end", "kind", "status", "item"),
    [
        (Finished(("stop",), Usage()), "completed", "completed", "completed"),
        (Finished(("length",), Usage()), "incomplete", "incomplete", "incomplete"),
        (Finished(("stop",), Usage(), "requested"), "incomplete", "cancelled", "incomplete"),
        (Failed("generation_failed", "x"), "failed", "failed", "incomplete"),
    ],
)
def test_how_a_response_ends(end, kind, status, item):
    """Each end has its one last event, its status, and the status of the item it cut off."""
    final = check_whole(events := events_of([("content", "a")], end))
    assert events[-1]["type"] == f"response.{kind}"
    assert (final["status"], final["output"][0]["status"]) == (status, item)
    why = {"reason": "max_output_tokens"} if status == "incomplete" else None
    assert final["incomplete_details"] == why
    assert (final["error"] is not None) == (status == "failed")
    told = {"status": "cancelled", "reason": "requested"} if status == "cancelled" else None
    assert final.get("session") == told


@pytest.mark.parametrize("code", [*KINDS])
def test_every_failure_has_a_code_that_the_sdk_knows(code):
    """Strict validation accepts the error of a Response, whatever it failed with."""
    final = check_whole(events_of([], Failed(code, "why", "input")))
    assert final["error"]["message"] == "why"
    assert final["error"]["param"] == "input"


def test_usage_has_the_names_of_the_responses_api():
    """Counts of prompt, answer, thoughts and cache stand where the SDK looks for them."""
    usage = check_whole(events_of([], Finished(("stop",), Usage(3, 4, 2, 1))))["usage"]
    assert usage == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 7,
    }


def test_a_stream_that_cannot_go_on_ends_with_an_error_event():
    """It is numbered behind what the client has, and bears the contract's error object."""
    reader = frames(5)
    reader.render(0, log_of([], Finished(("stop",), Usage()))[:1])
    [event] = parse(reader.render_error(UnbrokenError("events_expired", "Gone.")))
    assert (event["type"], event["sequence_number"]) == ("error", 6)
    assert event["error"] == UnbrokenError("events_expired", "Gone.").body()["error"]
    assert TERMINAL.isdisjoint([event["type"]])


def parsed(**body):
    return parse_response({"input": "Hi", **body}, SETTINGS)


def test_a_string_and_instructions_become_messages():
    """Instructions stand first, as the system's; a plain input is the user's."""
    system, user = parsed(instructions="Be brief.").generation.messages
    assert (system.role, system.parts) == ("system", (TextPart("Be brief."),))
    assert (user.role, user.parts) == ("user", (TextPart("Hi"),))


def test_items_become_messages():
    """Text, images, earlier answers and thoughts, as a client sends a conversation back."""
    image = {"type": "input_image", "image_url": "https://a.b/c.png", "detail": "auto"}
    content = [{"type": "input_text", "text": "What?"}, image]
    answer = {"type": "output_text", "text": "A cat.", "annotations": []}
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": content},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [answer]},
        {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    messages = parsed(input=items).generation.messages
    assert [m.role for m in messages] == ["system", "user", "assistant", "user"]
    assert isinstance(messages[1].parts[1], MediaPart)
    assert messages[2].parts == (TextPart("A cat."),)


def scored(text, channel="content"):
    """Return a delta with scores for each of its letters, and one letter that is likelier."""
    scores = tuple(TokenScores(Scored(-1.5, c), (Scored(-0.5, (226,)),)) for c in text)
    return ScoredDelta(0, (1,), text, channel, scores)


def test_log_probabilities_stand_with_the_answer_s_text():
    """Deltas have theirs, the end has all, with bytes in the item alone; thoughts have none."""
    log = [Started(1), scored("hm", "reasoning"), scored("ab"), scored("é")]
    events = parse(whole([encode_event(e) for e in (*log, Finished(("stop",), Usage()))]))
    thought, answer = check_whole(events)["output"]
    assert "logprobs" not in thought["content"][0]
    told = answer["content"][0]["logprobs"]
    assert [entry["token"] for entry in told] == ["a", "b", "é"]
    assert told[2] == {
        "token": "é", "bytes": [195, 169], "logprob": -1.5,
        "top_logprobs": [{"token": "\ufffd", "bytes": [226], "logprob": -0.5}],
    }  # fmt: skip
    deltas = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    assert [len(entries) for entries in deltas] == [2, 1]
    [done] = [e["logprobs"] for e in events if e["type"] == "response.output_text.done"]
    assert done == deltas[0] + deltas[1]
    top = [{"token": "\ufffd", "logprob": -0.5}]
    assert done[2] == {"token": "é", "logprob": -1.5, "top_logprobs": top}


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, (None, 0)),
        ({"include": ["message.output_text.logprobs"]}, (0, 0)),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, (3, 3)),
        ({"include": ["reasoning.encrypted_content"], "top_logprobs": 3}, (None, 3)),
    ],
)
def test_log_probabilities_are_told_where_they_are_included(fields, asked):
    """`top_logprobs` alone is repeated, and has nothing to show itself in."""
    request = parsed(**fields)
    assert (request.generation.sampling.logprobs, request.response.top_logprobs) == asked


FUNCTION = {"type": "function", "name": "look", "parameters": {"type": "object"}}


def test_functions_formats_and_efforts_are_read():
    """They mean what the same fields of a chat mean, and are kept to be shown."""
    form = {"type": "json_schema", "name": "it", "schema": {"type": "integer"}, "strict": True}
    asked = parsed(
        tools=[{**FUNCTION, "strict": True}],
        tool_choice={"type": "function", "name": "look"},
        text={"format": form},
        reasoning={"effort": "low"},
    )
    tools = asked.generation.tools
    assert (tools.only, tools.choice, tools.functions[0].name) == ("look", "required", "look")
    assert json.loads(asked.generation.schema)["type"] == "integer"
    assert asked.generation.sampling.thinking_budget == 1024
    assert json.loads(asked.response.format) == form
    assert tools.functions[0].strict
    [shown] = json.loads(asked.response.tools)
    assert (shown["name"], shown["strict"]) == ("look", True)


def test_only_known_fields_of_formats_and_choices_are_kept():
    """What a Response repeats of its request is what was checked, and no more."""
    deep = []
    for _ in range(5000):
        deep = [deep]
    form = {"type": "json_schema", "name": "it", "schema": {"type": "integer"}}
    choice = {"type": "function", "name": "look"}
    asked = parsed(
        tools=[{**FUNCTION, "junk": deep}],
        tool_choice={**choice, "junk": deep},
        text={"format": {**form, "junk": deep}},
    )
    assert json.loads(asked.response.format) == form
    assert json.loads(asked.response.tool_choice) == choice
    assert "junk" not in asked.response.tools
    plain = parsed(text={"format": {"type": "text", "junk": deep}})
    assert json.loads(plain.response.format) == {"type": "text"}


def test_calls_of_one_turn_become_one_message():
    """Calls behind an answer belong to it; their outputs are messages of their own."""
    items = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "I do."},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sea"},
        {"type": "function_call_output", "call_id": "c2", "output": "sky"},
    ]
    messages = parsed(input=items, tools=[FUNCTION]).generation.messages
    assert [m.role for m in messages] == ["user", "assistant", "tool", "tool"]
    assert [call.id for call in messages[1].tool_calls] == ["c1", "c2"]
    assert messages[3].tool_call_id == "c2"


def test_a_call_is_an_item_of_its_own():
    """Its arguments come in events between those that begin and end it; the end adds no item."""
    events = [
        Started(1),
        Delta(0, (1,), "I look."),
        CallDelta(0, (2,), 0, '{"at"', "look"),
        CallDelta(0, (3,), 0, ": 1}"),
        CallDelta(0, (4,), 1, "{}", "now"),
        Delta(0, (5,), ""),
        Finished(("tool_calls",), Usage(7, 5)),
    ]
    builder = ResponseBuilder("resp_1", RECORD)
    made = [one for event in events for one in builder.take(event)]
    assert [one["sequence_number"] for one in made] == list(range(len(made)))
    message, look, now = builder.final["output"]
    assert (message["type"], look["name"], look["arguments"]) == ("message", "look", '{"at": 1}')
    assert (now["name"], now["arguments"], now["status"]) == ("now", "{}", "completed")
    assert look["call_id"] != now["call_id"]
    deltas = [e["delta"] for e in made if e["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == '{"at": 1}{}'


BAD = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True, "store": False}, "background"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "f g"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"reasoning": "low"}, "reasoning"),
    ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {"$ref": "#"}}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {}, "strict": "yes"}}},
     "text.format.strict"),
    ({"text": {"format": {"type": "json_schema", "schema": {}, "description": "x" * 600_000}}},
     "text.format.description"),
    ({"truncation": "auto"}, "truncation"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": "2"}, "top_logprobs"),
    ({"include": "all"}, "include"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"input": []}, "input"),
    ({"input": ""}, "input"),
    ({"input": 3}, "input"),
    ({"input": [{"type": "reasoning", "id": "rs_1"}]}, "input"),
    ({"input": [{"type": "item_reference", "id": "m"}]}, "input[0].type"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].content"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "custom_tool_call", "call_id": "c"}]}, "input[0].type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": ["user"], "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
     "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
     "input[0].content[0].image_url"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 2**31}, "max_output_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"instructions": ["x"]}, "instructions"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"background": "yes"}, "background"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), BAD, ids=[json.dumps(b)[:50] for b, _ in BAD])
def test_what_cannot_be_honoured_is_refused_by_name(body, param):
    """A 400 names the field as the client wrote it."""
    with pytest.raises(UnbrokenError) as raised:
        parsed(**body)
    assert raised.value.kind.status == 400
    assert raised.value.param == param


def test_what_changes_nothing_is_accepted():
    """Fields that ask for what is so anyway, or for what nobody would miss, are let through."""
    plain = parsed()
    idle = parsed(
        tools=[], tool_choice="auto", truncation="disabled", text={"format": {"type": "text"}},
        reasoning={"summary": "auto"}, include=["reasoning.encrypted_content"], user="u",
        service_tier="auto", prompt_cache_key="k", max_tool_calls=3, previous_response_id=None,
    )  # fmt: skip
    assert idle == plain


def test_the_digest_tells_requests_apart_by_all_that_can_be_seen_later():
    """What the record keeps is part of a request's identity; how it is sent is not."""
    digest = parsed().digest
    assert parsed(stream=True).digest == digest
    for other in ({"metadata": {"a": "b"}}, {"background": True}, {"seed": 1}, {"temperature": 0}):
        assert parsed(**other).digest != digest


def test_an_old_record_is_no_response():
    """A record of an earlier version, or a chat's, has no params."""
    old = msgspec.json.decode(msgspec.json.encode(RECORD))
    del old["response"]
    assert msgspec.convert(old, SessionRecord).response is None
