"""Schemas that leave much open at one place: refused at once, or followed to the end."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from llguidance import LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask

from gateway.json_schema import MAX_WIDTH, check_schema
from shared.errors import UnbrokenError
from worker import grammar
from worker.engine.messages import AnswerForm
from worker.pattern_trial import MOST_PATTERNS

OPEN = "open at one place"  # what a refusal says


def optional(count, letter="p", **more):
    return {"type": "object", "properties": {f"{letter}{n}": {} for n in range(count)}, **more}


def deep(schema, depth=5):
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def kinds(count):
    """Return a union as programs have it: a name for each kind, and a few fields."""
    fields = {"x": {"type": "integer"}, "y": {"type": "string"}}
    return [
        {"type": "object", "properties": {"kind": {"const": f"k{n}"}, **fields}}
        | {"required": ["kind"], "additionalProperties": False}
        for n in range(count)
    ]


def told_apart(count, **first):
    """Return alternatives of 16 properties, of which the first has another word in each."""
    names = {f"p{n}": {} for n in range(15)}
    return [
        {"type": "object", "properties": {"k": {"const": f"k{n}", **first}, **names}}
        | {"required": ["k"]}
        for n in range(count)
    ]


def any_required(letters):
    return {"anyOf": [{"required": [letter]} for letter in letters]}


HALF = optional(MAX_WIDTH // 2)
SIX = {"type": "object", "properties": {letter: {} for letter in "abcdef"}}
TREE = {"anyOf": [*kinds(30), {"type": "array", "items": {"$ref": "#"}}]}
TOO_WIDE = {
    "an object": optional(MAX_WIDTH),
    "alternatives": {"anyOf": [HALF, HALF]},
    "alternatives far inside": deep({"anyOf": [HALF, optional(MAX_WIDTH // 2, "q")]}),
    "inside of alternatives": {"anyOf": [deep(HALF, 2), deep(HALF, 2)]},
    "alternatives of alternatives": {"anyOf": [{"anyOf": [optional(99)] * 3}] * 2},
    "parts of a whole": {"allOf": [HALF, optional(MAX_WIDTH // 2, "q")]},
    "alternatives that multiply": {"allOf": [{"anyOf": kinds(25)}, {"anyOf": kinds(25)}]},
    "any of many, but one": optional(60, minProperties=1, additionalProperties=False),
    "objects of an enum": {"enum": [{"a": n} for n in range(MAX_WIDTH + 1)]},
    "behind references": {
        "anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        "$defs": {"a": HALF, "b": deep(HALF)},
    },
    "names that fit two patterns": {"patternProperties": {"^a": HALF, "a$": HALF}},
    "the same word twice": {"anyOf": [*told_apart(35), told_apart(1)[0]]},
    "words that need not come": {
        "anyOf": [{**option, "required": []} for option in told_apart(35)],
    },
    "words behind the rest": {
        "anyOf": [
            {**o, "properties": dict(reversed(o["properties"].items()))} for o in told_apart(35)
        ],
    },
    "words, or no object": {
        "anyOf": [{k: v for k, v in o.items() if k != "type"} for o in told_apart(35)],
    },
    "words with another part": {"anyOf": told_apart(35), "properties": {"z": {}}},
    "words of two unions": {"allOf": [{"anyOf": told_apart(35)}, {"anyOf": told_apart(6)}]},
    "needs that multiply": {**SIX, "allOf": [any_required("abcdef")] * 4},
}
FINE = {
    "one object": optional(MAX_WIDTH - 1),
    "one behind the other": {
        "type": "object",
        "properties": {"a": HALF, "b": HALF, "c": HALF},
        "required": ["a", "b", "c"],
    },
    "a union": {"anyOf": kinds(120)},
    "a tree": TREE,
    "a list of words": {"enum": [f"word {n}" for n in range(1000)]},
    "the same again": {"type": "array", "prefixItems": [HALF, HALF, HALF], "minItems": 3},
    "a change of some of many": optional(40, minProperties=1, additionalProperties=False),
    "told apart by a word": {"anyOf": told_apart(35)},
    "told apart behind references": deep(
        {"anyOf": [{"$ref": f"#/$defs/d{n}"} for n in range(35)]}, 1
    )
    | {"$defs": {f"d{n}": option for n, option in enumerate(told_apart(35))}},
    "one of each six required": {**SIX, "allOf": [any_required("abcdef")] * 3},
}


@pytest.mark.parametrize("schema", TOO_WIDE.values(), ids=TOO_WIDE)
def test_what_leaves_too_much_open_is_refused(schema):
    """However it comes about, it is a 400 before anything is queued."""
    with pytest.raises(UnbrokenError, match=OPEN) as caught:
        check_schema(schema, "f")
    assert (caught.value.kind.status, caught.value.param) == (400, "f")


@pytest.mark.parametrize("schema", FINE.values(), ids=FINE)
def test_what_is_large_but_not_wide_passes(schema):
    """Places behind one another, unions of small objects and lists of words are no burden."""
    assert check_schema(schema, "f")


def test_widths_that_multiply_are_found_at_once():
    """Alternatives of alternatives, each by reference, have no number that is worth counting."""
    defs = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 3} for n in range(200)}
    with pytest.raises(UnbrokenError, match=OPEN):
        check_schema({"$ref": "#/$defs/d0", "$defs": defs | {"d200": {"anyOf": kinds(3)}}}, "f")


ENDLESS = [".*[a-m].{20}x.*", ".*[a-m].{30}x.*", "^(.*[aeiou].{40}){3}$"]
HARMLESS = [
    "^([a-z]+ ){5,200}$",
    "^[\\w.+-]+@([\\w-]+\\.)+[\\w-]{2,}$",
    "^.{100,4000}$",
    "^(a?){50}a{50}$",
    "^https?://[^\\s/$.?#].[^\\s]*$",
    "(foo|bar).*(baz|q{3,40})",
    "^#([A-Fa-f0-9]{6}|[A-Fa-f0-9]{3})$",
]


@pytest.mark.parametrize("where", ["alone", "far inside", "a name", "arguments"])
def test_a_pattern_that_grows_without_bound_is_refused(where):
    """Its automaton would fail in the middle of an answer; those of usual patterns do not."""
    check = grammar.create()  # as a child of the worker's does

    def asked(pattern):
        text = {"type": "string", "pattern": pattern}
        schema = (
            {"type": "object", "patternProperties": {pattern: {}}} if where == "a name" else text
        )
        if where == "far inside":
            schema = deep({"type": "array", "items": {"anyOf": [{"type": "null"}, text]}})
        if where == "arguments":
            checked = check_schema(deep(text), "f")
            return AnswerForm(tools="qwen", functions=(("f", checked),), required=True)
        return AnswerForm(check_schema(schema, "f"))

    for pattern in HARMLESS:
        check(asked(pattern))
    for pattern in ENDLESS:
        with pytest.raises(UnbrokenError, match="pattern that is too complex") as caught:
            check(asked(pattern))
        assert caught.value.param == ("tools" if where == "arguments" else "response_format")
    free = check_schema(deep({"type": "string", "pattern": ENDLESS[0]}), "f")
    strict = check_schema(deep({"type": "string"}), "f")
    both = (("look", strict), ("now", free))
    check(AnswerForm(tools="qwen", functions=both, strict=("look",)))  # need not be followed


def patterned(texts):
    fields = {f"f{n}": {"type": "string", "pattern": text} for n, text in enumerate(texts)}
    schema = {"properties": fields, "required": [*fields], "additionalProperties": False}
    return AnswerForm(check_schema({"type": "object", **schema}, "f"))


def test_patterns_that_are_too_much_together_are_refused():
    """Each makes fewer states than one may; the lexer that has all of them would give up."""
    check = grammar.create()
    hard = [f".*[a-{letter}].{{11}}x.*" for letter in "defghijklmnopqrstuvwyz"]
    check(patterned(hard[:1]))
    with pytest.raises(UnbrokenError, match="pattern that is too complex"):
        check(patterned([*hard, *(f"^x{n}+$" for n in range(MOST_PATTERNS - len(hard)))]))
    check(patterned(f"{HARMLESS[n % len(HARMLESS)]}|^{n}$" for n in range(MOST_PATTERNS)))


def test_more_patterns_than_are_tried_are_refused():
    """One that nobody has tried could end an answer in the middle."""
    many = [f"^x{{{n}}}$" for n in range(1, MOST_PATTERNS + 2)]
    check = grammar.create()
    check(patterned(many[1:]))
    with pytest.raises(UnbrokenError, match="more than 64 different patterns"):
        check(patterned(many))


def leaf(draw):
    pattern = draw.choice(["^[a-f]{2,50}$", ".*[a-m].{9}x.*", "^(a|b|ab)*c$", r"^\\S+@\\S+$"])
    kind = draw.choice(["string", "integer", "boolean", "null", "number", pattern])
    return {"type": "string", "pattern": pattern} if kind == pattern else {"type": kind}


def hostile(draw, depth=0):  # noqa: PLR0911  # a kind after the other
    """Return a random schema that may be far too wide."""
    kind = draw.choice(["object"] * 3 + ["any"] * 2 + ["all", "array", "enum", "count", "leaf"])
    if depth > 3 or kind == "leaf":
        return leaf(draw)
    if kind == "object":
        schema = optional(draw.choice([1, 3, 10, 60, 150]), draw.choice("pqr"))
        names = list(schema["properties"])
        few = draw.sample(names, min(len(names), 3))
        schema["properties"].update({name: hostile(draw, depth + 1) for name in few})
        closed = {"additionalProperties": False} if draw.random() < 0.5 else {}
        return {
            **schema,
            "required": draw.sample(names, draw.randint(0, min(2, len(names)))),
        } | closed
    if kind == "any":
        return {"anyOf": [hostile(draw, depth + 1) for _ in range(draw.choice([2, 4, 8]))]}
    if kind == "all":
        return {"allOf": [hostile(draw, depth + 1) for _ in range(2)]}
    if kind == "enum":
        return {"enum": [{"a": n, "b": [n]} for n in range(draw.choice([3, 50, 400]))]}
    if kind == "count":
        most = draw.choice([5, 15, 40])
        return optional(most, "c", minProperties=1, additionalProperties=False)
    items = {"items": hostile(draw, depth + 1), "minItems": draw.randint(0, 2)}
    return {"type": "array", **items, "maxItems": draw.randint(2, 4)}


def write(tokenizer, text, draw, most=60):
    """Write an answer of random tokens; returns the matcher where it is complete, or long."""
    matcher = grammar.matcher(f"start: json\njson: %json {text}", tokenizer)
    bits = np.zeros((1, -(-tokenizer.vocab_size // 32)), dtype=np.int32)
    for _ in range(most):
        if matcher.is_stopped():
            break
        bits[:] = 0
        fill_next_token_bitmask(matcher, bits, 0)
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
        tokens = np.nonzero(allowed)[0].tolist()
        marks = [
            t for t in tokens if any(mark in b'"{}[]:,' for mark in tokenizer.decode_bytes([t]))
        ]
        matcher.consume_tokens([draw.choice(marks if marks and draw.random() < 0.6 else tokens)])
    return matcher


class Words:
    """A tokenizer with bytes, and a token for the end of each property and the next one's begin."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)

    def __init__(self):
        ends = [f'{number}":{after}'.encode() for number in range(100) for after in '{["1tn ']
        self.tokens = [*(bytes([n]) for n in range(256)), b"<end>", *ends]

    def __call__(self, text):
        return list(text.encode() if isinstance(text, str) else text)


