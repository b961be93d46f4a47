"""Tiny timm models with random weights of every family that the timm integration is tested on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from testkit import rand
from torch import Tensor, nn

timm = pytest.importorskip("timm")

TINY: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
SIZE = (48, 80)  # a grid of 3 x 5 patches of 16
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": SIZE}, SIZE),
    "no class token": ("vit_medium_patch16_gap_240", {"img_size": SIZE}, SIZE),
    "query and key norm": ("vit_tiny_patch16_224", {"img_size": SIZE, "qk_norm": True, "scale_attn_norm": True}, SIZE),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": SIZE}, SIZE),
    "deit3": ("deit3_small_patch16_224", {"img_size": SIZE}, SIZE),
    "residual post norm": ("vit_base_patch16_rpn_224", {"img_size": SIZE}, SIZE),
    "parallel blocks": ("vit_small_patch16_18x2_224", {"img_size": SIZE}, SIZE),
    "clip, pre norm": ("vit_base_patch16_clip_224", {"img_size": SIZE}, SIZE),
    "siglip, attention pool": ("vit_base_patch16_siglip_224", {"img_size": SIZE}, SIZE),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": (42, 70)}, (42, 70)),
    "dynamic image size": ("vit_small_patch14_dinov2", {"img_size": 42, "dynamic_img_size": True}, (70, 28)),
    "dynamic padding": (
        "vit_tiny_patch16_224",
        {"img_size": 48, "dynamic_img_size": True, "dynamic_img_pad": True},
        (50, 70),
    ),
    "naflex": ("naflexvit_base_patch16_gap", {}, SIZE),
}
# Attention with rotary positions: rotations of all layers in one tensor or of each, halves or pairs, prefix or none.
ROTARY: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "eva02": ("eva02_tiny_patch14_224", {"img_size": (42, 70)}, (42, 70)),
    "eva02, one projection each": ("eva02_base_patch14_224", {"img_size": (42, 70)}, (42, 70)),
    "eva, no rotation": ("eva_giant_patch14_224", {"img_size": (42, 70)}, (42, 70)),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": SIZE}, SIZE),
    "dinov3, any size": ("vit_small_patch16_dinov3", {"img_size": 48, "dynamic_img_size": True}, SIZE),
    "rope axial": ("vit_small_patch16_rope_224", {"img_size": SIZE}, SIZE),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": SIZE}, SIZE),
    "rope, registers, pooled": ("vit_betwixt_patch16_rope_reg4_gap_256", {"img_size": SIZE}, SIZE),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {"img_size": SIZE}, SIZE),
    "fewer key heads": (
        "vit_small_patch16_dinov3",
        {"img_size": SIZE, "attn_type": "rope", "num_heads": 4, "num_kv_heads": 2, "qkv_fused": False},
        SIZE,
    ),
}

PREFIX = {  # tokens before the patches, where they are not one
    "no class token": 0,
    "distilled": 2,
    "residual post norm": 0,
    "siglip, attention pool": 0,
    "dinov2 with registers": 5,
    "naflex": 4,
    "dinov3": 5,
    "dinov3, any size": 5,
    "rope, registers, pooled": 4,
    "fewer key heads": 5,
}
GRIDS = {"dynamic image size": (5, 2), "dynamic padding": (4, 5)}  # of patches, where they are not 3 x 5


def build(name: str, **arguments: Any) -> nn.Module:
    """A model in evaluation mode whose attention is far from uniform."""
    model, own, _ = (FAMILIES | ROTARY)[name]
    built = timm.create_model(model, **{**TINY, **own, **arguments}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.25 if parameter.dim() > 1 else 0.1)
        if parameter.dim() == 1:
            parameter.data += 0.7
    return built


def images(name: str, batch: int = 2) -> Tensor:
    return rand(batch, 3, *(FAMILIES | ROTARY)[name][2], seed=1)
