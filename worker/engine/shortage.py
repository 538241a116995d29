"""What the engine does where memory is short: whatever can wait or be computed again, makes room.

First go copies that are kept in case they are of use; then the newest sequence waits until another
has left. One that is alone leaves the engine: another worker may have the room.
"""

from __future__ import annotations

import logging

import torch

from worker.engine.ahead import Ahead
from worker.engine.holding import Holding
from worker.engine.model_runner import ModelRunner
from worker.engine.prefix_cache import PrefixCache
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence

log = logging.getLogger("unbroken.engine")


class Shortage:
    """Makes room among the sequences of an engine.

    Args:
        runner: has their rows.
        scheduler: knows them.
        prefixes: has copies of what ended.
        ahead: may have a step of theirs in flight.
        holding: may have logits of theirs.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        prefixes: PrefixCache,
        ahead: Ahead,
        holding: Holding,
    ) -> None:
        self._runner, self._scheduler, self._prefixes = runner, scheduler, prefixes
        self._ahead, self._holding = ahead, holding

    def make_room(self, newest: Sequence) -> Sequence | None:
        """Make room after a forward that had none: drop copies, or have the newest sequence wait.

        Returns:
            The sequence that has to leave, since it is alone; None if all stay.
        """
        alone, live = None, len(self._scheduler.live)
        if not self.spare():
            if live == 1:
                alone = newest
            else:
                log.warning("memory is short: a sequence waits", extra={"running": live})
                self._ahead.forget(newest)
                self._runner.scrub(newest.slot)  # nobody has looked at its numbers yet
                for source, sequence in self._scheduler.put_back(newest):
                    self._runner.move(source, sequence)
        torch.cuda.empty_cache()  # without CUDA it does nothing
        return alone

    def begin_anew(self) -> Sequence | None:
        """Have all wait, one of them until another has left: nobody knows what their rows hold.

        Returns:
            As `make_room` does.
        """
        live = self._scheduler.live
        log.warning("memory is short: what runs is computed anew", extra={"running": len(live)})
        for sequence in live:
            self._ahead.forget(sequence)
        self._holding.unpark()
        self._scheduler.put_all_back()
        spared = self.spare()
        if self._runner.bucketed is None:
            self._runner.cache.release()
        else:  # which stays where it is
            for row in range(len(live)):
                self._runner.scrub(row)
        return live[0] if len(live) == 1 and not spared else None

    def spare(self) -> bool:
        """Drop what is kept in case it comes again; tell whether rows were among it.

        What an encoder made does not count: a prompt that is tried again makes it again.
        """
        self._runner.pieces.visuals.drop()
        self._runner.encoded.clear()
        return self._prefixes.clear()
