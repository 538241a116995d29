"""What the stack streams equals what the unmodified model generates."""

import asyncio

import pytest
from openai import AsyncOpenAI

from tests.media_samples import encode, encode_video, movie, picture
from tests.oracle import Oracle, image_part, text_part, video_part

RED, GREEN = picture(), picture(300, 40, (0, 200, 0))


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


CASES = {
    "text": (user(text_part("Hello there, who are you?")), 40),
    "conversation": (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One and two?"},
            {"role": "assistant", "content": "Three."},
            {"role": "user", "content": "Why? Ünïcode ✓ too."},
        ],
        25,
    ),
    "png": (user(image_part(encode(RED)), text_part("What is this?")), 30),
    "jpeg and webp": (
        user(
            image_part(encode(RED, "JPEG"), "image/jpeg"),
            text_part("and"),
            image_part(encode(GREEN, "WEBP"), "image/webp"),
            text_part("differ?"),
        ),
        35,
    ),
    "mp4": (user(video_part(encode_video(movie(24))), text_part("What moves?")), 20),
    "webm": (
        user(video_part(encode_video(movie(40), "webm"), "video/webm"), text_part("And here?")),
        33,
    ),
    "image and video": (
        user(
            text_part("Compare"),
            image_part(encode(GREEN)),
            video_part(encode_video(movie(5), fps=2)),
        ),
        15,
    ),
    "long": (user(text_part("Tell me a long story. " * 20)), 60),
}


@pytest.fixture(scope="module")
def oracle(demo_model):
    return Oracle(str(demo_model))


@pytest.fixture(scope="module")
def truth(oracle):
    """What the model says to each case: reasoning, answer, number of tokens."""
    return {
        name: oracle.greedy(messages, max_tokens) for name, (messages, max_tokens) in CASES.items()
    }


@pytest.fixture
async def client(stack):
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def streamed(client, messages, max_tokens, **options):
    """Stream a completion; returns reasoning, answer and the number of tokens."""
    options = {"temperature": 0, **options}
    stream = await client.chat.completions.create(
        model="any",
        messages=messages,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        **options,
    )
    reasoning, content, tokens = "", "", 0
    async for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
    return reasoning, content, tokens


@pytest.mark.parametrize("name", CASES)
async def test_greedy_text_equals_generate(client, truth, name):
    """A greedy stream gives the tokens of `generate()` on the same processor output."""
    assert await streamed(client, *CASES[name]) == truth[name]


async def test_greedy_text_is_the_same_while_requests_join_and_leave(client, truth):
    """Eight requests of all kinds and lengths at once, joining at different steps, stay right."""

    async def later(position, name):
        await asyncio.sleep(0.03 * position)  # join while others decode
        return await streamed(client, *CASES[name])

    answers = await asyncio.gather(*(later(i, name) for i, name in enumerate(CASES)))
    assert dict(zip(CASES, answers, strict=True)) == truth


async def test_one_seed_gives_one_text_alone_and_in_a_batch(client):
    """A sampled text depends on its seed, not on what else is in the batch; seeds differ."""
    messages, _ = CASES["png"]
    options = {"temperature": 1.2, "top_p": 0.95, "extra_body": {"top_k": 50}}
    alone = [await streamed(client, messages, 24, seed=s, **options) for s in (1, 2)]
    together = await asyncio.gather(
        *(streamed(client, messages, 24, seed=1 + i % 2, **options) for i in range(8))
    )
    assert together == alone * 4
    assert alone[0] != alone[1]


async def test_choices_have_seeds_of_their_own(client):
    """With n = 3 each choice is another text, and the first is what n = 1 gives."""
    options = {"temperature": 1.2, "seed": 7, "max_tokens": 16, "model": "any"}
    options["extra_body"] = {"ignore_eos": True}
    messages, _ = CASES["text"]
    three = await client.chat.completions.create(messages=messages, n=3, **options)
    one = await client.chat.completions.create(messages=messages, **options)

    def text(choice):
        return choice.message.reasoning_content, choice.message.content

    assert len({text(c) for c in three.choices}) == 3
    assert text(three.choices[0]) == text(one.choices[0])
    assert three.usage.completion_tokens == 48
