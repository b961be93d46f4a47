"""Reads PTX, the text that nvcc makes of kernels, and decodes it for the machine (machine/).

ptx_body.py says how strict the reader is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import ptx_memory  # noqa: F401  (these three register their decoders)
import ptx_numbers  # noqa: F401
import ptx_warps  # noqa: F401
from ptx_body import WIDTHS, Body, Kernel, PtxError, split

# What the compiler tells the assembler and no thread sees.
SILENT = (".version", ".target", ".address_size", ".pragma", ".file")
# Access to memory and threads for all kernels, and the toolkit's: a place there says nothing, so that of the caller
# counts.
COMMON_FILES = re.compile(r"(device|matrix)\.h|.*\.hpp")


def statements(text: str, line: int = 1) -> Iterable[tuple[int, str]]:
    """(line, statement) without comments: braces that open or close a scope and labels stand alone, everything else
    ends with a semicolon. ``line`` is the number of the first one."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    current, start = "", line
    for row in text.split("\n"):
        row = row.split("//")[0]
        stripped = row.strip()
        if not current and re.match(r"\.(loc|file|version|target|address_size|pragma)\b", stripped):
            yield line, " ".join(stripped.rstrip(";").split())
            row = ""
        elif not current and stripped[-1:] == ";" and stripped[0] not in "{}$;" and stripped.count(";") == 1:
            yield line, " ".join(stripped[:-1].split())  # most lines
            row = ""
        for letter in row:
            if not current.strip():
                start = line
                if letter in "{}":
                    yield line, letter
                    continue
            if letter == ";":
                yield start, " ".join(current.split())
                current = ""
            elif letter == ":" and re.fullmatch(r"\s*[\w$]+", current):
                yield line, current.strip() + ":"
                current = ""
            elif letter == "{" and re.match(r"\s*\.(visible|weak|entry|func)\b", current):
                yield start, " ".join(current.split())
                yield line, "{"
                current = ""
            else:
                current += letter
        current += "\n" if current.strip() else ""
        current = current if current.strip() else ""
        line += 1
    if current.strip():
        raise PtxError(f"line {start}: the text ends within a statement")


def entry_head(text: str) -> tuple[str, dict[str, int], int]:
    """The name of an entry, where its parameters lie, and their size."""
    match = re.match(r"(?:\.(?:visible|weak)\s+)?\.entry\s+([\w$]+)\s*\((.*?)\)(.*)", text)
    if not match:
        raise PtxError(f"unknown declaration {text!r}")
    rest = re.sub(r"\.(maxntid|minnctapersm|maxnreg|reqntid)\s+\d+(\s*,\s*\d+)*", "", match[3])
    if rest.strip():
        raise PtxError(f"unknown directive {rest.strip()!r}")
    params: dict[str, int] = {}
    size = 0
    for parameter in split(match[2]):
        found = re.fullmatch(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", parameter)
        if not found or found[2] not in WIDTHS:
            raise PtxError(f"unknown parameter {parameter!r}")
        align = int(found[1] or WIDTHS[found[2]] // 8)
        params[found[3]] = size = -(-size // align) * align
        size += WIDTHS[found[2]] // 8 * int(found[4] or 1)
    return match[1], params, size


def entry_names(text: str) -> list[str]:
    return re.findall(r"\.entry\s+([\w$]+)", text)


def of_entries(text: str, wanted: set[str] | None) -> Iterable[tuple[int, str]]:
    """The statements of the entries that are wanted, all where it is None, and of what stands before the first one."""
    heads = list(re.finditer(r"^[ \t]*(?:\.(?:visible|weak)\s+)?\.entry\s+([\w$]+)", text, re.M))
    starts = [0, *(head.start() for head in heads), len(text)]
    for i, (start, end) in enumerate(zip(starts, starts[1:])):
        if i == 0 or wanted is None or heads[i - 1][1] in wanted:
            yield from statements(text[start:end], text.count("\n", 0, start) + 1)


def place_of(statement: str, files: dict[str, str], before: str) -> str:
    """What a .loc says, callers after what they call in."""
    spots = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", statement)
    for file, line in spots:
        if line != "0" and not COMMON_FILES.fullmatch(files.get(file, "?")):
            return f"{files.get(file, '?')}:{line}"
    return before


def read_kernels(text: str, only: Iterable[str] | None = None) -> dict[str, Kernel]:
    """The kernels of a file of PTX by name, or those whose names are given."""
    wanted = None if only is None else set(only)
    kernels: dict[str, Kernel] = {}
    dynamic: set[str] = set()
    body: Body | None = None
    shared = Body("", {}, None, dynamic)  # what stands outside of entries
    param_bytes = depth = 0
    line, statement = 0, ""
    files = {number: path.split("/")[-1] for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)}
    text = re.split(r"^\s*\.section\s+\.debug_str\b", text, maxsplit=1, flags=re.M)[0]
    try:
        for line, statement in of_entries(text, wanted):
            if statement.split()[0] in SILENT:
                continue
            if statement.startswith(".loc "):
                body.place = place_of(statement, files, body.place)
                continue
            if depth == 0:
                if match := re.fullmatch(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", statement):
                    dynamic.add(match[1])
                elif statement.startswith(".shared"):
                    shared.declare_memory(statement)
                elif statement == "{":
                    depth = 1
                else:
                    name, params, param_bytes = entry_head(statement)
                    body = Body(name, params, shared, dynamic)
                continue
            depth += (statement == "{") - (statement == "}")
            if statement == "{":
                body.scopes.append({})
            elif statement == "}" and depth:
                body.scopes.pop()
            elif statement == "}":
                kernels[body.name] = body.finish()
                kernels[body.name].param_bytes = param_bytes
            elif statement.endswith(":"):
                body.labels[statement[:-1]] = len(body.instructions)
            elif statement.startswith(".reg"):
                body.declare_registers(statement)
            elif statement.startswith((".shared", ".local")):
                body.declare_memory(statement)
            elif match := re.fullmatch(r"([\w$]+)\s*:\s*\.branchtargets\s+(.*)", statement):
                body.tables[match[1]] = split(match[2])
            elif statement.startswith(".branchtargets"):
                label = next(name for name, at in reversed(body.labels.items()) if at == len(body.instructions))
                body.tables[label] = split(statement[len(".branchtargets") :])
            else:
                body.instruction(statement, line)
    except PtxError as error:
        where = f", in {body.name}" if body else ""
        raise PtxError(f"{error}, in line {line}: {statement}{where}") from None
    return kernels
