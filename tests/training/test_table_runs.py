"""The runs of a table: done, kept, resumed or refused."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
import yaml
from table_logs import step, validation, write_log
from testkit import environment

from scatterbrain.training import table_run, table_runs, table_workers
from scatterbrain.training.config import AttentionConfig, DataConfig
from scatterbrain.training.files import FolderLock, UnusableRun
from scatterbrain.training.interrupt import StopRequest
from scatterbrain.training.table_run import TableRun, difference, is_complete
from scatterbrain.training.table_runs import TableStopped, carry_out, time_left
from scatterbrain.training.train_step import TrainState
from scatterbrain.training.trainer import Trainer


def train_losses(run: TableRun) -> list[float]:
    return [record["loss"] for record in run.records() if record["kind"] == "train"]


def finish(*runs: TableRun, jobs: int = 1, overwrite: bool = False) -> None:
    carry_out(list(runs), runs[0].folder.path.parent, jobs, overwrite, "scatterbrain table again")


# -------------------- which runs are there


def test_a_run_is_complete_once_its_last_step_is_validated(make_run, monkeypatch):
    monkeypatch.setattr(table_run, "_is_saved", lambda run, done: True)
    run = make_run(steps=2)
    assert not is_complete(run)
    write_log(run, step(1), validation(1, 2.0, 2.0))
    assert not is_complete(run)
    write_log(run, step(1), validation(1, 2.0, 2.0), step(2))
    assert not is_complete(run)
    write_log(run, step(1), step(2), validation(2, 2.0, 4.0))
    assert is_complete(run)
    write_log(run, step(2), validation(2, 2.0, 4.0))
    assert not is_complete(run), "its seconds would lack those of the first step"


def test_a_run_is_complete_with_the_checkpoint_of_its_last_step_and_without_a_failure(make_run):
    run = make_run(steps=2)
    finish(run)
    assert is_complete(run)
    run.failure.write_text("No space left on device")
    assert not is_complete(run)
    run.failure.unlink()
    run.folder.checkpoint.unlink()
    assert not is_complete(run)


def test_a_run_with_a_time_limit_is_complete_once_its_time_is_up(make_run, monkeypatch):
    run = make_run(steps=10**6, minutes=0.02, validate_every=1)
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(TableStopped):
            finish(run)
    assert not is_complete(run), "validated after its last step, but stopped before its time was up"
    finish(run)
    assert is_complete(run)


def test_a_setting_that_affects_the_result_is_a_difference_and_the_number_of_threads_is_none(make_run):
    run = make_run()
    assert difference(run) is None
    Trainer(run.config).run()
    assert difference(run) is None
    assert difference(make_run(threads=2)) is None
    assert difference(make_run(validate_every=1)) == "train.validate_every: 2 there, 1 now"  # "best" depends on it
    assert difference(make_run(steps=5)) == "train.steps: 4 there, 5 now"
    assert difference(make_run(attention=AttentionConfig(support="window"))).startswith("attention.support: 'full'")
    other_task = dataclasses.replace(run.config, task={"kind": "copy", "tokens": 33, "symbols": 8})
    assert difference(dataclasses.replace(run, config=other_task)) == "task.tokens: 31 there, 33 now"


def test_a_setting_that_came_later_is_no_difference_while_it_has_its_default(make_run):
    run = make_run()
    Trainer(run.config).run()
    stored = yaml.safe_load(run.folder.config.read_text())
    del stored["train"]["clip"]
    run.folder.config.write_text(yaml.safe_dump(stored))
    assert difference(run) is None
    assert difference(make_run(clip=2.0)) == "train.clip: 1.0 there, 2.0 now"


def test_data_that_have_changed_are_a_difference_and_no_run_goes_on_with_them(make_run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 120)) * 60)
    run = make_run(context=40)
    config = dataclasses.replace(run.config, task="language", data=DataConfig(path=str(text), validation_fraction=0.2))
    run = dataclasses.replace(run, config=config)
    Trainer(config).run()
    assert difference(run) is None
    Trainer(dataclasses.replace(config, resume=True))._lock.release()
    content = bytearray(text.read_bytes())
    content[7] += 1
    text.write_bytes(content)
    assert difference(run) == "data: the content of the files has changed"
    with pytest.raises(UnusableRun, match="data: the content of the files has changed; restore the files"):
        Trainer(dataclasses.replace(config, resume=True))
    text.write_bytes(content * 2)
    assert difference(run).startswith("data: '4,224 bytes to train on, 1,056 to validate on' there, '8,448 bytes")


def test_other_initial_weights_are_a_difference(make_run):
    first = make_run("first")
    Trainer(first.config).run()
    run = make_run("second", initialize_from=str(first.folder.checkpoint))
    Trainer(run.config).run()
    assert difference(run) is None
    Trainer(dataclasses.replace(make_run("first", learning_rate=0.1).config, overwrite=True)).run()
    assert difference(run) == f"train.initialize_from: other weights were in {first.folder.checkpoint}"


def test_a_folder_that_holds_something_else_is_refused_by_its_name(make_run):
    run = make_run()
    write_log(run, step(1))
    run.folder.config.write_text("steps: 4")
    with pytest.raises(UnusableRun, match=r"full-0/config.yaml: expected the settings of a run"):
        difference(run)


def test_the_time_left_is_that_of_the_methods_own_steps_where_one_run_is_complete(make_run):
    slow, fast = make_run("slow"), make_run("fast")
    assert time_left([(slow, [1.0]), (fast, [])]) is None
    assert time_left([(slow, [4.0] * 4), (fast, [1.0] * 4), (make_run("slow", 1), [4.0] * 3)]) == 4.0
    assert time_left([(slow, [4.0] * 4), (fast, [1.0] * 4), (make_run("new"), [])]) == 4 * 2.5


# -------------------- doing the others


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Calls ``action`` just before step ``number`` (from 1) of this process is taken."""
    original, count = TrainState.step, 0

    def counted(self, *arguments):
        nonlocal count
        count += 1
        if count == number:
            action()
        return original(self, *arguments)

    monkeypatch.setattr(TrainState, "step", counted)


