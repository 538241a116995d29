"""One step after the other: admit and prefill, decode all, sample, stop, say what came of it.

A sequence's own failure (bad tensors, numbers that are not finite) ends that sequence alone; one
that there is no memory for waits, or leaves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from shared.errors import UnbrokenError
from shared.protocol import CancelReason, FinishReason
from worker.engine.ahead import Ahead
from worker.engine.constraint import Tokens
from worker.engine.decode import Decode
from worker.engine.drawing import Drawer
from worker.engine.holding import Holding
from worker.engine.loader import LoadedModel
from worker.engine.logprobs import attach
from worker.engine.memory import lacks_memory
from worker.engine.messages import LIMITS, Abort, Add, Cancel, Command, Limits, Output, Piece
from worker.engine.outfit import FAILED, LOG_FAILED, NO_MEMORY, prepare
from worker.engine.prefill import Fresh, Prefill
from worker.engine.prefix_cache import PrefixCache
from worker.engine.runner_setup import build_runner
from worker.engine.sampler import BAD_ROW
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence
from worker.engine.shortage import Shortage
from worker.engine.stopping import finish_reason

log = logging.getLogger("unbroken.engine")

DECODE_FAILED = "The model could not compute the next token."
PREFILL_FAILED = "The model could not process the prompt."
STEP_FAILED = "The next token could not be drawn: the model's numbers are not finite."
GRAMMAR_FAILED = "The answer's format has become too complex to be followed."
TEXT_FAILED = "The next token could not be turned into text."


class Engine:
    """The running batch of one model.

    Args:
        loaded: model and tokenizer.
        max_batch_size: most sequences that run at once.
        on_busy: is told the handles of the sequences that alone can be to blame for what comes
            next, and then none.
        limits: on memory, and on the prefill of a step.

    Raises:
        LoadError: the model cannot be batched.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        max_batch_size: int,
        on_busy: Callable[[tuple[int, ...]], None] = lambda _: None,
        limits: Limits = LIMITS,
    ) -> None:
        self._on_busy = on_busy
        self.runner, self.loaded = build_runner(loaded, max_batch_size, limits)
        self.drawer = Drawer(self.runner.vocab_size, self.runner.device, loaded.tokenizer)
        self.holding = Holding(self.drawer.masks)
        self.tokens = Tokens(loaded, self.runner.vocab_size)
        self.scheduler = Scheduler(max_batch_size, self.runner.cache.fits)
        self.prefixes = PrefixCache(self.runner.cache, limits.row_bytes)
        self.runner.encoded.max_bytes = limits.encoder_bytes
        self.decode = Decode(self.runner, self.scheduler)
        self.ahead = Ahead(self.runner, self.scheduler)
        parts = self.runner, self.scheduler, self.prefixes
        self.shortage = Shortage(*parts, self.ahead, self.holding)
        self.prefill = Prefill(*parts, limits.chunk_tokens, self.shortage.spare)
        self.cancelled: dict[int, CancelReason] = {}
        self._outputs: list[Output] = []
        self._batch = 0

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return self.scheduler.idle and not self._outputs

    @property
    def urgent(self) -> bool:
        """Whether there is something to do that need not wait for the running sequences' turn."""
        scheduler = self.scheduler
        prompts = scheduler.prefilling or scheduler.next
        return bool(self._outputs or (prompts and not any(s.trial for s in scheduler.running)))

    def handle(self, command: Command) -> None:
        """Take a command in; what it has to say comes with the next step.

        `Stop` is the process's business, and ignored here.
        """
        if isinstance(command, Add):
            self._add(command)
        elif isinstance(command, Cancel):
            self._cancel(command)
        elif isinstance(command, Abort) and (found := self.scheduler.find(command.handle)):
            self._remove(found)

    def step(self, *, decode: bool = True) -> tuple[Output, ...]:
        """Prefill a chunk of the new prompts and decode the others; return what there is to say.

        Each running sequence gets one token; only one that is on trial, while one is. None gets one
        without `decode`, nor while its grammar is compiled or its mask computed.

        Raises:
            torch.AcceleratorError: the device is lost, and the engine with it.
        """
        self._settle()
        running = [s for s in self.scheduler.running if not self.holding.has(s)]
        trial = next((s for s in running if s.trial), None)
        self.drawer.masks.begin(self.scheduler.live)
        fresh = [] if trial else self._prefill(decoding=decode and bool(running))
        began = time.perf_counter()
        rows = self._rows(trial, fresh) if decode else []
        rows, flying = self._fly(rows) if decode else (rows, 0)
        count = flying + len(rows) + len(fresh)
        rows, tokens = self._draw(rows, fresh, turn=decode)
        if trial and decode:
            trial.trial = trial.replays
            self._on_busy(())
        if decode:
            self._batch = count
        worked = count or self.scheduler.prefilling
        # No token comes soon that ends those that were cancelled before they were held or put back.
        without = (*self.holding.parked, *self.scheduler.waiting) if self.cancelled else ()
        ended = [s for s in without if s.handle in self.cancelled]
        for sequence in ended:
            self._finish(sequence, ())
        ended += self._take_in(rows, tokens) if rows else []
        self._remove_all(ended)
        if decode and not (worked or rows or ended or self._outputs):
            self.holding.idle()
        if count > flying + len(fresh):
            self.prefill.pace.decoded(time.perf_counter() - began)
        outputs, self._outputs = tuple(self._outputs), []
        return outputs

    def load(self) -> tuple[int, float]:
        """Return how many sequences the last step ran, and the share of the cache in use."""
        used = sum(sequence.length for sequence in self.scheduler.live)
        most = self.scheduler.max_batch_size * self.loaded.context_length
        return self._batch, used / min(most, self.runner.cache.max_tokens or most)

    def _add(self, add: Add) -> None:
        bounds = self.loaded.eos_ids, self.loaded.context_length, add.generated
        sequence = Sequence(add.handle, add.prompt, add.sampling, *bounds, trial=add.trial)
        try:
            self.drawer.sampler.check(sequence.sampling)
            if not prepare(sequence, self.loaded.tokenizer, self.tokens, self.cancelled):
                self.scheduler.add(sequence)
                self.holding.watch(sequence)
                return
            self._finish(sequence, ())  # its worker died between the last token and the end
        except UnbrokenError as error:
            self._fail(sequence, error.code, error.message)
        except Exception as error:
            log.exception("a sequence could not be set up")
            self._fail(sequence, *(NO_MEMORY if lacks_memory(error) else (FAILED, PREFILL_FAILED)))
        self.holding.forget(sequence)

    def _settle(self) -> None:
        """See what grammars that have come now say of what their sequences have so far."""
        for sequence, constraint in self.holding.compiled():
            if constraint.refusal:
                self._fail(sequence, *constraint.refusal)
            elif constraint.failed:
                self._fail(sequence, FAILED, LOG_FAILED)
            elif constraint.done:
                self._finish(sequence, ())
            else:
                continue
            self._remove(sequence)

    def _cancel(self, cancel: Cancel) -> None:
        sequence = self.scheduler.find(cancel.handle)
        if sequence is None:
            return  # it has ended, and said so
        self.cancelled[cancel.handle] = cancel.reason
        if sequence not in self.scheduler.running or self.holding.has(sequence):
            self._finish(sequence, ())
            self._remove(sequence)

    def _prefill(self, *, decoding: bool) -> list[Fresh]:
        """Compute this step's share of the new prompts; return the sequences that can run now."""
        fresh, failure = self.prefill.step(self._on_busy, decoding=decoding)
        if failure and lacks_memory(failure.error):
            self._leave(self.shortage.make_room(failure.sequence))
        elif failure:
            log.error("prefill failed", exc_info=failure.error)
            self._fail(failure.sequence, FAILED, PREFILL_FAILED)
            self._remove(failure.sequence)
        return fresh

    def _rows(self, trial: Sequence | None, fresh: list[Fresh]) -> list[Sequence]:
        """Choose whom to decode: the one on trial alone, else all but the fresh ones."""
        if trial:
            self._on_busy((trial.handle, *self.prefill.encoding))
            return [trial]
        if any(one.sequence.trial for one in fresh):
            return []
        going = self.scheduler.running[: len(self.scheduler.running) - len(fresh)]
        return [s for s in going if not self.holding.has(s)]

    def _fly(self, rows: list[Sequence]) -> tuple[list[Sequence], int]:
        """Begin the rows' next step, where it can run ahead, and take the last one's tokens in.

        Returns:
            Those that are to be decoded here, and how many rows are on their way.
        """
        landed, flying = self.ahead.turn(rows)
        if landed:
            self._remove_all(self._take_in(*map(list, zip(*landed, strict=True))))
        return [] if flying else [row for row in rows if row.slot >= 0], flying

    def _decode(self, rows: list[Sequence]) -> tuple[list[Sequence], Tensor | None]:
        """Compute the rows' next logits; return the rows that have some, and `[B, V]`.

        A sequence that cannot go on is failed and left out. Where memory is short, one gives up its
        place, and the others go on in the next step.
        """
        rows, logits, failures = self.decode.step(rows)
        for failure in failures:
            if lacks_memory(failure.error):
                self._leave(self.shortage.make_room(failure.sequence))
            else:
                self._fail(failure.sequence, FAILED, DECODE_FAILED)
                self._remove(failure.sequence)
        return rows, logits

    def _draw(
        self, rows: list[Sequence], fresh: list[Fresh], *, turn: bool
    ) -> tuple[list[Sequence], list[int]]:
        """Decode the rows; return a token for each of them and the fresh ones that can have one.

        Where memory is short elsewhere than in the forward, nobody has one, and all begin anew.
        """
        try:
            rows, logits = self._decode(rows)
            if fresh:
                rows = [*rows, *(one.sequence for one in fresh)]
                parts = [one.logits for one in fresh]
                logits = torch.cat(parts if logits is None else [logits, *parts])
            rows, logits = self.holding.sift(rows, logits, turn=turn)
            return rows, self.drawer.draw(logits, rows) if rows else []
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if not lacks_memory(error):
                raise
        self._leave(self.shortage.begin_anew())
        return [], []

    def _leave(self, sequence: Sequence | None) -> None:
        """Let a sequence go that there is no memory for, if there is one."""
        if sequence is not None:
            self._fail(sequence, *NO_MEMORY)
            self._remove(sequence)

    def _take_in(self, rows: list[Sequence], tokens: list[int]) -> list[Sequence]:
        """Add a token to each sequence; return those that it ends."""
        views = torch.tensor(tokens)[:, None].split(1)  # what criteria take: [1, L]
        drawn = zip(rows, tokens, views, strict=True)
        return [sequence for sequence, *new in drawn if self._advance(sequence, *new)]

    def _advance(self, sequence: Sequence, token: int, view: Tensor) -> bool:
        """Add a token to a sequence and say what it released; return whether that was its last."""
        if token == BAD_ROW:
            self.runner.scrub(sequence.slot)
            lost = sequence.constraint is not None and sequence.constraint.failed
            self._fail(sequence, FAILED, GRAMMAR_FAILED if lost else STEP_FAILED)
            return True
        try:
            sequence.output_ids.append(token)
            pieces = tuple(sequence.detokenizer.push(token))
            if sequence.constraint:
                sequence.constraint.push(token)
            if bool(sequence.stopping(view, None)):
                self._finish(sequence, pieces)
                return True
        except torch.AcceleratorError:
            raise
        except Exception as error:
            log.exception("a token could not be taken in")
            self._fail(sequence, *(NO_MEMORY if lacks_memory(error) else (FAILED, TEXT_FAILED)))
            return True
        if pieces:
            self._say(sequence, pieces)
        return False

    def _finish(self, sequence: Sequence, pieces: tuple[Piece, ...]) -> None:
        """Say a sequence's last words: these pieces, and what its detokenizer held back."""
        reason, cancelled = finish_reason(sequence, self.cancelled)
        if sequence in self.scheduler.running:
            self.prefixes.keep(sequence)
        self._say(sequence, (*pieces, *sequence.detokenizer.finish()), reason, cancelled)

    def _say(
        self,
        sequence: Sequence,
        pieces: tuple[Piece, ...],
        finish: FinishReason | None = None,
        cancelled: CancelReason | None = None,
    ) -> None:
        if sequence.scores is not None:
            pieces = attach(pieces, sequence.scores, sequence.detokenizer.marks or [])
        self._outputs.append(
            Output(
                sequence.handle,
                pieces,
                finish,
                cancelled,
                completion_tokens=len(sequence.output_ids),
                reasoning_tokens=sequence.detokenizer.reasoning_tokens,
                cached_tokens=sequence.cached,
            )
        )

    def _fail(self, sequence: Sequence, code: str, message: str, param: str = "") -> None:
        self._outputs.append(
            Output(
                sequence.handle,
                completion_tokens=len(sequence.output_ids),
                error=(code, message, param) if param else (code, message),
            )
        )

    def _remove_all(self, sequences: list[Sequence]) -> None:
        # From the last row down: a row that ends too is not moved first.
        for sequence in sorted(sequences, key=lambda s: s.slot, reverse=True):
            self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """Take a sequence out of queue or batch, and close the gap its row leaves."""
        if sequence in self.scheduler.prefilling:
            self.runner.scrub(sequence.slot)  # nobody has looked at its numbers yet
        self.holding.forget(sequence)
        self.prefill.forget(sequence)
        self.ahead.forget(sequence)
        self.cancelled.pop(sequence.handle, None)
        for source, moved in self.scheduler.remove(sequence):
            self.runner.move(source, moved)
