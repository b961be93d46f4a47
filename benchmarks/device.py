"""The Python parts of benchmarks/device.sh, one a step; benchmarks/device.sh --help says what they are.

    python benchmarks/device.py facts                   the card and the versions
    python benchmarks/device.py smoke                   every path of an operator once, against the CPU
    python benchmarks/device.py table --lengths 4096    times and memory beside torch's kernels
    python benchmarks/device.py calls                   a few small calls, for the sanitizer to watch
    python benchmarks/device.py summary                 what the steps left in --out, as a table

With --device emulator the kernels run on the CPU (tests/emulated.py), where times mean nothing: that tests this file.
A job that brings its process down, or hangs, is noted, and the rest goes on in another process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "tests"))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import scatterbrain as sb
from scatterbrain.bench.clock import clock_of, sets_beyond_cache
from scatterbrain.bench.memory import device_peak
from scatterbrain.bench.methods import parse_method

HEAD_DIM, RANK = 64, 9
TOKENS_AND_HEADS = 1 << 18  # of every setting of the table
METHODS = {  # by causality
    False: ("window-{}", "routed-{}", "per-query-{}", "window-{}+centroid", "routed-{}+centroid"),
    True: ("window-{}", "routed-{}", "per-query-{}"),
}
PEERS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch cuDNN": SDPBackend.CUDNN_ATTENTION}
DIRECTIONS = ("F", "F+B")
MOST_REPEATS, FEWEST_REPEATS = 20, 3
SECONDS_OF_A_METHOD = 0.5  # that its repeats at a setting may take
DTYPE = torch.bfloat16


class Machine:
    """Where the kernels run: a CUDA device, or the emulator, with smaller sizes.

    Attributes:
        tell: takes what is run next, so that whoever waits knows what did not return.
    """

    def __init__(self, name: str) -> None:
        self.device = torch.device("cuda" if name == "cuda" else "cpu")
        self.tell: Callable[[dict[str, str]], None] = lambda message: None
        if name == "cuda" and not torch.cuda.is_available():
            raise SystemExit("device.py: torch finds no CUDA device; --device emulator runs the kernels on the CPU")

    def running(self) -> contextlib.AbstractContextManager:
        """Inside, operators on tensors of the machine run the CUDA kernels."""
        return contextlib.nullcontext() if self.is_real else self._emulator.installed()

    @cached_property
    def _emulator(self) -> Any:
        from emulated import Emulator, build

        return Emulator(build())

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def place(self, given: Any) -> Any:
        """A tensor or what a low-rank kernel runs with, there."""
        return given if given is None else given.to(self.device)

    @property
    def is_real(self) -> bool:
        return self.device.type == "cuda"


# -------------------- jobs, in a process of their own


def serve(connection: Connection, device: str) -> None:
    """Answers jobs until told to stop. An error that leaves a CUDA context unusable ends the process."""
    machine = Machine(device)
    machine.tell = connection.send
    connection.send({"ready": True})
    while (job := connection.recv()) is not None:
        kind, arguments = job
        try:
            answer = JOBS[kind](machine, **arguments)
            machine.synchronize()
        except Exception as error:  # the parent notes it
            answer = {"error": reason(error)}
        connection.send(answer)
        with contextlib.suppress(Exception):
            machine.synchronize()
            continue
        return


class Worker:
    """A process that is started again where a job has brought it down or was stopped.

    Attributes:
        at: what the last job was doing when it was heard of last.
    """

    def __init__(self, device: str) -> None:
        self.device, self.at, self._process, self._connection = device, "", None, None

    def ask(self, kind: str, limit: float, **arguments: Any) -> dict[str, Any]:
        """What the job answers, or {"error": why it does not}."""
        deadline = time.monotonic() + limit
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, self.device), daemon=True)
            process.start()
            self._process = process
            theirs.close()
            started = self._receive(deadline)
            if "error" in started:
                return started
        try:
            self._connection.send((kind, arguments))
        except (BrokenPipeError, OSError):
            self.close()
            return {"error": "its process had ended"}
        return self._receive(deadline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        try:
            while self._connection.poll(max(0.0, deadline - time.monotonic())):
                answer = self._connection.recv()
                if "at" not in answer:
                    return answer
                self.at = answer["at"]
            answer = {"error": "stopped: it took too long"}
        except (EOFError, OSError):
            self._process.join(5)
            answer = {"error": f"its process ended with code {self._process.exitcode}"}
        self.close()
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


# -------------------- smoke


def paths(keys: int) -> Iterator[dict[str, Any]]:
    """Every form of list, of so many keys, with every kind of low-rank kernel, and the operators beside attention."""
    for operator in ("project", "project_packed", "project_backward", "cluster", "route"):
        yield {"operator": operator}
    for is_causal in (False, True):
        for support in ("window-{}", "routed-{}", "per-query-{}", "lsh-{}", "empty"):
            for kernel in ("none", "quadratic", "favor", "centroid"):
                name = f"{support.format(keys)}+{kernel}"
                if (support, kernel) == ("empty", "none") or parse_method(name).refusal(is_causal):
                    continue
                for direction in DIRECTIONS:
                    yield {"operator": "attention", "method": name, "is_causal": is_causal, "direction": direction}


def path_name(path: dict[str, Any]) -> str:
    if path["operator"] != "attention":
        return path["operator"]
    return f"{path['method']}{', causal' if path['is_causal'] else ''}, {path['direction']}"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smoke_of(machine: Machine, operator: str, **path: Any) -> dict[str, Any]:
    """The error of a path against the same call of the CPU's kernels in float64."""
    function = partial(attention_path, **path) if operator == "attention" else OPERATORS[operator]
    with machine.running():
        got = function(machine, torch.float32, machine.place)
    want = function(machine, torch.float64, lambda t: t)
    errors = [
        float((mine.cpu().double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))
        for mine, exact in zip(got, want, strict=True)
    ]
    worst = float(torch.tensor(errors).amax())  # NaN where one is
    return {"passed": worst <= 1e-3, "error_of_norm": worst}


