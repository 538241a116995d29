"""The grammar of a call's parameters in tags, from the JSON Schema of a function's arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

from shared.errors import UnbrokenError
from worker.tools.arguments import is_text

SPACE = r"[ \n]{0,4}"
"""What a model may write around the tags of a call."""

_FIELDS = frozenset(("type", "properties", "required", "additionalProperties", "$defs", "title"))
_FIELDS |= {"definitions", "description", "$schema", "$id", "$comment", "default", "examples"}
_FIELDS |= {"x-guidance", "strict"}
_DEFINITIONS = ("$defs", "definitions")
MOST_CHARACTERS = 16 * 65536
"""Of the rules of all functions: twice their schemas, since parameters repeat their definitions."""

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
            is, where a name cannot stand in a tag, or where the rules become too long.
    """
    root: dict[str, Any] = json.loads(schema)
    properties, required = root.get("properties") or {}, root.get("required") or []
    _refuse_more(root)
    parts, rules, size = [], list[str](), 0
    for number, name in enumerate([*properties, *_missing(required, properties)]):
        inner = properties.get(name, root.get("additionalProperties", True))
        if name not in required and inner is False:
            continue
        if not re.fullmatch(r"[^<>\n]{1,256}", name):
            raise _cannot("a property whose name cannot stand in a tag")
        rule = f"{prefix}_p{number}"
        rules += _parameter(rule, name, inner, root)
        size = within_bounds(rules[-2:], size)
        parts.append(rule if name in required else f"{rule}?")
    return Body(" ".join(parts) or '""', rules)


def within_bounds(rules: Iterable[str], size: int) -> int:
    """Add the length of rules to that of others.

    Raises:
        UnbrokenError: `invalid_value`, where that is more than a request's may have.
    """
    size += sum(map(len, rules))
    if size > MOST_CHARACTERS:
        raise UnbrokenError("invalid_value", "'tools' is too complex to be followed.", "tools")
    return size


def _refuse_more(root: dict[str, Any]) -> None:
    """Refuse a schema that asks for more than the parameters that it names."""
    if extra := sorted(root.keys() - _FIELDS):
        raise _cannot(f"'{extra[0]}' beside 'properties'")
    properties, required = root.get("properties") or {}, root.get("required") or []
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise _cannot("'properties' that are no object or 'required' that is no list")
    others = root.get("additionalProperties", True)
    if isinstance(others, dict) and others:
        raise _cannot("what properties without a name are")
    asked = "properties" not in root or "additionalProperties" in root  # else: no arguments
    if others is not False and asked and not properties and not any(_missing(required, {})):
        raise _cannot("an object whose properties have no names")


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
    own = {field: value for field, value in schema.items() if field not in _DEFINITIONS}
    inner = {**own, **_definitions(own, root), "x-guidance": root.get("x-guidance", {})}
    text = json.dumps(inner, ensure_ascii=False)
    return [f"{rule}: {head} {rule}_value {end}", f"{rule}_value: %json {text}"]


def _definitions(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the root's definitions that a schema refers to, in one way or another."""
    found: dict[str, dict[str, Any]] = {}
    left = [*_references(schema)]
    while left:
        place = [
            part.replace("~1", "/").replace("~0", "~") for part in unquote(left.pop()).split("/")
        ]
        if len(place) < 3 or place[0] != "#" or place[1] not in _DEFINITIONS:
            raise _cannot("a '$ref' to something else than a definition")
        _, field, name, *_ = place
        known = root.get(field)
        if isinstance(known, dict) and name in known and name not in found.get(field, {}):
            found.setdefault(field, {})[name] = known[name]
            left += _references(known[name])
    return found


def _text(schema: dict[str, Any]) -> str:
    """Return the terminal of a string without quotation marks."""
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        values = [value for value in values if value == schema.get("const", value)]
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
    return json.dumps(text, ensure_ascii=False)


def _cannot(what: str) -> UnbrokenError:
    return UnbrokenError(
        "invalid_value",
        f"'tools' cannot be followed: this model writes calls in tags, which cannot say {what}.",
        "tools",
    )
