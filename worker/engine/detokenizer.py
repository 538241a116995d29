"""Turns tokens into pieces of text: whole characters only, without stop strings, thoughts apart.

An id leaves in the piece that holds the last of its text, and waits until then. So a log that
holds an id holds all of its text, and no text beside that: a successor replays the log's ids and
goes on with the next token. (The pieces of one `push` belong into the log together.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import decoders

from shared.protocol import Channel
from worker.engine.messages import Piece

OPEN, CLOSE = "<think>", "</think>"
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


@dataclass
class _Run:
    """Text to show, `start` to `end` in the pending text, of one channel."""

    channel: Channel
    start: int
    end: int


class Detokenizer:
    """Turns one sequence's tokens into pieces.

    The output begins as reasoning where the prompt left a thought open, or where it starts with
    `<think>` itself. `</think>` ends the thought; neither tag is shown, nor are the newlines after
    them. A stop string counts in either channel, but not across the two; of several, the one that
    is complete first ends the output, and nothing of it is shown. Only text that may yet become a
    tag or a stop string waits.

    Args:
        tokenizer: a Transformers tokenizer.
        stop: the stop strings.
        thinking: whether the prompt left a thought open.
        min_tokens: a stop string counts only if this many tokens or more are there when it ends.
        hidden: tokens without text, besides the special ones (a request's stop tokens).

    Attributes:
        stopped: whether a stop string was found; no token is to be pushed after that.
        marks: whether each of the ids that have left shows text, where somebody wants to know.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: tuple[str, ...] = (),
        thinking: bool = False,  # noqa: FBT001, FBT002  # a fact about the prompt, not a mode
        min_tokens: int = 0,
        hidden: Iterable[int] = (),
    ) -> None:
        self.stopped = False
        self.marks: list[bool] | None = None
        self._decoder = TextDecoder(tokenizer, hidden)
        self._stop = tuple(s for s in stop if s)
        self._min_tokens = min_tokens
        self._count = 0
        self._thought_tokens = 0
        self._state: Literal["start", "thought", "answer"] = "thought" if thinking else "start"
        self._after_tag = False  # newlines that come now are dropped
        self._text = ""  # decoded, but not yet in a piece
        self._units: deque[tuple[list[int], int]] = deque()  # ids, and where their text ends
        self._runs: list[_Run] = []
        self._sorted = 0  # up to here, the text is known as tag, newline after it or run
        self._clear = 0  # up to here, it is also known not to belong to a stop string

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the thought so far, the one that ends it included."""
        return self._count if self._state == "thought" else self._thought_tokens

    def push(self, token: int) -> list[Piece]:
        """Take the next token in; return what can be shown now, in order.

        A token that ends the thought and begins the answer gives two pieces, its id in the second.
        """
        self._count += 1
        settled = self._decoder.push(token)
        if settled is None:
            return []
        self._add(*settled)
        self._sort(final=False)
        return self._release(final=False)

    def replay(self, ids: Iterable[int]) -> None:
        """Take in tokens whose pieces are in the log already."""
        for token in ids:
            self.push(token)
        self._add(*self._decoder.finish())
        if self._text:
            self._sort(final=True)
        # What seems to wait was shown when the token after it, which is drawn again, was there.
        self._reset()

    def finish(self) -> list[Piece]:
        """Return what was held back, with all the ids that are left."""
        self._add(*self._decoder.finish())
        self._sort(final=True)
        return self._release(final=True)

    def _add(self, ids: list[int], text: str) -> None:
        if ids:
            self._text += text
            self._units.append((ids, len(self._text)))

    def _sort(self, *, final: bool) -> None:
        """Tell tags and text apart, as far as the text so far allows."""
        while not self.stopped:
            if self._state == "start" and not self._open_thought(final=final):
                return
            if self._after_tag:
                rest = self._text[self._sorted :].lstrip("\n")
                self._sorted = self._clear = len(self._text) - len(rest)
                self._after_tag = not rest
            if self._state == "answer":
                self._show("content", len(self._text))
                return
            close = self._text.find(CLOSE, self._sorted)
            if close < 0:
                held = 0 if final else _overlap(self._text[self._sorted :], CLOSE)
                self._show("reasoning", len(self._text) - held)
                return
            self._show("reasoning", close)
            if not self.stopped:
                self._sorted = close + len(CLOSE)
                self._join(close, self._sorted)
                self._state, self._after_tag = "answer", True
                self._thought_tokens = self._count

    def _open_thought(self, *, final: bool) -> bool:
        """Look for `<think>` at the very start; return whether it is clear what begins here."""
        if self._text.startswith(OPEN):
            self._sorted = len(OPEN)
            self._state, self._after_tag = "thought", True
        elif OPEN.startswith(self._text) and not final:
            return False
        else:
            self._state = "answer"
        return True

    def _join(self, start: int, end: int) -> None:
        """Keep the tokens of a tag together if its first one has other text too.

        That one would go out with its text, and a replay that ends there would not see the tag.
        """
        units = list(self._units)
        first = next(i for i, unit in enumerate(units) if unit[1] > start)
        last = next(i for i, unit in enumerate(units) if unit[1] >= end)
        if start > (units[first - 1][1] if first else 0):
            ids = [token for unit in units[first : last + 1] for token in unit[0]]
            self._units = deque([*units[:first], (ids, units[last][1]), *units[last + 1 :]])

    def _show(self, channel: Channel, end: int) -> None:
        """Make the text up to `end` part of a channel, or stop where a stop string begins."""
        start, self._sorted = self._sorted, end
        if start == end:
            return
        if self._runs and self._runs[-1].channel == channel:
            self._runs[-1].end = end
        else:
            self._runs.append(_Run(channel, start, end))
        if self._stop and self._count >= self._min_tokens:
            found = self._find_stop(start, end)
            if found is not None:
                self._runs[-1].end = self._clear = found
                self.stopped = True
                return
        tail = self._text[self._clear : end]
        self._clear = end - max((_overlap(tail, stop) for stop in self._stop), default=0)

    def _find_stop(self, start: int, end: int) -> int | None:
        """Return where the stop string begins that is complete first, if one ends after `start`."""
        found = []
        for stop in self._stop:
            at = self._text.find(stop, max(self._clear, start - len(stop) + 1), end)
            if at >= 0:
                found.append((at + len(stop), at))
        return min(found)[1] if found else None

    def _release(self, *, final: bool) -> list[Piece]:
        """Return the pieces of the tokens whose text is all clear; the others wait."""
        if self._clear == len(self._text) and len(self._units) == len(self._runs) == 1:
            run = self._runs[0]
            if run.start == 0 and run.end == self._clear:  # nearly always
                ids, text = self._units[0][0], self._text
                self._reset()
                self._mark(ids, shown=True)
                return [Piece(tuple(ids), text, run.channel)]
        return self._sorted_pieces(final=final)

    def _sorted_pieces(self, *, final: bool) -> list[Piece]:
        pieces: list[tuple[Channel, list[int], list[str]]] = []
        ids = list[int]()
        start = 0
        while self._units and (final or self._units[0][1] <= self._clear):
            unit, end = self._units.popleft()
            shown = False
            for run in self._runs:
                text = self._text[max(run.start, start) : min(run.end, end)]
                if text:
                    if not pieces or pieces[-1][0] != run.channel:
                        pieces.append((run.channel, [], []))
                    pieces[-1][2].append(text)
                    shown = True
            ids += unit
            self._mark(unit, shown=shown)
            if shown:
                pieces[-1][1].extend(ids)
                ids = []
            start = end
        if final and ids:
            if not pieces:
                channel: Channel = "reasoning" if self._state == "thought" else "content"
                pieces.append((channel, [], []))
            pieces[-1][1].extend(ids)
            ids = []
        if self.marks and ids:  # they stay, and are marked again
            del self.marks[-len(ids) :]
        self._forget(start, ids)
        return [Piece(tuple(ids), "".join(texts), channel) for channel, ids, texts in pieces]

    def _mark(self, tokens: list[int], *, shown: bool) -> None:
        if self.marks is not None:
            self.marks += [shown and self._decoder.shows(token) for token in tokens]

    def _reset(self) -> None:
        self._units.clear()
        self._runs.clear()
        self._text, self._sorted, self._clear = "", 0, 0

    def _forget(self, start: int, ids: list[int]) -> None:
        """Drop the text up to `start`; ids without any text wait for the next piece."""
        if ids:
            self._units.appendleft((ids, start))
        if not start:
            return
        self._text = self._text[start:]
        self._sorted = max(self._sorted - start, 0)
        self._clear = max(self._clear - start, 0)
        self._units = deque((ids, end - start) for ids, end in self._units)
        self._runs = [
            _Run(run.channel, max(run.start - start, 0), run.end - start)
            for run in self._runs
            if run.end > start
        ]


def _overlap(text: str, word: str) -> int:
    """Return the length of the longest end of `text` that begins `word` without being all of it."""
    if not text:
        return 0
    at = word.rfind(text[-1], 0, min(len(word) - 1, len(text)))
    while at >= 0 and not text.endswith(word[: at + 1]):
        at = word.rfind(text[-1], 0, at)
    return at + 1
