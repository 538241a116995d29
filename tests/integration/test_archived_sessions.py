import asyncio
import contextlib
import sqlite3
from pathlib import Path

import psutil
import pytest

from gateway import upkeep
from gateway.history import ArchiveThread, History
from gateway.upkeep import Archiver
from shared import archive as archive_module
from shared import keys
from shared.archive import OUTBOX_SECONDS, SETTLE_SECONDS, Archive
from shared.session_log import PAGE, SessionLog
from tests.gateway_process import GatewayProcess
from tests.scripted import ArchivingWorker, ScriptedWorker
from tests.served import serving

BODY = {"messages": [{"role": "user", "content": "hello"}]}
STREAM = {**BODY, "stream": True}
CHAT = "/v1/chat/completions"


pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def worker(store):
    worker = ArchivingWorker(store)
    await worker.announce()
    return worker


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "sessions.db")


@pytest.fixture
async def start(redis_url, path, monkeypatch):
    """Start gateways that archive; they end with the test."""
    monkeypatch.setattr(archive_module, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(upkeep, "RETAKE_SECONDS", 1)
    async with contextlib.AsyncExitStack() as running:

        async def start(**settings):
            defaults = {"persist_sessions": True, "sessions_db_path": path}
            return await running.enter_async_context(serving(redis_url, **{**defaults, **settings}))

        yield start


async def serve_one(client, worker, session_id="s", texts=("wo", "rd"), headers=None, **more):
    """Make a session that ends; returns its stream as it came live."""
    body = {**STREAM, "session_id": session_id, **more}
    task = asyncio.create_task(client.post(CHAT, json=body, headers=headers))
    while not (sessions := await worker.claim()):
        await worker.queue.wait_for_work(1)
    for text in texts:
        await worker.say(sessions[0], text)
    await worker.finish(sessions[0])
    return (await task).content


async def until_archived(store):
    """Wait until the outbox is empty."""
    while await store.redis.exists(keys.OUTBOX):
        await asyncio.sleep(0.02)


def largest(*paths):
    return max(Path(path).stat().st_size for path in paths)


def exists(path):
    return Path(path).exists()


def error_of(response):
    return response.status_code, response.json()["error"]["code"]


async def everything(client, session_id="s", headers=None):
    """Return all that a client can read of a session."""
    calls = {
        "stream": client.post(CHAT, json={**STREAM, "session_id": session_id}, headers=headers),
        "whole": client.post(CHAT, json={**BODY, "session_id": session_id}, headers=headers),
        "retrieve": client.get(f"{CHAT}/{session_id}", headers=headers),
        "status": client.get(f"/v1/sessions/{session_id}", headers=headers),
        "events": client.get(f"/v1/sessions/{session_id}/events", headers=headers),
        "cancel": client.post(f"/v1/cancel/{session_id}", headers=headers),
    }
    for index in range(4):
        place = {**(headers or {}), "last-event-id": f"{session_id}:{index}"}
        calls[f"resume {index}"] = client.post(CHAT, headers=place)
        calls[f"events {index}"] = client.get(f"/v1/sessions/{session_id}/events", headers=place)
    return {name: ((r := await call).status_code, r.content) for name, call in calls.items()}


async def test_everything_reads_the_same_when_redis_is_empty(start, client, worker, store):
    """Each route gives the same bytes from the archive, on any gateway, with no worker at all."""
    live = await serve_one(client, worker)
    before = await everything(client)
    assert before["stream"] == (200, live)
    assert before["events 3"] == (204, b"")
    await until_archived(store)
    await store.redis.flushall()
    other = await start()
    assert await everything(client) == before
    assert await everything(other) == before
    said = keys.watch("s").encode()  # once a second, of whoever reads just then
    assert set(await store.redis.keys("*s")) <= {said}


@pytest.mark.parametrize("ending", ["cancelled", "failed"])
async def test_cancelled_and_failed_sessions_are_archived_too(client, worker, store, ending):
    """However a session ended, it reads as before, with its reason or its error."""
    body = {**STREAM, "session_id": "s"}
    task = asyncio.create_task(client.post(CHAT, json=body))
    while not await worker.queue.depth():
        await asyncio.sleep(0.01)
    if ending == "cancelled":
        await client.post("/v1/cancel/s")
    else:
        [claimed] = await worker.claim()
        await worker.fail(claimed, "invalid_media", "broken", "messages")
    live = (await task).content
    before = await everything(client)
    await until_archived(store)
    await store.redis.flushall()
    assert await everything(client) == before
    assert before["stream"] == (200, live)
    assert before["status"][1].count(b'"requested"' if ending == "cancelled" else b"broken") == 1


async def test_an_archived_id_is_in_use(client, worker, store):
    """Another body under an archived id or key is 409, as long as the archive keeps it."""
    await serve_one(client, worker)
    await serve_one(client, worker, None, headers={"idempotency-key": "k"})
    await until_archived(store)
    await store.redis.flushall()
    await worker.announce()
    other = {**BODY, "seed": 1}
    by_id = await client.post(CHAT, json={**other, "session_id": "s"})
    by_key = await client.post(CHAT, json=other, headers={"idempotency-key": "k"})
    same = await client.post(CHAT, json=BODY, headers={"idempotency-key": "k"})
    assert error_of(by_id) == error_of(by_key) == (409, "session_id_in_use")
    assert same.json()["choices"][0]["message"]["content"] == "word"
    assert await worker.claim() == []


async def test_an_archived_session_belongs_to_its_key(start, worker, store):
    """Another key finds nothing on any route, and its POST under that id begins nothing."""
    client = await start(api_keys="alpha,beta")
    alpha, beta = ({"authorization": f"Bearer {k}"} for k in ("alpha", "beta"))
    await serve_one(client, worker, headers=alpha)
    mine = await everything(client, headers=alpha)
    await until_archived(store)
    await store.redis.flushall()
    await worker.announce()
    assert await everything(client, headers=alpha) == mine
    assert {status for status, _ in (await everything(client, headers=beta)).values()} == {404}
    assert await worker.claim() == []


async def test_a_reader_goes_on_in_the_archive_where_redis_ends(client, worker, store, path):
    """A session that Redis forgets between two pages has no seam: same events, same order."""
    await serve_one(client, worker, texts=[f"{n} " for n in range(2 * PAGE)])
    await until_archived(store)
    thread = ArchiveThread(path)
    history = History(store, thread)
    whole = await SessionLog(store).read("s", -1, count=9999)
    first = await history.read("s", -1)
    await store.redis.delete(keys.session("s"), keys.events("s"))
    found = list(first)
    while page := await history.read("s", found[-1].index):
        found += page
    await thread.close()
    assert len(first) == PAGE
    assert found == whole


@pytest.mark.parametrize("call", ["resume", "attach", "events", "retrieve"])
async def test_a_session_that_expires_after_the_look_up_is_still_read(
    client, worker, store, monkeypatch, call
):
    """Redis may forget the session right after a request has found it there."""
    live = await serve_one(client, worker)
    await until_archived(store)
    history, real = client.services.log, SessionLog.record

    async def find_then_lose(self, session_id):
        found = await real(self, session_id)
        await store.redis.delete(keys.session(session_id), keys.events(session_id))
        return found

    if call == "attach":  # past the first look into the archive, as if the row came just after it
        monkeypatch.setattr(history, "archived", lambda _: asyncio.sleep(0))
    monkeypatch.setattr(SessionLog, "record", find_then_lose)
    if call == "resume":
        got = await client.post(CHAT, headers={"last-event-id": "s:0"})
        assert got.content == live[live.index(b"id: s:1") :]
    elif call == "attach":
        got = await client.post(CHAT, json={**STREAM, "session_id": "s"})
        assert got.content == live
    elif call == "events":
        assert (await client.get("/v1/sessions/s/events")).content == live
    else:
        got = await client.get(f"{CHAT}/s")
        assert got.json()["choices"][0]["message"]["content"] == "word"
    assert await worker.claim() == []


async def test_a_locked_archive_hinders_no_stream_and_is_written_later(client, worker, store, path):
    """Sessions stream and end while somebody holds the file's lock; afterwards they are in it."""
    await serve_one(client, worker, "first")
    await until_archived(store)
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    for name in "abc":
        assert (await serve_one(client, worker, name)).endswith(b"data: [DONE]\n\n")
    lock.execute("ROLLBACK")
    lock.close()
    await until_archived(store)
    reader = Archive(path)
    assert all(reader.record(name) for name in ("first", *"abc"))
    reader.close()


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_FSIZE"), reason="no prlimit on this system")
async def test_a_full_disk_hinders_no_stream_and_is_written_later(
    redis_url, worker, store, path, tmp_path
):
    """With no room for the archive sessions stream and end; with room again they are in it."""
    env = {"PERSIST_SESSIONS": "1", "SESSIONS_DB_PATH": path}
    gateway = GatewayProcess(redis_url, tmp_path, env)
    process = psutil.Process(gateway.process.pid)
    unlimited = process.rlimit(psutil.RLIMIT_FSIZE)
    try:
        async with serving(redis_url) as client:  # another gateway: not the one without room
            client.base_url = gateway.url
            await serve_one(client, worker, "first")
            await until_archived(store)
            log = tmp_path / f"gateway-{gateway.port}.log"
            room = largest(path, f"{path}-wal", log) + 32_768  # for the log, not for the session
            process.rlimit(psutil.RLIMIT_FSIZE, (room, unlimited[1]))
            texts = [str(n) * 500 for n in range(1000, 1600)]
            live = await serve_one(client, worker, "big", texts)
            assert live.count(b"\n\n") == len(texts) + 3
            while "can not archive" not in log.read_text():
                await asyncio.sleep(0.05)
            assert (await serve_one(client, worker, "next")).endswith(b"data: [DONE]\n\n")
            process.rlimit(psutil.RLIMIT_FSIZE, unlimited)
            await until_archived(store)
            await store.redis.flushall()
            got = await client.post(CHAT, json={**STREAM, "session_id": "big"})
            assert got.content == live
    finally:
        gateway.stop()


async def test_an_unreadable_archive_never_lets_an_id_begin_anew(
    start, worker, store, tmp_path, monkeypatch
):
    """What can not be known is a 503 to try again; what Redis knows, and new ids, go on."""
    (tmp_path / "broken.db").mkdir()
    client = await start(sessions_db_path=str(tmp_path / "broken.db"))
    begun = asyncio.create_task(client.post(CHAT, json={**STREAM}))
    while not (sessions := await worker.claim()):
        await worker.queue.wait_for_work(1)
    await worker.say(sessions[0], "word")
    sid = sessions[0].session_id
    named = await client.post(CHAT, json={**BODY, "session_id": "unheard-of"})
    keyed = await client.post(CHAT, json=BODY, headers={"idempotency-key": "k"})
    status = await client.get("/v1/sessions/unheard-of")
    for refused in (named, keyed, status):
        assert error_of(refused) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) > 0
    attached = asyncio.create_task(client.post(CHAT, json={**STREAM, "session_id": sid}))
    await worker.finish(sessions[0])
    assert (await begun).content == (await attached).content
    assert (await begun).text.endswith("data: [DONE]\n\n")
    assert await worker.claim() == []


