"""Kills, freezes and restarts a running stack at random, while clients stream through it.

    python3 run.py chaos [--seconds 120] [--clients 32] [--seed 7] [--save]

The stack is `run.py up`: Redis, two gateways, three workers and their supervisor, with the demo
model. First each case is answered undisturbed; then clients ask for the same cases through the
resuming transport, while faults come at least every two seconds. Each text that a client has read,
and each session's log in Redis, is compared with the undisturbed one, token by token. The exit code
is 1 where a token was lost, repeated or changed, or a stream has not exactly one end.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import _chaos_verdict as verdict
from benchmarks._chaos_cases import kind, make_cases
from benchmarks._chaos_clients import Client
from benchmarks._chaos_faults import Faults
from benchmarks._chaos_load import Load
from benchmarks._chaos_report import Run, figures, is_kept, write
from benchmarks._chaos_stack import Stack
from shared.store import Store, connect
from shared.tasks import stop as stop_task

REDIS_RETRIES = 30
AT_ONCE = 24
"""Cases that are answered at the same time when nothing disturbs them."""


async def undisturbed(
    cases: list[dict[str, Any]], urls: list[str], store: Store
) -> list[verdict.Truth]:
    """Answer each case once, while nothing happens."""
    left, truths = list(range(len(cases))), dict[int, verdict.Truth]()

    async def work(number: int) -> None:
        client = Client(number, urls, cases, seed=0)
        while left:
            case = left.pop()
            stream = await client.read(case)
            log = await verdict.read_log(store, stream.session_id)
            if not (log.is_sound and stream.usage and not stream.errors):
                raise SystemExit(f"an undisturbed stream failed: {stream.errors} {log.status}")
            truths[case] = verdict.Truth(stream.texts, log.tokens(), stream.usage)
        await client.close()

    await asyncio.gather(*map(work, range(AT_ONCE)))
    return [truths[case] for case in range(len(cases))]


async def disturb(
    stack: Stack, store: Store, cases: list[dict[str, Any]], args: argparse.Namespace
) -> tuple[list[Client], Faults]:
    """Stream and inject faults at the same time; returns when all streams have ended."""
    clients = [Client(n, stack.urls, cases, args.seed) for n in range(args.clients)]
    faults = Faults(stack, store.redis, clients, args.seed)
    stop = asyncio.Event()
    running = [asyncio.create_task(client.run(stop)) for client in clients]
    try:
        await faults.run(args.seconds)
    finally:
        stop.set()
    await asyncio.gather(*running)
    for client in clients:
        await client.close()
    return clients, faults


async def chaos(stack: Stack, args: argparse.Namespace) -> dict[str, Any]:
    """Run it; returns the figures."""
    store = Store(connect(stack.state["redis"]["url"], retries=REDIS_RETRIES))
    cases = make_cases(args.cases, args.tokens, args.seed)
    began = time.monotonic()
    truths = await undisturbed(cases, stack.urls, store)
    spent = time.monotonic() - began
    alone = sum(len(ids) for truth in truths for ids in truth.tokens.values())
    print(f"{len(cases)} cases undisturbed: {alone} tokens, {alone / spent:.0f} per second")
    began, load = time.monotonic(), Load()
    watch = asyncio.create_task(load.watch())
    clients, faults = await disturb(stack, store, cases, args)
    spent = time.monotonic() - began
    await stop_task(watch)
    streams = [stream for client in clients for stream in client.streams]
    logs = {s.session_id: await verdict.read_log(store, s.session_id) for s in streams}
    await store.close()
    judged = [verdict.judge(s, logs[s.session_id], truths[s.case]) for s in streams]
    for stream, found in zip(streams, judged, strict=True):
        if not found.is_whole:
            note = dataclasses.replace(found, notes=sorted(set(found.notes)))
            print(f"{stream.session_id} ({kind(cases[stream.case])}): {note}")
            print(f"  since its last event: {', '.join(stream.trail())}")
    run = Run(streams, logs, judged, faults.done, list(stack.worker_logs()), spent, load)
    return figures(run, args)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="run.py chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120, help="of faults (120)")
    parser.add_argument("--clients", type=int, default=32, help="streams at a time (32)")
    parser.add_argument("--seed", type=int, default=7, help="of everything that is drawn (7)")
    parser.add_argument("--cases", type=int, default=24, help="different requests (24)")
    parser.add_argument("--tokens", type=int, default=300, help="of an answer, about (300)")
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--dtype", default="float64", help="the model's (float64: no near ties)")
    parser.add_argument("--pace", type=float, default=12, help="tokens/s of a stream (12; 0: all)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/chaos-DATE")
    return parser.parse_args(argv)


def main() -> int:
    """Run it; the exit code is 1 where a promise was broken."""
    args = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also then the stack is stopped
    folder = Path(tempfile.mkdtemp(prefix="unbroken-chaos-"))
    env = {"TORCH_DTYPE": args.dtype, "SESSIONS_TTL_SECONDS": "86400", "LOG_LEVEL": "INFO"}
    env["MAX_STEPS_PER_SECOND"] = str(args.pace)
    env["MAX_BATCH_SIZE"] = str(2 * args.clients)  # one worker alone has rows for all choices
    stack = Stack(folder / "data", gateways=args.gateways, workers=args.workers, env=env)
    kept = False
    try:
        stack.wait_until_ready()
        found = asyncio.run(chaos(stack, args))
        write(found, save=args.save)
        kept = is_kept(found)
    finally:
        stack.stop()
        if kept:
            shutil.rmtree(folder)
        else:
            print(f"the stack's logs: {folder}/data/logs")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
