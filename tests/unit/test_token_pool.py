"""Rows of a pooled cache that move to slots of another size."""

import pytest
import torch

from worker.engine.torchvision_shim import prepare_torchvision

prepare_torchvision()  # before anything imports transformers
# ruff: noqa: E402

from worker.engine.token_pool import PAGE, PooledCache

ROWS = 3


@pytest.fixture
def cache():
    """A cache of two layers with three rows of a page, each full of numbers of its own."""
    cache = PooledCache(2, ROWS, 8 * PAGE)
    cache.reserve(ROWS, PAGE)
    for layer in cache.layers:
        layer.lazy_initialization(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
        for row in range(ROWS):
            for pool in layer.row(row, PAGE):
                pool.copy_(torch.arange(PAGE)[:, None] + 1000 * row + 1)
    return cache


def same(cache, length):
    numbers = torch.arange(length)[:, None] + 1
    return all(
        bool((pool == numbers + 1000 * row).all())
        for layer in cache.layers
        for row in range(ROWS)
        for pool in layer.row(row, length)
    )


@pytest.mark.parametrize("tokens", [2 * PAGE, 3 * PAGE, 7 * PAGE])
def test_rows_move_whole_without_memory(cache, monkeypatch, tokens):
    """Once the pools are large enough nothing is taken that could be short half way."""
    cache._grow(ROWS * 8 * PAGE)

    def short(*_args, **_options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "clone", short)
    cache.reserve(ROWS, tokens)
    assert same(cache, PAGE)


@pytest.mark.parametrize("step", [1, 5, PAGE - 1, PAGE])
@pytest.mark.parametrize("away", [1, -1])
def test_places_that_overlap_are_copied_as_if_they_did_not(cache, step, away):
    """Whichever way, and by how little they move."""
    source = cache.plan.start(1)
    before = [tuple(pool.clone() for pool in layer.row(1, PAGE)) for layer in cache.layers]
    for layer in cache.layers:
        layer.shift(source, source + away * step, PAGE)
    for layer, (keys, _) in zip(cache.layers, before, strict=True):
        moved = layer.keys[source + away * step :][:PAGE].transpose(0, 1)
        assert torch.equal(moved, keys)
