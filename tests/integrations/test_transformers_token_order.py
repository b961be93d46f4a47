"""Vision models of transformers with tokens along a Hilbert curve: layers see the curve, outputs stay, and a model's
configuration chooses the order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from testkit import COPIES, cores
from testkit import assert_close_in_scale as close
from token_orders import EVERY_KEY, ORDERED, WINDOW, check_curve
from torch import nn

import scatterbrain as sb
from scatterbrain.integrations.vision import apply_order

hf = pytest.importorskip("transformers")
from hf_vision_models import HUGGING_FACE, ODD, SMALL, hugging_face


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers_layers_see_the_curve(name: str):
    model, x, arguments = hugging_face(name)
    block = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
    check_curve(model, block, x, HUGGING_FACE[name][4], (x.shape[2] // 4, x.shape[3] // 4), **arguments)


@pytest.mark.filterwarnings("ignore:MultiheadAttention runs exact attention:UserWarning")  # SigLIP's pooling head
@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.parametrize("settings", [ORDERED, EVERY_KEY], ids=["full", "every key"])
def test_transformers_outputs_and_hidden_states_stay(name: str, settings: dict[str, Any]):
    model, x, arguments = hugging_face(name)
    with torch.no_grad():
        before = model(x, output_hidden_states=True, **arguments)
        report = sb.replace_attention(model, **settings)
        close(dict(model(x, output_hidden_states=True, **arguments)), dict(before))
        as_tuple = model(x, return_dict=False, **arguments)
        assert isinstance(as_tuple, tuple)
        close(as_tuple[0], before[0])
        report.restore()
        close(dict(model(x, output_hidden_states=True, **arguments)), dict(before))


def test_attention_weights_are_put_back():
    model, x, _ = hugging_face("dinov2")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        before = model(x, output_attentions=True).attentions
        apply_order(model)
        close(model(x, output_attentions=True).attentions, before)


def test_padding_masks_of_transformers_are_ordered_with_the_tokens():
    model, x, _ = hugging_face("dinov2")
    mask = torch.ones(2, 1 + 5 * 9, dtype=torch.long)
    mask[:, 20:] = 0
    with torch.no_grad():
        before = model(x, attention_mask=mask).last_hidden_state[:, :20]
        sb.replace_attention(model, **ORDERED)
        close(model(x, attention_mask=mask).last_hidden_state[:, :20], before)
        with pytest.raises(ValueError, match=r"expected attention_mask of shape \(batch, tokens\)"):
            model(x, attention_mask=mask[:, None, None, :])


POOLING = {  # a part that gets all tokens behind the layers, by the model that has it
    "vit": "pooler",
    "deit": "pooler",
    "ijepa": "pooler",
    "siglip": "head",
    "siglip, inside": "head.attention",
    "siglip, inside of what is swapped": "head.attention.attention",
}


@pytest.mark.filterwarnings("ignore:MultiheadAttention runs exact attention:UserWarning")  # SigLIP's pooling head
@pytest.mark.parametrize("kind", ["forward", "forward, before", "backward"])
@pytest.mark.parametrize("name", POOLING)
def test_hooks_on_parts_that_pool_the_tokens_are_refused_by_name(name: str, kind: str):
    if name == "ijepa":
        model, x = hf.IJepaModel(HUGGING_FACE[name][1], add_pooling_layer=True).eval(), torch.randn(2, 3, *ODD)
        arguments = {}
    else:
        model, x, arguments = hugging_face(name.split(",")[0])
    sb.replace_attention(model, **EVERY_KEY)
    part, hook = model.get_submodule(POOLING[name]), lambda module, *args: None
    register = {
        "forward": part.register_forward_hook,
        "forward, before": part.register_forward_pre_hook,
        "backward": part.register_full_backward_hook,
    }[kind]
    handle = register(hook)
    with pytest.raises(RuntimeError, match=f"a {kind[:8].strip(',')} hook on {POOLING[name]} would see .*tokens"):
        model(x, **arguments)
    handle.remove()
    model(x, **arguments)


@pytest.mark.filterwarnings("ignore:MultiheadAttention runs exact attention:UserWarning")
@pytest.mark.parametrize(("name", "where"), [("vit", "pooler.dense"), ("siglip", "head.mlp")])
def test_hooks_on_what_was_pooled_are_let_in(name: str, where: str):
    model, x, arguments = hugging_face(name)
    seen = []
    model.get_submodule(where).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        before = model(x, **arguments)
        sb.replace_attention(model, **EVERY_KEY)
        close(dict(model(x, **arguments)), dict(before))
    close(*seen)


def test_a_model_without_the_part_that_pools_is_ordered():
    _, x, arguments = hugging_face("vit")
    model = hf.ViTModel(HUGGING_FACE["vit"][1], add_pooling_layer=False).eval()
    with torch.no_grad():
        before = model(x).last_hidden_state
        report = sb.replace_attention(model, **ORDERED)
        close(model(x).last_hidden_state, before)
    assert any("tokens in Hilbert order" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # transformers' own name for it
def test_models_around_an_ordered_model_work_and_checkpoint_gradients():
    model = hf.ViTForImageClassification(hf.ViTConfig(image_size=20, **SMALL)).train()
    x = torch.randn(2, 3, 20, 20)
    model(x, labels=torch.tensor([0, 1])).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    report = sb.replace_attention(model, **EVERY_KEY)
    assert "vit: tokens in Hilbert order" in report.notes
    model.gradient_checkpointing_enable()
    model.zero_grad()
    model(x, labels=torch.tensor([0, 1])).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name], rtol=1e-3, atol=1e-5)


def test_an_ordered_model_saves_as_its_own_class(tmp_path):
    model, x, _ = hugging_face("dinov2")
    before = model(x).last_hidden_state
    sb.replace_attention(model, **ORDERED)
    model.save_pretrained(tmp_path)
    again = hf.AutoModel.from_pretrained(tmp_path)
    assert type(again) is hf.Dinov2Model and model.config.architectures == ["Dinov2Model"]
    close(again(x).last_hidden_state, before)


# -------------------- the order by the configuration


def saved(model: nn.Module, folder: Any) -> str:
    model.save_pretrained(folder)
    return str(folder)


def ordered_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if hasattr(module, "_token_order")]


@pytest.fixture
def dinov2(tmp_path: Any) -> str:
    return saved(hugging_face("dinov2")[0], tmp_path / "dinov2")


@pytest.fixture
def dinov3(tmp_path: Any) -> str:
    return saved(hugging_face("dinov3")[0], tmp_path / "dinov3")


def load(folder: str, cls: Any = hf.AutoModel, **arguments: Any) -> nn.Module:
    import scatterbrain.integrations.transformers as integration

    if "scatterbrain:order_test" not in integration.SETTINGS:
        integration.register("scatterbrain:order_test", *WINDOW.values())
    return cls.from_pretrained(folder, **{"attn_implementation": "scatterbrain:order_test", **arguments})


def test_models_that_choose_the_implementation_are_ordered_as_replace_attention_does_it(dinov2: str):
    model, x = load(dinov2), torch.randn(2, 3, *ODD)
    replaced = hf.AutoModel.from_pretrained(dinov2)
    sb.replace_attention(replaced, **WINDOW, token_order="hilbert")
    natural = load(dinov2, scatterbrain_token_order="natural")
    assert ordered_paths(model) == [""] and ordered_paths(natural) == []
    with torch.no_grad():
        assert torch.equal(model(x).last_hidden_state, replaced(x).last_hidden_state)
        assert not torch.equal(model(x).last_hidden_state, natural(x).last_hidden_state)


def test_from_pretrained_asks_for_an_order_or_refuses_it_and_saves_the_choice(dinov2: str, tmp_path: Any):
    model = load(dinov2, scatterbrain_token_order="natural")
    again = load(saved(model, tmp_path / "natural"))
    assert again.config.scatterbrain_token_order == "natural" and ordered_paths(again) == []
    assert ordered_paths(load(dinov2, scatterbrain_token_order="hilbert")) == [""]
    assert ordered_paths(load(dinov2, attn_implementation="sdpa", scatterbrain_token_order="hilbert")) == []
    assert ordered_paths(load(dinov2, attn_implementation="scatterbrain:full")) == []
    assert ordered_paths(load(dinov2, hf.AutoModelForImageClassification)) == ["dinov2"]
    with pytest.raises(ValueError, match=r"scatterbrain_token_order must be 'auto', 'hilbert', .*got 'raster'"):
        load(dinov2, scatterbrain_token_order="raster")
    assert "scatterbrain_token_order" not in hf.Dinov2Config().to_dict()


def test_a_hilbert_order_asked_for_by_name_raises_where_there_is_none():
    import scatterbrain.integrations.transformers  # noqa: F401  (registers the implementations)

    config = hf.BertConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8)
    config._attn_implementation, config.scatterbrain_token_order = "scatterbrain", "hilbert"
    with pytest.raises(ValueError, match="scatterbrain_token_order='hilbert' expected a model with a vision tr.*BertM"):
        hf.BertModel(config)
    config.scatterbrain_token_order = "auto"
    assert ordered_paths(hf.BertModel(config)) == []


def test_another_implementation_undoes_the_order(dinov2: str):
    exact, model, x = hf.AutoModel.from_pretrained(dinov2), load(dinov2), torch.randn(2, 3, *ODD)
    model.set_attn_implementation("sdpa")
    assert ordered_paths(model) == [] and type(model) is hf.Dinov2Model
    with torch.no_grad():
        assert torch.equal(model(x).last_hidden_state, exact(x).last_hidden_state)
    model.set_attn_implementation("scatterbrain:order_test")
    assert ordered_paths(model) == [""] and not model._token_order.is_strict
    model.config.scatterbrain_token_order = "hilbert"
    model.set_attn_implementation("scatterbrain:order_test")
    assert ordered_paths(model) == [""] and model._token_order.is_strict
    model.config.scatterbrain_token_order = "natural"
    model.set_attn_implementation("scatterbrain:order_test")
    assert ordered_paths(model) == []
    report = sb.replace_attention(exact, **WINDOW)
    exact.set_attn_implementation("sdpa")
    assert ordered_paths(exact) == []
    report.restore()
    assert type(exact) is hf.Dinov2Model


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "pickle"])
def test_copies_of_an_ordered_model_keep_the_order_and_lose_it_by_themselves(dinov3: str, copied: Any):
    exact, model, x = hf.AutoModel.from_pretrained(dinov3), load(dinov3), torch.randn(1, 3, *ODD)
    again = copied(model)
    with torch.no_grad():
        ordered = model(x).last_hidden_state
        assert torch.equal(again(x).last_hidden_state, ordered)
        again.set_attn_implementation("sdpa")
        assert torch.equal(again(x).last_hidden_state, exact(x).last_hidden_state)
        assert not again.embeddings._forward_hooks and not again.rope_embeddings._forward_hooks
        assert torch.equal(model(x).last_hidden_state, ordered)


def test_of_two_towers_the_images_are_ordered(tmp_path: Any):
    text = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 8}
    tokens = {"eos_token_id": 49, "bos_token_id": 1, "pad_token_id": 2}
    tower = {
        "text_config": {**text, "vocab_size": 50, **tokens},
        "vision_config": {**SMALL, "image_size": 20},
    }
    folder = saved(hf.CLIPModel(hf.CLIPConfig(**tower)), tmp_path)
    exact, model = hf.AutoModel.from_pretrained(folder), load(folder)
    assert ordered_paths(model) == ["vision_model"]
    assert ordered_paths(load(folder, scatterbrain_token_order="natural")) == []
    assert ordered_paths(load(folder, scatterbrain_token_order="hilbert")) == ["vision_model"]
    batch = {"input_ids": torch.tensor([[3, 4, 49]]), "pixel_values": torch.randn(1, 3, 20, 20)}
    every_key = copy.deepcopy(model)
    for core in cores(every_key).values():
        core.support, core.low_rank = sb.Window(4096), None
    with torch.no_grad():
        close(every_key(**batch).image_embeds, exact(**batch).image_embeds)


def test_models_of_transformers_that_choose_the_implementation_have_exact_class_tokens_too():
    import scatterbrain.integrations.transformers  # noqa: F401  (registers the implementations)

    config = hf.Dinov2WithRegistersConfig(image_size=24, **SMALL)
    config._attn_implementation = "scatterbrain"
    model = hf.Dinov2WithRegistersModel(config)
    assert [core.exact_queries for core in cores(model).values()] == [5, 5]
