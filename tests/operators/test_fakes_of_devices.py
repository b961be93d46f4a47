"""Fakes of the operators for tensors of a GPU: shapes and dtypes as on the CPU, on the tokens' device. No GPU is
needed."""

from __future__ import annotations

import pytest
import torch
from testkit import B, N, qkv
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import scatterbrain as sb
from scatterbrain.operators.devices import COMPILED

CALLS = {
    "window": (sb.Window(16), None),
    "routed, favor": (sb.Routed(32), sb.Favor(16)),
    "per query, stored": (sb.Routed(16, block_q=1, block_k=8), sb.Quadratic(4, statistics="stored")),
    "routed, heads' own keys": (sb.Routed((32, 40)), sb.Favor(16)),
    "routed, centroid": (sb.Routed(32), sb.Centroid(8)),
    "lsh, centroid": (sb.LSH(16), sb.Centroid(8)),
}
STATISTICS = sb.fit_statistics(*qkv()[:2], rank=4)


def run(device: str, support: sb.Window, low_rank: object, padded: bool, train: bool) -> list[Tensor]:
    query, key, value = (t.to(device).requires_grad_(train) for t in qkv(value_dim=5))
    mask = torch.zeros(B, N, dtype=torch.bool, device=device) if padded else None
    statistics = None
    if isinstance(low_rank, sb.Quadratic):
        statistics = STATISTICS.to(device)
    out, lse = sb.attention(query, key, value, support, low_rank, mask, statistics=statistics, return_lse=True)
    if train and torch.cuda.is_available():  # torch's engine asks the driver for the device, of fake tensors too
        return [out, lse, *torch.autograd.grad(out.sum(), (query, key, value))]
    return [out, lse]


@pytest.mark.parametrize("train", [False, True] if COMPILED else [False])  # the device says what it saves
@pytest.mark.parametrize("padded", [False, True], ids=["everything", "padded"])
@pytest.mark.parametrize("name", CALLS)
def test_results_of_fake_gpu_tensors_are_those_of_the_cpu_on_the_gpu(name: str, padded: bool, train: bool) -> None:
    support, low_rank = CALLS[name]
    real = run("cpu", support, low_rank, padded, train)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = run("cuda", support, low_rank, padded, train)
    assert {t.device.type for t in fake} == {"cuda"}
    facts = [[(t.shape, t.dtype, t.stride()) for t in results] for results in (fake, real)]
    assert facts[0] == facts[1]
