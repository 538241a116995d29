"""Prompts with media in pieces, beside running streams: the tokens are those of `generate()`."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch

from shared.protocol import SamplingParams
from tests.engine_kit import (
    CONTEXT,
    GREEDY,
    Driver,
    alone,
    config,
    image_prompt,
    oracle,
    record_all,
)
from tests.engine_kit import text_prompt as text
from worker.engine import chunk_step, prefill_step, visuals
from worker.engine.engine import Engine
from worker.engine.loader import load
from worker.engine.messages import Abort, Cancel, Limits, Prompt
from worker.engine.model_runner import ModelRunner
from worker.engine.pace import LEAST_TOKENS, Pace
from worker.engine.sequence import Chunk, Sequence

pytestmark = pytest.mark.timeout(120)  # real models, on machines that may be busy
ENDLESS = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)


def start(loaded, chunk_tokens=6, prefix_bytes=0, batch=8) -> Driver:
    """Start an engine that has made all its records, as one that runs has after some requests."""
    engine = Engine(loaded, batch, limits=Limits(None, prefix_bytes, chunk_tokens))
    record_all(engine.runner)
    return Driver(engine)


def album(loaded, seed: int = 0) -> Prompt:
    """Two pictures with a video of two moments between them, and text around each."""
    draw, settings = np.random.default_rng(seed), loaded.model.config
    image, video = settings.image_token_id, settings.video_token_id
    ids: list[int] = []
    for token, count in ((image, 9), (video, 4), (video, 4), (image, 4)):
        ids += draw.integers(10, 600, 5).tolist()
        ids += [settings.vision_start_token_id, *[token] * count, settings.vision_end_token_id]
    ids += draw.integers(10, 600, 4).tolist()
    kinds = [[{image: 1, video: 2}.get(i, 0) for i in ids]]
    tensors = {
        "pixel_values": draw.standard_normal((36 + 16, 1536)).astype(np.float32),
        "image_grid_thw": np.array([[1, 6, 6], [1, 4, 4]]),
        "pixel_values_videos": draw.standard_normal((32, 1536)).astype(np.float32),
        "video_grid_thw": np.array([[2, 4, 4]]),
        "mm_token_type_ids": np.array(kinds, dtype=np.int32),
    }
    return Prompt(ids, tensors)


def behind(ids: list[int], prompt: Prompt, media: str) -> Prompt:
    """The prompt behind more text."""
    kinds = np.pad(prompt.tensors["mm_token_type_ids"], ((0, 0), (len(ids), 0)))
    tensors = {**prompt.tensors, "mm_token_type_ids": kinds}
    return dataclasses.replace(
        prompt, input_ids=[*ids, *prompt.input_ids], tensors=tensors, media=media
    )


class Gate:
    """Holds the model's encoder back until it is opened; counts its runs."""

    def __init__(self, loaded):
        self.open, self.runs = threading.Event(), 0
        self._hook = loaded.model.base_model.visual.register_forward_pre_hook(self._wait)

    def _wait(self, *_):
        self.runs += 1
        assert self.open.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open.set()
        self._hook.remove()


@pytest.fixture(scope="module")
def wide(demo_model):
    return load(config(demo_model, dtype="float32"), lambda *_: None)


@pytest.mark.parametrize("size", [1, 5, 16, 512])
def test_media_in_pieces_of_any_size_give_the_tokens_of_generate(loaded, size):
    """Pictures and videos, several in a prompt, cut anywhere, while others run."""
    prompts = [text(9), image_prompt(loaded, 1, 8), album(loaded), text(40), album(loaded, 3)]
    driver = start(loaded, size)
    for handle, prompt in enumerate(prompts):
        driver.add(handle, prompt)
        driver.step()
    driver.drain()
    for handle, prompt in enumerate(prompts):
        assert driver.ids(handle) == oracle(loaded, prompt)


