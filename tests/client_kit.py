"""What the tests of the clients share: a proxy that cuts, a producer, the documented examples."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from pathlib import Path

from shared.store import Store, connect
from tests.scripted import ScriptedWorker
from tests.stack import ROOT

PIECES = ["Grü", "ße ", "aus ", "\n\n", "data: x", "🙂", '"q" ', "id: 7\n", "end\r\n", " of "]

PROGRAM_SECONDS = 40


class CutProxy:
    """Passes bytes on to `port`, and cuts each connection after a number of bytes downstream.

    Args:
        port: of the server behind it, on loopback.
        budget: gives the bytes that a connection may carry to the client; None for no cut.
    """

    def __init__(self, port: int, budget=lambda: None) -> None:
        self.upstream, self.budget = port, budget
        self.cuts = self.connections = 0
        self.seen = bytearray()  # all that went to clients
        self._rng = random.Random(0)
        self._tasks: set[asyncio.Task] = set()

    async def __aenter__(self) -> CutProxy:  # noqa: PYI034 - Python 3.10 has no Self
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader, writer) -> None:
        self.connections += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader, writer) -> None:
        back = None
        try:
            up_reader, back = await asyncio.open_connection("127.0.0.1", self.upstream)
            up = asyncio.create_task(self._copy(reader, back))
            try:
                await self._down(up_reader, writer)
            finally:
                up.cancel()
                await asyncio.gather(up, return_exceptions=True)
        except OSError:
            pass  # the server behind is away, or one side has left: the other sees it end
        finally:
            for side in filter(None, (writer, back)):
                side.close()

    async def _copy(self, reader, writer) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()

    async def _down(self, reader, writer) -> None:
        left = self.budget()
        while data := await reader.read(65536):
            part = data if left is None else data[:left]
            self.seen += part
            writer.write(part)
            await writer.drain()
            if left is not None:
                left -= len(part)
                if left <= 0:
                    self.cuts += 1
                    if self._rng.random() < 0.5:
                        writer.transport.abort()  # the client sees a reset, else an early end
                    return


def budgets(seed: int, most: int = 1500):
    """Return a source of byte budgets for `CutProxy`: 1 to `most`, drawn from `seed`."""
    rng = random.Random(seed)
    return lambda: rng.randint(1, most)


class Producer:
    """Answers each session with numbered pieces, some of which look like SSE.

    Args:
        redis_url: its Redis.
        count: pieces of an answer.
        pause: seconds between two pieces.
    """

    def __init__(self, redis_url: str, count: int = 40, pause: float = 0.001) -> None:
        self._store = Store(connect(redis_url))
        self.worker = ScriptedWorker(self._store)
        self.texts = [f"{n} {PIECES[n % len(PIECES)]}" for n in range(count)]
        self.sessions: list[str] = []
        self.gate = asyncio.Event()  # pieces after the tenth wait for it
        self.gate.set()
        self._pause = pause

    @property
    def text(self) -> str:
        return "".join(self.texts)

    async def __aenter__(self) -> Producer:  # noqa: PYI034 - Python 3.10 has no Self
        await self.worker.announce()
        self._tasks = {asyncio.create_task(self._stay()), asyncio.create_task(self._claim())}
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.close()
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _stay(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            await self.worker.announce()

    async def _claim(self) -> None:
        while True:
            for session in await self.worker.claim(8):
                self.sessions.append(session.session_id)
                self._tasks.add(asyncio.create_task(self._answer(session)))
            await self.worker.queue.wait_for_work(1)

    async def _answer(self, session) -> None:
        for number, text in enumerate(self.texts):
            if number == 10:
                await self.gate.wait()
            said = await self.worker.say(session, text, "reasoning" if number < 3 else "content")
            assert said == number + 1, "the producer lost its lease"
            await asyncio.sleep(self._pause)
        await self.worker.finish(session)


class Held(bytes):
    """An answer after which the connection stays open for 1.1 s."""


class Script:
    """An HTTP server that gives one prepared answer per request, and keeps the requests."""

    def __init__(self, *answers: bytes) -> None:
        self.answers, self.requests = list(answers), []
        self.times: list[float] = []  # of the requests, seconds

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_exc):
        self._server.close()

    async def _serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = dict(re.findall(r"^([\w-]+): (.*)\r$", head.lower(), re.MULTILINE))
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append((headers, body))
        self.times.append(asyncio.get_running_loop().time())
        answer = self.answers.pop(0)
        writer.write(answer)
        if not self.answers:
            self._server.close()  # from now on connections are refused
        await writer.drain()
        if isinstance(answer, Held):
            await asyncio.sleep(1.1)
        writer.close()


def chunk(index, content, *, event_id=True):
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": None}
    data = {"id": "s", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    line = f"id: s:{index}\n" if event_id else ""
    return f"{line}data: {json.dumps({**data, 'choices': [choice]})}\n\n".encode()


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-session-id: s\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def status(line, *headers):
    return "\r\n".join([f"HTTP/1.1 {line}", *headers, "content-length: 0", "", ""]).encode()


def examples(language: str) -> dict[str, str]:
    """Return the README's examples in a language, by the heading that each stands under."""
    text = (ROOT / "clients" / "README.md").read_text()
    found = re.findall(
        rf"^## ([^\n]+)\n(?:(?!^## ).)*?^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    return dict(found)


async def output_of(*argv: str | Path, cwd: Path, env: dict[str, str]) -> str:
    """Run a program in a process of its own; returns what it printed, fails where it failed."""
    process = await asyncio.create_subprocess_exec(
        *map(str, argv),
        cwd=cwd,
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), PROGRAM_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()[-3000:]
    return out.decode()
