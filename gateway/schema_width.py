"""Estimates how many branches of a JSON Schema can be open at one place of an answer.

The matcher of the worker follows all of them side by side, and gives up beyond a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Resolve = Callable[[Any], Any]
"""Returns what a `$ref` points to; None where that is nothing."""

MOST = 10**9
"""Widths are not counted further: alternatives of alternatives multiply."""


ALIKE = 4
"""As many alternatives that only differ in what is required cost as much as one other: they share
the names, and the matcher follows one item for each where it follows four otherwise."""

MERGING = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "enum"}
"""What makes more than one reading of a subschema, or takes more than one to read it."""

NOTES = {"title", "description", "default", "examples", "discriminator", "type"} | {
    *("$schema", "$id", "$comment", "$defs", "definitions"),
}
"""What leaves nothing open."""


class _Size(NamedTuple):
    """Of a subschema: how many `ways` there are to read it, and the branches of all of them.

    `needs` are further ways, which differ only in what is required. `alone` are the branches where
    nothing else has to be followed at the same place: then one property can tell the ways apart.
    """

    ways: int
    branches: int
    needs: int = 1
    alone: int = 0

    @property
    def total(self) -> int:
        """Return the branches, with those of all needs."""
        return min(self.branches * -(-self.needs // ALIKE), MOST)


NOTHING = _Size(1, 0)


def width(root: dict[str, Any], resolve: Resolve) -> int:
    """Return an estimate, from above, of the branches that are open at the same time.

    These are the properties that may come next, in each alternative that the text so far fits.
    What contains itself is counted once: the matcher shares what begins at one place.
    Each subschema is looked at once, so the time is linear.
    """
    sizes: dict[int, _Size] = {}
    begun = set[int]()
    stack = [root]
    while stack:
        node = stack[-1]
        if id(node) not in begun:
            begun.add(id(node))
            stack += [child for child in _children(node, resolve) if id(child) not in begun]
            continue
        stack.pop()
        if id(node) not in sizes:
            sizes[id(node)] = _size(node, resolve, sizes)
    return sizes[id(root)].alone


def _children(node: dict[str, Any], resolve: Resolve) -> Iterator[dict[str, Any]]:
    found = [*_within(node), *_beside(node), *_all_of(node, resolve)]
    for name in ("anyOf", "oneOf"):
        found += _list(node, name)
    yield from (child for child in found if isinstance(child, dict))


def _size(node: dict[str, Any], resolve: Resolve, sizes: dict[int, _Size]) -> _Size:
    """Return a subschema's size, from those of what lies in it; what is being sized counts 0."""

    def known(child: Any) -> _Size:
        return sizes.get(id(child), NOTHING) if isinstance(child, dict) else NOTHING

    own = max(_run(node), *(known(child).total for child in _within(node)), 0)
    own = max(own, sum(known(child).total for child in _beside(node)))
    parts = [_Size(1, own), *map(known, _all_of(node, resolve))]
    for name in ("anyOf", "oneOf"):
        options = _list(node, name)
        if options and all(isinstance(o, dict) and _says(o) == {"required"} for o in options):
            parts.append(_Size(1, 0, len(options)))
        elif options:
            ways = sum(known(option).ways * known(option).needs for option in options)
            parts.append(_Size(ways, sum(known(option).total for option in options)))
    values = sum(isinstance(value, (dict, list)) for value in _list(node, "enum"))
    parts.append(_Size(max(values, 1), values))
    whole = _both(parts)
    if whole.needs == 1:
        whole = whole._replace(branches=max(whole.branches, 1))
    return whole._replace(alone=_alone(node, resolve, known, whole.total))


def _alone(
    node: dict[str, Any], resolve: Resolve, known: Callable[[Any], _Size], total: int
) -> int:
    """Return the branches of a subschema that is followed alone; `total` where that is no help."""
    says = _says(node)
    if says == {"$ref"}:
        return known(resolve(node["$ref"])).alone
    if says in ({"anyOf"}, {"oneOf"}):
        options = _list(node, *says)
        each = [known(option).alone for option in options]
        if _told_apart(options, resolve):
            return len(options) + max(each)
        return min(sum(each), total)
    if says & MERGING:
        return total
    beside = sum(known(child).alone for child in _beside(node))
    return max(_run(node), *(known(child).alone for child in _within(node)), beside, 1)


def _told_apart(options: list[Any], resolve: Resolve) -> bool:
    """Return whether these are objects that begin with the same property, each with its own words.

    It is required and comes first, so no more than one of them is followed behind it.
    """
    names, words = set[str](), list[Any]()
    for given in options:
        option = given
        for _ in range(ALIKE):  # references to references
            if isinstance(option, dict) and _says(option) == {"$ref"}:
                option = resolve(option["$ref"])
        if not isinstance(option, dict) or option.get("type") != "object":
            return False
        properties = option.get("properties")
        if _says(option) & MERGING or not isinstance(properties, dict) or not properties:
            return False
        name, first = next(iter(properties.items()))
        if name not in _list(option, "required") or not isinstance(first, dict):
            return False
        names.add(name)
        words += [first["const"]] if "const" in first else _list(first, "enum") or [None]
    return (
        len(names) == 1
        and all(isinstance(word, str) for word in words)
        and len(set(words)) == len(words)
    )


def _says(node: dict[str, Any]) -> set[str]:
    return node.keys() - NOTES


def _both(parts: list[_Size]) -> _Size:
    """Return the size of what has to follow all of the parts: each way with each of the others."""
    ways, branches, needs = 1, 0, 1
    for part in parts:
        branches = min(branches * part.ways + part.branches * ways, MOST)
        ways, needs = min(ways * part.ways, MOST), min(needs * part.needs, MOST)
    return _Size(ways, branches, needs)


def _run(node: dict[str, Any]) -> int:
    """Return the most properties of an object of which any one may come next."""
    properties, required = node.get("properties"), node.get("required")
    if not isinstance(properties, dict):
        return 0
    names = required if isinstance(required, list) else []
    needed = {name for name in names if isinstance(name, str)}
    longest = run = 0
    for name in properties:
        run = 0 if name in needed else run + 1
        longest = max(longest, run)
    counted = "minProperties" in node or "maxProperties" in node  # an alternative for each of them
    return (longest + 1) * (max(1, -(-len(properties) // ALIKE)) if counted else 1)


def _within(node: dict[str, Any]) -> list[Any]:
    """Return the subschemas for parts of a document, of which only one is read at a time."""
    properties = node.get("properties")
    found = list(properties.values()) if isinstance(properties, dict) else []
    return [*found, node.get("items"), *_list(node, "prefixItems")]


def _beside(node: dict[str, Any]) -> list[Any]:
    """Return those for properties whose names may fit several of them."""
    patterns = node.get("patternProperties")
    found = list(patterns.values()) if isinstance(patterns, dict) else []
    return [*found, node.get("additionalProperties")]


def _all_of(node: dict[str, Any], resolve: Resolve) -> list[Any]:
    return [*_list(node, "allOf"), resolve(node.get("$ref"))]


def _list(node: dict[str, Any], name: str) -> list[Any]:
    value = node.get(name)
    return value if isinstance(value, list) else []
