"""Saved and pickled models of transformers: what every implementation makes of a folder, of a damaged one, and of one
that an earlier release has saved."""

from __future__ import annotations

import logging
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import hf_models as hf
import pytest
import torch
import transformers
from testkit import cores, run_python
from torch import Tensor

import scatterbrain as sb
from scatterbrain.integrations.transformers import layers, register
from scatterbrain.low_rank import Heads

files = pytest.importorskip("safetensors.torch")

SUPPORT = sb.Routed(16, block_q=8)
KERNELS = {"rank5": sb.Quadratic(5), "rank6": sb.Quadratic(6), "ema": sb.Quadratic(5, "ema"), "none": None}
KERNELS |= {"learned": sb.Quadratic(5, "learned"), "favor": sb.Favor(8), "input": sb.Quadratic(5, "input")}
NAMES = {name: register(f"scatterbrain:saved_{name}", SUPPORT, kernel) for name, kernel in KERNELS.items()}
NAMES |= {name: f"scatterbrain:{name}" for name in ("full", "paper", "train", "quadratic", "drop_in")} | {
    "sdpa": "sdpa"
}
MINE = NAMES["rank5"]
# What is left of the statistics of rank 5, by implementation: all of it, nothing that a layer would need, or a warning.
FITS, NEEDS_NOTHING, UNUSED = {"rank5", "ema"}, {"none", "full", "sdpa"}, {"input", "drop_in"}


def calibrated(name: str = MINE) -> transformers.PreTrainedModel:
    model = hf.FAMILIES["bert"].build(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "calibrate: statistics were fitted")  # on few tokens, before any fixture
        with sb.calibrate(model), torch.no_grad():
            model(**hf.inputs("bert")[0])
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    calibrated().save_pretrained(folder)
    return folder


@pytest.fixture
def report(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers says while it loads."""
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers.utils.logging.disable_propagation()


def load(folder: Path, name: str, cls: type = transformers.BertModel) -> tuple[transformers.PreTrainedModel, list[str]]:
    """The model, and what we say of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = cls.from_pretrained(folder, attn_implementation=name)
    return model, [str(w.message) for w in caught if "attention layer" in str(w.message)]


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if ".scatterbrain." in name}


def changed(folder: Path, target: Path, change: object) -> Path:
    """A copy of a folder with other entries in its file."""
    shutil.copytree(folder, target)
    entries = files.load_file(target / "model.safetensors")
    change(entries)
    files.save_file(entries, target / "model.safetensors", metadata={"format": "pt"})
    return target


def as_earlier_releases_saved(entries: dict[str, Tensor]) -> None:
    for name in [name for name in entries if name.endswith(".calibration")]:
        path = name.removesuffix("calibration")
        del entries[name], entries[f"{path}step_count"]
        entries[f"{path}_extra_state"] = torch.tensor([1.0, 0.25, 5, 3, 0], dtype=torch.float64)


# -------------------- folders


@pytest.mark.parametrize("old", [False, True], ids=["this release's", "an earlier release's"])
@pytest.mark.parametrize("name", NAMES)
def test_a_calibrated_folder_loads_under_every_implementation(name: str, old: bool, saved: Path, tmp_path, report):
    folder = changed(saved, tmp_path / "old", as_earlier_releases_saved) if old else saved
    model, said = load(folder, NAMES[name])
    assert "scatterbrain" not in report.text  # nothing of ours among missing, unexpected or mismatched entries
    assert len(said) == (name not in FITS | NEEDS_NOTHING)
    weights = hf.FAMILIES["bert"].build("sdpa").state_dict()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    if name in FITS:
        mine, theirs = state(calibrated()), state(model)
        assert mine.keys() == theirs.keys() and all(core.is_calibrated for core in cores(model).values())
        assert all(torch.equal(mine[key], theirs[key]) for key in mine if not key.endswith("step_count"))
        assert {core.steps for core in cores(model).values()} == {3 * old}
    else:
        start = state(hf.FAMILIES["bert"].build(NAMES[name]))
        torch.testing.assert_close(state(model), start, rtol=0, atol=0)
    if name in UNUSED:
        layers = "2 attention layers (encoder.layer.0.attention.self.scatterbrain, ...)"
        assert f"the checkpoint's entries of scatterbrain for {layers} are not used" in said[0]
        assert "'scatterbrain:quadratic' in transformers" in said[0]
    elif said:
        assert said[0].startswith("2 attention layers (encoder.layer.0.attention.self.scatterbrain, ...) are new")
        assert ("uncalibrated" in said[0]) == (name in ("rank6", "quadratic"))
        assert "of another low-rank kernel than" in said[0]


