"""T2T-ViT (Yuan et al., ICCV 2021), with the parameter names and shapes of its published weights. Its first layers
attend over thousands of tokens; there sparse + low-rank attention takes the place of softmax or Performer attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scatterbrain.hilbert import hilbert_order, inverse_order
from scatterbrain.training.models.blocks import AttentionFactory
from scatterbrain.training.models.exchangeable import ExchangeableAttention, exact_attention
from scatterbrain.training.models.vision_block import Mlp, VisionBlock, initialise_linear_layers, through

SPLITS = ((7, 4), (3, 2), (3, 2))  # kernel and stride of each soft split, as published


class T2TViT(nn.Module):
    """Images to class logits: three soft splits with a token transformer after each of the first two, then a class
    token, fixed sinusoidal positions, and blocks of attention. The defaults are T2T-ViT_t-14; with
    ``tokens="performer"`` they are T2T-ViT-14.

    Published weights of both were trained with ``scale=width ** -0.5`` in the blocks.

    Args:
        image_size: height and width in pixels, a multiple of the strides' product.
        channels: of an image. classes: logits.
        width, depth, heads: of the blocks. mlp_width: hidden features of their MLPs; default 3 times the width.
        token_width: features of a token between the soft splits.
        tokens: kind of the token transformers, "transformer" or "performer": which parameters they have, and which
            attention computes them without ``token_attention``.
        splits: (kernel, stride) of each soft split.
        scale: factor of q.k in the blocks; default (width / heads) ** -0.5.
        attention: makes the attention of each block; default exact.
        token_attention: makes the attention of the two token transformers, which have one head of ``token_width``;
            default softmax, or random features as published for "performer".
        hilbert: whether token transformers and blocks see tokens in the order of a Hilbert curve, in which near tokens
            are near in the image; default raster order. Exact attention is the same in both.
        generator: draws every weight except those of ``attention`` and ``token_attention``.

    ``recompute``, False at first, makes the backward pass compute every block and token transformer again in place of
    keeping what is inside.

    Raises:
        ValueError: a size that does not fit.
    """

    def __init__(
        self,
        image_size: int = 224,
        channels: int = 3,
        classes: int = 1000,
        width: int = 384,
        depth: int = 14,
        heads: int = 6,
        mlp_width: int | None = None,
        token_width: int = 64,
        tokens: str = "transformer",
        splits: tuple[tuple[int, int], ...] = SPLITS,
        scale: float | None = None,
        attention: AttentionFactory = exact_attention,
        token_attention: AttentionFactory | None = None,
        hilbert: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.recompute = False
        if width % heads:
            raise ValueError(f"T2TViT: expected a width that is a multiple of heads={heads}, got {width}")
        self.tokens_to_token = TokensToToken(
            image_size, channels, width, token_width, tokens, splits, token_attention, hilbert
        )
        side = self.tokens_to_token.sides[-1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(sinusoids(side**2 + 1, width)[None], requires_grad=False)
        hidden = 3 * width if mlp_width is None else mlp_width
        self.blocks = nn.ModuleList(
            VisionBlock(width, heads, hidden, attention, False, scale, exact_queries=1) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        order = 1 + hilbert_order(side, side) if hilbert else None
        self.register_buffer("order", order if order is None else F.pad(order, (1, 0)), persistent=False)
        nn.init.trunc_normal_(self.cls_token, std=0.02, generator=generator)
        initialise_linear_layers(self, generator)
        self.tokens_to_token.draw_features(generator)

    def forward(self, images: Tensor, mask: None = None) -> Tensor:
        """(batch, channels, image_size, image_size) to logits (batch, classes). Of images every token counts, so there
        is no ``mask``."""
        x = self.tokens_to_token(images, self.recompute)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        if self.order is not None:
            x = x[:, self.order]
        for block in self.blocks:
            x = through(block, x, self.recompute)
        return self.head(self.norm(x[:, 0]))


class TokensToToken(nn.Module):
    """The soft splits and token transformers; arguments as :class:`T2TViT`. A soft split joins the features of
    overlapping squares of tokens, so a token of the next stage holds kernel x kernel of this one's."""

    def __init__(
        self,
        image_size: int,
        channels: int,
        width: int,
        token_width: int,
        tokens: str,
        splits: tuple[tuple[int, int], ...],
        token_attention: AttentionFactory | None,
        hilbert: bool,
    ) -> None:
        super().__init__()
        kinds = {"transformer": TokenTransformer, "performer": TokenPerformer}
        if tokens not in kinds:
            raise ValueError(f"T2TViT: expected tokens 'transformer' or 'performer', got {tokens!r}")
        if len(splits) != 3 or any(kernel < stride or stride < 1 for kernel, stride in splits):
            raise ValueError(f"T2TViT: expected three splits (kernel, stride) with kernel >= stride, got {splits}")
        self.image_size, self.sides = image_size, []
        side, features = image_size, channels
        for stage, (kernel, stride) in enumerate(splits):
            if side % stride:
                total = math.prod(stride for _, stride in splits)
                raise ValueError(f"T2TViT: expected an image_size that is a multiple of {total}, got {image_size}")
            side //= stride
            self.sides.append(side)
            split = nn.Unfold(kernel, padding=(kernel - stride + 1) // 2, stride=stride)
            self.add_module(f"soft_split{stage}", split)
            if stage < 2:
                transformer = kinds[tokens](features * kernel**2, token_width, token_attention)
                self.add_module(f"attention{stage + 1}", transformer)
                features = token_width
                order = hilbert_order(side, side) if hilbert else None
                self.register_buffer(f"order{stage + 1}", order, persistent=False)
        self.project = nn.Linear(token_width * splits[2][0] ** 2, width)

    def forward(self, images: Tensor, recompute: bool = False) -> Tensor:
        """(batch, channels, image_size, image_size) to (batch, tokens, width), tokens in raster order."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            expected = f"{self.image_size} x {self.image_size}"
            raise ValueError(f"T2TViT: expected images of {expected}, got {tuple(images.shape)}; set image_size")
        x = self.soft_split0(images).transpose(1, 2)
        x = self._as_image(self._attend(self.attention1, x, self.order1, recompute), self.sides[0])
        x = self.soft_split1(x).transpose(1, 2)
        x = self._as_image(self._attend(self.attention2, x, self.order2, recompute), self.sides[1])
        return self.project(self.soft_split2(x).transpose(1, 2))

    def draw_features(self, generator: torch.Generator | None) -> None:
        """Draws the random features of Performer attention."""
        for module in self.modules():
            if isinstance(module, TokenPerformer):
                module.draw_features(generator)

    def _attend(self, transformer: nn.Module, x: Tensor, order: Tensor | None, recompute: bool) -> Tensor:
        if order is None:
            return through(transformer, x, recompute)
        return through(transformer, x[:, order], recompute)[:, inverse_order(order)]

    def _as_image(self, x: Tensor, side: int) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (side, side))


class TokenTransformer(nn.Module):
    """attn(norm1(x)), then x + mlp(norm2(x)): (batch, tokens, width) to (batch, tokens, token_width)."""

    def __init__(self, width: int, token_width: int, attention: AttentionFactory | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = TokenAttention(width, token_width, attention or exact_attention)
        self.norm2 = nn.LayerNorm(token_width)
        self.mlp = Mlp(token_width, token_width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenAttention(ExchangeableAttention):
    """One head that narrows tokens. What is added to its output is the values, since the input is wider; and the scale
    is that of the input's width, as published."""

    def __init__(self, width: int, token_width: int, attention: AttentionFactory) -> None:
        super().__init__(1, token_width, attention(1, 1, token_width), scale=width**-0.5)
        self.qkv = nn.Linear(width, 3 * token_width, bias=False)
        self.proj = nn.Linear(token_width, token_width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x)[:, None].chunk(3, dim=-1)
        return (value + self.proj(self.attend(query, key, value))).squeeze(1)


class TokenPerformer(ExchangeableAttention):
    """A token transformer whose attention is that of the Performer: the kernel exp(q.k), without a scale, by
    token_width / 2 positive random features that are drawn once, orthogonal to each other (Choromanski et al., ICLR
    2021). With ``attention`` that computes it, on the same queries and keys; the features then stay unused."""

    EPSILON = 1e-8  # added to a row's total weight, as published

    def __init__(self, width: int, token_width: int, attention: AttentionFactory | None) -> None:
        inner = None if attention is None else attention(1, 1, token_width)
        super().__init__(1, token_width, inner, scale=1.0)
        features = token_width // 2
        self.norm1 = nn.LayerNorm(width)
        self.kqv = nn.Linear(width, 3 * token_width)
        self.proj = nn.Linear(token_width, token_width)
        self.w = nn.Parameter(torch.empty(features, token_width), requires_grad=False)
        self.norm2 = nn.LayerNorm(token_width)
        self.mlp = nn.Sequential(nn.Linear(token_width, token_width), nn.GELU(), nn.Linear(token_width, token_width))

    def draw_features(self, generator: torch.Generator | None) -> None:
        """Orthogonal rows of norm sqrt(features)."""
        nn.init.orthogonal_(self.w, gain=math.sqrt(len(self.w)), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        key, query, value = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        if self.attention is None:
            attended = self._linear_attention(query, key, value)
        else:
            attended = self.attend(query[:, None], key[:, None], value[:, None]).squeeze(1)
        x = value + self.proj(attended)
        return x + self.mlp(self.norm2(x))

    def _linear_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """In float32 under autocast too: exponentials of half types would lose the small weights."""
        with torch.autocast(query.device.type, enabled=False):
            query, key = self._features(query), self._features(key)
            sums = query @ (key.transpose(1, 2) @ value.float())
            total = query @ key.sum(1)[:, :, None]
            return (sums / (total + self.EPSILON)).to(value.dtype)

    def _features(self, x: Tensor) -> Tensor:
        """exp(w.x - |x|^2 / 2) / sqrt(features), in float32: (batch, tokens, width) to (batch, tokens, features)."""
        x = x.float()
        exponent = F.linear(x, self.w.float()) - x.square().sum(-1, keepdim=True) / 2
        return exponent.exp() / math.sqrt(len(self.w))


def sinusoids(positions: int, width: int) -> Tensor:
    """Sine and cosine of position / 10000 ** (2 j / width) in turn, float32 (positions, width) (Vaswani et al.,
    NeurIPS 2017, section 3.5)."""
    frequency = 10000.0 ** (-2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    is_even = torch.arange(width) % 2 == 0
    return torch.where(is_even, angle.sin(), angle.cos()).float()
