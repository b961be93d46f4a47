"""What the quadratic kernel runs with: fitted statistics or learned projections."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from scatterbrain.call import Call
from scatterbrain.fields import check_finite, check_floats, check_number
from scatterbrain.low_rank.base import Coefficients, check_shapes
from scatterbrain.low_rank.moments import Moments

STORED_FLOOR = 1e-4  # floor of the covariances' eigenvalues relative to their mean, calibrated statistics
EMA_FLOOR = 1e-3  # the same for moving averages, which see few tokens at first


@dataclass(frozen=True, eq=False)
class Statistics(Coefficients):
    """Means and projections of the quadratic kernel, per key/value head (shared by its query heads): x = Pq (scale q -
    a), rho = scale q.b, y = Pk (k - b), kappa = a.(k - b). Leading dimensions (Hkv,), or (B, Hkv) for statistics of
    each batch row.

    Args:
        query_projection: Pq (..., rank, head_dim).
        query_mean: a (..., head_dim), the mean of ``scale * query``.
        key_projection: Pk (..., rank, head_dim).
        key_mean: b (..., head_dim), the mean of the keys weighted by exp(a.k).
        scale: the scale they were fitted for; another one at use raises.

    Raises:
        TypeError, ValueError: naming the field, for anything but finite floating-point tensors of shapes that fit
            together and a finite scale.
    """

    can_be_prepared: ClassVar[bool] = True

    query_projection: Tensor
    query_mean: Tensor
    key_projection: Tensor
    key_mean: Tensor
    scale: float

    def __post_init__(self) -> None:
        maps, means = ("query_projection", "key_projection"), ("query_mean", "key_mean")
        check_floats("Statistics", {name: getattr(self, name) for name in (*maps, *means)})
        check_number("Statistics", "scale", self.scale)
        if self.query_projection.dim() not in (3, 4):
            raise ValueError(
                "Statistics: query_projection must be (Hkv, rank, head_dim), or (B, Hkv, rank, head_dim) for "
                f"statistics of each batch row, got shape {tuple(self.query_projection.shape)}"
            )
        *leading, rank, head_dim = self.query_projection.shape
        of_map, of_mean = (*leading, rank, head_dim), (*leading, head_dim)
        check_shapes(self, of_map, of_mean, of_map, of_mean)
        for name in (*maps, *means):
            check_finite("Statistics", name, getattr(self, name))

    @property
    def rank(self) -> int:
        return self.query_projection.shape[-2]

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return self.query_projection, self.query_mean, self.key_projection, self.key_mean

    def weights(self, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(query weight, query offset, key weight, key offset) of ``map = weight token + offset``, coordinates first,
        log scale last."""
        pq, a, pk, b = self.tensors()
        dot = (a * b).sum(-1)
        query_weight = torch.cat([pq, b[..., None, :]], -2) * scale
        query_offset = torch.cat([-(pq @ a[..., None]).squeeze(-1), torch.zeros_like(dot)[..., None]], -1)
        key_weight = torch.cat([pk, a[..., None, :]], -2)
        key_offset = torch.cat([-(pk @ b[..., None]).squeeze(-1), -dot[..., None]], -1)
        return query_weight, query_offset, key_weight, key_offset

    def check_geometry(self, call: Call) -> None:
        """Raises ValueError unless these are per key/value head of the call and for its scale."""
        (batch, _, _, d), kv_heads, scale = call.query.shape, call.key.shape[1], call.scale
        if abs(self.scale - scale) > 1e-6 * max(abs(scale), 1e-6):
            raise ValueError(
                f"statistics were fitted for scale={self.scale:.6g}, attention runs with "
                f"scale={scale:.6g}; fit them with the same scale"
            )
        leading = tuple(self.query_projection.shape[:-2])
        if leading not in ((kv_heads,), (batch, kv_heads), (1, kv_heads)):
            raise ValueError(
                f"statistics must be per key/value head, expected leading shape ({kv_heads},) or ({batch}, "
                f"{kv_heads}), got {leading}"
            )
        check_shapes(self, (*leading, self.rank, d), (*leading, d), (*leading, self.rank, d), (*leading, d))

    def fits(self, rank: int, call: Call) -> bool:
        """Whether these are of this rank, per key/value head and for the call's scale: the common case, fast."""
        kv_heads, head_dim = call.key.shape[1], call.query.shape[3]
        of_map, of_mean = (kv_heads, rank, head_dim), (kv_heads, head_dim)
        return (
            self.scale == call.scale
            and self.query_projection.shape == of_map
            and self.key_projection.shape == of_map
            and self.query_mean.shape == of_mean
            and self.key_mean.shape == of_mean
        )


