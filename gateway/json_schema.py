"""Looks at the JSON Schemas of requests before they are queued: size, depth, and whether they end.

What needs the grammar's compiler is checked by the worker, in a process that may die of it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gateway.schema_choices import plain
from gateway.schema_width import width
from shared.errors import invalid
from shared.json_refs import target

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_CHARACTERS = 65536
MAX_DEPTH = 32
MAX_NODES = 2000
"""Objects and lists in a schema. With 2,000 properties the compiler takes 0.1 s, with 5,000 4 s."""

MAX_ALL_CHARACTERS = 8 * MAX_CHARACTERS
MAX_ALL_NODES = 8 * MAX_NODES
"""What all schemas of a request, and what it says of them, may have together."""

MAX_ENUM = 1000

MAX_WIDTH = 500
"""Branches that may be open at one place of an answer (`schema_width.width`): properties that may
come next, in all alternatives together. The worker's matchers (worker/grammar.py) bear it."""

WHITESPACE = r"\n?[ ]{0,16}"
"""Between two tokens of JSON: enough to indent, and not so much that a model loses itself in it."""

OPTIONS = {"whitespace_pattern": WHITESPACE}
"""How the compiler (llguidance) shall read a schema; a client has no say in it."""


class SchemaBudget:
    """What the schemas of one request may still have together, and the texts beside them."""

    def __init__(self) -> None:
        self.nodes = MAX_ALL_NODES
        self.characters = MAX_ALL_CHARACTERS

    def spend(self, where: str, *, characters: int, nodes: int = 0) -> None:
        """Count what stands at `where`.

        Raises:
            UnbrokenError: `invalid_value`, where it is more than is left.
        """
        self.nodes -= nodes
        self.characters -= characters
        if self.nodes < 0:
            raise invalid(where, f"makes more than {MAX_ALL_NODES} parts in all schemas together")
        if self.characters < 0:
            raise invalid(
                where, f"makes more than {MAX_ALL_CHARACTERS} characters in all schemas together"
            )


def parse_format(
    given: Any, where: str = "response_format", budget: SchemaBudget | None = None
) -> str:
    """Return the JSON text of the schema that the answer has to follow; empty for any text.

    Args:
        given: the request's `response_format`.
        where: its name, for errors.
        budget: what the request's schemas may have together.

    Raises:
        UnbrokenError: a 400 that names the parameter at fault.
    """
    if given is None:
        return ""
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return ""
    if kind == "json_object":
        return check_schema({"type": "object"}, where, budget)
    if kind != "json_schema":
        raise invalid(where, "must be of type 'text', 'json_object' or 'json_schema'")
    flat = where != "response_format"  # the Responses API has no object of its own for it
    inner = given if flat else given.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    path = f"{where}.schema" if flat else f"{where}.json_schema.schema"
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise invalid(path, "must be a JSON Schema")
    return check_schema(schema, path, budget)


def check_schema(schema: dict[str, Any], where: str, budget: SchemaBudget | None = None) -> str:
    """Return a schema's JSON text, as the worker's compiler takes it.

    Raises:
        UnbrokenError: `invalid_value`, where it is too large (alone, or for the request's budget),
            too deep or too wide, or where no finite document follows it because it contains
            itself.
    """
    nodes = _count(schema, where)
    choices = plain(schema, 1000 + 20 * nodes)  # all schemas of a request: half a second at most
    text = json.dumps({**choices, "x-guidance": OPTIONS}, ensure_ascii=False)
    if len(text) > MAX_CHARACTERS:
        raise invalid(where, f"has more than {MAX_CHARACTERS} characters")
    (budget or SchemaBudget()).spend(where, nodes=nodes, characters=len(text))
    if not _ends(schema):
        raise invalid(where, "contains itself without an end")
    branches = width(schema, lambda ref: target(ref, schema))
    if branches > MAX_WIDTH:
        raise invalid(
            where,
            f"leaves up to {branches} alternatives and optional properties open at one place of an "
            f"answer; the limit is {MAX_WIDTH}",
        )
    return text


