"""How far is approximate attention from exact attention on real queries, keys and values?

Error of a head: ||o - o*|| / ||o*|| against exact softmax attention in float64; the table shows the mean over heads and
layers.

    python benchmarks/quality.py FILE               the table
    python benchmarks/quality.py FILE --captured    and what the staged search of the routing operator costs against
    scoring every key
    python benchmarks/quality.py FILE --equal-cost  support and kernel together, each alone, and the paper's estimator,
    each as large as the same multiply-adds per query allow; src/scatterbrain/analysis/cost.py has the formula
    python benchmarks/quality.py FILE --equal-cost-search  the pairs that gain most on the better of their parts

FILE is a safetensors file of (heads, tokens, head_dim) tensors named `<model>.N<tokens>.layer<l>.{q,k,v}` to measure on
and `<model>.cal.layer<l>.{q,k}` to calibrate on; attention is softmax(q k^T / sqrt(head_dim)) v. Models named lm* are
measured causally. Of models named dino* token 0 is a class token and the rest a square of image patches in raster
order: the patches are put in Hilbert order, the class token last.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

import scatterbrain as sb
from scatterbrain.analysis.cost import Shape, cost, with_keys_for, with_size_for
from scatterbrain.bench.inputs import calibration_of
from scatterbrain.hilbert import hilbert_order
from scatterbrain.low_rank import LowRankKernel
from scatterbrain.supports import Support


@dataclass
class Layer:
    """One layer of one model, each tensor (1, heads, tokens, head_dim) float32, and stored statistics from other
    inputs.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    statistics: sb.Statistics
    is_causal: bool

    def __post_init__(self) -> None:
        q, k, v = self.q.double(), self.k.double(), self.v.double()
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        self.exact = torch.softmax(scores, -1) @ v

    def error(self, out: Tensor) -> float:
        difference = (out.double() - self.exact).flatten(2).norm(dim=-1)
        return float((difference / self.exact.flatten(2).norm(dim=-1)).mean())


def load(path: str, rank: int, calibration_tokens: int | None) -> dict[str, list[Layer]]:
    """The layers of every model in the file, in ascending order; statistics from the first ``calibration_tokens``."""
    with safe_open(path, "pt") as file:
        names = sorted(
            (m for m in map(re.compile(r"(\w+)\.N\d+\.layer(\d+)\.q").fullmatch, file.keys()) if m),
            key=lambda m: (m[1], int(m[2])),
        )
        if not names:
            raise SystemExit(f"{path}: expected tensors named <model>.N<tokens>.layer<l>.q, found none")
        models: dict[str, list[Layer]] = {}
        for match in names:
            model = match[1]
            q, k, v = (file.get_tensor(f"{match[0][:-1]}{part}").float()[None] for part in "qkv")
            cal = slice(calibration_tokens)
            others = calibration_of(match[0][:-2], file.keys())
            if others is None:
                raise SystemExit(f"{path}: expected {model}.cal.layer{match[2]}.q and .k to calibrate on, found none")
            q_cal, k_cal = (file.get_tensor(f"{others}.{part}").float()[None, :, cal] for part in "qk")
            if model.startswith("dino"):
                side = math.isqrt(q.shape[2] - 1)
                order = torch.cat([1 + hilbert_order(side, side), torch.tensor([0])])
                q, k, v = q[:, :, order], k[:, :, order], v[:, :, order]
            models.setdefault(model, []).append(
                Layer(q, k, v, sb.fit_statistics(q_cal, k_cal, rank), model.startswith("lm"))
            )
    return models


Method = Callable[[Layer], Tensor]
Pair = tuple[Support, LowRankKernel | None]
POOLED, PER_QUERY = {"block_q": 16}, {"block_q": 1, "block_k": 8, "window": 16}


def approximate(layer: Layer, support: Support, low_rank: LowRankKernel | None) -> Tensor:
    stored = isinstance(low_rank, sb.Quadratic) and low_rank.statistics == "stored"
    return sb.attention(
        layer.q,
        layer.k,
        layer.v,
        support,
        low_rank,
        is_causal=layer.is_causal,
        statistics=layer.statistics if stored else None,
    )


