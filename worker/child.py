"""A pool of child processes that answer one request at a time and may die without harm.

A child runs a handler named `"module:factory"`: `factory(*args)` is called once in the child and
returns the function that answers each request. Arrays travel outside the pickle, uncopied.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from shared import metrics
from shared.errors import UnbrokenError
from worker.child_entry import receive, send
from worker.launch import Launch, execute

log = logging.getLogger("unbroken.child")

T = TypeVar("T")


class ChildDied(Exception):  # noqa: N818  # what happened to the child
    """The child ended, or was ended, before it answered."""


class ChildTimeout(ChildDied):
    """The child did not answer in time, and was killed."""


class ChildError(Exception):
    """The handler raised something unexpected; the child lives on."""


class StartFailed(Exception):  # noqa: N818  # the same
    """The child's factory failed; the text is its reason, fit for an operator."""


class PoolFull(Exception):  # noqa: N818  # a state, not a fault
    """Too many calls are waiting already."""


class PoolClosed(Exception):  # noqa: N818  # the same
    """The pool was closed."""


class _Child:
    """One process and the socket to it. `exchange` and `reap` block: they run in threads."""

    def __init__(self, launch: Launch) -> None:
        level = logging.getLevelName(logging.getLogger().getEffectiveLevel())
        self.sock, self.process = launch("worker.child_entry:main", (level,))

    def exchange(self, message: object) -> tuple[Any, ...]:
        """Send a message and wait for the answer.

        Raises:
            ChildDied: the child ended before it answered.
        """
        try:
            send(self.sock, message)
            answer: tuple[Any, ...] = receive(self.sock)
        except (OSError, EOFError):
            raise ChildDied(f"the child ended with {self.process.wait()}") from None
        return answer

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """End the process at once; whoever waits for its answer gets `ChildDied`.

        The socket is shut too: of a child that is not forked yet, the other end lies in a queue.
        """
        self.process.kill()
        with contextlib.suppress(OSError):  # it is closed already
            self.sock.shutdown(socket.SHUT_RDWR)

    def reap(self) -> None:
        """Kill the process and wait until it is gone."""
        self.kill()
        self.process.wait()
        self.sock.close()


class _Slot:
    """A place in the pool; empty while its child is dead."""

    def __init__(self) -> None:
        self.child: _Child | None = None


