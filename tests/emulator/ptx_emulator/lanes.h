// What one lane computes: the functions that the generated cases (ops.py) and the other files call.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <algorithm>
#include <array>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <type_traits>
#include <unordered_map>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;
typedef double f64;
typedef unsigned __int128 u128;
typedef __int128 s128;

// ---- lane arithmetic ----------------------------------------------------------------------------------------------
template <class D, class S>
static inline D bitcast(S s) {
  D d;
  static_assert(sizeof(D) == sizeof(S));
  memcpy(&d, &s, sizeof d);
  return d;
}
static inline f32 canon(f32 x) { return x != x ? bitcast<f32>(0x7fffffffu) : x; }
static inline f64 canon(f64 x) { return x; }
static inline f32 fz(f32 x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.f, x) : x; }
static inline f32 sat01(f32 x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }  // NaN -> 0
static inline f32 relu_(f32 x) { return x < 0 ? 0.f : x; }
template <int NAN_, class T>
static inline T fmin_(T a, T b) {
  bool pick_a = (a < b) | ((a == b) & (__builtin_copysign((T)1, a) < 0));
  T r = pick_a ? a : b;
  if (NAN_) return (a != a) | (b != b) ? (T)canon((T)NAN) : r;
  return a != a ? canon(b) : (b != b ? a : r);
}
template <int NAN_, class T>
static inline T fmax_(T a, T b) {
  bool pick_a = (a > b) | ((a == b) & (__builtin_copysign((T)1, a) > 0));
  T r = pick_a ? a : b;
  if (NAN_) return (a != a) | (b != b) ? (T)canon((T)NAN) : r;
  return a != a ? canon(b) : (b != b ? a : r);
}
static inline f32 f32_of_bf16(u16 x) { return bitcast<f32>((u32)x << 16); }
static inline u16 bf16_of(f32 x) {
  u32 b = bitcast<u32>(x);
  u32 r = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return x != x ? 0x7fff : (u16)r;
}
static inline u16 bf16_rz(f32 x) { return x != x ? 0x7fff : (u16)(bitcast<u32>(x) >> 16); }
static inline f32 f32_of_f16(u16 x) { return (f32)bitcast<_Float16>(x); }
static inline u16 f16_of(f32 x) { return x != x ? 0x7fff : bitcast<u16>((_Float16)x); }
static inline u32 tf32_rna(u32 a) { return (a & 0x7f800000u) == 0x7f800000u ? a : (a + 0x1000u) & 0xffffe000u; }
static inline u32 tf32_rn(u32 a) {
  return (a & 0x7f800000u) == 0x7f800000u ? a : (a + 0xfffu + ((a >> 13) & 1)) & 0xffffe000u;
}
static inline s32 sat32(s64 x) { return x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : (s32)x; }
template <class T>
static inline T f2i(f64 x) {  // rounds to zero, saturates, NaN -> 0
  if (x != x) return 0;
  f64 lo = (f64)(std::is_signed<T>::value ? -std::ldexp(1.0, sizeof(T) * 8 - 1) : 0.0);
  f64 hi = std::ldexp(1.0, sizeof(T) * 8 - (std::is_signed<T>::value ? 1 : 0));
  if (x < lo) return std::numeric_limits<T>::min();
  if (x >= hi) return std::numeric_limits<T>::max();
  return (T)x;
}
template <class T>
static inline T bfe(T a, u32 pos, u32 len) {
  const int N = sizeof(T) * 8;
  typedef typename std::make_unsigned<T>::type Un;
  pos &= 255;
  len &= 255;
  if (std::is_signed<T>::value) {
    if (len == 0) return 0;
    T sign = pos + len - 1 >= (u32)N ? (a < 0) : (((Un)a >> (pos + len - 1)) & 1);
    Un v = pos >= (u32)N ? 0 : (Un)a >> pos;
    if (len < (u32)N) v &= (((Un)1 << len) - 1);
    if (pos + len > (u32)N) {
      u32 have = pos >= (u32)N ? 0 : N - pos;
      if (sign && have < (u32)N) v |= ~(Un)0 << have;
    } else if (sign && len < (u32)N) v |= ~(Un)0 << len;
    return (T)v;
  }
  Un v = pos >= (u32)N ? 0 : (Un)a >> pos;
  return len >= (u32)N ? (T)v : (T)(v & (((Un)1 << len) - 1));
}
template <class T>
static inline T bfi(T a, T b, u32 pos, u32 len) {
  const u32 N = sizeof(T) * 8;
  pos &= 255;
  len &= 255;
  if (pos >= N || len == 0) return b;
  T mask = (len >= N ? ~(T)0 : (((T)1 << len) - 1)) << pos;
  return (b & ~mask) | ((a << pos) & mask);
}
template <class T>
static inline u32 bfind(T a) {
  if (std::is_signed<T>::value && a < 0) a = ~a;
  u64 v = (u64)(typename std::make_unsigned<T>::type)a;
  return v ? 63 - __builtin_clzll(v) : ~0u;
}
template <class T>
static inline T brev(T a) {
  T r = 0;
  for (unsigned i = 0; i < sizeof(T) * 8; i++) {
    r = (r << 1) | (a & 1);
    a >>= 1;
  }
  return r;
}
static inline u32 lop3(u32 a, u32 b, u32 c, u32 t) {
  u32 r = 0;
  for (int k = 0; k < 8; k++) {
    u32 s = -((t >> k) & 1);
    r |= s & (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  }
  return r;
}
static inline u32 prmt(u32 a, u32 b, u32 sel) {
  u64 v = ((u64)b << 32) | a;
  u32 r = 0;
  for (int k = 0; k < 4; k++) {
    u32 s = (sel >> (4 * k)) & 15;
    u32 byte = (u32)(v >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << (8 * k);
  }
  return r;
}
static inline s32 dp4a(u32 a, u32 b, s32 c) {
  for (int k = 0; k < 4; k++) c += (s32)(s8)(a >> 8 * k) * (s8)(b >> 8 * k);
  return c;
}
template <class F>
static inline u32 pair(F f, u32 a) {
  return (u32)f((u16)a) | ((u32)f((u16)(a >> 16)) << 16);
}
template <class F>
static inline u32 pair(F f, u32 a, u32 b) {
  return (u32)f((u16)a, (u16)b) | ((u32)f((u16)(a >> 16), (u16)(b >> 16)) << 16);
}
template <class F>
static inline u32 pair(F f, u32 a, u32 b, u32 c) {
  return (u32)f((u16)a, (u16)b, (u16)c) | ((u32)f((u16)(a >> 16), (u16)(b >> 16), (u16)(c >> 16)) << 16);
}
// Two fp32 numbers in 64 bits, each half by itself.
template <class F, class... T>
static inline u64 pair_f32(F f, T... packed) {
  const u32 low = bitcast<u32>((f32)f(bitcast<f32>((u32)packed)...));
  const u32 high = bitcast<u32>((f32)f(bitcast<f32>((u32)(packed >> 32))...));
  return (u64)high << 32 | low;
}

#ifdef __AVX512DQ__
#include <immintrin.h>
#endif
static inline u32 bits(const s32* t) {
#ifdef __AVX512DQ__
  return (u32)_mm512_movepi32_mask(_mm512_load_si512(t)) | ((u32)_mm512_movepi32_mask(_mm512_load_si512(t + 16)) << 16);
#else
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= (u32)(t[i] & 1) << i;
  return r;
#endif
}
