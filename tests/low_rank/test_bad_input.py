"""Low-rank kernels that cannot be, and statistics that do not fit them or a call, are refused, naming the field, what
came and the cure."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import testkit
import torch
from bad_calls import KV, STORED, B, D, H, N, assert_refused, attend, projections, qkv, statistics
from testkit import rand

import scatterbrain as sb


def clusters() -> sb.Clusters:
    return sb.reference.cluster(*qkv()[:2], 4)


# id: (call, error, words that the message holds, in this order)
CALLS = {
    # kernels, on construction
    "rank 0": (lambda: sb.Quadratic(0), ValueError, "Quadratic: rank must be at least 1"),
    "statistics misspelt": (
        lambda: sb.Quadratic(9, "store"),
        ValueError,
        "Quadratic: expected statistics 'stored'.*got 'store'",
    ),
    "no features": (lambda: sb.Favor(0), ValueError, "Favor: features must be at least 1"),
    "odd hyperbolic": (lambda: sb.Favor(7, hyperbolic=True), ValueError, "Favor: hyperbolic.*even number.*7"),
    "centred by a number": (lambda: sb.Favor(centred=1), TypeError, "Favor: centred must be a bool, got 1"),
    "causal centred features": (
        lambda: attend(low_rank=sb.Favor(8, centred=True), is_causal=True),
        ValueError,
        r"Favor\(centred=True\) takes the means of the whole sequence, so causal attention would see the future; use "
        "centred=False or low_rank=Quadratic, or is_causal=False",
    ),
    "centred features of NaN": (
        lambda: attend(torch.full((B, H, N, D), math.nan), *qkv()[1:], low_rank=sb.Favor(8, centred=True)),
        ValueError,
        r"Favor\(centred=True\): query or key holds NaN or infinity among the valid tokens.*use centred=False, which",
    ),
    "redraw 0": (lambda: sb.Favor(redraw=0), ValueError, "Favor: redraw must be at least 1"),
    "no clusters": (lambda: sb.Centroid(0), ValueError, "Centroid: clusters must be at least 1, got 0"),
    "more clusters than samples": (lambda: sb.Centroid(257), ValueError, "Centroid: clusters must be at most 256"),
    "half a cluster": (lambda: sb.Centroid(2.5), TypeError, "Centroid: clusters must be an int, got 2.5"),
    # sizes that the kernels cannot count to
    "features past 32 bits": (lambda: sb.Favor(2**31), ValueError, "Favor: features must be at most 2147483647"),
    "Favor seed past 32 bits": (lambda: sb.Favor(seed=2**32), ValueError, "Favor: seed must be at most"),
    "redraw past 32 bits": (lambda: sb.Favor(redraw=2**31), ValueError, "Favor: redraw must be at most"),
    "rank past 32 bits": (lambda: sb.Quadratic(2**31), ValueError, "Quadratic: rank must be at most 2147483647"),
    # clusters
    "clusters named by 64 bits": (
        lambda: replace(clusters(), index=clusters().index.long()),
        TypeError,
        r"Clusters: index must be an int32 tensor \(B, Hkv, M\), got torch.int64 \(2, 2, 40\); make it by sb.cluster",
    ),
    "a cluster that is not there": (
        lambda: replace(clusters(), index=torch.full_like(clusters().index, 4)),
        ValueError,
        "Clusters: index must name clusters 0 to 3, or -1 for padded keys, got 4 to 4",
    ),
    "clusters of two numbers of keys": (
        lambda: replace(clusters(), log_mass=rand(B, KV, N - 1)),
        ValueError,
        r"Clusters: log_mass must be of shape \(2, 2, 40\), got \(2, 2, 39\)",
    ),
    "clusters of one head without its dimension": (
        lambda: replace(clusters(), representatives=rand(B, 4, D)),
        ValueError,
        r"Clusters: representatives must be \(B, Hkv, clusters, head_dim\), got shape \(2, 4, 8\)",
    ),
    "clusters with NaN": (
        lambda: replace(clusters(), query_mean=torch.full((B, KV, D), math.nan)),
        ValueError,
        "Clusters: query_mean must be finite, got NaN or infinity",
    ),
    "clusters of no scale": (lambda: replace(clusters(), scale=None), TypeError, "Clusters: scale must be a number"),
    "clusters for another kernel": (
        lambda: attend(low_rank=STORED, statistics=clusters()),
        TypeError,
        "Quadratic takes statistics=Statistics.*got Clusters",
    ),
    "statistics for Centroid": (
        lambda: attend(low_rank=sb.Centroid(4), statistics=statistics()),
        TypeError,
        r"Centroid takes statistics=Clusters \(sb.cluster\) or None, got Statistics",
    ),
    "another number of clusters": (
        lambda: attend(low_rank=sb.Centroid(5), statistics=clusters()),
        ValueError,
        "Clusters has 4 clusters, low_rank asks for 5; make them with clusters=5",
    ),
    "clusters for another scale": (
        lambda: attend(low_rank=sb.Centroid(4), statistics=clusters(), scale=0.1),
        ValueError,
        "made for scale=0.35.*attention runs with scale=0.1; make them with the same scale",
    ),
    "clusters of other keys": (
        lambda: attend(low_rank=sb.Centroid(4), statistics=sb.reference.cluster(*testkit.qkv(9)[:2], 4)),
        ValueError,
        r"Clusters must be those of key, expected index \(2, 2, 40\) and head_dim 8, got \(2, 1, 9\) and 8; make",
    ),
    "causal clusters": (
        lambda: attend(low_rank=sb.Centroid(4), is_causal=True),
        ValueError,
        "Centroid clusters the keys of the whole sequence.*would see the future; use low_rank=Quadratic, or "
        "is_causal=False; modules and models take causal_low_rank=",
    ),
    # statistics
    "statistics of a NaN scale": (
        lambda: replace(statistics(), scale=math.nan),
        ValueError,
        "Statistics: scale must be finite, got nan",
    ),
    "statistics of no scale": (
        lambda: replace(statistics(), scale=None),
        TypeError,
        "Statistics: scale must be a number, got NoneType",
    ),
    "statistics without a mean": (
        lambda: replace(statistics(), key_mean=None),
        TypeError,
        "Statistics: key_mean must be a tensor, got NoneType",
    ),
    "integer statistics": (
        lambda: statistics().to(torch.int32),
        TypeError,
        "Statistics: query_projection must be a floating-point tensor, got torch.int32",
    ),
    "statistics on two devices": (
        lambda: replace(statistics(), key_mean=torch.zeros(KV, D, device="meta")),
        ValueError,
        "Statistics: tensors must be on one device, got query_projection on cpu and key_mean on meta; move",
    ),
    "statistics of one head without its dimension": (
        lambda: sb.Statistics(rand(4, D), rand(D), rand(4, D), rand(D), 1.0),
        ValueError,
        r"Statistics: query_projection must be \(Hkv, rank, head_dim\).*got shape \(4, 8\)",
    ),
    "statistics of two widths": (
        lambda: replace(statistics(), query_mean=rand(KV, D + 1)),
        ValueError,
        r"Statistics: query_mean must be of shape \(2, 8\), got \(2, 9\)",
    ),
    "statistics with NaN": (
        lambda: replace(statistics(), query_mean=torch.full((KV, D), math.nan)),
        ValueError,
        "Statistics: query_mean must be finite, got NaN or infinity; fit it again",
    ),
    "statistics that a narrower dtype does not hold": (
        lambda: replace(statistics(), key_projection=torch.full((KV, 4, D), 1e5)).to(torch.float16),
        ValueError,
        "Statistics: key_projection must be finite",
    ),
    "statistics without values": (
        lambda: attend(low_rank=STORED, statistics=statistics().to("meta")),
        ValueError,
        "statistics=Statistics: query_projection is on the meta device and holds no values",
    ),
    "projections of integers": (
        lambda: replace(projections(), key_bias=torch.zeros(KV, D, dtype=torch.int64)),
        TypeError,
        "Projections: key_bias must be a floating-point tensor, got torch.int64",
    ),
    "flat projections": (
        lambda: replace(projections(), key_projection=rand(4, D)),
        ValueError,
        r"Projections: key_projection must be \(Hkv, rank, head_dim\), got shape \(4, 8\)",
    ),
    "projections without values": (
        lambda: attend(low_rank=sb.Quadratic(4, "learned"), statistics=projections().to("meta")),
        ValueError,
        "statistics=Projections: query_projection is on the meta device",
    ),
    "random features of nothing": (
        lambda: sb.RandomFeatures(None),
        TypeError,
        "RandomFeatures: projection must be a tensor, got NoneType",
    ),
    "random features of a vector": (
        lambda: sb.RandomFeatures(rand(D)),
        ValueError,
        r"RandomFeatures: projection must be \(rows, head_dim\), got shape \(8,\)",
    ),
    "random features without values": (
        lambda: attend(low_rank=sb.Favor(8), statistics=sb.RandomFeatures(rand(8, D)).to("meta")),
        ValueError,
        "statistics=RandomFeatures: projection is on the meta device",
    ),
    # statistics of a call
    "uncalibrated": (lambda: attend(low_rank=STORED), ValueError, "not calibrated.*fit_statistics"),
    "uncalibrated ema": (lambda: attend(low_rank=sb.Quadratic(4, "ema")), ValueError, "not calibrated.*fit_statistics"),
    "statistics without a kernel": (
        lambda: attend(statistics=statistics()),
        ValueError,
        "statistics=Statistics needs a low-rank kernel",
    ),
    "statistics that fit themselves": (
        lambda: attend(low_rank=sb.Quadratic(4, "input"), statistics=statistics()),
        ValueError,
        "statistics=.*'input'.*'stored'",
    ),
    "statistics of another kind": (
        lambda: attend(low_rank=STORED, statistics=sb.RandomFeatures(rand(4, D))),
        TypeError,
        "Quadratic takes statistics=Statistics.*got RandomFeatures",
    ),
    "statistics for Favor": (
        lambda: attend(low_rank=sb.Favor(8), statistics=statistics()),
        TypeError,
        "Favor takes statistics=RandomFeatures.*got Statistics",
    ),
    "statistics are a dict": (
        lambda: attend(low_rank=STORED, statistics={}),
        TypeError,
        "statistics must be Statistics.*got dict",
    ),
    "another rank": (
        lambda: attend(low_rank=STORED, statistics=testkit.fitted(3, kv_heads=KV)),
        ValueError,
        "statistics have rank 3.*fit them with rank=4",
    ),
    "another scale": (
        lambda: attend(low_rank=STORED, statistics=statistics(), scale=1.0),
        ValueError,
        "fitted for scale=0.353553.*scale=1",
    ),
    "another head_dim": (
        lambda: attend(low_rank=STORED, statistics=statistics(head_dim=16, scale=D**-0.5)),
        ValueError,
        "statistics are for head_dim 16, query has 8",
    ),
    "other heads": (
        lambda: attend(low_rank=STORED, statistics=statistics(kv_heads=1)),
        ValueError,
        r"per key/value head.*\(2,\).*got \(1,\)",
    ),
    "projections of other heads": (
        lambda: attend(low_rank=STORED, statistics=projections(heads=2)),
        ValueError,
        "per head, expected 4 query and 2 key heads, got 2 and 2",
    ),
    "projections of another width": (
        lambda: attend(
            low_rank=STORED,
            statistics=sb.Projections(rand(H, 4, D), rand(H, D + 1), rand(H), rand(KV, 4, D), rand(KV, D)),
        ),
        ValueError,
        r"Projections: query_bias must be.*\(4, 8\), got \(4, 9\)",
    ),
    "projections of two ranks": (
        lambda: attend(
            low_rank=STORED, statistics=sb.Projections(rand(H, 4, D), rand(H, D), rand(H), rand(KV, 3, D), rand(KV, D))
        ),
        ValueError,
        r"Projections: key_projection must be",
    ),
    "rank above head_dim": (
        lambda: attend(low_rank=sb.Quadratic(9, "input")),
        ValueError,
        "rank must be at most head_dim=8, got 9",
    ),
    **{
        f"statistics of an input with {value} in {name}": (
            lambda name=name, value=value: attend(
                *qkv(**{name: rand(B, H if name == "query" else KV, N, D).index_fill(2, torch.tensor(3), value)}),
                low_rank=sb.Quadratic(4, "input"),
            ),
            ValueError,
            r"Quadratic\(statistics='input'\): query or key holds NaN or infinity.*stored",
        )
        for name in ("query", "key")
        for value in (math.nan, math.inf)
    },
    "another random projection": (
        lambda: attend(low_rank=sb.Favor(8), statistics=sb.RandomFeatures(rand(9, D))),
        ValueError,
        r"projection of Favor.*\(8, 8\), got \(9, 8\)",
    ),
    # fitting
    "fit on the meta device": (
        lambda: sb.fit_statistics(*(t.to("meta") for t in qkv()[:2]), 4),
        ValueError,
        "calibration: expected queries and keys that hold values, got tensors on the meta device",
    ),
    "fit above head_dim": (
        lambda: sb.fit_statistics(*qkv()[:2], rank=9),
        ValueError,
        "rank must be at most head_dim=8, got 9",
    ),
    "fit rank 0": (lambda: sb.fit_statistics(*qkv()[:2], rank=0), ValueError, "rank must be at least 1"),
    "fit on NaN": (
        lambda: sb.fit_statistics(rand(B, H, N, D).fill_(math.nan), qkv()[1], 4),
        ValueError,
        "calibration: query or key holds NaN",
    ),
    "fit on infinite keys": (
        lambda: sb.fit_statistics(qkv()[0], rand(B, KV, N, D).fill_(math.inf), 4),
        ValueError,
        "calibration: query or key holds NaN or infinity",
    ),
    "fit on nothing": (
        lambda: sb.fit_statistics(*qkv()[:2], 4, torch.ones(B, N, dtype=torch.bool)),
        ValueError,
        "at least one valid token.*key_padding_mask",
    ),
    "fit on no tokens": (
        lambda: sb.fit_statistics(rand(B, H, 0, D), rand(B, KV, 0, D), 4),
        ValueError,
        "at least one valid token",
    ),
    "fit on queries without keys": (
        lambda: sb.fit_statistics(rand(B, H, N, D), rand(B, KV, 0, D), 4),
        ValueError,
        "at least one valid token",
    ),
    "fit mask": (
        lambda: sb.fit_statistics(*qkv()[:2], 4, torch.ones(B, N)),
        TypeError,
        "key_padding_mask must be a bool tensor",
    ),
    "fit scale": (lambda: sb.fit_statistics(*qkv()[:2], 4, scale=math.nan), ValueError, "scale must be finite"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_kernels_and_statistics_are_named(name: str) -> None:
    assert_refused(*CALLS[name])
