"""Operators that are called directly raise and never crash, whatever the shapes, dtypes and contents of tensors."""

from __future__ import annotations

import random
from collections import namedtuple
from typing import NamedTuple

import pytest
import torch
from bad_calls import KV, B, D, H, N
from operator_cases import operator_arguments
from testkit import rand
from torch import Tensor

from scatterbrain.operators.arguments import (
    AttentionArguments,
    ForwardResults,
    KeptResults,
    QuadraticArguments,
    RouteArguments,
)


def well_formed(
    low_rank: int = 1,
    block_q: int = 8,
    form: str = "index",
    is_causal: bool = False,
    dtype: torch.dtype = torch.float32,
) -> AttentionArguments:
    lists = -(-N // block_q)
    maps = torch.float64 if dtype == torch.float64 else torch.float32
    fields: dict[str, object] = {}
    if low_rank:
        fields |= dict(query_map=rand(B, H, N, 4, dtype=maps), key_map=rand(B, KV, N, 4, dtype=maps))
    if form == "index":
        index = torch.arange(4, dtype=torch.int32).expand(B, H, lists, 4)
        fields |= dict(index=index, count=torch.full((B, H, lists), 4, dtype=torch.int32))
    if form == "span":
        fields |= dict(span=torch.tensor([0, 8], dtype=torch.int32).expand(1, lists, 2), span_keys=8)
    return operator_arguments(
        AttentionArguments,
        query=rand(B, H, N, D, dtype=dtype),
        key=rand(B, KV, N, D, dtype=dtype),
        value=rand(B, KV, N, D, dtype=dtype),
        low_rank=low_rank,
        block_q=block_q,
        is_causal=is_causal,
        scale=0.3,
        **fields,
    )


def int32(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def entries(first: int, at: int = 3) -> Tensor:
    index = torch.arange(4, dtype=torch.int32).repeat(B, H, 5, 1)
    index[1, 2, 4, at] = first
    return index


FORWARD = {
    "an entry past the keys": dict(index=entries(40)),
    "an entry of 2^31 - 1": dict(index=entries(2**31 - 1)),
    "a negative entry": dict(index=entries(-5, at=0)),
    "an entry twice": dict(index=entries(2)),
    "a count past the capacity": dict(count=torch.full((B, H, 5), 5, dtype=torch.int32)),
    "a count of 2^31 - 1": dict(count=torch.full((B, H, 5), 2**31 - 1, dtype=torch.int32)),
    "a negative count": dict(count=torch.full((B, H, 5), -1, dtype=torch.int32)),
    "a count of another shape": dict(count=torch.ones(B, H, 4, dtype=torch.int32)),
    "index without count": dict(count=None),
    "count without index": dict(index=None),
    "int64 index": dict(index=entries(3).long()),
    "an index of other blocks": dict(index=entries(3)[:, :, :4]),
    "an index of no head": dict(index=entries(3)[:, :0], count=torch.ones(B, 0, 5, dtype=torch.int32)),
    "an index of three heads": dict(index=entries(3)[:, :3], count=torch.ones(B, 3, 5, dtype=torch.int32)),
    "a list that breaks causality": dict(index=entries(39), is_causal=True, query_offset=int32(-20, -20)),
    "a query range past the queries": dict(query_range=int32([0, N], [0, N + 1])),
    "a key range past the keys": dict(key_range=int32([0, N], [0, N + 9])),
    "a key range before the keys": dict(key_range=int32([-1, N], [0, N])),
    "a key range that ends before it starts": dict(key_range=int32([30, 10], [0, N])),
    "a query range that ends before it starts": dict(query_range=int32([30, 10], [0, N])),
    "a range of another batch": dict(key_range=int32([0, N])),
    "a range of three numbers": dict(key_range=torch.zeros(B, 3, dtype=torch.int32)),
    "an offset of another batch": dict(query_offset=int32(0), is_causal=True),
    "an int64 offset": dict(query_offset=torch.zeros(B, dtype=torch.int64), is_causal=True),
    "a mask of other tokens": dict(key_mask=torch.zeros(B, N - 1, dtype=torch.bool)),
    "a mask of another batch": dict(query_mask=torch.zeros(1, N, dtype=torch.bool)),
    "a byte mask": dict(key_mask=torch.zeros(B, N, dtype=torch.uint8)),
    "an order past the queries": dict(query_order=torch.full((B, H, N), N, dtype=torch.int32)),
    "an order of no head": dict(query_order=torch.zeros(B, 0, N, dtype=torch.int32)),
    "an order of three heads": dict(query_order=torch.zeros(B, 3, N, dtype=torch.int32)),
    "an order of fewer queries": dict(query_order=torch.zeros(B, H, N - 1, dtype=torch.int32)),
    "an order that names a query twice": dict(query_order=torch.arange(N, dtype=torch.int32).repeat(B, H, 1) % (N - 1)),
    "a causal order": dict(query_order=torch.arange(N, dtype=torch.int32).expand(B, H, N), is_causal=True),
    "no maps": dict(query_map=None, key_map=None),
    "one map": dict(key_map=None),
    "maps without a kernel": dict(low_rank=0),
    "maps of two ranks": dict(key_map=rand(B, KV, N, 5)),
    "maps without coordinates": dict(query_map=rand(B, H, N, 1), key_map=rand(B, KV, N, 1)),
    "float64 maps": dict(query_map=rand(B, H, N, 4).double()),
    "a map of other tokens": dict(key_map=rand(B, KV, N - 1, 4)),
    "a map of other heads": dict(query_map=rand(B, KV, N, 4)),
    "no such kernel": dict(low_rank=3),
    "block_q 0": dict(block_q=0),
    "block_q of 2^62": dict(block_q=2**62),
    "block_k 0": dict(block_k=0),
    "block_k of 2^62": dict(block_k=2**62),
    "keys of other heads than value": dict(key=rand(B, H, N, D)),
    "values of other tokens": dict(value=rand(B, KV, N - 1, D)),
    "keys of another width": dict(key=rand(B, KV, N, D - 1)),
    "keys of another dtype": dict(key=rand(B, KV, N, D).half()),
    "integers": dict(query=torch.ones(B, H, N, D, dtype=torch.int32)),
    "heads that do not divide": dict(query=rand(B, 3, N, D)),
    "no query head": dict(query=rand(B, 0, N, D), query_map=rand(B, 0, N, 4)),
    "no width": dict(query=rand(B, H, N, 0), key=rand(B, KV, N, 0)),
    "no value width": dict(value=rand(B, KV, N, 0)),
    "three dimensions": dict(query=rand(H, N, D)),
}
SPANS = {
    "a span longer than said": dict(span=int32([0, 9]).expand(1, 5, 2)),
    "a span whose length wraps": dict(span=int32([-(2**31), 2**31 - 1]).expand(1, 5, 2)),
    "a negative length": dict(span=int32([9, 0]).expand(1, 5, 2), span_keys=-5),
    "a length of 2^62": dict(span_keys=2**62),
    "negative sinks": dict(span_sinks=-1),
    "sinks without a span": dict(span=None, span_sinks=1),
    "spans of other blocks": dict(span=int32([0, 8]).expand(1, 4, 2)),
    "spans of another batch": dict(span=int32([0, 8]).expand(3, 5, 2)),
    "spans of three numbers": dict(span=int32([0, 8, 8]).expand(1, 5, 3)),
}
RESULTS = {
    "out of fewer tokens": dict(out=(B, H, N - 1, D)),
    "out of another width": dict(out=(B, H, N, D - 1)),
    "d_out of another width": dict(d_out=(B, H, N, D + 1)),
    "d_out of other heads": dict(d_out=(B, KV, N, D)),
    "a flat d_out": dict(d_out=(B * H, N, D)),
    "lse of fewer tokens": dict(lse=(B, H, N - 1)),
    "a 4-D lse": dict(lse=(B, H, N, 1)),
    "d_lse of fewer tokens": dict(d_lse=(B, H, N - 1)),
    "a half-precision lse": dict(lse=torch.zeros(B, H, N, dtype=torch.float16)),
    "a double d_lse": dict(d_lse=torch.zeros(B, H, N, dtype=torch.float64)),
    "an integer d_out": dict(d_out=torch.zeros(B, H, N, D, dtype=torch.int32)),
}


def backward(given: AttentionArguments, **results: object) -> tuple[Tensor, ...]:
    shapes = dict(d_out=(B, H, N, D), d_lse=(B, H, N), out=(B, H, N, D), lse=(B, H, N)) | results
    tensors = {name: shape if isinstance(shape, Tensor) else torch.zeros(shape) for name, shape in shapes.items()}
    return torch.ops.scatterbrain.attention_backward(*ForwardResults(**tensors), *given)


@pytest.mark.parametrize(
    "form, change",
    [("index", c) for c in FORWARD.values()] + [("span", c) for c in SPANS.values()],
    ids=[*FORWARD, *SPANS],
)
def test_the_attention_operators_refuse(form: str, change: dict[str, object]) -> None:
    given = well_formed(form=form)
    torch.ops.scatterbrain.attention(*given)  # the change alone is refused below
    with pytest.raises(RuntimeError, match="^attention: "):
        torch.ops.scatterbrain.attention(*given._replace(**change))
    with pytest.raises(RuntimeError, match="^attention: "):
        backward(given._replace(**change))


@pytest.mark.parametrize("change", RESULTS.values(), ids=RESULTS)
def test_the_backward_operator_refuses_results_of_another_shape(change: dict[str, object]) -> None:
    backward(well_formed())
    with pytest.raises(RuntimeError, match="^attention_backward: "):
        backward(well_formed(), **change)


PROJECTIONS = {
    "weight of another width": (rand(1, KV, 3, D + 1), None),
    "weight of three heads": (rand(1, 3, 3, D), None),
    "weight of no head": (rand(1, 0, 3, D), None),
    "weight of another batch": (rand(3, KV, 3, D), None),
    "half weight": (rand(1, KV, 3, D).half(), None),
    "3-D weight": (rand(KV, 3, D), None),
    "no output": (rand(1, KV, 0, D), None),
    "bias of fewer outputs": (rand(1, KV, 3, D), rand(1, KV, 2)),
    "bias of fewer heads": (rand(1, KV, 3, D), rand(1, 1, 3)),
    "flat bias": (rand(1, KV, 3, D), rand(6)),
    "double bias": (rand(1, KV, 3, D), rand(1, KV, 3).double()),
}


@pytest.mark.parametrize("weight, bias", PROJECTIONS.values(), ids=PROJECTIONS)
def test_the_projection_refuses(weight: Tensor, bias: Tensor | None) -> None:
    with pytest.raises(RuntimeError, match="^project: "):
        torch.ops.scatterbrain.project(rand(B, H, N, D), weight, bias)


@pytest.mark.parametrize(
    "grad",
    [rand(B, H, N, 2), rand(B, H, N - 1, 3), rand(B, H, 3), rand(B, H, N, 3).double(), rand(B, KV, N, 3)],
    ids=lambda t: str(tuple(t.shape)),
)
def test_the_projection_refuses_gradients_of_another_shape(grad: Tensor) -> None:
    with pytest.raises(RuntimeError, match="^project_backward: "):
        torch.ops.scatterbrain.project_backward(grad, rand(B, H, N, D), rand(1, KV, 3, D))


def routing(block_q: int = 16, **changed: object) -> tuple[Tensor, Tensor]:
    given = operator_arguments(
        RouteArguments,
        query=rand(B, H, N, D),
        key=rand(B, KV, N, D),
        query_map=rand(B, H, N, 4),
        key_map=rand(B, KV, N, 4),
        low_rank=1,
        keys=24,
        block_q=block_q,
        block_k=1 if block_q > 1 else 8,
        scale=0.3,
    )
    return torch.ops.scatterbrain.route(*given._replace(**changed))


ROUTES = {name: FORWARD[name] for name in FORWARD if "range" in name or "offset" in name or "mask" in name} | {
    "no such form": dict(block_q=4),
    "a budget below the block": dict(keys=8),
    "a budget of 2^62": dict(keys=2**62),
    "a window above the budget": dict(block_q=1, block_k=8, window=32),
    "a negative window": dict(block_q=1, block_k=8, window=-8),
    "a window below the block": dict(window=8),
    "sinks above the budget": dict(sinks=9),
    "negative sinks": dict(sinks=-1),
    "blocks of sinks above the budget": dict(block_q=1, block_k=8, window=16, sinks=9),
    "keys of another width": dict(key=rand(B, KV, N, D - 1)),
    "heads that do not divide": dict(query=rand(B, 3, N, D)),
    "no head": dict(query=rand(B, 0, N, D)),
    "integers": dict(query=torch.ones(B, H, N, D, dtype=torch.int32)),
    "no maps": dict(query_map=None),
    "a map of other tokens": dict(key_map=rand(B, KV, N - 1, 4)),
    "maps without coordinates": dict(query_map=rand(B, H, N, 1), key_map=rand(B, KV, N, 1)),
    "double maps": dict(query_map=rand(B, H, N, 4).double()),
    "no such kernel": dict(low_rank=-1),
    "keys of other heads": dict(head_keys=int32([24] * (H + 1))),
    "keys of heads in one row": dict(head_keys=int32(*[24] * H)),
    "keys of heads in 64 bits": dict(head_keys=int32([24] * H).long()),
    "keys of a head above the budget": dict(head_keys=int32([24] * (H - 1) + [25])),
    "keys of a head below the block": dict(head_keys=int32([24] * (H - 1) + [15])),
}


@pytest.mark.parametrize("change", ROUTES.values(), ids=ROUTES)
def test_the_routing_operator_refuses(change: dict[str, object]) -> None:
    routing(block_q=change.get("block_q", 16) if change.get("block_q") in (1, 8, 16, 32) else 16)
    with pytest.raises(RuntimeError, match="^route: "):
        routing(**change)


def operator_calls() -> dict[str, tuple[str, NamedTuple]]:
    """Operators with well-formed arguments that fill every tensor but the ones that exclude each other."""
    optional = dict(
        query_mask=torch.zeros(B, N, dtype=torch.bool),
        key_mask=torch.zeros(B, N, dtype=torch.bool),
        query_range=int32([0, N], [0, N]),
        key_range=int32([0, N], [0, N]),
        query_offset=int32(0, 0),
    )
    attention, tokens = well_formed()._replace(**optional), (rand(B, H, N, D), rand(B, KV, N, D))
    spans = well_formed(form="span")._replace(query_order=None)
    ordered = well_formed()._replace(query_order=torch.arange(N, dtype=torch.int32).repeat(B, H, 1))
    weights = dict(
        query_weight=rand(1, KV, 4, D), query_bias=rand(1, KV, 4), key_weight=rand(1, KV, 4, D), key_bias=rand(1, KV, 4)
    )
    shared = {name: value for name, value in attention._asdict().items() if name in QuadraticArguments._fields}
    quadratic = operator_arguments(QuadraticArguments, **shared, **weights)
    routed = operator_arguments(
        RouteArguments,
        **dict(zip(("query", "key"), tokens)),
        **optional,
        query_map=rand(B, H, N, 4),
        key_map=rand(B, KV, N, 4),
        low_rank=1,
        keys=24,
        block_q=16,
        block_k=1,
        scale=0.3,
    )
    results = ForwardResults(rand(B, H, N, D), rand(B, H, N), rand(B, H, N, D), rand(B, H, N))
    backward = namedtuple("Backward", [*ForwardResults._fields, *AttentionArguments._fields, *KeptResults._fields])
    project = namedtuple("Project", ["tokens", "weight", "bias"])
    of_map = namedtuple("ProjectBackward", ["grad", "tokens", "weight"])
    return {
        "attention": ("attention", attention),
        "attention of a window": ("attention", spans),
        "attention in another order": ("attention", ordered),
        "attention_with_state": ("attention_with_state", attention),
        "attention_backward": (
            "attention_backward",
            backward(*results, *attention, *KeptResults(rand(0), rand(0), rand(1, KV, 4, D), rand(1, KV, 4, D))),
        ),
        "quadratic_attention": ("quadratic_attention", quadratic),
        "quadratic_attention_with_state": ("quadratic_attention_with_state", quadratic),
        "route": ("route", routed),
        "project": ("project", project(tokens[0], weights["query_weight"], weights["query_bias"])),
        "project_packed": ("project_packed", project(tokens[0], weights["query_weight"], weights["query_bias"])),
        "project_backward": ("project_backward", of_map(rand(B, H, N, 4), tokens[0], weights["query_weight"])),
    }


OPERATOR_CALLS = operator_calls()


@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_the_operators_refuse_a_tensor_on_another_device(name: str) -> None:
    """One tensor on the meta device would make torch return results that nothing has been written to."""
    operator, arguments = OPERATOR_CALLS[name]
    getattr(torch.ops.scatterbrain, operator)(*arguments)
    tensors = [field for field, value in arguments._asdict().items() if isinstance(value, Tensor)]
    assert len(tensors) >= 3
    for field in tensors:
        changed = arguments._replace(**{field: getattr(arguments, field).to("meta")})
        with pytest.raises(
            RuntimeError, match=r"[a-z_]+: tensors must be on one device, got \w+ on (cpu|meta) and \w+ on"
        ):
            getattr(torch.ops.scatterbrain, operator)(*changed)


@pytest.mark.parametrize("seed", range(60))
def test_drawn_nonsense_raises_or_gives_results_of_the_right_shape(seed: int) -> None:
    """Several arguments at once are replaced by tensors of drawn shapes, dtypes and contents."""
    r = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    given = well_formed(
        r.choice([0, 1, 2]),
        r.choice([1, 5, 8, 32]),
        r.choice(["index", "span", ""]),
        r.random() < 0.5,
        r.choice([torch.float32, torch.bfloat16, torch.float64]),
    )

    def tensor(like: object) -> object:
        shape = (
            list(like.shape)
            if isinstance(like, Tensor)
            else [r.choice([1, B]), r.choice([1, KV, H]), N, 4][: r.choice([1, 2, 3, 4])]
        )
        if r.random() < 0.5:
            shape[r.randrange(len(shape))] += r.choice([-1, 1])
        if isinstance(like, Tensor) and like.is_floating_point():
            return torch.randn([max(0, n) for n in shape], generator=generator).to(
                r.choice([like.dtype, like.dtype, torch.float16])
            )
        return torch.randint(-3, r.choice([5, 60]), [max(0, n) for n in shape], generator=generator, dtype=torch.int32)

    for name in r.sample(given._fields, r.choice([1, 2, 3])):
        value = getattr(given, name)
        can_be_left_out = name in ("index", "count", "span", "query_map", "key_map")
        if isinstance(value, bool):
            changed = not value
        elif isinstance(value, int):
            changed = r.choice([-1, 0, 1, 2, 8, 2**31, 2**40])
        elif isinstance(value, float):
            changed = value
        elif r.random() < 0.8:
            changed = tensor(value)
        else:
            changed = None if can_be_left_out else value
        given = given._replace(**{name: changed})
    try:
        out, lse = torch.ops.scatterbrain.attention(*given)
    except RuntimeError as error:
        assert str(error).startswith("attention: ")
        return
    assert out.shape == (*given.query.shape[:3], given.value.shape[3]) and lse.shape == out.shape[:3]
    gradients = torch.ops.scatterbrain.attention_backward(*ForwardResults(out, lse, out, lse), *given)
    assert [g.shape for g in gradients[:3]] == [t.shape for t in (given.query, given.key, given.value)]
