"""Low-rank kernels: positive kernels with a finite feature expansion, ``L_ij = exp(rho_i + kappa_j) K(x_i, y_j)``, one
file each.

``query_map`` and ``key_map`` hold the coordinates x, y and, in their last column, the log scales rho, kappa.

An own kernel is a frozen dataclass derived from :class:`LowRankKernel` that defines ``kind`` and ``coordinates``:
non-negative features and a log scale per token. (Where two functions say it all, :class:`Features` takes them, without
a class.) It works in every function and module; :func:`register` lets
configuration files and the benchmark find it by its kind.
"""

from scatterbrain.low_rank.base import (
    LOW_RANK_KERNELS,
    Coefficients,
    Heads,
    LowRankKernel,
    State,
    StateOwner,
    check_coefficients,
    check_kind_of_coefficients,
    check_low_rank,
    register,
)
from scatterbrain.low_rank.centroid import Centroid, Clusters
from scatterbrain.low_rank.favor import Favor, RandomFeatures
from scatterbrain.low_rank.features import Features
from scatterbrain.low_rank.quadratic import Quadratic
from scatterbrain.low_rank.quadratic_coefficients import Projections, Statistics

LowRank = LowRankKernel | None

for _kernel in (Quadratic, Favor, Centroid):
    register(_kernel)

__all__ = [
    "LOW_RANK_KERNELS",
    "Coefficients",
    "Heads",
    "LowRank",
    "LowRankKernel",
    "State",
    "StateOwner",
    "check_coefficients",
    "check_kind_of_coefficients",
    "check_low_rank",
    "register",
    "Centroid",
    "Clusters",
    "Favor",
    "Features",
    "Projections",
    "Quadratic",
    "RandomFeatures",
    "Statistics",
]
