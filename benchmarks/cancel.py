"""How long a cancel takes: from its POST to the session's last event, while it decodes.

    python3 run.py bench cancel [--cancels 200] [--streams 8]

Starts a stack of its own (demo model, one worker, two gateways). Each session is read on one
gateway and cancelled on the other; `--streams` run at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

GATEWAYS = 2
ROOT = Path(__file__).resolve().parent.parent
BODY = {
    "messages": [{"role": "user", "content": "Go on and on."}],
    "ignore_eos": True,
    "max_tokens": 3000,
    "temperature": 1.0,
    "stream": True,
}


async def one_cancel(reader: httpx.AsyncClient, canceller: httpx.AsyncClient) -> float:
    """Start a session, let it decode, cancel it; return seconds from the POST to `[DONE]`."""
    async with reader.stream("POST", "/v1/chat/completions", json=BODY) as response:
        response.raise_for_status()
        session_id = response.headers["x-session-id"]
        lines, status = response.aiter_lines(), None
        async for line in lines:
            if line == f"id: {session_id}:20":
                break
        began = time.perf_counter()
        cancel = asyncio.create_task(canceller.post(f"/v1/cancel/{session_id}"))
        async for line in lines:
            if '"session":{' in line:
                status = json.loads(line[6:])["session"]["status"]
            if line == "data: [DONE]":
                break
        seconds = time.perf_counter() - began
        (await cancel).raise_for_status()
        if status != "cancelled":
            raise SystemExit(f"a session ended as {status}, not by its cancel")
        return seconds


async def measure(urls: list[str], cancels: int, streams: int) -> list[float]:
    """Cancel so many sessions, `streams` at a time; return the seconds each took."""
    clients = [httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) for url in urls]
    left, found = itertools.count(), list[float]()

    async def worker(reader: httpx.AsyncClient, canceller: httpx.AsyncClient) -> None:
        while next(left) < cancels:
            found.append(await one_cancel(reader, canceller))

    pairs = [clients if n % 2 else clients[::-1] for n in range(streams)]
    await asyncio.gather(*(worker(*pair) for pair in pairs))
    for client in clients:
        await client.aclose()
    return found


def percentile(values: list[float], share: float) -> float:
    """Return the value that `share` of the others do not exceed, in milliseconds."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1000


def main() -> None:
    """Run the stack and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            sys.executable,
            "run.py",
            "up",
            "--no-install",
            "--port=0",
            f"--gateways={GATEWAYS}",
        ]
        stack = subprocess.Popen(
            [*argv, f"--data-dir={folder}/data"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert stack.stdout is not None
        ready = (line.split()[1] for line in stack.stdout if line.startswith("ready http"))
        urls = list(itertools.islice(ready, GATEWAYS))
        try:
            for streams in args.streams:
                found = asyncio.run(measure(urls, args.cancels, streams))
                print(
                    f"{streams} streams, {len(found)} cancels: "
                    f"p50 {percentile(found, 0.5):.0f} ms, p99 {percentile(found, 0.99):.0f} ms, "
                    f"max {max(found) * 1000:.0f} ms"
                )
        finally:
            stack.send_signal(signal.SIGINT)
            stack.wait(60)


if __name__ == "__main__":
    main()
