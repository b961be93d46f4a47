"""sb.MultiheadAttention against nn.MultiheadAttention and sb.attention: which calls are approximated, which run
exactly, which raise."""

from __future__ import annotations

import math
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from multihead_pairs import EVERY_KEY, INPUT, QUADRATIC, E, H, L, N, S, inputs, padding, pair
from testkit import causal_mask, partial_mask
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.nn.masks import as_bool_padding, is_causal_mask

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


# name: (constructor, inputs, call, what happens: None for approximated, else a part of the warning)
CALLS: dict[str, tuple[dict, dict, dict, str | None]] = {
    "plain": ({}, {}, {}, None),
    "batch_first": ({"batch_first": True}, {"batch_first": True}, {}, None),
    "unbatched": ({}, {"batched": False}, {}, None),
    "unbatched, batch_first": ({"batch_first": True}, {"batched": False}, {}, None),
    "no bias": ({"bias": False}, {}, {}, None),
    "cross": ({}, {"same": False}, {}, None),
    "cross, no bias": ({"bias": False}, {"same": False}, {}, None),
    "cross, other length": ({}, {"same": False, "length": 9}, {}, None),
    "cross, other length, batch_first": (
        {"batch_first": True},
        {"same": False, "length": 9, "batch_first": True},
        {"key_padding_mask": padding()},
        None,
    ),
    "three tensors": ({"batch_first": True}, {"batch_first": True, "same": False, "own_value": True}, {}, None),
    "value apart": ({}, {"own_value": True}, {"key_padding_mask": padding()}, None),
    "kdim": ({"kdim": 20}, {"same": False, "kdim": 20}, {}, None),
    "kdim, vdim": (
        {"kdim": 20, "vdim": 12, "batch_first": True},
        {"same": False, "kdim": 20, "vdim": 12, "batch_first": True},
        {},
        None,
    ),
    "kdim, vdim, no bias": ({"kdim": 20, "vdim": 12, "bias": False}, {"same": False, "kdim": 20, "vdim": 12}, {}, None),
    "key padding": ({}, {}, {"key_padding_mask": padding()}, None),
    "key padding, float": ({"batch_first": True}, {"batch_first": True}, {"key_padding_mask": padding(float)}, None),
    "key padding, cross": ({}, {"same": False}, {"key_padding_mask": padding()}, None),
    "key padding, unbatched": ({}, {"batched": False}, {"key_padding_mask": padding(batch=None)}, None),
    "causal, bool": ({}, {}, {"attn_mask": causal_mask(L), "is_causal": True}, None),
    "causal, float": (
        {"batch_first": True},
        {"batch_first": True},
        {"attn_mask": causal_mask(L, kind=float), "is_causal": True},
        None,
    ),
    "causal, per head": (
        {},
        {},
        {"attn_mask": causal_mask(L, kind=float).repeat(N * H, 1, 1), "is_causal": True},
        None,
    ),
    "causal, other length": (
        {},
        {"same": False, "length": 9},
        {"attn_mask": causal_mask(9, S, float), "is_causal": True},
        None,
    ),
    "causal, unbatched": ({}, {"batched": False}, {"attn_mask": causal_mask(L, kind=float), "is_causal": True}, None),
    "causal, key padding": (
        {},
        {},
        {"attn_mask": causal_mask(L, kind=float), "is_causal": True, "key_padding_mask": padding(float)},
        None,
    ),
    "dropout, evaluation": ({"dropout": 0.5}, {}, {}, None),
    "dropout, training": ({"dropout": 0.5}, {}, {"training": True}, "call sb.set_attention_dropout"),
    "weights": ({}, {}, {"need_weights": True}, "pass need_weights=False"),
    "weights per head": (
        {"batch_first": True},
        {"batch_first": True},
        {"need_weights": True, "average_attn_weights": False, "key_padding_mask": padding()},
        "pass need_weights=False",
    ),
    "weights, unbatched": ({}, {"batched": False}, {"need_weights": True}, "pass need_weights=False"),
    "weights, causal": (
        {},
        {},
        {"need_weights": True, "attn_mask": causal_mask(L, kind=float), "is_causal": True},
        "pass need_weights=False",
    ),
    "weights, kdim": (
        {"kdim": 20, "vdim": 12},
        {"same": False, "kdim": 20, "vdim": 12},
        {"need_weights": True},
        "need_weights",
    ),
    "weights, three tensors": (
        {"batch_first": True},
        {"batch_first": True, "same": False, "own_value": True},
        {"need_weights": True},
        "pass need_weights=False",
    ),
    "mask, bool": ({}, {}, {"attn_mask": partial_mask(L, S)}, "attn_mask is not the causal mask"),
    "mask, float": ({}, {}, {"attn_mask": partial_mask(L, S, kind=float)}, "attn_mask is not the causal mask"),
    "mask per head": (
        {"batch_first": True},
        {"batch_first": True},
        {"attn_mask": partial_mask(N * H, L, S)},
        "attn_mask is not the causal mask",
    ),
    "mask per head, float, key padding": (
        {},
        {},
        {"attn_mask": partial_mask(N * H, L, S, kind=float), "key_padding_mask": padding(float)},
        "attn_mask is not the causal mask",
    ),
    "mask per head, unbatched": (
        {},
        {"batched": False},
        {"attn_mask": partial_mask(H, L, S)},
        "attn_mask is not the causal mask",
    ),
    "causal mask without the hint": ({}, {}, {"attn_mask": causal_mask(L, kind=float)}, None),
    "causal mask without the hint, bool": (
        {"batch_first": True},
        {"batch_first": True},
        {"attn_mask": causal_mask(L), "key_padding_mask": padding()},
        None,
    ),
    "mask and key padding": (
        {},
        {},
        {"attn_mask": partial_mask(L, S), "key_padding_mask": padding()},
        "attn_mask is not the causal mask",
    ),
    "key padding, other values": (
        {},
        {},
        {"key_padding_mask": torch.linspace(-2, 2, N * S).reshape(N, S)},
        "values other than 0 and -inf",
    ),
    "add_bias_kv": ({"add_bias_kv": True}, {}, {"key_padding_mask": padding()}, "add_bias_kv=True"),
    "add_zero_attn": ({"add_zero_attn": True}, {}, {"key_padding_mask": padding()}, "add_zero_attn=True"),
    "add both, weights": ({"add_bias_kv": True, "add_zero_attn": True}, {}, {"need_weights": True}, "add_bias_kv=True"),
}
APPROXIMATED = [name for name, case in CALLS.items() if case[3] is None]
EXACT = [name for name, case in CALLS.items() if case[3] is not None]


