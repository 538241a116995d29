"""When a sequence ends: Transformers stopping criteria that each look at one sequence.

They read the sequence itself, not the tensors they are called with, so that a call costs no more
than a comparison. What ends a sequence is, in this order: EOS or a stop token, a stop string, an
answer that is complete, a length limit, a cancellation. So an EOS in the last place that
`max_tokens` allows is a `stop`, and a cancellation that comes with the last token has come too
late.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from shared.protocol import CancelReason, FinishReason
from worker.engine.penalties import ending_ids
from worker.engine.sequence import Sequence

# Read-only by agreement: `|` of two tensors, as in StoppingCriteriaList, makes a new one.
_GO_ON = torch.tensor([False])
_STOP = torch.tensor([True])


class SequenceCriteria(StoppingCriteria):
    """A criterion about one sequence, whose newest token is in `output_ids` already.

    Args:
        sequence: the only one it is ever asked about.
    """

    reason: FinishReason = "stop"

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence

    @abstractmethod
    def met(self) -> bool:
        """Return whether the sequence ends here."""

    def __call__(self, *_: Any, **__: Any) -> torch.Tensor:
        """Return a bool tensor of shape [1], whatever the input ids and scores."""
        return _STOP if self.met() else _GO_ON


class EosCriteria(SequenceCriteria):
    """The newest token is EOS (unless the request ignores it) or one of its stop tokens.

    The sampler draws none of them before `min_tokens`.
    """

    def __init__(self, sequence: Sequence) -> None:
        super().__init__(sequence)
        self._ids = ending_ids(sequence)

    def met(self) -> bool:
        """Return whether the newest token ends the sequence."""
        output = self.sequence.output_ids
        return bool(output) and output[-1] in self._ids


class StopStringCriteria(SequenceCriteria):
    """The output holds a stop string; the detokenizer, which reads the text anyway, found it."""

    def met(self) -> bool:
        """Return whether a stop string is complete."""
        return self.sequence.detokenizer.stopped


class CompleteCriteria(SequenceCriteria):
    """The output is all that its grammar wants, so that nothing could follow."""

    def met(self) -> bool:
        """Return whether the answer is complete."""
        constraint = self.sequence.constraint
        return constraint is not None and constraint.done


class LengthCriteria(SequenceCriteria):
    """The output has `max_tokens`, or prompt and output together fill the context."""

    reason: FinishReason = "length"

    def __init__(self, sequence: Sequence) -> None:
        super().__init__(sequence)
        room = sequence.context_length - len(sequence.prompt_ids)
        self._limit = min(sequence.sampling.max_tokens, room)

    def met(self) -> bool:
        """Return whether there is no room for another token."""
        return len(self.sequence.output_ids) >= self._limit


class CancelCriteria(SequenceCriteria):
    """Somebody cancelled the sequence.

    Args:
        sequence: the only one it is ever asked about.
        cancelled: why, by handle; read at every call, written by whoever hears of cancellations.
    """

    def __init__(self, sequence: Sequence, cancelled: Mapping[int, CancelReason]) -> None:
        super().__init__(sequence)
        self._cancelled = cancelled

    def met(self) -> bool:
        """Return whether the sequence is cancelled."""
        return self.sequence.handle in self._cancelled


class SequenceStopping(StoppingCriteriaList):
    """A list of stopping criteria for one sequence, which asks no further after the first yes."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return a bool tensor of shape [1]."""
        for criterion in self:
            if isinstance(criterion, SequenceCriteria):  # nearly always, and much cheaper
                met = criterion.met()
            else:
                met = bool(criterion(input_ids, scores, **kwargs))
            if met:
                return _STOP
        return _GO_ON


def build_stopping(
    sequence: Sequence, cancelled: Mapping[int, CancelReason]
) -> StoppingCriteriaList:
    """Return a sequence's stopping criteria, to be called after each of its tokens.

    Args:
        sequence: its detokenizer may be set later, and has to have seen each token before the call.
        cancelled: why sequences were cancelled, by handle; shared, and read at every call.
    """
    return SequenceStopping(
        [
            EosCriteria(sequence),
            StopStringCriteria(sequence),
            CompleteCriteria(sequence),
            LengthCriteria(sequence),
            CancelCriteria(sequence, cancelled),
        ]
    )


def finish_reason(
    sequence: Sequence, cancelled: Mapping[int, CancelReason]
) -> tuple[FinishReason, CancelReason | None]:
    """Return why a sequence ended, and who wanted it so if it was cancelled.

    Raises:
        ValueError: it has not ended.
    """
    for criterion in build_stopping(sequence, cancelled):
        if criterion.met():
            if isinstance(criterion, CancelCriteria):
                return criterion.reason, cancelled[sequence.handle]
            called = criterion.reason == "stop" and sequence.detokenizer.calls
            return "tool_calls" if called else criterion.reason, None
    raise ValueError("the sequence has not ended")
