"""The worker's composition root: settings, engine, prompt preparation, consumer, drain."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shared import logs, metrics
from shared.archive import hold_seconds
from shared.fleet import ANNOUNCE_SECONDS, Fleet, WorkerInfo
from shared.presence import Presence
from shared.queue import SessionQueue
from shared.session_log import SessionLog
from shared.settings import WorkerSettings
from shared.store import FAILED, Store, connect
from shared.tasks import stop
from worker import healthcheck, launch, meter
from worker.consumer import LeasedWorker
from worker.engine.messages import EngineConfig, Limits
from worker.engine_client import EngineClient
from worker.parts import Parts
from worker.prompts import PromptBuilder
from worker.publisher import Publisher
from worker.pulse import Pulse

if TYPE_CHECKING:
    from worker.engine_client import EngineState

log = logging.getLogger("unbroken.worker")

FOREVER_RETRIES = 10


class WorkerProcess:
    """Everything one worker runs, and its life: start, announce, serve, drain."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self.id = secrets.token_hex(6)
        self._since = 0
        self._draining = False
        self._load = meter.Load()
        self._store = Store(connect(settings.redis_url, retries=FOREVER_RETRIES))
        self._bell_store = Store(connect(settings.redis_url, retries=FOREVER_RETRIES))
        archived, kept = settings.persist_sessions, settings.sessions_ttl_seconds
        kept = hold_seconds(kept) if archived else kept
        watch_ms = int(settings.cancel_after_disconnect_seconds * 1000)
        self._fleet = Fleet(self._store)
        pulse = Pulse(kept)
        self._queue = queue = SessionQueue(
            self._store, kept_seconds=kept, watch_ms=watch_ms, archived=archived
        )
        self._bell = SessionQueue(self._bell_store, kept_seconds=kept, watch_ms=watch_ms)
        self._publisher = Publisher(
            SessionLog(self._store, archived=archived),
            kept_seconds=kept,
            restore=queue.restore,
            is_steady=lambda: pulse.steady,
        )
        self._template = launch.Template(settings.log_level)
        self._engine = EngineClient(
            engine_config(settings),
            self._on_engine_state,
            step_seconds=settings.step_timeout_seconds,
            launch=launch.for_engine(self._template),
        )
        self._prompts = PromptBuilder(settings, launch=launch.for_processor(self._template))
        parts = Parts(
            log=SessionLog(self._store),
            queue=queue,
            publisher=self._publisher,
            prompts=self._prompts,
            engine=self._engine,
            max_attempts=settings.max_attempts,
        )
        self._engine.on_step_end = self._publisher.flush
        self._consumer = LeasedWorker(
            worker_id=self.id,
            store=self._store,
            bell=self._bell,
            queue=queue,
            presence=Presence(self._store, watch_ms=watch_ms),
            parts=parts,
            slots=settings.max_batch_size,
            pulse=pulse,
            queue_timeout_seconds=settings.queue_timeout_seconds,
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain."""
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked.set)
        log.info("startup", extra={"worker": self.id, "model": self._settings.model_repo_id})
        end_metrics = meter.serve(self._settings.metrics_host, self._settings.metrics_port)
        self._publisher.start()
        announcing = asyncio.create_task(self._announce_forever(), name="announce")
        starting = asyncio.create_task(self._start_parts(), name="start")
        serving = asyncio.create_task(self._consumer.async_run(), name="serve")
        try:
            waiting = {asyncio.create_task(asked.wait()), serving, announcing}
            await asyncio.wait({starting}, return_when=asyncio.FIRST_EXCEPTION)
            if not starting.exception():  # else a restart is the best there is
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._shut_down(starting, announcing)
            end_metrics()
        for task in (starting, serving):
            if task.done() and not task.cancelled():
                task.result()  # a bug is no clean exit

    async def _start_parts(self) -> None:
        await asyncio.gather(self._engine.start(), self._prompts.start())
        self._on_engine_state(self._engine.state)

    def _on_engine_state(self, state: EngineState) -> None:
        """Claim only while the engine and the prompt preparation are ready."""
        ready = state.phase == "ready" and self._prompts.ready and not self._draining
        if ready and not self._consumer.can_claim.is_set():
            self._queue.model = self._bell.model = state.ready.model if state.ready else ""
            self._since = self._since or int(time.time())
            log.info("model ready", extra={"model": self._settings.model_repo_id})
            self._consumer.can_claim.set()
            metrics.WORKER_READY.set(1)
        elif not ready:
            self._consumer.can_claim.clear()
            metrics.WORKER_READY.set(0)

    def _info(self) -> WorkerInfo:
        state, ready = self._engine.state, self._engine.state.ready
        phase, reason = describe(state, self._prompts)
        return WorkerInfo(
            id=self.id,
            state="draining" if self._draining else phase,
            model=ready.model if ready else "",
            reason=reason,
            context_length=ready.context_length if ready else 0,
            fingerprint=short_fingerprint(ready.fingerprint) if ready else "",
            since=self._since,
            running=self._consumer.running,
            taken=self._consumer.taken,
            slots=self._settings.max_batch_size,
            pid=os.getpid(),
            tokens_per_second=self._load.tokens_per_second,
            cache_usage=self._load.cache_usage if self._consumer.running else 0.0,
            defaults=ready.defaults if ready else {},
            token_bytes=ready.token_bytes if ready else 0,
        )

    def _write_status(self, info: WorkerInfo) -> None:
        if self._settings.status_file:
            healthcheck.write(
                Path(self._settings.status_file),
                state=info.state,
                reason=info.reason,
                model=info.model,
                running=info.running,
                slots=info.slots,
            )

    async def _announce_forever(self) -> None:
        last = None
        while True:
            self._on_engine_state(self._engine.state)
            self._load.look()
            info = self._info()
            self._write_status(info)
            with contextlib.suppress(*FAILED):
                await self._fleet.announce(info)
            for _ in range(10):  # a change of state is said at once
                await asyncio.sleep(ANNOUNCE_SECONDS / 10)
                last, info = info, self._info()
                if (last.state, last.reason) != (info.state, info.reason):
                    break

    def _can_take_over(self, worker: WorkerInfo) -> bool:
        ours = self._engine.state.ready
        same = ours is None or worker.model == ours.model
        room = worker.running < worker.slots
        return worker.id != self.id and worker.state == "ready" and same and room

    async def _shut_down(self, *background: asyncio.Task[None]) -> None:
        log.info("shutdown", extra={"worker": self.id, "running": self._consumer.running})
        self._draining = True
        self._consumer.can_claim.clear()
        self._write_status(self._info())
        free: list[int] = []
        with contextlib.suppress(*FAILED):
            await self._fleet.leave(self.id)
            free = [w.slots - w.running for w in await self._fleet.live() if self._can_take_over(w)]
        await stop(*background)
        await self._consumer.drain(self._settings.drain_seconds, free)
        with contextlib.suppress(*FAILED):
            await self._fleet.leave(self.id)
        await self._publisher.close()
        await asyncio.gather(self._engine.close(), self._prompts.close())
        self._template.close()
        await self._store.close()
        await self._bell_store.close()
        log.info("stopped", extra={"worker": self.id})


def short_fingerprint(fingerprint: str) -> str:
    """Hash what exact continuation depends on into a `system_fingerprint` of OpenAI's form."""
    return f"fp_{hashlib.sha256(fingerprint.encode()).hexdigest()[:12]}"


def describe(
    state: EngineState, prompts: PromptBuilder
) -> tuple[Literal["loading", "ready", "failed"], str]:
    """Tell a worker's phase, and the reason for it unless it is ready."""
    if state.phase == "failed" or prompts.failed:
        return "failed", state.reason or prompts.failed or ""
    if state.phase == "ready":
        return ("ready", "") if prompts.ready else ("loading", "loading the processor")
    if state.phase == "dead":
        return "loading", state.reason or "the engine is restarted"
    if state.loading is None:
        return "loading", "starting the engine"
    percent = state.loading.fraction
    return "loading", state.loading.stage + (f" {percent:.0%}" if percent is not None else "")


def engine_config(settings: WorkerSettings) -> EngineConfig:
    """Say how the engine process shall load and run the model."""
    return EngineConfig(
        model=settings.model_repo_id,
        hf_token=settings.hf_token,
        device_map=settings.device_map,
        dtype=settings.torch_dtype,
        trust_remote_code=settings.trust_remote_code,
        max_batch_size=settings.max_batch_size,
        context_length=settings.context_length,
        threads=settings.engine_threads,
        limits=Limits(
            settings.cache_bytes or None, settings.prefix_cache_bytes, settings.prefill_chunk_tokens
        ),
        exact={"auto": None, "0": False, "1": True}[settings.exact],
        log_level=settings.log_level,
        graphs=settings.cuda_graphs == "auto",
        pace_seconds=1 / settings.max_steps_per_second if settings.max_steps_per_second else 0.0,
    )


def main() -> None:
    """Run a worker as this process."""
    settings = WorkerSettings()
    logs.configure(settings.log_level)
    asyncio.run(_serve(settings))


async def _serve(settings: WorkerSettings) -> None:
    await WorkerProcess(settings).run()


if __name__ == "__main__":
    main()
