"""What the tests share: seeded draws, small models, comparisons of results, and child processes."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import scatterbrain as sb
from scatterbrain.supports import Support

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"

# Sizes for tests to which they do not matter: rows, query heads, key/value heads, tokens, head_dim.
B, H, KV, N, D = 2, 2, 1, 37, 8

# -------------------- draws


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers: the same ones in every dtype, rounded."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(
    queries: int = N,
    keys: int | None = None,
    *,
    batch: int = B,
    heads: int = H,
    kv_heads: int = KV,
    head_dim: int = D,
    value_dim: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Query, key and value (batch, heads, tokens, width)."""
    keys = queries if keys is None else keys
    shapes = ((heads, queries, head_dim), (kv_heads, keys, head_dim), (kv_heads, keys, value_dim or head_dim))
    return [rand(batch, *shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory and strides, with gradients."""
    return [t.detach().requires_grad_() for t in tensors]


def fitted(
    rank: int = 3,
    *,
    heads: int = H,
    kv_heads: int = KV,
    head_dim: int = D,
    scale: float | None = None,
    seed: int = 5,
) -> sb.Statistics:
    """Statistics of 99 drawn tokens."""
    return sb.fit_statistics(
        rand(1, heads, 99, head_dim, seed=seed), rand(1, kv_heads, 99, head_dim, seed=seed + 1), rank, scale=scale
    )


def projections(
    rank: int = 3,
    *,
    heads: int = H,
    kv_heads: int = KV,
    head_dim: int = D,
    seed: int = 10,
    dtype: torch.dtype = torch.float32,
) -> sb.Projections:
    """Learned projections, small enough for a kernel that is far from zero and from infinity."""
    shapes = ((heads, rank, head_dim), (heads, head_dim), (heads,), (kv_heads, rank, head_dim), (kv_heads, head_dim))
    return sb.Projections(*(rand(*shape, seed=seed + i, dtype=dtype) / 3 for i, shape in enumerate(shapes)))


def weights(projections: sb.Projections) -> list[Tensor]:
    return list(vars(projections).values())


def blocks(
    lists: Sequence[Sequence[int]],
    block_q: int,
    block_k: int = 1,
    *,
    batch: int = B,
    heads: int = H,
    capacity: int | None = None,
    order: Tensor | None = None,
    count: int | None = None,
) -> sb.Blocks:
    """One list of key blocks for each query block, the same for every row and head. ``count`` replaces the lengths."""
    index = torch.full((len(lists), capacity or max(map(len, lists))), -1, dtype=torch.int32)
    for row, entries in zip(index, lists):
        row[: len(entries)] = torch.tensor(entries, dtype=torch.int32)
    lengths = torch.tensor([len(entries) if count is None else count for entries in lists], dtype=torch.int32)
    index, lengths = index.repeat(batch, heads, 1, 1), lengths.repeat(batch, heads, 1)
    return sb.Blocks(index, lengths, block_q, block_k, order)


def padding(tokens: int, right: Sequence[int], left: Sequence[int] | None = None) -> Tensor:
    """bool (rows, tokens), True is padding: so many tokens at the end of each row, and at its start."""
    position, right = torch.arange(tokens), torch.tensor(right)[:, None]
    left = torch.zeros_like(right) if left is None else torch.tensor(left)[:, None]
    return (position < left) | (position >= tokens - right)


def causal_mask(queries: int, keys: int | None = None, kind: type = bool) -> Tensor:
    """(queries, keys) as nn.MultiheadAttention takes it: the future is True, or -inf for ``kind`` float."""
    return as_kind(torch.ones(queries, keys or queries, dtype=torch.bool).triu(1), kind)


def partial_mask(*shape: int, kind: type = bool) -> Tensor:
    """Forbids about a third of the pairs, never the first key, and for ``kind`` float has other values elsewhere. Drawn
    from torch's own generator."""
    mask = torch.rand(shape) < 0.3
    mask[..., 0] = False
    return mask if kind is bool else torch.randn(shape).masked_fill(mask, -math.inf)


def as_kind(mask: Tensor, kind: type) -> Tensor:
    """A bool mask, or what it adds to the scores."""
    return mask if kind is bool else torch.zeros(mask.shape).masked_fill(mask, -math.inf)


# -------------------- memory layouts


def tokens_before_heads(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def width_first(t: Tensor) -> Tensor:
    """The last dimension is the one with the largest stride."""
    return t.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def every_second(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:3], 2 * t.shape[3]), torch.nan, dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def part_of_a_larger_one(t: Tensor) -> Tensor:
    """Views at an offset into memory that holds NaN around them, at addresses that no vector load is aligned to."""
    large = torch.full((t.shape[0] + 1, t.shape[1] + 2, t.shape[2] + 3, t.shape[3] + 5), torch.nan, dtype=t.dtype)
    view = large[1:, 1:-1, 2:-1, 3:-2]
    view.copy_(t)
    return view


def unaligned(t: Tensor) -> Tensor:
    flat = torch.empty(t.numel() + 1, dtype=t.dtype)
    flat[1:] = t.reshape(-1)
    return flat[1:].view(t.shape)


LAYOUTS = {
    f.__name__.replace("_", " "): f
    for f in (tokens_before_heads, width_first, every_second, part_of_a_larger_one, unaligned)
}


# -------------------- supports, low-rank kernels and models


def supports() -> dict[str, Support]:
    """Every form that lists of keys come in: for blocks of queries and for single ones, by place and by
    content, none."""
    return {
        "window": sb.Window(32),
        "window of 8": sb.Window(24, block_q=8),
        "single queries": sb.Window(24, block_q=1),
        "pooled": sb.Routed(32),
        "per query": sb.Routed(32, block_q=1, block_k=8, window=16),
        "per query of two pools": sb.Routed(32, block_q=1, block_k=8, window=16, pools=2),
        "per query by sketches": sb.Routed(32, block_q=1, block_k=8, window=16, pools=0),
        "lsh": sb.LSH(32),
        "empty": sb.Empty(),
    }


def low_ranks(rank: int = 4, features: int = 8) -> dict[str, sb.Quadratic | sb.Favor | None]:
    """Every kind of low-rank kernel by the name of its state."""
    quadratic = {name: sb.Quadratic(rank, name) for name in ("stored", "input", "ema", "learned")}
    return {"none": None, **quadratic, "favor": sb.Favor(features)}


def randomized(model: nn.Module, std: float = 0.2, vectors: float = 0.0) -> nn.Module:
    """Every parameter drawn anew, so that attention is not uniform; those of one dimension around ``vectors``."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else vectors, std=std)
    return model


def with_biases(model: nn.Module) -> nn.Module:
    """Biases drawn anew: torch starts them at zero, where a wrong one is not seen."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return model


def encoder(width: int = 48, heads: int = 4, layers: int = 2, nested: bool = True, **arguments: Any) -> Any:
    """An nn.TransformerEncoder without dropout."""
    arguments = {"dim_feedforward": 64, "dropout": 0.0, "batch_first": True, **arguments}
    layer = nn.TransformerEncoderLayer(width, heads, **arguments)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)


def swapped_encoder(low_rank: sb.Quadratic | sb.Favor | None) -> nn.TransformerEncoder:
    """A small encoder of width 32 whose attention is replaced."""
    model = encoder(32, 2, nested=False, dim_feedforward=48)
    sb.replace_attention(model, sb.Routed(16, block_q=8), low_rank)
    return model


def cores(model: nn.Module) -> dict[str, sb.ScatterbrainAttention]:
    """The attention of this library inside a model, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, sb.ScatterbrainAttention)}


def count_calls(model: nn.Module) -> list[nn.Module]:
    """A list to which every call of the library's attention inside ``model`` adds its module. Without hooks, which keep
    torch's fused encoder layer from its fast path."""
    calls: list[nn.Module] = []

    def counted(core: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(core)
            return forward(*args, **kwargs)

        return call

    for core in cores(model).values():
        core.forward = counted(core, core.forward)
    return calls


def under_grad(function: Callable[[], object]) -> None:
    """Calls ``function`` inside torch.func.grad."""

    def loss(x: Tensor) -> Tensor:
        function()
        return x.sum()

    torch.func.grad(loss)(torch.ones(2))


def under_inference_mode(function: Callable[[], object]) -> None:
    with torch.inference_mode():
        function()


def under_fake_mode(function: Callable[[], object]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        function()


# What tensors that are made inside must not outlive.
PASSING = [under_inference_mode, under_grad, under_fake_mode]
COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]

# -------------------- results


def out_and_gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
    d_out: Tensor | None = None,
    allow_unused: bool = False,
) -> list[Tensor]:
    """``function(*inputs)`` and its gradients by inputs and parameters, for ``d_out`` or the sum of squares."""
    inputs = leaves(inputs)
    out = function(*inputs)
    d_out = 2 * out.detach() if d_out is None else d_out
    wanted = [*inputs, *parameters]
    return [out.detach(), *_gradients([out], wanted, [d_out], allow_unused)]


def attend(
    tokens: Sequence[Tensor],
    support: Any,
    low_rank: Any,
    statistics: Any = None,
    d_out: Tensor | None = None,
    allow_unused: bool = False,
    **arguments: Any,
) -> list[Tensor]:
    """out, lse and the gradients of the tokens and of learned projections, for drawn gradients of out and lse, or for
    ``d_out`` alone. Calls that return the lse are never prepared: use out_and_gradients where that matters."""
    inputs, parameters = leaves(tokens), []
    if isinstance(statistics, sb.Projections):
        parameters = leaves(weights(statistics))
        statistics = sb.Projections(*parameters)
    out, lse = sb.attention(*inputs, support, low_rank, statistics=statistics, return_lse=True, **arguments)
    results, upstream = [out], [d_out]
    if d_out is None:
        upstream = [rand(*t.shape, seed=20 + i, dtype=t.dtype) for i, t in enumerate((out, lse))]
        results = [out, lse]
    return [out.detach(), lse.detach(), *_gradients(results, inputs + parameters, upstream, allow_unused)]


def _gradients(
    results: list[Tensor], wanted: list[Tensor], upstream: list[Tensor], allow_unused: bool
) -> tuple[Tensor, ...]:
    """Zeros for tensors that take no part, if that is allowed."""
    return torch.autograd.grad(results, wanted, upstream, allow_unused=allow_unused, materialize_grads=allow_unused)


RESULTS = ("out", "lse", "dq", "dk", "dv", "dPq", "db", "dc", "dPk", "da")  # of attend


def assert_same_bits(got: Sequence[Tensor], want: Sequence[Tensor], names: Sequence[str] = RESULTS) -> None:
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        name = names[i] if i < len(names) else i
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, name
        assert torch.equal(mine, theirs), f"{name}: {(mine - theirs).abs().max():.2e}"


def assert_all_close(got: Sequence[Tensor], want: Sequence[Tensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def assert_close_in_scale(mine: Any, exact: Any) -> None:
    """Equal to rounding in units of the standard deviation, also for tuples, lists and dictionaries of tensors."""
    if isinstance(exact, Tensor):
        assert exact.std() > 0.01
        torch.testing.assert_close(mine / exact.std(), exact / exact.std(), rtol=1e-4, atol=1e-4)
    elif isinstance(exact, dict):
        assert mine.keys() == exact.keys()
        assert_close_in_scale(list(mine.values()), list(exact.values()))
    elif exact is not None:
        assert type(mine) is type(exact)
        for a, b in zip(mine, exact, strict=True):
            assert_close_in_scale(a, b)


def counting_backend() -> tuple[list[object], Callable[[object, object], object]]:
    """A list of the graphs that torch.compile makes, and the backend ("aot_eager") that fills it."""
    graphs: list[object] = []

    def backend(graph: object, inputs: object) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    return graphs, backend


# -------------------- processes


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with the package under test and these modules importable."""
    path = (str(Path(sb.__file__).parents[1]), str(TESTS), os.environ.get("PYTHONPATH", ""))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))} | changes


def run_python(
    *arguments: object, cwd: Path | None = None, seconds: float | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    """``python *arguments`` to its end, with ``changes`` of the environment; TimeoutExpired after ``seconds``."""
    command = [sys.executable, *map(str, arguments)]
    options = {"cwd": cwd, "env": environment(**changes), "timeout": seconds}
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def run_two_ranks(arguments: Callable[[int], Sequence[object]], folder: Path, seconds: float) -> None:
    """Two processes, ``python *arguments(rank)``, that must both succeed."""
    processes, logs = [], [folder / f"{rank}.log" for rank in range(2)]
    try:
        for rank, log in enumerate(logs):
            with log.open("w", encoding="utf-8") as stream:
                command = [sys.executable, *map(str, arguments(rank))]
                alone = environment(OMP_NUM_THREADS="1")
                processes.append(subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=alone))
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        pytest.fail("\n".join(log.read_text(encoding="utf-8")[-4000:] for log in logs))


def need_weights(package: str) -> None:
    """Skips without the package that carries a model's weights; in continuous integration it has to be there."""
    if not os.environ.get("CI") and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package}, whose files hold the weights, is not installed")
