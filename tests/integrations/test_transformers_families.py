"""Families whose layers or masks are unlike those of other transformers: they compute what their eager attention does,
or are refused by name."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import re
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
import hf_models as hf
from testkit import assert_close_in_scale, cores
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import scatterbrain as sb
from scatterbrain.integrations.transformers import own_attention, register
from scatterbrain.integrations.transformers.layers import (
    WRONGLY_CAUSAL,
    _makes_causal_masks,
    causality,
    is_causal_alone,
    note_causality,
)
from scatterbrain.integrations.transformers.masks import ADDED
from scatterbrain.integrations.transformers.own_attention import (
    _built_by,
    attention_of,
    codes_of,
    computes_itself,
    models_of,
    names_in,
)

# One runs torch's attention, the other the library's kernels with lists that hold every key.
NAMES = ("scatterbrain:full", register("scatterbrain:families-every-key", sb.Window(4096), None))
TEXT = {**hf.TEXT, **hf.LONG, "initializer_range": 0.5}
VISION = {**hf.VISION, "image_size": 32, "patch_size": 8}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*runs exact attention, without approximation. its mask is added"),
    pytest.mark.filterwarnings("ignore:.*runs exact attention, without approximation. need_weights=True"),
]


def build(model: type[nn.Module], config: Any) -> nn.Module:
    torch.manual_seed(0)
    return model._from_config(config, attn_implementation="eager").eval()


def check(mine: Tensor, exact: Tensor) -> None:
    assert exact.std() > 0.01
    assert_close_in_scale(mine, exact)


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


def test_a_layer_that_says_nothing_is_causal_if_a_part_around_it_makes_the_masks():
    model, path = build(*ENCODERS["splinter"]), "encoder.layer.0.attention.self"
    layer = model.get_submodule(path)
    assert causality(layer, model, path) is False
    made = {"masks": lambda self: transformers.masking_utils.create_causal_mask}
    model.encoder.__class__ = type("Decoder", (type(model.encoder),), made)
    assert causality(layer, model, path) is None


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


@pytest.mark.parametrize("how", [*NAMES, "replaced"])
def test_an_image_encoder_whose_layers_say_wrongly_that_they_are_causal(how: str):
    phi = transformers.models.phi4_multimodal
    sizes = {**VISION, "crop_size": 32, "initializer_range": 0.3}
    model = build(
        phi.modeling_phi4_multimodal.Phi4MultimodalVisionModel,
        phi.configuration_phi4_multimodal.Phi4MultimodalVisionConfig(**sizes),
    )
    with torch.no_grad():  # it draws none of its weights
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = hf.run(model, pixel_values=pixels)
    choose(model, how)
    check(hf.run(model, pixel_values=pixels), exact)
    assert all(not core.support_of(False).is_full or how == NAMES[0] for core in cores(model).values())


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


# -------------------- attention that asks for no function, beside attention that does


def git() -> tuple[type[nn.Module], Any]:
    config = transformers.GitConfig(**TEXT, vision_config=VISION, bos_token_id=1, eos_token_id=2)
    return transformers.GitForCausalLM, config


def audio() -> tuple[type[nn.Module], Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    config = transformers.Gemma4AudioConfig(**sizes, subsampling_conv_channels=(128, 8))
    return transformers.models.gemma4.modeling_gemma4.Gemma4AudioModel, config


SAM_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
SAM_VISION |= {"output_channels": 32, "window_size": 2, "global_attn_indexes": [0], "mlp_dim": 32, "num_pos_feats": 16}


def sam(family: str) -> tuple[type[nn.Module], Any]:
    config = {"sam": transformers.SamConfig, "sam_hq": transformers.SamHQConfig}[family]
    decoder = {"hidden_size": 32, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "iou_head_depth": 2}
    decoder |= {"vit_dim": 32} if family == "sam_hq" else {}
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    model = {"sam": transformers.SamModel, "sam_hq": transformers.SamHQModel}[family]
    return model, config(vision_config=SAM_VISION, prompt_encoder_config=prompt, mask_decoder_config=decoder)


REFUSED = {
    "git": (git, "choose it for its other parts alone, with attn_implementation={'vision_config': 'scatterbrain'}"),
    "gemma4_audio": (audio, "models of this family are not supported"),
    "sam_vision_model": (
        lambda: (transformers.SamVisionModel, transformers.SamVisionConfig(**SAM_VISION)),
        "models of this family are not supported",
    ),
    "clap_audio_model": (
        lambda: (transformers.ClapAudioModel, transformers.ClapAudioConfig()),
        "models of this family are not supported",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_without_any_attention_that_asks_are_refused_before_they_are_built(family: str):
    make, cure = REFUSED[family]
    cls, config = make()
    message = rf"{cls.__name__} \({family}\) computes attention in its own code .*{re.escape(cure)}"
    with pytest.raises(ValueError, match=message):
        cls._from_config(copy.deepcopy(config), attn_implementation="scatterbrain")
    model = build(cls, copy.deepcopy(config))
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation("scatterbrain")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("how", ["loaded", "chosen", "replaced", "written"])
def test_parts_of_git_are_approximated_and_its_text_stays_causal(how: str):
    cls, config = git()
    model = build(cls, copy.deepcopy(config))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    arguments = {"input_ids": hf.tokens(40), "attention_mask": hf.keep("left", 40, 9)}
    exact, expected = model(**arguments).logits, model(**arguments, pixel_values=pixels).logits
    if how == "loaded":
        chosen = cls._from_config(config, attn_implementation={"": "eager", "vision_config": NAMES[1]}).eval()
        assert len(cores(chosen)) == 2
        chosen.load_state_dict(model.state_dict(), strict=False)
        model = chosen
    elif how == "chosen":
        model.set_attn_implementation({"vision_config": NAMES[1]})
    elif how == "replaced":
        assert len(sb.replace_attention(model, sb.Window(4096), None).replaced) == 2
    else:  # the whole of it, past the checks
        model.config._attn_implementation = NAMES[1]
    counts = arguments["attention_mask"].bool()
    check(model(**arguments).logits[counts], exact[counts])
    check(model(**arguments, pixel_values=pixels).logits[:, -40:][counts], expected[:, -40:][counts])


@pytest.mark.parametrize("family", ["sam", "sam_hq"])
def test_parts_that_compute_attention_themselves_stay_exact_and_that_is_said(family: str):
    cls, config = sam(family)
    says = pytest.warns(UserWarning, match=rf"{cls.__name__}: its vision_config \({family}_vision_model\) keeps exact")
    with says:
        model = cls._from_config(copy.deepcopy(config), attn_implementation=NAMES[1]).eval()
    assert cores(model) and model.config.vision_config._attn_implementation == "sdpa"
    other = build(cls, copy.deepcopy(config))
    other.load_state_dict(model.state_dict())
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    arguments = {"pixel_values": pixels, "input_points": torch.tensor([[[[9.0, 20.0]]]])}
    with torch.no_grad():
        exact = other(**arguments).pred_masks
        torch.testing.assert_close(model(**arguments).pred_masks, exact, rtol=1e-4, atol=1e-4)
        with says:
            other.set_attn_implementation(NAMES[1])
        assert other.config.vision_config._attn_implementation == "eager" and cores(other)
        torch.testing.assert_close(other(**arguments).pred_masks, exact, rtol=1e-4, atol=1e-4)


def test_an_audio_tower_that_computes_attention_itself_stays_exact():
    text = {"vocab_size": hf.WORDS, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    text |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": hf.WORDS}
    config = transformers.Gemma4Config(text_config=text, vision_config=None, audio_config=audio()[1].to_dict())
    with pytest.warns(UserWarning, match=r"Gemma4Model: its audio_config \(gemma4_audio\) keeps exact attention"):
        model = transformers.Gemma4Model._from_config(config, attn_implementation=NAMES[1]).eval()
    assert model.config.audio_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == NAMES[1] and len(cores(model)) == 2
    sound, keep = torch.randn(1, 120, 128), torch.ones(1, 120, dtype=torch.bool)
    assert model.audio_tower(sound, keep).last_hidden_state.isfinite().all()


# -------------------- attention that adds the masks of others to its scores


def choose(model: nn.Module, how: str) -> None:
    if how == "replaced":
        sb.replace_attention(model, sb.Window(4096), None)
    elif how == "written":
        model.config._attn_implementation = NAMES[1]
    else:
        model.set_attn_implementation(how)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("how", [*NAMES, "replaced", "written"])
@pytest.mark.parametrize("kind", ["original_full", "block_sparse"])
def test_an_encoder_that_adds_masks_does_not_see_padding(kind: str, how: str, side: str):
    sizes = {**hf.BART, **hf.LONG, "init_std": 0.3, "attention_type": kind, "block_size": 8}
    model = build(transformers.BigBirdPegasusModel, transformers.BigBirdPegasusConfig(**sizes))
    keep, ids = hf.keep(side), hf.tokens()
    arguments = {
        "attention_mask": keep,
        "decoder_input_ids": hf.tokens(seed=50),
        "decoder_attention_mask": keep.flip(0),
    }
    counts = keep.flip(0).bool()
    exact = hf.run(model, input_ids=ids, **arguments)[counts]
    choose(model, how)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs exact attention")  # masks are taken apart again
        out = hf.run(model, input_ids=ids, **arguments)[counts]
    check(out, exact)
    other = torch.where(keep.bool(), ids, 7)
    torch.testing.assert_close(hf.run(model, input_ids=other, **arguments)[counts], out)


@pytest.mark.parametrize("how", [*NAMES, "replaced", "written"])
@pytest.mark.parametrize("kind", ["prob", "full"])
def test_informer_runs_with_both_of_its_kinds_of_attention(kind: str, how: str):
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_time_features": 1}
    config = transformers.InformerConfig(
        **sizes, attention_type=kind, prediction_length=6, context_length=24, lags_sequence=[1, 2, 7], init_std=0.3
    )
    model, generator = build(transformers.InformerModel, config), torch.Generator().manual_seed(0)
    names = {"past_values": 31, "past_time_features": 31, "future_values": 6, "future_time_features": 6}
    arguments = {name: torch.randn(2, n, generator=generator) for name, n in names.items()}
    arguments |= {name: arguments[name][..., None] for name in names if name.endswith("features")}
    arguments["past_observed_mask"] = torch.ones(2, 31)

    def run() -> Tensor:
        torch.manual_seed(3)  # its attention draws keys
        return hf.run(model, **arguments)

    exact = run()
    choose(model, how)
    check(run(), exact)


# -------------------- models of users

# Not written as a class: transformers takes a file that defines such a class for one without attention functions.
AttentionPooling = type(
    "AttentionPooling",
    (nn.Module,),
    {
        "__init__": lambda self, width: (nn.Module.__init__(self), setattr(self, "w", nn.Linear(width, 1)))[0],
        "forward": lambda self, x: (self.w(x).softmax(1) * x).sum(1),
    },
)
SMALL = {**hf.TEXT, "num_hidden_layers": 1}


class EmbeddingConfig(transformers.BertConfig):
    model_type = "families-embedding"


class Embedding(transformers.BertPreTrainedModel):
    config_class = EmbeddingConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.pool = AttentionPooling(config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.pool(self.bert(input_ids).last_hidden_state)


class RewardConfig(transformers.LlamaConfig):
    model_type = "families-reward"


class Reward(transformers.LlamaForCausalLM):
    config_class = RewardConfig

    def __init__(self, config):
        super().__init__(config)
        self.pool = AttentionPooling(config.hidden_size)
        self.post_init()


class WrapperConfig(transformers.PreTrainedConfig):
    model_type = "families-wrapper"
    sub_configs = {"text_config": transformers.AutoConfig}
    text_config: dict | None = None

    def __post_init__(self, **arguments):
        self.text_config = transformers.BertConfig(**SMALL)
        super().__post_init__(**arguments)


class Wrapper(PreTrainedModel):
    config_class = WrapperConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.text = transformers.AutoModel.from_config(config.text_config)
        self.pool = AttentionPooling(hf.WIDTH)
        self.post_init()


class BorrowedConfig(PreTrainedModel):
    """Takes no more from the models of its configuration, which compute attention themselves, than that."""

    config_class = transformers.GitConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.text = transformers.AutoModel.from_config(transformers.BertConfig(**SMALL), attn_implementation=NAMES[1])
        self.pool = AttentionPooling(hf.WIDTH)
        self.post_init()


class Pool(PreTrainedModel):
    config_class = EmbeddingConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.pool = AttentionPooling(config.hidden_size)
        self.post_init()


class PoolBesideBert(PreTrainedModel):
    config_class = EmbeddingConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.pool = Pool(config)
        self.bert = transformers.BertModel(config)
        self.post_init()


class Extended(Pool):
    def __init__(self, config):
        super().__init__(config)
        self.text = transformers.AutoModel.from_config(transformers.BertConfig(**SMALL), attn_implementation=NAMES[1])
        self.post_init()


USERS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "configuration of its own": (Embedding, EmbeddingConfig(**SMALL)),
    "model of transformers with a head": (Reward, RewardConfig(**SMALL)),
    "wrapper of another": (Wrapper, WrapperConfig()),
    "configuration of others": (BorrowedConfig, transformers.GitConfig(**SMALL, vision_config=VISION)),
    "parts that are models": (PoolBesideBert, EmbeddingConfig(**SMALL)),
    "class that another extends": (Extended, EmbeddingConfig(**SMALL)),
}


@pytest.mark.parametrize("how", ["loaded", "chosen"])
@pytest.mark.parametrize("kind", USERS)
def test_a_head_that_is_called_attention_refuses_no_model_whose_other_layers_ask(kind: str, how: str):
    cls, config = USERS[kind]
    model = cls._from_config(copy.deepcopy(config), attn_implementation=NAMES[1] if how == "loaded" else "sdpa")
    if how == "chosen":
        model.set_attn_implementation(NAMES[1])
    assert len(cores(model)) == 1


def test_a_model_of_a_user_without_a_layer_that_asks_is_refused_once_it_is_built():
    config = EmbeddingConfig(**SMALL)
    message = r"Pool \(families-embedding\) computes attention in its own code .*models of this family are not"
    with pytest.raises(ValueError, match=message):
        Pool._from_config(copy.deepcopy(config), attn_implementation=NAMES[1])
    with pytest.raises(ValueError, match=message):
        Pool._from_config(copy.deepcopy(config), attn_implementation="sdpa").set_attn_implementation(NAMES[1])


def test_a_file_of_a_user_is_not_imported_to_look_at_it(tmp_path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "families_package"
    folder.mkdir()
    code = "import transformers\nclass FooConfig(transformers.BertConfig):\n    model_type = 'families-foo'\n"
    (folder / "configuration_foo.py").write_text(code)
    (folder / "modeling_foo.py").write_text("raise RuntimeError('needs another machine')\n")
    code = "import transformers\nfrom .configuration_foo import FooConfig\n"
    code += "class Bar(transformers.BertModel):\n    config_class = FooConfig\n"
    (folder / "modeling_bar.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    cls = importlib.import_module("families_package.modeling_bar").Bar
    assert models_of(cls.config_class) == []
    assert len(cores(cls._from_config(cls.config_class(**SMALL), attn_implementation=NAMES[1]))) == 1


def test_a_file_of_transformers_that_breaks_on_import_breaks_no_load(monkeypatch: pytest.MonkeyPatch):
    def breaks(name: str) -> None:
        raise RuntimeError(name)

    monkeypatch.setattr(own_attention.importlib, "import_module", breaks)
    assert own_attention._file("transformers.models.no_such.modeling_no_such") is None


class PlainConfig(transformers.PreTrainedConfig):
    model_type = "families-plain"
    hidden_size: int = 32
    num_attention_heads: int = 2


class Heads(nn.Module):
    """A layer that does not say whether it is causal, as many tutorials write it."""

    passes: dict[str, Any] = {}

    def __init__(self, config):
        super().__init__()
        self.config, self.head_dim = config, 16
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        q, k, v = (p(x).unflatten(-1, (2, 16)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return x + function(self, q, k, v, attention_mask, scaling=0.25, dropout=0.0, **self.passes)[0].flatten(2)


class TellingHeads(Heads):
    passes = {"is_causal": True}


class BidirectionalHeads(Heads):
    is_causal = False


class Plain(PreTrainedModel):
    config_class = PlainConfig
    _supports_sdpa = _supports_attention_backend = True
    layer: type[nn.Module] = Heads

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(hf.WORDS, 32)
        self.layers = nn.ModuleList([self.layer(config) for _ in range(2)])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Telling(Plain):
    layer = TellingHeads


class Bidirectional(Plain):
    layer = BidirectionalHeads


class Outer(PreTrainedModel):
    """Makes the masks of a model inside it, which shares its configuration."""

    config_class = PlainConfig
    _supports_sdpa = _supports_attention_backend = True
    inner: type[PreTrainedModel] = Plain

    def __init__(self, config):
        super().__init__(config)
        self.model = self.inner(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        Plain._init_weights(self, module)

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.model.embed(input_ids)
        mask = transformers.masking_utils.create_causal_mask(self.config, states, None, None)
        return self.model(input_ids, mask)


class OuterOfBidirectional(Outer):
    inner = Bidirectional


@pytest.mark.parametrize("how", ["loaded", "chosen", "replaced"])
@pytest.mark.parametrize("cls", [Plain, Telling, Outer])
def test_causal_layers_of_a_user_do_not_see_later_tokens(cls: type[PreTrainedModel], how: str):
    torch.manual_seed(0)
    model, ids = cls._from_config(PlainConfig(), attn_implementation="sdpa").eval(), hf.tokens(40)
    other = torch.cat([ids[:, :30], hf.tokens(10, seed=3)], 1)
    with torch.no_grad():
        exact = model(ids)
        if how == "loaded":
            chosen = cls._from_config(PlainConfig(), attn_implementation=NAMES[1]).eval()
            chosen.load_state_dict(model.state_dict(), strict=False)
            model = chosen
        else:
            choose(model, how if how == "replaced" else NAMES[1])
        assert len(cores(model)) == 2
        check(model(ids), exact)
        assert torch.equal(model(ids)[:, :30], model(other)[:, :30])


def test_a_layer_that_says_it_is_not_causal_may_get_the_masks_of_an_outer_model():
    model, path = OuterOfBidirectional(PlainConfig()), "model.layers.0"
    layer = model.get_submodule(path)
    assert causality(layer, model.model, "layers.0") is False
    assert causality(layer, model, path) is None
    model.config = copy.deepcopy(model.config)  # no longer that of the model inside
    assert causality(layer, model, path) is False


@pytest.mark.parametrize("cls", [Plain, Outer])
def test_causal_layers_of_a_user_ask_for_calibration(cls: type[PreTrainedModel]):
    model = cls._from_config(PlainConfig(), attn_implementation="scatterbrain").eval()
    with pytest.raises(ValueError, match="Heads is not calibrated for causal calls"), torch.no_grad():
        model(hf.tokens(290))


def test_a_note_of_an_inner_model_goes_once_the_model_around_it_is_known():
    model, path = build(*ENCODERS["splinter"]), "encoder.layer.0.attention.self"
    model.set_attn_implementation(NAMES[1])
    layer = model.get_submodule(path)
    assert is_causal_alone(layer) is False
    for is_causal in (None, True):
        note_causality(layer, False, path)
        note_causality(layer, is_causal, path)
        assert is_causal_alone(layer) is True


# -------------------- every family of transformers


def models() -> list[type[nn.Module]]:
    """The classes of models whose implementation can be chosen, of all files that can be imported."""
    folder, found = Path(transformers.__file__).parent / "models", []
    for path in sorted(folder.glob("*/modeling_*.py")):
        if "ALL_ATTENTION_FUNCTIONS" in path.read_text(encoding="utf-8"):
            try:
                file = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            except ImportError:  # of a package that it needs
                continue
            classes = [c for c in vars(file).values() if inspect.isclass(c) and issubclass(c, PreTrainedModel)]
            found += [c for c in classes if c.__module__ == file.__name__ and c._can_set_attn_implementation()]
    return found


def adds_masks(model: type[nn.Module]) -> bool:
    """Whether a model makes masks with transformers' functions and has attention of its own that takes them."""
    makes = any(re.fullmatch(r"create_\w*mask", name) for code in codes_of(model) for name in names_in(code))
    own = [inspect.signature(inspect.unwrap(cls.forward)).parameters for cls in attention_of(model).own]
    return makes and any("attention_mask" in parameters for parameters in own)


