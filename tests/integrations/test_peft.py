"""Adapters of peft on models whose attention is replaced, before or after."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from testkit import assert_same_bits, cores, counting_backend, encoder, partial_mask, rand, with_biases
from torch import Tensor, nn

peft = pytest.importorskip("peft")

import scatterbrain as sb

SETTINGS = (sb.Window(8, block_q=8), sb.Quadratic(4, "learned"))
CALIBRATED = (sb.Window(8, block_q=8), sb.Quadratic(4))


class Situation(NamedTuple):
    """A model of a library, what LoRA targets in it, and one forward pass.

    Args:
        build: the library's own model, the same at every call.
        targets: ``target_modules``.
        run: the output of a model.
        to_save: ``modules_to_save`` for the learned projections, as the warning names them; None where peft refuses.
    """

    build: Callable[[], nn.Module]
    targets: list[str]
    run: Callable[[nn.Module], Tensor]
    to_save: list[str] | None = ["attention"]


def torch_encoder() -> nn.Module:
    torch.manual_seed(0)
    return with_biases(encoder(32, 2, nested=False))


def vision_transformer() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2, embed_dim=48, num_heads=3, num_classes=5)


def diffusers_layers() -> nn.Module:
    layers = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    return nn.Sequential(*(layers.Attention(32, heads=2, dim_head=16) for _ in range(2)))


def hugging_face(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = pytest.importorskip("hf_models").FAMILIES[name].build()
        transformers = pytest.importorskip("scatterbrain.integrations.transformers")
        transformers.set_attention_dropout(model)
        return model

    return build


def of_tokens(model: nn.Module) -> Tensor:
    return model(rand(2, 40, 32))


def of_pixels(model: nn.Module) -> Tensor:
    return model(rand(2, 3, 96, 96))


def of_ids(model: nn.Module) -> Tensor:
    hf = pytest.importorskip("hf_models")
    return hf.output(model(input_ids=hf.tokens(40)))


SITUATIONS = {
    "multi-head": Situation(torch_encoder, ["self_attn"], of_tokens, None),
    "output projections": Situation(torch_encoder, ["out_proj"], of_tokens),
    "beside attention": Situation(torch_encoder, ["linear1", "linear2"], of_tokens),
    "timm": Situation(vision_transformer, ["qkv", "proj"], of_pixels),
    "diffusers": Situation(diffusers_layers, ["to_q", "to_v"], of_tokens),
    "llama": Situation(hugging_face("llama"), ["q_proj", "v_proj"], of_ids, ["scatterbrain"]),
    "bert": Situation(hugging_face("bert"), ["query", "value"], of_ids, ["scatterbrain"]),
}
KEPT = [name for name, situation in SITUATIONS.items() if situation.to_save is not None]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")
        warnings.filterwarnings("ignore", "(All adapters are already merged|Already unmerged)")  # peft to itself
        yield


def adapted(model: nn.Module, situation: Situation, **options: Any) -> peft.PeftModel:
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, target_modules=situation.targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def swapped(model: nn.Module, settings: tuple = SETTINGS) -> tuple[nn.Module, Any]:
    torch.manual_seed(3)
    return model, sb.replace_attention(model, *settings)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def step(model: nn.Module, situation: Situation, steps: int = 1) -> Tensor:
    """The loss of the first of some steps of training."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    torch.manual_seed(1)  # of dropout
    for _ in range(steps):
        optimizer.zero_grad()
        out = situation.run(model.train())
        losses.append((out - rand(*out.shape, seed=5)).square().mean())
        losses[-1].backward()
        optimizer.step()
    return losses[0].detach()


@torch.no_grad()
def output(model: nn.Module, situation: Situation) -> Tensor:
    return situation.run(model.eval())


# -------------------- the order


@pytest.mark.filterwarnings("ignore:the learned projections")
@pytest.mark.parametrize("name", SITUATIONS)
def test_the_order_of_adapter_and_swap_does_not_matter(name: str):
    situation = SITUATIONS[name]
    first = adapted(swapped(situation.build())[0], situation)
    last, report = swapped(adapted(situation.build(), situation))
    assert report.replaced
    results = []
    for model in (first, last):
        loss = step(model, situation)
        lora = adapters(model)
        assert lora and all(p.grad is not None and p.grad.any() for p in lora.values())
        results.append([loss, *(p.grad for p in lora.values()), *lora.values()])
    assert_same_bits(*results)


