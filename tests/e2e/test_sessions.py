"""Resume, attach, cancel and abandon on the real stack, over two gateways and two workers."""

import asyncio

import httpx
import pytest

from tests.media_samples import encode, picture
from tests.oracle import image_part, text_part

LONG = {
    "messages": [{"role": "user", "content": "Go on and on."}],
    "ignore_eos": True,
    "stream": True,
    "temperature": 0,
}


@pytest.fixture
async def clients(stack2):
    made = [
        httpx.AsyncClient(base_url=g["url"], timeout=60, trust_env=False) for g in stack2.gateways
    ]
    yield made
    for client in made:
        await client.aclose()


async def read(response, events):
    """Read until `events` events have come."""
    data = b""
    async for chunk in response.aiter_bytes():
        data += chunk
        if data.count(b"\n\n") >= events:
            break
    return data


async def test_64_requests_over_two_gateways_and_workers_are_all_right(clients, stack2):
    """Of 64 simultaneous requests each is answered as when asked alone, and both workers work."""
    kinds = [
        [text_part(f"Question number {i}")]
        + ([image_part(encode(picture()))] if i % 4 == 0 else [])
        for i in range(8)
    ]

    async def ask(number):
        body = {
            "messages": [{"role": "user", "content": kinds[number % 8]}],
            "max_tokens": 20,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = await clients[number % 2].post("/v1/chat/completions", json=body)
        usage = answer.json()["usage"]
        del usage["prompt_tokens_details"]  # what was reused depends on what was asked before
        return answer.json()["choices"][0]["message"], usage

    alone = [await ask(number) for number in range(8)]
    before = served(stack2)
    together = await asyncio.gather(*(ask(number) for number in range(64)))
    assert together == [alone[number % 8] for number in range(64)]
    assert all(after > b for after, b in zip(served(stack2), before, strict=True))


def served(stack):
    """Count the sessions that each worker has begun."""
    logs = sorted((stack.folder / "logs").glob("worker*.log"))
    return [log.read_text().count('"stream start"') for log in logs]


async def test_resume_on_the_other_gateway_gives_the_same_bytes(clients):
    """A client that moves to the other gateway in the middle has the bytes of an unbroken one."""
    one, two = clients
    body = {**LONG, "max_tokens": 60, "session_id": "resume-me"}
    async with one.stream("POST", "/v1/chat/completions", json=body) as response:
        head = await read(response, 9)
    head = head[: head.rindex(b"\n\n") + 2]  # whole events only
    last = head.rsplit(b"id: ", 1)[1].split(b"\n")[0].decode()
    rest = await two.post("/v1/chat/completions", headers={"last-event-id": last})
    whole = await one.post("/v1/chat/completions", json=body)
    assert head + rest.content == whole.content
    assert whole.text.count("data: [DONE]") == 1


async def test_cancel_from_the_other_gateway_stops_a_running_stream(clients):
    """A running stream is cancelled from anywhere, and ends with `stop` and the reason."""
    one, two = clients
    body = {**LONG, "max_tokens": 3000, "session_id": "cancel-me"}
    async with one.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.aiter_lines()
        async for line in lines:
            if line.startswith("id: cancel-me:5"):
                break
        answer = await two.post("/v1/cancel/cancel-me")
        rest = [line async for line in lines]
    assert answer.json() == {"session_id": "cancel-me", "status": "cancelling"}
    assert '"session":{"status":"cancelled","reason":"requested"}' in rest[-4]
    assert '"finish_reason":"stop"' in rest[-4]
    assert rest[-2] == "data: [DONE]"
    again = await one.post("/v1/cancel/cancel-me")
    assert again.json()["status"] == "cancelled"


async def test_leaving_does_not_stop_a_generation(clients):
    """The session goes on to its end with nobody there, and can be read afterwards."""
    one, two = clients
    body = {**LONG, "max_tokens": 50, "session_id": "left-alone"}
    async with one.stream("POST", "/v1/chat/completions", json=body) as response:
        await read(response, 2)
    while (await two.get("/v1/sessions/left-alone")).json()["status"] != "finished":
        await asyncio.sleep(0.02)
    whole = await two.post("/v1/chat/completions", json={**body, "stream": False})
    assert whole.json()["usage"]["completion_tokens"] == 50


async def test_an_abandoned_session_is_cancelled(make_stack):
    """With nobody watching for the configured time, the generation ends as abandoned."""
    env = {"CANCEL_AFTER_DISCONNECT_SECONDS": "1"}
    with make_stack(env=env) as stack:
        async with httpx.AsyncClient(base_url=stack.url, timeout=60, trust_env=False) as client:
            body = {**LONG, "max_tokens": 4000, "session_id": "s", "temperature": 1.9, "seed": 1}
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                await read(response, 3)
            while (await client.get("/v1/sessions/s")).json()["status"] == "running":
                await asyncio.sleep(0.05)
            replay = await client.post("/v1/chat/completions", headers={"last-event-id": "s:2"})
            assert '"reason":"abandoned"' in replay.text


async def test_a_killed_workers_session_goes_on_elsewhere(make_stack):
    """When the worker dies in the middle, the text continues, equal to an undisturbed run."""
    with make_stack(workers=2) as stack:
        async with httpx.AsyncClient(base_url=stack.url, timeout=60, trust_env=False) as client:
            body = {**LONG, "max_tokens": 400, "temperature": 1.0, "seed": 11}
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                await read(response, 5)
                logs = sorted((stack.folder / "logs").glob("worker*.log"))
                [busy] = [i for i, log in enumerate(logs) if '"stream start"' in log.read_text()]
                stack.kill("workers", busy)
            sid = response.headers["x-session-id"]
            whole = await client.post("/v1/chat/completions", headers={"last-event-id": f"{sid}:0"})
            other = await client.post("/v1/chat/completions", json={**body, "stream": False})
    texts = [line for line in whole.text.splitlines() if line.startswith("data: {")]
    import json

    deltas = [json.loads(t[6:])["choices"][0]["delta"] for t in texts]
    reasoning = "".join(d.get("reasoning_content", "") for d in deltas)
    content = "".join(d.get("content", "") for d in deltas)
    message = other.json()["choices"][0]["message"]
    assert (reasoning, content) == (message["reasoning_content"] or "", message["content"])