def prepare(
    name: str, support: Any, low_rank: Any = None
) -> tuple[nn.MultiheadAttention, sb.MultiheadAttention, tuple[Tensor, ...], dict, str | None]:
    """Both modules, the inputs, the call and the warning of a case."""
    constructor, shapes, call, warning = CALLS[name]
    theirs, ours = pair(support, low_rank, **constructor)
    call = {"need_weights": False, **call}
    training = call.pop("training", False)
    return theirs.train(training), ours.train(training), inputs(**shapes), call, warning


def run(module: nn.Module, tokens: tuple[Tensor, ...], call: dict, rows: Tensor | None = None) -> tuple[Tensor, ...]:
    """Output, weights and the gradients of inputs and parameters; ``rows``: which output rows matter."""
    torch.manual_seed(1)  # for dropout
    out, weights = module(*tokens, **call)
    kept = out if rows is None else out[rows]
    parameters = [p for n, p in module.named_parameters() if not n.startswith("attention.")]
    wanted = {id(t): t for t in tokens}
    torch.manual_seed(2)
    gradients = torch.autograd.grad(kept.mul(torch.randn(kept.shape)).sum(), (*wanted.values(), *parameters))
    return kept, *((weights,) if weights is not None else ()), *gradients


def real_queries(call: dict, tokens: tuple[Tensor, ...], batch_first: bool) -> Tensor | None:
    """Rows of the output that are no padding, where padding marks queries."""
    mask = as_bool_padding(call.get("key_padding_mask"))
    if mask is None or tokens[0] is not tokens[1]:
        return None
    return ~mask if batch_first or mask.dim() == 1 else ~mask.T


# ----------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("name", CALLS)
def test_full_support_is_torchs_own(name: str):
    theirs, ours, tokens, call, _ = prepare(name, sb.Full())
    torch.testing.assert_close(run(ours, tokens, call), run(theirs, tokens, call), rtol=0, atol=0)


