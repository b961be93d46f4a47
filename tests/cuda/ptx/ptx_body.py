"""What decoders of instructions share: the registers, labels and memory of one kernel, and the words of an instruction.

Strict: an instruction, a modifier, a type, a directive or an operand that is not known by name is an error, as are
registers whose width an instruction does not have.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field


class PtxError(Exception):
    """Text that this reader does not know."""


@dataclass
class Instruction:
    operation: str
    type: str = "u32"
    source_type: str = "u32"
    mode: str = "none"
    space: str = "generic"
    flags: int = 0
    bits: int = 0
    predicate: int = -1
    is_negated: bool = False
    results: list[int] = field(default_factory=list)
    operands: list[int] = field(default_factory=list)
    target: int = 0
    offset: int = 0
    text: str = ""
    line: int = 0  # of the PTX
    place: str = ""  # file:line of the kernel's source, where nvcc says it (-lineinfo)


@dataclass
class Kernel:
    """One .entry."""

    name: str
    instructions: list[Instruction]
    registers: int
    constants: dict[int, int]  # registers that hold a value from the start
    specials: dict[str, int]  # registers of %tid and the like
    param_bytes: int
    static_shared_bytes: int
    local_bytes: int
    branch_targets: list[int]


FLUSH, SATURATE, KEEP_NAN = 1, 2, 4
INTEGERS = ("u16", "u32", "u64", "s16", "s32", "s64")
FLOATS = ("f32", "f64")
BITS = ("b16", "b32", "b64")
BYTES = ("b8", "u8", "s8")
WIDTHS = {"pred": 1} | {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}
WIDTHS |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "num", "nan", "equ", "neu", "ltu", "leu", "gtu", "geu")
UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
ROUNDINGS = ("rn", "rz", "rm", "rp")
WHOLE_ROUNDINGS = ("rni", "rzi", "rmi", "rpi")
CACHES = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::no_allocate", "L1::evict_last", "L1::evict_first")
CACHES += ("L2::128B", "L2::64B", "L2::256B", "weak", "volatile", "unified")
SPACES = {"global": "global", "shared": "shared", "shared::cta": "shared", "local": "local", "param": "param"}
SPECIALS = {
    "%tid.x": "tid",
    "%ntid.x": "ntid",
    "%ctaid.x": "ctaid",
    "%nctaid.x": "nctaid",
    "%laneid": "laneid",
    "%warpid": "warpid",
    **{f"%{name}.{axis}": "zero" for name in ("tid", "ctaid") for axis in "yz"},
    **{f"%{name}.{axis}": "one" for name in ("ntid", "nctaid") for axis in "yz"},
}


def unsigned(type: str) -> str:
    """The machine has no .b types."""
    return "u" + type[1:] if type[0] == "b" and type != "bf16" else type


class Modifiers:
    """What follows an instruction's name; whoever reads one takes it away, and one that is left is an error."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def take(self, *choices: str, default: str = "") -> str:
        if self.words and self.words[0] in choices:
            return self.words.pop(0)
        return default

    def need(self, *choices: str) -> str:
        if not self.words or self.words[0] not in choices:
            came = self.words[0] if self.words else "nothing"
            raise PtxError(f"expected one of .{', .'.join(choices)}, got {'.' * bool(self.words)}{came}")
        return self.words.pop(0)


