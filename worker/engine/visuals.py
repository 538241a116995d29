"""What a prompt's images and videos are to the text model, so that it can be computed in pieces.

The encoder's outputs and all tokens' positions are known beforehand; each piece takes the slice
that belongs to its placeholders. The encoder runs in a thread of its own, beside the steps.
"""

from __future__ import annotations

import inspect
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from worker.engine.encoder_cache import PIXELS, EncoderCache
from worker.engine.sequence import Sequence

log = logging.getLogger("unbroken.engine")

KINDS = {"image": 1, "video": 2}
"""How `mm_token_type_ids` names what stands behind a placeholder."""
PATIENCE_SECONDS = 60
"""For so long a prompt waits for its encoder beside the steps; then the steps wait for it."""

UNMATCHED = "a prompt's placeholders do not match its media"

Outputs = dict[str, ModelOutput]


@dataclass(frozen=True)
class Features:
    """What the encoder made of all media of one kind, or of a slice of their placeholders.

    `tensors` are `[n, width]` each: what takes the placeholders' place, then what is added in
    deeper layers.
    """

    form: type[ModelOutput]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, output: ModelOutput) -> Features:
        """Read an encoder's output.

        Raises:
            ValueError: it has no rows for placeholders.
        """
        parts = [output.get("pooler_output"), *(output.get("deepstack_features") or ())]
        if parts[0] is None:
            raise ValueError("an encoder's output has no rows for placeholders")
        whole = [part if isinstance(part, Tensor) else torch.cat(list(part)) for part in parts]
        return cls(type(output), tuple(whole))

    def like(self, tensors: list[Tensor]) -> Features:
        """Return others of the same form."""
        return Features(self.form, tuple(tensors))

    def between(self, first: int, last: int) -> Features:
        """Return those of some placeholders."""
        return self.like([tensor[first:last] for tensor in self.tensors])

    def output(self) -> ModelOutput:
        """Return what the model takes as the output of its encoder."""
        pooled, *deep = self.tensors
        more = {"deepstack_features": [(tensor,) for tensor in deep]} if deep else {}
        return self.form(pooler_output=(pooled,), **more)


