"""Measures one server under one load: the parts of the relay benchmark that hold a clock."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import run
from benchmarks import _relay_parts as parts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks._relay_parts import Program

WARM_UP_SECONDS = 2.0
STREAMS_PER_CLIENT = 1000
SLOW_READERS = 5
SLOW_PADDING = 64 * 1024


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
    gc_ms: float = 0.0  # the gateways' longest pause for the garbage collector while measured
    gc_start_ms: float = 0.0  # and before, while the streams were opened
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


def longest_pause(gateways: list[Program]) -> float:
    """Return the gateways' longest pause for the garbage collector since the last question, ms."""
    for gateway in gateways:
        gateway.tell("gc")
    return max((max(gateway.hear()) for gateway in gateways), default=0.0)


def window(
    seconds: float,
    readers: list[Program],
    servers: list[Program],
    proxy: Program | None = None,
    *,
    gateways: bool = True,
) -> Measured:
    """Measure servers and their clients for so long."""
    begin = time.monotonic() + 0.2
    for reader in readers:
        reader.tell({"begin": begin, "end": begin + seconds})
    time.sleep(max(0, begin - time.monotonic()))
    proxies = [proxy] if proxy else []
    collecting = servers if gateways else []
    start_pause = longest_pause(collecting)
    busy, total = parts.machine_ticks()
    before = [[s.cpu_seconds() for s in group] for group in (servers, proxies)]
    time.sleep(max(0, begin + seconds - time.monotonic()))
    after = [[s.cpu_seconds() for s in group] for group in (servers, proxies)]
    busy_after, total_after = parts.machine_ticks()
    got = Measured(seconds=seconds, busy=(busy_after - busy) / max(1, total_after - total))
    got.gc_ms, got.gc_start_ms = longest_pause(collecting), start_pause
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
            return window(load.seconds, readers, [server], gateways=False)


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
