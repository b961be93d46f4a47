"""The Python parts of benchmarks/device.sh, one a step; benchmarks/device.sh --help says what they are.

    python benchmarks/device.py facts                   the card and the versions
    python benchmarks/device.py smoke                   every path of an operator once, against the CPU
    python benchmarks/device.py table --lengths 4096    times and memory beside torch's kernels
    python benchmarks/device.py calls                   a few small calls, for the sanitizer to watch
    python benchmarks/device.py summary                 what the steps left in --out, as a table

With --device emulator the kernels run on the CPU (tests/emulated.py), where times mean nothing: that tests this file.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import warnings
from pathlib import Path

import torch
from device_files import read, text, write
from device_machine import Machine
from device_smoke import calls, smoke
from device_table import TOKENS_AND_HEADS, table, table_lines

import scatterbrain as sb


def facts(options: argparse.Namespace) -> int:
    machine = Machine(options.device)
    about = {
        "card": "the CUDA kernels on the CPU (emulator): times mean nothing",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scatterbrain": sb.__version__,
        "cores": os.cpu_count(),
    }
    if machine.is_real:
        card = torch.cuda.get_device_properties(0)
        about |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "cache_mib": round(card.L2_cache_size / 2**20),
            "torch_cuda": torch.version.cuda,
        }
    write(options.out / "facts.json", about)
    for name, value in about.items():
        print(f"{name:<16}{value}")
    return 0


def summary(options: argparse.Namespace) -> int:
    """Prints at most 40 lines, and writes everything into one file."""
    steps = [line.split("\t") for line in text(options.out / "steps.tsv").splitlines()]
    about, found = read(options.out / "facts.json") or {}, read(options.out / "table.json")
    smoked = read(options.out / "smoke.json")
    results = {"steps": steps, "facts": about, "smoke": smoked, "table": found}
    write(options.out / "device.json", results)
    lines = [""]
    for name, result, seconds, _ in steps:
        log = text(options.out / f"{name}.log").strip().splitlines()
        detail = {"smoke": log[:1], "tests": log[-1:], "table": log[-1:]}.get(name, [])
        lines.append(f"{name:<10}{result:<24}{seconds:>4} s  {'; '.join(detail).strip('= ')}"[:150].rstrip())
    lines += [f"card: {about.get('card', 'unknown')}, torch {about.get('torch', '?')}", *table_lines(found)]
    print("\n".join(lines[:40]))
    passed = bool(steps) and all(code in ("0", "3") for *_, code in steps)
    print("device.sh: " + ("every step that ran passed" if passed else "NOT every step passed"))
    return 0 if passed else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {"facts": facts, "smoke": smoke, "table": table, "calls": calls, "summary": summary}
    parser.add_argument("step", choices=steps, help="which, as above")
    parser.add_argument("--device", default="cuda", choices=["cuda", "emulator"], help="default cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=150.0, help="that the step may take; default 150")
    parser.add_argument("--keys", type=int, help="that a query lists; default 64, and 16 in the emulator")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="of the table")
    parser.add_argument(
        "--tokens-and-heads",
        type=int,
        help=f"tokens times heads of a setting of the table; default {TOKENS_AND_HEADS}; in the emulator the tokens",
    )
    options = parser.parse_args()
    options.keys = options.keys or (64 if options.device == "cuda" else 16)
    if options.tokens_and_heads is None:
        options.tokens_and_heads = TOKENS_AND_HEADS if options.device == "cuda" else max(options.lengths)
    warnings.filterwarnings("ignore", message=".*calibrat.*")
    return steps[options.step](options)


if __name__ == "__main__":
    sys.exit(main())
