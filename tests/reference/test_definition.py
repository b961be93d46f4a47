"""The definition by hand where that is possible, and its extension from outside."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from testkit import rand, run_python
from torch import Tensor

import scatterbrain as sb
from scatterbrain.reference import Inputs
from scatterbrain.reference.low_rank import drawn_projection


def tokens(heads: int, n: int, seed: int, d: int = 8) -> Tensor:
    return rand(2, heads, n, d, seed=seed, dtype=torch.float64)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_a_window_by_hand(is_causal: bool) -> None:
    """Two rows of 10 tokens, of which the second has 2 padded ones before and one after; blocks of 4, 5 keys."""
    q = tokens(1, 10, 1)
    padding = torch.zeros(2, 10, dtype=torch.bool)
    padding[1, :2] = padding[1, 9] = True
    mask = sb.reference.mask(sb.Window(5, block_q=4), q, q, None, padding, is_causal)[:, 0]
    listed = [[row.nonzero().flatten().tolist() for row in of_row] for of_row in mask]
    if is_causal:  # [max(0, block's end - 5), i]
        assert listed[0][0] == [0] and listed[0][3] == [0, 1, 2, 3] and listed[0][4] == [3, 4]
        assert listed[0][7] == [3, 4, 5, 6, 7] and listed[0][9] == [7, 8, 9]
        assert listed[1][2] == [2] and listed[1][6] == [5, 6] and listed[1][8] == [5, 6, 7, 8]
    else:  # the centres of the blocks are 2, 6 and 10; in the second row 2 and 6 of 7 tokens
        assert listed[0][0] == listed[0][3] == [0, 1, 2, 3, 4] and listed[0][4] == [4, 5, 6, 7, 8]
        assert listed[0][8] == listed[0][9] == [5, 6, 7, 8, 9]
        assert listed[1][2] == listed[1][5] == [2, 3, 4, 5, 6] and listed[1][6] == [4, 5, 6, 7, 8]
    assert listed[1][0] == listed[1][1] == listed[1][9] == []


def test_sinks_and_windows_by_hand() -> None:
    """20 tokens, blocks of 8. Bidirectional windows lie behind the sinks, causal ones end with the block."""
    q = tokens(1, 20, 1)
    window = sb.Window(9, block_q=8, sinks=2)
    both, causal = (sb.reference.mask(window, q, q, None, is_causal=c)[0, 0] for c in (False, True))
    listed = [row.nonzero().flatten().tolist() for row in both]
    assert listed[0] == [*range(9)] and listed[8] == [0, 1, *range(9, 16)] and listed[16] == [0, 1, *range(13, 20)]
    listed = [row.nonzero().flatten().tolist() for row in causal]
    assert listed[0] == [0] and listed[7] == [*range(8)] and listed[8] == [0, 1] and listed[15] == [0, 1, *range(9, 16)]
    assert listed[17] == [0, 1, 17] and listed[19] == [0, 1, *range(17, 20)]
    routed = sb.Routed(14, block_q=8, window=10, sinks=2)  # and two of what is left
    for is_causal in (False, True):
        always = sb.reference.mask(sb.Window(12, block_q=8, sinks=2), q, q, None, is_causal=is_causal)
        mask = sb.reference.mask(routed, q, q, None, is_causal=is_causal)
        assert not (always & ~mask).any()
        assert (mask & ~always).sum(-1)[:, :, [0, 8]].eq(torch.tensor([0 if is_causal else 2, 2])).all()


LARGEST = """
import torch

import scatterbrain as sb

