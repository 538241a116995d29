"""The index of prefixes against a search through all of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.prefix_index import BLOCK, PrefixIndex

# Few different blocks, so that beginnings come again; and a rest that is no whole block.
PARTS = st.tuples(st.lists(st.integers(0, 1), max_size=5), st.integers(0, BLOCK - 1))
SEQUENCES = st.lists(st.tuples(PARTS, st.sampled_from(["", "picture"])), max_size=12)


def tokens(parts) -> np.ndarray:
    blocks, rest = parts
    return np.array([b for b in blocks for _ in range(BLOCK)] + [7] * rest, dtype=np.int64)


def shared(ids, media, other, other_media) -> int:
    """How many whole blocks two sequences have in common."""
    if media != other_media:
        return 0
    size = min(len(ids), len(other)) // BLOCK * BLOCK
    different = np.flatnonzero(ids[:size] != other[:size])
    return int(different[0] if len(different) else size) // BLOCK


@given(SEQUENCES, PARTS, st.sampled_from(["", "picture"]), st.sets(st.integers(0, 11)))
def test_it_finds_what_a_search_finds(kept, wanted, media, removed):
    """The most shared blocks, every beginning and every continuation, also after removals."""
    index, ids = PrefixIndex(), tokens(wanted)
    for key, (parts, its_media) in enumerate(kept):
        index.add(key, tokens(parts), its_media)
    left = {}
    for key, (parts, its_media) in enumerate(kept):
        if key in removed:
            index.remove(key, tokens(parts), its_media)
        else:
            left[key] = (tokens(parts), its_media)
    most = max((shared(ids, media, *other) for other in left.values()), default=0)
    found = index.longest(ids, media)
    assert (found is not None) == (most > 0)
    if found is not None:
        assert shared(ids, media, *left[found]) == most
    for key, (other, its_media) in left.items():
        if its_media == media and len(other) >= BLOCK:
            if len(other) <= len(ids) and (ids[: len(other)] == other).all():
                assert key in index.beginnings(ids, media)
            if len(ids) >= BLOCK and len(other) >= len(ids) and (other[: len(ids)] == ids).all():
                assert key in set(index.continuations(ids, media))


@given(SEQUENCES)
def test_nothing_stays_of_what_is_removed(kept):
    """It holds no more than what it was given and not asked to forget."""
    index = PrefixIndex()
    for key, (parts, media) in enumerate(kept):
        index.add(key, tokens(parts), media)
    for key, (parts, media) in enumerate(kept):
        index.remove(key, tokens(parts), media)
    assert len(index) == 0
