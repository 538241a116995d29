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


class _Size(NamedTuple):
    """Of a subschema: how many `ways` there are to read it, and the branches of all of them."""

    ways: int
    branches: int


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
    return sizes[id(root)].branches


def _children(node: dict[str, Any], resolve: Resolve) -> Iterator[dict[str, Any]]:
    found = [*_within(node), *_beside(node), *_all_of(node, resolve)]
    for name in ("anyOf", "oneOf"):
        found += _list(node, name)
    yield from (child for child in found if isinstance(child, dict))


def _size(node: dict[str, Any], resolve: Resolve, sizes: dict[int, _Size]) -> _Size:
    """Return a subschema's size, from those of what lies in it; what is being sized counts 0."""

    def known(child: Any) -> _Size:
        return sizes.get(id(child), NOTHING) if isinstance(child, dict) else NOTHING

    own = max(_run(node), *(known(child).branches for child in _within(node)), 0)
    own = max(own, sum(known(child).branches for child in _beside(node)))
    parts = [_Size(1, own), *map(known, _all_of(node, resolve))]
    for name in ("anyOf", "oneOf"):
        options = [known(option) for option in _list(node, name)]
        if options:
            ways = sum(option.ways for option in options)
            parts.append(_Size(ways, sum(option.branches for option in options)))
    values = sum(isinstance(value, (dict, list)) for value in _list(node, "enum"))
    parts.append(_Size(max(values, 1), values))
    whole = _both(parts)
    return _Size(whole.ways, max(whole.branches, 1))


def _both(parts: list[_Size]) -> _Size:
    """Return the size of what has to follow all of the parts: each way with each of the others."""
    ways, branches = 1, 0
    for part in parts:
        branches = min(branches * part.ways + part.branches * ways, MOST)
        ways = min(ways * part.ways, MOST)
    return _Size(ways, branches)


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
    return (longest + 1) * (len(properties) if counted else 1)


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
