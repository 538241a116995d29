"""Attention over rows of different lengths equals plain attention, whichever way it is computed."""

import pytest
import torch

from tests import engine_kit  # noqa: F401  # before transformers
from worker.engine import ragged

# FlexAttention runs as it is here, not compiled; and its import meets torch's own old habits.
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ragged.PATHS)
def test_each_path_equals_plain_attention(name, dtype):
    """Rows of 1, 255, 256, 257 and 512 tokens, anywhere in the pool, with shared key heads."""
    if reason := ragged.unavailable(name, CPU, dtype):
        pytest.skip(f"{reason}: the GPU benchmark's first section checks it")
    assert ragged.worst_error(name, CPU, dtype) <= ragged.TOLERANCE[dtype]


def test_the_check_sees_a_token_too_many(monkeypatch):
    """A path that attends to one token behind a row's end does not pass."""

    def greedy(query, keys, values, rows, scale):
        return ragged._sdpa(query, keys, values, rows._replace(lengths=rows.lengths + 1), scale)

    monkeypatch.setitem(ragged.PATHS, "sdpa", greedy)
    assert ragged.worst_error("sdpa", CPU, torch.float32) > 100 * ragged.TOLERANCE[torch.float32]


def test_a_path_that_is_wrong_or_fails_is_not_chosen(monkeypatch):
    """The best path is the first that computes the right thing on this very device."""
    meta = torch.device("meta")  # not a CPU, so that paths are tried
    monkeypatch.setattr(ragged, "unavailable", lambda *_: "")
    broken = RuntimeError("no kernel")
    outcome = {"flash": 1.0, "varlen": broken, "paged": float("nan"), "flex": 0.0}

    def worst_error(name, *_):
        if isinstance(outcome[name], Exception):
            raise outcome[name]
        return outcome[name]

    monkeypatch.setattr(ragged, "worst_error", worst_error)
    assert ragged.best(meta, torch.bfloat16) == "flex"
    outcome["flex"] = 1.0
    assert ragged.best(meta, torch.bfloat16) == "sdpa"
    assert ragged.best(CPU, torch.float32) == "sdpa"
