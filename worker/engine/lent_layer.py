"""What layers have in common whose keys and values are given to a record at each step."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class LentLayer(CacheLayerMixin):
    """A layer over memory that is there; where new tokens go in it, a subclass knows.

    Args:
        keys: `[B, kv heads, window, head dim]`, with room for the new tokens.
        values: likewise.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the memory is there."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Length and offset of the keys a mask covers."""
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        """Most tokens of a row in this step."""
        return self.keys.shape[2]
