"""Lists of keys from a boolean mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scatterbrain.fields import INT32_MAX, check_int, not_a_bool


def lists_of_mask(
    mask: Tensor, block_q: int | None, block_k: int | None, is_causal: bool, query_offset: int
) -> tuple[Tensor, Tensor, int, int]:
    """index, count, block_q and block_k, as :class:`scatterbrain.Blocks` takes them, of a mask as
    :meth:`scatterbrain.Blocks.from_mask` does."""
    _check(mask, block_q, block_k, is_causal, query_offset)
    mask = mask if mask.dim() == 4 else mask[None, None]
    batch, heads, n, m = mask.shape
    device = mask.device
    counts = torch.ones(n, m, dtype=torch.bool, device=device)  # pairs that anybody may see
    if is_causal:
        counts = torch.arange(m, device=device) <= torch.arange(n, device=device)[:, None] + query_offset
    found_q, found_k = _largest_blocks(mask, counts)
    block_q, block_k = found_q if block_q is None else block_q, found_k if block_k is None else block_k
    chosen, left_out = (_blocks(t & counts, block_q, block_k) for t in (mask, ~mask))
    if bool((chosen & left_out).any()):
        _refuse_mixed(mask, counts, chosen & left_out, (block_q, block_k), (found_q, found_k))
    count = chosen.sum(-1, dtype=torch.int32)
    key_blocks = chosen.shape[3]
    capacity = int(count.max()) if count.numel() else 0
    entry = torch.arange(key_blocks, dtype=torch.int32, device=device)
    index = torch.where(chosen, entry, key_blocks).sort(-1).values[..., :capacity]
    return index.masked_fill(index == key_blocks, -1).to(torch.int32).contiguous(), count, block_q, block_k


def _check(mask: object, block_q: object, block_k: object, is_causal: object, query_offset: object) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"Blocks.from_mask: mask must be a bool tensor, True where weights are exact, got {got}; compare it first "
            "(mask == 0 for what is added to scores)"
        )
    if mask.dim() not in (2, 4):
        raise ValueError(
            "Blocks.from_mask: mask must be (queries, keys) or (batch, heads, queries, keys), got shape "
            f"{tuple(mask.shape)}; a batch or heads of 1 stand for all"
        )
    if mask.is_meta:
        raise ValueError("Blocks.from_mask: mask is on the meta device and holds no values; make the lists on another")
    for name, value in (("block_q", block_q), ("block_k", block_k)):
        if value is not None:
            check_int("Blocks.from_mask", name, value, 1)
    error = not_a_bool("Blocks.from_mask: is_causal", is_causal)
    if error is not None:
        raise error
    check_int("Blocks.from_mask", "query_offset", query_offset, -INT32_MAX)
    if query_offset and not is_causal:
        raise ValueError(
            f"Blocks.from_mask: query_offset shifts the causal edge and needs is_causal=True, got {query_offset}"
        )


def _largest_blocks(mask: Tensor, counts: Tensor) -> tuple[int, int]:
    """The largest sizes of blocks that are all True or all False where ``counts``. Two neighbouring rows that differ in
    a column where both count cannot share a block, so a size divides the positions of all such edges; and it may be
    their greatest common divisor, since the pairs of a block that count hang together: with a causal edge, row i has a
    run of the block's columns from its first on, which only grows with i. Likewise for columns."""

    def largest(differs: Tensor, tokens: int) -> int:
        edges = (differs.nonzero().flatten() + 1).tolist()
        return math.gcd(*edges) if edges else max(1, tokens)

    n, m = counts.shape
    rows = ((mask[..., 1:, :] != mask[..., :-1, :]) & counts[1:] & counts[:-1]).any(-1).any(0).any(0)
    columns = ((mask[..., 1:] != mask[..., :-1]) & counts[:, 1:] & counts[:, :-1]).any(-2).any(0).any(0)
    return largest(rows, n), largest(columns, m)


def _blocks(pairs: Tensor, block_q: int, block_k: int) -> Tensor:
    """bool (batch, heads, blocks of queries, blocks of keys), True where any pair of a block is; blocks at the end may
    be cut."""
    *leading, n, m = pairs.shape
    block_q, block_k = min(block_q, max(1, n)), min(block_k, max(1, m))
    rows, columns = -(-n // block_q), -(-m // block_k)
    whole = pairs.new_zeros(*leading, rows * block_q, columns * block_k)
    whole[..., :n, :m] = pairs
    return whole.view(*leading, rows, block_q, columns, block_k).any(-1).any(-2)


def _refuse_mixed(mask: Tensor, counts: Tensor, mixed: Tensor, given: tuple[int, int], found: tuple[int, int]) -> None:
    """Raises ValueError with the first block of ``mixed``."""
    (block_q, block_k), (n, m) = given, counts.shape
    b, h, row, column = mixed.nonzero()[0].tolist()
    queries = slice(row * block_q, min((row + 1) * block_q, n))
    keys = slice(column * block_k, min((column + 1) * block_k, m))
    seen = counts[queries, keys]
    exact = int((mask[b, h, queries, keys] & seen).sum())
    where = "" if mask.shape[:2] == (1, 1) else f" in batch row {b}, head {h}"
    raise ValueError(
        f"Blocks.from_mask: expected every block of {block_q} queries and {block_k} keys to be all True or all False, "
        f"got queries {queries.start} to {queries.stop - 1} and keys {keys.start} to {keys.stop - 1}{where} with "
        f"{exact} of {int(seen.sum())} pairs True ({int(mixed.sum())} such blocks); pass block_q={found[0]} and "
        f"block_k={found[1]}, the largest that fit, or None to have them found"
    )
