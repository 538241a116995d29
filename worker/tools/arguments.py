"""Turns arguments that a model writes as plain text into JSON, by the schema of its function."""

from __future__ import annotations

import json
from typing import Any

from shared.json_refs import target

TYPES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}
PLAIN = frozenset(
    ("type", "enum", "const", "minLength", "maxLength", "title", "description", "default")
) | {"examples", "$comment", "deprecated", "readOnly", "writeOnly"}
"""What a schema of a string may say that is written without quotation marks."""

PYTHON = {"True": ("boolean", "true"), "False": ("boolean", "false"), "None": ("null", "null")}
"""Words that models write instead of JSON's: the type, and JSON's word."""

MOST_REFERENCES = 32


class Arguments:
    """The arguments of one function.

    Args:
        schema: of the function's arguments, as JSON; empty where it is not known.
    """

    def __init__(self, schema: str) -> None:
        self._root: dict[str, Any] = json.loads(schema) if schema else {}

    def of(self, key: str) -> Any:
        """Return the schema of an argument; True for anything."""
        properties = self._root.get("properties")
        found = properties.get(key) if isinstance(properties, dict) else None
        return self._root.get("additionalProperties", True) if found is None else found

    def streams(self, key: str) -> bool:
        """Tell whether an argument is a string that is written as it is."""
        return is_text(self.of(key))

    def json_of(self, key: str, text: str) -> str:
        """Return an argument as JSON: of what is written, or else of a string.

        What is JSON of a type that the schema does not allow, but a string would be, is a string.
        Python's words count as JSON's where the schema has their type, and no string.
        """
        types = self._types(self.of(key))
        kind, word = PYTHON.get(text.strip(), ("", ""))
        if kind in types and "string" not in types:
            return word
        try:
            value = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return json.dumps(text.removeprefix("\n").removesuffix("\n"), ensure_ascii=False)
        kind = TYPES[type(value)]
        known = kind in types or (kind == "integer" and "number" in types)
        if types and not known and "string" in types:
            return json.dumps(text.removeprefix("\n").removesuffix("\n"), ensure_ascii=False)
        return text.strip()

    def _types(self, schema: Any) -> set[str]:
        """Return the types that a schema names; none where it may be any."""
        found, open_schemas = set[str](), [schema]
        for _ in range(MOST_REFERENCES):
            if not open_schemas:
                return found
            node = open_schemas.pop()
            if not isinstance(node, dict):
                return set()
            named = node.get("type")
            values = [*_list(node, "enum"), *([node["const"]] if "const" in node else [])]
            options = [*_list(node, "anyOf"), *_list(node, "oneOf")]
            if named:
                names = [named] if isinstance(named, str) else _list(node, "type")
                found |= {name for name in names if isinstance(name, str)}
            elif values:
                found |= {TYPES[type(value)] for value in values}
            elif options:
                open_schemas += options
            elif "$ref" in node:
                open_schemas.append(target(node["$ref"], self._root))
            else:
                return set()
        return set()


def is_text(schema: Any) -> bool:
    """Tell whether a schema is that of a string, and no more than a count of letters or a list."""
    if not isinstance(schema, dict) or not schema.keys() <= PLAIN:
        return False
    if not isinstance(schema.get("enum", []), list):
        return False
    values = [*_list(schema, "enum"), *([schema["const"]] if "const" in schema else [])]
    if any(not isinstance(value, str) or "</parameter>" in value for value in values):
        return False
    if any(type(schema.get(field, 0)) is not int for field in ("minLength", "maxLength")):
        return False
    return schema.get("type") == "string" or ("type" not in schema and bool(values))


def _list(node: dict[str, Any], name: str) -> list[Any]:
    value = node.get(name)
    return value if isinstance(value, list) else []


def _refuse(name: str) -> None:
    raise ValueError(name)
