"""`LeasedWorker`: an arq worker whose poll is one `claim` script behind a doorbell.

arq gives the job format, the function registry and `run_job`; leases replace its in-progress keys,
so that a dead worker's sessions are free after seconds, and only the holder ends a session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, cast

from arq.connections import ArqRedis
from arq.worker import Worker, func

from shared import keys, logs, metrics
from shared.errors import UnbrokenError
from shared.fleet import ANNOUNCE_SECONDS, Fleet
from shared.overdue import Overdue
from shared.presence import SWEEP_SECONDS, Sweeper
from shared.queue import (
    JOB_FUNCTION,
    LEASE_MS,
    RENEW_SECONDS,
    Claimed,
    job_deserializer,
    job_serializer,
)
from shared.store import FAILED, UNAVAILABLE, Outage, is_wrong_type
from shared.tasks import stop
from worker.balance import FIRST_SECONDS, Balance
from worker.handover import hand_over
from worker.job import SessionJob
from worker.lifeline import LOOK_SECONDS, Lifeline, Watch
from worker.parts import GiveBack, LeaseLost

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from arq.typing import WorkerCoroutine

    from shared.presence import Presence
    from shared.queue import SessionQueue
    from shared.store import Store
    from worker.parts import Parts
    from worker.pulse import Pulse

log = logging.getLogger("unbroken.consumer")

IDLE_SECONDS = 1.0
"""Longest sleep of an idle worker: it looks for sessions whose worker died."""

PAUSE_SECONDS = 0.5
"""Pause after Redis failed, and longest sleep of a worker without room."""

CLAIM_AT_ONCE = 4
"""Most sessions of one claim, so that a burst spreads over the workers."""

LAST_SECONDS = 1.0
"""Given to sessions that are given back at the end of a drain, before their tasks are cancelled."""

SIGNAL_SECONDS = 0.025
"""How often the cancel flags of the running sessions are read."""


class LeasedWorker(Worker):
    """Claims sessions while the engine has room, and keeps their leases.

    Args:
        worker_id: unique for each start of the process.
        store: Redis client for commands.
        bell: a queue on a client of its own, whose connection may block.
        queue: the session queue.
        presence: cancel flags and watchers.
        parts: what the jobs need.
        slots: how many choices of sessions run at once.
        pulse: tells whether this process was frozen.
        queue_timeout_seconds: how long a session may wait for a worker.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        store: Store,
        bell: SessionQueue,
        queue: SessionQueue,
        presence: Presence,
        parts: Parts,
        slots: int,
        pulse: Pulse,
        queue_timeout_seconds: float = 600,
    ) -> None:
        pool = ArqRedis(
            connection_pool=store.redis.connection_pool,
            job_serializer=job_serializer,
            job_deserializer=job_deserializer,
            default_queue_name=keys.QUEUE,
        )
        super().__init__(
            functions=[func(cast("WorkerCoroutine", self.run_session), name=JOB_FUNCTION)],
            queue_name=keys.QUEUE,
            redis_pool=pool,
            handle_signals=False,
            max_jobs=slots,
            max_tries=2**31,  # a session's attempts are counted by its claims
            job_timeout=None,  # type: ignore[arg-type]
            keep_result=0,
            job_serializer=job_serializer,
            job_deserializer=job_deserializer,
            log_results=False,
        )
        self.worker_id, self._queue, self._bell = worker_id, queue, bell
        self._presence, self._parts = presence, parts
        self._leases: dict[str, str] = {}
        self._choices: dict[str, int] = {}  # of the sessions with a lease
        self._jobs: dict[str, SessionJob] = {}
        self._sweeper = Sweeper(store, queue, presence)
        self._overdue = Overdue(queue, queue_timeout_seconds)
        self._lifeline = Lifeline(store.redis, worker_id)
        self._watch = Watch(worker_id, Fleet(store), self._lifeline)
        self._balance = Balance(worker_id, Fleet(store))
        self._let_others = False  # they had their chance, before this claim
        self._loops: list[asyncio.Task[None]] = []
        self._pulse = pulse
        self._renewed = time.monotonic()
        self._intake = parts.intake
        self.can_claim = asyncio.Event()

    @property
    def running(self) -> int:
        """Count the sessions that run here."""
        return len(self._leases)

    @property
    def taken(self) -> int:
        """Count the slots that they take: one for each choice."""
        return sum(self._choices[session_id] for session_id in self._leases)

    async def main(self) -> None:
        """Claim and run sessions until cancelled; what keeps them goes on until `drain`."""
        for seconds, step in (
            (RENEW_SECONDS, self._renew),
            (SIGNAL_SECONDS, self._read_signals),
            (SWEEP_SECONDS, self._sweeper.sweep),
            (SWEEP_SECONDS, self._overdue.sweep),
            (LOOK_SECONDS, self._watch.look),
            (ANNOUNCE_SECONDS, self._compare),
        ):
            self._loops.append(asyncio.create_task(_forever(seconds, step), name=step.__name__))
        self._loops.append(asyncio.create_task(self._pulse.run(), name="pulse"))
        self._loops.append(asyncio.create_task(self._lifeline.run(), name="lifeline"))
        outage = Outage(log, "no sessions can be claimed")
        while True:
            await self.can_claim.wait()
            await _through_outages(self._poll_iteration, outage)

    async def _poll_iteration(self) -> None:
        """Claim what fits and start it, else wait: for room, or the bell, or an expiring lease."""
        if time.monotonic() - self._renewed > LEASE_MS / 2000:
            await self._renew()  # after an outage: our own sessions must not look abandoned
        self._intake.changed.clear()
        # Also for no slot: what a dead worker left is put back, and the bell rung for another
        # worker, since we may have taken the ring that was meant for whoever has room, or has less.
        self._let_others = self._balance.is_heavy(self.taken) and not self._let_others
        free = 0 if self._let_others else min(self._free(), CLAIM_AT_ONCE)
        refused = self._intake.refused()
        claim = await self._queue.claim(self.worker_id, free, refused)
        for claimed, choices in zip(claim.sessions, claim.choices, strict=True):
            self._start(claimed, choices)
        if claim.waiting and (self._let_others or (refused and not claim.sessions)):
            await asyncio.sleep(FIRST_SECONDS)  # and leave the bell to them
        elif not self._free():  # leave the bell to those that have room
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._intake.changed.wait(), PAUSE_SECONDS)
        elif not claim.sessions:
            expiry = IDLE_SECONDS if claim.next_expiry_ms is None else claim.next_expiry_ms / 1000
            self._let_others = False
            await self._bell.wait_for_work(min(IDLE_SECONDS, max(expiry, 0.05)))

    async def _compare(self) -> None:
        await self._balance.look(self._queue.model)

    def _free(self) -> int:
        """Return how many slots may be claimed now; never below 0."""
        return max(0, min(self.max_jobs - self.taken, self._intake.room()))

    def _start(self, claimed: Claimed, choices: int) -> None:
        sid = claimed.session_id
        before = self.tasks.get(sid)
        if sid in self._jobs:
            self._jobs[sid].lose()
        self._leases[sid], self._choices[sid] = claimed.lease, choices
        self._intake.take(sid)
        task = self.loop.create_task(self._run_after(before, claimed), name=f"session {sid}")
        self.tasks[sid] = task
        task.add_done_callback(lambda done: self._ended(claimed, done))

    async def _run_after(self, before: asyncio.Task[Any] | None, claimed: Claimed) -> None:
        if before is not None:
            await asyncio.gather(before, return_exceptions=True)
        try:
            await self.run_job(claimed.session_id, 0)
        except FAILED as error:  # before the session began: it is not to blame
            if is_wrong_type(error):  # or its job is
                await self.finish_failed_job(claimed.session_id, None)
                return
            await asyncio.sleep(PAUSE_SECONDS)
            await self._give_back(claimed, GiveBack(blameless=isinstance(error, UNAVAILABLE)))

    def _ended(self, claimed: Claimed, task: asyncio.Task[Any]) -> None:
        sid = claimed.session_id
        if self.tasks.get(sid) is task:
            del self.tasks[sid]
        if self._leases.get(sid) == claimed.lease:
            del self._leases[sid], self._choices[sid]
        self._intake.leave(sid)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("session job broke", extra={"session": sid, "error": type(error).__name__})

    async def run_session(
        self, _ctx: dict[Any, Any], session_id: str, request_id: object = None
    ) -> None:
        """Run one claimed session: the function that every queued arq job names.

        What is logged meanwhile bears the id of the HTTP request that it came with.
        """
        logs.request_id.set(str(request_id)[:64] if request_id else None)
        claimed = Claimed(session_id, self._leases[session_id])
        job = self._jobs[session_id] = SessionJob(claimed, self._parts)
        try:
            await job.run()
        except LeaseLost:
            metrics.LEASES_LOST.inc()
            log.info("session dropped", extra={"session": session_id})
        except GiveBack as why:
            if why.waited:
                await asyncio.sleep(PAUSE_SECONDS)
            await self._give_back(claimed, why)
        except asyncio.CancelledError:
            await self._give_back(claimed, GiveBack())
            raise
        except FAILED as error:
            log.warning("redis failed a job", extra={"error": type(error).__name__})
            await asyncio.sleep(PAUSE_SECONDS)
            await self._give_back(claimed, GiveBack(blameless=isinstance(error, UNAVAILABLE)))
        except Exception:
            log.exception("session job failed", extra={"session": session_id})
            await self._give_back(claimed, GiveBack(blameless=False))
        finally:
            if self._jobs.get(session_id) is job:
                del self._jobs[session_id]

    async def _give_back(self, claimed: Claimed, why: GiveBack) -> None:
        if why.lacked_memory:
            self._intake.refuse(claimed.session_id)
        try:
            if await self._queue.release(claimed, blameless=why.blameless, waited=why.waited):
                metrics.GIVEN_BACK.inc()
                log.info("session given back", extra={"session": claimed.session_id})
        except FAILED:  # its lease runs out by itself
            log.warning("could not give back", extra={"session": claimed.session_id})

    async def finish_job(self, job_id: str, *_args: Any, **_kwargs: Any) -> None:
        """Remove arq's retry counter; `finish.lua` or `release.lua` has settled the session."""
        with contextlib.suppress(*FAILED):  # it expires by itself
            await self.pool.delete(keys.RETRY + job_id)

    async def finish_failed_job(self, job_id: str, _result_data: bytes | None) -> None:
        """End a session as failed whose arq job is missing or unreadable."""
        if lease := self._leases.get(job_id):
            error = UnbrokenError("generation_failed", "The queued job is no longer readable.")
            await SessionJob(Claimed(job_id, lease), self._parts).fail(error)

    async def _renew(self) -> None:
        held, asked = dict(self._leases), time.monotonic()
        lost = await self._queue.renew(held)
        self._renewed = time.monotonic()
        for sid in lost:
            if self._leases.get(sid) == held[sid] and sid in self._jobs:
                job = self._jobs[sid]
                (job.doubt if self._pulse.steady else job.lose)()
        self._pulse.confirm(asked)

    async def _read_signals(self) -> None:
        jobs = dict(self._jobs)
        for sid, signals in (await self._presence.signals(list(jobs))).items():
            if signals.cancel:
                jobs[sid].cancel(signals.cancel)
            elif not signals.watched:
                jobs[sid].abandon()

    async def drain(self, grace_seconds: float, free_slots: Sequence[int] = ()) -> None:
        """Claim no more; let the running sessions end, or go on elsewhere; give back the rest.

        Args:
            grace_seconds: how long that may take.
            free_slots: the room of each live worker that could take over; sessions for which there
                is none run on here.
        """
        self.can_claim.clear()
        if self.main_task:
            await stop(self.main_task)
        end = time.monotonic() + grace_seconds
        await hand_over(self._jobs, self._queue, free_slots, grace_seconds)
        if self.tasks:
            await asyncio.wait(set(self.tasks.values()), timeout=max(0, end - time.monotonic()))
        for job in list(self._jobs.values()):
            job.hand_over()
        if late := set(self.tasks.values()):
            _done, late = await asyncio.wait(late, timeout=LAST_SECONDS)
            held = dict(self._leases)
            await stop(*late)
            for claimed in held.items():  # cancelled, they may not have come to it
                await self._give_back(Claimed(*claimed), GiveBack())
        await stop(*self._loops)


async def _through_outages(step: Callable[[], Awaitable[None]], outage: Outage) -> None:
    """Run a step; while Redis is away or refuses, say so once and wait a moment instead."""
    try:
        await step()
        outage.over()
    except FAILED as error:
        outage.begins(error)
        await asyncio.sleep(PAUSE_SECONDS)


async def _forever(seconds: float, step: Callable[[], Awaitable[None]]) -> None:
    """Repeat a step at a fixed pace, outages of Redis or not."""
    outage = Outage(log, f"redis fails {step.__name__.strip('_')}")
    while True:
        started = time.monotonic()
        try:
            await _through_outages(step, outage)
        except Exception:  # a bug here must not end the renewing of leases
            log.exception("worker loop failed")
        await asyncio.sleep(max(0.0, seconds - (time.monotonic() - started)))
