"""What parsers share whose calls stand between tags: the loop over states, the ways in and out."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator

from worker.tools.parser import Found, ToolParser
from worker.tools.text import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HELD_MOST = 8192
"""Characters of a call of which nothing can be shown yet; longer, it is no call but text."""

_BLANK = re.compile(r"\s*")


class TaggedParser(ToolParser):
    """Reads state by state; between calls, and behind the last, blanks are not shown."""

    opening = OPEN

    _state: str = "text"
    _after_call = False

    def read(self, text: str, *, final: bool) -> Iterator[Found]:
        """Yield what is known of the text: see `ToolParser.read`."""
        at = 0
        while at < len(text):
            found = self._next(text[at:], final=final)
            if found is None:
                return
            if found.size:
                yield found
            at += found.size

    @abstractmethod
    def _next(self, text: str, *, final: bool) -> Found | None:
        """Take what the text begins with, by the state; None where that is not known yet.

        What has no size is a change of the state.
        """

    @abstractmethod
    def _call(self, text: str, *, final: bool) -> Found | None:
        """Look at what begins with the opening tag."""

    def _text(self, text: str, *, final: bool) -> Found | None:
        """Take text up to the next opening tag, or to what may become one."""
        if self._after_call:
            if found := blank(text):
                return found
            self._after_call = False
        at = text.find(OPEN)
        if at == 0:
            return self._call(text, final=final)
        if at > 0:
            return Found("text", at)
        held = 0 if final else overlap(text, OPEN)
        return Found("text", len(text) - held) if held < len(text) else None

    def _tail(self, text: str, *, final: bool) -> Found | None:
        """Take what ends a call; anything else that comes instead is text."""
        if found := blank(text):
            return found
        if text.startswith(CLOSE):
            self._state, self._after_call = "text", True
            return Found("end", len(CLOSE))
        if not final and CLOSE.startswith(text):
            return None
        self._state = "text"
        return Found("text", 0)


def blank(text: str) -> Found | None:
    """Return the blanks that a text begins with."""
    match = _BLANK.match(text)
    return Found("markup", match.end()) if match and match.end() else None
