"""`Archive`: ended sessions in an SQLite file, for when Redis no longer has them.

All of it blocks: call it from a thread, one at a time for each object. Several processes of one
host may share a file.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from shared.session_log import PAGE, Entry, SessionRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BUSY_SECONDS = 2.0
"""How long a locked file is waited for."""

OUTBOX_SECONDS = 600
"""An ended session waits at least this long in Redis for its row, whatever the sessions' TTL."""

SETTLE_SECONDS = 120
"""How long it stays in Redis after its row is written: longer than any request can take, so that
one which just missed the row still finds the session."""

PURGE_BATCH = 100

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE sessions (
        id TEXT PRIMARY KEY, ended INTEGER NOT NULL, record BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX sessions_ended ON sessions (ended);
    CREATE TABLE pages (
        session TEXT NOT NULL, last INTEGER NOT NULL, events BLOB NOT NULL,
        PRIMARY KEY (session, last)
    )
    """,
)
"""Entry n leads from schema version n to n + 1; `PRAGMA user_version` says where a file is."""

_connecting = threading.Lock()
_records = msgspec.json.Decoder(SessionRecord)
_pages = msgspec.msgpack.Decoder(list[bytes])


class ArchiveError(OSError):
    """The archive can not be used for now: locked, full, unreadable, of a newer version.

    An `OSError`, and so one of `shared.store.UNAVAILABLE`: a stream waits, a request is a 503.
    """


def hold_seconds(kept_seconds: int) -> int:
    """Return how long Redis keeps an ended session that is still to be archived."""
    return max(kept_seconds, OUTBOX_SECONDS) + SETTLE_SECONDS


def is_whole(record: SessionRecord, entries: Sequence[Entry]) -> bool:
    """Tell whether these are all events of an ended session."""
    indexes = [entry.index for entry in entries]
    return record.has_ended and indexes == list(range(record.last + 1))


class Archive:
    """One connection to the file; opened with the first call, and again after a failure.

    Args:
        path: the database; made, with its folder, where it is not there. Only its user can read it.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._connection: sqlite3.Connection | None = None

    def put(self, session_id: str, record: SessionRecord, entries: Sequence[Entry]) -> None:
        """Write an ended session in one transaction; does nothing where it is there already.

        Raises:
            ArchiveError: nothing was written.
        """
        row = (session_id, record.ended or 0, msgspec.json.encode(record))
        with self._transaction() as db:
            if not db.execute("INSERT OR IGNORE INTO sessions VALUES (?, ?, ?)", row).rowcount:
                return
            for first in range(0, len(entries), PAGE):
                page = entries[first : first + PAGE]
                data = msgspec.msgpack.encode([entry.data for entry in page])
                db.execute("INSERT INTO pages VALUES (?, ?, ?)", (session_id, page[-1].index, data))

    def record(self, session_id: str) -> SessionRecord | None:
        """Return an archived session's record, or None.

        Raises:
            ArchiveError: it can not be known now.
        """
        with self._open() as db:
            found = db.execute("SELECT record FROM sessions WHERE id = ?", (session_id,)).fetchone()
            return _records.decode(found[0]) if found else None

    def read(self, session_id: str, after: int, count: int = PAGE) -> list[Entry]:
        """Return up to `count` events above index `after`, at most `PAGE`; none where none is.

        Raises:
            ArchiveError: they can not be read now.
        """
        query = "SELECT last, events FROM pages WHERE session = ? AND last > ? ORDER BY last"
        with self._open() as db:
            found = db.execute(query + " LIMIT 1", (session_id, after)).fetchone()
        if not found:
            return []
        events = _pages.decode(found[1])
        first = found[0] + 1 - len(events)
        entries = [Entry(first + i, data) for i, data in enumerate(events)]
        return entries[max(0, after + 1 - first) :][:count]

    def purge(self, ended_before: int) -> int:
        """Remove up to `PURGE_BATCH` sessions that ended before then (Unix s); returns how many.

        Raises:
            ArchiveError: nothing was removed.
        """
        query = "SELECT id FROM sessions WHERE ended < ? ORDER BY ended LIMIT ?"
        with self._transaction() as db:
            ids = db.execute(query, (ended_before, PURGE_BATCH)).fetchall()
            db.executemany("DELETE FROM pages WHERE session = ?", ids)
            db.executemany("DELETE FROM sessions WHERE id = ?", ids)
        if ids:
            with self._open() as db:
                db.executescript("PRAGMA incremental_vacuum")  # gives the space back
        return len(ids)

    def remove(self, session_id: str) -> None:
        """Remove a session; does nothing where it is not there.

        Raises:
            ArchiveError: nothing was removed.
        """
        with self._transaction() as db:
            db.execute("DELETE FROM pages WHERE session = ?", (session_id,))
            db.execute("DELETE FROM sessions WHERE id = ?", (session_id,))

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Give the connection; a failure closes it and becomes an `ArchiveError`."""
        try:
            if self._connection is None:
                self._connection = _connect(self._path)
            yield self._connection
        except (sqlite3.Error, OSError, msgspec.MsgspecError) as error:
            self.close()
            raise ArchiveError(f"{type(error).__name__}: {error}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._open() as db, _immediate(db):
            yield db


@contextlib.contextmanager
def _immediate(db: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock; commit at the end, and undo everything where something fails."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # some failures have rolled back already
            db.execute("ROLLBACK")
        raise


def _connect(path: Path) -> sqlite3.Connection:
    """Open the file, and make it where it is not there; waits for others who do the same."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            with _connecting:
                return _connect_once(path)
        except sqlite3.OperationalError as error:
            # SQLite itself does not wait for the lock that a change to WAL takes.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _connect_once(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Only a new file is opened here: to close a descriptor of a file drops all the locks that
    # SQLite has on it in this process.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))  # SQLite gives its WAL the same mode
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        if _version(db) == 0:  # both stay with the file, and need its lock
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.execute("PRAGMA journal_mode = WAL").fetchone()
        db.execute("PRAGMA synchronous = FULL")  # what left the outbox is on the disk
        db.execute("PRAGMA journal_size_limit = 67108864")
        _migrate(db)
    except BaseException:
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection) -> None:
    if _version(db) == len(MIGRATIONS):
        return
    with _immediate(db):
        version = _version(db)  # another process may have been quicker
        if version > len(MIGRATIONS):
            raise sqlite3.DatabaseError(f"the archive has schema version {version}, a newer one")
        for migration in MIGRATIONS[version:]:
            for statement in migration.split(";"):
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])
