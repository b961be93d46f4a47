"""Instructions per stage of keys of the forward pass on tensor cores stay as few as they are."""

from __future__ import annotations

import pytest
from cuda_compiler import NEEDS_NVCC, SOURCES, kernel_names, needs_by_symbol, nvcc, release
from cuda_instructions import NEEDS_DISASSEMBLER, Stage, disassembler, stages, stages_of
from cuda_instructions import SOURCES as OF_TILES

pytestmark = pytest.mark.skipif(not SOURCES, reason="needs the source tree, not only the installed package")

# With nvcc 13.0 for sm_90: instructions of the loop over stages, all of them; and registers.
MOST = {
    ("bfloat16", "64", "none"): (280, 128),
    ("bfloat16", "64", "quadratic"): (380, 128),
    ("bfloat16", "64", "centroid"): (390, 168),
    ("bfloat16", "128", "none"): (350, 168),
    ("bfloat16", "128", "quadratic"): (470, 168),
    ("bfloat16", "128", "centroid"): (470, 168),
    ("float16", "64", "none"): (310, 128),
    ("float16", "64", "quadratic"): (420, 128),
    ("float16", "64", "centroid"): (420, 168),
    ("float16", "128", "none"): (390, 168),
    ("float16", "128", "quadratic"): (520, 168),
    ("float16", "128", "centroid"): (510, 168),
}


# The same where neighbouring tiles share the keys of their windows.
MOST_OF_WINDOWS = {
    ("bfloat16", "64", "none"): (255, 128),
    ("bfloat16", "64", "quadratic"): (325, 168),
    ("bfloat16", "64", "centroid"): (330, 168),
    ("bfloat16", "128", "none"): (350, 255),
    ("bfloat16", "128", "quadratic"): (400, 255),
    ("bfloat16", "128", "centroid"): (470, 255),
    ("float16", "64", "none"): (310, 128),
    ("float16", "64", "quadratic"): (420, 168),
    ("float16", "64", "centroid"): (420, 168),
    ("float16", "128", "none"): (390, 255),
    ("float16", "128", "quadratic"): (520, 255),
    ("float16", "128", "centroid"): (510, 255),
}


@pytest.mark.skipif(nvcc() is None, reason=NEEDS_NVCC)
@pytest.mark.skipif(disassembler() is None, reason=NEEDS_DISASSEMBLER)
@pytest.mark.parametrize(("kernel", "most"), [("tile", MOST), ("window", MOST_OF_WINDOWS)], ids=["tile", "window"])
def test_a_stage_takes_few_instructions_and_registers(
    kernel: str, most: dict[tuple[str, str, str], tuple[int, int]]
) -> None:
    if release() != "13.0":
        pytest.skip("another compiler makes other instructions")
    source = next(source for source in OF_TILES if source.stem == f"kernels_attention_{kernel}")
    needs = needs_by_symbol(source, "90")
    registers = dict(zip(kernel_names(list(needs)), (of.registers for of in needs.values())))
    found = stages(source, "90")
    for (element, width, kind), (instructions, of_thread) in most.items():
        name = f"attention_{kernel}<{element}, {width}, {kind}, false>"
        assert found[name].all <= instructions, f"{name}: {found[name]}"
        assert registers[name] <= of_thread, f"{name}: {registers[name]} registers"


def test_what_is_outside_of_a_loop_over_stages_counts_for_one_of_a_round() -> None:
    product = "        /*{:04x}*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;"
    copy = "        /*{:04x}*/                   LDGSTS.E [R1], desc[UR4][R2.64], P1 ;"
    branch = "        /*{:04x}*/                   @P0 BRA `({}) ;"
    lines = [".L_x_1:", *[copy] * 9, ".L_x_2:", *[product] * 8, branch.replace("({})", "(.L_x_2)")]
    lines += [branch.replace("({})", "(.L_x_1)")]
    body = [line.format(16 * at) for at, line in enumerate(lines)]
    assert stages_of("\n".join(body)) == Stage(all=9 + 3, usual=9 + 3, products=8)


def test_the_usual_way_through_a_loop_has_all_products_and_no_rare_case() -> None:
    lines = [
        "MOV R0, R1",
        "LOOP",
        *["LDGSTS.E [R1], desc[UR4][R2.64], P1"] * 2,
        "@!P1 BRA `(.L_x_2)",
        "FMUL R3, R3, R4",
    ]
    lines += [
        "BRA `(.L_x_2)",
        "FADD R1, R1, R1",
        "END",
        *["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 8,
        "BRA.DIV UR4, `(.L_x_9)",
    ]
    lines += ["@P0 BRA `(.L_x_1)", "EXIT"]
    labels, body, at = {"LOOP": ".L_x_1:", "END": ".L_x_2:"}, [], 0
    for line in lines:
        body.append(labels.get(line) or f"        /*{at:04x}*/                   {line} ;")
        at += 16 * (line not in labels)
    assert stages_of("\n".join(body)) == Stage(all=16, usual=13, products=8)
