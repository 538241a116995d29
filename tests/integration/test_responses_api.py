"""`/v1/responses` through a real gateway and a real Redis, with scripted workers."""

import asyncio
import json
import threading

import pytest

from gateway import upkeep
from shared import archive as archive_module
from shared import keys
from shared.archive import Archive
from tests.responses_kit import check_whole, parse, text_of
from tests.scripted import ArchivingWorker

URL = "/v1/responses"
ASK = {"input": "hello"}
BACK = {**ASK, "background": True}


async def claimed(worker):
    while not (sessions := await worker.claim()):
        await worker.queue.wait_for_work(1)
    return sessions[0]


SAID = [("Hm. ", "reasoning"), ("So.", "reasoning"), ("Good ", "content"), ("day.", "content")]


async def answer(worker, said=SAID, reason="stop"):
    """Serve one session."""
    session = await claimed(worker)
    for text, channel in said:
        await worker.say(session, text, channel)
    await worker.finish(session, reason)
    return session.session_id


async def events_of(client, response_id, **params):
    got = await client.get(f"{URL}/{response_id}", params={"stream": "true", **params})
    assert got.status_code == 200, got.text
    return parse(got.content)


async def make(client, worker, body=BACK, said=SAID):
    """Make a Response that ends; returns its id."""
    made = (await client.post(URL, json=body)).json()["id"]
    assert await answer(worker, said) == made
    return made


def error_of(response, status, param=None):
    """Check an error's shape and status; return its code."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    return error["code"]


async def test_a_plain_request_returns_the_whole_response(client, worker):
    """Without stream and background, the answer is the Response as it ended."""
    serving = asyncio.create_task(answer(worker))
    body = {**ASK, "metadata": {"k": "v"}, "temperature": 0.5, "max_output_tokens": 9}
    response = await client.post(URL, json=body)
    got = response.json()
    assert got["id"] == await serving == response.headers["x-session-id"]
    assert got["id"].startswith("resp_")
    assert (got["status"], got["model"], got["background"]) == ("completed", "org/tiny", False)
    assert (got["metadata"], got["temperature"], got["max_output_tokens"]) == ({"k": "v"}, 0.5, 9)
    assert (text_of(got, "reasoning"), text_of(got)) == ("Hm. So.", "Good day.")
    assert got["usage"]["input_tokens"] == 7


async def test_a_stream_is_whole_and_ends_as_what_is_retrieved(client, worker):
    """The last event holds the same Response as a retrieval; the chat's view has the same text."""
    serving = asyncio.create_task(answer(worker))
    final = check_whole(parse((await client.post(URL, json={**ASK, "stream": True})).content))
    made = await serving
    assert (await client.get(f"{URL}/{made}")).json() == final
    chat = (await client.get(f"/v1/chat/completions/{made}")).json()["choices"][0]["message"]
    assert chat["content"] == text_of(final) == "Good day."
    assert chat["reasoning_content"] == text_of(final, "reasoning") == "Hm. So."


async def test_a_background_response_is_there_at_once(client, worker):
    """It is queued, then in progress with what there is so far, then completed."""
    made = (await client.post(URL, json=BACK)).json()
    assert (made["status"], made["output"], made["background"]) == ("queued", [], True)
    session = await claimed(worker)
    await worker.say(session, "Good ")
    so_far = (await client.get(f"{URL}/{made['id']}")).json()
    assert (so_far["status"], text_of(so_far)) == ("in_progress", "Good ")
    assert so_far["output"][0]["status"] == "in_progress"
    await worker.finish(session)
    assert (await client.get(f"{URL}/{made['id']}")).json()["status"] == "completed"


async def test_each_place_in_a_stream_can_be_resumed_from_any_gateway(start, client, worker):
    """`starting_after=N` gives the events behind N, on a gateway that did not see the beginning."""
    other = await start()
    made = await make(client, worker)
    whole = await events_of(client, made)
    check_whole(whole)
    for number in range(len(whole)):
        assert await events_of(other, made, starting_after=number) == whole[number + 1 :]


async def test_a_live_stream_is_resumed_where_it_stands(start, client, worker):
    """A client that comes back before the end gets what is missing, and then what comes."""
    other = await start()
    made = (await client.post(URL, json=BACK)).json()["id"]
    session = await claimed(worker)
    for text, channel in SAID[:3]:
        await worker.say(session, text, channel)
    tasks = [
        asyncio.create_task(events_of(c, made, starting_after=n)) for c in (client, other)
        for n in (0, 6, 11)  # 11: the last one that there is
    ]  # fmt: skip
    while sum(c.followers for g in (client, other) for c in channels(g)) < len(tasks):
        await asyncio.sleep(0.01)
    await worker.say(session, *SAID[3])
    await worker.finish(session)
    whole = await events_of(client, made)
    for task, number in zip(tasks, (0, 6, 11) * 2, strict=True):
        assert await task == whole[number + 1 :]


