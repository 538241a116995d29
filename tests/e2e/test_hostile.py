"""Hostile inputs: each gets its status, harms nobody, and reaches nothing inside; no log tells."""

import asyncio
import contextlib
import json
import re
import socket
import threading

import httpx
import pytest

from tests.e2e.hostile import CHAT, table
from tests.media_samples import data_url, encode, picture
from tests.stack import Stack, wait_until

KEY = "sk-hostile-5f1c09aa"
SECRET = "signing-77aa01"
PROMPT = "xylophone-secret-prompt"
QUERY = "token=querysecret42"
INTERNALS = re.compile(
    r"Traceback|File \"|\.py\b|/tmp/|/usr/|/home/|127\.0\.0\.|redis|errno", re.IGNORECASE
)
TABLE = table()


class Outside:
    """A media server of the outer world (127.0.0.9 is allowed), which does what it should not."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.9", 0))
        self.port = self.listener.getsockname()[1]
        self.over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection:
            path = connection.recv(65536).split()[1].decode()
            name, _, target = path[1:].partition("/")
            name = name.partition("?")[0]
            first, rest = self.answers(target).get(name, (b"", None))
            connection.sendall(first)
            while rest is not None and not self.over.wait(0 if len(rest) > 1 else 0.1):
                connection.sendall(rest)

    @staticmethod
    def answers(target):
        """What to send by the path's first part, and what to repeat then without end."""

        def head(status, *headers, body=b""):
            lines = [f"HTTP/1.1 {status} X", *headers, "connection: close", "", ""]
            return "\r\n".join(lines).encode() + body

        image = encode(picture())
        return {
            "to": (head(302, f"location: {target}"), None),
            "loop": (head(302, "location: /loop"), None),
            "404": (head(404, "content-length: 0"), None),
            "gzip": (head(200, "content-encoding: gzip", "content-length: 9"), None),
            "long": (head(200, "content-length: 99999999999"), None),
            "short": (head(200, "content-length: 5000", body=b"x" * 10), None),
            "empty": (head(200, "content-length: 0"), None),
            "junk": (b"SSH-2.0-OpenSSH\r\n", None),
            "image": (head(200, f"content-length: {len(image)}", body=image), None),
            "endless": (head(200), b"x" * 65536),
            "drip": (head(200, "content-length: 500"), b"x"),
            "silent": (head(200, "content-length: 500"), b""),
            "slow-head": (b"", b""),
        }


class Canary:
    """A port on loopback that nobody may touch."""

    def __init__(self):
        self.touched = 0
        self.sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port = self.sockets[0].getsockname()[1]
        with contextlib.suppress(OSError):
            self.sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))
        for listener in self.sockets:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()
                self.touched += 1


@pytest.fixture(scope="module")
def outside():
    server = Outside()
    yield server
    server.over.set()
    server.listener.close()


@pytest.fixture(scope="module")
def canary():
    canary = Canary()
    yield canary
    for listener in canary.sockets:
        listener.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, demo_model):
    """A stack as it would stand on the internet, at the most talkative log level."""
    env = {
        "API_KEYS": KEY,
        "STREAM_URL_SECRET": SECRET,
        "LOG_LEVEL": "DEBUG",
        "MEDIA_ALLOWED_HOSTS": "*,127.0.0.9",
        "MEDIA_TIMEOUT_SECONDS": "2",
        "MAX_MEDIA_BYTES": "20000000",
        "MAX_BODY_BYTES": "8000000",
    }
    with Stack(tmp_path_factory.mktemp("guarded") / "data", env=env) as stack:
        yield stack


@pytest.fixture
def client(guarded):
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=guarded.url, timeout=25, trust_env=False, headers=headers) as client:
        yield client


def filled(value, outside, canary):
    """Put ports and key in their places."""
    data = value.encode("latin-1") if isinstance(value, str) else value
    data = data.replace(b"{canary}", b"%d" % canary.port).replace(
        b"{outside}", b"%d" % outside.port
    )
    return data.replace(b"{key}", KEY.encode())


def still_works(client):
    body = {"messages": [{"role": "user", "content": "Still there?"}], "max_tokens": 2}
    assert client.get("/health").status_code == 200
    assert client.post(CHAT, json=body).status_code == 200


def test_the_table_is_long_enough():
    """There are at least 120 hostile inputs."""
    assert len(TABLE) >= 120


