"""torch's own Transformer modules with this library's attention inside: built from it, or swapped afterwards."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import testkit
import torch
from testkit import causal_mask, count_calls, encoder, partial_mask, randomized
from torch import Tensor, nn

import scatterbrain as sb

E, H, N, L, S = 48, 4, 2, 21, 17
EVERY_KEY: dict[str, Any] = {"support": sb.Window(64), "low_rank": None}  # approximated, and equal to exact attention
FEW: dict[str, Any] = {"support": sb.Routed(16, block_q=8), "low_rank": sb.Quadratic(9, "learned")}


pytestmark = pytest.mark.filterwarnings(
    "error::UserWarning",
    "ignore:The PyTorch API of nested tensors is in prototype",
    "ignore:enable_nested_tensor is True, but",
)


def padding(tokens: int, left: bool = False) -> Tensor:
    return testkit.padding(tokens, (0, 0 if left else 5), (0, 5 if left else 0))


# -------------------- calls and settings

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm_first": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "own activation": {"activation": nn.SiLU()},
    "no bias": {"bias": False},
    "tokens first": {"batch_first": False},
    "odd heads": {"heads": 3},
}
ENCODER_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"src_key_padding_mask": padding(L)},
    "left padding": {"src_key_padding_mask": padding(L, left=True)},
    "causal": {"mask": causal_mask(L, kind=float)},
    "causal, hint": {"mask": causal_mask(L, kind=float), "is_causal": True},
    "causal, bool": {"mask": causal_mask(L)},
    "causal, no hint": {"mask": causal_mask(L, kind=float), "is_causal": False},
    "causal, padding": {"mask": causal_mask(L), "src_key_padding_mask": padding(L)},
}
DECODER_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"tgt_mask": causal_mask(L, kind=float)},
    "causal, hint": {"tgt_mask": causal_mask(L, kind=float), "tgt_is_causal": True},
    "padding": {
        "tgt_mask": causal_mask(L), "tgt_key_padding_mask": padding(L), "memory_key_padding_mask": padding(S)
    },
    "causal memory": {"memory_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "memory_is_causal": True},
}  # fmt: skip
MASKED_CALLS: dict[str, dict[str, Any]] = {
    "mask": {"tgt_mask": partial_mask(L, L)},
    "memory mask": {"tgt_mask": causal_mask(L, kind=float), "memory_mask": partial_mask(L, S)},
}


def decoder() -> nn.TransformerDecoder:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 64, dropout=0.0, batch_first=True), 2)


def run(model: nn.Module, call: dict[str, Any], batch_first: bool = True) -> list[Tensor]:
    """Real rows of the output, batch first: in training with gradients, in evaluation with and without."""
    inputs = [testkit.rand(N, L, E, seed=1)]
    if isinstance(model, nn.TransformerDecoder):
        inputs.append(testkit.rand(N, S, E, seed=2))
    order = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    hidden = call.get("src_key_padding_mask", call.get("tgt_key_padding_mask"))
    results = []
    for training, grad in ((True, True), (False, True), (False, False)):
        model.train(training)
        with torch.set_grad_enabled(grad):
            out = order(model(*map(order, inputs), **call))
        results.append(out.detach() if hidden is None else out.detach()[~hidden])
    return results


# -------------------- Full support


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn with this library's attention under the name of torch's."""
    exact = functools.partial(sb.MultiheadAttention, support=sb.Full())
    monkeypatch.setattr(nn, "MultiheadAttention", exact)
    monkeypatch.setattr(nn.modules.transformer, "MultiheadAttention", exact)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("call", ENCODER_CALLS)
def test_encoders_built_of_exact_modules_are_torchs(layer: str, call: str, monkeypatch: pytest.MonkeyPatch):
    ours = randomized(encoder(**LAYERS[layer]))
    monkeypatch.undo()
    theirs = encoder(**LAYERS[layer])
    assert type(ours.layers[1].self_attn) is sb.MultiheadAttention
    assert type(theirs.layers[1].self_attn) is nn.MultiheadAttention
    assert ours.use_nested_tensor == theirs.use_nested_tensor
    theirs.load_state_dict(ours.state_dict(), strict=True)
    batch_first = LAYERS[layer].get("batch_first", True)
    for got, expected in zip(
        run(ours, ENCODER_CALLS[call], batch_first), run(theirs, ENCODER_CALLS[call], batch_first)
    ):
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("call", DECODER_CALLS | MASKED_CALLS)
def test_decoders_built_of_exact_modules_are_torchs(call: str, monkeypatch: pytest.MonkeyPatch):
    ours = randomized(decoder())
    monkeypatch.undo()
    theirs = decoder()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    arguments = (DECODER_CALLS | MASKED_CALLS)[call]
    for got, expected in zip(run(ours, arguments), run(theirs, arguments)):
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("patched")
def test_a_whole_transformer_built_of_exact_modules_is_torchs(monkeypatch: pytest.MonkeyPatch):
    arguments = {"d_model": E, "nhead": H, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 32}
    ours = nn.Transformer(**arguments, batch_first=True).eval()
    monkeypatch.undo()
    theirs = nn.Transformer(**arguments, batch_first=True).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    source, target = torch.randn(N, S, E), torch.randn(N, L, E)
    call = {"tgt_mask": causal_mask(L), "src_key_padding_mask": padding(S), "memory_key_padding_mask": padding(S)}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(ours(source, target, **call), theirs(source, target, **call))


