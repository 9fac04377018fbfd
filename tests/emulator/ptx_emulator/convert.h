// cvt in all forms that the table of ops.py does not hold.
#pragma once
#include "registers.h"

// x: 0 D, 1 S (type codes below), 2 rounding, 3 flags (1 sat, 2 ftz, 4 relu), 4 dst register width, 5 src register
// width
enum { C_U8, C_S8, C_U16, C_S16, C_U32, C_S32, C_U64, C_S64, C_F16, C_BF16, C_F32, C_F64 };
enum { R_NONE, R_RN, R_RZ, R_RM, R_RP, R_RNI, R_RZI, R_RMI, R_RPI };
static f64 to_integer(f64 x, int mode) {
  return mode == R_RZI   ? std::trunc(x)
         : mode == R_RMI ? std::floor(x)
         : mode == R_RPI ? std::ceil(x)
                         : std::nearbyint(x);
}
static f32 to_f32(f64 x, int mode) {
  f32 r = (f32)x;
  if (x != x || std::isinf(x) || mode <= R_RN || (f64)r == x) return canon(r);
  bool up = mode == R_RP || (mode == R_RZ && x < 0);
  bool is_up = (f64)r > x;
  return up == is_up ? r : std::nextafterf(r, up ? INFINITY : -INFINITY);
}
template <class T>
static u64 sat_to(f64 x) {
  return (u64)(s64)f2i<T>(x);
}
static void convert(u8* R, const Ins& I, u32 m) {
  for (int i = 0; i < 32; i++) {
    if (!((m >> i) & 1)) continue;
    u64 raw = get_lane(R, I.o[1], I.x[5], i);
    f64 v = 0;
    s64 k = 0;
    bool isf = false;
    int S = I.x[1], D = I.x[0];
    switch (S) {
      case C_U8: k = (u8)raw; break;
      case C_S8: k = (s8)raw; break;
      case C_U16: k = (u16)raw; break;
      case C_S16: k = (s16)raw; break;
      case C_U32: k = (u32)raw; break;
      case C_S32: k = (s32)raw; break;
      case C_U64:
      case C_S64: k = (s64)raw; break;
      case C_F16:
        v = f32_of_f16(raw);
        isf = true;
        break;
      case C_BF16:
        v = f32_of_bf16(raw);
        isf = true;
        break;
      case C_F32: {
        f32 f = bitcast<f32>((u32)raw);
        if (I.x[3] & 2) f = fz(f);
        v = f;
        isf = true;
        break;
      }
      case C_F64:
        v = bitcast<f64>(raw);
        isf = true;
        break;
    }
    u64 out = 0;
    if (D >= C_F16) {
      f64 y = v;
      f32 y32;
      if (isf) {
        if (I.x[2] >= R_RNI && y == y && !std::isinf(y)) {
          f64 z = to_integer(y, I.x[2]);
          y = z == 0 ? std::copysign(0.0, y) : z;
        }
        y32 = to_f32(y, I.x[2]);
      } else {
        y = S == C_U64 ? (f64)(u64)k : (f64)k;
        y32 = S == C_U64 ? (f32)(u64)k : (f32)k;
        if (I.x[2] > R_RN && I.x[2] < R_RNI) y32 = to_f32(y, I.x[2]);
      }
      if (I.x[3] & 1) {
        y = y > 0 ? (y < 1 ? y : 1) : 0;
        y32 = sat01(y32);
      }
      if (I.x[3] & 4) {
        y = y < 0 ? 0 : y;
        y32 = relu_(y32);
      }
      if (D == C_F64) out = bitcast<u64>(y);
      else if (D == C_F32) {
        if (I.x[3] & 2) y32 = fz(y32);
        out = bitcast<u32>(y32);
      } else if (D == C_F16) out = f16_of(y32);
      else out = I.x[2] == R_RZ ? bf16_rz(y32) : bf16_of(y32);
    } else if (isf) {
      f64 y = v == v ? to_integer(v, I.x[2]) : v;
      switch (D) {
        case C_U8: out = sat_to<u8>(y); break;
        case C_S8: out = sat_to<s8>(y); break;
        case C_U16: out = sat_to<u16>(y); break;
        case C_S16: out = sat_to<s16>(y); break;
        case C_U32: out = sat_to<u32>(y); break;
        case C_S32: out = sat_to<s32>(y); break;
        case C_U64: out = f2i<u64>(y); break;
        default: out = sat_to<s64>(y);
      }
    } else {
      if (I.x[3] & 1) {
        bool big = S == C_U64 && k < 0;
        s128 z = big ? (s128)(u64)k : (s128)k;
        auto clip = [&](s128 lo, s128 hi) { z = z < lo ? lo : z > hi ? hi : z; };
        switch (D) {
          case C_U8: clip(0, 255); break;
          case C_S8: clip(-128, 127); break;
          case C_U16: clip(0, 65535); break;
          case C_S16: clip(-32768, 32767); break;
          case C_U32: clip(0, UINT32_MAX); break;
          case C_S32: clip(INT32_MIN, INT32_MAX); break;
          case C_S64: clip(INT64_MIN, INT64_MAX); break;
          case C_U64: clip(0, UINT64_MAX); break;
        }
        k = (s64)z;
      }
      switch (D) {
        case C_U8: k = (u8)k; break;
        case C_S8: k = (s8)k; break;
        case C_U16: k = (u16)k; break;
        case C_S16: k = (s16)k; break;
        case C_U32: k = (u32)k; break;
        case C_S32: k = (s32)k; break;
      }
      out = (u64)k;
    }
    set_lane(R, I.o[0], I.x[4], i, out);
  }
}
