"""Finds where a value ends that is written between tags, while its text grows."""

from __future__ import annotations

import re

TAG = "</parameter>"

_BLANK = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\<\x00-\x1f]*')  # in a string: what has no meaning of its own there
_SIMPLE = re.compile(r"[-+.0-9A-Za-z]+")  # a number, or one of JSON's words
_GOES_ON = re.compile(rf"{TAG}\s*(?:<parameter=|</function>|</tool_call>)")
_ESCAPED = frozenset('"\\/bfnrtu')


class ValueEnd:
    """Looks for the closing tag of one value; what it has looked at it does not look at again.

    A tag inside of a JSON string is part of the value, as long as the text can be the beginning of
    JSON. Once it cannot (there is a newline in a string, or one where no value can stand), the
    quotation marks mean nothing, and the value ends at the first tag that only they kept from it.
    """

    def __init__(self) -> None:
        self._at = 0  # all before it was looked at
        self._is_json: bool | None = None  # None: only blanks so far
        self._in_string = False
        self._takes_value = True  # and not what comes behind one
        self._depth = 0
        self._doubted = -1  # the first tag in the string that is open, or that has just ended

    def find(self, text: str, *, final: bool) -> int:
        """Return where the tag that ends the value begins; -1 where it has not come.

        Args:
            text: the value from its beginning on: what it was the last time, and more.
            final: whether no more will come.
        """
        while self._is_json is not False:
            before = self._at, self._in_string, self._is_json
            if self._in_string:
                self._inside(text)
            else:
                self._outside(text)
            if before == (self._at, self._in_string, self._is_json):
                return self._cut(text) if final else -1
        if self._doubted >= 0:
            return self._doubted
        end = text.find(TAG, self._at)
        if end < 0:
            self._at = max(self._at, len(text) - len(TAG) + 1)
        return end

    def _inside(self, text: str) -> None:
        """Take a step in a string."""
        self._at = at = _end(_PLAIN.match(text, self._at), self._at)
        letter = text[at : at + 1]
        if letter == '"':
            self._in_string, self._at = False, at + 1
        elif letter == "\\":
            if at + 1 < len(text):
                self._is_json = text[at + 1] in _ESCAPED
                self._at += 2 if self._is_json else 1
        elif letter == "<":
            if text.startswith(TAG, at) and self._doubted < 0:
                self._doubted = at
            if not _may_be_tag(text, at):
                self._at += 1
        elif letter:
            self._is_json = False

    def _outside(self, text: str) -> None:
        """Take a step between strings, or before the first of them."""
        self._at = at = _end(_BLANK.match(text, self._at), self._at)
        letter = text[at : at + 1]
        if not letter or _may_be_tag(text, at):
            return
        if text.startswith(TAG, at):
            self._is_json, self._doubted = False, -1
            return
        if self._is_json is None:
            self._is_json = letter in '{["'
        self._is_json = self._is_json and self._takes(text, letter)

    def _takes(self, text: str, letter: str) -> bool:
        """Take what begins here; returns whether it can stand here."""
        at, may_begin = self._at, self._takes_value
        self._at += 1
        if letter in ",:":
            self._takes_value, self._doubted = True, -1
            return self._depth > 0 and not may_begin
        if letter in "{[":
            self._depth += 1
            return may_begin
        self._takes_value = False
        if letter in "}]":
            self._depth, self._doubted = self._depth - 1, -1
            return self._depth >= 0
        if letter == '"':
            self._in_string = True
            return may_begin
        self._at = _end(_SIMPLE.match(text, at), at)
        return self._at > at and (may_begin or bool(_SIMPLE.match(text, at - 1, at)))

    def _cut(self, text: str) -> int:
        """Return where the value ends if the rest of the call stands in a string without an end."""
        goes_on = _GOES_ON.search(text, self._doubted) if self._doubted >= 0 else None
        return goes_on.start() if goes_on else -1


def _end(match: re.Match[str] | None, otherwise: int) -> int:
    return match.end() if match else otherwise


def _may_be_tag(text: str, at: int) -> bool:
    """Tell whether the text ends within what may become the tag."""
    return len(text) - at < len(TAG) and TAG.startswith(text[at:])
