"""What the engine's tests share: prompts, a driver of its steps, `generate()` to compare with."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from shared.protocol import SamplingParams
from worker.engine.torchvision_shim import prepare_torchvision

prepare_torchvision()  # before anything imports transformers
# ruff: noqa: E402

from worker.engine.engine import Engine
from worker.engine.messages import Add, EngineConfig, Output, Prompt

CONTEXT = 400
GREEDY = SamplingParams(temperature=0, max_tokens=20)


def config(folder, **changes) -> EngineConfig:
    base = EngineConfig(str(folder), None, "auto", "float64", False, 8, CONTEXT, 1)
    return dataclasses.replace(base, **changes)


def text_prompt(length: int, seed: int = 0) -> Prompt:
    ids = np.random.default_rng((seed, length)).integers(10, 600, length)
    return Prompt(ids.tolist())


def image_prompt(loaded, seed: int = 0, side: int = 6) -> Prompt:
    """A picture of `side` by `side` patches between two pieces of text."""
    draw = np.random.default_rng(seed)
    settings = loaded.model.config
    places = [settings.image_token_id] * (side * side // 4)
    before, after = draw.integers(10, 600, 7).tolist(), draw.integers(10, 600, 5).tolist()
    ids = [*before, settings.vision_start_token_id, *places, settings.vision_end_token_id, *after]
    kinds = [[int(i == settings.image_token_id) for i in ids]]
    tensors = {
        "pixel_values": draw.standard_normal((side * side, 3 * 2 * 16 * 16)).astype(np.float32),
        "image_grid_thw": np.array([[1, side, side]]),
        "mm_token_type_ids": np.array(kinds, dtype=np.int32),
    }
    return Prompt(ids, tensors)


def oracle(loaded, prompt: Prompt, max_tokens: int = GREEDY.max_tokens) -> list[int]:
    """What `generate()` of the model's authors answers, greedily."""
    ids = torch.tensor([prompt.input_ids])
    tensors = {name: torch.from_numpy(array) for name, array in prompt.tensors.items()}
    answer = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **tensors,
        do_sample=False,
        max_new_tokens=max_tokens,
    )
    return answer[0, ids.shape[1] :].tolist()


def record_all(runner) -> None:
    """Make all records of prompts' pieces, which an engine's process makes in its lulls."""
    while runner.due(0):
        runner.record()


class Driver:
    """Steps an engine and gathers what each sequence said."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.said = engine, dict[int, list[Output]]()

    def add(self, handle, prompt, sampling=GREEDY, generated=()):
        """Send a sequence."""
        self.engine.handle(Add(handle, prompt, sampling, tuple(generated)))

    def step(self):
        """Take one step."""
        for output in self.engine.step():
            self.said.setdefault(output.handle, []).append(output)

    def drain(self):
        """Step until nothing is left to do."""
        while not self.engine.idle:
            self.step()
        return self

    def ids(self, handle) -> list[int]:
        """All token ids a sequence has said."""
        return [i for o in self.said.get(handle, ()) for piece in o.pieces for i in piece.ids]

    def text(self, handle) -> str:
        """All text a sequence has said."""
        return "".join(p.text for o in self.said.get(handle, ()) for p in o.pieces)

    def last(self, handle) -> Output:
        """A sequence's newest output."""
        return self.said[handle][-1]


def alone(loaded, prompt, sampling=GREEDY) -> list[int]:
    driver = Driver(Engine(loaded, 1))
    driver.add(1, prompt, sampling)
    return driver.drain().ids(1)
