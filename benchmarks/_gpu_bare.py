"""Lets the engine's modules be imported where msgspec is not installed: a GPU machine without it.

Only what an engine alone needs is there: structs, which become dataclasses. Nothing is encoded.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from typing import Any


def stand_in() -> bool:
    """Put a stand-in at msgspec's place if it cannot be imported; return whether that was so."""
    try:
        importlib.import_module("msgspec")
    except ImportError:
        sys.modules["msgspec"] = module = types.ModuleType("msgspec")
        vars(module).update(Struct=_Struct, json=_Json, structs=dataclasses)
        return True
    return False


class _Struct:
    """A base whose subclasses are dataclasses; how msgspec would write them is ignored."""

    def __init_subclass__(cls, *, frozen: bool = False, **_options: Any) -> None:
        super().__init_subclass__()
        for name in cls.__annotations__:
            default = vars(cls).get(name)
            if isinstance(default, (dict, list, set)):
                setattr(cls, name, dataclasses.field(default_factory=default.copy))
        dataclasses.dataclass(frozen=frozen)(cls)


class _Json:
    """Holds the names of msgspec's encoders; they are made when a module is loaded, and not run."""

    def __init__(self, *_types: Any) -> None: ...


_Json.Encoder = _Json.Decoder = _Json  # type: ignore[attr-defined]
