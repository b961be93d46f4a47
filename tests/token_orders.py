"""Settings with an order of tokens, and the check that blocks see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import scatterbrain as sb
from scatterbrain.hilbert import hilbert_order

EVERY_KEY: dict[str, Any] = {"support": sb.Window(4096), "low_rank": None, "token_order": "hilbert"}
ORDERED: dict[str, Any] = {"support": sb.Full(), "token_order": "hilbert"}
WINDOW: dict[str, Any] = {"support": sb.Window(4), "low_rank": sb.Quadratic(4, "input")}


class Seen:
    """A hook that keeps the tokens entering the first block, and is allowed inside the ordered part."""

    __module__ = "scatterbrain.tests"

    def __init__(self, block: nn.Module) -> None:
        block.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.tokens = args[0]


def check_curve(model: nn.Module, block: nn.Module, x: Tensor, prefix: int, grid: tuple[int, int], **arguments) -> None:
    """The first block of the ordered model gets the original's tokens along the curve, prefix tokens first."""
    seen = Seen(block)
    with torch.no_grad():
        model(x, **arguments)
        before = seen.tokens
        report = sb.replace_attention(model, **ORDERED)
        model(x, **arguments)
        report.restore()
    order = torch.cat([torch.arange(prefix), hilbert_order(*grid) + prefix])
    assert prefix + grid[0] * grid[1] == before.shape[1]
    torch.testing.assert_close(seen.tokens, before[:, order])
    assert not torch.equal(seen.tokens, before)
