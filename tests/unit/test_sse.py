import asyncio
import contextlib
import socket

import hypothesis
import pytest
import uvicorn
from hypothesis import strategies as st

from gateway import connection as connections
from gateway import sse
from gateway.connection import SERVER_SEND, Connection
from shared.errors import UnbrokenError

SCOPE = {"type": "http", "method": "POST"}


@pytest.mark.parametrize(
    ("value", "cursor"),
    [
        (None, None),
        ("", None),
        ("s:0", ("s", 0)),
        ("chatcmpl-a.b_c~d:12", ("chatcmpl-a.b_c~d", 12)),
    ],
)
def test_cursors_are_parsed(value, cursor):
    """A cursor is a session and an index; no cursor is none."""
    found = sse.parse_cursor(value)
    assert (found and (found.session_id, found.index)) == cursor


@hypothesis.given(
    st.one_of(
        st.text(max_size=200),
        st.text(alphabet="azAZ09._~-: \n\r\té٣", max_size=150),
        st.builds("{}:{}".format, st.text(max_size=20), st.integers()),
    )
)
def test_any_cursor_is_read_exactly_or_refused(value):
    """Whatever comes as a cursor is the very place that it names, or an invalid value."""
    try:
        found = sse.parse_cursor(value)
    except UnbrokenError:
        return
    if found is None:
        assert value == ""
        return
    session_id, _, index = value.rpartition(":")
    assert (found.session_id, found.index) == (session_id, int(index))
    assert value.isascii()
    assert not set(value) & set(" \r\n\t")


@pytest.mark.parametrize("value", ["s", ":1", "s:", "s:-1", "s: 1", "a:b:1", "s:1e3", "é:1", "s:٣"])
def test_malformed_cursors_are_refused(value):
    """A cursor of another form is an invalid value."""
    with pytest.raises(UnbrokenError) as raised:
        sse.parse_cursor(value)
    assert raised.value.code == "invalid_value"


class Client:
    """An ASGI client made by hand: keeps what is sent, and leaves when told to."""

    def __init__(self):
        self.sent, self.gone = [], asyncio.Event()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    def body(self):
        return b"".join(m["body"] for m in self.sent if m["type"] == "http.response.body")

    async def get(self, source, scope=SCOPE):
        response = sse.EventStreamResponse(source, {"x-session-id": "s"})
        await response(scope, self.receive, self.send)


async def test_a_stream_is_sent_and_closed():
    """A source's frames are the body; headers come first, and the body's end last."""

    async def source(connection):
        assert connection.push(b"one\n\n") is None
        await connection.write(b"two\n\n")

    client = Client()
    await client.get(source)
    headers = dict(client.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"x-session-id"] == b"s"
    assert b"content-length" not in headers
    assert client.body() == b"one\n\ntwo\n\n"
    assert [m.get("more_body") for m in client.sent] == [None, True, True, False]


async def test_bodies_go_past_the_middleware_and_headers_through_it():
    """Only the start of a response, and its end, pass the wrappers around `send`."""
    server = Client()

    async def source(connection):
        await connection.write(b"x\n\n")

    client = Client()
    await client.get(source, {**SCOPE, SERVER_SEND: server.send})
    assert server.body() == b"x\n\n"
    assert [m["type"] for m in client.sent] == ["http.response.start", "http.response.body"]


async def test_a_client_that_leaves_cancels_its_source_and_no_more():
    """When the client leaves the source is cancelled; the request's task goes on."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def source(_connection):
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    client = Client()
    task = asyncio.create_task(client.get(source))
    await begun.wait()
    client.gone.set()
    await task
    assert ended.is_set()
    assert [m["type"] for m in client.sent] == ["http.response.start"]


async def test_a_source_that_swallows_its_cancellation_is_cancelled_again():
    """A library that ignores one cancellation cannot keep a stream alive without its client."""
    swallowed = asyncio.Event()

    async def source(_connection):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        swallowed.set()
        await asyncio.Event().wait()

    client = Client()
    client.gone.set()
    await client.get(source)
    assert swallowed.is_set()


async def test_a_stopping_server_cancels_the_stream():
    """A cancellation from outside is no disconnect: it ends the request's task."""
    begun = asyncio.Event()

    async def source(_connection):
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(Client().get(source))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("error", "code"),
    [(UnbrokenError("events_expired", "gone"), b"events_expired"), (KeyError(), b"internal_error")],
)
async def test_what_goes_wrong_is_the_last_event(error, code):
    """An error after the headers is an event without an id, then `[DONE]`."""

    async def source(connection):
        await connection.write(b"x\n\n")
        raise error

    client = Client()
    await client.get(source)
    _, failed, done, rest = client.body().split(b"\n\n")
    assert failed.startswith(b'data: {"error":')
    assert b'"%s"' % code in failed
    assert (done, rest) == (b"data: [DONE]", b"")