def test_complete_runs_are_kept_and_a_run_after_another_is_the_one_it_is_alone(make_run, tmp_path):
    support = {"kind": "routed", "keys": 16, "block_q": 1, "block_k": 8, "window": 8}
    routed = AttentionConfig(support=support, low_rank={"kind": "quadratic", "rank": 3})
    first, second = make_run(), make_run("routed", attention=routed)
    finish(first)
    log = first.folder.metrics.stat().st_mtime_ns
    finish(first, second)
    assert first.folder.metrics.stat().st_mtime_ns == log and is_complete(second)
    alone = dataclasses.replace(second, config=dataclasses.replace(second.config, output=str(tmp_path / "alone")))
    Trainer(alone.config).run()
    assert train_losses(alone) == train_losses(second)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_the_next_call_goes_on_bit_for_bit(make_run, monkeypatch, tmp_path, number):
    runs = [make_run(seed=seed) for seed in (0, 1)]
    with monkeypatch.context() as patch:
        before_step(patch, 7, lambda: os.kill(os.getpid(), number))  # the third step of the second run
        with pytest.raises(
            TableStopped, match="1 of 2 runs are complete.*go on with: scatterbrain table again"
        ) as stop:
            finish(*runs)
    assert stop.value.exit_code == 128 + number
    assert is_complete(runs[0]) and len(train_losses(runs[1])) == 3
    finish(*runs)
    whole = dataclasses.replace(runs[1], config=dataclasses.replace(runs[1].config, output=str(tmp_path / "whole")))
    Trainer(whole.config).run()
    assert train_losses(runs[1]) == train_losses(whole)


def test_a_run_that_fails_is_noted_in_one_line_and_tried_again_by_the_next_call(make_run, monkeypatch):
    runs = [make_run(seed=seed) for seed in (0, 1)]

    def fail():
        raise MemoryError("not enough\nmemory")

    with monkeypatch.context() as patch:
        before_step(patch, 2, fail)
        finish(*runs)
    assert runs[0].failed_for() == "MemoryError: not enough memory" and not is_complete(runs[0])
    assert runs[1].failed_for() is None and is_complete(runs[1])
    finish(*runs)
    assert runs[0].failed_for() is None and is_complete(runs[0])


def test_runs_of_other_settings_are_refused_by_their_first_key_and_replaced_on_demand(make_run):
    finish(make_run())
    other = make_run(batch=1)
    with pytest.raises(UnusableRun, match="1 of 1 runs .*full-0: train.batch: 2 there, 1 now.*--overwrite.*--output"):
        finish(other)
    finish(other, overwrite=True)
    assert is_complete(other) and difference(other) is None


def test_two_tables_in_one_folder_at_a_time_are_refused(make_run, monkeypatch):
    run = make_run()
    before_step(monkeypatch, 1, lambda: finish(make_run(seed=1)))
    finish(run)
    assert "another run is writing" in run.failed_for()


