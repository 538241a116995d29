"""One followed session in this process: its newest events, and the clients the hub writes to."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from gateway import meter
from gateway.sse import KEEP_ALIVE
from shared import keys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Collection, Hashable, Iterable, Iterator, Sequence

    from gateway.connection import Connection
    from gateway.sse import Rendering
TAIL = 64
"""Events kept in memory per followed session, up to twice as many between two clean-ups; a follower
further behind reads the log by itself."""

LARGE = 4096
"""Bytes from which an event is not kept: all that followers may miss, they read from the log."""

HUB_EVENTS = 64
"""Events of a session that the hub reads at once."""

XREAD = b"*%d\r\n$5\r\nXREAD\r\n$5\r\nCOUNT\r\n$%d\r\n%d\r\n$7\r\nSTREAMS\r\n"
"""The head of the hub's command, put together by hand: it is sent once a second for all."""

CARE_SESSIONS = 64
"""Sessions looked after in one go, so that events need not wait until all have been."""

VANISHED_SWEEPS = 3
"""Sweeps in a row that find no record of a followed session before its followers are told."""

Item = tuple[bytes, list[bytes]]
"""A stream's entry as Redis sends it: its id, and its fields."""


class Viewer:
    """A client whose connection the hub writes to: a place in the log, not a queue.

    While its place is the hub's, the hub writes to it. Once its connection does not take what is
    written (the client reads too slowly), the hub leaves it alone: its own task waits until the
    connection has room, catches up from the log, and comes back.

    Args:
        connection: where to write.
        frames: renders the session's entries.
        after: index above which to read.
        seen: index up to which the client needs no frames; not below `after`.
        idle_seconds: after so long a silence a keep-alive is written.
    """

    __slots__ = (
        "_connection",
        "_crowd",
        "_idle",
        "_loop",
        "_rest",
        "_timer",
        "_woken",
        "_written",
        "ended",
        "frames",
        "index",
        "seen",
    )

    def __init__(
        self, connection: Connection, frames: Rendering, after: int, seen: int, idle_seconds: float
    ) -> None:
        self.index, self.seen, self.ended = after, seen, False
        self.frames = frames
        self._connection, self._idle = connection, idle_seconds
        self._loop = asyncio.get_running_loop()
        self._written = time.monotonic()
        self._crowd: Crowd | None = None
        self._woken: asyncio.Future[None] | None = None
        self._rest: Awaitable[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def write(self, events: Sequence[bytes]) -> None:
        """Write the events that follow its place, and wait until the connection has taken them."""
        data, self.ended = self.frames.render(self.index + 1, events, self.seen)
        self.index += len(events)
        if data:
            await self._connection.write(data)
            self._written = time.monotonic()

    async def stay(self, crowd: Crowd) -> None:
        """Let the hub write, until it is told to look for itself: see `wake`."""
        self._crowd, self._woken = crowd, self._loop.create_future()
        crowd.viewers.add(self)
        self._timer = self._loop.call_later(self._due(), self._break_silence)
        try:
            await self._woken
        finally:
            crowd.viewers.discard(self)
            self._crowd = None
            self._timer.cancel()
            self._woken = self._timer = None
        if self._rest is not None:
            rest, self._rest = self._rest, None
            await rest

    def push(self, data: bytes, now: float) -> None:
        """Write at the time `now`; what hinders that is a matter for the viewer's own task."""
        try:
            self._rest = self._connection.push(data)
        except Exception as error:  # noqa: BLE001 - it is raised again, where it belongs
            self.wake(error)
            return
        self._written = now
        if self._rest is not None or self.ended:
            self.wake()

    def wake(self, error: Exception | None = None) -> None:
        """Leave the crowd, and let the viewer's own task go on, or fail."""
        if self._crowd is not None:
            self._crowd.viewers.discard(self)
        if self._woken is not None and not self._woken.done():
            if error is None:
                self._woken.set_result(None)
            else:
                self._woken.set_exception(error)

    async def wait_silently(self, seconds: float) -> None:
        """Wait while there is nothing to be had, but do not let the connection fall silent."""
        await asyncio.sleep(min(seconds, max(0, self._due())))
        if self._due() <= 0:
            await self._connection.write(KEEP_ALIVE)
            self._written = time.monotonic()

    def _break_silence(self) -> None:
        """Write a keep-alive if one is due, and look again when the next one may be."""
        if self._due() <= 0:
            self.push(KEEP_ALIVE, time.monotonic())
        if self._crowd is not None and self in self._crowd.viewers:
            self._timer = self._loop.call_later(self._due(), self._break_silence)

    def _due(self) -> float:
        """Return the seconds until a keep-alive is due."""
        return self._written + self._idle - time.monotonic()


class Crowd:
    """The viewers of one session that get the same bytes, rendered once for all of them."""

    __slots__ = ("frames", "viewers")

    def __init__(self, frames: Rendering) -> None:
        self.frames = frames
        self.viewers: set[Viewer] = set()

    def hand_out(self, first: int, events: Sequence[bytes], writes: Writes) -> None:
        """Render events, and note what is to be written to whom."""
        try:
            data, ended = self.frames.render(first, events)
        except Exception as error:  # noqa: BLE001 - it is raised again, in the viewers' tasks
            for viewer in tuple(self.viewers):
                viewer.wake(error)
            return
        for viewer in tuple(self.viewers):
            if viewer.index != first - 1:
                viewer.wake()
                continue
            viewer.index += len(events)
            viewer.ended = ended
            writes[viewer] = writes.get(viewer, b"") + data


Writes = dict[Viewer, bytes]
"""What is to be written to whom, in one write each: a full connection takes no second one. A few
sessions are rendered before the first write: each write leaves the caches cold for the code that
follows; but while many are rendered, the first would wait."""


def push_all(writes: Writes, since: float, events: int) -> None:
    """Write to the viewers what came of so many events, heard of at the monotonic time `since`."""
    now = time.monotonic()
    for viewer, data in writes.items():
        viewer.push(data, now)
    if events:
        meter.burst(since, events)


class Channel:
    """The newest events of one followed session, shared by all its followers."""

    __slots__ = (
        "_changed",
        "_crowds",
        "_tail",
        "followers",
        "gone",
        "last",
        "missing",
        "name",
        "name_word",
        "session_id",
    )

    def __init__(self, session_id: str) -> None:
        self.session_id, self.name = session_id, session_id.encode()
        name = keys.events(session_id).encode()
        self.name_word = b"$%d\r\n%s\r\n" % (len(name), name)  # as a command names the log
        self.followers = 0
        self.last: int | None = None  # index up to which the hub has read; None: not begun
        self.missing = 0
        self.gone = False
        self._tail: list[bytes] = []  # of an idle session a tenth of what a deque takes
        self._crowds: dict[Hashable, Crowd] = {}
        self._changed: asyncio.Event | None = None

    @property
    def place_word(self) -> bytes:
        """The id of the last entry that was read, as a word of a command."""
        assert self.last is not None  # noqa: S101 - the hub asks for what it reads
        place = b"%d-0" % (self.last + 1)
        return b"$%d\r\n%s\r\n" % (len(place), place)

    def crowd(self, frames: Rendering) -> Crowd:
        """Return the crowd of the viewers that get these frames; it may render with another's."""
        return self._crowds.setdefault(frames.identity, Crowd(frames))

    def left_by(self, viewer: Viewer) -> None:
        """Forget the viewer's crowd, if nobody else is in it."""
        crowd = self._crowds.get(viewer.frames.identity)
        if crowd is not None and not crowd.viewers:
            del self._crowds[viewer.frames.identity]

    def since(self, after: int) -> list[bytes] | None:
        """Return the known events above index `after`, or None where only the log has them."""
        if self.last is None:
            return None
        count = self.last - after
        if count <= 0:
            return []
        if count > len(self._tail):
            return None
        return self._tail[-count:]

    def take_entries(self, items: Sequence[Item], writes: Writes) -> None:
        """Take entries of the log, as the hub has read them; `writes` as in `extend`."""
        first, last = (int(items[i][0].partition(b"-")[0]) - 1 for i in (0, -1))
        events = [fields[1] for _, fields in items]
        if last - first != len(events) - 1 or not self.extend(first, events, writes):
            self._tail.clear()  # a gap: whoever follows shall look into the log, and see it
            self.last = last
            self.wake_all()

    def extend(self, first: int, events: Sequence[bytes], writes: Writes) -> bool:
        """Take the events from index `first` on; those that are known are passed over.

        What is to be written to viewers is added to `writes`, and must be pushed at once. Returns
        False, and takes nothing, where events before `first` are missing.
        """
        following = 0 if self.last is None else self.last + 1
        if first > following:
            return False
        if first < following:
            first, events = following, events[following - first :]
        if not events:
            return True
        self.last, self.missing = first + len(events) - 1, 0
        self._tail += events
        if len(self._tail) > 2 * TAIL:
            del self._tail[:-TAIL]
        if len(events[0]) > LARGE or (len(events) > 1 and max(map(len, events)) > LARGE):
            self._tail.clear()
        for crowd in self._crowds.values():
            if crowd.viewers:
                crowd.hand_out(first, events, writes)
        if self._changed is not None:
            self._notify()
        return True

    def miss(self) -> None:
        """Note that a sweep found no record of the session; after a few, its followers are told."""
        self.missing += 1
        if self.missing >= VANISHED_SWEEPS:
            self.gone = True
            self.wake_all()

    def forget(self) -> None:
        """Forget where the hub is: its followers shall read the log for themselves."""
        self.last = None
        self.wake_all()

    def wake_all(self) -> None:
        """Let every follower look for itself."""
        self._notify()
        for crowd in self._crowds.values():
            for viewer in tuple(crowd.viewers):
                viewer.wake()

    async def changed(self, seconds: float) -> bool:
        """Wait for news; False if there is none for so long."""
        if self._changed is None:
            self._changed = asyncio.Event()
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None


def in_parts(channels: Iterable[Channel]) -> Iterator[list[Channel]]:
    """Yield the channels in parts between which other work gets its turn."""
    everyone = list(channels)
    for i in range(0, len(everyone), CARE_SESSIONS):
        yield everyone[i : i + CARE_SESSIONS]


def next_entries(channels: Collection[Channel]) -> bytes:
    """Return the command that reads what these sessions' logs hold behind their `last`."""
    head = XREAD % (4 + 2 * len(channels), len(b"%d" % HUB_EVENTS), HUB_EVENTS)
    names, places = ([c.name_word for c in channels], [c.place_word for c in channels])
    return b"".join((head, *names, *places))
