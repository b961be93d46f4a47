"""The transformer block of image models, with the parameter names that timm and T2T-ViT share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scatterbrain.training.models.blocks import AttentionFactory, uniform
from scatterbrain.training.models.exchangeable import ExchangeableAttention, let_first_queries_see_all


class SelfAttention(ExchangeableAttention):
    """``qkv``, attention and ``proj``: (batch, tokens, width) to the same shape.

    Args:
        width: features per token, a multiple of ``heads``.
        attention: makes the attention; called with (heads, heads, width / heads).
        qkv_bias: whether queries, keys and values have a bias.
        scale: factor of q.k; default (width / heads) ** -0.5.
        exact_queries: so many first tokens attend to every key, whatever the support.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        attention: AttentionFactory,
        qkv_bias: bool,
        scale: float | None = None,
        exact_queries: int = 0,
    ) -> None:
        head_dim = width // heads
        super().__init__(heads, head_dim, attention(heads, heads, head_dim), scale)
        self.exact_queries = exact_queries
        let_first_queries_see_all(self, exact_queries)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(*qkv).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """``fc1``, GELU and ``fc2``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); arguments as :class:`SelfAttention`.

    Args:
        mlp_width: hidden features of the MLP.
        norm_eps: added to the variance in both norms.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        attention: AttentionFactory,
        qkv_bias: bool,
        scale: float | None = None,
        exact_queries: int = 0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, norm_eps)
        self.attn = SelfAttention(width, heads, attention, qkv_bias, scale, exact_queries)
        self.norm2 = nn.LayerNorm(width, norm_eps)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def through(layer: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """``layer(x)``, whose inside the backward pass computes again if ``recompute``."""
    return checkpoint(layer, x, use_reentrant=False) if recompute and torch.is_grad_enabled() else layer(x)


def initialise_linear_layers(model: nn.Module, generator: torch.Generator | None) -> None:
    """Every linear layer outside of attention that was passed in, which draws its own: weights uniform in
    +- fan_in ** -0.5, biases zero. Small models start sooner from these than from the deviation .02 of large ones."""
    hosts = (module for module in model.modules() if isinstance(module, ExchangeableAttention))
    passed_in = {inner for host in hosts if host.attention is not None for inner in host.attention.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in passed_in:
            uniform(module, 1.0, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
