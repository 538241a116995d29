"""Runs the model: prefill, whole or in chunks, and one decode step for all the running sequences.

All of it goes through the model's own `forward`, over the slot cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Rows
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from shared.protocol import SamplingParams
from worker.engine.bucketed import BucketedDecode, BucketOptions
from worker.engine.decode_step import DecodeStep
from worker.engine.encoder_cache import EncoderCache
from worker.engine.kv_cache import SlotCache
from worker.engine.messages import Prompt
from worker.engine.prefill_step import PrefillStep
from worker.engine.sequence import Chunk, Sequence
from worker.engine.token_pool import PooledCache
from worker.engine.transfer import Pending

PROBE_IDS = (3, 7, 11, 5, 9, 4, 8)
# Largest relative difference between a batched decode and the model's own forward. Half precision
# is coarse; what the check is for (positions, masks, hidden state between calls) shows as ~1.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_TOLERANCE = 0.3


class UnsupportedModelError(Exception):
    """The model's layers or forward do not fit the slot cache; the message says why."""


class ModelRunner:
    """A model with the keys and values of its running sequences.

    Args:
        model: in eval mode, on its device.
        max_batch_size: most rows of a decode step.
        context_length: most tokens of a sequence.
        replay: decode each sequence by itself, and feed the tokens of a continued one through the
            decode step once more: a batch, or a prefill, would round otherwise.
        bucketed: how to decode in steps of fixed shapes, over a pooled cache; None: in steps of
            the batch's own shape, over a slot cache.

    Attributes:
        bucketed: those steps; None: there are none.
        on_time: whether a step's seconds are the model's, so that prompts may be cut by them.

    Raises:
        UnsupportedModelError: the model has layers other than plain full attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_batch_size: int,
        context_length: int,
        *,
        replay: bool = False,
        bucketed: BucketOptions | None = None,
    ) -> None:
        layers = _plain_layers(model)
        self.model, self.replay = model, replay
        self.device = model.get_input_embeddings().weight.device
        self.dtype = model.dtype
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.bucketed: BucketedDecode | None = None
        if bucketed is None:
            self.cache = SlotCache(layers, max_batch_size, context_length)
        else:
            self.cache = pool = PooledCache(layers, max_batch_size, context_length)
            self.bucketed = BucketedDecode(model, pool, bucketed)
        self.encoded = EncoderCache(model)
        parameters = inspect.signature(model.forward).parameters
        self._last_logit = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.step = DecodeStep(self._forward, self.cache, self.dtype)
        self.on_time = bucketed is None and self.device.type == "cpu" and not replay
        self.pieces = PrefillStep(
            model, self._forward, self.cache, self.encoded, aside=self.on_time
        )

    @property
    def apart(self) -> bool:
        """Whether each sequence is decoded by itself, since a batch's shape changes rounding."""
        return self.replay and self.bucketed is None

    @torch.inference_mode()
    def prefill(self, chunks: Rows[Chunk]) -> Tensor:
        """Compute the next tokens of sequences, into their rows; return the last logits `[n, V]`.

        Each chunk goes on at its sequence's `length`, which grows by the chunk's size. Several
        chunks lie one behind the other in one row of input, each attending to its own sequence
        alone; one with media comes alone, whole unless it `takes_pieces`, and sets `rope_delta`.
        `reserve` has been called.
        Whatever the model raises for bad tensors passes through; other rows are untouched then.
        """
        logits = self.pieces(chunks, self._several)
        for chunk in chunks:
            chunk.sequence.length += chunk.count
            if chunk.sequence.length >= chunk.sequence.head:
                chunk.sequence.visuals = None
        return logits

    @torch.inference_mode()
    def await_media(self, chunk: Chunk) -> bool:
        """Wait for what encoders make for a piece; tell whether it will run them itself."""
        return self.pieces.await_media(chunk)

    def encodes_aside(self, sequence: Sequence) -> bool:
        """Whether `encode` begins anything for a sequence."""
        return self.pieces.aside(sequence)

    def encode(self, sequence: Sequence) -> None:
        """Begin to encode a prompt's media beside the steps, where that can be."""
        self.pieces.encode(sequence)

    def takes_pieces(self, sequence: Sequence) -> bool:
        """Whether the prefill of a sequence, with media, may end at any token."""
        return self.pieces.visuals.suits(sequence)

    def due(self, pieces: int) -> bool:
        """Whether so many pieces of prompts have run that would be faster if `record` was called.

        That is of one kind: text, images or videos.
        """
        return self.pieces.due(pieces)

    def record(self) -> None:
        """Record one kind of prompts' pieces; running sequences wait for some 50 forwards."""
        self.pieces.record(self.vocab_size)

    def _several(self, last: list[int], **inputs: Any) -> Tensor:
        """Run pieces that lie one behind the other; return the logits at these places."""
        kept = (
            {"logits_to_keep": torch.tensor(last, device=self.device)} if self._last_logit else {}
        )
        logits: Tensor = self.model(**inputs, use_cache=True, return_dict=True, **kept).logits[0]
        return _widened(logits if kept else logits[last])

    @torch.inference_mode()
    def decode(self, sequences: Rows[Sequence]) -> Tensor:
        """Feed each sequence's next input; return the logits `[B, V]` of what follows it.

        Their slots follow one another, unless steps are bucketed, and `reserve` has been called.
        Each one's `length` grows by one.
        """
        if self.bucketed is not None:
            logits = self.bucketed.logits(sequences)
            for sequence in sequences:
                sequence.length += 1
            wide = torch.promote_types(logits.dtype, torch.float32)
            return logits.to(self.device, wide, copy=True)  # the next step overwrites it
        if self.apart and len(sequences) > 1:
            return torch.cat([self.decode([sequence]) for sequence in sequences])
        rows = [[s.next_input, s.length, s.length + s.rope_delta] for s in sequences]
        longest = max(sequence.length for sequence in sequences)
        logits = self.step(torch.tensor(rows, device=self.device), longest, sequences[0].slot)
        for sequence in sequences:
            sequence.length += 1
        return logits

    @torch.inference_mode()
    def launch(self, sequences: Rows[Sequence]) -> Pending:
        """Begin a bucketed step that draws each sequence's next token, and do not wait for it.

        `reserve` has been called. Each one's `length` grows by one.
        """
        if self.bucketed is None:
            raise RuntimeError("steps are not bucketed")
        pending = self.bucketed.launch(sequences)
        for sequence in sequences:
            sequence.length += 1
        return pending

    @torch.inference_mode()
    def reserve(self, sequences: Rows[Sequence]) -> None:
        """Make room for all sequences that have a row: their next token, or all of their prefill.

        Raises:
            RuntimeError: the memory is not there; nothing has changed.
        """
        rows = max(sequence.slot for sequence in sequences) + 1
        self.cache.reserve(rows, max(max(s.length + 1, s.target) for s in sequences))

    @torch.inference_mode()
    def move(self, source: int, sequence: Sequence) -> None:
        """Bring a sequence's keys and values from row `source` to its new slot."""
        self.cache.move(source, sequence.slot, sequence.length)
        if self.bucketed is not None:
            self.bucketed.move(source, sequence.slot)

    @torch.inference_mode()
    def scrub(self, row: int, first: int = 0) -> None:
        """Wipe a row that holds numbers that are not finite, from a token on."""
        self.cache.scrub(row, first)

    def _forward(self, **inputs: Any) -> Tensor:
        logits: Tensor = self.model(
            **inputs, use_cache=True, return_dict=True, **self._last_logit
        ).logits[:, -1]
        return _widened(logits)

    @property
    def attention(self) -> str:
        """How decode steps attend."""
        return self.bucketed.attention if self.bucketed else "mask"

    def warm_up(self) -> None:
        """Take the memory that bucketed steps need to stay where it is, and make them all.

        Raises:
            UnsupportedModelError: they do not compute what the model's own forward does.
        """
        if self.bucketed is not None:
            self.bucketed.warm_up()
            self._check()

    def verify(self) -> None:
        """Compare a batched, ragged decode with the model's own forward on a few token ids.

        Finds models whose forward ignores our positions or mask, or keeps state between calls. Then
        record the decode step, on a CPU.

        Raises:
            UnsupportedModelError: they differ.
        """
        with self.bucketed.plain() if self.bucketed else nullcontext():
            self._check()
            if not self.replay:  # where rounding must not depend on how a prompt is cut
                self.pieces.verify(TOLERANCE.get(self.dtype, HALF_TOLERANCE))
        if self.bucketed is None and self.device.type == "cpu":
            self._record_step()

    def _check(self) -> None:
        try:
            error = self._probe_error()
        except torch.AcceleratorError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as failure:
            raise UnsupportedModelError("its forward rejects a batched decode step") from failure
        if not error <= TOLERANCE.get(self.dtype, HALF_TOLERANCE):
            raise UnsupportedModelError("a batched decode step does not reproduce its own forward")

    @torch.inference_mode()
    def _record_step(self) -> None:
        self.step.record(self.vocab_size)
        if not self.replay:
            self.pieces.allow_records()

    @torch.inference_mode()
    def _probe_error(self) -> float:
        """Return the largest relative difference of two rows of different lengths, two steps on."""
        probes = [
            Sequence(slot, Prompt(list(ids)), SamplingParams(), frozenset(), len(PROBE_IDS))
            for slot, ids in enumerate((PROBE_IDS[:5], PROBE_IDS[:2]))
        ]
        probes = probes[: self.cache.plan.max_rows]
        for slot, probe in enumerate(probes):
            probe.slot = slot
        self.reserve(probes)
        self.prefill([Chunk(probe, 2) for probe in probes])
        self.prefill([Chunk(probes[0], 3)])
        for token in PROBE_IDS[5:]:
            for probe in probes:
                probe.output_ids.append(token)
            self.reserve(probes)
            decoded = self.decode(probes)
        expected = torch.cat(
            [
                self._forward(
                    input_ids=torch.tensor([p.prompt_ids + p.output_ids], device=self.device),
                    past_key_values=DynamicCache(config=self.model.config),
                )
                for p in probes
            ]
        )
        return float(((decoded - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _plain_layers(model: PreTrainedModel) -> int:
    """Count the model's layers; all of them must keep plain keys and values."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError("encoder-decoder models are not supported yet")
    layers = DynamicCache(config=model.config).layers
    other = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    if other:
        raise UnsupportedModelError(
            "sliding-window, linear-attention and other special cache layers are not supported yet"
            f" ({', '.join(sorted(other))})"
        )
    return len(layers)
