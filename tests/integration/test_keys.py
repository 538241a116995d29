"""Keys, their limits over all gateways, signed stream URLs, and pages of other origins."""

import asyncio
import hashlib
import json
import time

import pytest

from gateway import auth
from gateway.auth import Authenticator, KeyFileError, KeyLimits, parse_keys
from gateway.limits import SETTLE_SECONDS, RateLimits
from shared import keys
from shared.errors import UnbrokenError
from tests.served import serving

HELLO = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 10}


def key_file(tmp_path, *lines):
    """Write a file of keys, each a string or a dict."""
    path = tmp_path / "keys"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return str(path)


def bearer(key):
    return {"authorization": f"Bearer {key}"}


async def start(client, key="a", **body):
    """Post a streamed chat and leave after its headers; returns the answer."""
    async with client.stream(
        "POST", "/v1/chat/completions", json={**HELLO, **body}, headers=bearer(key)
    ) as answer:
        if answer.status_code != 200:
            await answer.aread()
        return answer


async def finish_all(worker):
    """End the sessions that wait."""
    for claimed in await worker.claim(16):
        await worker.say(claimed, "x")
        await worker.finish(claimed)


def test_a_file_of_keys_has_lines_or_objects():
    """Plain keys, objects with limits, hashed keys and comments can be mixed."""
    digest = hashlib.sha256(b"secret").hexdigest()
    limited = '{"key": "k", "name": "K", "requests_per_minute": 2}'
    text = f'# people\nplain\n\n{limited}\n{{"sha256": "{digest}"}}\n'
    found = parse_keys(text)
    assert found == {
        hashlib.sha256(b"plain").digest(): KeyLimits(),
        hashlib.sha256(b"k").digest(): KeyLimits(requests_per_minute=2),
        hashlib.sha256(b"secret").digest(): KeyLimits(),
    }


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "secret-x", "requests": 1}',
        '{"key": "secret-x", "requests_per_minute": 0}',
        '{"key": "secret-x", "tokens_per_minute": "1"}',
        '{"sha256": "secret-x"}',
        '{"key": "secret-x", "sha256": "00"}',
        "{}",
        "secret-x two",
        '{"key": "secret-x"',
    ],
)
def test_a_wrong_line_is_named_by_number_and_not_shown(line):
    """A mistake in the file says its line, and nothing of what stands there."""
    with pytest.raises(KeyFileError) as caught:
        parse_keys(f"good\n{line}\n")
    assert "line 2" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_not_there_ends_the_start(tmp_path):
    """A gateway whose file of keys is missing or wrong does not start open."""
    with pytest.raises(KeyFileError):
        Authenticator("", str(tmp_path / "none"))
    with pytest.raises(KeyFileError):
        Authenticator("", key_file(tmp_path, "{"))
    empty = Authenticator("", key_file(tmp_path, "# nobody"))
    assert not empty.is_open


async def test_the_file_is_read_again(redis_url, worker, tmp_path, monkeypatch, caplog):
    """New keys work, old ones do not; a file with a mistake changes nothing and is logged."""
    monkeypatch.setattr(auth, "LOOK_SECONDS", 0)
    path = key_file(tmp_path, "one")

    async def status(key):
        return (await client.get("/v1/models", headers=bearer(key))).status_code

    async with serving(redis_url, api_keys_file=path, api_keys="always") as client:
        assert [await status(k) for k in ("one", "two", "always")] == [200, 401, 200]
        key_file(tmp_path, "two", {"key": "three"})
        assert [await status(k) for k in ("one", "two", "three", "always")] == [401, 200, 200, 200]
        key_file(tmp_path, "four", '{"key": "hush-hush')
        assert [await status(k) for k in ("four", "two")] == [401, 200]
        (tmp_path / "keys").unlink()
        assert await status("two") == 200
    assert "line 2" in str([vars(r) for r in caplog.records])
    assert "hush" not in caplog.text


async def test_an_id_that_is_used_again_is_charged_again(store):
    """The same request sent twice at once costs once; its id, later, is another session's."""
    limits, most = RateLimits(store), KeyLimits(requests_per_minute=1)
    assert await limits.admit("me", most, "s", 1)
    assert not await limits.admit("me", most, "s", 1)
    await store.redis.zadd(keys.live_sessions("me"), {"s": time.time() - SETTLE_SECONDS - 1})
    with pytest.raises(UnbrokenError) as refused:
        await limits.admit("me", most, "s", 1)
    assert refused.value.code == "rate_limit_exceeded"


async def test_requests_a_minute_hold_over_gateways(redis_url, worker, tmp_path):
    """Two gateways count together; the 429 says when to come back; another key is free."""
    path = key_file(tmp_path, {"key": "a", "requests_per_minute": 3}, "b")
    async with (
        serving(redis_url, api_keys_file=path) as one,
        serving(redis_url, api_keys_file=path) as two,
    ):
        began = time.monotonic()
        answers = [await start(c, session_id=f"s{n}") for n, c in enumerate((one, two, one, two))]
        assert [a.status_code for a in answers] == [200, 200, 200, 429]
        assert answers[3].json()["error"]["code"] == "rate_limit_exceeded"
        waits = int(answers[3].headers["retry-after"])
        assert max(1, 19 - (time.monotonic() - began)) <= waits <= 20
        assert (await start(one, "b")).status_code == 200
        attached = await start(two, session_id="s0")
        assert attached.status_code == 200
        place = {**bearer("a"), "last-event-id": "s1:0"}
        async with two.stream("GET", "/v1/sessions/s1/events", headers=place) as resumed:
            assert resumed.status_code == 200


