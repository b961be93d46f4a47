"""The definition shares no code with what it judges."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from testkit import leaves, qkv, run_python
from torch.utils._python_dispatch import TorchDispatchMode

import scatterbrain as sb

FOLDER = Path(sb.reference.__file__).parent
PAGES = sorted(FOLDER.rglob("*.py"))
DATA_CLASSES = {
    "scatterbrain.supports": {"Full", "Empty", "Window", "Routed", "LSH", "Blocks"},
    "scatterbrain.low_rank": {
        *("Quadratic", "Favor", "Centroid", "Features"),
        *("Statistics", "Projections", "RandomFeatures", "Clusters"),
    },
}


def imported(page: Path) -> list[tuple[str, str]]:
    """(module, name) of everything that a page imports."""
    found = []
    for node in ast.walk(ast.parse(page.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{page.name}: name the module in full"
            found += [(node.module, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_imports_torch_and_the_data_classes_alone(page: Path) -> None:
    for module, name in imported(page):
        top = module.partition(".")[0]
        if top == "scatterbrain" and not module.startswith("scatterbrain.reference"):
            assert name in DATA_CLASSES.get(module, ()), f"{page.name} imports {name} of {module}"
        else:
            assert top in sys.stdlib_module_names | {"torch", "scatterbrain"}, f"{page.name} imports {module}"
    assert "torch.ops" not in page.read_text()


# The package's other modules do not exist here: only classes with the fields of the data classes, and without methods.
ALONE = """
import dataclasses, sys, types
import torch

def module(name, **classes):
    made = sys.modules[name] = types.ModuleType(name)
    for owner, fields in classes.items():
        setattr(made, owner, dataclasses.make_dataclass(owner, fields.split(), frozen=True, eq=False))
    return made

module("scatterbrain").__path__ = [{folder!r}]
supports = module("scatterbrain.supports", Full="", Empty="", Window="keys",
                  Routed="keys block_q block_k window sinks pools",
                  LSH="keys rounds hash seed", Blocks="index count block_q block_k query_order")
supports.Window = dataclasses.make_dataclass("Window", ["keys", ("block_q", int, 16), ("sinks", int, 0)])
low_rank = module("scatterbrain.low_rank", Favor="features orthogonal hyperbolic redraw seed centred",
                  Statistics="query_projection query_mean key_projection key_mean scale",
                  Projections="query_projection query_bias query_log_scale key_projection key_bias",
                  RandomFeatures="projection", Centroid="clusters", Features="query_features key_features",
                  Clusters="index representatives log_mass query_mean scale")
low_rank.Quadratic = dataclasses.make_dataclass("Quadratic", [("rank", int, 9), ("statistics", str, "stored")])

from scatterbrain import reference

torch.manual_seed(0)
query, key, value = torch.randn(3, 2, 2, 60, 8)
mask = torch.rand(2, 60) < 0.2
stored = reference.fit_statistics(query, key, 3, mask)
clusters = reference.cluster(query, key, 8, mask)
drawn = low_rank.RandomFeatures(torch.randn(16, 8))
lists = supports.Blocks(torch.zeros(2, 2, 4, 1).int(), torch.ones(2, 2, 4).int(), 16, 8, None)
checked = 0
for support in (supports.Full(), supports.Empty(), supports.Window(16), supports.Routed(24, 16, 1, 0, 0, 1),
                supports.Routed(24, 1, 8, 8, 0, 1), supports.LSH(16, 2, "e2lsh", 0), lists):
    for kernel, statistics in ((low_rank.Quadratic(3), stored), (low_rank.Quadratic(3, "input"), None),
                               (low_rank.Favor(16, True, False, None, 0, False), None),
                               (low_rank.Favor(16, True, False, None, 0, True), drawn), (low_rank.Centroid(8), None),
                               (low_rank.Centroid(8), clusters), (low_rank.Features(torch.exp, None), None),
                               (lambda q, k: torch.exp(q @ k.transpose(-1, -2)), None), (None, None)):
        if isinstance(kernel, types.FunctionType) and isinstance(support, supports.Routed):
            continue  # a dense kernel has no coordinates to route by
        out = reference.attention(query, key, value, support, kernel, mask, statistics=statistics)
        assert out.shape == value.shape and out.isfinite().all()
        assert kernel is None or out[~mask[:, None].expand(2, 2, 60)].ne(0).all()
        checked += 1
    for statistics in (None, clusters, stored):
        assert reference.attention(query, key, value, support, ..., mask, statistics=statistics).isfinite().all()
        assert reference.mask(support, query, key, ..., mask, statistics=statistics).shape == (2, 2, 60, 60)
others = [name for name in sys.modules if name.startswith("scatterbrain.") and "reference" not in name]
assert sorted(others) == ["scatterbrain.low_rank", "scatterbrain.supports"], others
print(checked)
"""


def test_it_runs_where_nothing_else_of_the_package_exists() -> None:
    """It reads the fields of the data classes and calls none of their methods."""
    program = ALONE.format(folder=str(FOLDER.parent))
    result = run_python("-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "61\n"


class NoOperators(TorchDispatchMode):
    def __torch_dispatch__(
        self, operator: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        assert operator.namespace != "scatterbrain", f"the definition calls {operator}"
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "low_rank", [None, sb.Quadratic(3), sb.Quadratic(3, "input"), sb.Favor(8), sb.Centroid(8)], ids=str
)
@pytest.mark.parametrize(
    "support",
    [sb.Full(), sb.Empty(), sb.Window(16), sb.Routed(24), sb.Routed(24, 1, 8, 8), sb.LSH(16)],
    ids=lambda support: type(support).__name__,
)
def test_it_calls_no_operator_of_the_package(support: object, low_rank: object) -> None:
    tokens = leaves(qkv(40, batch=1, kv_heads=2))
    with NoOperators():
        stored = low_rank == sb.Quadratic(3)
        statistics = sb.reference.fit_statistics(*tokens[:2], 3) if stored else None
        out = sb.reference.attention(*tokens, support, low_rank, statistics=statistics)
        torch.autograd.grad(out.sum(), tokens)
