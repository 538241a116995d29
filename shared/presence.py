"""Who is watching a session, and which sessions are to be cancelled.

Presence is an expiring key that every watcher's gateway renews; there is no counter that a crash
could leave wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

from shared import keys

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from shared.protocol import CancelReason
    from shared.store import Store

REFRESH_SECONDS = 1.0
"""How often a gateway says again which sessions its clients watch."""


class Signals(NamedTuple):
    """What a worker learns of one session: a cancel request, and whether somebody watches."""

    cancel: CancelReason | None
    watched: bool


class Presence:
    """Reads and writes the watch and cancel keys.

    Args:
        store: the Redis client.
        watch_ms: how long a session counts as watched after the last sign of a watcher; 0 for ever.
    """

    def __init__(self, store: Store, *, watch_ms: int) -> None:
        self._redis, self._watch_ms = store.redis, watch_ms

    async def watching(self, session_ids: Collection[str]) -> None:
        """Say that clients watch these sessions now. An ended session's key merely expires."""
        if not session_ids or not self._watch_ms:
            return
        async with self._redis.pipeline(transaction=False) as pipe:
            for session_id in session_ids:
                pipe.set(keys.watch(session_id), "1", px=self._watch_ms)
            await pipe.execute()

    async def signals(self, session_ids: Sequence[str]) -> dict[str, Signals]:
        """Return each session's signals, in one round trip."""
        if not session_ids:
            return {}
        names = [keys.cancel(s) for s in session_ids] + [keys.watch(s) for s in session_ids]
        values = await self._redis.mget(names)
        half = len(session_ids)
        return {
            session_id: Signals(
                cast("CancelReason", cancel.decode()) if cancel else None,
                watched is not None or not self._watch_ms,
            )
            for session_id, cancel, watched in zip(
                session_ids, values[:half], values[half:], strict=True
            )
        }
