"""Where the time of a decode step goes: the engine's parts timed by themselves, in one process.

`python -m benchmarks._engine_profile MODEL THREADS STREAMS…` prints a JSON line for each number of
streams: milliseconds of processor time per step, by part.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._engine_local import Local

STEPS = 48
PARTS = (
    "forward of the model, mask and cache",
    "inputs",
    "drawing",
    "text and stopping",
    "the rest of the step",
)


class Clock:
    """Adds up the processor time spent in functions, without that of the timed ones they call."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._open: list[float] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, counted as `part`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._open.append(0.0)
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - began
                self.spent[part] += took - self._open.pop()
                if self._open:
                    self._open[-1] += took

        return run


def instrument(local: Local) -> Clock:
    """Time the parts of an engine's step."""
    clock, engine = Clock(), local.engine
    runner = engine.runner
    runner.step = clock.timed(PARTS[0], runner.step)  # type: ignore[assignment]
    runner.decode = clock.timed(PARTS[1], runner.decode)  # type: ignore[method-assign]
    engine.drawer.draw = clock.timed(PARTS[2], engine.drawer.draw)  # type: ignore[method-assign]
    engine._advance = clock.timed(PARTS[3], engine._advance)  # type: ignore[method-assign]  # noqa: SLF001
    engine.step = clock.timed(PARTS[4], engine.step)  # type: ignore[method-assign]
    return clock


def profile(local: Local, clock: Clock, streams: int) -> dict[str, float]:
    """Return the milliseconds that each part takes of a decode step of `streams` sequences."""
    local.fill([local.prompt("text", 70_000 + n) for n in range(streams)], STEPS + 16)
    for _ in range(4):
        local.engine.step()
    clock.spent.clear()
    for _ in range(STEPS):
        local.engine.step()
    parts = {part: clock.spent[part] / STEPS * 1000 for part in PARTS}
    while not local.engine.idle:
        local.engine.step()
    return parts


def main() -> None:
    """Print a line for each number of streams."""
    local = Local(Path(sys.argv[1]), int(sys.argv[2]))
    clock = instrument(local)
    for streams in map(int, sys.argv[3:]):
        profile(local, clock, streams)  # warm
        print(json.dumps({"streams": streams, **profile(local, clock, streams)}), flush=True)


if __name__ == "__main__":
    main()
