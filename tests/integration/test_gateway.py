import asyncio
import json
import socket

import pytest

from shared import keys
from shared.protocol import decode_request
from tests.scripted import ScriptedWorker
from tests.served import serving

BODY = {"messages": [{"role": "user", "content": "hello"}]}


class Events:
    """Reads the SSE frames of a response: `(id, data)`, the data parsed, or "[DONE]"."""

    def __init__(self, response):
        self._lines = response.aiter_lines()

    async def next(self):
        event_id = data = None
        async for line in self._lines:
            if line.startswith("id: "):
                event_id = line[4:]
            elif line.startswith("data: "):
                data = line[6:]
            elif line == "" and data is not None:
                return event_id, data if data == "[DONE]" else json.loads(data)
        return None

    async def rest(self):
        found = []
        while (event := await self.next()) is not None:
            found.append(event)
        return found


async def claimed(worker):
    """Wait for the next queued session and claim it."""
    while not (sessions := await worker.claim()):
        await worker.queue.wait_for_work(1)
    return sessions[0]


async def answer(worker, *texts):
    """Serve one session with these texts."""
    session = await claimed(worker)
    for text in texts:
        await worker.say(session, text)
    await worker.finish(session)
    return session


async def test_first_frame_comes_before_any_worker_claims(client, worker):
    """The stream opens with the role under index 0 while the session is still queued."""
    async with client.stream(
        "POST", "/v1/chat/completions", json={**BODY, "stream": True}
    ) as response:
        event_id, chunk = await Events(response).next()
    session_id = response.headers["x-session-id"]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert event_id == f"{session_id}:0"
    assert chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (chunk["id"], chunk["model"]) == (session_id, "org/tiny")


async def test_stream_has_contiguous_ids_one_end_and_done(client, worker):
    """Ids run 0, 1, 2, …; the finish comes once, then usage and [DONE] without an id."""
    body = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    producer = asyncio.create_task(answer(worker, "Hel", "lo"))
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        got = await Events(response).rest()
    await producer
    sid = response.headers["x-session-id"]
    assert [i for i, _ in got] == [f"{sid}:0", f"{sid}:1", f"{sid}:2", f"{sid}:3", None, None]
    assert [c["choices"][0]["delta"].get("content") for _, c in got[:3]] == ["", "Hel", "lo"]
    assert got[3][1]["choices"][0]["finish_reason"] == "stop"
    assert all(c["usage"] is None for _, c in got[:4])
    assert got[4][1]["choices"] == []
    assert got[4][1]["usage"]["total_tokens"] == 9
    assert got[5][1] == "[DONE]"


async def test_the_whole_stream_is_the_same_bytes_on_any_gateway(start, worker):
    """A replay from another gateway, later, is byte-identical to the live stream."""
    one, two = await start(), await start()
    body = {**BODY, "stream": True, "session_id": "same"}
    producer = asyncio.create_task(answer(worker, "a", 'b"\n', "ü"))
    live = (await one.post("/v1/chat/completions", json=body)).content
    await producer
    assert (await two.post("/v1/chat/completions", json=body)).content == live
    header = {"last-event-id": "same:1"}
    rest = (await two.post("/v1/chat/completions", headers=header)).content
    assert live.endswith(rest)
    assert rest.startswith(b"id: same:2\n")
    assert live.startswith(b"id: same:0\nretry: 1000\ndata: ")


async def test_resume_goes_on_live_after_the_cursor(start, worker):
    """A client that left in the middle gets the rest from another gateway while it is written."""
    one, two = await start(), await start()
    async with one.stream(
        "POST", "/v1/chat/completions", json={**BODY, "stream": True, "session_id": "s"}
    ) as response:
        session = await claimed(worker)
        await worker.say(session, "one")
        events = Events(response)
        assert [(await events.next())[0] for _ in range(2)] == ["s:0", "s:1"]
    header = {"last-event-id": "s:1"}
    async with two.stream("POST", "/v1/chat/completions", headers=header) as response:
        await worker.say(session, "two")
        assert (await Events(response).next())[0] == "s:2"
        await worker.finish(session)
    rest = await two.post("/v1/chat/completions", headers={"last-event-id": "s:2"})
    assert rest.text.endswith("data: [DONE]\n\n")


