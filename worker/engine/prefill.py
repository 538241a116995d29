"""Which part of which prompts a step computes, and what it need not compute at all.

A step has a budget of tokens, and while others decode also one of time, so that running streams
wait no longer than one chunk takes. Only media of a model that takes them in one piece may be more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.memory import lacks_memory
from worker.engine.model_runner import ModelRunner
from worker.engine.pace import Pace
from worker.engine.prefill_step import PACKED_TOKENS
from worker.engine.prefix_cache import PrefixCache
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Chunk, Sequence

REST = 1.25
"""A piece may be so many times as long as there is time for, if it is the last one."""


@dataclass(frozen=True)
class Fresh:
    """A sequence whose prefill is done, with the logits `[1, V]` of its next token."""

    sequence: Sequence
    logits: Tensor


@dataclass(frozen=True)
class Failure:
    """A sequence that could not be prefilled, and why. It still has its row."""

    sequence: Sequence
    error: Exception


class Prefill:
    """Plans and runs the prefill of a step.

    Args:
        runner: makes room for their keys and values.
        scheduler: gives rows to waiting sequences.
        prefixes: fills the beginning of a new sequence's row, where it can.
        chunk_tokens: most tokens of a step.
        spare: gives memory back that is not needed; tells whether there was some.

    Attributes:
        pace: what steps cost, where that bounds them.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        prefixes: PrefixCache,
        chunk_tokens: int,
        spare: Callable[[], bool],
    ) -> None:
        self._runner, self._spare = runner, spare
        self._scheduler, self._prefixes = scheduler, prefixes
        self._chunk_tokens = chunk_tokens
        self._alone = runner.replay  # rounding must not depend on who else is there
        self.pace = Pace(chunk_tokens)
        self._on_busy: Callable[[tuple[int, ...]], None] = lambda _: None

    @property
    def encoding(self) -> tuple[int, ...]:
        """Handles of those whose media are encoded beside the steps: they too may be to blame."""
        prompts = (*self._scheduler.prefilling, *self._scheduler.waiting)
        return tuple(s.handle for s in prompts if s.visuals and not s.visuals.encoded.done())

    def step(
        self, on_busy: Callable[[tuple[int, ...]], None], *, decoding: bool = False
    ) -> tuple[list[Fresh], Failure | None]:
        """Compute a step's chunks; return the sequences that run now, and the one that failed.

        For want of memory that is the one that has got no room, else the newest without a token.

        Args:
            on_busy: is told whose the forward under way is, and then nobody.
            decoding: whether others wait for a token meanwhile.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        fresh: list[Fresh] = []
        self._on_busy = on_busy
        try:
            planned = self.plan(decoding=decoding)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - the engine judges it
            return fresh, Failure(self._scheduler.prefilling[-1], error)
        groups = deque([planned] if planned else [])
        while groups:
            chunks = groups.popleft()
            handles = dict.fromkeys(chunk.sequence.handle for chunk in chunks)
            on_busy((*(handles | dict.fromkeys(self.encoding)),))
            try:
                fresh += self._compute(chunks)
            except torch.AcceleratorError:
                raise
            except Exception as error:  # noqa: BLE001 - the engine judges it
                if lacks_memory(error):
                    self._encode_anew(chunks)
                if len(chunks) == 1:  # those behind it are tried again in the next step
                    newest = max(self._scheduler.prefilling, key=lambda s: s.handle)
                    return fresh, Failure(
                        newest if lacks_memory(error) else chunks[0].sequence, error
                    )
                groups.extend([chunk] for chunk in chunks)  # find out for whom it fails
            finally:
                on_busy(())
        return fresh, None

    def _compute(self, chunks: list[Chunk]) -> list[Fresh]:
        completing = [i for i, chunk in enumerate(chunks) if chunk.completes]
        whole = self._runner.await_media(chunks[0])
        began, tokens = time.perf_counter(), sum(chunk.count for chunk in chunks)
        logits = self._runner.prefill(chunks)
        if not whole:
            self.pace.prefilled(tokens, time.perf_counter() - began)
        return [Fresh(self._scheduler.join(), logits[i : i + 1]) for i in completing]

    def plan(self, *, decoding: bool = False) -> list[Chunk]:
        """Return the chunks that this step computes in one forward, in order of arrival.

        All but the last complete their sequences. One with media is alone, and so is
        one on trial; where rounding matters, all are. There are none while others decode
        and the next tokens are those of media that are still being encoded, or where time is short
        and an encoder is begun, which takes as long as a small piece.
        """
        chunks: list[Chunk] = []
        left, overhead = self._chunk_tokens, 0
        if hurry := decoding and self._runner.on_time:
            if self._begin_encoding():
                return chunks
            left, overhead = self.pace.tokens, self.pace.overhead
        for sequence in self._candidates(chunks):  # which sees each chunk before the next
            alone = self._alone or sequence.trial or sequence.length < sequence.head
            if chunks and alone:
                break
            count = self._size(sequence, left, decoding=decoding)
            if not count:
                break
            chunk = Chunk(sequence, count)
            chunks.append(chunk)
            left -= chunk.count + (0 if chunk.count < PACKED_TOKENS else overhead)
            if left <= 0 or alone or not chunk.completes:
                break
        if not hurry:
            self._begin_encoding()
        return chunks

    def _begin_encoding(self) -> bool:
        """Have the next prompt's media encoded meanwhile; tell whether that was begun here."""
        if any(sequence.trial for sequence in self._scheduler.live):
            return False
        return any(map(self._encode, (*self._scheduler.prefilling, self._scheduler.next)))

    def _candidates(self, chunks: list[Chunk]) -> Iterator[Sequence]:
        yield from list(self._scheduler.prefilling)
        while (sequence := self._scheduler.next) is not None:
            if any(self._prefixes.worth_waiting(sequence, chunk.sequence) for chunk in chunks):
                return  # in the next step it has less to compute
            if chunks and (self._alone or sequence.trial or sequence.head):
                return
            self._admit(sequence)
            yield sequence

    def _admit(self, sequence: Sequence) -> None:
        size = len(sequence.prompt_ids)
        sequence.target = size if self._runner.replay else sequence.total
        self._scheduler.admit()
        try:
            self._runner.reserve(self._scheduler.live)
        except Exception as error:
            if not (lacks_memory(error) and self._spare()):
                raise
            self._runner.reserve(self._scheduler.live)
        if not self._runner.replay:
            self._prefixes.fill(sequence, self._scheduler.live)

    def _size(self, sequence: Sequence, left: int, *, decoding: bool) -> int:
        if sequence.length >= sequence.head:
            return self._some(sequence.target - sequence.length, left)
        self._encode(sequence)
        whole = len(sequence.prompt_ids)
        if not self._runner.takes_pieces(sequence):
            return whole if whole <= self._chunk_tokens else sequence.head
        visuals = sequence.visuals
        if decoding and visuals is not None and not visuals.ready:
            whole = visuals.first
        return self._some(whole - sequence.length, left)

    def _encode(self, sequence: Sequence | None) -> bool:
        """Begin to encode a prompt's media beside the steps; say so before, should it crash.

        Returns:
            Whether it was begun now: not before, nor with tensors that cannot be encoded.
        """
        if sequence is None or sequence.visuals or not self._runner.encodes_aside(sequence):
            return False
        self._on_busy((sequence.handle, *self.encoding))
        try:
            self._runner.encode(sequence)
        finally:
            self._on_busy(())
        return sequence.visuals is not None

    def _encode_anew(self, chunks: list[Chunk]) -> None:
        """Do not keep what an encoder failed with: once there is memory, it may succeed."""
        for sequence in (chunk.sequence for chunk in chunks):
            if sequence.visuals is not None and sequence.visuals.failed:
                sequence.visuals = None

    def _some(self, wanted: int, left: int) -> int:
        """Return how many of the wanted tokens to take; a small rest is no forward of its own."""
        most = min(int(left * REST), self._chunk_tokens)
        return wanted if wanted <= most else min(left, self._chunk_tokens)

    def forget(self, sequence: Sequence) -> None:
        """Do not encode the media of a sequence that leaves, if that has not begun."""
        if sequence.visuals is None:
            return
        encoded, sequence.visuals = sequence.visuals.encoded, None
        others = [s.visuals for s in (*self._scheduler.live, *self._scheduler.waiting)]
        if not any(visuals and visuals.encoded is encoded for visuals in others):
            encoded.cancel()
