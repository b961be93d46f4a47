"""Times and memory of attention beside torch's kernels: the step table of benchmarks/device.py."""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from device_files import read, write
from device_machine import DIRECTIONS, RANK, Machine, drawn, reason
from device_smoke import path_name
from device_worker import Worker
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import scatterbrain as sb
from scatterbrain.bench.clock import clock_of, sets_beyond_cache
from scatterbrain.bench.memory import device_peak
from scatterbrain.bench.methods import parse_method

HEAD_DIM = 64
TOKENS_AND_HEADS = 1 << 18  # of every setting of the table
METHODS = {  # by causality
    False: ("window-{}", "routed-{}", "per-query-{}", "window-{}+centroid", "routed-{}+centroid"),
    True: ("window-{}", "routed-{}", "per-query-{}"),
}
PEERS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch cuDNN": SDPBackend.CUDNN_ATTENTION}
MOST_REPEATS, FEWEST_REPEATS = 20, 3
SECONDS_OF_A_METHOD = 0.5  # that its repeats at a setting may take
DTYPE = torch.bfloat16


def ceilings_of(machine: Machine) -> dict[str, Any]:
    """What the card itself does: a copy of memory, counting bytes read and written, and a matrix product."""
    clock = clock_of(machine.device)
    source = torch.randn((1 << 30) if machine.is_real else (1 << 16), device=machine.device)
    target = torch.empty_like(source)
    copied = measured(machine, lambda: target.copy_(source), 5)
    size = 8192 if machine.is_real else 64
    a, b = (torch.randn(size, size, device=machine.device).to(DTYPE) for _ in range(2))
    multiplied = measured(machine, lambda: a @ b, 10)
    return {
        "clock": clock.name,
        "copy_terabytes_per_second": 2 * source.numel() * source.element_size() / copied / 1e12,
        "bfloat16_matmul_teraflops_per_second": 2 * size**3 / multiplied / 1e12,
    }


def measured(machine: Machine, call: Callable[[], object], repeats: int) -> float:
    clock = clock_of(machine.device)
    call()
    return statistics.median(clock.seconds([call]) for _ in range(repeats))


def setting_of(machine: Machine, **setting: Any) -> dict[str, Any]:
    with machine.running():
        return times_of(machine, **setting)


