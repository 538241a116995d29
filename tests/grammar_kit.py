"""What tests of answers with a grammar share: forms, prompts that bear them, what was said."""

from __future__ import annotations

import dataclasses

from gateway.json_schema import check_schema
from shared.protocol import SamplingParams
from tests.engine_kit import Driver, text_prompt
from worker.engine.messages import AnswerForm

ONE = {
    "type": "object",
    "properties": {"at": {"type": "string", "maxLength": 9}, "n": {"enum": [1, 2.5, None]}},
    "required": ["at", "n"],
    "additionalProperties": False,
}


def form(schema=ONE, **changes):
    return AnswerForm(check_schema(schema, "response_format"), **changes)


def calls(names=("look", "now"), **changes):
    schema = check_schema(ONE, "tools")
    functions = tuple((name, schema) for name in names)
    return AnswerForm(**{"tools": "qwen", "functions": functions, "required": True, **changes})


def prompt(form=None, seed=0, *, thinking=False):
    changes = {"thinking": thinking} | ({"form": form} if form else {})
    return dataclasses.replace(text_prompt(20, seed), **changes)


def sampling(**changes):
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 250, "seed": 3, **changes})


def run(engine, *works):
    """Run (prompt, sampling, generated) side by side; returns the driver, handles from 1."""
    driver = Driver(engine)
    for handle, work in enumerate(works, 1):
        driver.add(handle, *work)
    return driver.drain()


def content(driver, handle):
    pieces = [p for o in driver.said[handle] for p in o.pieces]
    return "".join(p.text for p in pieces if p.channel == "content" and not p.call)


def heavy(name, functions=3):
    """A required call whose grammar takes long to compile, and is within the bounds of a form."""
    wide = {
        "type": "object",
        "properties": {f"{name}{number}": {} for number in range(390)},
    }
    properties = {f"{name}{number}": wide for number in range(4)}
    schema = check_schema({"type": "object", "properties": properties}, "tools")
    named = tuple((f"{name}_{number}", schema) for number in range(functions))
    return AnswerForm(tools="qwen", functions=named, required=True, parallel=False)


def offered(strict=("look",), free=("now",), schema=ONE, tools="qwen"):
    """Functions that may be called, of which some follow their schema."""
    checked = check_schema(schema, "tools")
    functions = tuple((name, checked) for name in (*strict, *free))
    return AnswerForm(tools=tools, functions=functions, strict=tuple(strict))


def called(driver, handle):
    """Return the calls of a sequence: names, and arguments as texts."""
    made = {}
    for piece in (p for o in driver.said[handle] for p in o.pieces):
        if piece.call:
            made.setdefault(piece.call.index, [piece.call.name, ""])[1] += piece.text
    return [tuple(call) for call in made.values()]


def a_schema(draw, depth=0):  # noqa: C901, PLR0911  # a kind after the other
    """Return a random schema whose documents are not endless."""
    kinds = ["enum", "const", "string", "integer", "boolean", "null", "pattern", "date"]
    kind = draw.choice(kinds + ["object", "object", "array", "any", "tuple"] * (depth < 3))
    if kind == "enum":
        return {"enum": draw.sample(["a", "b c", 'q"', "é", 1, -2.5, None, True, [1]], 3)}
    if kind == "const":
        return {"const": draw.choice(["x", {"k": [1]}, 0])}
    if kind == "string":
        return {"type": "string", "minLength": draw.randint(0, 2), "maxLength": draw.randint(2, 8)}
    if kind == "integer":
        low = draw.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 500)}
    if kind == "pattern":
        return {"type": "string", "pattern": draw.choice(["^[a-f]{2,5}$", "^(on|off)$"])}
    if kind == "date":
        return {"type": "string", "format": draw.choice(["date", "ipv4", "uuid"])}
    if kind == "object":
        names = draw.sample(["id", "name", "a b", "ü", "type", "x1"], draw.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: a_schema(draw, depth + 1) for name in names},
            "required": draw.sample(names, draw.randint(0, len(names))),
            "additionalProperties": False,
        }
    if kind == "array":
        items = {"items": a_schema(draw, depth + 2)}
        return {"type": "array", **items, "minItems": draw.randint(0, 1), "maxItems": 2}
    if kind == "tuple":
        both = [a_schema(draw, depth + 2), a_schema(draw, depth + 2)]
        return {"type": "array", "prefixItems": both, "items": False, "minItems": 2}
    if kind == "any":
        return {"anyOf": [a_schema(draw, depth + 2), a_schema(draw, depth + 2)]}
    return {"type": kind}


def an_object(draw):
    """Return a random schema of an object, whose documents are not endless."""
    names = draw.sample(["id", "name", "a b", "ü", "type", "x1"], draw.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: a_schema(draw, 1) for name in names},
        "required": draw.sample(names, draw.randint(0, len(names))),
        "additionalProperties": False,
    }