@pytest.mark.parametrize("name", TABLE)
def test_hostile_input(client, guarded, outside, canary, name):
    """It gets its status and a proper error, touches nothing inside, and the next is served."""
    method, path, headers, body, expected = TABLE[name]
    given = {k: filled(v, outside, canary) for k, v in headers.items()}
    request = client.build_request(
        method,
        filled(path, outside, canary).decode(),
        headers=given,
        content=filled(body, outside, canary),
    )
    answer = client.send(request)
    assert answer.status_code == expected, answer.text
    assert answer.headers["x-request-id"].startswith("req_")
    if expected >= 400:
        assert set(answer.json()) == {"error"}
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.content) <= 8192
        assert not INTERNALS.search(answer.text), answer.text
        assert KEY not in answer.text
    assert canary.touched == 0
    still_works(client)


def test_the_outside_can_be_reached(client, outside, canary):
    """Media may come from the test's server: what fails above fails for its own reason."""
    body = [{"type": "image_url", "image_url": {"url": f"http://127.0.0.9:{outside.port}/image"}}]
    chat = {"messages": [{"role": "user", "content": body}], "max_tokens": 2}
    assert client.post(CHAT, json=chat).status_code == 200


def test_a_crowd_of_hostile_requests_leaves_the_server_usable(client, guarded, outside, canary):
    """Many of them at once, with slow fetches among them, still leave room for others."""
    names = [n for n in TABLE if n.startswith(("image", "video", "field"))]
    with httpx.Client(
        base_url=guarded.url, timeout=60, trust_env=False, headers=client.headers
    ) as busy:
        threads = [
            threading.Thread(
                target=lambda n=name: busy.post(CHAT, content=filled(TABLE[n][3], outside, canary))
            )
            for name in names
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    still_works(client)


def test_no_log_line_tells_what_was_said(client, guarded, outside):
    """After all of the above, at DEBUG: no prompt, medium, URL query, key or token in any log."""
    picture_url = data_url(encode(picture(color=(7, 77, 177))), "image/png")
    url = f"http://127.0.0.9:{outside.port}/image?{QUERY}"
    broken = f"http://127.0.0.9:{outside.port}/404?{QUERY}"
    said = []
    for medium in (picture_url, url, broken):
        parts = [
            {"type": "text", "text": PROMPT},
            {"type": "image_url", "image_url": {"url": medium}},
        ]
        chat = {"messages": [{"role": "user", "content": parts}], "max_tokens": 12}
        answer = client.post(CHAT, json=chat)
        if answer.status_code == 200:
            message = answer.json()["choices"][0]["message"]
            said += [message["content"], message["reasoning"]]
            session = answer.json()["id"]
    signed = client.post(f"/v1/sessions/{session}/stream_url").json()["url"]
    signature = signed.rpartition("=")[2]
    assert client.get(signed, headers={"authorization": ""}).status_code == 200
    client.get(f"/v1/models?api_key={KEY}", headers={"authorization": "Bearer wrong-key-123"})
    logs = guarded.logs(10**8)
    for secret in (
        KEY,
        SECRET,
        PROMPT,
        "querysecret42",
        signature,
        "wrong-key-123",
        picture_url[40:100],
    ):
        assert secret not in logs, secret
    for text in filter(None, said):
        assert len(text) < 8 or text not in logs, text
    password = re.search(r"//:([^@]+)@", guarded.redis_url)[1]
    assert password not in logs
    assert "Still there?" not in logs


LIFECYCLE = ("session created", "stream start", "stream stop")


def test_each_lifecycle_stage_is_a_json_line_with_its_ids(client, guarded):
    """Each line is one JSON object; a request's stages bear its request id and its session."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    answer = client.post(CHAT, json=body)
    session, request = answer.json()["id"], answer.headers["x-request-id"]

    def lines():
        found = []
        for file in (guarded.folder / "logs").glob("*.log"):
            if file.name.startswith(("gateway", "worker")):
                found += [json.loads(line) for line in file.read_text().splitlines()]
        return [line for line in found if line.get("session") == session]

    wait_until(lambda: {line["message"] for line in lines()} >= set(LIFECYCLE), "all stages")
    assert {line.get("request_id") for line in lines()} == {request}
    [stop] = [line for line in lines() if line["message"] == "stream stop"]
    assert stop["gen_ai.usage.output_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", line["time"]) for line in lines())


def test_a_silent_client_is_no_hindrance(guarded, client):
    """Connections on which nothing, or half a request, comes do not keep others out."""
    host, port = guarded.url.removeprefix("http://").split(":")

    async def crowd():
        pairs = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
        for _, writer in pairs[::2]:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-le")
        await asyncio.to_thread(still_works, client)
        for _, writer in pairs:
            writer.close()

    asyncio.run(crowd())
