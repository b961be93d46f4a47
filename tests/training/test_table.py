"""The table of a task: rows from logs, runs that are done, kept, resumed or refused."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from testkit import environment

from scatterbrain.training import table_runs, table_workers
from scatterbrain.training.batch import Batch
from scatterbrain.training.config import AttentionConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from scatterbrain.training.files import FolderLock, UnusableRun
from scatterbrain.training.interrupt import StopRequest
from scatterbrain.training.metrics import ACCURACY, PERPLEXITY, Evaluation
from scatterbrain.training.table import Row, Table, as_csv, baseline_of, equal_cost, markdown, multiply_adds, row_of
from scatterbrain.training.table_picture import curve
from scatterbrain.training.table_runs import TableRun, TableStopped, carry_out, difference, is_complete, time_left
from scatterbrain.training.tasks.image_classification import ImageClassification
from scatterbrain.training.train_step import TrainState
from scatterbrain.training.trainer import Trainer

STEP = {"learning_rate": 0.1, "loss": 1.0, "accuracy": 0.5, "gradient_norm": 1.0, "tokens": 10}


def step(number: int, seconds: float = 2.0, attention_seconds: float = 0.5) -> dict:
    return {"kind": "train", "step": number, "seconds": seconds, "attention_seconds": attention_seconds} | STEP


def validation(number: int, perplexity: float, seconds: float, **more) -> dict:
    figures = {"loss": math.log(perplexity), "accuracy": 1 / perplexity}
    return {"kind": "validation", "step": number, "seconds": seconds} | figures | more


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., TableRun]:
    """Makes a run of four steps of a copy task that takes a second; keywords replace fields of ``train``."""

    def make(method: str = "full", seed: int = 0, attention: AttentionConfig | None = None, **train) -> TableRun:
        settings = {"steps": 4, "batch": 2, "warmup": 1, "threads": 1, "validate_every": 2, "validation_batches": 1}
        config = RunConfig(
            task={"kind": "copy", "tokens": 31, "symbols": 8},
            model=ModelConfig(layers=1, width=16, heads=2),
            attention=attention or AttentionConfig(support="full"),
            train=TrainConfig(**(settings | {"checkpoint_every": 2, "seed": seed} | train)),
            output=str(tmp_path / "table" / f"{method}-{seed}"),
        )
        return TableRun(method, seed, config)

    return make


def write_log(run: TableRun, *records: dict) -> None:
    run.folder.path.mkdir(parents=True, exist_ok=True)
    run.folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))


def train_losses(run: TableRun) -> list[float]:
    return [record["loss"] for record in run.records() if record["kind"] == "train"]


def finish(*runs: TableRun, jobs: int = 1, overwrite: bool = False) -> None:
    carry_out(list(runs), runs[0].folder.path.parent, jobs, overwrite, "scatterbrain table again")


# -------------------- rows


def test_a_row_has_mean_best_time_and_share_of_its_seeds(make_run):
    first, second = make_run(seed=0), make_run(seed=1)
    write_log(first, step(1), step(2, 4.0), validation(2, 9.0, 6.0, low_rank_shares=[0.2, 0.4]))
    write_log(
        second,
        step(1, 3.0, 1.5),
        validation(1, 4.0, 3.0),
        step(2, 3.0, 1.5),
        validation(2, 5.0, 6.0, low_rank_shares=[0.5, 0.7]),
    )
    row = row_of([first, second], PERPLEXITY, 100.0, until=4.5)
    assert row.final == pytest.approx((9.0, 5.0)) and row.best == pytest.approx((9.0, 4.0))
    assert row.reached == (None, 3.0) and row.steps == 2 and row.seeds == (0, 1)
    assert row.seconds == (6.0, 6.0) and row.in_attention == pytest.approx((1 / 6, 0.5))
    assert row.low_rank_share == pytest.approx((0.3, 0.6))


def test_the_best_accuracy_is_the_largest(make_run):
    run = make_run()
    write_log(run, step(1), validation(1, 2.0, 2.0), step(2), validation(2, 4.0, 4.0))
    row = row_of([run], ACCURACY, None, until=0.3)
    assert row.best == (0.5,) and row.final == (0.25,) and row.reached == (2.0,)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_validation_that_is_no_number_is_neither_the_best_nor_good_enough(make_run, order):
    run = make_run()
    perplexities = [[math.nan, 3.0, 2.0][index] for index in order]
    log = [validation(number, perplexity, float(number)) for number, perplexity in enumerate(perplexities, 1)]
    write_log(run, *[step(number) for number in (1, 2, 3)], *log)
    found = row_of([run], PERPLEXITY, None, until=2.0)
    assert found.best == pytest.approx((2.0,)) and found.reached == (1.0 + perplexities.index(2.0),)
    write_log(run, step(1), validation(1, math.nan, 1.0))
    found = row_of([run], ACCURACY, None, until=0.0)
    assert math.isnan(found.best[0]) and found.reached == (None,)


def table_of(*rows: Row, reference: float | None = 1000.0) -> Table:
    return Table("copy", PERPLEXITY, rows, Evaluation(math.log(8), 0.2), reference, 2.0, ("a note",))


def row(method: str, multiply_adds: float | None, *final: float) -> Row:
    times = tuple(10.0 for _ in final)
    seeds = tuple(range(len(final)))
    return Row(method, seeds, 4, final, final, (None,) * len(final), times, times, (), multiply_adds)


def cells(text: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by the first of their line."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: cells[1:] for cells in rows}


def test_the_text_marks_methods_that_are_not_at_equal_cost_and_spares_exact_attention():
    text = markdown(table_of(row("full", 9000, 1.0, 3.0), row("window", 1099, 4.0), row("routed-32-keys", 899, 5.0)))
    found = cells(text)
    assert list(found)[2:] == ["full", "window", "routed-32-keys *", "frequencies of the targets"]
    assert found["full"][:2] == ["2.000 ± 1.414", "2.000 ± 1.414"] and found["window"][0] == "4.000"
    assert found["frequencies of the targets"][0] == "8.000"
    assert "* not at equal cost: 1,000 multiply-adds" in text and "a note" in text
    assert "not at equal cost" not in markdown(table_of(row("window", 1099, 4.0)))


def test_the_csv_has_numbers_in_full_and_every_seed():
    lines = list(
        csv.DictReader(io.StringIO(as_csv(table_of(row("window", 1200.0, 1.25, 1.75), row("full", None, 1.0)))))
    )
    assert [line["method"] for line in lines] == ["window", "full", "baseline"]
    assert float(lines[0]["perplexity_mean"]) == 1.5 and lines[0]["perplexity_by_seed"] == "1.25 1.75"
    assert lines[0]["at_equal_cost"] == "False" and lines[1]["multiply_adds"] == lines[1]["perplexity_deviation"] == ""
    assert float(lines[2]["perplexity_mean"]) == pytest.approx(8.0)


def test_the_csv_says_of_equal_cost_only_what_is_known():
    rows = row("window", 1000.0, 1.0), row("favor", None, 1.0), row("full", 1000.0, 1.0)
    for reference, expected in ((1000.0, ["True", "", "False"]), (None, ["", "", "False"])):
        lines = list(csv.DictReader(io.StringIO(as_csv(table_of(*rows, reference=reference)))))
        assert [line["at_equal_cost"] for line in lines[:3]] == expected


def test_a_run_that_broke_leaves_the_table_readable():
    assert "inf ± nan" in markdown(table_of(row("window", 1000, math.inf, 2.0)))


def test_equal_cost_is_that_of_the_cheaper_combined_method():
    assert equal_cost({"routed-quadratic": 5.0, "routed-centroid": 4.0, "window": 1.0}) == 4.0
    assert equal_cost({"routed-quadratic": 5.0, "routed-centroid": None}) == 5.0
    assert equal_cost({"window": 1.0}) is None


def test_the_cost_of_a_model_of_images_is_that_of_the_attention_that_reads_the_longest_sequences():
    task = ImageClassification(model="t2t_vit", image_size=128, token_width=48)
    config = RunConfig(model=ModelConfig(width=128, heads=2), attention=AttentionConfig(support="full"))
    assert multiply_adds(config, task, 1024) == 2 * 1024 * 48
    assert multiply_adds(config, ImageClassification(), 1024) == 2 * 1024 * 64


def test_the_baseline_knows_the_frequencies_of_the_scored_targets_alone():
    batches = [Batch(torch.zeros(1, 4), torch.tensor([[3, 3, -100, 5]])), Batch(torch.zeros(1, 1), torch.tensor([[3]]))]
    found = baseline_of(batches)
    assert found.accuracy == 0.75
    assert found.loss == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_a_curve_is_the_mean_at_the_validations_that_all_seeds_have():
    logs = [[validation(1, 4.0, 1.0), validation(2, 2.0, 2.0)], [validation(2, 6.0, 4.0), step(2)]]
    seconds, means, lowest, highest = curve(logs, PERPLEXITY)
    assert seconds == [3.0]
    assert (means, lowest, highest) == (pytest.approx([4.0]), pytest.approx([2.0]), pytest.approx([6.0]))


# -------------------- which runs are there


def test_a_run_is_complete_once_its_last_step_is_validated(make_run, monkeypatch):
    monkeypatch.setattr(table_runs, "_is_saved", lambda run, done: True)
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
    lock = FolderLock(run.folder.path)
    with StopRequest() as stop:
        assert table_runs.do(run, stop) is None
    assert run.failed_for() is None and run.ended.exists()
    assert "full-0 is still running in another process" in capsys.readouterr().out
    lock.release()
    finish(run)
    assert is_complete(run)


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


def test_a_log_that_cannot_be_read_fails_its_run_alone(make_run):
    broken, whole = make_run(), make_run(seed=1)
    finish(broken)
    broken.folder.metrics.write_text("nonsense\n" + broken.folder.metrics.read_text())
    finish(broken, whole)
    assert "metrics.jsonl, line 1: expected a record" in broken.failed_for()
    assert is_complete(whole) and not is_complete(broken)


def test_a_run_remembers_every_machine_it_was_done_on(make_run, monkeypatch):
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
from scatterbrain.training.table_runs import TableRun, carry_out

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
