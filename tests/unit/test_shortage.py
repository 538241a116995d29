"""Memory that is short for a moment, at each place of a step: nothing is lost, and who waits."""

import msgspec
import pytest
import torch

from shared.protocol import SamplingParams
from tests.engine_kit import GREEDY, Driver, alone, image_prompt, text_prompt
from worker.engine.drawing import Drawer
from worker.engine.engine import Engine
from worker.engine.holding import Holding
from worker.engine.logprobs import Scorer
from worker.engine.memory import lacks_memory
from worker.engine.messages import OUT_OF_MEMORY, Cancel, Limits
from worker.engine.penalties import _Table
from worker.engine.sampler import Sampler

REAL = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
SCORED = SamplingParams(
    temperature=1.0, seed=3, max_tokens=12, ignore_eos=True, logprobs=2, frequency_penalty=0.5
)
KEPT = Limits(prefix_bytes=2**24)


def work(loaded):
    """Three sequences of different kinds: handle, prompt, sampling."""
    return (
        (1, text_prompt(20), SCORED),
        (2, image_prompt(loaded), msgspec.structs.replace(SCORED, logprobs=None, seed=5)),
        (3, text_prompt(33), GREEDY),
    )


@pytest.fixture(scope="module")
def undisturbed(loaded):
    """What those three say, left alone."""
    driver = Driver(Engine(loaded, 8))
    for one in work(loaded):
        driver.add(*one)
    return driver.drain()


def start(driver, loaded):
    """Send those three, and step until all of them run."""
    for one in work(loaded):
        driver.add(*one)
    while len(driver.engine.scheduler.running) < 3:
        driver.step()


def scores(driver, handle):
    return [s for o in driver.said[handle] for piece in o.pieces for s in piece.scores]


def failing(monkeypatch, owner, name, *, at, error=REAL):
    """Have one call of a method fail, the `at`-th from now."""
    method, calls = getattr(owner, name), []

    def call(*args, **options):
        calls.append(1)
        if len(calls) == at:
            raise error
        return method(*args, **options)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [  # the first is for the whole batch, the third for the second row by itself
        (Drawer, "_draw", [1, 3]),
        (Sampler, "sample", [1, 3]),
        (Scorer, "score", [1, 3]),
        (_Table, "advance", [1, 3]),
        (Holding, "sift", [1]),
    ],
)
def test_a_token_that_cannot_be_drawn_for_want_of_memory_is_drawn_later(
    loaded, undisturbed, monkeypatch, owner, name, calls
):
    """Text and log probabilities are those of an undisturbed run, wherever memory was short."""
    driver = Driver(Engine(loaded, 8, limits=KEPT))
    start(driver, loaded)
    for at in calls:
        failing(monkeypatch, owner, name, at=at)
    driver.drain()
    for handle in (1, 2, 3):
        assert driver.last(handle).error is None
        assert driver.ids(handle) == undisturbed.ids(handle)
        assert scores(driver, handle) == scores(undisturbed, handle)


def test_all_begin_anew_but_one_that_waits_for_another_to_leave(loaded, undisturbed, monkeypatch):
    """Where nobody knows what rows hold, they are computed again, the newest one later."""
    driver = Driver(Engine(loaded, 8))
    start(driver, loaded)
    failing(monkeypatch, Holding, "sift", at=1)
    driver.step()
    assert driver.engine.scheduler.live == []
    while 3 not in [s.handle for s in driver.engine.scheduler.live]:
        driver.step()
    assert driver.last(1).finish or driver.last(2).finish
    driver.drain()
    assert [driver.ids(n) for n in (1, 2, 3)] == [undisturbed.ids(n) for n in (1, 2, 3)]


def test_one_that_is_alone_leaves_with_what_it_has_said(loaded, monkeypatch):
    """It says that there is no memory here; elsewhere it goes on as if nothing had happened."""
    whole = alone(loaded, text_prompt(20), SCORED)
    driver = Driver(Engine(loaded, 8))
    driver.add(1, text_prompt(20), SCORED)
    for _ in range(4):
        driver.step()
    failing(monkeypatch, Sampler, "sample", at=1)
    failing(monkeypatch, Sampler, "sample", at=2)
    driver.drain()
    assert driver.last(1).error[0] == OUT_OF_MEMORY
    assert driver.ids(1) == whole[:4]
    driver.add(2, text_prompt(20), SCORED, whole[:4])
    assert driver.drain().ids(2) == whole[4:]


