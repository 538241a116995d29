"""Random JSON Schemas whose documents are not endless."""

from __future__ import annotations


def a_schema(draw, depth=0):  # noqa: C901, PLR0911  # a kind after the other
    """Return a random schema whose documents are not endless."""
    kinds = ["enum", "const", "string", "integer", "boolean", "null", "pattern", "date"]
    kind = draw.choice(kinds + ["object", "object", "array", "any", "tuple"] * (depth < 3))
    if kind == "enum":
        return {"enum": draw.sample(["a", "b c", 'q"', "é", 1, -2.5, None, True, [1]], 3)}
    if kind == "const":
        return {"const": draw.choice(["x", {"k": [1]}, 0])}
    if kind == "string":
        return {"type": "string", "minLength": draw.randint(0, 2), "maxLength": draw.randint(2, 8)}
    if kind == "integer":
        low = draw.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 500)}
    if kind == "pattern":
        return {"type": "string", "pattern": draw.choice(["^[a-f]{2,5}$", "^(on|off)$"])}
    if kind == "date":
        return {"type": "string", "format": draw.choice(["date", "ipv4", "uuid"])}
    if kind == "object":
        names = draw.sample(["id", "name", "a b", "ü", "type", "x1"], draw.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: a_schema(draw, depth + 1) for name in names},
            "required": draw.sample(names, draw.randint(0, len(names))),
            "additionalProperties": False,
        }
    if kind == "array":
        items = {"items": a_schema(draw, depth + 2)}
        return {"type": "array", **items, "minItems": draw.randint(0, 1), "maxItems": 2}
    if kind == "tuple":
        both = [a_schema(draw, depth + 2), a_schema(draw, depth + 2)]
        return {"type": "array", "prefixItems": both, "items": False, "minItems": 2}
    if kind == "any":
        return {"anyOf": [a_schema(draw, depth + 2), a_schema(draw, depth + 2)]}
    return {"type": kind}


def an_object(draw):
    """Return a random schema of an object, whose documents are not endless."""
    names = draw.sample(["id", "name", "a b", "ü", "type", "x1"], draw.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: a_schema(draw, 1) for name in names},
        "required": draw.sample(names, draw.randint(0, len(names))),
        "additionalProperties": False,
    }
