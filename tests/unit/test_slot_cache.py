"""The cache's sizes stay true when memory runs out in the middle of changing them."""

import pytest
import torch

from worker.engine import kv_cache
from worker.engine.kv_cache import SlotCache

LAYERS, HEADS, DIM = 3, 2, 4


@pytest.fixture
def cache():
    """Four rows of 512 tokens; 2,048 tokens are all there may be."""
    cache = SlotCache(LAYERS, 16, 2048)
    cache.max_tokens = 2048
    cache.plan.rows, cache.plan.capacity = 4, 512
    states = torch.zeros(1, HEADS, 1, DIM)
    for number, layer in enumerate(cache.layers):
        layer.lazy_initialization(states, states)
        layer.keys += number + 1
        layer.values += number + 1
    return cache


@pytest.mark.parametrize("rows_and_tokens", [(8, 200), (2, 1000)])
@pytest.mark.parametrize("calls", range(2 * LAYERS))
def test_a_resize_that_fails_half_way_leaves_a_usable_cache(
    cache, monkeypatch, calls, rows_and_tokens
):
    """The plan promises no more than each layer has, the next call mends all, no token is lost."""
    resized, left = kv_cache._resized, iter(range(calls))

    def out_of_memory(*args):
        if next(left, None) is None:
            raise RuntimeError("not enough memory")
        return resized(*args)

    monkeypatch.setattr(kv_cache, "_resized", out_of_memory)
    with pytest.raises(RuntimeError, match="memory"):
        cache.reserve(*rows_and_tokens)
    monkeypatch.undo()
    plan = cache.plan
    for layer in cache.layers:
        for stored in (layer.keys, layer.values):
            assert stored.shape[0] >= plan.rows
            assert stored.shape[2] >= plan.capacity
    cache.scrub(3)
    rows, tokens = rows_and_tokens
    cache.reserve(rows, tokens)
    for number, layer in enumerate(cache.layers):
        for stored in (layer.keys, layer.values):
            assert stored.shape[::2] == (plan.rows, plan.capacity)
            assert bool((stored[:2, :, :200] == number + 1).all())
    assert (plan.rows >= rows, plan.capacity >= tokens) == (True, True)
