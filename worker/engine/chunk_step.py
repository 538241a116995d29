"""A piece of one sequence's prefill, recorded as the decode step is: no Python runs within it.

A forward of few tokens costs about as much Python as one of a hundred, so that short pieces between
two decode steps are affordable only without it.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from worker.engine.kv_cache import Segment, SlotCache
from worker.engine.lent_layer import LentLayer
from worker.engine.memory import lacks_memory
from worker.engine.visuals import Features

log = logging.getLogger("unbroken.engine")

PROBED = ((5, 0), (17, 9), (3, 21), (2, 2))
"""Pieces that a record has to give the forward's bits for: tokens, and how many lie before them."""
ROWS = 2
"""Rows of the cache in which a record is made, in the last of them."""
LEAST = 2
"""Tokens of a record: one alone is rounded otherwise, by kernels for vectors."""
SLOW_SECONDS = 0.1
"""Where a forward of a few tokens takes longer, Python's part in it is not worth a record."""


class ChunkStep:
    """One forward over some tokens of one row.

    Args:
        forward: the model's, from `input_ids`, `position_ids`, `attention_mask`, `past_key_values`
            and features of media to the last logits `[1, V]`.
        cache: where the row's keys and values are, and the new ones go.
        dtype: of the mask.

    Attributes:
        missed: how many pieces have run without a record, by their kind of features, "" for none.
    """

    def __init__(
        self, forward: Callable[..., Tensor], cache: SlotCache, dtype: torch.dtype
    ) -> None:
        self._forward, self._cache, self._dtype = forward, cache, dtype
        self._records: dict[str, Callable[..., Tensor]] = {}
        self.missed: Counter[str] = Counter()

    def has(self, kind: str = "") -> bool:
        """Whether pieces with features of this kind, or with none, are recorded."""
        return kind in self._records

    def __call__(
        self, ids: Tensor, positions: Tensor, segment: Segment, features: dict[str, Features]
    ) -> Tensor:
        """Compute what follows the last of some tokens.

        Args:
            ids: `[1, T]`.
            positions: for the model, `[1, T]`, or `[3, 1, T]` where features are.
            segment: the row, the place of the first token there, and T.
            features: what the encoder made of the placeholders among them, by kind.

        Returns:
            Logits `[1, V]`.
        """
        kind = ",".join(features)
        record = self._records.get(kind)
        if record is not None and segment[2] >= LEAST:
            inputs = self._inputs(ids, positions, segment, features)
            try:
                # Without torch's own rewriting of the graph, which would begin anew for each shape.
                with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                    return record(*inputs)
            except RuntimeError as error:
                if lacks_memory(error):
                    raise
                log.exception("the record of a prefill failed, and is dropped")
                self.forget()
        self.missed[kind] += 1
        return self._plain(ids, positions, segment, features, short=True)

    def _plain(
        self,
        ids: Tensor,
        positions: Tensor,
        segment: Segment,
        features: dict[str, Features],
        *,
        short: bool = False,
    ) -> Tensor:
        """Run the forward; if short, with a mask that costs less, and may round otherwise."""
        begins = short and not segment[1]
        mask = torch.ones_like(ids) if begins else self._mask(segment, ids.device)
        self._cache.plan.begin_prefill([segment])
        media = {kind: part.output() for kind, part in features.items()}
        return self._forward(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            **({"mm_encoder_outputs": media} if media else {}),
        )

    def _mask(self, segment: Segment, device: torch.device) -> Tensor:
        """Additive mask `[1, 1, T, window]`: a token attends to its row up to itself."""
        _, start, count = segment
        shape = count, start + count
        mask = torch.full(shape, float("-inf"), dtype=self._dtype, device=device)
        return mask.triu_(start + 1)[None, None]

    def _inputs(
        self, ids: Tensor, positions: Tensor, segment: Segment, features: dict[str, Features]
    ) -> tuple[Tensor, ...]:
        """Return what a record takes: ids, positions, mask, each layer's row, the features."""
        row, start, count = segment
        stored = [
            states[row : row + 1, :, : start + count]
            for layer in self._cache.layers
            for states in (layer.keys, layer.values)
        ]
        parts = [tensor for part in features.values() for tensor in part.tensors]
        return ids, positions, self._mask(segment, ids.device), *stored, *parts

    def forget(self) -> None:
        """Run the forward itself from now on."""
        self._records = {}

    def record(self, vocab_size: int, picture: Picture | None = None) -> bool:
        """Record pieces of text, or of a picture, where they give what the forward does.

        Sequences may run meanwhile: it happens in rows of its own.

        Args:
            vocab_size: of drawn tokens.
            picture: makes drawn pieces with features, in place of text alone.

        Returns:
            Whether there is a record now.
        """
        kind = picture.kind if picture else ""
        rows, room = len(self._cache.layers), max(count + start for count, start in PROBED)
        trial = ChunkStep(self._forward, SlotCache(rows, ROWS, room), self._dtype)
        try:
            trial._record(kind, list(trial._probes(vocab_size, picture)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the forward itself runs
            log.info("a prefill cannot be recorded", extra={"why": type(error).__name__})
        else:
            self._records |= trial._records
        return self.has(kind)

    def _record(self, kind: str, probes: list[tuple[Any, ...]]) -> None:
        if min(map(self._seconds, probes)) < SLOW_SECONDS:
            self._records[kind] = self._traced(*probes[0])
            if not all(self._agrees(*probe) for probe in probes):
                self.forget()

    def _seconds(self, probe: tuple[Any, ...]) -> float:
        began = time.perf_counter()
        self._plain(*probe)
        return time.perf_counter() - began

    def _agrees(self, *probe: Any) -> bool:
        """Whether a record gives the forward's logits, and leaves the same in the cache."""
        logits = self(*probe)
        states = self._inputs(*probe)[3:]
        left = [state.clone() for state in states]
        same = torch.equal(logits, self._plain(*probe))
        return same and all(map(torch.equal, left, states))

    def _probes(self, vocab_size: int, picture: Picture | None) -> Iterator[tuple[Any, ...]]:
        draw, plan = torch.Generator().manual_seed(0), self._cache.plan
        self._cache.reserve(ROWS, plan.max_capacity)
        for count, start in PROBED:
            ids = torch.randint(vocab_size, (1, count), generator=draw)
            segment = (ROWS - 1, start, count)
            places = torch.arange(start, start + count)[None]
            if picture is None:
                yield ids, places, segment, {}
            else:
                ids, features = picture.draw(ids, draw)
                yield ids, places.expand(3, 1, -1).contiguous(), segment, features

    def _traced(
        self, ids: Tensor, positions: Tensor, segment: Segment, features: dict[str, Features]
    ) -> Callable[..., Tensor]:
        count = 2 * len(self._cache.layers)

        def step(ids: Tensor, positions: Tensor, mask: Tensor, *rest: Tensor) -> Tensor:
            stored, parts = rest[:count], list(rest[count:])
            media = {}
            for kind, part in features.items():
                taken = [parts.pop(0) for _ in part.tensors]
                media[kind] = part.like(taken).output()
            return self._forward(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=Cache(
                    layers=[_LentRow(*pair) for pair in zip(stored[::2], stored[1::2], strict=True)]
                ),
                **({"mm_encoder_outputs": media} if media else {}),
            )

        inputs = self._inputs(ids, positions, segment, features)
        with warnings.catch_warnings():  # of what it freezes: that is compared
            warnings.simplefilter("ignore")
            record: Callable[..., Tensor] = torch.jit.trace(step, inputs, check_trace=False)
        return record


class Picture:
    """Draws pieces of a prompt with placeholders, for comparisons.

    Args:
        kind: of the media.
        token: the placeholder's id.
        like: features of some picture, for their shapes.
    """

    def __init__(self, kind: str, token: int, like: Features) -> None:
        self.kind, self._token, self._like = kind, token, like

    def draw(self, ids: Tensor, draw: torch.Generator) -> tuple[Tensor, dict[str, Features]]:
        """Return these ids with placeholders in every second place, and features for them."""
        ids = ids.clone()
        ids[ids == self._token] = 0
        ids[0, ::2] = self._token
        count = len(ids[0, ::2])
        drawn = [
            torch.randn(count, part.shape[1], generator=draw, dtype=torch.float32).to(part.dtype)
            for part in self._like.tensors
        ]
        return ids, {self.kind: self._like.like(drawn)}


class _LentRow(LentLayer):
    """A layer of one row, whose end is the room for the new tokens."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ARG002  # the interface's
        **kwargs: Any,  # noqa: ARG002  # the interface's
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens to the row's end; return all that they may attend to."""
        start = self.keys.shape[2] - key_states.shape[2]
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens of the row, the new ones among them: nothing depends on it."""
        return self.keys.shape[2]
