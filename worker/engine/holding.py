"""Holds back the sequences that no token can be drawn for yet, while the others go on.

It waits for its grammar to be compiled, or for its mask; the logits of its next token, which are
there already, wait with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from worker.engine.constraint import Constraint
    from worker.engine.masks import Masks
    from worker.engine.sequence import Sequence

MASK_SECONDS = 0.05
"""How long a step waits for masks once the logits are there; nearly all are there before."""

IDLE_SECONDS = 0.02
"""How long a step that can do nothing waits at most: commands may have come."""


class Holding:
    """The sequences that are held back, and what they wait for.

    Args:
        masks: of their next tokens.
    """

    def __init__(self, masks: Masks) -> None:
        self._masks = masks
        self._compiling: dict[
            int, tuple[Sequence, Constraint]
        ] = {}  # by handle; not all are held back yet
        self._parked: dict[int, tuple[Sequence, Tensor]] = {}  # with the next logits, [1, V]

    def watch(self, sequence: Sequence) -> None:
        """Take note of a sequence that may have a grammar, which may not be compiled yet."""
        if sequence.constraint is not None:
            self._compiling[sequence.handle] = sequence, sequence.constraint

    def compiled(self) -> list[tuple[Sequence, Constraint]]:
        """Return the sequences whose grammars have come, or failed to, since the last time."""
        found = []
        for sequence, constraint in list(self._compiling.values()):
            constraint.adopt()
            if not constraint.compiling:
                found.append(self._compiling.pop(sequence.handle))
        return found

    @property
    def parked(self) -> list[Sequence]:
        """The sequences that have their next logits already, and wait."""
        return [sequence for sequence, _ in self._parked.values()]

    def has(self, sequence: Sequence) -> bool:
        """Whether a sequence has its next logits already, and is not to be decoded."""
        return sequence.handle in self._parked

    def forget(self, sequence: Sequence) -> None:
        """Drop a sequence that has left, and what was begun for it."""
        self._compiling.pop(sequence.handle, None)
        self._parked.pop(sequence.handle, None)
        self._masks.forget(sequence)
        if sequence.constraint is not None:
            sequence.constraint.close()

    def unpark(self) -> None:
        """Drop the logits of those that wait: all is computed again."""
        self._parked.clear()

    def sift(
        self, rows: list[Sequence], logits: Tensor | None, *, turn: bool = True
    ) -> tuple[list[Sequence], Tensor]:
        """Return those for whom a token can be drawn now, with their logits; the others wait.

        Args:
            rows: with the next logits, `[B, V]`; those that replay known tokens need none.
            logits: None if there are no rows.
            turn: whether those that wait may have a token now.

        Returns:
            Some of the rows, and of those that waited; where there are none, the logits are empty.
        """
        waited = {h: one for h, one in self._parked.items() if not one[0].replays}  # else put back
        asked = [sequence for sequence, _ in waited.values()] if turn else []
        late = self._late(rows, MASK_SECONDS) | self._late(asked, 0.0)
        late |= set() if turn else set(waited)
        self._parked = {handle: one for handle, one in waited.items() if handle in late}
        taken = [one for handle, one in waited.items() if handle not in late]
        parts, chosen = [], []
        if logits is not None:
            now = [i for i, row in enumerate(rows) if not row.replays and row.handle not in late]
            parts.append(logits if len(now) == len(rows) else logits[now])
            chosen = [rows[i] for i in now]
            for i, row in enumerate(rows):
                if row.handle in late:
                    self._parked[row.handle] = row, logits[i : i + 1].clone()
        chosen += [sequence for sequence, _ in taken]
        parts += [one for _, one in taken]
        if not chosen:
            return [], torch.empty(0)
        return chosen, torch.cat(parts) if len(parts) > 1 else parts[0]

    def idle(self) -> None:
        """Wait until something has come that somebody waits for."""
        awaited: list[Future[Any]] = []
        awaited += self._masks.late(self.parked, 0)
        for sequence in self.parked:
            if sequence.constraint and (compilation := sequence.constraint.compiling):
                awaited.append(compilation.future)
        if awaited:
            wait(awaited, timeout=IDLE_SECONDS, return_when=FIRST_COMPLETED)

    def _late(self, rows: Iterable[Sequence], seconds: float) -> set[int]:
        """Return the handles of those rows that have to wait, after so long a wait for masks."""
        limited = [row for row in rows if row.constraint and not row.replays]
        if not limited:
            return set()
        late = {row.handle for row in limited if row.constraint and row.constraint.held}
        due = [row for row in limited if row.handle not in late]
        if self._masks.late(due, seconds):
            late |= {row.handle for row in due if not self._masks.ready(row)}
        return late
