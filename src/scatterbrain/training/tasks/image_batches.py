"""Batches of labelled images: shuffled, shifted and mirrored for training, as they are for validation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scatterbrain.training.batch import Batch
from scatterbrain.training.tasks.fingerprint import fingerprint_of
from scatterbrain.training.tasks.images import Images
from scatterbrain.training.tasks.randomness import generator_of


class ImageBatches:
    """Batches are functions of their number. Every pass over the training images visits them in another order, and
    validation reads the published test images in one fixed order, in which classes are mixed.

    Args:
        images: as they were read.
        batch: images per batch.
        seed: of the order, the shifts and the mirroring.
        image_size: height and width that a model sees; square images of another size are resized bilinearly.
        shift: training images move by up to so many pixels in each direction; black follows.
        mirror: whether every other training image is mirrored, left to right.
        tokens: of the longest sequence that attention reads.
    """

    has_features = False

    def __init__(
        self, images: Images, batch: int, seed: int, image_size: int, shift: int, mirror: bool, tokens: int
    ) -> None:
        self.images, self.batch, self.seed = images, batch, seed
        self.image_size, self.shift, self.mirror = image_size, shift, mirror
        self.input_size, self.classes = images.train.shape[1], images.classes
        self.tokens = tokens
        height, width = images.train.shape[2:]
        self.fingerprint = fingerprint_of(images)
        self.description = (
            f"{len(images.train):,} images of {height} x {width} pixels to train on, {len(images.test):,} to validate "
            f"on, {images.classes} classes"
        )
        self._order_of_test = torch.randperm(len(images.test), generator=generator_of(0, "images", "validation"))
        self._pass_number, self._order = -1, None

    def training_batch(self, number: int, fraction: float) -> Batch:
        """float32 (batch, channels, image_size, image_size) from -1 to 1, and labels int64 (batch,)."""
        rows = torch.tensor([self._row(number * self.batch + place) for place in range(self.batch)])
        generator = generator_of(self.seed, "images", "training", number)
        pixels = self.images.train[rows]
        if self.shift > 0:
            pixels = shifted(
                pixels, torch.randint(2 * self.shift + 1, (2, self.batch), generator=generator), self.shift
            )
        if self.mirror:
            is_mirrored = torch.randint(2, (self.batch, 1, 1, 1), generator=generator) == 1
            pixels = torch.where(is_mirrored, pixels.flip(-1), pixels)
        return Batch(self._scaled(pixels), self.images.train_labels[rows])

    def validation_batch(self, number: int) -> Batch:
        """As a training batch, without shifts or mirroring; after the last test image the first follows."""
        places = torch.arange(number * self.batch, (number + 1) * self.batch) % len(self.images.test)
        rows = self._order_of_test[places]
        return Batch(self._scaled(self.images.test[rows]), self.images.test_labels[rows])

    def _row(self, place: int) -> int:
        pass_number, index = divmod(place, len(self.images.train))
        if pass_number != self._pass_number:
            generator = generator_of(self.seed, "images", "order", pass_number)
            self._order = torch.randperm(len(self.images.train), generator=generator)
            self._pass_number = pass_number
        return int(self._order[index])

    def _scaled(self, pixels: Tensor) -> Tensor:
        pixels = pixels.float() / 127.5 - 1
        if pixels.shape[-1] != self.image_size:
            pixels = F.interpolate(pixels, (self.image_size, self.image_size), mode="bilinear", align_corners=False)
        return pixels


def shifted(pixels: Tensor, start: Tensor, most: int) -> Tensor:
    """Each image of ``pixels`` (batch, channels, height, width) cut out of itself with ``most`` black pixels around it,
    from the row and the column that ``start``, int64 (2, batch), names."""
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (most,) * 4)
    cuts = zip(padded, start[0].tolist(), start[1].tolist())
    return torch.stack([image[:, row : row + height, column : column + width] for image, row, column in cuts])
