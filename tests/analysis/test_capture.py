"""sb.capture and what it stands on: the calls of a model's attention layers, and the file that they are written to."""

from __future__ import annotations

import functools
import json
from functools import partial
from pathlib import Path

import pytest
import testkit
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from testkit import ROOT, padding, randomized, run_python
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.analysis import calls_of
from scatterbrain.analysis.exact import exact
from scatterbrain.analysis.regimes.inputs import captured_heads
from scatterbrain.bench.inputs import calibration_of, file_inputs
from scatterbrain.integrations import register_replacer
from scatterbrain.integrations.replacer import REPLACERS
from scatterbrain.integrations.restrictions import NotExpressible

E, H, L = 48, 4, 60


def encoder() -> nn.TransformerEncoder:
    return randomized(testkit.encoder(E, H)).eval()


def llama(**more: object) -> nn.Module:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
    return hf.LlamaModel(hf.LlamaConfig(**sizes, num_key_value_heads=2, **more)).eval()


def test_calls_are_those_of_the_layers_and_the_model_is_as_before() -> None:
    model, x = encoder().train(), torch.randn(2, L, E)
    names, before = [type(m) for m in model.modules()], model.eval()(x)
    model.train()
    calls = calls_of(model, x)
    assert [call.path for call in calls] == ["layers.0.self_attn", "layers.1.self_attn"]
    attention = model.layers[0].self_attn
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    for got, want in zip((calls[0].query, calls[0].key, calls[0].value), projected):
        torch.testing.assert_close(got, want.unflatten(-1, (H, -1)).transpose(1, 2))
    assert (
        calls[0].scale == pytest.approx((E // H) ** -0.5)
        and not calls[0].is_causal
        and calls[0].key_padding_mask is None
    )
    assert model.training and [type(m) for m in model.modules()] == names and torch.equal(model.eval()(x), before)


def test_a_cure_that_is_for_other_attention_is_not_given() -> None:
    def masks_heads(module: nn.Module, inputs: object) -> None:
        raise NotExpressible("Layer masks heads", "use attn_implementation='eager' for the whole model")

    model = encoder()
    model.layers[0].register_forward_pre_hook(masks_heads)
    with pytest.raises(ValueError, match="Layer masks heads; leave that out of the model or its inputs") as refused:
        calls_of(model, torch.randn(2, L, E))
    assert "eager" not in str(refused.value) and "eager" in str(refused.value.__cause__)


def test_a_batch_may_be_arguments_in_every_form() -> None:
    model, x = encoder(), torch.randn(2, L, E)
    mask = padding(L, (0, 20))
    want = calls_of(model, {"src": x, "src_key_padding_mask": mask})
    for batch in ((x, None, mask), [x, None, mask], lambda m: m(x, src_key_padding_mask=mask)):
        got = calls_of(model, batch)
        assert torch.equal(got[1].query, want[1].query) and torch.equal(got[1].valid_queries(), ~mask)
    with pytest.raises(TypeError, match="batch must be a tensor, a mapping .* got int"):
        calls_of(model, 5)


def test_a_model_that_is_swapped_already_keeps_its_attention() -> None:
    model, x = encoder(), torch.randn(1, L, E)
    want = calls_of(model, x)
    report = sb.replace_attention(model, sb.Window(8), sb.Quadratic(4))  # not calibrated: nothing of it runs
    got = calls_of(model, x)
    assert all(torch.equal(a.query, b.query) and a.path == b.path for a, b in zip(got, want))
    assert len(report.replaced) == 2 and model.layers[0].self_attn.attention.support == sb.Window(8)
    assert "forward" not in vars(model.layers[0].self_attn.attention)


def test_a_decoder_that_is_swapped_need_not_be_calibrated() -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    model, words = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval(), {"input_ids": torch.arange(50)[None]}
    want = calls_of(model, words)
    sb.replace_attention(model, sb.Window(8), sb.Quadratic(4))
    got = calls_of(model, words)
    assert all(torch.equal(a.query, b.query) and a.path == b.path for a, b in zip(got, want, strict=True))
    with pytest.raises(ValueError, match="is not calibrated"):
        model(**words)


def test_what_others_have_set_on_a_layer_stays() -> None:
    """As hooks of accelerate do."""
    model, x = encoder(), torch.randn(1, L, E)
    sb.replace_attention(model, sb.Window(8), None)
    core, want = model.layers[0].self_attn.attention, model(x)
    hooked = core.forward = functools.partial(core.forward)
    calls_of(model, x)
    assert core.forward is hooked and torch.equal(model(x), want)


def test_an_error_inside_the_model_leaves_it_as_it_was() -> None:
    model = encoder()
    with pytest.raises((RuntimeError, AssertionError)):
        calls_of(model, torch.randn(2, L, E + 1))
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


class Block(nn.Module):
    """Two ways of attention in one module, made with this package."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = (sb.ScatterbrainAttention(H, E // H, support=sb.Window(8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (H, -1)).transpose(1, 2)
        out = self.own(heads, heads, heads) + self.other(heads, 2 * heads, heads)
        return out.transpose(1, 2).flatten(2)


def test_layers_of_one_module_have_paths_of_their_own() -> None:
    assert [call.path for call in calls_of(nn.Sequential(Block()), torch.randn(1, L, E))] == ["0.own", "0.other"]
    found = sb.compare(nn.Sequential(Block(), Block()), torch.randn(1, L, E), {"sparse": (sb.Window(8), None)})
    assert [layer.path for layer in found.layers] == ["0.own", "0.other", "1.own", "1.other"]


def test_a_layer_is_named_as_its_replacer_names_it(tmp_path: Path) -> None:
    """However deep the module inside it is that computes."""

    class Inner(nn.Module):
        def __init__(self, support: sb.Window) -> None:
            super().__init__()
            self.attention = sb.ScatterbrainAttention(H, E // H, support=support, low_rank=None)

        def forward(self, x: Tensor) -> Tensor:
            heads = x.unflatten(-1, (H, -1)).transpose(1, 2)
            return self.attention(heads, heads, heads).transpose(1, 2).flatten(2)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.processor: nn.Module = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.processor(x)

    class Replacer:
        def matches(self, module: nn.Module) -> bool:
            return type(module) is Layer

        def replace(self, module: Layer, support: sb.Window, low_rank: object) -> tuple[str, object]:
            before, module.processor = module.processor, Inner(support)
            return "", lambda: setattr(module, "processor", before)

    register_replacer(Replacer())
    try:
        model, x = nn.Sequential(Layer(), nn.Linear(E, E)), torch.randn(1, L, E)
        report = sb.replace_attention(model, sb.Window(8), None)
        assert [call.path for call in calls_of(model, x)] == [entry.path for entry in report.replaced] == ["0"]
        report.restore()
        assert [call.path for call in calls_of(model, x)] == ["0"]
    finally:
        REPLACERS.pop(0)


def test_what_is_not_looked_at_is_told_with_the_reason(tmp_path: Path) -> None:
    model, x = nn.Sequential(encoder(), OwnAttention()), torch.randn(1, L, E)
    pairs = {"sparse": (sb.Window(8), None)}
    found = sb.compare(model, x, pairs, repeats=1)
    assert list(found.left) == ["1"] and "an attention module of its own" in found.left["1"]
    assert "not looked at: 1: an attention module of its own" in str(found)
    found.write_json(tmp_path / "c.json")
    assert list(json.loads((tmp_path / "c.json").read_text())["facts"]["not_compared"]) == ["1"]
    model = encoder()
    sb.replace_attention(model, layers={"layers.1.self_attn": (sb.Window(8), None)})
    left = sb.compare(model, x, pairs, repeats=1).left
    assert (
        list(left) == ["layers.0.self_attn"]
        and "left as it is when other layers were replaced" in left["layers.0.self_attn"]
    )
    assert sb.compare(encoder(), x, pairs, repeats=1).left == {}


def test_calls_that_run_exactly_are_told_with_the_reason() -> None:
    model = encoder().layers[0].self_attn
    sb.replace_attention(model, sb.Window(8), None)
    model.attention.bypassed = "before"
    x = torch.randn(2, L, E)
    with pytest.warns(UserWarning, match="need_weights"), pytest.raises(ValueError, match=r"(?s)none of.*need_weights"):
        calls_of(model, (x, x, x))
    assert model.attention.bypassed == "before"


def test_scores_that_are_capped_name_a_cure_that_applies() -> None:
    hf = pytest.importorskip("transformers")
    sizes = dict(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
    model = hf.Gemma2Model(hf.Gemma2Config(**sizes, num_key_value_heads=2, head_dim=16)).eval()
    words = {"input_ids": torch.arange(50)[None]}
    for look in (calls_of, lambda *given: sb.tune(model, [words, words], max_error=0.1)):
        with pytest.raises(ValueError, match=r"to compare, tune or capture: Gemma2Attention caps the scores") as error:
            look(model, words)
        assert "where=" not in str(error.value)  # a layer that is left out would still run on our masks
    assert model(**words).last_hidden_state.isfinite().all()


def test_layers_of_a_decoder_that_attend_locally_are_told() -> None:
    hf = pytest.importorskip("transformers")
    sizes = dict(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
    kinds = dict(sliding_window=20, layer_types=["sliding_attention", "full_attention"], head_dim=16)
    model = hf.Gemma3TextModel(hf.Gemma3TextConfig(**sizes, **kinds, num_key_value_heads=2)).eval()
    with pytest.warns(UserWarning, match="sliding window"):
        found = sb.compare(model, {"input_ids": torch.arange(50)[None]}, {"sparse": (sb.Window(8), None)}, repeats=1)
    assert [layer.path for layer in found.layers] == ["layers.1.self_attn"]
    assert list(found.left) == ["layers.0.self_attn"] and "it ran exactly" in found.left["layers.0.self_attn"]
    assert "sliding window, 20 tokens wide" in str(found)


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


def test_a_model_without_known_attention_says_what_was_looked_at_and_what_is_needed() -> None:
    model = nn.Sequential(nn.Linear(E, E), OwnAttention())
    with pytest.raises(ValueError, match=r"(?s)got Sequential.*1: .*OwnAttention: .*register_replacer") as error:
        calls_of(model, torch.randn(1, L, E))
    assert "layers of torch, transformers, timm and diffusers are known" in str(error.value)
    with pytest.raises(ValueError, match=r"(?s)got Linear.*look like attention:\n  none"):
        sb.compare(nn.Linear(3, 3), torch.randn(1, 3))
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        sb.compare("model", torch.randn(1, 3))


def test_a_batch_that_reaches_no_attention_is_named() -> None:
    model = encoder()
    with pytest.raises(ValueError, match="none of them computed attention"):
        calls_of(model, lambda m: m.layers[0].linear1(torch.randn(1, L, E)))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_file_holds_what_plain_softmax_attention_computes_with(tmp_path: Path, scale: float | None) -> None:
    """Grouped heads, padding, causal, the scale: exact attention on the file's tensors is the layer's own."""
    model = llama()
    if scale is not None:
        for layer in model.layers:
            layer.self_attn.scaling = scale
    words = torch.randint(1, 60, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(words)
    mask[1, :9] = 0
    batch = {"input_ids": words, "attention_mask": mask}
    entries = sb.capture(model, batch, tmp_path / "new" / "qkv.safetensors", name="tiny")
    assert entries == [f"lm_tiny{row}.N{n}.layer{layer}" for layer in range(2) for row, n in (("", 70), ("_1", 61))]
    tensors = load_file(tmp_path / "new" / "qkv.safetensors")
    call = calls_of(model, batch)[1]
    assert call.is_causal and (scale is None or call.scale == scale)
    target = exact(call).out
    for row, name in ((0, "lm_tiny.N70.layer1"), (1, "lm_tiny_1.N61.layer1")):
        q, k, v = (tensors[f"{name}.{part}"] for part in "qkv")
        assert q.shape == k.shape == (4, int(name.split(".N")[1].split(".")[0]), 16)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(out, target[row, :, call.valid_queries()[row]], rtol=1e-4, atol=1e-5)
    assert tensors["lm_tiny.cal.layer0.q"].shape == (4, 70 + 61, 16)


def test_the_benchmarks_read_the_file(tmp_path: Path) -> None:
    file, x = tmp_path / "qkv.safetensors", torch.randn(1, 90, E)
    sb.capture(encoder(), x, file, calibration=torch.randn(1, 300, E))
    run = run_python(ROOT / "benchmarks" / "quality.py", file, "--keys", "32", "--only", "window 32 + centroid 64")
    assert run.returncode == 0 and "| window 32 + centroid 64 | 0." in run.stdout, run.stderr
    run = run_python(
        *("-m", "scatterbrain", "bench", "--inputs", file, "--lengths", "64", "--heads", "4", "--repeats", "1"),
        *("--methods", "sdpa", "window-16", "--memory", "false", "--rank", "4"),
    )
    assert run.returncode == 0 and "fitted on entry model.cal.layer0" in run.stdout + run.stderr, run.stderr


def test_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name must be letters, digits and underscores, got 'a.b'"):
        sb.capture(encoder(), torch.randn(1, L, E), tmp_path / "f", name="a.b")


def test_rows_of_padding_alone_are_left_out(tmp_path: Path) -> None:
    file, mask = tmp_path / "qkv.safetensors", torch.tensor([[False], [True]]).expand(2, L)
    batch = {"src": torch.randn(2, L, E), "src_key_padding_mask": mask}
    assert sb.capture(encoder(), batch, file) == [f"model.N{L}.layer{layer}" for layer in range(2)]
    with pytest.raises(ValueError, match="tokens that are not padding, got none"):
        sb.capture(encoder(), batch | {"src_key_padding_mask": torch.ones_like(mask)}, file)
    with pytest.raises(ValueError, match="expected a file to write, .* which is a folder"):
        sb.capture(encoder(), lambda model: pytest.fail("it ran"), tmp_path)


def test_what_statistics_are_fitted_on_is_written_once_for_all_rows(tmp_path: Path) -> None:
    file, rows = tmp_path / "qkv.safetensors", 6
    model = encoder()
    sb.capture(model, torch.randn(rows, L, E), file)
    tensors = load_file(file)
    names = {name for name in tensors if ".cal." in name}
    assert names == {f"model.cal.layer{layer}.{part}" for layer in range(2) for part in "qk"}
    assert tensors["model.cal.layer1.q"].shape == (H, rows * L, E // H)
    for entry in ("model.N60.layer1", "model_5.N60.layer1"):
        found = file_inputs(file, entry, L, H, 4)
        assert found.fitted_on == "entry model.cal.layer1"
        heads = list(captured_heads(file, [entry], None, None, "natural"))
        assert heads[0].fitted_on[0].shape == (1, 1, rows * L, E // H)
    assert calibration_of("model_2.N60.layer1", ["model_2.cal.layer1.q", "model_2.cal.layer1.k", *names]) == (
        "model_2.cal.layer1"
    )
    run = run_python(ROOT / "benchmarks" / "quality.py", file, "--keys", "32", "--only", "window 32 + centroid 64")
    assert run.returncode == 0 and "| window 32 + centroid 64 | 0." in run.stdout, run.stderr


class Depths(nn.Module):
    """Layers that run as often as the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = encoder().layers

    def forward(self, x: Tensor, order: tuple[int, ...]) -> Tensor:
        for number in order:
            x = self.layers[number](x)
        return x


def test_layers_are_fitted_on_their_own_calls_of_the_other_batch(tmp_path: Path) -> None:
    model, x, other = Depths().eval(), torch.randn(1, L, E), torch.randn(1, 300, E)
    file = tmp_path / "qkv.safetensors"
    sb.capture(model, (x, (0, 1)), file, calibration=(other, (1, 0)))
    want = {call.path: call.query for call in calls_of(model, (other, (1, 0)))}
    tensors = load_file(file)
    for layer in range(2):
        torch.testing.assert_close(tensors[f"model.cal.layer{layer}.q"], want[f"layers.{layer}.self_attn"][0])
    sb.capture(model, (x, (0, 1, 0)), file, calibration=(other, (0,)))
    assert [load_file(file)[f"model.cal.layer{layer}.q"].shape[1] for layer in range(3)] == [300, L, L]
    pairs = {"quadratic": (sb.Window(8), sb.Quadratic(4))}
    found = sb.compare(model, (x, (0, 1)), pairs, calibration=(other, (1, 0)), repeats=1)
    assert not any(layer.is_fitted_on_itself for layer in found.layers) and "they did not run" not in str(found)
    found = sb.compare(model, (x, (0, 1)), pairs, calibration=(other, (0,)), repeats=1)
    assert [layer.is_fitted_on_itself for layer in found.layers] == [False, True]
    assert "since they did not run on the other batch: layers.1.self_attn" in str(found)


def test_padded_keys_are_left_out_whatever_the_queries_mask_is(tmp_path: Path) -> None:
    file, model, x, mask = (
        tmp_path / "qkv.safetensors",
        encoder().layers[0].self_attn,
        torch.randn(2, L, E),
        padding(L, (9, 0)),
    )
    model.batch_first = True
    run = lambda m: m(x, x.clone(), x.clone(), key_padding_mask=mask, need_weights=False)  # no query is padded
    assert sb.capture(model, run, file) == ["model.N51.layer0", "model_1.N60.layer0"]
    (call,) = calls_of(model, run)
    torch.testing.assert_close(load_file(file)["model.N51.layer0.k"], call.key[0, :, ~mask[0]])


@pytest.mark.parametrize("order", ["hilbert", "auto"])
def test_a_vision_model_that_is_swapped_is_captured_in_its_own_order(tmp_path: Path, order: str) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=E, num_hidden_layers=2, num_attention_heads=H, intermediate_size=40, patch_size=4)
    model, pixels = (
        hf.ViTModel(hf.ViTConfig(**sizes, image_size=32)).eval(),
        {"pixel_values": torch.randn(1, 3, 32, 32)},
    )
    sb.capture(model, pixels, tmp_path / "before.safetensors")
    want, plain = load_file(tmp_path / "before.safetensors"), [call.query for call in calls_of(model, pixels)]
    report = sb.replace_attention(model, sb.Window(16), None, token_order=order)
    out = model(**pixels).last_hidden_state
    sb.capture(model, pixels, tmp_path / "after.safetensors")
    got = load_file(tmp_path / "after.safetensors")
    assert want.keys() == got.keys() and all(torch.allclose(want[name], got[name], atol=1e-4) for name in want)
    assert torch.equal(model(**pixels).last_hidden_state, out)  # in the order of the curve as before
    for a, b in zip(calls_of(model, pixels), plain):  # compare measures that order
        torch.testing.assert_close(a.query, b, rtol=1e-3, atol=1e-4)
    report.restore()


def test_padding_holds_anything() -> None:
    model, x = encoder(), torch.randn(2, L, E)
    mask = padding(L, (0, 25))
    run = partial(calls_of, model)
    want = exact(run({"src": x, "src_key_padding_mask": mask})[0])
    x[1, L - 25 :] = torch.nan
    got = exact(run({"src": x, "src_key_padding_mask": mask})[0])
    valid = ~mask
    for a, b in zip(got, want):
        assert torch.equal(a.transpose(1, 2)[valid], b.transpose(1, 2)[valid])


def test_a_file_that_cannot_be_written_is_named_before_the_model_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"got .*x.safetensors: .*file is no folder; write elsewhere, or make room"):
        sb.capture(encoder(), lambda model: pytest.fail("it ran"), tmp_path / "file" / "x.safetensors")
    name = "n" * 300
    with pytest.raises(ValueError, match=f"can be written, got .*{name}: File name too long; write elsewhere"):
        sb.capture(encoder(), torch.randn(1, L, E), tmp_path / name)