@pytest.mark.parametrize("name", FINE)
def test_a_mask_looks_far_ahead_in_a_wide_schema(name):
    """Where many tokens reach into the next value, more is looked at than the library allows."""
    tokenizer = LLTokenizer(TokenizerWrapper(Words()))
    text = check_schema(FINE[name], "f")
    matcher = grammar.matcher(f"start: json\njson: %json {text}", tokenizer)
    for token in b'{"p':
        bits = np.zeros((1, -(-tokenizer.vocab_size // 32)), dtype=np.int32)
        fill_next_token_bitmask(matcher, bits, 0)
        if (bits[0, token // 32] >> (token % 32)) & 1:
            matcher.consume_tokens([token])
    fill_next_token_bitmask(matcher, bits, 0)
    assert matcher.get_error() == ""


@pytest.mark.timeout(90)  # where others compute too
def test_a_random_schema_is_refused_or_followed(demo_model):
    """What the gateway lets pass and the compiler takes never fails in an answer that has begun."""
    tokenizer = LLTokenizer((demo_model / "tokenizer.json").read_text(), eos_token=[0])
    seen = {"refused": 0, "followed": 0}
    for seed in range(40):
        draw = random.Random(seed)
        try:
            text = check_schema(hostile(draw), "f")
        except UnbrokenError:
            seen["refused"] += 1
            continue
        if grammar.matcher(f"start: json\njson: %json {text}", tokenizer).is_error():
            continue  # as on trial
        matcher = write(tokenizer, text, draw)
        assert matcher.get_error() == "", (seed, json.dumps(text)[:500])
        seen["followed"] += 1
    assert min(seen.values()) >= 10
