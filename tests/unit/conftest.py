"""What unit tests share beside `tests/conftest.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def loaded(demo_model: Path) -> Iterator[Any]:
    """The demo model, with one torch thread, as in the engine's process: two wait for each other.

    A module with another model has a fixture of this name itself.
    """
    import torch

    from tests.engine_kit import config
    from worker.engine.loader import load

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load(config(demo_model), lambda *_: None)
    torch.set_num_threads(threads)
