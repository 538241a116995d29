"""How much memory the cache may take, and how long a sequence may be in it."""

from __future__ import annotations

import logging

import torch

from worker.engine.kv_cache import SlotCache
from worker.engine.loader import LoadedModel, LoadError
from worker.engine.memory import available_memory
from worker.engine.messages import Limits

log = logging.getLogger("unbroken.engine")

GPU_SHARE = 0.85  # of what the weights left free; the rest is for activations
CPU_SHARE = 0.25  # of what is free: others live on the machine too
LEAST_CONTEXT = 16  # tokens


def bound(cache: SlotCache, limits: Limits, loaded: LoadedModel, share: float = 1.0) -> int:
    """Bound the cache by bytes, from free memory unless they are given.

    To be called after a first forward, when the cache knows what a token takes. Of the bytes it
    takes a `share`.

    Returns:
        The most tokens of a sequence: one that is no longer always fits when it is alone.

    Raises:
        LoadError: there is no memory to speak of.
    """
    bytes_ = limits.cache_bytes
    if bytes_ is None:
        bytes_ = _free_bytes(loaded.model.device) - limits.prefix_bytes
    cache.max_tokens = int(max(bytes_, 0) * share) // cache.token_bytes
    if cache.plan.rows * cache.plan.capacity > cache.max_tokens:
        cache.release()
    context = min(loaded.context_length, cache.max_tokens)
    if context < LEAST_CONTEXT:
        raise LoadError(f"Not enough memory for the cache of '{loaded.name}'.")
    if context < loaded.context_length:
        log.warning("the cache has room for %d tokens, so that is the context length", context)
    return context


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)
    return int(available_memory() * CPU_SHARE)
