"""One step after the other: admit and prefill, decode all, sample, stop, say what came of it.

A sequence's own failure (bad tensors, numbers that are not finite) ends that sequence alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.errors import UnbrokenError
from shared.protocol import CancelReason
from worker.engine.detokenizer import Detokenizer
from worker.engine.loader import LoadedModel, LoadError
from worker.engine.messages import Abort, Add, Cancel, Command, Output, Piece
from worker.engine.model_runner import ModelRunner, UnsupportedModelError
from worker.engine.sampler import BAD_ROW, Sampler
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence
from worker.engine.stopping import build_stopping, finish_reason

log = logging.getLogger("unbroken.engine")

FAILED = "generation_failed"
NO_MEMORY = "There is not enough memory to go on with this sequence."
PREFILL_FAILED = "The model could not process the prompt."
STEP_FAILED = "The next token could not be drawn: the model's numbers are not finite."
TEXT_FAILED = "The next token could not be turned into text."


@dataclass(frozen=True)
class Fresh:
    """A sequence admitted in this step, with the logits `[1, V]` of its next token."""

    sequence: Sequence
    logits: Tensor


class Engine:
    """The running batch of one model.

    Args:
        loaded: model and tokenizer.
        max_batch_size: most sequences that run at once.

    Raises:
        LoadError: the model cannot be batched.
    """

    def __init__(self, loaded: LoadedModel, max_batch_size: int) -> None:
        self.loaded = loaded
        try:
            self.runner = ModelRunner(loaded.model, max_batch_size, loaded.context_length)
            self.runner.verify()
        except UnsupportedModelError as error:
            log.exception("the model cannot be batched")
            raise LoadError(f"'{loaded.name}' cannot be served: {error}.") from error
        self.sampler = Sampler(self.runner.vocab_size, self.runner.device)
        self.scheduler = Scheduler(max_batch_size)
        self.cancelled: dict[int, CancelReason] = {}
        self._outputs: list[Output] = []
        self._batch = 0

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return self.scheduler.idle and not self._outputs

    def handle(self, command: Command) -> None:
        """Take a command in; what it has to say comes with the next step.

        `Stop` is the process's business, and ignored here.
        """
        if isinstance(command, Add):
            self._add(command)
        elif isinstance(command, Cancel):
            self._cancel(command)
        elif isinstance(command, Abort):
            sequence = self.scheduler.find(command.handle)
            if sequence is not None:
                self._remove(sequence)

    def step(self) -> tuple[Output, ...]:
        """Prefill at most one waiting sequence and decode the others; return what there is to say.

        Each running sequence gets one token.

        Raises:
            RuntimeError: the decode step failed; the engine is not to be used any more.
        """
        fresh = self._admit()
        rows, logits = self._decode(fresh)
        if logits is not None:
            tokens = self._sample(logits, rows)
            views = torch.tensor(tokens)[:, None].split(1)  # what criteria take: [1, L]
            ended = [
                sequence
                for sequence, token, view in zip(rows, tokens, views, strict=True)
                if self._advance(sequence, token, view)
            ]
            # From the last row down: a row that ends too is not moved first.
            for sequence in sorted(ended, key=lambda s: s.slot, reverse=True):
                self._remove(sequence)
        self._batch = len(rows)
        outputs, self._outputs = tuple(self._outputs), []
        return outputs

    def load(self) -> tuple[int, float]:
        """Return how many sequences the last step ran, and the share of the cache in use."""
        used = sum(sequence.length for sequence in self.scheduler.running)
        return self._batch, used / (self.scheduler.max_batch_size * self.loaded.context_length)

    def _add(self, add: Add) -> None:
        context = self.loaded.context_length
        sequence = Sequence(
            add.handle, add.prompt, add.sampling, self.loaded.eos_ids, context, add.generated
        )
        if len(sequence.prompt_ids) >= context:
            message = (
                f"This model's maximum context length is {context} tokens, "
                f"but the prompt has {len(sequence.prompt_ids)}."
            )
            self._fail(sequence, "context_length_exceeded", message)
            return
        try:
            self.sampler.check(sequence.sampling)
            done = self._prepare(sequence)
        except UnbrokenError as error:
            self._fail(sequence, error.code, error.message)
            return
        except Exception:
            log.exception("a sequence could not be set up")
            self._fail(sequence, FAILED, PREFILL_FAILED)
            return
        if done:  # its worker died between the last token and the end
            self._finish(sequence, ())
        else:
            self.scheduler.add(sequence)

    def _prepare(self, sequence: Sequence) -> bool:
        """Give a sequence its criteria and detokenizer; return whether it has ended already."""
        ids = (*sequence.prompt_ids, *sequence.output_ids)
        if not ids or min(ids) < 0 or max(ids) >= self.runner.vocab_size:
            raise ValueError("token ids outside the vocabulary")
        sequence.stopping = build_stopping(sequence, self.cancelled)
        sampling = sequence.sampling
        sequence.detokenizer = Detokenizer(
            self.loaded.tokenizer,
            sampling.stop,
            sequence.prompt.thinking,
            sampling.min_tokens,
            sampling.stop_token_ids,
        )
        if not sequence.output_ids:
            return False
        sequence.detokenizer.replay(sequence.output_ids)
        return bool(sequence.stopping(torch.tensor([[sequence.last_token]]), None))

    def _cancel(self, cancel: Cancel) -> None:
        sequence = self.scheduler.find(cancel.handle)
        if sequence is None:
            return  # it has ended, and said so
        self.cancelled[cancel.handle] = cancel.reason
        if sequence.slot < 0:
            self._finish(sequence, ())
            self._remove(sequence)

    def _admit(self) -> Fresh | None:
        """Prefill the next waiting sequence, if there is room."""
        sequence = self.scheduler.admit()
        if sequence is None:
            return None
        try:
            return Fresh(sequence, self.runner.prefill(sequence)[None])
        except torch.AcceleratorError:
            raise  # the device is lost, not the sequence
        except (MemoryError, torch.OutOfMemoryError):
            self._fail(sequence, FAILED, NO_MEMORY)
        except Exception:
            log.exception("prefill failed")
            self._fail(sequence, FAILED, PREFILL_FAILED)
        self._remove(sequence)
        return None

    def _decode(self, fresh: Fresh | None) -> tuple[list[Sequence], Tensor | None]:
        """Compute every running sequence's next logits; return rows and logits `[B, V]`.

        A sequence that cannot go on is failed and left out. The fresh one, which sits in the last
        row, has its logits already.
        """
        rows = list(self.scheduler.running)
        old = rows[:-1] if fresh else rows
        parts = [self.runner.decode(old)] if old and self._reserve(old) else []
        if old and not parts:
            rows = []  # somebody's memory was given back; the others go on in the next step
            old = []
        if fresh:
            parts.append(fresh.logits)
            rows = [*old, fresh.sequence]
        return rows, torch.cat(parts) if parts else None

    def _reserve(self, rows: Rows[Sequence]) -> bool:
        """Make room for a step; where there is none, fail the longest sequence and return False."""
        try:
            self.runner.reserve(rows)
        except torch.AcceleratorError:
            raise
        except (MemoryError, RuntimeError):
            longest = max(rows, key=lambda s: s.length)
            self._fail(longest, FAILED, NO_MEMORY)
            self._remove(longest)
            return False
        return True

    def _sample(self, logits: Tensor, rows: list[Sequence]) -> list[int]:
        """Draw a token per row; `BAD_ROW` where that is not possible."""
        try:
            return self.sampler.sample(logits, rows)
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("sampling failed; trying row by row")
        tokens = []
        for index, sequence in enumerate(rows):
            try:
                tokens += self.sampler.sample(logits[index : index + 1], [sequence])
            except Exception:
                log.exception("sampling failed for a row")
                tokens.append(BAD_ROW)
        return tokens

    def _advance(self, sequence: Sequence, token: int, view: Tensor) -> bool:
        """Add a token to a sequence and say what it released; return whether that was its last."""
        if token == BAD_ROW:
            self.runner.scrub(sequence.slot)
            self._fail(sequence, FAILED, STEP_FAILED)
            return True
        try:
            sequence.output_ids.append(token)
            pieces = tuple(sequence.detokenizer.push(token))
            if bool(sequence.stopping(view, None)):
                self._finish(sequence, pieces)
                return True
        except Exception:
            log.exception("a token could not be taken in")
            self._fail(sequence, FAILED, TEXT_FAILED)
            return True
        if pieces:
            self._say(sequence, pieces)
        return False

    def _finish(self, sequence: Sequence, pieces: tuple[Piece, ...]) -> None:
        """Say a sequence's last words: these pieces, and what its detokenizer held back."""
        reason, cancelled = finish_reason(sequence, self.cancelled)
        self._outputs.append(
            Output(
                sequence.handle,
                (*pieces, *sequence.detokenizer.finish()),
                finish=reason,
                cancelled=cancelled,
                completion_tokens=len(sequence.output_ids),
                reasoning_tokens=sequence.detokenizer.reasoning_tokens,
            )
        )

    def _say(self, sequence: Sequence, pieces: tuple[Piece, ...]) -> None:
        self._outputs.append(
            Output(
                sequence.handle,
                pieces,
                completion_tokens=len(sequence.output_ids),
                reasoning_tokens=sequence.detokenizer.reasoning_tokens,
            )
        )

    def _fail(self, sequence: Sequence, code: str, message: str) -> None:
        self._outputs.append(
            Output(
                sequence.handle,
                completion_tokens=len(sequence.output_ids),
                error=(code, message),
            )
        )

    def _remove(self, sequence: Sequence) -> None:
        """Take a sequence out of queue or batch, and close the gap its row leaves."""
        moved = self.scheduler.remove(sequence)
        if moved is not None:
            self.runner.move(len(self.scheduler.running), moved)
        self.cancelled.pop(sequence.handle, None)
