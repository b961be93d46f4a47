"""Attention layers whose attention is a submodule that anything can take the place of, ``sb.replace_attention`` too."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from scatterbrain.integrations import register_replacer
from scatterbrain.integrations.restrictions import errors_as_reasons
from scatterbrain.low_rank import LowRank
from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.nn.host_module import attention_unless_exact
from scatterbrain.nn.pairs import Pairs
from scatterbrain.supports import Support


class ExactAttention(nn.Module):
    """softmax(q k / sqrt(d)) v by torch's own kernel; query (B, H, N, d), key (B, H, M, d), value (B, H, M, dv)."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def exact_attention(num_heads: int, num_kv_heads: int, head_dim: int) -> nn.Module:
    """The factory of :class:`ExactAttention`."""
    return ExactAttention()


class ExchangeableAttention(nn.Module):
    """A layer that makes queries, keys and values for its submodule ``attention``, which is called as
    :class:`ScatterbrainAttention` is, and has no parameters of its own where attention is exact.

    Args:
        num_heads: query heads, and heads of keys and values.
        head_dim: width of queries and keys.
        attention: the submodule; None where the layer computes attention itself.
        scale: factor of q.k; default 1/sqrt(head_dim), that of ``attention``. For another one queries and keys are
            multiplied alike, so that random features are those of this scale.
    """

    def __init__(self, num_heads: int, head_dim: int, attention: nn.Module | None, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.factor = 1.0 if scale is None else math.sqrt(scale * math.sqrt(head_dim))
        self.attention = attention

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention over all tokens; shapes as :class:`ExactAttention`."""
        if self.factor != 1.0:
            query, key = query * self.factor, key * self.factor
        return self.attention(query, key, value)


def let_first_queries_see_all(module: nn.Module, queries: int) -> None:
    """Lets so many first tokens, class tokens for one, attend to every key in all attention inside ``module``: a class
    token's neighbours in the sequence are not what it looks for."""
    for inner in module.modules():
        if isinstance(inner, ScatterbrainAttention):
            inner.exact_queries = queries


class ExchangeableReplacer:
    """``sb.replace_attention`` for these layers: their submodule ``attention`` is another one afterwards. Queries that
    saw every key still do."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, ExchangeableAttention)

    def replace(
        self, module: ExchangeableAttention, support: Support, low_rank: LowRank
    ) -> tuple[str, Callable[[], None]]:
        before = module.attention
        first = getattr(module, "exact_queries", 0)
        with errors_as_reasons():
            attention = attention_unless_exact(module.num_heads, module.head_dim, Pairs(support, low_rank), first)
        attention = ExactAttention() if attention is None else attention
        parameter = next(module.parameters())
        if not parameter.is_meta:
            attention.to(parameter.device)
        attention.train(module.training)
        module.attention = attention

        def undo() -> None:
            module.attention = before

        return "", undo


register_replacer(ExchangeableReplacer())
