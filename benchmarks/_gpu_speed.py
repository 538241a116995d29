"""The GPU benchmark's decode steps, stage by stage, and its prefills."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks._gpu_bench import FAST, GREEDY, STAGES, Bench, Cells, row
from benchmarks._gpu_measure import APART, Figures, median_of, prefill_operations, timed
from benchmarks._gpu_model import image_prompt, text_ids, video_prompt
from shared.protocol import SamplingParams
from worker.engine.messages import LIMITS, Prompt
from worker.engine.model_runner import ModelRunner
from worker.engine.sequence import Chunk, Sequence

WARM = 3  # steps before those that count: what is compiled and captured is so by then
AHEAD = 2  # steps on their way before the first token is read
DRAWN = {"drawn": 0.0, "sampled": 0.6}
HELD = 7  # the token that is fed in all steps


def decode(bench: Bench) -> Cells:
    """Time decode steps of all stages."""
    yield from _decode(bench, bench.scale.batches, max(bench.scale.batches))


def large_batch(bench: Bench) -> Cells:
    """Do so for the largest batch, whose cache needs the memory for itself."""
    bench.release()
    yield from _decode(bench, (bench.scale.deep,), bench.scale.deep)


def _decode(bench: Bench, batches: tuple[int, ...], rows: int) -> Cells:
    contexts = bench.scale.contexts
    for stage in STAGES:
        for batch in batches:
            for context in contexts:
                name = f"{stage} {batch} x {context}"
                yield name, partial(step_figures, bench, stage, batch, context, rows)
        bench.release(STAGES[-1])
    for batch in batches:
        for kind, temperature in DRAWN.items():
            name = f"{kind} {batch} x {contexts[0]}"
            yield name, partial(drawn_figures, bench, batch, contexts[0], rows, temperature)


def step_figures(bench: Bench, stage: str, batch: int, context: int, rows: int) -> Figures:
    """Time the forward of a step: its logits, nothing drawn."""
    runner = bench.runner(stage, rows)
    return step_timing(bench, runner, stage, batch, context)


def step_timing(bench: Bench, runner: ModelRunner, stage: str, batch: int, context: int) -> Figures:
    """Time decode steps of a runner that end at a context of `context` tokens."""
    sequences = standing(bench, runner, batch, context)
    return _figures(bench, stage, batch, context, lambda: runner.decode(sequences))


def drawn_figures(bench: Bench, batch: int, context: int, rows: int, temperature: float) -> Figures:
    """Time whole steps that feed each other on the device; tokens are read one step late."""
    runner = bench.runner(STAGES[-1], rows)
    sequences = standing(bench, runner, batch, context)
    sampling = SamplingParams(temperature=temperature, max_tokens=2**20, ignore_eos=True)
    for sequence in sequences:
        sequence.sampling = sampling
        del sequence.output_ids[WARM + 1 :]  # what comes behind is drawn
    pending = [runner.launch(sequences) for _ in range(AHEAD)]

    def step() -> None:
        pending.append(runner.launch(sequences))
        pending.pop(0).tokens()

    return _figures(bench, STAGES[-1], batch, context, step)


def _figures(
    bench: Bench, stage: str, batch: int, context: int, step: Callable[[], Any]
) -> Figures:
    steps = bench.scale.steps
    timing = timed(step, steps, bench.device)
    floor = bench.step_bytes(batch, context - APART - steps / 2) / bench.bandwidth * 1000
    return {
        "stage": stage,
        "batch": batch,
        "context": context,
        "ms": timing.ms,
        "host_ms": timing.host_ms,
        "tokens_per_s": batch / timing.ms * 1000,
        "floor_ms": floor,
        "floor_share": floor / timing.ms,
    }


@torch.inference_mode()
def standing(bench: Bench, runner: ModelRunner, batch: int, context: int) -> list[Sequence]:
    """Return rows some steps short of a context, warmed up; what they hold is noise."""
    steps = bench.scale.steps
    length = context - steps - APART - WARM - AHEAD
    prompt = Prompt([HELD] * length)
    tokens = [HELD] * (steps + APART + WARM)
    sequences = [row(slot, prompt, tokens, context) for slot in range(batch)]
    for sequence in sequences:
        sequence.length = length
    runner.reserve(sequences)
    for _ in range(WARM):
        runner.decode(sequences)
    for layer in runner.cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return sequences


def prefill(bench: Bench) -> Cells:
    """Time the prefill of texts, an image and a video."""
    scale = bench.scale
    bench.release()
    for length in scale.prefills:
        yield f"text {length}", partial(_text, bench, length, length)
    longest = max(scale.prefills)
    chunk = min(LIMITS.chunk_tokens, longest // 2)
    yield f"text {longest} by {chunk}", partial(_text, bench, longest, chunk)
    yield f"image {scale.image}", partial(_media, bench, image_prompt(scale, scale.image))
    video = video_prompt(scale, scale.video, scale.frames)
    yield f"video {scale.frames} x {scale.video}", partial(_media, bench, video)


def _text(bench: Bench, length: int, chunk: int) -> Figures:
    prompt = Prompt(text_ids(length, length))
    floor = prefill_operations(bench.model, length) / bench.matrix_rate * 1000
    figures = _prefill_figures(bench, prompt, chunk)
    return {**figures, "floor_ms": floor, "floor_share": floor / figures["ms"]}


def _media(bench: Bench, prompt: Prompt) -> Figures:
    return _prefill_figures(bench, prompt, len(prompt.input_ids))


@torch.inference_mode()
def _prefill_figures(bench: Bench, prompt: Prompt, chunk: int) -> Figures:
    """Time the prefill of a prompt, over the cache that the engine takes."""
    runner = bench.runner(FAST, 2, max(bench.scale.prefills) + 256)

    def once() -> None:
        sequence = Sequence(0, prompt, GREEDY, frozenset(), 2**20)
        sequence.slot = 0
        runner.reserve([sequence])
        while sequence.length < sequence.target:
            count = min(chunk, sequence.target - sequence.length)
            runner.prefill([Chunk(sequence, count)])

    ms = median_of(once, 3, bench.device)
    tokens = len(prompt.input_ids)
    return {"tokens": tokens, "ms": ms, "tokens_per_s": tokens / ms * 1000}
