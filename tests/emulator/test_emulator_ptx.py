"""Hand-written PTX: control flow, instructions Triton seldom emits, and faults that Triton would not compile."""

import os
import random
import shlex
import struct
import subprocess
import sys

import numpy
import pytest

from ptx_emulator import runtime
from ptx_emulator.assemble import Unsupported, assemble
from ptx_emulator.parse import parse

pytestmark = pytest.mark.skipif(runtime.compiler() is None, reason="the emulator is built with g++")

HEAD = """
.version 8.7
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 a, .param .u64 b) .reqntid {threads}
{{
 .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<30>; .reg .b64 %rd<30>; .reg .f32 %f<9>;
 ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b];
 mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x;
 mad.lo.u32 %r4, %r2, %r3, %r1; mul.wide.u32 %rd3, %r4, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
 ld.global.b32 %r5, [%rd4];
"""


def execute(body, a, *, out=None, threads=32, grid=1, shared=4096, **options):
    program = assemble(parse(HEAD.format(threads=threads) + body + "\nret;\n}\n"), "k")
    a = numpy.asarray(a)
    out = numpy.zeros(threads * grid, numpy.uint32) if out is None else out
    ranges = [(x.ctypes.data, x.ctypes.data + x.nbytes) for x in (a, out)]
    found, _, _ = runtime.launch(
        program, (grid, 1, 1), threads, shared, struct.pack("<QQ", a.ctypes.data, out.ctypes.data), ranges, **options
    )
    return out, found


def lanes(n=32, bits=32):
    return numpy.array([random.getrandbits(bits) for _ in range(n)], numpy.uint32)


def kinds(found):
    return {f.kind for f in found}


STORE = "st.global.b32 [%rd5], %r6;"


@pytest.mark.parametrize(("instruction", "function"), [
    ("brev.b32 %r6, %r5;", lambda x: int(f"{x:032b}"[::-1], 2)),
    ("popc.b32 %r6, %r5;", lambda x: bin(x).count("1")),
    ("clz.b32 %r6, %r5;", lambda x: 32 - x.bit_length()),
    ("bfe.u32 %r6, %r5, 5, 7;", lambda x: x >> 5 & 127),
    ("bfe.s32 %r6, %r5, 4, 3;", lambda x: ((x >> 4 & 7) ^ 4) - 4),
    ("bfe.s32 %r6, %r5, 1, 1;", lambda x: -(x >> 1 & 1)),
    ("bfi.b32 %r6, %r5, %r1, 8, 4;", None),
    ("prmt.b32 %r6, %r5, 0, 0x0123;", lambda x: int.from_bytes(x.to_bytes(4, "little"), "big")),
    ("shf.l.wrap.b32 %r6, %r5, %r5, 7;", lambda x: (x << 7 | x >> 25)),
    ("mul.hi.u32 %r6, %r5, 0xdeadbeef;", lambda x: x * 0xDEADBEEF >> 32),
    ("lop3.b32 %r6, %r5, 0xff00ff00, 0x0f0f0f0f, 0x96;", lambda x: x ^ 0xFF00FF00 ^ 0x0F0F0F0F),
    ("shr.s32 %r6, %r5, 40;", lambda x: -(x >> 31)),
    ("shl.b32 %r6, %r5, 32;", lambda x: 0),
    ("cvt.s32.s8 %r6, %r5;", lambda x: ((x & 255) ^ 128) - 128),
    ("cvt.u16.u32 %h1, %r5; cvt.u32.u16 %r6, %h1;", lambda x: x & 0xFFFF),
    ("{ .reg .b16 lo; mov.b32 {lo, _}, %r5; mov.b32 %r6, {lo, lo}; }", lambda x: (x & 0xFFFF) * 0x10001),
    ("min.s16x2 %r6, %r5, 0;", None),
])  # fmt: skip
def test_integers(instruction, function):
    random.seed(1)
    x = lanes()
    out, found = execute(instruction + STORE, x)
    assert not found
    if function:
        assert out.tolist() == [function(int(v)) % 2**32 for v in x]


