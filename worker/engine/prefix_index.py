"""Finds, among many token sequences, one that begins as another does: a look-up per block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

BLOCK = 16  # tokens; a common beginning that is shorter is not found

Ids = npt.NDArray[np.int64]


class PrefixIndex:
    """Keys of token sequences by the blocks that these begin with.

    A block's name depends on all before it, and on the media that stand behind placeholders. Names
    are hashes: whoever finds a key compares the tokens.
    """

    def __init__(self) -> None:
        self._keys: dict[int, dict[int, None]] = defaultdict(dict)  # in order of arrival
        self._ends: dict[int, dict[int, None]] = defaultdict(dict)

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: int, ids: Ids, media: str) -> None:
        """Take a sequence in; `key` is not in use."""
        names = _names(ids, media)
        for name in names:
            self._keys[name][key] = None
        if names:
            self._ends[names[-1]][key] = None

    def remove(self, key: int, ids: Ids, media: str) -> None:
        """Forget a sequence, given as it was added."""
        names = _names(ids, media)
        for name in names:
            _drop(self._keys, name, key)
        if names:
            _drop(self._ends, names[-1], key)

    def longest(self, ids: Ids, media: str) -> int | None:
        """Return the newest of the sequences that share the most blocks with these tokens."""
        for name in reversed(_names(ids, media)):
            if found := self._keys.get(name):
                return next(reversed(found))
        return None

    def beginnings(self, ids: Ids, media: str) -> list[int]:
        """Return those that may be a beginning of these tokens, or the same."""
        return [key for name in _names(ids, media) for key in self._ends.get(name, ())]

    def continuations(self, ids: Ids, media: str) -> Iterator[int]:
        """Yield those that may begin with all of these tokens."""
        names = _names(ids, media)
        yield from self._keys.get(names[-1], ()) if names else ()


def _names(ids: Ids, media: str) -> list[int]:
    names, name = list[int](), hash(media)
    for at in range(BLOCK, len(ids) + 1, BLOCK):
        name = hash((name, ids[at - BLOCK : at].tobytes()))
        names.append(name)
    return names


def _drop(table: dict[int, dict[int, None]], name: int, key: int) -> None:
    table[name].pop(key, None)
    if not table[name]:
        del table[name]