# -------------------- approximated


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("call", ENCODER_CALLS)
def test_swapped_encoders_are_approximated_and_mean_the_same(layer: str, call: str):
    model = randomized(encoder(**LAYERS[layer]))
    batch_first = LAYERS[layer].get("batch_first", True)
    expected = run(model, ENCODER_CALLS[call], batch_first)
    sb.replace_attention(model, **EVERY_KEY)
    calls = count_calls(model)
    for got, want in zip(run(model, ENCODER_CALLS[call], batch_first), expected):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert len(calls) == 6  # two layers, three runs: no fast path went around one


@pytest.mark.parametrize("call", DECODER_CALLS)
def test_swapped_decoders_are_approximated_and_mean_the_same(call: str):
    model = randomized(decoder())
    expected = run(model, DECODER_CALLS[call])
    sb.replace_attention(model, **EVERY_KEY)
    calls = count_calls(model)
    for got, want in zip(run(model, DECODER_CALLS[call]), expected):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert len(calls) == 12  # self and cross attention


@pytest.mark.parametrize("call", MASKED_CALLS)
def test_other_masks_of_a_swapped_decoder_run_exactly_and_warn(call: str):
    model = randomized(decoder())
    expected = run(model, MASKED_CALLS[call])
    sb.replace_attention(model, **FEW, where=lambda path: ("self_attn" in path) == (call == "mask"))
    with pytest.warns(UserWarning, match="attn_mask is not the causal mask") as caught:
        got = run(model, MASKED_CALLS[call])
    assert len(caught) == 2  # once for each of two modules
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("mask_check", [False, True])
def test_encoders_of_any_nested_tensor_setting_take_padding_after_the_swap(nested: bool, mask_check: bool):
    layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True)
    model = randomized(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested, mask_check=mask_check))
    expected = run(model, {"src_key_padding_mask": padding(L)})
    report = sb.replace_attention(model, **EVERY_KEY)
    got = run(model, {"src_key_padding_mask": padding(L)})
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert model.enable_nested_tensor is nested and model.use_nested_tensor is False
    report.restore()
    assert model.use_nested_tensor is nested


def test_a_swapped_layer_can_be_cloned_into_an_encoder():
    layer = randomized(nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True))
    expected = run(nn.TransformerEncoder(layer, 3), {"src_key_padding_mask": padding(L)})
    sb.replace_attention(layer, **EVERY_KEY)
    model = nn.TransformerEncoder(layer, 3)
    calls = count_calls(model)
    cores = {id(layer.self_attn.attention) for layer in model.layers}
    got = run(model, {"src_key_padding_mask": padding(L)})
    assert len(cores) == 3 and len(calls) == 9
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: nn.ModuleList([m, copy.deepcopy(m)])[1]])
def test_a_copy_of_a_calibrated_encoder_is_its_own(copied: Any):
    model = randomized(encoder()).eval()
    sb.replace_attention(model, *sb.presets.quadratic())
    x = torch.randn(N, L, E)
    with torch.no_grad():
        with sb.calibrate(model):
            model(x)
        before, other = model(x), copied(model)
        with sb.calibrate(other):
            other(10 * torch.randn(N, L, E))
        assert torch.equal(model(x), before)
        means = [m.layers[0].self_attn.attention.query_mean for m in (model, other)]
    assert not torch.equal(*means)


@pytest.mark.parametrize("norm_first", [False, True])
def test_real_tokens_do_not_see_padding(norm_first: bool):
    model = randomized(encoder(norm_first=norm_first)).eval()
    sb.replace_attention(model, **FEW)
    x, mask = torch.randn(N, L, E), padding(L)
    changed = x.masked_fill(mask[..., None], 1e4)
    with torch.no_grad():
        a, b = (model(t, src_key_padding_mask=mask)[~mask] for t in (x, changed))
    assert torch.equal(a, b)


@pytest.mark.parametrize("side", ["left", "right"])
def test_adding_padding_changes_no_real_token(side: str):
    model = randomized(encoder()).eval()
    sb.replace_attention(model, **FEW)
    x, junk = torch.randn(N, L, E), torch.full((N, 11, E), 1e3)
    longer = torch.cat([junk, x] if side == "left" else [x, junk], 1)
    mask = torch.zeros(N, L + 11, dtype=torch.bool)
    mask[:, slice(11) if side == "left" else slice(L, None)] = True
    with torch.no_grad():
        got = model(longer, src_key_padding_mask=mask)[~mask].reshape(N, L, E)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


def swapped_decoder() -> nn.Module:
    model = randomized(decoder()).eval()
    sb.replace_attention(model)
    with torch.no_grad(), sb.calibrate(model):
        model(torch.randn(N, 90, E), torch.randn(N, 100, E), tgt_mask=causal_mask(90, kind=float))
    return model


