"""What a run leaves beside its checkpoint: the weights of the best validation, a table, TensorBoard's files."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from scatterbrain.cli.command import CommandError, readable_errors
from scatterbrain.training.board import flat
from scatterbrain.training.config import AttentionConfig, SampleConfig
from scatterbrain.training.initial_weights import initialize_from
from scatterbrain.training.metrics import Evaluation
from scatterbrain.training.train_step import TrainState
from scatterbrain.training.trainer import RunStopped, Trainer

TRAIN = AttentionConfig(preset="train", keys=32)


def records(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def with_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[dict[str, torch.Tensor]]:
    """Lets validations, each of which evaluates twice, find these losses; returns the weights of each."""
    weights, calls = [], 0

    def evaluate(self, batches):
        nonlocal calls
        calls += 1
        if calls % 2:
            weights.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return Evaluation(losses[(calls - 1) // 2], 0.5)

    monkeypatch.setattr(TrainState, "evaluate", evaluate)
    return weights


def test_the_weights_of_the_best_validation_are_kept(tiny, monkeypatch):
    config = tiny(TRAIN, validate_every=2)
    weights = with_losses(monkeypatch, [3.0, 2.0, math.nan, 2.0])
    Trainer(config).run()
    path = Path(config.output) / "best.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "4" and float(metadata["bits_per_byte"]) == pytest.approx(2 / math.log(2))
    assert [record["best"] for record in records(config) if record["kind"] == "validation"] == [
        True,
        True,
        False,
        False,
    ]
    stored = safetensors.torch.load_file(path)
    assert stored.keys() == {f"model/{name}" for name in weights[1]}
    for name, value in weights[1].items():
        torch.testing.assert_close(stored[f"model/{name}"], value, rtol=0, atol=0, equal_nan=True)
    model = Trainer(dataclasses.replace(config, resume=True)).train_state.model
    assert "initial weights from" in initialize_from(path, model)


def test_a_continued_run_compares_with_the_best_before(tiny, monkeypatch):
    config = tiny(TRAIN, validate_every=2, steps=4)
    with monkeypatch.context() as patch:
        with_losses(patch, [1.0, 2.0])
        Trainer(config).run()
    with_losses(monkeypatch, [1.5, 0.5])
    Trainer(tiny(TRAIN, validate_every=2, steps=8, resume=True)).run()
    best = [record["best"] for record in records(config) if record["kind"] == "validation"]
    assert best == [True, False, False, True]
    Trainer(dataclasses.replace(tiny(TRAIN), overwrite=True))
    assert not (Path(config.output) / "best.safetensors").exists()


@pytest.mark.parametrize(("later", "kept"), [([2.5, 2.2], "4"), ([2.0, 3.0], "4"), ([2.5, 1.5], "6")])
def test_the_best_weights_stay_those_that_a_killed_run_kept_last(tiny, monkeypatch, later, kept):
    """Killed at step 5 after the checkpoint of step 3, the run goes on without the validation of step 4."""
    config, path = tiny(TRAIN, validate_every=2, steps=6), Path(tiny().output) / "best.safetensors"
    with monkeypatch.context() as patch:
        with_losses(patch, [3.0, 2.0])
        original = Trainer._record

        def record(self, *arguments):
            original(self, *arguments)
            if self.steps_done == 5:
                raise MemoryError

        patch.setattr(Trainer, "_record", record)
        with pytest.raises(MemoryError):
            Trainer(config).run()
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["step"] == "4"
    weights = safetensors.torch.load_file(path)
    with_losses(monkeypatch, later)
    Trainer(dataclasses.replace(config, resume=True)).run()
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["step"] == kept
    if kept == "4":  # also where step 4 was taken once more
        for name, value in safetensors.torch.load_file(path).items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=0, equal_nan=True)
    best = [record["best"] for record in records(config) if record["kind"] == "validation"]
    assert best == [
        True,
        *(loss <= 2.0 and loss == min([2.0, *later[: index + 1]]) for index, loss in enumerate(later)),
    ]


@pytest.mark.parametrize("error", [FloatingPointError("broke"), ValueError("unusable"), OSError("full")])
def test_the_table_of_the_records_is_written_also_where_an_error_ends_the_run(tiny, monkeypatch, error):
    config, original, count = tiny(TRAIN), TrainState.step, 0

    def step(self, *arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(TrainState, "step", step)
    with pytest.raises(RunStopped):
        Trainer(config).run()
    with open(Path(config.output) / "metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]


def test_the_table_has_every_number_of_every_record(tiny):
    config = tiny(TRAIN)
    Trainer(config).run()
    with open(Path(config.output) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records(config)) == 10
    for row, record in zip(rows, records(config)):
        expected = {name: str(value) for name, value in flat(record).items()}
        assert {name: value for name, value in row.items() if value} == expected
    assert "low_rank_shares_2" in rows[0]


def test_tensorboard_shows_every_step_once_after_a_run_was_continued(tiny):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Trainer(tiny(TRAIN, tensorboard=True, steps=4)).run()
    config = tiny(TRAIN, tensorboard=True, steps=8, resume=True)
    Trainer(config).run()
    events = accumulator.EventAccumulator(str(Path(config.output) / "tensorboard"))
    events.Reload()
    train = [record for record in records(config) if record["kind"] == "train"]
    assert [event.step for event in events.Scalars("train/loss")] == [record["step"] for record in train]
    shown = [event.value for event in events.Scalars("train/loss")]
    assert shown == pytest.approx([record["loss"] for record in train], rel=1e-6)
    assert {"validation/bits_per_byte", "validation/low_rank_shares_2"} <= set(events.Tags()["scalars"])


def test_a_missing_tensorboard_is_named_before_anything_is_created(tiny, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard" or ".tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config = tiny(tensorboard=True)
    with pytest.raises(CommandError, match="needs the package tensorboard: pip install tensorboard"):
        with readable_errors():
            Trainer(config)
    assert not Path(config.output).exists()


def test_a_sample_of_a_task_that_writes_none_is_said_to_be_left_out(tiny, capsys):
    config = dataclasses.replace(tiny(steps=1), task={"kind": "copy", "tokens": 15})
    Trainer(config).run()
    assert "sample: not written, the task copy writes no text" in capsys.readouterr().out
    for silent in (SampleConfig(), SampleConfig(length=0)):
        Trainer(dataclasses.replace(config, sample=silent, overwrite=True)).run()
        assert "sample:" not in capsys.readouterr().out
