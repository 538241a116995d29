"""What the relay costs: CPU per delivered event beside a bare server, latency, memory, gaps.

    python3 run.py bench relay [--streams 100 500 2000] [--rate 20] [--seconds 6] [--save]

Everything is real but the model: Redis, a gateway process, a worker that appends timestamps to all
sessions through the production scripts, and HTTP clients in processes of their own that check every
id. The bare server (`_relay_bare.py`) sends the same frames in the same bursts. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import run
from benchmarks import _relay_parts as parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks._relay_parts import Program

WARM_UP_SECONDS = 2.0
STREAMS_PER_CLIENT = 1000
SLOW_READERS = 5
SLOW_PADDING = 64 * 1024
TARGETS = "targets: ratio ≤ 1.0 at 500; p50 ≤ 3 ms and p99 ≤ 10 ms at 100; ≤ 30 KB; gaps 0"


@dataclass
class Load:
    """What is asked of a server."""

    streams: int
    rate: float
    seconds: float
    batch: int


@dataclass
class Measured:
    """What a server did with it. Latencies are in seconds, sorted."""

    events: int = 0
    gaps: int = 0
    cpu: float = 0.0
    proxy_cpu: float = 0.0
    seconds: float = 0.0
    idle_kb: float = 0.0
    busy: float = 0.0  # share of the machine's CPU time that was used, by whomever
    latencies: list[float] = field(default_factory=list)

    @property
    def micros(self) -> float:
        """CPU µs per delivered event."""
        return self.cpu / max(1, self.events) * 1e6

    def quantile(self, q: float) -> float:
        """Return a quantile of the latencies in ms."""
        ordered = self.latencies or [float("nan")]
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e3


def post(session_id: str) -> str:
    """Return the request that begins a stream at a gateway."""
    message = {"role": "user", "content": "hello"}
    body = json.dumps({"messages": [message], "stream": True, "session_id": session_id})
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )


def get(number: int) -> str:
    """Return the request that begins a stream at the bare server."""
    return f"GET /stream/{number} HTTP/1.1\r\nHost: bench\r\n\r\n"


@contextlib.contextmanager
def clients(port: int, requests: list[str], **options: Any) -> Iterator[list[Program]]:
    """Open streams, spread over a few processes; yields when each has had its first event."""
    with contextlib.ExitStack() as stack:
        running = []
        for i in range(0, len(requests), STREAMS_PER_CLIENT):
            one = stack.enter_context(parts.python("benchmarks._relay_clients"))
            some = requests[i : i + STREAMS_PER_CLIENT]
            one.tell({"port": port, "requests": some, **options})
            running.append(one)
        for one in running:
            one.hear()
        yield running


def window(
    seconds: float, readers: list[Program], servers: list[Program], proxy: Program | None = None
) -> Measured:
    """Measure servers and their clients for so long."""
    begin = time.monotonic() + 0.2
    for reader in readers:
        reader.tell({"begin": begin, "end": begin + seconds})
    time.sleep(max(0, begin - time.monotonic()))
    proxies = [proxy] if proxy else []
    busy, total = parts.machine_ticks()
    before = [[s.cpu_seconds() for s in group] for group in (servers, proxies)]
    time.sleep(max(0, begin + seconds - time.monotonic()))
    after = [[s.cpu_seconds() for s in group] for group in (servers, proxies)]
    busy_after, total_after = parts.machine_ticks()
    got = Measured(seconds=seconds, busy=(busy_after - busy) / max(1, total_after - total))
    got.cpu, got.proxy_cpu = (sum(a) - sum(b) for a, b in zip(after, before, strict=True))
    for reader in readers:
        answer = reader.hear()
        got.events += answer["events"]
        got.gaps += answer["gaps"] + answer["closed"]
        got.latencies += answer["latencies"]
    got.latencies.sort()
    if not got.events:
        raise RuntimeError("nothing was delivered")
    return got


def measure_bare(load: Load) -> Measured:
    """Measure the bare server."""
    port = run.free_port()
    plan = {"port": port, "streams": load.streams, "batch": load.batch, "rate": load.rate}
    with parts.python("benchmarks._relay_bare", json.dumps(plan)) as server:
        parts.wait_for_port(port)
        requests = [get(n) for n in range(load.streams)]
        with clients(port, requests) as readers:
            time.sleep(WARM_UP_SECONDS)
            return window(load.seconds, readers, [server])


@contextlib.contextmanager
def producer(redis_url: str, load: Load, padding: int = 0) -> Iterator[Program]:
    """Register the worker that will serve the load."""
    with parts.python("benchmarks._relay_producer") as worker:
        plan = {"streams": load.streams, "batch": load.batch, "rate": load.rate}
        worker.tell({"redis_url": redis_url, "padding": padding, **plan})
        worker.hear()
        yield worker


def begin(worker: Program) -> None:
    """Let the worker claim its sessions and append."""
    worker.tell("claim")
    worker.hear()
    time.sleep(WARM_UP_SECONDS)


def measure_gateways(folder: Path, load: Load, *, gateways: int = 1) -> Measured:
    """Measure gateways between which the streams are divided."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(parts.redis_server(folder / f"redis{time.monotonic_ns()}"))
        served = [stack.enter_context(parts.gateway(url)) for _ in range(gateways)]
        worker = stack.enter_context(producer(url, load))
        readers: list[Program] = []
        for i, (_, port) in enumerate(served):
            parts.wait_until_ready(port)
            warm = [post(f"warm-{i}-{n}") for n in range(20)]
            with clients(port, warm):
                pass
        claim_away(url)
        before = sum(server.rss_kb() for server, _ in served)
        for i, (_, port) in enumerate(served):
            requests = [post(f"s-{n:06d}") for n in range(i, load.streams, gateways)]
            readers += stack.enter_context(clients(port, requests))
        idle_kb = (sum(server.rss_kb() for server, _ in served) - before) / load.streams
        begin(worker)
        got = window(load.seconds, readers, [server for server, _ in served])
        got.idle_kb = idle_kb
        return got