most, blocks, padding = 2**31 - 1, 2**31 - 8, torch.zeros(2, 40, dtype=torch.bool)
padding[1, :3] = padding[1, 20] = True
query, key, value = torch.randn(3, 2, 1, 40, 8, generator=torch.Generator().manual_seed(0))
supports = [
    sb.Window(most),
    sb.Window(most, block_q=most, sinks=most - 1),
    sb.Routed(most),
    sb.Routed(most, window=most),
    sb.Routed(most, sinks=most - 16),
    sb.Routed(most, window=2**30, sinks=2**30 - 1),
    sb.Routed(blocks, block_q=1, block_k=8),
    sb.Routed(blocks, block_q=1, block_k=8, window=blocks),
    sb.Routed(blocks, block_q=1, block_k=8, sinks=blocks),
    sb.Routed(blocks, block_q=1, block_k=8, pools=2),
    sb.Routed(blocks, block_q=1, block_k=8, pools=0),
    sb.LSH(most, rounds=1),
]
for support in supports:
    for is_causal in (False, True)[: 1 if isinstance(support, sb.LSH) else 2]:
        arguments = None, padding, is_causal
        mask = sb.reference.mask(support, query, key, *arguments)
        assert torch.equal(mask, sb.reference.visible(query, key, *arguments[1:]).expand_as(mask)), (support, is_causal)
        out = sb.attention(query, key, value, support, *arguments)
        exact = sb.reference.attention(query, key, value, support, *arguments)
        torch.testing.assert_close(out, exact.to(out.dtype), msg=lambda text: f"{support}, {is_causal}: {text}")
        print(end=".")
