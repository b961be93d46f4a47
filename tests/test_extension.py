"""A support and a low-rank kernel of one's own, written here alone, run through everything that the built-in
ones do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from testkit import assert_all_close, leaves, out_and_gradients, padding, qkv, rand
from torch import Tensor

import scatterbrain as sb
from scatterbrain.call import Call
from scatterbrain.cli import main
from scatterbrain.low_rank import LOW_RANK_KERNELS, LowRankKernel
from scatterbrain.low_rank import register as register_kernel
from scatterbrain.supports import SUPPORTS, BlockLists, Support
from scatterbrain.supports import register as register_support

N, D = 75, 16


@dataclass(frozen=True)
class First(Support):
    """The first keys of the row (attention sinks), for every query."""

    kind: ClassVar[str] = "first"
    keys: int

    def lists(self, call: Call, query_map: Tensor | None, key_map: Tensor | None) -> BlockLists:
        (batch, _, n, _), (_, heads, m, _) = call.query.shape, call.key.shape
        blocks = -(-n // 16)
        valid = call.padding.key_range
        seen = torch.full((batch, 1), m) if valid is None else valid.diff(dim=1)
        seen = seen.expand(batch, blocks)
        if call.is_causal:
            seen = torch.minimum(seen, 16 * torch.arange(1, blocks + 1))
        count = seen.clamp(max=self.keys).to(torch.int32)[:, None].expand(batch, heads, blocks).contiguous()
        index = torch.arange(self.keys, dtype=torch.int32).expand(batch, heads, blocks, self.keys).contiguous()
        return BlockLists(index=index, count=count, block_q=16)


@dataclass(frozen=True)
class Elu(LowRankKernel):
    """Features elu(x) + 1 (Katharopoulos et al. 2020)."""

    kind: ClassVar[str] = "elu"

    def coordinates(self, call: Call) -> tuple[Tensor, Tensor]:
        def features(tokens: Tensor, mask: Tensor | None) -> Tensor:
            tokens = tokens if mask is None else tokens.masked_fill(mask[:, None, :, None], 0)
            positive = F.elu(tokens.to(torch.promote_types(tokens.dtype, torch.float32)) * abs(call.scale) ** 0.5) + 1
            return torch.cat([positive, torch.zeros_like(positive[..., :1])], -1)

        return features(call.query, call.padding.query_mask), features(call.key, call.padding.key_mask)


@sb.reference.support_mask.register
def _(support: First, inputs: sb.reference.Inputs) -> Tensor:
    chosen = inputs.pairs(False)
    for b in range(len(chosen)):
        first, end = inputs.key_range(b)
        chosen[b, :, :, first : min(first + support.keys, end)] = True
    return chosen


@sb.reference.log_kernel.register
def _(low_rank: Elu, inputs: sb.reference.Inputs) -> tuple[Tensor, Tensor]:
    phi = [F.elu(tokens * inputs.scale**0.5) + 1 for tokens in (inputs.query, inputs.key)]
    factor = phi[0] @ phi[1].repeat_interleave(inputs.group, 1).transpose(-1, -2)
    return torch.zeros_like(factor), factor


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_support(First)
    register_kernel(Elu)
    yield
    del SUPPORTS["first"], LOW_RANK_KERNELS["elu"]


@pytest.fixture
def used(monkeypatch) -> set[str]:
    """Names of the methods below that were called."""
    called: set[str] = set()
    for cls, name in ((First, "lists"), (Elu, "coordinates")):

        def recorded(*arguments, method=getattr(cls, name), name=f"{cls.__name__}.{name}"):
            called.add(name)
            return method(*arguments)

        monkeypatch.setattr(cls, name, recorded)
    return called


BOTH = {"First.lists", "Elu.coordinates"}
tokens = partial(qkv, N, heads=4, kv_heads=2, head_dim=D)
PADDING = padding(N, (0, 20))
PAIRS = [(First(8), Elu()), (First(8), None), (First(8), sb.Favor(32)), (sb.Window(16), Elu()), (sb.Routed(24), Elu())]


@pytest.mark.parametrize("mask", [None, PADDING, PADDING.flip(1)], ids=["everything", "right", "left"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize(("support", "low_rank"), PAIRS, ids=str)
def test_the_function_computes_what_the_reference_defines(support, low_rank, is_causal, mask) -> None:
    arguments = dict(low_rank=low_rank, is_causal=is_causal, key_padding_mask=mask)
    if isinstance(support, sb.Routed):  # the reference has no coordinates of Elu to route by
        query, key, _ = tokens()
        support = sb.route(query, key, support, **arguments)
    mine, defined = (
        out_and_gradients(
            lambda *t: function(*t, support, **arguments),
            tokens(dtype=dtype),
            d_out=rand(2, 4, N, D, seed=9, dtype=dtype),
        )
        for function, dtype in ((sb.attention, torch.float32), (sb.reference.attention, torch.float64))
    )
    assert_all_close([t.double() for t in mine], defined)


def test_a_module_owns_them_and_saves_and_loads() -> None:
    module = sb.ScatterbrainAttention(4, D, 2, First(8), Elu())
    query, key, value = leaves(tokens())
    out = module(query, key, value, key_padding_mask=PADDING)
    assert torch.equal(out, sb.attention(query, key, value, First(8), Elu(), PADDING))
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (query, key, value))
    fresh = sb.ScatterbrainAttention(4, D, 2, First(8), Elu())
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(query, key, value, key_padding_mask=PADDING), out)
    assert not module.needs_calibration and not module.state_dict()


def test_a_drop_in_module_takes_them(used) -> None:
    layer = torch.nn.MultiheadAttention(4 * D, 4, batch_first=True)
    report = sb.replace_attention(layer, First(8), Elu())
    assert len(report.replaced) == 1 and "First(keys=8), Elu()" in str(report)
    x = rand(2, N, 4 * D)
    assert layer(x, x, x, need_weights=False)[0].isfinite().all()
    assert used == BOTH


def test_they_are_compiled_and_traced() -> None:
    query, key, value = tokens()
    compiled = torch.compile(lambda *t: sb.attention(*t, First(8), Elu()), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value), sb.attention(query, key, value, First(8), Elu()))


@pytest.mark.parametrize("causal", ["no", "yes"])
def test_the_benchmark_knows_them_by_their_kind(tmp_path, used, causal: str) -> None:
    results = tmp_path / "results.json"
    options = ["--lengths", "64", "--repeats", "1", "--memory", "false", "--causal", causal, "--json", str(results)]
    assert main(["bench", "--methods", "sdpa", "first-8+elu", "first-8+none", "window-16+elu", *options]) == 0
    assert used == BOTH
    rows = [row for row in json.loads(results.read_text())["rows"] if row["method"] != "sdpa"]
    assert len(rows) == 6 and all(row["seconds"] and 0 < row["error"] < 10 for row in rows)


def test_a_configuration_names_them(tmp_path, used) -> None:
    text = tmp_path / "text.py"
    text.write_text("import os\n" * 4000)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{path: {text}}}\nmodel: {{layers: 1, width: 32, heads: 2}}\n"
        "attention: {support: {kind: first, keys: 8}, low_rank: elu}\n"
        "train: {steps: 2, context: 64, batch: 1, validate_every: 2, validation_batches: 1, checkpoint_every: 2}\n"
        f"sample: {{length: 4}}\noutput: {tmp_path / 'run'}\n"
    )
    assert main(["train", str(config)]) == 0
    assert (tmp_path / "run" / "sample.txt").exists() and used == BOTH


def test_a_configuration_imports_them_from_a_module(tmp_path, monkeypatch) -> None:
    from scatterbrain.training.attention import build_support_and_low_rank
    from scatterbrain.training.config import AttentionConfig

    code = (
        "from dataclasses import dataclass\nimport scatterbrain as sb\n\n\n"
        "@dataclass(frozen=True)\nclass Wide(sb.Window):\n    kind = 'wide'\n"
    )
    (tmp_path / "own_supports.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    support, _ = build_support_and_low_rank(AttentionConfig(support={"kind": "own_supports:Wide", "keys": 24}))
    assert type(support).__name__ == "Wide" and support.keys == 24
    with pytest.raises(ValueError, match="expected module:Class"):
        build_support_and_low_rank(AttentionConfig(support="own_supports:Missing"))


def test_a_kind_is_taken_once() -> None:
    @dataclass(frozen=True)
    class Other(Support):
        kind: ClassVar[str] = "window"

    with pytest.raises(ValueError, match="'window' is Window already; choose another kind"):
        register_support(Other)
    with pytest.raises(TypeError, match="expected a class derived from LowRankKernel"):
        register_kernel(Other)


def test_what_an_own_class_must_define_is_said() -> None:
    @dataclass(frozen=True)
    class Nothing(Support):
        kind: ClassVar[str] = "nothing"

    query, key, value = tokens()
    with pytest.raises(NotImplementedError, match=r"Nothing must define lists\(call, query_map, key_map\)"):
        sb.attention(query, key, value, Nothing(), None)
    with pytest.raises(TypeError, match="sb.reference knows no support Nothing; define it with"):
        sb.reference.attention(query, key, value, Nothing(), None)
