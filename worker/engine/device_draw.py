"""Draws next tokens where the logits are, without the host: what most requests ask for.

The rules and the numbers are the `Sampler`'s; what would need more than the best few tokens is
left to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.protocol import SamplingParams
from worker.engine.sampler import BAD_ROW, MIN_TEMPERATURE, uniform
from worker.engine.sequence import Sequence

UNDECIDED = -2
"""In place of a token: the host has to draw this one."""

FIELDS = 5  # of `parameters`
LISTED = 512
"""Best tokens that are looked at. More than the `Sampler` does at first: one row whose draw may lie
beyond them sends the whole batch to the host for a step."""


def drawable(sequence: Sequence) -> bool:
    """Whether the device can draw a sequence's next tokens, one after the other."""
    asked = sequence.sampling
    return (
        not (asked.frequency_penalty or asked.presence_penalty or asked.logit_bias)
        and asked.repetition_penalty == 1
        and asked.min_tokens <= len(sequence.output_ids)
        and asked.top_k < LISTED
        and sequence.constraint is None
        and sequence.scores is None
    )


def greedy(sampling: SamplingParams) -> bool:
    """Whether the best token is always taken."""
    return sampling.temperature < MIN_TEMPERATURE


def parameters(sequence: Sequence, position: int) -> tuple[float, float, float, float, float]:
    """Return what `draw` needs to know of a row: temperature (0: greedy), filters, number."""
    asked = sequence.sampling
    if greedy(asked):
        return 0.0, 0.0, 1.0, 0.0, 0.0
    number = uniform(sequence.seed, position)
    return asked.temperature, float(max(asked.top_k, 0)), asked.top_p, asked.min_p, number


def draw_best(logits: Tensor) -> Tensor:
    """Return the first of the best tokens of each row of `[B, V]`, or `BAD_ROW`."""
    best = logits.max(-1)
    return torch.where(best.values.isfinite(), best.indices, BAD_ROW)


def draw(logits: Tensor, asked: Tensor, chunk: int) -> Tensor:
    """Draw a token for each row.

    Args:
        logits: `[B, V]`.
        asked: `[FIELDS, B]` float64, columns of `parameters`.
        chunk: how many tokens are summed up at first where all of V may be drawn.

    Returns:
        `[B]` int64: tokens, `BAD_ROW` where numbers are not finite, or `UNDECIDED`.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    temperature, top_k, top_p, min_p, number = asked
    safe = torch.where(temperature > 0, temperature, 1.0)
    mass = torch.softmax(logits.float() / safe[:, None].float(), dim=-1)
    anything = (top_k == 0) & (top_p >= 1) & (min_p <= 0)
    listed = _listed(logits.float(), mass, safe, top_k, top_p, min_p, number)
    token = torch.where(anything, _open(mass, number, chunk), listed)
    token = torch.where(temperature > 0, token, draw_best(logits))
    return torch.where(logits.max(-1).values.isfinite(), token, BAD_ROW)


def _open(mass: Tensor, number: Tensor, chunk: int) -> Tensor:
    """Draw from all of V: find the chunk, then the token in it."""
    mass = torch.nn.functional.pad(mass, (0, -mass.shape[1] % chunk)).unflatten(1, (-1, chunk))
    sums = mass.sum(-1).double()
    cumulative = sums.cumsum(1)
    target = number * cumulative[:, -1]
    place = _invert(cumulative, target)[:, None]
    before = (cumulative - sums).gather(1, place)[:, 0]
    inside = mass.gather(1, place[:, :, None].expand(-1, -1, chunk))[:, 0].double()
    rest = (target - before).clamp_(min=0)
    return place[:, 0] * chunk + _invert(inside.cumsum(1), rest)


def _listed(
    logits: Tensor,
    mass: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    number: Tensor,
) -> Tensor:
    """Draw from the best tokens, of which each filter keeps the first."""
    width = min(LISTED, logits.shape[1])
    ids = logits.topk(width, dim=-1).indices.sort(-1).values  # equal scores: in order of tokens
    scores, order = logits.gather(1, ids).double().sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    weights = ((scores - scores[:, :1]) / temperature[:, None]).exp()
    cumulative = weights.cumsum(1)
    last = (top_k.long() - 1).clamp(0, width - 1)[:, None]
    limited = top_k[:, None] > 0
    threshold = torch.where(limited, scores.gather(1, last), -torch.inf)
    kept = ((scores >= threshold) & (weights > 0)).sum(1, keepdim=True)
    whole = mass.amax(-1).double().reciprocal()[:, None]
    total = torch.where(limited, cumulative.gather(1, (kept - 1).clamp(min=0)), whole)
    bound = torch.where(top_p < 1, top_p, torch.inf)[:, None] * total
    nucleus = 1 + (cumulative[:, :-1] < bound).sum(1, keepdim=True)
    likely = (weights >= min_p[:, None]).sum(1, keepdim=True)
    kept = torch.minimum(torch.minimum(kept, nucleus), likely).clamp(min=1)
    target = number * cumulative.gather(1, kept - 1)[:, 0]
    place = torch.minimum(_invert(cumulative, target)[:, None], kept - 1)
    known = (scores > scores[:, -1:]).sum(1, keepdim=True)  # of ties with the last some are missing
    decided = (kept <= known) | (width == logits.shape[1])
    return torch.where(decided, ids.gather(1, place), UNDECIDED)[:, 0]


def _invert(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return, per row, the first index whose cumulative mass exceeds the target."""
    place = (cumulative <= target[:, None]).sum(1)
    last = (cumulative < cumulative[:, -1:]).sum(1)
    return torch.minimum(place, last)