@pytest.mark.parametrize("base", [False, True], ids=["a head's", "a base model's"])
def test_a_folder_of_an_earlier_release_loads_with_or_without_a_head(base: bool, tmp_path, report):
    classes = [transformers.BertModel, transformers.BertForSequenceClassification]
    first, second = classes if base else classes[::-1]
    model = first._from_config(hf.FAMILIES["bert"].build("sdpa").config, attn_implementation=MINE)
    with sb.calibrate(model), torch.no_grad():
        model(**hf.inputs("bert")[0])
    model.save_pretrained(tmp_path / "new")
    folder = changed(tmp_path / "new", tmp_path / "old", as_earlier_releases_saved)
    loaded, said = load(folder, MINE, second)
    assert all(core.is_calibrated for core in cores(loaded).values()) and not said
    assert "scatterbrain" not in report.text


ENTRIES = list(sb.ScatterbrainAttention(4, 16, low_rank=sb.Quadratic(5)).state_dict())


@pytest.mark.parametrize("old", [False, True], ids=["this release's", "an earlier release's"])
@pytest.mark.parametrize("missing", ENTRIES[:-1])
def test_a_layer_that_misses_one_entry_starts_anew_and_is_named(missing: str, old: bool, saved, tmp_path, report):
    def damage(entries: dict[str, Tensor]) -> None:
        if old:
            as_earlier_releases_saved(entries)
        gone = "_extra_state" if old and missing == "calibration" else missing
        del entries[f"encoder.layer.1.attention.self.scatterbrain.{gone}"]

    model, said = load(changed(saved, tmp_path / "damaged", damage), MINE)
    whole, damaged = cores(model).values()
    assert whole.is_calibrated and not damaged.is_calibrated and "scatterbrain" not in report.text
    assert len(said) == 1 and said[0].startswith("attention layer encoder.layer.1.") and "is not whole" in said[0]
    assert all(not tensor.any() for tensor in damaged.state_dict().values())
    with pytest.raises(ValueError, match="BertSelfAttention is not calibrated"):
        model(**hf.inputs("bert")[0])


def test_the_folder_of_an_ordinary_model_loads_without_a_word(tmp_path, report):
    hf.FAMILIES["bert"].build("sdpa").save_pretrained(tmp_path)
    for name in NAMES.values():
        assert not load(tmp_path, name)[1]
    assert "scatterbrain" not in report.text


def test_state_dicts_load_strictly_both_ways_between_sdpa_and_exact_attention_of_ours():
    exact, plain = hf.FAMILIES["bert"].build("scatterbrain:full"), hf.FAMILIES["bert"].build("sdpa")
    assert len(cores(exact)) == 2
    assert list(exact.state_dict()) == list(plain.state_dict())
    exact.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(exact.state_dict(), strict=True)
    exact.load_state_dict(calibrated().state_dict(), strict=True)  # nothing of it is needed


