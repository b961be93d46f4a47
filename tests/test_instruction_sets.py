"""Every instruction set that this processor runs: parity, causality, padding, determinism and routing.

The other tests run with the best one. Here a sample of them runs in a process for each of the others.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scatterbrain as sb
from scatterbrain import _build_info
from scatterbrain.operators.library import ISA_VARIABLE

TESTS = Path(__file__).parent
IN_USE = torch.ops.scatterbrain.instruction_set()
FILES = (
    "test_half_types.py",
    "test_attention_parity.py",
    "test_causality_and_padding.py",
    "test_determinism.py",
    "test_route.py",
)
# Every 17th case of a test: prime to the periods in which the parity table goes through supports and kernels.
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


def run_python(program: str, instruction_set: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {ISA_VARIABLE: instruction_set},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in _build_info.instruction_sets if name != IN_USE])
def test_the_others_pass_a_sample_of_the_operators_tests(name: str) -> None:
    result = run_python(SAMPLE, name, *(str(TESTS / file) for file in FILES))
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
    result = run_python("import scatterbrain", "mmx")
    assert result.returncode != 0
    assert (
        "SCATTERBRAIN_ISA='mmx' is not available here; expected one of avx512_bf16, avx512, avx2, baseline"
        in result.stderr
    )


def outputs_and_gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(1, 2, 300, 24, generator=generator)  # noqa: E731
    leaves = [draw().requires_grad_() for _ in range(3)]
    fitted = sb.fit_statistics(draw(), draw())
    out = sb.attention(*leaves, sb.Routed(32), sb.Quadratic(9), statistics=fitted, is_causal=True)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def test_two_instruction_sets_agree_up_to_rounding(tmp_path: Path) -> None:
    """The sums are ordered otherwise, and nothing else differs: not the lists of the routing, not the support."""
    program = (
        "import sys, torch; from test_instruction_sets import outputs_and_gradients as f; torch.save(f(), sys.argv[1])"
    )
    path = tmp_path / "baseline.pt"
    with_path = f"import sys; sys.path.insert(0, {str(TESTS)!r}); {program}"
    result = run_python(with_path, "baseline", str(path))
    assert result.returncode == 0, result.stderr
    for mine, theirs in zip(outputs_and_gradients(), torch.load(path), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
