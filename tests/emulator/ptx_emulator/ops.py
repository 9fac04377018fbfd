"""The lane-wise instructions: one table from which the interpreter's cases are generated.

``lane(name, D, sources, expression)`` defines an instruction whose result in each lane depends on that lane alone;
``a``, ``b``, ``c`` are its sources, ``I.imm`` its immediate. The other instructions (memory, shuffles, barriers, MMA)
are written by hand in runtime.cpp and only named here, under HAND.
"""

LANE: list[tuple[str, str, list[str], str]] = []
SETP: list[tuple[str, str, str]] = []

HAND = [
    "ld", "st", "atom", "red", "cpasync", "cpasync_commit", "cpasync_wait", "ldmatrix", "stmatrix", "shfl",
    "vote", "ballot", "activemask", "match_any", "match_all", "redux", "bar", "barwarp", "bararrive", "membar",
    "bra", "ret", "trap", "ldparam", "movpred", "andpred", "orpred", "xorpred", "notpred", "pack", "unpack",
    "cvt", "mma", "nop", "nanosleep", "elect", "mbar_init", "mbar_inval", "mbar_expect_tx", "mbar_arrive",
    "mbar_try_wait", "tma_load", "tma_store", "tma_commit", "tma_wait", "fence_proxy", "wgmma", "wgmma_fence",
    "wgmma_commit", "wgmma_wait", "assertfail", "cvta", "clock", "brx", "tensor_alloc", "tensor_relinquish",
    "tensor_dealloc", "tensor_ld", "tensor_st", "tensor_wait", "tensor_mma", "tensor_commit",
]  # fmt: skip


def lane(name, dest, sources, expression):
    LANE.append((name, dest, sources.split(), expression))


S, U = ("s16", "s32", "s64"), ("u16", "u32", "u64")
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64", "u64": "u128", "s64": "s128"}
for t in S + U:
    n = int(t[1:])
    lane(f"add.{t}", t, f"{t} {t}", "a+b")
    lane(f"sub.{t}", t, f"{t} {t}", "a-b")
    lane(f"mul.lo.{t}", t, f"{t} {t}", "a*b")
    lane(f"mul.hi.{t}", t, f"{t} {t}", f"(({WIDE[t]})a*b)>>{n}")
    lane(f"mad.lo.{t}", t, f"{t} {t} {t}", "a*b+c")
    lane(f"mad.hi.{t}", t, f"{t} {t} {t}", f"((({WIDE[t]})a*b)>>{n})+c")
    if n < 64:
        lane(f"mul.wide.{t}", WIDE[t], f"{t} {t}", f"({WIDE[t]})a*b")
        lane(f"mad.wide.{t}", WIDE[t], f"{t} {t} {WIDE[t]}", f"({WIDE[t]})a*b+c")
    lane(f"min.{t}", t, f"{t} {t}", "a<b?a:b")
    lane(f"max.{t}", t, f"{t} {t}", "a>b?a:b")
    if t[0] == "s":
        lane(f"abs.{t}", t, t, "a<0?-a:a")
        lane(f"neg.{t}", t, t, "-a")
        lane(f"div.{t}", t, f"{t} {t}", "b==0?-1:b==-1?-a:a/b")
        lane(f"rem.{t}", t, f"{t} {t}", "b==0?a:b==-1?0:a%b")
        lane(f"shr.{t}", t, f"{t} u32", f"a>>(b>{n - 1}?{n - 1}:b)")
    else:
        lane(f"div.{t}", t, f"{t} {t}", "b==0?-1:a/b")
        lane(f"rem.{t}", t, f"{t} {t}", "b==0?a:a%b")
        lane(f"shr.{t}", t, f"{t} u32", f"b>{n - 1}?0:a>>b")
        lane(f"shl.b{n}", t, f"{t} u32", f"b>{n - 1}?0:a<<b")
        for name, e in (("and", "a&b"), ("or", "a|b"), ("xor", "a^b")):
            lane(f"{name}.b{n}", t, f"{t} {t}", e)
        lane(f"not.b{n}", t, t, "~a")
        lane(f"mov.b{n}", t, t, "a")
        lane(f"selp.b{n}", t, f"{t} {t} pred", "c?a:b")
    if n >= 32:
        lane(f"bfe.{t}", t, f"{t} u32 u32", f"bfe<{t}>(a,b,c)")
        lane(f"bfind.{t}", "u32", t, f"bfind<{t}>(a)")
        lane(f"bfind.shiftamt.{t}", "u32", t, f"bfind<{t}>(a)==~0u?~0u:{n - 1}-bfind<{t}>(a)")
