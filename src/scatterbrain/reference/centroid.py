"""The centroid kernel: clusters of a sequence's keys, each replaced by one representative key.

With c(j) the cluster of key j, b_c the representative and a the mean of the scaled queries,
L_ij = exp(q_i.b_c(j) + kappa_j), kappa_j = a.(k_j - b_c(j)).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scatterbrain.low_rank import Centroid, Clusters
from scatterbrain.reference.inputs import Inputs
from scatterbrain.reference.low_rank import SAMPLES, Coordinates, coordinates, log_kernel, spread

DIRECTIONS = 16  # dimensions in which keys are near or far
VANISHING = 1e-5  # a column with no more than this share of its length off the others adds no direction


def cluster(
    query: Tensor,
    key: Tensor,
    clusters: int = 64,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    query_padding_mask: Tensor | None = None,
) -> Clusters:
    """As :func:`scatterbrain.cluster`, in float64."""
    inputs = Inputs.of(query, key, None, key_padding_mask, scale=scale, query_padding_mask=query_padding_mask)
    return find_clusters(inputs, clusters)


@torch.no_grad()
def find_clusters(inputs: Inputs, clusters: int) -> Clusters:
    """Of every batch row and key/value head, from valid tokens alone."""
    inputs = inputs.to(torch.float64)
    (batch, heads, keys, d), make = inputs.key.shape, inputs.key.new_zeros
    index = torch.full((batch, heads, keys), -1, dtype=torch.int32, device=inputs.key.device)
    found = Clusters(
        index, make(batch, heads, clusters, d), make(batch, heads, keys), make(batch, heads, d), inputs.scale
    )
    for b in range(batch):
        of_query, of_key = ~inputs.query_padding[b], ~inputs.key_padding[b]
        for h in range(heads):
            queries = inputs.query[b, h * inputs.group : (h + 1) * inputs.group, of_query].reshape(-1, d) * inputs.scale
            one = cluster_head(queries, inputs.key[b, h, of_key], clusters)
            index[b, h, of_key] = one.index.to(torch.int32)
            found.log_mass[b, h, of_key] = one.kappa
            found.representatives[b, h], found.query_mean[b, h] = one.b, one.a
    return found


class OfHead(NamedTuple):
    """Clusters of one key/value head."""

    index: Tensor  # (M,)
    b: Tensor  # (C, d)
    kappa: Tensor  # (M,)
    a: Tensor  # (d,)


def cluster_head(queries: Tensor, keys: Tensor, clusters: int) -> OfHead:
    """Of scaled queries (n, d), those of all query heads that share the keys (M, d)."""
    a = queries.sum(0) / max(len(queries), 1)
    if len(keys) == 0:
        return OfHead(keys.new_zeros(0, dtype=torch.int32), keys.new_zeros(clusters, len(a)), keys.new_zeros(0), a)
    sample = keys[spread(min(SAMPLES, len(keys)), len(keys))]
    mean = sample.mean(0)
    w = directions(sample - mean)
    z, z_sample = (keys - mean) @ w, (sample - mean) @ w
    centre = z_sample[spread(clusters, len(sample))].clone()
    of_sample = nearest(z_sample, centre)
    for c in of_sample.unique().tolist():
        centre[c] = z_sample[of_sample == c].mean(0)
    index = nearest(z, centre)
    log_weight, b = keys @ a, keys.new_zeros(clusters, len(a))
    for c in index.unique().tolist():
        b[c] = torch.softmax(log_weight[index == c], 0) @ keys[index == c]
    return OfHead(index, b, ((keys - b[index]) * a).sum(-1), a)


def directions(centred: Tensor) -> Tensor:
    """W (d, R): an orthonormal basis near the R = min(16, d) principal directions of samples (n, d) whose mean is zero.
    Rows of the samples, orthonormalised, then two steps of subspace iteration."""
    n, d = centred.shape
    w = orthonormal(centred[spread(min(DIRECTIONS, d), n)].T)
    for _ in range(2):
        w = orthonormal(centred.T @ (centred @ w))
    return w


def orthonormal(columns: Tensor) -> Tensor:
    """Q of the QR decomposition, with zeros for columns that depend on those before them."""
    basis = torch.zeros_like(columns)
    for t, column in enumerate(columns.unbind(1)):
        rest = column
        for _ in range(2):  # once more, for what rounding left
            rest = rest - basis @ (basis.T @ rest)
        if rest.norm() > VANISHING * column.norm():
            basis[:, t] = rest / rest.norm()
    return basis


def nearest(z: Tensor, centre: Tensor) -> Tensor:
    """The centre nearest to each row, the lowest of equals."""
    return (z[:, None] - centre).square().sum(-1).argmin(1)


# -------------------- the kernel


class Represented(NamedTuple):
    """The clusters of a call, as functions of the keys."""

    index: Tensor  # (B, Hkv, M); 0 for padded keys, which nobody sees
    occupied: Tensor  # bool (B, Hkv, C)
    b: Tensor  # (B, Hkv, C, d)
    kappa: Tensor  # (B, Hkv, M)


def represented(low_rank: Centroid, inputs: Inputs) -> Represented:
    """The given clusters, or the call's own. c(j), a and the shares w_j / sum w of b are constants; b and kappa are
    not: b_c = sum_j share_j k_j."""
    if inputs.is_causal:
        raise ValueError("Centroid clusters the whole sequence, which would leak the future in causal attention")
    given = inputs.statistics
    if given is None:
        given = find_clusters(inputs, low_rank.clusters)
    if not math.isclose(given.scale, inputs.scale, rel_tol=1e-6, abs_tol=1e-12):
        raise ValueError(f"the clusters were made for scale={given.scale}, got scale={inputs.scale}")
    if given.index.shape != inputs.key.shape[:3] or given.representatives.shape[2] != low_rank.clusters:
        raise ValueError(
            f"Centroid: expected {low_rank.clusters} clusters of keys {tuple(inputs.key.shape[:3])}, got "
            f"{given.representatives.shape[2]} of {tuple(given.index.shape)}"
        )
    key, index = inputs.key, given.index.clamp(min=0).long()
    a, b = given.query_mean.detach().to(key), given.representatives.detach().to(key)
    member = (given.index[..., None] == torch.arange(low_rank.clusters, device=key.device)).to(key.dtype)
    member = member.where(~inputs.key_padding[:, None, :, None], 0)  # the mask may be new to given clusters
    log_weight = (key.detach() @ a[..., None]).where(member > 0, -math.inf)
    share = torch.softmax(log_weight, 2).where(member > 0, 0)  # over a cluster's keys
    b = b + share.transpose(-1, -2) @ (key - key.detach())
    kappa = ((key - of_cluster(b, index)) * a[..., None, :]).sum(-1)
    return Represented(index, member.sum(2) > 0, b, kappa)


def of_cluster(b: Tensor, index: Tensor) -> Tensor:
    """(B, Hkv, M, d): the representative of each key."""
    return b.gather(2, index[..., None].expand(*index.shape, b.shape[-1]))


@log_kernel.register
def _(low_rank: Centroid, inputs: Inputs) -> tuple[Tensor, Tensor]:
    index, _, b, kappa = (t.repeat_interleave(inputs.group, 1) for t in represented(low_rank, inputs))
    exponent = (inputs.query * inputs.scale) @ of_cluster(b, index).transpose(-1, -2) + kappa[..., None, :]
    return exponent, torch.ones_like(exponent)


@coordinates.register
def _(low_rank: Centroid, inputs: Inputs) -> Coordinates:
    """Features exp(q.b_c), and one-hot c(j) with log scale kappa_j: x.y exp(kappa) = L. The largest exponent is a
    query's log scale, a constant of the backward pass."""
    index, occupied, b, kappa = represented(low_rank, inputs)
    one_hot = torch.nn.functional.one_hot(index, low_rank.clusters).to(b)

    def features(query: Tensor, b: Tensor, occupied: Tensor) -> tuple[Tensor, Tensor]:
        exponent = (query @ b.transpose(-1, -2)).where(occupied[..., None, :], -math.inf)
        peak = exponent.detach().amax(-1).nan_to_num(neginf=0.0)
        return torch.exp(exponent - peak[..., None]), peak

    def at_mean(row: int, head: int, query: Tensor) -> tuple[Tensor, Tensor]:
        of = row, head // inputs.group
        x, rho = features(query[None].to(b), b[of], occupied[of])
        return x[0].cpu(), rho[0].cpu()

    of_queries = (t.repeat_interleave(inputs.group, 1) for t in (b, occupied))
    x, rho = features(inputs.query * inputs.scale, *of_queries)
    apart = (inputs.key - of_cluster(b, index)).square().sum(-1)
    return Coordinates(x, rho, one_hot, kappa, False, at_mean, apart)
