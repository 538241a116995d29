"""The chaos run's verdict finds what is wrong, so that its zeros mean something."""

from __future__ import annotations

import asyncio
import datetime as dt

import pytest

from benchmarks import _chaos_faults
from benchmarks._chaos_clients import Attempt, Stream
from benchmarks._chaos_faults import Fault, Faults
from benchmarks._chaos_stack import Part
from benchmarks._chaos_verdict import (
    UNBEGUN,
    Log,
    Truth,
    given_back,
    judge,
    resumed_after,
    silences,
    start_seconds,
    takeovers,
)
from shared.protocol import Delta, Finished, Started, Usage

USAGE = {"prompt_tokens": 5, "completion_tokens": 4}
END = Finished(("length",), Usage(5, 4))
CHUNK = (
    '{"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":%s}],"usage":null}'  # a chunk
)


def a_log(*events):
    return Log(list(events), contiguous=True, last=len(events) - 1, status="finished")


def delta(token, choice=0):
    return Delta(choice, (token,), f"{token} ")


GOOD = (Started(), *(delta(token) for token in (1, 2, 3, 4)), END)
TRUTH = Truth({(0, "content"): "1 2 3 4 "}, {0: [1, 2, 3, 4]}, USAGE)


def frames(*indexes):
    """Return the frames of the good log's events, in the order asked for."""
    out = []
    for index in indexes:
        text = f"{index} " if 0 < index < 5 else ""
        finish = '"length"' if index == 5 else "null"
        out.append(f"id: s:{index}\ndata: {CHUNK % (text, finish)}\n\n".encode())
    return out


def a_stream(*indexes, ends=1):
    stream = Stream(0, "s")
    for at, data in enumerate(frames(*indexes)):
        stream.feed(data, float(at))
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":4}}\n\n'
    stream.feed(usage + b"data: [DONE]\n\n" * ends, 9.0)
    return stream


def test_a_whole_stream_is_whole():
    """Nothing is found where nothing is wrong."""
    assert judge(a_stream(*range(6)), a_log(*GOOD), TRUTH).is_whole


@pytest.mark.parametrize(
    ("stream", "log", "expected"),
    [
        (a_stream(0, 1, 3, 4, 5), a_log(*GOOD), (1, 0, 0)),
        (a_stream(0, 1, 2, 2, 3, 4, 5), a_log(*GOOD), (0, 1, 0)),
        (a_stream(*range(6)), a_log(*GOOD[:4], END), (1, 0, 0)),
        (a_stream(*range(6)), a_log(*GOOD[:5], delta(4), END), (0, 1, 0)),
        (a_stream(*range(6)), a_log(*GOOD[:3], delta(7), GOOD[4], END), (0, 0, 1)),
    ],
    ids=["client misses one", "client sees one twice", "log lacks one", "one more", "another"],
)
def test_each_wrong_token_counts(stream, log, expected):
    """Lost, repeated and changed tokens are told apart, in the log and at the client."""
    found = judge(stream, log, TRUTH)
    assert (found.lost, found.repeated, found.changed) == expected


def test_a_text_that_is_not_the_logs_counts_as_changed():
    """The tokens may be right and the client's text still wrong."""
    stream = a_stream(*range(6))
    stream.texts[0, "content"] += "!"
    assert judge(stream, a_log(*GOOD), TRUTH).changed == 1


@pytest.mark.parametrize("log", [a_log(*GOOD, END), a_log(*GOOD[:-1]), a_log()])
def test_a_log_has_exactly_one_end(log):
    """Two terminal events, or none, are found."""
    assert any("exactly one end" in note for note in judge(a_stream(*range(6)), log, TRUTH).notes)


@pytest.mark.parametrize("ends", [0, 2])
def test_a_stream_has_exactly_one_end(ends):
    """`[DONE]` twice, or never, is found."""
    found = judge(a_stream(*range(6), ends=ends), a_log(*GOOD), TRUTH)
    assert any("exactly one end" in note for note in found.notes)


