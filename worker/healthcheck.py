"""How a worker is, in a file: it writes, `python -m worker.healthcheck FILE [--end-hung]` reads.

Reading needs the standard library alone, since it starts every few seconds.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from shared import hung

STALE_SECONDS = 60.0
"""A worker that has not written for so long hangs: it writes every second while Redis answers, and
between two attempts to reach it while it does not."""

HANGS = "broken: it hangs"


def write(path: Path, *, state: str, reason: str, model: str, running: int, slots: int) -> None:
    """Replace the file at once; a full disk is no reason to stop working."""
    word = {"at": time.time(), "state": state, "reason": reason, "model": model}
    new = path.with_name(path.name + ".new")
    with contextlib.suppress(OSError):
        new.write_text(json.dumps({**word, "running": running, "slots": slots}))
        new.replace(path)


def check(path: Path, now: float) -> tuple[int, str]:
    """Return an exit code, 0 for a worker that serves or drains, and a sentence.

    Args:
        path: the worker's `STATUS_FILE`.
        now: seconds since the epoch.
    """
    try:
        word: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return 1, "starting: the worker has not said anything yet"
    except (OSError, ValueError) as error:
        return 1, f"broken: its status cannot be read ({error})"
    if abs(now - word["at"]) > STALE_SECONDS:
        return 1, f"{HANGS}, silent for {now - word['at']:.0f} s"
    load = f"{word['running']} of {word['slots']} slots in use"
    return {
        "ready": (0, f"ready: {word['model']}, {load}"),
        "draining": (0, f"draining: {load}"),
        "failed": (1, f"broken: {word['reason']}"),
    }.get(word["state"], (1, f"starting: {word['reason']}"))


def main(arguments: list[str]) -> int:
    """Print the sentence; return the exit code.

    With `--end-hung`, a worker that has hung for three calls in a row is killed.
    """
    status = Path(arguments[0])
    code, sentence = check(status, time.time())
    if "--end-hung" in arguments:
        hangs = sentence.startswith(HANGS)
        hung.judge(status.with_name(status.name + ".hangs"), "worker.main", hangs=hangs)
    print(sentence)  # noqa: T201 - its answer
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
