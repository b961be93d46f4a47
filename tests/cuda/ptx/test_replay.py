"""Every compiled kernel runs on nvcc's PTX and writes what it writes on the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from cuda_compiler import TARGETS, kernel_name
from ptx_calls import CALLS, DTYPES
from ptx_machine import PtxFault
from ptx_replay import WORKING_MEMORY, Library, Recorded, difference, replay

Launches = Callable[[str, torch.dtype], list[Recorded]]
LEAST_COVERAGE = 0.1
LAUNCHES_OF_OTHER_TARGETS = 3


@pytest.fixture(scope="module")
def replayed(libraries: dict[str, Library], launches: Launches) -> object:
    """Replays the launches of a call on a target, once: all of them on the first one, and on the others, whose PTX
    differs in little, some of every kernel."""
    done: set[tuple[str, str]] = set()
    times: Counter[tuple[str, str]] = Counter()

    def of(target: str, call: str) -> None:
        if (target, call) in done:
            return
        for dtype in DTYPES:
            for launch in launches(call, dtype):
                times[target, launch.kernel] += 1
                if target == TARGETS[0] or times[target, launch.kernel] <= LAUNCHES_OF_OTHER_TARGETS:
                    replay(launch, libraries[target])
        done.add((target, call))

    return of


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_started_by_a_call(target: str, libraries: dict[str, Library], launches: Launches) -> None:
    started = {launch.kernel for call in CALLS for dtype in DTYPES for launch in launches(call, dtype)}
    missing = [kernel_name(name) for name in libraries[target].names() if name not in started]
    assert not missing, f"no call in ptx_calls.py starts {', '.join(missing)}"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("target", TARGETS)
def test_ptx_writes_what_the_host_writes(target: str, call: str, replayed: object) -> None:
    replayed(target, call)


def test_calls_execute_much_of_every_kernel(libraries: dict[str, Library], replayed: object) -> None:
    """What is left are mostly divisions of numbers beyond 32 bits and copies of loops for other lengths; kernels in
    float64 for float32 tokens that few calls flag have the least."""
    for call in CALLS:
        replayed(TARGETS[0], call)
    library = libraries[TARGETS[0]]
    shares = {kernel_name(name): library.kernel(name).coverage() for name in library.names()}
    assert not {name: share for name, share in shares.items() if share < LEAST_COVERAGE}


def test_a_launch_records_what_a_kernel_reads_and_writes(launches: Launches) -> None:
    forward = next(one for one in launches("windows", torch.float32) if "attention_forward" in one.kernel)
    assert forward.before.keys() == forward.after.keys() and forward.before != forward.after
    writable = [one for one in forward.ranges if one[2]]
    assert writable and len(writable) < len(forward.ranges)


def test_results_are_compared_and_working_memory_is_not(libraries: dict[str, Library], launches: Launches) -> None:
    route = next(one for one in launches("lists", torch.float32) if "route_pooled" in one.kernel)
    for dtype, message in ((WORKING_MEMORY, None), (torch.int32, "^parity: 1 of .* torch.int32")):
        begin = next(begin for begin, _, is_writable, kind in route.ranges if is_writable and kind == dtype)
        memory = bytearray(route.after[begin])
        memory[0] ^= 1
        changed = replace(route, after=route.after | {begin: bytes(memory)})
        with pytest.raises(PtxFault, match=message) if message else nullcontext():
            replay(changed, libraries[TARGETS[0]])


# -------------------- the comparison


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_differences_beyond_rounding_are_seen(dtype: torch.dtype) -> None:
    want = torch.linspace(-3, 3, 64, dtype=torch.float64).to(dtype)
    want[5] = torch.nan
    assert not difference(want, want.clone())
    for index, value in ((7, torch.nan), (5, 1.0), (9, torch.inf), (40, float(want[40]) * 1.02)):
        got = want.clone()
        got[index] = value
        assert difference(want, got).startswith("parity: 1 of 64")
    if dtype.itemsize == 2:  # next to each other, in many places
        steps = want.view(torch.int16) + 1
        steps[5] = want.view(torch.int16)[5]
        assert difference(want, steps.view(dtype)).startswith("rounding: 63 of 64")


def test_whole_numbers_of_16_bits_may_be_a_unit_apart() -> None:
    want = torch.arange(-500, 500, dtype=torch.int16)
    assert not difference(want, want + 1)
    assert difference(want, want + 2).startswith("rounding: ")
    got = want.clone()
    got[3] += 100
    assert difference(want, got).startswith("parity: 1 of 1000")


def test_whole_numbers_must_be_equal() -> None:
    want = torch.arange(8, dtype=torch.int32)
    got = want.clone()
    assert not difference(want, got)
    got[3] = 4
    assert difference(want, got) == "parity: 1 of 8 torch.int32, first at 3: 4 from PTX, 3 on the host"
