"""Noisy majority: votes, questions and what can be known of the right values, counted vote by vote."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
import torch

from scatterbrain.training.config import DataConfig, TrainConfig
from scatterbrain.training.tasks.majority import Majority, MajorityData


def opened(batch: int = 4, seed: int = 5, **fields) -> MajorityData:
    return Majority(**fields).open(DataConfig(), TrainConfig(batch=batch, seed=seed))


def votes_of(tokens: list[int], task: Majority) -> dict[int, Counter[int]]:
    """The values that were voted for, by key."""
    counts: dict[int, Counter[int]] = {}
    for key, value in zip(tokens[0 : 2 * task.votes : 2], tokens[1 : 2 * task.votes : 2], strict=True):
        assert key < task.keys <= value < task.keys + task.values
        counts.setdefault(key, Counter())[value - task.keys] += 1
    return counts


@pytest.mark.parametrize("fields", [{}, {"votes": 341, "tokens": 1024, "right": 0.3}, {"votes": 20, "tokens": 64}])
def test_votes_are_shared_out_and_one_right_value_of_each_key_is_asked_for(fields):
    data = opened(**fields)
    task = data.task
    for batch in (data.training_batch(0, 0.0), data.validation_batch(0)):
        assert batch.inputs.shape == batch.targets.shape == (4, task.tokens)
        for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            numbers = [sum(counter.values()) for counter in votes_of(tokens, task).values()]
            assert len(numbers) == task.keys and max(numbers) - min(numbers) <= 1
            assert targets[: 2 * task.votes] == [-100] * (2 * task.votes)
            right: dict[int, set[int]] = {}
            for key, target in zip(tokens[2 * task.votes :], targets[2 * task.votes :], strict=True):
                assert key < task.keys and target < task.values
                right.setdefault(key, set()).add(target)
            assert all(len(values) == 1 for values in right.values())


def test_the_stated_share_of_votes_is_right_and_the_stated_share_of_majorities():
    """Ties count as much as the share of them that a guess would get."""
    data = opened(batch=1000)
    task = data.task
    batch = data.validation_batch(0)
    right_votes = votes = 0
    majorities, keys = 0.0, 0
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        right = dict(zip(tokens[2 * task.votes :], targets[2 * task.votes :], strict=True))
        for key, counts in votes_of(tokens, task).items():
            if key in right:
                right_votes, votes = right_votes + counts[right[key]], votes + sum(counts.values())
                best = [value for value, number in counts.items() if number == max(counts.values())]
                majorities, keys = majorities + (right[key] in best) / len(best), keys + 1
    assert abs(right_votes / votes - task.right) < 4 * math.sqrt(0.25 / votes)
    stated = float(re.search(r"right for ([0-9.]+)% of the keys", data.description)[1]) / 100
    assert abs(majorities / keys - stated) < 4 * math.sqrt(0.12 / keys)


def test_wrong_votes_are_for_any_of_the_other_values():
    data = opened(batch=500, keys=1, values=4, votes=4, tokens=16, right=0.4)
    batch = data.validation_batch(0)
    difference = (batch.inputs[:, 1:8:2] - 1 - batch.targets[:, -1:]) % 4
    shares = torch.bincount(difference.flatten()) / difference.numel()
    assert torch.allclose(shares, torch.tensor([0.4, 0.2, 0.2, 0.2]), atol=0.045)


def test_a_batch_is_a_function_of_the_seed_the_part_and_its_number():
    first, second = opened(), opened()
    second.training_batch(0, 0.0)
    assert torch.equal(first.training_batch(4, 0.1).inputs, second.training_batch(4, 0.9).inputs)
    others = (first.training_batch(5, 0.1), first.validation_batch(4), opened(seed=6).training_batch(4, 0.1))
    assert all(not torch.equal(first.training_batch(4, 0.1).inputs, other.inputs) for other in others)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 128}, r"task.tokens: expected more than 2 \* votes = 128, got 128"),
        ({"votes": 7}, "task.votes: expected at least keys = 8, got 7"),
        ({"keys": 0}, "task.keys: expected 1 or more, got 0"),
        ({"values": 1}, "task.values: expected 2 or more, got 1"),
        ({"right": 0.125}, "task.right: expected more than 1 / values = 0.125, to 1, got 0.125"),
        ({"right": "most"}, "task.right: expected a number, got 'most'"),
    ],
)
def test_a_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Majority(**fields)
