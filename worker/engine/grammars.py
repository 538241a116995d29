"""Compiles grammars in threads beside the engine's, each text once, and keeps those used last."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from worker import grammar

THREADS, LONG_THREADS = 4, 2
"""How many short and long ones are compiled at once: heavy ones do not keep light ones waiting."""

LONG_CHARACTERS = 16_384
"""What is longer has those other threads: only such a text can be heavy for tens of seconds."""

NICENESS = 10
"""Of those threads: on a machine without idle cores the engine's step comes first."""

MOST_SECONDS = 30.0
"""What a compilation may take: the trial of the form has had 3 s, with a smaller vocabulary."""

MOST_WAITED = 60.0
"""Seconds from its request on: what is queued for longer holds a row's place for nothing."""

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
        self._asked = time.monotonic()
        self._began: float | None = None

    @property
    def ended(self) -> bool:
        """Whether there is a matcher, or it has taken too long."""
        return self.future.done() or self.overdue

    @property
    def overdue(self) -> bool:
        """Whether it is not compiled yet, after `MOST_SECONDS` of it or `MOST_WAITED` in all."""
        now, began = time.monotonic(), self._began
        late = began is not None and now - began > MOST_SECONDS
        return (late or now - self._asked > MOST_WAITED) and not self.future.done()

    @property
    def broken(self) -> bool:
        """Whether it ended without a verdict on the text: memory was short, or the like."""
        future = self.future
        return future.done() and (future.cancelled() or future.exception() is not None)

    @property
    def wrong(self) -> bool:
        """Whether the compiler has refused the text."""
        return self.future.done() and not self.broken and bool(self.future.result().is_error())

    def matcher(self) -> Any:
        """Return the matcher, to be copied; None where there is none, or not yet."""
        if not self.future.done() or self.broken or self.wrong:
            return None
        return self.future.result()

    def run(self, tokenizer: Any) -> Any:
        """Compile it; returns the matcher, which may be one that has given up already."""
        self._began = time.monotonic()
        return self._compile(tokenizer)

    def _compile(self, tokenizer: Any) -> Any:
        matcher = grammar.matcher(self.text, tokenizer)
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
        self._short, self._long = (
            ThreadPoolExecutor(count, thread_name_prefix="grammar", initializer=_give_way)
            for count in (THREADS, LONG_THREADS)
        )
        self._kept = OrderedDict[str, Compilation]()  # those used last at the end

    def borrow(self, text: str) -> Compilation:
        """Return a grammar that is compiled or will be; `give_back` ends its use."""
        found = self._kept.pop(text, None)
        if found is None or found.broken:
            found = Compilation(text)
            threads = self._long if len(text) > LONG_CHARACTERS else self._short
            found.future = threads.submit(found.run, self._tokenizer)
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
