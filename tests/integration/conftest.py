"""What the integration tests share: gateways in this process, and a scripted worker."""

import contextlib

import pytest

from tests.scripted import ScriptedWorker
from tests.served import serving


@pytest.fixture
async def worker(store):
    """A scripted worker that is announced; it does what the test says."""
    worker = ScriptedWorker(store)
    await worker.announce()
    return worker


@pytest.fixture
async def start(redis_url):
    """Start gateways with settings of the test's choice; they end with the test."""
    async with contextlib.AsyncExitStack() as running:

        async def start(**settings):
            return await running.enter_async_context(serving(redis_url, **settings))

        yield start


@pytest.fixture
async def client(start):
    """An HTTP client of one gateway."""
    return await start()
