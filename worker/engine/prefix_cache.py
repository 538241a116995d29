"""Keys and values of beginnings that come again: the last turns of a conversation, one image.

Taken from a sequence that has a row now (so the choices of one request share a prefill), or from
copies of the rows of sequences that ended.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.engine.kv_cache import SlotCache
from worker.engine.prefix_index import BLOCK, PrefixIndex
from worker.engine.sequence import Sequence

log = logging.getLogger("unbroken.engine")

LEAST = BLOCK  # tokens; fewer are computed as fast as they are looked up

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Stored:
    """What is known of a row: its tokens, and the media that stand for placeholders among them."""

    ids: Ids
    media: str
    head: int
    rope_delta: int
    layers: list[tuple[Tensor, Tensor]]

    @property
    def size(self) -> int:
        """Bytes of keys and values."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


class PrefixCache:
    """Remembers up to `max_bytes` of ended sequences; the least recently used go first.

    A beginning is used again only where the tokens are the same, and the media too: all of them, or
    none so far. At least one token is left to compute, since its logits are what is wanted.

    Args:
        cache: the slot cache, whose rows are copied from and to.
        max_bytes: 0 keeps nothing of ended sequences, and shares nothing.
    """

    def __init__(self, cache: SlotCache, max_bytes: int) -> None:
        self._cache, self._max_bytes = cache, max_bytes
        self._stored: OrderedDict[int, _Stored] = OrderedDict()
        self._index = PrefixIndex()
        self._bytes = 0

    @property
    def size(self) -> int:
        """Bytes that are kept of ended sequences."""
        return self._bytes

    @torch.inference_mode()
    def fill(self, sequence: Sequence, live: list[Sequence]) -> None:
        """Fill the beginning of a sequence's row from the best source; sets `length`, `cached`."""
        if not self._max_bytes:
            return
        ids = _ids(sequence, sequence.target)
        best, source, row = LEAST - 1, self._index.longest(ids, _known(sequence)), None
        if source is not None:
            stored = self._stored[source]
            count = _usable(sequence, ids, stored.ids, stored.media, stored.head)
            best, source = (count, source) if count > best else (best, None)
        for other in live:
            if other is not sequence:
                count = _usable(sequence, ids, _ids(other, _sure(other)), *_media(other))
                if count > best:
                    best, row = count, other
        if row is not None:
            self._cache.move(row.slot, sequence.slot, best)
            self._take(sequence, best, row.rope_delta)
        elif source is not None:
            self._stored.move_to_end(source)
            self._cache.copy_in(sequence.slot, self._stored[source].layers, best)
            self._take(sequence, best, self._stored[source].rope_delta)

    def _take(self, sequence: Sequence, count: int, rope_delta: int) -> None:
        sequence.length = count
        sequence.cached = min(count, len(sequence.prompt_ids))
        sequence.rope_delta = rope_delta if sequence.head else 0

    def worth_waiting(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether a sequence can use what the other one's prefill is about to compute."""
        if not self._max_bytes:
            return False
        ids = _ids(sequence, len(sequence.prompt_ids))
        return _usable(sequence, ids, _ids(other, other.target), *_media(other)) >= LEAST

    def clear(self) -> bool:
        """Forget all ended sequences; tell whether there were any."""
        kept = list(self._stored)
        for key in kept:
            self._drop(key)
        return bool(kept)

    @torch.inference_mode()
    def keep(self, sequence: Sequence) -> None:
        """Remember a sequence that ends now, and still has its row."""
        length = _sure(sequence)
        size = length * self._cache.token_bytes
        if length < LEAST or size > self._max_bytes or length < sequence.head:
            return
        ids, (media, head) = _ids(sequence, length), _media(sequence)
        if sequence.head and not media:
            return
        if self._has(ids, media):
            return
        while self._bytes + size > self._max_bytes:
            self._drop(next(iter(self._stored)))
        try:
            layers = self._cache.copy_out(sequence.slot, length)
        except torch.AcceleratorError:
            raise
        except (MemoryError, RuntimeError):  # no memory for what is of use, but not needed
            log.warning("no memory to remember a prefix", extra={"tokens": length})
            return
        stored = _Stored(ids, media, head, sequence.rope_delta, layers)
        self._stored[sequence.handle] = stored
        self._index.add(sequence.handle, ids, media)
        self._bytes += stored.size

    def _has(self, ids: Ids, media: str) -> bool:
        """Whether one that is kept begins with these tokens; those that they begin with go."""
        for key in self._index.continuations(ids, media):
            old = self._stored[key]
            if old.media == media and np.array_equal(old.ids[: len(ids)], ids):
                self._stored.move_to_end(key)
                return True
        for key in self._index.beginnings(ids, media):
            old = self._stored[key]
            if old.media == media and np.array_equal(old.ids, ids[: len(old.ids)]):
                self._drop(key)
        return False

    def _drop(self, key: int) -> None:
        stored = self._stored.pop(key)
        self._index.remove(key, stored.ids, stored.media)
        self._bytes -= stored.size


def _sure(sequence: Sequence) -> int:
    """Return how many tokens of a row are of use: a step under way may be adding the last one.

    Nobody has looked at its numbers yet, or ever will, if the sequence ends meanwhile.
    """
    return min(sequence.length, sequence.total - 1)


def _ids(sequence: Sequence, count: int) -> Ids:
    return np.array(sequence.tokens(0, count), dtype=np.int64)


def _known(sequence: Sequence) -> str:
    """Return what a kept row must have been made with, to be of use to a sequence."""
    return sequence.prompt.media if sequence.head else ""


def _media(sequence: Sequence) -> tuple[str, int]:
    return sequence.prompt.media, sequence.head


def _usable(sequence: Sequence, ids: Ids, other: Ids, media: str, head: int) -> int:
    """Return how many tokens of another sequence are the beginning of this one."""
    count = min(len(ids) - 1, len(other))
    different = np.flatnonzero(ids[:count] != other[:count])
    count = int(different[0]) if len(different) else count
    if sequence.head:
        same = bool(media) and media == sequence.prompt.media and head == sequence.head
        return count if same and count >= head else 0
    # Without media of its own, only what comes before the other's: behind them positions differ.
    return count if not head else 0
