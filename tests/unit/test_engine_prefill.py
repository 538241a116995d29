"""Prefill in chunks, in packs and from the prefix cache: the tokens are those of `generate()`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from shared.protocol import SamplingParams
from tests.engine_kit import CONTEXT, GREEDY, Driver, config, image_prompt, oracle, text_prompt
from worker.engine import prefix_cache
from worker.engine.engine import Engine
from worker.engine.loader import LoadError, load
from worker.engine.messages import Cancel, Limits, Prompt

pytestmark = pytest.mark.timeout(120)  # real models, on machines that may be busy
SMALL = Limits(prefix_bytes=2**24, chunk_tokens=16)
ENDLESS = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)


@pytest.fixture(scope="module", params=["float64", "float32"])
def loaded(request, demo_model):
    return load(config(demo_model, dtype=request.param), lambda *_: None)


@pytest.fixture(scope="module")
def exact(demo_model):
    return load(config(demo_model), lambda *_: None)


def start(loaded, limits=SMALL, batch=8) -> Driver:
    return Driver(Engine(loaded, batch, limits=limits))


def watched(driver, monkeypatch) -> list[list[tuple[int, int]]]:
    """Record each prefill: handles and sizes of its chunks."""
    prefill, seen = driver.engine.runner.prefill, []

    def recorded(chunks):
        seen.append([(chunk.sequence.handle, chunk.count) for chunk in chunks])
        return prefill(chunks)

    monkeypatch.setattr(driver.engine.runner, "prefill", recorded)
    return seen


def known(prompt: Prompt, name: str = "a picture") -> Prompt:
    return dataclasses.replace(prompt, media=name)


def longer(prompt: Prompt, more: list[int]) -> Prompt:
    """The prompt's next turn: the same beginning, and more text."""
    tensors = dict(prompt.tensors)
    if tensors:
        kinds = tensors["mm_token_type_ids"]
        tensors["mm_token_type_ids"] = np.pad(kinds, ((0, 0), (0, len(more))))
    return dataclasses.replace(prompt, input_ids=[*prompt.input_ids, *more], tensors=tensors)


def test_prompts_in_chunks_and_packs_give_the_tokens_of_generate(loaded):
    """Long, short and image prompts arrive while others run, at 16 tokens of prefill a step."""
    prompts = [text_prompt(70), text_prompt(5), image_prompt(loaded, 1, 8), text_prompt(33)]
    prompts += [text_prompt(3), image_prompt(loaded, 2, 4), text_prompt(18, 9), text_prompt(40)]
    driver = start(loaded)
    for handle, prompt in enumerate(prompts):
        driver.add(handle, prompt)
        if handle % 2:
            driver.step()
    driver.drain()
    for handle, prompt in enumerate(prompts):
        assert driver.ids(handle) == oracle(loaded, prompt)
        assert driver.last(handle).cached_tokens == 0


def test_a_long_prompt_never_stalls_the_running_streams(exact, monkeypatch):
    """While 100 tokens are computed 16 at a time, each step gives the running streams a token."""
    driver = start(exact)
    driver.add(1, text_prompt(5), ENDLESS)
    driver.step()
    seen = watched(driver, monkeypatch)
    driver.add(2, text_prompt(100))
    for _ in range(7):
        driver.step()
    assert [size for step in seen for _, size in step] == [16] * 6 + [4]
    assert driver.said[1][-1].completion_tokens == 8
    assert driver.last(2).completion_tokens == 1
    driver.engine.handle(Cancel(1, "requested"))
    driver.drain()
    assert driver.ids(2) == oracle(exact, text_prompt(100))


def test_short_prompts_share_a_forward(exact, monkeypatch):
    """What arrives together is prefilled together, up to the budget of a step."""
    driver = start(exact)
    seen = watched(driver, monkeypatch)
    for handle in range(4):
        driver.add(handle, text_prompt(6, handle))
    driver.drain()
    assert seen == [[(0, 6), (1, 6), (2, 4)], [(2, 2), (3, 6)]]


def test_the_next_turn_of_a_conversation_computes_only_what_is_new(loaded, monkeypatch):
    """Prompt and answer come again with more text: the same tokens as without the prefix cache."""
    driver = start(loaded, Limits(prefix_bytes=2**24))
    first = text_prompt(40)
    driver.add(1, first)
    driver.drain()
    turn = longer(first, [*driver.ids(1), 17, 29, 31])
    seen = watched(driver, monkeypatch)
    driver.add(2, turn)
    driver.drain()
    expected = oracle(loaded, turn)
    assert driver.ids(2) == expected
    assert driver.last(2).cached_tokens == len(turn.input_ids) - 4
    assert seen == [[(2, 4)]]


def test_the_same_picture_is_computed_once(loaded, monkeypatch):
    """An image prompt comes again, ends otherwise, and comes with another image."""
    driver = start(loaded, Limits(prefix_bytes=2**24))
    picture = known(image_prompt(loaded, seed=5, side=8))
    driver.add(1, picture)
    driver.drain()
    size = len(picture.input_ids)
    seen = watched(driver, monkeypatch)
    other = dataclasses.replace(
        image_prompt(loaded, seed=6, side=8), input_ids=picture.input_ids, media="another"
    )
    prompts = {2: picture, 3: longer(picture, [20, 21, 22]), 4: other}
    for handle, prompt in prompts.items():
        driver.add(handle, prompt)
        driver.drain()
        assert driver.ids(handle) == oracle(loaded, prompt)
    assert [driver.last(n).cached_tokens for n in prompts] == [size - 1, size, 0]
    assert seen == [[(2, 1)], [(3, 3)], [(4, size)]]


