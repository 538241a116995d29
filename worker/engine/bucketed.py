"""Decode steps of a few fixed shapes, from inputs that stay in one place.

So a step can be compiled once for each shape, and recorded as a CUDA graph: one launch instead of
hundreds. All but the recording itself runs on any device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Batch
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from worker.engine import ragged
from worker.engine.device_draw import FIELDS, draw, draw_best, greedy, parameters
from worker.engine.ragged import PAGE, Heads, Rows
from worker.engine.sampler import chunk_size
from worker.engine.sequence import Sequence
from worker.engine.token_pool import PooledCache
from worker.engine.transfer import Mirror, Pending

log = logging.getLogger("unbroken.engine")

SMALLEST = 2  # a batch of one takes other kernels than all the others
WARM_UPS = 2  # runs before a recording: libraries allocate and choose kernels in them
SHAPES = 64  # most versions of a step that are compiled

SPARE = 2  # columns of inputs; a row of them is a multiple of 16 bytes, as compiled kernels want
INPUTS = 6  # of a row: token, length, position, start, place, slot
KINDS = LOGITS, BEST, DRAWN = "logits", "best", "drawn"  # what a step returns: logits or tokens

Forward = Callable[[Tensor, int], Tensor]
Run = Callable[[], Tensor]
"""Runs a step over the inputs as they are; returns the same tensor each time."""


@dataclass(frozen=True)
class BucketOptions:
    """How decode steps of fixed shapes are run.

    Args:
        attention: the name of a path in `ragged.PATHS`; empty for the best that runs here.
        compile: whether `torch.compile` makes each shape's step.
        capture: whether each shape's step is recorded as a CUDA graph.
        fixed: whether all steps have the largest shape, and rows are not split for attention, so
            that rounding does not depend on who else runs.
    """

    attention: str = ""
    compile: bool = False
    capture: bool = False
    fixed: bool = False


def best_options(model: PreTrainedModel, *, exact: bool) -> BucketOptions | None:
    """Return what is fastest for a model where it is; None where plain steps are (on CPUs)."""
    devices = {parameter.device for parameter in model.parameters()}
    if {device.type for device in devices} != {"cuda"}:
        return None
    one = len(devices) == 1  # a recording cannot span several
    return BucketOptions(compile=one, capture=one, fixed=exact)


class BucketedDecode:
    """Decodes rows of a pooled cache through a model's text decoder and its head.

    Args:
        model: in eval mode, on its device.
        cache: its keys and values.
        options: how to run the steps.

    Attributes:
        options: as given.
        attention: the name of the path that they take.
        buckets: the batch sizes there are steps for, ascending.
    """

    def __init__(self, model: PreTrainedModel, cache: PooledCache, options: BucketOptions) -> None:
        self._decoder, self._head = model.get_decoder(), model.get_output_embeddings()
        self._cache, self.options = cache, options
        self._device = model.get_input_embeddings().weight.device
        self.attention = options.attention or ragged.best(
            self._device, model.dtype, _heads(model), whole=options.fixed
        )
        self.buckets = _buckets(cache.plan.max_rows)[-1 if options.fixed else 0 :]
        self._chunk = chunk_size(int(self._head.weight.shape[0]))
        # Where they are fed from, by slot; the last one is that of rows that only fill up.
        self._drawn = torch.zeros(cache.plan.max_rows + 1, dtype=torch.int64, device=self._device)
        # Wider than the largest step, so that none of them is laid out otherwise than the others.
        most, slot = self.buckets[-1] + SPARE, cache.plan.max_rows
        self._inputs = Mirror(INPUTS, most, torch.int64, self._device)
        self._nobody = np.array([(0, 1, 0, 0, at % PAGE, slot) for at in range(most)]).T
        self._asked = Mirror(FIELDS, self.buckets[-1], torch.float64, self._device)
        forward = self._logits
        self._forward = _compiled(forward, options) if options.compile else forward
        self._record = Capture(self._device) if options.capture else _as_it_is
        self._runs: dict[tuple[int, int, str], Run] = {}
        self._version, self._plain = cache.plan.version, False

    @property
    def rounding(self) -> str:
        """Name what rounding depends on, beside the libraries and the device."""
        made = "compiled " if self.options.compile else ""
        kind = "fixed " if self.options.fixed else ""
        size, window = self.buckets[-1], self._window()
        return f"{kind}{made}steps of {size} by {self.attention} over {window}"

    def logits(self, sequences: Batch[Sequence]) -> Tensor:
        """Feed each sequence's next input; return `[B, V]`, valid until the next call.

        Their rows may lie anywhere, and `reserve` has been called. No `length` changes.
        """
        run = self._run(self._size(sequences), LOGITS)
        self._fill(sequences)
        return run()[: len(sequences)]

    def launch(self, sequences: Batch[Sequence]) -> Pending:
        """Begin a step that draws each sequence's next token, which may be fed in the next one.

        Each sequence's next input is known, or was drawn so by the step before. `drawable` holds
        for all, and `reserve` has been called. No `length` changes.
        """
        best = all(greedy(sequence.sampling) for sequence in sequences)
        run = self._run(self._size(sequences), BEST if best else DRAWN)
        self._fill(sequences)
        if not best:
            asked = [parameters(s, s.length + 1 - len(s.prompt_ids)) for s in sequences]
            self._asked.host[:, : len(asked)] = np.array(asked).T
            self._asked.send()
        return Pending(run()[: len(sequences)])

    def move(self, source: int, target: int) -> None:
        """Have a row's next input come along to another slot."""
        self._drawn[target] = self._drawn[source]

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Neither compile nor record inside of it."""
        self._plain = True
        try:
            yield
        finally:
            self._plain = False

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Take all memory, then compile and record all steps: the largest first.

        Raises:
            RuntimeError: the memory is not there, or a step cannot be compiled or recorded.
        """
        self._cache.allocate()
        for size in reversed(self.buckets):
            began = time.monotonic()
            for kind in KINDS:
                run = self._run(size, kind)
                self._fill(())
                run()
            log.info("decode steps of %d made in %.1f s", size, time.monotonic() - began)

    def _size(self, sequences: Batch[Sequence]) -> int:
        return next(bucket for bucket in self.buckets if bucket >= len(sequences))

    def _fill(self, sequences: Batch[Sequence]) -> None:
        """Write a step's inputs to their place.

        An input that is not known yet is -1. Rows that nobody has read and write page 0.
        """
        plan, host = self._cache.plan, self._inputs.host
        rows = []
        for sequence in sequences:
            length, slot = sequence.length, sequence.slot
            token = sequence.next_input if sequence.replays else -1
            position, start = length + sequence.rope_delta, plan.start(slot)
            rows.append((token, length + 1, position, start, start + length, slot))
        host[:, : len(rows)] = np.array(rows).reshape(-1, INPUTS).T
        host[:, len(rows) :] = self._nobody[:, len(rows) :]
        self._inputs.send()

    def _run(self, size: int, kind: str) -> Run:
        """Return what runs a step; make it where there is none yet, or where memory has moved.

        Nobody's inputs are there then: a step that is run twice would feed what it has drawn.
        """
        plan = self._cache.plan
        if self._version != plan.version:
            self._runs.clear()
            self._version = plan.version
        window = self._window()
        if self._plain:
            return self._step(self._logits, size, window, kind)
        run = self._runs.get((size, window, kind))
        if run is None:
            self._fill(())
            step = self._step(self._forward, size, window, kind)
            run = self._runs[size, window, kind] = self._record(step)
        return run

    def _window(self) -> int:
        """Return the most tokens of a row: what is not copied together need not follow the slots'.

        A change makes new steps, and may change rounding.
        """
        plan = self._cache.plan
        follow = self.attention == "sdpa" and not self.options.fixed
        return plan.capacity if follow else -(-plan.max_capacity // PAGE) * PAGE

    def _step(self, forward: Forward, size: int, window: int, kind: str) -> Run:
        inputs, asked = self._inputs.device[:, :size], self._asked.device[:, :size]
        config, drawn, slots = self._decoder.config, self._drawn, inputs[5]
        if self.options.compile and len(self.buckets) > 1:
            _leave_open(inputs)

        def step() -> Tensor:
            with ragged.applied(config):
                logits = forward(inputs, window)
            if kind == LOGITS:
                return logits
            logits = logits.to(drawn.device)
            tokens = draw_best(logits) if kind == BEST else draw(logits, asked, self._chunk)
            drawn.index_copy_(0, slots, tokens.clamp(min=0))
            return tokens

        return step

    def _logits(self, inputs: Tensor, window: int) -> Tensor:
        ids, lengths, positions, starts, places, slots = inputs.unbind()
        self._cache.plan.begin_step(places)  # the compiler sees where they come from
        ids = torch.where(ids < 0, self._drawn[slots], ids)
        rows = Rows(
            starts=pad(starts, (0, 1)).int(),
            lengths=lengths.int(),
            queries=torch.arange(len(ids) + 1, dtype=torch.int32, device=ids.device),
            window=window,
            path=self.attention,
            whole=self.options.fixed,
        )
        hidden = self._decoder(
            input_ids=ids[:, None],
            position_ids=positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
            ragged=rows,
        ).last_hidden_state
        logits: Tensor = self._head(hidden[:, -1])
        return logits


class Capture:
    """Records steps as CUDA graphs that share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, step: Run) -> Run:
        """Record a step; what runs it plays the recording."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS - 1):
                step()
            with _never_waiting():
                step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # what other threads do is theirs
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


@contextmanager
def _never_waiting() -> Iterator[None]:
    """Refuse what waits for the device: in a recording it would cost the device, not the step.

    Raises:
        RuntimeError: what runs inside of it waits.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _leave_open(inputs: Tensor) -> None:
    """Have the compiler leave the number of rows open; where it cannot, it compiles for each."""
    import torch._dynamo as dynamo  # costs seconds

    dynamo.maybe_mark_dynamic(inputs, 1)


def _compiled(forward: Forward, options: BucketOptions) -> Forward:
    """Return what compiles a step, once for all batch sizes, and runs it.

    With `fixed` what is measured on the spot does not choose between kernels that round otherwise.
    """
    import torch._dynamo as dynamo  # costs seconds
    from torch._inductor import list_options

    known = options.fixed and "deterministic" in list_options()
    compiled = torch.compile(
        forward, dynamic=False, options={"deterministic": True} if known else None
    )

    def run(inputs: Tensor, window: int) -> Tensor:
        with dynamo.config.patch(recompile_limit=SHAPES):
            return compiled(inputs, window)

    return run


def _heads(model: PreTrainedModel) -> Heads:
    config = model.config.get_text_config()
    queries = int(config.num_attention_heads)
    shared = getattr(config, "num_key_value_heads", None) or queries
    dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    return Heads(queries, int(shared), int(dim))


def _as_it_is(step: Run) -> Run:
    return step


def _buckets(most: int) -> tuple[int, ...]:
    """Return powers of two up to the first that holds `most` rows."""
    sizes = [SMALLEST]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)
