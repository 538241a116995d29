"""Keeps tokens from being drawn that a sequence's constraint does not allow, for a whole batch.

The grammars' masks are computed in threads of their own while the model computes the logits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from worker.engine.constraint import Constraint
    from worker.engine.sequence import Sequence

Bits = npt.NDArray[np.int32]

WORD = 32
MOST_THREADS = 8


@dataclass(frozen=True)
class _Mask:
    """One row of a batch of masks, for the token that comes behind `count` others."""

    count: int
    batch: Future[Bits]
    row: int

    def good_for(self, sequence: Sequence) -> bool:
        """Whether it is, or will be, that of a sequence's next token."""
        failed = self.batch.done() and self.batch.exception() is not None
        return self.count == len(sequence.output_ids) and not failed


class Masks:
    """The masks of the sequences' next tokens.

    Args:
        vocab_size: V, the width of the logits.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._words = -(-vocab_size // WORD)
        self._threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // 2))
        self._jobs = ThreadPoolExecutor(2, thread_name_prefix="masks")
        self._executor: Any = None
        self._shifts = torch.arange(WORD, dtype=torch.int32, device=device)
        self._masks: dict[int, _Mask] = {}  # by handle

    def begin(self, rows: Iterable[Sequence]) -> None:
        """Begin to compute what these sequences may say next, where it is not known yet."""
        new = []
        for row in rows:
            if row.constraint is not None and row.constraint.has_mask:
                known = self._masks.get(row.handle)
                if known is None or not known.good_for(row):
                    new.append(row)
        if not new:
            return
        constraints = [row.constraint for row in new if row.constraint is not None]
        batch = self._jobs.submit(self._compute, constraints)
        for place, row in enumerate(new):
            self._masks[row.handle] = _Mask(len(row.output_ids), batch, place)

    def late(self, rows: Iterable[Sequence], seconds: float) -> list[Future[Bits]]:
        """Wait for the masks of these sequences; return what is still under way after that time."""
        self.begin(rows)
        batches = {self._masks[row.handle].batch for row in rows if _masked(row)}
        return list(wait(batches, timeout=seconds).not_done) if batches else []

    def ready(self, row: Sequence) -> bool:
        """Whether a sequence needs no mask, or `begin` has come to an end for it."""
        return not _masked(row) or self._masks[row.handle].batch.done()

    def forget(self, row: Sequence) -> None:
        """Drop what is known of a sequence that has left."""
        self._masks.pop(row.handle, None)

    def apply(self, logits: torch.Tensor, rows: Rows[Sequence]) -> torch.Tensor:
        """Return the logits, [B, V], with -inf for what is not allowed; themselves, if all is.

        Where a matcher has given up, its constraint has `failed`, and its row holds NaN.
        """
        limited = [(i, row, row.constraint) for i, row in enumerate(rows) if row.constraint]
        if not any(c.has_mask or c.failed or c.forced is not None or c.barred for *_, c in limited):
            return logits
        self.begin(rows)
        logits = logits.clone()
        masked = [(i, self._bits(row)) for i, row, constraint in limited if constraint.has_mask]
        if masked:
            at = torch.tensor([i for i, _ in masked], device=self._device)
            words = torch.from_numpy(np.stack([mask for _, mask in masked])).to(self._device)
            allowed = ((words[:, :, None] >> self._shifts) & 1).flatten(1)[:, : self._vocab_size]
            logits[at] = logits[at].masked_fill(allowed == 0, -torch.inf)
        for i, _, constraint in limited:
            if constraint.failed:
                logits[i] = torch.nan
            elif constraint.forced is not None:
                logits[i] = -torch.inf
                logits[i, constraint.forced] = 0.0
            elif barred := constraint.barred:
                logits[i, [token for token in barred if token < self._vocab_size]] = -torch.inf
        return logits

    def _bits(self, row: Sequence) -> Bits:
        mask = self._masks[row.handle]
        bits: Bits = mask.batch.result()[mask.row]
        return bits

    def _compute(self, constraints: list[Constraint]) -> Bits:
        from llguidance import LLExecutor
        from llguidance.numpy import fill_next_token_bitmask_par

        if self._executor is None:
            self._executor = LLExecutor(num_threads=self._threads)
        bits = np.zeros((len(constraints), self._words), dtype=np.int32)
        work = [(c.matcher, row) for row, c in enumerate(constraints) if not c.failed]
        fill_next_token_bitmask_par(self._executor, work, bits)
        for matcher, row in work:
            constraints[row].failed = matcher.is_error()
        return bits


def _masked(row: Sequence) -> bool:
    return row.constraint is not None and row.constraint.has_mask
