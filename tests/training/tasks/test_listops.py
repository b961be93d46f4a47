from __future__ import annotations

import hashlib
import re
from statistics import median

import pytest
import torch

from scatterbrain.training.config import DataConfig, TrainConfig
from scatterbrain.training.tasks import listops_sequences
from scatterbrain.training.tasks.listops import ListOps, ListOpsData
from scatterbrain.training.tasks.listops_sequences import NAMES, Shape, draw_sequences, text_of

SHORT = Shape(shortest=16, longest=64, depth=4, arguments=4)
PAPER = Shape(shortest=500, longest=2000, depth=10, arguments=10)

OPERATORS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(median(values)),
    "[SM": lambda values: sum(values) % 10,
}


def value_of_text(text: str) -> int:
    """Reads the words from the left, with a stack of open brackets."""
    open_lists: list[tuple[str, list[int]]] = [("", [])]
    for word in text.split():
        if word in OPERATORS:
            open_lists.append((word, []))
        elif word == "]":
            name, values = open_lists.pop()
            open_lists[-1][1].append(OPERATORS[name](values))
        else:
            open_lists[-1][1].append(int(word))
    [(_, [value])] = open_lists
    return value


def depth_of(text: str) -> int:
    depth = deepest = 0
    for word in text.split():
        depth += (word in OPERATORS) - (word == "]")
        deepest = max(deepest, depth)
    return deepest


@pytest.mark.parametrize(
    ("text", "value"),
    [("[MED 1 2 4 9 ]", 3), ("[SM 9 9 [MIN 5 3 ] ]", 1), ("[MAX 0 [MED 7 2 5 ] 1 ]", 5), ("[MED 2 3 ]", 2)],
)
def test_the_judge_of_this_file_evaluates_examples_done_by_hand(text, value):
    assert value_of_text(text) == value


@pytest.mark.parametrize(("count", "shape"), [(400, SHORT), (40, PAPER)])
def test_the_target_is_the_value_of_the_tokens(count, shape):
    inputs, values, mask = draw_sequences(count, shape, 0, "training", 0)
    lengths = mask.sum(1)
    assert inputs.shape == mask.shape == (count, lengths.max()) and inputs.dtype == torch.int64
    for row, value, length in zip(inputs, values.tolist(), lengths.tolist(), strict=True):
        text = text_of(row.tolist())
        assert value_of_text(text) == value
        assert len(text.split()) == length and shape.shortest <= length <= shape.longest
        assert depth_of(text) <= shape.depth
    assert torch.equal(mask, torch.arange(inputs.shape[1]) < lengths[:, None])
    assert bool((inputs[~mask] == 0).all()) and inputs.max() < len(NAMES)


def test_all_operators_digits_depths_and_numbers_of_arguments_occur():
    inputs, values, _ = draw_sequences(500, SHORT, 0, "training", 0)
    assert set(inputs.flatten().tolist()) == set(range(len(NAMES)))
    assert set(values.tolist()) == set(range(10))
    assert {depth_of(text_of(row.tolist())) for row in inputs} == {2, 3, 4}


def test_lengths_are_spread_between_both_bounds():
    lengths = draw_sequences(2000, SHORT, 0, "training", 0)[2].sum(1)
    assert int((lengths < 32).sum()) > 500 and int((lengths > 48).sum()) > 500


def test_the_most_frequent_value_is_no_answer_to_most_sequences():
    values = draw_sequences(1000, Shape(100, 512, 10, 10), 0, "training", 0)[1]
    assert torch.bincount(values).max() < 220


def test_no_sequence_is_in_both_parts():
    """Of two short lists there are few, so that parts drawn without a rule share many."""
    few = Shape(shortest=4, longest=5, depth=1, arguments=3)
    drawn = {
        part: {tuple(row.tolist()) for row in draw_sequences(3000, few, 0, part, 0)[0]}
        for part in ("training", "validation")
    }
    assert not drawn["training"] & drawn["validation"]
    assert len(drawn["training"]) > 1000 and len(drawn["validation"]) > 300
    for part, rows in drawn.items():
        for row in rows:
            of_validation = hashlib.sha256(bytes(token for token in row if token)).digest()[0] % 8 == 0
            assert of_validation == (part == "validation")


