"""timm's attention with rotary positions, and sparse + low-rank attention inside: EVA-02, DINOv3, rope ViTs and
Gemma 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope as TimmAttentionRope
from timm.layers import apply_rot_embed_cat
from timm.models.eva import EvaAttention as TimmEvaAttention
from timm.models.gemma4_vit import Gemma4Attention as TimmGemma4Attention
from timm.models.gemma4_vit import apply_multidimensional_rope
from torch import Tensor

from scatterbrain.integrations.timm_host import TimmHost


class Rotary(TimmHost):
    """Mixin for EvaAttention and AttentionRope: queries and keys behind the prefix tokens are rotated by position, then
    attention is softmax(q k^T) v. A :class:`TimmHost`."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As timm's: ``x`` (batch, tokens, dim); ``rope`` sines and cosines of the patches, (..., patches, 2 head_dim);
        ``attn_mask`` as F.scaled_dot_product_attention takes it."""
        if self.attention is None:
            return super().forward(x, rope, attn_mask, is_causal)
        padding = self._padding(attn_mask, x)
        if self._runs_exact(attn_mask, padding, is_causal):
            return self.attention.with_zero_gradients(super().forward(x, rope, attn_mask, is_causal))
        gate = None if self.gate is None else self.gate(x).sigmoid()
        q, k, v = self._projections(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._rotated(tokens, rope).type_as(v) for tokens in (q, k))
        scale = None if self.fused_attn else self.scale  # timm's fused kernel always uses 1/sqrt(head_dim)
        out = self.norm(self.attention(q, k, v, padding, is_causal, scale).transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(out if gate is None else out * gate))

    def _projections(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries (batch, heads, tokens, head_dim), keys and values with their own number of heads."""
        if self.qkv is not None:
            parts = self._fused(x).chunk(3, -1)
        else:
            parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)

    def _fused(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def _rotated(self, tokens: Tensor, rope: Tensor) -> Tensor:
        prefix, patches = tokens[:, :, : self.num_prefix_tokens], tokens[:, :, self.num_prefix_tokens :]
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=getattr(self, "rotate_half", False))], 2)


class AttentionRope(Rotary, TimmAttentionRope):
    """:class:`timm.layers.AttentionRope` with sparse + low-rank attention: the same parameters and checkpoint. Keys and
    values with fewer heads than queries are not repeated."""


class EvaAttention(Rotary, TimmEvaAttention):
    """:class:`timm.models.eva.EvaAttention` with sparse + low-rank attention: the same parameters and checkpoint."""

    def _fused(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        return self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias)


class Gemma4Attention(TimmHost, TimmGemma4Attention):
    """:class:`timm.models.gemma4_vit.Gemma4Attention` with sparse + low-rank attention: the same parameters and
    checkpoint."""

    OUTPUT = "o_proj"

    def forward(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """As timm's: ``x`` (batch, tokens, dim), cosines and sines for every token."""
        if self.attention is None:
            return super().forward(x, rope_cos, rope_sin, attn_mask)
        padding = self._padding(attn_mask, x)
        if self._runs_exact(attn_mask, padding, is_causal=False):
            return self.attention.with_zero_gradients(super().forward(x, rope_cos, rope_sin, attn_mask))
        q, k, v = (
            norm(projection(x).unflatten(-1, (-1, self.head_dim)))
            for norm, projection in (
                (self.q_norm, self.q_proj),
                (self.k_norm, self.k_proj),
                (self.v_norm, self.v_proj),
            )
        )
        q, k = (apply_multidimensional_rope(t, rope_cos, rope_sin, ndim=2, unsqueeze_dim=2) for t in (q, k))
        out = self.attention(*(t.transpose(1, 2) for t in (q, k, v)), padding, scale=1.0)
        return self.proj_drop(self.o_proj(out.transpose(1, 2).flatten(2)))


HOSTS = (
    (TimmAttentionRope, AttentionRope),
    (TimmEvaAttention, EvaAttention),
    (TimmGemma4Attention, Gemma4Attention),
)
"""Each class of timm with the one that takes its place."""
