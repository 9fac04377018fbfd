"""Blackwell: tensor memory and its matrix products (tcgen05) -> the interpreter's instructions."""

import re

from .operands import Unsupported

PLAIN = {"cta_group::1", "sync", "aligned", "b32", "b64", "shared::cta", "shared::cluster", "mbarrier::arrive::one"}
SHAPES = ("32x32b", "16x32bx2")


def tcgen05(a, s, parts, operands):
    what, rest = parts[0], set(parts[1:]) - PLAIN
    if what in ("fence::before_thread_sync", "fence::after_thread_sync"):
        return [{"op": "nop"}]  # barriers order what they order, in the interpreter
    if what in ("wait::ld", "wait::st") and not rest:
        return [{"op": "tensor_wait", "x": [what == "wait::st"]}]
    if what in ("ld", "st"):
        return _access(a, s, what, rest, operands)
    if "cta_group::1" not in parts:
        raise Unsupported(f"{s.opcode}: of two CTAs")
    if what == "mma":
        return _product(a, s, rest, operands)
    if rest:
        raise Unsupported(s.opcode)
    if what == "alloc":
        base, width, offset = a.address(operands[0])
        columns = a.source(operands[1], 4)
        return [{"op": "tensor_alloc", "o": [base, columns], "imm": offset, "x": [0, 0, 0, 0, 0, width]}]
    if what == "relinquish_alloc_permit":
        return [{"op": "tensor_relinquish"}]
    if what == "dealloc":
        return [{"op": "tensor_dealloc", "o": [a.source(operands[0], 4), a.source(operands[1], 4)]}]
    if what == "commit" and len(operands) == 1:
        base, width, offset = a.address(operands[0])
        return [{"op": "tensor_commit", "o": [base], "imm": offset, "x": [0, 0, 0, 0, 0, width]}]
    raise Unsupported(s.opcode)


def _access(a, s, what, rest, operands):
    """Loads and stores: the registers of a lane lie in columns that follow one another."""
    shape = next((shape for shape in SHAPES if shape in rest), None)
    count = next((int(part[1:]) for part in rest if re.fullmatch(r"x\d+", part)), 0)
    if shape is None or rest != {shape, f"x{count}"}:
        raise Unsupported(s.opcode)
    address, *split, registers = operands if what == "st" else (*operands[1:], operands[0])
    registers = registers if isinstance(registers, tuple) else (registers,)
    if len(registers) != count:
        raise Unsupported(f"{s.opcode} of {len(registers)} registers")
    base, width, offset = a.address(address)
    split = a.number(split[0], 4) if split else 0
    slots = [a.source(text, 4) if what == "st" else a.dest(text) for text in registers]
    x = [SHAPES.index(shape), count, split, 0, 0, width]
    return [{"op": f"tensor_{what}", "o": [base], "imm": offset, "extra": slots, "x": x}]


def _product(a, s, rest, operands):
    if rest not in ({"kind::f16"}, {"kind::tf32"}) or len(operands) != 5:
        raise Unsupported(s.opcode)
    base, _, offset = a.address(operands[0])
    o = [base, -1, a.source(operands[2], 8), a.source(operands[3], 4), a.pred(operands[4])]
    left, left_offset = operands[1], 0
    in_tensor_memory = left.startswith("[")
    if in_tensor_memory:
        o[1], _, left_offset = a.address(left)
    else:
        o[1] = a.source(left, 8)
    if base < 0 or o[1] < 0:
        raise Unsupported(f"{s.opcode} at a constant address")
    offsets = offset & 0xFFFFFFFF | left_offset << 32
    return [{"op": "tensor_mma", "o": o, "imm": offsets, "x": ["kind::tf32" in rest, in_tensor_memory]}]
