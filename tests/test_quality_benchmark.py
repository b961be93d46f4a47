"""benchmarks/quality.py --equal-cost and --equal-cost-search: sizes, costs and errors of their tables."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from testkit import ROOT, rand

import scatterbrain as sb
from scatterbrain.analysis.cost import Shape, cost, with_keys_for

pytest.importorskip("safetensors")
SCRIPT = ROOT / "benchmarks" / "quality.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree, not only the installed package")
TOKENS, D = 400, 32


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def layers(quality: ModuleType, is_causal: bool = False) -> dict[str, list[object]]:
    q, k, v = (2 * rand(1, 2, TOKENS, D, seed=seed) for seed in range(3))
    return {"model": [quality.Layer(q, k, v, sb.fit_statistics(q, k, 5), is_causal)]}


def test_no_method_of_the_table_costs_more_than_the_pair(quality: ModuleType) -> None:
    """And none could be larger by a block of its keys or a part of its features."""
    shape = Shape(TOKENS, TOKENS, D, D)
    for support, low_rank in quality.together():
        budget = cost(support, low_rank, shape).total
        found = list(quality.counterparts(budget, shape, rank=5))
        assert len(found) == 9 and all(pairs for _, pairs in found)
        for name, pairs in found:
            for other, kernel in pairs:
                spent = cost(other, kernel, shape).total
                assert spent <= budget and (spent > 0.9 * budget or kernel == sb.Centroid(256)), name


def lines_of_the_default(
    quality: ModuleType,
    models: dict[str, list[object]],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """The table of equal cost whose pair is the default."""
    monkeypatch.setattr(quality, "together", lambda: [sb.presets.drop_in()])
    with torch.inference_mode():
        quality.print_equal_cost(models, rank=5)
    return capsys.readouterr().out.strip().splitlines()


def test_the_table_has_the_error_of_every_method_and_how_many_times_the_pairs_it_is(
    quality: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = layers(quality)
    head, _, both, *others = lines_of_the_default(quality, models, capsys, monkeypatch)
    (layer,) = models["model"]
    error = layer.error(sb.attention(layer.q, layer.k, layer.v, *sb.presets.drop_in()))
    assert f"{cost(*sb.presets.drop_in(), Shape(TOKENS, TOKENS, D, D)).total:,.0f} multiply-adds" in head
    assert f"72 keys for 32 queries, 64 clusters | **{error:.4f}**" in both
    window = next(line for line in others if line.startswith("| sparse only: window"))
    keys = int(window.split("|")[2].split()[0])
    alone = layer.error(sb.attention(layer.q, layer.k, layer.v, sb.Window(keys), None))
    assert window.endswith(f"| {alone:.4f}, {alone / error:.1f} times |")


def test_lists_alone_have_the_form_that_errs_least(
    quality: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = layers(quality)
    rows = lines_of_the_default(quality, models, capsys, monkeypatch)
    (line,) = (row for row in rows if row.startswith("| sparse only: routed"))
    with torch.inference_mode():
        shape = Shape(TOKENS, TOKENS, D, D)
        budget = cost(*sb.presets.drop_in(), shape).total
        alone = [with_keys_for(budget, sb.Routed(32, **form), None, shape) for form in quality.FORMS]
        errors = [models["model"][0].error(quality.approximate(models["model"][0], one, None)) for one in alone]
    assert f"| {min(errors):.4f}, " in line
    best = alone[errors.index(min(errors))]
    assert f"| {best.keys} keys for {best.block_q} " in line


def test_the_search_shows_pairs_whose_parts_cost_no_more(
    quality: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "FORMS", ({"block_q": 32}, {"block_q": 1, "block_k": 8, "pools": 0}))
    models = layers(quality)
    with torch.inference_mode():
        quality.print_equal_cost_search(models)
        head, _, *rows = capsys.readouterr().out.strip().splitlines()
        assert len(rows) == quality.BEST and head.count("|") == rows[0].count("|")
        gains = []
        for row in rows:
            _, of, pair, budget, error, listed, by_lists, clustered, by_clusters, _ = map(str.strip, row.split("|"))
            assert of == f"model, {TOKENS}"
            form = {"block_q": 32} if "32 queries" in pair else {"block_q": 1, "block_k": 8, "pools": 0}
            both = sb.Routed(int(pair.split()[0]), **form), sb.Centroid(int(pair.split()[-2]))
            shape = Shape(TOKENS, TOKENS, D, D)
            assert f"{cost(*both, shape).total:,.0f}" == budget
            assert error == f"**{models['model'][0].error(quality.approximate(models['model'][0], *both)):.4f}**"
            form = {"block_q": 32} if "32 queries" in listed else {"block_q": 1, "block_k": 8, "pools": 0}
            assert cost(sb.Routed(int(listed.split()[0]), **form), None, shape).total <= float(budget.replace(",", ""))
            assert cost(sb.Empty(), sb.Centroid(int(clustered.split()[0])), shape).total <= float(
                budget.replace(",", "")
            )
            least = min(float(cell.split(",")[0]) for cell in (by_lists, by_clusters))
            gains.append(least / float(error.strip("*")))
        assert gains == sorted(gains, reverse=True)


def test_a_file_of_causal_models_is_refused(quality: ModuleType) -> None:
    with pytest.raises(SystemExit, match="equal cost: expected a bidirectional model"):
        quality.print_equal_cost(layers(quality, is_causal=True), rank=5)