def test_a_gap_in_the_log_is_found():
    """Entries whose ids do not follow each other make a log unsound."""
    log = a_log(*GOOD)
    log.contiguous = False
    assert not judge(a_stream(*range(6)), log, TRUTH).is_whole


def test_a_silence_belongs_to_the_faults_that_hit_the_stream():
    """The longest pause that begins soon after a fault is its; two faults share one pause."""
    stream, other = Stream(0, times=[0, 1, 2, 5, 6]), Stream(0, times=[0, 7, 13])
    kill = Fault("worker SIGKILL", 1.9, hit=[stream])
    away = Fault("redis SIGSTOP", 5.5, outage=0.4, hit=[stream])
    [one, two], unexplained = silences([stream, other], [kill, away])
    assert unexplained == [1, 6]
    assert (one.kind, one.seconds, one.beyond) == ("worker SIGKILL", 3, 3)
    assert (two.kind, two.seconds, two.beyond) == ("redis SIGSTOP", 0.5, pytest.approx(0.1))
    away.at = 2.5
    [both], _ = silences([stream], [kill, away])
    assert (both.kind, both.bound) == ("several at once", 6)


@pytest.mark.parametrize(
    ("times", "faults", "seconds"),
    [
        ([0, 1, 6, 7], [3.5], 2.5),  # it had been silent for long
        ([0, 1, 6, 7], [3.5, 2], 4),  # since the first of several
        ([0, 1, 6, 7], [0.9], 5),  # all of a pause that begins later
        ([0, 9, 10], [2], 7),  # its first token is waited for since the fault
        ([0, 5, 6, 7], [4.9], 1),  # what was nearly over is not the longest
    ],
)
def test_a_silence_is_counted_from_the_fault_on(times, faults, seconds):
    """What a stream had waited before is not the fault's doing; what it waits after it, is."""
    stream = Stream(0, times=times)
    hits = [Fault("worker SIGTERM", at, hit=[stream]) for at in faults]
    [found], _ = silences([stream], hits)
    assert found.seconds == seconds


def test_a_wait_for_the_first_token_is_told_apart_where_a_connection_is_lost():
    """A gateway's end keeps no prompt from being computed; a worker's does."""
    for kind, expected in (("gateway SIGKILL", UNBEGUN), ("worker SIGKILL", "worker SIGKILL")):
        waits, runs = Stream(0, times=[0, 9, 10]), Stream(0, times=[0, 1, 9, 10])
        found, _ = silences([waits, runs], [Fault(kind, 2, hit=[waits, runs])])
        assert [(silence.kind, silence.seconds) for silence in found] == [(expected, 7), (kind, 7)]


def test_a_stopping_worker_answers_for_each_hand_over():
    """The pause when a session is given back is the stop's, however late; no other pause is."""
    times = [0, 1, 2, 3, 8, 9, 9.5, 13.5]
    stream = Stream(0, "s", times=times)
    lines = [
        {"message": "session given back", "session": name, "time": f"2026-11-23T00:00:0{at}.0Z"}
        for name, at in (("s", 4), ("other", 9))
    ]
    given = given_back(lines, dt.datetime(2026, 11, 23, tzinfo=dt.timezone.utc).timestamp())
    assert given == {"s": [4], "other": [9]}
    for kind, expected in (("worker SIGTERM", 5), ("worker SIGKILL", 1)):
        [found], _ = silences([stream], [Fault(kind, 1.5, hit=[stream])], given)
        assert found.seconds == expected


def test_takeovers_are_counted_from_the_workers_own_words():
    """A run that wrote nothing is no writer, but what it prefilled was prefilled again."""
    stream, log = a_stream(*range(6)), a_log(*GOOD)
    lines = [
        {"message": "stream start", "session": "s", "time": f"{time}", "index": index}
        for time, index in enumerate((1, 3, 3))
    ]
    found = takeovers(lines, {"s": log}, [stream])
    assert (found.switches, found.sessions, found.rewound) == (1, 1, 0)
    assert found.prefilled_again == 2 * (5 + 2)


