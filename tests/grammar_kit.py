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