def test_layers_on_disk_have_their_statistics(saved, tmp_path):
    pytest.importorskip("accelerate")
    where = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}
    loaded = transformers.BertModel.from_pretrained(
        saved, attn_implementation=MINE, device_map=where, offload_folder=tmp_path
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    arguments, counts = hf.inputs("bert", "right")
    for _ in range(2):
        assert torch.equal(hf.run(loaded, **arguments)[counts], hf.run(calibrated(), **arguments)[counts])


# -------------------- other implementations in between


def test_exact_attention_in_between_keeps_what_a_layer_remembers():
    model = calibrated()
    before, keys = state(model), list(model.state_dict())
    model.set_attn_implementation("scatterbrain:full")
    assert not state(model)
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation("scatterbrain:full")
    model.set_attn_implementation(MINE)
    assert list(model.state_dict()) == keys and all(core.is_calibrated for core in cores(model).values())
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)


# -------------------- pickles

FRESH = """
import sys, torch
for name in sys.argv[2:]:
    model, inputs, expected = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(model(**inputs).last_hidden_state, expected), name
    chosen = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation(chosen)
"""


def test_pickled_models_run_in_a_process_that_has_imported_nothing_of_ours(tmp_path):
    replaced = hf.FAMILIES["bert"].build("sdpa")
    sb.replace_attention(replaced, SUPPORT, sb.Quadratic(5), where=lambda path: "layer.1" in path)
    with sb.calibrate(replaced), torch.no_grad():
        replaced(**hf.inputs("bert")[0])
    models = {"named": calibrated(), "exact": hf.FAMILIES["bert"].build("scatterbrain:full"), "replaced": replaced}
    arguments, _ = hf.inputs("bert", "right")
    for name, model in models.items():
        torch.save((model, arguments, hf.run(model, **arguments)), tmp_path / f"{name}.pt")
    (tmp_path / "fresh.py").write_text(FRESH)
    done = run_python(tmp_path / "fresh.py", tmp_path, *models)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_name_that_is_registered_already_keeps_its_meaning():
    name = register("scatterbrain:pickled", SUPPORT, sb.Quadratic(5))
    pickled = pickle.dumps(calibrated(name))
    register(name, sb.Window(16), sb.Quadratic(3))
    model = pickle.loads(pickled)
    assert all(core.support == SUPPORT and core.is_calibrated for core in cores(model).values())
    model.set_attn_implementation(name)
    assert all(core.support == sb.Window(16) and not core.is_calibrated for core in cores(model).values())


# -------------------- projections of queries with gates beside them

GATED = {
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig"),
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig"),
}


def gated(family: str, name: str) -> transformers.PreTrainedModel:
    model, config = (getattr(transformers, cls, None) for cls in GATED[family])
    if config is None:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    sizes = hf.TEXT | {"num_key_value_heads": 2, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts |= {"shared_expert_intermediate_size": 16}
    return model(config(**sizes, **(experts if "next" in family else {}), attn_implementation=name)).eval()


@pytest.mark.parametrize("family", GATED)
@pytest.mark.parametrize("name", ["drop_in", "train", "favor"])
def test_models_with_gates_beside_their_queries_are_saved_loaded_and_trained(family, name, tmp_path) -> None:
    model, ids = gated(family, NAMES[name]), hf.tokens()
    assert all(core.num_heads == hf.HEADS for core in cores(model).values())
    if name == "drop_in":
        with sb.calibrate(model), torch.no_grad():
            model(ids)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=NAMES[name]).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.ne(0).any() for core in cores(loaded).values() for p in core.parameters())


@pytest.mark.parametrize("name", ["rank5", "favor"])
def test_state_of_key_heads_serves_a_model_whose_query_heads_were_guessed_wrong(name, tmp_path, monkeypatch) -> None:
    model, ids = hf.FAMILIES["llama"].build(NAMES[name]), hf.tokens()
    if name == "rank5":
        with sb.calibrate(model), torch.no_grad():
            model(ids)
    else:
        for core in cores(model).values():
            core.redraw(torch.Generator().manual_seed(5))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want = model(ids).logits
    monkeypatch.setattr(layers, "heads_of", lambda module: Heads(2 * hf.HEADS, 16, 2))
    torch.manual_seed(7)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=NAMES[name]).eval()
    assert all(core.num_heads == 2 * hf.HEADS for core in cores(loaded).values())
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, want)
