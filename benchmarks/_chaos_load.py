"""How busy the machine was under a chaos run: what of the silences is the load, and no fault's."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from benchmarks._relay_parts import machine_ticks

TICK = 0.05


@dataclass
class Load:
    """The machine while `watch` runs. A lag is how late a timer of this process was, seconds."""

    lags: list[float] = field(default_factory=list)
    _began: tuple[int, int] = field(default_factory=machine_ticks)

    @property
    def busy(self) -> float:
        """The share of the machine's CPU time that was used since the beginning, by whomever."""
        (busy, total), (busy_now, total_now) = self._began, machine_ticks()
        return (busy_now - busy) / max(1, total_now - total)

    async def watch(self) -> None:
        """Note the lags until cancelled."""
        while True:
            due = time.monotonic() + TICK
            await asyncio.sleep(TICK)
            self.lags.append(time.monotonic() - due)
