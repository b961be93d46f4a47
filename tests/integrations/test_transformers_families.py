"""Families whose layers or masks are unlike those of other transformers: they compute what their eager attention does,
or are refused by name."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
import hf_models as hf
from testkit import cores

import scatterbrain as sb
from scatterbrain.integrations.transformers import register

# One runs torch's attention, the other the library's kernels with lists that hold every key.
NAMES = ("scatterbrain:full", register("scatterbrain:families-every-key", sb.Window(4096), None))
TEXT = {**hf.TEXT, **hf.LONG, "initializer_range": 0.5}
VISION = {**hf.VISION, "image_size": 32, "patch_size": 8}
pytestmark = pytest.mark.filterwarnings("ignore:.*runs exact attention, without approximation. its mask is added")


def build(model: type[nn.Module], config: Any) -> nn.Module:
    torch.manual_seed(0)
    return model._from_config(config, attn_implementation="eager").eval()


def check(mine: Tensor, exact: Tensor) -> None:
    assert exact.std() > 0.01
    torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


# -------------------- layers that do not say whether they are causal, or say it wrongly

ENCODERS: dict[str, tuple[type[nn.Module], Any]] = {
    "align": (transformers.AlignTextModel, transformers.AlignTextConfig(**TEXT)),
    "clap": (transformers.ClapTextModel, transformers.ClapTextConfig(**TEXT)),
    "layoutlm": (transformers.LayoutLMModel, transformers.LayoutLMConfig(**TEXT)),
    "markuplm": (transformers.MarkupLMModel, transformers.MarkupLMConfig(**TEXT)),
    "splinter": (transformers.SplinterModel, transformers.SplinterConfig(**TEXT, question_token_id=5)),
}
# Attention classes of transformers that have no attribute is_causal, and whether they are causal.
WITHOUT = {
    "AlignTextSelfAttention": False,
    "ClapTextSelfAttention": False,
    "DogeAttention": True,
    "LayoutLMSelfAttention": False,
    "MarkupLMSelfAttention": False,
    "MllamaTextCrossAttention": False,
    "MllamaVisionAttention": False,
    "SplinterSelfAttention": False,
}


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_whose_layers_say_nothing_sees_later_tokens(family: str, side: str):
    exact = build(*ENCODERS[family])
    arguments = {"input_ids": hf.tokens(), "attention_mask": hf.keep(side)}
    expected = hf.run(exact, **arguments)[hf.keep(side).bool()]
    for name in NAMES:
        model = build(*ENCODERS[family])
        model.set_attn_implementation(name)
        check(hf.run(model, **arguments)[hf.keep(side).bool()], expected)


@pytest.mark.parametrize("family", ["align", "clap", "splinter"])  # the others add masks to the scores
def test_an_encoder_whose_layers_say_nothing_has_nothing_to_calibrate(family: str):
    model, ids = build(*ENCODERS[family]), hf.tokens(290)
    exact = hf.run(model, input_ids=ids)
    model.set_attn_implementation("scatterbrain")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = hf.run(model, input_ids=ids)
        changed = hf.run(model, input_ids=torch.cat([ids[:, :200], hf.tokens(90, seed=3)], 1))
    assert not torch.equal(out, exact) and not torch.allclose(changed[:, :200], out[:, :200], atol=1e-3)


@pytest.mark.parametrize("part", ["", "encoder"])
@pytest.mark.parametrize("family", ENCODERS)
def test_single_layers_of_an_encoder_that_says_nothing(family: str, part: str):
    model = build(*ENCODERS[family])
    exact = hf.run(model, input_ids=hf.tokens())
    report = sb.replace_attention(model.get_submodule(part), sb.Window(4096), None, where=lambda p: ".0." in p)
    assert len(report.replaced) == 1 and report.skipped
    check(hf.run(model, input_ids=hf.tokens()), exact)


def test_an_implementation_that_is_written_into_the_configuration():
    model = build(*ENCODERS["splinter"])
    exact = hf.run(model, input_ids=hf.tokens())
    model.config._attn_implementation = NAMES[1]
    check(hf.run(model, input_ids=hf.tokens()), exact)


def test_cross_attention_that_says_nothing_sees_every_key():
    text = {**TEXT, "num_key_value_heads": hf.HEADS, "cross_attention_layers": [1], "rope_parameters": None}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.models.mllama.MllamaTextConfig(**text | {"rope_parameters": rope})
    model = build(transformers.MllamaTextModel, config)
    states = torch.randn(2, 100, hf.WIDTH, generator=torch.Generator().manual_seed(0))
    nn.init.ones_(model.layers[1].cross_attn_attn_gate)
    arguments = {"input_ids": hf.tokens(), "cross_attention_states": states}
    exact = hf.run(model, **arguments)
    model.set_attn_implementation(NAMES[1])
    check(hf.run(model, **arguments), exact)


def bridgetower() -> nn.Module:
    text = {**TEXT, "initializer_factor": 20}
    config = transformers.BridgeTowerConfig(
        hidden_size=hf.WIDTH,
        num_attention_heads=hf.HEADS,
        num_hidden_layers=2,
        intermediate_size=80,
        text_config=text,
        vision_config={"hidden_size": hf.WIDTH, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32},
    )
    return build(transformers.BridgeTowerModel, config)


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("how", [*NAMES, "replaced"])
def test_layers_that_are_told_wrongly_that_they_are_causal(how: str, side: str):
    model = bridgetower()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    arguments = {"input_ids": hf.tokens(), "attention_mask": hf.keep(side), "pixel_values": pixels}
    with torch.no_grad():
        exact = model(**arguments)
        if how == "replaced":
            sb.replace_attention(model, sb.Window(4096), None)
        else:
            model.set_attn_implementation(how)
        mine = model(**arguments)
    check(mine.image_features, exact.image_features)
    check(mine.text_features[hf.keep(side).bool()], exact.text_features[hf.keep(side).bool()])


def test_the_classes_that_do_not_say_whether_they_are_causal_are_known():
    found = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        code = path.read_text(encoding="utf-8")
        if "ALL_ATTENTION_FUNCTIONS" not in code:
            continue
        for cls in (node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)):
            names = {node.attr for node in ast.walk(cls) if isinstance(node, ast.Attribute)}
            names |= {node.arg for node in ast.walk(cls) if isinstance(node, ast.keyword)}
            routes = "get_interface" in names and any(n.name == "forward" for n in cls.body if hasattr(n, "name"))
            is_derived = any("Attention" in ast.unparse(base) for base in cls.bases)
            if routes and "is_causal" not in names and not is_derived:
                found.add(cls.name)
    assert len(found) > 4 and found <= set(WITHOUT), "see whether layers.causality is right for them, and add them"


@pytest.mark.parametrize("family", ENCODERS)
def test_what_is_known_of_these_classes(family: str):
    model = build(*ENCODERS[family])
    model.set_attn_implementation("scatterbrain")
    layers = [model.get_submodule(path.removesuffix(".scatterbrain")) for path in cores(model)]
    assert layers and {WITHOUT[type(layer).__name__] for layer in layers} == {False}
    assert all(sb.integrations.transformers.layers.is_causal_alone(layer) is False for layer in layers)
