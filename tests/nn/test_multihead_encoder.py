"""sb.MultiheadAttention in nn.TransformerEncoder and its decoder, also compiled."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import testkit
import torch
from multihead_pairs import EVERY_KEY, INPUT, QUADRATIC, E, H, L, N, S, inputs, padding, pair
from testkit import causal_mask, count_calls
from torch import nn

import scatterbrain as sb

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def encoder(layers: int = 2, **arguments: Any) -> nn.TransformerEncoder:
    layer = testkit.encoder(E, H, 1).layers[0]
    layer.self_attn = sb.MultiheadAttention(E, H, batch_first=True, **arguments)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_encoder_layers_fast_path_does_not_bypass_us(grad: bool, training: bool):
    model = encoder(support=sb.Window(8), low_rank=INPUT).train(training)
    calls = count_calls(model)
    x = torch.randn(N, L, E)
    with torch.set_grad_enabled(grad):
        model(x)
        model(x, src_key_padding_mask=padding())
    assert len(calls) == 4


@pytest.mark.parametrize("low_rank", [None, sb.Quadratic(9, "learned")], ids=str)
def test_an_encoder_made_of_our_layers_may_pass_nested_tensors(low_rank: sb.Quadratic | None):
    layer = encoder(1, support=sb.Window(8), low_rank=low_rank).layers[0]
    model = nn.TransformerEncoder(layer, 2).eval()
    calls, x = count_calls(model), torch.randn(N, L, E)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        assert model.use_nested_tensor
        nested = model(x, src_key_padding_mask=padding())
        model.use_nested_tensor = False
        padded = model(x, src_key_padding_mask=padding()).masked_fill(padding()[..., None], 0)
    torch.testing.assert_close(nested, padded)
    assert len(calls) == 4


@pytest.mark.parametrize("hint", [None, True])
@pytest.mark.parametrize("kind", [bool, float])
def test_the_encoders_causal_mask_is_approximated_and_hides_the_future(hint: bool | None, kind: type):
    model = encoder(support=sb.Routed(16, block_q=8), low_rank=sb.Quadratic(9, "learned"))
    calls = count_calls(model)
    x = torch.randn(N, L, E)
    changed = torch.cat([x[:, :11], torch.randn(N, L - 11, E)], 1)
    with torch.no_grad():
        a, b = (model(t, mask=causal_mask(L, kind=kind), is_causal=hint) for t in (x, changed))
    assert len(calls) == 4 and torch.equal(a[:, :11], b[:, :11]) and not torch.equal(a, b)


def test_the_decoder_is_approximated_in_self_and_cross_attention():
    layer = nn.TransformerDecoderLayer(E, H, 64, dropout=0.0, batch_first=True)
    layer.self_attn = sb.MultiheadAttention(E, H, batch_first=True, support=EVERY_KEY, low_rank=None)
    layer.multihead_attn = sb.MultiheadAttention(E, H, batch_first=True, support=EVERY_KEY, low_rank=None)
    theirs = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 64, dropout=0.0, batch_first=True), 2)
    ours = nn.TransformerDecoder(layer, 2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    calls = count_calls(ours)
    target, memory = torch.randn(N, 9, E), torch.randn(N, S, E)
    arguments = {"tgt_mask": causal_mask(9, kind=float), "memory_key_padding_mask": padding()}
    expected = theirs(target, memory, **arguments)
    torch.testing.assert_close(ours(target, memory, **arguments), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4


def test_calibration_through_an_encoder():
    model = encoder(**QUADRATIC).eval()
    x = torch.randn(N, L, E)
    with torch.no_grad():
        with pytest.raises(ValueError, match="not calibrated"):
            model(x)
        with sb.calibrate(model):
            exact = model(x, src_key_padding_mask=padding())
        approximated = model(x, src_key_padding_mask=padding())
    valid = ~padding()
    assert (approximated - exact)[valid].norm() < 0.05 * exact[
        valid
    ].norm()  # 64 keys see all tokens: only rounding differs


def test_learned_projections_get_gradients_through_an_encoder():
    model = encoder(support=sb.Window(4, block_q=4), low_rank=sb.Quadratic(9, "learned"))
    model(torch.randn(N, L, E)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert ".query_log_scale" in name or parameter.grad.any(), name


@pytest.mark.parametrize(
    "call",
    [{"src_key_padding_mask": padding()}, {"mask": causal_mask(L, kind=float), "is_causal": True}],
    ids=["padded", "causal"],
)
def test_compiles_without_graph_breaks(call: dict):
    model = encoder(1, support=sb.Window(8), low_rank=sb.Quadratic(9, "learned"))
    x = torch.randn(N, L, E)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, **call), model(x, **call))


def test_compiled_calls_that_run_exactly_warn_too():
    _, ours = pair(sb.Window(8))
    x = inputs()[0]
    compiled = torch.compile(lambda x: ours(x, x, x), fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="need_weights=False"):
        compiled(x)


def test_compiled_padding_masks_with_other_values_raise():
    _, ours = pair(sb.Window(8))
    compiled = torch.compile(lambda x, m: ours(x, x, x, m, need_weights=False)[0], fullgraph=True, backend="eager")
    x = torch.randn(L, N, E)
    torch.testing.assert_close(compiled(x, padding(float)), ours(x, x, x, padding(), need_weights=False)[0])
    with pytest.raises(RuntimeError, match="pass a bool mask"):
        compiled(x, padding(float) - 1)