async def test_redis_keeps_a_session_until_it_is_archived_and_a_moment_longer(
    start, worker, store, path
):
    """`SESSIONS_TTL_SECONDS` counts from the end, but Redis does not forget before the row is."""
    client = await start(sessions_ttl_seconds=5)
    lock = Archive(path)
    lock.record("x")
    lock._connection.execute("BEGIN IMMEDIATE")
    body = {**STREAM, "session_id": "s"}
    task = asyncio.create_task(client.post(CHAT, json=body))
    while not await worker.queue.depth():
        await asyncio.sleep(0.01)
    await client.post("/v1/cancel/s")
    await task
    for key in (keys.session("s"), keys.events("s")):
        assert OUTBOX_SECONDS < await store.redis.ttl(key) <= OUTBOX_SECONDS + SETTLE_SECONDS
    lock._connection.execute("ROLLBACK")
    lock.close()
    await until_archived(store)
    while await store.redis.ttl(keys.events("s")) > SETTLE_SECONDS:
        await asyncio.sleep(0.01)
    assert SETTLE_SECONDS - 20 < await store.redis.ttl(keys.session("s")) <= SETTLE_SECONDS


async def test_after_the_row_the_ordinary_ttl_counts(start, worker, store):
    """With a long `SESSIONS_TTL_SECONDS` the session stays in Redis for what is left of it."""
    client = await start(sessions_ttl_seconds=900)
    await serve_one(client, worker)
    await until_archived(store)
    while await store.redis.ttl(keys.session("s")) <= SETTLE_SECONDS:
        await asyncio.sleep(0.01)
    assert 890 < await store.redis.ttl(keys.session("s")) <= 900


