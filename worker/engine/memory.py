"""How much main memory is free."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def available_memory() -> int:
    """Return the bytes of main memory that this process may still take."""
    available = int(psutil.virtual_memory().available)
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        available = min(available, int(limit))
    return available
