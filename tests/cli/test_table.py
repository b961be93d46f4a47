from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from testkit import environment

from scatterbrain.cli import main
from scatterbrain.training.config_files import read_config
from scatterbrain.training.table_task import method_files
from scatterbrain.training.train_step import TrainState

TASK = """\
task: {kind: copy, tokens: 31, symbols: 8}
model: {layers: 1, width: 32, heads: 2}
train: {steps: 3, batch: 2, warmup: 1, threads: 1, validate_every: 2, validation_batches: 1}
"""
METHODS = {
    "full": "{support: full}",
    "window": "{support: {kind: window, keys: 8}, low_rank: none}",
    "routed-quadratic": "{keys: 16, support: {kind: routed, block_q: 1, block_k: 8, window: 8}, low_rank: quadratic}",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of three methods, and one file that is none; the working directory is beside it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "task.yaml").write_text(TASK)
    for name, attention in METHODS.items():
        (path / f"{name}.yaml").write_text(f"extends: task.yaml\nattention: {attention}\n")
    (path / "other.yaml").write_text("train: {steps: 10}\n")
    return path


def rows(text: str) -> list[str]:
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]


def test_it_trains_every_method_with_every_seed_and_writes_the_table(folder, tmp_path, capsys):
    assert main(["table", str(folder), "--seeds", "0", "1", "--until", "1000"]) == 0
    output = tmp_path / "runs" / "tiny"
    text = (output / "table.md").read_text()
    assert rows(text)[1:] == ["full", "window *", "routed-quadratic", "frequencies of the targets"]
    assert "seconds to perplexity 1000" in text and "thread, torch" in text and "± is the standard deviation" in text
    assert text in capsys.readouterr().out
    assert (output / "table.csv").read_text().count("\n") == 5
    assert (output / "table.png").read_bytes().startswith(b"\x89PNG")


def test_methods_and_keys_of_a_run_are_options_and_collecting_starts_nothing(folder, tmp_path, capsys):
    chosen = ["table", str(folder), "--methods", "window", "--seeds", "3", "--output", "out", "--train.steps", "2"]
    assert main([*chosen, "--only-collect"]) == 1
    assert "no run is complete" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main(chosen) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["window-3"]
    assert main([*chosen, "--only-collect"]) == 0
    assert "| 2     | 3" in capsys.readouterr().out
    assert main([*chosen[:-1], "3", "--only-collect"]) == 1, "runs of other settings are no rows"
    assert "window-3 is left out, it has other settings: train.steps: 2 there, 3 now" in capsys.readouterr().out


LANGUAGE = """\
data: {path: text.txt, validation_fraction: 0.3}
model: {layers: 1, width: 32, heads: 2}
train: {steps: 2, batch: 2, context: 32, warmup: 1, threads: 1, validation_batches: 1}
"""


def test_collecting_needs_no_data_and_says_what_it_leaves_out(folder, tmp_path, capsys):
    (folder / "task.yaml").write_text(LANGUAGE)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number:04d}\n" for number in range(100)))
    command = ["table", str(folder), "--seeds", "0", "--methods", "full", "window"]
    assert main(command) == 0
    table = tmp_path / "runs" / "tiny" / "table.md"
    title, before = table.read_text().splitlines()[0], rows(table.read_text())
    text.unlink()
    capsys.readouterr()
    assert main(command) == 1 and "data.path: " in capsys.readouterr().err
    assert main([*command, "--only-collect"]) == 0
    found = table.read_text()
    assert found.splitlines()[0] == title and rows(found)[1:] == ["full", "window"]
    assert before[-1] == "frequencies of the targets"
    assert "without multiply-adds and the guess that reads no input: the data are not here (data.path: " in found
    assert "baseline" not in (tmp_path / "runs" / "tiny" / "table.csv").read_text()
    (tmp_path / "runs" / "tiny" / "window-0" / "data.txt").write_text("something else\n")
    assert main([*command, "--only-collect"]) == 0
    assert "window-0 is left out, it has other settings: data: " in table.read_text()


def test_without_data_rows_are_of_the_data_of_runs_that_are_asked_for(folder, tmp_path, capsys):
    (folder / "task.yaml").write_text(LANGUAGE)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"other line {number:04d}\n" for number in range(100)))
    command = ["table", str(folder), "--seeds", "0", "--methods"]
    assert main([*command, "full", "--train.steps", "1"]) == 0
    text.write_text("".join(f"line {number:04d}\n" for number in range(100)))
    assert main([*command, "window"]) == 0
    table = tmp_path / "runs" / "tiny" / "table.md"
    title = table.read_text().splitlines()[0]
    text.unlink()
    assert main([*command, "full", "window", "--only-collect"]) == 0
    found = table.read_text()
    assert found.splitlines()[0] == title and rows(found)[1:] == ["window"]
    assert "full-0 is left out, it has other settings: train.steps: 1 there, 2 now" in found


