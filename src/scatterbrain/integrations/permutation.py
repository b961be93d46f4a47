"""Hilbert orders of image tokens, and reordering by them."""

from __future__ import annotations

import torch
from torch import Tensor

from scatterbrain.hilbert import hilbert_distance, hilbert_order, inverse_order
from scatterbrain.operators.device_constants import kept
from scatterbrain.operators.tracing import is_untraced


def _make_grid_orders(height: int, width: int, prefix: int, device: torch.device) -> Tensor:
    patches = hilbert_order(height, width)
    order = torch.cat([torch.arange(prefix), patches + prefix])
    return torch.stack([order, inverse_order(order)]).to(device)


def _grid_orders(height: int, width: int, prefix: int, device: torch.device) -> Tensor:
    """int64 (2, prefix + height * width): the order and its inverse, which nobody may write to."""
    if is_untraced():
        return kept(_make_grid_orders, device, height, width, prefix)
    return _make_grid_orders(height, width, prefix, device)


@torch.library.custom_op("scatterbrain::grid_order", mutates_args=())
def _grid_order(height: int, width: int, prefix: int, inverse: bool, device: torch.device) -> Tensor:
    """:func:`_grid_orders` as an operator for compiled graphs, whose sizes may be symbols. Returns a copy, since a
    graph may write into its inputs."""
    return _grid_orders(height, width, prefix, device)[int(inverse)].clone()


@_grid_order.register_fake
def _(height: int, width: int, prefix: int, inverse: bool, device: torch.device) -> Tensor:
    return torch.empty(prefix + height * width, dtype=torch.int64, device=device)


def coordinate_order(coordinates: Tensor, valid: Tensor | None, prefix: int) -> Tensor:
    """Hilbert order of tokens that carry their coordinates, for each row of the batch.

    Args:
        coordinates: integers (batch, patches, 2), row and column.
        valid: bool (batch, patches), False = padding, which keeps its place; None for no padding.
        prefix: tokens before the patches, which keep their places.

    Returns:
        int64 (batch, prefix + patches): entry t is the index of the token that comes t-th.
    """
    batch, patches, _ = coordinates.shape
    side = 1 << max(patches - 1, 1).bit_length()  # no grid of that many patches has a longer side
    distance = hilbert_distance(coordinates[..., 0].clamp(0, side - 1), coordinates[..., 1].clamp(0, side - 1), side)
    if valid is None:
        order = distance.argsort(dim=-1, stable=True)
    else:
        tokens = distance.masked_fill(~valid, side * side).argsort(dim=-1, stable=True)
        slots = (~valid).to(torch.int8).argsort(dim=-1, stable=True)
        order = torch.empty_like(tokens).scatter_(1, slots, tokens)
    first = torch.arange(prefix, device=order.device).expand(batch, prefix)
    return torch.cat([first, order + prefix], 1)


class Permutation:
    """An order of (prefix + patches) tokens, int64 (tokens) or, with one order per batch row, (batch, tokens)."""

    def __init__(self, order: Tensor, inverse: Tensor, prefix: int) -> None:
        self.order, self.inverse, self.prefix = order, inverse, prefix

    def apply(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, ...) into this order."""
        return _take(tokens, self.order)

    def apply_to_patches(self, rotations: Tensor) -> Tensor:
        """Angles of the patches, (..., patches, channels), into this order, which is one for the whole batch."""
        return rotations.index_select(-2, self.order[self.prefix :] - self.prefix)

    def undo(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, ...) back from this order."""
        return _take(tokens, self.inverse)

    def undo_patches(self, patches: Tensor) -> Tensor:
        """Patches without their prefix, (batch, patches, channels) or (batch, channels, height, width), back."""
        inverse = self.inverse[..., self.prefix :] - self.prefix
        if patches.dim() == 3:
            return _take(patches, inverse)
        return patches.flatten(2).index_select(2, inverse).view_as(patches)

    def undo_pairs(self, weights: Tensor) -> Tensor:
        """Attention weights (batch, heads, tokens, tokens) back."""
        return weights.index_select(2, self.inverse).index_select(3, self.inverse)


def grid_permutation(height: int, width: int, prefix: int, device: torch.device) -> Permutation:
    """The Hilbert order of patches that form one grid, behind ``prefix`` tokens that keep their places."""
    if torch.compiler.is_compiling():
        order, inverse = (_grid_order(height, width, prefix, which, device) for which in (False, True))
    else:
        order, inverse = _grid_orders(height, width, prefix, device)
    return Permutation(order, inverse, prefix)


def _take(tokens: Tensor, order: Tensor) -> Tensor:
    if order.dim() == 1:
        return tokens.index_select(1, order)
    return tokens.gather(1, order[..., None].expand(*order.shape, tokens.shape[2]))
