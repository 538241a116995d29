import asyncio
import contextlib

from shared.tasks import stop


async def test_a_task_that_swallows_a_cancellation_is_ended_all_the_same():
    """A library that ignores one cancellation cannot keep a process from stopping."""
    swallowed = asyncio.Event()

    async def stubborn():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        swallowed.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await stop(task)
    assert swallowed.is_set()
    assert task.cancelled()


async def test_ending_nothing_or_the_failed_is_no_error():
    """Tasks that have ended already, even by an exception, are no trouble."""

    async def fail():
        raise ValueError

    task = asyncio.create_task(fail())
    await asyncio.wait({task})
    await stop(task)
    await stop()
