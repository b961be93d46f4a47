from __future__ import annotations

import pytest
import torch

from scatterbrain.training.tasks.documents import LabelledTexts
from scatterbrain.training.tasks.text_classification_data import LabelledPassages

TEXTS = LabelledTexts(
    ("lower", "upper"),
    [[b"abcdefghij" * 3, b"klm"], [b"ABCDEFGHIJ" * 2]],
    [[b"nopqrstuvw" + b"xyz", b"no"], [b"NOPQRSTUVWXYZ" * 4]],
)


def make(passages: str, batch: int = 16, seed: int = 0) -> LabelledPassages:
    return LabelledPassages(TEXTS, 10, passages, batch, seed)


def rows(batch) -> list[tuple[bytes, int]]:
    """The text of each row by its mask, and its class."""
    mask = torch.ones_like(batch.inputs, dtype=torch.bool) if batch.mask is None else batch.mask
    found = [bytes(row[kept].tolist()) for row, kept in zip(batch.inputs, mask, strict=True)]
    return list(zip(found, batch.targets.tolist(), strict=True))


@pytest.mark.parametrize("passages", ["first", "any"])
def test_a_passage_is_a_piece_of_a_training_text_of_its_class(passages):
    data, seen = make(passages), set()
    for number in range(8):
        batch = data.training_batch(number, 0.5)
        assert batch.inputs.shape == (16, 10) and batch.inputs.dtype == batch.targets.dtype == torch.int64
        for text, label in rows(batch):
            assert any(text in source and len(text) == min(10, len(source)) for source in TEXTS.training[label])
            assert text in [source[:10] for source in TEXTS.training[label]] or passages == "any"
            seen.add(text)
    assert b"klm" in seen and (len(seen) > 10 if passages == "any" else len(seen) == 3)


def test_padding_is_masked_and_whole_passages_need_no_mask():
    data = LabelledPassages(TEXTS, 10, "first", 2, 0)
    first, second = data.validation_batch(0), data.validation_batch(1)
    padded, whole = (first, second) if first.mask is not None else (second, first)
    assert padded.mask.sum(1).tolist() == [2, 10] and whole.mask is None
    assert padded.inputs[0].tolist() == [*b"no"] + [0] * 8


def test_any_cuts_validation_texts_into_passages_and_visits_each_class_in_turn():
    data = make("any", batch=2 * 5)
    found = rows(data.validation_batch(0))
    assert [label for _, label in found] == [0, 1] * 5
    assert sorted(text for text, label in found if label) == sorted(
        (b"NOPQRSTUVWXYZ" * 4)[start : start + 10] for start in range(0, 50, 10)
    )
    assert {text for text, label in found if not label} == {b"nopqrstuvw", b"no"}


def test_classes_are_drawn_equally_often_whatever_their_sizes():
    data = make("any", batch=400)
    share = torch.stack([data.training_batch(number, 0.0).targets for number in range(5)]).float().mean()
    assert abs(share - 0.5) < 0.05  # 4.5 standard deviations of 2,000 draws


def test_batches_are_functions_of_number_and_seed_and_validation_of_the_number_alone():
    def inputs(seed: int, number: int, validation: bool = False) -> list:
        data = make("any", seed=seed)
        return (data.validation_batch(number) if validation else data.training_batch(number, 0.3)).inputs.tolist()

    assert inputs(0, 3) == inputs(0, 3)
    assert inputs(0, 3) != inputs(0, 4) and inputs(0, 3) != inputs(1, 3)
    assert inputs(0, 3, validation=True) == inputs(1, 3, validation=True)


def test_the_description_counts_texts_and_names_the_classes():
    assert make("any").description == (
        "3 texts to train on, 7 passages of 10 bytes to validate on; 2 classes: lower, upper"
    )
