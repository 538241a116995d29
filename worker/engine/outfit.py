"""Gives a sequence what reads its tokens: criteria, detokenizer, parser of calls, constraint."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from shared.errors import UnbrokenError
from shared.protocol import CancelReason
from worker.engine.constraint import Constraint
from worker.engine.detokenizer import Detokenizer
from worker.engine.messages import OUT_OF_MEMORY
from worker.engine.stopping import build_stopping
from worker.tools import PARSERS

if TYPE_CHECKING:
    from worker.engine.constraint import Tokens
    from worker.engine.sequence import Sequence

FAILED = "generation_failed"
LOG_FAILED = "The answer so far does not follow its format."
NO_MEMORY = OUT_OF_MEMORY, "There is not enough memory to go on with this sequence."


def prepare(
    sequence: Sequence, tokenizer: Any, tokens: Tokens, cancelled: Mapping[int, CancelReason]
) -> bool:
    """Give a sequence all that it takes to run; return whether it has ended already.

    Raises:
        ValueError: it has token ids that the model does not.
        UnbrokenError: the prompt leaves no room, or what it has from the log does not follow its
            format.
    """
    context, size = sequence.context_length, len(sequence.prompt_ids)
    if size >= context:
        message = f"This model's maximum context length is {context} tokens, but the prompt has"
        raise UnbrokenError("context_length_exceeded", f"{message} {size}.")
    ids = (*sequence.prompt_ids, *sequence.output_ids)
    if not ids or min(ids) < 0 or max(ids) >= tokens.vocab_size:
        raise ValueError("token ids outside the vocabulary")
    sequence.stopping = build_stopping(sequence, cancelled)
    outfit(sequence, tokenizer, tokens)
    if not sequence.output_ids:
        return False
    done = bool(sequence.stopping(torch.tensor([[sequence.last_token]]), None))
    if not done and sequence.constraint and sequence.constraint.failed:
        raise UnbrokenError(FAILED, LOG_FAILED)
    return done


def outfit(sequence: Sequence, tokenizer: Any, tokens: Tokens) -> None:
    """Outfit a sequence, and let it all read the tokens that it has from the log.

    Raises:
        ValueError: there are no grammars for this tokenizer.
    """
    sampling, prompt = sequence.sampling, sequence.prompt
    form = prompt.form
    sequence.detokenizer = Detokenizer(
        tokenizer,
        sampling.stop,
        prompt.thinking,
        sampling.min_tokens,
        sampling.stop_token_ids,
        PARSERS[form.tools](form.functions) if form.tools else None,
        sys.maxsize if form.parallel else 1,
    )
    constraint = Constraint(sequence, tokens)
    if constraint.limits:
        sequence.constraint = constraint
    sequence.detokenizer.replay(sequence.output_ids, constraint.push)
    constraint.adopt()  # where it is compiled already
    if sequence.scores is not None:
        sequence.detokenizer.marks = []
