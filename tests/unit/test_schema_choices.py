"""`oneOf` whose options exclude each other: an `anyOf` to the compiler, the same to the caller."""

import copy
import json
import random
import time
from itertools import combinations

import jsonschema
import pytest

from gateway.json_schema import check_schema
from gateway.schema_choices import plain
from worker.engine.messages import AnswerForm
from worker.grammar import create

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
CLOSED = {"additionalProperties": False}
DEFS = {
    "point": POINT,
    "closed": {**POINT, **CLOSED},
    "other": {"type": "object", "properties": {"y": {}}, "required": ["y"], **CLOSED},
    "open": {"type": "object", "patternProperties": {"^y": {}}, **CLOSED},
    "list": {"type": "array", "items": {"type": "integer"}},
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "amount": {"type": "number"},
    "a": {"enum": ["a"]},
    "b": {"const": "b"},
    "one": {"const": 1},
    "cat": {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
    "dog": {"type": "object", "properties": {"kind": {"$ref": "#/$defs/b"}}, "required": ["kind"]},
    "stray": {"type": "object", "properties": {"kind": {"type": "string"}}},
    "maybe": {"type": "object", "properties": {"kind": {"const": "b"}}},
    "alias": {"$ref": "#/$defs/text"},
    "chain": {
        "type": "object",
        "properties": {"next": {"oneOf": [{"$ref": "#/$defs/chain"}, {"type": "null"}]}},
        "required": ["next"],
    },
    "loop": {"$ref": "#/$defs/loop"},
}
NULL = {"type": "null"}
DOCUMENTS = [None, True, 1, 1.0, 1.5, "a", "b", "c", [], [1], {}, {"x": 1}, {"y": 1}]
DOCUMENTS += [{"x": 1, "y": 2}, {"kind": "cat"}, {"kind": "b"}, {"kind": "c"}, {"next": None}]
DOCUMENTS += [{"kind": "cat", "x": 1}, {"next": {"next": None}}, {"next": 3}, {"z": 1}]


def choice(*options, **more):
    refs = [{"$ref": f"#/$defs/{o}"} if isinstance(o, str) else o for o in options]
    return {"oneOf": refs, "$defs": copy.deepcopy(DEFS), **more}


@pytest.mark.parametrize(
    "options",
    [
        ("point", NULL),
        ("point", "list"),
        ("closed", "other"),
        ("point", "other"),
        ("text", "count", "list", NULL),
        ("a", "b"),
        ("a", NULL, {"type": "boolean"}),
        ("cat", "dog"),
        ("cat", "maybe"),
        ("alias", "point"),
        ("chain", NULL),
        ({"$ref": "#/$defs/text", "enum": ["c"]}, "a"),
    ],
    ids=str,
)
def test_options_that_exclude_each_other_can_be_followed(options):
    """Also where they are references, which the compiler does not compare."""
    schema = choice(*options)
    before = copy.deepcopy(schema)
    text = check_schema(schema, "f")
    assert "anyOf" in json.loads(text)
    assert schema == before
    create()(AnswerForm(schema=text))  # compiles


@pytest.mark.parametrize(
    "options",
    [
        ("text", "a"),
        ("count", "amount"),
        ("count", "one"),
        ("point", "closed"),
        ("cat", "stray"),
        ("open", "other"),
        ("text", {}),
        ("loop", "text"),
        ("nowhere", "text"),
        ("text", "alias"),
    ],
    ids=str,
)
def test_options_that_may_hold_at_once_stay(options):
    """Whatever cannot be told apart for sure is left to the compiler."""
    schema = choice(*options)
    assert plain(schema)["oneOf"] == schema["oneOf"]


def test_only_subschemas_are_rewritten():
    """Data, properties of that name, and what has an `anyOf` already stay."""
    two = [{"type": "string"}, NULL]
    data = {"const": {"oneOf": two}, "enum": [{"oneOf": two}], "default": {"oneOf": two}}
    both = {"oneOf": two, "anyOf": [{"type": "string"}]}
    named = {"properties": {"oneOf": {"oneOf": two}, "d": data, "b": both}, "items": [two]}
    made = plain(named)
    assert made["properties"] == {"oneOf": {"anyOf": two}, "d": data, "b": both}
    assert made["items"] == [two]
    assert plain({"oneOf": []}) == {"oneOf": []}


def test_the_same_documents_follow():
    """Each pair of options, and triples of them, accept what they accepted before."""
    draw = random.Random(7)
    options = [*(name for name in DEFS if name != "loop"), NULL, {"type": "string", "minLength": 2}]
    rewritten = 0
    for chosen in (*combinations(options, 2), *(draw.sample(options, 3) for _ in range(50))):
        schema = choice(*chosen)
        made = plain(schema)
        rewritten += "anyOf" in made
        old, new = (jsonschema.Draft202012Validator(one) for one in (schema, made))
        for document in DOCUMENTS:
            assert old.is_valid(document) == new.is_valid(document), (chosen, document)
    assert 50 < rewritten < 170


@pytest.mark.parametrize("path", ["oneOf/0", "one%4ff/0"])
def test_what_references_lead_into_stays_where_it_is(path):
    """A reference to an option is followed as before."""
    both = {"oneOf": [{"type": "string"}, NULL]}
    schema = {"type": "object", "properties": {"a": both, "b": {"$ref": f"#/properties/a/{path}"}}}
    text = check_schema(schema, "f")
    create()(AnswerForm(schema=text))  # compiles


@pytest.mark.parametrize(
    "more", [{"$id": "http://a/b"}, {"$defs": {"x": {"$ref": "#name"}}}], ids=str
)
def test_references_that_lead_elsewhere_are_not_compared(more):
    """An `$id` below the top, or a name for a place, makes a `$ref` mean something else."""
    schema = choice("text", NULL, properties={"inner": {**more, "type": "null"}})
    assert plain(schema) == schema
    assert "anyOf" in plain({**choice("text", NULL), "$id": "http://a/b"})


def test_few_steps_are_taken_for_many_options():
    """However much is shared by options that are compared: what is left over stays as it is."""
    names = [f"n{i}" for i in range(1000)]
    defs = {"base": {"type": "object", "required": names, "properties": dict.fromkeys(names, True)}}
    for i in range(64):
        defs[f"k{i}"] = {"properties": {"k": {"const": str(i)}}, "required": ["k"]}
        defs[f"k{i}"] |= {"$ref": "#/$defs/base"}
    refs = [{"$ref": f"#/$defs/k{i}"} for i in range(64)]
    schema = {"prefixItems": [{"oneOf": refs} for _ in range(20)], "$defs": defs}
    began = time.process_time()
    made = plain(schema)["prefixItems"]
    assert time.process_time() - began < 2  # it was ten minutes
    assert "anyOf" in made[0]
    assert "oneOf" in made[-1]
