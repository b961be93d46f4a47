"""Every path of an operator once, against the CPU: the steps smoke and calls of benchmarks/device.py."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from device_files import write
from device_machine import DIRECTIONS, RANK, Machine, Place, drawn, reason
from device_worker import Worker
from torch import Tensor

import scatterbrain as sb
from scatterbrain.bench.methods import parse_method


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
