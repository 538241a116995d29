"""Turns tokens into text one by one, whole characters only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import decoders

UNFINISHED = "\ufffd"  # what an incomplete character decodes to
SURE = 4  # an incomplete UTF-8 character has at most 3 bytes: of 4 tokens, one can be settled
PATIENCE = 16  # tokens after which a text that ends in U+FFFD is taken as it is


class TextDecoder:
    """Decodes token by token; the texts add up to the decoding of all tokens at once.

    Special tokens have no text. With a decoder that judges a run of byte tokens as a whole (byte
    fallback) the sum differs for invalid UTF-8, where valid characters that were shown stay.

    Args:
        tokenizer: a Transformers tokenizer.
        hidden: more tokens that have no text here.
    """

    def __init__(self, tokenizer: Any, hidden: Iterable[int] = ()) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            silent, self._size = tokenizer.all_special_ids, len(tokenizer)
            self._decode: Callable[[list[int]], str] = lambda ids: tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        else:
            added = backend.get_added_tokens_decoder()
            silent, self._size = [i for i, t in added.items() if t.special], len(tokenizer)
            self._decode = backend.decode  # skips special tokens unless told otherwise
        self._silent = frozenset(silent).union(hidden)
        # Bytes that are put together need no context; other decoders look at the token before.
        self._needs_context = not isinstance(getattr(backend, "decoder", None), decoders.ByteLevel)
        self._context: list[int] = []
        self._context_text = ""
        self._ids: list[int] = []  # all tokens since the last settled one
        self._open: list[int] = []  # those of them that have text

    def push(self, token: int) -> tuple[list[int], str] | None:
        """Take a token in; return the tokens whose text is settled by it, and that text.

        None while the text may end in an incomplete character.
        """
        self._ids.append(token)
        if token in self._silent or token >= self._size:
            return None if self._open else self._settle(0, "")
        self._open.append(token)
        text = self._text(self._open)
        if not text.endswith(UNFINISHED) or len(self._open) >= PATIENCE:
            return self._settle(len(self._open), text)
        if len(self._open) >= SURE:
            # No character lies across a cut where both sides decode to their part of the whole.
            for cut in range(len(self._open) - 1, 0, -1):
                left, right = self._text(self._open[:cut]), self._decode(self._open[cut:])
                if right and left + right == text:
                    return self._settle(cut, left)
        return None

    def finish(self) -> tuple[list[int], str]:
        """Return the tokens that are left, and their text: U+FFFD for incomplete characters."""
        return self._settle(len(self._open), self._text(self._open) if self._open else "")

    def _text(self, tokens: list[int]) -> str:
        if not self._context:
            return self._decode(tokens)
        text = self._decode(self._context + tokens)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(tokens)

    def _settle(self, count: int, text: str) -> tuple[list[int], str]:
        """Take the first `count` open tokens, and the silent ones before them, as done."""
        settled, self._open = self._open[:count], self._open[count:]
        if self._needs_context and settled:
            self._context = settled if text else self._context + settled
            self._context_text = self._decode(self._context)
        if not self._open:
            ids, self._ids = self._ids, []
            return ids, text
        end = len(self._ids)
        for _ in self._open:
            end = max(i for i in range(end) if self.shows(self._ids[i]))
        ids, self._ids = self._ids[:end], self._ids[end:]
        return ids, text

    def shows(self, token: int) -> bool:
        """Whether a token has text."""
        return token not in self._silent and token < self._size
