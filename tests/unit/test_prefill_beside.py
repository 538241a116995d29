"""An encoder beside the steps: whom its crash names, and what a lack of memory in it costs."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from shared.protocol import SamplingParams
from tests.engine_kit import GREEDY, Driver, image_prompt, oracle, record_all
from tests.engine_kit import text_prompt as text
from worker.engine.encoder_cache import EncoderCache
from worker.engine.engine import Engine
from worker.engine.messages import Add, Limits
from worker.engine.visuals import PATIENCE_SECONDS, Visuals

pytestmark = pytest.mark.timeout(120)  # real models, on machines that may be busy
ENDLESS = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)


class Encoder:
    """The model's encoder, held back until it is opened; notes what `look` says as it begins."""

    def __init__(self, monkeypatch, look=lambda: None):
        self.open, self.seen = threading.Event(), []
        run = EncoderCache.run

        def late(cache, tensors):
            self.seen.append(look())
            assert self.open.wait(60)
            return run(cache, tensors)

        monkeypatch.setattr(EncoderCache, "run", late)


class Watched(Driver):
    """A driver that knows what the engine's process would be blamed for."""

    def __init__(self, loaded, chunk_tokens=6):
        self.named: list[tuple[int, ...]] = []
        limits = Limits(None, 0, chunk_tokens)
        super().__init__(Engine(loaded, 8, self.named.append, limits))
        record_all(self.engine.runner)

    def begun(self):
        return {handle for handles in self.named for handle in handles}


def test_who_is_encoded_beside_others_is_named_before(loaded, monkeypatch):
    """A picture that waits behind a long text may be what the process dies of."""
    driver = Watched(loaded)
    driver.add(1, text(5), ENDLESS)
    driver.step()
    encoder = Encoder(monkeypatch, driver.begun)
    try:
        driver.add(2, text(60))
        driver.add(3, image_prompt(loaded, 3))
        driver.step()
        driver.step()  # which begins the encoder, and no forward of a prompt
        del driver.named[:]
        driver.step()
        assert [set(names) for names in driver.named if names] == [{2, 3}]
    finally:
        encoder.open.set()
    while 3 not in driver.said:
        driver.step()
    [begun] = encoder.seen
    assert 3 in begun


def test_nothing_is_encoded_beside_one_on_trial(loaded, monkeypatch):
    """What the process dies of then is the one on trial."""
    driver = Watched(loaded)
    encoder = Encoder(monkeypatch)
    encoder.open.set()
    driver.engine.handle(Add(1, text(20), GREEDY, (), trial=True))
    driver.add(2, image_prompt(loaded, 3))
    while 1 not in driver.said:
        assert encoder.seen == []
        driver.step()
    assert {names for names in driver.named if names} == {(1,)}
    driver.drain()
    assert driver.ids(2) == oracle(loaded, image_prompt(loaded, 3))


def test_an_encoder_that_runs_already_is_named_beside_one_on_trial(loaded, monkeypatch):
    """One that goes on overtakes a picture whose encoder has begun: it may be either."""
    driver = Watched(loaded)
    driver.add(1, text(5), ENDLESS)
    driver.step()
    encoder = Encoder(monkeypatch)
    try:
        driver.add(2, text(30))
        driver.add(3, image_prompt(loaded, 3))
        driver.step()
        driver.step()  # which begins the encoder
        driver.engine.handle(Add(4, text(9), GREEDY, (20,), trial=True))
        while 4 not in driver.said:
            driver.step()
        named = [names for names in driver.named if 4 in names]
        assert len(named) > 1  # its prefill, and its first step
        assert all(3 in names for names in named)
    finally:
        encoder.open.set()


def test_an_encoder_that_lacked_memory_runs_again_once_some_is_free(loaded, monkeypatch):
    """Copies are dropped for it; alone with room, its prompt does not leave the engine."""
    run, calls = EncoderCache.run, []

    def short(cache, tensors):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return run(cache, tensors)

    driver = Driver(Engine(loaded, 8, limits=Limits(None, 2**24, 512)))
    driver.add(1, text(40))
    driver.drain()  # a copy is kept, that can be spared
    monkeypatch.setattr(EncoderCache, "run", short)
    driver.add(2, image_prompt(loaded, 3))
    driver.drain()
    assert driver.last(2).error is None
    assert driver.ids(2) == oracle(loaded, image_prompt(loaded, 3))
    assert len(calls) == 2


def test_where_nothing_is_to_be_shared_no_encoder_is(loaded, monkeypatch):
    """Without a cache nobody learns by the clock that somebody asks for the same picture."""
    driver = Driver(Engine(loaded, 8, limits=Limits(None, 0, 512)))
    encoder = Encoder(monkeypatch)
    driver.add(9, text(5), ENDLESS)
    driver.step()
    picture = dataclasses.replace(image_prompt(loaded, 4), media="a picture")
    for handle in (1, 2):
        driver.add(handle, picture)
    driver.step()
    driver.step()
    encoder.open.set()
    while not (driver.said.keys() >= {1, 2}):
        driver.step()
    assert len(encoder.seen) == 2


def test_the_wait_for_an_encoder_is_no_part_of_the_pace(loaded, monkeypatch):
    """A lone picture with a slow encoder does not make later prompts' pieces smaller."""
    driver = Driver(Engine(loaded, 8))
    run, told = EncoderCache.run, []
    clock = [0.0]
    monkeypatch.setattr("worker.engine.prefill.time.perf_counter", lambda: clock[0])

    def slow(cache, tensors):
        clock[0] += 5.0
        return run(cache, tensors)

    monkeypatch.setattr(EncoderCache, "run", slow)
    monkeypatch.setattr(driver.engine.prefill.pace, "prefilled", lambda *one: told.append(one))
    driver.add(1, image_prompt(loaded, 2))
    driver.engine.handle(Add(2, image_prompt(loaded, 3), GREEDY, (), trial=True))
    driver.drain()
    assert told
    assert all(seconds < 5.0 for _, seconds in told)


def test_placeholders_that_nothing_stands_for_fail_their_prompt(loaded):
    """A prompt is not computed as if its picture were text."""
    prompt = image_prompt(loaded, 2)
    kinds = prompt.tensors["mm_token_type_ids"]
    blind = dataclasses.replace(prompt, tensors={**prompt.tensors, "mm_token_type_ids": 0 * kinds})
    driver = Driver(Engine(loaded, 8))
    driver.add(1, blind)
    driver.drain()
    assert driver.last(1).error[0] == "generation_failed"


def test_patience_with_an_encoder_begins_when_its_prompt_waits(monkeypatch):
    """Not while it stands behind another's encoder, whose time is not its own."""
    now = 0.0
    monkeypatch.setattr("worker.engine.visuals.time.monotonic", lambda: now)
    picture = Visuals(torch.zeros(3, 1, 2), 0, np.array([0, 1]), Future())
    now = 2.0 * PATIENCE_SECONDS
    assert not picture.ready
    now += 1.1 * PATIENCE_SECONDS
    assert picture.ready
