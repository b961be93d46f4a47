"""Dropout of attention weights can be set in every family of models, and nothing else changes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import scatterbrain as sb


def encoder(dropout: float) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 32, dropout, batch_first=True), 2)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_the_dropout_of_multihead_attention_is_set_before_and_after_the_swap(is_replaced: bool):
    model, x = encoder(0.1), torch.randn(2, 40, 32)
    if is_replaced:
        report = sb.replace_attention(model, *sb.presets.train(32))
        assert "call sb.set_attention_dropout(model, 0.0)" in report.replaced[0].note
        with pytest.warns(UserWarning, match=r"dropout=0.1 acts .*sb.set_attention_dropout\(model, 0.0\)"):
            model(x)
    assert sb.set_attention_dropout(model) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert {layer.self_attn.dropout for layer in model.layers} == {0.0}
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}
    assert sb.set_attention_dropout(model) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb.replace_attention(model, *sb.presets.train(32)) if not is_replaced else None
        model(x)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_the_dropout_of_timms_attention_is_set_whether_it_can_be_replaced_or_not(name: str):
    timm = pytest.importorskip("timm")
    size = {"img_size": 28} if "14" in name else {}
    model = timm.create_model(name, depth=2, attn_drop_rate=0.1, proj_drop_rate=0.2, **size)
    assert sb.set_attention_dropout(model, 0.5) == ["blocks.0.attn", "blocks.1.attn"]
    assert {block.attn.attn_drop.p for block in model.blocks} == {0.5}
    assert {block.attn.proj_drop.p for block in model.blocks} == {0.2}


def test_the_dropout_of_a_diffusers_layer_is_that_of_its_output_and_stays():
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention

    layer = Attention(query_dim=16, heads=2, dim_head=8, dropout=0.3)
    assert sb.set_attention_dropout(layer, 0.0) == [] and layer.to_out[1].p == 0.3


def test_the_dropout_of_transformers_is_set_under_the_earlier_name_too():
    pytest.importorskip("transformers")
    from scatterbrain.integrations.transformers import set_attention_dropout

    assert set_attention_dropout is sb.set_attention_dropout


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        sb.set_attention_dropout("model", 0.0)
    for p in (-0.1, 1.5, "0", True):
        with pytest.raises(ValueError, match="p must be a probability between 0 and 1, got"):
            sb.set_attention_dropout(nn.Linear(2, 2), p)
