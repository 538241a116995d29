"""How the GPU benchmark measures: time on the device and on the host, bandwidth, floors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Figures = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """What a call takes, in milliseconds: one after the other, and of the host alone."""

    ms: float
    host_ms: float


APART = 3  # calls that are timed on the host, each with the device idle before it


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], count: int, device: torch.device) -> Timing:
    """Return what each of `count` calls takes, and what `APART` more take of the host alone.

    Where calls follow each other the host waits whenever it is ahead; so its own time is that of
    calls that find the device idle.
    """
    ms = _row_ms(call, count, device)
    return Timing(ms, statistics.median(_host_ms(call, device) for _ in range(APART)))


def _row_ms(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Return the milliseconds of each of `count` calls, one behind the other.

    The whole is timed by events on a GPU, by the clock elsewhere.
    """
    synchronize(device)
    cuda = device.type == "cuda"
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
    began = time.perf_counter()
    if cuda:
        ends[0].record()
    for _ in range(count):
        call()
    if cuda:
        ends[1].record()
    synchronize(device)
    whole = ends[0].elapsed_time(ends[1]) if cuda else (time.perf_counter() - began) * 1000
    return whole / count


def _host_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds until a call returns, all before it being done."""
    synchronize(device)
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def median_of(call: Callable[[], Any], count: int, device: torch.device, repeats: int = 3) -> float:
    """Return the median over repeats of the milliseconds that a call takes; after a first one."""
    call()
    return statistics.median(_row_ms(call, count, device) for _ in range(repeats))


def copy_bandwidth(size: int, device: torch.device) -> float:
    """Return the bytes per second, read and written, of a copy of `size` bytes on the device."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_of(lambda: target.copy_(source), 4, device) * 1000


def matrix_rate(dtype: torch.dtype, side: int, device: torch.device) -> float:
    """Return the floating-point operations per second of a square matrix product."""
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / median_of(lambda: left @ right, 4, device) * 1000


def decoder_bytes(model: Any) -> int:
    """Return the bytes of weights that a decode step reads: the text layers and the output head.

    Of the embedding only the rows of the step's tokens are read, and they are not counted.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    embedding = decoder.get_input_embeddings().weight
    weights = {id(w): w for w in decoder.parameters() if w is not embedding}
    weights |= {id(w): w for w in head.parameters()}
    return sum(weight.nbytes for weight in weights.values())


def decoder_matrices(model: Any) -> int:
    """Return the numbers in the text layers' matrices; a token costs two operations for each."""
    layers = model.get_decoder().layers.parameters()
    return sum(weight.numel() for weight in layers if weight.dim() > 1)


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of a token over all layers."""
    text = config.get_text_config()
    return int(
        2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * dtype.itemsize
    )


def prefill_operations(model: Any, tokens: int) -> float:
    """Return the operations of a text's prefill: matrices, causal attention, one row of logits."""
    text = model.config.get_text_config()
    wide = text.num_attention_heads * text.head_dim
    attention = 4 * text.num_hidden_layers * wide * tokens * tokens / 2
    return 2.0 * decoder_matrices(model) * tokens + attention + 2.0 * text.vocab_size * wide
