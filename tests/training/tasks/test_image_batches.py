"""Batches of images follow from their number, and training alone shifts and mirrors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numpy")
from scatterbrain.training.tasks.image_batches import ImageBatches, shifted
from scatterbrain.training.tasks.images import Images


def images(train: int = 12, test: int = 6, side: int = 8) -> Images:
    """Every pixel of image number i is 10 + i, of the test part 100 + i, and i is the label."""
    parts = []
    for first, count in ((10, train), (100, test)):
        number = torch.arange(count)
        parts += [(first + number).to(torch.uint8)[:, None, None, None].expand(count, 3, side, side), number]
    return Images(*parts)


def batches(**changes) -> ImageBatches:
    return ImageBatches(
        **{"images": images(), "batch": 4, "seed": 0, "image_size": 8, "shift": 0, "mirror": False, "tokens": 64}
        | changes
    )


def numbers(inputs: torch.Tensor, first: int) -> list[int]:
    """Which image each one is, from its pixels."""
    return ((inputs[:, 0, 4, 4] + 1) * 127.5 - first).round().int().tolist()


def test_pixels_and_labels_stay_together_and_each_pass_visits_every_image_once():
    data = batches()
    passes = []
    for start in (0, 3):
        rows = [data.training_batch(number, 0.0) for number in range(start, start + 3)]
        assert all(numbers(batch.inputs, 10) == batch.targets.tolist() for batch in rows)
        passes.append([label for batch in rows for label in batch.targets.tolist()])
    assert all(sorted(labels) == list(range(12)) for labels in passes) and passes[0] != passes[1]


def test_a_batch_is_a_function_of_its_number_and_the_seed():
    noise = Images(*(torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8), torch.arange(12)) * 2)
    data = batches(images=noise, shift=3, mirror=True)
    first, fifth = data.training_batch(1, 0.0), data.training_batch(5, 0.0)
    again = batches(images=noise, shift=3, mirror=True)
    assert torch.equal(again.training_batch(5, 0.5).inputs, fifth.inputs)
    assert torch.equal(again.training_batch(1, 0.5).inputs, first.inputs)
    other = batches(images=noise, shift=3, mirror=True, seed=1)
    assert other.training_batch(1, 0.0).targets.tolist() != first.targets.tolist()


def test_validation_reads_the_test_images_unchanged_whatever_the_seed():
    data = batches(shift=3, mirror=True)
    first = data.validation_batch(0)
    assert numbers(first.inputs, 100) == first.targets.tolist()
    assert torch.equal(batches(seed=5).validation_batch(0).inputs, first.inputs)
    labels = first.targets.tolist() + data.validation_batch(1).targets.tolist()
    assert sorted(set(labels)) == list(range(6)) and labels[6:] == labels[:2]  # starts again after the last


def test_pixels_run_from_minus_one_to_one():
    extremes = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 8)
    data = batches(images=Images(extremes, torch.arange(2), extremes, torch.arange(2)), batch=2)
    inputs = data.validation_batch(0).inputs
    assert inputs.dtype == torch.float32 and sorted(inputs.unique().tolist()) == [-1, 1]


def test_shifts_move_an_image_and_fill_with_black():
    pixels = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).repeat(3, 1, 1, 1)
    moved = shifted(pixels, torch.tensor([[2, 1, 4], [2, 3, 0]]), 2)
    assert moved[0, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert moved[1, 0].tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]
    assert moved[2, 0].tolist() == [[0, 0, 7], [0, 0, 0], [0, 0, 0]]


def test_about_half_of_the_training_images_are_mirrored():
    ramp = torch.arange(8, dtype=torch.uint8).expand(1, 3, 8, 8)
    data = batches(images=Images(ramp, torch.zeros(1).long(), ramp, torch.zeros(1).long()), batch=200, mirror=True)
    inputs = data.training_batch(0, 0.0).inputs
    falls = inputs[:, 0, 0, 0] > inputs[:, 0, 0, -1]
    assert 60 < falls.sum() < 140
    assert torch.equal(inputs[falls].flip(-1)[:1], inputs[~falls][:1])


def test_images_are_resized_to_what_the_model_sees():
    data = batches(image_size=16)
    assert data.training_batch(0, 0.0).inputs.shape == data.validation_batch(0).inputs.shape == (4, 3, 16, 16)
    assert numbers(data.validation_batch(0).inputs, 100) == data.validation_batch(0).targets.tolist()


def test_the_description_says_what_there_is():
    assert batches().description == "12 images of 8 x 8 pixels to train on, 6 to validate on, 12 classes"