lane("add.sat.s32", "s32", "s32 s32", "sat32((s64)a+b)")
lane("sub.sat.s32", "s32", "s32 s32", "sat32((s64)a-b)")
for n in (32, 64):
    t = f"u{n}"
    lane(f"popc.b{n}", "u32", t, "__builtin_popcountll(a)")
    lane(f"clz.b{n}", "u32", t, f"a?__builtin_clzll(a)-{64 - n}:{n}")
    lane(f"brev.b{n}", t, t, f"brev<{t}>(a)")
    lane(f"bfi.b{n}", t, f"{t} {t} u32 u32", f"bfi<{t}>(a,b,c,d)")
lane("slct.b32.s32", "u32", "u32 u32 s32", "c>=0?a:b")
lane("lop3.b32", "u32", "u32 u32 u32", "lop3(a,b,c,(u32)I.imm)")
lane("prmt.b32", "u32", "u32 u32 u32", "prmt(a,b,c)")
lane("shf.l.wrap.b32", "u32", "u32 u32 u32", "(u32)(((((u64)b<<32)|a)<<(c&31))>>32)")
lane("shf.r.wrap.b32", "u32", "u32 u32 u32", "(u32)((((u64)b<<32)|a)>>(c&31))")
lane("shf.l.clamp.b32", "u32", "u32 u32 u32", "c>31?a:(u32)(((((u64)b<<32)|a)<<c)>>32)")
lane("shf.r.clamp.b32", "u32", "u32 u32 u32", "c>31?b:(u32)((((u64)b<<32)|a)>>c)")
lane("dp4a.s32.s32", "s32", "u32 u32 s32", "dp4a(a,b,c)")
for name, e in (("add", "x+y"), ("sub", "x-y"), ("min", "x<y?x:y"), ("max", "x>y?x:y")):
    for t in ("u16", "s16"):
        lane(f"{name}.{t}x2", "u32", "u32 u32",
             f"pair([](u16 p,u16 q)->u16{{{t} x=p,y=q;return (u16)({t})({e});}},a,b)")  # fmt: skip

# Floating point: NaN results of f32 arithmetic are the canonical 0x7FFFFFFF, as on the hardware.
for t in ("f32", "f64"):
    k = "canon" if t == "f32" else ""
    fma = "__builtin_fmaf" if t == "f32" else "__builtin_fma"
    suffix = "f" if t == "f32" else ""
    for z in ("", ".ftz") if t == "f32" else ("",):
        f = "fz" if z else ""
        out = f"{f}({{}})"
        A, B, C = f"{f}(a)", f"{f}(b)", f"{f}(c)"
        lane(f"add{z}.{t}", t, f"{t} {t}", f"{k}({out.format(f'{A}+{B}')})")
        lane(f"sub{z}.{t}", t, f"{t} {t}", f"{k}({out.format(f'{A}-{B}')})")
        lane(f"mul{z}.{t}", t, f"{t} {t}", f"{k}({out.format(f'{A}*{B}')})")
        lane(f"fma{z}.{t}", t, f"{t} {t} {t}", f"{k}({out.format(f'{fma}({A},{B},{C})')})")
        lane(f"div{z}.{t}", t, f"{t} {t}", f"{k}({out.format(f'{A}/{B}')})")
        lane(f"min{z}.{t}", t, f"{t} {t}", f"fmin_<0>({A},{B})")
        lane(f"max{z}.{t}", t, f"{t} {t}", f"fmax_<0>({A},{B})")
        lane(f"min{z}.NaN.{t}", t, f"{t} {t}", f"fmin_<1>({A},{B})")
        lane(f"max{z}.NaN.{t}", t, f"{t} {t}", f"fmax_<1>({A},{B})")
        lane(f"abs{z}.{t}", t, t, f"__builtin_fabs{suffix}({A})")
        lane(f"neg{z}.{t}", t, t, f"-({A})")
        lane(f"sqrt{z}.{t}", t, t, f"{k}(__builtin_sqrt{suffix}({A}))")
        lane(f"rsqrt{z}.{t}", t, t, f"{k}(({t})(1.0/__builtin_sqrt((f64){A})))")
        lane(f"rcp{z}.{t}", t, t, f"{k}({out.format(f'1/{A}')})")
        if t == "f32":
            for name, function in (("ex2", "exp2"), ("lg2", "log2"), ("sin", "sin"), ("cos", "cos"), ("tanh", "tanh")):
                lane(f"{name}{z}.{t}", t, t, f"{k}({out.format(f'(f32)::{function}((f64){A})')})")
            for name in ("min", "max"):
                for NAN, n in (("", 0), (".NaN", 1)):
                    lane(f"{name}3{z}{NAN}.{t}", t, f"{t} {t} {t}", f"f{name}_<{n}>(f{name}_<{n}>({A},{B}),{C})")
            for name, arity, e in (("add", 2, f"{A}+{B}"), ("sub", 2, f"{A}-{B}"), ("mul", 2, f"{A}*{B}"),
                                   ("fma", 3, f"{fma}({A},{B},{C})")):  # fmt: skip
                values = ",".join("abc"[:arity])
                function = f"[](f32 {',f32 '.join('abc'[:arity])}){{return {k}({out.format(e)});}}"
                lane(f"{name}{z}.f32x2", "u64", " ".join(["u64"] * arity), f"pair_f32({function},{values})")
            lane(f"add.sat{z}.{t}", t, f"{t} {t}", f"sat01({A}+{B})")
            lane(f"mul.sat{z}.{t}", t, f"{t} {t}", f"sat01({A}*{B})")
            lane(f"fma.sat{z}.{t}", t, f"{t} {t} {t}", f"sat01(__builtin_fmaf({A},{B},{C}))")
    lane(f"copysign.{t}", t, f"{t} {t}", f"__builtin_copysign{suffix}(b,a)")
    for name, e in (("finite", "a-a==0"), ("infinite", "a==a&&a-a!=0"), ("number", "a==a"), ("notanumber", "a!=a")):
        SETP.append((f"testp.{name}.{t}", t, e))
