// Instructions through which the lanes of a warp see one another, and the packing of registers.
#pragma once
#include "registers.h"

// o[0] dst, o[1..] parts; x: 0 parts, 1 part width
void Machine::pack(Warp& w, const Ins& I, int pc, u32 m) {
  u8* const R = w.R;
  int n = I.x[0], pw = I.x[1], bits_ = pw * 8;
  if (n == 2 && pw == 4) {
    alignas(64) u64 t[32];
    const u32 *a = (u32*)(R + I.o[1]), *b = (u32*)(R + I.o[2]);
    for (int i = 0; i < 32; i++) t[i] = a[i] | ((u64)b[i] << 32);
    put<u64>(R + I.o[0], t, m);
    return;
  }
  if (n == 2 && pw == 2) {
    alignas(64) u32 t[32];
    const u16 *a = (u16*)(R + I.o[1]), *b = (u16*)(R + I.o[2]);
    for (int i = 0; i < 32; i++) t[i] = a[i] | ((u32)b[i] << 16);
    put<u32>(R + I.o[0], t, m);
    return;
  }
  for (int i = 0; i < 32; i++)
    if ((m >> i) & 1) {
      u64 v = 0;
      for (int k = 0; k < n; k++)
        v |= (get_lane(R, I.o[1 + k], pw == 1 ? 2 : pw, i) & (bits_ == 64 ? ~0ull : (1ull << bits_) - 1))
             << (bits_ * k);
      set_lane(R, I.o[0], n * pw, i, v);
    }
}

// o[0] src, o[1..] parts (-1: unused)
void Machine::unpack(Warp& w, const Ins& I, int pc, u32 m) {
  u8* const R = w.R;
  int n = I.x[0], pw = I.x[1], bits_ = pw * 8;
  if (n == 2 && pw == 4) {
    alignas(64) u32 t[32];
    const u64* s = (u64*)(R + I.o[0]);
    for (int k = 0; k < 2; k++)
      if (I.o[1 + k] >= 0) {
        for (int i = 0; i < 32; i++) t[i] = (u32)(s[i] >> (32 * k));
        if (I.o[0] == I.o[1 + k]) continue;
        put<u32>(R + I.o[1 + k], t, m);
      }
    return;
  }
  if (n == 2 && pw == 2) {
    alignas(64) u16 t[2][32];
    const u32* s = (u32*)(R + I.o[0]);
    for (int i = 0; i < 32; i++) {
      t[0][i] = (u16)s[i];
      t[1][i] = (u16)(s[i] >> 16);
    }
    for (int k = 0; k < 2; k++)
      if (I.o[1 + k] >= 0) put<u16>(R + I.o[1 + k], t[k], m);
    return;
  }
  for (int i = 0; i < 32; i++)
    if ((m >> i) & 1) {
      u64 v = get_lane(R, I.o[0], n * pw, i);
      for (int k = 0; k < n; k++)
        if (I.o[1 + k] >= 0)
          set_lane(R, I.o[1 + k], pw == 1 ? 2 : pw, i,
                   (v >> (bits_ * k)) & (bits_ == 64 ? ~0ull : (1ull << bits_) - 1));
    }
}

// o[0] dst, o[1] pred or -1, o[2] src, o[3] b, o[4] c, o[5] member mask; x[0]: 0 up 1 down 2 bfly 3 idx
void Machine::shuffle(Warp& w, const Ins& I, int pc, u32 m) {
  u8* const R = w.R;
  const u32 *s = (u32*)(R + I.o[2]), *b = (u32*)(R + I.o[3]), *cc = (u32*)(R + I.o[4]);
  alignas(64) u32 t[32];
  u32 p = 0;
  for (int i = 0; i < 32; i++) {
    u32 bv = b[i] & 31, cv = cc[i] & 31, seg = (cc[i] >> 8) & 31;
    int maxl = (i & seg) | (cv & ~seg), minl = i & seg, j = i;
    bool ok;
    switch (I.x[0]) {
      case 0:
        j = i - (int)bv;
        ok = j >= maxl;
        break;
      case 1:
        j = i + bv;
        ok = j <= maxl;
        break;
      case 2:
        j = i ^ bv;
        ok = j <= maxl;
        break;
      default: j = minl | (bv & ~seg); ok = j <= maxl;
    }
    if (!ok) j = i;
    t[i] = s[j];
    p |= (u32)ok << i;
    if (((m >> i) & 1) && !((m >> j) & 1)) {
      report(SHFL_INACTIVE, pc, i, &w, 0, -1, -1, -1, "source lane is inactive");
      t[i] = 0xDEADBEEF;
    }
  }
  put<u32>(R + I.o[0], t, m);
  if (I.o[1] >= 0) {
    u32* d = (u32*)(R + I.o[1]);
    *d = (*d & ~m) | (p & m);
  }
}

