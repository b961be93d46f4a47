"""timm: its self-attention with sparse + low-rank attention inside, replaced in place or as ``attn_layer=``."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

import timm.layers
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from scatterbrain import checks
from scatterbrain.integrations.replacer import ClassReplacer, register_replacer
from scatterbrain.integrations.restrictions import NotReplaceable
from scatterbrain.low_rank import LowRank
from scatterbrain.nn.host_module import LOW_RANK, SUPPORT, HostModule, attention_unless_exact
from scatterbrain.nn.masks import padding_of
from scatterbrain.supports import Support

# -------------------- the module


class Attention(HostModule, timm.layers.Attention):
    """:class:`timm.layers.Attention` with sparse + low-rank attention: the same arguments, parameters and checkpoint.

    Norms of queries and keys (``qk_norm``), of the output (``scale_norm``), gates and projection dropout stay. A call
    that sparse + low-rank attention cannot express runs exactly, as timm computes it, and warns once, naming the cure.

    ============================================= ==================================================================
    call                                          what happens
    ============================================= ==================================================================
    no ``attn_mask``                              approximated, whatever ``fused_attn`` is
    ``is_causal=True``                            approximated, causal
    ``attn_mask`` that only hides padded tokens   approximated; rows of padded tokens are zero before the projection
    any other ``attn_mask``                       exact, warns
    ``attn_drop`` > 0 in training                 exact, warns
    ``support=Full()``                            timm's own forward; ``attention`` is None and ``low_rank`` unused
    ============================================= ==================================================================

    Under torch.compile a padding mask is recognised if it has one query row, (batch, 1, 1, tokens), as NaFlexVit makes
    it with ``use_key_only_attn_mask=True``.

    Args:
        dim, num_heads, ...: as :class:`timm.layers.Attention`.
        support, low_rank: default those of the class, see :func:`attention_layer`.
    """

    SUPPORT: Support = SUPPORT
    LOW_RANK: LowRank = LOW_RANK
    EXACT_QUERIES = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        geometry = (self.num_heads, self.head_dim)
        self._attach(attention_unless_exact(*geometry, self.SUPPORT, self.LOW_RANK, self.EXACT_QUERIES))

    def _is_of_original(self, state_dict: dict[str, Any], prefix: str) -> bool:
        return f"{prefix}qkv.weight" in state_dict

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As timm's: ``x`` (batch, tokens, dim); ``attn_mask`` as F.scaled_dot_product_attention takes it."""
        if self.attention is None:
            return super().forward(x, attn_mask, is_causal)
        batch, tokens, _ = x.shape
        padding = None if attn_mask is None else padding_of(attn_mask, batch, tokens)
        obstacle = self._obstacle(attn_mask, padding, is_causal)
        if obstacle is not None:
            self._warn_exact(obstacle)
            return self.attention.with_zero_gradients(super().forward(x, attn_mask, is_causal))
        gate = None if self.gate is None else self.gate(x).sigmoid()
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scale = None if self.fused_attn else self.scale  # timm's fused kernel always uses 1/sqrt(head_dim)
        out = self.attention(self.q_norm(q), self.k_norm(k), v, padding, is_causal, scale)
        out = self.norm(out.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        return self.proj_drop(self.proj(out if gate is None else out * gate))

    def _obstacle(self, attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> str | None:
        """Why this call cannot be approximated, with the cure; None if it can."""
        if self.training and self.attn_drop.p > 0:
            return f"attn_drop={self.attn_drop.p} acts on attention weights in training; set attn_drop.p = 0.0"
        if attn_mask is not None and (padding is None or is_causal):
            return "attn_mask is more than the padding of tokens; pass none, is_causal=True alone, or a padding mask"
        return None


class LayerType(type):
    """Metaclass of the classes that :func:`attention_layer` makes, for copyreg: models that hold such a class can then
    be pickled."""


def attention_layer(
    support: Support = SUPPORT, low_rank: LowRank = LOW_RANK, exact_queries: int = 0
) -> type[Attention]:
    """A class for ``timm.create_model(name, attn_layer=...)``, of the VisionTransformer family and NaFlexVit.

    Args:
        support: which keys are exact; default that of :func:`scatterbrain.presets.drop_in`.
        low_rank: the kernel of the rest; default that of :func:`scatterbrain.presets.drop_in`, which must be calibrated
            (:func:`scatterbrain.calibrate`).
        exact_queries: this many first tokens attend to every key exactly; give the model's ``num_prefix_tokens``, as
            :func:`scatterbrain.replace_attention` does by itself.

    Returns:
        A subclass of :class:`Attention` with these settings.

    Raises:
        TypeError, ValueError: for a support or low-rank kernel that does not fit together.
    """
    checks.check_pair(support, low_rank, is_causal=False)
    settings = {"SUPPORT": support, "LOW_RANK": low_rank, "EXACT_QUERIES": exact_queries, "__module__": __name__}
    return LayerType("Attention", (Attention,), settings)


copyreg.pickle(LayerType, lambda layer: (attention_layer, (layer.SUPPORT, layer.LOW_RANK, layer.EXACT_QUERIES)))


# -------------------- replacers


def _dropout(module: timm.layers.Attention) -> str:
    if module.attn_drop.p == 0:
        return ""
    return f"exact in training for its attn_drop={module.attn_drop.p}; set attn_drop.p = 0.0"


ROTARY = "its queries and keys are rotated by position (RoPE), which the swap of timm.layers.Attention does not do"
BIASED = "it adds a bias for the position of each pair, which no support holds"
WINDOWED = "it attends inside small windows, where exact attention is the fastest"
REDUCED = "it attends to a reduced set of keys already"
CLASS_ONLY = "only a class token or a few latents attend, which is linear in the tokens already"
FUSED = "its attention is a part of the block's own forward"
LINEAR = "it is a linear attention already"
MIXED_HEADS = "it mixes or subtracts attention weights of several heads, which the low-rank kernel cannot follow"
CHANNELS = "it attends over channels, not over tokens"
# Why timm's other attention modules are left alone, by class; by file and class where several files share a class name.
REASONS = {
    "EvaAttention": ROTARY, "AttentionRope": ROTARY, "Gemma4Attention": ROTARY,
    "beit.Attention": BIASED, "RelPosAttention": BIASED, "levit.Attention": BIASED, "AttentionDownsample": BIASED,
    "vision_transformer_sam.Attention": BIASED, "MultiScaleAttention": BIASED,
    "efficientformer.Attention": BIASED, "GPSA": BIASED, "BottleneckAttn": BIASED,
    "WindowAttention": WINDOWED, "WindowAttentionGlobal": WINDOWED, "WindowMultiHeadAttention": WINDOWED,
    "tiny_vit.Attention": WINDOWED, "MaskUnitAttention": WINDOWED, "AttentionCl": WINDOWED, "HaloAttn": WINDOWED,
    "LocallyGroupedAttn": WINDOWED, "CascadedGroupAttention": WINDOWED, "OutlookAttention": WINDOWED,
    "pvt_v2.Attention": REDUCED, "GlobalSubSampleAttn": REDUCED, "MobileAttention": REDUCED,
    "ClassAttention": CLASS_ONLY, "ClassAttn": CLASS_ONLY, "CrossAttention": CLASS_ONLY,
    "AttentionPoolLatent": CLASS_ONLY, "AttentionPool2d": CLASS_ONLY,
    "ParallelScalingBlock": FUSED, "DiffParallelScalingBlock": MIXED_HEADS, "DiffAttention": MIXED_HEADS,
    "TalkingHeadAttn": MIXED_HEADS, "FactorAttnConvRelPosEnc": LINEAR, "LinearSelfAttention": LINEAR,
    "EfficientAdditiveAttention": LINEAR,
    "XCA": CHANNELS, "ChannelAttention": CHANNELS, "CrossCovarianceAttn": CHANNELS,
}  # fmt: skip


class UnsupportedAttention:
    """Every other attention module of timm: left alone, with the reason."""

    def matches(self, module: nn.Module) -> bool:
        cls = type(module)
        if not cls.__module__.startswith("timm.") or is_parametrized(module) or cls is timm.layers.Attention:
            return False
        looks_like = cls.__name__.lower().endswith(("attention", "attn"))
        return cls.__name__ in REASONS or (looks_like and next(module.parameters(), None) is not None)

    def replace(self, module: nn.Module, support: Support, low_rank: LowRank) -> tuple[str, Callable[[], None]]:
        cls = type(module)
        file = cls.__module__.split(".")[-1]
        reason = REASONS.get(f"{file}.{cls.__name__}") or REASONS.get(cls.__name__)
        reason = reason or "its forward is its own; only timm.layers.Attention is swapped"
        raise NotReplaceable(f"{cls.__module__}.{cls.__name__}: {reason}")


register_replacer(UnsupportedAttention())
register_replacer(ClassReplacer(timm.layers.Attention, Attention, _dropout))
