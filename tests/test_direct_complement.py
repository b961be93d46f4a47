"""Queries whose listed keys hold nearly all of the low-rank part: what is left of it must not be rounding."""

from __future__ import annotations

import pytest
import torch
from oracle import row_error

import scatterbrain as sb  # noqa: F401  (registers the operator)

KEYS, LISTED, HEAD_DIM, RANK = 320, 48, 16, 2


def peaked_call(block_q: int, is_causal: bool, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and gradients of the operator where L of the listed keys is 1e6 times every other weight."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    query, key, value = (normal(1, 2, KEYS, HEAD_DIM) for _ in range(3))
    query_map, key_map = 0.3 * normal(1, 2, KEYS, RANK + 1), 0.3 * normal(1, 2, KEYS, RANK + 1)
    query_map[..., 0], key_map[:, :, :LISTED, 0] = 4.0, 500.0
    blocks = -(-KEYS // block_q)
    index = torch.arange(LISTED, dtype=torch.int32).expand(1, 1, blocks, LISTED).contiguous()
    count = torch.full((1, 1, blocks), LISTED, dtype=torch.int32)
    if is_causal:  # a list names no key after its block's last query
        last = torch.arange(1, blocks + 1, dtype=torch.int32) * block_q
        count = torch.minimum(count, last.expand(1, 1, blocks)).contiguous()
        index = torch.where(torch.arange(LISTED) < count[..., None], index, -1).to(torch.int32)
    leaves = [t.to(dtype).requires_grad_() for t in (query, key, value, query_map, key_map)]
    out, lse = torch.ops.scatterbrain.attention(
        *leaves, index, count, None, None, None, None, None, None, None, 1, block_q, 1, 0, is_causal, 0.25
    )
    gradients = [normal(*out.shape).to(dtype), normal(*lse.shape).to(dtype)]
    return [out.detach(), lse.detach()], list(torch.autograd.grad([out, lse], leaves, gradients))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block_q", [1, 8, 16, 32])
def test_what_is_left_of_a_peaked_low_rank_part_is_exact(block_q: int, is_causal: bool) -> None:
    results, gradients = peaked_call(block_q, is_causal, torch.float32)
    want, want_gradients = peaked_call(block_q, is_causal, torch.float64)
    for got, expected in zip((*results, *gradients), (*want, *want_gradients)):
        assert row_error(got, expected) < 1e-4


def test_the_state_alone_would_lose_it() -> None:
    """The case is one where subtracting listed keys from the state in float32 leaves nothing but rounding."""
    total = torch.tensor(LISTED * (1 + 4.0 * 500.0 / 2) ** 2, dtype=torch.float32)
    rest = float(KEYS - LISTED)
    assert torch.finfo(torch.float32).eps * total > 1e-2 * rest


@pytest.mark.parametrize("block_q", [1, 16])
def test_the_result_is_the_same_for_any_number_of_threads(block_q: int) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = peaked_call(block_q, True, torch.float32)
        torch.set_num_threads(4)
        four = peaked_call(block_q, True, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip((*one[0], *one[1]), (*four[0], *four[1])))
