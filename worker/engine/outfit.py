"""Gives a sequence what reads its tokens: detokenizer, parser of calls, constraint."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from worker.engine.constraint import Constraint
from worker.engine.detokenizer import Detokenizer
from worker.tools import PARSERS

if TYPE_CHECKING:
    from worker.engine.constraint import Tokens
    from worker.engine.sequence import Sequence


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
