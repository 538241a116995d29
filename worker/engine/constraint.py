"""Which tokens a sequence may have next: those of its grammar, or the end of a thought.

All of it follows from the sequence's tokens, so a successor comes to the same.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from worker import grammar
from worker.engine.detokenizer import CLOSE
from worker.engine.grammars import Grammars
from worker.tools import PARSERS
from worker.tools.text import overlap

if TYPE_CHECKING:
    from worker.engine.grammars import Compilation
    from worker.engine.loader import LoadedModel
    from worker.engine.messages import AnswerForm
    from worker.engine.sequence import Sequence

NO_GRAMMAR = "'{}' cannot be followed by this model."
LATE_GRAMMAR = "'{}' could not be prepared in time."
KNOWN_TEXTS = 4
"""Grammars whose text is kept for the next sequence."""

log = logging.getLogger("unbroken.engine.constraint")


class Tokens:
    """What constraints need of a model's tokenizer; made once, since it takes up to a second.

    Args:
        loaded: the model and its tokenizer.
        vocab_size: the width of its logits.

    Attributes:
        close_ids: the tokens that end a thought.
        eos_ids: the tokens that end a sequence.
        grammars: compiled for this tokenizer; None where there are none.
        vocab_size: the width of the logits.
    """

    def __init__(self, loaded: LoadedModel, vocab_size: int) -> None:
        self.eos_ids, self.vocab_size = sorted(loaded.eos_ids), vocab_size
        self.close_ids: list[int] = loaded.tokenizer.encode(CLOSE, add_special_tokens=False)
        self._tokenizer = self._make(loaded, vocab_size)
        self.grammars = Grammars(self._tokenizer) if self._tokenizer else None
        self._build = lru_cache(KNOWN_TEXTS)(self._text)  # all choices of a prompt have the same
        self._past: dict[str, dict[int, list[int]]] = {}
        if self._tokenizer:
            for tag in (CLOSE, *(parser.opening for parser in PARSERS.values())):
                self.past(tag, 0)

    def grammar(self, sequence: Sequence) -> Compilation | None:
        """Return a sequence's grammar, to be given back to `grammars`; None where it has none.

        Raises:
            ValueError: there are no grammars for this tokenizer.
        """
        text = self._build(sequence.prompt.form, sequence.prompt.thinking)
        if not text:
            return None
        if self.grammars is None:
            raise ValueError("there are no grammars for this tokenizer")
        return self.grammars.borrow(text)

    def past(self, tag: str, size: int) -> list[int]:
        """Return the tokens that go on behind a tag, whose first `size` letters are there already.

        What follows the tag in the same token would escape the grammar.
        """
        if tag not in self._past:
            self._past[tag] = self._tokens_past(tag)
        return self._past[tag].get(size, [])

    def _text(self, form: AnswerForm, thinking: bool) -> str:  # noqa: FBT001  # a part of a key
        return grammar.build(form, self._quote, thinking=thinking)

    def _make(self, loaded: LoadedModel, vocab_size: int) -> Any:
        backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
        if backend is None or not self.eos_ids:
            return None
        from llguidance import LLTokenizer

        try:
            return LLTokenizer(
                backend.to_str(),
                n_vocab=max(vocab_size, len(loaded.tokenizer)),
                eos_token=self.eos_ids,
            )
        except Exception:
            log.warning("there are no grammars for this tokenizer", exc_info=True)
            return None

    def _tokens_past(self, tag: str) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for token in range(self._tokenizer.vocab_size):
            text = self._tokenizer.decode_bytes([token])
            if b">" not in text[:-1]:
                continue
            for size in range(len(tag)):
                rest = tag[size:].encode()
                whole = tag.encode() in text[:-1]
                if whole or (len(text) > len(rest) and text.startswith(rest)):
                    found.setdefault(size, []).append(token)
        return found

    def _quote(self, text: str) -> str:
        """Write a tag that is a token of its own as such, and any other text as a string."""
        tag = text.startswith("<") and text.endswith(">")
        token = self._tokenizer.tokenize_str(text, parse_special=True) if tag else []
        if len(token) == 1 and self._tokenizer.is_special_token(token[0]):
            return text
        return grammar.quoted(text)


class Constraint:
    """What one sequence may say.

    Its grammar is that of the whole answer, or (`AnswerForm.lazy`) of each call from its opening
    tag on; between those calls anything may come.

    Args:
        sequence: has its detokenizer, which has to see each token before this does.
        tokens: of the model.

    Attributes:
        forced: the only token that may come now, because the thought has to end; else None.
        matcher: that of the grammar, where the sequence stands; None where nothing is to match.
        failed: whether the grammar's matcher has given up.
        refusal: why the grammar could not be compiled: code, message, and field; else None.
    """

    def __init__(self, sequence: Sequence, tokens: Tokens) -> None:
        self._sequence, self._tokens = sequence, tokens
        self._budget = sequence.sampling.thinking_budget
        form = sequence.prompt.form
        self._tag = PARSERS[form.tools].opening if form.lazy else ""
        self._grammar = tokens.grammar(sequence)
        self._compiled: Any = None  # the grammar at its beginning, shared with others
        self.matcher: Any = None  # this sequence's own, where it has to match now
        self._behind: list[tuple[int, bool]] = []  # tokens before it was compiled: see `_read`
        self._forced_count = 0  # tokens of the thought's end that were forced
        self._answering = not sequence.prompt.thinking
        self.failed = self._done = False
        self.refusal: tuple[str, ...] | None = None
        self.forced = self._end_of_thought()

    @property
    def limits(self) -> bool:
        """Whether it may ever say no."""
        return self._grammar is not None or self._budget is not None

    @property
    def compiling(self) -> Compilation | None:
        """The grammar, while this waits for it."""
        return None if self._compiled or self.refusal else self._grammar

    @property
    def held(self) -> bool:
        """Whether nobody can say what comes next until the grammar is compiled."""
        if self.compiling is None or not self._answering:
            return False
        return bool(self._behind) if self._tag else True

    @property
    def done(self) -> bool:
        """Whether the answer is complete, so that nothing can follow."""
        return self._done

    @property
    def has_mask(self) -> bool:
        """Whether the grammar says what may come."""
        return self.matcher is not None and self._answering

    @property
    def barred(self) -> list[int]:
        """The tokens that may not come where there is no mask.

        Inside a thought before an answer with a grammar, and where a call may begin.
        """
        if self._grammar is None or self.has_mask:
            return []
        reader = self._sequence.detokenizer
        if self._tag:
            size = overlap(reader.unread, self._tag) if self._answering else 0
            return self._tokens.past(self._tag, size)
        return [*self._tokens.eos_ids, *self._tokens.past(CLOSE, reader.closing)]

    def adopt(self) -> None:
        """Take the grammar over, once its compilation has ended, and read what came meanwhile."""
        if self.compiling is None or not self.compiling.ended:
            return
        compilation = self.compiling
        self._compiled = compilation.matcher()
        if self._compiled is None:
            self.refusal = self._refuse(compilation)
            return
        if not self._tag:
            self.matcher = self._compiled.deep_copy()
        behind, self._behind = self._behind, []
        for token, opens in behind:
            self._read(token, opens=opens)
            if self._tag and self.failed:  # by a worker that did not mind
                self.matcher, self.failed = None, False

    def push(self, token: int) -> None:
        """Take in the token that came, after the detokenizer has."""
        if self.forced is not None:
            self._forced_count += 1
        if self._grammar is not None and self._answering:
            opens = bool(self._tag) and self._sequence.detokenizer.unread.endswith(self._tag)
            if self._compiled is not None:
                self._read(token, opens=opens)
            elif opens or self._behind or not self._tag:
                self._behind.append((token, opens))
        if not self._answering:
            self._answering = self._sequence.detokenizer.answering
        self.forced = self._end_of_thought()

    def close(self) -> None:
        """End the grammar's use."""
        if self._grammar is not None and self._tokens.grammars is not None:
            self._tokens.grammars.give_back(self._grammar)
            self._grammar = self.matcher = None

    def _read(self, token: int, *, opens: bool) -> None:
        """Let the matcher read a token of the answer; behind one that opens a call, begin one."""
        if self.matcher is not None:
            self.matcher.consume_tokens([token])
            self.failed = self.failed or self.matcher.is_error()
            if self.failed:
                return  # one that has given up is "stopped" as well
            if not self._tag:
                self._done = bool(self.matcher.is_stopped())
            elif self.matcher.is_accepting():
                self.matcher = None  # the call is complete, or one that may be anything
        elif opens:
            self.matcher = self._compiled.deep_copy()

    def _refuse(self, compilation: Compilation) -> tuple[str, ...]:
        """Tell the caller's fault from a lack of time or memory, which may be over soon."""
        param = "response_format" if self._sequence.prompt.form.schema else "tools"
        if compilation.wrong:
            return "invalid_value", NO_GRAMMAR.format(param), param
        return "unavailable", LATE_GRAMMAR.format(param)

    def _end_of_thought(self) -> int | None:
        thought = self._sequence.detokenizer
        if self._budget is None or not thought.thinking:
            return None
        if thought.reasoning_tokens - self._forced_count < self._budget:
            return None
        return self._tokens.close_ids[self._forced_count % len(self._tokens.close_ids)]
