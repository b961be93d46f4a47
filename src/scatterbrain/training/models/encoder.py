"""Bidirectional transformers: a class for every token, for a sequence, or for a pair of sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scatterbrain.training.config import ModelConfig
from scatterbrain.training.models.blocks import AttentionFactory, Transformer, uniform
from scatterbrain.training.models.positions import LearnedPositions


class Encoder(Transformer):
    """Embedding, blocks of bidirectional attention, and a linear head on every token.

    Args:
        config: Sizes and variants.
        input_size: Number of tokens of the vocabulary or, where ``has_features``, features of a token.
        classes: Of the head.
        attention: Makes the attention of a layer.
        generator: Draws every weight except those of the attention modules, so models that differ in attention alone
            start from the same weights.
        tokens: The longest sequence, for learned positions.
        has_features: Whether tokens are vectors, such as pixels, rather than numbers of a vocabulary.
    """

    def __init__(
        self,
        config: ModelConfig,
        input_size: int,
        classes: int,
        attention: AttentionFactory,
        generator: torch.Generator | None = None,
        tokens: int | None = None,
        has_features: bool = False,
    ) -> None:
        super().__init__(config, attention, is_causal=False)
        self.embedding = nn.Linear(input_size, config.width) if has_features else nn.Embedding(input_size, config.width)
        self.positions = LearnedPositions(tokens, config.width) if config.positions == "learned" else None
        self.head = self._build_head(classes)
        self._initialise(generator)

    def _build_head(self, classes: int) -> nn.Module:
        return nn.Linear(self.config.width, classes)

    def features(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Of every token, (B, N, width), from int64 (B, N) or float (B, N, features)."""
        x = self.embedding(inputs)
        if self.positions is not None:
            x = self.positions(x)
        return self.transform(x, mask)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, N, classes)."""
        return self.head(self.features(inputs, mask))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        std = self.config.embedding_std * self.config.width**-0.5
        if isinstance(self.embedding, nn.Embedding):
            nn.init.normal_(self.embedding.weight, std=std, generator=generator)
        else:
            uniform(self.embedding, 1.0, generator)
            nn.init.zeros_(self.embedding.bias)
        self.initialise_blocks(generator)
        for layer in self.head.modules():
            if isinstance(layer, nn.Linear):
                uniform(layer, 1.0, generator)
                nn.init.zeros_(layer.bias)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=std, generator=generator)


class SequenceClassifier(Encoder):
    """An encoder with one class for a sequence, from the mean of its tokens' features or from the first token's, as
    ``config.pooling`` says."""

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, classes)."""
        return self.head(self.pooled(inputs, mask))

    def pooled(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features (B, width): the mean of the tokens that count, or those of the first one that does."""
        x = self.features(inputs, mask)
        if self.config.pooling == "first":
            first = x.new_zeros(x.shape[0], dtype=torch.int64) if mask is None else mask.int().argmax(dim=1)
            return x[torch.arange(x.shape[0], device=x.device), first]
        if mask is None:
            return x.mean(dim=1)
        # Padding content must not matter, and NaN times zero is NaN.
        x = x.masked_fill(~mask[..., None], 0)
        return x.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


class PairClassifier(SequenceClassifier):
    """One class for a pair of sequences, which go through the same encoder apart from one another. A hidden layer reads
    the pooled features of both, their product and the size of their difference: whether two are alike is no linear
    function of them."""

    def _build_head(self, classes: int) -> nn.Module:
        width = self.config.width
        return nn.Sequential(nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, classes))

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, classes) from (B, 2, N)."""
        pooled = self.pooled(inputs.flatten(0, 1), None if mask is None else mask.flatten(0, 1))
        first, second = pooled.unflatten(0, (-1, 2)).unbind(dim=1)
        both = torch.cat((first, second, first * second, (first - second).abs()), dim=-1)
        return self.head(both)
