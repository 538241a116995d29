"""What the worker measures: runs of sessions, and engine steps; and its `/metrics`."""

from __future__ import annotations

import logging
import threading
import time
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, generate_latest

from shared import metrics
from shared.protocol import Failed, Finished

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shared.session_log import SessionRecord
    from worker.engine.messages import Ready, Step
    from worker.publisher import Ending

log = logging.getLogger("unbroken.meter")


class _Exposition(BaseHTTPRequestHandler):
    """Always the plain text format: the library's own server bends `vllm:` names when asked to."""

    def do_GET(self) -> None:
        """Answer a scrape."""
        body = generate_latest(metrics.WORKER)
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Say nothing: scrapes are no lifecycle."""


def serve(host: str, port: int) -> Callable[[], None]:
    """Expose the worker's metrics over HTTP; port 0 takes a free one. Returns what ends it.

    A port that is taken costs the metrics, not the worker.
    """
    try:
        server = ThreadingHTTPServer((host, port), _Exposition)
    except OSError as error:
        log.error("no metrics: cannot listen", extra={"port": port, "error": str(error)})  # noqa: TRY400
        return lambda: None
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    log.info("metrics", extra={"host": host, "port": server.server_port})

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close


def step(done: Step, engine: Ready | None) -> None:
    """Note the size of one engine step and how full the cache is."""
    if engine is not None:
        metrics.BATCH_SIZE.observe(done.batch)
        _cache_usage(engine.model).set(done.cache_usage)


_cache_usage = lru_cache(1)(metrics.KV_CACHE_USAGE.labels)  # labels() takes longer than set()


def failed(code: str) -> None:
    """Note that a session was ended as failed without running."""
    metrics.FAILURES.labels(code).inc()


def attributes(ending: Ending) -> dict[str, object]:
    """Return what a log line says of a session's end, by OpenTelemetry's names."""
    reasons = ending.event.reasons if isinstance(ending.event, Finished) else ()
    return {
        "gen_ai.usage.input_tokens": ending.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": ending.usage.completion_tokens,
        "gen_ai.response.finish_reasons": list(reasons),
        **({"error.type": ending.event.code} if isinstance(ending.event, Failed) else {}),
    }


def engine_restarted() -> None:
    """Note that another engine process is started."""
    metrics.ENGINE_RESTARTS.inc()


class Load:
    """How busy the worker is, by its own metrics: what it tells the register of workers."""

    def __init__(self) -> None:
        self._tokens, self._at = _total(metrics.GENERATION_TOKENS), time.monotonic()
        self.tokens_per_second = 0.0

    def look(self) -> None:
        """Take the tokens since the last look for the present rate."""
        tokens, now = _total(metrics.GENERATION_TOKENS), time.monotonic()
        self.tokens_per_second = round((tokens - self._tokens) / max(now - self._at, 1e-3), 1)
        self._tokens, self._at = tokens, now

    @property
    def cache_usage(self) -> float:
        """The share of the cache's places that held a token in the last step."""
        return round(_total(metrics.KV_CACHE_USAGE), 4)


def _total(metric: Counter | Gauge) -> float:
    samples = [sample for family in metric.collect() for sample in family.samples]
    return sum(sample.value for sample in samples)


class RunMeter:
    """Measures one run of a session, from its claim to its end or to being given back.

    Args:
        model: the served model's name.
        record: the session's record.
        lease: `worker:epoch`; the epoch is Redis' time of the claim in microseconds.
    """

    def __init__(self, model: str, record: SessionRecord, lease: str) -> None:
        self._model = model
        self._state: Gauge | None = metrics.WAITING.labels(model)
        self._state.inc()
        self._latency = metrics.INTER_TOKEN_LATENCY.labels(model)
        self._tokens_out = metrics.GENERATION_TOKENS.labels(model)
        self._in_engine = self._first = self._last = 0.0
        self._outputs: dict[int, tuple[int, float]] = {}  # choice -> tokens, when
        if record.last > 0:
            metrics.TAKEOVERS.inc()
        elif record.claims <= 1:
            seconds = int(lease.rpartition(":")[2]) / 1e6 - record.enqueued / 1e3
            metrics.QUEUE_TIME.labels(model).observe(max(0.0, seconds))

    def in_engine(self, prompt_tokens: int, generated: Sequence[Sequence[int]]) -> None:
        """Note that the prompt went to the engine, with the tokens that each choice has already."""
        self._in_engine = time.monotonic()
        self._outputs = {c: (len(ids), self._in_engine) for c, ids in enumerate(generated)}
        self._move(metrics.RUNNING.labels(self._model))
        metrics.PROMPT_TOKENS.labels(self._model).inc(prompt_tokens)

    def output(self, choice: int, tokens: int) -> None:
        """Note that a choice has `tokens` tokens by now."""
        had, before = self._outputs[choice]
        if tokens <= had:
            return
        now = self._last = time.monotonic()
        self._outputs[choice] = tokens, now
        self._tokens_out.inc(tokens - had)
        if before > self._in_engine:
            self._latency.observe((now - before) / (tokens - had))
        elif not self._first:
            self._first = now
            metrics.PREFILL_TIME.labels(self._model).observe(now - self._in_engine)

    def ended(self, ending: Ending) -> None:
        """Note that the session's end stands in its log."""
        event, usage = ending.event, ending.usage
        reason = "error"
        if isinstance(event, Failed):
            metrics.FAILURES.labels(event.code).inc()
        elif isinstance(event, Finished):
            reason = "abort" if event.cancelled else (*event.reasons, "stop")[0]
            if event.cancelled:
                metrics.CANCELS.labels(event.cancelled).inc()
        metrics.REQUEST_SUCCESS.labels(self._model, reason).inc()
        if usage.prompt_tokens:
            metrics.PREFIX_QUERIES.labels(self._model).inc(usage.prompt_tokens)
            metrics.PREFIX_HITS.labels(self._model).inc(usage.cached_tokens)
            metrics.REQUEST_PROMPT_TOKENS.labels(self._model).observe(usage.prompt_tokens)
            metrics.REQUEST_GENERATION_TOKENS.labels(self._model).observe(usage.completion_tokens)
        if self._first:
            metrics.DECODE_TIME.labels(self._model).observe(self._last - self._first)
            metrics.INFERENCE_TIME.labels(self._model).observe(self._last - self._in_engine)

    def close(self) -> None:
        """Note that this worker runs the session no more, however that came."""
        self._move(None)

    def _move(self, state: Gauge | None) -> None:
        if self._state is not None:
            self._state.dec()
        if state is not None:
            state.inc()
        self._state = state
