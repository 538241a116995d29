"""What all processes that need torch import, for the process that they are forked from."""

from __future__ import annotations

import gc
import importlib

from worker.engine.torchvision_shim import prepare_torchvision

MODULES = (
    "worker.engine.engine",
    "worker.engine.loader",
    "worker.engine.processor",
    "worker.child_entry",
    "transformers.generation.utils",  # found lazily, but by every model
    "transformers.processing_utils",
)


def preload() -> None:
    """Import it all, and nothing else: no tensor is computed, no thread started, no device used."""
    prepare_torchvision()
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the children's collections would copy the pages that they share
