from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from shared.protocol import SamplingParams
from worker.demo_model import ensure_demo_model
from worker.engine.channel import Channel, Disconnected, FrameReader, encode, send_frame
from worker.engine.messages import Abort, Add, EngineConfig, Output, Piece, Prompt, Step
from worker.engine_client import EngineClient, EngineState, LoadFailedError
from worker.launch import execute

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

# Each engine is a process of its own that imports torch: seconds on a busy machine.
pytestmark = pytest.mark.timeout(120)
shared_engine = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> EngineConfig:
    folder = ensure_demo_model(tmp_path_factory.mktemp("models") / "demo")
    return EngineConfig(str(folder), None, "auto", "float64", False, 4, 400, 1)


@contextlib.asynccontextmanager
async def started(config, **options) -> AsyncIterator[tuple[EngineClient, list[EngineState]]]:
    states: list[EngineState] = []
    client = EngineClient(config, states.append, restart_delays=(0.0,), **options)
    await client.start()
    try:
        yield client, states
    finally:
        await client.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(config):
    """One engine for the tests that leave a living one behind: client and its states so far."""
    async with started(config) as (client, states):
        yield client, states


class Listener:
    """A sink that can be waited for."""

    def __init__(self) -> None:
        self.outputs: list[Output | None] = []
        self._heard = asyncio.Event()

    def __call__(self, output: Output | None) -> None:
        self.outputs.append(output)
        self._heard.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds; looked at after each output."""
        while not condition():
            self._heard.clear()
            await self._heard.wait()

    async def end(self) -> Output | None:
        """Wait for the last output, or for None."""
        await self.until(lambda: bool(self.outputs) and (self.last is None or self.over))
        return self.last

    @property
    def last(self) -> Output | None:
        """The newest output."""
        return self.outputs[-1]

    @property
    def over(self) -> bool:
        """Whether the newest output is the last."""
        last = self.last
        return last is not None and bool(last.finish or last.error)

    @property
    def ids(self) -> list[int]:
        """All token ids so far."""
        return [i for o in self.outputs if o for piece in o.pieces for i in piece.ids]


def listen(client, prompt=(5, 6, 7), sampling=SHORT, generated=()) -> tuple[int, Listener]:
    handle, listener = client.new_handle(), Listener()
    client.add(Add(handle, Prompt(list(prompt)), sampling, tuple(generated)), listener)
    return handle, listener


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def gone(pid: int) -> None:
    """Wait for a process's end; the test's timeout is the limit."""
    # Nothing tells of the end of somebody else's child.
    while alive(pid):
        await asyncio.sleep(0.01)


async def test_prompts_do_not_wait_for_the_pace_of_running_sequences(config):
    """With a token every so many seconds, new sequences get their first one at once."""
    slow = dataclasses.replace(config, pace_seconds=30.0)
    async with started(slow) as (client, _):
        listeners = []
        for n in range(4):
            _, listener = listen(client, prompt=(5, 6, 7 + n), sampling=ENDLESS)
            await listener.until(lambda heard=listener: bool(heard.outputs))
            listeners.append(listener)
        assert [len(listener.ids) for listener in listeners] == [1, 1, 1, 1]


@shared_engine
async def test_a_real_engine_process_serves_cancels_and_aborts(served, monkeypatch):
    """Sequences sent while it loads wait; outputs come in order; SIGINT is not the engine's."""
    client, states = served
    steps = []
    monkeypatch.setattr(client, "on_step_end", lambda: steps.append(1))
    _, first = listen(client)
    assert (await first.end()).finish == "length"
    assert len(first.ids) == first.last.completion_tokens == 8
    assert len(steps) == 8
    assert [s.phase for s in states][-1] == client.state.phase == "ready"
    assert {s.loading.stage for s in states if s.loading} >= {"loading the weights"}
    assert client.state.ready.model == "demo"
    assert client.state.ready.context_length == 400

    os.kill(client.pid, signal.SIGINT)
    handle, running = listen(client, sampling=ENDLESS)
    await running.until(lambda: len(running.outputs) >= 3)
    client.cancel(handle, "requested")
    last = await running.end()
    assert (last.finish, last.cancelled) == ("stop", "requested")
    assert len(running.ids) == last.completion_tokens

    handle, dropped = listen(client, sampling=ENDLESS)
    client.abort(handle)
    _, again = listen(client, generated=first.ids[:5])
    await again.end()
    assert first.ids[:5] + again.ids == first.ids
    assert dropped.outputs == []

    _, too_long = listen(client, prompt=[7] * 500)
    assert (await too_long.end()).error[0] == "context_length_exceeded"
    assert client._sinks == {}


