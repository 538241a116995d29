"""Trains the demo model on one CPU core, in a few minutes, from a fixed seed.

Torch is imported inside the functions, so that importing this module stays cheap.
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
from worker.demo_weights import initialize

if TYPE_CHECKING:
    import torch

STEPS = 700
KINDS: tuple[corpus.Kind, ...] = (
    *("count", "image", "count", "video"),
    *("count", "talk", "count", "video"),
)
ROUNDS = 4
ROUND_STEPS = 80
LEARNING_RATE = 3e-3
WARM_UP = 20  # steps
STOP_WEIGHT = 2.0  # where to stop is one token of many

Report = Callable[[int, int], None]
"""Hears of steps done, and of all there are."""


def train(
    model: Any,
    processor: Any,
    report: Report,
    *,
    seed: int,
    steps: int = STEPS,
    rounds: int = ROUNDS,
) -> int:
    """Give the model new weights and train it, and after that until it passes its exam.

    Args:
        model: a Qwen3-VL of the demo's configuration.
        processor: its processor, with the chat template.
        report: is told after each step.
        seed: for the weights and the samples.
        steps: of the optimizer; each is a batch of one kind.
        rounds: of more steps at most, each on what the model still gets wrong.

    Returns:
        How many questions of the exam the model still gets wrong.
    """
    import torch

    total = steps + rounds * ROUND_STEPS
    with _deterministic(seed):
        initialize(model, processor.tokenizer)
        optimizer = torch.optim.AdamW(
            _groups(model), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        batches = Batches(processor, random.Random(seed))
        model.train()
        for step in range(steps):
            batch = batches.draw(KINDS[step % len(KINDS)])
            _learn(model, optimizer, batch, _main_pace(step, steps))
            report(step + 1, total)
        exam = Exam(processor)
        best, wrong = _weights(model), exam.wrong(model)
        for number in range(rounds):
            if not any(wrong.values()):
                break
            kinds = [*KINDS, *(kind for kind, count in wrong.items() for _ in range(count and 3))]
            for step in range(ROUND_STEPS):
                batch = batches.draw(kinds[step % len(kinds)])
                _learn(model, optimizer, batch, 0.15 * (1.05 - step / ROUND_STEPS))
                report(steps + number * ROUND_STEPS + step + 1, total)
            now = exam.wrong(model)
            if sum(now.values()) <= sum(wrong.values()):
                best, wrong = _weights(model), now
        model.load_state_dict(best)
        model.eval()
        report(total, total)
    return sum(wrong.values())


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _learn(model: Any, optimizer: torch.optim.Optimizer, batch: Batch, pace: float) -> None:
    """Take one step; `pace` is the share of the learning rate."""
    import torch

    for group in optimizer.param_groups:
        group["lr"] = group["pace"] * LEARNING_RATE * pace
    loss = batch.loss(model)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _groups(model: Any) -> list[dict[str, Any]]:
    """Let what has been written change slowly: full steps would wash it out before it is used."""
    written = [
        parameter
        for layer in model.model.language_model.layers[:2]
        for parameter in layer.self_attn.parameters()
    ]
    embedding = model.get_input_embeddings().weight
    slow = {id(parameter) for parameter in (*written, embedding)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in slow]
    return [
        {"params": rest, "pace": 1.0},
        {"params": [embedding], "pace": 0.3},
        {"params": written, "pace": 0.1},
    ]


def _main_pace(step: int, steps: int) -> float:
    decay = 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2
    return decay * min(1.0, (step + 1) / WARM_UP)


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


class ProgressBar:
    """Shows on stdout how far work has come: a bar on a terminal, else a line now and then."""

    WIDTH = 30
    LINE_SECONDS = 5.0

    def __init__(self, what: str) -> None:
        self._what, self._began, self._said = what, time.monotonic(), 0.0
        self._on_terminal, self._ended = sys.stdout.isatty(), False

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` steps out of `total` are done."""
        now = time.monotonic()
        if self._ended:
            return
        self._ended = done == total
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
        rows = {"talk": 10, "image": 8, "video": 6}[kind]
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
        for _ in range(max(2, 600 // (2 * middle + 40))):
            length = min(corpus.COUNTS_TO, max(1, round(middle * draw.uniform(0.8, 1.1))))
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


class Exam:
    """Questions that the model must answer rightly: all counts, and unseen images, videos, talk.

    Args:
        processor: with a tokenizer and the chat template.
    """

    EACH = 40  # unseen samples of each other kind

    def __init__(self, processor: Any) -> None:
        draw = random.Random(0)
        self._batches = Batches(processor, draw)
        counts = [corpus.count(draw, 1, last) for last in range(1, corpus.COUNTS_TO + 1)]
        self._samples: dict[corpus.Kind, list[Sample]] = {
            "count": counts,
            "image": [corpus.image(draw) for _ in range(self.EACH)],
            "video": [corpus.video(draw) for _ in range(self.EACH)],
            "talk": [corpus.talk(draw) for _ in range(self.EACH)],
        }

    def wrong(self, model: Any) -> dict[corpus.Kind, int]:
        """Return how many replies of each kind greedy decoding would not give exactly."""
        model.eval()
        wrong: dict[corpus.Kind, int] = {}
        for kind, samples in self._samples.items():
            parts = [samples[at : at + 8] for at in range(0, len(samples), 8)]
            right = [self._batches.collate(part).right(model) for part in parts]
            wrong[kind] = sum(row.count(False) for row in right)
        model.train()
        return wrong