def _count(schema: Any, where: str) -> int:
    """Count objects and lists; refuse too many, too deep ones, and options of the compiler."""
    level, nodes, depth = [schema], 0, 0
    while level:
        nodes, depth = nodes + len(level), depth + 1
        if nodes > MAX_NODES:
            raise invalid(where, f"has more than {MAX_NODES} parts")
        if depth > 2 * MAX_DEPTH:  # a property takes two levels
            raise invalid(where, f"is nested more than {MAX_DEPTH} deep")
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                if "x-guidance" in node:
                    raise invalid(where, "has 'x-guidance', which is not supported")
                target = node.get("$ref")
                if isinstance(target, str) and not target.startswith("#"):
                    raise invalid(where, "has a '$ref' that leads out of it: nothing is fetched")
                below += node.values()
                values = node.get("enum")
                if isinstance(values, list) and len(values) > MAX_ENUM:
                    raise invalid(where, f"has an enum of more than {MAX_ENUM} values")
            else:
                below += node
        level = [node for node in below if isinstance(node, (dict, list))]
    return nodes


class _Gate:
    """A condition that opens once `needs` of those before it have opened."""

    __slots__ = ("behind", "needs")

    def __init__(self, needs: int = 0) -> None:
        self.needs = needs
        self.behind: list[_Gate] = []


Gates = dict[int, _Gate]
"""A gate for each subschema, by its `id`; it opens where a finite document follows that one."""


def _ends(root: dict[str, Any]) -> bool:
    """Tell whether a finite document can follow the schema, as far as recursion goes.

    A gate is looked at once for each way that leads to it, so the time is linear.
    """
    nodes = _subschemas(root)
    gates = {id(node): _Gate() for node in nodes}
    made: list[_Gate] = []
    for node in nodes:
        _require(node, root, gates, made)
    opening = [gate for gate in (*gates.values(), *made) if gate.needs == 0]
    while opening:
        for gate in opening.pop().behind:
            gate.needs -= 1
            if gate.needs == 0:  # below: one of several alternatives, after the first
                opening.append(gate)
    return gates[id(root)].needs <= 0


def _subschemas(root: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a schema and all that lies in it, the innermost first."""
    found, open_nodes = list[dict[str, Any]](), [root]
    while open_nodes:
        node = open_nodes.pop()
        found.append(node)
        open_nodes += [child for child in node.values() if isinstance(child, dict)]
        for child in node.values():
            if isinstance(child, list):
                open_nodes += [one for one in child if isinstance(one, dict)]
    return found[::-1]


def _require(node: dict[str, Any], root: dict[str, Any], gates: Gates, made: list[_Gate]) -> None:
    """Put a subschema's gate behind all that has to open first; lists what gates that makes."""
    if "enum" in node or "const" in node:
        return
    gate = gates[id(node)]
    _all(gate, [target(node.get("$ref"), root)], gates)
    whole = node.get("allOf")
    _all(gate, whole if isinstance(whole, list) else [], gates)
    for name in ("anyOf", "oneOf"):
        options = node.get(name)
        if (
            isinstance(options, list)
            and options
            and all(isinstance(option, dict) for option in options)
        ):
            _any(gate, [gates[id(option)] for option in options], made)
    kinds = node.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if any(kind not in ("object", "array") for kind in kinds):
        return
    ways: list[_Gate] = []
    for kind, needed in (("object", _in_object), ("array", _in_array)):
        if kind in kinds:
            ways.append(way := _Gate())
            _all(way, needed(node), gates)
    made += ways
    _any(gate, ways, made)


def _all(gate: _Gate, schemas: Iterable[Any], gates: Gates) -> None:
    """Let a gate wait for each of the schemas; what is no object holds nothing up."""
    for schema in schemas:
        if isinstance(schema, dict):
            gate.needs += 1
            gates[id(schema)].behind.append(gate)


def _any(gate: _Gate, ways: list[_Gate], made: list[_Gate]) -> None:
    """Let a gate wait for one of several; for ever, where there is none."""
    one = _Gate(needs=1)
    one.behind.append(gate)
    gate.needs += 1
    made.append(one)
    for way in ways:
        way.behind.append(one)


def _in_object(node: dict[str, Any]) -> Iterable[Any]:
    required, properties = node.get("required"), node.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    names = required if isinstance(required, list) else []
    rest = node.get("additionalProperties")
    return [properties.get(name, rest) for name in names if isinstance(name, str)]


def _in_array(node: dict[str, Any]) -> Iterable[Any]:
    least = node.get("minItems")
    least = least if isinstance(least, int) else 0
    first = node.get("prefixItems")
    first = first if isinstance(first, list) else []
    return [*first[:least], *([node.get("items")] if least > len(first) else [])]
