"""The centroid kernel: clusters of the sequence's own keys, each replaced by one representative key."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from scatterbrain.call import Call
from scatterbrain.fields import check_finite, check_floats, check_int, check_number
from scatterbrain.low_rank.base import Coefficients, LowRankKernel, check_shapes
from scatterbrain.operators import untraced
from scatterbrain.operators.arguments import CENTROID, ClusterArguments, KernelInputs
from scatterbrain.operators.fakes import accumulation_dtype
from scatterbrain.operators.tracing import is_readable, is_untraced
from scatterbrain.operators.transformed import project

MOST_CLUSTERS = 256  # centres are taken from as many sampled keys


@dataclass(frozen=True, eq=False)
class Clusters(Coefficients):
    """What the centroid kernel runs with, per batch row and key/value head: L_ij = exp(scale q_i.b_c(j) + kappa_j) with
    kappa_j = a.(k_j - b_c(j)).

    Which cluster a key is in, its share of the representative and ``query_mean`` are constants of the backward pass;
    the representatives and log masses are functions of the keys, and gradients reach the keys through them.

    Args:
        index: c, int32 (B, Hkv, M): the cluster of each key; -1 for padded keys.
        representatives: b (B, Hkv, C, head_dim): the mean key of each cluster, weighted by exp(a.k). Zeros where a
            cluster has no key.
        log_mass: kappa (B, Hkv, M); 0 for padded keys.
        query_mean: a (B, Hkv, head_dim), the mean of ``scale * query`` over the query heads that share the keys.
        scale: the scale they hold for; another one at use raises.

    Raises:
        TypeError, ValueError: naming the field, for anything but int32 and floating-point tensors of shapes that fit
            together and a finite scale.
    """

    index: Tensor
    representatives: Tensor
    log_mass: Tensor
    query_mean: Tensor
    scale: float

    def __post_init__(self) -> None:
        floats = ("representatives", "log_mass", "query_mean")
        check_floats("Clusters", {name: getattr(self, name) for name in floats})
        check_number("Clusters", "scale", self.scale)
        if not isinstance(self.index, Tensor) or self.index.dtype != torch.int32 or self.index.dim() != 3:
            got = f"{self.index.dtype} {tuple(self.index.shape)}" if isinstance(self.index, Tensor) else self.index
            raise TypeError(f"Clusters: index must be an int32 tensor (B, Hkv, M), got {got}; make it by sb.cluster")
        if self.representatives.dim() != 4:
            raise ValueError(
                "Clusters: representatives must be (B, Hkv, clusters, head_dim), got shape "
                f"{tuple(self.representatives.shape)}"
            )
        (batch, heads, keys), (*_, count, head_dim) = self.index.shape, self.representatives.shape
        check_shapes(
            self, (batch, heads, keys), (batch, heads, count, head_dim), (batch, heads, keys), (batch, heads, head_dim)
        )
        for name in floats:
            check_finite("Clusters", name, getattr(self, name))
        if is_readable(self.index) and bool(((self.index < -1) | (self.index >= count)).any()):
            raise ValueError(
                f"Clusters: index must name clusters 0 to {count - 1}, or -1 for padded keys, got "
                f"{int(self.index.min())} to {int(self.index.max())}"
            )

    @property
    def clusters(self) -> int:
        return self.representatives.shape[2]

    def to(self, *args: object, **kwargs: object) -> Clusters:
        """The same on another device or in another dtype, which the index does not take."""
        floats = {
            name: getattr(self, name).to(*args, **kwargs) for name in ("representatives", "log_mass", "query_mean")
        }
        return replace(self, index=self.index.to(floats["log_mass"].device), **floats)

    def check_geometry(self, call: Call) -> None:
        """Raises ValueError unless these are clusters of the call's keys and for its scale."""
        (batch, _, _, d), (_, kv_heads, keys, _), scale = call.query.shape, call.key.shape, call.scale
        if abs(self.scale - scale) > 1e-6 * max(abs(scale), 1e-6):
            raise ValueError(
                f"the clusters were made for scale={self.scale:.6g}, attention runs with scale={scale:.6g}; make them "
                "with the same scale"
            )
        if tuple(self.index.shape) != (batch, kv_heads, keys) or self.representatives.shape[3] != d:
            raise ValueError(
                f"statistics=Clusters must be those of key, expected index {(batch, kv_heads, keys)} and head_dim {d}, "
                f"got {tuple(self.index.shape)} and {self.representatives.shape[3]}; make them by sb.cluster"
            )
        self._check_membership(call.padding.key_mask)

    def _check_membership(self, key_mask: Tensor | None) -> None:
        """That every key which is not ignored is in a cluster. On the CPU the operator looks, on another device nobody
        does but with SCATTERBRAIN_CHECK=1: there such a key counts as one of cluster 0."""
        if self.index.is_cpu or not is_readable(self.index, key_mask):
            return
        homeless = self.index < 0
        if key_mask is not None:
            homeless &= ~key_mask[:, None].to(homeless.device)
        if bool(homeless.any()):
            raise ValueError(
                f"statistics=Clusters must name clusters 0 to {self.clusters - 1} for every key that is not ignored, "
                f"got -1 for {int(homeless.sum())} of them; make the clusters with the key_padding_mask that attention "
                "is given"
            )