def test_what_a_reconnection_took_is_told_from_the_silence():
    """It is counted from the break to the next accepted answer, over what failed between."""
    stream = Stream(0, "s")
    stream.attempts = [
        Attempt(0.0, 1, "200 ReadError", answered=0.1, ended=5.1),
        Attempt(5.3, 2, "ConnectError", ended=5.3),
        Attempt(5.8, 1, "503", answered=5.9),
        Attempt(6.4, 1, "200", answered=6.6),
    ]
    found = resumed_after([Fault("gateway SIGKILL", 5.0, hit=[stream])])
    assert found == {"gateway SIGKILL": [pytest.approx(1.5)]}
    assert stream.trail()[1] == "+5.3..+5.3 :2 ConnectError"


def test_starts_are_read_from_the_workers_logs():
    """From a worker's first line until its model is ready; an engine's new start is none."""
    told = [
        ("startup", "02:59:58.500"),
        ("model ready after 0.8 s: demo | cpu", "03:00:02.000"),
        ("model ready after 0.5 s: demo | cpu", "03:00:20.000"),
        ("startup", "03:01:00.000"),
        ("startup", "03:01:10.000"),
        ("model ready after 0.8 s: demo | cpu", "03:01:15.250"),
    ]
    lines = [{"message": message, "time": f"2026-11-23T{at}Z"} for message, at in told]
    assert start_seconds(lines) == [3.5, 5.25]


class Client:
    """One whose stream is under way."""

    def __init__(self):
        self.current = Stream(0, "s", times=[1.0])


def test_a_quiet_time_spares_those_that_the_last_fault_hit():
    """Only others are cut, one at a time, as long as there are any."""
    clients = [Client() for _ in range(4)]
    faults = Faults(None, None, clients, seed=7)
    faults.done.append(Fault("worker SIGKILL", 1.0, hit=[c.current for c in clients[:3]]))
    for _ in range(20):
        faults._cut_a_bystander()
    cut = [fault.hit for fault in faults.done[1:]]
    assert all(len(hit) == 1 and hit[0] is clients[3].current for hit in cut)
    assert [c.current.cut for c in clients] == [False, False, False, True]


class ThreeWorkers:
    """A stack whose signals go nowhere."""

    def parts(self):
        return [Part("worker", n, n, name=f"w{n}") for n in (1, 2, 3)]


async def test_a_worker_that_was_killed_counts_as_none(monkeypatch):
    """While Redis still knows those that are gone, the last that serves is not hit."""
    monkeypatch.setattr(Part, "signal", lambda *_: True)
    faults = Faults(ThreeWorkers(), None, [], seed=7)
    monkeypatch.setattr(faults, "_ready_workers", lambda: asyncio.sleep(0, {"w1", "w2", "w3"}))
    monkeypatch.setattr(faults, "hit_by", lambda _part: asyncio.sleep(0, []))
    for left in (2, 0):
        [part, *_] = await faults.able("worker")
        await faults.hit("worker SIGKILL", part)
        assert len(await faults.able("worker")) == left


async def test_a_fault_comes_in_time_whatever_choosing_takes(monkeypatch):
    """While nobody says whom to hit, clients are cut: no two seconds pass without a fault."""
    monkeypatch.setattr(_chaos_faults, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(_chaos_faults, "LONGEST_PAUSE", 0.03)
    faults = Faults(None, None, [Client()], seed=7)
    monkeypatch.setattr(faults, "_choose", asyncio.Event().wait)
    await faults.run(0.3)
    assert len(faults.done) > 1
    assert {fault.kind for fault in faults.done} == {"client cut"}
