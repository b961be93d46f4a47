from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from scatterbrain.training import files
from scatterbrain.training.batch import Batch
from scatterbrain.training.checkpoint import read_progress
from scatterbrain.training.config import AttentionConfig, CompareConfig, DataConfig, RunConfig
from scatterbrain.training.tasks import Task
from scatterbrain.training.train_step import Sums, TrainState
from scatterbrain.training.trained import load_trained
from scatterbrain.training.trainer import RunStopped, Trainer

ATTENTIONS = {
    "full": AttentionConfig(support="full"),
    "train": AttentionConfig(preset="train", keys=32),
    "ema": AttentionConfig(preset="train", keys=32, low_rank={"kind": "quadratic", "statistics": "ema"}),
}


def losses(config: RunConfig) -> list[tuple[str, int, float]]:
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [(record["kind"], record["step"], record["loss"]) for record in map(json.loads, lines)]


def tensors(config: RunConfig) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(config.output) / "checkpoint.safetensors")


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, action) -> None:
    """Calls ``action`` just before step ``number`` (from 1) of this process is taken."""
    original, count = TrainState.step, 0

    def step(self, *arguments):
        nonlocal count
        count += 1
        if count == number:
            action()
        return original(self, *arguments)

    monkeypatch.setattr(TrainState, "step", step)