@dataclass(frozen=True)
class Centroid(LowRankKernel):
    """``exp(scale q.b_c + kappa)``: keys are clustered, each cluster is replaced by one key b_c, and each key keeps its
    own weight for the mean query, ``kappa_j = a.(k_j - b_c)``. Nothing to calibrate; bidirectional only, and not for
    the cross-attention of a decoder, whose mean query knows every target token.

    The rest of a row is then exact attention to a few representative keys, as in clustered attention (Vyas et al.,
    NeurIPS 2020), which clusters the queries; here the keys are clustered, and a key that is represented counts by its
    own exponential mass in place of one, so that L_ij = exp(s_ij) for the mean query and wherever the keys of a cluster
    agree.

    Args:
        clusters: number of clusters, from 1 to 256, the keys that are sampled for their centres. More cost time and
            leave less error; 64 costs about what Quadratic(rank=9) does.
    """

    kind: ClassVar[str] = "centroid"
    takes: ClassVar[tuple[type[Coefficients], ...]] = (Clusters,)
    code: ClassVar[int] = CENTROID
    can_be_prepared: ClassVar[bool] = True
    reads_input = True

    clusters: int = 64

    def __post_init__(self) -> None:
        check_int("Centroid", "clusters", self.clusters, 1, MOST_CLUSTERS)

    def check(self, is_causal: bool) -> None:
        if is_causal:
            raise ValueError(
                "low_rank=Centroid clusters the keys of the whole sequence, so causal attention would see the future; "
                "use low_rank=Quadratic, or is_causal=False; modules and models take causal_low_rank=Quadratic() "
                "beside it"
            )

    def check_from_scratch(self, is_causal: bool = True) -> None:
        if is_causal:
            raise ValueError(
                "low_rank=Centroid is for bidirectional attention and cannot train a causal model; use Quadratic with "
                "statistics 'learned' or 'ema'"
            )

    def check_coefficients(self, coefficients: Coefficients | None, call: Call) -> None:
        if coefficients is None:
            return
        if not isinstance(coefficients, Clusters):
            raise TypeError(
                f"low_rank=Centroid takes statistics=Clusters (sb.cluster) or None, got {type(coefficients).__name__}"
            )
        if coefficients.clusters != self.clusters:
            raise ValueError(
                f"statistics=Clusters has {coefficients.clusters} clusters, low_rank asks for {self.clusters}; make "
                f"them with clusters={self.clusters}"
            )
        coefficients.check_geometry(call)

    def fitting(self, coefficients: Coefficients) -> Centroid:
        return Centroid(coefficients.clusters) if isinstance(coefficients, Clusters) else self

    def with_coefficients(self, call: Call) -> Call:
        if call.coefficients is not None:
            return call
        return call._replace(coefficients=find_clusters(call, self.clusters))

    def inputs(self, call: Call) -> KernelInputs:
        given = self._constants(self.with_coefficients(call))
        return KernelInputs(
            cluster_index=given.index,
            representatives=given.representatives,
            log_mass=given.log_mass,
            query_mean=given.query_mean,
        )

    def own_clusters(self, call: Call) -> int:
        return self.clusters if call.coefficients is None else 0

    def coordinates(self, call: Call) -> tuple[Tensor, Tensor]:
        """For the choice of keys: features exp(scale q.b_c), and of a key one-hot its cluster with log scale kappa;
        constants."""
        dtype, query_mask = accumulation_dtype(call.query.dtype), call.padding.query_mask
        given = self._constants(self.with_coefficients(call))
        query = _without_padding(call.query.detach(), query_mask)
        member = (given.index[..., None] == torch.arange(self.clusters, device=query.device)).to(dtype)
        exponent = project(query, given.representatives * call.scale, None)
        empty = (~(member > 0).any(2)).repeat_interleave(query.shape[1] // call.key.shape[1], 1)[:, :, None]
        exponent = exponent.masked_fill(empty, float("-inf"))
        peak = exponent.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        return torch.cat([torch.exp(exponent - peak), peak], -1), torch.cat([member, given.log_mass[..., None]], -1)

    def _constants(self, call: Call) -> Clusters:
        """The clusters in the precision of the call. Gradients go through the operator, to the keys alone."""
        given, dtype, device = call.coefficients, accumulation_dtype(call.query.dtype), call.query.device
        floats = given.representatives, given.log_mass, given.query_mean
        if all(t.dtype == dtype and t.device == device and not t.requires_grad for t in floats):
            return given
        floats = (t.detach().to(device=device, dtype=dtype) for t in floats)
        return Clusters.unchecked(given.index.to(device), *floats, given.scale)


def find_clusters(call: Call, clusters: int) -> Clusters:
    """The clusters of a call's keys: constants."""
    untraced_call = is_untraced()
    query, key = (call.query, call.key) if untraced_call else (call.query.detach(), call.key.detach())
    arguments = ClusterArguments(query, key, **call.padding._asdict(), clusters=clusters, scale=call.scale)
    found = untraced.cluster(arguments) if untraced_call else torch.ops.scatterbrain.cluster(*arguments)
    return Clusters.unchecked(*found, call.scale)


def _without_padding(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return tokens if mask is None else tokens.masked_fill(mask[:, None, :, None], 0)
