"""Statements -> rows of the interpreter's instructions, one method for each kind of opcode.

A row is a dict: ``op`` (a name in ops.NUMBER), ``o`` (slots), ``imm``, ``x`` (small numbers), ``label`` or ``labels``
(jump targets), ``extra`` (more slots than ``o`` holds). What an instruction does with them stands beside its case in
the C++ files.
"""

import re

from . import blackwell, hopper, ops
from .operands import PARAM_WINDOW, SPECIAL, Operands, Unsupported
from .parse import SIZES

SPACES = {"global": 1, "shared": 2, "local": 3}
CVT_TYPES = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64"]
ROUNDING = ["", "rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"]
ATOM_OPS = {"add": 0, "min": 1, "max": 2, "and": 3, "or": 4, "xor": 5, "exch": 6, "cas": 7, "inc": 8, "dec": 9}
ATOM_TYPES = ["u32", "s32", "u64", "s64", "f32", "f64", "f16", "bf16", "f16x2", "bf16x2", "b16", "b32", "b64"]
LANE = {entry[0]: entry for entry in ops.LANE}


class Instructions(Operands):
    def lanes(self, name: str, operands, **more):
        """An instruction of the table: its sources are read with the types that it declares."""
        _, _, sources, _ = LANE[name]
        slots = [self.dest(operands[0])]
        for text, t in zip(operands[1:], sources, strict=True):
            slots.append(self.pred(text) if t == "pred" else self.source(text, int(re.sub(r"\D", "", t)) // 8))
        return [{"op": name, "o": slots, **more}]

    def one(self, s):
        parts = s.opcode.split(".")
        method = getattr(self, "op_" + parts[0], None)
        if method is not None:
            return method(s, parts[1:], s.operands)
        return self.arithmetic(s, parts, s.operands)

    # -- arithmetic --------------------------------------------------------------------------------------------------
    def arithmetic(self, s, parts, operands):
        name, kind = parts[0], parts[-1]
        modifiers = parts[1:-1]
        if kind == "pred":
            slots = [self.dest(operands[0]), *(self.pred(text) for text in operands[1:])]
            return [{"op": f"{name}pred", "o": slots}]
        keep = [m for m in modifiers if m not in ("rn", "approx", "full")]
        if keep == ["f32"] and kind in ("f16", "bf16"):  # the first operands have 16 bits, the last and the result 32
            return self.lanes(f"{name}.f32.{kind}", operands)
        if name in ("min", "max") and len(operands) == 4:
            name += "3"
        if (
            name == "div"
            and "full" not in modifiers
            and "approx" not in modifiers
            and kind == "f32"
            and "rn" not in modifiers
        ):
            raise Unsupported("rounding")
        if name in ("shl",):
            kind = "b" + kind[1:]
        if name == "shr" and kind[0] == "b":
            kind = "u" + kind[1:]
        if name in ("add", "sub", "mul", "mad") and kind[0] == "b":
            kind = "u" + kind[1:]
        order = {"sat": 0, "lo": 0, "hi": 0, "wide": 0, "shiftamt": 0, "l": 0, "r": 0, "ftz": 1, "relu": 1, "wrap": 1,
                 "clamp": 1, "NaN": 2}  # fmt: skip
        if any(m not in order for m in keep):
            raise Unsupported(f"modifier of {s.opcode}")
        keep.sort(key=order.get)
        full = ".".join([name, *keep, kind])
        if full not in LANE and "ftz" in keep:  # 16-bit: nothing to flush that matters to a rounded result
            full = ".".join([name, *(m for m in keep if m != "ftz"), kind])
        if full not in LANE:
            raise Unsupported(f"instruction {s.opcode}")
        if name == "lop3":
            return self.lanes(full, operands[:4], imm=self.number(operands[4], 4))
        return self.lanes(full, operands)

    def op_setp(self, s, parts, operands):
        kind = parts[-1]
        modifiers = parts[:-1]
        cmp, boolop = modifiers[0], next((m for m in modifiers[1:] if m in ("and", "or", "xor")), None)
        if kind[0] == "b" and not kind.startswith("bf"):
            kind = "u" + kind[1:]
        width = SIZES[kind]
        first = operands[0].split("|")
        o = [
            self.dest(first[0]),
            self.dest(first[1]) if len(first) > 1 else -1,
            self.source(operands[1], width),
            self.source(operands[2], width),
            -1,
        ]
        x = [0, 0]
        if boolop:
            text = operands[3]
            x = [("and", "or", "xor").index(boolop) + 1, int(text.startswith("!"))]
            o[4] = self.pred(text.lstrip("!"))
        return [{"op": f"setp.{cmp}.{kind}", "o": o, "x": x}]

    def op_testp(self, s, parts, operands):
        return [
            {"op": s.opcode, "o": [self.dest(operands[0]), -1, self.source(operands[1], SIZES[parts[-1]])], "x": [0, 0]}
        ]

    def op_selp(self, s, parts, operands):
        text = operands[3]
        if text.startswith("!"):
            operands = [operands[0], operands[2], operands[1], text[1:]]
        return self.lanes(f"selp.b{8 * SIZES[parts[-1]]}", operands)

    def op_mov(self, s, parts, operands):
        kind = parts[-1]
        to, of = operands
        if kind == "pred":
            return [{"op": "movpred", "o": [self.dest(to), self.pred(of)]}]
        width = SIZES[kind]
        if isinstance(of, tuple):
            if len(of) * 1 > 8 or width // len(of) not in (1, 2, 4):
                raise Unsupported(s.opcode)
            part = width // len(of)
            return [
                {"op": "pack", "o": [self.dest(to), *(self.source(t, max(part, 2)) for t in of)], "x": [len(of), part]}
            ]
        if isinstance(to, tuple):
            part = width // len(to)
            return [{"op": "unpack", "o": [self.source(of, width), *(self.dest(t) for t in to)], "x": [len(to), part]}]
        if of in ("%clock", "%clock64", "%globaltimer", "%clock_hi", "%globaltimer_lo"):
            return [{"op": "clock", "o": [self.dest(to)], "x": [self.width(to)]}]
        if of in SPECIAL and width == 8:
            return [{"op": "cvt.u64.u32.r32", "o": [self.dest(to), self.source(of, 4)]}]
        if width != self.width(to):
            raise Unsupported(f"{s.opcode} into a register of {self.width(to)} bytes")
        return [{"op": f"mov.b{8 * width}", "o": [self.dest(to), self.source(of, width)]}]

    def op_cvt(self, s, parts, operands):
        if parts[0] == "pack":
            raise Unsupported(s.opcode)
        to, of = parts[-2:]
        modifiers = parts[:-2]
        if to in ("bf16x2", "f16x2", "tf32"):
            name = "cvt." + ".".join([m for m in modifiers if m != "satfinite"] + [to, of])
            if name not in LANE or "satfinite" in modifiers:
                raise Unsupported(s.opcode)
            return self.lanes(name, operands)
        if to not in CVT_TYPES or of not in CVT_TYPES:
            raise Unsupported(s.opcode)
        integer = to[0] in "us" and of[0] in "us"
        wide_to, wide_of = self.width(operands[0]), self.width(operands[1])
        if operands[1] not in self.slots:  # an immediate or a special register
            wide_of = max(2, SIZES[of])
            src = self.source(operands[1], wide_of)
        else:
            src = self.slots[operands[1]]
        if integer and not modifiers:
            # narrow into the register of the destination: of its own width, or of a wider one
            extended = to if SIZES[to] == wide_to else None
            if extended and (name := f"cvt.{to}.{of}.r{8 * wide_of}") in LANE:
                return [{"op": name, "o": [self.dest(operands[0]), src]}]
        plain = ".".join(["cvt", *modifiers, to, of])
        if plain in LANE and wide_to == SIZES[to] and wide_of == SIZES[of]:
            return [{"op": plain, "o": [self.dest(operands[0]), src]}]
        rounding = next((m for m in modifiers if m in ROUNDING), "")
        flags = ("sat" in modifiers) | ("ftz" in modifiers) << 1 | ("relu" in modifiers) << 2
        if set(modifiers) - {rounding, "sat", "ftz", "relu"}:
            raise Unsupported(s.opcode)
        x = [CVT_TYPES.index(to), CVT_TYPES.index(of), ROUNDING.index(rounding), flags, wide_to, wide_of]
        return [{"op": "cvt", "o": [self.dest(operands[0]), src], "x": x}]

    def op_cvta(self, s, parts, operands):
        space = next((p for p in parts if p in SPACES or p == "param"), None)
        width = SIZES[parts[-1]]
        if space == "param":  # of 64 bits the window is there already, of 32 bits (Triton 3.9) the offset alone
            window = self.fixed(PARAM_WINDOW, 8)
            return [{"op": "or.b64", "o": [self.dest(operands[0]), self.source(operands[1], width), window]}]
        window = {"global": 0, None: 0, "shared": 1 << 56, "local": 2 << 56}[space]
        if "to" in parts:
            window = -window
        return [
            {
                "op": "cvta",
                "o": [self.dest(operands[0]), self.source(operands[1], width)],
                "x": [width, width],
                "imm": window,
            }
        ]

    # -- memory ------------------------------------------------------------------------------------------------------
    def memory(self, s, parts):
        space = next((SPACES[p.split("::")[0]] for p in parts if p.split("::")[0] in SPACES), 0)
        kind = parts[-1]
        vector = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
        semantics = 0
        for p in parts:
            semantics |= {"volatile": 1, "relaxed": 1, "acquire": 3, "release": 5, "mmio": 1}.get(p, 0)
        size = SIZES[kind]
        if space in (1, 2):
            self.granules[space] = min(self.granules[space], {1: 0, 2: 1}.get(size, 2))
        elif space == 0:
            for each in (1, 2):
                self.granules[each] = min(self.granules[each], {1: 0, 2: 1}.get(size, 2))
        known = {"v2", "v4", "v8", "volatile", "relaxed", "acquire", "release", "weak", "cta", "gpu", "sys",
                 "cluster", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", kind}  # fmt: skip
        for p in parts:
            if p not in known and p.split("::")[0] not in SPACES and not p.startswith(("L1::", "L2::")):
                raise Unsupported(f"{s.opcode}: .{p}")
        return space, size, vector, semantics, kind

    def op_ld(self, s, parts, operands):
        to = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        if "param" in parts:
            kind = parts[-1]
            m = re.fullmatch(r"\[\s*([\w$]+)(?:\+(\d+))?\s*\]", operands[1])
            if m[1] not in self.params:
                raise Unsupported(f"parameter {m[1]} of a call")
            offset = self.params[m[1]].offset + int(m[2] or 0)
            return [
                {
                    "op": "ldparam",
                    "o": [self.dest(t) for t in to],
                    "imm": offset,
                    "x": [SIZES[kind], len(to), self.width(to[0]), kind[0] == "s"],
                }
            ]
        parts = ["global" if p == "const" else p for p in parts]
        space, size, vector, semantics, kind = self.memory(s, parts)
        if vector != len(to):
            raise Unsupported("vector")
        base, width, offset = self.address(operands[1])
        wide = next((self.width(t) for t in to if t != "_"), 4)
        o = [self.dest(t) for t in to] + [-1] * (8 - len(to)) + [base]
        return [{"op": "ld", "o": o, "imm": offset, "x": [size, vector, wide, kind[0] == "s", space, width, semantics]}]

    def op_st(self, s, parts, operands):
        if "param" in parts:
            self.call_params[re.match(r"\[\s*([\w$]+)", operands[0])[1]] = operands[1]
            return []
        values = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        space, size, vector, semantics, _ = self.memory(s, parts)
        if vector != len(values):
            raise Unsupported("vector")
        base, width, offset = self.address(operands[0])
        wide = next((self.size_of[t] for t in values if t in self.slots), max(2, size))
        o = [self.source(t, wide) for t in values] + [-1] * (8 - len(values)) + [base]
        return [{"op": "st", "o": o, "imm": offset, "x": [size, vector, wide, 0, space, width, semantics]}]

    def op_atom(self, s, parts, operands, result=True):
        space = next((SPACES[p.split("::")[0]] for p in parts if p.split("::")[0] in SPACES), 0)
        kind = parts[-1]
        name = next(p for p in parts if p in ATOM_OPS)
        vector = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
        if kind.startswith("v") or vector > 1:
            vector = vector if not kind.startswith("v") else int(kind[1:])
            kind = parts[-1] if not parts[-1].startswith("v") else parts[-2]
        semantics = 1
        for p in parts:
            semantics |= {"acquire": 2, "release": 4, "acq_rel": 6}.get(p, 0)
        size = SIZES[kind]
        if space:
            self.granules[space] = min(self.granules[space], {1: 0, 2: 1}.get(size, 2))
        if name in ("min", "max", "add", "inc", "dec") and kind[0] == "b" and not kind.startswith("bf"):
            raise Unsupported(s.opcode)
        rest = list(operands[1:] if result else operands)
        base, width, offset = self.address(rest[0])
        if vector > 1:
            to = operands[0] if result else ("_",) * vector
            o = (
                [-1, base, -1, -1]
                + [self.dest(t) for t in to]
                + [-1] * (8 - vector)
                + [self.source(t, max(2, size)) for t in rest[1]]
            )
            wide = self.width(rest[1][0])
        else:
            o = [
                self.dest(operands[0]) if result else -1,
                base,
                self.source(rest[1], max(2, size)),
                self.source(rest[2], max(2, size)) if len(rest) > 2 and name == "cas" else -1,
            ]
            wide = max(2, size)
        x = [ATOM_OPS[name], ATOM_TYPES.index(kind), size, space, width, semantics, wide, vector]
        return [{"op": "atom", "o": o, "imm": offset, "x": x}]

    def op_red(self, s, parts, operands):
        if parts[0] == "async":
            raise Unsupported(s.opcode)
        return self.op_atom(s, parts, operands, result=False)

    def op_cp(self, s, parts, operands):
        if parts[:2] == ["async", "bulk"]:
            return hopper.bulk(self, s, parts, operands)
        if parts[1] == "commit_group":
            return [{"op": "cpasync_commit"}]
        if parts[1] == "wait_group":
            return [{"op": "cpasync_wait", "imm": self.number(operands[0], 4)}]
        if parts[1] == "wait_all":
            return [{"op": "cpasync_wait", "imm": -1}]
        if parts[1] not in ("ca", "cg"):
            raise Unsupported(s.opcode)
        dst, dst_width, dst_off = self.address(operands[0])
        src, src_width, src_off = self.address(operands[1])
        size = self.number(operands[2], 4)
        ignore = -1
        if (len(operands) > 3 and not any("cache_hint" in p for p in parts)) or len(operands) > 4:
            ignore = self.source(operands[3], 4)
        if dst_width != 4 or src_width != 8 or dst < 0:
            raise Unsupported(s.opcode)
        self.granules[2] = min(self.granules[2], 2)
        return [
            {"op": "cpasync", "o": [dst, src, ignore], "imm": (dst_off & 0xFFFFFFFF) | (src_off << 32), "x": [size]}
        ]

    def op_ldmatrix(self, s, parts, operands):
        if parts[-1] != "b16" or "m8n8" not in parts:
            raise Unsupported(s.opcode)
        to = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        base, width, offset = self.address(operands[1])
        return [
            {
                "op": "ldmatrix",
                "o": [self.dest(t) for t in to] + [-1] * (8 - len(to)) + [base],
                "imm": offset,
                "x": [len(to), "trans" in parts, 0, 0, 0, width],
            }
        ]

    def op_stmatrix(self, s, parts, operands):
        if parts[-1] != "b16" or "m8n8" not in parts:
            raise Unsupported(s.opcode)
        of = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        base, width, offset = self.address(operands[0])
        return [
            {
                "op": "stmatrix",
                "o": [self.source(t, 4) for t in of] + [-1] * (8 - len(of)) + [base],
                "imm": offset,
                "x": [len(of), "trans" in parts, 0, 0, 0, width],
            }
        ]

    def op_prefetch(self, s, parts, operands):
        return [{"op": "nop"}]

    def op_discard(self, s, parts, operands):
        return [{"op": "nop"}]

    def op_createpolicy(self, s, parts, operands):
        return [{"op": "mov.b64", "o": [self.dest(operands[0]), self.fixed(0, 8)]}]

    # -- warps -------------------------------------------------------------------------------------------------------
    def op_shfl(self, s, parts, operands):
        mode = ("up", "down", "bfly", "idx").index(parts[1])
        to = operands[0].split("|")
        o = [self.dest(to[0]), self.dest(to[1]) if len(to) > 1 else -1, *(self.source(t, 4) for t in operands[1:5])]
        return [{"op": "shfl", "o": o, "x": [mode]}]

    def op_vote(self, s, parts, operands):
        member = self.source(operands[2], 4)
        text = operands[1]
        o, negated = [self.dest(operands[0]), self.pred(text.lstrip("!")), member], int(text.startswith("!"))
        if "ballot" in parts:
            return [{"op": "ballot", "o": o, "x": [0, negated]}]
        return [{"op": "vote", "o": o, "x": [("all", "any", "uni").index(parts[1]), negated]}]

    def op_activemask(self, s, parts, operands):
        return [{"op": "activemask", "o": [self.dest(operands[0])]}]

    def op_elect(self, s, parts, operands):
        to = operands[0].split("|")
        return [{"op": "elect", "o": [self.dest(to[0]), self.dest(to[1])]}]

    def op_match(self, s, parts, operands):
        to = operands[0].split("|")
        width = SIZES[parts[-1]]
        o = [
            self.dest(to[0]),
            self.dest(to[1]) if len(to) > 1 else -1,
            self.source(operands[1], width),
            self.source(operands[2], 4),
        ]
        return [{"op": f"match_{parts[0]}", "o": o, "x": [width]}]

    def op_redux(self, s, parts, operands):
        x = [
            ("add", "min", "max", "and", "or", "xor").index(parts[1]),
            {"u": 0, "b": 0, "s": 1, "f": 2}[parts[-1][0]],
            "NaN" in parts,
        ]
        if "abs" in parts:
            raise Unsupported(s.opcode)
        return [
            {
                "op": "redux",
                "o": [self.dest(operands[0]), self.source(operands[1], 4), self.source(operands[2], 4)],
                "x": x,
            }
        ]

    def op_bar(self, s, parts, operands):
        parts = [p for p in parts if p not in ("cta", "aligned")]
        if parts == ["warp", "sync"]:
            return [{"op": "barwarp", "o": [self.source(operands[0], 4)]}]
        if parts[0] == "cluster":
            return [{"op": "nop"}] if parts[1] == "arrive" else [{"op": "bar", "o": [-1, -1], "imm": 15}]
        if parts not in (["sync"], ["arrive"]):
            raise Unsupported(s.opcode)
        number = self.number(operands[0], 4)
        o = [
            -1 if number is not None else self.source(operands[0], 4),
            self.source(operands[1], 4) if len(operands) > 1 else -1,
        ]
        return [{"op": "bar" if parts == ["sync"] else "bararrive", "o": o, "imm": number or 0}]

    op_barrier = op_bar

    def op_membar(self, s, parts, operands):
        return [{"op": "membar"}]

    def op_fence(self, s, parts, operands):
        if parts[:2] == ["proxy", "async"]:
            return [{"op": "fence_proxy"}]
        if parts[0] in ("proxy", "mbarrier_init"):
            return [{"op": "nop"}]
        if "cta" in parts:
            return [{"op": "nop"}]
        return [{"op": "membar"}]

    def op_mma(self, s, parts, operands):
        text = s.opcode
        if "row.col" not in text or any(p in parts for p in ("sp", "b1")):
            raise Unsupported(s.opcode)
        shape = re.search(r"m16n8k(\d+)", text)
        types = parts[-4:]
        if (
            shape is None
            or types[1] != types[2]
            or types[1] not in ("bf16", "f16", "tf32")
            or types[0] != types[3]
            or types[0] not in ("f32", "f16")
        ):
            raise Unsupported(s.opcode)
        k, kind = int(shape[1]), ("bf16", "f16", "tf32").index(types[1])
        if (kind, k) not in {(0, 16), (0, 8), (1, 16), (1, 8), (2, 8), (2, 4)}:
            raise Unsupported(s.opcode)
        d, a, b, c = ((o,) if isinstance(o, str) else o for o in operands)

        def fill(slots, n):
            return list(slots) + [-1] * (n - len(slots))

        o = (
            fill([self.dest(t) for t in d], 4)
            + fill([self.source(t, 4) for t in a], 4)
            + fill([self.source(t, 4) for t in b], 2)
            + [self.source(t, 4) for t in c]
        )
        return [{"op": "mma", "o": o, "x": [kind, k, types[0] == "f16"]}]

    # -- control -----------------------------------------------------------------------------------------------------
    def op_bra(self, s, parts, operands):
        return [{"op": "bra", "label": operands[0]}]

    def op_brx(self, s, parts, operands):
        return [{"op": "brx", "o": [self.source(operands[0], 4)], "labels": self.entry.targets[operands[1]]}]

    def op_ret(self, s, parts, operands):
        return [{"op": "ret"}]

    op_exit = op_ret

    def op_trap(self, s, parts, operands):
        return [{"op": "trap"}]

    def op_call(self, s, parts, operands):
        target = next(o for o in operands if isinstance(o, str) and re.fullmatch(r"[\w$]+", o))
        if target == "__assertfail":
            first = self.call_params.get("param0", "0")
            return [{"op": "assertfail", "o": [self.source(first, 8)]}]
        raise Unsupported(f"call of {target}")

    def op_nanosleep(self, s, parts, operands):
        return [{"op": "nanosleep"}]

    def op_griddepcontrol(self, s, parts, operands):
        return [{"op": "nop"}]

    op_setmaxnreg = op_griddepcontrol
    op_pmevent = op_griddepcontrol

    def op_mbarrier(self, s, parts, operands):
        return hopper.mbarrier(self, s, parts, operands)

    def op_wgmma(self, s, parts, operands):
        return hopper.wgmma(self, s, parts, operands)

    def op_tcgen05(self, s, parts, operands):
        return blackwell.tcgen05(self, s, parts, operands)
