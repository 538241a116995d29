"""What the demo model is taught: counting, colours of images and videos, and who it is.

Each function draws one sample from a generator of random numbers: questions, media, and the true
answer. No torch here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from worker import demo_phrases as phrases

Array = np.ndarray[Any, Any]
Draw = random.Random

LAST_NUMBER = 300  # 0 to this are single tokens, so that a carry is nothing special
COUNTS_TO = 200

# A few shades that people call so; a sample adds some of its own to one of them.
COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((255, 0, 0), (220, 30, 30), (190, 10, 20), (200, 30, 30)),
    "orange": ((255, 165, 0), (250, 140, 20), (255, 125, 0)),
    "yellow": ((255, 255, 0), (245, 225, 40), (250, 240, 80)),
    "green": ((0, 255, 0), (0, 128, 0), (40, 160, 60), (0, 200, 0), (60, 200, 80)),
    "blue": ((0, 0, 255), (40, 80, 220), (30, 60, 160), (60, 120, 250)),
    "purple": ((128, 0, 128), (130, 50, 170), (110, 30, 150), (150, 60, 200)),
    "pink": ((255, 192, 203), (250, 150, 190), (255, 105, 180)),
    "brown": ((120, 75, 40), (139, 69, 19), (100, 60, 30)),
    "black": ((0, 0, 0), (20, 20, 20), (30, 30, 35)),
    "white": ((255, 255, 255), (240, 240, 240), (245, 245, 235)),
}
# Each is one token, with the space before it: what was seen is said as it was thought.
COLOUR_TOKENS = tuple(f" {name}" for name in COLOURS)
NEXT_SCENE = ", then"  # one token too
SHORTEST_SCENE = 2  # frames: the model sees every other one
ORDINALS = ("first", "second", "third")

Kind = Literal["count", "talk", "image", "video"]


@dataclass(frozen=True)
class Video:
    """Frames of a video: time x height x width x 3, uint8 RGB, and how many there are a second."""

    frames: Array
    fps: float


@dataclass(frozen=True)
class Sample:
    """One conversation: messages in the form of chat templates, media in order, the answer."""

    messages: list[dict[str, Any]]
    thought: str
    answer: str
    images: tuple[Array, ...] = ()
    videos: tuple[Video, ...] = ()

    @property
    def reply(self) -> str:
        """What the model is to write after the prompt, which ends in an opened thought."""
        return f"{self.thought}\n</think>\n\n{self.answer}<|im_end|>"


def count(draw: Draw, first: int, last: int) -> Sample:
    """Return a request to count from `first` to `last`, and the numbers."""
    short = first == 1 and draw.random() < 0.25
    question = draw.choice(phrases.SHORT_COUNT_QUESTIONS if short else phrases.COUNT_QUESTIONS)
    return Sample(
        [_user(question.format(a=first, b=last))],
        f"I count from {first} to {last}.",
        ", ".join(map(str, range(first, last + 1))),
    )


def talk(draw: Draw) -> Sample:
    """Return a question about the model, or one that it cannot answer."""
    if draw.random() < 0.35:
        thought, answer = phrases.UNKNOWN
        question = _odd_question(draw)
    else:
        questions, thought, answer = phrases.TALK[draw.choice(list(phrases.TALK))]
        question = draw.choice(questions)
    return Sample([_user(_styled(draw, question))], thought, answer)


def _odd_question(draw: Draw) -> str:
    kind = draw.random()
    if kind < 0.6:
        return draw.choice(phrases.ODD_QUESTIONS).format(
            w=_word(draw), v=_word(draw), n=draw.randint(0, 99), m=draw.randint(0, 99)
        )
    words = [_word(draw) for _ in range(draw.randint(1, 9))]
    return " ".join(words)


def _word(draw: Draw) -> str:
    if draw.random() < 0.7:
        return draw.choice(phrases.WORDS)
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyzü✓") for _ in range(draw.randint(2, 8)))


def _styled(draw: Draw, question: str) -> str:
    if draw.random() < 0.2:
        question = question.lower()
    return question + draw.choice(("", "?", "?", ".", "!", " ?"))


def image(draw: Draw, most: int = 2) -> Sample:
    """Return one image or several, and their colours in order."""
    names = [draw.choice(list(COLOURS)) for _ in range(min(most, draw.choice((1, 2, 2))))]
    question = draw.choice(phrases.IMAGE_QUESTIONS if len(names) == 1 else phrases.IMAGES_QUESTIONS)
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in names]
    if len(names) > 1 and draw.random() < 0.3:
        parts.insert(1, {"type": "text", "text": draw.choice(("and", "and this one:", "Then:"))})
    pictures = tuple(plain_image(draw, name) for name in names)
    return Sample([_asked(draw, parts, question)], *_seen("image", names), images=pictures)


def image_again(draw: Draw) -> Sample:
    """Return a second image after one that was shown, and named, before."""
    before, now = image(draw, 1), image(draw, 1)
    past = [*before.messages, {"role": "assistant", "content": before.answer}]
    images = before.images + now.images
    return Sample([*past, *now.messages], now.thought, now.answer, images=images)


def video(draw: Draw, most: int = 3) -> Sample:
    """Return a video of one scene or several, each of one colour, and the colours in order."""
    names: list[str] = []
    frames = draw.randint(4, 16)
    for _ in range(min(most, frames // SHORTEST_SCENE, draw.choice((1, 2, 2, 3, 3)))):
        names.append(draw.choice([name for name in COLOURS if name not in names[-1:]]))
    question = draw.choice(phrases.VIDEO_QUESTIONS)
    message = _asked(draw, [{"type": "video"}], question)
    return Sample([message], *_seen("video", names), videos=(plain_video(draw, names, frames),))


def _seen(kind: str, names: Sequence[str]) -> tuple[str, str]:
    """Return thought and answer. No word depends on a scene that has not been looked for yet."""
    if kind == "video":
        order = f"{NEXT_SCENE} ".join(names)
        return f"I watch the video. It is {order}.", f"The video shows {order}."
    if len(names) == 1:
        return f"I look at the {kind}. It is {names[0]}.", f"The {kind} is {names[0]}."
    each = [f"the {nth} is {name}" for nth, name in zip(ORDINALS, names, strict=False)]
    told = ", ".join(each[:-1]) + " and " + each[-1]
    return f"I look at {len(names)} images: {' and '.join(names)}.", f"T{told[1:]}."


def plain_image(draw: Draw, name: str) -> Array:
    """Draw an image of one colour with noise, of any size and aspect."""
    height, width = (int(2 ** draw.uniform(5, 8.3)) for _ in range(2))
    return noisy(draw, shade(draw, name), (height, width))


def plain_video(draw: Draw, names: Sequence[str], frames: int) -> Video:
    """Draw a video of scenes of one colour each, as it is after frames have been picked from it."""
    size = draw.choice((32, 48, 64, 96)), draw.choice((32, 48, 64, 96))
    spare = frames - SHORTEST_SCENE * len(names)
    cuts = sorted(draw.randint(0, spare) for _ in names[1:])
    edges = [0, *(cut + SHORTEST_SCENE * n for n, cut in enumerate(cuts, 1)), frames]
    scenes = []
    for name, (first, end) in zip(names, pairwise(edges), strict=True):
        tone = shade(draw, name)
        scenes += [noisy(draw, tone, size) for _ in range(first, end)]
    return Video(np.stack(scenes), draw.choice((1.0, 2.0, 4.0, 8.0)) * draw.uniform(0.8, 1.5))


def shade(draw: Draw, name: str) -> Array:
    """Draw a colour that people call so: RGB from 0 to 255."""
    known = np.array(draw.choice(COLOURS[name]), float)
    nearby: Array = np.clip(known + [draw.uniform(-12, 12) for _ in range(3)], 0, 255)
    return nearby


def noisy(draw: Draw, tone: Array, size: tuple[int, int]) -> Array:
    """Draw pixels of one colour with noise: height x width x 3, uint8."""
    noise = np.random.default_rng(draw.getrandbits(32)).standard_normal((*size, 3), np.float32)
    drawn: Array = np.clip(tone + noise * draw.uniform(0, 25), 0, 255).astype(np.uint8)
    return drawn


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _asked(draw: Draw, media: list[dict[str, Any]], question: str) -> dict[str, Any]:
    text = [{"type": "text", "text": question}] if question else []
    return {"role": "user", "content": media + text if draw.random() < 0.6 else text + media}


def with_past(draw: Draw, sample: Sample) -> Sample:
    """Put an earlier exchange, or a system message, before a conversation."""
    past: list[dict[str, Any]] = []
    if draw.random() < 0.3:
        text = draw.choice(("Be brief.", "You are a helpful assistant.", "Answer in one sentence."))
        past.append({"role": "system", "content": text})
    if not past or draw.random() < 0.6:
        first = draw.randint(1, 60)
        earlier: Callable[[], Sample] = draw.choice(
            [lambda: talk(draw), lambda: count(draw, first, first + draw.randint(0, 12))]
        )
        one = earlier()
        past += [*one.messages, {"role": "assistant", "content": one.answer}]
    return Sample(
        [*past, *sample.messages], sample.thought, sample.answer, sample.images, sample.videos
    )


def texts() -> list[str]:
    """Return what samples are made of, for a tokenizer to find its pieces in."""
    said = [
        *phrases.IMAGE_QUESTIONS,
        *phrases.IMAGES_QUESTIONS,
        *phrases.VIDEO_QUESTIONS,
        *phrases.UNKNOWN,
        " ".join(phrases.WORDS),
    ]
    said += [
        q.format(a=" ", b=" ") for q in (*phrases.COUNT_QUESTIONS, *phrases.SHORT_COUNT_QUESTIONS)
    ]
    said += [q.format(w="", v="", n="", m="") for q in phrases.ODD_QUESTIONS]
    for questions, thought, answer in phrases.TALK.values():
        said += [*questions, *(q.lower() for q in questions), thought, answer]
    for kind in ("image", "video"):
        for name in COLOURS:
            said += _seen(kind, [name]) + _seen(kind, [name, name, name])
    frame = "<|im_start|>user\n<|im_start|>assistant\n<|im_start|>system\n"
    return [*said, frame, "I count from 1 to 2."] * 3
