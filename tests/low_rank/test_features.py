"""Low-rank kernels made of the caller's functions: features for the operator, dense ones for the definition."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from bad_calls import assert_refused
from operator_cases import operator_arguments
from testkit import assert_all_close, out_and_gradients, padding, rand
from torch import Tensor

import scatterbrain as sb
from scatterbrain.operators.arguments import AttentionArguments

N, D = 75, 16
MASK = padding(N, (0, 20))


def elu(tokens: Tensor) -> Tensor:
    return F.elu(tokens) + 1


def second_order(tokens: Tensor) -> Tensor:
    """1 + t + t^2 / 2 of q.k (Based, Arora et al. 2024) where coordinates are not negative."""
    t = tokens.abs()
    pairs = (t[..., :, None] * t[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(t[..., :1]), t, pairs / 2**0.5], -1)


def far(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Features that no float holds without their log scale."""
    exponent = 40 * tokens[..., :7]
    peak = exponent.amax(-1, keepdim=True)
    return torch.exp(exponent - peak), peak.squeeze(-1)


def huge(tokens: Tensor) -> Tensor:
    """Within a float, beyond what the operator takes as coordinates."""
    return torch.exp(tokens[..., :7] + 45)


def half_zero(tokens: Tensor) -> Tensor:
    """Tokens without any feature among them."""
    return F.relu(tokens[..., :2] - 0.2)


PAIRS = {
    "elu": sb.Features(elu),
    "second order": sb.Features(second_order),
    "log scales": sb.Features(far),
    "log scales of queries alone": sb.Features(far, lambda k: torch.exp(k[..., :7])),
    "huge": sb.Features(huge),
    "nothing for some": sb.Features(half_zero),
    "other functions": sb.Features(lambda q: torch.exp(q[..., :5]), lambda k: torch.softmax(k[..., 3:8], -1)),
}
tokens = [rand(2, h, N, D, seed=i) for i, h in enumerate((4, 2, 2))]


def both(support: object, low_rank: object, defined: object = None, **arguments: object) -> tuple[list, list]:
    return tuple(
        [
            t.double()
            for t in out_and_gradients(
                lambda *t: function(*t, support, kernel, **arguments),
                [t.to(dtype) for t in tokens],
                d_out=rand(2, 4, N, D, seed=9, dtype=dtype),
            )
        ]
        for function, kernel, dtype in (
            (sb.attention, low_rank, torch.float32),
            (sb.reference.attention, low_rank if defined is None else defined, torch.float64),
        )
    )