@dataclass(frozen=True, eq=False)
class Projections(Coefficients):
    """Learned form of the quadratic kernel: x = Pq scale q, rho = scale q.b + c, y = Pk k, kappa = a.k.

    Args:
        query_projection: Pq (Hq, rank, head_dim).
        query_bias: b (Hq, head_dim).
        query_log_scale: c (Hq).
        key_projection: Pk (Hkv, rank, head_dim).
        key_bias: a (Hkv, head_dim).

    Raises:
        TypeError, ValueError: naming the field, for anything but floating-point tensors of shapes that fit together.
    """

    query_projection: Tensor
    query_bias: Tensor
    query_log_scale: Tensor
    key_projection: Tensor
    key_bias: Tensor

    def __post_init__(self) -> None:
        check_floats("Projections", {field.name: getattr(self, field.name) for field in fields(self)})
        for name, heads in (("query_projection", "Hq"), ("key_projection", "Hkv")):
            shape = tuple(getattr(self, name).shape)
            if len(shape) != 3:
                raise ValueError(f"Projections: {name} must be ({heads}, rank, head_dim), got shape {shape}")
        (q_heads, rank, head_dim), kv_heads = self.query_projection.shape, self.key_projection.shape[0]
        of_heads = (q_heads, rank, head_dim), (q_heads, head_dim), (q_heads,)
        check_shapes(self, *of_heads, (kv_heads, rank, head_dim), (kv_heads, head_dim))

    @property
    def rank(self) -> int:
        return self.query_projection.shape[-2]

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return self.query_projection, self.query_bias, self.query_log_scale, self.key_projection, self.key_bias

    def parameters(self) -> tuple[Tensor, ...]:
        return self.tensors()

    def weights(self, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As :meth:`Statistics.weights`."""
        query_weight = torch.cat([self.query_projection, self.query_bias[..., None, :]], -2) * scale
        query_offset = torch.cat([torch.zeros_like(self.query_projection[..., 0]), self.query_log_scale[..., None]], -1)
        key_weight = torch.cat([self.key_projection, self.key_bias[..., None, :]], -2)
        return query_weight, query_offset, key_weight, torch.zeros_like(key_weight[..., 0])

    def check_geometry(self, call: Call) -> None:
        """Raises ValueError unless these are per head of the call."""
        (_, q_heads, _, d), kv_heads, r = call.query.shape, call.key.shape[1], self.rank
        if self.query_projection.shape[0] != q_heads or self.key_projection.shape[0] != kv_heads:
            raise ValueError(
                f"projections must be per head, expected {q_heads} query and {kv_heads} key heads, got "
                f"{self.query_projection.shape[0]} and {self.key_projection.shape[0]}"
            )
        check_shapes(self, (q_heads, r, d), (q_heads, d), (q_heads,), (kv_heads, r, d), (kv_heads, d))

    def fits(self, rank: int, call: Call) -> bool:
        """Whether no further check is needed; here one always is."""
        return False


def _root(second: Tensor, mean: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """C^(1/2) and C^(-1/2) of the covariance C = second - mean mean^T, eigenvalues floored relative to their mean;
    zeros where C is zero up to rounding. And the root of the floor (..., 1)."""
    covariance = second - mean[..., :, None] * mean[..., None, :]
    values, vectors = torch.linalg.eigh((covariance + covariance.transpose(-1, -2)) / 2)
    average = values.clamp(min=0).mean(-1, keepdim=True)
    degenerate = average <= 1e-13 * torch.diagonal(second, dim1=-2, dim2=-1).mean(-1, keepdim=True)
    values = torch.maximum(values, floor * average)
    root = torch.where(degenerate, 0, values.clamp(min=0).sqrt())
    inverse = torch.where(degenerate, 0, 1 / torch.where(degenerate, 1, values).sqrt())
    rows = vectors.transpose(-1, -2)
    lowest = (floor * average).sqrt()
    return vectors @ (root[..., None] * rows), vectors @ (inverse[..., None] * rows), lowest


@contextmanager
def on_one_thread(device: torch.device = torch.device("cpu")) -> Iterator[None]:
    """LAPACK's decompositions differ in the last bits between numbers of threads, and small matrices gain nothing from
    them. What runs on another ``device`` than the CPU uses none. A trace cannot hold the change.

    Torch sets the number for the thread that asks, and for threads that use torch for the first time later, which keep
    it. So another thread sets it back for those at once."""
    if device.type != "cpu" or torch.compiler.is_compiling() or torch.get_num_threads() == 1:
        yield
        return
    with _changing_threads:
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            helper = threading.Thread(target=torch.set_num_threads, args=(threads,))
            helper.start()
            helper.join()
        except BaseException:  # the system may have no thread to give
            torch.set_num_threads(threads)
            raise
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_changing_threads = threading.Lock()


def statistics_from_moments(m: Moments, rank: int, scale: float, floor: float = STORED_FLOOR) -> Statistics:
    """Pq, a, Pk, b in float32 from moments (the singular vectors of Cq^(1/2) Ck^(1/2): the r directions in which q - a
    and k - b interact most). A direction in which neither varied, so that both are at their floors, has rows of zeros:
    it is an arbitrary one of many, which rounding would choose."""
    d = m.query_mean.shape[-1]
    if rank > d:
        raise ValueError(f"rank must be at most head_dim={d}, got {rank}")
    with on_one_thread(m.query_second.device):
        q_root, q_inverse, q_lowest = _root(m.query_second, m.query_mean, floor)
        k_root, k_inverse, k_lowest = _root(m.key_second, m.key_mean, floor)
        u, s, vt = torch.linalg.svd(q_root @ k_root)
    root = torch.where(s > (1 + 1e-6) * q_lowest * k_lowest, s, 0)[..., :rank].sqrt()[..., None]
    pq = root * (u.transpose(-1, -2)[..., :rank, :] @ q_inverse)
    pk = root * (vt[..., :rank, :] @ k_inverse)
    return Statistics(pq.float(), m.query_mean.float(), pk.float(), m.key_mean.float(), float(scale))
