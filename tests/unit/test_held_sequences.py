"""Sequences that wait for a grammar or a mask: they alone wait, and come to the same tokens."""

from __future__ import annotations

import threading
import time

import pytest

from tests.engine_kit import Driver, Engine
from tests.grammar_kit import ONE, content, form, heavy, prompt, run, sampling
from worker.engine import grammars, holding
from worker.engine.grammars import LONG_CHARACTERS, THREADS, Compilation
from worker.engine.messages import Abort, Cancel, Limits

pytestmark = pytest.mark.timeout(120)  # compiling in earnest, where others compute too

FREE = sampling(max_tokens=150, ignore_eos=True)
SHORT = sampling(max_tokens=15)


class Gate:
    """Compiles no grammar with `slow` in it before it is opened; knows what was begun."""

    def __init__(self, monkeypatch):
        self.opened, self.begun = threading.Event(), []
        compile_now = Compilation._compile

        def compile_later(compilation, tokenizer):
            self.begun.append(compilation.text)
            if "slow" in compilation.text:
                assert self.opened.wait(60)
            return compile_now(compilation, tokenizer)

        monkeypatch.setattr(Compilation, "_compile", compile_later)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def slow(number=0):
    """A form whose grammar waits for the gate."""
    return form({"type": "object", "properties": {f"slow{number}": ONE}, "required": ["slow0"]})


def no_memory(*_):
    raise MemoryError


def tokens_of(engine, handle):
    return len(engine.scheduler.find(handle).output_ids)


def settled(engine, handle):
    """Wait until a sequence's grammar is compiled."""
    compilation = engine.scheduler.find(handle).constraint.compiling
    if compilation is not None:
        compilation.future.result(60)


def test_others_go_on_while_a_heavy_grammar_is_compiled(loaded):
    """Each of four rows gets a token in each of the many steps that the fifth waits."""
    engine = Engine(loaded, 8)
    driver = Driver(engine)
    for handle in range(1, 5):
        driver.add(handle, prompt(None, handle), FREE)
    driver.step()
    driver.add(5, prompt(heavy("h"), 5), sampling(max_tokens=3))
    steps = 0
    while tokens_of(engine, 5) == 0 and tokens_of(engine, 1) < FREE.max_tokens - 1:
        before = [tokens_of(engine, handle) for handle in range(1, 5)]
        driver.step()
        assert [tokens_of(engine, handle) for handle in range(1, 5)] == [n + 1 for n in before]
        steps += 1
    assert steps > 5
    driver.drain()
    assert driver.last(5).finish == "length"


def test_a_grammar_is_compiled_once_for_all_choices(loaded, gate):
    """Eight sequences of one form share a compilation, and so does one that comes later."""
    engine = Engine(loaded, 8)
    driver = run(
        engine, *[(prompt(form(), 7), sampling(seed=seed, max_tokens=30)) for seed in range(8)]
    )
    assert len({content(driver, handle) for handle in range(1, 9)}) > 1
    run(engine, (prompt(form(), 8), SHORT))
    assert len(gate.begun) == 1


def test_a_light_grammar_does_not_wait_behind_heavy_ones(loaded, gate):
    """With as many slow compilations as there may be but one, a light one's answer comes."""
    engine = Engine(loaded, 8)
    driver = Driver(engine)
    for handle in range(1, THREADS):
        driver.add(handle, prompt(slow(handle)), SHORT)
    driver.add(THREADS, prompt(form(), 7), sampling())
    while not driver.said.get(THREADS) or driver.last(THREADS).finish is None:
        driver.step()
    assert driver.last(THREADS).finish == "stop"
    assert [tokens_of(engine, handle) for handle in range(1, THREADS)] == [0] * (THREADS - 1)
    gate.opened.set()
    driver.drain()


def test_a_held_row_says_what_it_says_without_waiting(loaded, gate):
    """Behind a thought, with rows on both sides that come and go meanwhile, nothing changes."""
    works = [
        (prompt(None, 1), sampling(max_tokens=12, ignore_eos=True)),
        (prompt(slow(), 4, thinking=True), sampling(thinking_budget=5, max_tokens=40)),
        (prompt(None, 3), sampling(max_tokens=30, ignore_eos=True)),
        (prompt(form(), 7), sampling(max_tokens=40)),
    ]
    engine = Engine(loaded, 8)
    driver = Driver(engine)
    for handle, work in enumerate(works, 1):
        driver.add(handle, *work)
    while any(not driver.said.get(h) or driver.last(h).finish is None for h in (1, 3, 4)):
        driver.step()
    assert tokens_of(engine, 2) == 6  # the thought, and the tag that ends it
    gate.opened.set()
    driver.drain()
    one = Engine(loaded, 1)
    for handle, work in enumerate(works, 1):
        assert driver.ids(handle) == run(one, work).ids(1), handle


def test_who_waited_waits_for_its_turn_too(loaded, gate):
    """Between the turns of a paced engine it gets no token, however ready it is."""
    engine = Engine(loaded, 8)
    driver = Driver(engine)
    driver.add(1, prompt(slow()), SHORT)
    driver.step()
    gate.opened.set()
    settled(engine, 1)
    engine.step(decode=False)
    assert tokens_of(engine, 1) == 0
    while tokens_of(engine, 1) == 0:  # its mask is computed then
        driver.step()
    assert driver.drain().last(1).finish in ("stop", "length")


