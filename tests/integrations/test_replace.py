"""sb.replace_attention: the modules that it replaces, its notes on the others, and the way back."""

from __future__ import annotations

import copy
import re
import runpy
import warnings
from functools import partial
from typing import Any

import pytest
import testkit
import torch
from testkit import EXAMPLES, randomized
from torch import nn

import scatterbrain as sb
from scatterbrain.integrations import NotReplaceable, Replacer, register_replacer
from scatterbrain.integrations.replacer import REPLACERS

E, H, N, L = 48, 4, 2, 21
SETTINGS: dict[str, Any] = {"support": sb.Window(8), "low_rank": sb.Quadratic(9, "input")}
EVERY_KEY: dict[str, Any] = {"support": sb.Window(64), "low_rank": None}
pytestmark = pytest.mark.filterwarnings("error::UserWarning")
padding = partial(testkit.padding, L, (0, 6))


class TheirMultihead(nn.MultiheadAttention):
    """A subclass, as torch.ao's quantizable one."""


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)


class WrappedAttention(nn.Module):
    """Called attention, but the attention is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(E, H)


class NoWeightsAttention(nn.Module):
    """Nothing to swap, nothing to learn."""


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.MultiheadAttention(E, H, batch_first=True)
        self.wide = nn.MultiheadAttention(E, H, kdim=20, vdim=12)
        self.listed = nn.ModuleList([nn.MultiheadAttention(E, H, dropout=0.1)])
        self.again = self.plain
        self.wrapped = WrappedAttention()
        self.bias_kv = nn.MultiheadAttention(E, H, add_bias_kv=True)
        self.zero = nn.MultiheadAttention(E, H, add_zero_attn=True)
        self.patched = nn.MultiheadAttention(E, H)
        self.patched.forward = lambda *a, **k: None
        self.subclass = TheirMultihead(E, H)
        self.parametrized = nn.MultiheadAttention(E, H)
        nn.utils.parametrizations.weight_norm(self.parametrized, "in_proj_weight")
        self.own = OwnAttention()
        self.ours = sb.MultiheadAttention(E, H)
        self.exact = sb.MultiheadAttention(E, H, support=sb.Full())
        self.core = sb.ScatterbrainAttention(H, E // H)
        self.nothing = NoWeightsAttention()
        self.narrow = nn.MultiheadAttention(16, 4)


EXPECTED = {  # path: (replaced, part of the note)
    "plain": (True, ""),
    "wide": (True, ""),
    "listed.0": (True, "exact in training for its dropout=0.1"),
    "again": (True, "the same module as plain"),
    "wrapped.inner": (True, ""),
    "bias_kv": (False, "add_bias_kv=True"),
    "zero": (False, "add_zero_attn=True"),
    "patched": (False, "forward is overridden on the instance"),
    "subclass": (False, "a subclass of nn.MultiheadAttention"),
    "parametrized": (False, "it is parametrized"),
    "own": (False, "use sb.attention or sb.ScatterbrainAttention"),
    "ours": (False, "runs Scatterbrain already"),
    "exact": (False, "runs Scatterbrain already"),
    "narrow": (False, "rank must be at most head_dim=4"),
}


def encoder() -> nn.TransformerEncoder:
    return randomized(testkit.encoder(E, H))


# ------------------------------------------------------------------------------------------------------------- report


def test_every_module_is_listed_with_what_happened():
    report = sb.replace_attention(Zoo(), **SETTINGS)
    assert [entry.path for entry in report.entries] == list(EXPECTED)
    for entry in report.entries:
        replaced, note = EXPECTED[entry.path]
        assert (entry.now is not None) == replaced, entry
        assert note in entry.note and (note or not entry.note), entry
    assert {entry.path for entry in report.replaced} | {entry.path for entry in report.skipped} == set(EXPECTED)


def test_the_report_is_a_table():
    lines = str(sb.replace_attention(Zoo(), **SETTINGS)).splitlines()
    assert lines[0].split() == ["module", "was", "now", "note"]
    assert lines[1].split() == ["plain", "torch.nn.MultiheadAttention", "scatterbrain.MultiheadAttention"]
    bias_kv = "bias_kv torch.nn.MultiheadAttention unchanged add_bias_kv=True adds a key that no support holds"
    assert " ".join(lines[6].split()) == bias_kv
    assert lines[-1] == f"5 of 14 attention modules replaced with {SETTINGS['support']}, {SETTINGS['low_rank']}"


@pytest.mark.parametrize(
    ("where", "error", "words"),
    [
        (
            lambda path, module: True,
            TypeError,
            r"where must be a function of a module's path.*\(path, module\): missing",
        ),
        (lambda: True, TypeError, "where must be a function of a module's path.*too many positional arguments"),
        ("layers.1", TypeError, "where must be a function of a module's path.*got str"),
        (lambda path: {"layers.0.self_attn": True}[path], KeyError, "layers.1.self_attn"),
    ],
    ids=["two arguments", "no argument", "a string", "an error of its own"],
)
def test_a_where_that_fails_leaves_the_model_as_it_was(where, error, words):
    model = testkit.encoder()
    before = [type(module) for module in model.modules()]
    with pytest.raises(error, match=words):
        sb.replace_attention(model, **SETTINGS, where=where)
    assert [type(module) for module in model.modules()] == before


def test_where_may_be_any_function_of_one_path():
    for where in (re.compile(r"layers\.1\.").match, {"layers.1.self_attn"}.__contains__):
        report = sb.replace_attention(testkit.encoder(), **SETTINGS, where=where)
        assert [entry.path for entry in report.replaced] == ["layers.1.self_attn"]


def test_where_chooses_by_path():
    model = encoder()
    report = sb.replace_attention(model, **SETTINGS, where=lambda path: path.startswith("layers.1."))
    assert [entry.path for entry in report.replaced] == ["layers.1.self_attn"]
    assert [entry.note for entry in report.skipped] == ["left out by where="]
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_the_model_itself_may_be_the_module():
    model = nn.MultiheadAttention(E, H)
    report = sb.replace_attention(model, **SETTINGS)
    assert type(model) is sb.MultiheadAttention and "(the model)" in str(report)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), OwnAttention()], ids=["no attention", "unknown attention"])
def test_replacing_nothing_warns(model: nn.Module):
    with pytest.warns(UserWarning, match="changed nothing"):
        report = sb.replace_attention(model)
    assert not report.replaced


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "encoder"}, "model must be an nn.Module, got str"),
        ({"support": 64}, "support must be one of Full, .*, got int"),
        ({"low_rank": 9}, "low_rank must be Quadratic, Favor, Centroid, Features or None, got int"),
    ],
)
def test_wrong_arguments_are_named_before_anything_changes(arguments: dict, message: str):
    model = encoder()
    with pytest.raises(TypeError, match=message):
        sb.replace_attention(**{"model": model, **arguments})
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_the_default_is_the_drop_in_preset_and_that_of_causal_calls_the_causal_one():
    model = encoder()
    sb.replace_attention(model)
    core = model.layers[0].self_attn.attention
    assert (core.support, core.low_rank) == sb.presets.drop_in()
    assert (core.causal_support, core.causal_low_rank) == sb.presets.causal()


def test_causal_calls_have_their_own_support_and_the_report_says_it():
    model, own = encoder().eval(), sb.Window(24)
    for given, used in (({}, sb.presets.causal()[0]), ({"causal_support": own}, own), ({"support": own}, None)):
        report = sb.replace_attention(model, **given)
        core = model.layers[0].self_attn.attention
        assert core.causal_support == used and core.support == given.get("support", sb.presets.drop_in()[0])
        assert f"{core.support}, {core.low_rank} (causal calls: {used or own}, {core.causal_low_rank})" in str(report)
        report.restore()
    with pytest.raises(ValueError, match="causal_support must be .* got LSH"):
        sb.replace_attention(model, causal_support=sb.LSH(32))
    with pytest.raises(TypeError, match="replace_attention: causal_support must be one of Full.*got str"):
        sb.replace_attention(model, causal_support="window")


def test_short_calls_of_a_model_are_exact_where_that_is_asked_for():
    exact = encoder().eval()
    model = copy.deepcopy(exact)
    report = sb.replace_attention(model, **SETTINGS, exact_below=L + 1)
    assert f"bidirectional calls with fewer than {L + 1} keys run exact attention" in str(report)
    with torch.no_grad():
        for n, is_exact in ((L, True), (L + 1, False)):
            x = torch.randn(2, n, E)
            error = float((model(x) - exact(x)).abs().max())
            assert (error < 1e-5) == is_exact, error
    report.restore()
    for wrong in (-1, 2.0, "auto"):
        with pytest.raises(ValueError, match="replace_attention: exact_below must be an int of at least 0, got"):
            sb.replace_attention(model, exact_below=wrong)
    assert "run exact attention" not in str(sb.replace_attention(model, **SETTINGS))


def test_cross_attention_has_no_causal_support():
    model = nn.TransformerDecoderLayer(32, 2, 64, 0.0, batch_first=True)
    sb.replace_attention(model)
    assert model.self_attn.attention.causal_support == sb.presets.causal()[0]
    assert model.multihead_attn.attention.causal_support is None


# --------------------------------------------------------------------------------------------------------------- swap


def test_identity_parameters_hooks_and_modes_stay():
    model = encoder().double().eval()
    attention = model.layers[0].self_attn
    attention.in_proj_bias.requires_grad_(False)
    attention.train()
    seen: list[nn.Module] = []
    attention.register_forward_hook(lambda module, args, out: seen.append(module))
    before = dict(attention.named_parameters())

    sb.replace_attention(model, **SETTINGS)
    assert model.layers[0].self_attn is attention and type(attention) is sb.MultiheadAttention
    assert all(parameter is before[name] for name, parameter in attention.named_parameters())
    assert not attention.in_proj_bias.requires_grad and attention.training and attention.attention.training
    assert not model.layers[1].self_attn.attention.training
    assert model(torch.randn(N, L, E, dtype=torch.double)).dtype == torch.double
    assert seen == [attention]


def test_output_is_that_of_the_model_before_where_all_keys_are_in_the_support():
    model = encoder().train()
    x = torch.randn(N, L, E)
    before = model(x, src_key_padding_mask=padding())
    sb.replace_attention(model, **EVERY_KEY)
    after = model(x, src_key_padding_mask=padding())
    torch.testing.assert_close(after[~padding()], before[~padding()], rtol=1e-4, atol=1e-4)


def test_full_support_keeps_torchs_fast_path_and_its_output():
    model = encoder().eval()
    x = torch.randn(N, L, E)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        before = model(x, src_key_padding_mask=padding())
        sb.replace_attention(model, sb.Full())
        assert model.use_nested_tensor and torch.equal(model(x, src_key_padding_mask=padding()), before)


def test_full_support_replaces_heads_of_any_width():
    model = nn.MultiheadAttention(16, 4)
    assert sb.replace_attention(model, sb.Full()).replaced and model.attention is None


def test_an_encoder_with_nested_tensors_runs_after_the_swap():
    model = encoder().eval()
    assert model.use_nested_tensor
    sb.replace_attention(model, **EVERY_KEY)
    assert not model.use_nested_tensor
    x = torch.randn(N, L, E)
    with torch.no_grad():
        inference = model(x, src_key_padding_mask=padding())
    torch.testing.assert_close(inference, model(x, src_key_padding_mask=padding()))


def test_an_encoder_without_a_swap_keeps_its_nested_tensors():
    model = nn.ModuleDict({"a": encoder(), "b": encoder()})
    sb.replace_attention(model, **SETTINGS, where=lambda path: path.startswith("a."))
    assert not model["a"].use_nested_tensor and model["b"].use_nested_tensor


def test_calibration_then_inference():
    model = encoder().eval()
    sb.replace_attention(model, *sb.presets.quadratic())
    x = torch.randn(N, L, E)
    with torch.no_grad():
        with pytest.raises(ValueError, match="not calibrated"):
            model(x)
        with sb.calibrate(model):
            exact = model(x)
        assert (model(x) - exact).norm() < 0.05 * exact.norm()


def test_copies_of_a_swapped_model_are_swapped():
    model = encoder().eval()
    sb.replace_attention(model, **SETTINGS)
    x = torch.randn(N, L, E)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_a_swapped_model_loads_the_checkpoint_of_the_original_strictly():
    original, model = encoder(), encoder()
    sb.replace_attention(model, support=sb.Window(8), low_rank=sb.Quadratic(9, "learned"))
    model.load_state_dict(original.state_dict(), strict=True)
    assert torch.equal(model.layers[1].self_attn.in_proj_weight, original.layers[1].self_attn.in_proj_weight)


# ------------------------------------------------------------------------------------------------------------ restore


def test_restore_gives_the_model_back():
    model = encoder().eval()
    names, x = list(model.state_dict()), torch.randn(N, L, E)
    with torch.no_grad():
        before = model(x)
        report = sb.replace_attention(model, support=sb.Window(8), low_rank=sb.Quadratic(9, "learned"))
        assert not torch.equal(model(x), before)
        report.restore()
        report.restore()
        assert torch.equal(model(x), before)
    assert list(model.state_dict()) == names and model.use_nested_tensor
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in model.layers)
    assert vars(model.layers[0].self_attn).keys() == vars(encoder().layers[0].self_attn).keys()


def test_restore_keeps_nested_tensors_off_where_they_were_off():
    model = encoder()
    model.use_nested_tensor = False
    sb.replace_attention(model, **SETTINGS).restore()
    assert model.use_nested_tensor is False


def test_restored_models_can_be_swapped_again():
    model = encoder()
    sb.replace_attention(model, **SETTINGS).restore()
    assert len(sb.replace_attention(model, **EVERY_KEY).replaced) == 2


# ---------------------------------------------------------------------------------------------------------- replacers


def test_a_registered_replacer_takes_its_family():
    class OwnReplacer:
        def matches(self, module: nn.Module) -> bool:
            return isinstance(module, OwnAttention)

        def replace(self, module: nn.Module, support: sb.Window, low_rank: sb.Quadratic):
            if module.qkv.bias is None:
                raise NotReplaceable("it has no bias")
            module.support = support
            return "by its own replacer", lambda: delattr(module, "support")

    model = nn.ModuleList([OwnAttention(), OwnAttention()])
    model[1].qkv.bias = None
    replacer: Replacer = OwnReplacer()
    register_replacer(replacer)
    try:
        report = sb.replace_attention(model, **SETTINGS)
    finally:
        REPLACERS.remove(replacer)
    assert [(entry.now is not None, entry.note) for entry in report.entries] == [
        (True, "by its own replacer"),
        (False, "it has no bias"),
    ]
    assert model[0].support == SETTINGS["support"]
    report.restore()
    assert not hasattr(model[0], "support")


def test_the_earlier_names_of_replacers_can_be_imported():
    from scatterbrain.integrations import Handler, register_handler

    assert Handler is Replacer and register_handler is register_replacer


def test_a_family_of_transformers_without_a_replacer_is_named():
    pytest.importorskip("transformers")
    foreign = type("Attention", (OwnAttention,), {"__module__": "transformers.models.some"})
    model = nn.ModuleList([foreign(), nn.MultiheadAttention(E, H)])
    (entry,) = sb.replace_attention(model, **SETTINGS).skipped
    assert entry.was == "transformers.Attention"
    assert entry.note == "some computes attention in its own code, without transformers' AttentionInterface"


# ------------------------------------------------------------------------------------------------------------ example


def test_the_example_runs(capsys: pytest.CaptureFixture[str]):
    runpy.run_path(str(EXAMPLES / "swap_multihead_attention.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "4 of 4 attention modules replaced" in out
    error = float(out.split("relative error: ")[1].split()[0])
    assert error < 0.1