class Visuals:
    """The media of one prompt.

    Args:
        positions: of all its tokens for the model, `[3, 1, L]`.
        delta: what is added to the place of a later token.
        kinds: of each token, 0 for text.
        encoded: what the encoders make of its media.
    """

    def __init__(
        self,
        positions: Tensor,
        delta: int,
        kinds: npt.NDArray[np.int64],
        encoded: Future[Outputs],
    ) -> None:
        self.positions, self.delta, self.encoded = positions, delta, encoded
        self._kinds = kinds
        self._since: float | None = None  # when somebody first asked whether it is ready
        self._features: dict[str, Features] | None = None

    @property
    def first(self) -> int:
        """The place of the first placeholder."""
        return int(np.flatnonzero(self._kinds)[0])

    @property
    def ready(self) -> bool:
        """Whether the encoders are done, or so late that the steps wait for them."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        return self.encoded.done() or now - self._since > PATIENCE_SECONDS

    @property
    def failed(self) -> bool:
        """Whether an encoder has raised."""
        encoded = self.encoded
        return encoded.done() and (encoded.cancelled() or encoded.exception() is not None)

    def features(self, start: int, end: int) -> dict[str, Features]:
        """Return what stands for the placeholders between two places; wait for it, if need be.

        Raises:
            ValueError: there are more or fewer placeholders than the encoder has made rows for.
            Exception: whatever the encoder raises for bad tensors.
        """
        if not self._kinds[start:end].any():
            return {}
        if self._features is None:
            outputs = self.encoded.result()
            self._features = {kind: Features.of(output) for kind, output in outputs.items()}
            self._check(self._features)
        return {
            kind: self._features[kind].between(*(int((part == number).sum()) for part in parts))
            for kind, number in KINDS.items()
            if (self._kinds[start:end] == number).any()
            for parts in [(self._kinds[:start], self._kinds[:end])]
        }

    def _check(self, features: dict[str, Features]) -> None:
        for kind, number in KINDS.items():
            rows = features[kind].tensors[0].shape[0] if kind in features else 0
            if rows != int((self._kinds == number).sum()):
                raise ValueError(UNMATCHED)


class VisualEncoder:
    """Prepares prompts with media for a prefill in pieces.

    Args:
        model: whose encoders and positions they are.
        encoded: remembers what encoders made of media that come again.
        aside: run the encoder in a thread, beside the steps.

    Attributes:
        works: whether the model can take its prompts so; False until somebody has compared.
    """

    def __init__(self, model: PreTrainedModel, encoded: EncoderCache, *, aside: bool) -> None:
        self._base, self._encoded = model.base_model, encoded
        self._device = model.get_input_embeddings().weight.device
        self.works = False
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="encoder") if aside else None
        self._running: dict[
            str | int, Future[Outputs]
        ] = {}  # by the media's name, if they have one

    @property
    def eligible(self) -> bool:
        """Whether the model has what this needs, as far as its interface tells."""
        return self._encoded.takes_outputs and hasattr(self._base, "get_rope_index")

    def suits(self, sequence: Sequence) -> bool:
        """Whether a sequence still has media to compute, and can be computed in pieces."""
        if not self.works or sequence.length >= sequence.head:
            return False
        tensors = sequence.prompt.tensors
        return "mm_token_type_ids" in tensors and any(name in tensors for name in PIXELS.values())

    @torch.inference_mode()
    def prepare(self, sequence: Sequence, tensors: dict[str, Any]) -> Visuals:
        """Compute a prompt's positions, and begin to encode its media.

        Args:
            sequence: one that `suits`.
            tensors: arguments of `forward`.

        Raises:
            ValueError: no token, or more tokens than there are, stand for its media.
            Exception: whatever the model raises for bad tensors.
        """
        rope = self._base.get_rope_index
        names = inspect.signature(rope).parameters.keys() & tensors.keys()
        ids = torch.tensor([sequence.prompt_ids], device=self._device)
        positions, delta = rope(ids, **{name: tensors[name] for name in names})
        kinds = np.asarray(sequence.prompt.tensors["mm_token_type_ids"][0], dtype=np.int64)
        if not kinds.any() or len(kinds) != len(sequence.prompt_ids):
            raise ValueError(UNMATCHED)
        shared = sequence.prompt.media if self._encoded.max_bytes else ""
        encoded = self._begin(shared, tensors, aside=not sequence.trial)
        return Visuals(positions, int(delta.reshape(-1)[0]), kinds, encoded)

    def _begin(self, media: str, tensors: dict[str, Any], *, aside: bool) -> Future[Outputs]:
        """Begin to encode, unless what comes of it is known, or under way."""
        self.collect()
        known = self._encoded.find(media)
        if known is not None:
            done: Future[Outputs] = Future()
            done.set_result(known)
            return done
        future = self._running.get(media)
        if future is None or future.cancelled():
            future = self._start(tensors, aside=aside)
            self._running[media or id(future)] = future
        return future

    def _start(self, tensors: dict[str, Any], *, aside: bool) -> Future[Outputs]:
        if self._threads is not None and aside:
            return self._threads.submit(self._encoded.run, tensors)
        future: Future[Outputs] = Future()
        try:
            future.set_result(self._encoded.run(tensors))
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)
        return future

    def drop(self) -> None:
        """Forget what encoders have made, or failed with, since the last time."""
        self._running = {name: one for name, one in self._running.items() if not one.done()}

    def collect(self) -> None:
        """Remember what encoders have made since the last time."""
        for media, future in list(self._running.items()):
            if future.done():
                del self._running[media]
                if isinstance(media, str) and not (future.cancelled() or future.exception()):
                    self._encoded.keep(media, future.result())
