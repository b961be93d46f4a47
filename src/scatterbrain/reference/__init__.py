"""The definition of Scatterbrain attention: dense, in float64, gradients by autograd. Slow, obvious, and the oracle of
every test.

It shares no code with what it judges: it imports torch and the data classes (supports, low-rank kernels and their
statistics), reads their fields and calls no operator. One page per concept:

    inputs.py     what one call is given: padding, valid ranges, causal edge
    supports.py   which pairs are exact
    routing.py    the lists of Routed
    lsh.py        the clusters of LSH
    low_rank.py   the kernel of the other pairs, and the statistics it is fitted to
    centroid.py   clusters of keys, and the kernel that they make
    attention.py  weights, normaliser, output

A support or a low-rank kernel of your own is defined without touching the package::

    @sb.reference.support_mask.register
    def _(support: MySupport, inputs: sb.reference.Inputs) -> Tensor:
        return ...  # bool (B, Hq, N, M): the exact pairs; padding and the causal edge are applied afterwards

    @sb.reference.log_kernel.register
    def _(low_rank: MyKernel, inputs: sb.reference.Inputs) -> tuple[Tensor, Tensor]:
        return ...  # (log scale, factor), both (B, Hq, N, M), of L = exp(log scale) factor, in the dtype of query

A kernel that Routed shall choose by also registers its ``coordinates``, from which ``log_kernel`` follows::

    @sb.reference.coordinates.register
    def _(low_rank: MyKernel, inputs: sb.reference.Inputs) -> sb.reference.Coordinates: ...

    @sb.reference.log_kernel.register
    def _(low_rank: MyKernel, inputs: sb.reference.Inputs) -> tuple[Tensor, Tensor]:
        return sb.reference.coordinates(low_rank, inputs).log_kernel()
"""

from scatterbrain.reference.attention import attention, mask, visible
from scatterbrain.reference.centroid import cluster
from scatterbrain.reference.inputs import Inputs
from scatterbrain.reference.low_rank import Coordinates, coordinates, fit_statistics, log_kernel
from scatterbrain.reference.routing import routed_lists
from scatterbrain.reference.supports import computed_queries, support_mask

__all__ = [
    "attention",
    "mask",
    "visible",
    "Inputs",
    "support_mask",
    "computed_queries",
    "log_kernel",
    "coordinates",
    "Coordinates",
    "fit_statistics",
    "cluster",
    "routed_lists",
]
