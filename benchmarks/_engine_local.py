"""Measures in a process of its own what needs no server: the engine alone, and `generate()`.

Reads jobs as JSON lines and answers each with one. `python -m benchmarks._engine_local MODEL`.
"""

from __future__ import annotations

import base64
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from worker.engine.torchvision_shim import prepare_torchvision

prepare_torchvision()
# ruff: noqa: E402

import numpy as np
import torch

from benchmarks._engine_work import messages
from shared.protocol import MediaPart, MediaRef, Message, SamplingParams, TextPart
from worker.decoder import Job, Limits, decode
from worker.engine.engine import Engine
from worker.engine.loader import load, use_threads
from worker.engine.messages import Add, EngineConfig, Prompt
from worker.engine.processor import PromptProcessor

LIMITS = Limits(10**7, 16)


class Local:
    """A model in this process, behind the engine and behind `generate()`."""

    def __init__(self, folder: Path, threads: int) -> None:
        use_threads(threads)
        config = EngineConfig(str(folder), None, "cpu", "float32", False, 64, 4096, threads)
        self.loaded = load(config, lambda *_: None)
        self.engine = Engine(self.loaded, config.max_batch_size)
        while self.engine.runner.due(0):  # as the worker's engine does in its first lulls
            self.engine.runner.record()
        self.processor = PromptProcessor(
            str(folder), None, trust_remote_code=False, max_video_frames=16
        )
        self._prompts: dict[tuple[str, int], Prompt] = {}
        self._handles = 0

    def prompt(self, workload: str, number: int) -> Prompt:
        """Return a conversation's prompt; each is made once, and outside the measured time."""
        found = self._prompts.get((workload, number))
        if found is None:
            found = self._prompts[workload, number] = self._build(messages(workload, number))
        return found

    def _build(self, conversation: list[dict[str, Any]]) -> Prompt:
        made, media = [], []
        for message in conversation:
            content = message["content"]
            parts: list[TextPart | MediaPart] = []
            for part in (
                [{"type": "text", "text": content}] if isinstance(content, str) else content
            ):
                if part["type"] == "text":
                    parts.append(TextPart(part["text"]))
                    continue
                url = part["image_url"]["url"]
                parts.append(MediaPart(MediaRef("image", url)))
                data = base64.b64decode(url.partition(",")[2])
                media.append(decode(Job("image", (data,)), LIMITS))
            made.append(Message(message["role"], tuple(parts)))
        return self.processor.build(made, media)

    def run_engine(self, prompts: list[Prompt], streams: int, tokens: int) -> dict[str, Any]:
        """Run the prompts, `streams` at a time: a new one enters as soon as one has ended."""
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        left, gaps, count, running = iter(prompts), [], 0, 0
        last: dict[int, float] = {}
        began, cpu = time.perf_counter(), time.process_time()
        for prompt in itertools.islice(left, streams):
            self._add(prompt, sampling)
            running += 1
        while running:
            outputs = self.engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.handle in last:
                    gaps.append(now - last[output.handle])
                last[output.handle] = now
                if output.finish:
                    count += output.completion_tokens
                    running -= 1
                    following = next(left, None)
                    if following is not None:
                        self._add(following, sampling)
                        running += 1
                elif output.error:
                    raise RuntimeError(output.error[1])
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return {"rate": count / seconds, "cpu_rate": count / cpu, **quantiles(gaps)}

    def fill(self, prompts: list[Prompt], tokens: int) -> None:
        """Send the prompts to the engine, and step until all of them decode."""
        for prompt in prompts:
            self._add(prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        while len(self.engine.scheduler.running) < len(prompts):
            self.engine.step()

    def _add(self, prompt: Prompt, sampling: SamplingParams) -> None:
        self._handles += 1
        self.engine.handle(Add(self._handles, prompt, sampling))

    @torch.inference_mode()
    def run_generate(self, prompts: list[Prompt], streams: int, tokens: int) -> dict[str, Any]:
        """Run the prompts through `generate()` in static batches of `streams`, padded left."""
        count, began, cpu = 0, time.perf_counter(), time.process_time()
        for at in range(0, len(prompts), streams):
            inputs = padded(prompts[at : at + streams])
            width = inputs["input_ids"].shape[1]
            answer = self.loaded.model.generate(
                **inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=0
            )
            count += answer[:, width:].numel()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return {"rate": count / seconds, "cpu_rate": count / cpu}


def padded(prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """Return a batch as the processor would make it of all the conversations at once."""
    width = max(len(prompt.input_ids) for prompt in prompts)
    room = [width - len(prompt.input_ids) for prompt in prompts]

    def left(rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor([[0] * n + row for n, row in zip(room, rows, strict=True)])

    ids = [prompt.input_ids for prompt in prompts]
    inputs = {"input_ids": left(ids), "attention_mask": left([[1] * len(row) for row in ids])}
    names = {name for prompt in prompts for name in prompt.tensors}
    for name in names:
        arrays = [prompt.tensors.get(name) for prompt in prompts]
        if name == "mm_token_type_ids":
            kinds = [
                [0] * len(row) if array is None else array[0].tolist()
                for array, row in zip(arrays, ids, strict=True)
            ]
            inputs[name] = left(kinds)
        else:
            inputs[name] = torch.from_numpy(np.concatenate([a for a in arrays if a is not None]))
    return inputs


def quantiles(gaps: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile in milliseconds."""
    ordered = sorted(gaps) or [0.0]
    return {
        "p50_ms": ordered[len(ordered) // 2] * 1000,
        "p99_ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000,
    }


def main() -> None:
    """Answer jobs: `{"what", "workload", "streams", "rounds", "tokens", "first"}`."""
    local = Local(Path(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        job = json.loads(line)
        numbers = range(job["first"], job["first"] + job["streams"] * job["rounds"])
        prompts = [local.prompt(job["workload"], number) for number in numbers]
        run = local.run_engine if job["what"] == "engine" else local.run_generate
        print(json.dumps(run(prompts, job["streams"], job["tokens"])), flush=True)


if __name__ == "__main__":
    main()