@pytest.mark.parametrize("name", EXACT)
def test_what_cannot_be_approximated_is_exact_and_warns(name: str):
    theirs, ours, tokens, call, warning = prepare(name, sb.Window(8))
    with pytest.warns(UserWarning, match=warning) as caught:
        got = run(ours, tokens, call)
    assert len(caught) == 1 and "runs exact attention" in str(caught[0].message)
    torch.testing.assert_close(got, run(theirs, tokens, call), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", APPROXIMATED)
def test_masks_mean_what_they_mean_in_torch(name: str):
    theirs, ours, tokens, call, _ = prepare(name, EVERY_KEY)
    rows = real_queries(call, tokens, ours.batch_first)
    with mock.patch.object(ours, "_exact", side_effect=AssertionError("exact path taken")):
        got = run(ours, tokens, call, rows)
    torch.testing.assert_close(got, run(theirs, tokens, call, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", APPROXIMATED)
def test_approximated_calls_are_sb_attention(name: str):
    support, low_rank = sb.Routed(16, block_q=8), sb.Quadratic(9, "stored")
    _, ours, tokens, call, _ = prepare(name, support, low_rank)
    causal_call, mask = "attn_mask" in call, as_bool_padding(call.get("key_padding_mask"))
    # By hand: separate projections of (batch, tokens, width), sb.attention, output projection.
    separate = (ours.q_proj_weight, ours.k_proj_weight, ours.v_proj_weight)
    weights = separate if ours.in_proj_weight is None else ours.in_proj_weight.chunk(3)
    biases = (None,) * 3 if ours.in_proj_bias is None else ours.in_proj_bias.chunk(3)
    batched, swap = tokens[0].dim() == 3, tokens[0].dim() == 3 and not ours.batch_first
    batch_first = [x.transpose(0, 1) if swap else x.reshape(-1, *x.shape[-2:]) for x in tokens]
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (H, -1)).transpose(1, 2) for x, w, b in zip(batch_first, weights, biases)
    )
    query_mask = None
    if mask is not None:
        mask = mask if batched else mask[None]
        query_mask = mask if tokens[0] is tokens[1] else torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool)
    statistics = sb.fit_statistics(q, k, 9)
    expected = sb.attention(
        q, k, v, support, low_rank, mask, causal_call, statistics=statistics, query_padding_mask=query_mask
    )
    expected = F.linear(expected.transpose(1, 2).flatten(2), ours.out_proj.weight, ours.out_proj.bias)
    expected = expected.transpose(0, 1) if swap else expected.reshape(tokens[0].shape)

    with sb.calibrate(ours), torch.no_grad():
        ours(*tokens, need_weights=False)
    out, none = ours(*tokens, **call)
    assert none is None
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_full_support_takes_torchs_fast_path():
    _, ours = pair(sb.Full(), batch_first=True)
    x = torch.randn(N, L, E)
    with mock.patch("torch._native_multi_head_attention", return_value=(x, None)) as fast, torch.no_grad():
        ours.eval()(x, x, x)
    assert fast.called


def test_cross_attention_computes_every_query_whatever_the_keys_padding():
    """As many queries as keys, but other tokens: the key padding says nothing of the queries."""
    theirs, ours = pair(EVERY_KEY)
    query, key, value = inputs(same=False)
    got = ours(query, key, value, key_padding_mask=padding(), need_weights=False)[0]
    expected = theirs(query, key, value, key_padding_mask=padding(), need_weights=False)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_rank", [None, INPUT, sb.Favor(32)], ids=["none", "quadratic", "favor"])
def test_fully_padded_rows_give_the_output_bias_and_finite_gradients(low_rank: Any):
    _, ours = pair(sb.Window(8), low_rank, batch_first=True)
    x = inputs(batch_first=True)[0]
    mask = padding()
    mask[0] = True
    out = ours(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand(L, E))
    torch.testing.assert_close(out[1, -1], ours.out_proj.bias.detach())
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert gradient.isfinite().all() and not gradient[0].any()


def test_what_padded_slots_hold_changes_nothing():
    _, ours = pair(sb.Routed(16, block_q=8), INPUT, batch_first=True)
    x = torch.randn(N, L, E)
    changed = x.clone()
    changed[1, S - 6 :] = 1e4
    with torch.no_grad():
        a, b = (ours(t, t, t, key_padding_mask=padding(), need_weights=False)[0] for t in (x, changed))
    assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------- warnings and errors


def test_each_reason_is_warned_of_once():
    _, ours = pair(sb.Window(8))
    x = inputs()[0]
    with pytest.warns(UserWarning, match="need_weights=False"):
        ours(x, x, x)
    with pytest.warns(UserWarning, match="attn_mask is not the causal mask"):
        ours(x, x, x, need_weights=False, attn_mask=partial_mask(L, S))
    for _ in range(2):  # warnings are errors here
        ours(x, x, x)
        ours(x, x, x, need_weights=False, attn_mask=partial_mask(L, S))


def test_a_wrong_causal_hint_uses_the_mask_and_says_so():
    theirs, ours = pair(sb.Window(8))
    x, mask = inputs()[0], partial_mask(L, S)
    with pytest.warns(UserWarning, match="attn_mask is not the causal mask"):
        got = ours(x, x, x, need_weights=False, attn_mask=mask, is_causal=True)[0]
    torch.testing.assert_close(got, theirs(x, x, x, need_weights=False, attn_mask=mask)[0])