async def test_resume_after_the_end_gives_what_follows_it_only(client, worker):
    """Whoever has seen the last event gets the usage they asked for, and [DONE]."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    producer = asyncio.create_task(answer(worker, "x"))
    await client.post("/v1/chat/completions", json={**BODY, **options, "session_id": "s"})
    await producer
    rest = await client.post("/v1/chat/completions", headers={"last-event-id": "s:2"})
    events = rest.text.split("\n\n")
    assert json.loads(events[0][6:])["usage"]["completion_tokens"] == 1
    assert events[1:] == ["data: [DONE]", ""]


async def test_non_streaming_gathers_the_same_log(client, worker):
    """A non-streaming caller gets reasoning, answer and real counts in one completion."""

    async def produce():
        session = await claimed(worker)
        await worker.say(session, "hm", "reasoning")
        await worker.say(session, "Hi")
        await worker.finish(session, "length")

    producer = asyncio.create_task(produce())
    response = await client.post("/v1/chat/completions", json=BODY)
    await producer
    completion = response.json()
    message = completion["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "reasoning_content": "hm",
        "reasoning": "hm",
    }
    assert completion["choices"][0]["finish_reason"] == "length"
    assert completion["id"] == response.headers["x-session-id"]
    assert completion["usage"]["prompt_tokens"] == 7


async def test_fifty_posts_with_one_key_make_one_generation(client, worker):
    """Fifty simultaneous posts with one Idempotency-Key, half streaming, share one session."""
    header = {"idempotency-key": "k"}
    posts = [
        client.post("/v1/chat/completions", headers=header, json={**BODY, "stream": i % 2 == 0})
        for i in range(50)
    ]
    tasks = [asyncio.create_task(post) for post in posts]
    session = await claimed(worker)
    await worker.say(session, "once")
    await worker.finish(session)
    responses = await asyncio.gather(*tasks)
    assert {r.headers["x-session-id"] for r in responses} == {session.session_id}
    assert len({r.text for r in responses[::2]}) == 1
    texts = {r.json()["choices"][0]["message"]["content"] for r in responses[1::2]}
    assert texts == {"once"}
    assert await worker.claim() == []


async def test_a_used_session_id_with_another_body_is_409(client, worker):
    """The same id with another body is refused and changes nothing."""
    producer = asyncio.create_task(answer(worker, "x"))
    await client.post("/v1/chat/completions", json={**BODY, "session_id": "s"})
    await producer
    response = await client.post(
        "/v1/chat/completions", json={**BODY, "session_id": "s", "temperature": 1.5}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (409, "session_id_in_use")


async def test_cancel_while_queued_ends_the_stream_cleanly(client, worker):
    """A cancelled stream ends with `stop`, says why, and answers the cancel again and again."""
    body = {**BODY, "stream": True, "session_id": "s"}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        events = Events(response)  # dropping it would close the connection
        await events.next()
        first = await client.post("/v1/cancel/s")
        again = await client.post("/v1/cancel/s")
    assert first.json() == again.json() == {"session_id": "s", "status": "cancelled"}
    replay = await client.post("/v1/chat/completions", json=body)
    last = json.loads(replay.text.split("\n\n")[1].split("data: ")[1])
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["session"] == {"status": "cancelled", "reason": "requested"}


async def test_a_failed_session_is_an_error_with_its_status(client, worker):
    """What fails in the worker is a status without streaming, and a final error event with it."""

    async def produce():
        session = await claimed(worker)
        await worker.fail(session, "invalid_media", "broken", "messages[0].content[1]")

    producer = asyncio.create_task(produce())
    response = await client.post("/v1/chat/completions", json={**BODY, "session_id": "s"})
    await producer
    expected = {
        "message": "broken",
        "type": "invalid_request_error",
        "param": "messages[0].content[1]",
        "code": "invalid_media",
    }
    assert (response.status_code, response.json()) == (400, {"error": expected})
    replay = await client.post(
        "/v1/chat/completions", json={**BODY, "session_id": "s", "stream": True}
    )
    tail = replay.text.split("\n\n")[1:]
    assert tail[0].startswith("id: s:1\n")
    assert json.loads(tail[0].split("data: ")[1]) == {"error": expected}
    assert tail[1:] == ["data: [DONE]", ""]


@pytest.mark.parametrize(
    ("cursor", "status", "code"),
    [
        ("s:99", 400, "invalid_value"),
        ("s:-1", 400, "invalid_value"),
        ("s", 400, "invalid_value"),
        ("s:one", 400, "invalid_value"),
        ("s s:1", 400, "invalid_value"),
        ("other:0", 404, "session_not_found"),
    ],
)
async def test_bad_cursors_get_their_status(client, worker, cursor, status, code):
    """A malformed, future or unknown cursor is refused, and starts nothing."""
    producer = asyncio.create_task(answer(worker, "x"))
    await client.post("/v1/chat/completions", json={**BODY, "session_id": "s"})
    await producer
    response = await client.post("/v1/chat/completions", headers={"last-event-id": cursor})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert await worker.claim() == []


async def test_resume_of_lost_events_is_410(client, worker, store):
    """A cursor into a log that is no longer kept is 410, not a silent gap."""
    producer = asyncio.create_task(answer(worker, "x"))
    await client.post("/v1/chat/completions", json={**BODY, "session_id": "s"})
    await producer
    await store.redis.delete(keys.events("s"))
    response = await client.post("/v1/chat/completions", headers={"last-event-id": "s:0"})
    assert (response.status_code, response.json()["error"]["code"]) == (410, "events_expired")


async def test_resume_body_must_name_the_same_session(client, worker):
    """A body that names another session than the cursor is 400."""
    response = await client.post(
        "/v1/chat/completions", headers={"last-event-id": "s:0"}, json={"session_id": "t"}
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "session_id")


async def test_a_vanished_session_ends_its_stream_with_an_error(client, worker, store):
    """A follower of a session that Redis lost is told within seconds, not left waiting."""
    async with client.stream(
        "POST", "/v1/chat/completions", json={**BODY, "stream": True, "session_id": "s"}
    ) as response:
        events = Events(response)
        await events.next()
        await store.redis.flushall()
        got = await events.rest()
    assert got[0][1]["error"]["code"] == "events_expired"
    assert got[1][1] == "[DONE]"


async def test_a_lost_ring_costs_a_second_not_a_token(client, worker, store):
    """Events appended without a ring still arrive, by the sweep."""
    async with client.stream(
        "POST", "/v1/chat/completions", json={**BODY, "stream": True}
    ) as response:
        events = Events(response)
        await events.next()
        session = await claimed(worker)
        await store.redis.client_kill_filter(_type="pubsub")
        await worker.say(session, "quiet")
        _, chunk = await events.next()
        assert chunk["choices"][0]["delta"]["content"] == "quiet"


async def test_keep_alive_has_no_blank_line(start, worker):
    """Silence is filled with a comment that is no event."""
    client = await start(keepalive_seconds=0.05)
    body = {**BODY, "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        seen = b""
        async for data in response.aiter_bytes():
            seen += data
            if seen.count(b": keep-alive") >= 2:
                break
    assert b": keep-alive\n: keep-alive\n" in seen
    assert b": keep-alive\n\n" not in seen


async def test_without_a_ready_worker_posts_are_503_with_the_reason(client, store):
    """No worker, or one that cannot load its model, is a 503 that says so."""
    response = await client.post("/v1/chat/completions", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_not_ready")
    assert int(response.headers["retry-after"]) > 0
    await ScriptedWorker(store).announce("failed", "the repository does not exist")
    while "does not exist" not in (await client.get("/ready")).text:
        await asyncio.sleep(0.05)


async def test_readiness_names_the_workers_that_are_not_ready(client, store, worker):
    """While one worker serves, `/ready` is 200 and says what each of the others does."""
    assert (await client.get("/ready")).json()["not_ready"] == []
    other = ScriptedWorker(store, "other")
    await other.announce("loading", "the engine is restarted")
    while not (body := (await client.get("/ready")).json())["not_ready"]:
        await asyncio.sleep(0.05)
    assert (body["workers"], body["not_ready"]) == (1, ["loading: the engine is restarted"])


async def test_a_full_queue_is_429_with_retry_after(start, worker):
    """Beyond the queue bound a request is refused at once."""
    client = await start(max_queue=1)
    body = {**BODY, "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        events = Events(response)  # dropping it would close the connection
        await events.next()
        refused = await client.post("/v1/chat/completions", json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) > 0


async def test_models_lists_what_workers_serve(client, worker):
    """Models come from live workers, also by an id with a slash, encoded or not."""
    listed = (await client.get("/v1/models")).json()["data"]
    assert [m["id"] for m in listed] == ["org/tiny"]
    for path in ("/v1/models/org/tiny", "/v1/models/org%2Ftiny"):
        assert (await client.get(path)).json() == listed[0]
    assert (await client.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"


async def test_health_ready_docs_and_request_ids(client, worker):
    """Health, readiness and docs answer; every answer bears a request id."""
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        response = await client.get(path)
        assert response.status_code == 200
        assert response.headers["x-request-id"]
    missing = await client.get("/nothing")
    assert missing.json() == {
        "error": {
            "message": "Not Found",
            "type": "invalid_request_error",
            "param": None,
            "code": "not_found",
        }
    }
    assert missing.headers["x-request-id"]
    assert (await client.get("/v1/cancel/x")).json()["error"]["code"] == "method_not_allowed"


async def test_strict_model_refuses_unknown_names(start, worker):
    """With STRICT_MODEL a missing name is 400 and an unknown one 404; else any name is served."""
    client = await start(strict_model=True)
    nameless = await client.post("/v1/chat/completions", json=BODY)
    unknown = await client.post("/v1/chat/completions", json={**BODY, "model": "gpt-9"})
    assert (nameless.status_code, unknown.status_code) == (400, 404)
    assert unknown.json()["error"]["code"] == "model_not_found"


async def test_keys_are_checked_and_sessions_belong_to_them(start, worker):
    """With API keys set, a wrong one is 401, and another key's session does not exist."""
    client = await start(api_keys="alpha, beta")
    assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 401
    alpha, beta = ({"authorization": f"Bearer {k}"} for k in ("alpha", "beta"))
    producer = asyncio.create_task(answer(worker, "x"))
    body = {**BODY, "session_id": "s"}
    first = await client.post("/v1/chat/completions", json=body, headers=alpha)
    await producer
    assert first.status_code == 200
    assert (await client.get("/v1/sessions/s", headers=alpha)).json()["status"] == "finished"
    for call in (
        client.get("/v1/sessions/s", headers=beta),
        client.post("/v1/cancel/s", headers=beta),
        client.post("/v1/chat/completions", headers={**beta, "last-event-id": "s:0"}),
        client.post("/v1/chat/completions", json=body, headers=beta),
    ):
        response = await call
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "session_not_found"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [(b"{not json", 400, "invalid_request"), (b"[]", 400, "invalid_request")],
)
async def test_broken_json_is_400_in_the_contract_shape(client, worker, content, status, code):
    """A body that is no JSON object is a 400 with all four keys."""
    response = await client.post("/v1/chat/completions", content=content)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_body_over_the_limit_is_413_also_in_chunks(start, worker):
    """Too large a body is refused whether its length was announced or not."""
    client = await start(max_body_bytes=2048)

    async def chunks():
        for _ in range(10):
            yield b" " * 1024

    announced = await client.post("/v1/chat/completions", content=b" " * 4096)
    chunked = await client.post("/v1/chat/completions", content=chunks())
    assert announced.status_code == chunked.status_code == 413
    assert chunked.json()["error"]["code"] == "request_too_large"


