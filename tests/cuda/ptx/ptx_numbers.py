"""Decodes instructions on numbers: arithmetic, bits, comparisons and conversions."""

from __future__ import annotations

from ptx_body import (
    BITS,
    COMPARISONS,
    FLOATS,
    FLUSH,
    INTEGERS,
    KEEP_NAN,
    ROUNDINGS,
    SPACES,
    UNSIGNED_COMPARISONS,
    WHOLE_ROUNDINGS,
    WIDTHS,
    Body,
    Instruction,
    Modifiers,
    PtxError,
    decodes,
    expect,
    float_modifiers,
    simple,
    split,
    unsigned,
)


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
