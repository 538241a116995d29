"""Decodes one step ahead of what the host has read: the device feeds its tokens to itself.

What a token means (a stop string, the end, a client's cancel) is seen a step late, and the token
that a sequence then has too many is dropped unseen.
"""

from __future__ import annotations

import logging

import torch

from worker.engine.device_draw import UNDECIDED, drawable
from worker.engine.memory import lacks_memory
from worker.engine.model_runner import ModelRunner
from worker.engine.sampler import BAD_ROW
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence
from worker.engine.transfer import Pending

log = logging.getLogger("unbroken.engine")

Landed = list[tuple[Sequence, int]]


class Ahead:
    """The step in flight.

    Args:
        runner: runs the steps.
        scheduler: knows all rows that need room.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler) -> None:
        self._runner, self._scheduler = runner, scheduler
        self._pending: Pending | None = None
        self._rows: list[Sequence | None] = []
        self._slots: list[int] = []  # where those rows were when the step was launched
        self._broken = False
        self._totals: dict[int, int] = {}  # by handle: whose token behind so many the host draws

    def turn(self, rows: list[Sequence]) -> tuple[Landed, int]:
        """Launch a step of the rows, if it can be one; read the tokens of the one before.

        Returns:
            Sequences with their next tokens, of those that have not left since; and how many rows
            are on their way: if none, they are the host's to decode, once it has taken these in.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        pending, flown, slots = self._pending, self._rows, self._slots
        flying = {row.handle for row in flown if row}
        # Of the others the token in flight is the last.
        going = [row for row in rows if row.handle not in flying or row.length + 1 < row.reach]
        self._pending = self._launch(going)
        self._rows = [*going] if self._pending else []
        self._slots = [row.slot for row in going]
        landed = Landed()
        if pending is not None:
            for row, slot, token in zip(flown, slots, pending.tokens(), strict=True):
                if row is None:
                    self._clean(slot, token)
                elif token == UNDECIDED:
                    self._step_back(row)
                else:
                    landed.append((row, token))
        return landed, len(self._rows)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is in flight of a sequence that leaves its row."""
        self._rows = [None if row is sequence else row for row in self._rows]
        self._totals.pop(sequence.handle, None)

    def _launch(self, rows: list[Sequence]) -> Pending | None:
        off = self._runner.bucketed is None or self._broken
        if off or not rows or not all(map(self._may, rows)):
            return None
        try:
            self._runner.reserve(self._scheduler.live)
            return self._runner.launch(rows)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # the host's own step meets it again, and finds out whose it is
            self._broken = not lacks_memory(error)
            if self._broken:
                log.exception("a decode step ahead failed; there will be no more")
            return None

    def _may(self, row: Sequence) -> bool:
        """Whether a row's next token is unknown, and the device's to draw."""
        tried = self._totals.get(row.handle)
        return (
            not row.trial
            and row.length + 1 >= row.total
            and drawable(row)
            and (tried is None or row.total > tried)
        )

    def _clean(self, slot: int, token: int) -> None:
        """Wipe what a step has left of a row that was forgotten, if its numbers are not finite."""
        if token == BAD_ROW:
            tenant = next((row for row in self._scheduler.live if row.slot == slot), None)
            self._runner.scrub(slot, tenant.length if tenant else 0)

    def _step_back(self, row: Sequence) -> None:
        """Have a row's last token fed once more, in a step of the host's."""
        self.forget(row)
        row.length = row.total - 1
        self._totals[row.handle] = row.total
