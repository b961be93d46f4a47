"""The precision of the forward pass: float32, or autocast to a type of 16 bits."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from scatterbrain.training.config import TrainConfig

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast, and with it, in float16, the scale of the loss that keeps small gradients from vanishing. Weights,
    gradients and the optimizer's averages are float32 whatever the precision is.

    Args:
        train: ``precision`` and ``bf16`` of it count.
        device: where the model is.
    """

    def __init__(self, train: TrainConfig, device: torch.device) -> None:
        name = "bf16" if train.bf16 else train.precision
        self.dtype, self.device = AUTOCAST.get(name), device
        self.scales_loss = self.dtype == torch.float16
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.scales_loss)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Around a forward pass."""
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose backward pass gives gradients times the scale."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the scale, and notes whether one has overflowed."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step of the optimizer, unless a scaled gradient has overflowed. Then the scale is halved; after 2000 steps
        without it is doubled.

        Raises:
            FloatingPointError: gradients that overflow without any scale.
        """
        self._scaler.step(optimizer)
        self._scaler.update()
        if self.scales_loss and self._scaler.get_scale() < 1:
            raise FloatingPointError(
                "expected gradients that float16 holds, got some that overflow without a scale of the loss; use "
                "train.precision bf16 or float32, or lower train.learning_rate"
            )

    def state(self) -> dict[str, Tensor]:
        """What an exact continuation needs: the scale, float64, and the steps since it changed, int64; nothing where
        the loss is not scaled."""
        state = self._scaler.state_dict()
        if not state:
            return {}
        tracker = torch.tensor(state["_growth_tracker"], dtype=torch.int64)
        return {"scale": torch.tensor(state["scale"], dtype=torch.float64), "growth_tracker": tracker}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what :meth:`state` gave."""
        if self.scales_loss:
            own = self._scaler.state_dict()
            own |= {"scale": state["scale"].item(), "_growth_tracker": int(state["growth_tracker"])}
            self._scaler.load_state_dict(own)
