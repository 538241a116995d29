"""Attention of one new token per row over rows of different lengths, without a mask.

The one place that knows what the torch at hand offers for it; each way is a `Path` and is held
against plain attention in float32 by `worst_error`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

log = logging.getLogger("unbroken.engine")

NAME = "unbroken_ragged"
PAGE = 256  # tokens; every row begins at a multiple of it
BLOCK = 128  # tokens that FlexAttention takes or skips together
HALF = (torch.bfloat16, torch.float16)
# Largest absolute difference from float32 attention, for normally distributed inputs.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Rows(NamedTuple):
    """Where the rows of a step lie in a pool of tokens `[tokens, kv heads, head dim]`.

    Attributes:
        starts: `[B + 1]` int32, where each row begins; the last one is not used.
        lengths: `[B]` int32, how many tokens it has, the new one included: at least 1.
        queries: `[B + 1]` int32, 0 .. B.
        window: most tokens of a row.
        path: the name of the path that computes it.
        whole: a row is not split over parts whose number depends on the batch.
    """

    starts: Tensor
    lengths: Tensor
    queries: Tensor
    window: int
    path: str
    whole: bool = False


class Heads(NamedTuple):
    """A model's heads of queries, of keys and values, and their size."""

    queries: int
    shared: int
    dim: int


USUAL = (Heads(8, 2, 64), Heads(8, 2, 128))

Path = Callable[[Tensor, Tensor, Tensor, Rows, float], Tensor]
"""Of queries `[B, heads, dim]`, a pool of keys, one of values, rows and a scale; as queries."""


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, rows: Rows, scale: float) -> Tensor:
    """Copy each row's window together, and mask what is beyond its length: runs anywhere.

    There its last token stands once more: what another row holds may be NaN, which no mask undoes.
    """
    places = torch.arange(rows.window, device=query.device)
    lengths = rows.lengths[:, None]
    index = rows.starts[:-1, None] + torch.minimum(places, lengths - 1)
    mask = (places < lengths)[:, None, None]
    packed = query.unflatten(1, (keys.shape[1], -1))  # heads of a group as queries of one head
    key, value = keys[index].transpose(1, 2), values[index].transpose(1, 2)
    out = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
    return out.flatten(1, 2)


