"""Trains the demo model on one CPU core, in a few minutes, from a fixed seed.

Two things make it short. The circuit that copies from the prompt ("after the word that came before,
came this") is written into the first two layers instead of being waited for; and numbers begin as
points on circles, where "one more" is a rotation. Torch is imported inside the functions.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from worker import demo_corpus as corpus
from worker.demo_corpus import Sample

if TYPE_CHECKING:
    import torch

STEPS = 1200
KINDS: tuple[corpus.Kind, ...] = (
    *("count", "image", "count", "video"),
    *("count", "talk", "count", "video"),
)
LEARNING_RATE = 3e-3
WARM_UP = 20  # steps
DEVIATION = 0.1  # of the embeddings, to which the scale of the written circuit is fitted
CODE_DIMS = 48  # of the embeddings: a number's place on circles
CONSTANT = 127  # the embeddings' last dimension: the same in all tokens, for heads that see places
STOP_WEIGHT = 2.0  # where to stop is one token of many

Report = Callable[[int, int], None]
"""Hears of steps done, and of all there are."""


def train(model: Any, processor: Any, report: Report, *, seed: int, steps: int = STEPS) -> None:
    """Give the model new weights and train it.

    Args:
        model: a Qwen3-VL of the demo's configuration.
        processor: its processor, with the chat template.
        report: is told after each step.
        seed: for the weights and the samples.
        steps: of the optimizer; each is a batch of one kind.
    """
    import torch

    with _deterministic(seed):
        initialize(model, processor.tokenizer)
        optimizer = torch.optim.AdamW(
            model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        batches = Batches(processor, random.Random(seed))
        model.train()
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = _learning_rate(step, steps)
            loss = batches.draw(KINDS[step % len(KINDS)]).loss(model)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            report(step + 1, steps)
        model.eval()


def _learning_rate(step: int, steps: int) -> float:
    decay = 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2
    return LEARNING_RATE * decay * min(1.0, (step + 1) / WARM_UP)


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Seed torch, and use one thread: how sums are split over threads changes their last bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def initialize(model: Any, tokenizer: Any) -> None:
    """Draw the weights, place the numbers, and write the copying circuit."""
    import torch

    with torch.no_grad():
        model.init_weights()
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02)
            elif name.endswith("bias"):
                weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.normal_(0, DEVIATION)
        embedding[:, CONSTANT] = 6 * DEVIATION
        numbers = [str(number) for number in range(corpus.LAST_NUMBER + 1)]
        ids = tokenizer.convert_tokens_to_ids(numbers)
        code = torch.from_numpy(_on_circles(len(numbers))).to(embedding.dtype)
        embedding[ids, :CODE_DIMS] = code
        content = _write_copying(model)
        signs = torch.from_numpy(_far_apart(len(numbers), len(content))).to(embedding.dtype)
        embedding[ids] += (1.3 * DEVIATION * signs - embedding[ids] @ content.T) @ content


def _on_circles(count: int) -> np.ndarray[Any, Any]:
    """Place numbers on circles of 2.2 to 400 numbers round: count x `CODE_DIMS`."""
    periods = np.geomspace(2.2, 400, CODE_DIMS // 2)
    angles = 2 * np.pi * np.arange(count)[:, None] / periods
    return 1.4 * DEVIATION * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def _far_apart(count: int, length: int) -> np.ndarray[Any, Any]:
    """Return words of signs (count x length); any two differ in a third of their places."""
    words: list[int] = []
    for word in range(2**length):
        if all((word ^ other).bit_count() * 3 >= length for other in words):
            words.append(word)
            if len(words) == count:
                break
    bits = np.array(words)[:, None] >> np.arange(length) & 1
    return 2.0 * bits - 1.0


def _write_copying(model: Any) -> torch.Tensor:
    """Write an induction circuit into the first two layers.

    Layer 0: one head looks a token back, one two tokens back, by the rotary angle alone; each
    copies what it sees into directions of its own. Layer 1: a head looks for a place before
    which stood the present token, another for one two places behind the token before this one;
    both copy what they find. They match in the dimensions that the rotary embedding hardly turns,
    so that distance does not matter.
    """
    import torch

    config = model.config.text_config
    size, head = config.hidden_size, config.head_dim
    half = head // 2
    first, second = (layer.self_attn for layer in model.model.language_model.layers[:2])
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    content = _directions(head, range(CODE_DIMS, CONSTANT), size)
    seen = _directions(2 * head, range(CONSTANT), size)
    copied = _directions(2 * head, range(CONSTANT), size)
    fast, slow = 3, [*range(7, half), *range(half + 7, head)]

    first.q_norm.weight.fill_(1.9)
    first.k_norm.weight.fill_(1.9)
    first.k_proj.weight[:head] *= 0.1
    first.q_proj.weight[: 2 * head] *= 0.1
    amplitudes = torch.zeros(half)
    amplitudes[:fast] = torch.tensor([0.7, 0.55, 0.45])
    first.k_proj.weight[:half, CONSTANT] = amplitudes
    for number, distance in enumerate((1, 2)):
        rows = first.q_proj.weight[number * head : (number + 1) * head]
        rows[:half, CONSTANT] = amplitudes * torch.cos(frequencies * distance)
        rows[half:, CONSTANT] = -amplitudes * torch.sin(frequencies * distance)
    first.v_proj.weight[:head] = content
    first.o_proj.weight[:, : 2 * head] = 2 * DEVIATION * seen.T

    second.q_norm.weight.fill_(1.6)
    second.k_norm.weight.fill_(1.6)
    second.k_proj.weight *= 0.1
    for group, wanted in ((0, content), (1, seen[:head])):
        rows = second.q_proj.weight[2 * group * head : (2 * group + 1) * head]
        rows *= 0.1
        rows[slow] = wanted[: len(slow)]
        second.k_proj.weight[group * head :][slow] = seen[group * head :][: len(slow)]
        values = copied[group * head : (group + 1) * head]
        second.v_proj.weight[group * head : (group + 1) * head] = values
        second.o_proj.weight[:, 2 * group * head : (2 * group + 1) * head] = (
            3 * DEVIATION * values.T
        )
    return content[: len(slow)]


def _directions(count: int, dims: Sequence[int], size: int) -> torch.Tensor:
    """Return orthonormal directions (count x size) within some dimensions."""
    import torch

    found = torch.zeros(count, size)
    found[:, list(dims)] = torch.linalg.qr(torch.randn(len(dims), count))[0].T
    return found


class ProgressBar:
    """Shows on stdout how far work has come: a bar on a terminal, else a line now and then."""

    WIDTH = 30
    LINE_SECONDS = 5.0

    def __init__(self, what: str) -> None:
        self._what, self._began, self._said = what, time.monotonic(), 0.0
        self._on_terminal = sys.stdout.isatty()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` steps out of `total` are done."""
        now = time.monotonic()
        if done < total and now - self._said < (0.2 if self._on_terminal else self.LINE_SECONDS):
            return
        self._said = now
        left = (now - self._began) / done * (total - done)
        news = f"{self._what}: {done * 100 // total} %, {left:.0f} s left"
        if self._on_terminal:
            full = self.WIDTH * done // total
            bar = "█" * full + "░" * (self.WIDTH - full)
            print(f"\r{bar} {news}  ", end="\n" if done == total else "", flush=True)
        else:
            print(news, flush=True)


