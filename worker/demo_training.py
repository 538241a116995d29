"""Trains the demo model on one CPU core, in a few minutes, from a fixed seed.

Torch is imported inside the functions, so that importing this module stays cheap.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from worker import demo_corpus as corpus
from worker.demo_batches import Batches, Exam
from worker.demo_vision import learn_colours
from worker.demo_weights import initialize, writers, written

if TYPE_CHECKING:
    import torch

    from worker.demo_batches import Batch

STEPS = 440
KINDS: tuple[corpus.Kind, ...] = (
    *("count", "video", "image", "count", "video"),
    *("talk", "count", "video", "image", "video"),
)
ROUNDS = 3
ROUND_STEPS = 80
LEARNING_RATE = 3e-3
WARM_UP = 20  # steps
CIRCUIT_PACE = 0.1  # of the learning rate, where the circuit was written

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
    total = steps + rounds * ROUND_STEPS
    with _deterministic(seed):
        reserved = initialize(model, processor.tokenizer)
        learn_colours(model, processor.tokenizer, random.Random(seed))
        optimizer, circuit = _optimizer(model), _Circuit(model, reserved)
        batches = Batches(processor, random.Random(seed))
        model.train()
        for step in range(steps):
            batch = batches.draw(KINDS[step % len(KINDS)])
            _learn(model, optimizer, circuit, batch, _main_pace(step, steps))
            report(step + 1, total)
        exam = Exam(processor)
        best, wrong = _weights(model), exam.wrong(model)
        for number in range(rounds):
            if not any(wrong.values()):
                break
            kinds = [*KINDS, *(kind for kind, count in wrong.items() for _ in range(count and 3))]
            for step in range(ROUND_STEPS):
                batch = batches.draw(kinds[step % len(kinds)])
                _learn(model, optimizer, circuit, batch, 0.15 * (1.05 - step / ROUND_STEPS))
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


def _learn(
    model: Any, optimizer: torch.optim.Optimizer, circuit: _Circuit, batch: Batch, pace: float
) -> None:
    """Take one step; `pace` is the share of the learning rate."""
    import torch

    for group in optimizer.param_groups:
        group["lr"] = group["pace"] * LEARNING_RATE * pace
    loss = batch.loss(model)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with circuit.held_back():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _optimizer(model: Any) -> torch.optim.Optimizer:
    """Let what has a meaning already change slowly: the embeddings, and what patches become."""
    import torch

    embedding = model.get_input_embeddings().weight
    visual = list(model.model.visual.parameters())
    slow = {id(parameter) for parameter in (embedding, *visual)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in slow], "pace": 1.0},
        {"params": [embedding], "pace": 0.3},
        {"params": visual, "pace": 0.1},
    ]
    return torch.optim.AdamW(
        groups, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )


class _Circuit:
    """Holds back what has been written: full steps would wash it out before it is used.

    Only there: the heads beside it learn at the full rate, as all else does. But nothing learns to
    write in the directions that its heads read: what others add there is noise to them.
    """

    def __init__(self, model: Any, reserved: torch.Tensor) -> None:
        self._parts, self._writers, self._reserved = written(model), writers(model), reserved
        self._words = model.get_input_embeddings().weight

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Take back most of a step of the optimizer, where the circuit lies or reads."""
        import torch

        keep = self._reserved
        with torch.no_grad():
            before = [parameter.clone() for parameter, _ in self._parts]
            writers = [parameter.clone() for parameter in self._writers]
            yield
            for (parameter, where), old in zip(self._parts, before, strict=True):
                parameter.lerp_(old, (1 - CIRCUIT_PACE) * where)
            for parameter, old in zip(self._writers, writers, strict=True):
                step = parameter - old
                if parameter is self._words:
                    parameter.sub_(step @ keep.T @ keep)
                else:
                    parameter.sub_(keep.T @ (keep @ step))


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
