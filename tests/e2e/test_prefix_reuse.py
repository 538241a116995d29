"""What a client sees of prompts that begin alike."""

import pytest
from openai import AsyncOpenAI

from tests.media_samples import encode, picture
from tests.oracle import Oracle, image_part, text_part


@pytest.fixture
async def client(stack):
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_question_about_the_same_picture_reports_cached_tokens(client, demo_model):
    """The picture's tokens are computed for the first question only; both answers are true."""
    shown = image_part(encode(picture(192, 192, (17, 99, 201))))
    oracle, cached = Oracle(str(demo_model)), []
    for question in ("What colour is the thing in the middle?", "What colour is the other thing?"):
        messages = [{"role": "user", "content": [shown, text_part(question)]}]
        answer = await client.chat.completions.create(
            model="any", messages=messages, max_tokens=12, temperature=0
        )
        reasoning, content, tokens = oracle.greedy(messages, 12)
        message = answer.choices[0].message
        assert (message.reasoning_content or "", message.content or "") == (reasoning, content)
        assert answer.usage.completion_tokens == tokens
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    first, second = cached
    assert first == 0
    assert 16 <= second < answer.usage.prompt_tokens
