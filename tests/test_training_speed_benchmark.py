"""benchmarks/training_speed.py: a small run prints every figure."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
from testkit import ROOT

SCRIPT = ROOT / "benchmarks" / "training_speed.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree, not only the installed package")


def test_it_states_the_share_of_the_bound_that_a_step_reaches(monkeypatch, capsys):
    arguments = "--tokens 256 --width 32 --heads 2 --layers 1 --keys 32 --steps 1"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split()])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    text = capsys.readouterr().out
    rows = re.findall(r"^(exact|scatterbrain) +\d+ +\d+ +([\d,]+) MiB$", text, re.MULTILINE)
    assert [name for name, _ in rows] == ["exact", "scatterbrain"]
    times, reached, share, bound = (
        float(re.search(pattern, text)[1])
        for pattern in (r"([\d.]+) times as fast\n", r"step: ([\d.]+) times", r"(\d+) % of", r"bound of ([\d.]+)")
    )
    assert times > 0 and share == pytest.approx(100 * reached / bound, rel=0.05)
