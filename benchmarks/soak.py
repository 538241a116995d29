"""Hundreds of random requests against a running stack: each ends as it must, and memory stays flat.

    python3 run.py bench soak [--requests 500] [--clients 12] [--seed 7] [--save]

Text, images, several choices, log probabilities, cancels, clients that leave, media that are broken
or out of reach, prompts that are too long. The memory of each process is its resident set, averaged
over the second fifth of the requests and over the last; the exit code is 1 where it has grown
by more than the limit, a request has ended otherwise than it must, or something is left running.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from benchmarks._chaos_stack import ROOT, Stack
from benchmarks._soak_requests import KINDS, WrongEndError

MOST_GROWTH = 24.0  # MB, or this share of what it was
MOST_SHARE = 0.08
PARTS = {
    "gateway.main": "gateway",
    "worker.main": "worker",
    "redis-server": "redis",
    "valkey-server": "redis",
}
HELPER = "helper"  # decodes media, tokenizes, or watches: may be replaced
SAMPLE_EVERY = 5  # requests
END_SECONDS = 20
LIMITS = {"PREFIX_CACHE_BYTES": str(4 * 2**20), "SESSIONS_TTL_SECONDS": "20"}
"""What is kept on purpose is full, or gone, before the second fifth is over."""


@dataclass
class Soak:
    """What a soak has seen: requests by kind, wrong ends, and memory (MB) by process."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    left_over: str = ""

    def growth(self) -> dict[str, tuple[float, float]]:
        """Return the mean megabytes of the second and of the last fifth, by process."""
        found = {}
        for name, values in self.memory.items():
            fifth = max(1, len(values) // 5)
            found[name] = (
                statistics.mean(values[fifth : 2 * fifth]),
                statistics.mean(values[-fifth:]),
            )
        return found

    def grown(self) -> list[str]:
        """Return the processes that have grown by more than the limit."""
        return [
            name
            for name, (before, after) in self.growth().items()
            if after - before > max(MOST_GROWTH, MOST_SHARE * before)
        ]

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong and not self.left_over and not self.grown()


def processes(root: int) -> dict[str, psutil.Process]:
    """Return a stack's processes by what they run: those below its supervisor."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process(root).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may just have ended
            words = " ".join(process.cmdline())
            own = process.name()  # children of the worker name themselves
            name = next((name for part, name in PARTS.items() if part in words), HELPER)
            name = own if own == "engine" else name
            found[f"{name} {process.pid}"] = process
    return found


async def run(urls: list[str], root: int, requests: int, clients: int, seed: int) -> Soak:
    """Send the requests, `clients` at a time, and watch the processes below `root`."""
    soak, watched = Soak(), processes(root)
    left = iter(range(requests))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=urls[0], timeout=120, limits=limits, trust_env=False
    ) as client:

        async def work() -> None:
            for number in left:
                await one(client, soak, random.Random(f"{seed} {number}"), number)
                if number % SAMPLE_EVERY == 0:
                    sample(soak, watched)

        await asyncio.gather(*(work() for _ in range(clients)))
        soak.left_over = await left_over(client)
    return soak


async def one(client: httpx.AsyncClient, soak: Soak, rng: random.Random, number: int) -> None:
    """Make one request, and note how it ended."""
    weights = [weight for weight, _, _ in KINDS.values()]
    [kind] = rng.choices(list(KINDS), weights)
    _, make, check = KINDS[kind]
    soak.kinds[kind] += 1
    try:
        await check(client, make(rng))
    except (WrongEndError, httpx.HTTPError) as error:
        soak.wrong.append(f"{number} {kind}: {type(error).__name__} {error}")


def sample(soak: Soak, watched: dict[str, psutil.Process]) -> None:
    """Note the memory of each process; one that has ended, and is no helper, shows as wrong."""
    for name, process in list(watched.items()):
        try:
            soak.memory[name].append(process.memory_info().rss / 2**20)
        except psutil.NoSuchProcess:
            if not name.startswith(HELPER):
                soak.wrong.append(f"{name} has ended")
            del watched[name]


async def left_over(client: httpx.AsyncClient) -> str:
    """Return what still runs or waits when all requests have ended; empty where nothing does."""
    deadline = time.monotonic() + END_SECONDS
    while True:
        told = (await client.get("/v1/status")).json()
        if not told["sessions_running"] and not told["queue_depth"]:
            return ""
        if time.monotonic() > deadline:
            return f"{told['sessions_running']} sessions run, {told['queue_depth']} wait"
        await asyncio.sleep(0.2)


def report(soak: Soak, args: argparse.Namespace, seconds: float) -> str:
    """Write what was seen as Markdown."""
    lines = [
        f"# Soak, {dt.datetime.now(dt.timezone.utc):%Y-%m-%d}",
        (
            f"\n`python3 run.py bench soak --requests {args.requests}`: {seconds:.0f} s, "
            f"{args.clients} at a time, seed {args.seed}, demo model.\n"
        ),
        ", ".join(f"{count} {kind}" for kind, count in sorted(soak.kinds.items())) + ".",
        "\n| process | MB, second fifth | MB, last fifth | growth |",
        "|---|---|---|---|",
    ]
    for name, (before, after) in sorted(soak.growth().items()):
        said = f"{after - before:+.1f}" + (" **too much**" if name in soak.grown() else "")
        lines.append(f"| {name.rpartition(' ')[0]} | {before:.1f} | {after:.1f} | {said} |")
    lines.append(f"\nEnded otherwise than they must: {len(soak.wrong)}.")
    lines += [f"- {text}" for text in soak.wrong[:20]]
    lines.append(f"\nLeft over: {soak.left_over or 'nothing'}.")
    return "\n".join([*lines, ""])


def main() -> int:
    """Run it; the exit code is 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="run.py bench soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/soak-DATE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unbroken-soak-") as folder:
        stack = Stack(Path(folder) / "data", gateways=1, workers=1, env=LIMITS)
        try:
            stack.wait_until_ready()
            began = time.monotonic()
            soak = asyncio.run(
                run(stack.urls, stack.process.pid, args.requests, args.clients, args.seed)
            )
            text = report(soak, args, time.monotonic() - began)
        finally:
            stack.stop()
    print(text)
    if args.save:
        day = f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}"
        (ROOT / "benchmarks" / "results" / f"soak-{day}.md").write_text(text)
    return 0 if soak.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
