"""Attention over rows of different lengths equals plain attention, whichever way it is computed."""

import pytest
import torch

from tests import engine_kit  # noqa: F401  # before transformers
from worker.engine import ragged

# FlexAttention runs as it is here, not compiled; and its import meets torch's own old habits.
pytestmark = [
    pytest.mark.timeout(120),  # it computes for seconds, on machines that may be busy
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

    def worst_error(name, *_, **__):
        if isinstance(outcome[name], Exception):
            raise outcome[name]
        return outcome[name]

    monkeypatch.setattr(ragged, "worst_error", worst_error)
    assert ragged.best(meta, torch.bfloat16) == "flex"
    outcome["flex"] = 1.0
    assert ragged.best(meta, torch.bfloat16) == "sdpa"
    assert ragged.best(CPU, torch.float32) == "sdpa"


def test_only_a_lost_device_ends_the_search(monkeypatch):
    """A kernel that a device lacks costs one path, checked with the model's heads and options."""
    heads, asked = ragged.Heads(6, 6, 32), []

    def worst_error(name, _device, _dtype, checked, *, whole):
        asked.append((name, *checked, whole))
        if name == "flash":
            raise torch.AcceleratorError("no kernel image")
        return 0.0

    monkeypatch.setattr(ragged, "unavailable", lambda *_: "")
    monkeypatch.setattr(ragged, "worst_error", worst_error)
    monkeypatch.setattr(ragged, "_touch", lambda _: None)
    meta = torch.device("meta")  # not a CPU, so that paths are tried
    assert ragged.best(meta, torch.bfloat16, heads, whole=True) == "varlen"
    assert asked == [("flash", heads, True), ("varlen", heads, True)]

    def lost(_):
        raise torch.AcceleratorError("an illegal memory access")

    monkeypatch.setattr(ragged, "_touch", lost)
    with pytest.raises(torch.AcceleratorError):
        ragged.best(meta, torch.bfloat16, heads)


@pytest.mark.parametrize("heads", [ragged.Heads(6, 6, 32), ragged.Heads(12, 4, 80)])
def test_other_heads_are_checked_too(heads):
    """Heads that are not shared, and of an uneven size."""
    assert ragged.worst_error("sdpa", CPU, torch.float32, [heads]) <= 1e-5


def test_what_lies_behind_a_row_cannot_reach_it():
    """A window goes on into the next slot, whose numbers may not be finite."""
    pools = torch.randn(2, 2 * ragged.PAGE, 2, 8)
    pools[:, 3 : ragged.PAGE], pools[:, ragged.PAGE + 5 :] = torch.nan, torch.inf
    starts, lengths = torch.tensor([0, ragged.PAGE, 0]).int(), torch.tensor([3, 5]).int()
    rows = ragged.Rows(starts, lengths, torch.arange(3).int(), 2 * ragged.PAGE, "sdpa", True)
    query = torch.randn(2, 4, 8)
    found = ragged._sdpa(query, *pools, rows, 0.3)
    alone = [
        ragged._sdpa(
            query[n : n + 1],
            *pools[:, start : start + length],
            rows._replace(starts=starts[:2] * 0, lengths=lengths[n : n + 1], window=length),
            0.3,
        )
        for n, (start, length) in enumerate([(0, 3), (ragged.PAGE, 5)])
    ]
    torch.testing.assert_close(found, torch.cat(alone))


@pytest.mark.parametrize("beyond", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_scores_that_are_changed_are_refused(beyond):
    """A model that caps its scores, or has attention sinks, is not computed without them."""
    query, pool = torch.zeros(1, 4, 1, 8), torch.zeros(256, 2, 8)
    rows = ragged.Rows(
        *(torch.zeros(2).int(), torch.ones(1).int(), torch.arange(2).int()), 1, "sdpa"
    )
    module = torch.nn.Module()
    with pytest.raises(NotImplementedError):
        ragged.attention(module, query, pool, pool, None, ragged=rows, **beyond)
    with pytest.raises(NotImplementedError):
        ragged._paged(query[:, :2, 0], pool, pool, rows, 1.0)
