"""benchmarks/finetune.py runs from its arguments alone, and goes on where it was."""

from __future__ import annotations

import json
import runpy
import sys
import zipfile
from pathlib import Path

import pytest
from testkit import ROOT

np = pytest.importorskip("numpy")
pytest.importorskip("tqdm")
SCRIPT = ROOT / "benchmarks" / "finetune.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree, not only the installed package")


def images(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    arrays = {f"x_{part}": draw.integers(0, 256, (n, 32, 32, 3), np.uint8) for part, n in (("train", 8), ("test", 6))}
    labels = {f"y_{part}": draw.integers(0, 10, n, np.uint8) for part, n in (("train", 8), ("test", 6))}
    np.savez(folder / "images.npz", **arrays, **labels)
    return folder / "images.npz"


def texts(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "texts.zip", "w") as archive:
        for label in ("neg", "pos"):
            for i in range(5):
                archive.writestr(f"reviews/{label}/{i}.txt", f"{label} " * (40 + 60 * i))
    return folder / "texts.zip"


@pytest.mark.parametrize(("task", "data"), [("images", images), pytest.param("text", texts, marks=pytest.mark.slow)])
def test_it_prints_accuracies_and_does_not_repeat_itself(
    task: str, data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    call = [str(SCRIPT), task, str(data(tmp_path)), "--out", str(tmp_path / "out"), "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", [*call, "--steps", "1", "--finetune-steps", "1"])
    monkeypatch.setattr(sys, "path", sys.path[:])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    keys = "32 keys" if task == "images" else "64 keys"
    swaps = [[f"{keys} + {kernel}", "its lists alone"] for kernel in ("centroid", "quadratic")]
    assert [line.split("  before")[0].strip() for line in lines[1:]] == ["exact", *swaps[0], *swaps[1]]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results) == 8 and all(0 <= value <= 100 for value in results.values())
    (tmp_path / "out" / "results.json").write_text(json.dumps({name: 12.5 for name in results}))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert all("before 12.50" in line for line in capsys.readouterr().out.splitlines()[1:])


def test_results_of_other_options_are_not_taken_for_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    data, out = images(tmp_path), tmp_path / "out"

    def run(*more: str, file: Path = data) -> dict[str, float]:
        call = [str(SCRIPT), "images", str(file), "--out", str(out), "--seeds", "0", "--low-rank", "centroid"]
        monkeypatch.setattr(sys, "argv", [*call, "--finetune-steps", "1", *more])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return json.loads((out / "results.json").read_text())

    first = run("--steps", "1")
    other_rate = run("--steps", "1", "--rate", "0.4")
    assert first.items() < other_rate.items() and len(other_rate) == len(first) + 2
    with pytest.raises(SystemExit, match="expected results of the same steps, 1, got 2; choose another --out"):
        run("--steps", "2")
    (out / "options.json").rename(tmp_path / "options.json")
    with pytest.raises(SystemExit, match="out: expected options.json beside results.json, .*; remove the folder, or"):
        run("--steps", "1")
    (tmp_path / "options.json").rename(out / "options.json")
    (tmp_path / "more").mkdir()
    others = images(tmp_path / "more")
    with np.load(others) as arrays:
        np.savez(others, **dict(arrays) | {"y_test": (arrays["y_test"] + 1) % 10})
    with pytest.raises(SystemExit, match="expected results of the same data"):
        run("--steps", "1", file=others)


def test_centroid_is_swapped_in_without_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import scatterbrain

    def refuse(*_: object):
        raise AssertionError("the centroid kernel has nothing to calibrate")

    monkeypatch.setattr(scatterbrain, "calibrate", refuse)
    monkeypatch.setattr(sys, "path", sys.path[:])
    call = [str(SCRIPT), "images", str(images(tmp_path)), "--out", str(tmp_path / "out"), "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", [*call, "--steps", "1", "--finetune-steps", "1", "--low-rank", "centroid"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [name for name in results if "quadratic" in name] == [] and len(results) == 5
