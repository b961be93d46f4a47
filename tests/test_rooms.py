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
    """Source of the expressions that ask for the class of a support or kernel: isinstance, issubclass, a comparison
    with type(x) or x.__class__, a class pattern."""
    aliases = {a.asname: a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}

    def names(nodes: list[ast.AST]) -> set[str]:
        within = [n for node in nodes for n in ast.walk(node)]
        found = {n.id for n in within if isinstance(n, ast.Name)} | {
            n.attr for n in within if isinstance(n, ast.Attribute)
        }
        return {aliases.get(name, name) for name in found}

    questions = []
    for node in ast.walk(tree):
        asked: list[ast.AST] = []
        if isinstance(node, ast.Call) and names([node.func]) & {"isinstance", "issubclass"}:
            asked = node.args[1:]
        elif isinstance(node, ast.Compare) and names([node]) & {"type", "__class__"}:
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchClass):
            asked = [node.cls]
        if names(asked) & CLASSES:
            questions.append(ast.unparse(node))
    return questions


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_outside_the_rooms_asks_for_the_class(path: Path) -> None:
    assert class_questions(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(x, sb.Window)",
        "isinstance(x, (Routed, int))",
        "issubclass(x, Support)",
        "type(x) is Quadratic",
        "type(x) is not Quadratic",
        "type(x) in (Full, Empty)",
        "x.__class__ == Favor",
    ],
)
def test_such_a_question_would_be_found(code: str) -> None:
    assert class_questions(ast.parse(code)) == [code]


def test_class_patterns_and_other_names_of_a_class_would_be_found() -> None:
    assert class_questions(ast.parse("match x:\n    case Window(keys=8): pass")) == ["Window(keys=8)"]
    code = "from scatterbrain.supports import Window as W\nisinstance(x, W)"
    assert class_questions(ast.parse(code)) == ["isinstance(x, W)"]
