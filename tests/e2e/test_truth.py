"""The trained demo model tells the truth: through `generate()`, and word for word in a stream."""

import random

import numpy as np
import pytest
from openai import AsyncOpenAI

import run
from tests.conftest import TEST_ENV
from tests.media_samples import encode, encode_video
from tests.oracle import Oracle, image_part, text_part, video_part
from tests.page_kit import CHROMIUM, browser_context, count_through_kills, text_of
from tests.stack import Stack
from worker.demo_corpus import COLOURS

COUNTS = (5, 10, 20, 50, 100, 200)
SIZES = ((64, 64), (320, 60), (50, 400), (33, 47), (256, 256))
FULL_SPEED = {"MAX_STEPS_PER_SECOND": "0"}
LENGTH = 460  # tokens: a count to 200 takes 399, and its thought a dozen


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def plain(name, number, size):
    """Draw an image of one colour with noise; the last shade of each colour."""
    noise = np.random.default_rng(number).normal(0, 12, (*size, 3))
    return np.clip(np.array(COLOURS[name][-1]) + noise, 0, 255).astype(np.uint8)


def counted(last):
    return f"I count from 1 to {last}.", ", ".join(map(str, range(1, last + 1)))


def image_cases():
    """Each colour once, in any size and aspect."""
    for number, name in enumerate(COLOURS):
        image = image_part(encode(plain(name, number, SIZES[number % len(SIZES)])))
        yield user(image, text_part("What colour is this image?")), f"The image is {name}."


def pair_cases():
    """25 ordered pairs of different colours."""
    draw = random.Random(1)
    for number in range(25):
        first, second = draw.sample(list(COLOURS), 2)
        images = [
            image_part(encode(plain(name, 50 + 2 * number + place, draw.choice(SIZES))))
            for place, name in enumerate((first, second))
        ]
        answer = f"The first is {first} and the second is {second}."
        yield user(*images, text_part("What colours are these images?")), answer


def video_cases():
    """A video of each colour, of any length."""
    draw = random.Random(2)
    for number, name in enumerate(COLOURS):
        frames = [plain(name, 100 * number + i, (64, 96)) for i in range(draw.randint(8, 16))]
        video = video_part(encode_video(frames, fps=8))
        answer = f"The video shows {name}."
        yield user(video, text_part("What colours does this video show?")), answer


def scene_cases(scenes):
    """25 videos of some scenes, of any length but two frames at least, of different colours."""
    draw = random.Random(scenes)
    for number in range(25):
        names, frames = draw.sample(list(COLOURS), scenes), draw.randint(8, 16)
        spare = frames - 2 * scenes
        cuts = sorted(draw.randint(0, spare) for _ in names[1:])
        changes = [cut + 2 * n for n, cut in enumerate(cuts, 1)]
        shown = [
            plain(names[sum(change <= i for change in changes)], 1000 + 50 * number + i, (64, 96))
            for i in range(frames)
        ]
        video = video_part(encode_video(shown, fps=draw.choice((2, 8))))
        answer = f"The video shows {', then '.join(names)}."
        yield user(video, text_part("What colours does this video show?")), answer


def later_cases():
    """A second image, after one that has been asked about before."""
    cases = list(image_cases())
    for (earlier, told), (later, answer) in zip(cases[:5], cases[5:], strict=True):
        yield [*earlier, {"role": "assistant", "content": told}, *later], answer


TALK = {
    "Hello!": "Hello! I am a tiny demo model.",
    "Who are you?": "I am the demo model of Unbroken",
    "What can you do?": "This is a demo. I can count up to 200",
    "What is the capital of France?": "I am only a tiny demo model",
}


@pytest.fixture(scope="module")
def oracle(truthful_model):
    return Oracle(str(truthful_model))


@pytest.mark.parametrize("last", COUNTS)
def test_it_counts_without_a_slip(oracle, last):
    """Exactly the numbers 1 to N, and a thought that names the end."""
    thought, answer, _ = oracle.greedy(user(text_part(f"Count from 1 to {last}.")), LENGTH)
    assert (thought.strip(), answer) == counted(last)


def wrong_answers(oracle, cases):
    asked = [(answer, oracle.greedy(messages, 40)[1]) for messages, answer in cases]
    return [(answer, said) for answer, said in asked if said != answer]


def test_it_sees_colours(oracle):
    """Ten of ten colours, of any size and aspect."""
    assert wrong_answers(oracle, image_cases()) == []


def test_it_sees_the_colour_of_a_video(oracle):
    """Ten of ten colours."""
    assert wrong_answers(oracle, video_cases()) == []


def test_it_tells_images_apart(oracle):
    """Both colours in their order for 25 of 25 pairs: swapped images would be plain."""
    assert wrong_answers(oracle, pair_cases()) == []


def test_it_sees_the_newer_image(oracle):
    """A second image in a chat is what the second question is about."""
    assert wrong_answers(oracle, later_cases()) == []


@pytest.mark.parametrize("scenes", [2, 3])
def test_it_sees_scenes_in_the_order_of_time(oracle, scenes):
    """All colours in the order of time for 23 of 25 videos at least."""
    assert len(wrong_answers(oracle, scene_cases(scenes))) <= 2


@pytest.mark.parametrize("question", TALK)
def test_it_says_that_it_is_a_demo(oracle, question):
    """Small talk has a fixed answer, and what it cannot know it does not invent."""
    thought, answer, _ = oracle.greedy(user(text_part(question)), 80)
    assert thought.strip()
    assert answer.startswith(TALK[question])


async def test_a_stream_says_the_same(oracle, truthful_model, tmp_path):
    """Through gateway, queue and engine: the same thoughts and answers, token for token."""
    cases = [user(text_part(f"Count from 1 to {last}.")) for last in (20, 200)]
    cases += [next(image_cases())[0], next(video_cases())[0], user(text_part("Hello!"))]
    with Stack(tmp_path / "data", model=run.DEMO_MODEL, env={**TEST_ENV, **FULL_SPEED}) as stack:
        async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
            for messages in cases:
                told = await client.chat.completions.create(
                    model="any", messages=messages, max_tokens=LENGTH, temperature=0
                )
                message = told.choices[0].message
                thought, answer, tokens = oracle.greedy(messages, LENGTH)
                assert message.content == answer
                assert message.reasoning_content.strip() == thought.strip()
                assert told.usage.completion_tokens == tokens


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
async def test_a_count_to_100_survives_the_visitor(tmp_path, truthful_model):
    """Worker and gateway are killed with the page's buttons; the text is 1, 2, … 100."""
    env = {"MAX_STEPS_PER_SECOND": "25"}
    with Stack(tmp_path / "data", workers=2, model=run.DEMO_MODEL, env=env) as stack:
        async with browser_context() as context:
            page = await context.new_page()
            await count_through_kills(page, stack)
            assert await text_of(page) == ", ".join(map(str, range(1, 101)))
            assert await text_of(page, ".thought p") == "I count from 1 to 100."
            marks = " ".join(await page.locator(".ticks b").all_text_contents())
            assert "took over" in marks
            assert "resumed after #" in marks
            assert "none lost, none twice" in await text_of(page, ".last")
