"""Calls on a device whose contents the host may not read without waiting: forward and backward read nothing.

The tensors are on the CPU, where calls are what they are on a device once everything that is done on the CPU alone is
left out: checks of contents, calls that were prepared, projections that are kept. What torch's profiler saw is
searched for operations that wait. ``tests/cuda/test_device.py`` asks the same of a GPU.
"""

from __future__ import annotations

import pytest
import torch
from testkit import B, N, leaves, qkv, rand
from torch import Tensor

import scatterbrain as sb
from scatterbrain import checks, fields, prepared
from scatterbrain.low_rank import centroid, input_statistics, moments, quadratic, quadratic_projection
from scatterbrain.supports import blocks
from scatterbrain.training.config import ModelConfig
from scatterbrain.training.models.decoder import Decoder

WAITING = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
WAITING |= {"scatterbrain::equal_bytes", "aten::masked_select", "aten::unique_consecutive", "aten::_unique2"}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, fields, checks, centroid, moments):
        monkeypatch.setattr(module, "is_readable", lambda *tensors: False)
    monkeypatch.setattr(prepared, "key_of", lambda *arguments: None)
    monkeypatch.setattr(quadratic_projection, "constant_projection", lambda *arguments: None)
    monkeypatch.setattr(quadratic, "fitted_projection", input_statistics.composed_projection)


def waited_for(run) -> set[str]:
    run()  # what is made once
    with torch.autograd.profiler.profile() as profile:
        run()
    assert any("scatterbrain::" in event.name for event in profile.function_events)
    return WAITING & {event.name for event in profile.function_events}


def lists() -> sb.Blocks:
    index = torch.arange(4, dtype=torch.int32).expand(B, 2, -(-N // 16), 4).contiguous()
    return sb.Blocks(index, torch.full(index.shape[:3], 4, dtype=torch.int32), 16, 1)


SUPPORTS = {
    "window": lambda: sb.Window(16),
    "window with sinks": lambda: sb.Window(16, sinks=4),
    "pooled": lambda: sb.Routed(32),
    "pooled, heads' own keys": lambda: sb.Routed((32, 40)),
    "per query": lambda: sb.Routed(16, block_q=1, block_k=8),
    "lsh": lambda: sb.LSH(16),
    "blocks": lists,
    "empty": lambda: sb.Empty(),
}
KERNELS = {
    "none": None,
    "quadratic": sb.Quadratic(4, statistics="stored"),
    "favor": sb.Favor(16),
    "centroid": sb.Centroid(8),
    "input": sb.Quadratic(4, statistics="input"),
}


@pytest.mark.parametrize("padded", [False, True], ids=["everything", "padded"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("support", SUPPORTS)
def test_forward_and_backward_read_nothing_on_the_host(
    device: None, support: str, kernel: str, is_causal: bool, padded: bool
) -> None:
    if is_causal and (support == "lsh" or kernel in ("centroid", "input")):
        return  # refused: bidirectional alone
    if support == "empty" and kernel == "none":
        return  # nothing to compute
    tokens = leaves(qkv())
    query, key, _ = tokens
    mask = None
    if padded:
        mask = torch.zeros(B, N, dtype=torch.bool)
        mask[0, -9:] = True
    low_rank, statistics = KERNELS[kernel], None
    if kernel == "quadratic":
        statistics = sb.fit_statistics(query.detach(), key.detach(), rank=4)
    upstream = rand(B, 2, N, 8, seed=3)
    chosen = SUPPORTS[support]()

    def run() -> None:
        out = sb.attention(*tokens, chosen, low_rank, mask, is_causal, statistics=statistics)
        torch.autograd.grad(out, tokens, upstream)

    assert waited_for(run) == set()


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(
    "support, low_rank",
    [
        (sb.Routed(32), sb.Quadratic(4, statistics="stored")),
        (sb.Routed(16, block_q=1, block_k=8), sb.Quadratic(4)),
        (sb.Window(16), sb.Favor(16)),
    ],
    ids=["stored", "learned", "favor"],
)
def test_modules_read_nothing_on_the_host(
    device: None, support: sb.Support, low_rank: sb.LowRankKernel, is_causal: bool
) -> None:
    tokens = leaves(qkv())
    module = sb.ScatterbrainAttention(tokens[0].shape[1], 8, tokens[1].shape[1], support=support, low_rank=low_rank)
    if module.needs_calibration:
        with sb.calibrate(module), torch.no_grad():
            module(*tokens, is_causal=is_causal)

    def run() -> None:
        torch.autograd.grad(module(*tokens, is_causal=is_causal).sum(), tokens)

    assert waited_for(run) == set()


def test_a_training_step_of_the_example_model_reads_nothing_on_the_host(device: None) -> None:
    """So that it can be captured in a CUDA graph, with an optimizer that can be."""

    def attention(heads: int, kv_heads: int, head_dim: int) -> torch.nn.Module:
        support, low_rank = sb.presets.train(32)
        return sb.ScatterbrainAttention(heads, head_dim, num_kv_heads=kv_heads, support=support, low_rank=low_rank)

    model = Decoder(ModelConfig(width=32, layers=2, heads=2), 8, attention)
    text = torch.arange(98).repeat(2, 1) % 8

    def run() -> None:
        logits = model(text[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    assert waited_for(run) == set()


def test_a_host_read_would_be_seen() -> None:
    def run() -> Tensor:
        out = sb.attention(*qkv(), sb.Window(16), None)
        return out * float(out.sum())

    assert "aten::item" in waited_for(run)


def test_contents_are_checked_where_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from scatterbrain.operators import tracing

    class OnDevice(Tensor):
        """A tensor that says it is not on the CPU."""

        is_cpu = False

    tensor = torch.zeros(3).as_subclass(OnDevice)
    assert not tracing.is_readable(tensor)
    monkeypatch.setenv("SCATTERBRAIN_CHECK", "1")
    assert tracing.is_readable(tensor) and not tracing.is_readable(torch.zeros(3, device="meta"))
