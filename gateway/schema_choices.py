"""Rewrites each `oneOf` of a JSON Schema whose options exclude each other as an `anyOf`.

The worker's compiler sees that of options that stand there, not of references to them.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from shared.json_refs import target

MOST_OPTIONS = 64
"""Each option is compared with each other; a longer list stays as it is."""

MOST_REFS = 8
"""References to references that are followed."""

MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
SINGLE = {"items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"}
"""Keywords, by what they hold: subschemas by name, several, or one."""

KINDS = {str: {"string"}, bool: {"boolean"}, type(None): {"null"}}
"""The types of JSON's values that are equal where Python's are: 1 and true are not compared."""


def plain(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that the same documents follow, without a `oneOf` that `anyOf` can replace.

    What is no subschema, such as a `const` or a `default`, stays as it is, and so does the schema
    that was given. Nesting has to be bounded by the caller.
    """
    made: dict[str, Any] = _plain(schema, schema)
    return made


def _plain(node: Any, root: dict[str, Any]) -> Any:
    if not isinstance(node, dict):
        return node
    made: dict[str, Any] = {}
    for name, value in node.items():
        if name in MAPS and isinstance(value, dict):
            made[name] = {key: _plain(child, root) for key, child in value.items()}
        elif name in LISTS and isinstance(value, list):
            made[name] = [_plain(child, root) for child in value]
        else:
            made[name] = _plain(value, root) if name in SINGLE else value
    options = node.get("oneOf")
    if isinstance(options, list) and options and "anyOf" not in node and _exclusive(options, root):
        made["anyOf"] = made.pop("oneOf")
    return made


def _exclusive(options: list[Any], root: dict[str, Any]) -> bool:
    """Return whether no document can follow two of the options, as far as can be seen."""
    if len(options) > MOST_OPTIONS:
        return False
    parts = [_parts(option, root) for option in options]
    return all(_apart(one, other, root) for one, other in combinations(parts, 2))


def _parts(option: Any, root: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the subschemas that a document of this option has to follow, all of them."""
    found: list[dict[str, Any]] = []
    while isinstance(option, dict) and len(found) < MOST_REFS:
        found.append(option)
        option = target(option.get("$ref"), root)
    return found


def _apart(one: list[dict[str, Any]], other: list[dict[str, Any]], root: dict[str, Any]) -> bool:
    kinds = _kinds(one), _kinds(other)
    if kinds[0] is not None and kinds[1] is not None and not kinds[0] & kinds[1]:
        return True
    if _differ(_values(one), _values(other)):
        return True
    if kinds != ({"object"}, {"object"}):
        return False
    if _lacks(one, other) or _lacks(other, one):
        return True
    return any(
        _differ(_values(_property(one, name, root)), _values(_property(other, name, root)))
        for name in _required(one) | _required(other)
    )


def _kinds(parts: list[dict[str, Any]]) -> set[str] | None:
    """Return the types that a document may have; None for any. An integer is a number too."""
    kinds: set[str] | None = None
    for part in parts:
        given = part.get("type")
        names = given if isinstance(given, list) else [given]
        stated = {name for name in names if isinstance(name, str)}
        if "number" in stated:
            stated.add("integer")
        values = _values([part])
        if values is not None:
            stated = {kind for value in values for kind in KINDS[type(value)]}
        if stated:
            kinds = stated if kinds is None else kinds & stated
    return kinds


def _values(parts: list[dict[str, Any]]) -> set[Any] | None:
    """Return the strings, truth values and nulls that a document has to be one of; None: others."""
    for part in parts:
        listed = [part["const"]] if "const" in part else part.get("enum")
        if isinstance(listed, list) and all(type(value) in KINDS for value in listed):
            return set(listed)
    return None


def _differ(one: set[Any] | None, other: set[Any] | None) -> bool:
    return one is not None and other is not None and not one & other


def _required(parts: list[dict[str, Any]]) -> set[str]:
    found = set[str]()
    for part in parts:
        names = part.get("required")
        found |= (
            {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
        )
    return found


def _property(parts: list[dict[str, Any]], name: str, root: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the subschemas that a property has to follow."""
    found: list[dict[str, Any]] = []
    for part in parts:
        properties = part.get("properties")
        if isinstance(properties, dict):
            found += _parts(properties.get(name), root)
    return found


def _lacks(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Return whether an option allows no property that the other one requires."""
    return any(
        part.get("additionalProperties") is False
        and "patternProperties" not in part
        and isinstance(part.get("properties", {}), dict)
        and bool(_required(other) - part.get("properties", {}).keys())
        for part in one
    )
