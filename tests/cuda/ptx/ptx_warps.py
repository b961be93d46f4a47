"""Decodes jumps, barriers, and what the lanes of a warp do together."""

from __future__ import annotations

from ptx_body import WIDTHS, Body, Instruction, Modifiers, decodes, expect, simple, unsigned, vector


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