class Batch:
    """Input of the model, and for each place the token that is to come there (-100: any)."""

    def __init__(self, inputs: dict[str, Any], labels: torch.Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def loss(self, model: Any) -> torch.Tensor:
        """Return the mean cross-entropy of the replies' tokens."""
        import torch

        logits, wanted = self._predict(model)
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        end = model.config.text_config.eos_token_id
        weights = torch.where(wanted == end, STOP_WEIGHT, 1.0)
        return (losses * weights).sum() / weights.sum()

    def right(self, model: Any) -> list[bool]:
        """Tell for each row whether greedy decoding gives exactly its reply."""
        import torch

        with torch.no_grad():
            logits, wanted = self._predict(model)
        wrong = torch.zeros_like(self.labels[:, 1:], dtype=torch.bool)
        wrong[self.labels[:, 1:] != -100] = logits.argmax(-1) != wanted
        return [not row for row in wrong.any(1).tolist()]

    def _predict(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model.model(**self.inputs).last_hidden_state[:, :-1]
        asked = self.labels[:, 1:] != -100
        return model.lm_head(hidden[asked]), self.labels[:, 1:][asked]


class Batches:
    """Draws batches.

    Args:
        processor: with a tokenizer and the chat template.
        draw: where all randomness comes from.
    """

    def __init__(self, processor: Any, draw: random.Random) -> None:
        self._processor, self._tokenizer, self._draw = processor, processor.tokenizer, draw
        self._end = self._tokenizer.eos_token_id

    def draw(self, kind: corpus.Kind) -> Batch:
        """Return a batch of one kind, of about as many tokens as all others."""
        draw = self._draw
        if kind == "count":
            return self.collate(self._counts())
        rows = {"talk": 16, "image": 12, "video": 8}[kind]
        samples = [getattr(corpus, kind)(draw) for _ in range(rows)]
        if kind != "video":
            samples = [corpus.with_past(draw, s) if draw.random() < 0.15 else s for s in samples]
        return self.collate(samples)

    def _counts(self) -> list[Sample]:
        """Draw counts of about one length: mostly short ones from anywhere, some long ones."""
        draw = self._draw
        low, high = draw.choice(((2, 12), (2, 12), (10, 60), (50, corpus.COUNTS_TO)))
        middle = draw.randint(low, high)
        samples = []
        for _ in range(max(2, 800 // (2 * middle + 40))):
            length = min(corpus.COUNTS_TO, max(2, round(middle * draw.uniform(0.8, 1.1))))
            from_one = draw.random() < (0.6 if middle > 12 else 0.25)
            first = 1 if from_one else draw.randint(1, corpus.COUNTS_TO + 1 - length)
            samples.append(corpus.count(draw, first, first + length - 1))
        return [corpus.with_past(draw, s) if draw.random() < 0.1 else s for s in samples]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Make one batch, padded on the right; only the replies are to be learnt."""
        import torch

        media: dict[str, Any] = {}
        if any(sample.images for sample in samples):
            media["images"] = [list(sample.images) for sample in samples]
        if any(sample.videos for sample in samples):
            media["videos"] = [[_frames(video) for video in s.videos] for s in samples]
            media["video_metadata"] = [[_metadata(video) for video in s.videos] for s in samples]
            media["do_sample_frames"] = False
        inputs = self._processor(
            text=[self._prompt(sample) + sample.reply for sample in samples],
            padding=True,
            padding_side="right",
            return_tensors="pt",
            **media,
        )
        lengths = inputs.pop("attention_mask").sum(1).tolist()  # causal: nothing sees the padding
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            reply = self._tokenizer.encode(sample.reply)
            labels[row, length - len(reply) : length] = torch.tensor(reply)
        return Batch(dict(inputs), labels)

    def _prompt(self, sample: Sample) -> str:
        text: str = self._processor.apply_chat_template(
            sample.messages, add_generation_prompt=True, tokenize=False
        )
        return text


def _frames(video: corpus.Video) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(video.frames.transpose(0, 3, 1, 2)))


def _metadata(video: corpus.Video) -> dict[str, Any]:
    count, height, width, _ = video.frames.shape
    return {
        "total_num_frames": count,
        "fps": video.fps,
        "frames_indices": list(range(count)),
        "height": height,
        "width": width,
        "duration": count / video.fps,
    }
