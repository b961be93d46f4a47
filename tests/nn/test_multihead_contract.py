"""The documented behaviour of nn.MultiheadAttention, asked of torch's own class and of sb.MultiheadAttention with Full
support. No test knows which class it has."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from testkit import as_kind, partial_mask, with_biases
from torch import Tensor, nn

import scatterbrain as sb

E, H, N, L, S = 24, 4, 3, 5, 7
Make = Callable[..., nn.MultiheadAttention]


class Exact(sb.MultiheadAttention):
    """sb.MultiheadAttention with the constructor of nn.MultiheadAttention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, support=sb.Full())


CLASSES: dict[str, Make] = {
    "torch": nn.MultiheadAttention,
    "scatterbrain": functools.partial(sb.MultiheadAttention, support=sb.Full()),
    "subclass": Exact,
}


@pytest.fixture(params=CLASSES)
def make(request: pytest.FixtureRequest) -> Make:
    return CLASSES[request.param]


def by_hand(m: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor,
            bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(N, L, E) output and (N, H, L, S) weights in float64 from inputs (N, tokens, width); ``bias`` is added to the
    scores (N, H, L, S). add_bias_kv and add_zero_attn append keys, which ``bias`` does not reach."""
    q, k, v = query.double(), key.double(), value.double()
    weights = m.in_proj_weight.double().chunk(3) if m.in_proj_weight is not None else (
        m.q_proj_weight.double(), m.k_proj_weight.double(), m.v_proj_weight.double())  # fmt: skip
    biases = (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.double().chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases))
    if m.bias_k is not None:
        k, v = (torch.cat([x, b.double().expand(len(x), 1, -1)], 1) for x, b in ((k, m.bias_k), (v, m.bias_v)))
    if m.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(len(x), 1, x.shape[2])], 1) for x in (k, v))
    q, k, v = (x.unflatten(2, (m.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(m.head_dim)
    bias = torch.as_tensor(bias, dtype=torch.float64).expand(*scores.shape[:3], key.shape[1])
    probabilities = (scores + F.pad(bias, (0, scores.shape[3] - key.shape[1]))).softmax(-1)
    out = (probabilities @ v).transpose(1, 2).flatten(2)
    return F.linear(out, m.out_proj.weight.double(), None if m.out_proj.bias is None else m.out_proj.bias.double()), (
        probabilities
    )


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def tokens(count: int, width: int = E, batch: int = N) -> Tensor:
    return torch.randn(batch, count, width)


def added(mask: Tensor) -> Tensor:
    """What a bool mask adds to the scores."""
    return as_kind(mask, float)


# ------------------------------------------------------------------------------------------------------- constructions

CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim": {"kdim": 10},
    "vdim": {"vdim": 9},
    "kdim, vdim": {"kdim": 10, "vdim": 9, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "everything": {"kdim": 10, "vdim": 9, "add_bias_kv": True, "add_zero_attn": True},
    "one head": {"num_heads": 1},
    "narrow heads": {"num_heads": 12},
    "odd heads": {"num_heads": 3},
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_output_and_weights_are_those_of_the_definition(make: Make, name: str, batch_first: bool, need_weights: bool):
    arguments = {"embed_dim": E, "num_heads": H, **CONSTRUCTIONS[name]}
    m = with_biases(make(**arguments, batch_first=batch_first))
    q, k, v = tokens(L), tokens(S, m.kdim), tokens(S, m.vdim)
    padding, mask = partial_mask(N, S), partial_mask(L, S)
    expected, probabilities = by_hand(m, q, k, v, added(padding)[:, None, None] + added(mask))
    order = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    out, weights = m(order(q), order(k), order(v), key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)
    close(order(out), expected)
    if need_weights:
        close(weights, probabilities.mean(1))
    else:
        assert weights is None


def test_the_mode_and_gradients_do_not_matter_to_the_result(make: Make):
    m = with_biases(make(E, H, batch_first=True))
    x, padding = tokens(S), partial_mask(N, S)
    expected, probabilities = by_hand(m, x, x, x, added(padding)[:, None, None])
    for training in (True, False):
        for grad in (True, False):
            m.train(training)
            with torch.set_grad_enabled(grad):
                out, weights = m(x, x, x, key_padding_mask=padding)
                close(out, expected)
                close(weights, probabilities.mean(1))
                close(m(x, x, x, key_padding_mask=padding, need_weights=False)[0], expected)
    with torch.inference_mode():
        close(m(x, x, x)[0], by_hand(m, x, x, x)[0])


def test_gradients_are_those_of_the_definition(make: Make):
    m = with_biases(make(E, H, batch_first=True, kdim=10, vdim=9, add_bias_kv=True))
    leaves = [t.requires_grad_() for t in (tokens(L), tokens(S, 10), tokens(S, 9))]
    mask = added(partial_mask(L, S))
    wanted = [*leaves, *m.parameters()]
    got = torch.autograd.grad(m(*leaves, attn_mask=mask)[0].square().sum(), wanted)
    expected = torch.autograd.grad(by_hand(m, *leaves, mask)[0].square().sum(), wanted)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)]
)
def test_dtype_and_device_are_those_of_the_arguments(make: Make, dtype: torch.dtype, tolerance: float):
    m = make(E, H, batch_first=True, device="cpu", dtype=dtype)
    assert {(p.dtype, p.device.type) for p in m.parameters()} == {(dtype, "cpu")}
    x = tokens(S).to(dtype)
    out, weights = m(x, x, x)
    assert out.dtype == weights.dtype == dtype
    close(out, by_hand(m, x, x, x)[0], tolerance)


def test_a_module_on_the_meta_device_is_filled_later(make: Make):
    m = make(E, H, device="meta")
    assert all(p.is_meta for p in m.parameters())
    x = torch.empty(L, N, E, device="meta")
    assert m(x, x, x)[0].is_meta
    m = m.to_empty(device="cpu")
    m._reset_parameters()
    m.out_proj.reset_parameters()
    assert m(torch.randn(L, N, E), torch.randn(S, N, E), torch.randn(S, N, E))[0].isfinite().all()


def test_construction_draws_the_same_numbers(make: Make):
    m = make(E, H, kdim=10, vdim=9, add_bias_kv=True)
    after = torch.rand(1)
    torch.manual_seed(0)
    expected = nn.MultiheadAttention(E, H, kdim=10, vdim=9, add_bias_kv=True)
    assert torch.equal(after, torch.rand(1))
    assert {k: v.tolist() for k, v in m.state_dict().items()} == {
        k: v.tolist() for k, v in expected.state_dict().items()
    }


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("kind", [bool, float])
@pytest.mark.parametrize("shape", [(L, S), (N * H, L, S)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_masks_act_on_the_scores(make: Make, kind: type, shape: tuple, padded: bool, need_weights: bool):
    m = with_biases(make(E, H, batch_first=True))
    q, k = tokens(L), tokens(S)
    mask, padding = partial_mask(*shape), partial_mask(N, S)
    mask[..., 1] = padding[:, 1] = False
    mask = mask if kind is bool else torch.randn(shape) + added(mask)
    padding = padding if kind is bool else torch.randn(N, S) + added(padding)
    bias = (added(mask) if kind is bool else mask).reshape(-1, H if len(shape) == 3 else 1, L, S)
    if padded:
        bias = bias + (added(padding) if kind is bool else padding)[:, None, None]
    expected, probabilities = by_hand(m, q, k, k, bias)
    out, weights = m(
        q, k, k, key_padding_mask=padding if padded else None, attn_mask=mask, need_weights=need_weights,
        average_attn_weights=False,
    )  # fmt: skip
    close(out, expected)
    if need_weights:
        close(weights, probabilities)


def test_float_masks_are_added(make: Make):
    m = make(E, H, batch_first=True)
    x, bias, row = tokens(S), torch.randn(S, S), torch.randn(N, S)
    close(m(x, x, x, attn_mask=bias)[0], by_hand(m, x, x, x, bias)[0])
    close(m(x, x, x, key_padding_mask=row)[0], by_hand(m, x, x, x, row[:, None, None])[0])


@pytest.mark.parametrize("kinds", [(bool, float), (float, bool)])
def test_masks_of_two_types_work_and_are_deprecated(make: Make, kinds: tuple):
    m = make(E, H, batch_first=True)
    x, padding, mask = tokens(S), partial_mask(N, S), partial_mask(S, S)
    expected = by_hand(m, x, x, x, added(padding)[:, None, None] + added(mask))[0]
    given = [t if kind is bool else added(t) for t, kind in zip((padding, mask), kinds)]
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask is deprecated"):
        out = m(x, x, x, key_padding_mask=given[0], attn_mask=given[1])[0]
    close(out, expected)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [bool, float])
def test_is_causal_with_the_causal_mask(make: Make, need_weights: bool, padded: bool, kind: type):
    m = make(E, H, batch_first=True)
    x, padding = tokens(S), partial_mask(N, S)
    mask = nn.Transformer.generate_square_subsequent_mask(S)
    bias = mask + added(padding)[:, None, None] if padded else mask
    mask, padding = (mask, added(padding)) if kind is float else (mask.isinf(), padding)
    out = m(
        x, x, x, attn_mask=mask, is_causal=True, key_padding_mask=padding if padded else None, need_weights=need_weights
    )[0]
    close(out, by_hand(m, x, x, x, bias)[0])


def test_is_causal_without_a_mask_is_an_error(make: Make):
    x = tokens(S)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        make(E, H)(x, x, x, is_causal=True)


def test_padded_keys_have_weight_zero(make: Make):
    x, padding = tokens(S), partial_mask(N, S)
    for training in (True, False):
        m = make(E, H, batch_first=True).train(training)
        with torch.no_grad():
            weights = m(x, x, x, key_padding_mask=padding)[1]
        assert not weights.transpose(1, 2)[padding].any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(N, S))


def test_gradients_with_padding_are_finite(make: Make):
    m = make(E, H, batch_first=True, dropout=0.1)
    x = tokens(S).requires_grad_()
    m(x, x, x, key_padding_mask=partial_mask(N, S), attn_mask=partial_mask(S, S))[0].sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in m.parameters())


# --------------------------------------------------------------------------------------------------- shapes of results


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_unbatched_inputs_are_a_batch_of_one(make: Make, batch_first: bool, average: bool):
    m = with_biases(make(E, H, batch_first=batch_first))
    q, k = tokens(L, batch=1), tokens(S, batch=1)
    padding = partial_mask(1, S)
    for mask in (None, partial_mask(L, S), partial_mask(H, L, S)):
        bias = added(padding)[:, None, None] + (0.0 if mask is None else added(mask))
        expected, probabilities = by_hand(m, q, k, k, bias)
        out, weights = m(
            q[0], k[0], k[0], key_padding_mask=padding[0], attn_mask=mask, average_attn_weights=average
        )  # fmt: skip
        close(out, expected[0])
        close(weights, probabilities[0].mean(0) if average else probabilities[0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_weights_are_averaged_over_heads_or_not(make: Make, batch_first: bool):
    m = make(E, H, batch_first=batch_first)
    q, k = (tokens(n) if batch_first else tokens(n).transpose(0, 1) for n in (L, S))
    averaged, each = (m(q, k, k, average_attn_weights=average)[1] for average in (True, False))
    assert averaged.shape == (N, L, S) and each.shape == (N, H, L, S)
    torch.testing.assert_close(averaged, each.mean(1))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(make: Make, batch: int):
    m = make(E, H, batch_first=True)
    x = torch.randn(batch, S, E)
    out, weights = m(x, x, x)
    assert out.shape == (batch, S, E) and weights.shape == (batch, S, S)


# ------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_acts_on_the_weights_in_training_only(make: Make):
    m = make(E, H, batch_first=True, dropout=0.5)
    x = tokens(S)
    _, weights = m(x, x, x, average_attn_weights=False)
    assert (weights == 0).float().mean() > 0.2
    m.eval()
    assert (m(x, x, x, average_attn_weights=False)[1] > 0).all()
    close(m(x, x, x)[0], by_hand(m, x, x, x)[0])


def test_dropout_follows_the_seed(make: Make):
    m = make(E, H, batch_first=True, dropout=0.3)
    x, results = tokens(S), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(m(x, x, x, need_weights=False)[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


# -------------------------------------------------------------------------------------------------------------- errors

WRONG: dict[str, tuple[tuple[tuple[int, ...], ...], dict, type[Exception], str]] = {
    "4-D query": (((1, L, N, E), (S, N, E), (S, N, E)), {}, AssertionError, "unbatched 2D or batched 3D tensor"),
    "key of another rank": (((L, N, E), (S, E), (S, N, E)), {}, AssertionError, "expected `key` and `value` to be 3-D"),
    "value of another rank": (((L, E), (S, E), (S, N, E)), {}, AssertionError, "expected `key` and `value` to be 2-D"),
    "embed_dim": (((L, N, E + 1), (S, N, E), (S, N, E)), {}, AssertionError, f"embedding dimension of {E}, but got"),
    "key and value": (((L, N, E), (S, N, E), (S + 1, N, E)), {}, AssertionError, "does not match value shape"),
    "2-D attn_mask": (
        ((L, N, E), (S, N, E), (S, N, E)),
        {"attn_mask": torch.zeros(L, S + 1)}, RuntimeError, "shape of the 2D attn_mask"
    ),
    "3-D attn_mask": (
        ((L, N, E), (S, N, E), (S, N, E)),
        {"attn_mask": torch.zeros(N, L, S)}, RuntimeError, "shape of the 3D attn_mask"
    ),
    "1-D attn_mask": (
        ((L, N, E), (S, N, E), (S, N, E)), {"attn_mask": torch.zeros(S)}, AssertionError, "found 1-D tensor instead"
    ),
    "int attn_mask": (
        ((L, N, E), (S, N, E), (S, N, E)),
        {"attn_mask": torch.ones(L, S).int()}, AssertionError, "only bool and floating"
    ),
    "int key_padding_mask": (
        ((L, N, E), (S, N, E), (S, N, E)),
        {"key_padding_mask": torch.ones(N, S).int()}, AssertionError, "only bool and fl"
    ),
    "1-D key_padding_mask": (
        ((L, N, E), (S, N, E), (S, N, E)),
        {"key_padding_mask": torch.zeros(S)}, AssertionError, "`key_padding_mask` to be"
    ),
    "key_padding_mask's batch": (
        ((L, N, E), (S, N, E), (S, N, E)),
        {"key_padding_mask": torch.zeros(N + 1, S)}, AssertionError, "to be 3, but got 4"
    ),
    "heads of an unbatched mask": (
        ((L, E), (S, E), (S, E)), {"attn_mask": torch.zeros(H + 1, L, S)}, AssertionError, "Expected `attn_mask` shape"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_raise(make: Make, name: str):
    shapes, call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        make(E, H)(*(torch.randn(shape) for shape in shapes), **call)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1), ValueError, "must be greater than 0"),
        ((8, 0), ValueError, "must be greater than 0"),
        ((-8, 2), ValueError, "must be greater than 0"),
        ((10, 3), AssertionError, "embed_dim must be divisible by num_heads"),
    ],
)
def test_wrong_arguments_raise(make: Make, arguments: tuple, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make(*arguments)


# ----------------------------------------------------------------------------------------------------------- fast path


def ragged() -> tuple[Tensor, Tensor, Tensor]:
    """A nested tensor, the same padded, and the padding mask."""
    parts = [torch.randn(n, E) for n in (3, 7, 5)]
    padding = torch.arange(S) >= torch.tensor([[3], [7], [5]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(parts), nn.utils.rnn.pad_sequence(parts, batch_first=True), padding


def test_inference_takes_nested_tensors(make: Make):
    m = with_biases(make(E, H, batch_first=True)).eval()
    nested, padded, padding = ragged()
    with torch.inference_mode():
        out = m(nested, nested, nested, need_weights=False)[0]
        expected = m(padded, padded, padded, key_padding_mask=padding, need_weights=False)[0]
    assert out.is_nested
    torch.testing.assert_close(out.to_padded_tensor(0.0), expected.masked_fill(padding[..., None], 0.0))


def test_training_refuses_nested_tensors(make: Make):
    m = make(E, H, batch_first=True)
    nested = ragged()[0]
    with pytest.raises(AssertionError, match="training is enabled"):
        m(nested, nested, nested)


def test_the_fast_path_is_taken_and_can_be_turned_off(make: Make, monkeypatch: pytest.MonkeyPatch):
    m, x = make(E, H, batch_first=True).eval(), tokens(S)
    calls: list[None] = []
    fast = torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *a: (calls.append(None), fast(*a))[1])
    with torch.no_grad():
        m(x, x, x)
        m(x, x, tokens(S))
        m(x, x, x, attn_mask=partial_mask(S, S))
    assert len(calls) == 2
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            m(x, x, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert len(calls) == 2


def test_merge_masks_is_a_method(make: Make):
    m, x = make(E, H, batch_first=True), tokens(S)
    mask, padding = added(partial_mask(S, S)), added(partial_mask(N, S))
    assert m.merge_masks(None, None, x) == (None, None)
    assert m.merge_masks(None, padding, x) == (padding, 1)
    merged, kind = m.merge_masks(mask, padding, x)
    assert kind == 2 and torch.equal(merged, (mask + padding[:, None, None]).expand(N, H, S, S))


# --------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_parameters_have_torchs_names_and_nothing_else_does(make: Make, name: str):
    arguments = {"embed_dim": E, "num_heads": H, **CONSTRUCTIONS[name]}
    m, theirs = make(**arguments), nn.MultiheadAttention(**arguments)
    assert list(m.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in m.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert not list(m.buffers())
    m.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(m.state_dict(), strict=True)


def test_missing_and_unexpected_keys_are_reported(make: Make):
    m = make(E, H)
    state = {"in_proj_weight": m.in_proj_weight, "other": torch.zeros(1)}
    with pytest.raises(
        RuntimeError, match='(?s)Unexpected key.*"other".*Missing key.*"in_proj_bias"|Missing.*Unexpected'
    ):
        m.load_state_dict(state)
    result = m.load_state_dict(state, strict=False)
    assert result.missing_keys == ["in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert result.unexpected_keys == ["other"]


def test_pickles_of_version_1_1_load(make: Make):
    m, x = make(E, H), tokens(S)
    state = vars(m).copy()
    del state["_qkv_same_embed_dim"]
    old = object.__new__(type(m))
    old.__setstate__(state)
    assert old._qkv_same_embed_dim is True and torch.equal(old(x, x, x)[0], m(x, x, x)[0])


def test_copies_and_files(make: Make):
    m, x = make(E, H, dropout=0.0), tokens(S)
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    copies = (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(file, weights_only=False))
    for other in copies:
        assert type(other) is type(m) and torch.equal(other(x, x, x)[0], m(x, x, x)[0])


def test_repr_shows_the_output_projection_only(make: Make):
    m = make(E, H)
    assert repr(m).replace(type(m).__name__, "MultiheadAttention", 1) == repr(nn.MultiheadAttention(E, H))


def test_it_is_an_nn_multihead_attention(make: Make):
    m = make(E, H, kdim=10, batch_first=True)
    assert isinstance(m, nn.MultiheadAttention) and m.__constants__ == ["batch_first"]
    names = ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "dropout", "batch_first", "add_zero_attn")
    assert [getattr(m, name) for name in names] == [E, H, E // H, 10, E, 0.0, True, False]
    assert type(m.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear


# ---------------------------------------------------------------------------------------------- programs about programs


class Model(nn.Module):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.attention = make(E, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0] + 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["script", "trace", "fx", "export", "compile", "functional_call", "vmap", "make_fx"])
def test_programs_made_of_it_compute_the_same(make: Make, how: str):
    m, x = Model(make).eval(), tokens(S)
    others = {
        "script": lambda: torch.jit.script(copy.deepcopy(m)),
        "trace": lambda: torch.jit.trace(m, x, check_trace=False),
        "fx": lambda: torch.fx.symbolic_trace(m),
        "export": lambda: torch.export.export(m, (x,)).module(),
        "compile": lambda: torch.compile(m, fullgraph=True, backend="eager"),
        "functional_call": lambda: lambda x: torch.func.functional_call(m, dict(m.named_parameters()), (x,)),
        "vmap": lambda: lambda x: torch.vmap(m)(torch.stack([x, x]))[1],
        "make_fx": lambda: torch.fx.experimental.proxy_tensor.make_fx(m)(x),
    }
    torch.testing.assert_close(others[how]()(x), m(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients(make: Make):
    m, x = Model(make), tokens(S)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(m, parameters, (sample[None],)).square().sum()

    parameters = dict(m.named_parameters())
    each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    whole = torch.autograd.grad(m(x).square().sum(), list(parameters.values()))
    for got, expected in zip(each.values(), whole):
        torch.testing.assert_close(got.sum(0), expected, rtol=1e-4, atol=1e-4)


def test_parametrizations_and_weight_tying(make: Make):
    m, x = make(E, H), tokens(S)
    before = m(x, x, x)[0]
    nn.utils.parametrizations.weight_norm(m.out_proj, "weight")
    nn.utils.parametrizations.weight_norm(m, "in_proj_weight")
    torch.testing.assert_close(m(x, x, x)[0], before)


def test_autocast(make: Make):
    m, x = make(E, H), tokens(S)
    with torch.autocast("cpu", torch.bfloat16):
        assert m(x, x, x, need_weights=False)[0].dtype == torch.bfloat16