def claim_away(redis_url: str) -> None:
    """Take the sessions that wait off the queue: they only warmed the gateway up."""
    import redis

    from shared import keys

    with redis.Redis.from_url(redis_url) as client:
        client.delete(keys.QUEUE)


def measure_proxied(folder: Path, load: Load) -> Measured | None:
    """Measure a gateway with nginx before it; None where there is no nginx."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(parts.redis_server(folder / "redis-nginx"))
        server, port = stack.enter_context(parts.gateway(url))
        front = stack.enter_context(parts.nginx(folder / "nginx", port))
        if front is None:
            return None
        worker = stack.enter_context(producer(url, load))
        parts.wait_until_ready(port)
        requests = [post(f"s-{n:06d}") for n in range(load.streams)]
        readers = stack.enter_context(clients(front[1], requests))
        begin(worker)
        return window(load.seconds, readers, [server], front[0])


def measure_slow_readers(folder: Path, load: Load) -> tuple[Measured, Measured, float]:
    """Measure streams without and beside clients that never read; with the memory these took, MB.

    The slow ones' sessions grow by more than a MB each second.
    """
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(parts.redis_server(folder / "redis-slow"))
        server, port = stack.enter_context(parts.gateway(url))
        worker = stack.enter_context(producer(url, load))
        parts.wait_until_ready(port)
        requests = [post(f"s-{n:06d}") for n in range(load.streams)]
        readers = stack.enter_context(clients(port, requests))
        begin(worker)
        alone = window(load.seconds, readers, [server])
        slow = Load(SLOW_READERS, load.rate, load.seconds, 1)
        pusher = stack.enter_context(producer(url, slow, SLOW_PADDING))
        before = server.rss_kb()
        requests = [post(f"slow-{n}") for n in range(SLOW_READERS)]
        stack.enter_context(clients(port, requests, reads=False, receive_buffer=4096))
        begin(pusher)
        beside = window(load.seconds, readers, [server])
        return alone, beside, (server.rss_kb() - before) / 1024


def table(rows: list[tuple[int, Measured, Measured]]) -> Iterator[str]:
    """Yield the lines of the main table: streams, the gateway's figures and the bare server's."""
    yield (
        "| streams | events/s | gateway µs/event | bare µs/event | ratio | gateway p50 / p99 ms "
        "| bare p50 / p99 ms | machine busy | KB per idle stream | gaps |"
    )
    yield "|" + "---|" * 10
    for streams, ours, bare in rows:
        yield (
            f"| {streams} | {ours.events / ours.seconds:.0f} | {ours.micros:.1f} "
            f"| {bare.micros:.1f} | {ours.micros / bare.micros:.2f} "
            f"| {ours.quantile(0.5):.1f} / {ours.quantile(0.99):.1f} "
            f"| {bare.quantile(0.5):.1f} / {bare.quantile(0.99):.1f} "
            f"| {ours.busy:.0%} / {bare.busy:.0%} | {ours.idle_kb:.1f} | {ours.gaps} |"
        )
    if len(rows) > 1:
        (_, first, bare_first), (_, last, bare_last) = rows[0], rows[-1]
        ours, bare = last.micros / first.micros, bare_last.micros / bare_first.micros
        yield ""
        yield (
            f"From {rows[0][0]} to {rows[-1][0]} streams the cost per event changes by "
            f"x{ours:.2f}, the bare server's by x{bare:.2f}."
        )


def more(folder: Path, args: argparse.Namespace, one: Measured, load: Load) -> Iterator[str]:
    """Yield what slow readers, a second gateway and nginx change."""
    few = Load(100, args.rate, args.seconds, args.batch)
    alone, beside, megabytes = measure_slow_readers(folder, few)
    yield (
        f"- {SLOW_READERS} clients that never read, beside 100 streams: p50 / p99 "
        f"{alone.quantile(0.5):.1f} / {alone.quantile(0.99):.1f} ms without, "
        f"{beside.quantile(0.5):.1f} / {beside.quantile(0.99):.1f} ms with them; "
        f"{megabytes / SLOW_READERS:.2f} MB of the gateway each; gaps {beside.gaps}."
    )
    two = measure_gateways(folder, load, gateways=2)
    yield (
        f"- Two gateways for {load.streams} streams: {two.micros:.1f} µs per event over both, "
        f"{one.micros:.1f} with one: by CPU time two of them carry "
        f"{2 * one.micros / two.micros:.2f} times what one does; p99 {two.quantile(0.99):.1f} ms, "
        f"gaps {two.gaps}. To load two gateways fully takes more cores than this machine's "
        f"{os.cpu_count()}, which clients, worker and Redis share with them."
    )
    proxied = measure_proxied(folder, load)
    if proxied is None:
        yield "- nginx in front: not on PATH, not measured."
    else:
        yield (
            f"- nginx in front, {load.streams} streams: "
            f"{proxied.proxy_cpu / proxied.events * 1e6:.1f} µs of nginx and {proxied.micros:.1f} "
            f"of the gateway per event; p50 / p99 {proxied.quantile(0.5):.1f} / "
            f"{proxied.quantile(0.99):.1f} ms; gaps {proxied.gaps}."
        )


def report(args: argparse.Namespace) -> Iterator[str]:
    """Measure, and yield the report's lines as they come."""
    versions = ", ".join(f"{n} {version(n)}" for n in ("starlette", "uvicorn", "redis", "hiredis"))
    yield f"# Relay, {dt.datetime.now(dt.timezone.utc):%Y-%m-%d}"
    yield ""
    yield (
        f"`{args.command}`; Python {platform.python_version()}, {versions}; {os.cpu_count()} "
        f"cores, load {os.getloadavg()[0]:.1f} at the start; groups of {args.batch} sessions."
    )
    yield ""
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        for streams in args.streams:
            load = Load(streams, args.rate, args.seconds, args.batch)
            bare = measure_bare(load)
            rows.append((streams, measure_gateways(folder, load), bare))
        yield from table(rows)
        yield ""
        yield TARGETS
        yield (
            "Near 100 % busy, events wait for the processor: latencies then show the machine's "
            "load, and several events share a write, which makes each of them cheaper."
        )
        if not args.quick:
            yield ""
            middle = min(rows, key=lambda row: abs(row[0] - 500))
            load = Load(middle[0], args.rate, args.seconds, args.batch)
            yield from more(folder, args, middle[1], load)


def main() -> None:
    """Read the command line, measure, print, and save where asked to."""
    parser = argparse.ArgumentParser(prog="run.py bench relay", description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[100, 500, 2000])
    parser.add_argument("--rate", type=float, default=20, help="events per second and stream")
    parser.add_argument("--seconds", type=float, default=6, help="length of each measurement")
    parser.add_argument("--batch", type=int, default=32, help="sessions that share a worker's step")
    parser.add_argument("--quick", action="store_true", help="the table alone")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/relay-….md")
    args = parser.parse_args()
    args.command = "python3 run.py bench relay --streams " + " ".join(map(str, args.streams))
    args.command += f" --rate {args.rate:g} --seconds {args.seconds:g} --batch {args.batch}"
    lines = []
    for line in report(args):
        print(line, flush=True)
        lines.append(line)
    if args.save:
        folder = parts.ROOT / "benchmarks" / "results"
        folder.mkdir(exist_ok=True)
        path = folder / f"relay-{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}.md"
        path.write_text("\n".join(lines) + "\n")
        print(f"saved to {path.relative_to(parts.ROOT)}")


if __name__ == "__main__":
    main()