def test_a_batch_is_a_function_of_the_seed_and_its_number():
    first, again = (draw_sequences(4, SHORT, 3, "training", 5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for seed, part, number in ((4, "training", 5), (3, "training", 6), (3, "validation", 5)):
        other = draw_sequences(4, SHORT, seed, part, number)
        assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


def test_the_usual_length_counts_operators_brackets_and_digits():
    assert Shape(1, 1, depth=1, arguments=4).usual_length() == 2 + 3
    assert Shape(1, 1, depth=2, arguments=4).usual_length() == 2 * (1 + 3) + 9


def test_a_wrong_operator_would_be_seen(monkeypatch):
    monkeypatch.setattr(listops_sequences, "value_of", lambda operator, values: max(values))
    with pytest.raises(AssertionError):
        test_the_target_is_the_value_of_the_tokens(40, SHORT)


def opened(batch: int = 3, **fields) -> ListOpsData:
    return ListOps(**fields).open(DataConfig(), TrainConfig(batch=batch, seed=5))


def test_the_task_gives_sequences_of_its_shape_and_states_what_guesses_reach():
    data = opened(tokens=64, shortest=16, depth=4, arguments=4)
    for batch in (data.training_batch(0, 0.0), data.validation_batch(0)):
        lengths = batch.mask.sum(1)
        assert batch.inputs.shape == batch.mask.shape and 16 <= lengths.min() and lengths.max() <= 64
        for row, target in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            assert value_of_text(text_of(row)) == target
    assert (data.input_size, data.classes, data.tokens) == (16, 10, 64)
    frequent, by_operator = (int(share) for share in re.findall(r"(\d+)%", data.description))
    assert 10 <= frequent < by_operator < 40


def test_lists_grow_and_a_batch_has_fewer_of_them():
    data = opened(tokens=64, shortest=16, depth=4, arguments=4, first_tokens=16, first_share=0.25, full_share=0.75)
    for fraction, rows, shortest, longest in ((0.0, 12, 4, 16), (0.5, 6, 8, 32), (0.75, 3, 16, 64)):
        lengths = torch.cat([data.training_batch(number, fraction).mask.sum(1) for number in range(20)])
        assert lengths.numel() == 20 * rows
        assert shortest - 2 <= lengths.min() and lengths.max() <= longest and lengths.max() > 3 * longest // 4
    assert data.validation_batch(0).inputs.shape[0] == 3 and data.validation_batch(0).mask.sum(1).min() >= 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_tokens": 3}, "task.first_tokens: expected 4 to task.tokens 512, got 3"),
        ({"first_share": 0.9}, "task.full_share: expected first_share = 0.9 to 1, got 0.8"),
        ({"depth": 3, "arguments": 4}, "task.tokens: expected 4 to 53, which depth = 3 and arguments = 4 leave room"),
        ({"shortest": 513}, "task.shortest: expected 4 to tokens = 512, got 513"),
        ({"arguments": 1}, "task.arguments: expected 2 or more, got 1"),
        ({"depth": 0}, "task.depth: expected 1 or more, got 0"),
        ({"tokens": None}, "task.tokens: expected an int, got None"),
        (
            {"tokens": 512, "shortest": 512, "arguments": 2},
            "task.shortest: expected 4 to 511, .* arguments = 2 has 512 to 512 tokens, got 512",
        ),
        (
            {"tokens": 6, "shortest": 6, "arguments": 3},
            "task.shortest: expected 4 to 5, as no list with arguments = 3 has 6 to 6 tokens, got 6",
        ),
        (
            {"tokens": 511, "shortest": 511, "arguments": 2, "first_tokens": 127},
            "task.shortest: expected less than 511, .* arguments = 2 has 254 to 254 tokens, .* task.first_tokens = 127",
        ),
    ],
)
def test_a_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ListOps(**fields)


@pytest.mark.parametrize("arguments", [2, 3, 4])
def test_the_lengths_that_lists_have_are_those_that_are_drawn(arguments):
    for length in range(4, 17):
        shape = Shape(length, length, depth=4, arguments=arguments)
        if shape.has_lists():
            assert draw_sequences(2, shape, 0, "training", 0)[2].sum(1).tolist() == [length, length]
        else:
            with pytest.raises(ValueError, match=f"task.shortest: .* {length} to {length} tokens"):
                draw_sequences(2, shape, 0, "training", 0)
    unreachable = [length for length in range(4, 17) if not Shape(length, length, 4, arguments).has_lists()]
    assert unreachable == {2: [5, 6, 8, 9, 11, 12, 14, 15], 3: [6], 4: []}[arguments]


def test_lists_that_are_too_rare_to_be_found_end_in_an_error(monkeypatch):
    monkeypatch.setattr(listops_sequences, "ATTEMPTS", 50)
    monkeypatch.setattr(listops_sequences, "is_validation", lambda tokens: False)
    with pytest.raises(ValueError, match="task.shortest: expected lists .* got none in 50 draws"):
        draw_sequences(1, SHORT, 0, "validation", 0)


def test_a_length_that_no_part_of_the_run_asks_for_is_not_refused():
    settings = {"tokens": 511, "shortest": 511, "arguments": 2, "first_tokens": 127}
    ListOps(**settings, first_share=0.5, full_share=0.5)  # from 127 to 511 at once
    ListOps(**settings, first_share=0.0, full_share=0.0)


@pytest.mark.parametrize(("first_share", "full_share"), [(0.4, 0.8), (0.5, 0.5), (0.0, 0.0), (0.0, 1.0)])
def test_the_lengths_of_a_run_are_those_of_its_shares(first_share, full_share):
    task = ListOps(tokens=500, first_tokens=100, first_share=first_share, full_share=full_share)
    asked = {task.tokens_at(share / 1000, 500) for share in range(1001)}
    assert task.lengths(500) == sorted(asked)
    assert ListOps().lengths(500) == [500]
