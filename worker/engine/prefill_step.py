"""The forwards of a prefill: text of several sequences in one, a prompt with media by itself.

All go through the model's own `forward`, over the cache; single pieces from a record of it, where
there is one.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.protocol import SamplingParams
from worker.engine.chunk_step import ChunkStep, Picture
from worker.engine.encoder_cache import EncoderCache
from worker.engine.kv_cache import SlotCache
from worker.engine.messages import Prompt
from worker.engine.sequence import TOKEN_KINDS, Chunk, Sequence
from worker.engine.visuals import Features, VisualEncoder

log = logging.getLogger("unbroken.engine")

PACKED, PACKED_TOKENS = 3, 64
"""So many pieces of fewer tokens are run as one; others by themselves, where that is recorded."""


class PrefillStep:
    """Computes pieces of prompts, into their rows.

    Args:
        model: whose forward it is.
        forward: the model's, to the last logits `[1, V]`, widened.
        cache: where keys and values go.
        encoded: remembers what encoders made of media that come again.
        aside: run encoders in a thread, beside the steps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Tensor],
        cache: SlotCache,
        encoded: EncoderCache,
        *,
        aside: bool,
    ) -> None:
        self._model, self._forward, self._cache = model, forward, cache
        self._device = model.get_input_embeddings().weight.device
        self._encoded, self._aside = encoded, aside
        self.visuals = VisualEncoder(model, encoded, aside=aside)
        self.pieces = ChunkStep(forward, cache, model.dtype)
        self._like: Features | None = None
        self._recordable: dict[str, Picture | None] = {}  # kinds of pieces, until that is tried

    def __call__(self, chunks: Rows[Chunk], several: Callable[..., Tensor]) -> Tensor:
        """Compute the next tokens of sequences; return the last logits `[n, V]`.

        Args:
            chunks: as `ModelRunner.prefill` has them.
            several: the model's forward over pieces that lie one behind the other, to the logits
                at the places that it is given.
        """
        first = chunks[0].sequence
        self._prepare(first)
        if first.visuals is not None and first.length < first.head:
            logits = self._piece(chunks[0])
            self.visuals.collect()
            return logits
        if first.length < first.head:
            return self._media(first, chunks[0].count)
        size = sum(chunk.count for chunk in chunks)
        if self.pieces.has() and (len(chunks) < PACKED or size >= PACKED_TOKENS * len(chunks)):
            return torch.cat([self._piece(chunk) for chunk in chunks])
        self.pieces.missed[""] += len(chunks)
        return self._text(chunks, several)

    def await_media(self, chunk: Chunk) -> bool:
        """Wait for the encoder, if a piece needs it; tell whether the piece runs it itself.

        Raises:
            Exception: whatever the encoder raises for bad tensors.
        """
        sequence, start = chunk.sequence, chunk.sequence.length
        self._prepare(sequence)
        if start >= sequence.head:
            return False
        if sequence.visuals is not None:
            sequence.visuals.features(start, start + chunk.count)
        return sequence.visuals is None

    def aside(self, sequence: Sequence) -> bool:
        """Whether a prompt's media are encoded beside the steps."""
        return self._aside and not sequence.trial and self.visuals.suits(sequence)

    def encode(self, sequence: Sequence) -> None:
        """Begin to encode a prompt's media beside the steps, if it can be computed in pieces.

        Whatever the model raises for bad tensors, it raises once the prompt is computed.
        """
        if self.aside(sequence):
            with contextlib.suppress(
                ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError
            ):
                self._prepare(sequence)

    def _prepare(self, sequence: Sequence) -> None:
        if sequence.visuals is None and self.visuals.suits(sequence):
            sequence.visuals = self.visuals.prepare(sequence, self._tensors(sequence))

    def _piece(self, chunk: Chunk) -> Tensor:
        """Run one sequence's next tokens; behind its prompt no placeholder is a picture."""
        sequence, count = chunk.sequence, chunk.count
        start = sequence.length
        end = start + count
        ids = torch.tensor([sequence.tokens(start, end)], device=self._device)
        at = start + sequence.rope_delta
        positions, features = torch.arange(at, at + count, device=self._device)[None], {}
        if sequence.visuals is not None and start < sequence.head:
            sequence.rope_delta = sequence.visuals.delta
            features = sequence.visuals.features(start, end)
            positions = sequence.visuals.positions[:, :, start:end]
            if not features:  # in text, all of them are the same
                positions = positions[0]
        return self.pieces(ids, positions, (sequence.slot, start, count), features)

    def _media(self, sequence: Sequence, count: int) -> Tensor:
        """Run a prompt's beginning as the model's authors do; read what it adds to positions.

        Never with generated tokens: a generated placeholder id is no picture.
        """
        self._cache.plan.begin_prefill([(sequence.slot, sequence.length, count)])
        base = self._model.base_model
        # Qwen-VL models keep the last prompt's offset on the module: one must not leak to the next.
        if hasattr(base, "rope_deltas"):
            base.rope_deltas = None
        ids = torch.tensor([sequence.prompt_ids[:count]], device=self._device)
        tensors = self._tensors(sequence)
        for name in TOKEN_KINDS & tensors.keys():
            tensors[name] = tensors[name][:, :count]
        tensors["attention_mask"] = torch.ones_like(ids)
        tensors = self._encoded.encode(sequence.prompt.media, tensors)
        logits = self._forward(input_ids=ids, past_key_values=self._cache, **tensors)
        delta = getattr(base, "rope_deltas", None)
        sequence.rope_delta = 0 if delta is None else int(delta.reshape(-1)[0])
        return logits

    def _text(self, chunks: Rows[Chunk], several: Callable[..., Tensor]) -> Tensor:
        """Run pieces of text whose places are known, each behind what its row holds already."""
        self._cache.plan.begin_prefill(
            [(c.sequence.slot, c.sequence.length, c.count) for c in chunks]
        )
        ids, positions, last = list[int](), list[int](), list[int]()
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.length
            ids += sequence.tokens(start, start + chunk.count)
            at = start + sequence.rope_delta
            positions += range(at, at + chunk.count)
            last.append(len(ids) - 1)
        return several(
            last,
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            attention_mask=self._block_mask(),
            past_key_values=self._cache,
        )

    def _block_mask(self) -> Tensor:
        """Mask for a prefill: a token attends to its own row up to itself.

        Additive, `[1, 1, tokens, window]`; for the beginning of one row the plain `[1, tokens]` of
        ones, which costs less.
        """
        (_, first, size), *others = self._cache.plan.segments
        if not first and not others:
            return torch.ones(1, size, dtype=torch.int64, device=self._device)
        blocks = []
        for _, start, count in self._cache.plan.segments:
            block = torch.full(
                (count, start + count), float("-inf"), dtype=self._model.dtype, device=self._device
            )
            blocks.append(block.triu_(start + 1))
        if len(blocks) == 1:
            return blocks[0][None, None]
        rows = sum(block.shape[0] for block in blocks)
        mask = blocks[0].new_full((rows, self._cache.plan.window), float("-inf"))
        row, column = 0, 0
        for block in blocks:
            mask[row : row + block.shape[0], column : column + block.shape[1]] = block
            row, column = row + block.shape[0], column + block.shape[1]
        return mask[None, None]

    def _tensors(self, sequence: Sequence) -> dict[str, Tensor]:
        return {name: self._tensor(array) for name, array in sequence.prompt.tensors.items()}

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(np.require(array, requirements=("C", "A", "W"))).to(self._device)
        return tensor.to(self._model.dtype) if tensor.is_floating_point() else tensor

    @torch.inference_mode()
    def verify(self, tolerance: float) -> None:
        """Find out whether prompts with media can be computed in pieces.

        One with a made-up picture is computed whole and in pieces. The cache is empty afterwards.

        Args:
            tolerance: the largest relative difference.
        """
        if not self.visuals.eligible:
            return
        self.visuals.works = True
        try:
            prompt = _made_up(self._model)
            self.visuals.works = self._difference(prompt) <= tolerance
        except torch.AcceleratorError:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, such prompts are computed whole
            self.visuals.works = False
        self._cache.release()

    def _difference(self, prompt: Prompt) -> float:
        rows = [
            Sequence(n, prompt, SamplingParams(), frozenset(), len(prompt.input_ids) + 1)
            for n in range(2)
        ]
        whole, pieces = rows
        whole.slot = pieces.slot = 0
        self._cache.reserve(1, whole.total)
        expected = self._media(whole, whole.total)
        self._prepare(pieces)
        while pieces.length < pieces.total:
            count = min(5, pieces.total - pieces.length)  # text and placeholders, in some
            found = self._piece(Chunk(pieces, count))
            pieces.length += count
        if pieces.visuals is not None:
            self._like = pieces.visuals.features(0, pieces.total)["image"]
        same = whole.rope_delta == pieces.rope_delta
        return float((found - expected).norm() / expected.norm()) if same else float("inf")

    def due(self, pieces: int) -> bool:
        """Whether at least so many pieces of a kind have run for which a record can be made."""
        return any(self.pieces.missed[kind] >= pieces for kind in self._recordable)

    @torch.inference_mode()
    def record(self, vocab_size: int) -> None:
        """Record the kind of pieces that has lacked it most; it takes some 50 forwards' time."""
        if not self._recordable:
            return
        began = time.perf_counter()
        kind = max(self._recordable, key=self.pieces.missed.__getitem__)
        kept = self.pieces.record(vocab_size, self._recordable.pop(kind))
        seconds = round(time.perf_counter() - began, 3)
        extra = {"media": kind, "kept": kept, "seconds": seconds}
        log.info("pieces of prompts recorded", extra=extra)
        if not kind and not kept:
            self._recordable.clear()  # nor can any other

    def allow_records(self) -> None:
        """Let pieces of text be recorded, and of pictures and videos where they `verify`."""
        self._recordable = {"": None}
        self.pieces.missed.clear()  # checks are no requests
        for kind in ("image", "video"):
            token = getattr(self._model.config, f"{kind}_token_id", None)
            if self._like is not None and self.visuals.works and token is not None:
                self._recordable[kind] = Picture(kind, token, self._like)


def _made_up(model: PreTrainedModel) -> Prompt:
    """Return a prompt with a small picture, for models that are built as Qwen-VL's are.

    Raises:
        AttributeError: this one is not.
    """
    config, vision = model.config, model.config.vision_config
    merge, patch = vision.spatial_merge_size, vision.patch_size
    grid = (1, 2 * merge, 3 * merge)
    values = vision.in_channels * vision.temporal_patch_size * patch * patch
    draw = np.random.default_rng(0)
    places = [config.image_token_id] * 6
    ids = [3, 7, config.vision_start_token_id, *places, config.vision_end_token_id, 5, 9]
    return Prompt(
        ids,
        {
            "pixel_values": draw.standard_normal((grid[1] * grid[2], values)).astype(np.float32),
            "image_grid_thw": np.array([grid]),
            "mm_token_type_ids": np.array([[int(i == places[0]) for i in ids]], dtype=np.int32),
        },
    )
