"""Finds patterns whose automaton grows without bound: they fail in the middle of an answer.

Compiling such a pattern is quick: its states are made when an answer comes to them.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

STEPS = 24
"""Tokens that are written on trial: those of a harmless pattern make few states then."""

MOST_PATTERNS = 64
"""Of a form, all of which are tried: some 0.02 s each."""

WORDS, LONGEST = 6000, 12
END = 256  # the token that ends a sequence


class _Words:
    """A vocabulary like a model's: bytes, and words of letters, digits and blanks."""

    eos_token_id, bos_token_id, special_token_ids = END, None, (END,)

    def __init__(self) -> None:
        draw = random.Random(0)  # the same on each trial
        letters = string.ascii_lowercase * 3 + string.ascii_letters + string.digits + "   -_.@/"
        words = {"".join(draw.choices(letters, k=draw.randint(2, LONGEST))) for _ in range(WORDS)}
        many = [word.encode() for word in sorted(words)]
        self.tokens = [*(bytes([n]) for n in range(256)), b"<end>", *many]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def vocabulary() -> LLTokenizer:
    """Return the tokenizer to write with on trial."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Words()))


def patterns(schemas: Iterable[str]) -> Iterator[str]:
    """Yield the JSON Schemas of the strings that have to fit patterns, each once; one too many."""
    seen, level = set[str](), [json.loads(text) for text in schemas if '"pattern' in text]
    while level and len(seen) <= MOST_PATTERNS:
        node = level.pop()
        below = list(node.values()) if isinstance(node, dict) else node
        level += [one for one in below if isinstance(one, (dict, list))]
        for part in _parts(node):
            text = json.dumps(part)
            if text not in seen:
                seen.add(text)
                yield text


def write(matcher: LLMatcher) -> bool:
    """Write a string of random tokens; returns whether the matcher has borne it."""
    draw = random.Random(0)  # the same on each trial
    for _ in range(STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        bits = matcher.compute_bitmask()
        if matcher.is_error():
            break
        allowed = [8 * n + bit for n, byte in enumerate(bits) if byte for bit in _set(byte)]
        words = [token for token in allowed if token > END]
        if allowed:
            matcher.consume_tokens([draw.choice(words or allowed)])
    return not matcher.is_error()


def _set(byte: int) -> Iterator[int]:
    return (bit for bit in range(8) if byte >> bit & 1)


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """Yield what a subschema itself says of strings."""
    if not isinstance(node, dict):
        return
    if isinstance(node.get("pattern"), str):
        fields = ("pattern", "minLength", "maxLength", "format")
        yield {"type": "string", **{name: node[name] for name in fields if name in node}}
    names = node.get("patternProperties")
    for name in names if isinstance(names, dict) else ():
        yield {"type": "string", "pattern": name}
    whole = node.get("allOf")
    if isinstance(whole, list) and sum('"pattern"' in json.dumps(part) for part in whole) > 1:
        strings = [part for part in whole if isinstance(part, dict) and "pattern" in part]
        yield {"type": "string", "allOf": strings}
