"""Calls with a tag for each parameter that follow their schemas: a real engine, random weights."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
from llguidance import LLTokenizer

from gateway.json_schema import check_schema
from shared.errors import UnbrokenError
from tests.engine_kit import Engine
from tests.grammar_kit import ONE, called, calls, offered, prompt, run, sampling
from tests.random_schemas import an_object
from worker import grammar
from worker.engine.messages import AnswerForm

pytestmark = pytest.mark.timeout(120)  # a real engine, where others compute too

SEA = {
    "type": "object",
    "properties": {
        "at": {"type": "string", "minLength": 1, "maxLength": 9},
        "how": {"enum": ["near", "far"]},
        "n": {"type": "integer", "minimum": 1},
        "day": {"type": "string", "format": "date"},
        "all": {"$ref": "#/$defs/all"},
    },
    "required": ["at", "n"],
    "additionalProperties": False,
    "$defs": {"all": {"type": "array", "items": {"type": "boolean"}}},
}


@pytest.fixture(scope="module")
def engine(loaded):
    return Engine(loaded, 16)


def xml(schema, **changes):
    """A required call of a function with this schema."""
    functions = (("look", check_schema(schema, "tools")),)
    return AnswerForm(tools="qwen-xml", functions=functions, required=True, **changes)


def test_random_functions_are_called_as_their_schemas_have_it(engine):
    """Strings without quotation marks and other values as JSON make arguments that validate."""
    draw = random.Random(11)
    schemas = [an_object(draw) for _ in range(40)]
    works = [
        (prompt(xml(schema, parallel=False), seed), sampling(seed=seed, max_tokens=380))
        for seed, schema in enumerate(schemas)
    ]
    driver = run(engine, *works)
    for handle, schema in enumerate(schemas, 1):
        assert driver.last(handle).finish == "tool_calls", schema
        [(name, arguments)] = called(driver, handle)
        assert name == "look"
        jsonschema.validate(json.loads(arguments), schema)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_continues_from_any_seam(engine, parallel):
    """Whatever part of it a successor knows, its tokens and its arguments go on as they would."""
    form = calls(tools="qwen-xml", parallel=parallel)
    work = prompt(form, 8, thinking=True), sampling(thinking_budget=3, max_tokens=120)
    whole = run(engine, work)
    ids, seams, count = whole.ids(1), [], 0
    for output in whole.said[1]:
        count += sum(len(piece.ids) for piece in output.pieces)
        seams.append(count)
    seams = [*seams[:6], *seams[6::6]]
    again = run(engine, *[(*work, ids[:seam]) for seam in seams])
    for handle, seam in enumerate(seams, 1):
        assert again.ids(handle) == ids[seam:], seam
        assert whole.text(1).endswith(again.text(handle))
        assert again.last(handle).finish == whole.last(1).finish


CALL = (
    "<parameter=at>\nthe <sea>\n</parameter>\n<parameter=how>\nfar\n</parameter>\n"
    "<parameter=n>\n5\n</parameter>\n"
)


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        (f"\n<function=look>\n{CALL}</function>\n</tool_call>", True),
        (f"<function=look>{CALL}</function></tool_call>", True),
        (f"\n<function=look>\n{CALL.replace('5', '[1]')}", False),
        (f"\n<function=look>\n{CALL.replace('far', 'near by')}", False),
        (f"\n<function=look>\n{CALL.replace('<sea>', 'whole sea')}", False),
        (f"\n<function=look>\n{CALL.replace('the <sea>', '')}", False),
        ("\n<function=look>\n<parameter=at>\na</parameter>", False),
        ("\n<function=look>\n<parameter=other>", False),
        ("\n<function=look>\n</function>", False),
        ("\n<function=looks>", False),
        ("\n<function=now>", True),
    ],
)
def test_a_strict_call_follows_its_schema(text, accepted):
    """Behind the tag the grammar takes what the schema allows; other names are free."""
    tokenizer = LLTokenizer("byte")
    matcher = grammar.matcher(grammar.build(offered(schema=SEA, tools="qwen-xml")), tokenizer)
    tokens = tokenizer.tokenize_str(text)
    assert (matcher.validate_tokens(tokens) == len(tokens)) is accepted
    if accepted:
        matcher.consume_tokens(tokens)
        assert matcher.is_accepting()


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [ONE, ONE], "type": "object"},
        {"type": "object", "patternProperties": {"^a": {}}},
        {"type": "object", "properties": {"a": {"$ref": "#/properties/b"}, "b": {}}},
        {"type": "object", "properties": {"a\nb": {}}},
        {"type": "object", "properties": {"a": {"enum": ["abc"], "maxLength": 2}}},
        {"type": "object", "properties": {"a": {"type": "strange"}}},
        {"type": "object", "required": ["a"], "additionalProperties": False},
        {"type": "object"},
        {"type": "object", "properties": {}, "additionalProperties": True},
        {"type": "object", "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": {"a": {"type": "string", "enum": []}}},
        {"type": "object", "properties": {"a": {"type": "string", "enum": "xyz"}}},
        {"type": "object", "properties": {"a": {"type": "string", "enum": 5}}},
        {"type": "object", "properties": {"a": {}}, "required": "a"},
    ],
    ids=[
        *("anyOf", "patterns", "ref", "name", "nothing", "type", "missing", "any", "more", "map"),
        *("beside", "empty", "text", "number", "required"),
    ],
)
def test_what_tags_cannot_say_is_refused(schema):
    """A call that has to follow such a schema is a 400 that names the tools."""
    check = grammar.create()  # as a child of the worker's does
    with pytest.raises(UnbrokenError) as caught:
        check(xml(schema))
    assert (caught.value.code, caught.value.param) == ("invalid_value", "tools")
    check(xml(SEA))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {}},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": True},
        {"type": "object", "required": ["a"]},
        {"type": "object", "properties": {"a": {"enum": ["é", "水"], "const": "é"}}},
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/b%20c"}},
            "required": ["a"],
            "$defs": {
                "b c": {"items": {"$ref": "#/$defs/d~1e/not"}},
                "d/e": {"not": {"type": "null"}},
            },
        },
    ],
    ids=["none", "named", "required", "letters", "refs"],
)
def test_what_tags_can_say_is_taken(schema):
    """Neither a function without arguments nor a definition of a definition is refused."""
    grammar.create()(xml(schema))


def test_a_parameter_takes_its_own_definitions_along():
    """The grammar grows with what parameters refer to, not with all that could be referred to."""
    long = {"enum": ["a" * 30_000]}
    text = json.dumps({"type": "integer"})
    schema = {
        "type": "object",
        "properties": {f"p{n}": {} for n in range(400)} | {"q": {"$ref": "#/$defs/short"}},
        "$defs": {"long": long, "short": {"type": "integer"}},
    }
    built = grammar.build(xml(schema))
    assert text in built
    assert "a" * 30_000 not in built
    assert len(built) < 65536 * 4


@pytest.mark.parametrize("lazy", [True, False])
def test_a_grammar_that_would_be_too_long_is_refused(lazy):
    """Parameters that repeat a long definition end in a 400, before all of it is written."""
    schema = {
        "type": "object",
        "properties": {f"p{n}": {"$ref": "#/$defs/long"} for n in range(400)},
        "required": [f"p{n}" for n in range(400)],
        "$defs": {"long": {"enum": ["a" * 30_000]}},
    }
    form = offered(schema=schema, tools="qwen-xml") if lazy else xml(schema)
    with pytest.raises(UnbrokenError, match="too complex") as caught:
        grammar.build(form)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "tools")
    few = {**schema, "properties": {"p": {"$ref": "#/$defs/long"}}}
    functions = tuple((f"f{n}", check_schema(few, "tools")) for n in range(50))
    with pytest.raises(UnbrokenError, match="too complex"):
        grammar.build(AnswerForm(tools="qwen-xml", functions=functions, required=True))


def test_the_choices_of_a_prompt_share_the_text_of_their_grammar(engine, monkeypatch):
    """It is written once, however many there are."""
    built, build = [], grammar.build
    monkeypatch.setattr(grammar, "build", lambda *a, **k: built.append(a) or build(*a, **k))
    work = prompt(xml({**SEA, "title": "new"}), 1), sampling(max_tokens=3)
    run(engine, *[work] * 4)
    assert len(built) == 1