async def test_a_refused_request_is_not_counted(redis_url, worker, tmp_path, store):
    """What the queue refuses costs its key nothing."""
    path = key_file(tmp_path, {"key": "a", "requests_per_minute": 2, "tokens_per_minute": 100})
    async with serving(redis_url, api_keys_file=path, max_queue=1) as client:
        assert (await start(client)).status_code == 200
        for _ in range(4):
            refused = await start(client)
            assert refused.json()["error"]["code"] == "queue_full"
        await finish_all(worker)
        assert (await start(client)).status_code == 200


async def test_tokens_a_minute(redis_url, worker, tmp_path):
    """A session is charged with all that it may use; what can never fit is a 400."""
    path = key_file(tmp_path, {"key": "a", "tokens_per_minute": 100})
    async with serving(redis_url, api_keys_file=path) as client:
        assert (await start(client, max_tokens=30, n=2)).status_code == 200
        late = await start(client, max_tokens=60)
        assert late.status_code == 429
        assert 1 <= int(late.headers["retry-after"]) <= 60
        assert (await start(client, max_tokens=30)).status_code == 200
        never = await start(client, max_tokens=101)
        assert (never.status_code, never.json()["error"]["param"]) == (400, "max_tokens")


async def test_sessions_at_once(redis_url, worker, tmp_path, store):
    """A key has so many sessions that have not ended, and one more as soon as one ends."""
    path = key_file(tmp_path, {"key": "a", "concurrent_sessions": 2})
    async with serving(redis_url, api_keys_file=path) as client:
        together = await asyncio.gather(*(start(client, session_id=f"s{n}") for n in range(5)))
        assert sorted(a.status_code for a in together) == [200, 200, 429, 429, 429]
        await finish_all(worker)
        assert (await start(client)).status_code == 200
        owner = hashlib.sha256(b"a").hexdigest()[:32]
        assert await store.redis.zcard(keys.live_sessions(owner)) == 1


async def test_a_signed_url_reads_one_session_for_a_while(redis_url, worker, tmp_path):
    """It needs no key; it is no good for another session, later, or changed."""
    settings = {"api_keys": "a,b", "stream_url_secret": "s3", "stream_url_ttl_seconds": 60}
    async with serving(redis_url, **settings) as client, serving(redis_url, **settings) as other:
        for name in ("mine", "other"):
            await start(client, session_id=name)
        await finish_all(worker)
        made = await client.post("/v1/sessions/mine/stream_url", headers=bearer("a"))
        url = made.json()["url"]
        assert (await client.get(url)).text == (await other.get(url)).text
        assert (await client.get(url)).text.endswith("data: [DONE]\n\n")
        place = {"last-event-id": "mine:1"}
        assert (await client.get(url, headers=place)).text.startswith("id: mine:2\n")
        bad = [
            url.replace("mine", "other"),
            url.replace("mine", "unknown"),
            url[:-1] + ("0" if url[-1] != "0" else "1"),
            url.replace("expires=", "expires=9"),
            "/v1/sessions/mine/events?expires=1&signature=",
            "/v1/sessions/mine/events?expires=x&signature=é",
            "/v1/sessions/mine/events",
        ]
        assert [(await client.get(u)).status_code for u in bad] == [401] * len(bad)
        foreign = await client.post("/v1/sessions/mine/stream_url", headers=bearer("b"))
        assert foreign.status_code == 404
    async with serving(redis_url, **{**settings, "stream_url_secret": ""}) as unsigned:
        asked = await unsigned.post("/v1/sessions/mine/stream_url", headers=bearer("a"))
        assert asked.status_code == 404
        assert (await unsigned.get(url)).status_code == 401
    async with serving(redis_url, **{**settings, "stream_url_ttl_seconds": 1}) as client:
        made = await client.post("/v1/sessions/mine/stream_url", headers=bearer("a"))
        expires = made.json()["expires"]
        with pytest.MonkeyPatch.context() as later:
            later.setattr("gateway.signing.time.time", lambda: expires + 1)
            assert (await client.get(made.json()["url"])).status_code == 401


PREFLIGHT = {
    "origin": "https://app.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,last-event-id,idempotency-key,x-stainless-os",
}


async def test_pages_of_other_origins_are_refused_unless_named(redis_url, worker):
    """No CORS header without the setting; with it only for the origins that it names."""
    async with serving(redis_url) as client:
        await start(client, session_id="s")
        await finish_all(worker)
        closed = await client.get("/v1/sessions/s/events", headers={"origin": PREFLIGHT["origin"]})
        preflight = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        for answer in (closed, preflight):
            assert not [name for name in answer.headers if name.startswith("access-control")]
    async with serving(redis_url, cors_origins="https://app.example, https://b.example") as client:
        answer = await client.get("/v1/sessions/s/events", headers={"origin": "https://b.example"})
        assert answer.headers["access-control-allow-origin"] == "https://b.example"
        assert "X-Session-Id" in answer.headers["access-control-expose-headers"]
        assert "Last-Event-ID" in answer.headers["access-control-expose-headers"]
        preflight = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert preflight.status_code == 200
        allowed = preflight.headers["access-control-allow-headers"].lower()
        assert "last-event-id" in allowed
        assert "x-stainless-os" in allowed
        evil = await client.get("/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in evil.headers
