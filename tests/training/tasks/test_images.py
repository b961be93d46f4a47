"""Labelled images are read from both layouts, and what does not fit is named with the layout that does."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
from scatterbrain.training.tasks.images import read_images


def arrays(side: int = 32, channels: tuple[int, ...] = (3,), train: int = 10, test: int = 4) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    parts = (("train", train), ("test", test))
    pixels = {f"x_{part}": draw.integers(0, 256, (n, side, side, *channels), np.uint8) for part, n in parts}
    return pixels | {f"y_{part}": draw.integers(0, 10, n, np.uint8) for part, n in parts}


def npz(folder: Path, **changes: np.ndarray | None) -> Path:
    """The file with some arrays changed, or left out where they are None."""
    content = {name: value for name, value in (arrays() | changes).items() if value is not None}
    np.savez(folder / "images.npz", **content)
    return folder / "images.npz"


def batches(folder: Path, content: dict[str, np.ndarray]) -> Path:
    """As CIFAR-10 is published: protocol 2, byte strings as keys, channels before rows."""
    folder.mkdir()
    rows = [("test_batch", content["x_test"], content["y_test"])]
    for number in range(5):
        part = slice(2 * number, 2 * number + 2)
        rows.append((f"data_batch_{number + 1}", content["x_train"][part], content["y_train"][part]))
    for name, pixels, labels in rows:
        planes = np.stack([pixels[..., channel].reshape(len(pixels), -1) for channel in range(3)], 1)
        batch = {b"data": planes.reshape(len(pixels), 3072), b"labels": labels.tolist(), b"batch_label": name.encode()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def test_pixels_and_labels_keep_their_places(tmp_path: Path):
    want, images = arrays(), read_images(npz(tmp_path))
    assert images.train.dtype == images.test.dtype == torch.uint8
    assert images.train.shape == (10, 3, 32, 32) and images.test.shape == (4, 3, 32, 32)
    for image, channel, row, column in ((0, 0, 0, 0), (7, 2, 3, 31), (9, 1, 31, 4)):
        assert images.train[image, channel, row, column] == want["x_train"][image, row, column, channel]
    assert images.test_labels.tolist() == want["y_test"].tolist()
    assert images.train_labels.dtype == torch.int64
    assert images.classes == 1 + max(want["y_train"].max(), want["y_test"].max())


@pytest.mark.parametrize("inner", ["cifar-10-batches-py", "any name"])
def test_both_layouts_give_the_same_images(tmp_path: Path, inner: str):
    folder = batches(tmp_path / inner, arrays())
    if inner == "cifar-10-batches-py":
        folder = tmp_path  # the folder that holds it
    for mine, theirs in zip(read_images(folder), read_images(npz(tmp_path)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("channels", [(), (1,)])
def test_grey_images_of_any_size_have_one_channel(tmp_path: Path, channels: tuple[int, ...]):
    content = arrays(28, channels)
    images = read_images(npz(tmp_path, **content))
    assert images.train.shape == (10, 1, 28, 28)
    assert torch.equal(images.train[:, 0], torch.from_numpy(content["x_train"].reshape(10, 28, 28)))


def test_labels_may_be_a_column(tmp_path: Path):
    content = arrays()
    images = read_images(npz(tmp_path, y_train=content["y_train"][:, None]))
    assert images.train_labels.tolist() == content["y_train"].tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"y_test": None}, "lacks an array.*y_test"),
        ({"x_train": np.zeros((10, 32, 32, 3), np.float32)}, "x_train of float32"),
        ({"x_train": np.zeros((10, 3, 32, 32), np.uint8)}, r"x_train of uint8, shape \(10, 3, 32, 32\)"),
        ({"x_train": np.zeros((0, 32, 32, 3), np.uint8), "y_train": np.zeros(0, int)}, r"x_train of uint8, shape \(0"),
        ({"x_test": np.zeros((4, 28, 28, 3), np.uint8)}, r"\(3, 32, 32\) in x_train and \(3, 28, 28\) in x_test"),
        ({"y_train": np.zeros(9, np.uint8)}, "10 images in x_train and 9 labels in y_train"),
        ({"y_train": np.zeros(10)}, "y_train of float64"),
        ({"y_train": np.full(10, -1)}, "label -1 in y_train"),
        ({"y_train": np.array([{}] * 10)}, "cannot be read"),  # would have to be unpickled
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, changes: dict, said: str):
    with pytest.raises(ValueError, match=rf"data\.path: expected a \.npz file.*images\.npz.*{said}.*cifar\.html"):
        read_images(npz(tmp_path, **changes))


def test_a_missing_path_says_the_layout_and_where_to_get_the_data(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.path.*x_train.*data_batch_1.*does not exist.*https://.*cifar\.html"):
        read_images(tmp_path / "nothing.npz")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_archive_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "images.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.path.*images\.npz.*cannot be read"):
        read_images(tmp_path / "images.npz")


def test_a_folder_without_batches_names_the_missing_ones(tmp_path: Path):
    folder = batches(tmp_path / "some", arrays())
    (folder / "data_batch_3").unlink()
    with pytest.raises(ValueError, match=r"data\.path.*a folder without data_batch_3\."):
        read_images(folder)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({b"labels": [0]}, "cannot be read as a batch"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, "not uint8 of shape"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "2 images and 1 labels"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(tmp_path: Path, batch: dict, said: str):
    folder = batches(tmp_path / "some", arrays())
    (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ValueError, match=rf"data\.path.*test_batch.*{said}"):
        read_images(folder)


class Command:
    """A pickle that would run a command when it is read."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_a_batch_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = batches(tmp_path / "some", arrays())
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": Command(), b"labels": [0]}, protocol=2))
    with pytest.raises(ValueError, match="cannot be read as a batch.*which no batch of CIFAR-10 does"):
        read_images(folder)
    assert not (tmp_path / "ran").exists()