@shared_engine
async def test_it_tells_once_that_the_engine_begins_a_sequence(served):
    """Before the first output, and once, however many chunks the prompt has."""
    client, _states = served
    order, over = [], asyncio.Event()

    def sink(output):
        order.append("output")
        if output is None or output.finish:
            over.set()

    message = Add(client.new_handle(), Prompt(list(range(10, 300))), SHORT)
    client.add(message, sink, lambda: order.append("begun"))
    await over.wait()
    assert order == ["begun", *["output"] * 8]


@shared_engine
async def test_a_killed_engine_is_reported_and_replaced(served):
    """After SIGKILL each sequence hears None once, and the next engine serves again."""
    client, states = served
    first = client.pid
    await client.ready()
    listeners = [listen(client, sampling=ENDLESS)[1] for _ in range(6)]
    await listeners[0].until(lambda: len(listeners[0].outputs) >= 2)
    os.kill(first, signal.SIGKILL)
    for listener in listeners:
        assert await listener.end() is None
    assert client.state.phase == "dead"
    assert client.state.reason == (
        "The engine process was killed while it served (SIGKILL, perhaps for want of memory)."
    )
    _, refused = listen(client)
    assert await refused.end() is None
    await client.ready()
    assert client.pid != first
    _, answered = listen(client)
    assert (await answered.end()).finish == "length"
    assert [listener.outputs.count(None) for listener in listeners] == [1] * 6
    phases = [s.phase for s in states]
    assert phases[phases.index("dead") :][1] == "loading"


async def test_a_model_that_cannot_be_loaded_is_a_reason_and_no_crash_loop(
    config, tmp_path, caplog
):
    """The state says why, waiting sequences hear None, and it is tried again, soon if asked to."""
    folder = tmp_path / "late"
    model, config = config.model, dataclasses.replace(config, model=str(folder))
    async with started(config, load_delays=(0.0, 60.0)) as (client, states):
        pid = client.pid
        _, waiting = listen(client)
        with pytest.raises(LoadFailedError, match="There is no model folder named 'late'"):
            await client.ready()
        assert await waiting.end() is None
        _, refused = listen(client)
        assert await refused.end() is None
        await gone(pid)
        while [s.phase for s in states].count("failed") < 2:  # it tried again by itself
            await asyncio.sleep(0.02)
        assert [s.phase for s in states].count("dead") == 0
        folder.symlink_to(model)
        await client.restart()
        _, answered = listen(client)
        assert (await answered.end()).finish == "length"
        pid = client.pid
        caplog.clear()
    assert not alive(pid)
    assert client.pid is None
    assert caplog.records == []  # a close is no death


async def test_an_engine_that_dies_while_it_loads_is_followed_by_one_without_graphs(config):
    """Recording may be what it died of; after one that served, they are tried again."""
    asked, again = [], asyncio.Event()

    def launch(target, arguments):
        sock, process = execute(target, arguments)
        asked.append(arguments[0].graphs)
        if len(asked) < 3:
            process.kill()
        if len(asked) == 4:
            again.set()
        return sock, process

    async with started(config, launch=launch) as (client, _):
        await client.ready()
        assert asked == [True, False, False]
        os.kill(client.pid, signal.SIGKILL)
        await again.wait()
    assert asked[3:] == [True]


async def test_an_engine_closed_while_it_loads_is_gone(config):
    """Closing does not wait for the model."""
    async with started(config) as (client, _):
        pid = client.pid
        assert alive(pid)
    assert not alive(pid)
    assert client.state.phase == "dead"


@shared_engine
async def test_a_hanging_engine_can_be_restarted(served):
    """A stopped process, deaf to SIGTERM, is killed; nothing of it is left."""
    client, _ = served
    await client.ready()
    first = client.pid
    os.kill(first, signal.SIGSTOP)
    _, running = listen(client)
    await client.restart("The engine hung.")
    assert await running.end() is None
    assert not alive(first)
    assert alive(client.pid)


