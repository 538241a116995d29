import base64

import pytest

from gateway.openai import parse_chat
from shared.errors import UnbrokenError
from shared.protocol import MediaRef, TextPart
from shared.settings import GatewaySettings

SETTINGS = GatewaySettings(_env_file=None)
PIXEL = base64.b64encode(b"not really a picture").decode()


def chat(**fields):
    return parse_chat({"messages": [{"role": "user", "content": "hi"}], **fields}, SETTINGS)


def parts(*content):
    return chat(messages=[{"role": "user", "content": list(content)}]).generation.messages[0].parts


def test_defaults_come_from_the_settings():
    """A bare request takes the server's limits and temperature."""
    sampling = chat().generation.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.n) == (256, 0.7, 1)


def test_max_completion_tokens_wins_over_max_tokens():
    """The newer name of the token limit has precedence."""
    assert chat(max_tokens=5, max_completion_tokens=9).generation.sampling.max_tokens == 9


def test_developer_speaks_as_system_and_null_content_is_an_empty_turn():
    """The developer role is the system's; an assistant turn may have no content."""
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "assistant", "content": None},
        ]
    )
    first, second = request.generation.messages
    assert (first.role, first.parts, second.parts) == ("system", (TextPart("be brief"),), ())


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{PIXEL}"},
        {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}"},
        {"type": "input_image", "data": PIXEL},
        {"type": "input_image", "b64_json": PIXEL},
        {"type": "input_image", "image": PIXEL},
    ],
)
def test_every_way_to_give_an_image(part):
    """An image comes as a URL object, a URL, or base64 under one of its names."""
    assert parts(part)[0].media == MediaRef("image", f"data:image/png;base64,{PIXEL}")


def test_every_way_to_give_a_video():
    """A video comes as a URL, as base64, or as a list of frames."""
    frames = f"data:video/jpeg;base64,{PIXEL},{PIXEL}"
    assert parts({"type": "video_url", "video_url": {"url": frames}})[0].media.url == frames
    assert parts({"type": "input_video", "video": PIXEL})[0].media.kind == "video"
    web = {"type": "video_url", "video_url": {"url": "https://host/v.mp4"}}
    assert parts(web)[0].media.url == "https://host/v.mp4"


def test_the_digest_is_of_the_meaning():
    """Key order, streaming and the session's id are no part of what is generated."""
    one = parse_chat({"messages": [{"role": "user", "content": "hi"}], "top_p": 0.5}, SETTINGS)
    two = parse_chat(
        {"stream": True, "top_p": 0.5, "messages": [{"content": "hi", "role": "user"}]}, SETTINGS
    )
    assert one.digest == two.digest
    assert one.digest != chat(top_p=0.6).digest
    assert chat(seed=0).digest != chat().digest


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"modalities": 5}, "modalities"),
        ({"modalities": True}, "modalities"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 9}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"top_k": 2**70}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids[0]"),
        ({"stop_token_ids": list(range(1025))}, "stop_token_ids"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_usage": 5}}, "stream_options.include_usage"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"session_id": "a:b"}, "session_id"),
        ({"session_id": "x" * 129}, "session_id"),
    ],
)
def test_bad_values_are_400_and_name_the_parameter(fields, param):
    """What is out of range or of the wrong type is refused by name."""
    with pytest.raises(UnbrokenError) as caught:
        chat(**fields)
    assert (caught.value.kind.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"functions": [{}]}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {"a": 1}}, "web_search_options"),
        ({"chat_template": "{{x}}"}, "chat_template"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields, param):
    """A field that would change the answer is a 400, never silently dropped."""
    with pytest.raises(UnbrokenError) as caught:
        chat(**fields)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)


@pytest.mark.parametrize(
    ("part", "code", "param"),
    [
        ({"type": "input_audio"}, "unsupported_parameter", ""),
        ({"type": "file"}, "unsupported_parameter", ""),
        ({"type": "hologram"}, "invalid_value", ".type"),
        ({"type": []}, "invalid_value", ".type"),
        ({"type": {}}, "invalid_value", ".type"),
        ({"type": "text"}, "invalid_value", ".text"),
        ({"type": "image_url", "image_url": {}}, "invalid_value", ".image_url"),
        ({"type": "image_url", "image_url": "file:///etc/passwd"}, "invalid_value", ".image_url"),
        ({"type": "image_url", "image_url": "data:text/html,x"}, "invalid_media", ".image_url"),
        (
            {"type": "image_url", "image_url": "data:image/png;base64,@@@"},
            "invalid_media",
            ".image_url",
        ),
        ({"type": "input_video", "data": "data:video/mp4;base64,"}, "invalid_media", ".video_url"),
    ],
)
def test_bad_parts_are_400_and_say_where(part, code, param):
    """A bad content part is refused by its place in the conversation."""
    with pytest.raises(UnbrokenError) as caught:
        parts(part)
    assert (caught.value.code, caught.value.param) == (code, f"messages[0].content[0]{param}")


def test_ignored_fields_and_unknown_keys_pass():
    """Fields documented as ignored change nothing."""
    plain = chat()
    noisy = chat(
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
        verbosity="low",
        whatever=1,
    )
    assert plain.digest == noisy.digest
    url = f"data:image/png;base64,{PIXEL}"
    exact, rough = (
        parts({"type": "image_url", "image_url": {"url": url, **more}})
        for more in ({"detail": "high"}, {})
    )
    assert exact == rough


def test_text_comes_under_either_name():
    """A text part is the same as `text` and as `input_text`, and as the content itself."""
    whole = chat(messages=[{"role": "user", "content": "hi"}]).generation.messages[0].parts
    assert parts({"type": "text", "text": "hi"}) == whole
    assert parts({"type": "input_text", "text": "hi"}) == whole


def test_logit_bias_is_part_of_the_digest_whatever_its_order():
    """Token biases count in a request's meaning, in any order."""
    one = chat(logit_bias={"5": 1, "10": -2})
    two = chat(logit_bias={"10": -2, "5": 1})
    assert one.digest == two.digest != chat(logit_bias={"5": 1}).digest
    assert one.generation.sampling.logit_bias == {5: 1.0, 10: -2.0}


def test_an_error_names_no_endless_parameter():
    """A key of a hundred kilobytes does not come back in the error."""
    with pytest.raises(UnbrokenError) as caught:
        chat(logit_bias={"k" * 100_000: "y"})
    assert len(str(caught.value.body())) < 8000
