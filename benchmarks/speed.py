"""How much faster than exact attention? Forward and forward + backward against F.scaled_dot_product_attention,
interleaved in one process.

    python benchmarks/speed.py                       one thread, 4 heads of 64, float32, lengths 1024 and 4096
    python benchmarks/speed.py --tokens 16384 --heads 1

Times are medians of the CPU time of one thread, so that a busy machine does not count; what a user sees includes
Python, autograd, coordinates and routing. Errors are against exact attention on the same random inputs, which have no
structure to find: see benchmarks/quality.py for real ones.
"""

from __future__ import annotations

import os
import sys

# The folder of a script leads the import path, where copy.py would hide the standard module copy.
sys.path[:] = [p for p in sys.path if os.path.abspath(p) != os.path.dirname(os.path.abspath(__file__))]

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import scatterbrain as sb

CASES = [
    ("window 128", sb.Window(128), False),
    ("window 64", sb.Window(64), False),
    ("routed 64, block_q 16", sb.Routed(64), False),
    ("routed 64 per query", sb.Routed(64, block_q=1, block_k=8, window=16), False),
    ("window 64", sb.Window(64), True),
    ("routed 64 per query", sb.Routed(64, block_q=1, block_k=8, window=16), True),
]


def step(attention: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[float, float]:
    """Thread CPU seconds of one forward and one forward + backward."""
    start = time.thread_time()
    out = attention(*leaves)
    middle = time.thread_time()
    torch.autograd.grad(out, leaves, grad)
    return middle - start, time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="sequence lengths")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--rank", type=int, default=9, help="rank of the quadratic kernel")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats, of which the median counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{options.heads} heads of {options.head_dim}, float32, one thread, instruction set "
        f"{torch.ops.scatterbrain.instruction_set()}; times in ms"
    )
    print(f"{'tokens':>7}  {'support':<24}{'':<8}{'F':>8}{'SDPA':>9}{'ratio':>7}   {'F+B':>8}{'SDPA':>9}{'ratio':>7}")
    for n in options.tokens:
        generator = torch.Generator().manual_seed(0)
        leaves = [
            torch.randn(1, options.heads, n, options.head_dim, generator=generator).requires_grad_() for _ in range(3)
        ]
        grad = torch.randn(leaves[0].shape, generator=generator)
        fitted = sb.fit_statistics(leaves[0], leaves[1], options.rank)
        for name, support, is_causal in CASES:
            ours = lambda q, k, v: sb.attention(
                q, k, v, support, sb.Quadratic(options.rank), is_causal=is_causal, statistics=fitted
            )  # noqa: B023, E731
            exact = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)  # noqa: B023, E731
            times = [(step(ours, leaves, grad), step(exact, leaves, grad)) for _ in range(options.repeats)]
            f, fb, exact_f, exact_fb = (
                statistics.median(t[side][part] for t in times) * 1e3 for side in (0, 1) for part in (0, 1)
            )
            causal = "causal" if is_causal else ""
            print(
                f"{n:>7}  {name:<24}{causal:<8}{f:>8.1f}{exact_f:>9.1f}{exact_f / f:>7.1f}   "
                f"{fb:>8.1f}{exact_fb:>9.1f}{exact_fb / fb:>7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
