"""How much work the CUDA kernels do, and by how many threads at once, counted in the emulator: what time would show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_memory import at_once
from emulated import Emulator
from operator_cases import operator_arguments
from testkit import rand
from tile_gradients import given_of, gradients
from tiles import statistics_of
from torch import Tensor

import scatterbrain as sb
from scatterbrain.operators.arguments import AttentionArguments

OPERATORS = torch.ops.scatterbrain


def counted(emulator: Emulator, name: str, run: Callable[[], object], kernels: str = "") -> int:
    """How often what ``statistics`` calls ``name`` happens in a run, in kernels whose names begin so."""
    counts = []

    def observe(launch: object, is_after: bool) -> None:
        if launch.kernel.decode().startswith(kernels):
            counts.append((1 if is_after else -1) * emulator.statistics()[name])

    with emulator.installed(), emulator.observed(observe):
        run()
    assert counts, kernels
    return sum(counts)


@pytest.mark.parametrize("kernel", ["attention_tile", "attention_backward_tile"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_spans_in_any_order_take_linear_time(emulator: Emulator, dtype: torch.dtype, kernel: str) -> None:
    """Tiles of queries whose spans lie far from each other do not look at all keys between them. Each query's kernel;
    those of keys begin with the same name, and look at what names a key."""
    shuffles = []
    for n in (1024, 2048):
        leaves = [rand(1, 1, n, 16, seed=seed).to(dtype).requires_grad_() for seed in range(3)]
        first = 97 * torch.arange(n) % n
        fields = dict(zip(("query", "key", "value"), leaves), span=torch.stack([first, first + 1], -1)[None].int())
        arguments = operator_arguments(AttentionArguments, **fields, span_keys=20, block_q=1)
        run = lambda: torch.autograd.grad(OPERATORS.attention(*arguments)[0].sum(), leaves)  # noqa: B023, E731
        of_keys = counted(emulator, "shuffles", run, f"{kernel}_keys") if "backward" in kernel else 0
        shuffles.append(counted(emulator, "shuffles", run, kernel) - of_keys)
    assert shuffles[1] <= 2.1 * shuffles[0], shuffles


@pytest.mark.parametrize("support", [sb.Window(64), sb.Routed(64, 16)], ids=["window", "routed"])
def test_lists_are_transposed_by_many_warps(emulator: Emulator, support: object) -> None:
    """Each has few blocks of queries to go through, and memory is in proportion to the lists."""
    blocks, n = [], 1024

    def observe(launch: object, is_after: bool) -> None:
        if launch.kernel == b"transpose_count" and not is_after:
            blocks.append(launch.blocks)

    given = given_of(torch.bfloat16, n=n)
    with emulator.installed(), emulator.observed(observe):
        gradients(given, support, None)
    assert blocks and min(blocks) * 4 >= 32, blocks  # warps of 64 blocks of queries


def test_values_in_any_place_are_copied_once(emulator: Emulator) -> None:
    """Tensor cores read rows at multiples of 16 bytes."""
    tokens = [rand(1, 2, 256, 64, seed=seed).bfloat16() for seed in range(3)]
    low_rank, value = sb.Quadratic(4), tokens[2]
    beside = torch.zeros(value.numel() + 1, dtype=value.dtype)[1:].view_as(value).copy_(value)

    more = dict(statistics=statistics_of(low_rank, tokens))

    def bytes_of(value: Tensor) -> int:
        with emulator.installed():
            return at_once(lambda: sb.attention(*tokens[:2], value, sb.Window(64), low_rank, **more))

    bytes_of(value)  # constants are made once
    assert bytes_of(beside) - bytes_of(value) <= 1.5 * value.nbytes


def test_a_key_that_no_computed_query_sees_has_no_gradient(emulator: Emulator) -> None:
    """Whatever it holds: the slots of ignored queries have no say."""
    query, key, value, grad = (rand(1, 1, 16, 16, seed=seed).bfloat16() for seed in range(4))
    key[:, :, 15], value[:, :, 15] = torch.nan, torch.inf
    leaves = [t.requires_grad_() for t in (query, key, value)]
    ignored = torch.zeros(1, 16, dtype=torch.bool)
    ignored[:, 15] = True
    lists = dict(index=torch.tensor([[[[0, 15]]]]).int(), count=torch.full((1, 1, 1), 2).int(), block_q=16, block_k=1)
    fields = dict(zip(("query", "key", "value"), leaves), query_mask=ignored, is_causal=True, **lists)
    with emulator.installed():
        out, _ = OPERATORS.attention(*operator_arguments(AttentionArguments, **fields))
        _, dk, dv = torch.autograd.grad(out, leaves, grad)
    assert not dk[:, :, 15].any() and not dv[:, :, 15].any() and dv[:, :, 0].any()
