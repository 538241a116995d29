"""The GPU benchmark's requests from end to end, through the engine."""

from __future__ import annotations

import random
import time
from functools import partial

from benchmarks._gpu_bench import READY, Bench, Cells
from benchmarks._gpu_measure import Figures
from benchmarks._gpu_model import Scale, load_for_engine, text_ids
from shared.protocol import SamplingParams
from worker.engine.engine import Engine
from worker.engine.messages import Abort, Add, Prompt

WARM_LENGTH = 4  # tokens of an answer that warms up
TEMPERATURES = {"greedy": 0.0, "sampled": 0.6}


def draw_requests(scale: Scale) -> list[tuple[list[int], int]]:
    """Draw prompts and lengths of answers, the same in every run."""
    draw = random.Random(0)
    low, high = scale.lengths
    return [
        (text_ids(draw.randint(low, high), seed), draw.randint(low, high))
        for seed in range(scale.requests)
    ]


def requests(bench: Bench) -> Cells:
    """Run all requests at once through the engine: prefill, decode, draw, text.

    Its steps are recorded and not compiled, so that it is ready in no time.
    """
    return _requests(bench, "graph")


def requests_compiled(bench: Bench) -> Cells:
    """Do so with the engine as it comes on a GPU, which compiles a step for each batch size."""
    return _requests(bench, "compiled")


def _requests(bench: Bench, stage: str) -> Cells:
    bench.release()
    holder: list[Engine] = []
    yield READY, partial(_prepare, bench, stage, holder)
    for kind, temperature in TEMPERATURES.items():
        yield kind, partial(_run, bench, holder, temperature)
    holder.clear()


def _prepare(bench: Bench, stage: str, holder: list[Engine]) -> Figures:
    """Make the engine, and have it run batches of all sizes once."""
    scale = bench.scale
    loaded = load_for_engine(bench.model, scale, 2 * scale.lengths[1], bench.options(stage))
    engine = Engine(loaded, scale.requests)
    batch, handle = 1, 0
    while batch <= scale.requests:
        for _ in range(batch):
            handle -= 1
            prompt = Prompt(text_ids(scale.lengths[0], -handle))
            engine.handle(Add(handle, prompt, _sampling(0.0, WARM_LENGTH)))
        while not engine.idle:
            engine.step()
        batch *= 2
    holder.append(engine)
    steps = engine.runner.bucketed  # what came of it: another way is taken where one fails
    options = str(steps.options) if steps else "plain"
    return {"largest_batch": batch // 2, "attention": engine.runner.attention, "steps": options}


def _run(bench: Bench, holder: list[Engine], temperature: float) -> Figures:
    """Add all requests, and step until they have ended or time is up; time each step."""
    if not holder:
        return {"left_out": "the engine is not ready"}
    engine, drawn = holder[0], draw_requests(bench.scale)
    for handle, (ids, length) in enumerate(drawn):
        engine.handle(Add(handle, Prompt(ids), _sampling(temperature, length, handle)))
    tokens: dict[int, int] = {}
    first, steps = list[float](), list[float]()
    began = last = time.monotonic()
    while not engine.idle and last < bench.until:
        outputs = engine.step()
        now = time.monotonic()
        steps.append(now - last)
        last = now
        for output in outputs:
            if output.error:
                raise RuntimeError(output.error[1])
            if output.handle not in tokens:
                first.append(now - began)
            tokens[output.handle] = output.completion_tokens
    cut = not engine.idle
    for handle in range(len(drawn)):
        engine.handle(Abort(handle))
    seconds, total = last - began, sum(tokens.values())
    steps.sort()
    return {
        "requests": len(drawn),
        "prompt_tokens": sum(len(ids) for ids, _ in drawn),
        "tokens": total,
        "expected_tokens": sum(length for _, length in drawn),
        "cut": cut,
        "seconds_of_work": seconds,
        "tokens_per_s": total / seconds,
        "step_p50_ms": steps[len(steps) // 2] * 1000,
        "step_p99_ms": steps[int(len(steps) * 0.99)] * 1000,
        "last_first_token_s": max(first, default=0.0),
    }


def _sampling(temperature: float, length: int, seed: int = 0) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True, seed=seed)