@pytest.mark.parametrize("name", SITUATIONS)
def test_an_adapter_changes_the_output_and_can_be_switched_off(name: str):
    situation = SITUATIONS[name]
    plain = output(swapped(situation.build())[0], situation)
    model = adapted(swapped(situation.build())[0], situation)
    assert not torch.allclose(output(model, situation), plain, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(output(model, situation), plain)


@pytest.mark.parametrize("name", SITUATIONS)
def test_merging_keeps_the_output_and_unmerging_gives_the_model_back(name: str):
    situation = SITUATIONS[name]
    model = adapted(swapped(situation.build())[0], situation)
    before = output(model, situation)
    model.merge_adapter()
    torch.testing.assert_close(output(model, situation), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(output(model, situation), before, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    assert not adapters(merged)
    torch.testing.assert_close(output(merged, situation), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_saved_adapter_loads_into_a_replaced_model(name: str, tmp_path: Path):
    situation = SITUATIONS[name]
    model = adapted(swapped(situation.build())[0], situation)
    before = output(model, situation)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(swapped(situation.build())[0], tmp_path)
    torch.testing.assert_close(output(again, situation), before)


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("calibrated", ["before", "after"])
def test_a_calibrated_model_takes_an_adapter(name: str, calibrated: str):
    situation = SITUATIONS[name]
    model = swapped(situation.build(), CALIBRATED)[0]
    model = adapted(model, situation) if calibrated == "after" else model
    with sb.calibrate(model), torch.no_grad():
        situation.run(model.eval())
    model = adapted(model, situation) if calibrated == "before" else model
    step(model, situation)
    assert all(p.grad is not None and p.grad.any() for p in adapters(model).values())


@pytest.mark.parametrize("name", SITUATIONS)
def test_an_adapter_that_is_loaded_leaves_the_calibration(name: str, tmp_path: Path):
    situation = SITUATIONS[name]
    model = swapped(situation.build(), CALIBRATED)[0]
    with sb.calibrate(model), torch.no_grad():
        situation.run(model.eval())
    adapted(copy.deepcopy(model), situation).save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert_same_bits(output(again, situation), output(adapted(model, situation), situation))


@pytest.mark.filterwarnings("ignore:the learned projections")
@pytest.mark.parametrize("name", SITUATIONS)
def test_restoring_leaves_the_adapter(name: str):
    situation = SITUATIONS[name]
    model, report = swapped(situation.build())
    model = adapted(model, situation)
    report.restore()
    assert not cores(model)
    exact = adapted(situation.build(), situation)
    if name != "output projections":  # torch's own module never calls an adapter there
        torch.testing.assert_close(output(model, situation), output(exact, situation))


def test_an_adapted_output_projection_acts_on_exact_calls_too():
    """torch's own function takes the weight of an output projection and never calls it."""
    situation = SITUATIONS["output projections"]
    model = adapted(swapped(situation.build())[0], situation)
    layer, x, mask = model.base_model.model.layers[0].self_attn, rand(2, 40, 32), partial_mask(40, 40)
    with pytest.warns(UserWarning, match="runs exact attention"):
        got = layer(x, x, x, attn_mask=mask, need_weights=False)[0]
    merged = model.merge_and_unload().layers[0].self_attn
    torch.testing.assert_close(got, merged(x, x, x, attn_mask=mask, need_weights=False)[0])


# -------------------- learned projections


@pytest.mark.parametrize("name", SITUATIONS)
def test_frozen_projections_are_said_once_for_a_model(name: str):
    situation = SITUATIONS[name]
    model = adapted(swapped(situation.build())[0], situation)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(model, situation, steps=2)
    said = [str(w.message) for w in caught if "learned projections" in str(w.message)]
    assert len(cores(model)) > 1 and len(said) == 1
    assert f"modules_to_save={situation.to_save or ['attention']}" in said[0]


@pytest.mark.parametrize("name", KEPT)
def test_modules_to_save_trains_saves_and_reloads_the_projections(name: str, tmp_path: Path):
    situation = SITUATIONS[name]
    model = adapted(swapped(situation.build())[0], situation, modules_to_save=situation.to_save)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the learned projections")
        step(model, situation, steps=2)
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert sum(name.endswith("modules_to_save.default.key_projection") for name in moved) == 2
    trained = output(model, situation)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(swapped(situation.build())[0], tmp_path)
    torch.testing.assert_close(output(again, situation), trained)
    merged = again.merge_and_unload()
    assert len(cores(merged)) == 2 and not any("modules_to_save" in key for key in merged.state_dict())
    torch.testing.assert_close(output(merged, situation), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["evaluation", "nothing trains", "they train", "no gradients"])
def test_nothing_is_said_where_nothing_is_missed(what: str):
    module = sb.ScatterbrainAttention(2, 8, None, *SETTINGS).train(what != "evaluation")
    module.requires_grad_(what == "they train")
    inputs = [rand(2, 2, 40, 8, seed=i).requires_grad_(what != "nothing trains") for i in range(3)]
    with warnings.catch_warnings(), torch.set_grad_enabled(what != "no gradients"):
        warnings.simplefilter("error")
        module(*inputs)


def test_a_compiled_module_says_it_while_it_is_traced_and_makes_one_graph():
    module = sb.ScatterbrainAttention(2, 8, None, *SETTINGS).requires_grad_(False)
    graphs, backend = counting_backend()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    inputs = [rand(2, 2, 40, 8, seed=i).requires_grad_() for i in range(3)]
    with pytest.warns(UserWarning, match="learned projections"):
        compiled(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(*inputs).sum().backward()
    assert len(graphs) == 1


def test_the_layers_are_named_apart_from_other_modules():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2), "cross_attention": nn.Linear(3, 3)})
    sb.replace_attention(model, *SETTINGS)
    assert model["attention"].attention.names == ["attention.attention"]


def test_another_implementation_reaches_the_projections_that_an_adapter_holds():
    situation, model = SITUATIONS["llama"], SITUATIONS["llama"].build()
    transformers = pytest.importorskip("scatterbrain.integrations.transformers")
    narrow = transformers.register("scatterbrain:narrow", *SETTINGS)
    every_key = transformers.register("scatterbrain:every-key", sb.Window(512, block_q=8), SETTINGS[1])
    model.set_attn_implementation(narrow)
    wrapped = adapted(model, situation, modules_to_save=situation.to_save)
    step(wrapped, situation, steps=2)
    approximated = output(wrapped, situation)
    outputs = {}
    for name in ("sdpa", every_key, narrow):
        model.set_attn_implementation(name)
        outputs[name] = output(wrapped, situation)
    torch.testing.assert_close(outputs[every_key], outputs["sdpa"], rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs[narrow], approximated) and not torch.allclose(approximated, outputs["sdpa"], atol=1e-3)