Place = Callable[[Any], Any]


def attention_path(
    machine: Machine, dtype: torch.dtype, place: Place, method: str, is_causal: bool, direction: str
) -> list[Tensor]:
    n = 300 if machine.is_real else 70
    shapes = ((1, 4, n, 32), (1, 2, n, 32), (1, 2, n, 24))
    tokens = [drawn(*shape, seed=i) for i, shape in enumerate(shapes)]
    support, low_rank = parse_method(method).pair(RANK)
    fitted = None
    if isinstance(low_rank, sb.Quadratic):
        fitted = place(sb.fit_statistics(drawn(1, 4, 200, 32, seed=4), drawn(1, 2, 200, 32, seed=5), RANK))
    if isinstance(low_rank, sb.Centroid):  # fixed: which of two centres is nearer may be rounding
        fitted = place(sb.reference.cluster(tokens[0], tokens[1], 16))
        low_rank = sb.Centroid(16)
    arguments = dict(low_rank=low_rank, is_causal=is_causal, statistics=fitted)
    leaves = [place(t.to(dtype)).requires_grad_(direction == "F+B") for t in tokens]
    out = sb.attention(*leaves, support, **arguments)
    if direction == "F":
        return [out]
    return [out.detach(), *torch.autograd.grad(out, leaves, place(drawn(*out.shape, seed=6).to(dtype)))]


def _projection(machine: Machine, dtype: torch.dtype, place: Place) -> list[Tensor]:
    tensors = (drawn(2, 4, 300, 32), drawn(2, 2, 7, 32, seed=1), drawn(2, 2, 7, seed=2))
    return [place(t.to(dtype)) for t in tensors]


def _project_backward(machine: Machine, dtype: torch.dtype, place: Place) -> list[Tensor]:
    tokens, weight, _ = _projection(machine, dtype, place)
    grad = place(drawn(2, 4, 300, 7, seed=3).to(dtype))
    return list(torch.ops.scatterbrain.project_backward(grad, tokens, weight))


def _cluster(machine: Machine, dtype: torch.dtype, place: Place) -> list[Tensor]:
    found = sb.cluster(place(drawn(1, 4, 90, 32).to(dtype)), place(drawn(1, 2, 600, 32, seed=1).to(dtype)), 16)
    return [found.index, found.representatives, found.log_mass, found.query_mean]


def _route(machine: Machine, dtype: torch.dtype, place: Place) -> list[Tensor]:
    del dtype  # lists of float64 scores agree but for ties within its rounding
    query, key = (place(drawn(1, heads, 200, 16, seed=heads).double()) for heads in (4, 2))
    lists = sb.route(query, key, sb.Routed(64), None)
    return [lists.index, lists.count]


OPERATORS: dict[str, Callable[[Machine, torch.dtype, Place], list[Tensor]]] = {
    "project": lambda *a: [torch.ops.scatterbrain.project(*_projection(*a))],
    "project_packed": lambda *a: [torch.ops.scatterbrain.project_packed(*_projection(*a))],
    "project_backward": _project_backward,
    "cluster": _cluster,
    "route": _route,
}


def smoke(options: argparse.Namespace) -> int:
    deadline, results = time.monotonic() + options.seconds, {}
    worker = Worker(options.device)
    for path in paths(options.keys):
        left = deadline - time.monotonic()
        answer = {"error": "no time left"} if left <= 0 else worker.ask("smoke", min(60.0, left), **path)
        results[path_name(path)] = {"passed": False, "error": "", **answer}
        write(options.out / "smoke.json", results)
    worker.close()
    failed = [name for name, result in results.items() if not result["passed"]]
    print(f"{len(results) - len(failed)} of {len(results)} paths agree with the CPU")
    causes: dict[str, list[str]] = {}
    for name in failed:
        cause = results[name]["error"] or f"error {results[name]['error_of_norm']:.1e} of the norm"
        causes.setdefault(cause, []).append(name)
    for cause, names in causes.items():
        print(f"  {len(names)} x {cause}: {'; '.join(names[:4])}{' ...' if len(names) > 4 else ''}")
    return 1 if failed else 0


# -------------------- table


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


JOBS = {"smoke": smoke_of, "ceilings": ceilings_of, "setting": setting_of}


# -------------------- facts, calls, summary


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


def calls(options: argparse.Namespace) -> int:
    """Calls of every kind of kernel: lengths that are no multiple of anything, several segments, padding."""
    machine = Machine(options.device)
    failures = 0
    with machine.running():
        for path in paths(options.keys):
            if path["operator"] == "attention" and path["direction"] == "F":
                continue  # a trained call runs the forward kernels too
            function = OPERATORS.get(path["operator"]) or partial(
                attention_path, method=path["method"], is_causal=path["is_causal"], direction=path["direction"]
            )
            try:
                function(machine, torch.float32, machine.place)
                machine.synchronize()
            except RuntimeError as error:
                failures += 1
                print(f"{path_name(path)}: {reason(error)}", flush=True)
    print(f"{failures} calls failed")
    return 1 if failures else 0


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


# -------------------- files


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


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
