"""Which sequences wait and which run: first come, first served, up to the largest batch."""

from __future__ import annotations

from worker.engine.sequence import Sequence


class Scheduler:
    """The waiting queue and the running batch.

    `running[i].slot == i` always: rows of the cache stay dense, so that a decode step takes the
    first `len(running)` rows as they are.

    Args:
        max_batch_size: most sequences that run at once.
    """

    def __init__(self, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self.running: list[Sequence] = []
        self._waiting: dict[int, Sequence] = {}  # by handle, in order of arrival
        self._room = max_batch_size  # less after a lack of memory, until a sequence has left

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self._waiting

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the waiting queue."""
        self._waiting[sequence.handle] = sequence

    def admit(self) -> Sequence | None:
        """Move the oldest waiting sequence into the batch, if there is one and room for it.

        The caller prefills it at once. One per step, so that the running streams stall no longer
        than one prompt takes.
        """
        if not self._waiting or len(self.running) >= self._room:
            return None
        sequence = self._waiting.pop(next(iter(self._waiting)))
        sequence.slot = len(self.running)
        self.running.append(sequence)
        return sequence

    def find(self, handle: int) -> Sequence | None:
        """Return a sequence, waiting or running, by its handle."""
        waiting = self._waiting.get(handle)
        return waiting or next((s for s in self.running if s.handle == handle), None)

    def remove(self, sequence: Sequence) -> Sequence | None:
        """Take a sequence out; return the one that must move into its row of the cache, if any.

        The returned sequence, which was the last of the batch, has its new `slot` already; its
        keys and values are still in row `len(running)`.
        """
        if sequence.slot < 0:
            self._waiting.pop(sequence.handle, None)
            return None
        self._room = self.max_batch_size
        return self._take_out(sequence)

    def put_back(self, sequence: Sequence) -> Sequence | None:
        """Take a running sequence out for want of memory; it is the next to be admitted.

        Nobody is, until another has left. Returns what `remove` does.
        """
        moved = self._take_out(sequence)
        sequence.length = 0
        self._waiting = {sequence.handle: sequence, **self._waiting}
        self._room = max(1, len(self.running))
        return moved

    def _take_out(self, sequence: Sequence) -> Sequence | None:
        hole, sequence.slot = sequence.slot, -1
        last = self.running.pop()
        if last is sequence:
            return None
        self.running[hole] = last
        last.slot = hole
        return last