for t in ("f16", "bf16"):
    to, of = f"{t}_of", f"f32_of_{t}"
    forms = [
        ("add", 2, "x+y"), ("sub", 2, "x-y"), ("mul", 2, "x*y"),
        ("fma", 3, "(f32)((f64)x*y+z)"), ("min", 2, "fmin_<0>(x,y)"), ("max", 2, "fmax_<0>(x,y)"),
        ("min.NaN", 2, "fmin_<1>(x,y)"), ("max.NaN", 2, "fmax_<1>(x,y)"), ("ex2", 1, "::exp2f(x)"),
        ("tanh", 1, "::tanhf(x)"), ("fma.relu", 3, "relu_((f32)((f64)x*y+z))"),
    ]  # fmt: skip
    for name, arity, e in forms:
        params = ",".join(f"u16 {p}_" for p in "xyz"[:arity])
        body = "".join(f"f32 {p}={of}({p}_);" for p in "xyz"[:arity])
        function = f"[]({params})->u16{{{body}return {to}({e});}}"
        args = ",".join("abc"[:arity])
        for z in ("", ".ftz"):
            if z and name not in ("ex2",) and t == "bf16":
                continue
            dotted = name if not z else name + ".ftz"
            lane(f"{dotted}.{t}", "u16", " ".join(["u16"] * arity), f"({function})({args})")
            lane(f"{dotted}.{t}x2", "u32", " ".join(["u32"] * arity), f"pair({function},{args})")
    lane(f"add.f32.{t}", "f32", "u16 f32", f"canon({of}(a)+b)")
    lane(f"sub.f32.{t}", "f32", "u16 f32", f"canon({of}(a)-b)")
    lane(f"fma.f32.{t}", "f32", "u16 u16 f32", f"canon(__builtin_fmaf({of}(a),{of}(b),c))")
    lane(f"abs.{t}", "u16", "u16", "a&0x7fff")
    lane(f"neg.{t}", "u16", "u16", "a^0x8000")
    lane(f"abs.{t}x2", "u32", "u32", "a&0x7fff7fffu")
    lane(f"neg.{t}x2", "u32", "u32", "a^0x80008000u")
    lane(f"cvt.f32.{t}", "f32", "u16", f"{of}(a)")
    lane(f"cvt.rn.{t}.f32", "u16", "f32", f"{to}(a)")
    lane(f"cvt.rn.{t}x2.f32", "u32", "f32 f32", f"((u32){to}(a)<<16)|{to}(b)")
    lane(f"cvt.rn.relu.{t}x2.f32", "u32", "f32 f32", f"((u32){to}(relu_(a))<<16)|{to}(relu_(b))")
lane("cvt.rz.bf16x2.f32", "u32", "f32 f32", "((u32)bf16_rz(a)<<16)|bf16_rz(b)")
lane("cvt.rna.tf32.f32", "u32", "u32", "tf32_rna(a)")
lane("cvt.rn.tf32.f32", "u32", "u32", "tf32_rn(a)")
lane("cvt.rz.tf32.f32", "u32", "u32", "a&0xffffe000u")

# Conversions of integers between registers of different widths, the common ones; all others are the slow `cvt`.
for d in S + U:
    for s in S + U + ("u8", "s8"):
        for reg in (16, 32, 64):
            width = int(s[1:])
            if width <= reg and not (width == 8 and reg == 64):
                lane(f"cvt.{d}.{s}.r{reg}", d, f"u{reg}", f"({d})({s})a")
for s in ("s32", "u32", "s64", "u64"):
    lane(f"cvt.rn.f32.{s}", "f32", s, "(f32)a")
    lane(f"cvt.rn.f64.{s}", "f64", s, "(f64)a")
