"""What a chaos run has shown: streams and their logs against undisturbed ones, and silences."""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from shared.protocol import Event, Generated, Started, Terminal, decode_event
from shared.session_log import SessionLog

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from benchmarks._chaos_clients import Stream
    from benchmarks._chaos_faults import Fault
    from shared.store import Store

WINDOW = 1.0
"""Seconds after a fault within which the silence that it causes begins."""

HAND_OVER = 25.0
"""A worker that was told to stop gives no session away so many seconds later: it has drained."""

BOUNDS: dict[str, float] = {
    "worker SIGKILL": 4.0,
    "worker SIGSTOP": 4.0,
    "worker SIGTERM": 0.5,
    "gateway SIGKILL": 1.5,
    "gateway SIGTERM": 1.5,
    "gateway SIGSTOP": 1.5,
    "redis SIGKILL": 2.0,
    "redis SIGSTOP": 2.0,
    "client cut": 1.5,
}
"""The longest silence aimed at, seconds at p99; of some, beside the time that the part is away."""

CONNECTION = {"gateway SIGKILL", "gateway SIGTERM", "gateway SIGSTOP", "client cut"}
"""Faults that take a stream's connection, and leave its worker and the queue alone."""

UNBEGUN = "a connection, before the first token"

BEYOND_OUTAGE = {"redis SIGKILL", "redis SIGSTOP", "gateway SIGSTOP"}


@dataclass
class Log:
    """A session as it stands in Redis."""

    events: list[Event] = field(default_factory=list)
    contiguous: bool = True
    last: int = -1  # as the record says
    status: str = "missing"

    @property
    def terminals(self) -> int:
        """How many terminal events it has."""
        return sum(isinstance(event, Terminal) for event in self.events)

    @property
    def is_sound(self) -> bool:
        """Whether it runs without a gap from `Started` to its one terminal event."""
        return (
            self.contiguous
            and self.last == len(self.events) - 1
            and bool(self.events)
            and isinstance(self.events[0], Started)
            and isinstance(self.events[-1], Terminal)
            and self.terminals == 1
        )

    def tokens(self, before: int | None = None) -> dict[int, list[int]]:
        """Return each choice's token ids, of all events or of those before an index."""
        ids = defaultdict[int, list[int]](list)
        for event in self.events[:before]:
            if isinstance(event, Generated):
                ids[event.choice] += event.ids
        return dict(ids)


async def read_log(store: Store, session_id: str) -> Log:
    """Read a session's whole log, and what its record says of it."""
    session_log, log = SessionLog(store), Log()
    record = await session_log.record(session_id) if session_id else None
    if record is None:
        return log
    log.last, log.status = record.last, record.status
    while page := await session_log.read(session_id, len(log.events) - 1):
        log.contiguous &= [e.index for e in page] == list(
            range(len(log.events), len(log.events) + len(page))
        )
        log.events += [decode_event(entry.data) for entry in page]
    return log


@dataclass
class Truth:
    """What an undisturbed run of a case gave."""

    texts: dict[tuple[int, str], str]
    tokens: dict[int, list[int]]
    usage: dict[str, Any]


@dataclass
class Judgement:
    """What is wrong with one stream; all zero and empty where nothing is."""

    lost: int = 0
    repeated: int = 0
    changed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.repeated or self.changed or self.notes)


def judge(stream: Stream, log: Log, truth: Truth) -> Judgement:
    """Compare a stream with its log, and both with the truth; counts tokens, or events unseen."""
    found = Judgement(lost=stream.lost, repeated=stream.repeated)
    tokens = log.tokens()
    for choice, expected in truth.tokens.items():
        given = tokens.get(choice, [])
        found.lost += max(0, len(expected) - len(given))
        found.repeated += max(0, len(given) - len(expected))
        found.changed += sum(a != b for a, b in zip(given, expected, strict=False))
    if stream.texts != truth.texts and not (found.lost or found.changed or found.repeated):
        found.changed += 1
        found.notes.append("the client's text differs from the log's")
    if len(stream.times) != len(log.events):
        found.notes.append(f"{len(stream.times)} events seen of {len(log.events)}")
    if not log.is_sound:
        found.notes.append(f"the log is not sound: {log.status}, last {log.last}")
    if (stream.finishes, stream.dones, log.terminals) != (1, 1, 1):
        ends = f"{stream.finishes} finishes, {stream.dones} [DONE], {log.terminals} in the log"
        found.notes.append(f"not exactly one end: {ends}")
    for name in ("prompt_tokens", "completion_tokens"):
        if (stream.usage or {}).get(name) != truth.usage.get(name):
            found.notes.append(f"usage: {stream.usage} instead of {truth.usage}")
    found.notes += [f"error: {error}" for error in stream.errors]
    return found


@dataclass
class Silence:
    """The longest pause of a stream that faults may have caused, seconds; see `silences`."""

    kinds: tuple[str, ...]
    seconds: float
    outage: float
    unbegun: bool = False  # the first token was waited for

    @property
    def kind(self) -> str:
        """The fault's kind, or that there was more than one, or that it took no token away.

        Who has no token yet waits for queue and prompt, connected or not.
        """
        if self.unbegun and CONNECTION.issuperset(self.kinds):
            return UNBEGUN
        return self.kinds[0] if len(self.kinds) == 1 else "several at once"

    @property
    def beyond(self) -> float:
        """What counts against the bound."""
        return max(0.0, self.seconds - self.outage)

    @property
    def bound(self) -> float:
        """The bound of its kind; the sum of all of them."""
        return sum(BOUNDS[kind] for kind in self.kinds)


