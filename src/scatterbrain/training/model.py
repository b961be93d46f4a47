"""A small decoder-only transformer whose attention is any module with ScatterbrainAttention's forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scatterbrain.training.config import ModelConfig

AttentionFactory = Callable[[int, int, int], nn.Module]
"""Called with (num_heads, num_kv_heads, head_dim), once per layer."""


class Decoder(nn.Module):
    """Pre-norm blocks of causal attention with rotary positions and an MLP, then a norm and a linear head.

    Args:
        config: Sizes and variants.
        vocabulary: Number of tokens.
        attention: Makes the attention of a layer; it maps query (B, H, N, d), key and value (B, Hkv, N, d) to
            (B, H, N, d) and takes ``is_causal``.
        generator: Draws every weight except those of the attention modules, so models that differ in attention alone
            start from the same weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: int,
        attention: AttentionFactory,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.head = None if config.tied else nn.Linear(config.width, vocabulary, bias=False)
        self._initialise(generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, N, vocabulary) of the token after each of ``tokens``, int64 (B, N)."""
        x = self.embedding(tokens)
        rotation = rotary_angles(
            tokens.shape[1], self.config.width // self.config.heads, self.config.rope_base, x.device
        )
        for block in self.blocks:
            x = block(x, rotation)
        return F.linear(self.norm(x), self.embedding.weight if self.head is None else self.head.weight)

    def _initialise(self, generator: torch.Generator | None) -> None:
        """Linear layers uniform in +- fan_in ** -0.5, those that write to the residual stream scaled down by depth."""
        residual_scale = (2 * self.config.layers) ** -0.5
        with torch.no_grad():
            nn.init.normal_(
                self.embedding.weight, std=self.config.embedding_std * self.config.width**-0.5, generator=generator
            )
            for block in self.blocks:
                for layer in (block.qkv, block.mlp_in):
                    _uniform(layer, 1.0, generator)
                for layer in (block.out, block.mlp_out):
                    _uniform(layer, residual_scale, generator)
            if self.head is not None:
                _uniform(self.head, 1.0, generator)


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
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.attention = attention(self.heads, self.kv_heads, self.head_dim)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = make_norm(config)
        self.mlp_in = nn.Linear(config.width, 2 * hidden if self.gated else hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self._attend(self.attention_norm(x), rotation)
        hidden = self.mlp_in(self.mlp_norm(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        return x + self.mlp_out(hidden)

    def _attend(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.qkv(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        output = self.attention(rotate(query, rotation), rotate(key, rotation), value, is_causal=True)
        return self.out(output.transpose(1, 2).reshape(batch, tokens, width))


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


def _uniform(layer: nn.Linear, scale: float, generator: torch.Generator | None) -> None:
    bound = scale * layer.in_features**-0.5
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
