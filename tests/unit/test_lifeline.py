"""A worker that died is told from one that is frozen, slow, away or of an older version."""

import asyncio
import signal
import subprocess
import sys
import time

import pytest

from shared import keys
from shared.fleet import Fleet, WorkerInfo
from shared.protocol import GenerationRequest, Message, SamplingParams, TextPart
from shared.queue import SessionQueue, Submission
from shared.store import Store, connect
from shared.tasks import stop
from tests.own_redis import OwnRedis
from tests.stack import ROOT
from worker.lifeline import AGAIN_SECONDS, MISSES, WATCHED, Lifeline, Watch, neighbours


class Looker:
    """A worker's view of the others: its lifeline and its watch; looks when it is told to."""

    def __init__(self, url):
        self.store = Store(connect(url, retries=100))
        self.fleet = Fleet(self.store)
        self.queue = SessionQueue(self.store, kept_seconds=60, watch_ms=60_000)
        self.lifeline = Lifeline(self.store.redis, "looker")
        self.watch = Watch("looker", self.fleet, self.lifeline)
        self.task = asyncio.create_task(self.lifeline.run())

    async def submit(self, *names):
        request = GenerationRequest((Message("user", (TextPart("x"),)),), SamplingParams())
        for name in names:
            await self.queue.submit(Submission(name, "", "d", "m", "fp", False, request), 9)

    async def held(self, worker_id, count=1):
        """Wait until so many connections hold a worker's lifeline."""
        channel = keys.lifeline(worker_id)
        while (await self.store.redis.pubsub_numsub(channel))[0][1] != count:
            await asyncio.sleep(0.005)

    async def sees(self, worker_id):
        """Look until the watch has seen a worker hold its lifeline."""
        await self.held("looker")
        await self.held(worker_id)
        while self.watch._missed.get(worker_id) != 0:
            await self.watch.look()

    async def look(self, times=MISSES):
        for _ in range(times):
            await self.watch.look()

    async def claim(self):
        return [c.session_id for c in (await self.queue.claim("looker", 9)).sessions]

    async def cut(self, worker_id):
        """Have Redis close all lifelines; returns once its own and another one are back."""
        breaks = self.lifeline.breaks
        await self.store.redis.client_kill_filter(_type="pubsub")
        while self.lifeline.breaks == breaks:
            await asyncio.sleep(0.005)
        await self.held("looker")
        await self.held(worker_id)


@pytest.fixture
async def looker(redis_url):
    looker = Looker(redis_url)
    yield looker
    await stop(looker.task)
    await looker.store.close()


@pytest.fixture
def start():
    """Start a process that holds a lifeline; killed at the end."""
    started = []

    def start(url, worker_id="other", sessions=0):
        argv = [sys.executable, "-m", "tests.lifeline_holder", url, worker_id, str(sessions)]
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "holding\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


async def test_the_sessions_of_a_killed_worker_are_free_long_before_its_leases_run_out(
    redis_url, looker, start
):
    """SIGKILL ends its lifeline; after some looks without it, others get its sessions."""
    await looker.submit("a", "b", "c")
    process = start(redis_url, sessions=2)
    await looker.sees("other")
    assert await looker.claim() == ["c"]
    process.kill()
    await looker.held("other", 0)
    await looker.look(MISSES - 1)
    assert await looker.claim() == []
    await looker.store.redis.delete(keys.work_bell("m"))
    await looker.look(1)
    assert await looker.store.redis.llen(keys.work_bell("m")) == 1
    assert await looker.claim() == ["a", "b"]
    assert looker.watch._missed == {}


async def test_a_dead_worker_is_buried_in_a_full_redis_too(redis_url, looker, start):
    """Takeover needs no memory, which may be used up just then; nobody keeps looking in vain."""
    await looker.submit("a")
    process = start(redis_url, sessions=1)
    await looker.sees("other")
    await looker.store.redis.config_set("maxmemory", "1")
    try:
        process.kill()
        await looker.held("other", 0)
        await looker.look()
        assert looker.watch._missed == {}
    finally:
        await looker.store.redis.config_set("maxmemory", "0")
    assert await looker.claim() == ["a"]


async def test_a_frozen_worker_is_not_taken_for_dead(redis_url, looker, start):
    """SIGSTOP leaves its connection open: its sessions stay its own until their leases run out."""
    await looker.submit("a")
    process = start(redis_url, sessions=1)
    await looker.sees("other")
    process.send_signal(signal.SIGSTOP)
    await looker.look(3 * MISSES)
    assert await looker.claim() == []
    process.kill()
    await looker.held("other", 0)
    await looker.look()
    assert await looker.claim() == ["a"]


async def test_a_lifeline_that_only_breaks_costs_nothing(redis_url, looker, start):
    """One that is back before it was missed often enough was never gone."""
    await looker.submit("a")
    start(redis_url, sessions=1)
    await looker.sees("other")
    looker.watch._missed["other"] = MISSES - 1  # as while it is on its way back
    await looker.look(1)
    assert looker.watch._missed == {"other": 0}
    assert await looker.fleet.bury("other") == 0  # the script sees for itself that it lives
    assert await looker.claim() == []


