"""The yardstick: a Starlette server that sends the relay's frames from memory, as simply as can be.

No Redis, no sessions, no rendering: each group of streams has a clock of its own that makes one
text per tick, and each stream is a generator in a `StreamingResponse` that waits for the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from typing import TYPE_CHECKING

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from gateway.main import tune_garbage_collection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

HEAD = (
    'data: {"id":"%s","object":"chat.completion.chunk","created":1790000000,"model":"org/tiny",'
    '"system_fingerprint":"fp_bench","choices":[{"index":0,"delta":{"content":"'
)
TAIL = b'"},"logprobs":null,"finish_reason":null}]}\n\n'


class Plan(msgspec.Struct):
    """How streams are grouped and how fast they tick, and the port to listen on."""

    port: int
    streams: int
    batch: int
    rate: float


class Group:
    """Streams that get their events at the same moment."""

    def __init__(self, phase: float, rate: float) -> None:
        self.texts: list[bytes] = [b""]
        self._phase, self._period = phase, 1 / rate
        self._tick = asyncio.Event()

    async def run(self) -> None:
        """Tick for ever."""
        begin = time.monotonic() + self._phase
        while True:
            due = begin + len(self.texts) * self._period
            await asyncio.sleep(max(0, due - time.monotonic()))
            self.texts.append(b"%.6f" % time.monotonic())
            self._tick.set()
            self._tick = asyncio.Event()

    async def frames(self, session_id: str) -> AsyncIterator[bytes]:
        """Yield the frames of one stream, from index 0."""
        name, head = session_id.encode(), (HEAD % session_id).encode()
        index, first = 0, len(self.texts) - 1
        while True:
            while first + index < len(self.texts):
                text = self.texts[first + index]
                yield b"".join((b"id: %s:%d\n" % (name, index), head, text, TAIL))
                index += 1
            await self._tick.wait()


def make_app(plan: Plan) -> Starlette:
    """Make the application: `GET /stream/<number>`."""
    count = -(-plan.streams // plan.batch)
    groups = [Group(g / count / plan.rate, plan.rate) for g in range(count)]

    async def stream(request: Request) -> StreamingResponse:
        number = int(request.path_params["number"])
        frames = groups[number // plan.batch].frames(f"chatcmpl-{number:032x}")
        return StreamingResponse(frames, media_type="text/event-stream")

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        clocks = [asyncio.create_task(group.run()) for group in groups]
        yield
        for clock in clocks:
            clock.cancel()

    return Starlette(routes=[Route("/stream/{number:int}", stream)], lifespan=lifespan)


def main() -> None:
    """Serve; the plan is the first argument, as JSON."""
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    app = make_app(plan)
    tune_garbage_collection()
    uvicorn.run(
        app,
        loop="asyncio",
        port=plan.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main()
