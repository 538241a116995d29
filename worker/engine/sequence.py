"""The state of one running or waiting sequence, without torch.

Scheduler, model runner, sampler, stopping criteria and the engine's loop read and write it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared.protocol import SamplingParams, TokenScores
from worker.engine.messages import Prompt

TOKEN_KINDS = frozenset({"mm_token_type_ids", "token_type_ids"})
"""The processor's outputs `[1, L]` that are not 0 where a prompt has placeholders of media."""

if TYPE_CHECKING:
    from transformers import StoppingCriteriaList

    from worker.engine.constraint import Constraint
    from worker.engine.detokenizer import Detokenizer
    from worker.engine.visuals import Visuals


class Sequence:
    """One choice of one request, from its arrival in the engine to its last output.

    Args:
        handle: the asyncio side's name for it.
        prompt: the processed prompt; its tensors are dropped once they are in the cache.
        sampling: how to draw; `sampling.seed` is this sequence's own seed.
        eos_ids: the tokens that end a sequence of this model.
        context_length: most tokens prompt and output may have together.
        generated: output tokens it already has from the log (continuation).
        trial: its first step is to be taken alone.

    Attributes:
        output_ids: every sampled token so far, continued ones and EOS included. The next token's
            position, for the sampler, is `len(output_ids)`.
        slot: its row in the cache, -1 while it waits.
        length: tokens whose keys and values are in the cache; while it runs, that is every token
            but the last of `output_ids`, or fewer while known tokens are fed once more.
        rope_delta: what the model adds to `length` to get the next token's position (0 for models
            and prompts without media).
        head: tokens at the prompt's beginning that one forward takes together, up to the last
            placeholder of media; 0 for text.
        target: tokens that prefill computes; `length` grows up to it in one or more chunks.
        cached: tokens of the prompt that were copied from another sequence, not computed.
        scores: log probabilities of drawn tokens that no piece has shown yet; None: not asked for.
        stopping: its own stopping criteria; set by the engine before it is scheduled.
        detokenizer: turns its tokens to text; set by the engine before it is scheduled.
        constraint: which tokens it may have; None: any.
        visuals: its media, where its prompt is computed in pieces; None: not begun, or not so.
    """

    __slots__ = (
        "cached",
        "constraint",
        "context_length",
        "detokenizer",
        "eos_ids",
        "handle",
        "head",
        "length",
        "output_ids",
        "prompt",
        "prompt_ids",
        "rope_delta",
        "sampling",
        "scores",
        "seed",
        "slot",
        "stopping",
        "target",
        "trial",
        "visuals",
    )

    stopping: StoppingCriteriaList
    detokenizer: Detokenizer

    def __init__(
        self,
        handle: int,
        prompt: Prompt,
        sampling: SamplingParams,
        eos_ids: frozenset[int],
        context_length: int,
        generated: tuple[int, ...] = (),
        *,
        trial: bool = False,
    ) -> None:
        self.handle = handle
        self.prompt = prompt
        self.sampling = sampling
        self.seed = sampling.seed
        self.scores = deque[TokenScores]() if sampling.logprobs is not None else None
        self.prompt_ids = prompt.input_ids
        self.output_ids = list(generated)
        self.eos_ids = eos_ids
        self.context_length = context_length
        self.slot = -1
        self.length = 0
        self.rope_delta = 0
        self.head = media_head(prompt)
        self.target = self.total
        self.cached = 0
        self.trial = trial
        self.constraint: Constraint | None = None
        self.visuals: Visuals | None = None

    @property
    def total(self) -> int:
        """Tokens of prompt and output together."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def replays(self) -> bool:
        """Whether the cache still lacks tokens that are known: what comes next is known too."""
        return self.length < self.total

    @property
    def reach(self) -> int:
        """Most tokens it may come to have."""
        return min(len(self.prompt_ids) + self.sampling.max_tokens, self.context_length)

    def tokens(self, start: int, end: int) -> list[int]:
        """Return the tokens from one place to another, of prompt and output together."""
        size = len(self.prompt_ids)
        if start >= size:
            return self.output_ids[start - size : end - size]
        return self.prompt_ids[start:end] + self.output_ids[: max(end - size, 0)]

    @property
    def last_token(self) -> int:
        """The newest token."""
        return self.output_ids[-1]

    @property
    def next_input(self) -> int:
        """The token that the next decode step feeds to the model; the newest, unless it replays."""
        return self.output_ids[self.length - len(self.prompt_ids)]


@dataclass(frozen=True)
class Chunk:
    """The next `count` tokens of a sequence's prefill."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """Whether the sequence can be decoded after it."""
        return self.sequence.length + self.count >= self.sequence.target


def media_head(prompt: Prompt) -> int:
    """Return how many tokens at a prompt's beginning go through one forward, with its tensors."""
    if not prompt.tensors.keys() - TOKEN_KINDS:
        return 0
    kinds = [prompt.tensors[name] for name in TOKEN_KINDS & prompt.tensors.keys()]
    places = np.flatnonzero(kinds[0]) if kinds else np.array([])
    return int(places[-1]) + 1 if len(places) else len(prompt.input_ids)
