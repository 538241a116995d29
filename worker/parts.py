"""What all sessions of a worker share, and the ways in which one leaves it without an end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from worker.intake import Intake

if TYPE_CHECKING:
    from shared.queue import SessionQueue
    from shared.session_log import SessionLog
    from worker.engine_client import EngineClient
    from worker.prompts import PromptBuilder
    from worker.publisher import Publisher

NOT_NOW = ("unavailable", "model_not_ready")
"""Codes of what a worker cannot do for the moment, whatever the request."""

FREE_CLAIMS = 2
"""A session claimed more often, without a new token, is prepared and tried in a turn of its own."""


class LeaseLost(Exception):  # noqa: N818 - a signal, not a fault
    """The session is another worker's now, or gone: drop it without a word."""


class GiveBack(Exception):  # noqa: N818 - see LeaseLost
    """The session goes back to the queue: the engine died, or another worker shall go on with it.

    Args:
        blameless: the session cannot be the reason.
        waited: it could not begin here: it has waited for a worker all along.
        lacked_memory: this worker has none for it, and another one shall try.
    """

    def __init__(
        self, *, blameless: bool = True, waited: bool = False, lacked_memory: bool = False
    ) -> None:
        super().__init__()
        self.blameless, self.waited, self.lacked_memory = blameless, waited, lacked_memory


class Parts:
    """What all sessions of a worker share."""

    def __init__(
        self,
        *,
        log: SessionLog,
        queue: SessionQueue,
        publisher: Publisher,
        prompts: PromptBuilder,
        engine: EngineClient,
        max_attempts: int = 3,
    ) -> None:
        self.log, self.queue, self.publisher = log, queue, publisher
        self.prompts, self.engine = prompts, engine
        self.max_attempts = max_attempts
        self.intake = Intake()
        self.trials = asyncio.Lock()
        """Held by the session whose turn it is; see `Turn`."""


class Turn:
    """A session's turn to be tried alone, from its preparation until its engine has said something.

    Those that wait for theirs have done nothing, and cannot be blamed for what kills the worker.

    Args:
        trials: shared by all sessions of the worker.
    """

    def __init__(self, trials: asyncio.Lock) -> None:
        self._trials, self._held = trials, False

    async def take(self, interrupted: asyncio.Future[None]) -> None:
        """Wait for the turn, unless the session is interrupted before; `leave` comes after it."""
        waiting = asyncio.ensure_future(self._trials.acquire())
        either: set[asyncio.Future[Any]] = {waiting, interrupted}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if waiting.done():
                self._held = True
            else:
                waiting.cancel()

    def leave(self) -> None:
        """End the turn, if it is ours."""
        if self._held:
            self._held = False
            self._trials.release()
