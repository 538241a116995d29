"""Keeps tokens from being drawn that a sequence's constraint does not allow, for a whole batch.

The grammars' masks are computed in threads of their own while the model computes the logits.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from worker.engine.memory import lacks_memory

if TYPE_CHECKING:
    from worker.engine.constraint import Constraint
    from worker.engine.sequence import Sequence

log = logging.getLogger("unbroken.engine.masks")

Bits = npt.NDArray[np.int32]

WORD = 32
LEAST_THREADS, MOST_THREADS = 4, 8

SLOW_SECONDS, SLOW_THREADS = 0.05, 2
"""A row whose last mask took longer is not waited for, and has its masks computed by other threads;
the next one may be quick again."""


class _Computed(NamedTuple):
    bits: Bits | None  # None: the matcher has given up
    seconds: float


@dataclass(frozen=True)
class _Mask:
    """That of the token that comes behind `count` others."""

    count: int
    slow: bool  # as the one before was
    future: Future[_Computed]

    @property
    def took_long(self) -> bool:
        """Whether it was slow to come."""
        future = self.future
        failed = not future.done() or future.cancelled() or future.exception() is not None
        return self.slow if failed else future.result().seconds > SLOW_SECONDS


class Masks:
    """The masks of the sequences' next tokens.

    Args:
        vocab_size: V, the width of the logits.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._words = -(-vocab_size // WORD)
        threads = max(LEAST_THREADS, min(MOST_THREADS, (os.cpu_count() or 1) // 2))
        self._quick = ThreadPoolExecutor(threads, thread_name_prefix="masks")
        self._slow = ThreadPoolExecutor(SLOW_THREADS, thread_name_prefix="slow-masks")
        self._shifts = torch.arange(WORD, dtype=torch.int32, device=device)
        self._masks: dict[int, _Mask] = {}  # by handle

    def begin(self, rows: Iterable[Sequence]) -> None:
        """Begin to compute what these sequences may say next, where it is not known yet."""
        for row in rows:
            if row.constraint is None or not row.constraint.has_mask:
                continue
            known = self._masks.get(row.handle)
            if known is None or known.count != len(row.output_ids):
                slow = known is not None and known.took_long
                # The matcher is taken along: a constraint may be closed at any time.
                job = (self._slow if slow else self._quick).submit
                future = job(self._compute, row.constraint.matcher)
                self._masks[row.handle] = _Mask(len(row.output_ids), slow, future)

    def late(self, rows: Iterable[Sequence], seconds: float) -> list[Future[_Computed]]:
        """Wait for the masks of these sequences, but for slow ones; return what is under way."""
        self.begin(rows)
        masks = [self._masks[row.handle] for row in rows if _masked(row)]
        awaited = [m.future for m in masks if not m.slow and not m.future.done()]
        if awaited and seconds:
            wait(awaited, timeout=seconds)
        return [m.future for m in masks if not m.future.done()]

    def ready(self, row: Sequence) -> bool:
        """Whether a sequence needs no mask, or `begin` has come to an end for it."""
        return not _masked(row) or self._masks[row.handle].future.done()

    def forget(self, row: Sequence) -> None:
        """Drop what is known of a sequence that has left."""
        mask = self._masks.pop(row.handle, None)
        if mask is not None:
            mask.future.cancel()

    def apply(self, logits: torch.Tensor, rows: Rows[Sequence]) -> torch.Tensor:
        """Return the logits, [B, V], with -inf for what is not allowed; themselves, if all is.

        Where a matcher has given up, its constraint has `failed`, and its row holds NaN.

        Raises:
            Exception: there was no memory for a mask (`lacks_memory`); the next call makes it.
        """
        limited = [(i, row, row.constraint) for i, row in enumerate(rows) if row.constraint]
        if not any(c.has_mask or c.failed or c.forced is not None or c.barred for *_, c in limited):
            return logits
        self.begin(rows)
        logits = logits.clone()
        masked = [(i, self._bits(row, c)) for i, row, c in limited if c.has_mask]
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

    def _bits(self, row: Sequence, constraint: Constraint) -> Bits:
        try:
            bits = self._masks[row.handle].future.result().bits
        except Exception as error:
            if lacks_memory(error):
                del self._masks[row.handle]  # it is computed again
                raise
            log.exception("a mask could not be computed")
            bits = None
        if bits is None:
            constraint.failed = True
            return np.zeros(self._words, dtype=np.int32)
        return bits

    def _compute(self, matcher: Any) -> _Computed:
        from llguidance.numpy import fill_next_token_bitmask

        began = time.monotonic()
        bits = np.zeros((1, self._words), dtype=np.int32)
        if not matcher.is_error():
            fill_next_token_bitmask(matcher, bits, 0)
        failed = matcher.is_error()
        return _Computed(None if failed else bits[0], time.monotonic() - began)


def _masked(row: Sequence) -> bool:
    return row.constraint is not None and row.constraint.has_mask
