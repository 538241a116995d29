"""Rewrites each `oneOf` of a JSON Schema whose options exclude each other as an `anyOf`.

The worker's compiler sees that of options that stand there, not of references to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, combinations, islice
from typing import Any
from urllib.parse import unquote

from shared.json_refs import target

MOST_OPTIONS = 64
"""Each option is compared with each other; a longer list stays as it is."""

MOST_REFS = 8
"""References to references that are followed."""

MOST_REQUIRED = 64
"""Names that are looked at in a list of required ones."""

MOST_STEPS = 40_000
"""Comparisons for a schema, about a microsecond each; what comes behind them stays as it is."""

MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
SINGLE = {"items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"}
"""Keywords, by what they hold: subschemas by name, several, or one."""

KINDS = {str: {"string"}, bool: {"boolean"}, type(None): {"null"}}
"""The types of JSON's values that are equal where Python's are: 1 and true are not compared."""


def plain(schema: dict[str, Any], steps: int = MOST_STEPS) -> dict[str, Any]:
    """Return a schema that the same documents follow, without a `oneOf` that `anyOf` can replace.

    What is no subschema, such as a `const` or a `default`, stays as it is, and so does the schema
    that was given. Nesting has to be bounded by the caller.

    Args:
        schema: with references into itself.
        steps: most comparisons of options, and of what is required of them.
    """
    if not all(map(_safe, _objects(schema))):
        return schema
    made: dict[str, Any] = _plain(schema, _Choices(schema, steps))
    return made


def _objects(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    waiting: list[Any] = [*schema.values()]
    yield {name: value for name, value in schema.items() if name != "$id"}
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _safe(node: dict[str, Any]) -> bool:
    """Return whether its reference, if any, is where we look for it, then as now."""
    ref = node.get("$ref")
    plainly = not isinstance(ref, str) or ref == "#" or ref.startswith("#/")
    return plainly and "/oneOf" not in unquote(str(ref)) and not isinstance(node.get("$id"), str)


def _plain(node: Any, choices: _Choices) -> Any:
    if not isinstance(node, dict):
        return node
    made: dict[str, Any] = {}
    for name, value in node.items():
        if name in MAPS and isinstance(value, dict):
            made[name] = {key: _plain(child, choices) for key, child in value.items()}
        elif name in LISTS and isinstance(value, list):
            made[name] = [_plain(child, choices) for child in value]
        else:
            made[name] = _plain(value, choices) if name in SINGLE else value
    options = node.get("oneOf")
    if isinstance(options, list) and options and "anyOf" not in node and choices.exclude(options):
        made["anyOf"] = made.pop("oneOf")
    return made


class _Part:
    """What is known of a document that follows a subschema, references in it aside."""

    def __init__(self, node: dict[str, Any]) -> None:
        self.node = node
        self.values = _values(node)
        self.kinds = _kinds(node, self.values)
        names, properties = node.get("required"), node.get("properties", {})
        listed = islice(names if isinstance(names, list) else [], MOST_REQUIRED)
        self.required = [name for name in listed if isinstance(name, str)]
        self.properties = properties if isinstance(properties, dict) else {}
        closed = node.get("additionalProperties") is False and isinstance(properties, dict)
        self.closed = closed and "patternProperties" not in node


class _Option:
    """What is known of a document that follows all of some parts."""

    def __init__(self, parts: list[_Part]) -> None:
        self.parts = parts
        kinds = [part.kinds for part in parts if part.kinds is not None]
        self.kinds = set.intersection(*kinds) if kinds else None
        self.values = next((part.values for part in parts if part.values is not None), None)
        self.required = dict.fromkeys(name for part in parts for name in part.required)
        self.limits: dict[str, set[Any] | None] = {}  # properties that were asked for


class _Choices:
    """Tells whether options exclude each other, until the steps are used up.

    Each subschema is read once, however many refer to it.
    """

    def __init__(self, root: dict[str, Any], steps: int) -> None:
        self._root, self._steps = root, steps
        self._parts: dict[int, _Part] = {}  # by the subschema's id

    def exclude(self, options: list[Any]) -> bool:
        """Return whether no document can follow two of the options, as far as can be seen."""
        if len(options) > MOST_OPTIONS:
            return False
        known = [_Option(self._follow(option)) for option in options]
        return all(self._apart(one, other) for one, other in combinations(known, 2))

    def _spend(self, steps: int) -> bool:
        self._steps -= steps
        return self._steps >= 0

    def _follow(self, node: Any) -> list[_Part]:
        """Return what a document of this subschema has to follow, all of it."""
        found: list[_Part] = []
        while isinstance(node, dict) and len(found) < MOST_REFS:
            part = self._parts.get(id(node))
            if part is None:
                part = self._parts[id(node)] = _Part(node)
            found.append(part)
            node = target(node.get("$ref"), self._root)
        return found

    def _apart(self, one: _Option, other: _Option) -> bool:
        if not self._spend(1):
            return False
        if one.kinds is not None and other.kinds is not None and one.kinds.isdisjoint(other.kinds):
            return True
        if self._differ(one.values, other.values):
            return True
        if one.kinds != {"object"} or other.kinds != {"object"}:
            return False
        if self._lacks(one, other) or self._lacks(other, one):
            return True
        names = chain(one.required, other.required)
        return any(self._differ(self._limit(one, n), self._limit(other, n)) for n in names)

    def _differ(self, one: set[Any] | None, other: set[Any] | None) -> bool:
        if one is None or other is None:
            return False
        return self._spend(min(len(one), len(other)) // 32) and one.isdisjoint(other)

    def _lacks(self, one: _Option, other: _Option) -> bool:
        """Return whether an option allows no property that the other one requires."""
        return any(
            self._spend(1 + len(other.required) // 32)
            and bool(other.required.keys() - part.properties.keys())
            for part in one.parts
            if part.closed
        )

    def _limit(self, option: _Option, name: str) -> set[Any] | None:
        """Return what a property may be, where it can only be one of a few values."""
        if name not in option.limits:
            said = [part.properties[name] for part in option.parts if name in part.properties]
            parts = [one for node in said for one in self._follow(node)]
            within = (part.values for part in parts if part.values is not None)
            left = self._spend(1 + len(option.parts) + len(parts))
            option.limits[name] = next(within, None) if left else None
        return option.limits[name] if self._spend(1) else None


def _kinds(node: dict[str, Any], values: set[Any] | None) -> set[str] | None:
    """Return the types that a document may have; None for any. An integer is a number too."""
    given = node.get("type")
    names = given if isinstance(given, list) else [given]
    stated = {name for name in names if isinstance(name, str)}
    if "number" in stated:
        stated.add("integer")
    if values is not None:
        stated = {kind for value in values for kind in KINDS[type(value)]}
    return stated or None


def _values(node: dict[str, Any]) -> set[Any] | None:
    """Return the strings, truth values and nulls that a document has to be one of; None: others."""
    listed = [node["const"]] if "const" in node else node.get("enum")
    if isinstance(listed, list) and all(type(value) in KINDS for value in listed):
        return set(listed)
    return None
