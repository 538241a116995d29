import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shared import archive as archive_module
from shared import keys
from shared.archive import SETTLE_SECONDS, Archive, ArchiveError, hold_seconds, is_whole
from shared.protocol import Delta, Finished, GenerationRequest, Message, SamplingParams, Usage
from shared.protocol import encode_event as encode
from shared.queue import SessionQueue, Submission
from shared.session_log import PAGE, Append, Entry, SessionLog, SessionRecord
from tests.stack import ROOT


def entries(count):
    return [Entry(n, encode(Delta(0, (n,), f"t{n} ü"))) for n in range(count)]


def record(last, ended=1000, status="finished", **more):
    return SessionRecord(
        owner="me",
        digest="d",
        model="m",
        fingerprint="fp",
        choices=1,
        status=status,
        last=last,
        created=900,
        enqueued=900.5,
        ended=ended,
        usage=Usage(3, 4),
        **more,
    )


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "deep" / "sessions.db")


@pytest.fixture
def archive(path):
    archive = Archive(path)
    yield archive
    archive.close()


def test_what_was_put_is_read_by_another_process(archive, path):
    """A session comes back whole: its record, and each event's bytes under its index."""
    events = entries(2 * PAGE + 3)
    archive.put("s", record(len(events) - 1), events)
    other = Archive(path)
    assert other.record("s") == record(len(events) - 1)
    found = []
    while page := other.read("s", len(found) - 1):
        assert len(page) <= PAGE
        found += page
    other.close()
    assert found == events


@pytest.mark.parametrize("after", [-1, 0, PAGE - 2, PAGE - 1, PAGE, 2 * PAGE, 2 * PAGE + 9])
def test_reading_begins_right_behind_the_given_event(archive, after):
    """The first event of a page is the one after the cursor; behind the last there is none."""
    events = entries(2 * PAGE + 2)
    archive.put("s", record(len(events) - 1), events)
    page = archive.read("s", after)
    assert page == events[after + 1 :][: len(page)]
    assert bool(page) == (after < len(events) - 1)
    assert archive.read("s", after, count=1) == page[:1]
    assert archive.read("t", after) == []


def test_putting_again_changes_nothing(archive):
    """A repeat, as after a crash between row and outbox, keeps what is there."""
    archive.put("s", record(2), entries(3))
    archive.put("s", record(4), entries(5))
    assert archive.record("s") == record(2)
    assert archive.read("s", -1) == entries(3)


