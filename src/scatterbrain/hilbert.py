"""Order of the cells of a grid along a Hilbert curve.

Attention does not depend on the order of its tokens, but everything that works on runs of neighbouring tokens does.
Along a Hilbert curve a run of image patches is a compact piece of the picture, where in raster order it is a strip one
patch high.
"""

import torch
from torch import Tensor


def hilbert_order(height: int, width: int) -> Tensor:
    """The cells of a height x width grid in the order of a Hilbert curve (D. Hilbert, 1891) through the smallest square
    of 2^n cells that covers it.

    Args:
        height, width: cells, each at least 1.

    Returns:
        int64 (height * width,): entry t is the raster number, row * width + column, of the t-th cell;
        ``patches[order]`` reorders patches in raster order.

    Raises:
        ValueError: height or width below 1.
    """
    if height < 1 or width < 1:
        raise ValueError(f"hilbert_order: height and width must be at least 1, got {height} and {width}")
    cell = torch.arange(height * width)
    side = 1 << (max(height, width) - 1).bit_length()
    return torch.argsort(hilbert_distance(cell // width, cell % width, side))


def hilbert_distance(row: Tensor, column: Tensor, side: int) -> Tensor:
    """How far along the curve through a square of ``side`` x ``side`` cells each cell lies.

    Args:
        row, column: integers of one shape, each in [0, side).
        side: a power of two.

    Returns:
        int64 of the same shape, in [0, side * side).
    """
    x, y = column.long(), row.long()
    distance = torch.zeros_like(x)
    half = side // 2
    while half > 0:
        right, low = (x & half) > 0, (y & half) > 0
        # The curve passes the quadrants in the order top left, bottom left, bottom right, top right; inside the first
        # it is mirrored on the diagonal, inside the last on the other one.
        distance += half * half * (3 * right.long() ^ low.long())
        swap, flip = ~low, ~low & right
        x, y = (
            torch.where(flip, half - 1 - (x & (half - 1)), x & (half - 1)),
            torch.where(flip, half - 1 - (y & (half - 1)), y & (half - 1)),
        )
        x, y = torch.where(swap, y, x), torch.where(swap, x, y)
        half //= 2
    return distance


def inverse_order(order: Tensor) -> Tensor:
    """The order that undoes ``order``: ``tokens[order][inverse_order(order)]`` is ``tokens``."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse
