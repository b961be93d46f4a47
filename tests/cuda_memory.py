"""What calls on a GPU allocate: the table of docs/gpu.md. ``python tests/cuda_memory.py`` writes it anew.

The launchers of the CUDA kernels run in the emulator, whose launches are left out here: torch's profiler counts what
they ask its allocator for. A GPU's allocator rounds each piece up to 512 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from cuda_compiler import ROOT
from emulated import Emulator, build
from marked import Marked
from testkit import leaves, rand

import scatterbrain as sb
from scatterbrain import prepared
from scatterbrain.low_rank import quadratic_projection

TABLE = Marked(ROOT / "docs" / "gpu.md", "table of memory")
TOKENS, HEADS = 4096, 4


class Bytes(NamedTuple):
    """Per token and head. ``peak``: the most at once during a forward pass without gradients, during one and the
    backward pass that follows, what they return included; ``kept``: between the two, beside the inputs and out."""

    forward_peak: float
    kept: float
    peak: float


def at_once(run: Callable[[], object]) -> int:
    """The most bytes that ``run`` has at once beyond those before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = run()  # noqa: F841  (what it returns is alive when the profile ends)
    now = most = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure(dtype: torch.dtype, head_dim: int, support: object, low_rank: object, is_causal: bool) -> Bytes:
    tokens = leaves([rand(1, HEADS, TOKENS, head_dim, seed=i, dtype=dtype) for i in range(3)])
    statistics = None
    if isinstance(low_rank, sb.Quadratic):
        statistics = sb.fit_statistics(*(rand(1, HEADS, 99, head_dim, seed=i) for i in range(2)), low_rank.rank)
    arguments = dict(is_causal=is_causal, statistics=statistics)
    upstream = torch.ones_like(tokens[0])

    def forward() -> torch.Tensor:
        return sb.attention(*tokens, support, low_rank, **arguments)

    def forward_alone() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    def both() -> tuple[torch.Tensor, ...]:
        out = forward()
        return out, *torch.autograd.grad(out, tokens, upstream)

    def saved() -> int:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            out = forward()
        events = [event.nbytes() for event in profile.kineto_results.events() if event.name() == "[memory]"]
        return sum(events) - out.nbytes

    forward_alone()  # constants are made once
    figures = at_once(forward_alone), saved(), at_once(both)
    return Bytes(*(figure / (TOKENS * HEADS) for figure in figures))


CALLS = {
    "`Window(64)`": (sb.Window(64), None, False),
    "`Window(64)`, causal": (sb.Window(64), None, True),
    "`Window(64)`, `Quadratic(9)`": (sb.Window(64), sb.Quadratic(9), False),
    "`Window(64)`, `Quadratic(9)`, causal": (sb.Window(64), sb.Quadratic(9), True),
    "`Window(64)`, `Centroid(64)`": (sb.Window(64), sb.Centroid(64), False),
    "`Routed(64)`, `Quadratic(9)`": (sb.Routed(64), sb.Quadratic(9), False),
    "`Routed(64)`, `Quadratic(9)`, causal": (sb.Routed(64), sb.Quadratic(9), True),
    "`drop_in()`": (*sb.presets.drop_in(), False),
    "`quality()`": (*sb.presets.quality(), False),
    "`causal()`": (*sb.presets.causal(), True),
    "`train()`, causal, per query": (*sb.presets.train(), True),
}
COLUMNS = ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64))


def figures(emulator: Emulator) -> dict[str, list[Bytes]]:
    """By call, of every column."""
    with (
        emulator.installed(),
        emulator.limited_to(0),
        mock.patch.object(prepared, "key_of", lambda *arguments: None),  # as on a device
        mock.patch.object(quadratic_projection, "constant_projection", lambda *arguments: None),
    ):
        return {name: [measure(*column, *call) for column in COLUMNS] for name, call in CALLS.items()}


def table(emulator: Emulator) -> list[str]:
    head = ["call", *(f"{str(dtype).removeprefix('torch.')}, d {d}: F, kept, F+B" for dtype, d in COLUMNS)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, columns in figures(emulator).items():
        cells = [", ".join(f"{figure:.0f}" for figure in of_column) for of_column in columns]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


if __name__ == "__main__":
    TABLE.write(table(Emulator(build())))