def test_a_failed_put_leaves_no_trace_and_can_be_repeated(archive, monkeypatch):
    """Record and events come in one transaction."""
    archive.record("s")
    real = archive_module.msgspec.msgpack.encode
    monkeypatch.setattr(archive_module.msgspec.msgpack, "encode", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        archive.put("s", record(2), entries(3))
    monkeypatch.setattr(archive_module.msgspec.msgpack, "encode", real)
    assert archive.record("s") is None
    archive.put("s", record(2), entries(3))
    assert archive.read("s", -1) == entries(3)


def test_a_process_killed_while_it_writes_leaves_no_trace(archive, path):
    """A SIGKILL in the middle of a transaction costs that row alone, and locks nothing."""
    archive.put("before", record(2), entries(3))
    code = (
        "import os, signal, sys; from shared.archive import Archive\n"
        f"with Archive({path!r})._transaction() as db:\n"
        "    db.execute(\"INSERT INTO sessions VALUES ('cut', 1, '{}')\")\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=20)
    assert killed.returncode == -9
    assert archive.record("cut") is None
    assert archive.record("before") == record(2)
    archive.put("cut", record(2), entries(3))
    assert archive.record("cut") == record(2)


def test_several_writers_share_a_file(path):
    """Threads with connections of their own put the same and other sessions; each is whole."""

    def write(writer):
        own = Archive(path)
        for n in range(10):
            own.put("same", record(4), entries(5))
            own.put(f"{writer}-{n}", record(4), entries(5))
        own.close()

    threads = [threading.Thread(target=write, args=(w,)) for w in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader = Archive(path)
    names = ["same", *(f"{w}-{n}" for w in range(4) for n in range(10))]
    assert all(reader.read(name, -1) == entries(5) for name in names)
    reader.close()


def test_many_who_open_a_new_file_at_once_all_get_it(tmp_path):
    """Gateways that start together make the file once, and none fails because of the others."""
    for attempt in range(20):
        archives = [Archive(str(tmp_path / f"{attempt}.db")) for _ in range(8)]
        found = []

        def ask(archive, found=found):
            found.append(archive.record("s"))

        threads = [threading.Thread(target=ask, args=(archive,)) for archive in archives]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for archive in archives:
            archive.close()
        assert found == [None] * len(archives)


def test_opening_a_file_drops_nobodys_lock(archive, path):
    """A second connection of this process, come and gone, leaves the first one's lock alone."""
    archive.record("s")
    second = Archive(path)
    second.record("s")  # it closes nothing that would drop the first one's lock
    connect = f"import sqlite3; db = sqlite3.connect({path!r}, timeout=0)"
    code = f"{connect}; db.execute('PRAGMA journal_mode = DELETE')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20)
    second.close()
    assert b"locked" in other.stderr


def test_a_locked_file_fails_writing_but_not_reading(archive, path, monkeypatch):
    """While somebody else holds the write lock, what is there can be read; afterwards all works."""
    monkeypatch.setattr(archive_module, "BUSY_SECONDS", 0.05)
    archive.put("s", record(2), entries(3))
    archive.close()  # the next call waits as briefly as we ask
    other = sqlite3.connect(path, isolation_level=None)
    archive.record("s")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ArchiveError, match="locked"):
        archive.put("t", record(2), entries(3))
    assert archive.read("s", -1) == entries(3)
    other.execute("ROLLBACK")
    other.close()
    archive.put("t", record(2), entries(3))
    assert archive.record("t") == record(2)


def test_a_full_disk_fails_that_put_alone(archive):
    """What does not fit is not there at all; what is there can be read; with room it fits."""
    archive.put("s", record(2), entries(3))
    limit = archive._connection.execute("PRAGMA page_count").fetchone()[0] + 2
    archive._connection.execute(f"PRAGMA max_page_count = {limit}")
    many = entries(20 * PAGE)
    with pytest.raises(ArchiveError, match="full"):
        archive.put("big", record(len(many) - 1), many)
    assert archive.record("big") is None
    assert archive.read("s", -1) == entries(3)
    archive.put("big", record(len(many) - 1), many)
    assert archive.read("big", len(many) - 2) == many[-1:]


def test_a_file_of_a_newer_version_is_refused_untouched(archive, path):
    """An older program neither reads nor changes what a newer one wrote."""
    archive.put("s", record(2), entries(3))
    archive.close()
    raw = sqlite3.connect(path)
    raw.execute("PRAGMA user_version = 99")
    raw.close()
    for call in (lambda: archive.record("s"), lambda: archive.put("t", record(2), entries(3))):
        with pytest.raises(ArchiveError, match="newer"):
            call()


@pytest.mark.parametrize("damage", ["garbage", "folder"])
def test_a_file_that_is_no_archive_is_an_archive_error(tmp_path, damage):
    """Whatever lies at the path: the error is one that the callers know."""
    path = tmp_path / "sessions.db"
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"not a database at all" * 300)
    with pytest.raises(ArchiveError):
        Archive(str(path)).record("s")


def test_only_its_user_can_read_the_file(archive, path):
    """Conversations are private: neither the file nor its WAL is open to others."""
    archive.put("s", record(2), entries(3))
    modes = {name: Path(f"{path}{name}").stat().st_mode for name in ("", "-wal", "-shm")}
    assert not [n for n, mode in modes.items() if mode & (stat.S_IRWXG | stat.S_IRWXO)]


def test_purge_removes_what_is_old_and_shrinks_the_file(archive, path):
    """Old sessions go with their events, a batch at a time, and the space comes back."""
    many = entries(4 * PAGE)
    for n in range(archive_module.PURGE_BATCH + 5):
        archive.put(f"s{n}", record(len(many) - 1, ended=n), many)
    pages = "PRAGMA page_count"
    before = archive._connection.execute(pages).fetchone()[0]
    assert archive.purge(archive_module.PURGE_BATCH + 4) == archive_module.PURGE_BATCH
    assert archive.purge(archive_module.PURGE_BATCH + 4) == 4
    assert archive.purge(archive_module.PURGE_BATCH + 4) == 0
    assert archive.record("s0") is None
    assert archive.read("s0", -1) == []
    assert archive.read(f"s{archive_module.PURGE_BATCH + 4}", -1) == many[:PAGE]
    assert archive._connection.execute(pages).fetchone()[0] < before / 20


def test_a_session_is_whole_with_all_events_up_to_its_end():
    """A running session, a gap, a missing head or tail: none of these is archived."""
    assert is_whole(record(2), entries(3))
    assert not is_whole(record(2, status="running"), entries(3))
    for part in (entries(2), entries(3)[1:], [*entries(3)[:1], *entries(3)[2:]], []):
        assert not is_whole(record(2), part)


# --- the outbox -----------------------------------------------------------------------------------


def submission(session_id):
    request = GenerationRequest((Message("user"),), SamplingParams())
    return Submission(session_id, "", request.digest(), "m", "fp", False, request)


async def end_two(store, *, archived, kept=60):
    """End one session by its worker, and one by a cancel while it waits."""
    queue = SessionQueue(store, kept_seconds=kept, watch_ms=0, archived=archived)
    log = SessionLog(store, archived=archived)
    await queue.submit(submission("done"), 9)
    [claimed] = (await queue.claim("w", 1)).sessions
    await queue.submit(submission("gone"), 9)
    await queue.cancel("gone", "", "requested")
    end = Finished(("stop",), Usage())
    last = Append(*claimed, 1, [encode(Delta(0, (1,), "x"))])
    for _ in range(2):  # a repeat after a lost reply
        assert await log.finish(last, end, status="finished", usage=Usage(), kept_seconds=kept)


async def test_ended_sessions_wait_in_the_outbox(store):
    """Finished and cancelled sessions are due once each, and due again only after a while."""
    await end_two(store, archived=True)
    now, *ids = await store.run("outbox", [keys.OUTBOX], [10, 30])
    assert sorted(ids) == [b"done", b"gone"]
    assert await store.run("outbox", [keys.OUTBOX], [10, 30]) == [now]
    await store.redis.zadd(keys.OUTBOX, {"done": 1})  # its taker died long ago
    _, *again = await store.run("outbox", [keys.OUTBOX], [10, 30])
    assert again == [b"done"]


async def test_the_outbox_gives_no_more_than_asked_for(store):
    """A taker gets as many as it can write soon; the others stay due."""
    await end_two(store, archived=True)
    taken = [(await store.run("outbox", [keys.OUTBOX], [1, 30]))[1] for _ in range(2)]
    assert sorted(taken) == [b"done", b"gone"]


async def test_without_persistence_there_is_no_outbox(store):
    """Nothing gathers where nobody would fetch it."""
    await end_two(store, archived=False)
    assert not await store.redis.exists(keys.OUTBOX)


async def test_an_outbox_that_nobody_empties_does_not_grow(store):
    """What was not fetched while its session was kept is dropped with the next end."""
    await store.redis.zadd(keys.OUTBOX, {"ancient": 1})
    await end_two(store, archived=True)
    assert set(await store.redis.zrange(keys.OUTBOX, 0, -1)) == {b"done", b"gone"}
    assert 0 < await store.redis.ttl(keys.OUTBOX) <= 60


def test_redis_keeps_a_session_until_its_row_can_be_written():
    """A short TTL does not race the archive, and a long one is not cut."""
    assert hold_seconds(1) == archive_module.OUTBOX_SECONDS + SETTLE_SECONDS
    assert hold_seconds(86_400) == 86_400 + SETTLE_SECONDS
