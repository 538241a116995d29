"""Pictures that come again behind another text: their encoder runs once, and the tokens stay."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from shared.protocol import SamplingParams
from tests.engine_kit import Driver, config, image_prompt, oracle
from worker.engine.engine import Engine
from worker.engine.loader import load
from worker.engine.messages import Limits, Prompt

pytestmark = pytest.mark.timeout(120)  # a real model, on machines that may be busy
LIMITS = Limits(prefix_bytes=2**24)
TOKENS = 4
SHORT = SamplingParams(temperature=0, max_tokens=TOKENS)


@pytest.fixture(scope="module")
def loaded(demo_model):
    return load(config(demo_model), lambda *_: None)


def behind(text: list[int], prompt: Prompt, media: str) -> Prompt:
    """The prompt's picture, and what follows it, behind more text."""
    tensors = dict(prompt.tensors)
    tensors["mm_token_type_ids"] = np.pad(tensors["mm_token_type_ids"], ((0, 0), (len(text), 0)))
    ids = [*text, *prompt.input_ids]
    return dataclasses.replace(prompt, input_ids=ids, tensors=tensors, media=media)


def encoded(loaded, limits, prompts) -> tuple[int, Engine]:
    """Run the prompts one after the other, whose tokens are `generate()`'s; count encoder runs."""
    runs = []
    visual = loaded.model.base_model.visual
    engine = Engine(loaded, 4, limits=limits)
    driver = Driver(engine)
    for handle, prompt in enumerate(prompts):
        watch = visual.register_forward_hook(lambda *_: runs.append(1))
        driver.add(handle, prompt, SHORT)
        driver.drain()
        watch.remove()
        assert driver.ids(handle) == oracle(loaded, prompt, TOKENS)
    return len(runs), engine


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_picture_behind_another_text_is_encoded_once(loaded, kind):
    """Three texts before the same picture or video: one run of the encoder, the right tokens."""
    picture = image_prompt(loaded, 5, 8)
    if kind == "video":
        picture = as_video(loaded, picture)
    prompts = [behind([11 + n] * (3 + n), picture, "a picture") for n in range(3)]
    runs, engine = encoded(loaded, LIMITS, prompts)
    assert runs == 1
    assert 0 < engine.runner.encoded.size <= LIMITS.encoder_bytes


def test_other_pictures_are_not_taken_for_it(loaded):
    """What is not known to be the same, by name, is encoded for itself."""
    pictures = [image_prompt(loaded, seed, 8) for seed in (1, 2)]
    names = ["one", "two", "", ""]
    both = [behind([n + 20] * 4, pictures[n % 2], names[n]) for n in range(4)]
    runs, _ = encoded(loaded, LIMITS, both)
    assert runs == 4


def test_the_least_recently_used_goes_first_and_zero_keeps_nothing(loaded):
    """A bound of two pictures holds the two used last; with no bound at all nothing is kept."""
    pictures = [image_prompt(loaded, seed, 8) for seed in (1, 2, 3)]
    one = encoded(loaded, LIMITS, [behind([9], pictures[0], "0")])[1].runner.encoded.size
    order = (0, 1, 0, 2, 0, 1)  # the last 1 was pushed out by 2
    prompts = [behind([30 + n] * 4, pictures[m], str(m)) for n, m in enumerate(order)]
    runs, engine = encoded(loaded, Limits(prefix_bytes=4 * 2 * one), prompts)
    assert (runs, engine.runner.encoded.size) == (4, 2 * one)
    runs, engine = encoded(loaded, Limits(), prompts)
    assert (runs, engine.runner.encoded.size) == (6, 0)


def test_broken_pixels_fail_their_sequence_alone_and_are_not_kept(loaded):
    """An encoder that raises costs its own prompt; the same name serves again afterwards."""
    good = behind([40], image_prompt(loaded, 4, 8), "name")
    bad = dataclasses.replace(
        good, tensors={**good.tensors, "pixel_values": np.zeros((3, 5), np.float32)}
    )
    engine = Engine(loaded, 4, limits=LIMITS)
    driver = Driver(engine)
    driver.add(1, bad)
    driver.drain()
    assert driver.last(1).error
    assert engine.runner.encoded.size == 0
    driver.add(2, good, SHORT)
    driver.drain()
    assert driver.ids(2) == oracle(loaded, good, TOKENS)


def as_video(loaded, prompt: Prompt) -> Prompt:
    """The same patches as one moment of a video."""
    settings = loaded.model.config
    ids = [settings.video_token_id if i == settings.image_token_id else i for i in prompt.input_ids]
    kinds = np.array([[2 * int(i == settings.video_token_id) for i in ids]], dtype=np.int32)
    tensors = {
        "pixel_values_videos": prompt.tensors["pixel_values"],
        "video_grid_thw": prompt.tensors["image_grid_thw"],
        "mm_token_type_ids": kinds,
    }
    return Prompt(ids, tensors)


def test_the_cache_does_nothing_for_models_that_take_no_such_outputs(loaded, monkeypatch):
    """Older models, and other ones, get their pixels as ever."""
    engine = Engine(loaded, 4, limits=LIMITS)
    monkeypatch.setattr(engine.runner.encoded, "_takes", False)
    tensors = {"pixel_values": torch.zeros(1)}
    assert engine.runner.encoded.encode("name", tensors) is tensors
