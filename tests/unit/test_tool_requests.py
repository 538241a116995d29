"""Functions, formats and efforts in requests, and calls in answers: the gateway's part."""

from __future__ import annotations

import itertools
import json
import time
import timeit

import msgspec
import pytest

from gateway.json_schema import MAX_WIDTH
from gateway.openai import parse_chat
from gateway.render import ChunkRenderer, CompletionBuilder, call_identity
from gateway.sse import Frames
from shared.errors import UnbrokenError
from shared.protocol import (
    CallDelta,
    Delta,
    Finished,
    Started,
    Usage,
    decode_event,
    decode_request,
    encode_event,
    encode_request,
)
from shared.session_log import SessionRecord
from shared.settings import GatewaySettings

SETTINGS = GatewaySettings(_env_file=None)
ASK = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
RECORD = SessionRecord(
    owner="", digest="", model="org/tiny", fingerprint="fp", choices=2, status="running", last=0,
    created=7, enqueued=7.5,
)  # fmt: skip


def tool(name="look", **fields):
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, **fields}}


def form(schema, **fields):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


def chat(**fields):
    return parse_chat({"messages": ASK, **fields}, SETTINGS)


def nested(depth):
    schema = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def wide(optional, needed=0):
    names = [f"p{number}" for number in range(optional + needed)]
    return {"type": "object", "properties": {n: {} for n in names}, "required": names[:needed]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [tool(), tool()]}, "tools"),
        ({"tools": [tool(str(n)) for n in range(129)]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("x" * 129)]}, "tools[0].function.name"),
        ({"tools": [tool(description=5)]}, "tools[0].function.description"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
        ({"tools": [tool(parameters=5)]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"properties": {}})]}, "tools[0].function.parameters"),
        (
            {"tools": [tool(parameters={"type": "object", "properties": {"a": nested(100)}})]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "no"}}},
            "tool_choice",
        ),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": form([])}, "response_format.json_schema.schema"),
        ({"response_format": form(nested(100))}, "response_format.json_schema.schema"),
        ({"response_format": form(nested(100_000))}, "response_format.json_schema.schema"),
        (
            {"response_format": form({"enum": list(range(1001))})},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": form({"items": wide(MAX_WIDTH)})},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": form({"description": "x" * 70_000})},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": form({"properties": {"a": {"x-guidance": {"lenient": True}}}})},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": form({"properties": {"a": {"$ref": "http://127.0.0.1/x"}}})},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": form({"x-guidance": {"lenient": True}})},
            "response_format.json_schema.schema",
        ),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"thinking_token_budget": 1, "thinking_budget": 2}, "thinking_token_budget"),
    ],
)
def test_what_cannot_be_read_is_a_400_that_names_it(fields, param):
    """Wrong kinds, unknown names and schemas that are too large are refused by the gateway."""
    with pytest.raises(UnbrokenError) as caught:
        chat(**fields)
    assert (caught.value.kind.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "call",
    [5, {}, {"function": {"name": "f"}}, {"function": {"name": "f", "arguments": 5}}, {"id": 3}],
)
def test_calls_of_earlier_turns_are_checked(call):
    """What is no call of a function is refused by its place."""
    with pytest.raises(UnbrokenError) as caught:
        chat(messages=[*ASK, {"role": "assistant", "tool_calls": [call]}])
    assert caught.value.param.startswith("messages[1].tool_calls[0]")


ENDLESS = [
    {"$ref": "#"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1},
    {"allOf": [{"type": "object"}, {"anyOf": [{"$ref": "#"}]}]},
    {"type": "object", "required": ["x"], "additionalProperties": {"$ref": "#"}},
]
RECURSIVE = [
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 1}, {"type": "null"}]},
    {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
]


def test_only_optional_properties_are_counted():
    """An object with many properties is refused for those that may be left out."""
    assert chat(response_format=form(wide(MAX_WIDTH - 1, 1000))).generation.schema
    assert chat(response_format=form(wide(0, 1500))).generation.schema


