"""Decodes loads, stores and asynchronous copies."""

from __future__ import annotations

from ptx_body import (
    BITS,
    BYTES,
    CACHES,
    FLOATS,
    INTEGERS,
    SPACES,
    WIDTHS,
    Body,
    Instruction,
    Modifiers,
    PtxError,
    decodes,
    expect,
    unsigned,
    vector,
)


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
