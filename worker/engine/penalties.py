"""Changes scores before a draw: logit bias, penalties for repeated tokens, and `min_tokens`.

What it counts per sequence is kept from step to step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from worker.engine.sequence import Sequence


def ending_ids(row: Sequence) -> frozenset[int]:
    """Return the tokens that end this row: its stop tokens and, unless ignored, EOS."""
    stops = frozenset(row.sampling.stop_token_ids)
    return stops if row.sampling.ignore_eos else stops | row.eos_ids


class Penalties:
    """Edits the few scores per row that a request asks to change, for a whole batch at once.

    Args:
        vocab_size: V, the width of the logits.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._tables: dict[int, _Table] = {}

    def apply(self, logits: torch.Tensor, rows: list[Sequence]) -> torch.Tensor:
        """Return the edited scores, [B, V] in float32, or `logits` itself where no row asks.

        The order and the arithmetic are those of Transformers: bias, repetition penalty over
        prompt and output, frequency and presence penalty over the output, then `min_tokens`.
        """
        edits = [(i, self._table(row)) for i, row in enumerate(rows) if _edited(row)]
        if not edits:
            return logits
        if len(self._tables) > 4 * len(rows) + 64:  # ended rows; one that comes back is rebuilt
            self._tables = {rows[i].handle: table for i, table in edits}
        lengths = [table.size for _, table in edits]
        offsets = np.repeat([i * self._vocab_size for i, _ in edits], lengths)
        ids = np.concatenate([table.ids() for _, table in edits]) + offsets
        per_row = np.array([_factors(rows[i]) for i, _ in edits], dtype=np.float32).T
        per_token = np.concatenate([table.values() for _, table in edits], axis=1)
        columns = np.concatenate([per_token, np.repeat(per_row, lengths, axis=1)])
        logits = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        entries, at = logits.view(-1), torch.from_numpy(ids).to(self._device)
        entries[at] = _edit(entries[at], torch.from_numpy(columns).to(self._device))
        return logits

    def _table(self, row: Sequence) -> _Table:
        table = self._tables.pop(row.handle, None)
        if table is None or table.outputs is not row.output_ids:
            table = _Table(row, self._vocab_size)
        table.advance()  # one that fails for want of memory has counted who knows what: it is gone
        self._tables[row.handle] = table
        return table


class _Table:
    """The tokens of one row whose scores may change, grown by the row's new tokens only."""

    def __init__(self, row: Sequence, vocab_size: int) -> None:
        sampling = row.sampling
        self.outputs = row.output_ids
        self._vocab_size = vocab_size
        self._counting = bool(
            sampling.repetition_penalty != 1
            or sampling.frequency_penalty
            or sampling.presence_penalty
        )
        self._read = 0
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.int64)
        self._values = np.zeros((4, 64), dtype=np.float32)
        for token, bias in sampling.logit_bias.items():
            self._set(0, token, bias)
        if sampling.repetition_penalty != 1:
            for token in set(row.prompt_ids):
                self._set(2, token, 1)
        if sampling.min_tokens:
            for token in ending_ids(row):
                self._set(3, token, 1)

    @property
    def size(self) -> int:
        """The number of tokens in the table, n."""
        return len(self._slots)

    def ids(self) -> npt.NDArray[np.int64]:
        """Return the tokens, [n], each once."""
        return self._ids[: self.size]

    def values(self) -> npt.NDArray[np.float32]:
        """Return bias, count in the output, seen (0 or 1), ends the row (0 or 1): [4, n]."""
        return self._values[:, : self.size]

    def advance(self) -> None:
        """Take in the tokens that were drawn since the last call."""
        if self._counting:
            for token in self.outputs[self._read :]:
                slot = self._set(2, token, 1)
                if slot is not None:
                    self._values[1, slot] += 1
            self._read = len(self.outputs)

    def _set(self, column: int, token: int, value: float) -> int | None:
        if not 0 <= token < self._vocab_size:  # a token without a score cannot be drawn anyway
            return None
        slot = self._slots.setdefault(token, self.size)
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._values = np.concatenate([self._values, np.zeros_like(self._values)], axis=1)
        self._ids[slot] = token
        self._values[column, slot] = value
        return slot


def _edited(row: Sequence) -> bool:
    sampling = row.sampling
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.frequency_penalty
        or sampling.presence_penalty
        or len(row.output_ids) < sampling.min_tokens
    )


def _factors(row: Sequence) -> tuple[float, float, float, bool]:
    """Return the row's penalties, and whether it is too short to end."""
    sampling = row.sampling
    return (
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
        len(row.output_ids) < sampling.min_tokens,
    )


def _edit(score: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    bias, count, seen, ends, repetition, frequency, presence, early = columns
    score = score + bias
    repeated = torch.where(score < 0, score * repetition, score / repetition)
    score = torch.where(seen > 0, repeated, score)
    score = score - count * frequency - (count > 0) * presence
    return score.masked_fill_((ends * early) > 0, -torch.inf)