async def test_old_rows_are_removed_on_a_schedule_of_their_own(start, worker, store, path):
    """After `ARCHIVE_TTL_SECONDS` the row is gone, whatever Redis still has; then nothing is."""
    client = await start(archive_ttl_seconds=1)
    await serve_one(client, worker)
    await until_archived(store)
    reader = Archive(path)
    while reader.record("s"):
        await asyncio.sleep(0.05)
    reader.close()
    assert (await client.get("/v1/sessions/s")).status_code == 200
    await store.redis.flushall()
    assert error_of(await client.get("/v1/sessions/s")) == (404, "session_not_found")


async def test_gateways_of_one_host_share_the_work(start, worker, store, path):
    """Each of many sessions is archived once, whichever gateway takes it."""
    one, two = await start(), await start()
    names = [f"s{n}" for n in range(40)]
    for n, name in enumerate(names):
        await serve_one((one, two)[n % 2], worker, name, texts=["x"])
    await until_archived(store)
    reader = Archive(path)
    assert all(len(reader.read(name, -1)) == 3 for name in names)
    reader.close()


async def test_a_crash_between_row_and_outbox_repeats_harmlessly(client, worker, store, path):
    """An id that is due although its row exists leaves the outbox; the row stays."""
    await serve_one(client, worker)
    await until_archived(store)
    await store.redis.zadd(keys.OUTBOX, {"s": 1})
    await until_archived(store)
    reader = Archive(path)
    assert len(reader.read("s", -1)) == 4
    reader.close()


