"""How much of the weight of attention the low-rank part carries: a part that carries nothing is dead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.checks import lists_keys
from scatterbrain.training.attention_timer import TimedAttention


@contextmanager
def low_rank_shares(model: nn.Module) -> Iterator[list[float]]:
    """Measures every layer's share in the forward passes inside the block.

    The share of a query is that of its weights under the common normaliser: one minus the sum over its listed keys over
    the sum over all keys. A figure of the list is the mean over queries and heads of a layer with a low-rank part, in
    the order of the calls.
    """
    shares: list[float] = []

    def measure(layer: TimedAttention, args: tuple, kwargs: dict, output: Tensor) -> None:
        attention = layer.attention
        if not isinstance(attention, sb.ScatterbrainAttention):
            return
        share = low_rank_share(attention, *args, **kwargs)
        if share is not None:
            shares.append(share)

    layers = [module for module in model.modules() if isinstance(module, TimedAttention)]
    hooks = [layer.register_forward_hook(measure, with_kwargs=True) for layer in layers]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def low_rank_share(
    attention: sb.ScatterbrainAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> float | None:
    """Mean over queries and heads of one call; None where the layer has no low-rank part."""
    support, low_rank = attention.support_of(is_causal), attention.kernel_that_runs(is_causal)
    if support.is_full or low_rank is None:
        return None
    lse = attention(query, key, value, key_padding_mask, is_causal, return_lse=True)[1]
    listed = torch.full_like(lse, -torch.inf)
    if lists_keys(support, is_causal):
        if support.depends_on_content:
            statistics = low_rank.coefficients(attention)
            support = sb.route(query, key, support, low_rank, key_padding_mask, is_causal, statistics=statistics)
        listed = sb.attention(query, key, value, support, None, key_padding_mask, is_causal, return_lse=True)[1]
    counts = lse.isfinite()
    if key_padding_mask is not None:
        counts &= ~key_padding_mask[:, None]
    return 1 - float((listed - lse)[counts].exp().mean())
