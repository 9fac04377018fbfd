// Reading and writing registers. A register is an array of 32 lanes, a predicate 32 bits.
#pragma once
#include "machine.h"

template <class T>
static inline void put(u8* dst_, const T* t, u32 m) {
  T* dst = (T*)dst_;
  if (m == ~0u) {
    memcpy(dst, t, 32 * sizeof(T));
    return;
  }
  for (int i = 0; i < 32; i++) dst[i] = (m >> i) & 1 ? t[i] : dst[i];
}
// A comparison's result r and its complement q, each joined with a third predicate where the instruction names one.
// x[0]: 0 none, 1 and, 2 or, 3 xor with o[4] (x[1]: negated)
static inline void setpred2(u8* R, const Ins& I, u32 r, u32 q, u32 m) {
  if (I.x[0]) {
    u32 c = *(u32*)(R + I.o[4]);
    if (I.x[1]) c = ~c;
    if (I.x[0] == 1) {
      r &= c;
      q &= c;
    } else if (I.x[0] == 2) {
      r |= c;
      q |= c;
    } else {
      r ^= c;
      q ^= c;
    }
  }
  if (I.o[0] >= 0) {
    u32* d = (u32*)(R + I.o[0]);
    *d = (*d & ~m) | (r & m);
  }
  if (I.o[1] >= 0) {
    u32* d = (u32*)(R + I.o[1]);
    *d = (*d & ~m) | (q & m);
  }
}
static inline void setpred(u8* R, const Ins& I, u32 r, u32 m) { setpred2(R, I, r, ~r, m); }
static inline void addresses(const u8* R, const Ins& I, int base, int width, u64* a) {
  if (base < 0) {
    for (int i = 0; i < 32; i++) a[i] = (u64)I.imm;
  } else if (width == 8) {
    const u64* s = (const u64*)(R + base);
    for (int i = 0; i < 32; i++) a[i] = s[i] + I.imm;
  } else {
    const u32* s = (const u32*)(R + base);
    for (int i = 0; i < 32; i++) a[i] = (u32)(s[i] + (u32)I.imm);
  }
}
static inline void set_lane(u8* R, s32 slot, int width, int lane, u64 v) {
  if (slot < 0) return;
  if (width == 2) ((u16*)(R + slot))[lane] = (u16)v;
  else if (width == 4) ((u32*)(R + slot))[lane] = (u32)v;
  else ((u64*)(R + slot))[lane] = v;
}
static inline u64 get_lane(const u8* R, s32 slot, int width, int lane) {
  return width == 2   ? ((const u16*)(R + slot))[lane]
         : width == 4 ? ((const u32*)(R + slot))[lane]
                      : ((const u64*)(R + slot))[lane];
}
