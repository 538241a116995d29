"""The scheduler under random arrivals and ends; no model, no torch."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.protocol import SamplingParams
from worker.engine.messages import Prompt
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence

CONTEXT = 64
CACHE = 160  # tokens

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, CONTEXT - 1), st.integers(1, 80)),
        st.tuples(st.just("arrive"), st.integers(1, CONTEXT - 1), st.integers(1, 80)),
        st.tuples(st.just("arrive"), st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.just("admit"), st.just(0), st.just(0)),
        st.tuples(st.just("join"), st.just(0), st.just(0)),
        st.tuples(st.just("remove"), st.integers(0, 50), st.just(0)),
        st.tuples(st.just("put back"), st.integers(0, 50), st.just(0)),
    ),
    min_size=20,
    max_size=60,
)


def fits(rows: int, tokens: int) -> bool:
    return rows * tokens <= CACHE


class Model:
    """A scheduler, and what its rows hold: by row, the handle whose keys and values lie there."""

    def __init__(self, most: int) -> None:
        self.most, self.rows = most, dict[int, int]()
        self.scheduler = Scheduler(most, fits)
        self.waiting: list[int] = []
        self.handles = 0

    def add(self, prompt: int, tokens: int) -> None:
        self.handles += 1
        params = SamplingParams(max_tokens=tokens)
        made = Sequence(self.handles, Prompt([1] * prompt), params, frozenset(), CONTEXT)
        self.scheduler.add(made)
        self.waiting.append(self.handles)

    def admit(self) -> None:
        sequence = self.scheduler.admit()
        if sequence is not None:
            assert sequence.handle == self.waiting.pop(0)
            self.rows[sequence.slot] = sequence.handle

    def take_out(self, number: int, *, back: bool) -> None:
        live = self.scheduler.live
        if not live:
            return
        sequence = live[number % len(live)]
        take = self.scheduler.put_back if back else self.scheduler.remove
        del self.rows[sequence.slot]
        for source, moved in take(sequence):
            assert self.rows.pop(source) == moved.handle
            assert moved.slot not in self.rows, "a move must not overwrite a row in use"
            self.rows[moved.slot] = moved.handle
        if back:
            self.waiting.insert(0, sequence.handle)

    def check(self) -> None:
        live = self.scheduler.live
        assert [s.slot for s in live] == list(range(len(live)))
        assert self.rows == {s.slot: s.handle for s in live}
        assert len(live) <= self.most
        assert not live or fits(len(live), max(s.reach for s in live))


@settings(max_examples=100, deadline=None)
@given(ACTIONS, st.integers(4, 6))
def test_rows_stay_dense_and_within_the_cache(actions, most):
    """Whatever comes and goes, each has its own row, and all of them can grow to their end."""
    model = Model(most)
    for what, first, second in actions:
        if what in ("add", "arrive"):
            model.add(first, second)
        if what in ("admit", "arrive"):
            model.admit()
        elif what == "join" and model.scheduler.prefilling:
            model.scheduler.join()
        elif what in ("remove", "put back"):
            model.take_out(first, back=what == "put back")
        model.check()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, CONTEXT - 1), st.integers(1, 80)), max_size=30))
def test_everybody_runs_in_order_of_arrival(arrivals):
    """Nobody starves and nobody overtakes: all are admitted, the oldest first."""
    model = Model(4)
    for prompt, tokens in arrivals:
        model.add(prompt, tokens)
    order = []
    while not model.scheduler.idle:
        while (sequence := model.scheduler.admit()) is not None:
            order.append(sequence.handle)
            model.rows[sequence.slot] = sequence.handle
            model.scheduler.join()
        model.take_out(len(order), back=False)
    assert order == list(range(1, len(arrivals) + 1))


def test_a_waiting_sequence_can_be_removed():
    """A cancelled sequence that never ran leaves the queue to the others."""
    model = Model(1)
    model.add(3, 3)
    model.add(4, 4)
    assert model.scheduler.remove(model.scheduler.find(1)) == []
    assert model.scheduler.admit().handle == 2
    assert model.scheduler.find(1) is None


def test_what_goes_on_comes_before_what_begins():
    """A stream that was taken over waits behind its like alone, and for no row of its own."""
    scheduler = Scheduler(1)
    for handle, known in ((1, ()), (2, ()), (3, (7,)), (4, ()), (5, (7, 8))):
        params = SamplingParams(max_tokens=9)
        scheduler.add(Sequence(handle, Prompt([1]), params, frozenset(), CONTEXT, known))
    order = []
    while (sequence := scheduler.admit()) is not None:
        order.append(sequence.handle)
        scheduler.remove(scheduler.join())
    assert order == [3, 5, 1, 2, 4]
