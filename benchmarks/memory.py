"""Peak memory of forward + backward, in bytes per token and head beyond query, key, value, the output and their
gradients.

    python benchmarks/memory.py                      4 heads of 64, float32, lengths 16384, 32768, 65536

The high-water mark of resident memory of a fresh process per row (Linux), so scratch memory of the kernels counts as
well as tensors.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import torch

import scatterbrain as sb

QUADRATIC = sb.Quadratic(9)
SUPPORTS = {
    "window 64": (sb.Window(64), QUADRATIC, False),
    "routed 64, block_q 16": (sb.Routed(64), QUADRATIC, False),
    "routed 72, block_q 32, centroid": (*sb.presets.drop_in(), False),
    "window 64, causal": (sb.Window(64), QUADRATIC, True),
    "routed 64 per query, causal": (sb.Routed(64, block_q=1, block_k=8, window=16), QUADRATIC, True),
}


def resident(mark: str) -> int:
    """VmRSS (now) or VmHWM (high-water mark) of this process in bytes."""
    return int(re.search(rf"{mark}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def measure(name: str, n: int, heads: int, head_dim: int, threads: int) -> None:
    """Prints the peak of one forward + backward above what was resident before it."""
    torch.set_num_threads(threads)
    support, low_rank, is_causal = SUPPORTS[name]

    def run(tokens: int) -> None:
        leaves = [torch.randn(1, heads, tokens, head_dim).requires_grad_() for _ in range(3)]
        fitted = None
        if low_rank is QUADRATIC:
            fitted = sb.fit_statistics(leaves[0][:, :, :1024], leaves[1][:, :, :1024])
        grad = torch.randn(1, heads, tokens, head_dim)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
        out = sb.attention(*leaves, support, low_rank, is_causal=is_causal, statistics=fitted)
        out.backward(grad)
        print(resident("VmHWM") - before)

    run(512)  # code pages, thread pools
    run(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 65536])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row", choices=SUPPORTS, help="measure one support in this process and print bytes")
    options = parser.parse_args()
    if options.row:
        measure(options.row, options.tokens[0], options.heads, options.head_dim, options.threads)
        return
    shape = [f"--{name}={getattr(options, name)}" for name in ("heads", "head_dim", "threads")]
    results = 4 * options.head_dim * 4  # the output and three gradients, float32
    print(f"{'support':<34}{'tokens':>8}{'peak MiB':>10}{'of it results':>15}{'other bytes per token and head':>33}")
    for name in SUPPORTS:
        for n in options.tokens:
            command = [sys.executable, __file__, "--row", name, f"--tokens={n}", *shape]
            peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            shared = results * n * options.heads
            per_token = peak / (n * options.heads)
            print(
                f"{name:<34}{n:>8}{peak / 2**20:>10.0f}{shared / 2**20:>15.0f}{per_token - results:>33.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
