"""What a support or a low-rank kernel is, its own room alone asks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import scatterbrain
from scatterbrain.low_rank import LOW_RANK_KERNELS
from scatterbrain.supports import SUPPORTS

PACKAGE = Path(scatterbrain.__file__).parent
ROOMS = ("supports", "low_rank")
CLASSES = {cls.__name__ for cls in (*SUPPORTS.values(), *LOW_RANK_KERNELS.values())}
CLASSES |= {"Support", "SUPPORTS", "LowRankKernel", "LOW_RANK_KERNELS", "Coefficients", "Statistics", "Projections"}
CLASSES |= {"RandomFeatures"}
OUTSIDE = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ROOMS)


def class_questions(tree: ast.AST) -> list[str]:
    """Source of the expressions that ask for the class of a support or kernel: isinstance, issubclass, type(x) is."""
    found = []
    for node in ast.walk(tree):
        asked: list[ast.expr] = []
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            asked = node.args[1:]
        elif isinstance(node, ast.Compare) and any(isinstance(op, (ast.Is, ast.Eq, ast.In)) for op in node.ops):
            sides = (node.left, *node.comparators)
            if any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "type" for n in sides):
                asked = list(sides)
        names = {n.id for a in asked for n in ast.walk(a) if isinstance(n, ast.Name)}
        names |= {n.attr for a in asked for n in ast.walk(a) if isinstance(n, ast.Attribute)}
        if names & CLASSES:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_outside_the_rooms_asks_for_the_class(path: Path) -> None:
    assert class_questions(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    ["isinstance(x, sb.Window)", "isinstance(x, (Routed, int))", "type(x) is Quadratic", "type(x) in (Full, Empty)"],
)
def test_such_a_question_would_be_found(code: str) -> None:
    assert class_questions(ast.parse(code)) == [code]