async def test_a_redis_that_refuses_is_asked_less_and_less(redis_url, looker):
    """Tries in vain lie further and further apart; one that succeeds counts as the first again."""
    redis = looker.store.redis
    await redis.acl_setuser("mute", enabled=True, passwords=["+x"], keys=["*"], commands=["+@all"])
    await redis.execute_command("ACL", "SETUSER", "mute", "resetchannels")
    host, database = redis_url.rpartition("@")[2].removeprefix("redis://").split("/")
    mute = Store(connect(f"redis://mute:x@{host}/{database}"))
    lifeline = Lifeline(mute.redis, "mute")
    running, began = asyncio.create_task(lifeline.run()), time.monotonic()
    try:
        while lifeline.breaks < 5:
            await asyncio.sleep(0.005)
        assert time.monotonic() - began >= AGAIN_SECONDS * (1 + 2 + 4 + 8)
        await redis.execute_command("ACL", "SETUSER", "mute", "allchannels")
        await looker.held("mute")
        await looker.cut("mute")
        assert lifeline._pause <= 2 * AGAIN_SECONDS
    finally:
        await stop(running)
        await mute.redis.aclose()
        await redis.acl_deluser("mute")


async def test_only_a_worker_that_left_sessions_behind_is_warned_of(
    redis_url, looker, start, caplog
):
    """Who stopped as it should has given all back; that it is gone is no news for an operator."""
    caplog.set_level("INFO", "unbroken.lifeline")
    await looker.submit("a")
    for name, sessions in (("idle", 0), ("busy", 1)):
        process = start(redis_url, name, sessions)
        await looker.sees(name)
        process.kill()
        await looker.held(name, 0)
        await looker.look()
    found = [(r.worker, r.levelname) for r in caplog.records if r.message == "a worker is gone"]
    assert found == [("idle", "INFO"), ("busy", "WARNING")]


async def test_who_lost_its_own_lifeline_judges_nobody(redis_url, looker, start):
    """Others may have lost theirs for the same reason, and be on their way back."""
    await looker.submit("a")
    process = start(redis_url, sessions=1)
    await looker.sees("other")
    await looker.cut("other")
    process.kill()
    await looker.held("other", 0)
    await looker.held("looker")
    await looker.look(3 * MISSES)
    assert await looker.claim() == []


async def test_nobody_is_judged_while_the_own_lifeline_is_away(redis_url, looker, start):
    """Redis may know of no lifeline at all, as right after its start."""
    await looker.submit("a")
    process = start(redis_url, sessions=1)
    await looker.sees("other")
    await stop(looker.task)
    looker.lifeline.breaks -= 1  # it has not noticed yet
    process.kill()
    await looker.held("other", 0)
    await looker.held("looker", 0)
    await looker.look(3 * MISSES)
    assert await looker.claim() == []


async def test_a_restarted_redis_proves_nothing_until_workers_are_back(tmp_path, start):
    """Who does not come back from it is left to its lease; who does is watched again."""
    own = OwnRedis(tmp_path)
    looker = Looker(own.url)
    try:
        await looker.store.redis.config_set("appendfsync", "always")  # else it may lose a lease
        await looker.submit("a", "b")
        processes = [start(own.url, name, 1) for name in ("one", "two")]
        for name in ("one", "two"):
            await looker.sees(name)
        own.kill()
        processes[0].kill()
        own.start()
        await looker.sees("two")
        await looker.look(3 * MISSES)
        assert await looker.claim() == []
        processes[1].kill()
        await looker.held("two", 0)
        await looker.look()
        assert await looker.claim() == ["b"]
    finally:
        await stop(looker.task)
        await looker.store.close()
        own.kill()


async def test_a_worker_without_a_lifeline_is_left_to_its_lease(looker):
    """One of an older version, or whose lifeline is not up yet, is not dead."""
    await looker.submit("a")
    await looker.queue.claim("older", 1)
    await looker.fleet.announce(WorkerInfo("older", "ready", "m"))
    await looker.held("looker")
    await looker.look(3 * MISSES)
    assert await looker.claim() == []


async def test_who_leaves_the_register_is_watched_on(redis_url, looker, start):
    """A worker that is killed while it drains is found out too."""
    await looker.submit("a")
    process = start(redis_url, sessions=1)
    await looker.sees("other")
    await looker.fleet.leave("other")
    await looker.look(2)
    process.kill()
    await looker.held("other", 0)
    await looker.look()
    assert await looker.claim() == ["a"]


def test_each_worker_is_watched_by_some_others():
    """In a ring each one watches those behind it, however large the fleet."""
    names = [f"w{n:02}" for n in range(30)]
    watched = [other for name in names for other in neighbours(names, name)]
    assert {watched.count(name) for name in names} == {WATCHED}
    assert neighbours(["b", "a"], "a") == ["b"]
    assert neighbours([], "a") == []