def test_a_picture_of_unknown_content_is_never_used_again(exact):
    """Without an identity of its media, a prompt neither gives nor takes a prefix."""
    driver = start(exact, Limits(prefix_bytes=2**24))
    first = image_prompt(exact, seed=1, side=8)
    other = dataclasses.replace(image_prompt(exact, seed=2, side=8), input_ids=first.input_ids)
    for handle, prompt in ((1, first), (2, other)):
        driver.add(handle, prompt)
    driver.drain()
    for handle, prompt in ((1, first), (2, other)):
        assert driver.last(handle).cached_tokens == 0
        assert driver.ids(handle) == oracle(exact, prompt)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_choices_of_a_request_share_one_prefill(exact, kind, monkeypatch):
    """Siblings, that come at once, compute the prompt's last token each, and draw as if alone."""
    prompt = text_prompt(40) if kind == "text" else known(image_prompt(exact, 3, 8))
    size = len(prompt.input_ids)
    driver = start(exact, Limits(prefix_bytes=2**24))
    seen = watched(driver, monkeypatch)
    choices = {n: SamplingParams(temperature=1, seed=50 + n, max_tokens=9) for n in range(4)}
    for handle, sampling in choices.items():
        driver.add(handle, prompt, sampling)
    driver.drain()
    assert sum(count for step in seen for _, count in step) == size + 3
    for handle, sampling in choices.items():
        alone = start(exact, Limits())
        alone.add(9, prompt, sampling)
        assert driver.ids(handle) == alone.drain().ids(9)


def test_what_is_kept_of_ended_sequences_is_bounded(exact):
    """The least recently used goes first, and no more bytes are held than allowed."""
    token = start(exact).engine.runner.cache.token_bytes
    driver = start(exact, Limits(prefix_bytes=160 * token))  # a quarter is for encoders
    one = SamplingParams(temperature=0, max_tokens=1)
    prompts = [text_prompt(50, seed) for seed in range(3)]
    for handle, number in enumerate((0, 1, 0, 2, 0, 1)):
        driver.add(handle, prompts[number], one)
        driver.drain()
        assert driver.engine.prefixes.size <= 120 * token
    assert [driver.last(n).cached_tokens for n in range(6)] == [0, 0, 49, 0, 49, 0]


def test_a_cancel_in_the_middle_of_a_prefill_ends_it_at_once(exact):
    """The sequence answers with its reason, and leaves nothing to the others behind it."""
    driver = start(exact)
    driver.add(1, text_prompt(100))
    driver.add(2, text_prompt(30))
    driver.step()
    driver.step()
    driver.engine.handle(Cancel(1, "requested"))
    driver.drain()
    assert driver.last(1).cancelled == "requested"
    assert driver.ids(1) == []
    assert driver.ids(2) == oracle(exact, text_prompt(30))


def test_a_full_cache_makes_the_next_ones_wait(exact):
    """With room for 130 tokens, two sequences of up to 60 run at once; nothing fails for memory."""
    token = start(exact).engine.runner.cache.token_bytes
    driver = start(exact, Limits(cache_bytes=130 * token))
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    for handle in range(5):
        driver.add(handle, text_prompt(30, handle), sampling)
    most = 0
    while not driver.engine.idle:
        driver.step()
        plan = driver.engine.runner.cache.plan
        assert plan.rows * plan.capacity <= 130
        most = max(most, len(driver.engine.scheduler.live))
    assert most == 2
    for handle in range(5):
        expected = oracle(exact, text_prompt(30, handle))[:20]  # ends with the model's own end
        assert driver.ids(handle)[: len(expected)] == expected


def test_the_cache_bounds_the_context(exact):
    """A prompt that can never fit is told so; a cache without room serves no model."""
    token = start(exact).engine.runner.cache.token_bytes
    driver = start(exact, Limits(cache_bytes=100 * token))
    assert driver.engine.loaded.context_length == 100 < CONTEXT
    driver.add(1, text_prompt(100))
    driver.drain()
    assert driver.last(1).error[0] == "context_length_exceeded"
    with pytest.raises(LoadError, match="Not enough memory for the cache"):
        start(exact, Limits(cache_bytes=5 * token))


def test_a_row_of_nans_is_not_kept(exact):
    """A prompt whose numbers are not finite fails again, and does not fail the next one."""
    driver = start(exact)
    good = known(image_prompt(exact, seed=5, side=8))
    pixels = np.full_like(good.tensors["pixel_values"], np.nan)
    bad = dataclasses.replace(good, tensors={**good.tensors, "pixel_values": pixels})
    driver.add(1, bad, GREEDY)
    driver.drain()
    assert driver.last(1).error[0] == "generation_failed"
    driver.add(2, good, GREEDY)
    driver.drain()
    assert driver.last(2).cached_tokens == 0
    assert driver.ids(2) == oracle(exact, good)


def test_a_look_up_costs_the_same_however_much_is_kept(exact, monkeypatch):
    """Of two dozen ended conversations, only the one that begins alike is compared."""
    driver = start(exact, Limits(prefix_bytes=2**26))
    one = SamplingParams(temperature=0, max_tokens=1)
    for handle in range(24):
        driver.add(handle, text_prompt(40, handle), one)
    driver.drain()
    compared = []
    usable = prefix_cache._usable
    monkeypatch.setattr(
        prefix_cache, "_usable", lambda *args: compared.append(args) or usable(*args)
    )
    driver.add(24, longer(text_prompt(40, 13), [5, 6]), one)
    driver.drain()
    assert driver.last(24).cached_tokens == 40
    assert len(compared) == 1
