"""Operands of a PTX instruction -> places in a warp's register file.

Slots of registers are counted from ``REGISTERS`` while the program is assembled: constants lie before them, and how
many those are is known only at the end.
"""

import re

import numpy

from .parse import Entry, Module, PTXError

REGISTERS = 1 << 28
PARAM_WINDOW = 3 << 56  # generic addresses of parameters, as in hopper.h
SPECIAL = {"%tid.x": 0, "%tid.y": 1, "%tid.z": 2, "%ntid.x": 3, "%ntid.y": 4, "%ntid.z": 5, "%ctaid.x": 6,
           "%ctaid.y": 7, "%ctaid.z": 8, "%nctaid.x": 9, "%nctaid.y": 10, "%nctaid.z": 11, "%laneid": 12,
           "%warpid": 13, "%smid": 14, "%lanemask_eq": 15, "%lanemask_lt": 16, "%lanemask_le": 17, "%lanemask_gt": 18,
           "%lanemask_ge": 19, "%nsmid": 20, "%nwarpid": 21, "%dynamic_smem_size": 22, "%total_smem_size": 22,
           "%cluster_ctarank": 1, "%cluster_nctarank": 4, "%cluster_ctaid.x": 1, "%clusterid.x": 6, "%clusterid.y": 7,
           "%clusterid.z": 8}  # fmt: skip


class Unsupported(PTXError):
    """An instruction, modifier or operand that the interpreter does not know."""


class Operands:
    """The register slots and the constants of one kernel."""

    def __init__(self, module: Module, entry: Entry):
        self.module, self.entry = module, entry
        self.constants: dict[tuple[int, int], int] = {}
        self.image = bytearray()
        self.special: dict[int, int] = {}
        self.slots: dict[str, int] = {}
        self.size_of: dict[str, int] = {}
        self.ext: list[int] = []
        self.params = {p.name: p for p in entry.params}
        self.call_params: dict[str, str] = {}
        self.granules = {1: 2, 2: 2}
        self.globals_, self.addresses, self.global_ranges = [], {}, []
        for name, data in module.constants.items():
            buffer = numpy.frombuffer(bytearray(data + b"\0" * 64), dtype=numpy.uint8)
            self.globals_.append(buffer)
            self.addresses[name] = buffer.ctypes.data
            self.global_ranges.append((buffer.ctypes.data, buffer.ctypes.data + len(data)))

    def fixed(self, value: int, width: int) -> int:
        key = (value % (1 << 8 * width), width)
        if key not in self.constants:
            self.constants[key] = len(self.image)
            self.image += key[0].to_bytes(width, "little") * 32
            self.image += b"\0" * (-len(self.image) % 64)
        return self.constants[key]

    def number(self, text: str, width: int, floating: bool = False) -> int | None:
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return int(m[1], 16)
        if m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            return int(m[1], 16)
        if m := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
            digits = m[2]
            value = int(digits, 8) if re.fullmatch(r"0[0-7]+", digits) else int(digits, 0)
            return -value if m[1] else value
        if text in self.module.shared:
            return self.module.shared[text]
        if text in self.addresses:
            return self.addresses[text]
        if text in self.entry.local:
            return self.entry.local[text][0]
        if text in self.params:
            return PARAM_WINDOW + self.params[text].offset
        if m := re.fullmatch(r"([\w$]+)\+(\d+)", text):
            base = self.number(m[1], width)
            return None if base is None else base + int(m[2])
        if text in ("true", "false"):
            return -(text == "true")
        return None

    def source(self, text: str, width: int) -> int:
        """The slot of a source operand that is read as ``width`` bytes a lane."""
        if text in self.slots:
            if self.size_of[text] < width:
                raise PTXError(f"register {text} is narrower than {width} bytes")
            return self.slots[text]
        if text in SPECIAL:
            code = SPECIAL[text]
            if code not in self.special:
                self.special[code] = len(self.image)
                self.image += b"\0" * 128
            return self.special[code]
        value = self.number(text, width)
        if value is None:
            raise Unsupported(f"operand {text!r}")
        return self.fixed(value, width)

    def pred(self, text: str) -> int:
        if text in self.slots:
            return self.slots[text]
        value = self.number(text, 4)
        if value is None:
            raise Unsupported(f"predicate {text!r}")
        key = ("pred", bool(value))
        if key not in self.constants:
            self.constants[key] = len(self.image)
            self.image += (b"\xff" if value else b"\0") * 4 + b"\0" * 60
        return self.constants[key]

    def dest(self, text: str) -> int:
        if text == "_":
            return -1
        return self.slots[text]

    def width(self, text: str) -> int:
        return self.size_of.get(text, 4)

    def address(self, text: str) -> tuple[int, int, int]:
        """Slot (or -1), its width, offset."""
        inner = text.strip()[1:-1].replace(" ", "")
        m = re.fullmatch(r"([%\w$.@]+?)(?:\+(-?\w+)|(-\d+))?", inner)
        if m is None:
            raise Unsupported(f"address {text}")
        offset = int(m[2] or m[3] or "0", 0)
        if m[1] in self.slots:
            return self.slots[m[1]], self.size_of[m[1]], offset
        base = self.number(m[1], 8)
        if base is None:
            raise Unsupported(f"address {text}")
        return -1, 8, base + offset
