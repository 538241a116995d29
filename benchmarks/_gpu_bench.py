"""What the sections of the GPU benchmark share: the model, its runners, rows to decode."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from benchmarks._gpu_measure import (
    Figures,
    copy_bandwidth,
    decoder_bytes,
    matrix_rate,
    synchronize,
    token_bytes,
)
from benchmarks._gpu_model import FULL, TINY, Scale, build, load_for_engine
from shared.protocol import SamplingParams
from worker.engine.bucketed import BucketOptions, best_options
from worker.engine.messages import LIMITS, Prompt
from worker.engine.model_runner import ModelRunner
from worker.engine.runner_setup import build_runner
from worker.engine.sequence import Chunk, Sequence
from worker.engine.token_pool import PooledCache

Cell = tuple[str, Callable[[], Figures]]
Cells = Iterator[Cell]

GREEDY = SamplingParams(temperature=0, max_tokens=2**20, ignore_eos=True)
STAGES = ("eager", "ragged", "graph", "compiled")
EXACT, FAST = "exact", "fast"  # what the engine itself takes, with and without EXACT=1
READY = "getting ready"  # a cell after which a section's time begins anew


class Bench:
    """One model on one device, and the runners that are measured on it.

    Args:
        tiny: a small model, which a CPU can do in a minute.

    Attributes:
        until: when the section is over that runs now, by the monotonic clock.
    """

    until = float("inf")

    def __init__(self, *, tiny: bool) -> None:
        self.scale: Scale = TINY if tiny else FULL
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda = self.device.type == "cuda"
        self._runners: dict[tuple[str, int], ModelRunner] = {}

    @cached_property
    def model(self) -> Any:
        """The vision-language model."""
        return build(self.scale, self.device)

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second of a copy."""
        return copy_bandwidth(self.scale.copied_bytes, self.device)

    @cached_property
    def matrix_rate(self) -> float:
        """Operations per second of a matrix product."""
        return matrix_rate(self.scale.dtype, 8192 if self.cuda else 512, self.device)

    @cached_property
    def working(self) -> dict[str, bool]:
        """What of compiling and recording works here, tried as the engine does with a tiny model.

        So a compiler that is missing costs the sections that need one, and no others.
        """
        scale = replace(TINY, dtype=self.scale.dtype)
        model, wanted = build(scale, self.device), self.options(STAGES[-1])
        runner, _ = build_runner(
            load_for_engine(model, scale, scale.contexts[0], wanted), 2, LIMITS
        )
        found = BucketOptions() if runner.bucketed is None else runner.bucketed.options
        return {"compile": found.compile, "capture": found.capture}

    @property
    def room(self) -> int:
        """Tokens of a row: the longest context that is measured."""
        return max(self.scale.contexts)

    def step_bytes(self, batch: int, context: float) -> float:
        """Return what a decode step has to read: weights, and each row's keys and values."""
        cached = batch * context * token_bytes(self.model.config, self.scale.dtype)
        return decoder_bytes(self.model) + cached

    def runner(self, stage: str, rows: int, room: int = 0) -> ModelRunner:
        """Return the runner of a stage with so many rows, always the same one until `release`."""
        if self.options(stage) == self.options(STAGES[-1]):
            stage = STAGES[-1]  # the same, and compiled once
        key = (stage, rows)
        if key not in self._runners:
            self._runners[key] = self._make(stage, rows, room or self.room)
        return self._runners[key]

    def options(self, stage: str) -> BucketOptions | None:
        """Return how a stage decodes; None: in plain steps."""
        if stage in {FAST, EXACT}:
            options = best_options(self.model, exact=stage == EXACT)
            if options is None:
                return None
            able = self.working
            return replace(options, compile=able["compile"], capture=able["capture"])
        return {
            "eager": None,
            "ragged": BucketOptions(),
            "graph": BucketOptions(capture=self.cuda),
            "compiled": BucketOptions(compile=True, capture=self.cuda),
        }[stage]

    def _make(self, stage: str, rows: int, room: int) -> ModelRunner:
        bucketed, replay = self.options(stage), stage == EXACT
        runner = ModelRunner(self.model, rows, room, replay=replay, bucketed=bucketed)
        runner.verify()  # after which the cache knows its shape
        if isinstance(runner.cache, PooledCache):
            runner.cache.allocate()  # its growth would record all steps anew
        return runner

    def release(self, *keep: str) -> None:
        """Give back the memory of all runners but those of some stages."""
        for key in [key for key in self._runners if key[0] not in keep]:
            del self._runners[key]
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def row(slot: int, prompt: Prompt, output: list[int], room: int) -> Sequence:
    """Make a sequence in a slot; its outputs are known already, and fed one by one."""
    sequence = Sequence(slot, prompt, GREEDY, frozenset(), room, tuple(output))
    sequence.slot = slot
    sequence.target = len(sequence.prompt_ids)
    return sequence


def prefill(runner: ModelRunner, sequences: list[Sequence]) -> torch.Tensor:
    """Prefill the sequences' prompts one after the other; return the logits of all, `[n, V]`."""
    runner.reserve(sequences)
    return torch.cat(
        [runner.prefill([Chunk(one, one.target - one.length)]).clone() for one in sequences]
    )


def next_logits(runner: ModelRunner, sequences: list[Sequence]) -> torch.Tensor:
    """Decode a step to its end, as the engine does, which has to know its tokens: `[n, V]`."""
    runner.reserve(sequences)
    logits = runner.decode(sequences).clone()
    synchronize(runner.device)
    return logits