def test_recursion_needs_an_end():
    """A schema that contains itself passes if some finite document follows it, else not."""
    for schema in RECURSIVE:
        assert chat(response_format=form(schema)).generation.schema
    for schema in ENDLESS:
        with pytest.raises(UnbrokenError) as caught:
            chat(response_format=form(schema))
        assert "without an end" in caught.value.message


def links(count, last):
    """Return the definitions of a chain of references, in which each needs the next."""
    defs = {
        f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}, "minItems": 1}
        for i in range(count)
    }
    return {**defs, f"a{count}": last}


def test_a_long_way_round_is_no_end():
    """However far the recursion reaches, and in whatever order, none without an end passes."""
    for order in (1, -1):
        defs = dict([*links(300, {"$ref": "#/$defs/b0"}).items()][::order])
        way = {f"b{i}": {"$ref": f"#/$defs/b{i + 1}"} for i in range(200)}
        for last, ends in (({"type": "null"}, True), ({"$ref": "#/$defs/b200"}, False)):
            schema = {"$ref": "#/$defs/a0", "$defs": {**defs, **way, "b200": last}}
            if ends:
                assert chat(response_format=form(schema)).generation.schema
                continue
            with pytest.raises(UnbrokenError, match="without an end"):
                chat(response_format=form(schema))


def test_a_schema_of_any_shape_is_judged_in_time():
    """A chain of references costs as much in the worst order as in the best."""
    times = []
    for order in (1, -1):
        defs = dict([*links(600, {"type": "null"}).items()][::order])
        asked = {"response_format": form({"$ref": "#/$defs/a0", "$defs": defs})}
        runs = timeit.repeat(
            lambda asked=asked: chat(**asked), timer=time.thread_time, number=1, repeat=7
        )
        times.append(min(runs))  # without garbage collection, undisturbed at least once
    assert max(times) < 4 * min(times)
    assert max(times) < 0.5


WIDE = wide(0, 1900)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"parameters": WIDE}, "tools[8].function.parameters"),
        ({"parameters": {"type": "object", "title": "x" * 65_000}}, "tools[8].function.parameters"),
        ({"description": "x" * 65_000}, "tools[8].function.description"),
    ],
)
def test_all_schemas_of_a_request_have_one_bound(fields, param):
    """Each function may be large, but not all of them; the format counts too."""
    few = [tool(str(n), **fields) for n in range(8)]
    assert chat(tools=few).generation.tools
    with pytest.raises(UnbrokenError) as caught:
        chat(tools=[*few, tool("last", **fields)])
    assert (caught.value.code, caught.value.param) == ("invalid_value", param)
    assert "together" in caught.value.message
    with pytest.raises(UnbrokenError) as caught:
        chat(tools=few, response_format=form({**WIDE, "title": "x" * 20_000}))
    assert caught.value.param == "response_format.json_schema.schema"


def test_the_order_of_properties_is_kept_on_the_way_to_the_worker():
    """Prompt and grammar have them as the client wrote them."""
    generation = chat(tools=[tool()], response_format=form(SCHEMA)).generation
    kept = decode_request(encode_request(generation))
    assert kept == generation
    for text in (kept.schema, kept.tools.functions[0].schema):
        assert list(json.loads(text)["properties"]) == ["b", "a"]
    assert list(json.loads(kept.tools.functions[0].definition)["function"]) == [
        "name",
        "description",
        "parameters",
    ]


def test_strict_functions_are_told_to_the_worker():
    """Only `strict: true` is; and it makes another request."""
    plain, strict = chat(tools=[tool(strict=False)]), chat(tools=[tool(strict=True), tool("b")])
    assert [f.strict for f in plain.generation.tools.functions] == [False]
    kept = decode_request(encode_request(strict.generation))
    assert [f.strict for f in kept.tools.functions] == [True, False]
    assert chat(tools=[tool()]).digest == plain.digest != chat(tools=[tool(strict=True)]).digest