BAD_CALLS: dict[str, tuple[tuple[tuple[int, ...], ...], dict]] = {
    "1-D query": (((E,),) * 3, {}),
    "2-D key of a 3-D query": (((L, N, E), (S, E), (S, N, E)), {}),
    "2-D value of a 3-D query": (((L, N, E), (S, N, E), (S, E)), {}),
    "3-D key of a 2-D query": (((L, E), (S, N, E), (S, E)), {}),
    "embed_dim": (((L, N, E + 1), (S, N, E), (S, N, E)), {}),
    "value's length": (((L, N, E), (S, N, E), (S + 1, N, E)), {}),
    "key's batch": (((L, N, E), (S, N + 1, E), (S, N + 1, E)), {}),
    "causal without a mask": (((L, N, E),) * 3, {"is_causal": True}),
    "attn_mask's size": (((L, N, E),) * 3, {"attn_mask": causal_mask(L, S + 1, float)}),
    "attn_mask's heads": (((L, N, E),) * 3, {"attn_mask": partial_mask(N * H + 1, L, S)}),
    "attn_mask's heads, unbatched": (((L, E),) * 3, {"attn_mask": partial_mask(H + 1, L, S)}),
    "attn_mask's rank": (((L, N, E),) * 3, {"attn_mask": torch.zeros(S, dtype=torch.bool)}),
    "attn_mask's type": (((L, N, E),) * 3, {"attn_mask": torch.zeros(L, S, dtype=torch.int64)}),
    "key_padding_mask's type": (((L, N, E),) * 3, {"key_padding_mask": torch.zeros(N, S, dtype=torch.int64)}),
    "key_padding_mask's rank": (((L, N, E),) * 3, {"key_padding_mask": padding(batch=None)}),
    "key_padding_mask's rank, unbatched": (((L, E),) * 3, {"key_padding_mask": padding()}),
    "key_padding_mask's batch": (((L, N, E),) * 3, {"key_padding_mask": padding(batch=N + 1)}),
    "key_padding_mask's length": (((L, N, E),) * 3, {"key_padding_mask": torch.zeros(N, S + 1, dtype=torch.bool)}),
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_raises_what_torch_raises(name: str, need_weights: bool):
    shapes, call = BAD_CALLS[name]
    theirs, ours = pair(sb.Window(8))
    tokens = [torch.randn(shape) for shape in shapes]
    with pytest.raises(Exception) as expected:
        theirs(*tokens, need_weights=need_weights, **call)
    with pytest.raises(type(expected.value)) as got:
        ours(*tokens, need_weights=need_weights, **call)
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("arguments", [(0, 1), (8, 0), (10, 3)])
def test_constructor_raises_what_torch_raises(arguments: tuple[int, int]):
    with pytest.raises(Exception) as expected:
        nn.MultiheadAttention(*arguments)
    with pytest.raises(type(expected.value)) as got:
        sb.MultiheadAttention(*arguments)
    assert str(got.value) == str(expected.value)


def rows_of_two_lengths(layout: torch.layout = torch.strided) -> tuple[list[Tensor], Tensor]:
    rows = [torch.randn(length, E) for length in (5, 21)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        return rows, torch.nested.nested_tensor(rows, layout=layout)


def test_rows_of_a_nested_tensor_are_attended_to_alone():
    _, ours = pair(sb.Window(8), batch_first=True)
    rows, x = rows_of_two_lengths()
    for row, out in zip(rows, ours(x, x, x, need_weights=False)[0].unbind()):
        torch.testing.assert_close(out, ours(row, row, row, need_weights=False)[0])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_other_calls_with_nested_tensors_are_refused_with_the_cure(layout: torch.layout):
    _, ours = pair(sb.Window(8), batch_first=True)
    _, x = rows_of_two_lengths(layout)
    other = x if layout == torch.jagged else x.clone()
    with pytest.raises(ValueError, match="use_nested_tensor=False"):
        ours.eval()(x, other, other, need_weights=False)


def test_uncalibrated_statistics_are_named():
    ours = sb.MultiheadAttention(E, H, **QUADRATIC)
    x = inputs()[0]
    with pytest.raises(ValueError, match="not calibrated.*sb.calibrate"):
        ours(x, x, x, need_weights=False)


def test_what_attention_refuses_reaches_the_caller():
    with pytest.raises(ValueError, match="rank must be at most head_dim=4"):
        sb.MultiheadAttention(16, 4, **QUADRATIC)
    _, ours = pair(sb.LSH(16), INPUT)
    x = inputs()[0]
    with pytest.raises(ValueError, match="LSH is bidirectional only"):
        ours(x, x, x, need_weights=False, attn_mask=causal_mask(L, kind=float), is_causal=True)


# --------------------------------------------------------------------------------------------------------------- masks


def one_changed(mask: Tensor, query: int, key: int) -> Tensor:
    mask[query, key] = not mask[query, key]
    return mask


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (causal_mask(L), True),
        (causal_mask(L, kind=float), True),
        (causal_mask(9, S, float), True),
        (causal_mask(300, kind=float), True),
        (causal_mask(300, 140, float), True),
        (causal_mask(140, 300), True),
        (one_changed(causal_mask(300, kind=float), 299, 0), False),
        (one_changed(causal_mask(300, kind=float), 200, 205), False),
        (one_changed(causal_mask(300), 0, 299), False),
        (causal_mask(300, kind=float).masked_fill(torch.eye(300).roll(5, 1).bool(), math.nan), False),
        (causal_mask(L, kind=float).bfloat16(), True),
        (causal_mask(L, kind=float).repeat(3, 1, 1), True),
        (causal_mask(L).logical_not(), False),
        (causal_mask(L, kind=float).nan_to_num(neginf=-1e9), False),
        (torch.zeros(L, S), False),
        (torch.ones(L, S).triu(2).bool(), False),
        (torch.ones(L, S).triu(0).bool(), False),
    ],
)
def test_causal_masks_are_told_from_others(mask: Tensor, expected: bool):
    assert is_causal_mask(mask) is expected


