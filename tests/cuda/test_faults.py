"""What the emulator catches: faults planted into copies of the kernels, each with the name that it must get. Those that
leave every access legal must show in the parity with the definition."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from cluster_cases import assert_agree, tokens_of
from cuda_calls import excess
from emulated import Emulator, build
from heavy_keys import RANK, Call, late_call
from oracle import assert_parity, draw, row_error
from planted import FLOAT, Kernels
from supports.test_route import BY_SKETCH, PER_QUERY, POOLED, TWO_POOLS, Inputs, assert_as_defined, random_mask
from testkit import rand

import scatterbrain as sb

# Windows, lists with a causal edge, causal states, lists of single queries; without a kernel, quadratic and features;
# several chunks. None with Favor(centred=True): faults are looked for in a library of float32 kernels alone, and that
# kernel's map is float64.
SEEDS = (2, 18, 35, 98, 39, 49, 10, 11, 12, 13, 20, 29, 34, 36, 37, 187, 44, 50, 58, 61, 66, 68, 76, 83, 191, 100)


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    name: str


FAULTS = {
    "missing barrier": Fault(
        "kv_state.cuh",
        "      sync_block();\n      chunk.add_to(",
        "      chunk.add_to(",
        "race|uninitialised shared memory",
    ),
    "missing barrier at the end of a loop": Fault(
        "kv_state.cuh",
        "return T(1); });\n      sync_block();",
        "return T(1); });",
        "race",
    ),
    "missing warp barrier": Fault(
        "attention_forward.cuh", "      }\n    }\n    sync_warp();\n  }", "      }\n    }\n  }", "race"
    ),
    "threads leave before a barrier": Fault(
        "rows.cuh",
        "  counts.set(thread, sum);",
        "  if (thread >= p.slots) return;\n  counts.set(thread, sum);",
        "divergent barrier",
    ),
    "a warp's barrier in a branch of some lanes": Fault(
        "attention_forward.cuh",
        "    sync_warp();\n    for (int i = 0; i < kWarp; ++i) {",
        "    if (key >= 0) sync_warp();\n    for (int i = 0; i < kWarp; ++i) {",
        "divergent warp|race|uninitialised",
    ),
    "wrong bound of a row": Fault(
        "attention_forward.cuh", "if (e >= p.value_pad) break;", "if (e >= kWidest) break;", "out of bounds"
    ),
    "int32 overflow of an offset": Fault(
        "../params.h",
        "b * batch + h * head + i * row;",
        "uint16_t(b * batch + h * head + i * row);",  # inside of the tensor still, wherever that lies
        "clusters",
    ),
    "write to an input": Fault(
        "attention_query.cuh",
        "    const E* row = p.q",
        "    store(p.q.template at<E>(b, h, query), E{});\n    const E* row = p.q",
        "write to an input",
    ),
    "missing rescale": Fault(
        "attention_forward.cuh", "sum[c] *= scale;\n      top", "sum[c] *= T(1);\n      top", "parity"
    ),
    "lost group offset": Fault("attention_query.cuh", "kv(p.kv_head(h))", "kv(h % p.kv_heads)", "parity"),
    "wrong mask bound": Fault(
        "key_list.cuh",
        "span.hi > edge + 1 ? edge + 1 : span.hi",
        "span.hi > edge + 2 ? edge + 2 : span.hi",
        "parity|out",
    ),
    "stale index": Fault("attention_forward.cuh", "memory.taken.get(i);", "memory.taken.get(i ^ 1);", "parity"),
    "missing barrier of a sort": Fault(
        "clusters_of_segment.cuh",
        "        }\n        sync_block();\n      }",
        "        }\n      }",
        "race|uninitialised shared memory",
    ),
    "missing barrier of directions": Fault(
        "cluster.cuh", "      sync_block();\n      const double rest", "      const double rest", "race"
    ),
    "lost group offset of the mean query": Fault(
        "cluster.cuh", "first_head = head % p.kv_heads * group", "first_head = head % p.kv_heads", "clusters"
    ),
    "missing rescale of a segment": Fault(
        "cluster_keys.cuh", "exp2_of(load(static_cast<const T*>(p.top) + at) - top)", "T(1)", "clusters"
    ),
    "lost low parts of keys and centres": Fault(
        "nearest_centres.cuh", "int order = kParts - 1; order >= 0", "int order = 0; order >= 0", "clusters"
    ),
    "a lane's own nearest centre": Fault(
        "nearest_centres.cuh", "int mask = 1; mask <= 2; ++mask", "int mask = 1; mask < 2; ++mask", "clusters"
    ),
    "a centre behind the last": Fault(
        "nearest_centres.cuh", ": -float(INFINITY));", ": 0.0f);", "clusters|out of bounds"
    ),
    "the mean taken from keys alone": Fault("cluster_keys.cuh", "(value - load(kept.mean + e))", "value", "clusters"),
    "lost first segment": Fault("kv_state.cuh", "has_keys = slot > 0 &&", "has_keys = slot > 1 &&", "parity"),
    "held key taken back": Fault(
        "attention_forward.cuh",
        "if (is_held_out(p, head, first_key + key, state_slot)) return T(0);",
        "",
        "held",
    ),
    "lost late keys": Fault("kv_state.cuh", "late_count = load(p.late_counts + slot);", "late_count = 0;", "late"),
    "missing rescale of a state": Fault("kv_state.cuh", " * exp2_of(of_segment - top);", ";", "states"),
    "wrong mask bound of a run": Fault(
        "route_groups.cuh", "key < length && !(mask", "key <= length && !(mask", "out of bounds|lists"
    ),
    "last additions of a sketch": Fault("route_sketch.cuh", "half < width; half", "half < width / 2; half", "lists"),
    "missing warp barrier of a sketch": Fault(
        "route_sketch.cuh",
        "b), value.set(at + half, a - b);\n        }\n        sync_warp();",
        "b), value.set(at + half, a - b);\n        }",
        "race",
    ),
    "lost group offset of a routed head": Fault(
        "route_pooled.cuh", "p.kv_heads + h / (p.q_heads / p.kv_heads)", "p.kv_heads + h % p.kv_heads", "lists"
    ),
    "wrong scan order of what is taken": Fault(
        "route_block.cuh", "t < thread; ++t) at +=", "t <= thread; ++t) at +=", "lists|out|uninitialised global"
    ),
    "missing barrier before scores are read": Fault(
        "route_block.cuh",
        "    if (lane_index() == 0) counts.set(warp_index(), value);\n    sync_block();",
        "    if (lane_index() == 0) counts.set(warp_index(), value);",
        "race|uninitialised shared memory",
    ),
    "missing barrier before a sort": Fault(
        "clusters_of_segment.cuh",
        "    sync_block();\n    for (int64_t run",
        "    for (int64_t run",
        "race|uninitialised shared memory",
    ),
}

# In the backward pass: noticed in gradients, or where they are computed.
FAULTS_OF_GRADIENTS = {
    "lost group offset of a key": Fault(
        "attention_backward_keys.cuh",
        "for (int64_t h = kv * group; h < (kv + 1) * group; ++h)",
        "for (int64_t h = kv; h < kv + group; ++h)",
        "d[qkv]:",
    ),
    "wrong scan order": Fault(
        "kv_state_backward.cuh",
        "for (int64_t segment = p.query_segments - 1; segment >= 0; --segment) {",
        "for (int64_t segment = 0; segment < p.query_segments; ++segment) {",
        "d[qkv]:",
    ),
    "stale index of a transposed list": Fault(
        "naming_blocks.cuh",
        "begin = entry > 0 ? load(of.cursor + at - 1) : 0",
        "begin = entry > 0 ? load(of.cursor + at) : 0",
        "d[qkv]:",
    ),
    "lost last part of a list": Fault(
        "naming_blocks.cuh", "load(of.cursor + at + of.parts - 1)", "load(of.cursor + at)", "d[qkv]:"
    ),
    "blocks of an entry in one place": Fault(
        "transposed_lists.cuh", "int32_t(named.peers_before())", "0", "d[qkv]:|race|uninitialised global"
    ),
    "missing decay of a state's gradient": Fault(
        "kv_state_backward.cuh", "sum *= exp2_of(log_of(segment) - log_of(segment + 1));", "sum *= T(1);", "d[qkv]:"
    ),
    "missing warp barrier of a key's pairs": Fault(
        "attention_backward_keys.cuh",
        "    sync_warp();\n    for (int i = 0; i < kWarp; ++i) {",
        "    for (int i = 0; i < kWarp; ++i) {",
        "race|uninitialised shared memory",
    ),
    "missing barrier of a state's gradient": Fault(
        "kv_state_backward.cuh",
        "      sync_block();\n      chunk.add_to(",
        "      chunk.add_to(",
        "race|uninitialised shared memory",
    ),
}
# Causal and not: windows and lists, of single queries too; quadratic, features, clusters; groups of heads, padding.
SEEDS_OF_GRADIENTS = (155, 11, 193, 230, 252, 310)


# What runs with every fault: each returns what is wrong, or nothing.


def wrong_calls(emulator: Emulator) -> str:
    for seed in SEEDS:
        wrong = excess(emulator, draw(seed), torch.float32, 1e-5)
        if wrong:
            return f"parity: {wrong}"
    return ""


def wrong_clusters(emulator: Emulator) -> str:
    for name in ("few", "one key more", "segments"):
        query, key, clusters = tokens_of(name, torch.float32)
        with emulator.installed():
            found = sb.cluster(query, key, clusters)
        try:
            assert_agree(found, sb.reference.cluster(query, key, clusters), rtol=1e-5, atol=2e-6)
        except AssertionError:
            return f"clusters: {name}"
    return ""


def wrong_states_of_two_segments(emulator: Emulator) -> str:
    query, key, value = rand(1, 1, 20, 16), rand(1, 1, 600, 16, seed=1), rand(1, 1, 600, 16, seed=2)
    for low_rank in (sb.Favor(8), sb.Centroid(3)):
        statistics = sb.reference.cluster(query, key, 3) if isinstance(low_rank, sb.Centroid) else None
        arguments = dict(support=sb.Empty(), low_rank=low_rank, statistics=statistics)
        with emulator.installed():
            out = sb.attention(query, key, value, **arguments)
        if not row_error(out, sb.reference.attention(query, key, value, **arguments)) <= 1e-5:
            return f"states: {low_rank}"
    return ""


def wrong_lists(emulator: Emulator) -> str:
    for form, queries, keys in (
        (POOLED[1], 75, 75),
        (TWO_POOLS[1], 75, 75),
        (PER_QUERY[2], 75, 75),
        (BY_SKETCH[0], 9, 300),
    ):
        inputs = Inputs(queries, keys, heads=4, kv_heads=2)
        inputs.mask(random_mask(2, keys, 1), random_mask(2, queries, 1))
        try:
            with emulator.installed():
                assert_as_defined(inputs, **form)
        except (AssertionError, ValueError, IndexError):
            return f"lists: {form}"
    return ""


def wrong_held_keys(emulator: Emulator) -> str:
    arguments, want = late_call()
    with emulator.installed():
        late, _ = torch.ops.scatterbrain.attention(*arguments)
    if not row_error(late, want) <= 1e-5:
        return "late keys"
    call, support = Call(40.0), sb.Window(24)
    settings = dict(scale=call.scale, statistics=call.statistics)
    with emulator.installed():
        out = sb.attention(*call.inputs, support, sb.Quadratic(RANK), **settings)
    if not row_error(out, call.defined(support, False, torch.float64)[0]) <= 1e-4:
        return "held keys"
    return ""


def wrong_gradients(emulator: Emulator) -> str:
    for seed in SEEDS_OF_GRADIENTS:
        case = draw(seed)
        try:
            with emulator.installed():
                assert_parity(case, torch.float32, 1e-5, case.low_rank_share())
        except AssertionError as error:
            return str(error)
    return ""


# With what their complaints begin, or have in them.
CHECKS = {
    wrong_states_of_two_segments: "states",
    wrong_clusters: "clusters",
    wrong_lists: "lists",
    wrong_calls: "parity",
    wrong_held_keys: "held|late",
}


def checks_of(fault: Fault) -> list[Callable[[Emulator], str]]:
    """That which should notice it first."""
    return sorted(CHECKS, key=lambda check: not set(CHECKS[check].split("|")) & set(fault.name.split("|")))


def first_complaint(emulator: Emulator, checks: Sequence[Callable[[Emulator], str]]) -> str:
    for check in checks:
        try:
            complaint = check(emulator)
        except RuntimeError as error:
            return str(error)
        if complaint:
            return complaint
    return ""


def test_kernels_without_a_fault_raise_no_complaint(emulator: Emulator) -> None:
    assert first_complaint(emulator, (*CHECKS, wrong_gradients)) == ""


@pytest.mark.parametrize("fault", [*FAULTS, *FAULTS_OF_GRADIENTS])
def test_a_planted_fault_is_caught_by_name(kernels: Kernels, fault: str) -> None:
    file, old, new, name = (FAULTS | FAULTS_OF_GRADIENTS)[fault]
    checks = checks_of(FAULTS[fault]) if fault in FAULTS else (wrong_gradients,)
    kernels.assert_caught(file, old, new, name, lambda emulator: first_complaint(emulator, checks), FLOAT)


def test_a_fault_has_a_place(kernels: Kernels) -> None:
    bad = "      if (e < p.value_pad) store(out + e + 1000000"
    with kernels.planted("attention_forward.cuh", "      if (e < p.value_pad) store(out + e", bad) as path:
        line = path.read_text().split(bad)[0].count("\n") + 1
        complaint = first_complaint(Emulator(build(kernels.csrc, FLOAT)), CHECKS)
    place = rf"in kernel attention_forward, block \d+, thread \d+, at attention_forward.cuh:{line}$"
    assert re.match(f"out of bounds: a write of 4 bytes .*{place}", complaint), complaint
