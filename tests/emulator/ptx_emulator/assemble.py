"""A kernel's statements -> the interpreter's program. What the interpreter does not know is refused by name."""

import re
from typing import NamedTuple

import numpy

from . import ops
from .instructions import Instructions
from .operands import REGISTERS, Unsupported
from .parse import SIZES, Entry, Module

INS = numpy.dtype({
    "names": ["op", "flags", "pad", "guard", "o", "imm", "x", "ext"],
    "formats": ["<u2", "u1", "u1", "<i4", ("<i4", 20), "<i8", ("u1", 12), "<i4"],
    "offsets": [0, 2, 3, 4, 8, 88, 96, 108], "itemsize": 112,
})  # fmt: skip


class Program(NamedTuple):
    name: str
    module: Module
    entry: Entry
    code: numpy.ndarray
    ext: numpy.ndarray
    image: bytearray
    regs_size: int
    specials: numpy.ndarray
    lines: list[int]  # PTX line of each instruction
    sources: list
    opcodes: list[str]
    globals_: list  # keeps the memory of .global constants alive
    granule_shared: int
    granule_global: int
    params_size: int
    global_ranges: list[tuple[int, int]]

    def where(self, pc: int) -> str:
        if not 0 <= pc < len(self.lines):
            return "?"
        source = self.sources[pc]
        text = self.module.lines[self.lines[pc] - 1].strip()
        at = f"{self.module.files.get(source[0], '?').rsplit('/', 1)[-1]}:{source[1]}" if source else "?"
        return f"PTX line {self.lines[pc]} `{text}` ({at})"


def assemble(module: Module, name: str) -> Program:
    return _Assembler(module, module.entries[name]).run()


def _align(n, to):
    return -(-n // to) * to


class _Assembler(Instructions):
    def run(self) -> Program:
        entry = self.entry
        # register slots come first, relative to a base behind the constants that is known only at the end
        used = set()
        for s in entry.statements:
            for operand in (s.guard, *s.operands):
                for text in operand if isinstance(operand, tuple) else (operand,):
                    if text:
                        used.update(re.findall(r"[\w$%.@]+", text))
        offset = 0
        names = [n for n in entry.registers if n in used]
        for name in names:
            kind = entry.registers[name]
            size = 1 if kind == "pred" else max(2, SIZES[kind])
            self.size_of[name] = 4 if kind == "pred" else size
            self.slots[name] = (REGISTERS) + offset
            offset += 64 if kind == "pred" else 32 * size
        rows, kept = [], []
        place: list[int] = []
        for s in entry.statements:
            place.append(len(rows))
            try:
                for row in self.one(s):
                    row.setdefault("guard", self.slots[s.guard] if s.guard else -1)
                    row.setdefault("flags", int(s.negated))
                    rows.append(row)
                    kept.append(s)
            except (Unsupported, KeyError, IndexError, ValueError, TypeError) as error:
                what = f"{entry.name}, PTX line {s.line}: {s.opcode} {s.operands}"
                raise Unsupported(f"{what}: {type(error).__name__} {error}") from error
        place.append(len(rows))
        rows.append({"op": "ret", "guard": -1, "flags": 0})
        kept.append(entry.statements[-1])
        base = _align(len(self.image), 64)
        self.image += b"\0" * (base - len(self.image))
        code = numpy.zeros(len(rows), INS)
        code["o"] = -1
        code["guard"] = -1

        def final(slot):
            return slot - (REGISTERS) + base if slot >= REGISTERS else slot

        for n, row in enumerate(rows):
            ins = code[n]
            ins["op"] = ops.NUMBER[row["op"]]
            ins["flags"] = row["flags"]
            ins["guard"] = final(row["guard"])
            o = [final(v) for v in row.get("o", ())]
            ins["o"][: len(o)] = o
            ins["imm"] = row.get("imm", 0)
            if "label" in row:
                ins["imm"] = place[entry.labels[row["label"]]]
            if "labels" in row:
                ins["ext"] = len(self.ext)
                self.ext += [place[entry.labels[name]] for name in row["labels"]]
            if "extra" in row:
                ins["ext"] = len(self.ext)
                self.ext += [final(v) for v in row["extra"]]
            x = row.get("x", ())
            ins["x"][: len(x)] = x
        specials = numpy.array([[code_, slot] for code_, slot in self.special.items()] or [[0, 0]][:0], numpy.int32)
        return Program(
            entry.name, self.module, entry, code, numpy.array(self.ext or [0], numpy.int32), self.image,
            _align(base + offset, 64), specials, [s.line for s in kept], [s.source for s in kept],
            [s.opcode for s in kept], self.globals_, self.granules[2], self.granules[1], entry.params_size,
            self.global_ranges,
        )  # fmt: skip
