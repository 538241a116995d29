"""Qwen3-Coder's and Qwen3.5's way: `<function=name>` with a `<parameter=key>` for each argument."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from worker.tools.arguments import Arguments
from worker.tools.parser import Found
from worker.tools.tagged import CLOSE, HELD_MOST, OPEN, TaggedParser
from worker.tools.text import overlap
from worker.tools.value_end import TAG as END_PARAMETER
from worker.tools.value_end import ValueEnd
from worker.tools.xml_grammar import SPACE, call_body, within_bounds

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER = "<parameter="

_NAME = r"([^<>\n]{1,256})>"
_HEAD = re.compile(
    rf"{OPEN}\s*{FUNCTION}{_NAME}\s*(?=({PARAMETER}[^<>\n]{{1,256}}>|{END_FUNCTION}))"
)
_MAYBE_HEAD = re.compile(r"\s*(<function=[^<>\n]{1,256}>\s*(<parameter=[^<>\n]{0,256})?)?")
_KEY = re.compile(PARAMETER + _NAME)
_MAYBE_KEY = re.compile(PARAMETER + r"[^<>\n]{0,256}")


class QwenXmlToolParser(TaggedParser):
    """The arguments become a JSON object: a parameter's text is taken as its schema has it.

    Text for a parameter that is a string is shown letter by letter; any other value once all of it
    is there. What stands in the tags of a call and is no parameter is dropped, as is a parameter
    that comes twice; a call that has no function stays text, tags and all.
    """

    def __init__(self, functions: Sequence[tuple[str, str]] = ()) -> None:
        self._functions = dict(functions)
        self._arguments = Arguments("")
        self._keys = set[str]()
        self._key = ""
        self._value_end = ValueEnd()
        self._at_start = False  # of a value: one newline is not part of it

    @staticmethod
    def speaks(template: str) -> bool:
        """Tell whether a template has these tags."""
        return all(tag in template for tag in (OPEN, FUNCTION, PARAMETER))

    @staticmethod
    def grammar(
        functions: Sequence[tuple[str, str]], quote: Callable[[str], str], *, parallel: bool
    ) -> str:
        """Return the rules for one call or more of these functions.

        Raises:
            UnbrokenError: `invalid_value`, where a schema says what these tags cannot.
        """
        more = '("\\n" call)*' if parallel else ""
        rules = [
            f"calls: call {more}",
            "call: " + " | ".join(f"call_{n}" for n in range(len(functions))),
        ]
        size = 0
        for n, (name, schema) in enumerate(functions):
            body = call_body(f"call_{n}", schema)
            size = within_bounds(body.rules, size)
            head, tail = quote(f"\n{FUNCTION}{name}>\n"), quote(f"{END_FUNCTION}\n")
            rules.append(f"call_{n}: {quote(OPEN)} {head} {body.rule} {tail} {quote(CLOSE)}")
            rules += body.rules
        return "\n".join(rules)

    @staticmethod
    def opened(name: str) -> str:
        """Return what a call of a function begins with: see `ToolParser.opened`."""
        return f"{OPEN}\n{FUNCTION}{name}>\n"

    @staticmethod
    def call_grammar(
        functions: Sequence[tuple[str, str]], strict: Sequence[str], quote: Callable[[str], str]
    ) -> str:
        """Return the grammar behind `<tool_call>`.

        Raises:
            UnbrokenError: `invalid_value`, where a schema says what these tags cannot.
        """
        free = [re.escape(name) for name, _ in functions if name not in strict]
        options = [f"call_{n}" for n, (name, _) in enumerate(functions) if name in strict]
        rules = [
            f"start: HEAD ({' | '.join([*options, *(['FREE'] if free else [])])})",
            f"HEAD: /{SPACE}{FUNCTION}/",
            f"TAIL: /{SPACE}{END_FUNCTION.replace('/', chr(92) + '/')}{SPACE}/",
        ]
        if free:
            rules.append(f"FREE: /({'|'.join(free)})>(.|\\n)*/")
        size = 0
        for n, (name, schema) in enumerate(functions):
            if name in strict:
                body = call_body(f"call_{n}", schema)
                size = within_bounds(body.rules, size)
                rules.append(f"NAME_{n}: /{re.escape(name)}>{SPACE}/")
                rules.append(f"call_{n}: NAME_{n} {body.rule} TAIL {quote(CLOSE)}")
                rules += body.rules
        return "\n".join(rules)

    def _next(self, text: str, *, final: bool) -> Found | None:
        readers = {
            "text": self._text,
            "body": self._body,
            "string": self._string,
            "value": self._value,
            "twice": self._twice,
            "tail": self._tail,
        }
        return readers[self._state](text, final=final)

    def _call(self, text: str, *, final: bool) -> Found | None:
        head = _HEAD.match(text)
        if head:
            self._state, self._keys = "body", set()
            self._arguments = Arguments(self._functions.get(head.group(1), ""))
            ahead = len(head.group(2))
            return Found("call", head.end(), head.group(1), ahead=ahead)
        if not final and len(text) < HELD_MOST and _may_be_head(text[len(OPEN) :]):
            return None
        return Found("text", len(OPEN))

    def _body(self, text: str, *, final: bool) -> Found | None:
        """Take a parameter's tag, or the one that ends the call."""
        if key := _KEY.match(text):
            return self._open(key)
        if text.startswith(END_FUNCTION):
            self._state = "tail"
            return Found("arguments", len(END_FUNCTION), arguments=self._closing())
        if text.startswith(CLOSE):
            self._state, self._after_call = "text", True
            return Found("end", len(CLOSE), arguments=self._closing())
        open_tag = (END_FUNCTION.startswith(text), CLOSE.startswith(text), _may_be_key(text))
        if not final and any(open_tag):
            return None
        other = text.find("<", 1)
        return Found("markup", other if other > 0 else len(text))

    def _closing(self) -> str:
        return "}" if self._keys else "{}"

    def _open(self, tag: re.Match[str]) -> Found:
        self._key, self._at_start, self._value_end = tag.group(1), True, ValueEnd()
        if self._key in self._keys:
            self._state = "twice"
            return Found("markup", tag.end())
        shown = f"{', ' if self._keys else '{'}{json.dumps(self._key, ensure_ascii=False)}: "
        self._keys.add(self._key)
        self._state = "string" if self._arguments.streams(self._key) else "value"
        shown += '"' if self._state == "string" else ""
        return Found("arguments", tag.end(), arguments=shown)

    def _string(self, text: str, *, final: bool) -> Found | None:
        """Take a value that is shown as a JSON string while it comes."""
        if self._at_start:
            self._at_start = False
            if text[0] == "\n":
                return Found("markup", 1)
        end = text.find(END_PARAMETER)
        size = end
        if end < 0:
            held = max(overlap(text, "\n" + END_PARAMETER), overlap(text, END_PARAMETER))
            size = len(text) - (0 if final else held)
        elif text[:end].endswith("\n"):
            size -= 1
        if size:
            shown = json.dumps(text[:size], ensure_ascii=False)[1:-1]
            return Found("arguments", size, arguments=shown)
        if end < 0:
            return None
        self._state = "body"
        return Found("arguments", end + len(END_PARAMETER), arguments='"')

    def _value(self, text: str, *, final: bool) -> Found | None:
        """Take a value of another kind, all at once."""
        end = self._value_end.find(text, final=final)
        if end < 0:
            return Found("arguments", len(text), arguments=text.lstrip()) if final else None
        self._state = "body"
        shown = self._arguments.json_of(self._key, text[:end])
        return Found("arguments", end + len(END_PARAMETER), arguments=shown)

    def _twice(self, text: str, *, final: bool) -> Found | None:
        end = text.find(END_PARAMETER)
        if end >= 0:
            self._state = "body"
            return Found("markup", end + len(END_PARAMETER))
        held = 0 if final else overlap(text, END_PARAMETER)
        return Found("markup", len(text) - held) if held < len(text) else None


def _may_be_head(text: str) -> bool:
    """Tell whether what stands behind the opening tag may yet become the rest of a head."""
    match = _MAYBE_HEAD.match(text)
    rest = text[match.end() :] if match else text
    if not rest:
        return True
    if match and match.group(2):
        return False
    tags = (PARAMETER, END_FUNCTION) if match and match.group(1) else (FUNCTION,)
    return any(tag.startswith(rest) for tag in tags) or _may_be_name(rest, FUNCTION)


def _may_be_key(text: str) -> bool:
    return PARAMETER.startswith(text) or _may_be_name(text, PARAMETER)


def _may_be_name(text: str, tag: str) -> bool:
    """Tell whether a text is a tag with a name in it that is not complete."""
    name = text[len(tag) :]
    return text.startswith(tag) and len(name) <= 256 and not re.search(r"[<>\n]", name)