def test_a_log_that_cannot_be_read_is_a_note_where_runs_are_collected(folder, tmp_path, capsys):
    command = ["table", str(folder), "--seeds", "0", "--methods", "full", "window"]
    assert main(command) == 0
    log = tmp_path / "runs" / "tiny" / "window-0" / "metrics.jsonl"
    whole = log.read_text()
    log.write_text("nonsense\n" + whole)
    capsys.readouterr()
    assert main([*command, "--only-collect"]) == 0
    text = capsys.readouterr().out
    assert "window-0 is not complete: " in text and "metrics.jsonl, line 1: expected a record" in text
    log.write_text("".join(whole.splitlines(keepends=True)[1:]))
    assert main([*command, "--only-collect"]) == 0
    assert "window-0 is not complete: its log lacks 1 of the steps of its checkpoint" in capsys.readouterr().out


def test_a_run_that_has_taken_no_step_is_said_to_be_so(folder, tmp_path, capsys):
    assert main(["table", str(folder), "--seeds", "0", "--methods", "full"]) == 0
    assert main(["table", str(folder), "--seeds", "0", "1", "--methods", "full", "--only-collect"]) == 0
    assert "full-1 is not complete: it has taken no step yet" in capsys.readouterr().out
    assert main(["table", str(folder), "--seeds", "1", "--methods", "full", "--train.steps", "2"]) == 0
    capsys.readouterr()
    log = tmp_path / "runs" / "tiny" / "full-1"
    for name in ("checkpoint.safetensors", "best.safetensors"):
        (log / name).unlink()
    options = ["--methods", "full", "--only-collect", "--train.steps", "2"]
    assert main(["table", str(folder), "--seeds", "1", *options]) == 1
    assert capsys.readouterr().out.endswith("full-1 is not complete\n")