"""


def test_the_largest_supports_are_all_keys_and_as_quick_as_those() -> None:
    result = run_python("-c", LARGEST, seconds=120)
    assert result.returncode == 0 and len(result.stdout) == 23, result.stderr


def test_the_query_mask_defaults_to_the_key_mask_of_the_same_tokens() -> None:
    padding = torch.arange(6).expand(2, 6) > 3
    seen = sb.reference.visible(tokens(1, 6, 1), tokens(1, 6, 2), padding)
    assert seen[:, 0, :4, :4].all() and seen.sum() == 2 * 16
    seen = sb.reference.visible(tokens(1, 5, 1), tokens(1, 6, 2), padding)
    assert seen[:, 0, :, :4].all() and seen.sum() == 2 * 20


@pytest.mark.parametrize("n", [1, 2, 5, 200])
@pytest.mark.parametrize("heads", [2, 4])
def test_both_fit_the_same_statistics(heads: int, n: int) -> None:
    """Few tokens span few directions; along others the projections are not determined, and do not matter."""
    q, k = tokens(heads, n, 1), tokens(2, n + 1, 2)
    mine, other = (fit(q, k, 3, scale=0.3) for fit in (sb.reference.fit_statistics, sb.fit_statistics))
    assert torch.allclose(mine.query_mean, other.query_mean) and torch.allclose(mine.key_mean, other.key_mean)
    low_rank = sb.Quadratic(3)
    weights = []
    for statistics in (mine, other):
        log, factor = sb.reference.log_kernel(low_rank, Inputs.of(q, k, scale=0.3, statistics=statistics))
        weights.append(log.exp() * factor)
    assert torch.allclose(*weights, rtol=1e-5)


@pytest.mark.parametrize(
    "low_rank",
    [sb.Favor(seed=3), sb.Favor(7, seed=1), sb.Favor(24, hyperbolic=True), sb.Favor(5, orthogonal=False, seed=9)],
    ids=str,
)
def test_a_modules_projection_is_drawn_by_the_recipe(low_rank: sb.Favor) -> None:
    """The first, and those of later draws."""
    module = sb.ScatterbrainAttention(2, 8, support=sb.Empty(), low_rank=replace(low_rank, redraw=1))
    for draw in range(3):
        assert torch.equal(module.projection, drawn_projection(low_rank, 8, draw))
        sb.update_statistics(module)


# -------------------- supports and kernels from outside


@dataclass(frozen=True)
class Strided:
    """Every ``step``-th key."""

    step: int


@dataclass(frozen=True)
class Constant:
    """L = exp(log_weight)."""

    log_weight: float


@sb.reference.support_mask.register
def _(support: Strided, inputs: Inputs) -> Tensor:
    return inputs.pairs(True) & (torch.arange(inputs.key.shape[2]) % support.step == 0)


@sb.reference.log_kernel.register
def _(low_rank: Constant, inputs: Inputs) -> tuple[Tensor, Tensor]:
    ones = inputs.pairs(True).to(inputs.query.dtype)
    return low_rank.log_weight * ones, ones


def test_a_support_and_a_kernel_are_added_from_outside() -> None:
    q, k, v = tokens(2, 9, 1), tokens(2, 9, 2), tokens(2, 9, 3)
    out = sb.reference.attention(q, k, v, Strided(3), Constant(-0.5), is_causal=True)
    score = torch.where(torch.arange(9) % 3 == 0, q @ k.mT * 8**-0.5, -0.5)
    want = torch.softmax(score.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf), -1) @ v
    assert torch.allclose(out, want)


def test_what_is_not_registered_says_how_to_register_it() -> None:
    q, k, v = tokens(2, 9, 1), tokens(2, 9, 2), tokens(2, 9, 3)
    with pytest.raises(TypeError, match=r"knows no support int.*@sb\.reference\.support_mask\.register"):
        sb.reference.attention(q, k, v, 7, None)
    with pytest.raises(TypeError, match=r"knows no low-rank kernel str.*@sb\.reference\.log_kernel\.register"):
        sb.reference.attention(q, k, v, sb.Empty(), "exp")
    with pytest.raises(TypeError, match=r"no coordinates of Constant.*@sb\.reference\.coordinates\.register"):
        sb.reference.attention(q, k, v, sb.Routed(16, 8), Constant(0.0))


MEANINGLESS = {
    "heads that do not divide": (dict(query=tokens(3, 9, 1)), "Hq a multiple of Hkv"),
    "value of other tokens": (dict(value=tokens(2, 8, 3)), "expected value"),
    "mask of another length": (dict(key_padding_mask=torch.zeros(2, 8, dtype=torch.bool)), "key_padding_mask must be"),
    "a mask of numbers": (dict(query_padding_mask=torch.zeros(2, 9)), "query_padding_mask must be bool"),
    "infinite scale": (dict(scale=float("inf")), "scale must be finite"),
    "offset without an edge": (dict(query_offset=3), "needs is_causal=True"),
    "causal clusters": (dict(support=sb.LSH(4), is_causal=True), "bidirectional only"),
    "causal statistics of the input": (dict(low_rank=sb.Quadratic(3, "input"), is_causal=True), "leak the future"),
    "no statistics": (dict(low_rank=sb.Quadratic(3)), "Quadratic needs statistics"),
    "another scale": (dict(low_rank=sb.Quadratic(3), scale=0.1), "fitted for scale"),
    "rank above head_dim": (dict(low_rank=sb.Quadratic(9, "input")), "at most head_dim=8"),
    "lists of other queries": (dict(support="lists"), "index must lead with"),
    "lists of other keys": (dict(support="keys"), "past the row's 9 keys"),
}


@pytest.mark.parametrize("name", MEANINGLESS)
def test_what_has_no_meaning_is_refused(name: str) -> None:
    changed, message = MEANINGLESS[name]
    q, k = tokens(2, 9, 1), tokens(2, 9, 2)
    given = dict(query=q, key=k, value=tokens(2, 9, 3), support=sb.Window(4), low_rank=None) | changed
    lists = sb.Blocks(torch.full((2, 2, 2, 1), 9, dtype=torch.int32), torch.ones(2, 2, 2, dtype=torch.int32), 8, 1)
    given["support"] = {"lists": replace(lists, block_q=4), "keys": lists}.get(given["support"], given["support"])
    if name == "another scale":
        given["statistics"] = sb.reference.fit_statistics(q, k, 3)
    with pytest.raises((TypeError, ValueError), match=message):
        sb.reference.attention(**given)