def test_choices_mean_what_they_say():
    """`none` hides the functions, `required` and a name demand them, and the digest tells."""
    assert chat(tools=[tool()], tool_choice="none").generation.tools is None
    named = {"type": "function", "function": {"name": "look"}}
    wanted = [("auto", None), ("required", None), ("required", "look")]
    digests = set()
    for choice, want in zip(("auto", "required", named), wanted, strict=True):
        asked = chat(tools=[tool(), tool("other")], tool_choice=choice)
        digests.add(asked.digest)
        assert (asked.generation.tools.choice, asked.generation.tools.only) == want
    assert len(digests) == 3
    assert not chat(tools=[tool()], parallel_tool_calls=False).generation.tools.parallel


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, 0),
        ({"reasoning_effort": "low"}, 1024),
        ({"reasoning_effort": "high"}, None),
        ({"reasoning_effort": "low", "thinking_token_budget": 5}, 5),
        ({"thinking_budget": 0}, 0),
    ],
)
def test_efforts_are_budgets(fields, budget):
    """An effort stands for a number of tokens, unless the request gives one."""
    generation = chat(**fields).generation
    assert generation.sampling.thinking_budget == budget
    assert generation.effort == fields.get("reasoning_effort", "")


EVENTS = [
    Started(2),
    Delta(0, (1,), "hm", "reasoning"),
    CallDelta(0, (2,), 0, '{"a"', "look"),
    CallDelta(1, (7,), 0, "{}", "now"),
    CallDelta(0, (3,), 0, ": 1}"),
    CallDelta(0, (4,), 1, "{}", "now"),
    Delta(0, (5,), ""),
    Delta(1, (8,), " Done."),
    Finished(("tool_calls", "tool_calls"), Usage(7, 8)),
]


def test_calls_are_rendered_alike_streamed_and_whole():
    """Deltas joined as clients do give the completion's calls, whose ids depend on the log only."""
    assert [decode_event(encode_event(event)) for event in EVENTS] == EVENTS
    builder = CompletionBuilder("chatcmpl-1", RECORD)
    whole = [builder.add(event) for event in EVENTS][-1]
    joined: dict[tuple[int, int], dict] = {}
    renderer = ChunkRenderer("chatcmpl-1", RECORD, include_usage=False)
    for event in EVENTS:
        for choice in json.loads(renderer.chunk(event))["choices"]:
            for part in choice["delta"].get("tool_calls", ()):
                call = joined.setdefault((choice["index"], part["index"]), part)
                if call is not part:
                    assert part.keys() == {"index", "function"}
                    call["function"]["arguments"] += part["function"]["arguments"]
    for number, choice in enumerate(whole["choices"]):
        calls = [part for (of, _), part in sorted(joined.items()) if of == number]
        assert [{**c, "index": i} for i, c in enumerate(choice["message"]["tool_calls"])] == calls
    assert whole["choices"][0]["message"]["content"] is None
    assert whole["choices"][1]["message"]["content"] == " Done."
    assert whole["choices"][0]["message"]["tool_calls"][0]["function"] == {
        "name": "look",
        "arguments": '{"a": 1}',
    }
    ids = [call_identity(s, c, n) for s, c, n in itertools.product(("a", "b"), (0, 1), (0, 1))]
    assert len(set(ids)) == 8


def test_frames_of_calls_are_the_same_from_any_event_on():
    """A stream that resumes inside a call has the bytes of the whole one."""
    entries = [encode_event(event) for event in EVENTS]

    def frames(first):
        renderer = ChunkRenderer("chatcmpl-1", RECORD, include_usage=False)
        return Frames("chatcmpl-1", renderer).render(first, entries[first:])[0]

    whole = frames(0)
    for first in range(1, len(entries)):
        assert whole.endswith(frames(first))
    assert msgspec.json.decode(entries[2])[0] == "t"
