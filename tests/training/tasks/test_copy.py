"""The copy task: what it shows and hides."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.training.config import DataConfig, TrainConfig
from scatterbrain.training.tasks.copy import Copy, CopyData


def opened(**fields) -> CopyData:
    return Copy(**fields).open(DataConfig(), TrainConfig(batch=3, seed=5))


def test_the_hidden_half_shows_nothing_of_what_is_scored():
    data = opened(tokens=31, masked=True)
    batch = data.training_batch(0, 0.0)
    assert batch.inputs.shape == batch.targets.shape == (3, 31)
    assert (batch.inputs[:, 16:] == data.hidden).all() and (batch.targets[:, :16] == -100).all()
    assert torch.equal(batch.targets[:, 16:], batch.inputs[:, :15])


def test_the_causal_task_scores_the_next_token_of_the_copied_half():
    batch = opened(tokens=31).training_batch(0, 0.0)
    assert batch.inputs.shape == batch.targets.shape == (3, 30)
    assert (batch.targets[:, :15] == -100).all() and torch.equal(batch.targets[:, 15:-1], batch.inputs[:, 16:])
    assert torch.equal(batch.targets[:, 15:], batch.inputs[:, :15])


def test_a_batch_is_a_function_of_its_number():
    first, second = opened(), opened()
    second.training_batch(0, 0.0)
    assert torch.equal(first.training_batch(4, 0.0).inputs, second.training_batch(4, 0.9).inputs)
    others = (first.training_batch(5, 0.0), first.validation_batch(4))
    assert all(not torch.equal(first.training_batch(4, 0.0).inputs, other.inputs) for other in others)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 256}, "task.tokens: expected an odd number from 3, got 256"),
        ({"tokens": "255"}, "task.tokens: expected an int, got '255'"),
        ({"symbols": 1}, "task.symbols: expected 2 or more, got 1"),
    ],
)
def test_a_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Copy(**fields)
