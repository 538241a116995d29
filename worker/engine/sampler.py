"""Draws the next token of every row of a batch: penalties, filters and one seeded number per row.

A row's token depends on its own logits, parameters, seed and position alone, never on the batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import UnbrokenError
from shared.protocol import SamplingParams
from worker.engine.penalties import Penalties
from worker.engine.sequence import Sequence

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BAD_ROW = -1
MIN_TEMPERATURE = 1e-5  # below it, dividing by the temperature may overflow: greedy is the limit
NARROW = 64  # candidates looked at before anything wider is tried
WIDEN = 16  # how much wider the next try is

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


def mix64(z: int) -> int:
    """Scramble 64 bits one-to-one (the output function of SplitMix64)."""
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1), of 53 random bits, that `seed` gives to a token's position.

    It is the `position`-th output of a SplitMix64 generator that starts at the scrambled seed, so
    any position can be had without those before it, and near seeds share nothing.
    """
    return (mix64(mix64(seed) + (position + 1) * _GAMMA) >> 11) * 2.0**-53


Draw = Callable[[torch.Tensor, list[Sequence]], list[int]]


class Sampler:
    """Draws tokens for batches of rows that may all have different parameters.

    The order of the steps is that of Transformers: logit bias, repetition penalty (over prompt and
    output), frequency and presence penalty (over the output), `min_tokens`, temperature, top-k,
    top-p, min-p. Everything runs in float32, as in `generate()`, and the few numbers that decide
    a draw in float64 on the host.

    Args:
        vocab_size: V, the width of the logits.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._chunk = chunk_size(vocab_size)
        self._penalties = Penalties(vocab_size, device)
        self._scratch = torch.empty(2, 0, vocab_size, device=device)

    def check(self, sampling: SamplingParams) -> None:
        """Refuse parameters that name tokens the model does not have.

        Raises:
            UnbrokenError: `logit_bias` names an unknown token (`invalid_value`).
        """
        for token in sampling.logit_bias:
            if not 0 <= token < self.vocab_size:
                raise UnbrokenError(
                    "invalid_value",
                    f"'logit_bias' names token {token}, but the model's tokens are 0 to "
                    f"{self.vocab_size - 1}.",
                    "logit_bias",
                )

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, rows: list[Sequence]) -> list[int]:
        """Draw one token per row.

        Args:
            logits: [B, V] of any float type; left as they are. Single tokens may be -inf.
            rows: the B sequences; the draw is for position `len(row.output_ids)`.

        Returns:
            B token ids; `BAD_ROW` (-1) where a row's logits hold NaN or +inf, or nothing finite.

        Raises:
            ValueError: the shape of `logits` is not [B, V].
        """
        if logits.shape != (len(rows), self.vocab_size):
            raise ValueError(f"logits are {tuple(logits.shape)}, not {len(rows), self.vocab_size}")
        groups: dict[Draw, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(self._draw_for(row.sampling), []).append(index)
        # Half precision may stay where only the place of the maximum counts.
        if logits.dtype == torch.float64 or groups.keys() != {_greedy}:
            logits = logits.float()
        logits = self._penalties.apply(logits, rows)
        tokens = [BAD_ROW] * len(rows)
        for draw, members in groups.items():
            part = logits if len(members) == len(rows) else logits[members]
            drawn = draw(part, [rows[i] for i in members])
            for index, token in zip(members, drawn, strict=True):
                tokens[index] = token
        return tokens

    def _draw_for(self, sampling: SamplingParams) -> Draw:
        if sampling.temperature < MIN_TEMPERATURE:
            return _greedy
        if _top_k(sampling, self.vocab_size) or sampling.top_p < 1 or sampling.min_p > 0:
            return self._listed
        return self._open

    def _open(self, logits: torch.Tensor, rows: list[Sequence]) -> list[int]:
        """Draw from the whole vocabulary: find the chunk, then the token in it. No sorting."""
        size, chunk = len(rows), self._chunk
        mass = self._softmax(logits, rows)
        if self.vocab_size % chunk:
            mass = torch.nn.functional.pad(mass, (0, -self.vocab_size % chunk))
        mass = mass.view(size, -1, chunk)
        sums = mass.sum(-1).double().cpu().numpy()
        bad = ~np.isfinite(sums.sum(1))
        sums[bad] = 1.0
        cumulative = np.cumsum(sums, axis=1)
        target = _uniforms(rows) * cumulative[:, -1]
        place = _invert(cumulative, target)
        every = np.arange(size)
        # Not below 0, where a first token without mass would be drawn.
        rest = np.maximum(target - (cumulative[every, place] - sums[every, place]), 0.0)
        at = torch.from_numpy(place).to(self.device)
        inside = mass[torch.arange(size, device=self.device), at].double().cpu().numpy()
        token = place * chunk + _invert(np.cumsum(inside, axis=1), rest)
        return np.where(bad, BAD_ROW, token).tolist()

    def _listed(self, logits: torch.Tensor, rows: list[Sequence], width: int = NARROW) -> list[int]:
        """Draw from the best tokens: each filter keeps a prefix of the list ordered by score.

        Rows whose prefix may reach past the `width` tokens looked at get a wider list.
        """
        top_k = np.array([_top_k(row.sampling, self.vocab_size) for row in rows])
        width = min(self.vocab_size, max(width, 1 << int(top_k.max()).bit_length()))
        best = logits.topk(width, dim=-1)
        scores, ids = best.values.double().cpu().numpy(), best.indices.cpu().numpy()
        bad = ~np.isfinite(scores[:, 0])
        scores[bad] = 0.0
        scores, ids = _canonical(scores, ids)
        temperature = np.array([row.sampling.temperature for row in rows])[:, None]
        weights = np.exp((scores - scores[:, :1]) / temperature)
        cumulative = np.cumsum(weights, axis=1)
        kept = _kept(scores, weights, cumulative, rows, top_k, self._total_mass(logits, rows))
        # Of tokens that tie with the last one listed, some may be missing.
        known = np.count_nonzero(scores > scores[:, -1:], axis=1)
        wider = np.flatnonzero((kept > known) & ~bad) if width < self.vocab_size else np.array([])
        every = np.arange(len(rows))
        place = _invert(cumulative, _uniforms(rows) * cumulative[every, kept - 1])
        token = ids[every, np.minimum(place, kept - 1)]
        tokens: list[int] = np.where(bad, BAD_ROW, token).tolist()
        if len(wider):
            part = logits[torch.from_numpy(wider).to(self.device)]
            again = self._listed(part, [rows[i] for i in wider], width * WIDEN)
            for index, value in zip(wider, again, strict=True):
                tokens[index] = value
        return tokens

    def _total_mass(self, logits: torch.Tensor, rows: list[Sequence]) -> Floats:
        """Return each row's sum of `exp((score - best) / temperature)` over all V tokens.

        Only rows with a top-p that no top-k precedes need it; the others get infinity.
        """
        total = np.full(len(rows), np.inf)
        needs = [
            i
            for i, row in enumerate(rows)
            if row.sampling.top_p < 1 and not _top_k(row.sampling, self.vocab_size)
        ]
        if needs:
            part = logits if len(needs) == len(rows) else logits[needs]
            mass = self._softmax(part, [rows[i] for i in needs])
            total[needs] = 1 / mass.amax(-1).double().cpu().numpy()
        return total

    def _softmax(self, logits: torch.Tensor, rows: list[Sequence]) -> torch.Tensor:
        """Return probabilities at each row's temperature, valid until the next call: [B, V]."""
        size = len(rows)
        if self._scratch.shape[1] < size:  # fresh memory of this size costs more than the sums
            self._scratch = torch.empty(2, size, self.vocab_size, device=self.device)
        scaled, mass = self._scratch[:, :size]
        temperatures = torch.tensor([[row.sampling.temperature] for row in rows])
        torch.div(logits, temperatures.to(self.device), out=scaled)
        return torch.softmax(scaled, dim=-1, out=mass)