def test_a_causal_decoder_reads_no_later_token():
    model = swapped_decoder()
    target, memory = torch.randn(N, 90, E), torch.randn(N, 100, E)
    changed = torch.cat([target[:, :41], torch.randn(N, 49, E)], 1)
    with torch.no_grad():
        a, b = (model(t, memory, tgt_mask=causal_mask(90, kind=float)) for t in (target, changed))
    assert torch.equal(a[:, :41], b[:, :41]) and not torch.equal(a, b)


@pytest.mark.parametrize(
    ("support", "low_rank", "now", "note"),
    [
        (sb.Routed(20), None, sb.Routed(24, block_q=1, block_k=8), "lists that queries share would show"),
        (sb.Routed(24, 1, 8, 8), None, sb.Routed(24, 1, 8), "where the number of target tokens puts it"),
        (sb.Routed(24, 1, 8), None, sb.Routed(24, 1, 8), ""),
        (sb.Routed(24, 1, 8, 8, pools=2), None, sb.Routed(24, 1, 8, pools=2), "where the number of target tokens"),
        (sb.Window(20), sb.Favor(8), sb.Routed(24, 1, 8), "where the number of target tokens puts it"),
        (sb.Empty(), sb.Favor(8), sb.Empty(), ""),
        (sb.LSH(16), None, None, "LSH sorts all queries"),
        (sb.Window(8), sb.Quadratic(4, "input"), None, "give causal_low_rank=Quadratic() beside it"),
    ],
)
def test_cross_attention_is_chosen_query_by_query(support: Any, low_rank: Any, now: Any, note: str):
    model = decoder()
    report = sb.replace_attention(model, support, low_rank)
    entry = report.entries[1]
    assert entry.path == "layers.0.multihead_attn" and note in entry.note and (note or not entry.note)
    attention = model.layers[0].multihead_attn
    assert (attention.attention.support == now) if now else (type(attention) is nn.MultiheadAttention)
    assert model.layers[0].self_attn.attention.support == support


# -------------------- programs


def test_torch_fx_traces_a_swapped_model_with_one_node_per_module():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, H, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False, key_padding_mask=mask)[0] + x

    model, x, mask = randomized(Model()), torch.randn(N, L, E), padding(L)
    sb.replace_attention(model, **FEW)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["attention"]
    torch.testing.assert_close(traced(x, mask), model(x, mask))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_refuses_what_it_cannot_hold():
    model = encoder()
    report = sb.replace_attention(model, **FEW)
    with pytest.raises(RuntimeError, match="use torch.export or torch.compile.*restore"):
        torch.jit.script(model)
    report.restore()
    assert torch.jit.script(model)(torch.randn(N, L, E)).shape == (N, L, E)


@pytest.mark.parametrize("call", ["padding", "causal, hint"])
def test_swapped_layers_export(call: str):
    model, x = randomized(encoder()).eval(), torch.randn(N, L, E)
    model.layers = model.layers[:1]
    sb.replace_attention(model, **FEW)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), ENCODER_CALLS[call]).module()(x, **ENCODER_CALLS[call])
        torch.testing.assert_close(exported, model(x, **ENCODER_CALLS[call]), rtol=1e-4, atol=1e-4)


def test_compiled_layers_train():
    model, x = randomized(encoder()).layers[0], torch.randn(N, L, E)
    sb.replace_attention(model, **FEW)
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        forward(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_compiled_decoders_need_the_hint_and_say_so():
    model = randomized(decoder())
    sb.replace_attention(model, **EVERY_KEY, where=lambda path: "self_attn" in path)
    target, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    compiled = torch.compile(model.layers[0], fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="pass is_causal=True if it is the causal mask"):
        got = compiled(target, memory, tgt_mask=causal_mask(L, kind=float))
    torch.testing.assert_close(
        got, model.layers[0](target, memory, tgt_mask=causal_mask(L, kind=float)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["converted", "autocast"])
def test_half_precision_encoders_keep_their_statistics(dtype: torch.dtype, how: str):
    model, x = randomized(encoder(dim_feedforward=48)).eval(), torch.randn(N, L, E)
    sb.replace_attention(model, support=sb.Routed(16, block_q=8), low_rank=sb.Quadratic(9))
    with torch.no_grad(), sb.calibrate(model):
        model(x)
    with torch.no_grad():
        expected = model(x)
        before = {n: b.clone() for n, b in model.named_buffers()}
        if how == "converted":
            got = model.to(dtype)(x.to(dtype), src_key_padding_mask=torch.zeros(N, L, dtype=torch.bool))
            assert got.dtype == dtype
        else:
            with torch.autocast("cpu", dtype):
                got = model(x, src_key_padding_mask=torch.zeros(N, L, dtype=torch.bool))
    assert all(torch.equal(b, before[n]) and b.dtype == before[n].dtype for n, b in model.named_buffers())
    assert (got.float() - expected).norm() < 0.1 * expected.norm()
