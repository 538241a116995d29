import asyncio
import contextlib
import json
import socket

import httpx
import openai
import pytest

from shared import keys
from tests.scripted import ScriptedWorker
from tests.served import serving

BODY = {"messages": [{"role": "user", "content": "hello"}]}
CHAT = "/v1/chat/completions"
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


async def begin(client, session_id="s", headers=None, **more):
    """Queue a session, and leave once its first event is there."""
    body = {**BODY, "stream": True, "session_id": session_id, **more}
    async with client.stream("POST", CHAT, json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        async for data in response.aiter_bytes():
            if b"\n\n" in data:
                break


async def finish(worker, *texts):
    """Serve the next session to its end."""
    [claimed] = await worker.claim()
    for text in texts:
        await worker.say(claimed, text)
    await worker.finish(claimed)


async def ended(client, worker, **more):
    """Make the session `s`, ended after one word."""
    await begin(client, **more)
    await finish(worker, "word")


def error_of(response):
    return response.status_code, response.json()["error"]["code"]


# --- GET /v1/sessions/{id}/events -----------------------------------------------------------------


async def test_eventsource_gets_the_stream_of_the_post(start, client, worker):
    """The same bytes as the POST's, from the start, or from behind the given event, anywhere."""
    await ended(client, worker)
    whole = await client.post(CHAT, json={**BODY, "stream": True, "session_id": "s"})
    other = await start()
    got = await other.get("/v1/sessions/s/events")
    assert got.headers["content-type"].startswith("text/event-stream")
    assert got.headers["x-session-id"] == "s"
    assert got.content == whole.content
    header = await other.get("/v1/sessions/s/events", headers={"last-event-id": "s:0"})
    query = await other.get("/v1/sessions/s/events?last_event_id=s:0")
    assert header.content == query.content == whole.content[whole.content.index(b"id: s:1") :]


async def test_the_header_wins_over_the_query(client, worker):
    """A reconnecting browser renews the header, while its URL still has the old place."""
    await ended(client, worker)
    url = "/v1/sessions/s/events?last_event_id=s:0"
    got = await client.get(url, headers={"last-event-id": "s:1"})
    assert got.text.startswith("id: s:2\n")
    assert (await client.get(url, headers={"last-event-id": ""})).text.startswith("id: s:1\n")


async def test_eventsource_is_told_to_stop_at_the_end(client, worker):
    """204 without a body once the last event was seen; before, the stream goes on live."""
    await begin(client)
    [claimed] = await worker.claim()
    await worker.say(claimed, "word")
    url = "/v1/sessions/s/events"
    live = asyncio.create_task(client.get(url, headers={"last-event-id": "s:1"}))
    while "s" not in await watched(worker):
        await asyncio.sleep(0.01)
    await worker.finish(claimed)
    assert (await live).text.startswith("id: s:2\n")
    assert (await live).text.endswith("data: [DONE]\n\n")
    end = await client.get(url, headers={"last-event-id": "s:2"})
    assert (end.status_code, end.content) == (204, b"")


async def watched(worker):
    """Forget who watched, and return who says so again."""
    found = [key async for key in worker.log._store.redis.scan_iter(keys.WATCH + "*")]
    return [key.decode().removeprefix(keys.WATCH) for key in found]


async def test_eventsource_has_usage_as_the_first_request_asked(client, worker):
    """Without a body to say it, usage comes as the session's first request wanted."""
    await begin(client, **USAGE)
    await finish(worker, "word")
    got = await client.get("/v1/sessions/s/events")
    assert '"usage":{"prompt_tokens":7' in got.text
    assert (
        got.content == (await client.post(CHAT, json={**BODY, **USAGE, "session_id": "s"})).content
    )


@pytest.mark.parametrize(
    ("cursor", "status", "code"),
    [
        ("t:0", 400, "invalid_value"),
        ("s:3", 400, "invalid_value"),
        ("s:x", 400, "invalid_value"),
        ("s: 1", 400, "invalid_value"),
        ("s:-1", 400, "invalid_value"),
        ("s:1\xe9", 400, "invalid_value"),
        ("s:\u0661".encode(), 400, "invalid_value"),
        ("s:9999999999999999999999", 400, "invalid_value"),
    ],
)
async def test_bad_places_are_400_on_both_ways(client, worker, cursor, status, code):
    """Malformed, future and foreign places get their status, and begin nothing."""
    await ended(client, worker)
    raw = cursor if isinstance(cursor, bytes) else cursor.encode("latin-1")
    got = await client.get("/v1/sessions/s/events", headers={b"last-event-id": raw})
    assert error_of(got) == (status, code)
    if cursor != "t:0":  # a POST has no other name to disagree with
        assert (await client.post(CHAT, headers={b"last-event-id": raw})).status_code == status
    assert await worker.claim() == []


async def lose(store, worker, claimed, session_id):
    """Say two words, and put Redis back to where it knew of one; returns when that is done."""
    await worker.say(claimed, "one")
    names = [keys.session(session_id), keys.events(session_id)]
    before = [await store.redis.dump(name) for name in names]
    await worker.say(claimed, "two")
    for name, value in zip(names, before, strict=True):
        await store.redis.restore(name, 60_000, value, replace=True)


async def test_a_place_that_redis_has_lost_is_waited_for(client, worker, store):
    """A client that has seen more than a Redis which came back knows goes on behind that."""
    await begin(client)
    [claimed] = await worker.claim()
    await lose(store, worker, claimed, "s")
    resumed = asyncio.create_task(client.post(CHAT, headers={"last-event-id": "s:2"}))
    done, _ = await asyncio.wait({resumed}, timeout=0.3)
    assert not done
    worker.rewind(claimed)
    await worker.say(claimed, "two")
    await worker.say(claimed, "three")
    await worker.finish(claimed)
    assert (await resumed).text.startswith("id: s:3\n")


async def test_a_response_goes_on_behind_what_redis_has_lost(client, worker, store):
    """A sequence number that the log does not have again yet is waited for, as an index is."""
    body = {"input": "hello", "background": True}
    made = (await client.post("/v1/responses", json=body)).json()["id"]
    [claimed] = await worker.claim()
    await lose(store, worker, claimed, made)  # 0-4 come with the first word, 5 with the second
    url = f"/v1/responses/{made}?stream=true&starting_after=5"
    resumed = asyncio.create_task(client.get(url))
    done, _ = await asyncio.wait({resumed}, timeout=0.3)
    assert not done
    worker.rewind(claimed)
    await worker.say(claimed, "two")
    await worker.finish(claimed)
    assert (await resumed).status_code == 200
    assert '"sequence_number":6' in (await resumed).text.split("\n\n")[0]


async def test_a_place_of_a_session_that_lives_is_no_final_refusal(client, worker, monkeypatch):
    """It is a 503 that clients try again, not a 400 that ends them, unless it is out of reach."""
    monkeypatch.setattr("gateway.patience.REWRITE_SECONDS", 0.1)
    body = {"input": "hello", "background": True}
    made = (await client.post("/v1/responses", json=body)).json()["id"]
    for index, expected in ((9, 503), (99_999, 400)):
        place = {"last-event-id": f"{made}:{index}"}
        events = f"/v1/sessions/{made}/events"
        number = f"/v1/responses/{made}?stream=true&starting_after={index}"
        for got in (
            await client.post(CHAT, headers=place),
            await client.get(events, headers=place),
            await client.get(number),
        ):
            assert got.status_code == expected, got.text
            assert got.headers.get("retry-after") == ("2" if expected == 503 else None)
        browser = await client.get(events, headers={**place, "accept": "text/event-stream"})
        assert browser.status_code == (200 if expected == 503 else 400)
        assert ("retry: 2000\n" in browser.text) == (expected == 503)


async def test_a_place_behind_the_end_of_an_ended_session_is_refused_at_once(
    client, worker, monkeypatch
):
    """Nobody writes there any more: a 400, without any wait."""
    monkeypatch.setattr("gateway.patience.REWRITE_SECONDS", 60)
    await ended(client, worker)
    got = await client.post(CHAT, headers={"last-event-id": "s:9"})
    assert error_of(got) == (400, "invalid_value")


async def test_two_different_places_are_400(client, worker):
    """A request that contradicts itself is refused; saying the same twice is no contradiction."""
    await ended(client, worker)
    twice = [("last-event-id", "s:0"), ("last-event-id", "s:1")]
    assert error_of(await client.post(CHAT, headers=twice)) == (400, "invalid_value")
    got = await client.get("/v1/sessions/s/events?last_event_id=s:0&last_event_id=s:1")
    assert error_of(got) == (400, "invalid_value")
    same = await client.post(CHAT, headers=[("last-event-id", "s:1")] * 2)
    assert same.text.startswith("id: s:2\n")


@pytest.mark.parametrize("session_id", ["unknown", "a%20b", "a:b", "%ff", "x" * 200, "%2e%2e"])
async def test_unknown_sessions_are_404_everywhere(client, worker, session_id):
    """No route invents a session, however its id looks."""
    for call in (
        client.get(f"/v1/sessions/{session_id}"),
        client.get(f"/v1/sessions/{session_id}/events"),
        client.get(f"{CHAT}/{session_id}"),
        client.post(f"/v1/cancel/{session_id}"),
    ):
        assert error_of(await call) == (404, "session_not_found")


async def test_keys_guard_every_route(start, worker):
    """Without a key 401, with another's 404, on each route of a session; never in the query."""
    client = await start(api_keys="alpha,beta")
    alpha, beta = ({"authorization": f"Bearer {k}"} for k in ("alpha", "beta"))
    await begin(client, headers=alpha)
    await finish(worker, "word")
    for method, url in (
        ("GET", "/v1/sessions/s"),
        ("GET", "/v1/sessions/s/events"),
        ("GET", f"{CHAT}/s"),
        ("POST", "/v1/cancel/s"),
    ):
        assert (await client.request(method, url, headers=alpha)).status_code == 200
        for refused, headers in (
            ((404, "session_not_found"), beta),
            ((401, "invalid_api_key"), {}),
        ):
            assert error_of(await client.request(method, url, headers=headers)) == refused
        in_query = await client.request(method, f"{url}?api_key=alpha")
        assert error_of(in_query) == (401, "invalid_api_key")


async def test_trimmed_events_are_410_and_no_silent_gap(client, worker, store):
    """A place whose following event is gone is refused, though later events are there."""
    await begin(client)
    await finish(worker, "a", "b", "c")
    await store.redis.xtrim(keys.events("s"), minid="3-0", approximate=False)
    for after, expected in ((-1, 410), (0, 410), (1, 200), (3, 200)):
        headers = {"last-event-id": f"s:{after}"} if after >= 0 else {}
        got = await client.get("/v1/sessions/s/events", headers=headers)
        assert got.status_code == expected
    assert error_of(await client.post(CHAT, headers={"last-event-id": "s:0"})) == (
        410,
        "events_expired",
    )


async def test_an_expired_session_is_404_and_its_cursor_begins_nothing(client, worker, store):
    """When Redis has forgotten it, a resume is told so; no new generation starts."""
    await ended(client, worker)
    await store.redis.delete(keys.session("s"), keys.events("s"))
    for call in (
        client.post(CHAT, headers={"last-event-id": "s:1"}),
        client.post(CHAT, headers={"last-event-id": "s:1"}, json={**BODY, "session_id": "s"}),
        client.get("/v1/sessions/s/events", headers={"last-event-id": "s:1"}),
    ):
        assert error_of(await call) == (404, "session_not_found")
    assert await worker.claim() == []


async def test_with_redis_away_an_eventsource_comes_back_and_others_get_503():
    """EventSource gives up on any status but 200, so it is asked to come back; curl is told."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with serving(f"redis://127.0.0.1:{closed.getsockname()[1]}/0") as client:
            url = "/v1/sessions/s/events"
            refused = await client.get(url)
            assert error_of(refused) == (503, "unavailable")
            assert int(refused.headers["retry-after"]) > 0
            for query in ({}, {"expires": "1", "signature": "x"}):  # whose check needs the record
                accept = {"accept": "text/event-stream"}
                browser = await client.get(url, params=query, headers=accept)
                lines = browser.text.split("\n")[1:]
                assert (browser.status_code, lines) == (200, ["retry: 2000", ""])


# --- GET /v1/chat/completions/{id} ----------------------------------------------------------------


async def test_retrieve_gives_the_completion_of_an_ended_session(client, worker):
    """The same object that a non-streaming POST answers with."""
    await ended(client, worker)
    got = await client.get(f"{CHAT}/s")
    assert got.json() == (await client.post(CHAT, json={**BODY, "session_id": "s"})).json()
    assert got.json()["choices"][0]["message"]["content"] == "word"
    assert got.headers["x-session-id"] == "s"


@pytest.mark.parametrize("claim", [False, True])
async def test_retrieve_before_the_end_is_409_in_progress(client, worker, claim):
    """Queued or running: 409, which an SDK shall not try again by itself."""
    await begin(client)
    if claim:
        await worker.claim()
    got = await client.get(f"{CHAT}/s")
    assert error_of(got) == (409, "in_progress")
    assert got.headers["x-should-retry"] == "false"


async def test_retrieve_of_a_failed_session_is_its_error(client, worker):
    """What it failed with, with that status."""
    await begin(client)
    [claimed] = await worker.claim()
    await worker.fail(claimed, "context_length_exceeded", "too long", "messages")
    assert error_of(await client.get(f"{CHAT}/s")) == (400, "context_length_exceeded")


async def test_the_sdk_retrieves(client, worker):
    """`chat.completions.retrieve` of the unmodified SDK; a conflict is raised at once."""
    requests = []

    async def count(request):
        requests.append(request.url.path)

    http = openai.DefaultAsyncHttpxClient(trust_env=False, event_hooks={"request": [count]})
    sdk = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="none", http_client=http)
    await begin(client)
    with pytest.raises(openai.ConflictError):
        await sdk.chat.completions.retrieve("s")
    assert requests == [f"{CHAT}/s"]
    await finish(worker, "word")
    completion = await sdk.chat.completions.retrieve("s")
    assert (completion.id, completion.choices[0].message.content) == ("s", "word")
    await sdk.close()


# --- GET /v1/sessions/{id}, cancel ----------------------------------------------------------------


async def test_a_session_tells_where_it_stands(client, worker):
    """Queued with its place, running, finished with usage: each with its times."""
    await begin(client, "a")
    await begin(client, "b")
    queued = (await client.get("/v1/sessions/b")).json()
    assert (queued["status"], queued["queue_position"], queued["last_index"]) == ("queued", 1, 0)
    assert queued["started"] is queued["ended"] is queued["usage"] is None
    await finish(worker, "x")
    assert (await client.get("/v1/sessions/b")).json()["queue_position"] == 0
    await worker.claim()
    running = (await client.get("/v1/sessions/b")).json()
    assert (running["status"], running["queue_position"]) == ("running", None)
    assert running["created"] <= running["started"]
    done = (await client.get("/v1/sessions/a")).json()
    assert (done["status"], done["last_index"], done["model"]) == ("finished", 2, "org/tiny")
    assert done["created"] <= done["started"] <= done["ended"]
    assert done["usage"]["completion_tokens"] == 1
    assert done["cancel_reason"] is done["error"] is None


async def test_a_session_tells_why_it_ended(client, worker):
    """A cancelled one its reason, a failed one its error."""
    await begin(client)
    assert (await client.post("/v1/cancel/s")).json()["status"] == "cancelled"
    cancelled = (await client.get("/v1/sessions/s")).json()
    assert (cancelled["status"], cancelled["cancel_reason"]) == ("cancelled", "requested")
    await begin(client, "t")
    [claimed] = await worker.claim()
    await worker.fail(claimed, "invalid_media", "broken")
    failed = (await client.get("/v1/sessions/t")).json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "invalid_media")
    assert (await client.post("/v1/cancel/t")).json()["status"] == "failed"


async def test_a_cancelled_session_is_not_brought_back_by_a_retry(client, worker):
    """The same POST again attaches to the cancelled session; nothing is queued."""
    await begin(client)
    await client.post("/v1/cancel/s")
    again = await client.post(CHAT, json={**BODY, "session_id": "s"})
    assert again.json()["session"] == {"status": "cancelled", "reason": "requested"}
    assert await worker.claim() == []


async def test_a_conflict_is_not_for_the_sdk_to_retry(client, worker):
    """A used id with another body is 409 and says that trying again is in vain."""
    await ended(client, worker)
    got = await client.post(CHAT, json={**BODY, "session_id": "s", "seed": 1})
    assert error_of(got) == (409, "session_id_in_use")
    assert got.headers["x-should-retry"] == "false"


async def test_idempotency_keys_attach_and_conflict_as_ids_do(client, worker):
    """One key is one session: the same body attaches, another is 409."""
    header = {"idempotency-key": "k"}
    first = asyncio.create_task(client.post(CHAT, json=BODY, headers=header))
    while not (sessions := await worker.claim()):
        await worker.queue.wait_for_work(1)
    await worker.say(sessions[0], "word")
    await worker.finish(sessions[0])
    sid = (await first).headers["x-session-id"]
    again = await client.post(CHAT, json={**BODY, "stream": True}, headers=header)
    assert again.headers["x-session-id"] == sid
    assert "word" in again.text
    other = await client.post(CHAT, json={**BODY, "max_tokens": 3}, headers=header)
    assert error_of(other) == (409, "session_id_in_use")


async def test_attaching_needs_no_worker(start, redis_url, store):
    """With all workers gone a known session is still read; another body is still a conflict."""
    client, worker = await start(), ScriptedWorker(store)
    await worker.announce()
    await ended(client, worker)
    await worker.fleet.leave(worker.id)
    while (await client.get("/ready")).status_code == 200:
        await asyncio.sleep(0.05)
    got = await client.post(CHAT, json={**BODY, "session_id": "s"})
    assert got.json()["choices"][0]["message"]["content"] == "word"
    other = await client.post(CHAT, json={**BODY, "session_id": "s", "seed": 1})
    assert error_of(other) == (409, "session_id_in_use")
    new = await client.post(CHAT, json={**BODY, "session_id": "new"})
    assert error_of(new) == (503, "model_not_ready")


async def test_coming_back_counts_as_watching_at_once(start, worker, store):
    """A resume, an attach and an EventSource each renew the watch key before they read on."""
    client = await start(cancel_after_disconnect_seconds=50)
    await begin(client)
    for method, url, more in (
        ("POST", CHAT, {"headers": {"last-event-id": "s:0"}}),
        ("POST", CHAT, {"json": {**BODY, "stream": True, "session_id": "s"}}),
        ("GET", "/v1/sessions/s/events", {}),
    ):
        await store.redis.delete(keys.watch("s"))
        async with client.stream(method, url, **more) as response:
            assert response.status_code == 200
            assert await store.redis.exists(keys.watch("s"))


async def test_an_ended_session_gets_no_watch_key(start, worker, store, monkeypatch):
    """Reading what has ended leaves no trace, unless the second's renewal falls into it."""
    monkeypatch.setattr("gateway.relay.REFRESH_SECONDS", 3600)
    client = await start()
    while "hub" not in client.services.relay._wires:
        await asyncio.sleep(0.01)
    await ended(client, worker)
    await store.redis.delete(keys.watch("s"))
    await client.post(CHAT, json={**BODY, "session_id": "s"})
    await client.get("/v1/sessions/s/events")
    with contextlib.suppress(httpx.HTTPError):
        await client.get("/v1/sessions/s/events", headers={"last-event-id": "s:2"})
    assert not await store.redis.exists(keys.watch("s"))
    assert json.loads((await client.get("/v1/sessions/s")).text)["status"] == "finished"
