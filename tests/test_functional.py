"""The public functions where a call names no low-rank kernel."""

from __future__ import annotations

from functools import partial

import pytest
import testkit
import torch
from testkit import leaves, padding, rand
from torch import Tensor

import scatterbrain as sb
from scatterbrain import prepared

qkv = partial(testkit.qkv, 300, heads=4, kv_heads=2, head_dim=16)
WINDOW = sb.Window(16)
attend = partial(sb.attention, support=WINDOW)
EXPLICIT = partial(sb.attention, support=WINDOW, low_rank=sb.Centroid(64))


def test_a_bidirectional_call_without_statistics_runs_with_clusters_of_its_own_keys() -> None:
    inputs, mask = qkv(), padding(300, (0, 70))
    assert torch.equal(attend(*inputs), EXPLICIT(*inputs))
    assert torch.equal(attend(*inputs, key_padding_mask=mask), EXPLICIT(*inputs, key_padding_mask=mask))
    assert torch.equal(sb.attention(*inputs), sb.attention(*inputs, sb.Window(64), sb.Centroid(64)))


def test_a_causal_call_without_statistics_names_the_cure() -> None:
    with pytest.raises(
        ValueError, match=r"not calibrated: pass statistics= from sb.fit_statistics\(query, key, rank=9\)"
    ):
        attend(*qkv(), is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rank", [4, 9])
def test_a_call_with_statistics_runs_with_the_kernel_that_takes_them(is_causal: bool, rank: int) -> None:
    inputs = qkv()
    statistics = sb.fit_statistics(*inputs[:2], rank)
    want = attend(*inputs, low_rank=sb.Quadratic(rank), statistics=statistics, is_causal=is_causal)
    assert torch.equal(attend(*inputs, statistics=statistics, is_causal=is_causal), want)


def test_a_call_with_clusters_runs_with_as_many() -> None:
    inputs = qkv()
    clusters = sb.cluster(*inputs[:2], clusters=12)
    assert torch.equal(attend(*inputs, statistics=clusters), attend(*inputs, low_rank=sb.Centroid(12)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_lists_are_those_of_the_kernel_that_attention_would_take(is_causal: bool) -> None:
    query, key, value = qkv()
    support = sb.Routed(32, block_q=16)
    kernel = None if is_causal else sb.Centroid(64)
    lists, want = (sb.route(query, key, support, *kernels, is_causal=is_causal) for kernels in ((), (kernel,)))
    assert torch.equal(lists.index, want.index) and torch.equal(lists.count, want.count)
    if not is_causal:
        torch.testing.assert_close(sb.attention(query, key, value, lists), sb.attention(query, key, value, support))
        without = sb.route(query, key, support, None)
        assert not torch.equal(lists.index, without.index)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_definition_has_the_same_default(is_causal: bool) -> None:
    inputs = qkv()
    given = {"statistics": sb.fit_statistics(*inputs[:2])} if is_causal else {}
    kernel = sb.Quadratic(9) if is_causal else sb.Centroid(64)
    without = sb.reference.attention(*inputs, WINDOW, is_causal=is_causal, **given)
    assert torch.equal(without, sb.reference.attention(*inputs, WINDOW, kernel, is_causal=is_causal, **given))
    routed = sb.Routed(32, block_q=16)
    of_default, named = (
        sb.reference.mask(routed, *inputs[:2], *kernels, is_causal=is_causal, **given) for kernels in ((), (kernel,))
    )
    assert torch.equal(of_default, named)


@pytest.mark.parametrize("is_causal", [False, True])
def test_random_features_without_a_kernel_are_those_of_favor(is_causal: bool) -> None:
    inputs = qkv()
    given = {"statistics": sb.RandomFeatures(rand(24, inputs[0].shape[-1])), "is_causal": is_causal}
    out = sb.attention(*inputs, WINDOW, **given)
    assert torch.equal(out, sb.attention(*inputs, WINDOW, sb.Favor(24), **given))
    without = sb.reference.attention(*inputs, WINDOW, **given)
    assert torch.equal(without, sb.reference.attention(*inputs, WINDOW, sb.Favor(24), **given))


@pytest.mark.parametrize("support", [sb.Routed(32, block_q=16), sb.LSH(32), sb.Window(16)], ids=lambda s: s.kind)
def test_lists_and_clusters_that_inference_mode_made_are_trained_with(support: sb.supports.Support) -> None:
    inputs = qkv()

    def gradients() -> list[Tensor]:
        lists = sb.route(*inputs[:2], support, None) if support.depends_on_content else support
        clusters = sb.cluster(*inputs[:2])
        with torch.inference_mode(False), torch.enable_grad():
            given = [t.clone().requires_grad_() for t in inputs]
            return list(torch.autograd.grad(sb.attention(*given, lists, statistics=clusters).square().sum(), given))

    want = gradients()
    with torch.inference_mode():
        got = gradients()
    assert all(map(torch.equal, got, want))


def test_a_mask_given_as_is_causal_is_refused_as_such() -> None:
    with pytest.raises(TypeError, match="is_causal must be a bool, got Tensor"):
        attend(*qkv(), is_causal=torch.ones(300, 300, dtype=torch.bool))


# -------------------- the default under everything that torch does to a call


def test_the_default_is_prepared_as_the_kernel_that_it_is() -> None:
    prepared._prepared.clear()
    inputs = qkv()
    first = attend(*inputs)
    kept = len(prepared._prepared)
    assert torch.equal(attend(*inputs), first) and torch.equal(EXPLICIT(*inputs), first)
    assert kept == len(prepared._prepared) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_runs_in_half_types_and_under_autocast(dtype: torch.dtype) -> None:
    inputs = qkv()
    half = [t.to(dtype) for t in inputs]
    with torch.autocast("cpu", dtype):
        out = attend(*inputs)
    assert out.dtype == dtype and torch.equal(out, attend(*half)) and torch.equal(out, EXPLICIT(*half))


def test_the_default_compiles_exports_and_transforms_as_the_kernel_that_it_is() -> None:
    inputs, others = qkv(), qkv(seed=9)
    torch.testing.assert_close(torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs), EXPLICIT(*inputs))

    class Layer(torch.nn.Module):
        def forward(self, *tokens: torch.Tensor) -> torch.Tensor:
            return attend(*tokens)

    exported = torch.export.export(Layer(), tuple(inputs)).module()
    torch.testing.assert_close(exported(*inputs), EXPLICIT(*inputs))
    both = torch.func.vmap(attend)(*(torch.stack(pair) for pair in zip(inputs, others)))
    torch.testing.assert_close(both, torch.stack([EXPLICIT(*inputs), EXPLICIT(*others)]))
    mine, theirs = (
        torch.func.grad(lambda *tokens: call(*tokens).square().sum(), argnums=(0, 1, 2))(*inputs)
        for call in (attend, EXPLICIT)
    )
    tokens = leaves(inputs)
    eager = torch.autograd.grad(attend(*tokens).square().sum(), tokens)
    for a, b, c in zip(mine, theirs, eager, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)
