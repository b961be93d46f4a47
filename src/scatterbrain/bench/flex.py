"""torch's flex_attention as one would use it for a sliding window: compiled, with a mask of blocks that skips what lies
outside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Tokens of a block of the mask. The CPU's kernel is fastest with small ones (a window of 64 over 4096 tokens: 7 ms, and
# 19 with flex_attention's default of 128); a GPU's is made for the default.
BLOCK = {"cpu": 32}
DEFAULT_BLOCK = 128
RECOMPILE_LIMIT = 1024  # a variant for every length: torch's own limit would leave all after the eighth uncompiled

_compiled_variants: set[tuple[object, ...]] = set()


def flex_window(query: Tensor, key: Tensor, value: Tensor, keys: int, is_causal: bool = False) -> Tensor:
    """Softmax over the ``keys`` nearest keys of each query, or the last ``keys`` up to it: the window of
    :func:`scatterbrain.bench.baselines.sliding_window`. The first call of each shape compiles.

    Args:
        query: (B, Hq, N, d); key, value: (B, Hkv, N, d), as many queries as keys.
        keys: width of the window, shifted to stay inside the sequence.
        is_causal: keys after the query are left out.

    Raises:
        NotImplementedError: gradients on the CPU, where flex_attention has none.
        RuntimeError: flex_attention cannot be compiled or run here.
    """
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if wants_gradient and query.device.type == "cpu":
        raise NotImplementedError("flex_attention has no backward pass on the CPU; measure --directions F")
    mask = window_mask(query.shape[2], keys, is_causal, query.device)
    variant = (query.shape, key.shape, query.dtype, query.device, keys, is_causal, wants_gradient)
    run = functools.partial(_compiled(), query, key, value, block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])
    if variant in _compiled_variants:
        return run()
    with _compiling():
        out = run()
    _compiled_variants.add(variant)
    return out


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@contextmanager
def _compiling() -> Iterator[None]:
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            yield
    except Exception as error:  # the compiler's errors have no common class
        reason = next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)
        raise RuntimeError(f"flex_attention cannot be compiled or run here: {reason}") from error


@functools.lru_cache(maxsize=64)
def window_mask(tokens: int, keys: int, is_causal: bool, device: torch.device) -> BlockMask:
    """The mask of a window, made from its ends: ``create_block_mask`` would look at every pair."""
    keys = min(keys, tokens)
    first = 1 - keys if is_causal else -(keys // 2)  # of a query's window, counted from the query
    latest = tokens if is_causal else tokens - keys

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        begin = (query + first).clamp(0, latest)
        return (key >= begin) & (key <= query) if is_causal else (key >= begin) & (key < begin + keys)

    size = BLOCK.get(device.type, DEFAULT_BLOCK)
    blocks = -(-tokens // size)
    least = torch.arange(blocks, device=device) * size  # first token of a block
    greatest = (least + size - 1).clamp(max=tokens - 1)

    def window(query: Tensor) -> tuple[Tensor, Tensor]:
        begin = (query + first).clamp(0, latest)
        return begin, query + 1 if is_causal else begin + keys

    (begin, least_end), (last_begin, end) = window(least), window(greatest)  # both ends ascend with the query
    column = torch.arange(blocks, device=device)
    is_touched = (column * size < end[:, None]) & ((column + 1) * size > begin[:, None])
    is_full = (column * size >= last_begin[:, None]) & ((column + 1) * size <= least_end[:, None])
    is_full[tokens // size :] = False  # a last block that the tokens do not fill
    some, whole = (_listed(chosen) for chosen in (is_touched & ~is_full, is_full))
    return BlockMask.from_kv_blocks(
        *some, *whole, BLOCK_SIZE=size, mask_mod=is_seen, seq_lengths=(tokens, tokens)
    )  # fmt: skip


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each row are chosen, and which, first in the row; for any batch row and head."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()