async def test_a_push_that_must_wait_is_gone_on_with_later():
    """A `send` that waits in the middle is resumed where it stands, by whoever awaits the rest."""
    room, steps = asyncio.Event(), []

    async def send(message):
        steps.append("begun")
        await room.wait()
        await asyncio.sleep(0)
        steps.append(message["body"])

    rest = Connection(send).push(b"x")
    assert rest is not None
    waiting = asyncio.ensure_future(rest)
    await asyncio.sleep(0)
    assert steps == ["begun"]
    room.set()
    await waiting
    assert steps == ["begun", b"x"]


async def test_what_a_resumed_push_raises_reaches_whoever_awaits_it():
    """An error or a cancellation is passed through the rest of a push, in both directions."""
    seen = []

    async def send(_message):
        try:
            await asyncio.sleep(0)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    waiting = asyncio.ensure_future(Connection(send).push(b"x"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert seen == ["cancelled"]

    async def broken(_message):
        raise OSError("broken pipe")

    with pytest.raises(OSError, match="broken pipe"):
        Connection(broken).push(b"x")


async def serve(app, http):
    """Run an ASGI app on uvicorn in this loop; returns the server, its task and its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = uvicorn.Config(app, port=port, log_config=None, http=http, lifespan="off")
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    return server, task, port


async def answer_of(port, version="1.1"):
    """Return the whole answer to a GET, as it comes off the wire, without its date."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET / HTTP/{version}\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    raw = await reader.read()
    writer.close()
    return b"\r\n".join(line for line in raw.split(b"\r\n") if not line.startswith(b"date:"))


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_the_short_way_puts_the_same_bytes_on_the_wire(version, monkeypatch):
    """Writing to uvicorn's transport is what its `send` would do; elsewhere `send` is used."""
    short = []

    async def app(_scope, _receive, send):
        async def source(connection):
            short.append(connection._cycle is not None)
            for data in (b"id: s:0\ndata: x\n\n", b"y" * 5000, "é\n\n".encode()):
                assert connection.push(data) is None

        await sse.EventStreamResponse(source, {})(SCOPE, _receive, send)

    answers = []
    for http in ("httptools", "h11"):
        server, task, port = await serve(app, http)
        answers.append(await answer_of(port, version))
        if http == "httptools":
            with monkeypatch.context() as patched:
                patched.setattr(connections, "uvicorn_cycle", lambda _send: None)
                answers.append(await answer_of(port, version))
        server.should_exit = True
        await task
    assert short == [True, False, False]
    assert answers[0] == answers[1]
    assert answers[0].partition(b"\r\n\r\n")[2] == answers[1].partition(b"\r\n\r\n")[2]
    assert b"id: s:0\ndata: x\n\n" in answers[2]


@pytest.mark.parametrize("http", ["httptools", "h11"])
async def test_a_client_that_does_not_read_makes_pushes_wait(http):
    """Beyond the server's buffer a push waits; what was pushed arrives whole and in order."""
    waited, pushed = asyncio.Event(), []

    async def app(_scope, receive, send):
        async def source(connection):
            while not waited.is_set():
                pushed.append(b"%06d" % len(pushed) + b"x" * 10_000 + b"\n\n")
                rest = connection.push(pushed[-1])
                if rest is not None:
                    waited.set()
                    await rest
            await connection.write(b"end")

        await sse.EventStreamResponse(source, {})(SCOPE, receive, send)

    server, task, port = await serve(app, http)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    await waited.wait()
    raw = await reader.read()
    writer.close()
    body, chunks = raw.partition(b"\r\n\r\n")[2], []
    while (size := int(body.partition(b"\r\n")[0], 16)) > 0:
        body = body.partition(b"\r\n")[2]
        chunks.append(body[:size])
        body = body[size + 2 :]
    assert b"".join(chunks) == b"".join(pushed) + b"end"
    server.should_exit = True
    await task
