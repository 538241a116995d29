"""What appending costs Redis: processor time and memory per event, at several batch sizes.

python3 run.py bench store [--redis-url URL] [--sessions N] [--events N]
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import run
from shared import keys
from shared.protocol import Delta, encode_event
from shared.session_log import Append, SessionLog
from shared.store import FAILED, Store, connect

BATCHES = (1, 8, 32, 128)
LEASE = "bench:1"


async def measure(store: Store, sessions: int, batch: int, events: int) -> dict[str, float]:
    """Append `events` events to each session, `batch` sessions per call; return the costs."""
    run_id, log = secrets.token_hex(4), SessionLog(store)
    ids = [f"{run_id}-{n}" for n in range(sessions)]
    async with store.redis.pipeline(transaction=False) as pipe:
        for sid in ids:
            pipe.hset(keys.session(sid), mapping={"lease": LEASE, "last": 0, "status": "running"})
            pipe.expire(keys.session(sid), 600)
            pipe.xadd(keys.events(sid), {"e": b"x"}, id="1-0")
            pipe.expire(keys.events(sid), 600)
        await pipe.execute()
    before, began, used = await _info(store), time.monotonic(), time.process_time()
    for index in range(1, events + 1):
        event = encode_event(Delta(0, (index % 100_000,), " token"))
        for at in range(0, sessions, batch):
            calls = [Append(sid, LEASE, index, [event]) for sid in ids[at : at + batch]]
            if set(await log.append(calls)) != {index}:
                raise RuntimeError("Redis refused an append")
    after, count = await _info(store), sessions * events
    cpu = sum(after[k] - before[k] for k in ("used_cpu_user", "used_cpu_sys"))
    result = {
        "batch": batch,
        "redis_us": cpu / count * 1e6,
        "client_us": (time.process_time() - used) / count * 1e6,
        "events_per_s": count / (time.monotonic() - began),
        "bytes": await store.redis.memory_usage(keys.events(ids[0]), samples=0) / events,
    }
    await store.redis.delete(*(key(sid) for sid in ids for key in (keys.session, keys.events)))
    return result


async def _info(store: Store) -> dict[str, Any]:
    return dict(await store.redis.info("cpu"))


async def compare(url: str, sessions: int, events: int) -> None:
    """Print a row for each batch size."""
    store = Store(connect(url))
    while True:
        try:
            version = (await store.redis.info("server"))["redis_version"]
            break
        except FAILED:
            await asyncio.sleep(0.1)
    print(f"Redis (or Valkey as Redis) {version}; {sessions} sessions, {events} events each\n")
    print("| sessions per append | Redis µs/event | client µs/event | events/s | bytes/event |")
    print("|---|---|---|---|---|")
    for batch in BATCHES:
        row = await measure(store, sessions, batch, events)
        print(
            f"| {batch} | {row['redis_us']:.1f} | {row['client_us']:.1f}"
            f" | {row['events_per_s']:.0f} | {row['bytes']:.0f} |",
            flush=True,
        )
    await store.close()


def main() -> None:
    """Measure the Redis of `--redis-url`, or one of our own with an append-only file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis-url", default="")
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--events", type=int, default=100)
    args = parser.parse_args()
    if args.redis_url:
        asyncio.run(compare(args.redis_url, args.sessions, args.events))
        return
    with tempfile.TemporaryDirectory() as folder:
        port, password = run.free_port(), secrets.token_hex(8)
        conf = run.REDIS_CONF.format(port=port, password=password)
        Path(folder, "redis.conf").write_text(conf)
        argv = [run.find_redis(sys.executable), "redis.conf"]
        server = subprocess.Popen(argv, cwd=folder, stdout=subprocess.DEVNULL)
        try:
            url = f"redis://:{password}@127.0.0.1:{port}/0"
            asyncio.run(compare(url, args.sessions, args.events))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
