"""Models of other packages with the default: what calibrates nothing and remembers nothing, what needs calibration, and
what becomes of checkpoints that were saved when every layer did."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import hf_models as hf
import pytest
import torch
import transformers
from testkit import cores, rand
from torch import nn

import scatterbrain as sb
from scatterbrain.integrations.transformers import register
from scatterbrain.integrations.transformers.layers import attention_layers, causality, core_of

QUADRATIC, CENTROID = sb.presets.causal()[1], sb.presets.drop_in()[1]
ENCODERS = ["bert", "roberta", "vit", "dinov2", "clip vision"]
DECODERS = ["gpt2", "llama", "qwen3", "opt", "clip text"]
pytestmark = pytest.mark.filterwarnings("error::UserWarning", "ignore:calibrate. statistics were fitted")


def ours(model: nn.Module) -> list[str]:
    return [name for name in model.state_dict() if ".scatterbrain." in name]


def calibrated(name: str, implementation: str = "scatterbrain") -> nn.Module:
    model = hf.FAMILIES[name].build(implementation)
    with sb.calibrate(model):
        hf.run(model, **hf.inputs(name, seed=5)[0])
    return model


# -------------------- transformers


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_calibrates_nothing_and_has_the_state_dict_of_the_original(name: str, tmp_path: Path):
    plain, model, arguments = hf.FAMILIES[name].build(), hf.FAMILIES[name].build("scatterbrain"), hf.inputs(name)[0]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(cores(model)) == 2 and not any(core.needs_calibration for core in cores(model).values())
    out = hf.run(model, **arguments)
    with pytest.warns(UserWarning, match="there is nothing to calibrate"), sb.calibrate(model):
        assert torch.equal(hf.run(model, **arguments), out)
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    model.save_pretrained(tmp_path)
    for implementation in ("sdpa", "scatterbrain"):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=implementation).eval()
        expected = out if implementation == "scatterbrain" else hf.run(plain, **arguments)
        assert torch.equal(hf.run(loaded, **arguments), expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_swapped_encoder_calibrates_nothing_and_has_the_state_dict_of_the_original(name: str):
    model, arguments = hf.FAMILIES[name].build(), hf.inputs(name)[0]
    names = model.state_dict().keys()
    sb.replace_attention(model)
    assert model.state_dict().keys() == names
    assert torch.equal(hf.run(model, **arguments), hf.run(hf.FAMILIES[name].build("scatterbrain"), **arguments))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("swap", [False, True])
def test_a_decoder_needs_calibration_and_says_so(name: str, swap: bool):
    model, arguments = hf.FAMILIES[name].build("sdpa" if swap else "scatterbrain"), hf.inputs(name)[0]
    if swap:
        sb.replace_attention(model)
    with pytest.raises(ValueError, match="not calibrated.*sb.calibrate"):
        hf.run(model, **arguments)
    with sb.calibrate(model):
        hf.run(model, **arguments)
    assert hf.run(model, **arguments).isfinite().all()
    assert all((core.support_of(True), core.causal_low_rank) == sb.presets.causal() for core in cores(model).values())


@pytest.mark.parametrize("name", ["whisper", "bart"])
def test_an_encoder_decoder_calibrates_its_decoder_alone(name: str):
    model, arguments = hf.FAMILIES[name].build("scatterbrain"), hf.inputs(name)[0]
    assert ours(model) and all(key.startswith("decoder.") for key in ours(model))
    encoder = {key: value for key, value in arguments.items() if not key.startswith("decoder")}
    with torch.no_grad():
        assert model.get_encoder()(**encoder).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="Attention is not calibrated"):
        hf.run(model, **arguments)
    with sb.calibrate(model):
        hf.run(model, **arguments)
    out, changed = hf.run(model, **arguments), dict(arguments)
    changed["decoder_input_ids"] = arguments["decoder_input_ids"].clone()
    changed["decoder_input_ids"][:, 60:] = hf.tokens(40, seed=77)
    other = hf.run(model, **changed)
    assert torch.equal(other[:, :60], out[:, :60]) and not torch.equal(other, out)


def test_a_model_that_generates_is_calibrated_once():
    config = transformers.BartConfig(**hf.BART | hf.LONG, attn_implementation="scatterbrain")
    model = transformers.BartForConditionalGeneration(config).eval()
    with sb.calibrate(model), torch.no_grad():
        model(**hf.inputs("bart")[0])
    written = model.generate(hf.tokens(), max_new_tokens=6, do_sample=False)
    assert written.shape[0] == 2 and written.shape[1] > 1


KNOWN = {
    "bert": {False}, "vit": {False}, "clip vision": {False}, "clip text": {None}, "llama": {True}, "gpt2": {True},
    "bert decoder": {True, False}, "whisper": {True, False}, "modernbert": {False},
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_whether_a_layer_is_causal_is_known_where_its_model_says_so(name: str):
    model = hf.FAMILIES[name].build()
    assert {causality(module, model, path) for path, module in attention_layers(model)} == KNOWN[name]


def test_a_layer_outside_of_a_model_is_taken_for_one_that_may_be_causal():
    encoder = hf.FAMILIES["vit"].build().layers
    model = nn.ModuleDict({"encoder": encoder})
    assert {causality(module, model, path) for path, module in attention_layers(model)} == {None}
    sb.replace_attention(model)
    assert all((c.low_rank, c.causal_low_rank) == (CENTROID, QUADRATIC) for c in cores(model).values())


def test_inside_calibrate_dropout_acts_on_bidirectional_calls_of_a_layer_that_gathers_causal_ones():
    layer = hf.FAMILIES["vit"].build(attention_probs_dropout_prob=0.5).layers[0].attention.train()
    sb.replace_attention(layer)
    assert core_of(layer).causal_low_rank == QUADRATIC
    with pytest.warns(UserWarning, match="dropout=0.5 acts on attention weights"):
        with pytest.raises(ValueError, match="no ScatterbrainAttention was run.*exact attention: dropout=0.5"):
            with sb.calibrate(layer):
                first, second = (layer(torch.ones(1, 90, hf.WIDTH))[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_a_kernel_for_all_calls_that_no_causal_call_can_have_is_refused_with_the_cure():
    name = register("scatterbrain:centroid-alone", sb.Window(16), sb.Centroid(8))
    with pytest.raises(ValueError, match=r"Centroid.*would see the future.*causal_low_rank=Quadratic\(\)"):
        hf.run(hf.FAMILIES["llama"].build(name), **hf.inputs("llama")[0])
    name = register("scatterbrain:with-causal", sb.Window(16), sb.Centroid(8), causal_low_rank=sb.Quadratic(4))
    assert all(core.low_rank == sb.Quadratic(4) for core in cores(calibrated("llama", name)).values())
    assert hf.run(hf.FAMILIES["bert"].build(name), **hf.inputs("bert")[0]).isfinite().all()
    with pytest.raises(ValueError, match="keeps the state of one low-rank kernel"):
        register("scatterbrain:two", sb.Window(16), sb.Quadratic(5), causal_low_rank=sb.Quadratic(4))


@pytest.mark.parametrize("how", ["name", "swap"])
def test_a_causal_mask_of_an_encoder_runs_exactly_and_says_so(how: str):
    plain, model = (hf.FAMILIES["bert"].build(name) for name in ("sdpa", "scatterbrain" if how == "name" else "sdpa"))
    if how == "swap":
        sb.replace_attention(model)
    mask = torch.ones(hf.TOKENS, hf.TOKENS, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    arguments = {"input_ids": hf.tokens(), "attention_mask": mask}
    with pytest.warns(UserWarning, match=r"exact attention.*mask is causal, and Centroid.*'scatterbrain:quadratic'"):
        out = hf.run(model, **arguments)
    torch.testing.assert_close(out, hf.run(plain, **arguments), rtol=2e-5, atol=2e-5)


def test_calibration_survives_a_time_under_a_kernel_without_state():
    model, arguments = calibrated("bert", "scatterbrain:quadratic"), hf.inputs("bert")[0]
    out = hf.run(model, **arguments)
    for name in ("scatterbrain", "scatterbrain:quality", "sdpa"):
        model.set_attn_implementation(name)
        assert not ours(model) and not torch.equal(hf.run(model, **arguments), out)
    model.set_attn_implementation("scatterbrain:quadratic")
    assert torch.equal(hf.run(model, **arguments), out)


@pytest.mark.parametrize("name", ["bert", "dinov2", "whisper", "llama"])
def test_a_folder_of_the_quadratic_pair_loads_under_the_default_and_runs_as_before_under_its_name(name: str, tmp_path):
    model, arguments = calibrated(name, "scatterbrain:quadratic"), hf.inputs(name)[0]
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new = type(model).from_pretrained(tmp_path, attn_implementation="scatterbrain").eval()
    said = [str(w.message) for w in caught if "scatterbrain" in str(w.message)]
    assert len(said) == (name != "llama") and all("'scatterbrain:quadratic' in transformers" in text for text in said)
    assert hf.run(new, **arguments).isfinite().all()  # a decoder is calibrated by what was saved
    old = type(model).from_pretrained(tmp_path, attn_implementation="scatterbrain:quadratic").eval()
    assert torch.equal(hf.run(old, **arguments), hf.run(model, **arguments))


def test_a_layer_of_the_default_in_a_copy_runs_the_same():
    model, arguments = calibrated("whisper"), hf.inputs("whisper")[0]
    assert torch.equal(hf.run(copy.deepcopy(model), **arguments), hf.run(model, **arguments))


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_an_encoder_of_the_default_trains(name: str):
    model, arguments = hf.FAMILIES[name].build("scatterbrain"), hf.inputs(name)[0]
    sb.set_attention_dropout(model, 0.0)
    hf.output(model.train()(**arguments)).square().mean().backward()
    core = core_of(next(module for _, module in attention_layers(model)))
    assert not list(core.parameters())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# -------------------- timm and diffusers


def test_timms_attention_remembers_nothing_and_loads_what_was_saved_when_it_did():
    models = pytest.importorskip("timm_models")
    for name in ("vit", "eva02"):
        plain, model, old = (models.build(name) for _ in range(3))
        sb.replace_attention(model)
        sb.replace_attention(old, *sb.presets.quadratic(32))
        assert model.state_dict().keys() == plain.state_dict().keys()
        image = models.images(name)
        with torch.no_grad():
            with sb.calibrate(old):
                old(image)
            with pytest.warns(UserWarning, match="entries of ScatterbrainAttention are not used") as said:
                model.load_state_dict(old.state_dict())
            assert len(said) == 1  # of all layers together
            model(image)


def test_a_causal_call_of_timms_attention_is_exact_with_a_kernel_that_reads_the_whole_sequence():
    timm = pytest.importorskip("timm")
    layer, x = timm.layers.Attention(32, 2).eval(), rand(2, 90, 32)
    expected = layer(x, is_causal=True)
    sb.replace_attention(layer)
    with pytest.warns(UserWarning, match=r"exact attention.*is_causal=True, and Centroid.*sb.Quadratic\(\)"):
        assert torch.equal(layer(x, is_causal=True), expected)


def test_diffusers_attention_remembers_nothing():
    diffusers = pytest.importorskip("diffusers")
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2}
    model = diffusers.DiTTransformer2DModel(**sizes, sample_size=16, patch_size=1, norm_num_groups=8).eval()
    names = model.state_dict().keys()
    report = sb.replace_attention(model)
    assert len(report.replaced) == 2 and model.state_dict().keys() == names
    with torch.no_grad():
        out = model(rand(1, 4, 16, 16), torch.tensor([3]), torch.tensor([1])).sample
    assert out.isfinite().all()
