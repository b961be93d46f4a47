"""Tiny vision models of transformers with random weights, of every family whose tokens can be ordered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from testkit import randomized
from torch import Tensor, nn

hf = pytest.importorskip("transformers")

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64, "patch_size": 4}
ODD = (20, 36)  # a grid of 5 x 9
ANY = {"interpolate_pos_encoding": True}
DINOV3 = hf.DINOv3ViTConfig(image_size=24, num_register_tokens=2, **SMALL)
HUGGING_FACE = {  # model, configuration, image size, arguments of its forward, prefix
    "vit": (hf.ViTModel, hf.ViTConfig(image_size=ODD, **SMALL), ODD, {}, 1),
    "vit, other size": (hf.ViTModel, hf.ViTConfig(image_size=24, **SMALL), ODD, ANY, 1),
    "vit_msn": (hf.ViTMSNModel, hf.ViTMSNConfig(image_size=ODD, **SMALL), ODD, {}, 1),
    "ijepa": (hf.IJepaModel, hf.IJepaConfig(image_size=ODD, **SMALL), ODD, {}, 0),
    "deit": (hf.DeiTModel, hf.DeiTConfig(image_size=20, **SMALL), (20, 20), {}, 2),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config(image_size=24, **SMALL), ODD, {}, 1),
    "registers": (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig(image_size=24, **SMALL), ODD, {}, 5),
    "backbone": (hf.Dinov2Backbone, hf.Dinov2Config(image_size=24, out_indices=[1, 2], **SMALL), ODD, {}, 1),
    "dinov3": (hf.DINOv3ViTModel, DINOV3, ODD, {}, 3),
    "dinov3 backbone": (hf.DINOv3ViTBackbone, DINOV3, ODD, {}, 3),
    "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig(image_size=24, **SMALL), ODD, ANY, 1),
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig(image_size=24, **SMALL), ODD, ANY, 0),
}


def hugging_face(name: str) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    cls, config, size, arguments, _ = HUGGING_FACE[name]
    model = randomized(cls(config), 0.25, vectors=0.7).eval()
    return model, torch.randn(2, 3, *size), arguments
