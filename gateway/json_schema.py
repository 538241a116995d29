"""Looks at the JSON Schemas of requests before they are queued: size, depth, and whether they end.

What needs the grammar's compiler is checked by the worker, in a process that may die of it.
"""

from __future__ import annotations

import json
from typing import Any

from shared.errors import UnbrokenError

MAX_CHARACTERS = 65536
MAX_DEPTH = 32
MAX_NODES = 2000
"""Objects and lists in a schema. With 2,000 properties the compiler takes 0.1 s, with 5,000 4 s."""

PASSES = 32
"""How often a schema is gone over to see whether it ends; one that is still not clear may pass."""

MAX_ENUM = 1000

WHITESPACE = r"\n?[ ]{0,16}"
"""Between two tokens of JSON: enough to indent, and not so much that a model loses itself in it."""

OPTIONS = {"whitespace_pattern": WHITESPACE}
"""How the compiler (llguidance) shall read the schema, whatever the client says of it."""


def parse_format(given: Any, where: str = "response_format") -> str:
    """Return the JSON text of the schema that the answer has to follow; empty for any text.

    Args:
        given: the request's `response_format`.
        where: its name, for errors.

    Raises:
        UnbrokenError: a 400 that names the parameter at fault.
    """
    if given is None:
        return ""
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return ""
    if kind == "json_object":
        return check_schema({"type": "object"}, where)
    if kind != "json_schema":
        raise _wrong(where, "must be of type 'text', 'json_object' or 'json_schema'")
    flat = where != "response_format"  # the Responses API has no object of its own for it
    inner = given if flat else given.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    path = f"{where}.schema" if flat else f"{where}.json_schema.schema"
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise _wrong(path, "must be a JSON Schema")
    return check_schema(schema, path)


def check_schema(schema: dict[str, Any], where: str) -> str:
    """Return a schema's JSON text, as the worker's compiler takes it.

    Raises:
        UnbrokenError: `invalid_value`, where it is too large or too deep, or where no finite
            document follows it because it contains itself.
    """
    nodes = _count(schema, where)
    if nodes > MAX_NODES:
        raise _wrong(where, f"has more than {MAX_NODES} parts")
    text = json.dumps({**schema, "x-guidance": OPTIONS}, ensure_ascii=False)
    if len(text) > MAX_CHARACTERS:
        raise _wrong(where, f"has more than {MAX_CHARACTERS} characters")
    if not _ends(schema):
        raise _wrong(where, "contains itself without an end")
    return text


def _wrong(where: str, why: str) -> UnbrokenError:
    return UnbrokenError("invalid_value", f"'{where}' {why}.", where)


def _count(schema: Any, where: str) -> int:
    """Count objects and lists; refuse what is too deep, and options of the compiler within."""
    level, nodes, depth = [schema], 0, 0
    while level:
        nodes, depth = nodes + len(level), depth + 1
        if depth > 2 * MAX_DEPTH:  # a property takes two levels
            raise _wrong(where, f"is nested more than {MAX_DEPTH} deep")
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                if node is not schema and "x-guidance" in node:
                    raise _wrong(where, "has 'x-guidance', which is not supported")
                below += node.values()
                values = node.get("enum")
                if isinstance(values, list) and len(values) > MAX_ENUM:
                    raise _wrong(where, f"has an enum of more than {MAX_ENUM} values")
            else:
                below += node
        level = [node for node in below if isinstance(node, (dict, list))]
    return nodes


def _ends(root: dict[str, Any]) -> bool:
    """Tell whether a finite document can follow the schema, as far as recursion goes.

    Grows the set of subschemas that can end until it grows no more.
    """
    left = _subschemas(root)
    ends: set[int] = set()
    for _ in range(PASSES):
        before = len(left)
        for node in left:
            if _can(node, root, ends):
                ends.add(id(node))
        left = [node for node in left if id(node) not in ends]
        if id(root) in ends:
            return True
        if len(left) == before:
            return False
    return True


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


def _can(node: dict[str, Any], root: dict[str, Any], ends: set[int]) -> bool:
    """Tell whether a schema can end, given those that are known to."""
    if "enum" in node or "const" in node:
        return True
    if not _known(_target(node.get("$ref"), root), ends):
        return False
    for name, enough in (("allOf", all), ("anyOf", any), ("oneOf", any)):
        options = node.get(name)
        if isinstance(options, list) and options and not enough(_known(o, ends) for o in options):
            return False
    kinds = node.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if any(kind not in ("object", "array") for kind in kinds):
        return True
    return ("object" in kinds and _object_can(node, ends)) or (
        "array" in kinds and _array_can(node, ends)
    )


def _known(schema: Any, ends: set[int]) -> bool:
    return not isinstance(schema, dict) or id(schema) in ends


def _object_can(node: dict[str, Any], ends: set[int]) -> bool:
    required, properties = node.get("required"), node.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    names = required if isinstance(required, list) else []
    rest = node.get("additionalProperties")
    return all(_known(properties.get(name, rest), ends) for name in names if isinstance(name, str))


def _array_can(node: dict[str, Any], ends: set[int]) -> bool:
    least = node.get("minItems")
    least = least if isinstance(least, int) else 0
    first = node.get("prefixItems")
    first = first if isinstance(first, list) else []
    needed = [*first[:least], *([node.get("items")] if least > len(first) else [])]
    return all(_known(item, ends) for item in needed)


def _target(ref: Any, root: dict[str, Any]) -> Any:
    """Return what a local reference points to; None where it is none, or points nowhere."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    node: Any = root
    for part in ref[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        node = node.get(name) if isinstance(node, dict) else None
    return node