def channels(client):
    return client.services.relay._channels.values()


@pytest.mark.parametrize(
    "number", ["3", "4", "99999", "-1", "x", "1.5", "", "9" * 30, "1&starting_after=1"]
)
async def test_a_place_that_is_none_is_refused(client, worker, number):
    """A number beyond the last event of an ended one, a negative one, or none at all is a 400."""
    made = (await client.post(URL, json=BACK)).json()["id"]
    await client.post(f"{URL}/{made}/cancel")  # its events: 0, 1 and 2
    got = await client.get(f"{URL}/{made}?stream=true&starting_after={number}")
    assert error_of(got, 400, "starting_after") == "invalid_value"


async def test_a_place_needs_a_stream(client, worker):
    """`starting_after` without `stream=true`, and a `stream` that is no boolean, are 400s."""
    made = (await client.post(URL, json=BACK)).json()["id"]
    error_of(await client.get(f"{URL}/{made}?starting_after=1"), 400, "starting_after")
    error_of(await client.get(f"{URL}/{made}?stream=maybe"), 400, "stream")


async def test_cancel_ends_a_queued_response(client, worker):
    """It never starts; its stream ends as incomplete, and says that it was cancelled."""
    made = (await client.post(URL, json=BACK)).json()["id"]
    for _ in range(2):
        got = (await client.post(f"{URL}/{made}/cancel")).json()
        assert (got["status"], got["output"]) == ("cancelled", [])
    events = await events_of(client, made)
    assert check_whole(events) == got
    assert [e["type"] for e in events[2:]] == ["response.incomplete"]
    assert await worker.claim() == []


async def test_cancel_of_an_ended_response_changes_nothing(client, worker):
    """It is answered with the Response as it is, again and again."""
    made = await make(client, worker)
    before = (await client.get(f"{URL}/{made}")).json()
    for _ in range(2):
        assert (await client.post(f"{URL}/{made}/cancel")).json() == before


async def test_cancel_of_a_running_response_whose_worker_is_slow_returns_in_time(
    client, worker, monkeypatch
):
    """The answer does not wait for ever; the Response is still in progress then."""
    monkeypatch.setattr("gateway.responses.CANCEL_SECONDS", 0.1)
    made = (await client.post(URL, json=BACK)).json()["id"]
    session = await claimed(worker)
    got = (await client.post(f"{URL}/{made}/cancel")).json()
    assert got["status"] == "in_progress"
    error_of(await client.delete(f"{URL}/{made}"), 503)
    await worker.finish(session)


async def test_delete_removes_all_that_redis_holds(client, worker, store):
    """Neither the Response nor the session is found again; a second delete is a 404."""
    made = await make(client, worker)
    got = await client.delete(f"{URL}/{made}")
    assert got.json() == {"id": made, "object": "response", "deleted": True}
    left = [k.decode() async for k in store.redis.scan_iter(f"*{made}*")]
    assert left == [keys.deleted(made)]
    for url in (f"{URL}/{made}", f"/v1/sessions/{made}", f"/v1/chat/completions/{made}"):
        assert error_of(
            await client.get(url), 404, (await client.get(url)).json()["error"]["param"]
        )
    error_of(await client.delete(f"{URL}/{made}"), 404, "response_id")


async def test_delete_cancels_what_waits(client, worker):
    """A queued Response is deleted with its place in the queue."""
    made = (await client.post(URL, json=BACK)).json()["id"]
    assert (await client.delete(f"{URL}/{made}")).json()["deleted"]
    assert await worker.claim() == []


async def test_a_response_belongs_to_its_key(start, worker):
    """To another key it does not exist, whatever is tried."""
    client = await start(api_keys="mine,yours")
    mine, yours = ({"authorization": f"Bearer {key}"} for key in ("mine", "yours"))
    made = (await client.post(URL, json=BACK, headers=mine)).json()["id"]
    tries = [("GET", ""), ("GET", "?stream=true"), ("POST", "/cancel"), ("DELETE", "")]
    for method, more in tries:
        got = await client.request(method, f"{URL}/{made}{more}", headers=yours)
        assert error_of(got, 404, "response_id") == "session_not_found"
        assert error_of(await client.request(method, f"{URL}/{made}{more}"), 401)
    assert (await client.get(f"{URL}/{made}", headers=mine)).json()["status"] == "queued"


