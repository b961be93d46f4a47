"""The baselines in plain torch against the dense definitions of their names."""

from __future__ import annotations

import math
from functools import partial

import pytest
import testkit
import torch
from testkit import assert_all_close, out_and_gradients, rand
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import scatterbrain as sb
from scatterbrain.bench import baselines, flex
from scatterbrain.bench.methods import parse_method
from scatterbrain.low_rank.favor import seeded_projection

H, N, D = 3, 48, 8


qkv = partial(testkit.qkv, N, heads=H, kv_heads=H, dtype=torch.float64)


def masked(tensors: list[Tensor], mask: Tensor) -> Tensor:
    query, key, value = tensors
    scores = (query @ key.transpose(-1, -2) * D**-0.5).masked_fill(~mask, -math.inf)
    return torch.softmax(scores, -1) @ value


def assert_same(function: object, want: object, tensors: list[Tensor]) -> None:
    """Outputs and gradients."""
    assert_all_close(*(out_and_gradients(f, tensors) for f in (function, want)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("keys", [1, 7, 16, 48, 100])
def test_the_sliding_window_is_attention_under_the_mask_of_its_support(keys: int, is_causal: bool) -> None:
    tensors = qkv()
    mask = sb.reference.mask(sb.Window(keys, block_q=1), *tensors[:2], is_causal=is_causal)
    assert_same(lambda *t: baselines.sliding_window(*t, keys, is_causal), lambda *t: masked(list(t), mask), tensors)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("features", [8, 20])
def test_the_performer_is_attention_with_its_features_alone(features: int, is_causal: bool) -> None:
    low_rank = sb.Favor(features)
    statistics = sb.RandomFeatures(seeded_projection(low_rank, D))
    assert_same(
        lambda *t: baselines.performer(*t, features, is_causal),
        lambda *t: sb.reference.attention(*t, sb.Empty(), low_rank, is_causal=is_causal, statistics=statistics),
        qkv(),
    )


# ---------------------------------------------------------------------------------------- flex_attention


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("tokens, keys", [(32, 8), (48, 1), (48, 100), (130, 7), (130, 64), (131, 97), (256, 100)])
def test_the_mask_of_blocks_is_the_one_that_torch_finds_by_looking_at_every_pair(
    tokens: int, keys: int, is_causal: bool
) -> None:
    """Blocks that are looked at, blocks that need no look inside, and the pairs."""
    cpu = torch.device("cpu")
    ours = flex.window_mask(tokens, keys, is_causal, cpu)
    theirs = create_block_mask(ours.mask_mod, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=flex.BLOCK["cpu"])

    def blocks(number: torch.Tensor, index: torch.Tensor) -> list[list[int]]:
        return [sorted(row[:n].tolist()) for row, n in zip(index[0, 0], number[0, 0])]

    assert blocks(ours.kv_num_blocks, ours.kv_indices) == blocks(theirs.kv_num_blocks, theirs.kv_indices)
    assert blocks(ours.full_kv_num_blocks, ours.full_kv_indices) == blocks(
        theirs.full_kv_num_blocks, theirs.full_kv_indices
    )
    at = torch.arange(tokens)
    pairs = ours.mask_mod(torch.tensor(0), torch.tensor(0), at[:, None], at)
    tensors = rand(1, 1, tokens, D), rand(1, 1, tokens, D)
    support = sb.Window(keys, block_q=1)
    assert torch.equal(pairs, sb.reference.mask(support, *tensors, is_causal=is_causal)[0, 0])


def test_flex_attention_says_that_it_has_no_backward_pass_on_the_cpu() -> None:
    leaves = [t.requires_grad_() for t in qkv()]
    with pytest.raises(NotImplementedError, match="no backward pass on the CPU; measure --directions F"):
        flex.flex_window(*leaves, keys=8)


def test_a_compiler_that_fails_is_a_reason_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*tokens: Tensor, **settings: object) -> Tensor:
        raise KeyError("\n no compiler\nat all")

    monkeypatch.setattr(flex, "_compiled", lambda: fail)
    with pytest.raises(RuntimeError, match="^flex_attention cannot be compiled or run here: .*no compiler"):
        flex.flex_window(*qkv(), keys=9)


# ---------------------------------------------------------------------------------------- clusters


def cluster_mask(orders: tuple[Tensor, Tensor], size: int) -> Tensor:
    """bool (B, H, N, N): query and key have ranks in one run of ``size``."""
    q_cluster, k_cluster = (torch.argsort(order, -1) // size for order in orders)
    return q_cluster[..., :, None] == k_cluster[..., None, :]


def test_one_round_of_clusters_is_attention_under_their_mask() -> None:
    tensors = qkv()
    (orders,) = baselines.cluster_orders(*tensors[:2], rounds=1, seed=3)
    mask = cluster_mask(orders, 12)
    assert (mask.sum(-1) == 12).all() and (mask.sum(-2) == 12).all()
    assert_same(lambda *t: baselines.clusters(*t, 12, rounds=1, seed=3), lambda *t: masked(list(t), mask), tensors)


def test_rounds_of_clusters_count_a_pair_as_often_as_they_join_it() -> None:
    tensors = qkv()
    masks = [cluster_mask(orders, 8) for orders in baselines.cluster_orders(*tensors[:2], rounds=3, seed=3)]

    def definition(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = sum(torch.exp(query @ key.transpose(-1, -2) * D**-0.5) * mask for mask in masks)
        return weights @ value / weights.sum(-1, keepdim=True)

    assert_same(lambda *t: baselines.clusters(*t, 24, rounds=3, seed=3), definition, tensors)


def test_clusters_bring_queries_to_keys_with_large_products() -> None:
    topics = 3 * rand(4, D, seed=8)  # far apart
    tokens = topics[torch.arange(N) % 4].expand(1, 1, N, D) + 0.1 * rand(1, 1, N, D, seed=1)
    (orders,) = baselines.cluster_orders(tokens, tokens, rounds=1, seed=0)
    products = tokens @ tokens.transpose(-1, -2)
    mask = cluster_mask(orders, N // 4)
    assert products[mask].mean() > products.mean() + products.std()


def test_clusters_refuse_lengths_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="multiple of 10 tokens"):
        baselines.clusters(*qkv(), keys=20)


# ---------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name, message",
    [
        ("flash", "unknown method"),
        ("window", "window-64"),
        ("sdpa-64", "sdpa without a number"),
        ("torch-window-64+favor", "takes no low-rank kernel"),
        ("per-query-60", "multiples of 8"),
        ("routed-4", "at least block_q"),
        ("causal-0", "at least 1"),
        ("lsh-63", "divide by rounds"),
        ("torch-window-0", "at least 1"),
        ("torch-flex-0", "at least 1"),
        ("torch-flex", "torch-flex-64"),
        ("empty+none", "nothing would be left"),
    ],
)
def test_names_of_no_method_are_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(name)


@pytest.mark.parametrize(
    "name",
    ["sdpa", "full", "window-8", "window-8+none", "window-8+input", "routed-16+favor", "per-query-24", "lsh-8", "empty"]
    + ["causal-16"]
    + ["torch-window-8", "torch-performer-8", "torch-clusters-8", "torch-flex-8"],
)
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_every_method_runs_with_grouped_heads(name: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    method = parse_method(name)
    if method.refusal(is_causal):
        assert is_causal and ("lsh" in name or "clusters" in name or "input" in name)
        return
    query, key, value = (t.float() for t in qkv())
    query = torch.cat([query, query.flip(1)], 1)
    attention = method.build(sb.fit_statistics(query, key, 3), 3, is_causal)
    out = attention(query, key, value)
    assert out.shape == query.shape and out.isfinite().all()
    if is_causal:
        changed = attention(query, key, torch.cat([value[:, :, :-1], value[:, :, -1:] + 1], 2))
        torch.testing.assert_close(out[:, :, :-1], changed[:, :, :-1])