lane("cvt.rzi.s32.f32", "s32", "f32", "f2i<s32>(a)")
lane("cvt.f64.f32", "f64", "f32", "a")
lane("cvt.rn.f32.f64", "f32", "f64", "(f32)a")

INT_CMP = {"eq": "a==b", "ne": "a!=b", "lt": "a<b", "le": "a<=b", "gt": "a>b", "ge": "a>=b",
           "lo": "a<b", "ls": "a<=b", "hi": "a>b", "hs": "a>=b"}  # fmt: skip
FLOAT_CMP = {"eq": "a==b", "ne": "(a<b)|(a>b)", "lt": "a<b", "le": "a<=b", "gt": "a>b", "ge": "a>=b",
             "equ": "!((a<b)|(a>b))", "neu": "!(a==b)", "ltu": "!(a>=b)", "leu": "!(a>b)", "gtu": "!(a<=b)",
             "geu": "!(a<b)", "num": "(a==a)&(b==b)", "nan": "(a!=a)|(b!=b)"}  # fmt: skip
for t in S + U:
    for name, e in INT_CMP.items():
        SETP.append((f"setp.{name}.{t}", t, e))
for t in ("f32", "f64"):
    for name, e in FLOAT_CMP.items():
        SETP.append((f"setp.{name}.{t}", t, e))
for t in ("f16", "bf16"):
    for name, e in FLOAT_CMP.items():
        e = e.replace("a", "x").replace("b", "y")
        SETP.append(
            (f"setp.{name}.{t}", "u16", f"([](u16 p,u16 q){{f32 x=f32_of_{t}(p),y=f32_of_{t}(q);return {e};}})(a,b)")
        )

SETP2 = []  # two halves, two predicates
for t in ("f16", "bf16"):
    for name, e in FLOAT_CMP.items():
        e = e.replace("a", "x").replace("b", "y")
        SETP2.append((f"setp.{name}.{t}x2", f"([](u16 p,u16 q){{f32 x=f32_of_{t}(p),y=f32_of_{t}(q);return {e};}})"))

NAMES = HAND + [entry[0] for entry in LANE] + [entry[0] for entry in SETP] + [entry[0] for entry in SETP2]
NUMBER = {name: number for number, name in enumerate(NAMES)}
assert len(NUMBER) == len(NAMES)


def enumeration() -> str:
    return "enum {" + ",".join(f"OP_{name}={NUMBER[name]}" for name in HAND) + "};\n"


def cases() -> str:
    out = []
    for name, dest, sources, e in LANE:
        loads, binds = [], []
        for place, (letter, t) in enumerate(zip("abcd", sources, strict=False)):
            if t == "pred":
                loads.append(f"const u32 {letter}_=*(const u32*)(R+I.o[{place + 1}]);")
                binds.append(f"bool {letter}=({letter}_>>i)&1;")
            else:
                loads.append(f"const {t}*{letter}_=(const {t}*)(R+I.o[{place + 1}]);")
                binds.append(f"{t} {letter}={letter}_[i];")
        out.append(
            f"case {NUMBER[name]}: {{ /* {name} */ {' '.join(loads)} alignas(64) {dest} t_[32];\n"
            f"  for(int i=0;i<32;i++){{ {' '.join(binds)} t_[i]=({dest})({e}); }}\n"
            f"  put<{dest}>(R+I.o[0],t_,m); break; }}"
        )
    for name, t, e in SETP:
        unary = name.startswith("testp")
        second = "" if unary else f"const {t}*b_=(const {t}*)(R+I.o[3]);"
        bind = "" if unary else f"{t} b=b_[i];"
        out.append(
            f"case {NUMBER[name]}: {{ /* {name} */ const {t}*a_=(const {t}*)(R+I.o[2]); {second}\n"
            f"  alignas(64) s32 t_[32]; for(int i=0;i<32;i++){{ {t} a=a_[i]; {bind} t_[i]=({e})?-1:0; }}\n"
            f"  setpred(R,I,bits(t_),m); break; }}"
        )
    for name, e in SETP2:
        out.append(
            f"case {NUMBER[name]}: {{ /* {name} */\n"
            f"  const u32*a_=(const u32*)(R+I.o[2]); const u32*b_=(const u32*)(R+I.o[3]);\n"
            f"  alignas(64) s32 t_[32], s_[32]; for(int i=0;i<32;i++){{ u32 a=a_[i],b=b_[i];\n"
            f"    t_[i]={e}((u16)a,(u16)b)?-1:0; s_[i]={e}((u16)(a>>16),(u16)(b>>16))?-1:0; }}\n"
            f"  setpred2(R,I,bits(t_),bits(s_),m); break; }}"
        )
    return "\n".join(out) + "\n"
