"""Settings layer by layer: their file, and the functions that take them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import testkit
import torch
from testkit import cores, randomized
from torch import nn

import scatterbrain as sb
from scatterbrain.layer_settings import LayerSettings
from scatterbrain.supports import SUPPORTS

PAIRS = {
    "layers.0.self_attn": (sb.Routed(64, block_q=32, pools=2), sb.Centroid(96)),
    "layers.1.self_attn": (sb.Full(), None),
}


def encoder() -> nn.TransformerEncoder:
    return randomized(testkit.encoder(48, 4)).eval()


def test_a_file_gives_the_settings_back(tmp_path: Path) -> None:
    more = {
        "a.b": (sb.Window(16, sinks=4), sb.Quadratic(4)),
        "c": (sb.Window(64), None),
        "d": (sb.LSH(32), sb.Favor(24)),
        "e": (sb.Routed((16, 24)), None),
    }
    more["f"] = more["e"]
    settings = LayerSettings(PAIRS | more, {"model": "mine", "error": 0.04})
    settings.save(tmp_path / "new" / "s.yaml")
    loaded = LayerSettings.load(tmp_path / "new" / "s.yaml")
    assert dict(loaded) == dict(settings) and loaded.about == settings.about
    text = (tmp_path / "new" / "s.yaml").read_text()
    assert "{kind: routed, keys: 64, block_q: 32, pools: 2}" in text and text.startswith("model: mine")
    assert text.count("keys: [16, 24]") == 2 and "&" not in text
    assert dict(LayerSettings.of(settings.as_dict())) == dict(settings) == dict(LayerSettings.of(dict(settings)))


def test_paths_are_found_inside_of_other_models() -> None:
    settings = LayerSettings({"layers.0.attn": (sb.Window(8), None), "layers.10.attn": (sb.Window(16), None)})
    assert settings.pair_of("layers.0.attn") == settings.pair_of("model.encoder.layers.0.attn") == (sb.Window(8), None)
    assert settings.pair_of("0.attn") == (sb.Window(8), None) and settings.pair_of("model.layers.1.attn") is None
    assert settings.pair_of("attn") is None  # of both


def found(own: str, target: str) -> list[str | None]:
    """Which of the settings of ``own`` the paths of ``target`` get."""
    keys = {path: (sb.Window(8 + i), None) for i, path in enumerate(own.split())}
    names = {pair: path for path, pair in keys.items()}
    return [names.get(pair) for pair in LayerSettings(keys).in_model(target.split()).values()]


@pytest.mark.parametrize(
    ("own", "target", "want"),
    [
        ("a.0 a.1", "a.0 a.1 other.a.0", ["a.0", "a.1", None]),
        ("a.0 a.1", "m.a.0 m.a.1", ["a.0", "a.1"]),
        ("a.0 a.1 a.2", "x.a.0 x.a.1 x.a.2 y.a.0", ["a.0", "a.1", "a.2", None]),
        ("m.a.0 m.a.1", "a.0 a.1", ["m.a.0", "m.a.1"]),
        ("x.a.0 x.a.1 y.a.0", "a.0 a.1", ["x.a.0", "x.a.1"]),
        ("a.0 b.0", "x.a.0 y.b.0", ["a.0", "b.0"]),
        ("a.0 m.a.0", "x.m.a.0", ["m.a.0"]),
        ("a.0 b.0", "_orig_mod.a.0 b._orig_mod.0 c", ["a.0", "b.0", None]),
        ("a.0", "b.0", [None]),
    ],
)
def test_all_layers_are_found_behind_one_beginning(own: str, target: str, want: list[str | None]) -> None:
    assert found(own, target) == want


@pytest.mark.parametrize(
    ("own", "target", "message"),
    [
        ("a.0", "x.a.0 y.a.0", r"a.0 ends 2: x.a.0 and y.a.0; .* part that was tuned \(x or y\), .*where="),
        ("a.0 b", "x.a.0 x.b y.a.0 y.b z.a.0 z.b w.b", "a.0 ends 3: x.a.0, y.a.0 and z.a.0"),
        ("x.a.0 y.a.0", "a.0", "a.0 could be any of x.a.0 and y.a.0; .* in the whole model"),
    ],
)
def test_paths_that_may_mean_several_layers_are_refused(own: str, target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(own, target)


def test_settings_of_a_part_do_not_reach_the_part_beside_it() -> None:
    """CLIP's two encoders have the same layers."""
    both = nn.ModuleDict({"text": encoder(), "vision": encoder()})
    with pytest.raises(ValueError, match=r"expected paths that end one layer of ModuleDict each, .*\(text or vision\)"):
        sb.replace_attention(both, layers=PAIRS)
    assert not cores(both)
    report = sb.replace_attention(both, layers=PAIRS, where=lambda path: path.startswith("vision"))
    assert [entry.path for entry in report.replaced] == ["vision.layers.0.self_attn"]
    report.restore()
    assert len(sb.replace_attention(both["text"], layers=PAIRS).replaced) == 1
    tied = encoder()
    sb.replace_attention(nn.ModuleDict({"a": tied, "b": tied}), layers=PAIRS)
    assert len(cores(tied)) == 1


