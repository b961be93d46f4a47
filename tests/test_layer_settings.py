"""Settings layer by layer: their file, and the functions that take them."""

from __future__ import annotations

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