def test_the_families_with_attention_of_their_own_are_known():
    every = models()
    assert len(every) > 500
    assert {model.config_class.__name__ for model in every if adds_masks(model)} == set(ADDED), (
        "add them to masks.ADDED"
    )
    # Those that look their classes up in tables are found, and no model whose layers ask for a function is.
    tables = re.compile(r"_CLASSES\[config\._attn_implementation\]")
    files = {inspect.getmodule(model) for model in every}
    looked_up = {file.__name__ for file in files if tables.search(inspect.getsource(file))}
    own = {model for model in every if inspect.isclass(model.config_class) and is_own(model.config_class)}
    assert looked_up and looked_up <= {model.__module__ for model in own}
    assert not any(attention_of(model).routed for model in own)


def is_own(config_class: type) -> bool:
    return bool(models_of(config_class)) and computes_itself(config_class.__new__(config_class))


@functools.cache
def causal_classes(file: types.ModuleType) -> set[str]:
    """The classes of a file that say of themselves, or tell a part, that it is causal."""
    pieces = re.split(r"^class (\w+)", inspect.getsource(file), flags=re.MULTILINE)[1:]
    code = dict(zip(pieces[::2], pieces[1::2]))
    return {name for name, text in code.items() if re.search(r"self\.is_causal = True|is_causal=True", text)}


def built_by(model: type[nn.Module]) -> set[type[nn.Module]]:
    """The classes that a model and its parts build, apart from those of models inside it."""
    seen, todo = {model}, [model]
    while todo:
        inner = {cls for cls in _built_by(todo.pop()) if not issubclass(cls, PreTrainedModel)} - seen
        seen |= inner
        todo += inner
    return seen - {model}


def test_the_classes_that_say_wrongly_that_they_are_causal_are_known():
    # Layers of these get their masks from the model around, or from a part that is no model.
    others = {"blt", "kosmos2_5", "mimi", "pocket_tts_audio_tokenizer"}
    found = set()
    for model in models():
        if model.__module__.split(".")[2] not in others and not _makes_causal_masks(model):
            says = causal_classes(inspect.getmodule(model))
            found |= {cls.__name__ for cls in built_by(model) if cls.__name__ in says}
    # This one tells BridgeTowerSelfAttention.
    known = set(WRONGLY_CAUSAL) - {"BridgeTowerSelfAttention"} | {"BridgeTowerBertCrossLayer"}
    assert found == known, "see whether they are, and add them to layers.WRONGLY_CAUSAL"
