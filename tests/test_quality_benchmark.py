"""benchmarks/quality.py --equal-cost: sizes, costs and errors of its table."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from testkit import ROOT, rand

import scatterbrain as sb
from scatterbrain.analysis.cost import Shape, cost

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
        found = list(quality.counterparts(support, budget, shape, rank=5))
        assert len(found) == 9 and all(other is not None for _, other, _ in found)
        for name, other, kernel in found:
            spent = cost(other, kernel, shape).total
            assert spent <= budget and (spent > 0.9 * budget or kernel == sb.Centroid(256)), name


def test_the_table_has_the_error_of_every_method_and_how_many_times_the_pairs_it_is(
    quality: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "together", lambda: [sb.presets.drop_in()])
    models = layers(quality)
    with torch.inference_mode():
        quality.print_equal_cost(models, rank=5)
    head, _, both, *others = capsys.readouterr().out.strip().splitlines()
    (layer,) = models["model"]
    error = layer.error(sb.attention(layer.q, layer.k, layer.v, *sb.presets.drop_in()))
    assert f"{cost(*sb.presets.drop_in(), Shape(TOKENS, TOKENS, D, D)).total:,.0f} multiply-adds" in head
    assert f"72 keys, 64 clusters | **{error:.4f}**" in both
    window = next(line for line in others if line.startswith("| sparse only: window"))
    keys = int(window.split("|")[2].split()[0])
    alone = layer.error(sb.attention(layer.q, layer.k, layer.v, sb.Window(keys), None))
    assert window.endswith(f"| {alone:.4f}, {alone / error:.1f} times |")


def test_a_file_of_causal_models_is_refused(quality: ModuleType) -> None:
    with pytest.raises(SystemExit, match="--equal-cost: expected a bidirectional model"):
        quality.print_equal_cost(layers(quality, is_causal=True), rank=5)