def silences(
    streams: Sequence[Stream],
    faults: Sequence[Fault],
    given_back: Mapping[str, Sequence[float]] = {},
) -> tuple[list[Silence], list[float]]:
    """Find, for each fault and each stream that it hit, the pause that it may have caused.

    Returns them, and each stream's longest pause that no fault explains, in seconds; the wait for
    its first token aside. A pause lasts from one event to the next, or from the first fault within
    it, if that came later: what a stream had waited before is not the fault's doing. One that was
    hit before its first token has waited for it since the fault, its turn in the queue included;
    where only its connection was hit, that is told apart.
    A worker that stops gives its sessions away one by one, `given_back` says when: the pauses then
    are its doing too.
    """
    hits = defaultdict[int, list["Fault"]](list)
    for fault in faults:
        for stream in fault.hit:
            hits[id(stream)].append(fault)
    found, unexplained = list[Silence](), list[float]()
    for stream in streams:
        pauses = list(pairwise(stream.times))
        causes = defaultdict[int, list["Fault"]](list)  # place of the pause -> its faults
        for fault in hits[id(stream)]:
            moments = [fault.at]
            if fault.kind == "worker SIGTERM":
                given = given_back.get(stream.session_id, ())
                moments += [at for at in given if 0 < at - fault.at < HAND_OVER]
            place = _pause_after(stream.times, moments)
            if place is not None:
                causes[place].append(fault)
        for place, several in causes.items():
            kinds = tuple(fault.kind for fault in several)
            before, after = pauses[place]
            seconds = after - max(before, min(fault.at for fault in several))
            outage = sum(f.outage for f in several if f.kind in BEYOND_OUTAGE)
            found.append(Silence(kinds, seconds, outage, place == 0))
        rest = [after - before for n, (before, after) in enumerate(pauses) if n and n not in causes]
        unexplained.append(max(rest, default=0.0))
    return found, unexplained


def _pause_after(times: Sequence[float], moments: Sequence[float]) -> int | None:
    """Return the place of the longest pause under way at one of the moments, or begun soon after.

    It counts from the first moment on.
    """
    pauses = [
        (after - max(before, moments[0]), place)
        for place, (before, after) in enumerate(pairwise(times))
        if any(after > at and before < at + WINDOW for at in moments)
    ]
    return max(pauses)[1] if pauses else None


def resumed_after(faults: Iterable[Fault]) -> dict[str, list[float]]:
    """Return, per kind of fault, how long after the break of a stream it was accepted again, s."""
    found = defaultdict[str, list[float]](list)
    for fault in faults:
        for stream in fault.hit:
            accepted = [a for a in stream.attempts if a.accepted]
            for broken, following in pairwise(accepted):
                if broken.ended > fault.at:
                    found[fault.kind].append(following.answered - broken.ended)
                    break
    return dict(found)


def given_back(lines: Iterable[dict[str, Any]], epoch: float) -> dict[str, list[float]]:
    """Read from the workers' logs when sessions were given back: seconds since `epoch` (Unix)."""
    found = defaultdict[str, list[float]](list)
    for line in lines:
        if line.get("message") == "session given back":
            found[line["session"]].append(_time(line).timestamp() - epoch)
    return dict(found)


def start_seconds(lines: Iterable[dict[str, Any]]) -> list[float]:
    """Read from the workers' logs how long each start took, from its first line on, seconds."""
    found, began = list[float](), None
    for line in lines:
        message = line.get("message", "")
        if message == "startup":
            began = _time(line)
        elif message.startswith("model ready") and began:
            found.append((_time(line) - began).total_seconds())
            began = None  # what comes next without a start is an engine alone
    return found


def _time(line: dict[str, Any]) -> dt.datetime:
    return dt.datetime.strptime(line["time"], "%Y-%m-%dT%H:%M:%S.%f%z")


@dataclass
class Takeovers:
    """How often sessions changed their writer, and what that cost."""

    switches: int = 0
    sessions: int = 0
    prefilled_again: int = 0  # tokens
    rewound: int = 0  # runs that began before the place of an earlier one


def runs_of(lines: Iterable[dict[str, Any]]) -> dict[str, list[int]]:
    """Read from the workers' logs at which index each run of each session began, in time order."""
    starts = defaultdict[str, list[tuple[str, int]]](list)
    for line in lines:
        if line.get("message") == "stream start":
            starts[line["session"]].append((line["time"], line["index"]))
    return {session: [index for _, index in sorted(begun)] for session, begun in starts.items()}


def takeovers(
    lines: Iterable[dict[str, Any]], logs: dict[str, Log], streams: Sequence[Stream]
) -> Takeovers:
    """Count who wrote which part of each session; a run that wrote nothing is no writer."""
    prompts = {s.session_id: (s.usage or {}).get("prompt_tokens", 0) for s in streams}
    found = Takeovers()
    for session, indexes in runs_of(lines).items():
        if session not in logs:
            continue
        log, ends = logs[session], [*indexes[1:], len(logs[session].events)]
        writers = sum(end > begin for begin, end in zip(indexes, ends, strict=True))
        found.switches += max(0, writers - 1)
        found.sessions += writers > 1
        found.rewound += sum(b < a for a, b in pairwise(indexes))
        choices = max(1, len(log.tokens()))
        for index in indexes[1:]:
            so_far = sum(map(len, log.tokens(index).values()))
            found.prefilled_again += choices * prompts[session] + so_far
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of the others do not exceed; 0 where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def count_kinds(faults: Sequence[Fault]) -> dict[str, int]:
    """Count the faults of each kind."""
    return dict(sorted(Counter(fault.kind for fault in faults).items()))
