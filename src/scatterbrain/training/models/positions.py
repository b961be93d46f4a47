"""Positions that are learned, one vector for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearnedPositions(nn.Module):
    """Adds a vector of its own to each position.

    Args:
        tokens: The longest sequence.
        width: Features of a token.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) from (B, N, width).

        Raises:
            ValueError: more tokens than there are positions.
        """
        tokens, longest = x.shape[1], self.weight.shape[0]
        if tokens > longest:
            raise ValueError(
                f"expected at most {longest} tokens, which have a learned position, got {tokens}; use "
                "model.positions: rotary, or train with longer sequences"
            )
        return x + self.weight[:tokens].to(x.dtype)
