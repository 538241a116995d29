"""Ends a program of this container that hangs, so that the restart policy starts it again.

For health commands: Docker asks them, and says "unhealthy", but does nothing about it. Needs the
standard library alone.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

STRIKES = 3
"""So many checks in a row must have found that it hangs."""

INIT = 1
"""The container's first process; the program is its child."""


def judge(notes: Path, module: str, *, hangs: bool) -> bool:
    """Take note of a check's result; kill the program with the last strike.

    Args:
        notes: a file that is this command's own, for the strikes between two calls.
        module: the program, as in `python -m module`.
        hangs: what the check has found.

    Returns:
        Whether the program was killed.
    """
    if not hangs:
        notes.unlink(missing_ok=True)
        return False
    try:
        strikes = int(notes.read_text()) + 1
    except (FileNotFoundError, ValueError):
        strikes = 1
    notes.write_text(str(strikes))
    if strikes < STRIKES:
        return False
    notes.unlink()
    found = _programs(module)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return bool(found)


def _programs(module: str) -> list[int]:
    """Return the children of init that run this module."""
    wanted, found = [b"-m", module.encode()], []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            argv = (folder / "cmdline").read_bytes().split(b"\0")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue  # it has ended meanwhile
        if argv[1:3] == wanted and int(parent) == INIT:
            found.append(int(folder.name))
    return found
