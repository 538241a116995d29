"""The gateway's own program, which also says how long the garbage collector held it up.

For each line on stdin it answers with a JSON line: the longest pause of each generation since the
line before, in ms (0: none). It reads the clock of the thread's CPU time, so that a busy machine's
pauses do not count as the collector's, once per collection and never per event.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time

from gateway import main as gateway


class Pauses:
    """The longest pause of each generation."""

    def __init__(self) -> None:
        self.longest = [0.0] * 3
        self._began = 0.0

    def note(self, phase: str, info: dict[str, int]) -> None:
        """Take the beginning or the end of a collection (`gc.callbacks`)."""
        if phase == "start":
            self._began = time.thread_time()
        else:
            pause, generation = time.thread_time() - self._began, info["generation"]
            self.longest[generation] = max(self.longest[generation], pause)

    def tell(self) -> None:
        """Answer the lines on stdin, until it closes."""
        for _ in sys.stdin:
            longest, self.longest = self.longest, [0.0] * 3
            print(json.dumps([pause * 1e3 for pause in longest]), flush=True)


def main() -> None:
    """Serve as the gateway does."""
    pauses = Pauses()
    gc.callbacks.append(pauses.note)
    threading.Thread(target=pauses.tell, daemon=True).start()
    gateway.main()


if __name__ == "__main__":
    main()
