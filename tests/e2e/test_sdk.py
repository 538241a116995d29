"""The official SDK, with strict response validation, against real gateway and worker processes."""

import openai
import pytest
from openai import OpenAI

from tests.media_samples import encode, picture
from tests.oracle import image_part, text_part


@pytest.fixture
def client(stack):
    with OpenAI(
        base_url=f"{stack.url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


TEXT = [{"role": "user", "content": "Hello!"}]
IMAGE = [
    {"role": "user", "content": [image_part(encode(picture())), text_part("What colour is it?")]}
]


@pytest.mark.parametrize("messages", [TEXT, IMAGE], ids=["text", "image"])
def test_completion_passes_strict_validation(client, messages):
    """A whole completion has every field the SDK's types demand, and counts that add up."""
    completion = client.chat.completions.create(
        model="any", messages=messages, max_tokens=12, seed=3
    )
    usage = completion.usage
    assert completion.choices[0].finish_reason in ("stop", "length")
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 1 <= usage.completion_tokens <= 12
    assert completion.system_fingerprint.startswith("fp_")


@pytest.mark.parametrize("messages", [TEXT, IMAGE], ids=["text", "image"])
def test_stream_passes_strict_validation_and_gives_the_completion(client, messages):
    """The streamed chunks, joined by the SDK's own helper, equal the whole completion."""
    request = {"model": "any", "messages": messages, "max_tokens": 12, "seed": 3}
    whole = client.chat.completions.create(**request)
    with client.chat.completions.stream(**request) as stream:
        for _event in stream:
            pass
        final = stream.current_completion_snapshot
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason


def test_visual_tokens_count_in_the_usage(client):
    """An image costs prompt tokens."""
    with_image, without = (
        client.chat.completions.create(model="any", messages=messages, max_tokens=1)
        for messages in (IMAGE, [{"role": "user", "content": "What colour is it?"}])
    )
    assert with_image.usage.prompt_tokens > without.usage.prompt_tokens + 2


def test_models_are_listed_and_found(client):
    """The SDK lists the model and retrieves it by its id, slashes and all."""
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id


def test_an_error_is_the_sdks_own_exception_streaming_or_not(client):
    """A bad request raises BadRequestError; a failure after the headers raises APIError."""
    broken = [{"role": "user", "content": [image_part(b"this is no picture")]}]
    with pytest.raises(openai.BadRequestError) as whole:
        client.chat.completions.create(model="any", messages=broken)
    assert (whole.value.code, whole.value.param) == ("invalid_media", "messages[0].content[0]")
    stream = client.chat.completions.create(model="any", messages=broken, stream=True)
    with pytest.raises(openai.APIError) as streamed:
        list(stream)
    assert streamed.value.body["code"] == "invalid_media"
