"""timm: its self-attention with sparse + low-rank attention inside, replaced in place or as ``attn_layer=``."""

from __future__ import annotations

import copyreg
from collections.abc import Callable

import timm.layers
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from scatterbrain import checks
from scatterbrain.integrations.replacer import ClassReplacer, register_replacer
from scatterbrain.integrations.restrictions import NotReplaceable
from scatterbrain.integrations.timm_host import TimmHost, dropout_note
from scatterbrain.integrations.timm_rotary import HOSTS
from scatterbrain.low_rank import LowRank
from scatterbrain.nn.pairs import LOW_RANK, SUPPORT
from scatterbrain.supports import Support

# -------------------- the module


class Attention(TimmHost, timm.layers.Attention):
    """:class:`timm.layers.Attention` with sparse + low-rank attention: the same arguments, parameters and checkpoint.

    Norms of queries and keys (``qk_norm``), of the output (``scale_norm``), gates and projection dropout stay. A call
    that sparse + low-rank attention cannot express runs exactly, as timm computes it, and warns once, naming the cure:
    :class:`scatterbrain.integrations.timm_host.TimmHost` says which.

    Under torch.compile a padding mask is recognised if it has one query row, (batch, 1, 1, tokens), as NaFlexVit makes
    it with ``use_key_only_attn_mask=True``.

    Args:
        dim, num_heads, ...: as :class:`timm.layers.Attention`.
        support, low_rank: default those of the class, see :func:`attention_layer`.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As timm's: ``x`` (batch, tokens, dim); ``attn_mask`` as F.scaled_dot_product_attention takes it."""
        if self.attention is None:
            return super().forward(x, attn_mask, is_causal)
        batch, tokens, _ = x.shape
        padding = self._padding(attn_mask, x)
        if self._runs_exact(attn_mask, padding, is_causal):
            return self.attention.with_zero_gradients(super().forward(x, attn_mask, is_causal))
        gate = None if self.gate is None else self.gate(x).sigmoid()
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scale = None if self.fused_attn else self.scale  # timm's fused kernel always uses 1/sqrt(head_dim)
        out = self.attention(self.q_norm(q), self.k_norm(k), v, padding, is_causal, scale)
        out = self.norm(out.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        return self.proj_drop(self.proj(out if gate is None else out * gate))


class LayerType(type):
    """Metaclass of the classes that :func:`attention_layer` makes, for copyreg: models that hold such a class can then
    be pickled."""


def attention_layer(
    support: Support = SUPPORT, low_rank: LowRank = LOW_RANK, exact_queries: int = 0
) -> type[Attention]:
    """A class for ``timm.create_model(name, attn_layer=...)``, of the VisionTransformer family and NaFlexVit. Tokens
    stay in the model's own order; :func:`scatterbrain.replace_attention` puts them in Hilbert order too.

    Args:
        support: which keys are exact; default that of :func:`scatterbrain.presets.drop_in`.
        low_rank: the kernel of the rest; default that of :func:`scatterbrain.presets.drop_in`, which needs no
            calibration.
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
        reason = reason or "its forward is its own"
        raise NotReplaceable(f"{cls.__module__}.{cls.__name__}: {reason}")


register_replacer(UnsupportedAttention())
for original, host in ((timm.layers.Attention, Attention), *HOSTS):
    register_replacer(ClassReplacer(original, host, dropout_note, is_never_causal=True))