def test_a_mask_written_to_is_compared_again():
    mask = causal_mask(L, kind=float)
    assert is_causal_mask(mask)
    mask[0, 1] = 0
    assert not is_causal_mask(mask)
    with torch.inference_mode():
        mask = causal_mask(L, kind=float)
        assert is_causal_mask(mask)
        mask[0, 1] = 0
        assert not is_causal_mask(mask)


def test_a_causal_mask_brings_the_causal_support():
    """The default's, or the one that is given; other calls keep the support."""
    torch.manual_seed(0)
    x, mask = torch.randn(1, 150, E), torch.ones(150, 150, dtype=torch.bool).triu(1)
    for given in ({}, {"causal_support": sb.Window(24)}):
        ours = sb.MultiheadAttention(E, H, batch_first=True, **given).eval()
        core = ours.attention
        assert core.support == sb.presets.drop_in()[0]
        assert core.causal_support == given.get("causal_support", sb.presets.causal()[0])
        with sb.calibrate(ours):
            ours(x, x, x, need_weights=False, attn_mask=mask)
        for causal, support in ((False, core.support), (True, core.causal_support)):
            low_rank = core.low_rank_of(causal)
            same = sb.MultiheadAttention(E, H, batch_first=True, support=support, low_rank=low_rank).eval()
            same.load_state_dict({k: v for k, v in ours.state_dict().items() if causal or "attention." not in k})
            call = dict(need_weights=False, attn_mask=mask if causal else None)
            with torch.no_grad():
                assert torch.equal(ours(x, x, x, **call)[0], same(x, x, x, **call)[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient_of_padded_self_attention(use_reentrant: bool):
    """Reentrant checkpointing runs the second forward pass on a detached tensor for every argument."""
    torch.manual_seed(0)
    ours = sb.MultiheadAttention(E, H, batch_first=True, support=sb.Window(8), low_rank=sb.Centroid(4))
    x = torch.randn(2, 60, E)
    padding = torch.zeros(2, 60, dtype=torch.bool)
    padding[0, 35:] = True

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ours(q, k, v, key_padding_mask=padding, need_weights=False)[0]

    gradients = []
    for checkpointed in (True, False):
        leaf = x.clone().requires_grad_()
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(call, leaf, leaf, leaf, use_reentrant=use_reentrant)
        else:
            out = call(leaf, leaf, leaf)
        out[~padding].square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_views_of_the_same_tokens_are_self_attention_and_others_are_not():
    torch.manual_seed(0)
    ours = sb.MultiheadAttention(E, H, batch_first=True, support=sb.Window(8), low_rank=sb.Centroid(4)).eval()
    x = torch.randn(2, 60, E)
    call = dict(key_padding_mask=torch.arange(60).expand(2, 60) >= 35, need_weights=False)
    want = ours(x, x, x, **call)[0]
    torch.testing.assert_close(ours(x, x.detach(), x.view_as(x), **call)[0], want)
    assert not torch.allclose(ours(x, x.clone(), x.clone(), **call)[0], want)
