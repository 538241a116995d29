"""The grammar of a call's parameters in tags, from the JSON Schema of a function's arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from shared.errors import UnbrokenError
from worker.tools.arguments import is_text

SPACE = r"[ \n]{0,4}"
"""What a model may write around the tags of a call."""

_FIELDS = frozenset(("type", "properties", "required", "additionalProperties", "$defs", "title"))
_FIELDS |= {"definitions", "description", "$schema", "$id", "$comment", "default", "examples"}
_FIELDS |= {"x-guidance", "strict"}
_DEFINITIONS = ("$defs", "definitions")
_NO_END = r"~/(?s:.*)<\/parameter>(?s:.*)/"  # in a value, the tag that ends it


class Body(NamedTuple):
    """What matches a call's parameters, and the rules that it needs."""

    rule: str
    rules: list[str]


def call_body(prefix: str, schema: str) -> Body:
    """Return the grammar, in llguidance's Lark, of parameters in the order of the schema.

    Args:
        prefix: of the names of its rules.
        schema: of the function's arguments, as JSON.

    Raises:
        UnbrokenError: `invalid_value`, where the schema says more than what each of the parameters
            is, or where a name cannot stand in a tag.
    """
    root: dict[str, Any] = json.loads(schema)
    if extra := sorted(root.keys() - _FIELDS):
        raise _cannot(f"'{extra[0]}' beside 'properties'")
    properties, required = root.get("properties") or {}, root.get("required") or []
    parts, rules = [], list[str]()
    for number, name in enumerate([*properties, *_missing(required, properties)]):
        inner = properties.get(name, root.get("additionalProperties", True))
        if name not in required and inner is False:
            continue
        if not re.fullmatch(r"[^<>\n]{1,256}", name):
            raise _cannot("a property whose name cannot stand in a tag")
        rule = f"{prefix}_p{number}"
        rules += _parameter(rule, name, inner, root)
        parts.append(rule if name in required else f"{rule}?")
    return Body(" ".join(parts) or '""', rules)


def _missing(required: list[Any], properties: dict[str, Any]) -> Iterator[str]:
    return (name for name in required if isinstance(name, str) and name not in properties)


def _parameter(rule: str, name: str, schema: Any, root: dict[str, Any]) -> list[str]:
    """Return the rules of one parameter, from its tag to the newline behind its end."""
    head, end = _quoted(f"<parameter={name}>\n"), _quoted("\n</parameter>\n")
    if is_text(schema):
        value = rule.upper()
        return [f"{rule}: {head} {value}", f"{value}: {_text(schema)} {end}"]
    if not isinstance(schema, dict):
        schema = {} if schema else {"not": {}}
    definitions = {field: root[field] for field in _DEFINITIONS if field in root}
    inner = {**schema, **definitions}
    if not all(ref.startswith(("#/$defs/", "#/definitions/")) for ref in _references(inner)):
        raise _cannot("a '$ref' to something else than a definition")
    inner["x-guidance"] = root.get("x-guidance", {})
    return [f"{rule}: {head} {rule}_value {end}", f"{rule}_value: %json {json.dumps(inner)}"]


def _text(schema: dict[str, Any]) -> str:
    """Return the terminal of a string without quotation marks."""
    values = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])]
    if values:
        if "const" in schema and "enum" in schema:
            values = [schema["const"]] if schema["const"] in schema["enum"] else []
        fits = [value for value in values if _fits(value, schema)]
        if not fits:
            raise _cannot("an enum of nothing")
        return f"({' | '.join(map(_quoted, fits))})"
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if isinstance(most, int) and most < least:
        raise _cannot("a string that is shorter than its 'minLength'")
    return f"(/(?s:.{{{least},{most}}})/ & {_NO_END})"


def _fits(value: str, schema: dict[str, Any]) -> bool:
    least, most = schema.get("minLength", 0), schema.get("maxLength", len(value))
    return bool(least <= len(value) <= most)


def _references(node: Any) -> Iterator[str]:
    below = list(node.values()) if isinstance(node, dict) else node
    if isinstance(node, dict) and isinstance(node.get("$ref"), str):
        yield node["$ref"]
    if isinstance(below, list):
        for one in below:
            yield from _references(one)


def _quoted(text: str) -> str:
    return json.dumps(text)


def _cannot(what: str) -> UnbrokenError:
    return UnbrokenError(
        "invalid_value",
        f"'tools' cannot be followed: this model writes calls in tags, which cannot say {what}.",
        "tools",
    )