async def test_a_chat_is_no_response(client, worker):
    """A session that was not made here has no Response to show."""
    body = {"messages": [{"role": "user", "content": "x"}], "session_id": "resp_chat"}
    serving = asyncio.create_task(answer(worker))
    await client.post("/v1/chat/completions", json=body)
    await serving
    for method, more in (("GET", ""), ("GET", "?stream=1"), ("POST", "/cancel"), ("DELETE", "")):
        got = await client.request(method, f"{URL}/resp_chat{more}")
        error_of(got, 404, "response_id")
    error_of(await client.get(f"{URL}/%00"), 404, "response_id")


async def test_without_store_a_response_is_not_retrieved(client, worker):
    """It is streamed or returned as ever, but nobody gets it again; it can be deleted."""
    serving = asyncio.create_task(answer(worker))
    got = (await client.post(URL, json={**ASK, "store": False})).json()
    await serving
    assert (got["store"], got["status"]) == (False, "completed")
    error_of(await client.get(f"{URL}/{got['id']}"), 404, "response_id")
    assert (await client.delete(f"{URL}/{got['id']}")).status_code == 200


async def test_the_same_key_attaches_and_another_body_is_a_conflict(client, worker):
    """A repeated POST makes no second generation, whether or not it streams."""
    key = {"idempotency-key": "k"}
    first = (await client.post(URL, json=BACK, headers=key)).json()
    await answer(worker)
    again = await client.post(URL, json={**BACK, "stream": True}, headers=key)
    assert check_whole(parse(again.content))["id"] == first["id"]
    other = await client.post(URL, json={**BACK, "metadata": {"a": "b"}}, headers=key)
    assert error_of(other, 409, "session_id") == "session_id_in_use"


async def test_a_failure_is_a_status_an_event_and_an_object(client, worker):
    """Whoever waits gets the error's status; a stream and a retrieval tell what happened."""
    waiting = asyncio.create_task(client.post(URL, json=ASK))
    session = await claimed(worker)
    await worker.fail(session, "invalid_media", "The image is broken.", "input")
    assert error_of(await waiting, 400, "input") == "invalid_media"
    events = await events_of(client, session.session_id)
    assert events[-1]["type"] == "response.failed"
    final = check_whole(events)
    assert final["error"]["message"] == "The image is broken."
    got = await client.get(f"{URL}/{session.session_id}")
    assert (got.status_code, got.json()) == (200, final)


@pytest.mark.parametrize(
    ("of_chats", "param"),
    [
        ("response_format", "text.format"),
        ("messages", "input"),
        ("messages[1].content[0]", "input"),
        ("tools", "tools"),
    ],
)
async def test_a_worker_s_failure_names_what_the_caller_wrote(client, worker, of_chats, param):
    """A worker knows the names of chats alone; a Response's caller has not used them."""
    waiting = asyncio.create_task(client.post(URL, json=ASK))
    session = await claimed(worker)
    field = of_chats.split("[")[0]
    await worker.fail(session, "invalid_value", f"'{field}' is too complex.", of_chats)
    assert error_of(await waiting, 400, param) == "invalid_value"
    assert (await waiting).json()["error"]["message"] == f"'{param}' is too complex."
    final = (await client.get(f"{URL}/{session.session_id}")).json()
    assert final["error"]["param"] == param


async def test_a_prompt_that_is_too_long_is_the_input(client, worker):
    """What the gateway finds out by itself is told in the same names."""
    await worker.announce(token_bytes=1)
    got = await client.post(URL, json={"input": "x" * 500})
    assert error_of(got, 400, "input") == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"{}", "input"),
        (json.dumps({**ASK, "previous_response_id": "resp_1"}).encode(), "previous_response_id"),
        (json.dumps({**ASK, "tools": [{"type": "mcp"}]}).encode(), "tools[0].type"),
    ],
)
async def test_a_bad_body_is_a_400_of_the_contract(client, worker, body, param):
    """Errors have the shape of all errors here."""
    error_of(await client.post(URL, content=body), 400, param)


async def test_events_that_are_gone_are_said_to_be(client, worker, store):
    """A log that Redis no longer has is a 410, streamed or not."""
    made = await make(client, worker)
    await store.redis.delete(keys.events(made))
    for more in ("", "?stream=true"):
        assert error_of(await client.get(f"{URL}/{made}{more}"), 410) == "events_expired"


