"""Turns tokens into pieces of text: whole characters only, without stop strings, thoughts apart.

An id leaves in the piece that holds the last of its text, and waits until then. So a log that
holds an id holds all of its text, and no text beside that: a successor replays the log's ids and
goes on with the next token. (The pieces of one `push` belong into the log together.)
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from shared.protocol import Channel
from worker.engine.messages import Call, Piece
from worker.engine.text_decoder import TextDecoder
from worker.tools.parser import Found, ToolParser
from worker.tools.text import overlap

OPEN, CLOSE = "<think>", "</think>"


@dataclass
class _Run:
    """Text to show, `start` to `end` in the pending text, of one channel or one call.

    A `whole` text is shown instead, once all of it is there.
    """

    channel: Channel
    start: int
    end: int
    call: Call | None = None
    whole: str | None = None

    def part(self, start: int, end: int, text: str) -> str:
        """Return what it shows of the pending text from `start` to `end`."""
        if self.whole is not None:
            return self.whole if start < self.end <= end else ""
        return text[max(self.start, start) : min(self.end, end)]


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
        parser: finds calls of functions in the answer; None: it is all text.
        max_calls: the end of so many calls is the end of the output.

    Attributes:
        stopped: whether a stop string or the last call was found; no token is to be pushed then.
        calls: how many calls have begun.
        marks: whether each of the ids that have left shows text, where somebody wants to know.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: tuple[str, ...] = (),
        thinking: bool = False,  # noqa: FBT001, FBT002  # a fact about the prompt, not a mode
        min_tokens: int = 0,
        hidden: Iterable[int] = (),
        parser: ToolParser | None = None,
        max_calls: int = sys.maxsize,
    ) -> None:
        self.stopped = False
        self.calls = 0
        self.marks: list[bool] | None = None
        self._parser, self._max_calls = parser, max_calls
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

    @property
    def thinking(self) -> bool:
        """Whether the output is inside a thought."""
        return self._state == "thought"

    @property
    def answering(self) -> bool:
        """Whether the thought, if there was one, has ended."""
        return self._state == "answer"

    @property
    def closing(self) -> int:
        """How many characters of `</think>` the thought ends with, without its last."""
        return overlap(self._text[self._sorted :], CLOSE) if self._state == "thought" else 0

    @property
    def unread(self) -> str:
        """The text outside of thoughts of which it is not yet known what it is."""
        return "" if self._state == "thought" else self._text[self._sorted :]

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

    def replay(self, ids: Iterable[int], seen: Callable[[int], None] = lambda _token: None) -> None:
        """Take in tokens whose pieces are in the log already; `seen` is told of each of them."""
        for token in ids:
            self.push(token)
            seen(token)
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
                if self._parser is None:
                    self._show("content", len(self._text))
                else:
                    self._read_answer(self._parser, final=final)
                return
            close = self._text.find(CLOSE, self._sorted)
            if close < 0:
                held = 0 if final else overlap(self._text[self._sorted :], CLOSE)
                self._show("reasoning", len(self._text) - held)
                return
            self._show("reasoning", close)
            if not self.stopped:
                self._sorted = close + len(CLOSE)
                self._join(close, self._sorted)
                self._state, self._after_tag = "answer", True
                self._thought_tokens = self._count

    def _read_answer(self, parser: ToolParser, *, final: bool) -> None:
        """Tell text, calls and their markup apart."""
        for found in parser.read(self._text[self._sorted :], final=final):
            start, end = self._sorted, self._sorted + found.size
            if found.kind == "text":
                self._show("content", end)
            elif found.kind == "arguments" and not found.arguments:
                self._show_call(start, end)
            else:
                self._join(start, end + found.ahead)
                if found.kind == "call":
                    self._open_call(found, start, end)
                elif found.arguments:
                    self._show_call(start, end, found.arguments)
                self._sorted = self._clear = end
                self.stopped = found.closes and self.calls >= self._max_calls
            if self.stopped:
                return

    def _open_call(self, found: Found, start: int, end: int) -> None:
        """Begin a call; its name goes out with the first of its arguments."""
        call = Call(self.calls, found.name)
        self.calls += 1
        if found.arguments:
            self._runs.append(_Run("content", start, end, call, found.arguments))
        else:
            self._runs.append(_Run("content", end, end, call))

    def _show_call(self, start: int, end: int, whole: str | None = None) -> None:
        """Make text part of the open call, or `whole` instead; stop strings do not count there."""
        last = self._runs[-1] if self._runs else None
        if last and last.call and last.end == start and last.whole is whole is None:
            last.end = end
        else:
            opened = last and last.call and last.start == last.end == start  # has the name
            call = self._runs.pop().call if opened else Call(self.calls - 1)
            self._runs.append(_Run("content", start, end, call, whole))
        self._sorted = self._clear = end

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
        last = self._runs[-1] if self._runs else None
        if last and last.channel == channel and not last.call and last.end == start:
            last.end = end
        else:
            self._runs.append(_Run(channel, start, end))
        if self._stop and self._count >= self._min_tokens:
            found = self._find_stop(start, end)
            if found is not None:
                self._runs[-1].end = self._clear = found
                self.stopped = True
                return
        tail = self._text[self._clear : end]
        self._clear = end - max((overlap(tail, stop) for stop in self._stop), default=0)

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
            if run.start == 0 and run.end == self._clear and run.whole is None:  # nearly always
                ids, text = self._units[0][0], self._text
                self._reset()
                self._mark(ids, shown=True)
                return [Piece(tuple(ids), text, run.channel, call=run.call)]
        return self._sorted_pieces(final=final)

    def _sorted_pieces(self, *, final: bool) -> list[Piece]:
        pieces: list[tuple[_Run, list[int], list[str]]] = []
        ids = list[int]()
        start = 0
        while self._units and (final or self._units[0][1] <= self._clear):
            unit, end = self._units.popleft()
            shown = False
            for run in self._runs:
                if text := run.part(start, end, self._text):
                    if not pieces or not _same(pieces[-1][0], run):
                        pieces.append((run, [], []))
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
                pieces.append((_Run("reasoning" if self.thinking else "content", 0, 0), [], []))
            pieces[-1][1].extend(ids)
            ids = []
        if self.marks and ids:
            del self.marks[-len(ids) :]  # they stay, and are marked again
        self._forget(start, ids)
        return [
            Piece(tuple(ids), "".join(texts), run.channel, call=run.call)
            for run, ids, texts in pieces
        ]

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
        self._runs = [_behind(run, start) for run in self._runs if run.end > start]


def _same(one: _Run, other: _Run) -> bool:
    """Tell whether the texts of two runs belong together."""
    if one.call and other.call:
        return one.call.index == other.call.index
    return one.call is other.call and one.channel == other.channel


def _behind(run: _Run, cut: int) -> _Run:
    """Return what is left of a run behind a place up to which the text is gone."""
    call = run.call
    if call and call.name and run.start < cut and run.whole is None:
        call = Call(call.index)  # the name has gone out
    return _Run(run.channel, max(run.start - cut, 0), run.end - cut, call, run.whole)