def times_of(
    machine: Machine,
    tokens: int,
    is_causal: bool,
    direction: str,
    methods: Sequence[str],
    seconds: float,
    tokens_and_heads: int,
) -> dict[str, Any]:
    """Times of the methods, one call of each in turn, on inputs that are in no cache, and the memory of a call."""
    deadline = time.monotonic() + seconds
    heads_and_rows = max(1, tokens_and_heads // tokens)
    heads = min(8, heads_and_rows)
    shape = (heads_and_rows // heads, heads, tokens, HEAD_DIM)
    generator = torch.Generator(machine.device).manual_seed(tokens)
    bytes_of_a_set = 4 * 2 * HEAD_DIM * shape[0] * heads * tokens
    sets = [
        [torch.randn(*shape, device=machine.device, generator=generator).to(DTYPE) for _ in range(4)]
        for _ in range(sets_beyond_cache(bytes_of_a_set, machine.device))
    ]
    fitted = machine.place(sb.fit_statistics(*(drawn(1, heads, 2048, HEAD_DIM, seed=i) for i in (1, 2)), RANK))
    clock, rows, ready = clock_of(machine.device), {}, {}
    for name in methods:
        machine.tell({"at": name})
        row = rows[name] = {"tokens": tokens, "is_causal": is_causal, "direction": direction, "method": name}
        try:
            call = method_of(machine, name, is_causal, fitted)
            steps = [step_of(call, tensors, direction) for tensors in sets]
            steps[0]()
            if machine.is_real:
                row["bytes_per_token_and_head"] = device_peak(steps[0], machine.device) / (shape[0] * heads * tokens)
            once = clock.seconds([steps[-1]])
            row["first_seconds"] = once
            ready[name] = steps, min(MOST_REPEATS, max(FEWEST_REPEATS, int(SECONDS_OF_A_METHOD / max(once, 1e-6))))
        except (RuntimeError, ValueError, TypeError) as error:
            row["error"] = reason(error)
            machine.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for repeat in range(MOST_REPEATS):
        for name in random.Random(repeat).sample(list(ready), len(ready)):
            steps, repeats = ready[name]
            if repeat < repeats and (time.monotonic() < deadline or repeat < FEWEST_REPEATS):
                samples[name].append(clock.seconds([steps[repeat % len(steps)]]))
    for name, found in samples.items():
        rows[name] |= {"seconds": statistics.median(found), "fastest": min(found), "repeats": len(found)}
    return {"shape": list(shape), "rows": list(rows.values())}


def method_of(
    machine: Machine, name: str, is_causal: bool, fitted: sb.Statistics
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if name not in PEERS:
        return parse_method(name).build(fitted, RANK, is_causal)

    def peer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(PEERS[name]) if machine.is_real else contextlib.nullcontext():
            return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    return peer


def step_of(call: Callable[..., Tensor], tensors: Sequence[Tensor], direction: str) -> Callable[[], object]:
    *tokens, upstream = tensors
    leaves = [t.detach().requires_grad_() for t in tokens]

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*tokens)

    return forward if direction == "F" else lambda: torch.autograd.grad(call(*leaves), leaves, upstream)


def table(options: argparse.Namespace) -> int:
    deadline, path = time.monotonic() + options.seconds, options.out / "table.json"
    worker, smoked = Worker(options.device), read(options.out / "smoke.json")
    found: dict[str, Any] = {"ceilings": worker.ask("ceilings", 60.0), "settings": [], "left_out": []}
    grid = [(n, c, d) for n in options.lengths for c in (False, True) for d in DIRECTIONS]
    broken: set[tuple[str, bool, str]] = set()
    for done, (tokens, is_causal, direction) in enumerate(grid):
        name = f"{tokens} tokens{', causal' if is_causal else ''}, {direction}"
        methods = [m.format(options.keys) for m in METHODS[is_causal]]
        methods = [m for m in methods if is_right(smoked, m, is_causal, direction)]
        answer = {"error": "no path that agrees with the CPU"}
        for _ in methods:  # once more without what brought the process down
            methods = [m for m in (*methods, *PEERS) if (m, is_causal, direction) not in broken]
            left = deadline - time.monotonic()
            if left < 3:
                answer = {"error": "no time left"}
                break
            share = 2 * left / (len(grid) - done)
            setting = dict(tokens=tokens, is_causal=is_causal, direction=direction, methods=methods)
            sizes = dict(seconds=share, tokens_and_heads=options.tokens_and_heads)
            answer = worker.ask("setting", min(left, 4 * share + 15), **setting, **sizes)
            if "error" not in answer:
                found["settings"].append(answer)
                break
            broken.add((worker.at, is_causal, direction))
            found["left_out"].append(f"{worker.at}, {name}: {answer['error']}")
            methods = [m for m in methods if m not in PEERS]
        if "error" in answer:
            found["left_out"].append(f"{name}: {answer['error']}")
        write(path, found)
    worker.close()
    write(path, found)
    print("\n".join(found["left_out"]))
    print(f"{len(found['settings'])} of {len(grid)} settings measured")
    return 0 if found["settings"] and "error" not in found["ceilings"] else 1


def is_right(smoked: dict[str, Any] | None, method: str, is_causal: bool, direction: str) -> bool:
    """Whether the smoke test of the method's path passed; without one, of every path."""
    name = method if "+" in method else f"{method}+quadratic"
    path = path_name({"operator": "attention", "method": name, "is_causal": is_causal, "direction": direction})
    return smoked is None or smoked.get(path, {}).get("passed", False)


# -------------------- as text


def table_lines(found: dict[str, Any] | None) -> list[str]:
    """ms of a call, and how many times faster than the faster of the two peers."""
    if not found or not found["settings"]:
        return []
    ceilings = found["ceilings"]
    lines = []
    if "error" not in ceilings:
        lines.append(
            f"ceilings: copy {ceilings['copy_terabytes_per_second']:.2f} TB/s, bfloat16 matmul "
            f"{ceilings['bfloat16_matmul_teraflops_per_second']:.0f} TFLOP/s"
        )
    rows = [row for setting in found["settings"] for row in setting["rows"]]
    lengths = sorted({row["tokens"] for row in rows})
    total = max(s["shape"][0] * s["shape"][1] * s["shape"][2] for s in found["settings"])
    lines.append(
        f"ms of a call on {total} tokens x heads of {HEAD_DIM}, bfloat16 (times faster than the faster of flash, cuDNN)"
    )
    for is_causal in (False, True):
        for direction in DIRECTIONS:
            some = [r for r in rows if (r["is_causal"], r["direction"]) == (is_causal, direction)]
            if some:
                title = f"{'causal' if is_causal else 'bidirectional'} {direction}"
                lines.append(f"{title:<24}{''.join(f'{n:>18}' for n in lengths)}  bytes/token/head")
                lines += method_lines(some, lengths)
    return lines


def method_lines(rows: list[dict[str, Any]], lengths: list[int]) -> Iterator[str]:
    cells = {(row["method"], row["tokens"]): row for row in rows}
    for method in dict.fromkeys(row["method"] for row in rows):
        texts, memory = [], "-"
        for n in lengths:
            row = cells.get((method, n), {})
            if "seconds" not in row:
                texts.append("-")
                continue
            peers = [cells[p, n]["seconds"] for p in PEERS if "seconds" in cells.get((p, n), {})]
            faster = f" ({min(peers) / row['seconds']:.2f}x)" if peers and method not in PEERS else ""
            texts.append(f"{row['seconds'] * 1e3:.3f}{faster}")
            if "bytes_per_token_and_head" in row:
                memory = f"{row['bytes_per_token_and_head']:.0f}"
        yield f"  {method:<22}{''.join(f'{cell:>18}' for cell in texts)}  {memory}"