async def test_a_log_lost_under_a_stream_is_an_error_event(client, worker, store):
    """The SDKs raise it: its place is not taken for the end."""
    made = (await client.post(URL, json=BACK)).json()["id"]
    reading = asyncio.create_task(client.get(f"{URL}/{made}?stream=true"))
    while not channels(client):
        await asyncio.sleep(0.01)
    await store.redis.flushall()
    *begin, error = parse((await reading).content)
    assert [e["type"] for e in begin] == ["response.created", "response.in_progress"]
    assert (error["type"], error["sequence_number"]) == ("error", 2)
    assert error["error"]["code"] == error["code"] == "events_expired"


async def test_viewers_that_left_are_forgotten(client, worker):
    """A long response that many come to see, and leave, keeps nothing of them."""
    made = (await client.post(URL, json=BACK)).json()["id"]
    staying = asyncio.create_task(events_of(client, made))
    session = await claimed(worker)
    for _ in range(5):
        async with client.stream("GET", f"{URL}/{made}?stream=true") as response:
            async for _ in response.aiter_bytes():
                break
    while True:
        [channel] = channels(client)
        if channel.followers == 1 and len(channel._crowds) == 1:
            break
        await asyncio.sleep(0.01)
    await worker.finish(session)
    check_whole(await staying)


@pytest.fixture
async def archiving(start, store, tmp_path, monkeypatch):
    """A gateway that archives, its worker, and the archive's file."""
    monkeypatch.setattr(archive_module, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(upkeep, "RETAKE_SECONDS", 1)
    worker = ArchivingWorker(store)
    await worker.announce()
    path = str(tmp_path / "sessions.db")
    return await start(persist_sessions=True, sessions_db_path=path), worker, path


async def outbox_is_empty(store):
    while await store.redis.zcard(keys.OUTBOX):
        await asyncio.sleep(0.02)


async def test_an_archived_response_is_the_same_and_can_be_deleted(archiving, store):
    """Redis may forget it: its events and numbers stay, until it is deleted for good."""
    client, worker, path = archiving
    made = await make(client, worker)
    live = await events_of(client, made)
    await outbox_is_empty(store)
    await store.redis.flushall()
    await worker.announce()
    assert await events_of(client, made) == live
    assert await events_of(client, made, starting_after=5) == live[6:]
    assert (await client.get(f"{URL}/{made}")).json() == check_whole(live)
    assert (await client.delete(f"{URL}/{made}")).status_code == 200
    error_of(await client.get(f"{URL}/{made}"), 404, "response_id")
    assert Archive(path).record(made) is None


async def test_a_row_written_during_a_delete_is_taken_back(archiving, store, monkeypatch):
    """The archiver has read the session, then it is deleted, then its row is written."""
    client, worker, path = archiving
    reached, go = threading.Event(), threading.Event()
    put, written = Archive.put, []

    def slowly(self, *args):
        reached.set()
        go.wait(10)
        put(self, *args)
        written.append(self.record(args[0]) is not None)

    monkeypatch.setattr(Archive, "put", slowly)
    made = await make(client, worker)
    await asyncio.to_thread(reached.wait, 10)
    assert (await client.delete(f"{URL}/{made}")).status_code == 200
    go.set()
    while Archive(path).record(made) is not None or not written:
        await asyncio.sleep(0.02)
    assert written == [True]


async def test_without_store_nothing_is_archived(archiving, store):
    """A session whose request said `store: false` goes into no archive."""
    client, worker, path = archiving
    serving = asyncio.create_task(answer(worker))
    made = (await client.post(URL, json={**ASK, "store": False})).json()["id"]
    await serving
    kept = await make(client, worker)
    await outbox_is_empty(store)
    archive = Archive(path)
    assert (archive.record(made), archive.record(kept) is not None) == (None, True)


async def test_a_waiting_background_response_needs_no_watcher(start, worker, store):
    """Nobody looks, or looks and leaves: it stays queued, while a plain one is abandoned."""
    client = await start(cancel_after_disconnect_seconds=0.3)
    while not client.services.presence._contact.heard():
        await asyncio.sleep(0.1)

    async def look(body):
        await worker.announce()  # the last time may be too long ago
        async with client.stream("POST", URL, json={**body, "stream": True}) as response:
            async for _ in response.aiter_bytes():
                break
        return response.headers["x-session-id"]

    async def is_abandoned(made):
        while (got := (await client.get(f"{URL}/{made}")).json())["status"] != "cancelled":
            await asyncio.sleep(0.02)
        return got["session"]["reason"] == "abandoned"

    made = await look(BACK)
    assert await is_abandoned(await look(ASK))
    await store.redis.delete(keys.watch(made))  # as when its last viewer left long ago
    assert await is_abandoned(await look(ASK))
    assert (await client.get(f"{URL}/{made}")).json()["status"] == "queued"
    assert await answer(worker) == made
