"""What an answer has to look like, as a grammar of llguidance; and whether that can be compiled.

Compiling is tried in a child process (`create`): a schema can make it take for ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from shared.errors import UnbrokenError
from worker.engine.messages import AnswerForm
from worker.tools import PARSERS

if TYPE_CHECKING:
    from llguidance import LLMatcher

AFTER_THOUGHT = r"/\n{0,2}/"
"""What stands between `</think>` and the answer; it is not shown."""


def quoted(text: str) -> str:
    """Return the grammar's terminal for a text."""
    return json.dumps(text)


def build(form: AnswerForm, quote: Callable[[str], str] = quoted, *, thinking: bool = False) -> str:
    """Return the grammar in Lark; empty where anything is allowed.

    Args:
        form: what to match.
        quote: writes a terminal for a text, which may be a single token of the tokenizer.
        thinking: whether a thought goes before.

    That of a `lazy` form is for what follows the tag that opens a call.
    """
    if form.lazy:
        return PARSERS[form.tools].call_grammar(form.functions, form.strict, quote)
    options = ["json"] if form.schema else []
    rules = [f"json: %json {form.schema}"] if form.schema else []
    if form.functions and (form.required or form.schema):
        parser = PARSERS[form.tools]
        rules.append(parser.grammar(form.functions, quote, parallel=form.parallel))
        options = ["calls"] if form.required else [*options, "calls"]
        rules = rules[-1:] if form.required else rules
    if not options:
        return ""
    blank = AFTER_THOUGHT if thinking else ""
    return "\n".join([f"start: {blank} answer", f"answer: {' | '.join(options)}", *rules])


def openings(form: AnswerForm) -> list[str]:
    """Return what answers may begin with, up to where each object of the form has been opened.

    Of a `lazy` form it is what follows the tag. Only those that the form allows count.
    """
    texts = ["{"] if form.schema else []
    if form.tools:
        parser = PARSERS[form.tools]
        skipped = len(parser.opening) if form.lazy else 0
        names = form.strict if form.lazy else [name for name, _ in form.functions]
        texts += [parser.opened(name)[skipped:] + "{" for name in names]
    return texts


def create() -> Callable[[AnswerForm], None]:
    """Return what checks a form's grammar, in a child process.

    The check raises `UnbrokenError` (`invalid_value`), with the compiler's reason.
    """
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    limits = LLParserLimits(verbose_errors=False)
    tokenizer = LLTokenizer("byte")

    def check(form: AnswerForm) -> None:
        param = "response_format" if form.schema else "tools"
        start = LLMatcher(tokenizer, build(form), log_level=0, limits=limits)
        for opening in ("", *openings(form)):
            matcher = _behind(start, tokenizer.tokenize_str(opening))
            if matcher.is_error():
                raise UnbrokenError(
                    "invalid_value", f"'{param}' cannot be followed: {_reason(matcher)}", param
                )

    return check


def _behind(start: LLMatcher, tokens: list[int]) -> LLMatcher:
    """Return a matcher that has computed what comes behind these tokens, if they may come."""
    matcher = start.deep_copy()
    if not matcher.is_error() and matcher.validate_tokens(tokens) == len(tokens):
        matcher.consume_tokens(tokens)
        if not matcher.is_error():
            matcher.compute_bitmask()
    return matcher


def _reason(matcher: LLMatcher) -> str:
    """Return the compiler's message without where in the grammar that is."""
    message = str(matcher.get_error()).splitlines()[0]
    return message.rpartition("failed to compile JSON schema: ")[2][:300]