def chunk_size(vocab_size: int) -> int:
    """Return how many tokens a draw over all of them sums up first.

    It looks at all the sums and into one chunk; a divisor of V saves a copy.
    """
    near_root = 1 << (vocab_size.bit_length() + 1) // 2
    return next((c for c in (512, 256, 128) if vocab_size % c == 0), near_root)


def _top_k(sampling: SamplingParams, vocab_size: int) -> int:
    return sampling.top_k if 0 < sampling.top_k < vocab_size else 0


def _uniforms(rows: list[Sequence]) -> Floats:
    return np.array([uniform(row.seed, len(row.output_ids)) for row in rows])


def _greedy(logits: torch.Tensor, _rows: list[Sequence]) -> list[int]:
    """Return the first of the best tokens, as `argmax` in `generate()` does."""
    best = logits.max(-1)  # a NaN counts as the maximum; of equal ones, the first is named
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [token if math.isfinite(score) else BAD_ROW for score, token in pairs]


def _canonical(scores: Floats, ids: Ints) -> tuple[Floats, Ints]:
    """Order equal scores by token: `topk` leaves their order to chance and to the width."""
    if not (scores[:, 1:] == scores[:, :-1]).any():
        return scores, ids
    order = np.lexsort((ids, -scores), axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


def _kept(
    scores: Floats,
    weights: Floats,
    cumulative: Floats,
    rows: list[Sequence],
    top_k: Ints,
    total: Floats,
) -> Ints:
    """Return how many of the listed tokens pass top-k (with ties), top-p and min-p: at least 1."""
    every = np.arange(len(rows))
    threshold = np.where(top_k > 0, scores[every, top_k - 1], -np.inf)
    kept = np.count_nonzero((scores >= threshold[:, None]) & (weights > 0), axis=1)
    total = np.where(top_k > 0, cumulative[every, kept - 1], total)
    top_p = np.array([row.sampling.top_p if row.sampling.top_p < 1 else np.inf for row in rows])
    min_p = np.array([row.sampling.min_p for row in rows])
    before = cumulative[:, :-1] < (top_p * total)[:, None]
    nucleus = 1 + np.count_nonzero(before, axis=1)
    likely = np.count_nonzero(weights >= min_p[:, None], axis=1)
    return functools.reduce(np.minimum, (kept, nucleus, likely)).clip(min=1)


def _invert(cumulative: Floats, target: Floats) -> Any:
    """Return, per row of [b, n], the first index whose cumulative mass exceeds the target.

    Rounding may put the target at or past the total: then the last index that has mass.
    """
    place = np.count_nonzero(cumulative <= target[:, None], axis=1)
    last = np.count_nonzero(cumulative < cumulative[:, -1:], axis=1)
    return np.minimum(place, last)
