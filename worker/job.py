"""One session: load the request and its log, prepare the prompt, run the engine, write the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from shared import protocol
from shared.errors import UnbrokenError
from shared.protocol import Failed, Finished, Usage
from shared.queue import RENEW_SECONDS
from shared.session_log import replay
from shared.store import FAILED
from worker.engine.messages import Add
from worker.events import NO_MEMORY, delta, failure
from worker.meter import RunMeter, attributes, failed
from worker.parts import FREE_CLAIMS, NOT_NOW, GiveBack, LeaseLost, Turn
from worker.publisher import Ending

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared.protocol import CancelReason, FinishReason, GenerationRequest
    from shared.queue import Claimed
    from shared.session_log import SessionRecord
    from worker.engine.messages import Output, Prompt
    from worker.parts import Parts
    from worker.publisher import SessionWriter

log = logging.getLogger("unbroken.job")

CLAIMS_PER_ATTEMPT = 4
"""So many claims count as an attempt, since a worker may die before its engine has begun."""


class SessionJob:
    """One run of a session on this worker.

    Args:
        claimed: the session and the lease to write it under.
        parts: the worker's shared parts.
    """

    def __init__(self, claimed: Claimed, parts: Parts) -> None:
        self.claimed, self._parts = claimed, parts
        self._reason: CancelReason | None = None
        self._interrupted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._handles: dict[int, int] = {}  # engine handle -> choice
        self._last: dict[int, Output] = {}  # choice -> its last output
        self._counts: dict[int, tuple[int, int]] = {}  # choice -> tokens, reasoning tokens so far
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writer: SessionWriter | None = None
        self._prompt_tokens, self._scored = 0, False  # scored: log probabilities are asked for
        self._meter: RunMeter | None = None
        self._may_be_abandoned = False  # before it is known whether it needs a watcher
        self._attempt: asyncio.Task[None] | None = None
        self._turn = Turn(parts.trials)

    def abandon(self) -> None:
        """End the session because nobody watches it, unless it goes on all the same."""
        if self._may_be_abandoned:
            self.cancel("abandoned")

    def cancel(self, reason: CancelReason) -> None:
        """End the session at its next step, or now where it is not in the engine yet."""
        ends = self._writer is not None and self._writer.ending is not None
        if self._reason is None and not ends:
            self._reason = reason
            log.info("cancel", extra={"session": self.claimed.session_id, "reason": reason})
            for handle in self._handles:
                self._parts.engine.cancel(handle, reason)
            if not self._handles and not self._interrupted.done():
                self._interrupted.set_result(None)

    def lose(self) -> None:
        """Drop the session: the lease is lost."""
        self._leave(LeaseLost())

    def hand_over(self) -> None:
        """Give the session back, for another worker to go on; one that is about to end may end."""
        self._leave(GiveBack())

    def _leave(self, why: Exception) -> None:
        for future in (self._done, self._interrupted):
            if not future.done():
                future.set_exception(why)
                future.exception()  # either may stay unread

    def doubt(self) -> None:
        """Find out whether the session is another's; if Redis has lost it, write it again."""
        if self._writer:
            self._writer.doubt()
        else:
            self.lose()

    async def run(self) -> None:
        """Run the session to its end.

        Raises:
            LeaseLost: another worker has the session, or it is gone.
            GiveBack: the session can be tried again.
        """
        sid = self.claimed.session_id
        try:
            record = await self._parts.log.record(sid)
        except UnbrokenError as error:
            log.error("session discarded", extra={"session": sid, "why": error.message})  # noqa: TRY400
            await self._parts.queue.discard(self.claimed)
            raise LeaseLost from None
        if record is None:
            raise LeaseLost
        self._may_be_abandoned = not record.runs_unwatched
        self._writer = writer = self._parts.publisher.open(self.claimed, record.last + 1, self.lose)
        extra = {"session": sid, "attempt": record.attempts + 1, "index": record.last + 1}
        log.info("stream start", extra=extra)
        self._meter = meter = RunMeter(record.model, record, self.claimed.lease)
        try:
            ending = await self._generate(record)
            self._drop_handles()
            if not await writer.finish(ending):
                raise LeaseLost
            meter.ended(ending)
            extra = {"session": sid, "status": ending.status, **attributes(ending)}
            log.info("stream stop", extra=extra)
        finally:
            meter.close()
            self._drop_handles()
            writer.close()

    async def fail(self, error: UnbrokenError) -> None:
        """End the session as failed without running it."""
        record = await self._parts.log.record(self.claimed.session_id)
        if record is not None:
            writer = self._parts.publisher.open(self.claimed, record.last + 1, self.lose)
            event = Failed(error.code, error.message, error.param)
            if await writer.finish(Ending(event, "failed")):
                failed(error.code)

    async def _generate(self, record: SessionRecord) -> Ending:
        try:
            request, generated = await self._load(record)
            self._check_attempts(record)
            prompt = await self._prepare_in_turn(request, record)
            if prompt is None:
                return self._ending(request.sampling.n)
            trial = record.attempts > 0 or record.claims > FREE_CLAIMS
            self._run_engine(prompt, request, generated, trial=trial)
            await self._done
            return self._ending(request.sampling.n)
        except GiveBack as why:
            if not (why.lacked_memory and self._is_last(record)):
                raise
            return Ending(Failed("unavailable", NO_MEMORY), "failed", self._usage())
        except UnbrokenError as error:
            if error.code in NOT_NOW:
                raise GiveBack(waited=not self._handles) from None
            return Ending(Failed(error.code, error.message, error.param), "failed", self._usage())
        except msgspec.MsgspecError:
            event = Failed("generation_failed", "The session's request or log is not readable.")
            return Ending(event, "failed", self._usage())
        finally:
            self._turn.leave()

    async def _load(self, record: SessionRecord) -> tuple[GenerationRequest, list[tuple[int, ...]]]:
        """Read the request, and the tokens of each choice so far."""
        sid = self.claimed.session_id
        try:
            raw, entries = await asyncio.gather(
                self._parts.queue.request(sid), self._parts.log.read_all(sid)
            )
        except FAILED:
            self._check_attempts(record)  # it may fail like this for ever
            raise
        if raw is None:
            raise UnbrokenError("generation_failed", "The request is no longer kept.")
        request = protocol.decode_request(raw)
        assert self._writer is not None  # noqa: S101 - run() opened it
        self._writer.keep(record, raw, [entry.data for entry in entries])
        generated = replay(entries, request.sampling.n)
        thoughts = replay(entries, request.sampling.n, "reasoning")
        self._counts = {c: (len(ids), len(thoughts[c])) for c, ids in enumerate(generated)}
        self._prompt_tokens = record.prompt_tokens
        return request, generated

    def _check_attempts(self, record: SessionRecord) -> None:
        """Give up a session under which workers or engines died again and again."""
        most = self._parts.max_attempts
        if record.attempts >= most or record.claims > most * CLAIMS_PER_ATTEMPT:
            tries = max(record.attempts, record.claims - 1)
            raise UnbrokenError("generation_failed", f"The generation failed {tries} times.")

    def _is_last(self, record: SessionRecord) -> bool:
        """Whether this run is the last attempt, and has brought no token."""
        end = self._writer.first + len(self._writer.pending) if self._writer else 0
        return end == record.last + 1 and record.attempts + 1 >= self._parts.max_attempts

    def _on_begin(self) -> None:
        """Count this run as an attempt, from now on: its engine has begun it."""
        self._parts.intake.begin(self.claimed.session_id)
        if self._attempt is None:
            self._attempt = asyncio.create_task(self._count_attempt(), name="attempt")

    async def _count_attempt(self) -> None:
        with contextlib.suppress(*FAILED):  # what is not counted now is so by its claims
            await self._parts.queue.attempt(self.claimed)

    async def _prepare_in_turn(
        self, request: GenerationRequest, record: SessionRecord
    ) -> Prompt | None:
        """Prepare; one whose workers died again and again does so in its turn, as an attempt."""
        if record.claims > FREE_CLAIMS:
            await self._turn.take(self._interrupted)
            if not self._interrupted.done():
                await self._count_attempt()
        return await self._prepare(request, record)

    async def _prepare(self, request: GenerationRequest, record: SessionRecord) -> Prompt | None:
        """Fetch, decode and tokenize; None if the session is cancelled meanwhile.

        Raises:
            UnbrokenError: the request is at fault, or its media are no longer what they were.
        """
        build = self._parts.prompts.build(request, begun=any(map(any, self._counts.values())))
        task = asyncio.ensure_future(build)
        try:
            either: set[asyncio.Future[Any]] = {task, self._interrupted}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._interrupted.done():
                self._interrupted.result()  # raises LeaseLost
                return None
            prompt, hashes = task.result()
        finally:
            task.cancel()
        await self._begin(prompt, ",".join(hashes), record)
        return prompt

    async def _begin(self, prompt: Prompt, media: str, record: SessionRecord) -> None:
        """Note what the session is generated from; it must be what it was begun with."""
        self._prompt_tokens = len(prompt.input_ids)
        engine = self._parts.engine.state.ready
        if engine is None:  # it died meanwhile
            raise GiveBack
        for last_try in (False, True):
            outcome = await self._parts.queue.begin(
                self.claimed, engine.fingerprint, media, self._prompt_tokens, exact=engine.exact
            )
            if outcome != "lost":
                break
            if last_try:
                raise LeaseLost
            self.doubt()  # Redis may have lost it meanwhile
            await asyncio.wait({self._interrupted}, timeout=RENEW_SECONDS)
        exact = record.exact and (
            record.last == 0 or (record.engine == engine.fingerprint and engine.exact)
        )
        assert self._writer is not None  # noqa: S101 - run() opened it
        self._writer.record = msgspec.structs.replace(
            record,
            engine=engine.fingerprint,
            media=media,
            prompt_tokens=self._prompt_tokens,
            exact=exact,
        )
        if outcome == "media_changed":
            raise UnbrokenError(
                "media_changed",
                "An image or a video has changed since the generation began, so it cannot go on.",
                "messages",
            )

    def _run_engine(
        self,
        prompt: Prompt,
        request: GenerationRequest,
        generated: Sequence[tuple[int, ...]],
        *,
        trial: bool,
    ) -> None:
        self._scored = request.sampling.logprobs is not None
        self._parts.intake.send(self.claimed.session_id)
        if self._meter:
            self._meter.in_engine(self._prompt_tokens, generated)
        for choice in range(request.sampling.n):
            handle = self._parts.engine.new_handle()
            self._handles[handle] = choice
            self._parts.engine.add(
                Add(handle, prompt, request.sampling_for(choice), generated[choice], trial),
                self._on_output,
                self._on_begin,
            )
        if self._reason:
            for handle in self._handles:
                self._parts.engine.cancel(handle, self._reason)

    def _on_output(self, output: Output | None) -> None:
        """Take one step's output of one choice; None says that the engine died."""
        try:
            if not self._done.done():
                self._take(output)
        except Exception:
            log.exception("an output was not taken", extra={"session": self.claimed.session_id})
            self._done.set_exception(UnbrokenError("generation_failed", "An output was lost."))

    def _take(self, output: Output | None) -> None:
        if output is None:
            blamed = any(self._parts.engine.blames(handle) for handle in self._handles)
            self._done.set_exception(GiveBack(blameless=not blamed))
            return
        self._turn.leave()
        choice = self._handles[output.handle]
        if output.error:
            self._done.set_exception(failure(output.error))
            return
        self._counts[choice] = output.completion_tokens, output.reasoning_tokens
        assert self._meter and self._writer  # noqa: S101, PT018 - run() opened them
        self._meter.output(choice, output.completion_tokens)
        for piece in output.pieces:
            self._writer.write(delta(choice, piece, scored=self._scored))
        if output.finish:
            self._last[choice] = output
            if len(self._last) == len(self._handles):
                self._done.set_result(None)

    def _ending(self, choices: int) -> Ending:
        cancelled = self._reason
        if self._last:
            cancelled = next((o.cancelled for o in self._last.values() if o.cancelled), None)
        reasons: list[FinishReason] = [
            (self._last[c].finish or "stop") if c in self._last else "stop" for c in range(choices)
        ]
        event = Finished(tuple(reasons), self._usage(), cancelled)
        return Ending(event, "cancelled" if cancelled else "finished", event.usage)

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(tokens for tokens, _ in self._counts.values()),
            reasoning_tokens=sum(thoughts for _, thoughts in self._counts.values()),
            cached_tokens=self._last[0].cached_tokens if 0 in self._last else 0,  # all share it
        )

    def _drop_handles(self) -> None:
        for handle, choice in self._handles.items():
            if choice not in self._last:
                self._parts.engine.abort(handle)
        self._handles.clear()
