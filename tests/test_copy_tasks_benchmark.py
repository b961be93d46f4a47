"""benchmarks/copy_tasks.py: what its two tasks show and hide."""

from __future__ import annotations

import runpy
import sys

import pytest
from testkit import ROOT

SCRIPT = ROOT / "benchmarks" / "copy_tasks.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree, not only the installed package")


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ("masked --attention window per-query-centroid", ["window", "per-query-centroid"]),
        ("causal --attention window", ["window"]),
    ],
)
def test_it_prints_a_perplexity_for_each_attention_and_seed(
    arguments: str, rows: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split(), "--steps", "1", "--seeds", "0"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[::2]] == rows
    assert all(20 < float(line.split("perplexity ")[1].split(",")[0]) < 300 for line in lines[1::2])


def test_a_kernel_that_reads_the_future_is_refused_in_causal_copy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--attention", "centroid"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2 and "expected any of train, full, window in causal copy" in capsys.readouterr().err
