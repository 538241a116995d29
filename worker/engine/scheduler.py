"""Which sequences wait, are prefilled and run: first come, first served; those that go on first."""

from __future__ import annotations

from collections.abc import Callable

from worker.engine.sequence import Sequence


class Scheduler:
    """The waiting queue and the batch.

    Rows of the cache stay dense: those that run have rows 0 .. R-1 (`running[i].slot == i`), so
    that a decode step takes them as they are; those whose prompts are computed have the next ones.

    Args:
        max_batch_size: most sequences that have a row at once.
        fits: whether the cache may have so many rows of so many tokens.
    """

    def __init__(
        self, max_batch_size: int, fits: Callable[[int, int], bool] = lambda _rows, _tokens: True
    ) -> None:
        self.max_batch_size, self._fits = max_batch_size, fits
        self.running: list[Sequence] = []
        self.prefilling: list[Sequence] = []  # in order of arrival
        self._waiting: dict[int, Sequence] = {}  # by handle, in order of arrival
        self._room = max_batch_size  # less after a lack of memory, until a sequence has left

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.prefilling and not self._waiting

    @property
    def live(self) -> list[Sequence]:
        """The sequences that have a row, in order of rows."""
        return [*self.running, *self.prefilling]

    @property
    def waiting(self) -> list[Sequence]:
        """The sequences that have no row yet, the next one first."""
        return list(self._waiting.values())

    @property
    def next(self) -> Sequence | None:
        """The oldest waiting sequence, if there is room for it.

        There is where the cache can hold every sequence at its longest: none runs out of it later.
        Younger ones do not overtake one that waits for room.
        """
        live = self.live
        if not self._waiting or len(live) >= self._room:
            return None
        sequence = next(iter(self._waiting.values()))
        longest = max(s.reach for s in (*live, sequence))
        return sequence if self._fits(len(live) + 1, longest) else None

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the waiting queue, or of those in it that go on.

        A stream that stands still has been seen to run; one that begins is waited for anyhow.
        """
        self._waiting[sequence.handle] = sequence
        if sequence.output_ids:
            waiting = sorted(self._waiting.values(), key=lambda s: not s.output_ids)  # stable
            self._waiting = {s.handle: s for s in waiting}

    def admit(self) -> Sequence | None:
        """Give the next waiting sequence a row, if there is room; its prefill can begin."""
        sequence = self.next
        if sequence is not None:
            del self._waiting[sequence.handle]
            sequence.slot = len(self.running) + len(self.prefilling)
            self.prefilling.append(sequence)
        return sequence

    def join(self) -> Sequence:
        """Let the first of those that are prefilled run; its row is the next one already."""
        sequence = self.prefilling.pop(0)
        self.running.append(sequence)
        return sequence

    def find(self, handle: int) -> Sequence | None:
        """Return a sequence, waiting or with a row, by its handle."""
        waiting = self._waiting.get(handle)
        return waiting or next((s for s in self.live if s.handle == handle), None)

    def remove(self, sequence: Sequence) -> list[tuple[int, Sequence]]:
        """Take a sequence out; return which others must move to another row of the cache.

        They have their new `slot` already, and stand with their old row, in the order to move in.
        """
        if sequence.slot >= 0:
            self._room = self.max_batch_size
            return self._take_out(sequence)
        self._waiting.pop(sequence.handle, None)
        if not self.live:  # nobody is there who could leave later
            self._room = self.max_batch_size
        return []

    def put_back(self, sequence: Sequence) -> list[tuple[int, Sequence]]:
        """Take a sequence out for want of memory; it is the next to be admitted.

        Nobody is, until another has left. Returns what `remove` does.
        """
        moves = self._take_out(sequence)
        sequence.length = sequence.cached = 0
        sequence.visuals = None
        self._waiting = {sequence.handle: sequence, **self._waiting}
        self._room = max(1, len(self.running) + len(self.prefilling))
        return moves

    def put_all_back(self) -> None:
        """Take all sequences out for want of memory; they are the next to be admitted, in order.

        Until one has left, all but one of them may have a row. What the rows hold is lost.
        """
        live = sorted(self.live, key=lambda s: s.handle)
        self.running, self.prefilling = [], []
        for sequence in live:
            sequence.slot, sequence.length, sequence.cached = -1, 0, 0
            sequence.visuals = None
        self._waiting = {s.handle: s for s in live} | self._waiting
        self._room = max(1, len(live) - 1)

    def _take_out(self, sequence: Sequence) -> list[tuple[int, Sequence]]:
        hole, sequence.slot = sequence.slot, -1
        moves = []
        if hole < len(self.running):
            last = self.running.pop()
            if last is not sequence:
                self.running[hole] = last
                moves.append((last.slot, last))
                last.slot = hole
        else:
            self.prefilling.remove(sequence)
        for slot, other in enumerate(self.prefilling, len(self.running)):
            if other.slot != slot:
                moves.append((other.slot, other))
                other.slot = slot
        return moves
