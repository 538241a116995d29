"""How much main memory is free, and whether an error is for the want of it."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

WORDS = ("tried to allocate", "t allocate memory", "not enough memory", "bad_alloc")
"""What errors of torch's CPU allocator and of C++ say, also as a recorded step repeats them."""


def available_memory() -> int:
    """Return the bytes of main memory that this process may still take."""
    available = int(psutil.virtual_memory().available)
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        available = min(available, int(limit))
    return available


def lacks_memory(error: BaseException) -> bool:
    """Tell whether memory was short; torch's CPU allocator says so in a `RuntimeError`."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
