"""What an answer has to look like, as a grammar of llguidance; and whether that can be compiled.

Compiling is tried in a child process (`create`): a schema can make it take for ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from shared.errors import UnbrokenError
from worker import pattern_trial
from worker.engine.messages import AnswerForm
from worker.tools import PARSERS

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_ITEMS, MOST_ITEMS_AHEAD = 8_000, 2_000_000
"""What a matcher may follow at one place of an answer, and in all that one mask looks ahead at. It
takes some four for each branch that a schema leaves open, which the gateway bounds."""

MOST_FUEL = 5_000_000
"""What the matcher's lexer may spend for one mask: 0.4 s, where the answer's patterns are hard."""

MOST_STATES, MOST_STATES_ON_TRIAL = 250_000, 15_000
"""States of the lexer, a kilobyte each; and those that a pattern may make while it is tried, where
there are few: all together have no more than the lexer. Usual patterns make some hundreds."""

AFTER_THOUGHT = r"/\n{0,2}/"
"""What stands between `</think>` and the answer; it is not shown."""


def matcher(text: str, tokenizer: LLTokenizer, states: int = MOST_STATES) -> LLMatcher:
    """Compile a grammar; returns its matcher, which may be one that has given up already.

    On trial and in earnest its bounds are the same, but for the `states`. They are wider than the
    library's own, which a vocabulary of 150,000 tokens can exceed where one of bytes does not: in
    the middle of an answer a slow mask is better than none.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_items_in_row=MOST_ITEMS,
        step_max_items=MOST_ITEMS_AHEAD,
        step_lexer_fuel=MOST_FUEL,
        max_lexer_states=states,
        verbose_errors=False,
    )
    return LLMatcher(tokenizer, text, log_level=0, limits=limits)


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
    """Return what answers may begin with, up to where each schema of the form has been met.

    Of a `lazy` form it is what follows the tag. Only those that the form allows count.
    """
    texts = ["{"] if form.schema else []
    if form.tools:
        parser = PARSERS[form.tools]
        skipped = len(parser.opening) if form.lazy else 0
        names = form.strict if form.lazy else [name for name, _ in form.functions]
        texts += [parser.opened(name)[skipped:] for name in names]
    return texts


def create() -> Callable[[AnswerForm], None]:
    """Return what checks a form's grammar, in a child process.

    The check raises `UnbrokenError` (`invalid_value`), with the compiler's reason.
    """
    from llguidance import LLTokenizer

    tokenizer, words = LLTokenizer("byte"), pattern_trial.vocabulary()

    def check(form: AnswerForm) -> None:
        param = "response_format" if form.schema else "tools"
        start = matcher(build(form), tokenizer)
        for opening in ("", *openings(form)):
            there = _behind(start, tokenizer.tokenize_str(opening))
            if there.is_error():
                raise UnbrokenError(
                    "invalid_value", f"'{param}' cannot be followed: {_reason(there)}", param
                )
        functions = [f for f in form.functions if not form.lazy or f[0] in form.strict]
        parts = list(pattern_trial.patterns((form.schema, *(schema for _, schema in functions))))
        if len(parts) > pattern_trial.MOST_PATTERNS:
            message = f"'{param}' has more than {pattern_trial.MOST_PATTERNS} different patterns."
            raise UnbrokenError("invalid_value", message, param)
        states = min(MOST_STATES_ON_TRIAL, MOST_STATES // max(1, len(parts)))
        for part in parts:
            there = matcher(f"start: json\njson: %json {part}", words, states)
            if not there.is_error() and not pattern_trial.write(there):
                raise UnbrokenError(
                    "invalid_value", f"'{param}' has a pattern that is too complex.", param
                )

    return check


def _behind(start: LLMatcher, tokens: list[int]) -> LLMatcher:
    """Return a matcher that has computed what comes behind these tokens, if they may come."""
    there = start.deep_copy()
    if not there.is_error() and there.validate_tokens(tokens) == len(tokens):
        there.consume_tokens(tokens)
        if not there.is_error():
            there.compute_bitmask()
    return there


def _reason(there: LLMatcher) -> str:
    """Return the compiler's message without where in the grammar that is."""
    message = str(there.get_error()).splitlines()[0]
    return message.rpartition("failed to compile JSON schema: ")[2][:300]
