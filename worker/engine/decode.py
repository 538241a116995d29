"""The decode part of a step: one more token's logits for each row, and whom that fails for."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from worker.engine.memory import lacks_memory
from worker.engine.model_runner import ModelRunner
from worker.engine.prefill import Failure
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence

log = logging.getLogger("unbroken.engine")


class Decode:
    """Runs the forward of a step over rows of the cache.

    Args:
        runner: whose forward it is.
        scheduler: knows all rows that need room.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler) -> None:
        self._runner, self._scheduler = runner, scheduler

    def step(self, rows: list[Sequence]) -> tuple[list[Sequence], Tensor | None, list[Failure]]:
        """Compute the rows' next logits: one forward for those that lie one behind the other.

        Returns:
            The rows that have some; these, `[B, V]`; and whom it failed for. Where it did, other
            rows may be left out too: their turn comes with the next step. For want of memory it is
            the newest row of a forward that fails.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        going, parts = list[Sequence](), list[Tensor]()
        failures = list[Failure]()
        whole = [rows] if rows else []
        for group in whole if self._runner.bucketed else neighbours(rows, apart=self._runner.apart):
            try:
                self._runner.reserve(self._scheduler.live)
                parts.append(self._runner.decode(group))
                going += group
            except torch.AcceleratorError:
                raise
            except Exception as error:
                if lacks_memory(error):
                    failures.append(Failure(max(group, key=lambda s: s.handle), error))
                else:
                    log.exception("a decode step failed; trying row by row")
                    failures += self._one_by_one(group, going, parts)
                break
        return going, torch.cat(parts) if parts else None, failures

    def _one_by_one(
        self, rows: list[Sequence], going: list[Sequence], parts: list[Tensor]
    ) -> list[Failure]:
        """Find out whom a decode step fails for; the others have their logits."""
        failures = []
        for sequence in rows:
            try:
                parts.append(self._runner.decode([sequence]))
                going.append(sequence)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                log.exception("the decode step of a row failed")
                failures.append(Failure(sequence, error))
        return failures


def neighbours(rows: Iterable[Sequence], *, apart: bool = False) -> list[list[Sequence]]:
    """Group rows, in order of their slots, into runs without a gap; into single ones if `apart`."""
    groups = list[list[Sequence]]()
    for row in rows:
        if groups and not apart and row.slot == groups[-1][-1].slot + 1:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
