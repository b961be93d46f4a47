from __future__ import annotations

import pytest
import torch

import scatterbrain as sb
from scatterbrain.training.low_rank_share import low_rank_share


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("support", [sb.Window(9), sb.Routed(32, block_q=1, block_k=8, window=16), sb.Empty()])
def test_the_share_is_that_of_the_weights_of_the_definition(support, is_causal):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 70, 16, generator=generator)
    mask = torch.arange(70) >= torch.tensor([[70], [51]])
    attention = sb.ScatterbrainAttention(2, 16, support=support, low_rank=sb.Quadratic(rank=3, statistics="learned"))
    share = low_rank_share(attention, query, key, value, mask, is_causal)
    assert share == pytest.approx(expected_share(attention, query, key, mask, is_causal), abs=1e-5)
    assert share == 1.0 if support == sb.Empty() else 0.05 < share < 0.999


def expected_share(attention, query, key, mask, is_causal) -> float:
    """By the definition: with the identity as value, the outputs are the weights."""
    low_rank = attention.low_rank_of(is_causal)
    support, statistics = attention.support_of(is_causal), low_rank.coefficients(attention)
    value = torch.eye(70, dtype=torch.float64).expand(2, 2, 70, 70)
    query, key = query.double(), key.double()
    weights = sb.reference.attention(query, key, value, support, low_rank, mask, is_causal, statistics=statistics)
    listed = sb.reference.mask(support, query, key, low_rank, mask, is_causal, statistics=statistics)
    others = (weights * ~listed).sum(-1)
    return float(others[~mask[:, None].expand_as(others)].mean())


def test_a_layer_without_a_low_rank_part_has_no_share():
    query = torch.randn(1, 1, 40, 8)
    for support in (sb.Full(), sb.Window(8)):
        attention = sb.ScatterbrainAttention(1, 8, support=support, low_rank=None)
        assert low_rank_share(attention, query, query, query) is None