// o[0] dst, o[1] pred source, o[2] member; x[0]: 0 all 1 any 2 uni; x[1] negated
void Machine::vote(Warp& w, const Ins& I, int pc, u32 m) {
  u8* const R = w.R;
  u32 s = *(u32*)(R + I.o[1]);
  if (I.x[1]) s = ~s;
  s &= m;
  if (I.op == OP_ballot) {
    alignas(64) u32 t[32];
    for (int i = 0; i < 32; i++) t[i] = s;
    put<u32>(R + I.o[0], t, m);
  } else {
    bool r = I.x[0] == 0 ? s == m : I.x[0] == 1 ? s != 0 : (s == m || s == 0);
    u32* d = (u32*)(R + I.o[0]);
    *d = (*d & ~m) | (r ? m : 0);
  }
}

// o[0] dst, o[1] pred or -1, o[2] src, o[3] member; x[0] width
void Machine::match(Warp& w, const Ins& I, int pc, u32 m) {
  u8* const R = w.R;
  alignas(64) u32 t[32];
  u64 f = get_lane(R, I.o[2], I.x[0], __builtin_ctz(m));
  bool all = true;
  for (int i = 0; i < 32; i++) {
    t[i] = 0;
    if (!((m >> i) & 1)) continue;
    u64 v = get_lane(R, I.o[2], I.x[0], i);
    all &= v == f;
    for (int j = 0; j < 32; j++)
      if (((m >> j) & 1) && get_lane(R, I.o[2], I.x[0], j) == v) t[i] |= 1u << j;
  }
  if (I.op == OP_match_all) {
    for (int i = 0; i < 32; i++) t[i] = all ? m : 0;
    if (I.o[1] >= 0) {
      u32* d = (u32*)(R + I.o[1]);
      *d = (*d & ~m) | (all ? m : 0);
    }
  }
  put<u32>(R + I.o[0], t, m);
}

// o[0] dst, o[1] src, o[2] member; x[0] op 0 add 1 min 2 max 3 and 4 or 5 xor; x[1] 0 unsigned 1 signed 2 f32; x[2]
// NaN
void Machine::reduce_warp(Warp& w, const Ins& I, int pc, u32 m) {
  u8* const R = w.R;
  const u32* s = (u32*)(R + I.o[1]);
  u32 first = __builtin_ctz(m), r = s[first];
  for (u32 rest = m & (m - 1); rest; rest &= rest - 1) {
    u32 v = s[__builtin_ctz(rest)];
    if (I.x[1] == 2) {
      f32 p = bitcast<f32>(r), q = bitcast<f32>(v);
      r = bitcast<u32>(I.x[0] == 1 ? (I.x[2] ? fmin_<1>(p, q) : fmin_<0>(p, q))
                                   : (I.x[2] ? fmax_<1>(p, q) : fmax_<0>(p, q)));
      continue;
    }
    switch (I.x[0]) {
      case 0: r += v; break;
      case 1: r = I.x[1] ? ((s32)v < (s32)r ? v : r) : std::min(r, v); break;
      case 2: r = I.x[1] ? ((s32)v > (s32)r ? v : r) : std::max(r, v); break;
      case 3: r &= v; break;
      case 4: r |= v; break;
      default: r ^= v;
    }
  }
  alignas(64) u32 t[32];
  for (int i = 0; i < 32; i++) t[i] = r;
  put<u32>(R + I.o[0], t, m);
}
