"""benchmarks/device.sh and device.py: what they would do on a GPU, through the emulator."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from testkit import ROOT, environment

SCRIPT = ROOT / "benchmarks" / "device.sh"
if not SCRIPT.exists():
    pytest.skip("needs the source tree, not only the installed package", allow_module_level=True)


@pytest.fixture(scope="module")
def device() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the script's Python parts."""
    sys.path.append(str(SCRIPT.parent))  # which processes that it starts get too
    try:
        yield lambda name: importlib.import_module(f"device_{name}")
    finally:
        sys.path.remove(str(SCRIPT.parent))


def run_script(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    changes = {"PYTHON": sys.executable} | changes
    command = ["bash", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**changes), check=False)


# -------------------- the script


def test_the_script_runs_its_steps_and_ends_with_the_table(tmp_path: Path, emulator: object) -> None:
    steps = ["--steps", "facts,table", "--lengths", "20", "--budget", "200"]
    run = run_script("--device", "emulator", *steps, OUT=str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert "device.sh: every step that ran passed" in lines and lines[-1].startswith("written: ")
    shown = lines[next(i for i, line in enumerate(lines) if line.startswith("facts     passed")) :]
    assert len(shown) <= 43 and sum(line.startswith("  window-16 ") for line in shown) == 4
    found = json.loads((tmp_path / "device.json").read_text())
    assert [step[:2] for step in found["steps"]] == [["facts", "passed"], ["table", "passed"]]
    assert len(found["table"]["settings"]) == 4 and not found["table"]["left_out"]
    rows = [row for setting in found["table"]["settings"] for row in setting["rows"]]
    assert all(row["seconds"] > 0 and row["repeats"] >= 3 for row in rows)
    assert "== table" in (tmp_path / "device.log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device.json", "device.log"]


def test_a_step_without_time_is_left_out_and_said(tmp_path: Path) -> None:
    run = run_script("--device", "emulator", "--steps", "facts,table", "--budget", 1, "--out", tmp_path)
    assert run.returncode == 1
    assert "left out: no time left" in run.stdout and "device.sh: NOT every step passed" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon"], "--budget: expected a number of seconds, got 'soon'"),
        (["--steps", "facts,tables"], "--steps: expected some of facts build smoke tests sanitizer table counters"),
        (["--lengths", "1k"], "--lengths: expected numbers with commas between, got '1k'"),
        (["--device", "tpu"], "--device: expected cuda or emulator, got 'tpu'"),
        (["--budget"], "--budget needs a value"),
        (["--fast"], "unknown option --fast"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str) -> None:
    run = run_script(*arguments)
    assert run.returncode == 2 and message in run.stderr and not run.stdout


def test_help_names_every_step_and_option() -> None:
    run = run_script("--help")
    assert run.returncode == 0
    for word in ("facts", "build", "smoke", "tests", "sanitizer", "table", "counters", "--budget", "--out"):
        assert word in run.stdout


# -------------------- smoke


def test_every_operator_is_smoked_and_most_paths_are_of_attention(device) -> None:
    smoke, table = device("smoke"), device("table")
    names = [smoke.path_name(path) for path in smoke.paths(64)]
    assert len(names) == len(set(names)) >= 60
    assert {"project", "project_packed", "project_backward", "cluster", "route"} <= set(names)
    for is_causal, methods in table.METHODS.items():  # what is timed can be looked up
        for method in methods:
            passed = {name: {"passed": True} for name in names}
            assert table.is_right(passed, method.format(64), is_causal, "F+B")


@pytest.mark.parametrize("index", range(0, 60, 7))
def test_paths_agree_with_the_cpu(device, emulator: object, index: int) -> None:
    smoke = device("smoke")
    path = list(smoke.paths(16))[index]
    assert smoke.smoke_of(smoke.Machine("emulator"), **path)["passed"]


def test_a_wrong_path_does_not_pass_and_is_not_timed(device, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = device("smoke")
    right = smoke.OPERATORS["project"]
    monkeypatch.setitem(
        smoke.OPERATORS,
        "project",
        lambda machine, dtype, place: [
            t * (1.01 if dtype == smoke.torch.float32 else 1) for t in right(machine, dtype, place)
        ],
    )
    assert not smoke.smoke_of(smoke.Machine("emulator"), "project")["passed"]
    assert not device("table").is_right({"window-64+quadratic, F": {"passed": False}}, "window-64", False, "F")


# -------------------- jobs in another process


def test_a_job_that_fails_or_hangs_is_noted_and_the_next_one_runs(device) -> None:
    worker = device("worker").Worker("emulator")
    try:
        assert "KeyError" in worker.ask("no such job", 60)["error"]
        assert worker.ask("ceilings", 0.0) == {"error": "stopped: it took too long"}
        assert worker.ask("ceilings", 60)["copy_terabytes_per_second"] > 0
    finally:
        worker.close()
