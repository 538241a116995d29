"""What ends a sequence, and what it is said to have ended by."""

from __future__ import annotations

import time
import timeit
from typing import Any

import pytest
import torch
from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList

from shared.protocol import CancelReason, SamplingParams
from worker.engine.messages import Prompt
from worker.engine.sequence import Sequence
from worker.engine.stopping import (
    CancelCriteria,
    CompleteCriteria,
    EosCriteria,
    LengthCriteria,
    StopStringCriteria,
    build_stopping,
    finish_reason,
)

EOS = 7
VIEW = torch.tensor([[1]])


class Reader:
    """The one thing that criteria read of a detokenizer."""

    stopped, calls = False, 0


def make_sequence(output: list[int], context_length: int = 8192, **kwargs: Any) -> Sequence:
    sequence = Sequence(
        3, Prompt([1, 2, 3]), SamplingParams(**kwargs), frozenset({EOS}), context_length
    )
    sequence.output_ids.extend(output)
    sequence.detokenizer = Reader()  # type: ignore[assignment]
    return sequence


def ends(sequence: Sequence, cancelled: dict[int, CancelReason] | None = None) -> bool:
    answer = build_stopping(sequence, cancelled or {})(VIEW, None)
    assert answer.shape == (1,)
    assert answer.dtype == torch.bool
    return bool(answer)


def test_the_criteria_are_those_of_transformers():
    """A sequence has a `StoppingCriteriaList` of five `StoppingCriteria`."""
    criteria = build_stopping(make_sequence([5]), {})
    assert isinstance(criteria, StoppingCriteriaList)
    assert all(isinstance(criterion, StoppingCriteria) for criterion in criteria)
    kinds = [
        EosCriteria,
        StopStringCriteria,
        CompleteCriteria,
        LengthCriteria,
        CancelCriteria,
    ]
    assert [type(criterion) for criterion in criteria] == kinds


@pytest.mark.parametrize(
    ("output", "kwargs", "expected"),
    [
        ([], {}, None),
        ([5], {}, None),
        ([5, EOS], {}, "stop"),
        ([EOS, 5], {}, None),
        ([5, EOS], {"ignore_eos": True}, None),
        ([5, 9], {"stop_token_ids": (8, 9)}, "stop"),
        ([5, 9], {"stop_token_ids": (9,), "ignore_eos": True}, "stop"),
        ([5] * 4, {"max_tokens": 5}, None),
        ([5] * 5, {"max_tokens": 5}, "length"),
        ([5] * 4 + [EOS], {"max_tokens": 5}, "stop"),
        ([5] * 4, {"context_length": 8}, None),
        ([5] * 5, {"context_length": 8}, "length"),
        ([5] * 5, {"context_length": 8, "max_tokens": 100}, "length"),
    ],
)
def test_tokens_end_a_sequence(output, kwargs, expected):
    """EOS, stop tokens and both length limits end it, and an EOS in the last place is a stop."""
    sequence = make_sequence(output, **kwargs)
    assert ends(sequence) == (expected is not None)
    if expected:
        assert finish_reason(sequence, {}) == (expected, None)


def test_a_stop_string_ends_a_sequence():
    """It ends as the detokenizer finds it, with `stop` even in the last place."""
    sequence = make_sequence([5] * 5, max_tokens=5)
    criteria = build_stopping(sequence, {})
    sequence.detokenizer.stopped = True
    assert bool(criteria(VIEW, None))
    assert finish_reason(sequence, {}) == ("stop", None)


@pytest.mark.parametrize("reason", ["requested", "abandoned"])
def test_a_cancellation_ends_a_sequence(reason):
    """It is heard of while the sequence runs, concerns that handle only, and says why."""
    cancelled: dict[int, CancelReason] = {4: "requested"}
    sequence = make_sequence([5])
    criteria = build_stopping(sequence, cancelled)
    assert not bool(criteria(VIEW, None))
    cancelled[3] = reason
    assert bool(criteria(VIEW, None))
    assert finish_reason(sequence, cancelled) == ("stop", reason)


@pytest.mark.parametrize(("output", "expected"), [([EOS], "stop"), ([5] * 9, "length")])
def test_a_cancellation_with_the_last_token_is_too_late(output, expected):
    """A sequence that is complete has finished, not been cancelled."""
    sequence = make_sequence(output, max_tokens=9)
    assert finish_reason(sequence, {3: "requested"}) == (expected, None)


def test_a_running_sequence_has_no_reason():
    """To ask why a sequence ended that has not is an error."""
    with pytest.raises(ValueError, match="not ended"):
        finish_reason(make_sequence([5]), {})


@pytest.mark.parametrize(("limit", "expected"), [(1, True), (2, False)])
def test_other_criteria_can_be_added(limit, expected):
    """A criterion of Transformers in the list is asked as well."""
    criteria = build_stopping(make_sequence([5]), {})
    criteria.append(MaxLengthCriteria(limit))
    assert bool(criteria(VIEW, None)) is expected


def test_the_answer_is_the_same_for_a_plain_list():
    """The criteria work in Transformers' own list, as `generate()` calls them."""
    for output in ([5], [EOS], [5] * 9):
        sequence = make_sequence(output, max_tokens=9)
        criteria = build_stopping(sequence, {})
        plain = StoppingCriteriaList(list(criteria))(VIEW, None)
        again = StoppingCriteriaList(list(criteria))(VIEW, None)
        assert torch.equal(plain, criteria(VIEW, None))
        assert torch.equal(plain, again)


def test_asking_costs_microseconds():
    """A call costs less than 50 µs of processor time, far below a decode step's share."""
    criteria = build_stopping(make_sequence([5]), {})
    times = timeit.repeat(
        lambda: criteria(VIEW, None), timer=time.thread_time, number=200, repeat=20
    )
    assert min(times) / 200 < 50e-6
