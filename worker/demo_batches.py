"""Makes batches of the demo model's samples, and the exam that it is to pass.

Torch is imported inside the functions, so that importing this module stays cheap.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from worker import demo_corpus as corpus
from worker.demo_corpus import Sample

if TYPE_CHECKING:
    import torch

# Of one token of many: where to stop, what was seen, and whether there is more to be seen.
STOP_WEIGHT, COLOUR_WEIGHT, AFTER_COLOUR_WEIGHT = 2.0, 4.0, 3.0


class Batch:
    """Input of the model, and for each place the token that is to come there (-100: any)."""

    def __init__(self, inputs: dict[str, Any], labels: torch.Tensor, weights: torch.Tensor) -> None:
        self.inputs, self.labels, self._weights = inputs, labels, weights

    def loss(self, model: Any) -> torch.Tensor:
        """Return the mean cross-entropy of the replies' tokens."""
        import torch

        logits, wanted = self._predict(model)
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        weights = self._weights[:, 1:][self.labels[:, 1:] != -100]
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
        import torch

        self._processor, self._tokenizer, self._draw = processor, processor.tokenizer, draw
        names = list(corpus.COLOUR_TOKENS)
        self._colours = torch.tensor(self._tokenizer.convert_tokens_to_ids(names))

    def draw(self, kind: corpus.Kind) -> Batch:
        """Return a batch of one kind, of about as many tokens as all others."""
        draw = self._draw
        if kind == "count":
            return self.collate(self._counts())
        rows = {"talk": 10, "image": 8, "video": 6}[kind]
        samples = [getattr(corpus, kind)(draw) for _ in range(rows)]
        if kind == "image":
            samples[0] = corpus.image_again(draw)
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
        return Batch(dict(inputs), labels, self._weigh(labels))

    def _weigh(self, labels: torch.Tensor) -> torch.Tensor:
        import torch

        colours = torch.isin(labels, self._colours)
        weights = torch.where(labels == self._tokenizer.eos_token_id, STOP_WEIGHT, 1.0)
        weights[colours] = COLOUR_WEIGHT
        weights[:, 1:][colours[:, :-1]] = AFTER_COLOUR_WEIGHT
        return weights

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
            "image": [
                *(corpus.image(draw) for _ in range(self.EACH * 4 // 5)),
                *(corpus.image_again(draw) for _ in range(self.EACH // 5)),
            ],
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