def split(text: str) -> list[str]:
    """Operands at commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


class Body:
    """Decodes the statements of one entry."""

    def __init__(self, name: str, params: dict[str, int], outer: Body | None, dynamic: set[str]) -> None:
        self.params, self.dynamic = params, dynamic
        self.shared = dict(outer.shared) if outer else {}
        self.shared_bytes = outer.shared_bytes if outer else 0
        self.local: dict[str, int] = {}
        self.local_bytes = 0
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        self.scopes: list[dict[str, int]] = [{}]
        self.widths: list[int] = []
        self.constants: dict[tuple[int, int], int] = {}
        self.specials: dict[str, int] = {}
        self.name = name
        self.jumps: list[tuple[Instruction, str]] = []
        self.place = ""

    # -------------------- names

    def register(self, width: int) -> int:
        self.widths.append(width)
        return len(self.widths) - 1

    def declare_registers(self, text: str) -> None:
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.+)", text)
        if not match or match[1] not in WIDTHS:
            raise PtxError(f"unknown declaration {text!r}")
        for name in split(match[2]):
            many = re.fullmatch(r"(%[\w$]+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                self.scopes[-1][one] = self.register(WIDTHS[match[1]])

    def declare_memory(self, text: str) -> None:
        match = re.fullmatch(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?", text)
        if not match or match[3] not in WIDTHS:
            raise PtxError(f"unknown declaration {text!r}")
        size = WIDTHS[match[3]] // 8 * int(match[5] or 1)
        align = int(match[2] or WIDTHS[match[3]] // 8)
        used = self.shared_bytes if match[1] == "shared" else self.local_bytes
        at = -(-used // align) * align
        if match[1] == "shared":
            self.shared[match[4]], self.shared_bytes = at, at + size
        else:
            self.local[match[4]], self.local_bytes = at, at + size

    def find(self, name: str) -> int | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def constant(self, value: int, width: int) -> int:
        key = value & ((1 << max(width, 8)) - 1), width
        if key not in self.constants:
            self.constants[key] = self.register(width)
        return self.constants[key]

    def address_of(self, name: str) -> int | None:
        """Of a variable, in its own space."""
        if name in self.dynamic:
            return -1  # behind what is static: its place is known when all declarations are read
        for space in (self.shared, self.local, self.params):
            if name in space:
                return space[name]
        return None

    # -------------------- operands

    def source(self, text: str, width: int, is_float: bool = False, at_least: bool = False) -> int:
        """The register that holds an operand of so many bits."""
        found = self.find(text)
        if found is not None:
            held = self.widths[found]
            if held != width and not (at_least and held >= width and held > 1):
                raise PtxError(f"expected an operand of {width} bits, {text} has {held}")
            return found
        if text in SPECIALS:
            name = SPECIALS[text]
            if width != 32:
                raise PtxError(f"expected an operand of {width} bits, {text} has 32")
            if name not in self.specials:
                self.specials[name] = self.register(32)
            return self.specials[name]
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            if width != 32:
                raise PtxError(f"expected a number of {width} bits, got {text}")
            return self.constant(int(match[1], 16), 32)
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            if width != 64:
                raise PtxError(f"expected a number of {width} bits, got {text}")
            return self.constant(int(match[1], 16), 64)
        if text == "WARP_SZ":
            return self.constant(32, width)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text) and not is_float:
            value = int(text.rstrip("U"), 0) if text.lstrip("-")[:2].lower() in ("0x", "0b") else int(text.rstrip("U"))
            return self.constant(int(value != 0) if width == 1 else value, width)
        raise PtxError(f"unknown operand {text!r}")

    def negatable(self, text: str) -> tuple[int, bool]:
        """A predicate, and whether it is negated."""
        is_negated = text.startswith("!")
        return self.source(text.lstrip("!"), 1), is_negated

    def result(self, text: str, width: int, at_least: bool = False) -> int:
        if text == "_":
            return -1
        found = self.find(text)
        if found is None or found in self.constants.values():
            raise PtxError(f"unknown register {text!r}")
        held = self.widths[found]
        if held != width and not (at_least and held >= width and held > 1):
            raise PtxError(f"expected a register of {width} bits, {text} has {held}")
        return found

    def address(self, text: str) -> tuple[int, int]:
        """A register with an address, and what to add to it."""
        match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if not match:
            raise PtxError(f"unknown address {text!r}")
        offset = int(match[2] or 0)
        found = self.find(match[1])
        if found is not None:
            if self.widths[found] not in (32, 64):
                raise PtxError(f"expected an address of 32 or 64 bits, {match[1]} has {self.widths[found]}")
            return found, offset
        if re.fullmatch(r"\d+", match[1]):
            return self.constant(0, 64), int(match[1]) + offset
        return self.variable(match[1], 64), offset

    def variable(self, name: str, width: int) -> int:
        """A register with the address of a variable."""
        at = self.address_of(name)
        if at is None:
            raise PtxError(f"unknown name {name!r}")
        if at >= 0:
            return self.constant(at, width)
        return self.scopes[0].setdefault(f"{name}:{width}", self.register(width))

    # -------------------- statements

    def instruction(self, text: str, line: int) -> None:
        match = re.fullmatch(r"(?:@(!?)(%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
        if not match:
            raise PtxError(f"unknown statement {text!r}")
        base, *words = match[3].split(".")
        if base not in DECODERS:
            raise PtxError(f"unknown instruction {match[3]}")
        modifiers = Modifiers(words)
        made = DECODERS[base](self, modifiers, split(match[4]))
        if modifiers.words:
            raise PtxError(f"unknown modifier .{modifiers.words[0]}")
        if match[2]:
            predicate = self.find(match[2])
            if predicate is None or self.widths[predicate] != 1:
                raise PtxError(f"expected a predicate, got {match[2]}")
        for one in made if isinstance(made, list) else [made]:
            if match[2]:
                one.predicate, one.is_negated = predicate, match[1] == "!"
            if one.bits == 0:
                one.bits = self.widths[one.results[0]] if one.results and one.results[0] >= 0 else 64
            one.text, one.line, one.place = text, line, self.place
            self.instructions.append(one)

    def finish(self) -> Kernel:
        for instruction, label in self.jumps:
            if label not in self.labels:
                raise PtxError(f"unknown label {label}")
            instruction.target = self.labels[label]
        targets: list[int] = []
        for instruction in self.instructions:
            if instruction.operation == "brx":
                names = self.tables.get(instruction.source_type)
                if names is None:
                    raise PtxError(f"unknown table {instruction.source_type}")
                instruction.source_type = "u32"
                instruction.target, instruction.offset = len(targets), len(names)
                targets += [self.labels[name] for name in names]
        self.instructions.append(Instruction("ret", text="(end)"))
        dynamic = -(-self.shared_bytes // 16) * 16 if self.shared_bytes else 0
        constants = {register: value for (value, _), register in self.constants.items()}
        for name, register in self.scopes[0].items():
            if name.split(":")[0] in self.dynamic:
                constants[register] = dynamic
        return Kernel(
            self.name,
            self.instructions,
            len(self.widths),
            constants,
            self.specials,
            0,
            dynamic,
            self.local_bytes,
            targets,
        )


# -------------------- instructions

Decoder = Callable[[Body, Modifiers, list[str]], Instruction | list[Instruction]]
DECODERS: dict[str, Decoder] = {}


def decodes(*names: str) -> Callable[[Decoder], Decoder]:
    def register(decoder: Decoder) -> Decoder:
        for name in names:
            DECODERS[name] = lambda body, modifiers, operands, name=name: decoder(body, name, modifiers, operands)
        return decoder

    return register


def expect(operands: list[str], *counts: int) -> None:
    if len(operands) not in counts:
        raise PtxError(f"expected {' or '.join(map(str, counts))} operands, got {len(operands)}")


def vector(text: str, count: int) -> list[str]:
    parts = split(text[1:-1]) if text.startswith("{") else [text]
    if len(parts) != count:
        raise PtxError(f"expected {count} registers, got {text}")
    return parts


def simple(body: Body, operation: str, type: str, operands: list[str], **more: object) -> Instruction:
    """All operands and the result have the type."""
    width, is_float = WIDTHS[type], type in FLOATS
    result = body.result(operands[0], width)
    sources = [body.source(text, width, is_float) for text in operands[1:]]
    return Instruction(operation, unsigned(type), results=[result], operands=sources, **more)


def float_modifiers(modifiers: Modifiers) -> int:
    return FLUSH * bool(modifiers.take("ftz")) | SATURATE * bool(modifiers.take("sat"))
