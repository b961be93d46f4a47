"""Pictures of comparisons and of tuning."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import testkit
import torch
from testkit import ROOT

import scatterbrain as sb
from scatterbrain.analysis import Comparison
from scatterbrain.analysis.tuning import EXACT, Step, Tuning

matplotlib = pytest.importorskip("matplotlib")


def compared(**inputs: torch.Tensor) -> Comparison:
    return sb.compare(testkit.encoder(32, 2).eval(), inputs, {"window": (sb.Window(16), None)}, repeats=1)


def test_windows_and_the_backend_of_the_user_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook pictures would no longer appear."""
    monkeypatch.setattr(matplotlib, "use", lambda *_: pytest.fail("another backend"))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    compared(src=torch.randn(1, 60, 32)).draw(tmp_path / "c.png")
    exact, step = Step({"a": EXACT}, 2.0, 0.0, 0.0), Step({"a": (sb.Window(8), None)}, 1.0, 0.1, 0.1)
    Tuning("Model", step, [exact, step], step, 2.0, "error at most 0.2", 0.2).draw(tmp_path / "t.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("c.png", "t.png"))


@pytest.mark.parametrize("word", ["pyplot", "matplotlib.use"])
def test_no_picture_is_made_with_the_users_windows(word: str) -> None:
    files = sorted((ROOT / "src").rglob("*.py"))
    assert files and [file.name for file in files if word in file.read_text(encoding="utf-8")] == []
