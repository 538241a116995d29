"""The slot cache: keys and values of all running sequences, one row each.

It stands behind Transformers' own cache interface, so that an unmodified model can decode a ragged
batch in one forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

FIRST_CAPACITY = 256  # tokens per row of a new cache; doubled as needed


class SlotLayer(CacheLayerMixin):
    """Keys and values of one model layer, each `[rows, kv heads, capacity, head dim]`.

    `rows` and `capacity` are the allocated sizes. They grow by doubling, and what is new is zeroed:
    a masked position still takes part in `0 * value`, which is NaN for a NaN value.
    """

    is_sliding = False

    def __init__(self, plan: SlotPlan) -> None:
        super().__init__()
        self.plan = plan

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape, dtype and device from the first keys and values `[1, kv heads, L, dim]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(0, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_zeros(0, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def store(self, row: int, key_states: Tensor, value_states: Tensor) -> None:
        """Fill a row from its start with a prefill's keys and values `[1, kv heads, L, dim]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.resize(self.plan.rows, self.plan.capacity)
        length = key_states.shape[2]
        self.keys[row, :, :length] = key_states[0]
        self.values[row, :, :length] = value_states[0]

    def resize(self, rows: int, capacity: int) -> None:
        """Grow to `rows` and `capacity`; what is stored stays where it is."""
        if not self.is_initialized:
            return
        if self.keys.shape[0] >= rows and self.keys.shape[2] >= capacity:
            return
        self.keys = _grown(self.keys, rows, capacity)
        self.values = _grown(self.values, rows, capacity)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ARG002  # the interface's
        **kwargs: Any,  # noqa: ARG002  # the interface's
    ) -> tuple[Tensor, Tensor]:
        """Write one new token per running row at the row's length; return the batch's window.

        Takes `[B, kv heads, 1, dim]`, returns views `[B, kv heads, plan.window, dim]`.
        """
        rows, lengths = self.plan.index(self.device)
        self.keys[rows, :, lengths] = key_states[:, :, 0]
        self.values[rows, :, lengths] = value_states[:, :, 0]
        first, window = self.plan.first, self.plan.window
        end = first + key_states.shape[0]
        return self.keys[first:end, :, :window], self.values[first:end, :, :window]

    def get_seq_length(self) -> int:
        """Tokens in the longest running row before this step."""
        return self.plan.window - 1

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
        self.rows, self.capacity, self.window, self.first = 0, 0, 1, 0
        self._index: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def begin(self, lengths: Tensor, longest: int, first: int = 0) -> None:
        """Announce a decode step: row `first + i`'s new token goes to position `lengths[i]`."""
        rows = torch.arange(first, first + lengths.shape[0], device=lengths.device)
        self._index = {lengths.device: (rows, lengths)}
        self.window, self.first = longest + 1, first

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
    """

    def __init__(self, layers: int, max_rows: int, max_capacity: int) -> None:
        self.plan = SlotPlan(max_rows, max_capacity)
        super().__init__(layers=[SlotLayer(self.plan) for _ in range(layers)])

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for `rows` rows of `tokens` tokens, by doubling up to the bounds.

        Raises:
            ValueError: more than the bounds allow.
            RuntimeError: the memory for it is not there (`torch.OutOfMemoryError` on a GPU).
        """
        plan = self.plan
        if rows > plan.max_rows or tokens > plan.max_capacity:
            raise ValueError(f"{rows} rows of {tokens} tokens do not fit the cache's bounds")
        if rows <= plan.rows and tokens <= plan.capacity:
            return
        new_rows = _doubled(plan.rows or 1, rows, plan.max_rows)
        new_capacity = _doubled(plan.capacity or FIRST_CAPACITY, tokens, plan.max_capacity)
        for layer in self.layers:
            layer.resize(new_rows, new_capacity)
        # Last: had a layer found no memory, the layers before it are merely larger than planned.
        plan.rows, plan.capacity = new_rows, new_capacity

    def store(self, row: int, prefilled: Cache) -> None:
        """Copy a prefill's keys and values into a row that `reserve` has made room for."""
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            layer.store(row, source.keys, source.values)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row to another: the last row fills a hole."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def scrub(self, row: int) -> None:
        """Zero a row whose numbers are not finite, so that they cannot reach its next tenant."""
        for layer in self.layers:
            layer.keys[row].zero_()
            layer.values[row].zero_()


def _doubled(size: int, needed: int, bound: int) -> int:
    while size < needed:
        size *= 2
    return min(size, bound)


def _grown(old: Tensor, rows: int, capacity: int) -> Tensor:
    new = old.new_zeros(
        max(rows, old.shape[0]), old.shape[1], max(capacity, old.shape[2]), old.shape[3]
    )
    new[: old.shape[0], :, : old.shape[2]] = old
    return new
