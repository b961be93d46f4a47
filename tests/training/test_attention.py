from __future__ import annotations

import pytest

import scatterbrain as sb
from scatterbrain.training.attention import build_support_and_low_rank, describe_attention, is_exact
from scatterbrain.training.config import AttentionConfig


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AttentionConfig(preset="train", keys=48), sb.presets.train(keys=48)),
        (AttentionConfig(support="full"), (sb.Full(), None)),
        (AttentionConfig(support="window", keys=32), (sb.Window(32), sb.presets.train()[1])),
        (AttentionConfig(support="window", low_rank="none"), (sb.Window(64), None)),
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
        (AttentionConfig(support={"kind": "routed", "keys": -1}), "attention.support: "),
    ],
)
def test_what_it_cannot_name_is_refused_by_key(config, message):
    with pytest.raises(ValueError, match=message):
        build_support_and_low_rank(config)


def test_full_support_is_exact_attention():
    assert is_exact(AttentionConfig(support="full")) and not is_exact(AttentionConfig())
    assert describe_attention(AttentionConfig(support="full")) == "exact attention"
