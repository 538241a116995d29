"""Keeps tokens from being drawn that a sequence's constraint does not allow, for a whole batch.

The grammars' masks are computed in threads of their own while the model computes the logits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
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


class Masks:
    """The masks of one step.

    Args:
        vocab_size: V, the width of the logits.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._words = -(-vocab_size // WORD)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // 2))
        self._executor: Any = None
        self._shifts = torch.arange(WORD, dtype=torch.int32, device=device)
        self._under_way: dict[int, int] = {}  # handle: row of the masks
        self._bits: Future[Bits] | None = None

    def begin(self, rows: Rows[Sequence]) -> None:
        """Begin to compute what these sequences may say next.

        They must not get tokens before `apply` or `settle`.
        """
        constraints = self._with_mask(row for row in rows if not row.replays)
        self._under_way = {handle: row for row, handle in enumerate(constraints)}
        self._bits = None
        if constraints:
            self._bits = self._thread.submit(self._compute, list(constraints.values()))

    def apply(self, logits: torch.Tensor, rows: list[Sequence]) -> torch.Tensor:
        """Return the logits, [B, V], with -inf for what is not allowed; themselves, if all is.

        Where a matcher has given up, its constraint has `failed`, and its row holds NaN.
        """
        limited = [(i, row.constraint) for i, row in enumerate(rows) if row.constraint]
        if not limited:
            return logits
        bits = self._collect(rows)
        logits = logits.clone()
        masked = [(i, bits[rows[i].handle]) for i, _ in limited if rows[i].handle in bits]
        if masked:
            at = torch.tensor([i for i, _ in masked], device=self._device)
            words = torch.from_numpy(np.stack([mask for _, mask in masked])).to(self._device)
            allowed = ((words[:, :, None] >> self._shifts) & 1).flatten(1)[:, : self._vocab_size]
            logits[at] = logits[at].masked_fill(allowed == 0, -torch.inf)
        for i, constraint in limited:
            if constraint.failed:
                logits[i] = torch.nan
            elif constraint.forced is not None:
                logits[i] = -torch.inf
                logits[i, constraint.forced] = 0.0
            elif refused := constraint.refused:
                logits[i, [token for token in refused if token < self._vocab_size]] = -torch.inf
        return logits

    def settle(self) -> None:
        """Wait for masks that nobody has asked for, so that their matchers are free again."""
        if self._bits is not None:
            self._bits.result()
            self._bits = None

    def _collect(self, rows: list[Sequence]) -> dict[int, Bits]:
        """Return the masks by handle; those that nobody has begun are computed now."""
        known = {}
        begun, self._bits = self._bits, None
        if begun is not None:
            bits = begun.result()
            known = {handle: bits[row] for handle, row in self._under_way.items()}
        missing = self._with_mask(row for row in rows if row.handle not in known)
        if missing:
            known |= dict(zip(missing, self._compute(list(missing.values())), strict=True))
        return known

    def _compute(self, constraints: list[Constraint]) -> Bits:
        from llguidance import LLExecutor
        from llguidance.numpy import fill_next_token_bitmask_par

        if self._executor is None:
            self._executor = LLExecutor(num_threads=self._threads)
        bits = np.zeros((len(constraints), self._words), dtype=np.int32)
        work = []
        for row, constraint in enumerate(constraints):
            matcher = constraint.matcher()
            if not constraint.failed:
                work.append((matcher, row))
        fill_next_token_bitmask_par(self._executor, work, bits)
        for matcher, row in work:
            constraints[row].failed = matcher.is_error()
        return bits

    @staticmethod
    def _with_mask(rows: Iterable[Sequence]) -> dict[int, Constraint]:
        found = ((row.handle, row.constraint) for row in rows)
        return {handle: one for handle, one in found if one is not None and one.has_mask}
