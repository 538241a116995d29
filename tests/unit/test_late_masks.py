"""Rows whose mask comes late: they alone wait, and a mask that breaks ends its row alone."""

from __future__ import annotations

import threading
import time

import pytest

from tests.engine_kit import Driver, Engine
from tests.grammar_kit import form, prompt, run, sampling
from worker.engine import holding
from worker.engine.engine import GRAMMAR_FAILED
from worker.engine.masks import Masks
from worker.engine.messages import Abort

pytestmark = pytest.mark.timeout(120)  # compiling in earnest, where others compute too


def test_a_late_mask_holds_nobody_else(loaded, monkeypatch):
    """Rows without a grammar get their tokens while a mask is computed; the row loses nothing."""
    work = prompt(form(), 7), sampling(max_tokens=40)
    alone = run(Engine(loaded, 1), work).ids(1)
    opened, compute = threading.Event(), Masks._compute

    def compute_later(masks, matcher):
        assert opened.wait(60)
        return compute(masks, matcher)

    monkeypatch.setattr(Masks, "_compute", compute_later)
    monkeypatch.setattr(holding, "MASK_SECONDS", 0.0)
    engine = Engine(loaded, 8)
    driver = Driver(engine)
    try:
        driver.add(1, *work)
        driver.add(2, prompt(None, 1), sampling(max_tokens=20, ignore_eos=True))
        if compilation := engine.scheduler.find(1).constraint.compiling:
            compilation.future.result(60)
        while not driver.said.get(2) or driver.last(2).finish is None:
            driver.step()
        assert driver.ids(1) == []
    finally:
        opened.set()
    driver.drain()
    assert driver.ids(1) == alone


FAULTS = {"breaks": RuntimeError, "lacks memory": MemoryError}


@pytest.mark.parametrize("end", ["comes", "breaks", "lacks memory", "aborted"])
def test_a_late_mask_holds_its_own_row_alone(loaded, monkeypatch, end):
    """Rows with quick masks come to their ends, and the wait for a late one is had once."""
    work = prompt(form(), 7), sampling(max_tokens=40)
    alone = run(Engine(loaded, 1), work).ids(1)
    opened, compute, first = threading.Event(), Masks._compute, []

    def compute_later(masks, matcher):
        first.append(matcher)
        if matcher is first[0] and not opened.is_set():
            assert opened.wait(60)
            if end in FAULTS:
                raise FAULTS[end]
        return compute(masks, matcher)

    monkeypatch.setattr(Masks, "_compute", compute_later)
    monkeypatch.setattr(holding, "MASK_SECONDS", 1.0)
    engine = Engine(loaded, 8)
    driver = Driver(engine)
    driver.add(1, *work)
    while not first:
        driver.step()
    driver.add(2, prompt(form(), 8), sampling())
    driver.add(3, prompt(None, 1), sampling(max_tokens=60, ignore_eos=True))
    try:
        began = time.monotonic()
        while any(not driver.said.get(h) or driver.last(h).finish is None for h in (2, 3)):
            driver.step()
        assert time.monotonic() - began < 20  # 60 steps
        assert driver.ids(1) == []
        if end == "aborted":
            engine.handle(Abort(1))
    finally:
        opened.set()
    driver.drain()
    if end in ("comes", "lacks memory"):  # in another step there is some
        assert driver.ids(1) == alone
    elif end == "breaks":
        assert driver.last(1).error == ("generation_failed", GRAMMAR_FAILED)
    else:
        assert 1 not in driver.said