def methods(keys: int, rank: int) -> Iterator[tuple[str, bool | None, Method]]:
    """Rows of the table: name, whether it is for causal models only (None: for all), method."""
    quadratic, from_input = sb.Quadratic(rank), sb.Quadratic(rank, statistics="input")
    rows = [
        (f"window {keys}", None, sb.Window(keys), quadratic),
        (f"window {2 * keys}, 4 sinks", None, sb.Window(2 * keys, sinks=4), quadratic),
        ("routed, block_q 16", None, sb.Routed(keys, **POOLED), quadratic),
        ("routed, block_q 8", None, sb.Routed(keys, block_q=8), quadratic),
        ("routed, block_q 16, statistics of the input", False, sb.Routed(keys, **POOLED), from_input),
        (f"routed, block_q 16, {2 * keys} keys", None, sb.Routed(2 * keys, **POOLED), quadratic),
        ("routed per query, blocks of 8, window 16", None, sb.Routed(keys, **PER_QUERY), quadratic),
        ("routed per query, 2 pools", None, sb.Routed(keys, **PER_QUERY, pools=2), quadratic),
        ("routed per query, by sketches", None, sb.Routed(keys, **PER_QUERY, pools=0), quadratic),
        (f"window {keys} + centroid 64", False, sb.Window(keys), sb.Centroid(64)),
        ("routed, block_q 32 + centroid 64", False, sb.Routed(keys, block_q=32), sb.Centroid(64)),
        (
            f"routed, block_q 32, {9 * keys // 8} keys + centroid 64",
            False,
            sb.Routed(9 * keys // 8, block_q=32),
            sb.Centroid(64),
        ),
        ("routed, block_q 16 + centroid 64", False, sb.Routed(keys, **POOLED), sb.Centroid(64)),
        (
            f"routed, block_q 32, {3 * keys // 2} keys, 2 pools + centroid 64",
            False,
            sb.Routed(3 * keys // 2, block_q=32, pools=2),
            sb.Centroid(64),
        ),
        (
            f"routed, block_q 32, {2 * keys} keys, 2 pools + centroid 96",
            False,
            sb.Routed(2 * keys, block_q=32, pools=2),
            sb.Centroid(96),
        ),
        ("quadratic only", None, sb.Empty(), quadratic),
        (f"window {keys} only", None, sb.Window(keys), None),
        ("routed, block_q 16, only", None, sb.Routed(keys, **POOLED), None),
        ("routed per query, only", None, sb.Routed(keys, **PER_QUERY), None),
        ("routed per query, 2 pools, only", None, sb.Routed(keys, **PER_QUERY, pools=2), None),
        ("routed per query, by sketches, only", None, sb.Routed(keys, **PER_QUERY, pools=0), None),
        (f"window {keys} + FAVOR+ 64", None, sb.Window(keys), sb.Favor(64)),
        ("LSH + FAVOR+ 64 (the paper's)", False, *sb.presets.paper(keys)),
        ("LSH + centred FAVOR+ 64", False, sb.LSH(keys), sb.Favor(64, centred=True)),
        ("LSH, angular + centred FAVOR+ 64", False, sb.LSH(keys, hash="angular"), sb.Favor(64, centred=True)),
    ]
    for name, causal, support, low_rank in rows:
        yield name, causal, partial(approximate, support=support, low_rank=low_rank)


def one_stage(layer: Layer, support: sb.Routed, rank: int) -> Tensor:
    """The same lists with every key scored."""
    low_rank = sb.Quadratic(rank)
    inputs = sb.reference.Inputs.of(layer.q, layer.k, low_rank, is_causal=layer.is_causal, statistics=layer.statistics)
    lists = sb.reference.routed_lists(support, inputs, stages=False)
    return approximate(layer, sb.Blocks(*lists, support.block_q, support.block_k), low_rank)


def captured(keys: int, rank: int) -> Iterator[tuple[str, bool | None, Method]]:
    for name, form in (("routed, block_q 16", POOLED), ("routed per query", PER_QUERY)):
        support = sb.Routed(keys, **form)
        yield f"{name}: staged", None, partial(approximate, support=support, low_rank=sb.Quadratic(rank))
        yield f"{name}: every key scored", None, partial(one_stage, support=support, rank=rank)


def print_table(models: dict[str, list[Layer]], rows: Iterable[tuple[str, bool | None, Method]]) -> None:
    print("| " + " | ".join(["error against exact attention", *models]) + " |")
    print("| --- |" + " --- |" * len(models))
    for name, causal, method in rows:
        cells = []
        for layers in models.values():
            fits = causal is None or causal == layers[0].is_causal
            cells.append(f"{sum(layer.error(method(layer)) for layer in layers) / len(layers):.4f}" if fits else "-")
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


# -------------------- equal cost


def together() -> Iterator[tuple[sb.Routed, sb.Centroid]]:
    """Pairs that set the cost: the default, ``quality``, and less error at a higher cost."""
    yield sb.presets.drop_in()
    yield sb.presets.quality()
    yield sb.Routed(160, block_q=8), sb.Centroid(64)


# Of routed lists: blocks of queries with one or two means of keys, and a list per query, by means or by sketches.
FORMS: tuple[dict[str, int], ...] = (
    {"block_q": 32},
    {"block_q": 32, "pools": 2},
    {"block_q": 16},
    {"block_q": 16, "pools": 2},
    {"block_q": 8},
    {"block_q": 8, "pools": 2},
    {"block_q": 1, "block_k": 8, "pools": 2},
    {"block_q": 1, "block_k": 8, "pools": 0},
)


def counterparts(budget: float, shape: Shape, rank: int) -> Iterator[tuple[str, list[Pair]]]:
    """(name, pairs within the budget, the best of which counts): sparse alone, low-rank alone, and the paper's
    estimator, which shares it out between 64 features and as many keys as the rest pays for. No pair: nothing fits."""

    def with_keys(*supports: Support, low_rank: LowRankKernel | None = None) -> list[Pair]:
        fitting = (with_keys_for(budget, support, low_rank, shape) for support in supports)
        return [(support, low_rank) for support in fitting if support is not None]

    yield "sparse only: window", with_keys(sb.Window(1))
    yield "sparse only: LSH", with_keys(sb.LSH(2))
    yield "sparse only: routed", with_keys(*(sb.Routed(32, **form) for form in FORMS))
    for name, of in (
        ("centroid", sb.Centroid()),
        ("quadratic, statistics of the input", sb.Quadratic(rank, "input")),
        ("FAVOR+ (Performer)", sb.Favor()),
        ("FAVOR+, centred and balanced", sb.Favor(centred=True)),
    ):
        kernel = with_size_for(budget, of, shape)
        yield f"low-rank only: {name}", [(sb.Empty(), kernel)] if kernel else []
    lsh, favor = sb.presets.paper()
    for name, kernel in (("FAVOR+", favor), ("centred FAVOR+", replace(favor, centred=True))):
        yield f"the paper's: LSH + {name}", with_keys(lsh, low_rank=kernel)


def size_of(support: Support, low_rank: LowRankKernel | None, spent: float) -> str:
    """Keys, and clusters, features or rank; how much of the budget is left unused, where that is more than a tenth."""
    parts = [f"{support.keys} keys"] if hasattr(support, "keys") else []
    if isinstance(support, sb.Routed):
        pools = {0: ", sketches", 2: ", 2 pools"}.get(support.pools, "")
        parts = [f"{support.keys} keys for {support.block_q} {'query' if support.block_q == 1 else 'queries'}{pools}"]
    parts += [f"{getattr(low_rank, name)} {name}" for name in ("clusters", "features") if hasattr(low_rank, name)]
    parts += [f"rank {low_rank.rank}"] if hasattr(low_rank, "rank") else []
    return ", ".join(parts) + (f" ({spent:.0%} of the cost)" if spent < 0.9 else "")


def mean_error(layers: list[Layer], support: Support, low_rank: LowRankKernel | None) -> float:
    return sum(layer.error(approximate(layer, support, low_rank)) for layer in layers) / len(layers)


def bidirectional(models: dict[str, list[Layer]]) -> dict[str, list[Layer]]:
    found = {name: layers for name, layers in models.items() if not layers[0].is_causal}
    if not found:
        raise SystemExit("equal cost: expected a bidirectional model in the file; its models are all causal (lm*)")
    return found


def shape_of(layers: list[Layer]) -> Shape:
    tokens, head_dim = layers[0].q.shape[-2:]
    return Shape(tokens, tokens, head_dim, layers[0].v.shape[-1])


def print_equal_cost(models: dict[str, list[Layer]], rank: int) -> None:
    """A table for each pair: how large every method is and its error, and how many times the pair's error that is."""
    models = bidirectional(models)
    for support, low_rank in together():
        heading, table = [], {}
        for model, layers in models.items():
            shape = shape_of(layers)
            budget, error = cost(support, low_rank, shape).total, mean_error(layers, support, low_rank)
            heading += [f"{model}, {shape.queries} tokens: {budget:,.0f} multiply-adds", "error"]
            table.setdefault("both", []).append(f"{size_of(support, low_rank, 1)} | **{error:.4f}**")
            for name, pairs in counterparts(budget, shape, rank):
                cell = "- | -"
                if pairs:
                    errors = [mean_error(layers, *pair) for pair in pairs]
                    theirs = min(errors)
                    best = pairs[errors.index(theirs)]
                    spent = cost(*best, shape).total / budget
                    cell = f"{size_of(*best, spent)} | {theirs:.4f}, {theirs / error:.1f} times"
                table.setdefault(name, []).append(cell)
        print("| " + " | ".join([f"{support} + {low_rank}", *heading]) + " |")
        print("| --- |" + " --- |" * len(heading))
        for name, cells in table.items():
            print("| " + " | ".join([name, *cells]) + " |", flush=True)
        print()


BEST = 3  # pairs of a model that the search shows


def print_equal_cost_search(models: dict[str, list[Layer]]) -> None:
    """Of all pairs of routed lists and clusters, those whose parts alone, the lists in every form, err the most times
    more at no more cost. A pair costs at most what the longest lists do, of 512 keys or all."""
    print("| tokens | pair | multiply-adds | error | lists alone | error | clusters alone | error |")
    print("| --- |" + " --- |" * 7)
    for model, layers in bidirectional(models).items():
        shape = shape_of(layers)
        tokens = shape.queries
        every = range(32, min(tokens, 512) + 1, 16)
        sizes = [keys for keys in every if keys % 32 == 0 and keys < 400]
        lists = [sb.Routed(keys, **form) for form in FORMS for keys in every]
        clusters = [sb.Centroid(count) for count in (16, 32, 64, 96, 128, 192, 256)]

        def measured(pairs: Iterable[Pair], title: str) -> list[tuple[float, float, Pair]]:
            """(multiply-adds, error, pair)"""
            pairs = list(pairs)
            return [
                (cost(*pair, shape).total, mean_error(layers, *pair), pair)
                for pair in tqdm(pairs, desc=f"{model}: {title}", leave=False)
            ]

        alone = measured(((support, None) for support in lists), "lists alone")
        low_rank = measured(((sb.Empty(), kernel) for kernel in clusters), "clusters alone")
        pairs = [(sb.Routed(keys, **form), kernel) for form in FORMS for keys in sizes for kernel in clusters]
        # A pair that costs more than the longest lists alone would win by default.
        ceiling = min(cost(sb.Routed(every[-1], **form), None, shape).total for form in FORMS)
        both = measured((pair for pair in pairs if cost(*pair, shape).total <= ceiling), "pairs")

        def rivals(budget: float) -> list[tuple[float, float, Pair]]:
            """The best of each part alone."""
            within = ([row for row in rows if row[0] <= budget] for rows in (alone, low_rank))
            return [min(rows, key=lambda row: row[1]) for rows in within if rows]

        gains = []
        for budget, error, pair in both:
            found = rivals(budget)
            if len(found) == 2:
                gains.append((min(row[1] for row in found) / error, budget, error, pair))
        for _, budget, error, pair in sorted(gains, key=lambda row: -row[0])[:BEST]:
            cells = [f"{model}, {tokens}", size_of(*pair, 1), f"{budget:,.0f}", f"**{error:.4f}**"]
            for _, theirs, other in rivals(budget):
                cells += [size_of(*other, 1), f"{theirs:.4f}, {theirs / error:.1f} times"]
            print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="safetensors file of queries, keys and values")
    parser.add_argument("--keys", type=int, default=64, help="keys per query (default 64)")
    parser.add_argument("--rank", type=int, default=9, help="rank of the quadratic kernel (default 9)")
    parser.add_argument("--calibration-tokens", type=int, help="of the calibration inputs (default all)")
    parser.add_argument("--only", default="", help="only rows whose name holds this text, such as centroid")
    parser.add_argument("--captured", action="store_true", help="also compare the staged search with scoring every key")
    parser.add_argument("--equal-cost", action="store_true", help="only compare methods of equal cost")
    parser.add_argument("--equal-cost-search", action="store_true", help="only search for the pairs that gain most")
    options = parser.parse_args()
    models = load(options.file, options.rank, options.calibration_tokens)
    with torch.inference_mode():
        if options.equal_cost:
            return print_equal_cost(models, options.rank)
        if options.equal_cost_search:
            return print_equal_cost_search(models)
        rows = [row for row in methods(options.keys, options.rank) if options.only in row[0]]
        if not rows:
            names = ", ".join(row[0] for row in methods(options.keys, options.rank))
            raise SystemExit(f"--only: expected a part of a row's name, got {options.only!r}; the rows are: {names}")
        print_table(models, rows)
        if options.captured:
            print()
            print_table(models, captured(options.keys, options.rank))


if __name__ == "__main__":
    main()
