"""Local references of JSON Schemas, as gateway and worker both follow them."""

from __future__ import annotations

from typing import Any


def target(ref: Any, root: dict[str, Any]) -> Any:
    """Return what a local reference points to; None where it is none, or points nowhere."""
    if not isinstance(ref, str) or not ref.startswith("#"):
        return None
    node: Any = root
    for part in ref[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        node = node.get(name) if isinstance(node, dict) else None
    return node