def test_a_run_that_another_process_does_is_no_failure(make_run, capsys):
    run = make_run()
    run.folder.path.mkdir(parents=True)
    run.ended.write_text("4 steps\n")
    run.failure.write_text("of an earlier start\n")
    lock = FolderLock(run.folder.path)
    with StopRequest() as stop:
        assert table_runs.do(run, stop) is None
    assert run.failed_for() is None and run.ended.exists()
    assert "full-0 is still running in another process" in capsys.readouterr().out
    lock.release()
    finish(run)
    assert is_complete(run)


def test_every_run_has_its_own_number_of_threads_and_leaves_none_behind(make_run, monkeypatch):
    torch.set_num_threads(2)  # stands for torch's own choice
    runs = [make_run("full", seed, threads=threads) for seed, threads in enumerate((3, None, 1, None))]
    missing = dataclasses.replace(runs[2].config, data=DataConfig(path="nowhere"), task={"kind": "language"})
    runs[2] = dataclasses.replace(runs[2], config=missing)
    found, original = [], TrainState.step
    monkeypatch.setattr(
        TrainState, "step", lambda self, *rest: found.append(torch.get_num_threads()) or original(self, *rest)
    )
    with StopRequest() as stop:
        for run in runs:  # the third fails before it starts
            run.folder.path.parent.mkdir(exist_ok=True)
            table_runs.do(run, stop)
    assert runs[2].failure.exists() and found == [3] * 4 + [2] * 8
    assert torch.get_num_threads() == 2
    assert [run.machine.read_text().split(", ")[1] for run in (runs[0], runs[1])] == ["3 threads", "2 threads"]


def without_line(run: TableRun, number: int) -> None:
    lines = run.folder.metrics.read_text().splitlines(keepends=True)
    run.folder.metrics.write_text("".join(lines[:number] + lines[number + 1 :]))


def test_a_run_whose_log_lacks_a_step_is_done_anew(make_run, capsys):
    run, other = make_run(), make_run(seed=1)
    finish(run, other)
    kept, losses = other.folder.metrics.stat().st_mtime_ns, train_losses(run)
    without_line(run, 1)
    assert not is_complete(run)
    finish(run, other)
    assert "full-0 is done anew: its log lacks steps that its checkpoint has" in capsys.readouterr().out
    assert is_complete(run) and train_losses(run) == losses and run.failed_for() is None
    assert other.folder.metrics.stat().st_mtime_ns == kept


@pytest.mark.parametrize("lost", ["metrics", "config"])
def test_a_checkpoint_of_other_settings_is_kept_also_where_its_log_or_settings_are_gone(make_run, lost):
    run = make_run()
    finish(run)
    getattr(run.folder, lost).unlink()
    before, other = run.folder.checkpoint.read_bytes(), make_run(batch=1)
    with pytest.raises(UnusableRun, match="full-0: train.batch: 2 there, 1 now.*--overwrite"):
        finish(other)
    assert run.folder.checkpoint.read_bytes() == before
    finish(other, overwrite=True)
    assert is_complete(other) and difference(other) is None
    run = make_run("second")
    finish(run)
    getattr(run.folder, lost).unlink()
    finish(run)
    assert is_complete(run) and difference(run) is None


def test_a_log_that_cannot_be_read_fails_its_run_alone(make_run):
    broken, whole = make_run(), make_run(seed=1)
    finish(broken)
    broken.folder.metrics.write_text("nonsense\n" + broken.folder.metrics.read_text())
    finish(broken, whole)
    assert "metrics.jsonl, line 1: expected a record" in broken.failed_for()
    assert is_complete(whole) and not is_complete(broken)


def test_a_run_remembers_every_machine_it_was_done_on(make_run, monkeypatch):
    torch.set_num_threads(1)  # as the run has, so that the machine is the same
    run = make_run()
    with monkeypatch.context() as patch:
        patch.setattr(table_runs, "machine", lambda device: "a slow machine")
        before_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(TableStopped):
            finish(run)
    here = table_runs.machine("cpu")
    for _ in range(2):
        run.failure.write_text("tried again\n")
        finish(run)
        assert run.machine.read_text().splitlines() == ["a slow machine", here]
    finish(make_run(batch=1), overwrite=True)
    assert run.machine.read_text().splitlines() == [here]


