"""The time that a training step spends in attention."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class AttentionTimer:
    """Adds up the seconds that the wrapped attention modules spend in their forward and backward passes.

    The forward pass is timed around the call. For the backward pass there is an identity before and after the module.
    Autograd reaches the one on the output when the output's gradient is complete, just before the backward pass of the
    attention, and the one on query, key and value when the attention has computed all three gradients. Autograd runs
    the nodes of a device one after another, latest first, so the work between the two belongs to the attention:
    routing, low-rank coordinates, kernels, and the gradients of its own parameters. The projections to query, key and
    value and the output projection are not counted.

    On a GPU each reading waits for the device, so the timed step loses some overlap.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def reset(self) -> None:
        self.seconds = 0.0

    def start(self, device: torch.device) -> None:
        self._started = now(device)

    def stop(self, device: torch.device) -> None:
        self.seconds += now(device) - self._started


class TimedAttention(nn.Module):
    """An attention module whose forward and backward passes are timed. Compiled graphs end before it and go on after
    it: the clock is read when the step runs, and untraced calls of attention are the fastest."""

    def __init__(self, attention: nn.Module, timer: AttentionTimer) -> None:
        super().__init__()
        self.attention = attention
        self._timer = timer

    @torch.compiler.disable(reason="the clock is read when the step runs")
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **options: Tensor | bool,
    ) -> Tensor:
        query, key, value = _StopInBackward.apply(self._timer, query, key, value)
        self._timer.start(query.device)
        output = self.attention(query, key, value, **options)
        self._timer.stop(query.device)
        return _StartInBackward.apply(self._timer, output)


class _StopInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, timer, query, key, value):
        ctx.timer = timer
        return query.view_as(query), key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx, *gradients):
        ctx.timer.stop(gradients[0].device)
        return None, *gradients


class _StartInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, timer, output):
        ctx.timer = timer
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        ctx.timer.start(gradient.device)
        return None, gradient
