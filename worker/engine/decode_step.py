"""The decode step over the slot cache, recorded where that can be: then no Python runs within it.

Most of a small step on a CPU is Python's time. `torch.jit.trace` notes which operators the model's
own forward calls, and the record calls the same ones in the same order. Whatever Python decides is
frozen in it; so it is used only where it gives the very bits of the forward for other batches too.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from worker.engine.kv_cache import SlotCache
from worker.engine.lent_layer import LentLayer
from worker.engine.memory import lacks_memory

log = logging.getLogger("unbroken.engine")

Stored = tuple[Tensor, Tensor]
"""A layer's keys and values of the step's rows, each `[B, kv heads, window, head dim]`."""

PROBED = ((2, False), (5, True), (3, False), (1, False))
"""Batches that a record has to give the forward's bits for: rows, and whether at far positions."""
PROBED_TOKENS = 24  # most tokens of a row in those


class DecodeStep:
    """One forward that feeds each row of a batch a token.

    Args:
        forward: the model's, from `input_ids`, `position_ids`, `attention_mask` and
            `past_key_values` to the last logits `[B, V]`.
        cache: where the rows' keys and values are, and the new ones go.
        dtype: of the mask.
    """

    def __init__(
        self, forward: Callable[..., Tensor], cache: SlotCache, dtype: torch.dtype
    ) -> None:
        self._forward, self._cache, self._dtype = forward, cache, dtype
        self._record: Callable[..., Tensor] | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether Python has no part in it."""
        return self._record is not None

    def __call__(self, rows: Tensor, longest: int, first: int) -> Tensor:
        """Compute what follows each row's next token.

        Args:
            rows: `[B, 3]` integers: token, tokens before it in its row, position for the model.
            longest: most tokens that one of the rows has.
            first: the slot of the first one; the others' follow.

        Returns:
            Logits `[B, V]`.
        """
        if self._record is not None:
            try:
                return self._recorded(self._record, rows, longest, first)
            except RuntimeError as error:
                if lacks_memory(error):
                    raise
                log.exception("the record of the decode step failed, and is dropped")
                self.forget()
        return self._plain(rows, longest, first)

    def _recorded(
        self, record: Callable[..., Tensor], rows: Tensor, longest: int, first: int
    ) -> Tensor:
        # Without torch's own rewriting of the graph, which would begin anew for other shapes.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return record(*self._inputs(rows, longest, first))

    def _plain(self, rows: Tensor, longest: int, first: int) -> Tensor:
        self._cache.plan.begin(rows[:, 1], longest, first)
        return self._forward(
            input_ids=rows[:, :1],
            position_ids=rows[:, 2:],
            attention_mask=_mask(rows[:, 1], longest + 1, self._dtype),
            past_key_values=self._cache,
        )

    def _inputs(self, rows: Tensor, longest: int, first: int) -> tuple[Tensor, ...]:
        """Return what the record takes: rows, mask, then each layer's `Stored`."""
        last, window = first + rows.shape[0], longest + 1
        stored = [
            states[first:last, :, :window]
            for layer in self._cache.layers
            for states in (layer.keys, layer.values)
        ]
        return rows, _mask(rows[:, 1], window, self._dtype), *stored

    def record(self, vocab_size: int) -> bool:
        """Record the step, and keep the record if it computes what the forward does, bit by bit.

        The cache has been used, and no sequence runs: it is empty afterwards.

        Returns:
            Whether it was kept.
        """
        try:
            probes = list(self._probes(vocab_size))
            record = self._traced(*probes[0])
            same = all(self._agrees(record, *probe) for probe in probes)
        except Exception as error:  # noqa: BLE001 - whatever it is, the forward itself runs
            log.info("the decode step cannot be recorded", extra={"why": type(error).__name__})
            same = False
        self._cache.release()
        self._record = record if same else None
        return same

    def _agrees(
        self, record: Callable[..., Tensor], rows: Tensor, longest: int, first: int
    ) -> bool:
        """Whether a record gives the forward's logits, and leaves the same in the cache."""
        logits = self._recorded(record, rows, longest, first)
        states = self._inputs(rows, longest, first)[2:]
        left = [state.clone() for state in states]
        same = torch.equal(logits, self._plain(rows, longest, first))
        return same and all(map(torch.equal, left, states))

    def forget(self) -> None:
        """Run the forward itself from now on."""
        self._record = None

    def _probes(self, vocab_size: int) -> Iterator[tuple[Tensor, int, int]]:
        """Yield batches of drawn tokens; far positions are where some models change their mind."""
        draw, plan = torch.Generator().manual_seed(0), self._cache.plan
        room = min(PROBED_TOKENS, plan.max_capacity)
        for wanted, far in PROBED:
            size = min(wanted, plan.max_rows)
            self._cache.reserve(size, room)
            ids = torch.randint(vocab_size, (size,), generator=draw)
            lengths = torch.randint(room, (size,), generator=draw)
            shift = plan.max_capacity - room if far else int(ids[0]) % 3
            rows = torch.stack([ids, lengths, lengths + shift], dim=1)
            yield rows, int(lengths.max()), 0

    def _traced(self, rows: Tensor, longest: int, first: int) -> Callable[..., Tensor]:
        """Run the step of a batch, and return the record of it."""

        def step(rows: Tensor, mask: Tensor, *stored: Tensor) -> Tensor:
            pairs = zip(stored[::2], stored[1::2], strict=True)
            return self._forward(
                input_ids=rows[:, :1],
                position_ids=rows[:, 2:],
                attention_mask=mask,
                past_key_values=Cache(layers=[_LentRows(pair, rows[:, 1]) for pair in pairs]),
            )

        inputs = self._inputs(rows, longest, first)
        with warnings.catch_warnings():  # of what it freezes: that is compared
            warnings.simplefilter("ignore")
            record: Callable[..., Tensor] = torch.jit.trace(step, inputs, check_trace=False)
        return record


class _LentRows(LentLayer):
    """A layer of several rows, which hold as many tokens as `lengths`, `[B]`, say."""

    def __init__(self, stored: Stored, lengths: Tensor) -> None:
        super().__init__(*stored)
        self._rows, self._lengths = torch.arange(lengths.shape[0]), lengths

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ARG002  # the interface's
        **kwargs: Any,  # noqa: ARG002  # the interface's
    ) -> Stored:
        """Write each row's new token behind what it has; return all that it may attend to."""
        self.keys[self._rows, :, self._lengths] = key_states[:, :, 0]
        self.values[self._rows, :, self._lengths] = value_states[:, :, 0]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens in the longest row before this step."""
        return self.keys.shape[2] - 1


def _mask(lengths: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """Additive mask `[B, 1, 1, window]`: a row attends to its own tokens and the new one."""
    positions = torch.arange(window, device=lengths.device)
    mask = torch.zeros(lengths.shape[0], window, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(positions > lengths[:, None], float("-inf"))[:, None, None]
