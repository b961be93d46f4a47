"""Queries that see nothing: gradients of their result and of their lse that are no numbers reach no other token."""

import pytest
import torch
from emulated import Emulator
from testkit import projections, rand, weights
from torch import Tensor

import scatterbrain as sb

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
KERNELS = ["none", "quadratic", "favor"]


def gradients(emulator: Emulator, tokens: list[Tensor], bad: Tensor, value: float, **arguments: object) -> list[Tensor]:
    """Of q, k, v and of projections that are parameters, where queries ``bad`` (N,) get gradients of ``value``."""
    leaves = [t.detach().requires_grad_() for t in tokens]
    learned = [t.requires_grad_() for t in weights(arguments["statistics"])] if "statistics" in arguments else []
    with emulator.installed():
        out, lse = sb.attention(*leaves, return_lse=True, **arguments)
        given = [rand(*t.shape, seed=9).to(t.dtype) for t in (out, lse)]
        for of in given:
            of[:, :, bad] = value
        return list(torch.autograd.grad([out, lse], leaves + learned, given, allow_unused=True))


def assert_nothing_reached(emulator: Emulator, tokens: list[Tensor], bad: Tensor, **arguments: object) -> None:
    expected = gradients(emulator, tokens, bad, 0.0, **arguments)
    for value in (torch.nan, torch.inf):
        for found, want in zip(gradients(emulator, tokens, bad, value, **arguments), expected, strict=True):
            assert want is None or torch.equal(found, want)
    assert (expected[0][:, :, bad] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [128, 20], ids=["state", "by-key"])
def test_features_that_are_all_zero(emulator: Emulator, keys: int, dtype: torch.dtype) -> None:
    tokens = [rand(1, 2, n, 32, seed=i).to(dtype) for i, n in enumerate((128, keys, keys))]
    tokens[1] = tokens[1].abs()
    bad = torch.arange(128) == 5
    tokens[0][:, :, bad] = -tokens[0][:, :, bad].abs()
    for is_causal in (False, True):
        assert_nothing_reached(
            emulator, tokens, bad, support=sb.Empty(), low_rank=sb.Features(torch.relu), is_causal=is_causal
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "low_rank", [None, sb.Quadratic(4, "learned"), sb.Favor(8)], ids=["none", "quadratic", "favor"]
)
@pytest.mark.parametrize("block_q", [16, 8, 1])
def test_queries_before_the_first_key(
    emulator: Emulator, block_q: int, low_rank: sb.Quadratic | sb.Favor | None, dtype: torch.dtype
) -> None:
    tokens = [rand(1, 2, 64, 32, seed=i).to(dtype) for i in range(3)]
    bad = torch.arange(64) < 8
    arguments = dict(support=sb.Window(16, block_q), low_rank=low_rank, is_causal=True, query_offset=-8)
    if isinstance(low_rank, sb.Quadratic):
        wide = torch.promote_types(dtype, torch.float32)
        arguments["statistics"] = projections(4, heads=2, kv_heads=2, head_dim=32, dtype=wide)
    assert_nothing_reached(emulator, tokens, bad, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low_rank", [None, sb.Quadratic(4), sb.Centroid(5)], ids=["none", "quadratic", "centroid"])
@pytest.mark.parametrize("block_q", [16, 8])
def test_a_row_whose_keys_are_all_ignored(
    emulator: Emulator, block_q: int, low_rank: sb.Quadratic | sb.Centroid | None, dtype: torch.dtype
) -> None:
    tokens = [rand(2, 2, 48, 32, seed=i).to(dtype) for i in range(3)]
    arguments = dict(
        support=sb.Window(16, block_q),
        low_rank=low_rank,
        key_padding_mask=torch.tensor([[True], [False]]).expand(2, 48),
        query_padding_mask=torch.zeros(2, 48, dtype=torch.bool),
    )
    if isinstance(low_rank, sb.Quadratic):
        arguments["statistics"] = sb.fit_statistics(*(t.float() for t in tokens[:2]), 4)
    leaves = [t.detach().requires_grad_() for t in tokens]
    with emulator.installed():
        out, lse = sb.attention(*leaves, return_lse=True, **arguments)
        given = [rand(*t.shape, seed=9).to(t.dtype) for t in (out, lse)]
        expected = torch.autograd.grad([out, lse], leaves, given, retain_graph=True)
        for of in given:
            of[0] = torch.nan
        found = torch.autograd.grad([out, lse], leaves, given)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got[1], want[1]) and (got[0] == 0).all()
