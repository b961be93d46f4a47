"""Every instruction set that this processor runs: parity, causality, padding, determinism and routing.

The other test files run with the best set. Here a sample of them runs in a process for each other set.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from testkit import TESTS, assert_all_close, fitted, out_and_gradients, qkv, run_python

import scatterbrain as sb
from scatterbrain import _build_info
from scatterbrain.operators.library import ISA_VARIABLE

IN_USE = torch.ops.scatterbrain.instruction_set()
FILES = (
    "test_half_types.py",
    "test_attention_parity.py",
    "test_causality_and_padding.py",
    "test_determinism.py",
    "supports/test_route.py",
    "low_rank/test_centroid.py",
)
# Every 17th case of a test: coprime to the periods of supports and kernels in the parity table.
STRIDE = 17
SAMPLE = f"""
import sys
import pytest
import torch

class Sample:
    def pytest_collection_modifyitems(self, items):
        cases, kept = {{}}, []
        for item in items:
            number = cases.setdefault(item.originalname, 0)
            cases[item.originalname] += 1
            if number % {STRIDE} == 0:
                kept.append(item)
        items[:] = kept

import scatterbrain
print("in use:", torch.ops.scatterbrain.instruction_set(), flush=True)
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Sample()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in _build_info.instruction_sets if name != IN_USE])
def test_the_others_pass_a_sample_of_the_operators_tests(name: str) -> None:
    result = run_python("-c", SAMPLE, *(TESTS / file for file in FILES), **{ISA_VARIABLE: name})
    if f"{ISA_VARIABLE}='{name}' is not available here" in result.stderr:
        pytest.skip(f"this processor has no {name}")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert f"in use: {name}" in result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 70, result.stdout[-500:]


def test_the_best_or_the_chosen_one_is_in_use() -> None:
    """Compiled ones are listed with the best first."""
    sets = list(_build_info.instruction_sets)
    wanted = os.environ.get(ISA_VARIABLE)
    assert wanted == IN_USE if wanted else IN_USE in sets
    assert {"avx512_bf16", "avx512", "avx2", "baseline"} >= set(sets) and "baseline" in sets


def test_an_instruction_set_that_does_not_exist_is_refused_at_import() -> None:
    result = run_python("-c", "import scatterbrain", **{ISA_VARIABLE: "mmx"})
    assert result.returncode != 0
    assert (
        "SCATTERBRAIN_ISA='mmx' is not available here; expected one of avx512_bf16, avx512, avx2, baseline"
        in result.stderr
    )


def outputs_and_gradients() -> list[torch.Tensor]:
    given = dict(support=sb.Routed(32), low_rank=sb.Quadratic(9), is_causal=True, statistics=fitted(9, head_dim=24))
    return out_and_gradients(partial(sb.attention, **given), qkv(300, batch=1, head_dim=24))


def test_two_instruction_sets_agree_up_to_rounding(tmp_path: Path) -> None:
    """Only the order of sums differs: routed lists are the same."""
    program = (
        "import sys, torch; from test_instruction_sets import outputs_and_gradients as f; torch.save(f(), sys.argv[1])"
    )
    path = tmp_path / "baseline.pt"
    result = run_python("-c", program, path, **{ISA_VARIABLE: "baseline"})
    assert result.returncode == 0, result.stderr
    assert_all_close(outputs_and_gradients(), torch.load(path))


PAYLOADS = """
import itertools
import torch
import scatterbrain as sb

print("in use:", torch.ops.scatterbrain.instruction_set())
supports = sb.Window(64), sb.Window(16, block_q=1), sb.Routed(32)
for dtype, of_bits, digits in ((torch.float32, torch.int32, 23), (torch.float64, torch.int64, 52)):
    quiet = torch.iinfo(of_bits).max - 2 ** (digits - 1) + 1
    for bits, support, kernel, is_causal in itertools.product(
        (-1, quiet, quiet + 1, quiet + 253, torch.iinfo(of_bits).max), supports, (None, sb.Favor(16)), (False, True)
    ):
        tokens = [torch.randn(1, 1, 200, 32, dtype=dtype) for _ in range(3)]
        tokens[0][0, 0, 50] = torch.full((32,), bits, dtype=of_bits).view(dtype)
        query, key, value = (t.requires_grad_() for t in tokens)
        out, lse = sb.attention(query, key, value, support, kernel, is_causal=is_causal, return_lse=True)
        case = dtype, bits, support, kernel, is_causal
        assert out[0, 0, 50].isnan().all() and lse[0, 0, 50].isnan(), case
        assert torch.autograd.grad(out.sum(), query)[0][0, 0, 50].isnan().all(), case
"""


@pytest.mark.parametrize("name", _build_info.instruction_sets)
def test_nan_is_not_swallowed_whatever_its_bits_are(name: str) -> None:
    """Powers of two are made of bits: those of a NaN must not add up to a number."""
    result = run_python("-c", PAYLOADS, **{ISA_VARIABLE: name})
    if f"{ISA_VARIABLE}='{name}' is not available here" in result.stderr:
        pytest.skip(f"this processor has no {name}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"in use: {name}" in result.stdout