async def test_redis_away_is_503_unavailable(start):
    """While Redis is away requests get a 503 they can retry, and the process lives."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{closed.getsockname()[1]}/0"
        async with serving(url) as client:
            response = await client.post("/v1/chat/completions", json=BODY)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "unavailable"
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/health")).status_code == 200


async def test_watching_keeps_the_watch_key_alive_and_leaving_lets_it_expire(start, worker, store):
    """A follower's presence is renewed every second, and no longer once it has left."""
    client = await start(cancel_after_disconnect_seconds=2)
    async with client.stream(
        "POST", "/v1/chat/completions", json={**BODY, "stream": True, "session_id": "s"}
    ) as response:
        events = Events(response)  # dropping it would close the connection
        await events.next()
        await store.redis.delete(keys.watch("s"))
        while not await store.redis.exists(keys.watch("s")):
            await asyncio.sleep(0.05)
    del events
    while await store.redis.exists(keys.watch("s")):
        await asyncio.sleep(0.05)


async def test_a_bug_is_500_without_a_word_of_what_it_was(client, worker, monkeypatch):
    """An unexpected exception is an answer in the contract's shape that tells nothing inside."""

    async def broken(*_args):
        raise RuntimeError("secret detail at /some/path")

    monkeypatch.setattr("shared.queue.SessionQueue.submit", broken)
    response = await client.post("/v1/chat/completions", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert response.headers["x-request-id"]
    assert (await client.get("/health")).status_code == 200


async def test_the_models_defaults_are_queued_and_what_cannot_fit_is_not(start, worker):
    """A worker's register decides both, before anything waits."""
    client = await start()
    limits = {"defaults": {"top_k": 20.0, "top_p": 0.95}, "token_bytes": 8}
    await worker.announce(**limits)
    long = [{"role": "user", "content": "x" * 1100}]
    refused = await client.post("/v1/chat/completions", json={"messages": long})
    assert (refused.status_code, refused.json()["error"]["code"]) == (
        400,
        "context_length_exceeded",
    )
    assert await client.services.queue.depth() == 0
    body = {**BODY, "stream": True, "top_p": 0.5, "session_id": "defaults"}
    async with client.stream("POST", "/v1/chat/completions", json=body):
        [claimed] = await worker.claim()
        request = decode_request(await worker.queue.request("defaults"))
        await worker.finish(claimed)
    assert (request.sampling.top_k, request.sampling.top_p) == (20, 0.5)
