"""What `/metrics` says after what happened, on gateway and worker."""

import math
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

import run
from gateway.meter import METHODS
from shared import metrics
from shared.errors import KINDS
from tests.served import serving
from worker import meter

PROMETHEUS_ACCEPTS = (
    "application/openmetrics-text;version=1.0.0;escaping=underscores;q=0.6,"
    "text/plain;version=1.0.0;escaping=underscores;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.1"
)
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def samples(text):
    """Return the exposition as `{(name, labels): value}`."""
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def total(values, name, **labels):
    """Sum the series of a name that have these labels."""
    wanted = labels.items()
    return sum(v for (n, given), v in values.items() if n == name and wanted <= set(given))


class Difference:
    """What changed between two scrapes: the registry is the whole process's."""

    def __init__(self, client):
        self._client = client

    async def begin(self):
        self._before = samples((await self._client.get("/metrics")).text)
        return self

    async def of(self, *names):
        now = samples((await self._client.get("/metrics")).text)
        return lambda name, **labels: (
            total(now, name, **labels) - total(self._before, name, **labels)
        )


async def answer(client, worker, **body):
    """Post a streamed chat that the worker answers with two words; returns the stream's text."""
    async with client.stream(
        "POST", "/v1/chat/completions", json={**HELLO, "stream": True, **body}
    ) as r:
        while not (claimed := await worker.claim()):
            pass
        await worker.say(claimed[0], "one")
        await worker.say(claimed[0], " two")
        await worker.finish(claimed[0])
        return (await r.aread()).decode()


async def test_a_stream_is_counted_once(redis_url, worker):
    """A stream gives one first token, one end, its route and status; a resume counts as such."""
    async with serving(redis_url) as client:
        changed = Difference(client)
        await changed.begin()
        text = await answer(client, worker, session_id="s1")
        place = {"last-event-id": "s1:1"}
        await client.post("/v1/chat/completions", headers=place)
        await client.get("/v1/sessions/s1/events", headers=place)
        await client.post("/v1/chat/completions", json={**HELLO, "session_id": "s1"})
        grown = await changed.of()
        model = {"model_name": "org/tiny"}
        assert text.count("data: ") == 5
        assert grown("vllm:time_to_first_token_seconds_count", **model) == 1
        assert grown("vllm:e2e_request_latency_seconds_count", **model) == 1
        assert grown("unbroken_resumes_total", kind="resume") == 2
        assert grown("unbroken_resumes_total", kind="attach") == 1
        assert grown("unbroken_relay_events_total") >= 2
        assert grown("unbroken_relay_lag_seconds_count") >= 1
        assert grown("unbroken_redis_seconds_count", command="submit") == 2
        assert grown("unbroken_streams") == 0
        chat = {"http_route": "/v1/chat/completions", "http_response_status_code": "200"}
        assert grown("http_server_request_duration_seconds_count", **chat) == 3


async def test_first_tokens_wait_for_the_text(redis_url, worker):
    """The time to the first token includes the wait for the worker, not only the first frame."""
    async with serving(redis_url) as client:
        changed = await Difference(client).begin()
        post = {**HELLO, "stream": True, "session_id": "s2"}
        async with client.stream("POST", "/v1/chat/completions", json=post) as response:
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith("id: s2:0")
            grown = await changed.of()
            assert grown("vllm:time_to_first_token_seconds_count") == 0
            assert grown("unbroken_streams") == 1
            assert grown("unbroken_followed_sessions") == 1
            assert grown("unbroken_queue_depth") == 1
            [claimed] = await worker.claim()
            await worker.say(claimed, "x")
            await worker.finish(claimed)
            async for _ in lines:
                pass
        grown = await changed.of()
        assert grown("vllm:time_to_first_token_seconds_count") == 1


async def test_errors_and_cancels_are_counted_by_kind(redis_url, worker):
    """Errors count by code; a queued session that is cancelled twice counts once."""
    async with serving(redis_url, api_keys="k") as client:
        changed = await Difference(client).begin()
        await client.get("/v1/models")
        client.headers["authorization"] = "Bearer k"
        await client.post("/v1/chat/completions", json={})
        await client.get("/nowhere/at/all")
        await client.request("PURGE", "/v1/models")
        post = {**HELLO, "stream": True, "session_id": "s3"}
        async with client.stream("POST", "/v1/chat/completions", json=post):
            for _ in range(2):
                answer = await client.post("/v1/cancel/s3")
                assert answer.json()["status"] == "cancelled"
        grown = await changed.of()
        assert grown("unbroken_errors_total", error_type="invalid_api_key") == 1
        assert grown("unbroken_errors_total", error_type="invalid_value") == 1
        assert grown("unbroken_cancels_total", reason="requested") == 1
        seconds = "http_server_request_duration_seconds_count"
        assert grown(seconds, http_route="other", http_response_status_code="404") == 1
        assert grown(seconds, http_request_method="_OTHER") == 1


async def test_labels_do_not_grow_with_requests(redis_url, worker):
    """Whatever ids, paths and methods come, there are no new series beyond the known ones."""
    async with serving(redis_url) as client:
        for method in ("PURGE", "MKCOL", "LOCK", "TRACE"):
            await client.request(method, "/")
        for n in range(30):
            await client.get(f"/v1/sessions/id-{n}")
            await client.get(f"/path-{n}")
        now = samples((await client.get("/metrics")).text)
        routes = {dict(labels).get("http_route") for _, labels in now}
        methods = {dict(labels).get("http_request_method") for _, labels in now}
        codes = {dict(labels).get("error_type") for _, labels in now}
        plain = {(route or "other").replace(":path}", "}") for route in routes}
        assert plain <= {"other", *client.routes}
        assert methods <= {None, "_OTHER", *METHODS}
        assert codes <= {None, *KINDS}


async def test_without_redis_a_scrape_still_answers():
    """With Redis away `/metrics` answers soon, and says that it knows no depth."""
    async with serving("redis://127.0.0.1:1/0") as client:
        now = samples((await client.get("/metrics")).text)
        assert now["unbroken_redis_up", ()] == 0
        assert math.isnan(now["unbroken_queue_depth", ()])


async def test_redis_says_how_full_it_is(redis_url, store):
    """What Redis keeps and what it may keep stand in the gateway's metrics; else NaN."""
    await store.redis.config_set("maxmemory", 10**9)
    try:
        async with serving(redis_url) as client:
            now = samples((await client.get("/metrics")).text)
    finally:
        await store.redis.config_set("maxmemory", 0)
    assert 10**5 < now["unbroken_redis_memory_bytes", ()] < 10**9
    assert now["unbroken_redis_memory_limit_bytes", ()] == 10**9
    async with serving("redis://127.0.0.1:1/0") as client:
        now = samples((await client.get("/metrics")).text)
    assert math.isnan(now["unbroken_redis_memory_bytes", ()])


@pytest.mark.parametrize("accept", ["*/*", PROMETHEUS_ACCEPTS])
def test_the_workers_names_are_the_same_for_every_scraper(accept):
    """Whatever forms a scraper offers to take, `vllm:` names come with their colon."""
    port = run.free_port()
    end = meter.serve("127.0.0.1", port)
    try:
        metrics.RUNNING.labels("some-model").set(1)
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept}
        )
        with urllib.request.urlopen(asked) as answer:
            text = answer.read().decode()
    finally:
        end()
        metrics.RUNNING.remove("some-model")
    assert 'vllm:num_requests_running{model_name="some-model"} 1.0' in text
