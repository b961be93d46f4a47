"""Machine instructions per stage of 16 keys of the forward pass on tensor cores: the table of docs/gpu.md. They are
counts of instructions, not times. ``python tests/cuda_instructions.py`` prints them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from build_cache import made_once
from cuda_compiler import NEEDS_NVCC, ROOT, kernel_names, nvcc, ptx_file

FORMS = ("tile", "tile_ragged", "window", "window_causal")
SOURCES = tuple(ROOT / "csrc" / "cuda" / f"kernels_attention_{form}.cu" for form in FORMS)
STAGES_OF_ROUND = 4  # of attention_window, which has a loop over them in that over rounds
NEEDS_DISASSEMBLER = "needs nvdisasm: none on PATH, beside nvcc, or of the packages nvidia-cuda-nvdisasm or triton"
PRODUCT, COPY = "HMMA", "LDGSTS"  # to shared memory


@cache
def disassembler() -> str | None:
    """On PATH, beside nvcc, or of a package."""
    beside = Path(str(nvcc())).resolve().with_name("nvdisasm")
    places = ("nvidia/cu*/bin/nvdisasm", "nvidia/cuda_nvdisasm/bin/nvdisasm", "triton/backends/nvidia/bin/nvdisasm")
    packages = (path for entry in sys.path for place in places for path in Path(entry).glob(place))
    return shutil.which("nvdisasm") or next((str(path) for path in (beside, *packages) if path.exists()), None)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def machine_code(source: Path, architecture: str) -> str:
    """The text of a source's kernels."""
    ptx = ptx_file(source, f"compute_{architecture}")
    ptxas = str(Path(str(nvcc())).resolve().with_name("ptxas"))
    command = [ptxas, "-O3", f"-arch=sm_{architecture}", str(ptx), "-o"]
    cubin = made_once(ptx.with_suffix(".cubin"), lambda path: _run([*command, str(path)]))
    return _run([str(disassembler()), "-c", str(cubin)])


# -------------------- loops


class Instruction(NamedTuple):
    text: str
    target: int | None  # of a branch of the warp

    @property
    def name(self) -> str:
        return re.sub(r"^@!?U?P\w+ +", "", self.text).split(".")[0].split()[0]

    def falls_through(self) -> bool:
        return not re.match(r"(BRA|EXIT|RET)\b(?! *\.?DIV)", self.text) or ", `" in self.text.split("(")[0]


class Stage(NamedTuple):
    """A loop over stages: instructions between its first one and its branch back, of rare cases too; and those of the
    shortest way through that has all of its products and copies."""

    all: int
    usual: int
    products: int


def _instructions(body: str) -> list[Instruction]:
    places: dict[str, int] = {}
    texts: list[str] = []
    for line in body.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            places[label[1]] = len(texts)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            texts.append(instruction[1])
    # Lanes that diverged unexpectedly go through BRA.DIV, and come back.
    branches = (re.search(r"\bBRA(?!\.DIV).*`\((\.L_x_\d+)\)", text) for text in texts)
    return [Instruction(text, places[found[1]] if found else None) for text, found in zip(texts, branches)]


def _shortest_way(code: list[Instruction], first: int, last: int) -> tuple[int, int]:
    """Products and copies of the way from `first` to `last` that has most of them, and its fewest instructions. Loops
    inside are gone through once."""
    best: dict[int, tuple[int, int]] = {first: (0, 0)}
    for at in range(first, last + 1):
        if at not in best:
            continue
        wanted, length = best[at]
        one = code[at]
        here = (wanted + (one.name in (PRODUCT, COPY)), length - 1)
        if at == last:
            return here[0], -here[1]
        following = [at + 1] if one.falls_through() else []
        if one.target is not None and at < one.target <= last:
            following.append(one.target)
        for to in following:
            best[to] = max(best.get(to, here), here)
    raise AssertionError("the loop's end is not reached from its beginning")


def stages_of(body: str) -> Stage:
    """Of a kernel: the shortest of its loops with products and copies. Where products are in a loop inside it, what is
    outside of that counts for one of the stages of a round."""
    code = _instructions(body)

    def count(loop: tuple[int, int], name: str) -> int:
        return sum(one.name == name for one in code[loop[0] : loop[1] + 1])

    loops = [(one.target, at) for at, one in enumerate(code) if one.target is not None and one.target <= at]
    over_stages = [loop for loop in loops if count(loop, PRODUCT) >= 8 and count(loop, COPY) > 0]
    first, last = min(over_stages, key=lambda loop: loop[1] - loop[0])
    _, usual = _shortest_way(code, first, last)
    whole = Stage(last - first + 1, usual, count((first, last), PRODUCT))
    inside = [loop for loop in loops if first < loop[0] and loop[1] < last and count(loop, PRODUCT) >= 8]
    if not inside:
        return whole
    begin, end = min(inside, key=lambda loop: loop[1] - loop[0])
    length, (_, usual) = end - begin + 1, _shortest_way(code, begin, end)
    shared = [-(-rest // STAGES_OF_ROUND) for rest in (whole.all - length, whole.usual - usual)]
    return Stage(length + shared[0], usual + shared[1], count((begin, end), PRODUCT))


def stages(source: Path, architecture: str) -> dict[str, Stage]:
    """By kernel of a source."""
    sections = machine_code(source, architecture).split("\t.section\t.text.")[1:]
    names = kernel_names([section.partition(",")[0] for section in sections])
    return {name: stages_of(section) for name, section in zip(names, sections)}


def table(architecture: str = "90") -> list[str]:
    lines = [f"| kernel, sm_{architecture} | instructions | usual ones | products |", "| --- | --- | --- | --- |"]
    for source in SOURCES:
        for name, stage in sorted(stages(source, architecture).items()):
            lines.append(f"| `{name}` | {stage.all} | {stage.usual} | {stage.products} |")
    return lines


if __name__ == "__main__":
    for tool, needs in ((nvcc(), NEEDS_NVCC), (disassembler(), NEEDS_DISASSEMBLER)):
        if tool is None:
            sys.exit(f"cuda_instructions.py {needs}; install one.")
    print("\n".join(table(*sys.argv[1:])), end=os.linesep)