@pytest.mark.parametrize("mask", [None, MASK, MASK.flip(1)], ids=["everything", "right", "left"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("name", PAIRS)
def test_functions_run_as_the_definition_reads_them(name: str, is_causal: bool, mask: Tensor | None) -> None:
    arguments = dict(is_causal=is_causal, key_padding_mask=mask, scale=-0.3 if name == "elu" else None)
    assert_all_close(*both(sb.Window(16), PAIRS[name], **arguments), rtol=2e-4)


def test_a_dense_function_defines_the_same_kernel() -> None:
    def dense(q: Tensor, k: Tensor) -> Tensor:
        return elu(q) @ elu(k).transpose(-1, -2)

    for support in (sb.Window(16), sb.Empty(), sb.LSH(16)):
        assert_all_close(*both(support, sb.Features(elu), dense))


def test_a_dense_exponential_is_exact_attention() -> None:
    """What the definition gives the function: q and k whose product is the score."""
    want = F.scaled_dot_product_attention(*(t.double() for t in tokens), enable_gqa=True, scale=-0.7)
    kernel = lambda q, k: torch.exp(q @ k.transpose(-1, -2))  # noqa: E731
    torch.testing.assert_close(sb.reference.attention(*tokens, sb.Window(8), kernel, scale=-0.7), want)


def test_routing_chooses_by_what_the_features_leave() -> None:
    query, key, _ = tokens
    low_rank = PAIRS["second order"]
    lists = sb.route(query, key, sb.Routed(24), low_rank)
    want = sb.reference.mask(sb.Routed(24), query, key, low_rank)
    assert float((sb.reference.mask(lists, query, key, None) != want).float().mean()) < 1e-3  # but for equal scores
    other = sb.reference.mask(sb.Routed(24), query, key, None)
    assert float((other != want).float().mean()) > 0.01


def some_without_any(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens without any feature, whose log scale is far above that of the others."""
    return F.relu(tokens), torch.where(tokens.abs().amax(-1) > 0, 0.0, 150.0)


@pytest.mark.parametrize("support", [sb.Empty(), sb.Window(16), sb.Window(16, 1), sb.Routed(24)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_a_token_without_features_takes_nothing_from_the_others(side: str, is_causal: bool, support: object) -> None:
    """Whatever its log scale is: sums of states and of rows are not counted from it."""
    given = [rand(1, 2, 300, D, seed=i) for i in range(3)]
    given[("queries", "keys").index(side)][:, :, ::7] = 0
    kernel = sb.Features(some_without_any)
    results = []
    for function, dtype in ((sb.attention, torch.float32), (sb.reference.attention, torch.float64)):
        call = lambda *t, function=function: function(*t, support, kernel, is_causal=is_causal)  # noqa: E731
        results.append([t.double() for t in out_and_gradients(call, [t.to(dtype) for t in given])])
    assert all(t.isfinite().all() for t in results[0])
    assert_all_close(*results, rtol=2e-4)


def test_the_operator_takes_nothing_from_others_for_keys_without_features() -> None:
    """Maps that something else than sb.Features has made."""
    query, key, value = (rand(1, 1, 300, D, seed=i) for i in range(3))
    maps = [F.pad(rand(1, 1, 300, 4, seed=seed).abs(), (0, 1)) for seed in (3, 4)]
    maps[1][:, :, ::7, :-1] = 0
    results = []
    for log_scale in (0.0, 150.0):
        maps[1][:, :, ::7, -1] = log_scale
        named = dict(query=query, key=key, value=value, query_map=maps[0], key_map=maps[1])
        settings = dict(low_rank=2, block_q=16, is_causal=False, scale=1.0)
        out, _ = torch.ops.scatterbrain.attention(*operator_arguments(AttentionArguments, **named, **settings))
        results.append(out)
    assert float(results[0].norm()) > 1 and torch.equal(*results)


@pytest.mark.parametrize("block_q", [1, 16])
@pytest.mark.parametrize("keys", [64, 200])
def test_features_that_are_no_numbers_give_results_that_are_none(keys: int, block_q: int) -> None:
    """Also in short rows, whose lists are bitmasks (docs/algorithm.md, section 7)."""
    given = [rand(1, 1, keys, D, seed=i) for i in range(3)]
    kernel = sb.Features(lambda t: torch.full_like(t, torch.nan))
    results = out_and_gradients(lambda *t: sb.attention(*t, sb.Window(16, block_q), kernel), given)
    assert all(t.isnan().all() for t in results)


def test_gradients_reach_what_the_functions_read() -> None:
    """A learned feature map (Performer-ReLU): the gradient of its weight is that of the definition."""
    draw = rand(5, D, seed=7)
    got = []
    for function, dtype in ((sb.attention, torch.float32), (sb.reference.attention, torch.float64)):
        weight = draw.to(dtype).requires_grad_()
        low_rank = sb.Features(lambda t, weight=weight: F.softplus(t @ weight.T))
        out = function(*(t.to(dtype) for t in tokens), sb.Window(16), low_rank)
        (gradient,) = torch.autograd.grad(out.square().sum(), weight)
        got.append(gradient.double())
    assert float(got[1].norm()) > 1e-3
    assert_all_close(got[:1], got[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["operator", "definition"])
def test_padding_gives_the_functions_no_token_without_a_gradient(dtype: torch.dtype) -> None:
    """A map that divides by a norm has none where its token is zero."""
    attention = sb.attention if dtype == torch.float32 else sb.reference.attention
    mask = MASK.clone()
    mask[0] = True  # a row without a token
    results = []
    for fill in (0.0, torch.nan):
        weight = rand(5, D, seed=7).to(dtype).requires_grad_()
        low_rank = sb.Features(lambda t, weight=weight: F.normalize(t @ weight.T, dim=-1, eps=0).exp())
        padded = [t.to(dtype).masked_fill(mask[:, None, :, None], fill) for t in tokens]
        out = attention(*padded, sb.Window(16), low_rank, mask)
        results += [out.detach(), *torch.autograd.grad(out.square().sum(), weight)]
    assert results[1].isfinite().all() and float(results[1].norm()) > 1e-3
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_a_module_trains_with_functions_that_are_modules() -> None:
    torch.manual_seed(0)
    features = torch.nn.Sequential(torch.nn.Linear(D, 8), torch.nn.Softplus())
    attention = sb.ScatterbrainAttention(4, D, 2, sb.Window(16), sb.Features(features))
    out = attention(*tokens, is_causal=True)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in features.parameters())
    assert torch.equal(copy.deepcopy(attention)(*tokens, is_causal=True), out)


def softplus_of(features: int = 8) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(D, features), torch.nn.Softplus())


def test_functions_that_are_modules_are_saved_loaded_and_moved_with_the_layer() -> None:
    torch.manual_seed(0)
    first, second = (
        sb.ScatterbrainAttention(4, D, 2, sb.Window(16), sb.Features(softplus_of(), softplus_of())) for _ in range(2)
    )
    names = [f"{side}_features.0.{name}" for side in ("query", "key") for name in ("weight", "bias")]
    assert list(first.state_dict()) == names == [name for name, _ in first.named_parameters()]
    want = first(*tokens)
    assert not torch.equal(second(*tokens), want)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(*tokens), want)
    assert torch.equal(copy.deepcopy(first)(*tokens), want)
    assert torch.equal(pickle.loads(pickle.dumps(first))(*tokens), want)
    assert {p.device.type for p in copy.deepcopy(first).to("meta").parameters()} == {"meta"}
    with torch.no_grad():
        for p in first.parameters():
            p.zero_()
    assert not torch.equal(first(*tokens), want) and torch.equal(second(*tokens), want)


def test_functions_of_a_model_of_16_bits_stay_in_float32() -> None:
    torch.manual_seed(0)
    attention = sb.ScatterbrainAttention(4, D, 2, sb.Window(16), sb.Features(softplus_of()))
    weight = attention.query_features[0].weight.detach().clone()
    for dtype in (torch.bfloat16, torch.float16):
        attention.to(dtype)
        assert torch.equal(attention.query_features[0].weight, weight) and weight.dtype == torch.float32
        assert attention(*(t.to(dtype) for t in tokens)).dtype == dtype
    assert attention.double()(*(t.double() for t in tokens)).dtype == torch.float64
    assert attention.query_features[0].weight.dtype == torch.float64


def assigned(attention: torch.nn.Module, doubled: torch.nn.Module) -> torch.nn.Module:
    attention.query_features = doubled
    return attention


def replica(attention: torch.nn.Module, doubled: torch.nn.Module) -> torch.nn.Module:
    """As nn.DataParallel makes them."""
    copied = attention._replicate_for_data_parallel()
    copied._modules["query_features"] = doubled
    return copied


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("put", [assigned, replica, lambda a, doubled: copy.deepcopy(assigned(a, doubled))])
def test_what_takes_the_place_of_a_function_is_what_runs(put, is_causal: bool) -> None:
    torch.manual_seed(0)
    first, other, of_keys = softplus_of(), softplus_of(), softplus_of()
    for before, after in (
        (sb.Features(first), sb.Features(other)),
        (sb.Features(first, first), sb.Features(other)),
        (sb.Features(first, of_keys), sb.Features(other, of_keys)),
    ):
        attention, want = (sb.ScatterbrainAttention(4, D, 2, sb.Window(16), kernel) for kernel in (before, after))
        expected = want(*tokens, is_causal=is_causal)
        assert not torch.equal(attention(*tokens, is_causal=is_causal), expected)
        assert torch.equal(put(attention, other)(*tokens, is_causal=is_causal), expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("copied", [lambda layer: layer, copy.deepcopy])
def test_what_takes_the_place_of_a_function_stays_when_its_kernel_is_chosen_again(copied, is_causal: bool) -> None:
    torch.manual_seed(0)
    first, other, of_keys, third = (softplus_of() for _ in range(4))
    attention = sb.ScatterbrainAttention(4, D, 2, sb.Window(16), sb.Features(first, of_keys))
    attention.query_features = other
    pairs, attention = attention.pairs, copied(attention)
    want, present = attention(*tokens, is_causal=is_causal), dict(attention.named_children())
    for _ in range(2):
        attention.pairs = pairs
        assert torch.equal(attention(*tokens, is_causal=is_causal), want)
        assert dict(attention.named_children()) == present
    attention.pairs = pairs._replace(low_rank=sb.Features(third, of_keys))
    assert attention.query_features is third and attention.key_features is present["key_features"]


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(D, D)
        self.attention = sb.ScatterbrainAttention(4, D, 2, sb.Window(16), sb.Features(softplus_of()))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(self.projection(query), key, value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_function_that_an_adapter_trains_is_what_runs() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Layer()
    before = model(*tokens)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["projection"], modules_to_save=["query_features"])
    )
    assert torch.equal(adapted(*tokens), before)
    adapted(*tokens).square().sum().backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad and "query_features" in name}
    assert len(trained) == 2 and all(p.grad.abs().sum() > 0 for p in trained.values())


def test_every_function_of_both_kinds_of_calls_is_the_layers() -> None:
    both = softplus_of(), softplus_of(6)
    attention = sb.ScatterbrainAttention(
        4, D, 2, sb.Window(16), sb.Features(both[0]), causal_low_rank=sb.Features(both[1], both[0])
    )
    assert dict(attention.named_children()) == {"query_features": both[0], "causal_query_features": both[1]}
    shared = sb.ScatterbrainAttention(4, D, 2, sb.Window(16), sb.Features(both[0], both[0]))
    assert len(list(shared.parameters())) == 2


def test_a_model_that_is_replaced_trains_the_functions() -> None:
    torch.manual_seed(0)
    features = softplus_of()
    model = torch.nn.ModuleList(torch.nn.MultiheadAttention(4 * D, 4, batch_first=True) for _ in range(2))
    sb.replace_attention(model, sb.Window(8), sb.Features(features))
    assert all(any(p is own for own in model.parameters()) for p in features.parameters())
    assert len(list(model.parameters())) == 2 * 4 + 2  # layers share them
    assert sb.Features(features).adds_parameters and not sb.Features(elu).adds_parameters


def test_the_same_function_is_called_for_a_layer_that_is_replaced() -> None:
    layer = torch.nn.MultiheadAttention(4 * D, 4, batch_first=True)
    report = sb.replace_attention(layer, sb.Window(8), sb.Features(elu))
    x = rand(2, N, 4 * D)
    assert len(report.replaced) == 1 and layer(x, x, x, need_weights=False)[0].isfinite().all()


def test_half_types_get_features_in_float32() -> None:
    seen = []

    def watched(t: Tensor) -> Tensor:
        seen.append(t.dtype)
        return elu(t)

    out = sb.attention(*(t.bfloat16() for t in tokens), sb.Window(16), sb.Features(watched))
    with torch.autocast("cpu", torch.bfloat16):
        sb.attention(*tokens, sb.Window(16), sb.Features(watched))
    sb.attention(*(t.double() for t in tokens), sb.Window(16), sb.Features(watched))
    assert out.dtype == torch.bfloat16 and seen == 4 * [torch.float32] + 2 * [torch.float64]


def test_padding_and_the_future_change_no_bit() -> None:
    query, key, value = (t.clone() for t in tokens)
    low_rank = sb.Features(far)
    padded = sb.attention(query, key, value, sb.Window(16), low_rank, MASK)
    causal = sb.attention(query, key, value, sb.Window(16), low_rank, is_causal=True)
    for t in (query, key, value):
        t[1, :, -20:] = torch.nan
    assert torch.equal(sb.attention(query, key, value, sb.Window(16), low_rank, MASK), padded)
    for t in (query, key, value):
        t[1, :, -20:] = 3.0
    assert torch.equal(sb.attention(query, key, value, sb.Window(16), low_rank, is_causal=True)[:, :, :-20],
                       causal[:, :, :-20])  # fmt: skip


def test_they_are_compiled_and_mapped() -> None:
    low_rank = sb.Features(elu)
    want = sb.attention(*tokens, sb.Window(16), low_rank)
    compiled = torch.compile(lambda *t: sb.attention(*t, sb.Window(16), low_rank), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tokens), want)
    mapped = torch.vmap(lambda *t: sb.attention(*(x[None] for x in t), sb.Window(16), low_rank)[0])
    torch.testing.assert_close(mapped(*tokens), want)


def attend(*functions: object, **arguments: object) -> Tensor:
    return sb.attention(*tokens, sb.Window(16), sb.Features(*functions), **arguments)


# id: (call, error, words that the message holds, in this order)
CALLS = {
    "no function": (
        lambda: sb.Features(64),
        TypeError,
        "Features: query_features must be a function of tokens.*returns features.*got int",
    ),
    "keys without one": (lambda: sb.Features(elu, 3.0), TypeError, "Features: key_features must be a function.*float"),
    "negative features": (
        lambda: attend(lambda t: t),
        ValueError,
        "Features: query_features must return non-negative features, got -.*; weights are their products: let the",
    ),
    "negative features of keys": (lambda: attend(elu, torch.sin), ValueError, "Features: key_features must return non"),
    "nothing": (
        lambda: attend(lambda t: None),
        TypeError,
        r"query_features must return features \(batch, heads, tokens, m\), or a pair.*got NoneType",
    ),
    "three tensors": (lambda: attend(lambda t: (t, t, t)), TypeError, "or a pair of these.*got a tuple of 3"),
    "a list as log scale": (lambda: attend(lambda t: (elu(t), [0.0])), TypeError, "or a pair of these.*got list"),
    "flat features": (
        lambda: attend(lambda t: elu(t).flatten(2)),
        ValueError,
        r"with \(batch, heads, tokens\) = \(2, 4, 75\) and m at least 1, got shape \(2, 4, 1200\)",
    ),
    "no features": (lambda: attend(lambda t: elu(t)[..., :0]), ValueError, r"m at least 1, got shape \(2, 4, 75, 0\)"),
    "a log scale with a dimension too many": (
        lambda: attend(lambda t: (elu(t), t[..., :1])),
        ValueError,
        r"the log scale that query_features returns must be \(batch, heads, tokens\) = \(2, 4, 75\), got shape \(2, 4, "
        r"75, 1\)",
    ),
    "counts": (lambda: attend(lambda t: elu(t).long()), TypeError, "as floating-point numbers, got torch.int64"),
    "features elsewhere": (
        lambda: attend(lambda t: elu(t).to("meta")),
        ValueError,
        "on the device of the tokens, cpu, got meta; move what it reads there",
    ),
    "two numbers of features": (
        lambda: attend(elu, lambda k: elu(k)[..., :3]),
        ValueError,
        "query_features and key_features must return the same number of features, got 16 and 3",
    ),
    "a bare function": (
        lambda: sb.attention(*tokens, sb.Window(16), elu),
        TypeError,
        r"low_rank must be Quadratic, Favor, Centroid, Features or None, got function; a function that makes features "
        r"goes into sb.Features, a dense one \(q, k\) -> L into sb.reference.attention alone",
    ),
    "statistics": (
        lambda: attend(elu, statistics=sb.RandomFeatures(rand(4, D))),
        TypeError,
        "low_rank=Features takes no statistics, got RandomFeatures",
    ),
    "a dense function of another shape": (
        lambda: sb.reference.attention(*tokens, sb.Window(16), lambda q, k: q),
        ValueError,
        r"low_rank\(q, k\) must be a tensor of weights \(B, Hq, N, M\) = \(2, 4, 75, 75\), got \(2, 4, 75, 16\)",
    ),
    "a dense function below zero": (
        lambda: sb.reference.attention(*tokens, sb.Window(16), lambda q, k: q @ k.transpose(-1, -2)),
        ValueError,
        r"low_rank\(q, k\) must be non-negative, got -.*; take its exp or square",
    ),
    "features below zero by the definition": (
        lambda: sb.reference.attention(*tokens, sb.Window(16), sb.Features(torch.sin)),
        ValueError,
        "Features: features must be non-negative, got -",
    ),
    "a class": (
        lambda: sb.reference.attention(*tokens, sb.Window(16), sb.Favor),
        TypeError,
        "low_rank must be a low-rank kernel, got the class Favor; make one of it",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_positive_feature_map_is_refused(name: str) -> None:
    assert_refused(*CALLS[name])
