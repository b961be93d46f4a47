"""Labelled images, from one npz file or from the published python batches of CIFAR-10."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NPZ = (
    "a .npz file with x_train, x_test (uint8, images x height x width x 3, or without the 3 for grey images), y_train "
    "and y_test"
)
BATCHES = "the folder cifar-10-batches-py with data_batch_1 to data_batch_5 and test_batch"
SOURCE = "CIFAR-10 is at https://www.cs.toronto.edu/~kriz/cifar.html, as the 'python version'"
CIFAR_SIDE = 32


class Images(NamedTuple):
    """Images with their labels, split as they were published.

    Args:
        train, test: uint8 (images, channels, height, width), 3 channels of colour images and 1 of grey ones.
        train_labels, test_labels: int64 (images,), from 0.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """One more than the largest label of either part."""
        return 1 + int(max(self.train_labels.max(), self.test_labels.max()))


def read_images(path: str | Path) -> Images:
    """Reads ``path``: a .npz file, the folder of CIFAR-10's python batches, or the folder that holds this folder.

    Raises:
        ValueError: naming data.path, what is wrong there, the layout that is expected and where CIFAR-10 is found.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        inner = root / "cifar-10-batches-py"
        return _read_batches(inner if inner.is_dir() else root)
    if root.is_file():
        return _read_npz(root)
    raise _unusable(path, "which does not exist")


def _unusable(path: str | Path, what: str) -> ValueError:
    return ValueError(f"data.path: expected {NPZ}, or {BATCHES}, got {str(path)!r}, {what}. {SOURCE}")


# -------------------- npz


def _read_npz(path: Path) -> Images:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    except KeyError as error:
        raise _unusable(path, f"which lacks an array: {error.args[0]}") from error
    except (OSError, EOFError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise _unusable(path, f"which cannot be read: {error}") from error
    parts = []
    for part in ("train", "test"):
        parts += [_pixels(path, f"x_{part}", arrays[f"x_{part}"]), _labels(path, f"y_{part}", arrays[f"y_{part}"])]
        if len(parts[-2]) != len(parts[-1]):
            raise _unusable(path, f"with {len(parts[-2])} images in x_{part} and {len(parts[-1])} labels in y_{part}")
    if parts[0].shape[1:] != parts[2].shape[1:]:
        raise _unusable(
            path, f"with images of {tuple(parts[0].shape[1:])} in x_train and {tuple(parts[2].shape[1:])} in x_test"
        )
    return Images(*parts)


def _pixels(path: Path, name: str, array: np.ndarray) -> Tensor:
    is_grey = array.ndim == 3
    if array.dtype != np.uint8 or not (is_grey or (array.ndim == 4 and array.shape[3] in (1, 3))) or array.size == 0:
        raise _unusable(path, f"with {name} of {array.dtype}, shape {array.shape}")
    pixels = torch.from_numpy(array)
    return (pixels[:, None] if is_grey else pixels.permute(0, 3, 1, 2)).contiguous()


def _labels(path: Path, name: str, array: np.ndarray) -> Tensor:
    """Labels of shape (images, 1) too, as some copies of CIFAR-10 have them."""
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 1):
        raise _unusable(path, f"with {name} of {array.dtype}, shape {array.shape}; labels are integers, one per image")
    if array.size and array.min() < 0:
        raise _unusable(path, f"with the label {array.min()} in {name}; labels count from 0")
    return torch.from_numpy(array.astype(np.int64).reshape(-1))


# -------------------- python batches


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays, lists, dictionaries and strings. A pickle can call any function, so no other name is
    looked up."""

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
        (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 does")
        if name == "_reconstruct":  # moved between versions of numpy, so that the published name warns
            return np.empty(0).__reduce__()[0]
        return super().find_class(module, name)


def _read_batches(folder: Path) -> Images:
    missing = [name for name in (*_train_names(), "test_batch") if not (folder / name).is_file()]
    if missing:
        raise _unusable(folder, f"a folder without {', '.join(missing)}")
    batches = [_read_batch(folder / name) for name in _train_names()]
    train, train_labels = (torch.cat(tensors) for tensors in zip(*batches))
    return Images(train, train_labels, *_read_batch(folder / "test_batch"))


def _train_names() -> list[str]:
    return [f"data_batch_{number}" for number in range(1, 6)]


def _read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """A dictionary with data, uint8 (images, 3072) with a row's red, green and blue pixels in turn, and labels."""
    try:
        with open(path, "rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        data, labels = batch[b"data"], np.asarray(batch[b"labels"])
    except (OSError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unusable(path, f"which cannot be read as a batch: {error}") from error
    size = 3 * CIFAR_SIDE**2
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != size:
        raise _unusable(path, f"whose data are not uint8 of shape (images, {size})")
    if len(data) == 0 or len(labels) != len(data):
        raise _unusable(path, f"with {len(data)} images and {len(labels)} labels")
    pixels = torch.from_numpy(data).reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).contiguous()
    return pixels, _labels(path, "labels", labels)
