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
from scatterbrain.training.config import AttentionConfig
from scatterbrain.training.initial_weights import initialize_from
from scatterbrain.training.metrics import Evaluation
from scatterbrain.training.train_step import TrainState
from scatterbrain.training.trainer import Trainer

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