async def test_what_can_not_be_archived_holds_up_nothing(client, worker, store, path):
    """Ids without a session, unreadable records, logs with gaps: dropped, and the rest goes on."""
    now, _micros = await store.redis.time()
    gap = {"owner": "", "digest": "", "model": "m", "fingerprint": "", "choices": 1, "last": 2}
    gap |= {"status": "finished", "created": now, "enqueued": now, "ended": now}
    async with store.redis.pipeline() as pipe:
        pipe.hset(keys.session("gap"), mapping=gap)
        pipe.xadd(keys.events("gap"), {"e": b"x"}, id="3-0")
        pipe.hset(keys.session("broken"), mapping={"created": "never"})
        pipe.zadd(keys.OUTBOX, {"gone": now - 3, "broken": now - 2, "gap": now - 1})
        for key in (keys.session("gap"), keys.events("gap"), keys.session("broken"), keys.OUTBOX):
            pipe.expire(key, 60)
        await pipe.execute()
    await serve_one(client, worker, "fine")
    await until_archived(store)
    reader = Archive(path)
    assert [reader.record(name) for name in ("gone", "broken", "gap")] == [None] * 3
    assert len(reader.read("fine", -1)) == 4
    reader.close()


async def test_archiving_goes_on_after_redis_was_away(store, worker, path):
    """An archiver that fails is not the end of archiving."""
    thread = ArchiveThread(path)
    archiver = Archiver(store, thread, kept_seconds=60, archive_seconds=60)
    real, failures = store.run, iter([ConnectionError("away"), RuntimeError("a bug")])

    async def run(script, *rest):
        if script == "outbox" and (error := next(failures, None)):
            raise error
        return await real(script, *rest)

    store.run = run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upkeep, "MAX_BACKOFF", 0.01)
        task = asyncio.create_task(archiver.run())
        await store.redis.zadd(keys.OUTBOX, {"gone": 1})
        await until_archived(store)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await thread.close()


async def test_without_persistence_no_file_is_made(start, store, path):
    """`PERSIST_SESSIONS=0` leaves no trace on the disk, and needs none."""
    client = await start(persist_sessions=False)
    worker = ScriptedWorker(store)
    await worker.announce()
    await serve_one(client, worker)
    assert not exists(path)
    assert not await store.redis.exists(keys.OUTBOX)
