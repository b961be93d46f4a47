"""Dropout of attention weights can be set in every family of models, and nothing else changes."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from types import CodeType

import pytest
import torch
from torch import nn

import scatterbrain as sb
from scatterbrain.integrations.dropout import places_read


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


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8, "attention_probs_dropout_prob": 0.1}
TRANSFORMERS = {
    "DPTModel": IMAGE | {"backbone_out_indices": [0, 1], "neck_hidden_sizes": [8, 8], "reassemble_factors": [1, 1]},
    "VideoMAEModel": IMAGE | {"num_frames": 4},
    "YolosModel": IMAGE | {"image_size": [32, 32], "num_detection_tokens": 4},
    "VJEPA2Model": IMAGE
    | {
        "crop_size": 32,
        "frames_per_clip": 4,
        "pred_hidden_size": 32,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
    }
    | {"num_pooler_layers": 1},
    "PersimmonModel": {**SIZES, "vocab_size": 9, "attention_dropout": 0.1},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_dropout_that_a_layer_of_transformers_passes_on_is_set(name: str, monkeypatch: pytest.MonkeyPatch):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, name)(getattr(transformers, name[:-5] + "Config")(**TRANSFORMERS[name])).train()
    passed = []

    def attention(module: nn.Module, query, key, value, mask, dropout: float = 0.0, **kwargs):
        passed.append((paths[module], dropout))
        return value.transpose(1, 2), None

    model.set_attn_implementation("sdpa")
    monkeypatch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS, "sdpa", attention)
    paths = {module: path for path, module in model.named_modules()}
    arguments = {
        "DPTModel": {"pixel_values": torch.randn(1, 3, 32, 32)},
        "VideoMAEModel": {"pixel_values": torch.randn(1, 4, 3, 32, 32)},
        "YolosModel": {"pixel_values": torch.randn(1, 3, 32, 32)},
        "VJEPA2Model": {"pixel_values_videos": torch.randn(1, 4, 3, 32, 32)},
        "PersimmonModel": {"input_ids": torch.arange(9)[None]},
    }[name]
    model(**arguments)
    assert {dropout for _, dropout in passed} == {0.1}
    assert sb.set_attention_dropout(model) == [path for path in paths.values() if path in dict(passed)]
    passed.clear()
    model(**arguments)
    assert {dropout for _, dropout in passed} == {0.0} and sb.set_attention_dropout(model) == []


def methods(cls: ast.ClassDef) -> list[CodeType]:
    """The code of the methods of a class that is not made."""
    (made,) = (c for c in compile(ast.Module([cls], []), "", "exec").co_consts if isinstance(c, CodeType))
    return [code for code in made.co_consts if isinstance(code, CodeType) and code.co_name != "__init__"]


def test_the_name_that_counts_is_the_one_that_layers_of_transformers_pass_on():
    transformers = pytest.importorskip("transformers")
    passed, wrong = 0, {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        if "ALL_ATTENTION_FUNCTIONS" not in text:
            continue
        for cls in (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)):
            calls = (c for c in ast.walk(cls) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name))
            calls = (call for call in calls if call.func.id.startswith("attention_interface"))
            arguments = {ast.unparse(a.value) for call in calls for a in call.keywords if a.arg == "dropout"}
            for config, name in re.findall(r"self\.(config\.)?(\w+)", " ".join(arguments).replace("self.training", "")):
                passed += 1
                places = places_read(methods(cls))
                if places[:1] != [(bool(config), name)]:
                    wrong[cls.name] = (config + name, places)
    assert passed > 400 and not wrong, "order or add dropout._NAMES"


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        sb.set_attention_dropout("model", 0.0)
    for p in (-0.1, 1.5, "0", True):
        with pytest.raises(ValueError, match="p must be a probability between 0 and 1, got"):
            sb.set_attention_dropout(nn.Linear(2, 2), p)