def test_copies_of_what_ended_make_room_before_anybody_waits(loaded, undisturbed, monkeypatch):
    """A forward without memory is tried again once they are dropped; nobody lost a place."""
    driver = Driver(Engine(loaded, 8, limits=KEPT))
    driver.add(9, text_prompt(50), GREEDY)
    driver.drain()
    assert driver.engine.prefixes.size > 0
    start(driver, loaded)
    failing(monkeypatch, driver.engine.runner, "decode", at=1)
    driver.step()
    assert (driver.engine.prefixes.size, driver.engine.runner.encoded.size) == (0, 0)
    assert [s.handle for s in driver.engine.scheduler.live] == [1, 2, 3]
    driver.drain()
    assert [driver.ids(n) for n in (1, 2, 3)] == [undisturbed.ids(n) for n in (1, 2, 3)]


@pytest.mark.parametrize("owner", ["forward", "draw"])
def test_one_that_is_put_back_hears_of_its_cancel(loaded, monkeypatch, owner):
    """It does not wait for room only to end then."""
    driver = Driver(Engine(loaded, 8))
    for handle in (1, 2):
        driver.add(handle, text_prompt(20 + handle), SCORED)
    driver.step()
    driver.step()
    if owner == "forward":
        failing(monkeypatch, driver.engine.runner, "decode", at=1)
    else:
        failing(monkeypatch, Holding, "sift", at=1)
    driver.engine.handle(Cancel(2, "requested"))
    driver.step()
    assert driver.last(2).cancelled == "requested"
    assert driver.engine.scheduler.find(2) is None
    assert driver.engine.cancelled == {}
    driver.drain()
    assert driver.last(1).finish == "length"


def test_who_leaves_alone_leaves_all_rooms_to_others(loaded, monkeypatch):
    """Once nobody is there, nobody has to wait for another to leave."""
    driver = Driver(Engine(loaded, 8))
    driver.add(1, text_prompt(20))
    driver.step()
    failing(monkeypatch, Holding, "sift", at=1)
    driver.step()
    assert driver.last(1).error[0] == OUT_OF_MEMORY
    for handle in (2, 3):
        driver.add(handle, text_prompt(20 + handle))
    driver.step()
    driver.step()
    assert len(driver.engine.scheduler.live) == 2


def test_numbers_of_a_prompt_that_is_put_back_reach_nobody(loaded, monkeypatch):
    """What a part of it has left in its row is wiped: nobody had looked at it."""
    driver = Driver(Engine(loaded, 8, limits=Limits(chunk_tokens=8)))
    driver.add(1, text_prompt(100), msgspec.structs.replace(GREEDY, max_tokens=4))
    driver.drain()
    driver.add(2, text_prompt(40))
    driver.add(3, text_prompt(41))
    while not any(s.handle == 3 and s.length >= 24 for s in driver.engine.scheduler.prefilling):
        driver.step()
    cache = driver.engine.runner.cache
    with torch.inference_mode():
        for layer in cache.layers:
            layer.row(1, 24)[1].fill_(torch.nan)  # as a broken prompt does
    failing(monkeypatch, driver.engine.runner, "prefill", at=1)
    driver.step()
    assert [s.handle for s in driver.engine.scheduler.live] == [2]
    assert all(bool(layer.row(1, 24)[1].isfinite().all()) for layer in cache.layers)


def test_room_that_was_not_there_is_reserved_again(loaded, monkeypatch):
    """A prompt that was admitted, and had no row then, gets one before it is computed."""
    driver = Driver(Engine(loaded, 8, limits=KEPT))
    driver.add(9, text_prompt(50), GREEDY)
    driver.drain()
    failing(monkeypatch, driver.engine.runner.cache, "reserve", at=1)
    driver.add(1, text_prompt(300), GREEDY)
    driver.drain()
    assert driver.ids(1) == alone(loaded, text_prompt(300))


def test_a_sequence_that_cannot_be_taken_in_leaves(loaded, monkeypatch):
    """Without memory to set it up it is for another worker, not a failed prompt."""
    driver = Driver(Engine(loaded, 8))
    failing(monkeypatch, driver.engine.drawer.sampler, "check", at=1, error=MemoryError())
    driver.add(1, text_prompt(5))
    driver.drain()
    assert driver.last(1).error[0] == OUT_OF_MEMORY


def test_errors_for_want_of_memory_are_told_from_others():
    """By their type, or by the words of torch's allocators and of C++."""
    short = (MemoryError(), torch.OutOfMemoryError(), REAL, RuntimeError("std::bad_alloc"))
    assert all(map(lacks_memory, short))
    assert lacks_memory(RuntimeError("not enough memory: you tried to allocate 9 bytes"))
    assert not lacks_memory(RuntimeError("The size of tensor a (3) must match"))
    assert not lacks_memory(ValueError("can't allocate memory"))
