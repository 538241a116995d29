"""Which worker goes first where a session waits: one that has fewer of them.

The bell wakes whoever has waited longest, however much it runs. Without more than that, a worker
that outlives the others ends up with nearly all sessions, and its own death hits all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.lifeline import neighbours

if TYPE_CHECKING:
    from shared.fleet import Fleet

SLACK = 2
"""Slots that a worker may have more than the lightest, and still come first: records are a second
old, and whoever is woken is fastest."""

FIRST_SECONDS = 0.05
"""How long a worker leaves what waits to lighter ones."""


class Balance:
    """Compares a worker with some others.

    Args:
        worker_id: whose turn it is about.
        fleet: the register of workers, where each one says what it runs.
    """

    def __init__(self, worker_id: str, fleet: Fleet) -> None:
        self._id, self._fleet = worker_id, fleet
        self._lightest: int | None = None

    async def look(self, model: str) -> None:
        """Read what others run that serve the same model; to be repeated every second."""
        others = neighbours(await self._fleet.ids(), self._id)
        found = await self._fleet.infos(others)
        taken = [info.taken for info in found if info.state == "ready" and info.model == model]
        self._lightest = min(taken, default=None)

    def is_heavy(self, taken: int) -> bool:
        """Whether another worker has so much less that it should come first."""
        return self._lightest is not None and taken > self._lightest + SLACK
