"""What the tests of the backward pass on tensor cores share: calls of it, and how near to float64 they have to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from emulated import Emulator
from half_products import are_the_cpus, rounded_gradients
from oracle import row_error
from testkit import rand
from tiles import rms, statistics_of
from torch import Tensor

import scatterbrain as sb

HALF = [torch.bfloat16, torch.float16]
LOW_RANKS = {"none": None, "quadratic": sb.Quadratic(4), "centroid": sb.Centroid(20)}
NAMES = ("dq", "dk", "dv")
SHARES = b"attention_backward_shares"


@contextmanager
def on_tensor_cores(emulator: Emulator, expected: bool = True) -> Iterator[None]:
    """Operators run in the emulator, and gradients of queries on tensor cores or not, as expected; of keys too where a
    window or a state has them."""
    started = []
    with emulator.installed(), emulator.observed(lambda launch, is_after: started.append(launch.kernel)):
        yield
    assert (b"attention_backward_tile" in started) == expected
    assert expected or b"attention_backward_tile_keys" not in started


@contextmanager
def by_shares(emulator: Emulator, expected: bool = True) -> Iterator[None]:
    """Operators run in the emulator, and listed keys by shares or not, as expected."""
    started = []
    with emulator.installed(), emulator.observed(lambda launch, is_after: started.append(launch.kernel)):
        yield
    assert (SHARES in started) == (b"sum_shares" in started) == expected


def given_of(dtype: torch.dtype, head_dim: int = 24, value_dim: int = 40, heads: int = 1, n: int = 96) -> list[Tensor]:
    """query, key, value, and the gradients of out and lse."""
    tokens = rand(1, 2, n, head_dim, seed=1), rand(1, heads, n, head_dim, seed=2), rand(1, heads, n, value_dim, seed=3)
    return [*(t.to(dtype) for t in (*tokens, rand(1, 2, n, value_dim, seed=4))), rand(1, 2, n, seed=5)]


def gradients(
    given: list[Tensor], *arguments: object, reference: bool = False, **more: object
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; by the definition in float64."""
    leaves = [(t.double() if reference else t.detach()).clone().requires_grad_() for t in given[:3]]
    attention = sb.attention
    if reference:
        attention, more = sb.reference.attention, more | {"dtype": torch.float64}
    support, low_rank = arguments
    out, lse = attention(*leaves, support, low_rank=low_rank, return_lse=True, **more)
    return torch.autograd.grad([out, lse], leaves, [given[3].to(out.dtype), given[4].to(lse.dtype)])


def gradients_of_keys(
    emulator: Emulator, given: list[Tensor], support: object, low_rank: object, **more: object
) -> tuple[Tensor, Tensor]:
    more.setdefault("statistics", statistics_of(low_rank, given))
    with by_shares(emulator):
        return gradients(given, support, low_rank, **more)[1:]


def excess(emulator: Emulator, given: list[Tensor], support: object, low_rank: object, **more: object) -> str:
    """Empty where the errors are near those of the CPU's kernel at the same type, else which one is not."""
    more.setdefault("statistics", statistics_of(low_rank, given))
    with on_tensor_cores(emulator):
        ours = gradients(given, support, low_rank, **more)
    cpu, exact = (gradients(given, support, low_rank, reference=wide, **more) for wide in (False, True))
    yardsticks = [cpu]
    if not are_the_cpus(given[0].dtype):
        yardsticks.append(rounded_gradients(given, exact, support, low_rank, **more))
    for i, name in enumerate(NAMES):
        for kind, error, most in (("rms", rms, 1.1), ("row", row_error, 1.5)):
            of_cpu = max(error(other[i], exact[i]) for other in yardsticks)
            if not error(ours[i], exact[i]) <= most * of_cpu:
                return f"{name} {kind}: {error(ours[i], exact[i]) / of_cpu:.2f} times the CPU's"
    return ""
