"""Looks for words in a text that is still growing."""

from __future__ import annotations


def overlap(text: str, word: str) -> int:
    """Return the length of the longest end of `text` that begins `word` without being all of it."""
    if not text:
        return 0
    at = word.rfind(text[-1], 0, min(len(word) - 1, len(text)))
    while at >= 0 and not text.endswith(word[: at + 1]):
        at = word.rfind(text[-1], 0, at)
    return at + 1