def test_the_title_is_the_folder_s_name_also_from_inside(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["table", ".", "--seeds", "0", "--methods", "full", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "table.md").read_text().startswith("# tiny: ")


def test_the_output_may_be_in_the_user_s_own_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main(["table", str(folder), "--seeds", "0", "--methods", "full", "--output", "~/out"]) == 0
    assert (tmp_path / "home" / "out" / "full-0" / "checkpoint.safetensors").exists()
    assert (tmp_path / "home" / "out" / "table.md").exists() and not (tmp_path / "~").exists()


def test_a_stop_says_the_command_that_goes_on(folder, monkeypatch, capsys):
    original = TrainState.step

    def step(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(TrainState, "step", step)
    assert main(["table", str(folder), "--seeds", "0", "--methods", "full", "window"]) == 143
    errors = capsys.readouterr().err
    assert f"go on with: scatterbrain table {folder} --seeds 0 --methods full window" in errors


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_table_whose_output_nobody_reads_any_more_stops_and_goes_on(folder, tmp_path, jobs):
    arguments = ["table", str(folder), "--seeds", "0", "1", "--train.steps", "100", "--jobs", str(jobs)]
    command = [sys.executable, "-m", "scatterbrain", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment(), cwd=tmp_path, **pipes)
    assert "runs to do" in process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=120)
    errors = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE, errors
    assert "stopped by SIGPIPE: nobody reads what it prints any more; " in errors
    assert f"go on with: scatterbrain {' '.join(arguments)}" in errors and "Broken pipe" not in errors
    assert not list((tmp_path / "runs" / "tiny").glob("*.failure.txt"))


class Closed(io.StringIO):
    """A stream behind which nobody reads any more: a pipe, or the terminal of a window that was closed."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str = "") -> int:
        raise OSError(self.number, os.strerror(self.number))

    flush = write


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_a_table_is_written_also_where_nobody_reads_it(folder, tmp_path, monkeypatch, number):
    command = ["table", str(folder), "--seeds", "0", "--methods", "full"]
    assert main(command) == 0
    table = tmp_path / "runs" / "tiny" / "table.md"
    table.unlink()
    monkeypatch.setattr(sys, "stdout", Closed(number))
    assert main([*command, "--only-collect"]) == 0 and table.exists()


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_a_failure_that_nobody_reads_is_noted_and_stops_the_table(folder, tmp_path, monkeypatch, number):
    def step(self, *arguments):
        monkeypatch.setattr(sys, "stdout", Closed(number))
        monkeypatch.setattr(sys, "stderr", Closed(number))
        raise RuntimeError("a fault of the model")

    monkeypatch.setattr(TrainState, "step", step)
    assert main(["table", str(folder), "--seeds", "0", "--methods", "full", "window"]) == 128 + signal.SIGPIPE
    runs = tmp_path / "runs" / "tiny"
    assert (runs / "full-0.failure.txt").read_text() == "RuntimeError: a fault of the model\n"
    assert (runs / "table.md").exists() is False and not (runs / "window-0.failure.txt").exists()


def test_a_run_that_cannot_start_fails_alone_and_the_exit_code_says_so(folder, tmp_path, capsys):
    broken = tmp_path / "runs" / "tiny" / "window-0"
    broken.mkdir(parents=True)
    (broken / "checkpoint.safetensors").write_text("nothing of the kind")
    assert main(["table", str(folder), "--seeds", "0", "--methods", "window", "full"]) == 1
    text = capsys.readouterr().out
    assert "window-0 failed: " in text and "expected a checkpoint of scatterbrain train" in text
    assert "full" in rows(text) and "window-0 failed: " in (tmp_path / "runs" / "tiny" / "table.md").read_text()


def test_attention_that_cannot_be_built_is_refused_by_its_method_before_any_run(folder, tmp_path, capsys):
    (folder / "window.yaml").write_text("extends: task.yaml\nattention: {support: {kind: window, keys: 0}}\n")
    assert main(["table", str(folder), "--seeds", "0", "--methods", "full"]) == 1
    assert "window: attention.support: Window: keys must be" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lsh"], "--methods: expected some of full, window, routed-quadratic, got 'lsh'"),
        (["--jobs", "0"], "--jobs: expected 1 or more, got 0"),
        (["--seeds", "-1"], "--seeds: expected 0 or more, got -1"),
        (["--train.seed", "5"], "--train.seed: the table sets this key of every run"),
        (["--output=x", "--resume=true"], "--resume: the table sets this key of every run"),
        (["--train.batch", "0"], "full: train.batch: expected positive, got 0"),
    ],
)
def test_a_bad_option_is_named_in_one_line(folder, capsys, arguments, message):
    assert main(["table", str(folder), *arguments]) == 1
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["--jobs", "2"], ["FOLDER", "--jobs", "two"], ["FOLDER", "--modle.width", "8"], ["FOLDER", "--sedes", "1"]],
)
def test_a_wrong_command_line_leaves_with_code_two(folder, capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["table", *[str(folder) if argument == "FOLDER" else argument for argument in arguments]])
    assert stopped.value.code == 2 and "scatterbrain table: " in capsys.readouterr().err


def left_out(text: str) -> list[str]:
    """The files that a table names as left out."""
    (names,) = re.findall("^left out, as they do not extend task.yaml: (.*)$", text, re.MULTILINE)
    return names.strip().split(", ")


def test_methods_are_all_files_that_lead_to_the_task_and_the_others_are_named(folder, tmp_path, capsys):
    (tmp_path / "link").symlink_to(folder)
    files = {
        "dotted": "extends: ./task.yaml",
        "listed": f"extends: [other.yaml, {folder / 'task.yaml'}]",
        "wider": "extends: window.yaml\nattention: {support: {kind: window, keys: 16}}",
        "widest": "extends: ../link/wider.yaml",
        "lost": "extends: nowhere.yaml",
        "circle": "extends: circle.yaml",
        "list": "[1, 2]",
    }
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text + "\n")
    (folder / "._full.yaml").write_bytes(b"\x00\x05\x16\x07")  # as macOS writes them
    for path in (folder, tmp_path / "link"):
        assert set(method_files(path)) == {*METHODS, "dotted", "listed", "wider", "widest"}
    assert main(["table", str(folder), "--methods", "widest", "--seeds", "0"]) == 0
    text = (tmp_path / "runs" / "tiny" / "table.md").read_text()
    assert left_out(text) == ["circle.yaml", "list.yaml", "lost.yaml"]  # other.yaml is used by listed.yaml


def test_no_file_that_is_used_is_said_to_be_left_out(folder, tmp_path):
    (folder / "shared.yaml").write_text("model: {mlp: gelu}\n")
    (folder / "optimizer.yaml").write_text("train: {clip: 2.0}\n")
    (folder / "task.yaml").write_text("extends: shared.yaml\n" + TASK)
    (folder / "window.yaml").write_text(f"extends: [optimizer.yaml, task.yaml]\nattention: {METHODS['window']}\n")
    assert main(["table", str(folder), "--methods", "window", "--seeds", "0"]) == 0
    text = (tmp_path / "runs" / "tiny" / "table.md").read_text()
    assert left_out(text) == ["other.yaml"]


def test_a_file_behind_a_link_is_extended_from_where_the_link_is(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.yaml").write_text(f"extends: task.yaml\nattention: {METHODS['window']}\n")
    (folder / "middle.yaml").symlink_to(elsewhere / "linked.yaml")
    (folder / "method.yaml").write_text("extends: middle.yaml\n")
    read_config(folder / "method.yaml")  # as a run reads it
    assert set(method_files(folder)) == {*METHODS, "middle", "method"}
    (elsewhere / "task.yaml").write_text("train: {steps: 1}\n")
    assert set(method_files(folder)) == {*METHODS, "middle", "method"}


def test_a_folder_without_methods_is_named_with_what_it_lacks(folder, tmp_path, capsys):
    assert main(["table", str(tmp_path / "nowhere")]) == 1
    assert "nowhere, which has none" in capsys.readouterr().err
    for name in METHODS:
        (folder / f"{name}.yaml").unlink()
    assert main(["table", str(folder)]) == 1
    assert "expected files of methods with the line 'extends: task.yaml'" in capsys.readouterr().err


def test_the_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["table", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"--{name}" in text for name in ("methods", "seeds", "output", "jobs", "until", "only-collect"))
