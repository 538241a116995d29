"""Every Prometheus metric of gateway and worker, and the two registries that they are exposed from.

Names that start with `vllm:` mean what vLLM means by them, so that its dashboards work; the label
values of each metric come from a fixed set, or name a served model.
"""

from __future__ import annotations

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asks for

GATEWAY = CollectorRegistry()
WORKER = CollectorRegistry()
for _registry in (GATEWAY, WORKER):
    for _collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
        _registry.register(_collector)

MODEL = ["model_name"]
SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
MEDIUM = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
LONG = (0.05, 0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480, 960, 1920)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# --- Gateway and worker ---------------------------------------------------------------------------
REDIS_SECONDS = Histogram(
    "unbroken_redis_seconds", "A round trip to Redis, retries included.", ["command"],
    buckets=SHORT, registry=None,
)  # fmt: skip
CANCELS = Counter(
    "unbroken_cancels", "Sessions that ended as cancelled.", ["reason"], registry=None
)
FAILURES = Counter(
    "unbroken_sessions_failed", "Sessions that ended as failed.", ["error_type"], registry=None
)
for _metric in (REDIS_SECONDS, CANCELS, FAILURES):
    GATEWAY.register(_metric)
    WORKER.register(_metric)

# --- Gateway --------------------------------------------------------------------------------------
TIME_TO_FIRST_TOKEN = Histogram(
    "vllm:time_to_first_token_seconds", "Request received to first text given to the client.",
    MODEL, buckets=MEDIUM, registry=GATEWAY,
)  # fmt: skip
E2E_LATENCY = Histogram(
    "vllm:e2e_request_latency_seconds", "Request received to the end of its answer.",
    MODEL, buckets=LONG, registry=GATEWAY,
)  # fmt: skip
HTTP_SECONDS = Histogram(
    "http_server_request_duration_seconds", "HTTP requests, until their answer is complete.",
    ["http_request_method", "http_route", "http_response_status_code"],
    buckets=LONG, registry=GATEWAY,
)  # fmt: skip
ERRORS = Counter(
    "unbroken_errors", "Answers and streams that ended with an error, by its code.",
    ["error_type"], registry=GATEWAY,
)  # fmt: skip
RESUMES = Counter(
    "unbroken_resumes", "Streams resumed behind an event, and posts attached to a known session.",
    ["kind"], registry=GATEWAY,
)  # fmt: skip
RATE_LIMITED = Counter(
    "unbroken_rate_limited", "Requests over a limit of their key.", ["limit"], registry=GATEWAY
)
STREAMS = Gauge("unbroken_streams", "Open event streams.", registry=GATEWAY)
FOLLOWED = Gauge(
    "unbroken_followed_sessions", "Sessions whose log this gateway follows.", registry=GATEWAY
)
RELAY_LAG = Histogram(
    "unbroken_relay_lag_seconds", "Doorbell heard to its events written to all clients.",
    buckets=SHORT, registry=GATEWAY,
)  # fmt: skip
RELAY_EVENTS = Counter(
    "unbroken_relay_events", "Events that the hub took from the logs.", registry=GATEWAY
)
QUEUE_DEPTH = Gauge(
    "unbroken_queue_depth", "Sessions that wait for a worker, in all.", registry=GATEWAY
)
WORKERS = Gauge("unbroken_workers", "Live workers, in all.", ["state"], registry=GATEWAY)
REDIS_UP = Gauge("unbroken_redis_up", "Whether Redis answered this scrape.", registry=GATEWAY)
REDIS_MEMORY = Gauge("unbroken_redis_memory_bytes", "What Redis keeps.", registry=GATEWAY)
REDIS_MEMORY_LIMIT = Gauge(
    "unbroken_redis_memory_limit_bytes", "What Redis may keep; 0: any amount.", registry=GATEWAY
)

# --- Worker ---------------------------------------------------------------------------------------
RUNNING = Gauge("vllm:num_requests_running", "Sessions in the engine.", MODEL, registry=WORKER)
WAITING = Gauge(
    "vllm:num_requests_waiting", "Sessions claimed, and not yet in the engine.",
    MODEL, registry=WORKER,
)  # fmt: skip
KV_CACHE_USAGE = Gauge(
    "vllm:kv_cache_usage_perc", "Share of the cache's places that hold a token, 0 to 1.",
    MODEL, registry=WORKER,
)  # fmt: skip
PROMPT_TOKENS = Counter("vllm:prompt_tokens", "Prompt tokens processed.", MODEL, registry=WORKER)
GENERATION_TOKENS = Counter("vllm:generation_tokens", "Tokens generated.", MODEL, registry=WORKER)
PREFIX_QUERIES = Counter(
    "vllm:prefix_cache_queries", "Prompt tokens looked up for reuse.", MODEL, registry=WORKER
)
PREFIX_HITS = Counter(
    "vllm:prefix_cache_hits", "Prompt tokens reused, not computed.", MODEL, registry=WORKER
)
REQUEST_PROMPT_TOKENS = Histogram(
    "vllm:request_prompt_tokens", "Prompt tokens of a session.",
    MODEL, buckets=TOKENS, registry=WORKER,
)  # fmt: skip
REQUEST_GENERATION_TOKENS = Histogram(
    "vllm:request_generation_tokens", "Tokens generated for a session.",
    MODEL, buckets=TOKENS, registry=WORKER,
)  # fmt: skip
QUEUE_TIME = Histogram(
    "vllm:request_queue_time_seconds", "Submitted to first claimed.",
    MODEL, buckets=MEDIUM, registry=WORKER,
)  # fmt: skip
PREFILL_TIME = Histogram(
    "vllm:request_prefill_time_seconds", "In the engine to first token.",
    MODEL, buckets=MEDIUM, registry=WORKER,
)  # fmt: skip
DECODE_TIME = Histogram(
    "vllm:request_decode_time_seconds", "First token to last.",
    MODEL, buckets=LONG, registry=WORKER,
)  # fmt: skip
INFERENCE_TIME = Histogram(
    "vllm:request_inference_time_seconds", "In the engine to last token.",
    MODEL, buckets=LONG, registry=WORKER,
)  # fmt: skip
INTER_TOKEN_LATENCY = Histogram(
    "vllm:inter_token_latency_seconds", "Time per token between two outputs of a sequence.",
    MODEL, buckets=SHORT, registry=WORKER,
)  # fmt: skip
REQUEST_SUCCESS = Counter(
    "vllm:request_success", "Ended sessions.", [*MODEL, "finished_reason"], registry=WORKER
)
BATCH_SIZE = Histogram(
    "unbroken_batch_size", "Sequences in a step of the engine.", buckets=BATCH, registry=WORKER
)
TAKEOVERS = Counter(
    "unbroken_takeovers", "Sessions continued behind the tokens of an earlier run.", registry=WORKER
)
GIVEN_BACK = Counter("unbroken_given_back", "Sessions given back to the queue.", registry=WORKER)
LEASES_LOST = Counter(
    "unbroken_leases_lost", "Sessions dropped because the lease is another's.", registry=WORKER
)
ENGINE_RESTARTS = Counter(
    "unbroken_engine_restarts", "Engine processes started after the first.", registry=WORKER
)
CHILD_DEATHS = Counter(
    "unbroken_child_deaths", "Decoder and processor processes that ended.", ["kind"],
    registry=WORKER,
)  # fmt: skip
WORKER_READY = Gauge("unbroken_worker_ready", "Whether this worker claims.", registry=WORKER)
