"""The speed of one build against another: python benchmarks/compare_builds.py OLD NEW

OLD and NEW are folders from which ``import scatterbrain`` finds a build (a checkout's ``src``, or what ``pip install
--target`` made). Each runs in a process of its own, one thread, on the same inputs; the two take turns, call by call,
so that what else the machine does meets both. Printed is OLD's time over NEW's, the median over the turns: above 1 the
new build is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

METHODS = ("routed-64", "window-64")
LENGTHS = (256, 1024, 4096)


def work() -> None:
    """Reads "METHOD TOKENS DIRECTION CAUSAL CALLS" lines and answers each with the seconds that the calls took."""
    import time

    import torch

    from scatterbrain.bench.inputs import random_inputs
    from scatterbrain.bench.methods import parse_method

    torch.set_num_threads(1)
    inputs, functions = {}, {}
    for line in sys.stdin:
        method, tokens, direction, causal, calls = line.split()
        if tokens not in inputs:
            inputs[tokens] = random_inputs(1, 4, 4, int(tokens), 64, 9)
        given = inputs[tokens]
        leaves = [t.detach().requires_grad_(direction == "F+B") for t in (given.query, given.key, given.value)]
        name = (method, causal)
        if name not in functions:
            functions[name] = parse_method(method).build(given.statistics, 9, causal == "causal")
        function, gradient = functions[name], torch.ones_like(given.query)
        start = time.perf_counter()
        for _ in range(int(calls)):
            if direction == "F+B":
                torch.autograd.grad(function(*leaves), leaves, gradient)
            else:
                with torch.no_grad():
                    function(*leaves)
        print(time.perf_counter() - start, flush=True)


class Worker:
    def __init__(self, folder: str) -> None:
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONSAFEPATH": "1"}
        command = [sys.executable, os.path.abspath(__file__), "--work"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, *request: object) -> float:
        print(*request, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("a build's process ended; its error is above")
        return float(answer)


def ratio(old: Worker, new: Worker, request: tuple, turns: int) -> float:
    calls = max(1, round(0.03 / min(w.seconds(*request, 3) / 3 for w in (old, new))))
    ratios = []
    for turn in range(turns):
        pair = (old, new) if turn % 2 == 0 else (new, old)
        times = {worker: worker.seconds(*request, calls) for worker in pair}
        ratios.append(times[old] / times[new])
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="as scatterbrain bench --methods")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--causal", action="store_true", help="causal attention")
    parser.add_argument("--turns", type=int, default=31, help="times that the builds take turns (default 31)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work()
    if arguments.old is None or arguments.new is None:
        parser.error("expected two folders, OLD and NEW")
    old, new = Worker(arguments.old), Worker(arguments.new)
    causal = "causal" if arguments.causal else "bidirectional"
    print(f"{'method':14}{'direction':11}" + "".join(f"{n:>9}" for n in arguments.lengths))
    for method in arguments.methods:
        for direction in ("F", "F+B"):
            found = [ratio(old, new, (method, n, direction, causal), arguments.turns) for n in arguments.lengths]
            print(f"{method:14}{direction:11}" + "".join(f"{r:9.3f}" for r in found), flush=True)


if __name__ == "__main__":
    main()
