"""Compiles grammars in threads beside the engine's, each text once, and keeps those used last."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

THREADS = 4
"""How many are compiled at once: a heavy one does not keep light ones waiting."""

NICENESS = 10
"""Of those threads: on a machine without idle cores the engine's step comes first."""

MOST_SECONDS = 30.0
"""What a compilation may take: the trial of the form has had 3 s, with a smaller vocabulary."""

MOST_KEPT, MOST_CHARACTERS = 64, 250_000
"""Bounds of what is kept beyond its use; a compiled grammar takes some 350 bytes a character."""


class Compilation:
    """A grammar that is being compiled, or is.

    Args:
        text: the grammar, in Lark.

    Attributes:
        future: brings the matcher, at the grammar's beginning.
        users: how many sequences have it.
    """

    def __init__(self, text: str) -> None:
        self.text, self.users = text, 0
        self.future: Future[Any]
        self._began: float | None = None

    @property
    def ended(self) -> bool:
        """Whether there is a matcher, or it has taken too long."""
        return self.future.done() or self.overdue

    @property
    def overdue(self) -> bool:
        """Whether it is still being compiled, after `MOST_SECONDS`."""
        began = self._began
        late = began is not None and time.monotonic() - began > MOST_SECONDS
        return late and not self.future.done()

    def matcher(self) -> Any:
        """Return the matcher, to be copied; None where there is none, or not yet."""
        if not self.future.done() or self.future.cancelled() or self.future.exception():
            return None
        matcher = self.future.result()
        return None if matcher.is_error() else matcher

    def run(self, tokenizer: Any) -> Any:
        """Compile it; returns the matcher, which may be one that has given up already."""
        self._began = time.monotonic()
        return self._compile(tokenizer)

    def _compile(self, tokenizer: Any) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(tokenizer, self.text, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first one is the slowest, and may be one too many
        return matcher


class Grammars:
    """The compiled grammars of one tokenizer. For one thread, the engine's.

    Args:
        tokenizer: an `LLTokenizer`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(
            THREADS, thread_name_prefix="grammar", initializer=_give_way
        )
        self._kept = OrderedDict[str, Compilation]()  # those used last at the end

    def borrow(self, text: str) -> Compilation:
        """Return a grammar that is compiled or will be; `give_back` ends its use."""
        found = self._kept.pop(text, None)
        if found is None:
            found = Compilation(text)
            found.future = self._threads.submit(found.run, self._tokenizer)
        self._kept[text] = found
        found.users += 1
        self._forget_some()
        return found

    def give_back(self, one: Compilation) -> None:
        """End a use; what nobody waits for any more is not compiled."""
        one.users -= 1
        if not one.users and one.future.cancel() and self._kept.get(one.text) is one:
            del self._kept[one.text]
        self._forget_some()

    def _forget_some(self) -> None:
        """Drop what was not used for longest, until the rest is within the bounds."""
        characters = sum(map(len, self._kept))
        for text in [text for text, one in self._kept.items() if not one.users]:
            if len(self._kept) <= MOST_KEPT and characters <= MOST_CHARACTERS:
                return
            del self._kept[text]
            characters -= len(text)


def _give_way() -> None:
    if sys.platform == "linux":  # where a thread has a niceness of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
