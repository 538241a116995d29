"""Bad input gets its status and error body, streaming or not, and the next request works."""

import json

import httpx
import pytest

from tests.media_samples import encode, encode_video, movie, picture
from tests.oracle import image_part, text_part, video_part


@pytest.fixture
def client(stack):
    with httpx.Client(base_url=stack.url, timeout=30, trust_env=False) as client:
        yield client


def user(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 4}


def works(client):
    answer = client.post("/v1/chat/completions", json=user(text_part("Still there?")))
    return answer.status_code == 200


REFUSED_AT_ONCE = {
    "empty messages": ({"messages": []}, "messages"),
    "no messages": ({}, "messages"),
    "bad role": ({"messages": [{"role": "x", "content": "y"}]}, "messages[0].role"),
    "broken base64": (
        user({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}),
        "messages[0].content[0].image_url",
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_what_the_gateway_sees_is_400_before_any_stream(client, name, stream):
    """A body that is wrong on its face is refused with its status, streaming or not."""
    body, param = REFUSED_AT_ONCE[name]
    answer = client.post("/v1/chat/completions", json={**body, "stream": stream})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert works(client)


def test_broken_json_is_400(client):
    """A body that is no JSON is refused with all four keys of the error."""
    answer = client.post("/v1/chat/completions", content=b'{"messages": [')
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert works(client)


def cut(data):
    return data[: len(data) // 3]


REFUSED_BY_THE_WORKER = {
    "corrupt image": (user(image_part(b"\x89PNG\r\n\x1a\n" + b"junk" * 9)), "invalid_media"),
    "cut image": (user(image_part(cut(encode(picture())))), "invalid_media"),
    "corrupt video": (user(video_part(b"\x00\x00\x00\x18ftypmp42" + b"x" * 99)), "invalid_media"),
    "cut video": (user(video_part(cut(encode_video(movie())))), "invalid_media"),
    "unreachable": (
        user({"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}),
        "media_unreachable",
    ),
    "too long": (user(text_part("word " * 5000)), "context_length_exceeded"),
}


@pytest.mark.parametrize("name", REFUSED_BY_THE_WORKER)
def test_what_the_worker_finds_is_400_or_a_final_error_event(client, name):
    """What only the worker can see is a 400 without streaming, and else one error event."""
    body, code = REFUSED_BY_THE_WORKER[name]
    whole = client.post("/v1/chat/completions", json=body)
    assert (whole.status_code, whole.json()["error"]["code"]) == (400, code)
    streamed = client.post("/v1/chat/completions", json={**body, "stream": True})
    events = streamed.text.split("\n\n")
    assert json.loads(events[1].split("data: ")[1]) == whole.json()
    assert events[2:] == ["data: [DONE]", ""]
    assert works(client)


def test_context_overflow_names_both_numbers(client):
    """The error says how long the context is and how long the prompt was."""
    body, _ = REFUSED_BY_THE_WORKER["too long"]
    message = client.post("/v1/chat/completions", json=body).json()["error"]["message"]
    context = client.get("/v1/models").json()["data"][0]["context_length"]
    assert str(context) in message
    assert sum(word.strip(".,").isdigit() for word in message.split()) == 2
