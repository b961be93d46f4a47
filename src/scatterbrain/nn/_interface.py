"""Stand-ins for members of supports and low-rank kernels, until those classes have them."""

from __future__ import annotations

import math

from scatterbrain.low_rank import Favor, Quadratic
from scatterbrain.nn.attention import ScatterbrainAttention
from scatterbrain.supports import LSH, SUPPORTS, Full, Routed, Window


def check_support(support):
    if not isinstance(support, SUPPORTS):
        raise TypeError(
            f"support must be one of {', '.join(s.__name__ for s in SUPPORTS)}, got {type(support).__name__}"
        )


def check_low_rank(low_rank):
    if low_rank is not None and not isinstance(low_rank, (Quadratic, Favor)):
        raise TypeError(f"low_rank must be Quadratic, Favor or None, got {type(low_rank).__name__}")


def _own_lists(keys):
    return Routed(8 * math.ceil(keys / 8), block_q=1, block_k=8)


def _for_cross_attention(support):
    if isinstance(support, LSH):
        raise ValueError("LSH sorts all queries, which would show a target token the ones after it; use Routed")
    if isinstance(support, Routed) and support.block_q > 1:
        own, why = _own_lists(support.keys), "lists that queries share would show a target token the ones after it"
    elif isinstance(support, Window) or (isinstance(support, Routed) and support.window):
        own, why = _own_lists(support.keys), "a window lies where the number of target tokens puts it"
    else:
        return support, ""
    return own, f"{own}: {why}"


def _has_state(core):
    if isinstance(core.low_rank, Quadratic) and core.low_rank.statistics == "stored":
        return core.is_calibrated
    return next(iter((*core.parameters(), *core.buffers())), None) is not None


def _needs_calibration(core):
    if core.support.is_full or not isinstance(core.low_rank, Quadratic):
        return False
    return core.low_rank.statistics == "stored" and not core.is_calibrated and not core._collecting


for cls in SUPPORTS:
    cls.is_full = cls is Full
    cls.for_cross_attention = _for_cross_attention
for cls in (Quadratic, Favor):
    cls.reads_input = property(lambda self: getattr(self, "statistics", None) == "input")
    cls.adds_parameters = property(lambda self: getattr(self, "statistics", None) == "learned")
    cls.least_head_dim = property(lambda self: getattr(self, "rank", 1))
ScatterbrainAttention.has_state = property(_has_state)
ScatterbrainAttention.needs_calibration = property(_needs_calibration)
ScatterbrainAttention.is_exact = property(lambda self: self.support.is_full)