def test_a_picture_is_computed_in_pieces_of_the_budget(loaded, monkeypatch):
    """No forward takes more tokens than the step may, whatever is among them."""
    driver = start(loaded, 6)
    prefill, sizes = driver.engine.runner.prefill, []
    monkeypatch.setattr(
        driver.engine.runner,
        "prefill",
        lambda chunks: sizes.append(sum(c.count for c in chunks)) or prefill(chunks),
    )
    driver.add(1, album(loaded))
    driver.drain()
    assert sum(sizes) == len(album(loaded).input_ids)
    assert max(sizes) == 6


def test_streams_go_on_while_a_picture_is_encoded(loaded):
    """As long as the encoder takes, each step gives the others a token; then all is as ever."""
    prompt = album(loaded)
    driver = start(loaded, 512)
    driver.add(1, text(5), ENDLESS)
    driver.step()
    with Gate(loaded) as gate:
        driver.add(2, prompt)
        for _ in range(20):
            driver.step()
        assert driver.said[1][-1].completion_tokens == 21
        assert 2 not in driver.said
        [waiting] = driver.engine.scheduler.prefilling
        assert waiting.length == 6  # the text in front of the first picture is there
        gate.open.set()
        while 2 not in driver.said:
            driver.step()
    driver.engine.handle(Cancel(1, "requested"))
    driver.drain()
    assert driver.ids(2) == oracle(loaded, prompt)


def test_a_step_beside_others_begins_an_encoder_or_computes_a_piece(loaded):
    """Both would take too long between two tokens of a running stream; nothing is put off twice."""
    driver = start(loaded, 512)
    driver.add(1, text(5), ENDLESS)
    driver.step()
    with Gate(loaded) as gate:
        driver.add(2, image_prompt(loaded, 1))
        driver.add(3, image_prompt(loaded, 2))
        seen = []
        for _ in range(3):
            driver.step()
            row = driver.engine.scheduler.find(2)
            begun = [driver.engine.scheduler.find(n).visuals is not None for n in (2, 3)]
            seen.append((row.length, *begun))
        gate.open.set()
        driver.engine.handle(Cancel(1, "requested"))
        driver.drain()
    ahead = seen[1][0]
    assert ahead > 0
    assert seen == [(0, True, False), (ahead, True, False), (ahead, True, True)]


def test_one_picture_that_two_ask_for_at_once_is_encoded_once(loaded):
    """The second finds the first one's encoder at work, behind another text."""
    picture = image_prompt(loaded, 4, 8)
    prompts = [behind([20 + n] * (4 + n), picture, "a picture") for n in range(2)]
    driver = start(loaded, 512, 2**24)
    driver.add(9, text(5), ENDLESS)
    driver.step()
    with Gate(loaded) as gate:
        for handle, prompt in enumerate(prompts):
            driver.add(handle, prompt)
        for _ in range(3):
            driver.step()
        gate.open.set()
        while not (driver.said.keys() >= {0, 1}):
            driver.step()
        assert gate.runs == 1
    driver.engine.handle(Cancel(9, "requested"))
    driver.drain()
    for handle, prompt in enumerate(prompts):
        assert driver.ids(handle) == oracle(loaded, prompt)


@pytest.mark.parametrize("command", [Cancel(2, "requested"), Abort(2)])
@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_one_that_leaves_between_its_pieces_leaves_nothing(loaded, command, steps):
    """Cancelled or handed over at any piece: those beside and behind it have their tokens."""
    driver = start(loaded)
    driver.add(1, text(7))
    driver.step()
    driver.add(2, album(loaded))
    driver.add(3, album(loaded, 5))
    for _ in range(steps):
        driver.step()
    driver.engine.handle(command)
    driver.drain()
    assert driver.ids(1) == oracle(loaded, text(7))
    assert driver.ids(2) == []
    assert driver.ids(3) == oracle(loaded, album(loaded, 5))


def test_what_nobody_waits_for_is_not_encoded(loaded):
    """Of pictures that come and go while another is encoded, none takes the encoder's time."""
    driver = start(loaded, 512)
    driver.add(1, text(5), ENDLESS)
    driver.step()
    with Gate(loaded) as gate:
        driver.add(2, image_prompt(loaded, 1))
        driver.step()
        for handle in range(3, 8):
            driver.add(handle, image_prompt(loaded, handle))
            driver.step()
            driver.engine.handle(Abort(handle))
        driver.engine.handle(Cancel(1, "requested"))
        gate.open.set()
        driver.drain()
        assert gate.runs == 1
    assert driver.ids(2) == oracle(loaded, image_prompt(loaded, 1))


def test_a_lack_of_memory_between_two_pieces_begins_the_prompt_anew(loaded, monkeypatch):
    """It waits for the other's end, and has the tokens of `generate()` then."""
    driver = start(loaded)
    prefill = driver.engine.runner.prefill

    def narrow(chunks):
        if len(driver.engine.scheduler.live) > 1 and chunks[0].sequence.length > 12:
            raise torch.OutOfMemoryError
        return prefill(chunks)

    monkeypatch.setattr(driver.engine.runner, "prefill", narrow)
    driver.add(1, text(4))
    driver.step()
    driver.add(2, album(loaded))
    driver.drain()
    assert driver.ids(1) == oracle(loaded, text(4))
    assert driver.ids(2) == oracle(loaded, album(loaded))


@pytest.mark.parametrize("size", [4, 512])
def test_a_prompt_with_media_goes_on_over_any_seam(loaded, size):
    """After a crash, what is known is computed in pieces, and the rest is the undisturbed text."""
    prompt = album(loaded, 2)
    sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=9, ignore_eos=True)
    whole = alone(loaded, prompt, sampling)
    driver = start(loaded, size, batch=16)
    for seam in range(len(whole)):
        driver.add(seam, prompt, sampling, whole[:seam])
    driver.drain()
    for seam in range(len(whole)):
        assert whole[:seam] + driver.ids(seam) == whole


@pytest.mark.parametrize("name", ["pixel_values", "image_grid_thw", "mm_token_type_ids"])
def test_bad_media_fail_their_own_sequence_beside_others(loaded, name):
    """An encoder that raises, positions that do not fit, placeholders without features."""
    wrong = {
        "pixel_values": np.zeros((3, 5), np.float32),
        "image_grid_thw": np.array([[1, 4, 6]]),
        "mm_token_type_ids": np.array([[0, 1, 1, *[0] * 20]], np.int32),
    }
    bad = image_prompt(loaded, 2)
    bad = dataclasses.replace(bad, tensors={**bad.tensors, name: wrong[name]})
    driver = start(loaded)
    driver.add(1, text(6))
    driver.step()
    driver.add(2, bad)
    driver.add(3, image_prompt(loaded, 3))
    driver.drain()
    assert driver.last(2).error[0] == "generation_failed"
    assert driver.ids(1) == oracle(loaded, text(6))
    assert driver.ids(3) == oracle(loaded, image_prompt(loaded, 3))


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_a_recorded_piece_gives_the_forwards_bits(loaded, wide, kind):
    """Pieces of text and media of other sizes and places than those it was compared at."""
    runner = Engine(loaded if kind == "float64" else wide, 4).runner
    record_all(runner)
    assert [runner.pieces.pieces.has(kind) for kind in ("", "image", "video")] == [True] * 3
    prompt, found = album(loaded, 1), {}
    for recorded in (True, False):
        if not recorded:  # the same mask, without the record
            runner.pieces.pieces.forget()
            plain = runner.pieces.pieces._plain
            runner.pieces.pieces._plain = lambda *a, short, plain=plain: plain(*a)
        row = Sequence(1, prompt, GREEDY, frozenset(), CONTEXT)
        row.slot = 2
        runner.reserve([row])
        found[recorded] = []
        for size in (4, 2, 7, 11, 3, 2, 13, len(prompt.input_ids) - 42):
            found[recorded].append(runner.prefill([Chunk(row, size)]))
    assert row.length == len(prompt.input_ids)
    for one, other in zip(found[True], found[False], strict=True):
        assert torch.equal(one, other)