def test_a_compiled_model_takes_the_settings_of_the_model() -> None:
    model = nn.Sequential(encoder())
    model[0].layers[0] = torch.compile(model[0].layers[0], backend="eager")
    report = sb.replace_attention(model, layers=PAIRS)
    assert [entry.path for entry in report.replaced] == ["0.layers.0._orig_mod.self_attn"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1", "expected a mapping with the key 'layers'"),
        ("layers: {x: {support: {kind: window, keys: 8}}}", "x: expected the keys support and low_rank"),
        ("layers: {x: {support: {kind: wndow}, low_rank: none}}", r"x.support: expected one of full, .* got"),
        ("layers: {x: {support: {kind: window, kyes: 8}, low_rank: none}}", "x.support.kyes: window has no such field"),
        ("layers: {x: {support: {kind: window, keys: 0}, low_rank: none}}", "x.support: .*keys must be at least"),
        ("layers: {x: {support: empty, low_rank: none}}", "x: .*leaves no attention at all"),
        (
            "layers: {x: {support: {kind: blocks, index: [[0]]}, low_rank: none}}",
            "x.support: expected one of full, .* got",
        ),
        ("layers: {x: {support: {keys: 8}, low_rank: none}}", r"x.support: expected one of full, .* got \{'keys': 8\}"),
        (
            "layers: {x: {support: full, low_rank: 'os:abc'}}",
            "x.low_rank: expected one of quadratic, .* got 'os:abc'",
        ),
        ("layers: {x: {support: {kind: window, keys: many}, low_rank: none}}", "x.support: Window"),
        ("layers: [", "is no YAML file"),
        ("layers: {}\nlayers: {}", "layers: .*: expected every key once, got layers twice, in lines 1 and 2"),
    ],
)
def test_a_wrong_file_names_the_layer_and_the_key(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        sb.replace_attention(encoder(), layers=file)


def test_what_is_no_settings_is_refused() -> None:
    with pytest.raises(ValueError, match="which is no file"):
        sb.replace_attention(encoder(), layers="gone.yaml")
    with pytest.raises(TypeError, match="layers must be LayerSettings, .* got int"):
        sb.replace_attention(encoder(), layers=5)
    with pytest.raises(TypeError, match=r"layers: x: expected a pair"):
        LayerSettings({"x": sb.Window(8)})
    with pytest.raises(ValueError, match="give no others"):
        sb.replace_attention(encoder(), sb.Window(8), layers=PAIRS)


class FullyShardedDataParallel(nn.Sequential):
    """What data parallelism is known by: its name."""


def test_parameters_are_not_added_inside_data_parallelism():
    learned = {"0.layers.1.self_attn": (sb.Window(8), sb.Quadratic(4, "learned"))}
    model = FullyShardedDataParallel(encoder())
    with pytest.raises(ValueError, match="model that is not yet in FullyShardedDataParallel, .* Quadratic.*learned"):
        sb.replace_attention(model, layers=learned)
    assert not cores(model)
    assert len(sb.replace_attention(model, layers={"0.layers.1.self_attn": (sb.Window(8), None)}).replaced) == 1
    assert len(sb.replace_attention(nn.Sequential(encoder()), layers=learned).replaced) == 1


def test_replace_attention_gives_every_layer_its_own() -> None:
    model = encoder()
    report = sb.replace_attention(model, layers=PAIRS | {"layers.2.self_attn": (sb.Window(8), None)})
    first = model.layers[0].self_attn.attention
    assert (first.support, first.low_rank) == PAIRS["layers.0.self_attn"]
    assert type(model.layers[1].self_attn) is nn.MultiheadAttention
    assert "keeps it exact" in str(report) and "layer by layer, 3 of them" in str(report)
    report.restore()
    report = sb.replace_attention(model, layers={"layers.1.self_attn": (sb.Window(8), None)})
    assert [entry.path for entry in report.replaced] == ["layers.1.self_attn"] and "does not name it" in str(report)


def test_a_module_of_ones_own_takes_a_layers_pair() -> None:
    settings = LayerSettings(PAIRS)
    core = sb.ScatterbrainAttention(4, 12, None, *settings["layers.0.self_attn"])
    assert (core.support, core.low_rank) == PAIRS["layers.0.self_attn"]


def bert(**more: object) -> nn.Module:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
    return hf.BertModel(hf.BertConfig(**sizes, initializer_range=0.3, **more)).eval()


def test_transformers_take_them_by_name_and_save_them_with_the_model(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    from scatterbrain.integrations.transformers import register

    pairs = {"encoder.layer.0.attention.self": (sb.Window(16), sb.Centroid(8))}
    name = register("scatterbrain:by-layer", layers=pairs)
    words = torch.randint(1, 60, (1, 90), generator=torch.Generator().manual_seed(1))
    model = bert()
    sb.replace_attention(model, layers=pairs)
    want = model(words).last_hidden_state
    named = bert()
    exact = named(words).last_hidden_state
    named.set_attn_implementation(name)
    assert torch.equal(named(words).last_hidden_state, want) and not torch.allclose(want, exact, atol=1e-3)
    named.save_pretrained(tmp_path / "model")
    loaded = hf.AutoModel.from_pretrained(tmp_path / "model", attn_implementation="scatterbrain").eval()
    assert torch.equal(loaded(words).last_hidden_state, want)
    plain = hf.AutoModel.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(plain(words).last_hidden_state, exact)
    inside = hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "model", attn_implementation=name)
    assert inside.bert.encoder.layer[0].attention.self.scatterbrain.support == sb.Window(16)
    with pytest.raises(ValueError, match="give no others"):
        register("scatterbrain:both", sb.Window(8), layers=pairs)


def clip() -> nn.Module:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    words = dict(vocab_size=60, bos_token_id=1, eos_token_id=2)
    parts = dict(text_config=sizes | words, vision_config=sizes | dict(image_size=32, patch_size=8))
    return hf.CLIPModel(hf.CLIPConfig(**parts)).eval()


def test_a_name_gives_a_part_its_settings_and_not_the_part_beside_it(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    from scatterbrain.integrations.transformers import register

    of_vision, layer = (sb.Window(8), None), "encoder.layers.0.self_attn"
    name, model = register("scatterbrain:of-vision", layers={layer: of_vision}), clip()
    with pytest.raises(ValueError, match="one layer of CLIPModel each, .*text_model or vision_model"):
        model.set_attn_implementation(name)
    assert not cores(model) and model.config._attn_implementation == "sdpa"
    assert {c._attn_implementation for c in (model.config.text_config, model.config.vision_config)} == {"sdpa"}
    model.set_attn_implementation({"vision_config": name})
    assert [core.support for core in cores(model).values()] == [sb.Window(8)]
    both = {f"vision_model.{layer}": of_vision, f"text_model.{layer}": (sb.Window(16), None)}
    model = clip()
    model.set_attn_implementation(register("scatterbrain:of-both", layers=both))
    model.save_pretrained(tmp_path / "clip")
    loaded = hf.AutoModel.from_pretrained(tmp_path / "clip", attn_implementation="scatterbrain")
    of_layers = {path: core.support for path, core in cores(loaded).items()}
    assert of_layers == {f"{path}.scatterbrain": support for path, (support, _) in both.items()}


def test_settings_of_a_configuration_are_for_its_own_layers(tmp_path: Path) -> None:
    """Also where another part of the model has equal ones."""
    hf = pytest.importorskip("transformers")
    from scatterbrain.integrations.transformers import register

    name = register("scatterbrain:of-either", layers={"encoder.layers.0.self_attn": (sb.Window(8), None)})
    model = clip()
    for part in (model.vision_model, model.text_model):
        part.set_attn_implementation(name)
    model.save_pretrained(tmp_path / "clip")
    loaded = hf.AutoModel.from_pretrained(tmp_path / "clip", attn_implementation="scatterbrain")
    assert [core.support for core in cores(loaded).values()] == [sb.Window(8)] * 2
    one = bert()
    pairs = {f"encoder.layer.{i}.attention.self": (sb.Window(8 + 8 * i), None) for i in range(2)}
    one.set_attn_implementation(register("scatterbrain:of-both-towers", layers=pairs))
    one.save_pretrained(tmp_path / "bert")
    two = hf.EncoderDecoderModel.from_encoder_decoder_pretrained(
        *[tmp_path / "bert"] * 2,
        encoder_attn_implementation="scatterbrain",
        decoder_attn_implementation="scatterbrain",
    )
    found = {path.removesuffix(".scatterbrain"): core.support for path, core in cores(two).items()}
    for begin in ("encoder.", "decoder.bert."):
        assert {path: (found[begin + path], None) for path in pairs} == pairs


def test_a_part_of_a_saved_model_is_loaded_though_its_settings_do_not_say_which_are_for_it(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    from scatterbrain.integrations.transformers import register
    from scatterbrain.integrations.transformers.layers import attention_layers

    size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    text = dict(size, vocab_size=50, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=dict(size, image_size=32, patch_size=8))).eval()
    pairs = {path: (sb.Window(2), None) for path, _ in attention_layers(model)}
    model.set_attn_implementation(register("scatterbrain:of-both-towers", layers=pairs))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="CLIPVisionModel: the settings in its configuration .* exact attention"):
        part = hf.CLIPVisionModel.from_pretrained(tmp_path, attn_implementation="scatterbrain").eval()
    pixels = torch.randn(1, 3, 32, 32)
    exact = hf.CLIPVisionModel.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    torch.testing.assert_close(part(pixels).last_hidden_state, exact(pixels).last_hidden_state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = hf.CLIPModel.from_pretrained(tmp_path, attn_implementation="scatterbrain").eval()
    ours = model.vision_model(pixels).last_hidden_state
    assert torch.equal(whole.vision_model(pixels).last_hidden_state, ours)
    assert not torch.allclose(ours, exact(pixels).last_hidden_state, atol=1e-4)


def test_a_model_that_is_loaded_refuses_settings_that_fit_several_ways(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    from scatterbrain.integrations.transformers import register

    layer = "encoder.layer.0.attention.self"
    pairs = {f"{part}.{layer}": (sb.Window(8), None) for part in ("query", "document")}
    name = register("scatterbrain:of-two-towers", layers=pairs)
    bert().save_pretrained(tmp_path / "bert")
    model = bert()
    for choose in (
        lambda: model.set_attn_implementation(name),
        lambda: hf.BertModel.from_pretrained(tmp_path / "bert", attn_implementation=name),
    ):
        with pytest.raises(ValueError, match=f"of BertModel .*could be any of query.{layer} and document"):
            choose()


@pytest.mark.parametrize(
    "pair",
    [
        (sb.Window(8), sb.Features(torch.exp)),
        (sb.Blocks.from_mask(torch.ones(8, 8, dtype=torch.bool)), None),
    ],
    ids=["functions", "lists"],
)
def test_parts_that_no_file_can_hold_are_refused_by_name(pair: tuple, tmp_path) -> None:
    settings = sb.LayerSettings({"layer": pair})
    with pytest.raises(ValueError, match="got (Features|Blocks), which is made of tensors or functions; pass"):
        settings.save(tmp_path / "layers.yaml")


def test_a_class_that_no_file_could_name_is_refused_before_it_is_written(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Wide(sb.Window):
        kind: ClassVar[str] = "wide"

    with pytest.raises(ValueError, match=r"layers: layer: .* got Wide, .*scatterbrain.supports.register\(Wide\)"):
        sb.LayerSettings({"layer": (Wide(8), None)}).save(tmp_path / "layers.yaml")
    assert not (tmp_path / "layers.yaml").exists()


def test_a_field_without_a_default_is_asked_for() -> None:
    @dataclass(frozen=True)
    class Needy(sb.Window):
        kind: ClassVar[str] = "needy"
        keys: int = field()

    try:
        SUPPORTS.register(Needy)
        with pytest.raises(ValueError, match="layers: x.support.keys: needy needs this field"):
            LayerSettings.from_dict({"layers": {"x": {"support": "needy", "low_rank": "none"}}})
    finally:
        SUPPORTS.pop("needy", None)