class ChildPool:
    """Up to `size` children of one kind, used one call at a time each, in the callers' order.

    Args:
        target: `"module:factory"`, imported in the child only.
        args: the factory's arguments (picklable).
        size: number of processes.
        timeout: seconds one call may take once a child has it; then the child is killed.
        start_timeout: seconds a child may take to get ready.
        max_waiting: calls that may wait for a child before `call` raises `PoolFull`.
        launch: starts a child.
    """

    def __init__(
        self,
        target: str,
        args: tuple[Any, ...] = (),
        *,
        size: int = 1,
        timeout: float = 60,
        start_timeout: float = 600,
        max_waiting: int = 1024,
        launch: Launch = execute,
    ) -> None:
        self._target, self._args, self._size = target, args, size
        self._launch = launch
        self._timeout, self._start_timeout = timeout, start_timeout
        self._max_waiting = max_waiting
        self._slots: list[_Slot] = []
        self._free: deque[_Slot] = deque()  # not empty only while nobody waits
        self._waiting: deque[asyncio.Future[_Slot]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="child-pool")
        self._closed = False

    async def start(self) -> None:
        """Start all children and wait until each is ready; to be called once.

        Raises:
            StartFailed: the factory raised, or took longer than `start_timeout`.
        """
        self._slots = [_Slot() for _ in range(self._size)]
        try:
            results = await asyncio.gather(
                *(self._fill(slot) for slot in self._slots), return_exceptions=True
            )
        except asyncio.CancelledError:
            self._kill_all()
            raise
        for slot in self._slots:
            self._hand_on(slot)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def call(self, payload: Any) -> Any:
        """Have a child answer `payload`. A cancelled call is safe: its child finishes it alone.

        Raises:
            UnbrokenError: what the handler raised.
            ChildError: the handler raised something else.
            ChildDied, ChildTimeout: the child was lost; another takes its place.
            StartFailed: no child could be started.
            PoolFull, PoolClosed: the call was not taken.
        """
        slot = await self._turn()
        # The task owns the slot from here on, and outlives a cancelled caller.
        outcome = await asyncio.shield(self._spawn_task(self._serve(slot, payload)))
        if isinstance(outcome, Exception):
            raise outcome
        return _unpack(outcome)

    async def close(self) -> None:
        """Kill all children and wait until they are gone. Calls under way raise."""
        self._closed = True
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(PoolClosed())
        self._kill_all()
        while self._tasks:
            await asyncio.wait(self._tasks)
        for slot in self._slots:
            if slot.child is not None:
                await self._in_thread(slot.child.reap)
                slot.child = None
        self._threads.shutdown()

    @property
    def pids(self) -> list[int]:
        """Process ids of the children that exist now."""
        found = [slot.child.process.pid for slot in self._slots if slot.child is not None]
        return [pid for pid in found if pid is not None]

    async def _turn(self) -> _Slot:
        """Wait for a free slot, first come, first served."""
        if self._closed:
            raise PoolClosed
        if self._free:
            return self._free.popleft()
        if len(self._waiting) >= self._max_waiting:
            raise PoolFull
        turn: asyncio.Future[_Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the slot came in the same moment
                self._hand_on(turn.result())
            raise
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)

    def _hand_on(self, slot: _Slot) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(slot)
                return
        self._free.append(slot)

    def _spawn_task(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _in_thread(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _kill_all(self) -> None:
        for slot in self._slots:
            if slot.child is not None:
                slot.child.kill()

    async def _serve(self, slot: _Slot, payload: Any) -> Any:
        """Return the child's answer or an exception; then free the slot, with a living child."""
        try:
            child = slot.child
            if child is None or not child.alive:
                child = await self._fill(slot)
            return await self._exchange(child, payload, self._timeout)
        except Exception as error:  # noqa: BLE001  # the caller raises it
            return error
        finally:
            self._spawn_task(self._release(slot))

    async def _release(self, slot: _Slot) -> None:
        if slot.child is not None and not slot.child.alive and not self._closed:
            metrics.CHILD_DEATHS.labels(self._target.partition(":")[0].rpartition(".")[2]).inc()
            log.warning("a child of %s ended (%s)", self._target, slot.child.process.returncode)
            try:
                await self._fill(slot)
            except (StartFailed, ChildDied, PoolClosed, OSError) as error:
                log.warning("a child of %s does not start: %r", self._target, error)
        self._hand_on(slot)

    async def _fill(self, slot: _Slot) -> _Child:
        """Put a fresh child into the slot and wait until it is ready."""
        if slot.child is not None:
            await self._in_thread(slot.child.reap)
            slot.child = None
        if self._closed:
            raise PoolClosed
        # Here, not in a thread: the kernel ends the child with the *thread* that started it.
        child = slot.child = _Child(self._launch)
        try:
            answer = await self._exchange(child, (self._target, self._args), self._start_timeout)
        except ChildTimeout:
            raise StartFailed(f"not ready within {self._start_timeout:g} s") from None
        if answer[0] != "ready":
            await self._in_thread(child.reap)
            slot.child = None
            raise StartFailed(answer[1])
        return child

    async def _exchange(self, child: _Child, message: Any, timeout: float) -> tuple[Any, ...]:
        """Exchange in a thread; at the timeout, kill the child, which ends the thread's wait."""
        exchange = self._in_thread(child.exchange, message)
        exchange.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen
        try:
            done, _ = await asyncio.wait({exchange}, timeout=timeout)
        except asyncio.CancelledError:
            child.kill()
            raise
        if done:
            return await exchange
        child.kill()
        await asyncio.wait({exchange})
        raise ChildTimeout(f"no answer within {timeout:g} s")


def _unpack(answer: tuple[Any, ...]) -> Any:
    status, *rest = answer
    if status == "refused":
        raise UnbrokenError(*rest)
    if status == "broke":
        log.error("a child's handler raised %s\n%s", *rest)
        raise ChildError(rest[0])
    return rest[0]
