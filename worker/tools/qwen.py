"""Qwen's and Hermes' way: `<tool_call>` around a JSON object with `name` and `arguments`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from worker.tools.parser import Found
from worker.tools.tagged import CLOSE, HELD_MOST, OPEN, TaggedParser

# What nearly every call begins with: its arguments can be shown from here on as they come.
_HEAD = re.compile(
    r'<tool_call>\s*\{\s*"name"\s*:\s*("(?:[^"\\\n]|\\.){1,256}")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_MAYBE_HEAD = re.compile(r'<tool_call>\s*(\{\s*("|$)|$)')
_SPACE = r"[ \n]{0,4}"  # in a grammar: what a model may write around the marks of JSON


class QwenToolParser(TaggedParser):
    """A call is shown from its name on, its arguments letter by letter as the model writes them.

    What stands in the tags and is no such object stays text, tags and all. Once the arguments have
    begun they are passed on even if they turn out to be no JSON: what was sent cannot be taken back
    (as with OpenAI's models, callers have to check them).
    """

    def __init__(self, functions: Sequence[tuple[str, str]] = ()) -> None:  # noqa: ARG002
        self._depth = 0
        self._in_string = self._escaped = False
        self._closed = False  # the brace that ends the object was there

    @staticmethod
    def speaks(template: str) -> bool:
        """Tell whether a template has these tags around JSON (Qwen3-Coder's have no JSON)."""
        return OPEN in template and "<function=" not in template

    @staticmethod
    def grammar(
        functions: Sequence[tuple[str, str]], quote: Callable[[str], str], *, parallel: bool
    ) -> str:
        """Return the rules for one call or more of these functions."""
        more = '("\\n" call)*' if parallel else ""
        rules = [
            f"calls: call {more}",
            "call: " + " | ".join(f"call_{n}" for n in range(len(functions))),
        ]
        for n, (name, schema) in enumerate(functions):
            head = quote(_head(name))
            tail = quote("}\n")
            rules.append(f"call_{n}: {quote(OPEN)} {head} %json {schema} {tail} {quote(CLOSE)}")
        return "\n".join(rules)

    @staticmethod
    def opened(name: str) -> str:
        """Return what a call of a function begins with: see `ToolParser.opened`."""
        return OPEN + _head(name) + "{"

    @staticmethod
    def call_grammar(
        functions: Sequence[tuple[str, str]], strict: Sequence[str], quote: Callable[[str], str]
    ) -> str:
        """Return the grammar behind `<tool_call>`: the name first, since the rest hangs on it."""
        free = [re.escape(name) for name, _ in functions if name not in strict]
        options = [f"call_{n}" for n, (name, _) in enumerate(functions) if name in strict]
        rules = [
            f"start: HEAD ({' | '.join([*options, *(['FREE'] if free else [])])})",
            f'HEAD: /{_SPACE}\\{{{_SPACE}"name"{_SPACE}:{_SPACE}"/',
            f"TAIL: /{_SPACE}\\}}{_SPACE}/",
        ]
        if free:
            rules.append(f'FREE: /({"|".join(free)})"(.|\\n)*/')
        for n, (name, schema) in enumerate(functions):
            if name in strict:
                key = f'{_SPACE},{_SPACE}"(arguments|parameters)"{_SPACE}:{_SPACE}'
                rules.append(f'NAME_{n}: /{re.escape(name)}"{key}/')
                rules.append(f"call_{n}: NAME_{n} %json {schema} TAIL {quote(CLOSE)}")
        return "\n".join(rules)

    def _next(self, text: str, *, final: bool) -> Found | None:
        if self._state == "arguments":
            return self._arguments(text)
        if self._state == "tail":
            return self._tail(text, final=final)
        return self._text(text, final=final)

    def _call(self, text: str, *, final: bool) -> Found | None:
        """Look at what begins with the opening tag."""
        head = _HEAD.match(text)
        name = _string(head.group(1)) if head else None
        if head and name:
            self._state = "arguments"
            return Found("call", head.end(), name, ahead=1)
        end = text.find(CLOSE, 0, HELD_MOST)
        if end >= 0:
            whole = _object(text[len(OPEN) : end])
            if whole:
                self._after_call = True
                return Found("call", end + len(CLOSE), *whole)
        elif not final and len(text) < HELD_MOST and _MAYBE_HEAD.match(text):
            return None
        return Found("text", len(OPEN))

    def _arguments(self, text: str) -> Found:
        """Take what belongs to the JSON object of the arguments."""
        for at, letter in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._state, self._closed = "tail", False
                    return Found("arguments", at + 1)
        return Found("arguments", len(text))

    def _tail(self, text: str, *, final: bool) -> Found | None:
        """Take the brace that closes the object as well."""
        if not self._closed and text[0] == "}":
            self._closed = True
            return Found("markup", 1)
        return super()._tail(text, final=final)


def _head(name: str) -> str:
    return f'\n{{"name": {json.dumps(name)}, "arguments": '


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) and _sendable(value) else None


def _object(text: str) -> tuple[str, str] | None:
    """Return name and arguments of a call that is written in some other order."""
    try:
        call: Any = json.loads(text, object_pairs_hook=_named_once)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, dict) or not _sendable(call["name"]):
            return None
        shown = json.dumps(arguments, ensure_ascii=False)
        # Half a character stays the escape sequence that it was.
        return call["name"], shown if _sendable(shown) else json.dumps(arguments)
    except (ValueError, RecursionError):
        return None


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of these pairs; of two names the first one chose the grammar."""
    if sum(key == "name" for key, _ in pairs) > 1:
        raise ValueError("two names")
    return dict(pairs)


def _sendable(text: str) -> bool:
    """Tell whether a text is all characters: JSON can spell half a one, UTF-8 cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
