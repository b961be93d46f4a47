from __future__ import annotations

import pytest
import torch

import scatterbrain as sb
from scatterbrain.training.attention import (
    attention_of_layers,
    build_attention,
    build_support_and_low_rank,
    describe_attention,
    is_exact,
)
from scatterbrain.training.config import AttentionConfig


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AttentionConfig(preset="train", keys=48), sb.presets.train(keys=48)),
        (AttentionConfig(support="full"), (sb.Full(), None)),
        (AttentionConfig(support="window", keys=20), (sb.Window(20), sb.presets.train()[1])),
        (AttentionConfig(support="window", low_rank="none"), (sb.Window(64), None)),
        (AttentionConfig(support="empty", low_rank="favor"), (sb.Empty(), sb.Favor())),
        (AttentionConfig(support="window", low_rank="quadratic"), (sb.Window(64), sb.Quadratic(statistics="learned"))),
        (
            AttentionConfig(
                support={"kind": "routed", "keys": 96, "block_q": 1, "block_k": 8, "window": 32},
                low_rank={"kind": "quadratic", "rank": 4, "statistics": "ema"},
            ),
            (sb.Routed(96, block_q=1, block_k=8, window=32), sb.Quadratic(4, statistics="ema")),
        ),
    ],
)
def test_a_configuration_names_a_support_and_a_low_rank_part(config, expected):
    assert build_support_and_low_rank(config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttentionConfig(support="fulll"), "attention.support: expected one of full, .* got 'fulll'"),
        (AttentionConfig(support={"kind": "window", "width": 3}), "attention.support.width: window has no such field"),
        (AttentionConfig(low_rank={"rank": 3}), "attention.low_rank: expected one of quadratic, favor"),
        (AttentionConfig(support={"kind": "routed", "keys": -1}), "attention.support: Routed"),
        (AttentionConfig(keys=20), "attention.keys: Routed: expected keys"),
        (AttentionConfig(support="routed", keys=8), "attention.support with attention.keys 8: Routed"),
        (AttentionConfig(low_rank={"kind": "quadratic", "rank": 0}), "attention.low_rank: Quadratic"),
    ],
)
def test_what_it_cannot_name_is_refused_by_key(config, message):
    with pytest.raises(ValueError, match=message):
        build_support_and_low_rank(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttentionConfig(support="lsh"), "attention.support: expected one of full, empty, window, routed"),
        (
            AttentionConfig(low_rank={"kind": "quadratic", "statistics": "stored"}),
            "attention.low_rank.statistics: expected learned or ema, got 'stored'",
        ),
        (
            AttentionConfig(low_rank={"kind": "quadratic", "statistics": "input"}),
            "attention.low_rank.statistics: expected learned or ema, got 'input'",
        ),
        (
            AttentionConfig(low_rank="centroid"),
            "attention.low_rank: low_rank=Centroid is for bidirectional attention and cannot train a causal model; "
            "use Quadratic with statistics 'learned' or 'ema'",
        ),
        (AttentionConfig(support="empty", low_rank="none"), "attention: support=Empty"),
        (AttentionConfig(support="full", low_rank="quadratic"), "attention.low_rank: support full leaves nothing"),
    ],
)
def test_what_cannot_train_a_causal_model_from_scratch_is_refused_by_key(config, message):
    with pytest.raises(ValueError, match=message):
        build_support_and_low_rank(config)


def test_a_rank_above_the_width_of_a_head_is_refused_by_key():
    with pytest.raises(ValueError, match="attention: .*rank must be at most head_dim=4"):
        build_attention(AttentionConfig(), num_heads=2, num_kv_heads=2, head_dim=4)


def test_full_support_is_exact_attention():
    assert is_exact(AttentionConfig(support="full")) and not is_exact(AttentionConfig())
    assert describe_attention(AttentionConfig(support="full")) == "exact attention"


def test_draws_follow_the_seed_of_the_run_unless_the_configuration_has_one():
    config = AttentionConfig(support={"kind": "lsh", "keys": 32}, low_rank={"kind": "favor", "features": 16})
    assert build_support_and_low_rank(config, False, seed=3) == (sb.LSH(32, seed=3), sb.Favor(features=16, seed=3))
    own = AttentionConfig(support="window", low_rank={"kind": "favor", "seed": 5})
    assert build_support_and_low_rank(own, seed=3)[1] == sb.Favor(seed=5)


def test_every_layer_has_draws_of_its_own_which_the_seed_repeats():
    config = AttentionConfig(support="empty", low_rank={"kind": "favor", "features": 16})

    def drawn(seed: int) -> list[torch.Tensor]:
        build = attention_of_layers(config, is_causal=True, seed=seed)
        return [build(2, 2, 8).state_dict()["projection"] for _ in range(2)]

    first, again, other = drawn(3), drawn(3), drawn(4)
    assert all(map(torch.equal, first, again)) and not torch.equal(*first)
    assert not any(torch.equal(mine, theirs) for mine in first for theirs in other)


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32 + 5, 2**63 - 1])
def test_a_seed_of_more_bits_than_the_generator_has_draws_what_its_low_bits_do(seed):
    for config, is_causal in (
        (AttentionConfig(support="empty", low_rank={"kind": "favor", "features": 16}), True),
        (AttentionConfig(support="lsh", low_rank="none"), False),
    ):
        build, low_bits = (attention_of_layers(config, is_causal, number) for number in (seed, seed % 2**32))
        for _ in range(2):
            mine, theirs = build(2, 2, 8), low_bits(2, 2, 8)
            assert (mine.support, mine.low_rank) == (theirs.support, theirs.low_rank)
            assert all(map(torch.equal, mine.state_dict().values(), theirs.state_dict().values()))
