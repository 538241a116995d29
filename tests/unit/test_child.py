"""The pool of child processes: order, deaths, timeouts, cancelled calls, and no survivors."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import pytest_asyncio

from shared.errors import UnbrokenError
from worker.child import (
    ChildDied,
    ChildError,
    ChildPool,
    ChildTimeout,
    PoolClosed,
    PoolFull,
    StartFailed,
)

ROOT = Path(__file__).parents[2]
TARGET = "tests.unit.test_child:create"
CALLS = []  # the child's own


def create(greeting="hello"):
    """Make the handler that these tests run in the child."""
    if greeting == "refuse to start":
        raise UnbrokenError("model_not_ready", "There is no such model.")

    def handle(payload):
        CALLS.append(payload)
        match payload:
            case "pid":
                return os.getpid()
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(60)
            case "refuse":
                raise UnbrokenError("invalid_media", "It is broken.", "messages[0].content[1]")
            case ("fail", text):
                raise KeyError(text)
            case "calls":
                return CALLS
            case ("sleep", seconds):
                time.sleep(seconds)
        return payload

    return handle


def wait_until_dead(process):
    """Wait until the child can be waited for, and leave that to the pool.

    A process reads as a zombie before the last of its threads has ended, and is not dead till then.
    """
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@pytest_asyncio.fixture
async def pool():
    pool = ChildPool(TARGET, timeout=20)
    await pool.start()
    yield pool
    await pool.close()


async def test_a_large_array_comes_back_equal(pool):
    """An array of tens of megabytes travels both ways unchanged."""
    array = np.random.default_rng(1).integers(0, 255, (40, 1000, 1000), dtype=np.uint8)
    back = await pool.call({"array": array, "text": "é"})
    assert np.array_equal(back["array"], array)
    assert back["text"] == "é"


async def test_a_large_array_leaves_the_event_loop_free(pool):
    """While an array of 128 MB travels, the event loop goes on turning."""
    array = np.zeros((128, 1 << 20), np.uint8)
    call, turns = asyncio.ensure_future(pool.call([array])), 0
    while not call.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert (await call)[0].shape == array.shape
    assert turns > 30


async def test_the_handlers_refusal_reaches_the_caller(pool):
    """An UnbrokenError keeps its code, message and param on its way out of the child."""
    with pytest.raises(UnbrokenError) as caught:
        await pool.call("refuse")
    error = caught.value
    assert (error.code, error.message) == ("invalid_media", "It is broken.")
    assert error.param == "messages[0].content[1]"


async def test_an_unexpected_error_keeps_the_child_and_hides_its_text(pool, caplog):
    """Another exception becomes ChildError; its text, which may quote a prompt, is not logged."""
    pid = await pool.call("pid")
    with pytest.raises(ChildError, match="KeyError"):
        await pool.call(("fail", "a secret prompt"))
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text
    assert await pool.call("pid") == pid


async def test_a_dead_child_fails_its_call_only(pool):
    """The call in flight gets ChildDied; the next one is answered by a fresh child."""
    first = await pool.call("pid")
    with pytest.raises(ChildDied):
        await pool.call("die")
    assert await pool.call("pid") != first
    assert not psutil.pid_exists(first)


async def test_a_child_that_died_between_calls_costs_no_call(pool):
    """A child that ends while idle is replaced before the next call is given to it."""
    first = psutil.Process(await pool.call("pid"))
    first.kill()
    await asyncio.to_thread(wait_until_dead, first)
    assert await pool.call("pid") != first.pid


async def test_a_hanging_child_is_killed_at_the_timeout():
    """A call over its time raises ChildTimeout, and the hung process is gone."""
    pool = ChildPool(TARGET, timeout=1.5)
    await pool.start()
    pid = await pool.call("pid")
    with pytest.raises(ChildTimeout):
        await pool.call("hang")
    assert await pool.call("pid") != pid
    assert not psutil.pid_exists(pid)
    await pool.close()


async def test_calls_are_served_in_order(pool):
    """Waiting calls get the child first come, first served."""
    await asyncio.gather(*(pool.call(number) for number in range(20)))
    assert await pool.call("calls") == [*range(20), "calls"]


async def test_a_cancelled_call_leaves_the_pool_usable(pool):
    """A cancelled call's child finishes alone, and the next caller gets its own answer."""
    pid = await pool.call("pid")
    busy = asyncio.ensure_future(pool.call(("sleep", 0.2)))
    waiting = asyncio.ensure_future(pool.call("never sent"))
    await asyncio.sleep(0)
    for call in (busy, waiting):
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert await pool.call("pid") == pid
    assert "never sent" not in await pool.call("calls")


async def test_the_queue_is_bounded():
    """A call beyond the bound on waiting calls is refused at once."""
    pool = ChildPool(TARGET, timeout=20, max_waiting=1)
    await pool.start()
    calls = [asyncio.ensure_future(pool.call(("sleep", 0.1))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(PoolFull):
        await pool.call("one too many")
    await asyncio.gather(*calls)
    await pool.close()


async def test_a_factory_that_fails_tells_why():
    """A child that cannot start makes `start` raise its reason."""
    pool = ChildPool(TARGET, ("refuse to start",))
    with pytest.raises(StartFailed, match="There is no such model"):
        await pool.start()
    assert pool.pids == []
    await pool.close()


async def test_close_ends_children_and_calls():
    """Closing kills every child, fails the calls under way and refuses new ones."""
    pool = ChildPool(TARGET, size=2, timeout=20)
    await pool.start()
    pids = pool.pids
    calls = [asyncio.ensure_future(pool.call("hang")) for _ in range(3)]
    await asyncio.sleep(0)
    await pool.close()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(r, (ChildDied, PoolClosed)) for r in results] == [True] * 3
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(PoolClosed):
        await pool.call("pid")


async def test_close_while_starting_leaves_no_child():
    """A pool that is closed before its children are ready ends them as well."""
    pool = ChildPool(TARGET, size=2)
    start = asyncio.ensure_future(pool.start())
    while len(pool.pids) < 2:
        await asyncio.sleep(0)
    pids = pool.pids
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await pool.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_children_ignore_the_terminals_interrupt(pool):
    """SIGINT, which Ctrl-C sends to the whole group, does not end a child."""
    pid = await pool.call("pid")
    os.kill(pid, signal.SIGINT)
    assert await pool.call("pid") == pid


PARENT = """
import asyncio
from worker.child import ChildPool

async def main():
    pool = ChildPool("tests.unit.test_child:create", size=2)
    await pool.start()
    call = asyncio.ensure_future(pool.call("hang"))
    await asyncio.sleep(0.1)
    print(*pool.pids, flush=True)
    await call

asyncio.run(main())
"""


def test_children_end_with_a_killed_parent():
    """When the parent is killed, its idle and its busy child end too."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    assert not alive
