"""How workers learn that one of them died long before its leases run out.

Each holds a subscription, its lifeline. The kernel closes it with the process, whatever ended it,
and keeps it open for one that is merely slow or frozen. So one that Redis no longer knows is dead.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as RedisConnectionError

from shared import keys
from shared.store import FAILED, Outage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from redis.asyncio import Redis

    from shared.fleet import Fleet

log = logging.getLogger("unbroken.lifeline")

PING_SECONDS = 5.0
"""A lifeline that has been silent for so long is tried; one that stays so is made anew."""

AGAIN_SECONDS = 0.05
"""Pause before a lifeline that broke is made anew; twice as long after each try in vain."""

MAX_PAUSE_SECONDS = 2.0
"""Longest such pause: a Redis that refuses subscribers is not asked more often."""

LOOK_SECONDS = 0.25

MISSES = 3
"""Looks in a row that must miss a lifeline: one that only breaks is back long before."""

WATCHED = 8
"""How many others a worker watches, so that its looks cost the same in a fleet of any size."""


class Lifeline:
    """This process's own subscription, on a connection of its own.

    Args:
        redis: the client whose server and credentials it uses.
        worker_id: whose lifeline it is.
    """

    def __init__(self, redis: Redis, worker_id: str) -> None:
        self._pool, self._channel = redis.connection_pool, keys.lifeline(worker_id)
        self.breaks = 0
        """How often it has ended; counted before it is made anew."""
        self._pause = AGAIN_SECONDS

    async def run(self) -> None:
        """Hold it until cancelled, and make it anew whenever it breaks."""
        outage = Outage(log, "no lifeline")
        while True:
            connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                await self._hold(connection, outage)
            except FAILED as error:
                outage.begins(error)
            finally:
                self.breaks += 1
                await connection.disconnect(nowait=True)
            pause, self._pause = self._pause, min(2 * self._pause, MAX_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    async def _hold(self, connection: Any, outage: Outage) -> None:
        """Subscribe, and wait for the end; nothing is ever published there.

        Raises:
            RedisError: Redis is away, is silent, or refuses.
        """
        await connection.connect()
        await connection.send_command("SUBSCRIBE", self._channel, check_health=False)
        waiting = True
        while True:
            if await connection.read_response(timeout=PING_SECONDS) is not None:
                outage.over()
                self._pause, waiting = AGAIN_SECONDS, False
            elif waiting:
                raise RedisConnectionError("Redis is silent.")
            else:
                await connection.send_command("PING", check_health=False)
                waiting = True


class Watch:
    """Looks whether others hold their lifelines, and frees the sessions of those that died.

    It believes only in an end: a lifeline that it has seen, and that has gone since, while its own
    went on. So a Redis that restarts, and loses all of them, proves nothing.

    Args:
        worker_id: who looks.
        fleet: the register of workers.
        lifeline: the looker's own.
    """

    def __init__(self, worker_id: str, fleet: Fleet, lifeline: Lifeline) -> None:
        self._id, self._fleet, self._lifeline = worker_id, fleet, lifeline
        self._breaks = lifeline.breaks
        self._others: list[str] = []
        self._missed: dict[str, int] = {}  # whom it has seen -> how many looks missed it since

    async def look(self) -> None:
        """Look once; to be repeated every `LOOK_SECONDS`."""
        asked = [self._id, *{*self._others, *self._missed}]
        known, held = await self._fleet.lifelines(asked)
        self._others = neighbours(known, self._id)
        if self._lifeline.breaks != self._breaks or self._id not in held:
            self._breaks = self._lifeline.breaks
            self._missed.clear()  # theirs may have broken with ours, and be on their way back
            return
        for other in asked[1:]:
            if other in held:
                self._missed[other] = 0
            elif other in self._missed:
                self._missed[other] += 1
                if self._missed[other] >= MISSES:
                    await self._bury(other)

    async def _bury(self, worker_id: str) -> None:
        freed = await self._fleet.bury(worker_id)
        del self._missed[worker_id]
        level = logging.WARNING if freed else logging.INFO  # one that stopped leaves nothing
        log.log(level, "a worker is gone", extra={"worker": worker_id, "freed": freed})


def neighbours(worker_ids: Iterable[str], own: str) -> list[str]:
    """Return whom a worker watches: those behind it, in the ring of all."""
    ring = sorted({*worker_ids, own})
    place = ring.index(own)
    return [*ring[place + 1 :], *ring[:place]][:WATCHED]
