"""Reads PTX, the text that nvcc makes of kernels, and decodes its instructions for the machine (machine.cpp).

Strict: an instruction, a modifier, a type, a directive or an operand that is not known by name is an error, as are
registers whose width an instruction does not have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
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
# What the compiler tells the assembler and no thread sees.
SILENT = (".version", ".target", ".address_size", ".pragma", ".file")
# Access to memory and threads for all kernels, and the toolkit's: a place there says nothing, so that of the caller
# counts.
COMMON_FILES = re.compile(r"(device|matrix)\.h|.*\.hpp")


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


def simple(body: Body, operation: str, type: str, operands: list[str], **more: object) -> Instruction:
    """All operands and the result have the type."""
    width, is_float = WIDTHS[type], type in FLOATS
    result = body.result(operands[0], width)
    sources = [body.source(text, width, is_float) for text in operands[1:]]
    return Instruction(operation, unsigned(type), results=[result], operands=sources, **more)


def float_modifiers(modifiers: Modifiers) -> int:
    return FLUSH * bool(modifiers.take("ftz")) | SATURATE * bool(modifiers.take("sat"))


@decodes("add", "sub", "mul", "mad", "fma", "div")
def _arithmetic(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 4 if name in ("mad", "fma") else 3)
    part = modifiers.take("lo", "hi", "wide") if name in ("mul", "mad") else ""
    if part:
        type = modifiers.need(*INTEGERS)
        if part == "wide":
            if WIDTHS[type] == 64:
                raise PtxError("mul.wide and mad.wide have no type of 64 bits")
            result = body.result(operands[0], 2 * WIDTHS[type])
            sources = [body.source(text, WIDTHS[type]) for text in operands[1:3]]
            sources += [body.source(text, 2 * WIDTHS[type]) for text in operands[3:]]
            return Instruction(f"{name}_wide", type, results=[result], operands=sources)
        return simple(body, name + "_hi" * (part == "hi"), type, operands)
    # A division that approximates errs by at most 2 units in the last place: the machine rounds to nearest.
    rounding = modifiers.take("rn", *(("full", "approx") if name == "div" else ()))
    flags = float_modifiers(modifiers)
    types = FLOATS if rounding or flags or name in ("fma", "mad") else INTEGERS + FLOATS
    if name in ("mul", "mad") and not rounding and not flags:
        types = FLOATS  # whole numbers have .lo, .hi or .wide
    if name == "fma" and not rounding:
        raise PtxError("expected a rounding mode")
    type = modifiers.need(*types)
    return simple(body, "fma" if name == "mad" else name, type, operands, flags=flags)


@decodes("rem")
def _remainder(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 3)
    return simple(body, name, modifiers.need(*INTEGERS), operands)


@decodes("min", "max")
def _extremes(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 3)
    flags = FLUSH * bool(modifiers.take("ftz")) | KEEP_NAN * bool(modifiers.take("NaN"))
    return simple(body, name, modifiers.need(*(("f32",) if flags else INTEGERS + FLOATS)), operands, flags=flags)


@decodes("abs", "neg")
def _sign(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2)
    flags = FLUSH * bool(modifiers.take("ftz"))
    type = modifiers.need(*(("f32",) if flags else ("s16", "s32", "s64", *FLOATS)))
    return simple(body, name, type, operands, flags=flags)


@decodes("and", "or", "xor", "not", "cnot")
def _logic(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2 if name in ("not", "cnot") else 3)
    type = modifiers.need(*BITS, *(() if name == "cnot" else ("pred",)))
    return simple(body, name if name == "cnot" else f"{name}_", type, operands)


@decodes("shl", "shr")
def _shift(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 3)
    type = modifiers.need(*BITS, *(INTEGERS if name == "shr" else ()))
    width = WIDTHS[type]
    return Instruction(
        name,
        unsigned(type),
        results=[body.result(operands[0], width)],
        operands=[body.source(operands[1], width), body.source(operands[2], 32)],
    )


@decodes("shf")
def _funnel(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 4)
    side, mode = modifiers.need("l", "r"), modifiers.need("wrap", "clamp")
    modifiers.need("b32")
    return simple(body, f"shf_{side}", "b32", operands, mode=mode)


@decodes("lop3")
def _lop3(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 5)
    return simple(body, name, modifiers.need("b32"), operands[:4], offset=int(operands[4], 0))


@decodes("prmt")
def _prmt(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 4)
    return simple(body, name, modifiers.need("b32"), operands)


@decodes("bfe", "bfi")
def _bit_field(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    whole = 1 if name == "bfe" else 2
    expect(operands, whole + 3)
    type = modifiers.need(*(("u32", "s32", "u64", "s64") if name == "bfe" else ("b32", "b64")))
    made = simple(body, name, type, operands[: whole + 1])
    made.operands += [body.source(text, 32) for text in operands[whole + 1 :]]
    return made


@decodes("popc", "clz", "bfind")
def _count(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2)
    type = modifiers.need(*(("u32", "s32", "u64", "s64") if name == "bfind" else ("b32", "b64")))
    source = body.source(operands[1], WIDTHS[type])
    return Instruction(name, unsigned(type), results=[body.result(operands[0], 32)], operands=[source])


@decodes("brev")
def _reverse(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2)
    return simple(body, name, modifiers.need("b32", "b64"), operands)


# Functions that approximate are computed to nearest.
@decodes("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _function(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2)
    rounding = modifiers.need("approx", *(("rn",) if name in ("rcp", "sqrt") else ()))
    flags = FLUSH * bool(modifiers.take("ftz"))
    if name == "rcp" and rounding == "approx" and flags and modifiers.take("f64"):
        return simple(body, "rcp_high", "f64", operands)
    has_double = rounding == "rn" and not flags
    return simple(body, name, modifiers.need("f32", *(("f64",) if has_double else ())), operands, flags=flags)


@decodes("copysign")
def _copysign(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 3)
    return simple(body, name, modifiers.need(*FLOATS), operands)


@decodes("testp")
def _testp(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2)
    mode = modifiers.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    type = modifiers.need(*FLOATS)
    source = body.source(operands[1], WIDTHS[type], True)
    return Instruction(name, type, mode=mode, results=[body.result(operands[0], 1)], operands=[source])


def comparison(modifiers: Modifiers) -> str:
    mode = modifiers.need(*COMPARISONS, *UNSIGNED_COMPARISONS)
    return UNSIGNED_COMPARISONS.get(mode, mode)


def compared_type(modifiers: Modifiers, mode: str, flags: int) -> str:
    """The type of a comparison; some are of floats alone."""
    integers = () if flags or mode in ("num", "nan") or (mode.endswith("u") and len(mode) == 3) else INTEGERS + BITS
    type = modifiers.need(*integers, *(("f32",) if flags else FLOATS))
    if type[0] == "b" and mode not in ("eq", "ne"):
        raise PtxError(f"bits have no order: .{mode}.{type}")
    return type


@decodes("setp")
def _setp(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> list[Instruction]:
    mode = comparison(modifiers)
    logic = modifiers.take("and", "or", "xor")
    expect(operands, 4 if logic else 3)
    flags = FLUSH * bool(modifiers.take("ftz"))
    type = compared_type(modifiers, mode, flags)
    width, is_float = WIDTHS[type], type in FLOATS
    results = [body.result(text.strip(), 1) for text in operands[0].split("|")]
    sources = [body.source(text, width, is_float) for text in operands[1:3]]
    made = Instruction(name, "pred", unsigned(type), mode, flags=flags, results=results, operands=sources)
    if not logic:
        return [made]
    third, is_negated = body.negatable(operands[3])
    made.offset = ("and", "or", "xor").index(logic)
    before = []
    if is_negated:
        negated = body.register(1)
        before = [Instruction("not_", "pred", results=[negated], operands=[third])]
        third = negated
    made.operands.append(third)
    return [*before, made]


@decodes("set")
def _set(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 3)
    mode = comparison(modifiers)
    flags = FLUSH * bool(modifiers.take("ftz"))
    type = modifiers.need("u32", "s32", "f32")
    compared = compared_type(modifiers, mode, flags)
    sources = [body.source(text, WIDTHS[compared], compared in FLOATS) for text in operands[1:]]
    result = body.result(operands[0], 32)
    return Instruction(name, type, unsigned(compared), mode, flags=flags, results=[result], operands=sources)


@decodes("selp")
def _selp(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 4)
    made = simple(body, name, modifiers.need(*BITS, *INTEGERS, *FLOATS), operands[:3])
    made.operands.append(body.source(operands[3], 1))
    return made


@decodes("mov")
def _mov(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2)
    type = modifiers.need("pred", *BITS, *INTEGERS, *FLOATS)
    width = WIDTHS[type]
    if operands[0].startswith("{"):
        parts = split(operands[0][1:-1])
        results = [body.result(part, width // len(parts)) for part in parts]
        return Instruction("unpack", bits=width, results=results, operands=[body.source(operands[1], width)])
    result = body.result(operands[0], width)
    if operands[1].startswith("{"):
        parts = split(operands[1][1:-1])
        return Instruction(
            "pack", results=[result], operands=[body.source(part, width // len(parts)) for part in parts]
        )
    if body.find(operands[1]) is None and body.address_of(operands[1]) is not None:
        return Instruction(name, unsigned(type), results=[result], operands=[body.variable(operands[1], width)])
    return simple(body, name, type, operands)


@decodes("cvt")
def _cvt(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    rounding = modifiers.take(*ROUNDINGS, *WHOLE_ROUNDINGS)
    flags = float_modifiers(modifiers)
    if modifiers.words and modifiers.words[0] in ("f16x2", "bf16x2"):
        expect(operands, 3)
        type = modifiers.need("f16x2", "bf16x2")[:-2]
        modifiers.need("f32")
        if rounding not in ("rn", "rz") or flags:
            raise PtxError("expected .rn or .rz and nothing else")
        sources = [body.source(text, 32, True) for text in operands[1:]]
        return Instruction("cvt_pair", type, "f32", rounding, results=[body.result(operands[0], 32)], operands=sources)
    expect(operands, 2)
    known = ("u8", "s8", *INTEGERS, "f16", "bf16", *FLOATS)
    type, source = modifiers.need(*known), modifiers.need(*known)
    floats = ("f16", "bf16", *FLOATS)
    if type in floats and source in floats:
        is_narrower = WIDTHS[type] < WIDTHS[source] or {type, source} == {"f16", "bf16"}
        if is_narrower and rounding not in ROUNDINGS:
            raise PtxError("expected a rounding mode")
        if rounding in WHOLE_ROUNDINGS and type != source or rounding in ROUNDINGS and not is_narrower:
            raise PtxError(f"unknown modifier .{rounding}")
    elif type in floats:
        if rounding not in ROUNDINGS:
            raise PtxError("expected a rounding mode")
    elif source in floats:
        if rounding not in WHOLE_ROUNDINGS:
            raise PtxError("expected a rounding mode to whole numbers")
    elif rounding:
        raise PtxError(f"unknown modifier .{rounding}")
    result = body.result(operands[0], WIDTHS[type], at_least=type not in floats)
    operand = body.source(operands[1], WIDTHS[source], source in floats, at_least=source not in floats)
    return Instruction(name, type, source, rounding or "none", flags=flags, results=[result], operands=[operand])


@decodes("cvta")
def _cvta(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2)
    operation = "cvta_to" if modifiers.take("to") else "cvta"
    space = SPACES[modifiers.need("global", "shared", "shared::cta", "local")]
    modifiers.need("u64")
    result = body.result(operands[0], 64)
    is_name = body.find(operands[1]) is None
    source = body.variable(operands[1], 64) if is_name else body.source(operands[1], 64)
    return Instruction(operation, "u64", space=space, results=[result], operands=[source])


def memory_modifiers(modifiers: Modifiers) -> tuple[str, int, str]:
    space, count = "generic", 1
    while modifiers.words:
        if word := modifiers.take(*SPACES):
            space = SPACES[word]
        elif word := modifiers.take("v2", "v4"):
            count = int(word[1])
        elif not modifiers.take(*CACHES):
            break
    return space, count, modifiers.need(*BYTES, *BITS, *INTEGERS, *FLOATS)


def vector(text: str, count: int) -> list[str]:
    parts = split(text[1:-1]) if text.startswith("{") else [text]
    if len(parts) != count:
        raise PtxError(f"expected {count} registers, got {text}")
    return parts


@decodes("ld")
def _load(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2)
    space, count, type = memory_modifiers(modifiers)
    results = [body.result(text, WIDTHS[type], at_least=type not in FLOATS) for text in vector(operands[0], count)]
    register, offset = body.address(operands[1])
    return Instruction(name, unsigned(type), space=space, results=results, operands=[register], offset=offset)


@decodes("st")
def _store(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2)
    space, count, type = memory_modifiers(modifiers)
    register, offset = body.address(operands[0])
    sources = [
        body.source(text, WIDTHS[type], type in FLOATS, at_least=type not in FLOATS)
        for text in vector(operands[1], count)
    ]
    return Instruction(name, unsigned(type), space=space, operands=[register, *sources], offset=offset)


@decodes("bra")
def _branch(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 1)
    modifiers.take("uni")
    made = Instruction(name)
    body.jumps.append((made, operands[0]))
    return made


@decodes("brx")
def _indexed_branch(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2)
    modifiers.need("idx")
    modifiers.take("uni")
    return Instruction(name, source_type=operands[1], operands=[body.source(operands[0], 32)])


@decodes("ret", "exit", "trap")
def _end(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 0)
    modifiers.take("uni")
    return Instruction("trap" if name == "trap" else "ret")


@decodes("membar", "fence")
def _fence(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 0)
    modifiers.take("sc", "acq_rel")
    modifiers.need("cta", "gl", "gpu", "sys")
    return Instruction("nothing")


@decodes("bar", "barrier")
def _barrier(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    if name == "bar" and modifiers.take("warp"):
        expect(operands, 1)
        modifiers.need("sync")
        return Instruction("bar_warp", operands=[body.source(operands[0], 32)])
    modifiers.take("cta")
    modifiers.need("sync")
    if name == "barrier":
        modifiers.take("aligned")
    expect(operands, 1)  # of all threads: a number of them would be a second operand
    return Instruction("bar_block", operands=[body.source(operands[0], 32)])


@decodes("shfl")
def _shuffle(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 5)
    modifiers.need("sync")
    mode = modifiers.need("up", "down", "bfly", "idx")
    modifiers.need("b32")
    value, *flag = (text.strip() for text in operands[0].split("|"))
    results = [body.result(value, 32), *(body.result(text, 1) for text in flag)]
    return Instruction(name, mode=mode, results=results, operands=[body.source(text, 32) for text in operands[1:]])


@decodes("vote")
def _vote(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 3)
    modifiers.need("sync")
    mode = modifiers.need("all", "any", "uni", "ballot")
    modifiers.need("b32" if mode == "ballot" else "pred")
    result = body.result(operands[0], 32 if mode == "ballot" else 1)
    return Instruction(
        name, mode=mode, results=[result], operands=[body.source(operands[1], 1), body.source(operands[2], 32)]
    )


@decodes("match")
def _match(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 3)
    modifiers.need("any")
    modifiers.need("sync")
    type = modifiers.need("b32", "b64")
    sources = [body.source(operands[1], WIDTHS[type]), body.source(operands[2], 32)]
    return Instruction("match_any", unsigned(type), results=[body.result(operands[0], 32)], operands=sources)


@decodes("redux")
def _redux(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 3)
    modifiers.need("sync")
    mode = modifiers.need("add", "min", "max", "and", "or", "xor")
    is_logic = mode in ("and", "or", "xor")
    type = modifiers.need(*(("b32",) if is_logic else ("u32", "s32")))
    return simple(body, name, type, operands, mode=mode + "_" * is_logic)


@decodes("activemask")
def _activemask(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 1)
    modifiers.need("b32")
    return Instruction(name, results=[body.result(operands[0], 32)])


# -------------------- matrices, copies


def all_lanes(body: Body) -> int:
    """The last operand of what a whole warp does together."""
    return body.constant(0xFFFFFFFF, 32)


@decodes("ldmatrix")
def _ldmatrix(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2)
    for word in ("sync", "aligned", "m8n8"):
        modifiers.need(word)
    count = int(modifiers.need("x1", "x2", "x4")[1])
    mode = modifiers.take("trans", default="none")
    modifiers.need("shared", "shared::cta")
    modifiers.need("b16")
    results = [body.result(text, 32) for text in vector(operands[0], count)]
    register, offset = body.address(operands[1])
    return Instruction(name, mode=mode, results=results, operands=[register, all_lanes(body)], offset=offset)


@decodes("movmatrix")
def _movmatrix(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 2)
    for word in ("sync", "aligned", "m8n8", "trans", "b16"):
        modifiers.need(word)
    sources = [body.source(operands[1], 32), all_lanes(body)]
    return Instruction(name, results=[body.result(operands[0], 32)], operands=sources)


@decodes("mma")
def _mma(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> Instruction:
    expect(operands, 4)
    for word in ("sync", "aligned"):
        modifiers.need(word)
    depth = int(modifiers.need("m16n8k16", "m16n8k8")[len("m16n8k") :])
    for word in ("row", "col", "f32"):
        modifiers.need(word)
    type = modifiers.need("f16", "bf16", *["tf32"] * (depth == 8))
    modifiers.need(type)
    modifiers.need("f32")
    lefts, rights = (4, 2) if type == "tf32" else (depth // 4, depth // 8)
    results = [body.result(text, 32) for text in vector(operands[0], 4)]
    sources = [body.source(text, 32) for text in vector(operands[1], lefts) + vector(operands[2], rights)]
    sources += [body.source(text, 32, True) for text in vector(operands[3], 4)]
    type = "f32" if type == "tf32" else type  # of which the upper 19 bits are read
    return Instruction(name, type, "f32", results=results, operands=[*sources, all_lanes(body)], offset=depth)


@decodes("cp")
def _copy(body: Body, name: str, modifiers: Modifiers, operands: list[str]) -> list[Instruction]:
    modifiers.need("async")
    kind = modifiers.need("ca", "cg", "commit_group", "wait_group", "wait_all")
    if kind == "wait_group":
        expect(operands, 1)
        if not operands[0].isdigit():
            raise PtxError(f"expected a number of groups, got {operands[0]}")
        return [Instruction("wait_group", offset=int(operands[0]))]
    if kind in ("commit_group", "wait_all"):
        expect(operands, 0)
        return [Instruction("commit"), *[Instruction("wait_group")] * (kind == "wait_all")]
    modifiers.need("shared", "shared::cta")
    modifiers.need("global")
    modifiers.take("L2::128B", "L2::64B", "L2::256B")
    expect(operands, 3, 4)
    sizes = ("16",) if kind == "cg" else ("4", "8", "16")
    if operands[2] not in sizes:
        raise PtxError(f"expected a copy of {' or '.join(sizes)} bytes, got {operands[2]}")
    size = int(operands[2])
    (to, to_offset), (source, offset) = (body.address(text) for text in operands[:2])
    made = Instruction("copy", bits=size, operands=[to, source], target=to_offset, offset=offset)
    found = body.find(operands[3]) if len(operands) == 4 else None
    if found is None or body.widths[found] != 1:
        made.operands.append(body.source(operands[3] if len(operands) == 4 else str(size), 32))
        return [made]
    # A predicate says that nothing is read.
    read = body.register(32)
    made.operands.append(read)
    sources = [body.constant(0, 32), body.constant(size, 32), found]
    return [Instruction("selp", results=[read], operands=sources), made]


# -------------------- files


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
