import json

from hypothesis import example, given
from hypothesis import strategies as st

from gateway import sse
from gateway.render import ChunkRenderer
from shared.protocol import Delta, Failed, Finished, Started, Usage, decode_event, encode_event
from shared.session_log import SessionRecord

SESSION = "chatcmpl-1"
NASTY = '","content"]\n\r\x00\x1f\x7f\u2028"],"\\u0041\U0001f600é]}'
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))  # no lone surrogates: UTF-8 has none


def record(**changes):
    known = {"owner": "", "digest": "d", "model": 'org/"tiny"', "fingerprint": "fp", "choices": 2}
    return SessionRecord(**{**known, "status": "running", "last": 0, "created": 7, "enqueued": 0.0,
                            **changes})  # fmt: skip


def renderer(*, include_usage=False, **changes):
    return ChunkRenderer(SESSION, record(**changes), include_usage=include_usage)


def decoded_frames(events, *, include_usage=False):
    """Render events the long way: each decoded, and encoded again."""
    chunks = renderer(include_usage=include_usage)
    return b"".join(
        sse.frame(SESSION, i, chunks.chunk(decode_event(e))) for i, e in enumerate(events)
    )


deltas = st.builds(
    Delta,
    st.integers(0, 7),
    st.lists(st.integers(0, 200_000), max_size=4).map(tuple),
    TEXTS,
    st.sampled_from(["content", "reasoning"]),
)


@given(st.lists(deltas, max_size=5), st.booleans())
@example([Delta(0, (1,), NASTY), Delta(1, (), NASTY, "reasoning"), Delta(0, (), "")], True)
def test_spliced_frames_equal_decoded_ones(events, include_usage):
    """Cutting a text out of the log gives the bytes that decoding and encoding it gives."""
    encoded = [encode_event(event) for event in events]
    frames = sse.Frames(SESSION, renderer(include_usage=include_usage))
    data, ended = frames.render(0, encoded)
    assert data == decoded_frames(encoded, include_usage=include_usage)
    assert not ended


@given(TEXTS, st.sampled_from(["content", "reasoning"]))
def test_a_frame_is_one_line_of_json_with_the_text(text, channel):
    """Whatever the text, the frame's data is one line, and its JSON gives the text back."""
    frames = sse.Frames(SESSION, renderer())
    data, _ = frames.render(4, [encode_event(Delta(1, (5,), text, channel))])
    head, rest = data.split(b"\n", 1)
    line, end = rest[: rest.index(b"\n")], rest[rest.index(b"\n") :]
    chunk = json.loads(line.removeprefix(b"data: "))
    names = ["content"] if channel == "content" else ["reasoning_content", "reasoning"]
    assert (head, end) == (b"id: chatcmpl-1:4", b"\n\n")
    assert chunk["choices"][0]["delta"] == dict.fromkeys(names, text)
    assert (chunk["choices"][0]["index"], chunk["model"]) == (1, 'org/"tiny"')


def test_a_delta_with_more_than_is_known_is_not_spliced():
    """An element that a later version adds to a delta does not end up in the text."""
    event = encode_event(Delta(0, (1,), 'a,"b'))
    longer = event[:-1] + b',["x","y"]]'
    plain, _ = sse.Frames(SESSION, renderer()).render(3, [event])
    assert sse.Frames(SESSION, renderer()).render(3, [longer]) == (plain, False)


def test_renderers_are_alike_where_their_bytes_are():
    """Renderers are told apart by the usage field, and by what the record gives."""
    assert renderer().identity == renderer(last=9, status="finished").identity
    assert renderer().identity != renderer(include_usage=True).identity
    assert renderer().identity != renderer(created=8).identity


def test_the_end_brings_usage_and_done():
    """The last event is followed by usage, where it was asked for, and `[DONE]`."""
    last = encode_event(Finished(("stop", "length"), Usage(3, 4)))
    data, ended = sse.Frames(SESSION, renderer(include_usage=True)).render(5, [last, b"never read"])
    first, usage, done, rest = data.split(b"\n\n")
    assert ended
    assert first.startswith(b"id: chatcmpl-1:5\n")
    assert json.loads(usage.removeprefix(b"data: "))["usage"]["total_tokens"] == 7
    assert (done, rest) == (b"data: [DONE]", b"")


def test_what_was_seen_gets_no_frame_but_its_end_counts():
    """Whoever has seen the last event gets only what follows it."""
    events = [encode_event(Started(1)), encode_event(Delta(0, (1,), "a"))]
    last = encode_event(Failed("invalid_media", "broken"))
    frames = sse.Frames(SESSION, renderer())
    assert frames.render(0, [*events, last], seen=2) == (sse.DONE, True)
    assert frames.render(0, events, seen=0)[0].startswith(b"id: chatcmpl-1:1\n")
