"""Images as sequences of pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from scatterbrain.training.config import DataConfig, TrainConfig
from scatterbrain.training.tasks.image_sequence import ImageSequence, ImageSequenceData


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Ten pictures of 4 x 6 to train on and five to test on. Their label is their number modulo 3."""
    pixels = np.random.default_rng(0).integers(0, 256, (15, 4, 6, 3), dtype=np.uint8)
    labels = np.arange(15) % 3
    np.savez(
        tmp_path / "pictures.npz", x_train=pixels[:10], y_train=labels[:10], x_test=pixels[10:], y_test=labels[10:]
    )
    return str(tmp_path / "pictures.npz")


def opened(path: str, batch: int = 5, seed: int = 0, **fields) -> ImageSequenceData:
    return ImageSequence(**fields).open(DataConfig(path=path), TrainConfig(batch=batch, seed=seed))


def test_a_token_is_a_pixel_row_by_row_and_its_feature_the_brightness(path):
    data = opened(path)
    batch = data.validation_batch(0)
    assert batch.inputs.shape == (5, 24, 1) and batch.inputs.dtype == torch.float32 and batch.mask is None
    with np.load(path) as file:
        grey = file["x_test"] @ np.array([0.299, 0.587, 0.114]) / 127.5 - 1
        labels = file["y_test"]
    for row, label in zip(batch.inputs, batch.targets.tolist(), strict=True):
        [picture] = [n for n in range(5) if np.allclose(row.flatten(), grey[n].flatten(), atol=1e-5)]
        assert labels[picture] == label
    assert (data.input_size, data.classes, data.tokens, data.has_features) == (1, 3, 24, True)


def test_colours_are_three_features(path):
    data = opened(path, colours=True)
    with np.load(path) as file:
        pictures = file["x_test"].reshape(5, 24, 3) / 127.5 - 1
    rows = data.validation_batch(0).inputs
    assert rows.shape == (5, 24, 3) and data.input_size == 3
    assert all(any(np.allclose(row, picture, atol=1e-5) for picture in pictures) for row in rows)


def test_a_side_averages_pixels(path):
    data = opened(path, side=2)
    whole = opened(path).validation_batch(0).inputs.view(5, 2, 2, 2, 3)
    assert torch.allclose(data.validation_batch(0).inputs.view(5, 2, 2), whole.mean((2, 4)), atol=1e-5)
    assert data.tokens == 4


def test_a_pass_shows_every_training_picture_once_and_the_next_in_another_order(path):
    data = opened(path)
    batches = [data.training_batch(number, 0.0).inputs for number in range(8)]
    passes = [torch.cat(batches[first : first + 2]) for first in range(0, 8, 2)]
    whole = sorted(passes[0].sum((1, 2)).tolist())
    assert all(sorted(rows.sum((1, 2)).tolist()) == whole for rows in passes) and len(set(whole)) == 10
    assert any(not torch.equal(passes[0], rows) for rows in passes[1:])
    test_pictures = data.validation_batch(0).inputs
    assert not any(torch.equal(row, other) for row in passes[0] for other in test_pictures)


def test_batches_are_functions_of_their_number_and_validation_does_not_depend_on_the_seed(path):
    first, second, other = opened(path), opened(path), opened(path, seed=1)
    forward = [first.training_batch(number, 0.0).inputs for number in range(6)]
    backward = [second.training_batch(number, 1.0).inputs for number in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert any(not torch.equal(rows, other.training_batch(number, 0.0).inputs) for number, rows in enumerate(forward))
    assert torch.equal(first.validation_batch(0).inputs, other.validation_batch(0).inputs)


def test_a_missing_path_says_where_data_come_from_and_their_layout():
    with pytest.raises(ValueError, match=r"data.path: expected a .npz file .* got 'nowhere'.*kriz/cifar"):
        opened("nowhere")


def test_a_bad_field_is_named(path, tmp_path):
    with pytest.raises(ValueError, match="task.side: expected 2 or more, or null, got 1"):
        ImageSequence(side=1)
    with pytest.raises(ValueError, match="task.side: expected at most the pictures' own 4, got 5"):
        opened(path, side=5)
    grey = np.zeros((2, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", x_train=grey, y_train=[0, 1], x_test=grey, y_test=[0, 1])
    with pytest.raises(ValueError, match="task.colours: expected false for the grey pictures of data.path, got True"):
        opened(str(tmp_path / "grey.npz"), colours=True)