def _flex(query: Tensor, keys: Tensor, values: Tensor, rows: Rows, scale: float) -> Tensor:
    """FlexAttention: all rows see the whole pool, of which blocks not their own are skipped."""
    from torch.nn.attention import flex_attention as flex  # imports the compiler

    starts, lengths = rows.starts, rows.lengths

    def own(b: Tensor, _head: Tensor, _query: Tensor, place: Tensor) -> Tensor:
        return (place >= starts[b]) & (place < starts[b] + lengths[b])

    blocks = keys.shape[0] // BLOCK
    every = torch.arange(blocks, device=query.device, dtype=torch.int32)
    count = (lengths + BLOCK - 1) // BLOCK
    mask = flex.BlockMask.from_kv_blocks(
        count[:, None, None],
        ((starts[:-1, None] // BLOCK + every) % blocks)[:, None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=own,
        seq_lengths=(1, keys.shape[0]),
    )
    run: Any = flex.flex_attention
    if query.is_cuda:  # on a CPU that would take half a minute
        run = torch.compile(run, dynamic=False)
    key, value = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    out: Tensor = run(query[:, :, None], key, value, block_mask=mask, scale=scale, enable_gqa=True)
    return out[:, :, 0]


def _flash(query: Tensor, keys: Tensor, values: Tensor, rows: Rows, scale: float) -> Tensor:
    """PyTorch's own flash kernel, which its public functions reach only without lengths (2.11).

    Into how many parts it splits rows, it derives from shapes alone: with `whole` those are fixed.
    """
    out: Tensor = _flash_kernel(
        *(query, keys, values, rows.queries, rows.starts, 1, rows.window, 0.0, False, False),
        scale=scale,
        seqused_k=rows.lengths,
    )[0]
    return out


def _varlen(query: Tensor, keys: Tensor, values: Tensor, rows: Rows, scale: float) -> Tensor:
    """The public function over the same kernel, from torch 2.12 on."""
    out: Tensor = varlen_attn(
        *(query, keys, values, rows.queries, rows.starts, 1, rows.window),
        scale=scale,
        enable_gqa=True,
        seqused_k=rows.lengths,
        **({"num_splits": 1} if rows.whole else {}),
    )
    return out


def _paged(query: Tensor, keys: Tensor, values: Tensor, rows: Rows, scale: float) -> Tensor:
    """The same with a table of pages, each row's one behind the other."""
    if query.shape[1] == keys.shape[1]:
        raise NotImplementedError("without shared key heads pages give wrong numbers in some torch")
    pages = keys.shape[0] // PAGE
    places = torch.arange(-(-rows.window // PAGE), device=query.device, dtype=torch.int32)
    table = (rows.starts[:-1, None] // PAGE + places).clamp_(max=pages - 1)
    out: Tensor = varlen_attn(
        *(query, keys.unflatten(0, (pages, PAGE)), values.unflatten(0, (pages, PAGE))),
        *(rows.queries, rows.starts, 1, rows.window),
        scale=scale,
        enable_gqa=True,
        seqused_k=rows.lengths,
        block_table=table,
        **({"num_splits": 1} if rows.whole else {}),
    )
    return out


PATHS: dict[str, Path] = {
    "flash": _flash,
    "varlen": _varlen,
    "paged": _paged,
    "flex": _flex,
    "sdpa": _sdpa,
}
"""All paths by name, the fastest first."""

_flash_kernel = torch.ops.aten._flash_attention_forward  # noqa: SLF001 - has no public name
_FLASH = str(_flash_kernel.default._schema)  # noqa: SLF001
try:
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn  # its arguments differ from version to version
    _VARLEN = set(inspect.signature(varlen_attn).parameters)
except ImportError:  # older than 2.10
    _VARLEN = set[str]()


def unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Say why a path cannot run here; nothing where it can."""
    if name == "sdpa":
        return ""
    if name == "flex":
        known = dtype in (*HALF, torch.float32) or device.type == "cpu"
        return "" if known else "needs 16 or 32 bits"
    if device.type != "cuda":
        return "needs CUDA"
    if dtype not in HALF:
        return "needs 16 bits"
    found = {
        "flash": "seqused_k" in _FLASH,
        "varlen": {"seqused_k", "enable_gqa"} <= _VARLEN,
        "paged": {"seqused_k", "enable_gqa", "block_table"} <= _VARLEN,
    }
    return "" if found[name] else f"torch {torch.__version__} has none"


def best(
    device: torch.device,
    dtype: torch.dtype,
    heads: Heads | None = None,
    *,
    whole: bool = False,
) -> str:
    """Return the fastest path that runs here and computes what it should; `sdpa` on a CPU.

    Args:
        device: where the model is.
        dtype: of its keys and values.
        heads: the model's; None: those of usual models.
        whole: as in `Rows`.

    Raises:
        torch.AcceleratorError: the device is lost.
    """
    checked = USUAL if heads is None else (heads,)
    for name in PATHS:
        if device.type == "cpu" or name == "sdpa" or unavailable(name, device, dtype):
            continue
        try:
            error = worst_error(name, device, dtype, checked, whole=whole)
        except Exception as failure:
            if isinstance(failure, torch.AcceleratorError):
                _touch(device)  # it may be lost; without a kernel of this path it is not
            log.warning("attention by '%s' fails here", name, exc_info=True)
            continue
        if error <= TOLERANCE[dtype]:
            return name
        log.warning("attention by '%s' is wrong by %g here", name, error)
    return "sdpa"


def _touch(device: torch.device) -> None:
    """Raise where nothing can be computed on a device any more."""
    torch.zeros(1, device=device).cpu()


def attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    ragged: Rows,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Do the attention of a model's layer, as `AttentionInterface` wants it.

    `query` is `[B, heads, 1, dim]`, `key` and `value` are the pools that the cache's `update`
    returns, and `ragged`, the step's rows, comes through the model's keyword arguments. Returns
    `[B, 1, heads, dim]`, and no weights.

    Raises:
        NotImplementedError: the model caps its scores, or has attention sinks.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("capped scores and attention sinks are not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = PATHS[ragged.path](query[:, :, 0], key, value, ragged, scale)
    return out[:, None], None


# There is no mask function of that name, so that models make no mask.
AttentionInterface.register(NAME, attention)


@contextmanager
def applied(config: PreTrainedConfig) -> Iterator[None]:
    """Have the text model of a configuration attend this way."""
    before = config._attn_implementation  # noqa: SLF001 - has no public name
    config._attn_implementation = NAME  # noqa: SLF001
    try:
        yield
    finally:
        config._attn_implementation = before  # noqa: SLF001


LENGTHS = (1, 2, 255, 256, 257, 511, 512)


@torch.inference_mode()
def worst_error(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    checked: Iterable[Heads] = USUAL,
    *,
    whole: bool = False,
) -> float:
    """Compute normally distributed rows of `LENGTHS` tokens by a path, and in float32 plainly.

    Returns:
        The largest absolute difference, over all the heads that are to be `checked`.
    """
    draw = torch.Generator().manual_seed(0)
    window, worst = max(LENGTHS), 0.0
    order = torch.randperm(len(LENGTHS), generator=draw)  # rows lie anywhere
    starts = torch.cat([order * window, order.new_zeros(1)]).int().to(device)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    queries = torch.arange(len(LENGTHS) + 1, dtype=torch.int32, device=device)
    rows = Rows(starts, lengths, queries, window, name, whole)
    for heads, shared, dim in checked:
        pools = torch.randn(2, len(LENGTHS) * window, shared, dim, generator=draw).to(device, dtype)
        query = torch.randn(len(LENGTHS), heads, dim, generator=draw).to(device, dtype)
        found = PATHS[name](query, pools[0], pools[1], rows, dim**-0.5).float()
        for row, (start, length) in enumerate(zip(order.tolist(), LENGTHS, strict=True)):
            first = start * window
            key, value = pools[:, first : first + length].transpose(1, 2).float().cpu()
            expected = scaled_dot_product_attention(
                query[row].float().cpu()[:, None],
                key.repeat_interleave(heads // shared, 0),
                value.repeat_interleave(heads // shared, 0),
            )[:, 0]
            worst = max(worst, float((found[row].cpu() - expected).abs().max()))
    return worst
