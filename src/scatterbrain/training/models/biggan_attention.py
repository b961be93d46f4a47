"""The attention block of BigGAN-deep (Brock et al., ICLR 2019; Zhang et al., ICML 2019), with the parameter names of
its published weights. Queries are all pixels, keys and values a quarter of them, and values are wider than keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scatterbrain.hilbert import hilbert_order, inverse_order
from scatterbrain.operators.device_constants import kept
from scatterbrain.operators.tracing import is_untraced
from scatterbrain.training.models.blocks import AttentionFactory
from scatterbrain.training.models.exchangeable import ExchangeableAttention, exact_attention


class BigGANAttention(ExchangeableAttention):
    """x + gamma * o(attention(theta(x), pooled phi(x), pooled g(x))), for images (batch, channels, height, width).

    Queries and keys have channels / 8 features, values channels / 2; 2 x 2 max pooling leaves a quarter of the keys.
    Scores have no scale. ``gamma`` starts at zero, so the block starts as the identity.

    Args:
        channels: a multiple of 8.
        attention: called with (1, 1, channels / 8), once; default exact.
        spectral_norm: whether the four convolutions divide their weight by its largest singular value, as BigGAN's do;
            each then has the buffers ``u0`` and ``sv0`` of the published code.
        hilbert: whether pixels are in the order of a Hilbert curve, the four of each pooled key beside each other; a
            window then holds the keys around its queries in the image. Exact attention is the same either way. Default
            true.
        generator: draws the weights of the convolutions, orthogonal ones as BigGAN's.

    Raises:
        ValueError: channels that do not divide by 8.
    """

    def __init__(
        self,
        channels: int,
        attention: AttentionFactory = exact_attention,
        spectral_norm: bool = True,
        hilbert: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if channels < 8 or channels % 8:
            raise ValueError(f"BigGANAttention: expected channels that are a multiple of 8, got {channels}")
        narrow, wide = channels // 8, channels // 2
        super().__init__(1, narrow, attention(1, 1, narrow), scale=1.0)
        self.hilbert = hilbert
        convolution = SpectralNormConv2d if spectral_norm else nn.Conv2d
        self.theta = convolution(channels, narrow, 1, bias=False)
        self.phi = convolution(channels, narrow, 1, bias=False)
        self.g = convolution(channels, wide, 1, bias=False)
        self.o = convolution(wide, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0))
        for layer in (self.theta, self.phi, self.g, self.o):
            nn.init.orthogonal_(layer.weight, generator=generator)
            if spectral_norm:
                layer.u0.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to the same shape.

        Raises:
            ValueError: an odd height or width, which 2 x 2 pooling would cut.
        """
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            raise ValueError(f"BigGANAttention: expected even height and width, got {height} x {width}; pad the image")
        query = _tokens(self.theta(x))
        key, value = (_tokens(F.max_pool2d(layer(x), 2)) for layer in (self.phi, self.g))
        if self.hilbert:
            pixels, back, cells = _orders(height, width, x.device)
            out = self.attend(query[:, :, pixels], key[:, :, cells], value[:, :, cells])[:, :, back]
        else:
            out = self.attend(query, key, value)
        return x + self.gamma * self.o(out.squeeze(1).transpose(1, 2).unflatten(2, (height, width)))


def _tokens(x: Tensor) -> Tensor:
    """(batch, channels, height, width) to (batch, 1, tokens, channels)."""
    return x.flatten(2).transpose(1, 2)[:, None]


def _orders(height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """The order of pixels, the one that undoes it, and that of pooled cells: the t-th pixel belongs to the cell t // 4
    of the last."""
    orders = kept(_make_orders, device, height, width) if is_untraced() else _make_orders(height, width, device)
    pixels = height * width
    return orders.split([pixels, pixels, pixels // 4])


def _make_orders(height: int, width: int, device: torch.device) -> Tensor:
    cells = hilbert_order(height // 2, width // 2)
    row, column = 2 * (cells // (width // 2)), 2 * (cells % (width // 2))
    pixels = torch.stack([(row + down) * width + column + right for down in (0, 1) for right in (0, 1)], 1).flatten()
    return torch.cat([pixels, inverse_order(pixels), cells]).to(device)


class SpectralNormConv2d(nn.Conv2d):
    """A convolution whose weight is divided by an estimate of its largest singular value (Miyato et al., ICLR 2018):
    one step of the power iteration per call, kept in training alone.

    Buffers:
        u0: (1, out_channels), the left singular vector. sv0: (1,), the last estimate, for logs.
    """

    EPSILON = 1e-12

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("u0", torch.randn(1, self.out_channels))
        self.register_buffer("sv0", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self._largest_singular_value(), self.bias)

    def _largest_singular_value(self) -> Tensor:
        """In the weight's own type under autocast too, or the estimate would move with rounding."""
        with torch.autocast(self.weight.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            with torch.no_grad():
                right = F.normalize(self.u0 @ matrix, eps=self.EPSILON)
                left = F.normalize(right @ matrix.T, eps=self.EPSILON)
            value = (left @ matrix @ right.T).squeeze()
            if self.training:
                with torch.no_grad():
                    self.u0.copy_(left)
                    self.sv0.fill_(value.detach())
            return value
