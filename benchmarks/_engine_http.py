"""The engine benchmark over HTTP: starts the servers, and drives any of them in a closed loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks._engine_work import ROOT, messages

START_SECONDS = 180
# torchvision cannot decode images beside a CPU torch: Pillow does it, as for our own worker.
SERVE = """
import io, sys
from worker.engine.torchvision_shim import prepare_torchvision
prepare_torchvision()
import numpy, PIL.Image, torch, torchvision.io

def decode_image(data, *_args, **_options):
    picture = PIL.Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB")
    return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)

torchvision.io.decode_image = torchvision.io.image.decode_image = decode_image
from transformers.cli.transformers import main
sys.argv[0] = "transformers"
main()
"""


@dataclass
class Server:
    """An OpenAI-compatible server: its address, and what its requests bear beside the usual."""

    name: str
    url: str
    body: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What one request gave: its tokens by `usage`, and when its chunks came (seconds)."""

    began: float
    tokens: int = 0
    times: list[float] = field(default_factory=list)


@contextlib.contextmanager
def our_stack(model: Path, data: Path) -> Iterator[Server]:
    """Run the whole stack with one gateway and one worker."""
    argv = [sys.executable, "run.py", "up", "--no-install", "--port=0"]
    argv += [f"--data-dir={data}", f"--model={model}"]
    stack = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert stack.stdout is not None
        url = next((line.split()[1] for line in stack.stdout if line.startswith("ready")), None)
        if url is None:
            raise SystemExit("the stack did not start")
        yield Server("this stack", url, {"ignore_eos": True})
    finally:
        stack.send_signal(signal.SIGINT)
        stack.wait(60)


@contextlib.contextmanager
def transformers_serve(model: Path) -> Iterator[Server]:
    """Run `transformers serve` from the same packages, in float32 too."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [sys.executable, "-c", SERVE, "serve", str(model), f"--port={port}"]
    argv += ["--host=127.0.0.1", "--device=cpu", "--dtype=float32", "--log-level=error"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    server = Server("transformers serve", f"http://127.0.0.1:{port}", {"model": str(model)})
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{server.url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("transformers serve did not start")
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    """Whether a GET succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


async def ask(server: Server, conversation: list[dict[str, Any]], tokens: int) -> Answer:
    """Stream one completion of `tokens` tokens; a plain socket costs less than the servers do."""
    body = {"messages": conversation, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"model": "any", "stream_options": {"include_usage": True}, **server.body}
    place = urlsplit(server.url)
    payload = json.dumps(body).encode()
    head = f"POST {place.path.rstrip('/')}/v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    answer = Answer(time.perf_counter())
    reader, writer = await asyncio.open_connection(place.hostname, place.port or 80, limit=2**22)
    try:
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + payload)
        status = await reader.readline()
        while (await reader.readline()).strip():
            pass
        if b" 200 " not in status:
            raise SystemExit(f"{server.name}: {(await reader.read(2000)).decode()}")
        await _read(reader, answer, server.name)
    finally:
        writer.close()
    return answer


async def _read(reader: asyncio.StreamReader, answer: Answer, name: str) -> None:
    """Read a chunked event stream to its end."""
    rest = b""
    while size := int(await reader.readline(), 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        *lines, rest = rest.split(b"\n")
        now = time.perf_counter()
        for line in lines:
            if b'"usage":' in line and b'"usage":null' not in line:
                usage = json.loads(line[6:]).get("usage") or {}
                answer.tokens = usage.get("completion_tokens", answer.tokens)
            if b'"content":"' in line or b'"reasoning_content":"' in line:
                if b'"content":""' not in line:
                    answer.times.append(now)
            elif b'"error"' in line:
                raise SystemExit(f"{name}: {line.decode()}")


async def _loop(server: Server, workload: str, numbers: Iterator[int], tokens: int) -> list[Answer]:
    return [await ask(server, messages(workload, number), tokens) for number in numbers]


async def _closed_loop(
    server: Server, workload: str, streams: int, rounds: int, tokens: int, first: int
) -> list[Answer]:
    numbers = iter(range(first, first + streams * rounds))
    loops = [_loop(server, workload, numbers, tokens) for _ in range(streams)]
    return [answer for part in await asyncio.gather(*loops) for answer in part]


def closed_loop(
    server: Server, workload: str, streams: int, rounds: int, tokens: int, first: int
) -> tuple[float, list[Answer]]:
    """Keep `streams` requests under way until `rounds` times as many are done.

    Returns:
        Tokens per second by `usage`, and the answers.
    """
    began = time.perf_counter()
    found = asyncio.run(_closed_loop(server, workload, streams, rounds, tokens, first))
    seconds = time.perf_counter() - began
    if any(answer.tokens != tokens for answer in found):
        raise SystemExit(f"{server.name} gave {[a.tokens for a in found]} tokens, not {tokens}")
    return sum(answer.tokens for answer in found) / seconds, found


def gaps(found: list[Answer]) -> list[float]:
    """Return the seconds between a stream's chunks, over all streams."""
    return [b - a for answer in found for a, b in zip(answer.times, answer.times[1:], strict=False)]


async def _first_tokens(
    server: Server, workload: str, streams: int, probes: int, first: int
) -> list[float]:
    crowd = [
        asyncio.create_task(ask(server, messages("text", first + n), 2000)) for n in range(streams)
    ]
    found = []
    try:
        if crowd:
            await asyncio.sleep(1 + streams * 0.05)  # until they all decode
        for number in range(first + streams, first + streams + probes):
            answer = await ask(server, messages(workload, number), 2)
            found.append(answer.times[0] - answer.began)
            if any(task.done() for task in crowd):
                raise SystemExit("the crowd ended before the probes did")
    finally:
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
    return found


def first_tokens(
    server: Server, workload: str, streams: int, probes: int, first: int
) -> list[float]:
    """Return the seconds to the first token of `probes` requests that come one by one.

    `streams` others, of text, decode meanwhile.
    """
    return asyncio.run(_first_tokens(server, workload, streams, probes, first))
