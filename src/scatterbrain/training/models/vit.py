"""A vision transformer (Dosovitskiy et al., ICLR 2021), with the parameter names of timm's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scatterbrain.hilbert import hilbert_order
from scatterbrain.training.models.blocks import AttentionFactory
from scatterbrain.training.models.exchangeable import exact_attention
from scatterbrain.training.models.vision_block import VisionBlock, initialise_linear_layers, through

NORM_EPS = 1e-6  # of ViT, which timm keeps


class VisionTransformer(nn.Module):
    """Images to class logits: a linear embedding of square patches, learned positions, pre-norm blocks of bidirectional
    attention, a norm, pooling and a linear head.

    timm's ``VisionTransformer`` of the same sizes has the same state dict: with ``pooling="class"`` by default,
    with "mean" for ``global_pool="avg", class_token=False, fc_norm=False``.

    Args:
        image_size: height and width in pixels, a multiple of ``patch_size``.
        patch_size: height and width of a patch; each is one token.
        channels: of an image. classes: logits.
        width, depth, heads: of the blocks. mlp_width: hidden features of their MLPs; default 4 times the width.
        pooling: "mean" of all tokens, or "class" for a token of its own, which sees every key whatever the support.
            Default "mean": every query is then approximated alike.
        attention: makes the attention of each block; default exact.
        hilbert: whether blocks see patches in the order of a Hilbert curve, in which near tokens are near in the image;
            windows and lists that neighbours share gain from it. Exact attention is the same in both. Default true.
        generator: draws every weight except those of ``attention``.

    ``recompute``, False at first, makes the backward pass compute every block again in place of keeping what is inside.

    Raises:
        ValueError: a size or a pooling that does not fit.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        channels: int,
        classes: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int | None = None,
        pooling: str = "mean",
        attention: AttentionFactory = exact_attention,
        hilbert: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size < 1 or image_size % patch_size:
            raise ValueError(
                f"VisionTransformer: expected an image_size that is a multiple of patch_size={patch_size}, got "
                f"{image_size}"
            )
        if width % heads:
            raise ValueError(f"VisionTransformer: expected a width that is a multiple of heads={heads}, got {width}")
        if pooling not in ("mean", "class"):
            raise ValueError(f"VisionTransformer: expected pooling 'mean' or 'class', got {pooling!r}")
        self.image_size, self.pooling, self.recompute = image_size, pooling, False
        side, first = image_size // patch_size, int(pooling == "class")
        self.patch_embed = PatchEmbedding(channels, width, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if first else None
        self.pos_embed = nn.Parameter(torch.empty(1, first + side**2, width))
        hidden = 4 * width if mlp_width is None else mlp_width
        self.blocks = nn.ModuleList(
            VisionBlock(width, heads, hidden, attention, True, exact_queries=first, norm_eps=NORM_EPS)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.head = nn.Linear(width, classes)
        order = F.pad(first + hilbert_order(side, side), (first, 0)) if hilbert else None
        self.register_buffer("order", order, persistent=False)
        self._initialise(generator)

    def forward(self, images: Tensor, mask: None = None) -> Tensor:
        """(batch, channels, image_size, image_size) to logits (batch, classes). Of images every token counts, so there
        is no ``mask``."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            expected = f"{self.image_size} x {self.image_size}"
            raise ValueError(
                f"VisionTransformer: expected images of {expected}, got {tuple(images.shape)}; set image_size"
            )
        x = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self.pos_embed
        if self.order is not None:
            x = x[:, self.order]
        for block in self.blocks:
            x = through(block, x, self.recompute)
        if self.pooling == "class":
            return self.head(self.norm(x[:, 0]))
        return self.head(self.norm(x).mean(1))

    def _initialise(self, generator: torch.Generator | None) -> None:
        """As :func:`initialise_linear_layers`, the patches' too; positions and the class token of deviation .02."""
        initialise_linear_layers(self, generator)
        projection = self.patch_embed.proj
        bound = projection.weight[0].numel() ** -0.5
        nn.init.uniform_(projection.weight, -bound, bound, generator=generator)
        nn.init.zeros_(projection.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02, generator=generator)


class PatchEmbedding(nn.Module):
    """A linear map of each patch: (batch, channels, height, width) to (batch, patches, features), in raster order."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)
