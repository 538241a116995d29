"""Records of prompts' pieces are made in lulls of the engine's process, or once they would pay."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.protocol import SamplingParams
from tests.engine_kit import GREEDY, Driver, config, image_prompt, oracle, record_all
from tests.engine_kit import text_prompt as text
from worker.engine import process
from worker.engine.channel import Channel
from worker.engine.chunk_step import ChunkStep
from worker.engine.engine import Engine
from worker.engine.loader import load
from worker.engine.messages import Add, Cancel, Limits, Step, Stop

pytestmark = pytest.mark.timeout(120)
ENDLESS = SamplingParams(temperature=0, max_tokens=390, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded(demo_model):
    return load(config(demo_model), lambda *_: None)


class Served:
    """An engine behind its process's loop, in a thread; `ids` gathers what sequences said."""

    def __init__(self, engine: Engine) -> None:
        self._sockets = socket.socketpair()
        ours, theirs = map(Channel, self._sockets)
        self.engine, self.ids, self._channel = engine, dict[int, list[int]](), ours
        self._pool = ThreadPoolExecutor(1)
        self._end = self._pool.submit(process._serve, theirs, engine, 0.0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._channel.send(Stop())
        while not self._end.done():
            if self._channel.ready(0.05):
                self._channel.receive()
        self._pool.shutdown()
        for sock in self._sockets:
            sock.close()
        self._end.result()

    def send(self, command) -> None:
        self._channel.send(command)

    def until(self, handle: int, count: int | None = None):
        """Take outputs in until a sequence has so many tokens, or has ended; return its last."""
        while True:
            message = self._channel.receive()
            for output in message.outputs if isinstance(message, Step) else ():
                said = self.ids.setdefault(output.handle, [])
                said += [i for piece in output.pieces for i in piece.ids]
                assert output.error is None
                if output.handle == handle and (output.finish or len(said) == count):
                    return output

    def has(self, *kinds: str) -> list[bool]:
        """Whether these kinds of pieces are recorded."""
        return [self.engine.runner.pieces.pieces.has(kind) for kind in kinds]


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_was_missed_is_recorded_in_a_lull_and_kept_prefixes_stay(loaded):
    """Not before there was a request; then text, then pictures, and never videos: none came."""
    limits = Limits(prefix_bytes=2**24)
    with Served(Engine(loaded, 4, limits=limits)) as served:
        time.sleep(2 * process.LULL_SECONDS)
        assert served.has("", "image", "video") == [False] * 3
        served.send(Add(1, text(60), GREEDY))
        first = served.until(1)
        wait_for(lambda: served.has("") == [True])
        served.send(Add(2, text(60), GREEDY))
        again = served.until(2)
        assert (first.cached_tokens, again.cached_tokens) == (0, 59)
        served.send(Add(3, image_prompt(loaded), GREEDY))
        served.until(3)
        wait_for(lambda: served.has("image") == [True])
        served.send(Add(4, image_prompt(loaded, 1), GREEDY))
        served.until(4)
        time.sleep(2 * process.LULL_SECONDS)
        assert served.has("", "image", "video") == [True, True, False]
    assert served.ids[1] == served.ids[2] == oracle(loaded, text(60))
    assert served.ids[3] == oracle(loaded, image_prompt(loaded))
    assert served.ids[4] == oracle(loaded, image_prompt(loaded, 1))


def test_without_a_lull_they_are_made_once_they_would_pay(loaded, monkeypatch):
    """Beside a running sequence, whose text stays what it would have been."""
    monkeypatch.setattr(process, "OFTEN", 3)
    monkeypatch.setattr(process, "LULL_SECONDS", 1e6)
    with Served(Engine(loaded, 4)) as served:
        served.send(Add(1, text(5), ENDLESS))
        served.until(1, 3)
        for handle in (2, 3):
            assert served.has("") == [False]
            served.send(Add(handle, text(20, handle), GREEDY))
            served.until(handle)
        wait_for(lambda: served.has("") == [True])
        served.send(Cancel(1, "requested"))
        served.until(1)
        assert 3 < len(served.ids[1]) < ENDLESS.max_tokens
    whole = Driver(Engine(loaded, 1))
    whole.add(1, text(5), ENDLESS)
    assert whole.drain().ids(1)[: len(served.ids[1])] == served.ids[1]
    for handle in (2, 3):
        assert served.ids[handle] == oracle(loaded, text(20, handle))


def test_rows_in_use_are_untouched_by_a_record(loaded):
    """Two sequences are in the middle of their texts while all kinds are recorded."""
    driver = Driver(Engine(loaded, 4))
    driver.add(1, text(9))
    driver.add(2, image_prompt(loaded))
    for _ in range(6):
        driver.step()
    assert driver.ids(1)
    assert driver.ids(2)
    record_all(driver.engine.runner)
    driver.drain()
    assert driver.ids(1) == oracle(loaded, text(9))
    assert driver.ids(2) == oracle(loaded, image_prompt(loaded))


def test_a_model_of_which_text_cannot_be_recorded_is_asked_once(loaded, monkeypatch):
    def fails(*_):
        raise RuntimeError("no record")

    monkeypatch.setattr(ChunkStep, "_traced", fails)
    runner = Engine(loaded, 4).runner
    assert runner.due(0)
    runner.record()
    assert not runner.due(0)
