"""A session's log and record: fenced appends, ordered reads, the terminal event."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from redis.exceptions import ResponseError

from shared import keys
from shared.errors import UnbrokenError
from shared.protocol import (
    ENDED,
    Generated,
    ResponseParams,
    Status,
    Usage,
    decode_event,
    encode_event,
)
from shared.store import is_wrong_type

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shared.protocol import Channel, Event
    from shared.store import Store

FENCED, LOG_LOST, REFUSED = -1, -2, -3
"""Answers of `append` in place of an index: another owner, entries missing, Redis said no."""

PAGE = 512
"""Events read from Redis at once."""

RING_BYTES = 8192
"""Most bytes of new events that a session's ring carries; what is more is read from the log."""


@dataclass(frozen=True)
class Entry:
    """One event as it stands in the log: its index from 0, and its encoding."""

    index: int
    data: bytes


class Append(NamedTuple):
    """Events of one session to append from index `first`, under `lease`."""

    session_id: str
    lease: str
    first: int
    events: Sequence[bytes]


class SessionRecord(msgspec.Struct, frozen=True):
    """What is known of a session beside its events. Times are Unix seconds of Redis' clock.

    Since its log last grew (at index `tried_at`), workers have claimed it `claims` times, and
    engines have begun it `attempts` times. `engine` and `media` (content hashes) are what its first
    tokens came from; `exact` tells whether its text is that of an undisturbed run, after
    `takeovers` changes of worker.
    """

    owner: str
    digest: str
    model: str
    fingerprint: str
    choices: int
    status: Status
    last: int
    created: int
    enqueued: float
    include_usage: bool = False
    attempts: int = 0
    claims: int = 0
    tried_at: int | None = None
    started: int | None = None
    ended: int | None = None
    usage: Usage | None = None
    response: ResponseParams | None = None
    engine: str = ""
    media: str = ""
    prompt_tokens: int = 0
    exact: bool = True
    takeovers: int = 0
    lease: str = ""

    @property
    def runs_unwatched(self) -> bool:
        """Tell whether the session goes on however long nobody watches it."""
        return self.response is not None and self.response.background

    @property
    def worker(self) -> str | None:
        """The id of the worker that generates it, or did so last."""
        return self.lease.rpartition(":")[0] or None

    @property
    def has_ended(self) -> bool:
        """Tell whether the log has its terminal event."""
        return self.status in ENDED


def _parse_record(raw: dict[bytes, bytes]) -> SessionRecord:
    fields: dict[str, object] = {name.decode(): value.decode() for name, value in raw.items()}
    for name in ("usage", "response"):
        if encoded := raw.get(name.encode()):
            fields[name] = msgspec.json.decode(encoded)
    return msgspec.convert(fields, SessionRecord, strict=False)


def record_fields(record: SessionRecord) -> list[str | bytes]:
    """Return a running session's record as names and values of its hash."""
    fields: list[str | bytes] = []
    for name, value in msgspec.structs.asdict(record).items():
        if name in ("usage", "response"):
            if value is not None:
                fields += (name, msgspec.json.encode(value))
        elif value is not None:
            fields += (name, str(int(value) if isinstance(value, bool) else value))
    return fields


class SessionLog:
    """Reads and writes the logs of all sessions through one Redis client.

    Args:
        store: the Redis client with the scripts.
        archived: sessions that end here are put into the outbox, for an archive to keep.
    """

    def __init__(self, store: Store, *, archived: bool = False) -> None:
        self._store, self._archived = store, archived

    async def record(self, session_id: str) -> SessionRecord | None:
        """Return the session's record, or None where it is unknown or expired.

        Raises:
            UnbrokenError: `generation_failed`, where what stands there is no record.
        """
        with _readable("record"):
            raw = await self._store.redis.hgetall(keys.session(session_id))  # type: ignore[misc]
            return _parse_record(raw) if raw.get(b"created") else None

    async def read(self, session_id: str, after: int, count: int = PAGE) -> list[Entry]:
        """Return up to `count` events with an index above `after` (-1: from the first).

        Raises:
            UnbrokenError: `generation_failed`, where what stands there is no log.
        """
        with _readable("log"):
            raw = await self._store.redis.xrange(
                keys.events(session_id), min=f"({after + 1}-0", count=count
            )
            return [_entry(item) for item in raw]

    async def read_all(self, session_id: str) -> list[Entry]:
        """Return all events of a session."""
        entries: list[Entry] = []
        while page := await self.read(session_id, entries[-1].index if entries else -1):
            entries += page
        return entries

    async def append(self, batch: Sequence[Append]) -> list[int]:
        """Append to several logs in one step.

        Returns, for each session, its last index, or `FENCED`, `LOG_LOST`, `REFUSED`. The same call
        repeated after a lost reply is accepted and appends nothing twice.
        """
        names: list[str] = []
        args: list[str | bytes | int] = [keys.EVENT_BELL, RING_BYTES]
        for item in batch:
            names += (keys.session(item.session_id), keys.events(item.session_id))
            args += (item.session_id, item.lease, item.first, len(item.events), *item.events)
        reply: list[int] = await self._store.express("append", names, args)
        return reply

    async def finish(
        self, last: Append, terminal: Event, *, status: Status, usage: Usage, kept_seconds: int
    ) -> bool:
        """Append the last events and the terminal one, and end the session, in one step.

        Returns False where the lease is another's or the log is gone.
        """
        sid = last.session_id
        names = [keys.session(sid), keys.events(sid), keys.request(sid), keys.job(sid)]
        names += [keys.watch(sid), keys.cancel(sid), keys.LEASES, keys.OUTBOX]
        args: list[str | bytes | int] = [sid, last.lease, keys.event_bell(sid), status]
        args += [kept_seconds, last.first, msgspec.json.encode(usage), int(self._archived)]
        args += [RING_BYTES]
        args += [*last.events, encode_event(terminal)]
        return bool(await self._store.run("finish", names, args) == 1)


def tally(entries: Sequence[Entry], prompt_tokens: int) -> Usage:
    """Count the tokens that a log holds.

    Raises:
        UnbrokenError: an entry is no event.
    """
    with _readable("log"):
        events = [decode_event(entry.data) for entry in entries]
    deltas = [event for event in events if isinstance(event, Generated)]
    return Usage(
        prompt_tokens if deltas else 0,
        sum(len(delta.ids) for delta in deltas),
        sum(len(delta.ids) for delta in deltas if delta.channel == "reasoning"),
    )


def replay(
    entries: Sequence[Entry], choices: int, channel: Channel | None = None
) -> list[tuple[int, ...]]:
    """Return the token ids that the log holds for each choice, in order; of one channel, or all."""
    ids: list[list[int]] = [[] for _ in range(choices)]
    for entry in entries:
        event = decode_event(entry.data)
        if isinstance(event, Generated) and channel in (None, event.channel):
            ids[event.choice] += event.ids
    return [tuple(i) for i in ids]


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn what a value of the wrong shape raises into the session's failure."""
    try:
        yield
    except (msgspec.MsgspecError, ValueError, KeyError):
        raise _unreadable(what) from None
    except ResponseError as error:
        if not is_wrong_type(error):
            raise
        raise _unreadable(what) from None


def _unreadable(what: str) -> UnbrokenError:
    return UnbrokenError("generation_failed", f"The session's {what} is not readable.")


def _entry(item: tuple[bytes, dict[bytes, bytes]]) -> Entry:
    entry_id, fields = item
    return Entry(int(entry_id.partition(b"-")[0]) - 1, fields[b"e"])
