"""The recall task: what it shows, asks and scores, read token by token."""

from __future__ import annotations

import pytest
import torch

from scatterbrain.training.batch import Batch
from scatterbrain.training.config import DataConfig, TrainConfig
from scatterbrain.training.tasks.recall import Recall, RecallData


def opened(batch: int = 4, seed: int = 5, **fields) -> RecallData:
    return Recall(**fields).open(DataConfig(), TrainConfig(batch=batch, seed=seed))


def check_rows(batch: Batch, keys: int, values: int, pairs: int) -> None:
    """Reads each row from the left: a key and its value after it, blanks, then questions alone."""
    for tokens, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        shown: dict[int, int] = {}
        asked: list[int] = []
        place = 0
        while place < len(tokens):
            token = tokens[place]
            if token == keys + values:
                assert targets[place] == -100
            elif token in shown:
                assert targets[place] == shown[token]
                asked.append(token)
            else:
                assert token < keys and keys <= tokens[place + 1] < keys + values
                assert targets[place : place + 2] == [-100, -100] and not asked
                shown[token] = tokens[place + 1]
                place += 1
            place += 1
        assert len(shown) == pairs and sorted(asked) == sorted(shown)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pairs": 5, "tokens": 40, "keys": 9, "values": 7, "first_pairs": 2},
        {"pairs": 341, "tokens": 1024, "keys": 341},
        {"pairs": 64, "tokens": 1024},
    ],
)
def test_every_key_is_asked_once_and_its_value_alone_is_scored(fields):
    data = opened(**fields)
    task = data.task
    for batch in (data.validation_batch(0), data.training_batch(3, 1.0)):
        assert batch.inputs.shape == batch.targets.shape == (4, task.tokens) and batch.mask is None
        check_rows(batch, task.keys, task.values, task.pairs)
    assert data.input_size == data.classes == task.keys + task.values + 1


def test_a_wrong_target_would_be_seen():
    batch = opened().validation_batch(0)
    wrong = torch.where(batch.targets >= 0, batch.targets.roll(1, 1), batch.targets)
    with pytest.raises(AssertionError):
        check_rows(batch._replace(targets=wrong), 64, 64, 64)


def test_pairs_grow_with_the_share_of_the_run_and_a_batch_keeps_its_tokens():
    data = opened()
    batches = [data.training_batch(0, share) for share in (0.0, 0.39, 0.5, 0.6, 1.0)]
    assert [tuple(batch.inputs.shape) for batch in batches] == [(16, 48), (16, 48), (6, 120), (4, 192), (4, 192)]
    for batch in batches:
        check_rows(batch, 64, 64, batch.inputs.shape[1] // 3)


def test_questions_come_in_an_order_that_says_nothing_of_the_values():
    tokens = opened(batch=64).validation_batch(0).inputs
    assert float((tokens[:, 0:128:2] == tokens[:, 128:]).double().mean()) < 0.05


def test_a_batch_is_a_function_of_the_seed_the_part_and_its_number():
    first, second = opened(), opened()
    second.training_batch(0, 0.0)
    assert torch.equal(first.training_batch(4, 1.0).inputs, second.training_batch(4, 1.0).inputs)
    assert torch.equal(first.validation_batch(2).targets, second.validation_batch(2).targets)
    others = (first.training_batch(5, 1.0), first.validation_batch(4), opened(seed=6).training_batch(4, 1.0))
    assert all(not torch.equal(first.training_batch(4, 1.0).inputs, other.inputs) for other in others)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 191}, r"task.tokens: expected at least 3 \* pairs = 192, got 191"),
        ({"keys": 63}, "task.keys: expected at least pairs = 64, got 63"),
        ({"values": 1}, "task.values: expected 2 or more, got 1"),
        ({"pairs": 0}, "task.pairs: expected 1 or more, got 0"),
        ({"first_pairs": 65}, "task.first_pairs: expected 1 to pairs = 64, got 65"),
        ({"first_share": 1.5}, "task.first_share: expected 0 to 1, got 1.5"),
        ({"full_share": 0.3}, "task.full_share: expected first_share = 0.4 to 1, got 0.3"),
        ({"pairs": "many"}, "task.pairs: expected an int, got 'many'"),
    ],
)
def test_a_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Recall(**fields)
