"""What a worker's `/metrics` says after real generations."""

import re
import urllib.request

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.stack import wait_until

HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def scrape(url):
    """Return the exposition as a list of samples."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    return [s for family in text_string_to_metric_families(text) for s in family.samples]


def total(samples, name, labels):
    """Sum the series of a name that have these labels."""
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def test_the_worker_counts_what_it_did(stack):
    """A real worker's `/metrics` agrees with the usage of the answers, and is free of leftovers."""
    logs = "".join(f.read_text() for f in (stack.folder / "logs").glob("worker*.log"))
    port = re.findall(r'"message": "metrics".*?"port": (\d+)', logs)[-1]
    url = f"http://127.0.0.1:{port}/metrics"
    before = scrape(url)
    usage = []
    with httpx.Client(base_url=stack.url, timeout=30, trust_env=False) as client:
        for n in (5, 9):
            body = {**HELLO, "max_tokens": n, "ignore_eos": True}
            usage.append(client.post("/v1/chat/completions", json=body).json()["usage"])
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        bad = {"messages": [{"role": "user", "content": [image]}]}
        assert client.post("/v1/chat/completions", json=bad).status_code == 400

    def grown(name, **labels):
        return total(scrape(url), name, labels) - total(before, name, labels)

    wait_until(lambda: grown("vllm:request_success_total", finished_reason="error") == 1, "end")
    assert grown("vllm:generation_tokens_total") == sum(u["completion_tokens"] for u in usage)
    assert grown("vllm:prompt_tokens_total") == sum(u["prompt_tokens"] for u in usage)
    assert grown("vllm:prefix_cache_queries_total") == grown("vllm:prompt_tokens_total")
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usage)
    assert grown("vllm:prefix_cache_hits_total") == cached
    assert grown("vllm:request_success_total", finished_reason="length") == 2
    assert grown("unbroken_sessions_failed_total", error_type="invalid_media") == 1
    for name in ("queue_time", "prefill_time", "decode_time", "inference_time"):
        expected = 3 if name == "queue_time" else 2
        assert grown(f"vllm:request_{name}_seconds_count") == expected, name
    assert grown("vllm:inter_token_latency_seconds_count") >= 8
    assert grown("unbroken_batch_size_count") >= 12
    assert 0 <= total(scrape(url), "vllm:kv_cache_usage_perc", {}) <= 1
    for state in ("running", "waiting"):
        assert grown(f"vllm:num_requests_{state}") == 0


def test_the_status_tells_how_busy_the_worker_is(stack):
    """Tokens a second and the share of the cache rise with a generation, and fall behind it."""
    body = {**HELLO, "max_tokens": 3000, "ignore_eos": True, "stream": True, "session_id": "busy"}
    with httpx.Client(base_url=stack.url, timeout=30, trust_env=False) as client:

        def load():
            [worker] = client.get("/v1/status").json()["workers"]
            return worker["tokens_per_second"], worker["cache_usage"]

        with client.stream("POST", "/v1/chat/completions", json=body):
            rate, cache = wait_until(lambda: all(now := load()) and now, "busy")
            assert 0 < rate < 100_000
            assert 0 < cache < 1
            client.post("/v1/cancel/busy")
        wait_until(lambda: load() == (0, 0), "idle")
