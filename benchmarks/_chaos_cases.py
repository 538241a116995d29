"""What the clients of the chaos run ask: text and images, greedy and seeded, n, penalties."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

from PIL import Image, ImageDraw

WORDS = ("river", "glass", "seven", "window", "orange", "quiet", "engine", "paper", "candle")

STYLES: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0, "frequency_penalty": 0.6, "presence_penalty": 0.3},
    {"temperature": 1.2, "repetition_penalty": 1.15, "frequency_penalty": 0.4},
    {"temperature": 0.9, "top_k": 40, "n": 2, "presence_penalty": 0.5},
    {"temperature": 1.0, "min_p": 0.02, "stop": ["the end", "\n\n\n\n"]},
)


def make_cases(count: int, max_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Return request bodies, every other one with an image; the same for the same arguments."""
    rng = random.Random(seed)
    return [_case(number, max_tokens, rng) for number in range(count)]


def kind(body: dict[str, Any]) -> str:
    """Describe a case in a few words, for the report."""
    with_image = isinstance(body["messages"][0]["content"], list)
    return f"{'image' if with_image else 'text'}, {'seeded' if body['temperature'] else 'greedy'}"


def _case(number: int, max_tokens: int, rng: random.Random) -> dict[str, Any]:
    question = f"Tell me about {' '.join(rng.sample(WORDS, 4))} ({number})."
    style = STYLES[number // 2 % len(STYLES)]
    choices = style.get("n", 1)
    content: Any = question
    if number % 2:
        picture = {"type": "image_url", "image_url": {"url": _picture(rng)}}
        content = [{"type": "text", "text": question}, picture]
    return {
        "messages": [{"role": "user", "content": content}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "max_tokens": max(8, int(max_tokens * rng.uniform(0.7, 1.3) / choices**0.5)),
        "seed": rng.randrange(2**31),
        **style,
    }


def _picture(rng: random.Random) -> str:
    """Draw coloured boxes; return them as a `data:` URL."""
    image = Image.new("RGB", (96, 64), tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        left, top = rng.randrange(70), rng.randrange(40)
        color = tuple(rng.randrange(256) for _ in range(3))
        draw.rectangle((left, top, left + 24, top + 20), fill=color)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
