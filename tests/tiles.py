"""What the tests of kernels on tensor cores share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from emulated import Emulator
from half_products import are_the_cpus, rounded_out
from oracle import row_error
from torch import Tensor

import scatterbrain as sb


def statistics_of(low_rank: object, tokens: list[Tensor]) -> object:
    if isinstance(low_rank, sb.Quadratic):
        return sb.fit_statistics(*(t.float() for t in tokens[:2]), low_rank.rank)
    if isinstance(low_rank, sb.Centroid):
        return sb.reference.cluster(*(t.float() for t in tokens[:2]), low_rank.clusters)
    return None


def rms(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).square().mean().sqrt())


def ragged(n: int, heads: int, most: int, ordered: bool, batch: int = 2) -> sb.Blocks:
    """Lists of 0 to `most` keys, by head."""
    generator = torch.Generator().manual_seed(n)
    blocks = -(-n // 16)
    index = torch.stack([torch.randperm(n, generator=generator)[:most] for _ in range(batch * heads * blocks)])
    count = torch.randint(0, most + 1, (batch * heads * blocks,), generator=generator)
    count[:3] = torch.tensor([0, most, 17])
    index = index.masked_fill(torch.arange(most) >= count[:, None], n).sort(-1).values
    order = None
    if ordered:
        order = (
            torch.stack([torch.randperm(n, generator=generator) for _ in range(batch * heads)])
            .view(batch, heads, n)
            .int()
        )
    shape = (batch, heads, blocks)
    return sb.Blocks(index.view(*shape, most).int(), count.view(shape).int(), block_q=16, block_k=1, query_order=order)


def lists(
    n: int,
    block_q: int,
    block_k: int,
    most: int,
    is_causal: bool = False,
    is_ordered: bool = False,
    batch: int = 2,
) -> sb.Blocks:
    """Lists of 0 to `most` entries, by head; the rest of an index names no key."""
    generator, blocks, entries = torch.Generator().manual_seed(block_q), -(-n // block_q), -(-n // block_k)
    index = torch.full((batch, 2, blocks, most), entries, dtype=torch.int32)
    count = torch.randint(0, most + 1, (batch, 2, blocks), generator=generator, dtype=torch.int32)
    count[:, :, ::5] = most
    for row in range(2 * batch * blocks):
        visible = min(entries, row % blocks * block_q // block_k + 1) if is_causal else entries
        count.view(-1)[row].clamp_(max=visible)
        used = int(count.view(-1)[row])
        index.view(-1, most)[row, :used] = torch.randperm(visible, generator=generator)[:used].sort().values.int()
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(2 * batch)]).view(batch, 2, n).int()
    return sb.Blocks(index, count, block_q, block_k, order if is_ordered else None)


@contextmanager
def kernel_starts(emulator: Emulator, kernel: str, expected: bool = True) -> Iterator[None]:
    """Operators run in the emulator, and a kernel is started or not, as expected."""
    started = []
    with emulator.installed(), emulator.observed(lambda launch, is_after: started.append(launch.kernel)):
        yield
    assert (kernel.encode() in started) == expected, f"{kernel} among {started}"


def excess(
    emulator: Emulator,
    kernel: str,
    tokens: list[Tensor],
    support: object,
    low_rank: object,
    rounds: bool | None = None,
    **more: object,
) -> str:
    """Empty where the errors of a call that starts ``kernel`` are near those of the CPU's kernel at the same type, else
    which one is not. ``rounds``: whether that kernel rounds weights where this one does; by default what its types
    say."""
    more.setdefault("statistics", statistics_of(low_rank, tokens))
    with kernel_starts(emulator, kernel):
        out, lse = sb.attention(*tokens, support, low_rank, return_lse=True, **more)
    cpu = sb.attention(*tokens, support, low_rank, **more)
    exact, exact_lse = sb.reference.attention(
        *tokens, support, return_lse=True, low_rank=low_rank, dtype=torch.float64, **more
    )
    yardsticks = [cpu]
    if not (are_the_cpus(tokens[0].dtype) if rounds is None else rounds):
        yardsticks.append(rounded_out(tokens, support, low_rank, **more))
    of_rms, of_row = 1.1, 1.5
    shown = exact_lse.isfinite()
    if not torch.equal(lse.isfinite(), shown):
        return "lse of rows without weight"
    if not float((lse.double() - exact_lse)[shown].abs().max()) <= 1e-5:
        return f"lse: {float((lse.double() - exact_lse)[shown].abs().max()):.1e}"
    for name, error, most in (("rms", rms, of_rms), ("row", row_error, of_row)):
        of_cpu = max(error(other, exact) for other in yardsticks)
        if not error(out, exact) <= most * of_cpu:
            return f"{name}: {error(out, exact) / of_cpu:.2f} times the CPU's"
    return ""
