"""What people would use instead on the same GPU: `generate()`, and Transformers' own batching."""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks._gpu_bench import STAGES, Bench, Cells
from benchmarks._gpu_measure import Figures, synchronize
from benchmarks._gpu_model import build_text_only, text_ids


def generate(bench: Bench) -> Cells:
    """Time `generate()` as it comes, token by token."""
    bench.release(STAGES[-1])  # whose steps have been compiled
    for batch in (1, bench.scale.batches[-1]):
        yield f"dynamic cache, {batch}", partial(_generate, bench, batch)


def static(bench: Bench) -> Cells:
    """Time `generate()` with a static cache, which Transformers compiles on a GPU."""
    bench.release()
    for batch in (1, bench.scale.batches[-1]):
        yield f"static cache, {batch}", partial(_generate, bench, batch, "static")


@torch.inference_mode()
def _generate(bench: Bench, batch: int, cache: str = "") -> Figures:
    """Time the tokens behind the first one, for prompts of the shorter context."""
    context, steps = bench.scale.contexts[0], bench.scale.steps
    prompts = [text_ids(context - steps - 1, seed) for seed in range(batch)]
    ids = torch.tensor(prompts, device=bench.device)
    options: dict[str, Any] = {"cache_implementation": cache} if cache else {}

    def run(tokens: int) -> float:
        synchronize(bench.device)
        began = time.perf_counter()
        answer = bench.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            **options,
        )
        synchronize(bench.device)
        assert answer.shape[1] == ids.shape[1] + tokens
        return time.perf_counter() - began

    longest = steps + 1
    run(longest)  # warms up, compiles
    ms = (min(run(longest) for _ in range(2)) - min(run(1) for _ in range(2))) / steps * 1000
    return {"batch": batch, "context": context, "ms": ms, "tokens_per_s": batch / ms * 1000}


def continuous(bench: Bench) -> Cells:
    """Run the same requests through Transformers' continuous batching, on a text-only model."""
    bench.release()
    yield "paged|sdpa", partial(_continuous, bench)


def _continuous(bench: Bench) -> Figures:
    from benchmarks._gpu_requests import draw_requests

    model = build_text_only(bench.scale, bench.device)
    try:
        model.set_attn_implementation("paged|sdpa")
    except (ValueError, ImportError):  # later versions say `sdpa` for it
        model.set_attn_implementation("sdpa")
    requests = draw_requests(bench.scale)
    answers = [length for _, length in requests]
    # It takes one length for all requests: the mean, so that the sum is the same.
    each = round(sum(answers) / len(answers))

    def config(tokens: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0
        )

    # It sizes itself by the memory of a GPU; by that of a machine without, too large.
    bounds = None if bench.cuda else ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    prompts = [ids for ids, _ in requests]
    model.generate_batch(prompts[:2], config(4), bounds)
    synchronize(bench.device)
    began = time.perf_counter()
    found = model.generate_batch(prompts, config(each), bounds)
    synchronize(bench.device)
    seconds = time.perf_counter() - began
    tokens = sum(len(output.generated_tokens) for output in found.values())
    del model
    gc.collect()
    expected = each * len(requests)
    if tokens < expected:
        return {"failed": f"{tokens} of {expected} tokens came"}
    return {"requests": len(requests), "tokens": tokens, "tokens_per_s": tokens / seconds}
