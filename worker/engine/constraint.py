"""Which tokens a sequence may have next: those of its grammar, or the end of a thought.

All of it follows from the sequence's tokens, so a successor comes to the same.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from worker import grammar
from worker.engine.detokenizer import CLOSE

if TYPE_CHECKING:
    from worker.engine.loader import LoadedModel
    from worker.engine.sequence import Sequence

log = logging.getLogger("unbroken.engine.constraint")


class Tokens:
    """What constraints need of a model's tokenizer; made once, since it takes up to a second.

    Args:
        loaded: the model and its tokenizer.
        vocab_size: the width of its logits.

    Attributes:
        close_ids: the tokens that end a thought.
        eos_ids: the tokens that end a sequence.
    """

    def __init__(self, loaded: LoadedModel, vocab_size: int) -> None:
        self.eos_ids = sorted(loaded.eos_ids)
        self.close_ids: list[int] = loaded.tokenizer.encode(CLOSE, add_special_tokens=False)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._tokenizer = self._make(loaded, vocab_size)
        self._past_end = self._tokens_past_end() if self._tokenizer else {}

    def compile(self, sequence: Sequence) -> Future[Any] | None:
        """Begin to compile a sequence's grammar, in another thread; None where it has none."""
        from llguidance import LLMatcher, LLParserLimits

        text = grammar.build(sequence.prompt.form, self._quote, thinking=sequence.prompt.thinking)
        if not text:
            return None
        if self._tokenizer is None:
            raise ValueError("there are no grammars for this tokenizer")
        limits = LLParserLimits(verbose_errors=False)
        return self._threads.submit(LLMatcher, self._tokenizer, text, log_level=0, limits=limits)

    def past_end(self, closing: int) -> list[int]:
        """Return the tokens that go on behind `</think>`, whose first letters are there already.

        What follows the tag in the same token would escape the grammar.
        """
        return self._past_end.get(closing, [])

    def _make(self, loaded: LoadedModel, vocab_size: int) -> Any:
        from llguidance import LLTokenizer

        backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
        if backend is None or not self.eos_ids:
            return None
        try:
            return LLTokenizer(
                backend.to_str(),
                n_vocab=max(vocab_size, len(loaded.tokenizer)),
                eos_token=self.eos_ids,
            )
        except Exception:
            log.warning("there are no grammars for this tokenizer", exc_info=True)
            return None

    def _tokens_past_end(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for token in range(self._tokenizer.vocab_size):
            text = self._tokenizer.decode_bytes([token])
            if b">" not in text[:-1]:
                continue
            for closing in range(len(CLOSE)):
                rest = CLOSE[closing:].encode()
                if len(text) > len(rest) and text.startswith(rest):
                    found.setdefault(closing, []).append(token)
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

    Args:
        sequence: has its detokenizer, which has to see each token before this does.
        tokens: of the model.

    Attributes:
        forced: the only token that may come now, because the thought has to end; else None.
        failed: whether the grammar's matcher has given up.
    """

    def __init__(self, sequence: Sequence, tokens: Tokens) -> None:
        self._sequence, self._tokens = sequence, tokens
        self._budget = sequence.sampling.thinking_budget
        self._compiling = tokens.compile(sequence)
        self._forced_count = 0  # tokens of the thought's end that were forced
        self._answering = not sequence.prompt.thinking
        self._behind: list[int] = []  # of the answer, and not yet read by the matcher
        self.failed = False
        self.forced = self._end_of_thought()

    @property
    def limits(self) -> bool:
        """Whether it may ever say no."""
        return self._compiling is not None or self._budget is not None

    @property
    def done(self) -> bool:
        """Whether the answer is complete, so that nothing can follow."""
        if not self.has_mask:
            return False
        stopped = bool(self.matcher().is_stopped())
        return stopped and not self.failed  # one that has given up is "stopped" as well

    @property
    def has_mask(self) -> bool:
        """Whether the grammar says what may come."""
        return self._compiling is not None and self._answering

    @property
    def refused(self) -> list[int]:
        """The tokens that may not come inside a thought before an answer with a grammar."""
        if self._compiling is None or self._answering:
            return []
        closing = self._sequence.detokenizer.closing
        return [*self._tokens.eos_ids, *self._tokens.past_end(closing)]

    def matcher(self) -> Any:
        """Return the grammar's matcher, where the sequence stands; waits for the compiler."""
        assert self._compiling is not None  # noqa: S101 - asked for only where there is a grammar
        matcher = self._compiling.result()
        if self._behind:
            behind, self._behind = self._behind, []
            matcher.consume_tokens(behind)
        self.failed = self.failed or matcher.is_error()
        return matcher

    def push(self, token: int) -> None:
        """Take in the token that came, after the detokenizer has."""
        if self.forced is not None:
            self._forced_count += 1
        if self.has_mask:
            self._behind.append(token)
        if not self._answering:
            self._answering = self._sequence.detokenizer.answering
        self.forced = self._end_of_thought()

    def _end_of_thought(self) -> int | None:
        thought = self._sequence.detokenizer
        if self._budget is None or not thought.thinking:
            return None
        if thought.reasoning_tokens - self._forced_count < self._budget:
            return None
        return self._tokens.close_ids[self._forced_count % len(self._tokens.close_ids)]