@pytest.mark.parametrize("leave", [Abort, lambda h: Cancel(h, "requested")])
def test_who_leaves_is_not_compiled_for(loaded, gate, leave):
    """Its compilation is cancelled if nobody else waits for it, and it ends at once."""
    engine = Engine(loaded, 8)
    driver = Driver(engine)
    for handle in range(1, THREADS + 1):
        driver.add(handle, prompt(slow(handle)), SHORT)
    for handle in (6, 7):
        driver.add(handle, prompt(form(), handle), sampling())
    [waiting] = {engine.scheduler.find(h).constraint.compiling for h in (6, 7)}
    driver.step()
    engine.handle(leave(6))
    driver.step()
    assert engine.scheduler.find(6) is None
    assert not waiting.future.cancelled()
    engine.handle(leave(7))
    driver.step()
    assert waiting.future.cancelled()
    assert {o.finish for h in (6, 7) for o in driver.said.get(h, ())} <= {"stop"}
    gate.opened.set()
    driver.drain()
    again = run(engine, (prompt(form(), 7), sampling()))
    assert again.last(1).finish == "stop"


def test_a_cancel_just_before_a_row_is_held_ends_it(loaded, gate):
    """Between the thought's end and the first letter of the answer it is not lost."""
    engine = Engine(loaded, 8)
    driver = Driver(engine)
    driver.add(1, prompt(slow(), 4, thinking=True), sampling(thinking_budget=5, max_tokens=60))
    driver.add(2, prompt(None, 1), sampling(max_tokens=30, ignore_eos=True))
    while (row := engine.scheduler.find(1)) is None or len(row.output_ids) < 6:
        driver.step()
    assert not engine.holding.has(row)
    engine.handle(Cancel(1, "requested"))
    driver.step()
    assert engine.scheduler.find(1) is None
    assert driver.last(1).cancelled == "requested"
    driver.drain()
    assert driver.last(2).completion_tokens == 30


@pytest.mark.parametrize("fault", ["wrong", "late", "queued", "broken"])
def test_a_grammar_that_cannot_be_compiled_fails_its_sequence_alone(
    loaded, gate, fault, monkeypatch
):
    """A wrong one is the caller's error; where time or memory was short, it may come again."""
    engine = Engine(loaded, 8)
    driver = Driver(engine)
    driver.add(1, prompt(None, 1), sampling(max_tokens=40, ignore_eos=True))
    if fault == "wrong":
        driver.add(2, prompt(form({"type": "strange"})), sampling())
    elif fault == "broken":
        with monkeypatch.context() as short:
            short.setattr(Compilation, "_compile", no_memory)
            driver.add(2, prompt(slow()), sampling())
            driver.drain()
    else:
        busy = THREADS if fault == "queued" else 0
        for handle in range(3, 3 + busy):
            driver.add(handle, prompt(slow(handle)), SHORT)
        driver.add(2, prompt(slow()), sampling())
        monkeypatch.setattr(grammars, "MOST_WAITED" if busy else "MOST_SECONDS", 0.0)
    driver.drain()
    code, message, *param = driver.last(2).error
    wrong = fault == "wrong"
    assert (code, param) == ("invalid_value" if wrong else "unavailable", param[:wrong])
    assert "response_format" in message
    assert driver.last(1).completion_tokens == 40
    if fault == "broken":
        gate.opened.set()
        assert run(engine, (prompt(slow()), SHORT)).last(1).error is None


def test_long_grammars_leave_short_ones_their_threads(loaded, gate):
    """With any number of long ones under way, a short one is compiled."""
    kept = Engine(loaded, 8).tokens.grammars
    for number in range(THREADS + 1):
        kept.borrow(f'start: "slow{number}{"x" * LONG_CHARACTERS}"')
    assert not kept.borrow('start: "short"').future.result(60).is_error()


def test_a_successor_waits_for_the_grammar_too(loaded, gate):
    """What the log holds is judged once there is a grammar: complete, wrong, or to be gone on."""
    whole = run(Engine(loaded, 1), (prompt(form(), 7), sampling()))
    ids = whole.ids(1)
    engine = Engine(loaded, 8)
    driver = Driver(engine)
    slow_form = form(ONE | {"description": "slow"})
    for handle, known in enumerate((ids, ids[:5], ids[3:] * 2), 1):
        driver.add(handle, prompt(slow_form, 7), sampling(), known)
    for _ in range(5):
        driver.step()
    assert driver.said == {}
    gate.opened.set()
    driver.drain()
    assert [driver.last(h).finish for h in (1, 2, 3)] == ["stop", "stop", None]
    assert driver.ids(1) == []
    assert driver.ids(2) == ids[5:]
    assert driver.last(3).error[0] == "generation_failed"


def test_a_prompt_is_not_held_up_by_a_held_row(loaded, gate, monkeypatch):
    """Where no token can be drawn, the steps that compute a prompt's parts do not wait."""
    monkeypatch.setattr(holding, "IDLE_SECONDS", 15.0)
    engine = Engine(loaded, 8, limits=Limits(chunk_tokens=4))
    driver = Driver(engine)
    driver.add(1, prompt(slow(), 1), SHORT)
    while not engine.holding.parked:
        driver.step()
    driver.add(2, prompt(None, 2), sampling(max_tokens=1))
    began, steps = time.monotonic(), 0
    while 2 not in driver.said:
        driver.step()
        steps += 1
    assert steps >= 5
    assert time.monotonic() - began < 45
    gate.opened.set()
    driver.drain()


def test_what_is_kept_of_grammars_is_bounded(loaded, gate, monkeypatch):
    """Beyond the bound the ones used longest ago go; those in use stay."""
    monkeypatch.setattr(grammars, "MOST_KEPT", 2)
    kept = Engine(loaded, 8).tokens.grammars
    used = kept.borrow('start: "slow"')
    for number in range(4):
        one = kept.borrow(f'start: "{number}"')
        assert not one.future.result(60).is_error()
        kept.give_back(one)
    assert list(kept._kept) == [used.text, one.text]
    gate.opened.set()
    kept.give_back(used)
    assert kept.borrow(used.text) is used
