"""The slot cache: keys and values of all running sequences, one row each.

It stands behind Transformers' own cache interface, so that an unmodified model can decode a ragged
batch in one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

Segment = tuple[int, int, int]
"""A piece of prefill: the row, the position of its first token there, how many tokens."""

FIRST_CAPACITY = 256  # tokens per row of a new cache; doubled as needed


class SlotLayer(CacheLayerMixin):
    """Keys and values of one model layer, each `[rows, kv heads, capacity, head dim]`.

    `rows` and `capacity` are the allocated sizes. They change with what runs, and what is new is
    zeroed: a masked position still takes part in `0 * value`, which is NaN for a NaN value.
    """

    is_sliding = False

    def __init__(self, plan: SlotPlan) -> None:
        super().__init__()
        self.plan = plan

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape, dtype and device from the first keys and values `[1, kv heads, L, dim]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, capacity = self.plan.rows, self.plan.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[1], capacity, key_states.shape[3])
        self.values = self.keys.new_zeros(*self.keys.shape[:3], value_states.shape[3])
        self.is_initialized = True

    def resize(self, rows: int, capacity: int) -> None:
        """Change to `rows` and `capacity`; what is stored in both old and new stays where it is."""
        if not self.is_initialized:
            return
        if self.keys.shape[::2] != (rows, capacity):
            self.keys = _resized(self.keys, rows, capacity)
        if self.values.shape[::2] != (rows, capacity):  # each for itself: memory may end in between
            self.values = _resized(self.values, rows, capacity)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ARG002  # the interface's
        **kwargs: Any,  # noqa: ARG002  # the interface's
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens to where the plan says; return all that they may attend to.

        A decode step takes `[B, kv heads, 1, dim]` and returns views `[B, kv heads, window, dim]`;
        a prefill takes its segments one behind the other in one row, and returns their rows so.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.plan.segments:
            return self._prefill(key_states, value_states)
        rows, lengths = self.plan.index(self.device)
        self.keys[rows, :, lengths] = key_states[:, :, 0]
        self.values[rows, :, lengths] = value_states[:, :, 0]
        first, window = self.plan.first, self.plan.window
        end = first + key_states.shape[0]
        return self.keys[first:end, :, :window], self.values[first:end, :, :window]

    def _prefill(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        segments, at = self.plan.segments, 0
        rows = [self.row(row, start + count) for row, start, count in segments]
        for (keys, values), (_, start, count) in zip(rows, segments, strict=True):
            keys[:, start:] = key_states[0, :, at : at + count]
            values[:, start:] = value_states[0, :, at : at + count]
            at += count
        if not any(start for _, start, _ in segments):
            return key_states, value_states
        if len(segments) == 1:
            return rows[0][0][None], rows[0][1][None]
        all_keys, all_values = zip(*rows, strict=True)
        return torch.cat(all_keys, dim=1)[None], torch.cat(all_values, dim=1)[None]

    def row(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Return views of a row's first tokens, `[kv heads, length, dim]`."""
        return self.keys[row, :, :length], self.values[row, :, :length]

    def get_seq_length(self) -> int:
        """Tokens in the longest running row before this step."""
        return self.plan.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Length and offset of the keys a mask covers."""
        return self.plan.window, 0

    def get_max_length(self) -> int:
        """Most tokens a row may ever hold."""
        return self.plan.max_capacity


class SlotPlan:
    """The sizes all layers share, and where the running step writes.

    Args:
        max_rows: most rows (the largest batch).
        max_capacity: most tokens of a row (the context length).
    """

    def __init__(self, max_rows: int, max_capacity: int) -> None:
        self.max_rows, self.max_capacity = max_rows, max_capacity
        self.rows, self.capacity, self.window, self.past, self.first = 0, 0, 1, 0, 0
        self.segments: Sequence[Segment] = ()
        self._index: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def begin(self, lengths: Tensor, longest: int, first: int = 0) -> None:
        """Announce a decode step: row `first + i`'s new token goes to position `lengths[i]`."""
        rows = torch.arange(first, first + lengths.shape[0], device=lengths.device)
        self._index = {lengths.device: (rows, lengths)}
        self.window, self.past, self.first = longest + 1, longest, first
        self.segments = ()

    def begin_prefill(self, segments: Sequence[Segment]) -> None:
        """Announce a prefill: pieces of several rows, one behind the other in one row of input."""
        self.segments = segments
        self.window = sum(start + count for _, start, count in segments)
        self.past = self.window - sum(count for _, _, count in segments)

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return rows and positions of the step's writes, on a layer's device."""
        found = self._index.get(device)
        if found is None:
            rows, lengths = next(iter(self._index.values()))
            found = self._index[device] = (rows.to(device), lengths.to(device))
        return found


class SlotCache(Cache):
    """Keys and values of the running sequences, dense in rows 0 .. B-1.

    Args:
        layers: number of the model's layers.
        max_rows: most rows (the largest batch).
        max_capacity: most tokens of a row (the context length).

    Attributes:
        max_tokens: most tokens that all rows may have room for together; None for no bound.
    """

    layer_type: type[SlotLayer] = SlotLayer
    plan_type: type[SlotPlan] = SlotPlan

    def __init__(self, layers: int, max_rows: int, max_capacity: int) -> None:
        self.plan = self.plan_type(max_rows, max_capacity)
        self.max_tokens: int | None = None
        super().__init__(layers=[self.layer_type(self.plan) for _ in range(layers)])

    @property
    def token_bytes(self) -> int:
        """What a token takes over all layers; known after the first forward."""
        return sum(
            int(stored.shape[1] * stored.shape[3]) * stored.element_size()
            for layer in self.layers
            for stored in (layer.keys, layer.values)
        )

    def fits(self, rows: int, tokens: int) -> bool:
        """Whether `rows` rows of `tokens` tokens are within the bounds."""
        plan = self.plan
        within = rows <= plan.max_rows and tokens <= plan.max_capacity
        return within and (self.max_tokens is None or rows * tokens <= self.max_tokens)

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for `rows` rows of `tokens` tokens, by doubling up to the bounds.

        Rows beyond, and tokens beyond, may be given up for it.

        Raises:
            ValueError: more than the bounds allow.
            RuntimeError: the memory for it is not there (`torch.OutOfMemoryError` on a GPU).
        """
        plan = self.plan
        if rows <= plan.rows and tokens <= plan.capacity:
            return
        if not self.fits(rows, tokens):
            raise ValueError(f"{rows} rows of {tokens} tokens do not fit the cache's bounds")
        new_rows, new_capacity = self._shape(rows, tokens)
        try:
            for layer in self.layers:
                layer.resize(new_rows, new_capacity)
            plan.rows, plan.capacity = new_rows, new_capacity
        except Exception:  # a layer found no memory, and those before it may have shrunk
            plan.rows, plan.capacity = self._smallest()
            raise

    def _smallest(self) -> tuple[int, int]:
        """Return the sizes that all layers have at least, keys and values."""
        ready = [layer for layer in self.layers if layer.is_initialized]
        shapes = [stored.shape for layer in ready for stored in (layer.keys, layer.values)]
        return min(shape[0] for shape in shapes), min(shape[2] for shape in shapes)

    def release(self) -> None:
        """Give all memory back, with what is stored."""
        self.plan.rows, self.plan.capacity = 0, 0
        for layer in self.layers:
            layer.resize(0, 0)

    def _shape(self, rows: int, tokens: int) -> tuple[int, int]:
        """Choose the sizes to allocate: the roomiest of a few that the bounds allow."""
        plan = self.plan
        more_rows = _doubled(plan.rows or 1, rows, plan.max_rows)
        more_tokens = _doubled(plan.capacity or FIRST_CAPACITY, tokens, plan.max_capacity)
        wide = _doubled(1, rows, plan.max_rows)
        long = _doubled(min(FIRST_CAPACITY, tokens), tokens, plan.max_capacity)
        shapes = ((more_rows, more_tokens), (wide, more_tokens), (wide, long), (rows, long))
        return next((shape for shape in shapes if self.fits(*shape)), (rows, tokens))

    def copy_out(self, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Copy the first `length` tokens of a row, `[kv heads, length, dim]` twice per layer."""
        return [
            (layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone())
            for layer in self.layers
        ]

    def copy_in(self, row: int, stored: list[tuple[Tensor, Tensor]], length: int) -> None:
        """Fill the start of a row with the first `length` tokens of what `copy_out` returned."""
        for layer, (keys, values) in zip(self.layers, stored, strict=True):
            layer.keys[row, :, :length] = keys[:, :length]
            layer.values[row, :, :length] = values[:, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row to another."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def scrub(self, row: int, first: int = 0) -> None:
        """Zero a row whose numbers are not finite, so that they cannot reach its next tenant."""
        for layer in self.layers:
            layer.keys[row : row + 1, :, first:].zero_()  # a lack of memory may have taken the row
            layer.values[row : row + 1, :, first:].zero_()


def _doubled(size: int, needed: int, bound: int) -> int:
    while size < needed:
        size *= 2
    return min(size, bound)


def _resized(old: Tensor, rows: int, capacity: int) -> Tensor:
    new = old.new_zeros(rows, old.shape[1], capacity, old.shape[3])
    both, length = min(rows, old.shape[0]), min(capacity, old.shape[2])
    new[:both, :, :length] = old[:both, :, :length]
    return new
