"""What the kernels need of a device: the table of docs/gpu.md. ``python tests/cuda_resources.py`` writes it anew."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from cuda_compiler import ARCHITECTURES, NEEDS_NVCC, ROOT, Needs, kernel_names, needs_by_symbol, nvcc, of_all_sources
from emulated import Emulator, Observed, build
from marked import Marked
from supports.test_route import BY_SKETCH, PER_QUERY, POOLED, Inputs
from testkit import rand

import scatterbrain as sb

TABLE = Marked(ROOT / "docs" / "gpu.md", "table of resources")
OPERATORS = torch.ops.scatterbrain
STATISTICS = {d: sb.fit_statistics(rand(1, 2, 99, d), rand(1, 2, 99, d, seed=1), min(9, d)) for d in (8, 20, 64, 128)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# -------------------- what is launched


@dataclass
class Kernel:
    """Threads and shared memory are of that launch of the calls below which has most of the latter."""

    threads: int = 0
    shared_bytes: int = 0
    needs: dict[str, Needs] = field(default_factory=dict)  # by architecture


def run_usual_calls(dtype: torch.dtype) -> None:
    """64 keys in heads of 64 and of 128 with each low-rank kernel as it is usually set, and windows of 128; narrow
    heads, whose sums are in double; and widths that tensor cores do not take."""

    def differentiate(head_dim: int, support: object, low_rank: object, **more: object) -> None:
        query, key, value = (rand(1, 2, 150, head_dim, seed=i, dtype=dtype).requires_grad_() for i in range(3))
        if isinstance(low_rank, sb.Quadratic):
            low_rank, more["statistics"] = sb.Quadratic(min(low_rank.rank, head_dim)), STATISTICS[head_dim]
        sb.attention(query, key, value, support, low_rank, **more).float().sum().backward()

    for low_rank in (None, sb.Quadratic(9), sb.Favor(64), sb.Centroid(64)):
        for head_dim in (8, 20, 64, 128):  # 20: what tensor cores do not take
            differentiate(head_dim, sb.Window(64), low_rank)
    for head_dim in (8, 64):
        differentiate(head_dim, sb.Window(64), sb.Quadratic(9), is_causal=True)
    for low_rank in (None, sb.Quadratic(9), sb.Centroid(64)):
        for head_dim in (64, 128):
            differentiate(head_dim, sb.Window(64, 8), low_rank)
            differentiate(head_dim, sb.Routed(64), low_rank)
            differentiate(head_dim, sb.Routed(64, block_q=8), low_rank)
            for is_causal in (False, True)[: 1 if isinstance(low_rank, sb.Centroid) else 2]:
                differentiate(head_dim, sb.Window(128), low_rank, is_causal=is_causal)
    wide = {"keys": 200, "block_q": 32}
    per_query = PER_QUERY[2]
    # Supports route float64 as float32.
    for low_rank, form, d in (
        (0, POOLED[1], 20),
        (2, POOLED[1], 64),
        (1, wide, 64),
        (1, per_query, 20),
        (1, per_query, 64),
        (0, BY_SKETCH[1], 20),
        (0, BY_SKETCH[1], 64),
    ):
        given = Inputs(150, low_rank=low_rank, d=d)
        given.query, given.key = given.query.to(dtype), given.key.to(dtype)
        given.route(**form)
    for d in (20, 64):
        x, weight = rand(1, 1, 9, d, dtype=dtype), rand(1, 1, 9, d).to(torch.promote_types(dtype, torch.float32))
        OPERATORS.project_backward(OPERATORS.project(x, weight, None), x, weight)


def kernels(emulator: Emulator) -> dict[str, Kernel]:
    """All that nvcc compiles, by symbol, each with a launch if the usual calls have one."""
    found: dict[str, Kernel] = {}
    jobs = of_all_sources(lambda source, architecture: (architecture, needs_by_symbol(source, architecture)))
    for architecture, needs in jobs:
        for symbol, of_kernel in needs.items():
            found.setdefault(symbol, Kernel()).needs[architecture] = of_kernel

    def observe(seen: Observed, is_after: bool) -> None:
        kernel = found[emulator.symbol(seen.function)]
        if not is_after and (seen.shared_bytes, seen.threads) >= (kernel.shared_bytes, kernel.threads):
            kernel.shared_bytes, kernel.threads = seen.shared_bytes, seen.threads

    # A launch without blocks computes nothing.
    with emulator.installed(), emulator.observed(observe), emulator.limited_to(0):
        for dtype in DTYPES:
            run_usual_calls(dtype)
    return found


# -------------------- occupancy


class Multiprocessor(NamedTuple):
    """CUDA C++ Programming Guide, Technical Specifications per Compute Capability."""

    shared_bytes: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


MULTIPROCESSORS = {"80": Multiprocessor(164 << 10), "90": Multiprocessor(228 << 10)}


def resident_warps(of: Multiprocessor, threads: int, registers: int, shared_bytes: int) -> int:
    """Of a kernel on a multiprocessor. A warp gets registers in units of 256, on one of four parts; a block shared
    memory in units of 128 bytes and 1 KB for itself."""
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = of.registers // 4 // of_warp * 4 // warps
    by_shared = of.shared_bytes // (-(-shared_bytes // 128) * 128 + 1024)
    return warps * min(by_registers, by_shared, of.warps // warps, of.blocks)


# -------------------- the table


def table(emulator: Emulator) -> list[str]:
    found = kernels(emulator)
    head = ["kernel", "threads", "shared", *(f"sm_{a}: registers, spilled, warps" for a in ARCHITECTURES)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, kernel in sorted(zip(kernel_names(list(found)), found.values()), key=lambda row: row[0]):
        assert kernel.threads, f"no usual call starts {name}"
        cells = [f"`{name}`", str(kernel.threads), str(kernel.shared_bytes)]
        for architecture in ARCHITECTURES:
            needs, of = kernel.needs[architecture], MULTIPROCESSORS[architecture]
            warps = resident_warps(of, kernel.threads, needs.registers, kernel.shared_bytes)
            cells.append(f"{needs.registers}, {needs.spilled}, {warps}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    if nvcc() is None:
        sys.exit(f"cuda_resources.py {NEEDS_NVCC}; install one.")
    TABLE.write(table(Emulator(build())))
