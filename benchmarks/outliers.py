"""What keys that outweigh all others cost, as the attention sinks of language models do.

    python benchmarks/outliers.py                          one head of 64, float32, one thread
    python benchmarks/outliers.py --lengths 1024 16384     other lengths

One, or several, keys score so much above the others for every query; the statistics come from tokens without such keys.
In the last columns the keys have other means than those of the statistics instead: all of them by 5 standard deviations
in every coordinate; every second one by 5, or by 30, the one way and the others the other way; the first half of the
sequence by 30 the one way and the second half, which weighs more, the other way; the first 100 keys by 30, where the
lists of most queries hold more than the whole weight. Printed is the processor time with them over that without, the
median of turns, for forward (F) and forward + backward (F+B).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

import scatterbrain as sb

HEAD_DIM, RANK, MEAN = 64, 9, 1.0
SUPPORTS = {
    "window 64": sb.Window(64),
    "routed 64": sb.Routed(64),
    "routed 64 per query": sb.Routed(64, block_q=1, block_k=8, window=16),
    "lsh 64": sb.LSH(64),
}
# The score, the keys that have it, how far all keys are from those of the statistics, and how far which others are.
CASES = {
    "10": (10.0, 1, 0.0),
    "40": (40.0, 1, 0.0),
    "200": (200.0, 1, 0.0),
    "40, 8 keys": (40.0, 8, 0.0),
    "40, 40 keys": (40.0, 40, 0.0),
    "moved mean": (0.0, 0, 5.0),
    "two means 5": (0.0, 0, 0.0, 5.0, "every second"),
    "two means 30": (0.0, 0, 0.0, 30.0, "every second"),
    "halves 30": (0.0, 0, 0.0, 30.0, "half"),
    "100 keys 30": (0.0, 0, 0.0, 30.0, "100"),
}


def inputs(
    tokens: int, strength: float, sinks: int, moved: float, apart: float = 0.0, which: str = "every second"
) -> tuple[list[Tensor], sb.Statistics]:
    """query, key and value with that many sinks from a third of the sequence on, and statistics of other tokens, whose
    keys have another mean by ``moved``, plus or minus ``apart`` in a random direction."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tensor:
        return torch.randn(1, 1, length, HEAD_DIM, generator=generator)

    query, key, value = draw(tokens) + MEAN, draw(tokens), draw(tokens)
    fitted = sb.fit_statistics(draw(2048) + MEAN, draw(2048), RANK)
    at = tokens // 3 + 3 * torch.arange(sinks)
    key[:, :, at] = strength * HEAD_DIM**-0.5 / MEAN + 0.1 * key[:, :, at]
    at = torch.arange(tokens)
    sides = {
        "every second": torch.where(at % 2 == 0, apart, -apart),
        "half": torch.where(at >= tokens // 2, apart, -apart),
        "100": torch.where(at < 100, apart, 0.0),
    }
    return [query, key + moved + sides[which][:, None] * draw(1), value], fitted


def seconds(call: tuple[list[Tensor], sb.Statistics], support: object, is_causal: bool, backward: bool) -> float:
    tokens, fitted = call
    leaves = [t.detach().requires_grad_(backward) for t in tokens]
    start = time.process_time()
    out = sb.attention(*leaves, support, sb.Quadratic(RANK), statistics=fitted, is_causal=is_causal)
    if backward:
        torch.autograd.grad(out.sum(), leaves)
    return time.process_time() - start


def ratio(tokens: int, case: tuple, support: object, is_causal: bool, backward: bool, turns: int) -> float:
    plain, heavy = inputs(tokens, 0.0, 0, 0.0), inputs(tokens, *case)
    ratios = []
    for _ in range(turns + 1):
        ratios.append(seconds(heavy, support, is_causal, backward) / seconds(plain, support, is_causal, backward))
    return statistics.median(ratios[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096], help="tokens (default 1024 4096)")
    parser.add_argument("--turns", type=int, default=7, help="times that the two take turns (default 7)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'support':22}{'':14}{'tokens':>7}  {'':4}" + "".join(f"{name:>13}" for name in CASES))
    for name, support in SUPPORTS.items():
        for is_causal in (False, True):
            if is_causal and isinstance(support, sb.LSH):
                continue
            for tokens in arguments.lengths:
                for backward in (False, True):
                    row = [
                        ratio(tokens, case, support, is_causal, backward, arguments.turns) for case in CASES.values()
                    ]
                    kind = "causal" if is_causal else "bidirectional"
                    cells = "".join(f"{value:13.2f}" for value in row)
                    print(f"{name:22}{kind:14}{tokens:7}  {'F+B' if backward else 'F':4}{cells}", flush=True)


if __name__ == "__main__":
    main()