ENDLESS = """
import sys
from pathlib import Path
from scatterbrain.training.config import AttentionConfig, ModelConfig, RunConfig, TrainConfig
from scatterbrain.training.table_run import TableRun
from scatterbrain.training.table_runs import carry_out

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    runs = [
        TableRun("full", seed, RunConfig(
            task={"kind": "copy", "tokens": 31, "symbols": 8},
            model=ModelConfig(layers=1, width=16, heads=2),
            attention=AttentionConfig(support="full"),
            train=TrainConfig(steps=10**6, checkpoint_every=10**6, threads=1, seed=seed),
            output=str(folder / f"full-{seed}"),
        ))
        for seed in (0, 1)
    ]
    carry_out(runs, folder, 2, False, "again")
"""


@pytest.mark.slow
def test_runs_side_by_side_stop_after_their_step_when_the_table_is_killed(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    folder = tmp_path / "table"
    table = subprocess.Popen([sys.executable, script, folder], env=environment())
    logs = [folder / f"full-{seed}" / "metrics.jsonl" for seed in (0, 1)]
    wait_until(lambda: all(log.exists() and log.stat().st_size > 500 for log in logs))
    table.kill()
    table.wait(timeout=60)
    checkpoints = [log.with_name("checkpoint.safetensors") for log in logs]
    wait_until(lambda: all(checkpoint.exists() for checkpoint in checkpoints))
    sizes = [log.stat().st_size for log in logs]
    time.sleep(1)
    assert [log.stat().st_size for log in logs] == sizes
    for log in logs:
        FolderLock(log.parent).release()  # nothing runs there any more


SLOW_STEPS = """
import time
from scatterbrain.training.train_step import TrainState

step = TrainState.step
TrainState.step = lambda *arguments: (time.sleep(3), step(*arguments))[1]
"""


@pytest.mark.slow
def test_runs_that_were_asked_to_stop_save_their_step_also_when_the_table_dies_meanwhile(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(SLOW_STEPS + ENDLESS)
    folder = tmp_path / "table"
    table = subprocess.Popen([sys.executable, script, folder], env=environment())
    logs = [folder / f"full-{seed}" / "metrics.jsonl" for seed in (0, 1)]
    wait_until(lambda: all(log.exists() and log.stat().st_size > 0 for log in logs))
    table.terminate()
    time.sleep(1)  # the table has asked its processes, and their steps go on
    table.kill()
    table.wait(timeout=60)
    wait_until(lambda: all(log.with_name("checkpoint.safetensors").exists() for log in logs))


def test_a_process_that_alone_is_stopped_says_so_where_its_output_goes(make_run, monkeypatch):
    run = make_run()
    run.folder.path.parent.mkdir(parents=True)
    monkeypatch.setattr(os, "setsid", lambda: None)
    monkeypatch.setattr(table_workers, "_stop_without_parent", lambda: None)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    ours, theirs = multiprocessing.Pipe()
    ours.send(run)
    table_workers._work(theirs, lambda run, stop: signal.SIGTERM)
    assert run.output.read_text().startswith("stopped by SIGTERM; the next call of the table goes on")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_runs_side_by_side_are_those_one_after_the_other_and_a_killed_process_fails_its_own_alone(
    make_run, tmp_path, monkeypatch, capsys
):
    runs = [make_run(seed=seed) for seed in (0, 1)] + [make_run("endless", steps=10**6)]
    original = table_workers.Worker.collect

    def collect(worker):
        if worker.run is not None and worker.run.method == "endless" and worker.run.folder.metrics.exists():
            worker.process.kill()
        return original(worker)

    monkeypatch.setattr(table_workers.Worker, "collect", collect)
    finish(*runs, jobs=2)
    assert all(map(is_complete, runs[:2])) and "exit code -9" in runs[2].failed_for()
    assert "full-0 is complete" in capsys.readouterr().out and "step 4: checkpoint in" in runs[0].output.read_text()
    alone = dataclasses.replace(runs[1], config=dataclasses.replace(runs[1].config, output=str(tmp_path / "alone")))
    Trainer(alone.config).run()
    assert train_losses(alone) == train_losses(runs[1])


@pytest.mark.slow
def test_a_signal_stops_runs_side_by_side_after_their_step(make_run, monkeypatch):
    runs = [make_run(seed=seed, steps=10**6, checkpoint_every=10**6) for seed in (0, 1)]
    original = table_workers.Worker.collect

    def collect(worker):
        if all(run.folder.metrics.exists() and run.folder.metrics.stat().st_size > 500 for run in runs):
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(table_workers.Worker, "collect", original)
        return original(worker)

    monkeypatch.setattr(table_workers.Worker, "collect", collect)
    with pytest.raises(TableStopped, match="stopped by SIGTERM; 0 of 2"):
        finish(*runs, jobs=2)
    assert all(run.folder.checkpoint.exists() and run.failed_for() is None for run in runs)
