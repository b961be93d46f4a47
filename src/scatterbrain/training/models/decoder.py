"""A small decoder-only transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scatterbrain.training.config import ModelConfig
from scatterbrain.training.models.blocks import AttentionFactory, Transformer, uniform
from scatterbrain.training.models.positions import LearnedPositions


class Decoder(Transformer):
    """Token embedding, blocks of causal attention, and a linear head.

    Args:
        config: Sizes and variants.
        vocabulary: Number of tokens.
        attention: Makes the attention of a layer.
        generator: Draws every weight except those of the attention modules, so models that differ in attention alone
            start from the same weights.
        tokens: The longest sequence, for learned positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: int,
        attention: AttentionFactory,
        generator: torch.Generator | None = None,
        tokens: int | None = None,
    ) -> None:
        super().__init__(config, attention, is_causal=True)
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.positions = LearnedPositions(tokens, config.width) if config.positions == "learned" else None
        self.head = None if config.tied else nn.Linear(config.width, vocabulary, bias=False)
        self._initialise(generator)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, N, vocabulary) of the token after each of ``inputs``, int64 (B, N)."""
        x = self.embedding(inputs)
        if self.positions is not None:
            x = self.positions(x)
        x = self.transform(x, mask)
        return F.linear(x, self.embedding.weight if self.head is None else self.head.weight)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        std = self.config.embedding_std * self.config.width**-0.5
        nn.init.normal_(self.embedding.weight, std=std, generator=generator)
        self.initialise_blocks(generator)
        if self.head is not None:
            uniform(self.head, 1.0, generator)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=std, generator=generator)