def raise_error(error: BaseException):
    raise error


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("how", ["stopped by a signal", "killed between two checkpoints"])
def test_a_run_that_was_cut_continues_bit_for_bit(tiny, monkeypatch, attention, how):
    whole = tiny(ATTENTIONS[attention], output="whole")
    Trainer(whole).run()
    with monkeypatch.context() as patch:
        if how == "stopped by a signal":
            before_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
            error = RunStopped
        else:
            before_step(patch, 5, lambda: raise_error(MemoryError()))
            error = MemoryError
        with pytest.raises(error):
            Trainer(tiny(ATTENTIONS[attention], output="cut")).run()
    torch.manual_seed(12345)
    cut = tiny(ATTENTIONS[attention], output="cut", resume=True)
    Trainer(cut).run()
    assert losses(cut) == losses(whole)
    expected, got = tensors(whole), tensors(cut)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_finish_and_saves_it(tiny, monkeypatch, number, code):
    config = tiny()
    before = signal.getsignal(number)  # a background job of a shell starts with SIGINT ignored
    before_step(monkeypatch, 5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(RunStopped, match="checkpoint of step 5 is whole.*--resume true") as stopped:
        Trainer(config).run()
    assert stopped.value.exit_code == code
    assert read_progress(Path(config.output) / "checkpoint.safetensors").step == 5
    assert signal.getsignal(number) == before


def test_a_full_disk_leaves_the_last_checkpoint_whole(tiny, monkeypatch):
    config = tiny()
    checkpoint = Path(config.output) / "checkpoint.safetensors"
    kept = []

    def fill_the_disk():
        kept.append(checkpoint.read_bytes())
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(files.os, "fsync", lambda descriptor: raise_error(full))

    before_step(monkeypatch, 5, fill_the_disk)
    with pytest.raises(RunStopped, match="No space left on device.*checkpoint of step 3 is whole") as stopped:
        Trainer(config).run()
    assert stopped.value.exit_code == 1
    assert checkpoint.read_bytes() == kept[0]
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == [
        "best.safetensors",
        "checkpoint.safetensors",
        "config.yaml",
        "data.txt",
        "metrics.jsonl",
    ]


def test_the_log_is_on_the_disk_before_a_checkpoint_that_knows_its_steps_is(tiny, monkeypatch):
    config, synced, replaced = tiny(), {}, []
    metrics = Path(config.output) / "metrics.jsonl"
    fsync, replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size
        fsync(descriptor)

    def put(source: Path, target: Path) -> None:
        if target.name == "checkpoint.safetensors":
            found = metrics.stat()
            replaced.append(synced.get(found.st_ino) == found.st_size)
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", sync)
    monkeypatch.setattr(files.os, "replace", put)
    Trainer(config).run()
    assert replaced == [True] * 3


def test_a_run_writes_its_loss_curve_and_a_sample(tiny):
    config = tiny()
    Trainer(config).run()
    assert (Path(config.output) / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (Path(config.output) / "sample.txt").read_text().startswith("line")


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_are_spoilt(tiny, monkeypatch):
    config = tiny()
    before_step(
        monkeypatch,
        5,
        lambda: monkeypatch.setattr(
            TrainState,
            "_sums",
            lambda *_: Sums(torch.tensor(float("nan"), requires_grad=True), torch.tensor(0), 1),
        ),
    )
    with pytest.raises(RunStopped, match="expected a finite loss.*checkpoint of step 3 is whole"):
        Trainer(config).run()


def test_a_time_limit_ends_the_run_with_the_whole_schedule(tiny):
    config = tiny(steps=10**6, minutes=0.01)
    Trainer(config).run()
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    rates = [record["learning_rate"] for record in map(json.loads, lines) if record["kind"] == "train"]
    assert rates[-1] < 0.2 * max(rates)


def test_small_batches_that_accumulate_take_the_steps_of_a_large_one(tiny):
    large, small = tiny(output="large"), tiny(output="small", batch=1, accumulate=2)
    for config in (large, small):
        Trainer(config).run()
    train = [[loss for kind, _, loss in losses(config) if kind == "train"] for config in (large, small)]
    assert train[0] == pytest.approx(train[1], rel=1e-4)


def test_every_target_of_a_step_counts_the_same_whichever_batch_it_is_in(tiny):
    large, small = Trainer(tiny(output="large")), Trainer(tiny(output="small", batch=1, accumulate=2))
    [batch] = large.training_batches(0)
    batch = batch._replace(targets=batch.targets.clone())
    batch.targets[1, 3:] = -100  # the second row has three targets that are scored
    whole = large.train_state.step([batch], 1e-3)
    parts = small.train_state.step([Batch(*(t[row : row + 1] for t in batch[:2])) for row in (0, 1)], 1e-3)
    assert (parts.loss, parts.gradient_norm) == pytest.approx((whole.loss, whole.gradient_norm), rel=1e-4)
    assert parts.accuracy == whole.accuracy


def test_a_step_without_targets_that_are_scored_is_refused(tiny):
    trainer = Trainer(tiny())
    [batch] = trainer.training_batches(0)
    batch = batch._replace(targets=torch.full_like(batch.targets, -100))
    for act in (lambda: trainer.train_state.step([batch], 1e-3), lambda: trainer.train_state.evaluate([batch])):
        with pytest.raises(ValueError, match="at least one target that is scored, got none"):
            act()


@pytest.mark.parametrize("attention", ["full", "train"])
def test_bfloat16_autocast_trains_close_to_float32(tiny, attention):
    single = tiny(ATTENTIONS[attention], output="single")
    half = tiny(ATTENTIONS[attention], output="half", bf16=True)
    for config in (single, half):
        Trainer(config).run()
    assert [loss for *_, loss in losses(half)] == pytest.approx([loss for *_, loss in losses(single)], rel=0.02)


def test_settings_that_nothing_uses_stop_a_new_run_alone(tiny, monkeypatch, capsys):
    config = tiny(steps=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, positions="learned", rope_base=1000.0))
    Trainer(config).run()
    said = "model.rope_base: 1000.0 is not used"
    assert said in capsys.readouterr().out

    def refused(*_: object) -> list[str]:
        raise ValueError("model.rope_base: refused")

    monkeypatch.setattr(Task, "check_unused", refused)
    load_trained(Path(config.output))
    Trainer(dataclasses.replace(config, resume=True, train=dataclasses.replace(config.train, steps=3))).run()
    with pytest.raises(ValueError, match="model.rope_base: refused"):
        Trainer(dataclasses.replace(config, overwrite=True))


def test_an_occupied_output_folder_is_refused_with_the_ways_out(tiny):
    Trainer(tiny(steps=1)).run()
    with pytest.raises(ValueError, match="--resume true.*--overwrite true.*--output"):
        Trainer(tiny())


def test_resuming_needs_a_checkpoint_and_auto_does_not(tiny):
    with pytest.raises(ValueError, match="resume: expected a checkpoint"):
        Trainer(tiny(resume=True))
    Trainer(tiny(resume="auto", steps=1)).run()
    assert Trainer(tiny(resume="auto")).steps_done == 1


def test_resuming_as_another_run_is_refused_by_key(tiny):
    Trainer(tiny(steps=1)).run()
    with pytest.raises(ValueError, match="train.batch: the checkpoint was made with 2, got 1"):
        Trainer(tiny(resume=True, batch=1))


OWN_TASK = """
from dataclasses import dataclass

from scatterbrain.training.tasks.copy import Copy


@dataclass(frozen=True)
class Own(Copy):
    lengths: tuple[int, ...] = (3, 5)
    pairs: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))
"""


def test_a_run_of_an_own_task_with_lists_among_its_fields_goes_on(tiny, tmp_path, monkeypatch):
    (tmp_path / "own_task_with_lists.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = dataclasses.replace(tiny(steps=1), task="own_task_with_lists:Own")
    Trainer(config).run()
    for task in (config.task, {"kind": config.task, "lengths": [3, 5]}):
        trainer = Trainer(dataclasses.replace(config, task=task, resume=True))
        assert trainer.steps_done == 1
        trainer._lock.release()
    with pytest.raises(ValueError, match=r"task.lengths: the checkpoint was made with \[3, 5\], got \[3, 6\]"):
        Trainer(dataclasses.replace(config, task={"kind": config.task, "lengths": [3, 6]}, resume=True))


def test_the_comparison_with_exact_attention_reports_both_at_the_same_step(tiny, capsys):
    config = dataclasses.replace(tiny(ATTENTIONS["train"]), compare=CompareConfig(steps=3))
    Trainer(config).run()
    table = (Path(config.output) / "comparison.txt").read_text()
    rows = ("bits per byte after 3 steps", "tokens/s", "in attention", "outside")
    assert all(row in table for row in rows) and table in capsys.readouterr().out


def with_validation(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, broken_from: int) -> None:
    """Makes the validation data of a trainer unusable after so many batches."""
    drawn, draw = 0, trainer.data.validation_batch

    def validation_batch(number: int) -> Batch:
        nonlocal drawn
        drawn += 1
        if drawn > broken_from:
            raise ValueError("task.distance: expected names that come again,\ngot none")
        return draw(number)

    monkeypatch.setattr(trainer.data, "validation_batch", validation_batch)


def test_data_that_a_later_step_finds_unusable_end_the_run_in_one_line_and_cost_no_step(tiny, monkeypatch):
    config = tiny(checkpoint_every=100)
    trainer = Trainer(config)
    with_validation(monkeypatch, trainer, 1)
    message = (
        r"^task.distance: expected names that come again, got none\. The checkpoint of step 8 is whole.*--resume true"
    )
    with pytest.raises(RunStopped, match=message) as stopped:
        trainer.run()
    assert stopped.value.exit_code == 1
    assert read_progress(Path(config.output) / "checkpoint.safetensors").step == 8
    trainer = Trainer(dataclasses.replace(config, resume=True))
    assert trainer.steps_done == 8
    trainer.run()
    assert [step for kind, step, _ in losses(config) if kind == "train"] == list(range(1, 9))


def test_validation_data_that_cannot_be_drawn_are_found_before_the_first_step(tiny, tmp_path):
    source = tmp_path / "scripts"
    source.mkdir()
    for number in range(10):
        (source / f"script{number}.py").write_text(f"a{number} = 1\n")
    config = dataclasses.replace(
        tiny(), task={"kind": "names", "tokens": 256, "repeats": 0.0}, data=DataConfig(path=str(source))
    )
    with pytest.raises(ValueError, match="task.distance: expected validation texts in which names come again"):
        Trainer(config)
    assert not Path(config.output).exists()


def test_a_comparison_that_breaks_is_no_failure_of_the_run(tiny, monkeypatch, capsys):
    config = dataclasses.replace(tiny(ATTENTIONS["train"]), compare=CompareConfig(steps=4))
    before_step(monkeypatch, 8 + 3, lambda: raise_error(FloatingPointError("expected a finite loss")))
    Trainer(config).run()
    assert "compare.steps: exact attention diverged at step 3: expected a finite loss" in capsys.readouterr().out
    assert not (Path(config.output) / "comparison.txt").exists()


def test_a_comparison_whose_initial_weights_are_gone_is_no_failure_of_the_run(tiny, monkeypatch, tmp_path, capsys):
    Trainer(tiny(ATTENTIONS["train"], output="first", steps=1)).run()
    weights = tmp_path / "first" / "checkpoint.safetensors"
    config = tiny(ATTENTIONS["train"], initialize_from=str(weights))
    before_step(monkeypatch, 3, weights.unlink)
    Trainer(dataclasses.replace(config, compare=CompareConfig(steps=2))).run()
    assert "compare.steps: no comparison, exact attention cannot be trained: train.initialize_from: expected" in (
        capsys.readouterr().out
    )


def test_the_comparison_of_a_run_that_its_time_limit_ended_is_of_what_was_run(tiny, monkeypatch, capsys):
    trainer = Trainer(dataclasses.replace(tiny(ATTENTIONS["train"], minutes=1), compare=CompareConfig(steps=8)))
    monkeypatch.setattr(trainer, "_seconds", lambda: 12 * trainer.steps_done)
    trainer.run()
    assert trainer.steps_done == 5
    assert "bits per byte after 5 steps" in (Path(trainer.config.output) / "comparison.txt").read_text()


def drawn_in(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Runs it; the number and the share of the run of every batch that it drew to train on."""
    drawn, draw = [], trainer.data.training_batch

    def record(number: int, fraction: float) -> Batch:
        drawn.append((number, fraction))
        return draw(number, fraction)

    monkeypatch.setattr(trainer.data, "training_batch", record)
    trainer.run()
    return drawn


def test_the_comparison_of_a_run_that_went_on_with_more_steps_repeats_its_batches(tiny, monkeypatch):
    growing = {"task": {"kind": "language", "first_tokens": 12}}
    Trainer(dataclasses.replace(tiny(ATTENTIONS["train"], steps=4), **growing)).run()
    config = dataclasses.replace(tiny(ATTENTIONS["train"], resume=True), **growing, compare=CompareConfig(steps=8))
    trainer = Trainer(config)
    drawn = drawn_in(trainer, monkeypatch)
    assert drawn[4:8] == [(number, number / 4) for number in range(4)], "as the first four steps were"
    assert drawn[8:] == drawn[:4]


def test_the_comparison_of_a_run_by_the_clock_repeats_its_batches(tiny, monkeypatch):
    trainer = Trainer(dataclasses.replace(tiny(ATTENTIONS["train"], minutes=1), compare=CompareConfig(steps=3)))
    monkeypatch.setattr(trainer, "_seconds", lambda: 12 * trainer.steps_done)  # the clock is ahead of the eight steps
    drawn = drawn_in(trainer, monkeypatch)
    assert [fraction for _, fraction in drawn[:3]] == pytest.approx([0, 0.2, 0.4])
    assert drawn[-3:] == drawn[:3]


def test_a_run_with_a_seed_of_63_bits_starts_and_goes_on(tiny):
    attention = AttentionConfig(support="window", keys=32, low_rank={"kind": "favor", "features": 8})
    config = tiny(attention, seed=2**63 - 1)
    Trainer(config).run()
    again = dataclasses.replace(config, resume=True, train=dataclasses.replace(config.train, steps=9))
    Trainer(again).run()
    assert [record[1] for record in losses(again) if record[0] == "train"] == list(range(1, 10))


def test_trainers_that_are_made_before_either_runs_have_their_own_number_of_threads(tiny, monkeypatch):
    torch.set_num_threads(2)  # stands for torch's own choice
    found, original = [], TrainState.step
    monkeypatch.setattr(
        TrainState, "step", lambda self, *rest: found.append(torch.get_num_threads()) or original(self, *rest)
    )
    trainers = []
    for number, threads in enumerate((3, None)):
        trainers.append(Trainer(tiny(output=str(number), steps=1, threads=threads)))
        assert torch.get_num_threads() == 2
    for trainer in trainers:
        trainer.run()
        assert torch.get_num_threads() == 2
    assert found == [3, 2]
