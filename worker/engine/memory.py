"""How much main memory is free, and whether an error is for the want of it."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def available_memory() -> int:
    """Return the bytes of main memory that this process may still take."""
    available = int(psutil.virtual_memory().available)
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        available = min(available, int(limit))
    return available


def lacks_memory(error: BaseException) -> bool:
    """Tell whether memory was short; torch's CPU allocator says so in a `RuntimeError`."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "t allocate" in str(error)
