"""`Relay`: carries the logs of all the sessions that this process's clients read.

Two connections serve them all: one is subscribed to the followed sessions' bells, whose rings carry
the new events; on the other the hub reads what no ring has brought. Events are rendered once and
written to the clients' connections, so that no task wakes for one. A ring may get lost, so a sweep
reads all followed sessions once a second.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from gateway.channel import HUB_EVENTS, Channel, in_parts, next_entries, push_all
from shared import keys
from shared.errors import UnbrokenError
from shared.presence import REFRESH_SECONDS
from shared.session_log import Entry
from shared.store import UNAVAILABLE
from shared.tasks import stop
from shared.wire import connect, pack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from gateway.channel import Item, Viewer, Writes
    from shared.presence import Presence
    from shared.session_log import SessionLog
    from shared.store import Store
    from shared.wire import Wire

log = logging.getLogger("unbroken.relay")

SWEEP_SECONDS = 1.0

OUTAGE_SECONDS = 0.5
"""Pause before Redis is asked again after it failed."""

SILENCE_SECONDS = 5.0
"""A connection that does not answer for so long is opened anew."""

CATCH_UP = 128
"""Events that a follower which is behind reads at once."""

HUB_SESSIONS = 256
"""Sessions that the hub reads at once."""

RINGS = 8
"""Rings rendered before their events are written: more at once are cheaper, and later."""

BELL_PREFIX = len(keys.EVENT_BELL)
PING = pack("PING")


class Relay:
    """The reading side of all live sessions in this process.

    Args:
        bell: the Redis that the two connections go to; closed with the relay.
        session_log: the logs.
        presence: how to say whom clients watch, which is said every second.
    """

    def __init__(self, bell: Store, session_log: SessionLog, presence: Presence) -> None:
        self._bell = bell
        self._log, self._presence = session_log, presence
        self._channels: dict[bytes, Channel] = {}
        self._rung: dict[Channel, None] = {}
        self._reading: dict[bytes, Channel] = {}  # what the hub waits for
        self._asked_at = 0.0  # monotonic: when the hub asked for what it waits for
        self._alone: set[Channel] = set()  # one of their logs is none
        self._wires: dict[str, Wire] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def followed(self) -> int:
        """How many sessions are followed."""
        return len(self._channels)

    def start(self) -> None:
        """Begin to listen."""
        for loop in (self._keep_bell, self._keep_hub, self._sweep, self._refresh_presence):
            self._tasks.append(asyncio.create_task(_restarting(loop), name=loop.__name__))

    async def close(self) -> None:
        """Stop listening, and close the subscription's client."""
        await stop(*self._tasks)
        await self._bell.close()

    async def deliver(self, session_id: str, viewer: Viewer) -> None:
        """Have the session's events written to a client, from its place to the session's end.

        Counts as watching while it runs.

        Raises:
            UnbrokenError: `events_expired`, where events behind the viewer are no longer kept.
        """
        channel = self._join(session_id)
        try:
            while not viewer.ended:
                events = await self._next(channel, viewer.index, viewer.seen)
                if events:
                    await viewer.write(events)
                elif events is not None and viewer.index == channel.last:
                    await viewer.stay(channel.crowd(viewer.frames))
                else:
                    self._ring(channel)
                    await viewer.wait_silently(OUTAGE_SECONDS)
        finally:
            channel.left_by(viewer)
            self._leave(channel)

    async def follow(
        self, session_id: str, after: int, idle_seconds: float
    ) -> AsyncIterator[list[Entry]]:
        """Yield the session's events above index `after`, in order, as they come, without end.

        An empty list says that nothing came for `idle_seconds`, or that Redis is away. The caller
        stops at the terminal event. Counts as watching while it is iterated.

        Raises:
            UnbrokenError: `events_expired`, where events after `after` are no longer kept.
        """
        channel = self._join(session_id)
        try:
            while True:
                events = await self._next(channel, after, after)
                if events:
                    yield [Entry(index, data) for index, data in enumerate(events, after + 1)]
                    after += len(events)
                elif events is None:
                    await asyncio.sleep(OUTAGE_SECONDS)
                    yield []
                elif not await channel.changed(idle_seconds):
                    yield []
        finally:
            self._leave(channel)

    def _join(self, session_id: str) -> Channel:
        """Follow a session until `_leave`: no context manager, which each stream would hold."""
        name = session_id.encode()
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = Channel(session_id)
            self._tell_bell("SUBSCRIBE", channel)
        channel.followers += 1
        return channel

    def _leave(self, channel: Channel) -> None:
        channel.followers -= 1
        if channel.followers == 0 and self._channels.get(channel.name) is channel:
            del self._channels[channel.name]
            self._tell_bell("UNSUBSCRIBE", channel)

    async def _next(self, channel: Channel, after: int, exists: int) -> list[bytes] | None:
        """Return events above `after`, from memory or else from the log; empty at the log's end.

        None where there should be some, since there is one at index `exists`, or where Redis is
        away: ask again later.
        """
        events = channel.since(after)
        if events is None or (not events and after < exists):
            try:
                events = await self._catch_up(channel, after)
            except UNAVAILABLE:
                return None
        if not events and channel.gone:
            raise _expired()
        return events if events or after >= exists else None

    async def _catch_up(self, channel: Channel, after: int) -> list[bytes]:
        """Read from the log; at its end, let the hub go on from there."""
        entries = await self._log.read(channel.session_id, after, CATCH_UP)
        if [entry.index for entry in entries] != list(range(after + 1, after + 1 + len(entries))):
            raise _expired()
        if channel.last is None and len(entries) < CATCH_UP:
            channel.last = after + len(entries)
            self._ring(channel)  # what was appended since the read
        return [entry.data for entry in entries]

    async def _keep_bell(self) -> None:
        """Keep the connection open on which rings come."""
        wire = self._wires["bell"] = await connect(self._bell.redis, self._on_bell)
        try:
            for channels in in_parts(self._channels.values()):
                self._tell_bell("SUBSCRIBE", *channels)
            await wire.closed
        finally:
            self._wires.pop("bell", None)
            wire.abort()

    async def _keep_hub(self) -> None:
        """Keep the connection open on which the hub reads."""
        wire = self._wires["hub"] = await connect(self._bell.redis, _ignore)
        try:
            self._ring(*self._channels.values())
            self._say_watched(list(self._channels.values()))
            await wire.closed
        finally:
            self._wires.pop("hub", None)
            wire.abort()
            self._ring(*self._reading.values())
            self._reading = {}

    def _tell_bell(self, command: str, *channels: Channel) -> None:
        if wire := self._wires.get("bell"):
            wire.send(pack(command, *(keys.event_bell(c.session_id) for c in channels)))

    def _on_bell(self, messages: list[Any]) -> None:
        """Hand out what rings bring; let the hub read what they do not."""
        heard_at = time.monotonic()
        behind: list[Channel] = []
        for start in range(0, len(messages), RINGS):
            writes: Writes = {}
            taken = sum(self._hear(m, writes, behind) for m in messages[start : start + RINGS])
            push_all(writes, heard_at, taken)
        if behind:
            self._ring(*behind)

    def _hear(self, message: Any, writes: Writes, behind: list[Channel]) -> int:
        """Take one message off the bell; returns how many events it brought."""
        if type(message) is not list:  # the answer to a ping while nothing is followed
            return 0
        channel = self._channels.get(message[1][BELL_PREFIX:])
        if channel is not None and message[0] == b"subscribe":
            behind.append(channel)  # what was appended before is in no ring
        elif channel is not None and message[0] == b"message" and channel.last is not None:
            first, *events = message[2].split(b"\n")
            if events and channel.extend(int(first), events, writes):
                return len(events)
            behind.append(channel)
        return 0

    def _ring(self, *channels: Channel) -> None:
        self._rung.update(dict.fromkeys(channels))
        self._read()

    def _read(self) -> None:
        """Ask for the new events of the sessions that rang, unless an answer is under way."""
        wire = self._wires.get("hub")
        if wire is None or self._reading or not self._rung:
            return
        chosen = list(self._rung)[:HUB_SESSIONS]
        if suspects := self._alone.intersection(chosen):
            chosen = [suspects.pop()]
            self._alone.discard(chosen[0])
        for channel in chosen:
            del self._rung[channel]
            if channel.last is not None:
                self._reading[channel.name] = channel
        reading = self._reading.values()
        if reading:
            self._asked_at = time.monotonic()
            wire.send(next_entries(reading), self._on_entries)

    def _on_entries(self, reply: list[tuple[bytes, list[Item]]] | Exception | None) -> None:
        """Hand out what the hub has read, and read on."""
        reading, self._reading = self._reading, {}
        if isinstance(reply, Exception):
            log.warning("redis refuses to read", extra={"error": str(reply)})
            if str(reply).startswith("WRONGTYPE"):
                self._set_apart(reading)
            return  # until the next ring, or the next sweep
        writes: Writes = {}
        for name, items in reply or ():
            channel = reading[name[len(keys.EVENTS) :]]
            channel.take_entries(items, writes)
            if len(items) == HUB_EVENTS:
                self._rung[channel] = None
        push_all(writes, self._asked_at, sum(len(items) for _, items in reply or ()))
        self._read()

    def _set_apart(self, reading: Mapping[bytes, Channel]) -> None:
        """One of these is no log: read each alone, and have its followers look for themselves."""
        if len(reading) > 1:
            self._alone.update(reading.values())
            self._ring(*reading.values())
        else:
            next(iter(reading.values())).forget()

    async def _sweep(self) -> None:
        """Read all followed sessions once a second, and see that they, and Redis, are there."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            for channels in in_parts(self._channels.values()):
                self._look_after(channels)
                await asyncio.sleep(0)
            self._ring(*self._channels.values())
            for name, wire in tuple(self._wires.items()):
                wire.send(PING, *([_ignore] if name == "hub" else []))
                if time.monotonic() - wire.heard > SILENCE_SECONDS:
                    wire.abort()

    def _look_after(self, channels: Sequence[Channel]) -> None:
        """Ask whether all these sessions exist, and if not, ask for each of them."""

        def on_count(count: object) -> None:
            if count == len(channels):
                for channel in channels:
                    channel.missing = 0
            elif isinstance(count, Exception):
                log.warning("redis refuses to say what exists", extra={"error": str(count)})
            elif len(channels) > 1:
                for channel in channels:
                    self._look_after([channel])
            else:
                channels[0].miss()

        if wire := self._wires.get("hub"):
            wire.send(pack("EXISTS", *(keys.session(c.session_id) for c in channels)), on_count)

    async def _refresh_presence(self) -> None:
        """Say once a second whom clients watch."""
        while True:
            for channels in in_parts(self._channels.values()):
                self._say_watched(channels)
                await asyncio.sleep(0)
            await asyncio.sleep(REFRESH_SECONDS)

    def _say_watched(self, channels: Sequence[Channel]) -> None:
        signs = [pack(*sign) for c in channels if (sign := self._presence.sign(c.session_id))]
        if signs and (wire := self._wires.get("hub")):
            wire.send(b"".join(signs), *[_ignore] * len(signs))


def _ignore(_reply: object) -> None:
    pass


def _expired() -> UnbrokenError:
    return UnbrokenError("events_expired", "These events are no longer kept.")


async def _restarting(loop: object) -> None:
    """Run one of the relay's loops; a lost connection starts it again, a bug is logged first."""
    while True:
        try:
            await loop()  # type: ignore[operator]
        except UNAVAILABLE as error:
            log.warning("redis unavailable", extra={"error": type(error).__name__})
        except Exception:
            log.exception("relay loop failed")
        await asyncio.sleep(OUTAGE_SECONDS)
