"""Pre-norm transformer blocks whose attention is any module with ScatterbrainAttention's forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scatterbrain.training.config import ModelConfig

AttentionFactory = Callable[[int, int, int], nn.Module]
"""Called with (num_heads, num_kv_heads, head_dim), once per layer; the module maps query (B, H, N, d), key and value
(B, Hkv, N, d) to (B, H, N, d) and takes ``key_padding_mask`` and ``is_causal``."""


class Transformer(nn.Module):
    """Blocks and the norm after them. What stands before (embeddings) and after (heads) is a subclass's.

    Args:
        config: Sizes and variants.
        attention: Makes the attention of a layer.
        is_causal: Whether a token reads only itself and those before it.

    ``recompute``, False at first, makes the backward pass compute every block again in place of keeping what is inside
    it (``train.recompute``).
    """

    def __init__(self, config: ModelConfig, attention: AttentionFactory, is_causal: bool) -> None:
        super().__init__()
        self.config, self.is_causal, self.recompute = config, is_causal, False
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = make_norm(config)

    def transform(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features (B, N, width) after blocks and norm; ``mask``, bool (B, N), is True where a token counts."""
        rotation = None
        if self.config.positions == "rotary":
            head_dim = self.config.width // self.config.heads
            rotation = rotary_angles(x.shape[1], head_dim, self.config.rope_base, x.device)
        for block in self.blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, rotation, mask, self.is_causal, use_reentrant=False)
            else:
                x = block(x, rotation, mask, self.is_causal)
        return self.norm(x)

    @torch.no_grad()
    def initialise_blocks(self, generator: torch.Generator | None) -> None:
        """Linear layers uniform in +- fan_in ** -0.5, those that write to the residual stream scaled down by depth."""
        residual_scale = (2 * self.config.layers) ** -0.5
        for block in self.blocks:
            for layer in (block.qkv, block.mlp_in):
                uniform(layer, 1.0, generator)
            for layer in (block.out, block.mlp_out):
                uniform(layer, residual_scale, generator)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, attention: AttentionFactory) -> None:
        super().__init__()
        self.heads = config.heads
        self.kv_heads = config.heads if config.kv_heads is None else config.kv_heads
        self.head_dim = config.width // config.heads
        self.gated = config.mlp == "swiglu"
        hidden = config.mlp_width
        if hidden is None:
            hidden = -(-8 * config.width // 48) * 16 if self.gated else 4 * config.width
        self.attention_norm = make_norm(config)
        features = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.width, features, bias=False)
        self.convolution = ShortConvolution(features, config.convolution) if config.convolution > 1 else None
        self.attention = attention(self.heads, self.kv_heads, self.head_dim)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = make_norm(config)
        self.mlp_in = nn.Linear(config.width, 2 * hidden if self.gated else hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, config.width, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        x = x + self._attend(self.attention_norm(x), rotation, mask, is_causal)
        hidden = self.mlp_in(self.mlp_norm(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        return x + self.mlp_out(hidden)

    def _attend(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        batch, tokens, width = x.shape
        features = self.qkv(x)
        if self.convolution is not None:
            features = self.convolution(features)
        heads = features.view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        masks = {} if mask is None else {"key_padding_mask": ~mask}  # of those who take none too
        output = self.attention(query, key, value, is_causal=is_causal, **masks)
        return self.out(output.transpose(1, 2).reshape(batch, tokens, width))


class ShortConvolution(nn.Module):
    """Every feature as a weighted sum of itself and the same feature of the ``taps - 1`` tokens before, with weights of
    its own: a token's key can then hold what came just before it. It starts as the identity.

    Args:
        features: Of a token.
        taps: Tokens that are read.
    """

    def __init__(self, features: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(taps, features))

    def forward(self, x: Tensor) -> Tensor:
        out = x * (1 + self.weight[0])
        for distance, weight in enumerate(self.weight[1:], 1):
            out = out + F.pad(x, (0, 0, distance, 0))[:, : x.shape[1]] * weight
        return out


def make_norm(config: ModelConfig) -> nn.Module:
    return nn.RMSNorm(config.width) if config.norm == "rms" else nn.LayerNorm(config.width)


def rotary_angles(tokens: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * base ** (-2 j / head_dim), float32 (tokens, head_dim / 2) (RoFormer, 3.4.2)."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(tokens, device=device, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the feature pairs (j, j + d / 2) of ``x`` (..., tokens, d) by the angle of their position."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def uniform(layer: nn.Linear, scale: float, generator: torch.Generator | None) -> None:
    bound = scale * layer.in_features**-0.5
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
