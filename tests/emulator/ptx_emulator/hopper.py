"""Hopper: mbarriers, tensor copies (TMA) and wgmma -> the interpreter's instructions; the emulated tensor map."""

import re
import struct

from .operands import Unsupported

MAGIC = 0x54454E534F524D41


def encode_descriptor(value, meta) -> bytes:
    """What the launcher has cuTensorMapEncodeTiled write, in a layout of our own; sizes innermost first."""
    size = meta["elem_size"]
    shape = list(value.shape)[::-1]
    strides = [s * size for s in list(value.strides)[::-1][1:]]
    box = list(meta["block_size"])[::-1]
    rank = len(shape)
    for stride in strides:
        if stride % 16 or stride >= 1 << 40:
            raise RuntimeError(f"cuTensorMapEncodeTiled refuses a stride of {stride} bytes")
    if value.base.data_ptr() % 16:
        raise RuntimeError("cuTensorMapEncodeTiled refuses an address that is no multiple of 16")
    if any(b > 256 or b < 1 for b in box) or box[0] * size % 16:
        raise RuntimeError(f"cuTensorMapEncodeTiled refuses a box of {box}")
    span = {0: 1 << 30, 1: 32, 2: 64, 3: 128}[meta["swizzle"]]
    if box[0] * size > span:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled refuses an inner box of {box[0] * size} bytes with a swizzle of {span}"
        )
    pad = [0] * 5
    return struct.pack("<QQ4Q5Q4Q", MAGIC, value.base.data_ptr(),
                       rank | size << 8 | meta["swizzle"] << 16 | (value.padding == "nan") << 24,
                       *_boxes(box), *(shape + pad)[:5], *(strides + pad)[:4])[:128]  # fmt: skip


def _boxes(box):
    box = (box + [1] * 6)[:6]
    return [box[0] | box[1] << 32, box[2] | box[3] << 32, box[4]]


def mbarrier(a, s, parts, operands):
    what = parts[0]
    if what == "init":
        base, width, offset = a.address(operands[0])
        return [{"op": "mbar_init", "o": [base, a.source(operands[1], 4)], "imm": offset, "x": [0, 0, 0, 0, 0, width]}]
    if what == "inval":
        base, width, offset = a.address(operands[0])
        return [{"op": "mbar_inval", "o": [base], "imm": offset, "x": [0, 0, 0, 0, 0, width]}]
    if what in ("arrive", "expect_tx"):
        arrives, expects = what == "arrive", "expect_tx" in parts
        rest = operands[1:] if arrives else operands
        if arrives and operands[0] != "_":
            raise Unsupported(f"{s.opcode} with a state")
        base, width, offset = a.address(rest[0])
        count = a.source(rest[1], 4) if len(rest) > 1 else -1
        return [{"op": "mbar_arrive", "o": [base, count], "imm": offset, "x": [arrives, expects, 0, 0, 0, width]}]
    if what in ("try_wait", "test_wait") and "parity" in parts:
        base, width, offset = a.address(operands[1])
        return [
            {
                "op": "mbar_try_wait",
                "o": [base, a.dest(operands[0]), a.source(operands[2], 4)],
                "imm": offset,
                "x": [0, 0, 0, 0, 0, width],
            }
        ]
    raise Unsupported(s.opcode)


def bulk(a, s, parts, operands):
    if "commit_group" in parts:
        return [{"op": "tma_commit"}]
    if "wait_group" in parts:
        return [{"op": "tma_wait", "imm": a.number(operands[0], 4)}]
    if "tensor" not in parts or any(
        p in parts for p in ("im2col", "multicast::cluster", "reduce", "prefetch", "tile::gather4")
    ):
        raise Unsupported(s.opcode)
    rank = int(next(p for p in parts if re.fullmatch(r"\dd", p))[0])
    load = parts.index("global") > next(n for n, p in enumerate(parts) if p.startswith("shared"))
    shared, tensor = (operands[0], operands[1]) if load else (operands[1], operands[0])
    m = re.fullmatch(r"\[\s*([\w$%.@]+)\s*,\s*\{(.*)\}\s*\]", tensor)
    base, width, offset = a.address(shared)
    o = [base, a.source(m[1], 8)]
    x = [rank, 0, 0, 0, 0, width]
    if load:
        mbar, mwidth, moffset = a.address(operands[2])
        if moffset or mbar < 0:
            raise Unsupported(s.opcode)
        o.append(mbar)
        x[6:] = [mwidth]
    else:
        o.append(-1)
    o += [a.source(t.strip(), 4) for t in m[2].split(",")]
    return [{"op": "tma_load" if load else "tma_store", "o": o, "imm": offset, "x": x}]


def wgmma(a, s, parts, operands):
    if parts[0] in ("fence", "commit_group"):
        return [{"op": "wgmma_fence" if parts[0] == "fence" else "wgmma_commit"}]
    if parts[0] == "wait_group":
        return [{"op": "wgmma_wait", "imm": a.number(operands[0], 4)}]
    shape = re.search(r"m64n(\d+)k(\d+)", s.opcode)
    types = parts[-3:]
    if parts[0] != "mma_async" or types[0] != "f32" or types[1] != types[2] or types[1] not in ("bf16", "f16", "tf32"):
        raise Unsupported(s.opcode)
    d, left, right, scale_d, *immediates = operands
    n, k, kind = int(shape[1]), int(shape[2]), ("bf16", "f16", "tf32").index(types[1])
    numbers = [a.number(t, 4) for t in immediates]
    if numbers[:2] not in ([1, 1], []):
        raise Unsupported(f"{s.opcode} with a negative scale")
    from_registers = isinstance(left, tuple)
    transposed = numbers[2:]
    ta = 0 if from_registers else (transposed[0] if transposed else 0)
    tb = transposed[-1] if transposed else 0
    o = [a.pred(scale_d), a.source(right, 8)] + (
        [a.source(t, 4) for t in left] if from_registers else [a.source(left, 8)]
    )
    return [{"op": "wgmma", "o": o, "extra": [a.dest(t) for t in d], "x": [kind, k, n // 8, from_registers, ta, tb]}]
