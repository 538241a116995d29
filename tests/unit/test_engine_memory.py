"""A real engine process under a real limit of its memory: what waits, what leaves, what is said."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import resource
from pathlib import Path

import pytest
import pytest_asyncio

from shared.protocol import SamplingParams
from tests.engine_kit import config as engine_config
from tests.engine_kit import text_prompt
from worker.engine.messages import OUT_OF_MEMORY, Add, EngineConfig, Limits, Output
from worker.engine_client import EngineClient

# An engine is a process of its own that imports torch: seconds on a busy machine.
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="no prlimit on this system"),
]

TOKENS = 40
GROWN, LONG = 360, 190
"""A prompt, and an answer in whose last part it needs another piece of the cache: prompts that come
beside running ones take some steps, and all have begun by then."""


@pytest.fixture(scope="module")
def config(demo_model) -> EngineConfig:
    limits = Limits(prefix_bytes=64 * 2**20)
    return dataclasses.replace(engine_config(demo_model), context_length=4096, limits=limits)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(config):
    """One engine for all these tests."""
    client = EngineClient(config, restart_delays=(0.0,))
    await client.start()
    await client.ready()
    yield client
    await client.close()


class Run:
    """One sequence, and what the engine has said of it."""

    def __init__(self, client, number, length=GROWN, generated=(), tokens=TOKENS) -> None:
        self.outputs: list[Output | None] = []
        self.over = asyncio.get_running_loop().create_future()
        self.heard = asyncio.Event()
        self.sampling = SamplingParams(
            temperature=1.0,
            seed=number,
            max_tokens=tokens,
            ignore_eos=True,
            frequency_penalty=0.5 * (number % 2),
            logprobs=2 if number % 3 == 0 else None,
        )
        prompt = text_prompt(length, number)
        client.add(Add(client.new_handle(), prompt, self.sampling, tuple(generated)), self._hear)

    def _hear(self, output: Output | None) -> None:
        self.outputs.append(output)
        self.heard.set()
        if output is None or output.finish or output.error:
            self.over.set_result(output)

    async def begun(self) -> None:
        await self.heard.wait()

    @property
    def pieces(self):
        return [piece for output in self.outputs if output for piece in output.pieces]

    @property
    def ids(self) -> list[int]:
        return [i for piece in self.pieces for i in piece.ids]

    @property
    def scores(self):
        return [score for piece in self.pieces for score in piece.scores]


def data_bytes(pid: int) -> int:
    """Return what RLIMIT_DATA counts."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def squeeze(client, spare: int) -> None:
    """Let the engine's process have no more than so many bytes beside what it has."""
    soft = data_bytes(client.pid) + spare
    _, hard = resource.prlimit(client.pid, resource.RLIMIT_DATA)
    resource.prlimit(client.pid, resource.RLIMIT_DATA, (soft, hard))


def ease(client) -> None:
    """Let it have what it may have at most."""
    _, hard = resource.prlimit(client.pid, resource.RLIMIT_DATA)
    resource.prlimit(client.pid, resource.RLIMIT_DATA, (hard, hard))


async def finished(run: Run) -> Run:
    assert (await run.over).finish == "length"
    return run


async def test_what_has_no_memory_leaves_whole_and_goes_on_where_there_is_some(client):
    """A limit that lets the cache grow no more costs sequences their place, never a token."""
    pid = client.pid
    runs = [Run(client, number, tokens=LONG) for number in range(4)]
    for run in runs:
        await run.begun()
    squeeze(client, 2**20)  # the cache wants 16 times that for all, and 4 times for one
    try:
        ends = [await run.over for run in runs]
    finally:
        ease(client)
    assert (client.pid, client.state.phase) == (pid, "ready")
    assert OUT_OF_MEMORY in [end.error[0] for end in ends if end and end.error]
    for number, (run, end) in enumerate(zip(runs, ends, strict=True)):
        assert end.finish == "length" or end.error[0] == OUT_OF_MEMORY
        again = [] if end.finish else [Run(client, number, generated=run.ids, tokens=LONG)]
        rest = [await finished(one) for one in again]
        whole = await finished(Run(client, number, tokens=LONG))
        assert whole.ids == [i for part in (run, *rest) for i in part.ids]
        assert whole.scores == [score for part in (run, *rest) for score in part.scores]


async def test_memory_that_comes_and_goes_changes_no_token(client):
    """However the limit moves, each sequence ends, and what it has said is what it would say."""
    draw, over = random.Random(1), False
    runs = [Run(client, number, length=700 + 40 * number) for number in range(4)]

    async def move_the_limit() -> None:
        while not over:
            squeeze(client, draw.randrange(2**18, 3 * 2**20))
            await asyncio.sleep(draw.random() * 0.1)
            ease(client)
            await asyncio.sleep(draw.random() * 0.02)

    moving = asyncio.create_task(move_the_limit())
    try:
        ends = [await run.over for run in runs]
    finally:
        over = True
        await moving
        ease(client)
    for number, (run, end) in enumerate(zip(runs, ends, strict=True)):
        assert end.finish == "length" or end.error[0] == OUT_OF_MEMORY
        whole = await finished(Run(client, number, length=700 + 40 * number))
        assert run.ids == (whole.ids if end.finish else whole.ids[: len(run.ids)])
        assert run.scores == whole.scores[: len(run.scores)]
