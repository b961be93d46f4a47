"""What a model reads and what it is judged by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Inputs and targets of a forward pass.

    Args:
        inputs: int64 (batch, tokens), float32 (batch, tokens, features), images (batch, channels, height, width), or
            int64 (batch, 2, tokens) of pairs.
        targets: int64 (batch, tokens), or (batch,) where a sequence has one; -100 is not scored.
        mask: bool (batch, tokens), of pairs (batch, 2, tokens), True where a token counts; None where all do.
            Attention modules take the opposite, a padding mask.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in self))

    @property
    def tokens(self) -> int:
        """Read by the model, padding included; of images, pixels."""
        shape = self.inputs.shape
        if self.inputs.ndim == 4:
            return shape[0] * shape[2] * shape[3]
        return self.inputs.numel() if self.inputs.dtype == torch.int64 else self.inputs.numel() // shape[-1]
