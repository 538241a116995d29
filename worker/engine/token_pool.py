"""The pooled cache: the rows of the slot cache as slots of one pool of tokens per layer.

Its memory stays where it is while rows come, go, grow and shrink, as recorded steps need it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from worker.engine.kv_cache import SlotCache, SlotLayer, SlotPlan
from worker.engine.ragged import PAGE


class PoolLayer(SlotLayer):
    """Keys and values of one model layer, each `[tokens, kv heads, head dim]`.

    The first page belongs to nobody: rows that only fill up a batch write there. Row r begins at
    `plan.start(r)`.
    """

    plan: PoolPlan

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take shape, dtype and device from the first keys and values `[1, kv heads, L, dim]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        tokens = self.plan.tokens
        self.keys = key_states.new_zeros(tokens, key_states.shape[1], key_states.shape[3])
        self.values = value_states.new_zeros(tokens, value_states.shape[1], value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write new tokens to where the plan says; return what they may attend to.

        A decode step takes `[B, kv heads, 1, dim]` and returns the pools, whose rows the attention
        function knows; a prefill is the slot cache's.
        """
        if self.plan.segments:
            return super().update(key_states, value_states, *args, **kwargs)
        places = self.plan.places.to(self.keys.device)
        self.keys.index_copy_(0, places, key_states[:, :, 0])
        self.values.index_copy_(0, places, value_states[:, :, 0])
        return self.keys, self.values

    def row(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Return views of a row's first tokens, `[kv heads, length, dim]`."""
        start = self.plan.start(row)
        end = start + length
        return self.keys[start:end].transpose(0, 1), self.values[start:end].transpose(0, 1)

    def grow(self, tokens: int) -> None:
        """Change to a larger pool, with what is stored."""
        if self.is_initialized:
            self.keys, self.values = _grown(self.keys, tokens), _grown(self.values, tokens)

    def shift(self, source: int, target: int, length: int) -> None:
        """Copy tokens from one place to another; the two may overlap.

        Piece by piece, none of which overlaps: it takes no memory, so it does not stop half way.
        """
        step = abs(target - source)
        if not self.is_initialized or not step:
            return
        places = range(0, length, step)
        for at in reversed(places) if target > source else places:
            size = min(step, length - at)
            for pool in (self.keys, self.values):
                pool[target + at :][:size].copy_(pool[source + at :][:size])


class PoolPlan(SlotPlan):
    """Where the slots lie: `rows` of them, of `capacity` tokens each, behind the first page.

    Attributes:
        tokens: the size of each pool.
        version: counts how often the pools have changed their place in memory.
        places: `[B]`, where a decode step's new tokens go.
    """

    places: Tensor

    def __init__(self, max_rows: int, max_capacity: int) -> None:
        super().__init__(max_rows, max_capacity)
        self.tokens, self.version = PAGE, 0

    def start(self, row: int) -> int:
        """Return the place of a row's first token."""
        return PAGE + row * self.capacity

    def begin_step(self, places: Tensor) -> None:
        """Announce a decode step whose new tokens go to `places`, `[B]`."""
        self.segments, self.places = (), places


class PooledCache(SlotCache):
    """Keys and values of the running sequences, in slots of whole pages.

    Args:
        layers: number of the model's layers.
        max_rows: most rows (the largest batch).
        max_capacity: most tokens of a row (the context length).
    """

    layer_type, plan_type = PoolLayer, PoolPlan
    plan: PoolPlan

    @property
    def token_bytes(self) -> int:
        """What a token takes over all layers; known after the first forward."""
        return sum(
            int(stored.shape[1] * stored.shape[2]) * stored.element_size()
            for layer in self.layers
            for stored in (layer.keys, layer.values)
        )

    def fits(self, rows: int, tokens: int) -> bool:
        """Whether `rows` rows of `tokens` tokens, in whole pages, are within the bounds."""
        plan = self.plan
        within = rows <= plan.max_rows and tokens <= plan.max_capacity
        most = self.max_tokens
        return within and (most is None or rows * _paged(tokens) <= _paged(most))

    def allocate(self) -> None:
        """Take all the memory there will ever be use for, so that the pools stay where they are.

        Raises:
            RuntimeError: the memory is not there.
        """
        most = self.plan.max_rows * _paged(self.plan.max_capacity)
        self._grow(most if self.max_tokens is None else min(most, _paged(self.max_tokens)))

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for `rows` rows of `tokens` tokens: share the pools out anew, or enlarge them.

        Rows beyond, and tokens beyond, may be given up for it.

        Raises:
            ValueError: more than the bounds allow.
            RuntimeError: the memory for it is not there; nothing has changed.
        """
        plan = self.plan
        if rows <= plan.rows and tokens <= plan.capacity:
            return
        if not self.fits(rows, tokens):
            raise ValueError(f"{rows} rows of {tokens} tokens do not fit the cache's bounds")
        new_rows, capacity = self._shape(rows, tokens)
        capacity = _paged(capacity)
        self._grow(new_rows * capacity)
        new_rows = min(plan.max_rows, (plan.tokens - PAGE) // capacity)
        self._share_out(new_rows, capacity)

    def release(self) -> None:
        """Give all memory back, with what is stored."""
        plan = self.plan
        plan.rows, plan.capacity, plan.tokens = 0, 0, PAGE
        plan.version += 1
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[:PAGE].clone(), layer.values[:PAGE].clone()

    def _grow(self, tokens: int) -> None:
        """Enlarge the pools to `tokens` behind the first page, all of them or none."""
        plan, tokens = self.plan, tokens + PAGE
        if tokens <= plan.tokens:
            return
        before = [(layer.keys, layer.values) for layer in self.layers]
        try:
            for layer in self.layers:
                layer.grow(tokens)
        except Exception:
            for layer, pools in zip(self.layers, before, strict=True):
                layer.keys, layer.values = pools
            raise
        plan.tokens = tokens
        plan.version += 1

    def _share_out(self, rows: int, capacity: int) -> None:
        """Move the rows to slots of another size."""
        plan = self.plan
        kept = 0 if capacity == plan.capacity else min(rows, plan.rows)
        length = min(capacity, plan.capacity)
        starts = [(plan.start(row), PAGE + row * capacity) for row in range(kept)]
        for source, target in reversed(starts) if capacity > plan.capacity else starts:
            for layer in self.layers:
                layer.shift(source, target, length)
        plan.rows, plan.capacity = rows, capacity

    def copy_out(self, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Copy the first `length` tokens of a row, `[kv heads, length, dim]` twice per layer."""
        found = [layer.row(row, length) for layer in self.layers]
        return [(keys.clone(), values.clone()) for keys, values in found]

    def copy_in(self, row: int, stored: list[tuple[Tensor, Tensor]], length: int) -> None:
        """Fill the start of a row with the first `length` tokens of what `copy_out` returned."""
        for layer, kept in zip(self.layers, stored, strict=True):
            for pool, part in zip(layer.row(row, length), kept, strict=True):
                pool.copy_(part[:, :length])

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row to another."""
        for layer in self.layers:
            layer.shift(self.plan.start(source), self.plan.start(target), length)

    def scrub(self, row: int, first: int = 0) -> None:
        """Zero a row whose numbers are not finite, so that they cannot reach its next tenant."""
        for layer in self.layers:
            for pool in layer.row(row, self.plan.capacity):
                pool[:, first:].zero_()


def _paged(tokens: int) -> int:
    """Round up to whole pages."""
    return -(-tokens // PAGE) * PAGE


def _grown(old: Tensor, tokens: int) -> Tensor:
    new = old.new_zeros(tokens, *old.shape[1:])
    new[: old.shape[0]] = old
    return new