async def test_an_engine_that_hangs_is_replaced(config):
    """A frozen engine's sequences are given up within the limit, and another engine serves."""
    async with started(config, step_seconds=1.0) as (client, states):
        await client.ready()
        _, first = listen(client)
        await first.end()
        pid = client.pid
        handle, running = listen(client, sampling=ENDLESS)
        waiting = [listen(client)[1] for _ in range(4)]  # one more than there is room for
        await running.until(lambda: len(running.outputs) >= 5)
        os.kill(pid, signal.SIGSTOP)
        assert await running.end() is None
        assert client.blames(handle)
        for listener in waiting:
            await listener.end()
        assert "hung" in client.state.reason
        await client.ready()
        assert client.pid != pid
        await gone(pid)
        _, answered = listen(client)
        assert (await answered.end()).finish == "length"
        assert [s.phase for s in states].count("dead") == 2  # hung, and its process gone


async def test_an_engine_is_only_blamed_on_what_it_was_busy_with(config):
    """Of an engine that dies, the sequences that it had not begun are no suspects."""
    config = dataclasses.replace(config, max_batch_size=1)
    async with started(config) as (client, _):
        await client.ready()
        first, running = listen(client, sampling=ENDLESS)
        second, waiting = listen(client, sampling=ENDLESS)
        await running.until(lambda: len(running.outputs) >= 2)
        os.kill(client.pid, signal.SIGKILL)
        assert await running.end() is None
        assert await waiting.end() is None
        assert (client.blames(first), client.blames(second)) == (True, False)


@shared_engine
async def test_a_prompt_of_many_megabytes_does_not_hold_up_the_event_loop(served):
    """The loop keeps turning while 25 MB of pixels go to the engine, which answers for them."""
    client, _ = served
    await client.ready()
    pixels = np.zeros((4096, 1536), dtype=np.float32)
    prompt = Prompt([5] * 20, {"pixel_values": pixels, "image_grid_thw": np.array([[1, 2, 2]])})
    handle, listener = client.new_handle(), Listener()
    client.add(Add(handle, prompt, SHORT), listener)
    turns = 0
    while not listener.outputs:
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10
    assert listener.last.error[0] == "generation_failed"


async def test_the_engine_dies_with_its_worker(config, tmp_path):
    """SIGKILL to the worker leaves no engine behind, loading or not."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, sys\n"
        "from worker.engine.messages import EngineConfig\n"
        "from worker.engine_client import EngineClient\n"
        "async def main():\n"
        "    client = EngineClient(EngineConfig(*eval(sys.argv[1])))\n"
        "    await client.start()\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        script,
        repr(dataclasses.astuple(config)),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    engine = int(await parent.stdout.readline())
    assert alive(engine)
    parent.kill()
    await parent.wait()
    await gone(engine)


def test_the_asyncio_side_loads_no_torch():
    """Importing the client does not import torch."""
    code = "import sys, worker.engine_client as _; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_cross_whole_however_they_are_cut(pair):
    """A frame in pieces of any size is the same message, arrays and all."""
    ours, theirs = pair
    steps = [Step((Output(n, (Piece((n,), "é" * n, "content"),)),)) for n in range(40)]
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([[1, 2]]), "c": np.zeros((0, 3))}
    add = Add(1, Prompt([1, 2], arrays), SamplingParams())
    sent = b"".join(bytes(b) for m in [*steps, add, Abort(3)] for b in encode(m))
    reader, received, draw = FrameReader(theirs), [], random.Random(1)
    assert reader.read() == []
    while sent:
        size = draw.choice((1, 7, 100, 3000))
        ours.sendall(sent[:size])
        sent = sent[size:]
        received += reader.read()
    assert received[:40] == steps
    assert received[41] == Abort(3)
    for name, array in arrays.items():
        np.testing.assert_array_equal(received[40].prompt.tensors[name], array)
    ours.close()
    with pytest.raises(Disconnected):
        reader.read()


def test_the_engine_end_waits_for_whole_messages(pair):
    """`ready` says that something came, `receive` returns all of it, the end of file raises."""
    ours, theirs = pair
    channel = Channel(theirs)
    assert not channel.ready()
    big = Prompt([1], {"pixel_values": np.ones((1000, 1536), dtype=np.float32)})
    writer = threading.Thread(target=send_frame, args=(ours, encode(Add(1, big, SamplingParams()))))
    writer.start()
    received = channel.receive()
    writer.join()
    np.testing.assert_array_equal(received.prompt.tensors["pixel_values"], 1.0)
    assert received.prompt.tensors["pixel_values"].flags.writeable
    ours.close()
    assert channel.ready()
    with pytest.raises(Disconnected):
        channel.receive()
