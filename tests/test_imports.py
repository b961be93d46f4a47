"""The package's import graph, read from its source: no module imports, even inside a function, one that imports it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "scatterbrain"


def module_names() -> dict[str, Path]:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(*nodes: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements in ``nodes``, those inside functions included, those under ``if TYPE_CHECKING`` left out."""
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(*node.orelse)
        else:
            yield from imports(*ast.iter_child_nodes(node))


def imported_modules(statement: ast.Import | ast.ImportFrom, names: dict[str, Path]) -> set[str]:
    """Modules of the package that a statement names. ``from package import module`` counts as ``module`` alone, since
    Python finds a submodule without the names that the package itself defines."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}.intersection(names)
    assert statement.level == 0, f"relative import: {ast.unparse(statement)}"
    paths = (f"{statement.module}.{alias.name}" for alias in statement.names)
    return {path if path in names else statement.module for path in paths}.intersection(names)


def import_graph() -> dict[str, set[str]]:
    names = module_names()
    return {
        name: {m for statement in imports(ast.parse(path.read_text())) for m in imported_modules(statement, names)}
        for name, path in names.items()
    }


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in this order, the first one repeated at the end; None if there are none."""
    done: set[str] = set()

    def visit(name: str, chain: list[str]) -> list[str] | None:
        if name in chain:
            return [*chain[chain.index(name) :], name]
        if name in done:
            return None
        for imported in sorted(graph[name]):
            cycle = visit(imported, [*chain, name])
            if cycle is not None:
                return cycle
        done.add(name)
        return None

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), None)


def test_the_graph_holds_every_way_of_importing():
    names = {name: PACKAGE for name in ("p", "p.a", "p.b")}
    source = """
import p.a
def late():
    from p.b import f
if TYPE_CHECKING:
    from p import hidden
else:
    from p import a, g
"""
    found = [imported_modules(statement, names) for statement in imports(ast.parse(source))]
    assert found == [{"p.a"}, {"p.b"}, {"p.a", "p"}]
    graph = import_graph()
    assert "scatterbrain.nn.attention" in graph["scatterbrain"]
    assert "scatterbrain.bench.runner" in graph["scatterbrain.cli.bench"]  # inside a function


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_no_module_imports_one_that_imports_it():
    assert find_cycle(import_graph()) is None
