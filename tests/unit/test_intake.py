"""How many sessions a worker takes while its engine has not begun those that it has."""

from types import SimpleNamespace

import pytest

from worker import intake
from worker.intake import AT_ONCE, PATIENCE_SECONDS, RECENT_SECONDS, Intake


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves on: `clock.now`, seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(intake.time, "monotonic", lambda: clock.now)
    return clock


def test_a_few_are_taken_until_the_engine_begins_them(clock):
    """Each that begins, or leaves without having begun, makes room for another."""
    found = Intake()
    for number in range(AT_ONCE):
        assert found.room() == AT_ONCE - number
        found.take(f"s{number}")
    found.send("s0")
    assert (found.room(), found.changed.is_set()) == (0, False)
    found.begin("s0")
    assert (found.room(), found.changed.is_set()) == (1, True)
    found.changed.clear()
    found.leave("s1")
    assert (found.room(), found.changed.is_set()) == (2, True)
    found.leave("s0")
    assert found.room() == 2


def test_an_engine_that_begins_many_gets_many(clock):
    """As many may be on their way as it has begun lately; a repeated word counts once."""
    found = Intake()
    for number in range(3 * AT_ONCE):
        found.take(f"s{number}")
        found.send(f"s{number}")
        found.begin(f"s{number}")
        found.begin(f"s{number}")
    assert found.room() == 3 * AT_ONCE
    clock.now += RECENT_SECONDS
    assert found.room() == AT_ONCE


def test_slow_media_keep_nobody_out_for_long_but_a_slow_engine_does(clock):
    """What waits for the engine had better wait where another worker can take it."""
    found = Intake()
    for number in range(AT_ONCE):
        found.take(f"s{number}")
    found.send("s0")
    clock.now += PATIENCE_SECONDS
    assert found.room() == AT_ONCE - 1
    found.send("s1")
    assert found.room() == AT_ONCE - 2
    clock.now += 3600
    assert found.room() == AT_ONCE - 2
    found.take("s0")  # claimed again
    assert found.room() == AT_ONCE - 2
    found.begin("s0")  # as the engine says of its former run
    assert found.room() == AT_ONCE - 2
