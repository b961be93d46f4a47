"""Files of text and images as inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scatterbrain.macos_files import without_macos_files

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def files(path: Path, suffixes: Sequence[str] | None) -> list[Path]:
    """The file, or the files of a folder, in the order of their names."""
    if path.is_file():
        return [path]
    names = without_macos_files(file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
    found = [path / name for name in names if suffixes is None or name.suffix.lower() in suffixes]
    if not found:
        raise ValueError(f"{path}: expected a folder with {' or '.join(suffixes or ['files'])}, found none")
    return found


def images(path: Path, count: int, size: int) -> Tensor:
    """(count, 3, size, size) in [0, 1], or fewer where there are fewer: resized bicubically, evenly spread over what
    there is. Of a folder only those are read.

    Raises:
        ValueError: no images.
    """
    if path.suffix in (".npz", ".npy"):
        available, read = _array(path), lambda pixels: pixels.float() / 255
    else:
        available, read = files(path, IMAGES), _read_image
    count = min(count, len(available))
    resized = []
    for i in range(count):
        image = read(available[i * len(available) // count])[None]
        resized.append(torch.nn.functional.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(0, 1))
    return torch.cat(resized)


def _array(path: Path) -> Tensor:
    """uint8 (count, 3, height, width)."""
    import numpy as np

    content = np.load(path)
    arrays = [content] if isinstance(content, np.ndarray) else [content[name] for name in content.files]
    for array in arrays:
        if array.ndim == 4 and len(array) and array.dtype == np.uint8 and 3 in (array.shape[1], array.shape[3]):
            pixels = torch.from_numpy(array)
            return pixels if array.shape[1] == 3 else pixels.permute(0, 3, 1, 2)
    raise ValueError(
        f"{path}: expected an array of images, uint8 (count, height, width, 3) or (count, 3, height, width)"
    )


def _read_image(path: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