def test_a_record_that_leaves_the_row_as_it_was_is_dropped(loaded, monkeypatch):
    """The next piece's logits would be wrong, not this one's."""
    update = chunk_step._LentRow.update

    def forgetful(layer, *states, **options):
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        return update(layer, *states, **options)

    monkeypatch.setattr(chunk_step._LentRow, "update", forgetful)
    runner = Engine(loaded, 2).runner
    record_all(runner)
    assert not runner.pieces.pieces.has()


def test_a_model_that_cannot_take_pieces_has_its_media_whole(loaded, monkeypatch):
    """Where pieces give something else than the whole prompt, they are not used."""
    right = visuals.Visuals.features

    def swapped(self, start, end):
        found = right(self, start, end)
        return {kind: part.like([t.flip(0) for t in part.tensors]) for kind, part in found.items()}

    monkeypatch.setattr(visuals.Visuals, "features", swapped)
    driver = start(loaded)
    assert not driver.engine.runner.pieces.visuals.works
    driver.add(1, image_prompt(loaded, 1))
    driver.drain()
    assert driver.ids(1) == oracle(loaded, image_prompt(loaded, 1))


def test_other_models_are_not_asked(loaded, monkeypatch):
    """One that the check's picture cannot be made for is served whole."""
    monkeypatch.setattr(prefill_step, "_made_up", lambda model: model.no_such_thing)
    driver = start(loaded)
    assert not driver.engine.runner.pieces.visuals.works
    driver.add(1, album(loaded))
    driver.drain()
    assert driver.ids(1) == oracle(loaded, album(loaded))


def test_where_rounding_matters_a_prompt_is_not_cut_by_the_clock(demo_model):
    """Exact in bfloat16: media whole, and pieces of text that depend on nothing but the text."""
    half = load(config(demo_model, dtype="bfloat16"), lambda *_: None)
    runner = ModelRunner(half.model, 2, CONTEXT, replay=True)
    runner.verify()
    row = Sequence(1, image_prompt(half, 1), GREEDY, frozenset(), CONTEXT)
    assert not runner.takes_pieces(row)
    assert not runner.on_time
    assert not runner.due(0)


def test_the_pace_is_what_a_step_can_bear():
    """Prefills of 2 ms and 0.1 ms a token, beside decode steps of 10 ms: 25 ms in all."""
    pace = Pace(512)
    assert pace.tokens == 512
    for _ in range(40):
        pace.decoded(0.010)
        pace.prefilled(40, 0.006)
        pace.prefilled(90, 0.011)
    assert pace.tokens == pytest.approx((25 - 10 - 2) / 0.1, abs=1)


def test_one_slow_forward_says_little():
    """The machine's load makes a step slow now and then; the pace stays in sight of what it was."""
    pace = Pace(512)
    for _ in range(40):
        pace.decoded(0.010)
        pace.prefilled(40, 0.006)
        pace.prefilled(90, 0.011)
    before = pace.tokens
    pace.prefilled(60, 5.0)
    pace.decoded(5.0)
    assert before / 3 < pace.tokens < before * 3


@pytest.mark.parametrize(("fixed", "least"), [(0.001, LEAST_TOKENS), (0.02, 100)])
def test_a_pace_is_never_so_low_that_forwards_run_for_next_to_no_tokens(fixed, least):
    """Where even a forward without tokens is too long for a step, it takes half as much more."""
    pace = Pace(512)
    for _ in range(40):
        pace.decoded(0.001)
        for tokens in (40, 90, 300):
            pace.prefilled(tokens, fixed + 0.0001 * tokens)
    assert pace.tokens == pytest.approx(least, abs=1)