def test_lanes_diverge_and_join():
    """Every lane loops as often as it likes; a shuffle after the loop sees all of them."""
    body = """
     and.b32 %r7, %r5, 31; mov.b32 %r8, 0;
    LOOP: setp.eq.u32 %p1, %r7, 0; @%p1 bra DONE; add.u32 %r8, %r8, %r7; sub.u32 %r7, %r7, 1; bra LOOP;
    DONE: shfl.sync.idx.b32 %r6, %r8, 5, 31, -1;
    """ + STORE  # fmt: skip
    x = lanes()
    out, found = execute(body, x)
    n = int(x[5]) & 31
    assert not found and set(out.tolist()) == {n * (n + 1) // 2}


def test_lanes_that_never_meet_a_shuffle():
    """Those that have ended are not waited for; two halves at two shuffles are."""
    body = "setp.lt.u32 %p1, %r1, 16; mov.b32 %r6, 0; @%p1 bra A; shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1; A: " + STORE
    assert not execute(body, lanes())[1]
    body = body.replace("A:", "bra B; A: shfl.sync.up.b32 %r6, %r5, 1, 0, -1; B:")
    assert "warp does not converge at a .sync instruction" in kinds(execute(body, lanes())[1])


def test_half_a_warp_may_shuffle_alone():
    body = (
        "setp.ge.u32 %p1, %r1, 16; mov.b32 %r6, 0; @%p1 bra A; shfl.sync.bfly.b32 %r6, %r5, 1, 31, 0xffff; A: " + STORE
    )
    x = lanes()
    out, found = execute(body, x)
    assert not found and out[:16].tolist() == [x[i ^ 1] for i in range(16)]


EXCHANGE = """
 mov.b32 %r10, smem; shl.b32 %r11, %r1, 2; add.u32 %r11, %r10, %r11; st.shared.b32 [%r11], %r5; {barrier}
 xor.b32 %r12, %r1, 32; shl.b32 %r12, %r12, 2; add.u32 %r12, %r10, %r12; ld.shared.b32 %r6, [%r12];
""" + STORE  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_warps_exchange(seed):
    x = lanes(64)
    out, found = execute(EXCHANGE.format(barrier="bar.sync 0;"), x, threads=64, seed=seed)
    assert not found and out.tolist() == [x[i ^ 32] for i in range(64)]
    _, found = execute(EXCHANGE.format(barrier=""), x, threads=64, seed=seed)
    assert kinds(found) & {"race on shared memory", "read of shared memory never written"}


def test_write_after_read():
    body = EXCHANGE.format(barrier="bar.sync 0;") + "st.shared.b32 [%r11], %r6;"
    assert kinds(execute(body, lanes(64), threads=64)[1]) == {"race on shared memory"}


def test_never_written():
    body = "mov.b32 %r10, smem; ld.shared.b32 %r6, [%r10+16];" + STORE
    assert kinds(execute(body, lanes())[1]) == {"read of shared memory never written"}


def test_bounds_and_alignment():
    assert kinds(execute("ld.shared.b32 %r6, [smem+4096];" + STORE, lanes())[1]) == {"shared access out of bounds"}
    assert kinds(execute("ld.global.v2.b32 {%r6, %r7}, [%rd1+4];" + STORE, lanes())[1]) == {"misaligned access"}
    assert kinds(execute("ld.global.b32 %r6, [%rd4+4];" + STORE, lanes())[1]) == {"global access out of bounds"}
    assert not execute("setp.lt.u32 %p1, %r1, 31; mov.b32 %r6, 0; @%p1 ld.global.b32 %r6, [%rd4+4];" + STORE, lanes())[
        1
    ]


def test_programs_that_write_one_place():
    """Each its own number; what is there already is reported apart, and atomics may meet."""
    between = "race on global memory between CTAs"
    assert between in kinds(execute("setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%rd2], %r2;", lanes(64), grid=2)[1])
    same = execute("setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%rd2], 7;", lanes(64), grid=2)[1]
    assert kinds(same) == {"unordered writes of the same value"} and not same[0].severe
    assert not execute("red.global.add.u32 [%rd2], 1;", lanes(64), grid=2)[1]


def test_addresses_of_parameters_are_generic_after_cvta():
    """Of 32 bits, as Triton 3.9 writes them, and of 64 they come out the same."""
    body = """
     mov.b32 %r8, b; cvt.u64.u32 %rd6, %r8; cvta.param.u64 %rd7, %rd6; mov.b64 %rd8, b; cvta.param.u64 %rd9, %rd8;
     xor.b64 %rd10, %rd7, %rd9; cvt.u32.u64 %r6, %rd10; shr.u64 %rd11, %rd7, 56; cvt.u32.u64 %r9, %rd11;
     shl.b32 %r9, %r9, 8; or.b32 %r6, %r6, %r9;
    """
    out, found = execute(body + STORE, lanes())
    assert not found and set(out.tolist()) == {3 << 8}


def test_barrier_that_a_warp_misses():
    """The others pass once it has ended; where it waits at another barrier, nobody goes on."""
    body = "setp.lt.u32 %p1, %r1, 32; mov.b32 %r6, 1; @%p1 bra A; bar.sync 1; bra B; A: bar.sync 0; B: " + STORE
    assert "deadlock" in kinds(execute(body, lanes(64), threads=64)[1])


def test_copy_that_is_not_waited_for():
    body = """
     mov.b32 %r10, smem; shl.b32 %r11, %r1, 2; add.u32 %r11, %r10, %r11;
     cp.async.ca.shared.global [%r11], [%rd4], 4; cp.async.commit_group; {wait} ld.shared.b32 %r6, [%r11];
    """ + STORE  # fmt: skip
    x = lanes()
    out, found = execute(body.format(wait="cp.async.wait_group 0;"), x)
    assert not found and out.tolist() == x.tolist()
    out, found = execute(body.format(wait="cp.async.wait_group 1;"), x)
    assert "asynchronous copy read before it was waited for" in kinds(found) and out.tolist() != x.tolist()


def test_lanes_of_a_store_that_differ():
    found = execute("st.global.b32 [%rd2], %r1;", lanes())[1]
    assert kinds(found) == {"lanes of one store write different values to one address"}


def test_unknown_instructions_are_refused():
    for text in ("frobnicate.b32 %r6, %r5;", "add.rz.f32 %f1, %f2, %f3;", "cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2;"):
        with pytest.raises(Unsupported, match=text.split()[0].replace(".", r"\.")):
            execute(text, lanes())


@pytest.mark.parametrize(("instruction", "function"), [
    ("cvt.rn.bf16.f32 %h1, %f1; mov.b16 %h2, 0; mov.b32 %r6, {%h2, %h1};", "bf16"),
    ("cvt.rni.s32.f32 %r6, %f1;", "rint"), ("cvt.rmi.s32.f32 %r6, %f1;", "floor"), ("cvt.rzi.u32.f32 %r6, %f1;", "u32"),
    ("cvt.rmi.f32.f32 %f2, %f1; mov.b32 %r6, %f2;", "ffloor"),
])  # fmt: skip
def test_conversions(instruction, function):
    import torch

    x = torch.cat([torch.randn(27) * 1000, torch.tensor([0.0, -0.0, 0.5, 1.5, float("nan")])])
    out, found = execute("mov.b32 %f1, %r5;" + instruction + STORE, x.numpy().view(numpy.uint32))
    assert not found
    got = torch.from_numpy(out.view(numpy.int32).copy())
    if function == "bf16":
        assert torch.equal(got.view(torch.float32).nan_to_num(7), x.bfloat16().float().nan_to_num(7))
    elif function == "ffloor":
        assert torch.equal(got.view(torch.float32).nan_to_num(7), x.floor().nan_to_num(7))
    else:
        y = x.nan_to_num(0)
        want = {"rint": y.round(), "floor": y.floor(), "u32": y.trunc().clamp(0)}[function]
        assert torch.equal(got.long(), want.long())


FLOATS = """
 mov.b32 %f1, %r5; shl.b32 %r7, %r5, 3; xor.b32 %r8, %r5, 0x80400000; mov.b32 %f2, %r7; mov.b32 %f3, %r8;
"""


@pytest.mark.parametrize(("instruction", "function"), [
    ("max.NaN.f32 %f4, %f1, %f2, %f3;", lambda x, y, z: numpy.max([x, y, z])),
    ("min.f32 %f4, %f1, %f2, %f3;", lambda x, y, z: min([v for v in (x, y, z) if v == v], default=numpy.nan)),
    ("mov.b64 %rd6, {%f1, %f2}; mov.b64 %rd7, {%f3, %f1}; add.rn.f32x2 %rd8, %rd6, %rd7; mov.b64 {%f4, _}, %rd8;",
     lambda x, y, z: x + z),
    ("mov.b64 %rd6, {%f1, %f2}; mov.b64 %rd7, {%f3, %f1}; sub.rn.f32x2 %rd8, %rd6, %rd7; mov.b64 {_, %f4}, %rd8;",
     lambda x, y, z: y - x),
    ("mov.b64 %rd6, {%f1, %f2}; mul.rn.ftz.f32x2 %rd8, %rd6, %rd6; mov.b64 {_, %f4}, %rd8;",
     lambda x, y, z: flushed(flushed(y) * flushed(y))),
    ("mov.b64 %rd6, {%f1, %f2}; mov.b64 %rd7, {%f3, %f3}; fma.rn.f32x2 %rd8, %rd6, %rd6, %rd7; mov.b64 {%f4, _}, %rd8;",
     lambda x, y, z: numpy.float32(numpy.longdouble(x) * x + z)),
    ("mov.b32 {_, %h1}, %r5; fma.rn.f32.bf16 %f4, %h1, %h1, %f2;",
     lambda x, y, z: numpy.float32(numpy.longdouble(upper(x)) * upper(x) + y)),
    ("mov.b32 {_, %h1}, %r5; sub.f32.bf16 %f4, %h1, %f2;", lambda x, y, z: upper(x) - y),
])  # fmt: skip
@numpy.errstate(all="ignore")
def test_floats_of_blackwell(instruction, function):
    """Three inputs, two numbers in 64 bits, and operands of 16 bits to a result of 32."""
    random.seed(2)
    x = numpy.array([*(random.getrandbits(32) & 0xBFFFFFFF for _ in range(28)), 0, 0x7F800000, 0x7FC00001, 3], "u4")
    out, found = execute(FLOATS + instruction + "mov.b32 %r6, %f4;" + STORE, x)
    y, z = (x << numpy.uint32(3)).view("f4"), (x ^ numpy.uint32(0x80400000)).view("f4")
    want = [function(*values) for values in zip(x.view("f4"), y, z, strict=True)]
    assert not found
    numpy.testing.assert_array_equal(out.view("f4"), numpy.array(want, "f4"))


def upper(x):
    """The bf16 number in the upper half of an fp32 number."""
    return (x.view("u4") & numpy.uint32(0xFFFF0000)).view("f4")


def flushed(x):
    return x if not abs(x) < 2.0**-126 else numpy.copysign(numpy.float32(0), x)


def test_processes_that_start_together_build_the_interpreter_once(tmp_path):
    """The compiler is played: it says that it was called, takes a while, and hands out what has been built already."""
    played = tmp_path / "g++"
    built = shlex.quote(runtime.library()._name)
    script = f'echo called >> {tmp_path}/calls\nsleep 1\nfor last; do :; done\ncp {built} "$last"\n'
    played.write_text("#!/bin/sh\n" + script)
    played.chmod(0o755)
    environment = {
        **os.environ, "CXX": str(played), "PTX_EMULATOR_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(runtime.HERE.parent),
    }  # fmt: skip
    command = [sys.executable, "-c", "from ptx_emulator import runtime; runtime.library()"]
    assert not any([process.wait() for process in [subprocess.Popen(command, env=environment) for _ in range(3)]])
    assert (tmp_path / "calls").read_text().split() == ["called"]
