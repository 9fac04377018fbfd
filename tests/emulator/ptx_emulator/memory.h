// Loads, stores, atomics, asynchronous copies (cp.async) and matrices through shared memory; sectors and bank conflicts.
#pragma once
#include "registers.h"

void Machine::count_memory(const Ins& I, int pc, const u64* a, u32 m, u32 n, int space) {
  if (!m) return;
  if (space == SP_GLOBAL) {
    u64 seen_[32 * 17];
    int k = 0;
    for (int i = 0; i < 32; i++)
      if ((m >> i) & 1)
        for (u64 s = a[i] >> 5; s <= (a[i] + n - 1) >> 5; s++) seen_[k++] = s;
    std::sort(seen_, seen_ + k);
    L->sectors[pc] += std::unique(seen_, seen_ + k) - seen_;
    L->requests[pc]++;
  } else if (space == SP_SHARED) {  // wavefronts: 32 banks of 4 bytes; wide accesses go in quarters or halves
    int lanes = n >= 16 ? 8 : n >= 8 ? 16 : 32;
    u64 waves = 0;
    for (int first = 0; first < 32; first += lanes) {
      std::vector<u64> banks[32];
      size_t most = 0;
      for (int i = first; i < first + lanes; i++)
        if ((m >> i) & 1)
          for (u64 wd = a[i] >> 2; wd <= (a[i] + n - 1) >> 2; wd++) {
            auto& b = banks[wd & 31];
            if (std::find(b.begin(), b.end(), wd) == b.end()) b.push_back(wd);
            most = std::max(most, b.size());
          }
      waves += most > 1 ? most - 1 : 0;
    }
    L->conflicts[pc] += waves;
    L->requests[pc]++;
  }
}

template <class T>
static T combine(int op, T old, T b, T c) {
  switch (op) {
    case 0: return old + b;
    case 1: return old < b ? old : b;
    case 2: return old > b ? old : b;
    case 6: return b;
    case 7: return old == b ? c : old;
    case 8: return old >= b ? 0 : old + 1;
    case 9: return old == 0 || old > b ? b : old - 1;
  }
  return old;
}
static u64 combine_bits(int op, u64 old, u64 b, u64 c) {
  switch (op) {
    case 3: return old & b;
    case 4: return old | b;
    case 5: return old ^ b;
    case 6: return b;
    case 7: return old == b ? c : old;
  }
  return old;
}
enum { T_U32, T_S32, T_U64, T_S64, T_F32, T_F64, T_F16, T_BF16, T_F16X2, T_BF16X2, T_B16, T_B32, T_B64 };
// o[0] dst or -1, o[1] base, o[2] b, o[3] c; x: 0 op, 1 type, 2 size, 3 space, 4 base width, 5 semantics, 6 reg width,
// 7 lanes of a vector
void Machine::atomic(Warp& w, const Ins& I, int pc, u32 m) {
  alignas(64) u64 a[32];
  u8* R = w.R;
  addresses(R, I, I.o[1], I.x[4], a);
  if (L->requests && (L->checks & COUNT_MEMORY)) count_memory(I, pc, a, m, I.x[2] * std::max<int>(1, I.x[7]), I.x[3]);
  int first = below(32), nvec = std::max<int>(1, I.x[7]);
  for (int j = 0; j < 32; j++) {
    int i = (first + j) & 31;
    if (!((m >> i) & 1)) continue;
    bool global = I.x[3] != SP_SHARED && !(a[i] >= SHARED_WINDOW);
    bool rel = (I.x[5] & SEM_RELEASE) || w.fenced, acq = I.x[5] & SEM_ACQUIRE;
    u8* p = at(w, I, pc, i, a[i], I.x[2] * nvec, I.x[3], true, true);
    if (!p) {
      if (I.o[0] >= 0) set_lane(R, I.o[0], I.x[6], i, 0);
      continue;
    }
    for (int v = 0; v < nvec; v++, p += I.x[2]) {
      s32 d = nvec > 1 ? I.o[4 + v] : I.o[0], sb = nvec > 1 ? I.o[12 + v] : I.o[2];
      u64 old = 0;
      memcpy(&old, p, I.x[2]);
      u64 b = get_lane(R, sb, I.x[6], i), c = I.o[3] >= 0 ? get_lane(R, I.o[3], I.x[6], i) : 0, r = 0;
      int op = I.x[0];
      switch (I.x[1]) {
        case T_U32: r = combine<u32>(op, old, b, c); break;
        case T_S32: r = (u32)combine<s32>(op, old, b, c); break;
        case T_U64: r = combine<u64>(op, old, b, c); break;
        case T_S64: r = combine<s64>(op, old, b, c); break;
        case T_F32: r = bitcast<u32>(canon(combine<f32>(op, bitcast<f32>((u32)old), bitcast<f32>((u32)b), 0))); break;
        case T_F64: r = bitcast<u64>(combine<f64>(op, bitcast<f64>(old), bitcast<f64>(b), 0)); break;
        case T_F16: r = f16_of(combine<f32>(op, f32_of_f16(old), f32_of_f16(b), 0)); break;
        case T_BF16: r = bf16_of(combine<f32>(op, f32_of_bf16(old), f32_of_bf16(b), 0)); break;
        case T_F16X2:
          r = pair([&](u16 x, u16 y) -> u16 { return f16_of(combine<f32>(op, f32_of_f16(x), f32_of_f16(y), 0)); },
                   (u32)old, (u32)b);
          break;
        case T_BF16X2:
          r = pair([&](u16 x, u16 y) -> u16 { return bf16_of(combine<f32>(op, f32_of_bf16(x), f32_of_bf16(y), 0)); },
                   (u32)old, (u32)b);
          break;
        default: r = combine_bits(op, old, b, c);
      }
      memcpy(p, &r, I.x[2]);
      if (d >= 0) set_lane(R, d, I.x[6], i, old);
    }
    if (global && (L->checks & CHECK_GLOBAL_RACE)) {
      if (acq) acquire(w, a[i]);
      else w.relaxed.push_back(a[i]);
      if (rel) release(w, a[i]);
    }
  }
}


// o[0..] dst, x: 0 esize, 1 nvec, 2 dst width, 3 signed
void Machine::load_parameter(Warp& w, const Ins& I, int pc, u32 m) {
  u8* const R = w.R;
  for (int v = 0; v < I.x[1]; v++) {
    u64 raw = 0;
    memcpy(&raw, L->params + I.imm + v * I.x[0], I.x[0]);
    if (I.x[3])
      raw = I.x[0] == 1   ? (u64)(s64)(s8)raw
            : I.x[0] == 2 ? (u64)(s64)(s16)raw
            : I.x[0] == 4 ? (u64)(s64)(s32)raw
                          : raw;
    for (int i = 0; i < 32; i++)
      if ((m >> i) & 1) set_lane(R, I.o[v], I.x[2], i, raw);
  }
}

// o[0..7] dst, o[8] base; x: 0 esize, 1 nvec, 2 dst width, 3 signed, 4 space, 5 base width, 6 semantics
void Machine::load(Warp& w, const Ins& I, int pc, u32 m) {
  u8* const R = w.R;
  const bool counting = L->checks & COUNT_MEMORY;
  alignas(64) u64 a[32];
  addresses(R, I, I.o[8], I.x[5], a);
  const u32 es = I.x[0], nv = I.x[1], n = es * nv, dw = I.x[2];
  if (counting) count_memory(I, pc, a, m, n, I.x[4]);
  for (u32 rest = m; rest; rest &= rest - 1) {
    int i = __builtin_ctz(rest);
    u8* p = at(w, I, pc, i, a[i], n, I.x[4], false, I.x[6] != 0);
    if (!p) {
      for (u32 v = 0; v < nv; v++) set_lane(R, I.o[v], dw, i, 0xBADBADBADBADBADull);
      continue;
    }
    if (es == 4 && dw == 4) {
      for (u32 v = 0; v < nv; v++)
        if (I.o[v] >= 0) ((u32*)(R + I.o[v]))[i] = ((u32*)p)[v];
    } else
      for (u32 v = 0; v < nv; v++) {
        u64 raw = 0;
        memcpy(&raw, p + v * es, es);
        if (I.x[3])
          raw = es == 1 ? (u64)(s64)(s8)raw : es == 2 ? (u64)(s64)(s16)raw : es == 4 ? (u64)(s64)(s32)raw : raw;
        set_lane(R, I.o[v], dw, i, raw);
      }
    if (I.x[6] && (L->checks & CHECK_GLOBAL_RACE)) {
      if (I.x[6] & SEM_ACQUIRE) acquire(w, a[i]);
      else w.relaxed.push_back(a[i]);
    }
  }
}

void Machine::store(Warp& w, const Ins& I, int pc, u32 m) {
  u8* const R = w.R;
  Cta* const c = w.cta;
  const bool counting = L->checks & COUNT_MEMORY;
  alignas(64) u64 a[32];
  addresses(R, I, I.o[8], I.x[5], a);
  const u32 es = I.x[0], nv = I.x[1], n = es * nv, dw = I.x[2];
  if (counting) count_memory(I, pc, a, m, n, I.x[4]);
  int first = below(32);
  for (int j = 0; j < 32; j++) {
    int i = (first + j) & 31;
    if (!((m >> i) & 1)) continue;
    if (I.x[6] & SEM_RELEASE) release(w, a[i]);
    else if (I.x[6] && w.fenced) release(w, a[i]);
    alignas(8) u8 value[72];
    for (u32 v = 0; v < nv; v++) {
      u64 raw = get_lane(R, I.o[v], dw, i);
      memcpy(value + v * es, &raw, 8);
    }
    u8* p = at(w, I, pc, i, a[i], n, I.x[4], true, I.x[6] != 0, value);
    if (p) memcpy(p, value, n);
  }
  if (L->checks & CHECK_MEM)  // lanes of one store that differ at one address: which one stays is not defined
    for (int i = 0; i < 32; i++)
      if (((m >> i) & 1))
        for (int j = i + 1; j < 32; j++)
          if (((m >> j) & 1) && a[i] == a[j]) {
            for (u32 v = 0; v < nv; v++) {
              u64 keep = es == 8 ? ~0ull : (1ull << (8 * es)) - 1;
              if ((get_lane(R, I.o[v], dw, i) ^ get_lane(R, I.o[v], dw, j)) & keep) {
                report(WW_SAME_INSTR, pc, j, &w, a[i], pc, w.id, c->linear,
                       "lanes of one store differ at one address");
                break;
              }
            }
          }
}

// o[0] dst base (shared), o[1] src base (global), o[2] source bytes or -1, imm: packed offsets; x: 0 size
void Machine::copy_async(Warp& w, const Ins& I, int pc, u32 m) {
  u8* const R = w.R;
  const u32* d = (const u32*)(R + I.o[0]);
  const u64* s = (const u64*)(R + I.o[1]);
  for (u32 rest = m; rest; rest &= rest - 1) {
    int i = __builtin_ctz(rest);
    u32 n = I.x[0], have = I.o[2] >= 0 ? std::min<u32>(n, get_lane(R, I.o[2], 4, i)) : n;
    u64 dst = (u32)(d[i] + (s32)(I.imm & 0xffffffff)), src = s[i] + (s64)(s32)(I.imm >> 32);
    if (dst % n || src % n) {
      report(MISALIGNED, pc, i, &w, dst % n ? dst : src);
      continue;
    }
    if (!shared_ok(w, pc, i, dst, n)) continue;
    if (have && (L->checks & CHECK_MEM) && !inside(src, have)) {
      report(OOB_GLOBAL, pc, i, &w, src, -1, -1, -1, "read");
      continue;
    }
    if (have && (L->checks & CHECK_GLOBAL_RACE)) track_global(w, pc, i, src, have, false, false);
    if (L->checks & CHECK_SHARED_RACE) track_shared(w, pc, i, dst, n, true);
    w.open.push_back(Copy{dst, src, n, n - have, pc});
  }
}

// o[0..3] dst, o[8] base; x: 0 matrices, 1 transposed
void Machine::load_matrices(Warp& w, const Ins& I, int pc, u32 m) {
  u8* const R = w.R;
  const bool counting = L->checks & COUNT_MEMORY;
  alignas(64) u64 a[32];
  addresses(R, I, I.o[8], I.x[5], a);
  int n = I.x[0];
  u16 rows[4][8][8];
  for (int k = 0; k < n * 8; k++) {
    u8* p = at(w, I, pc, k, a[k], 16, SP_SHARED, false, false);
    if (p) memcpy(rows[k >> 3][k & 7], p, 16);
    else memset(rows[k >> 3][k & 7], 0xBA, 16);
  }
  if (counting) count_memory(I, pc, a, n == 4 ? ~0u : (1u << (8 * n)) - 1, 16, SP_SHARED);
  for (int k = 0; k < n; k++)
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = 2 * (l & 3);
      ((u32*)(R + I.o[k]))[l] = I.x[1] ? rows[k][t][g] | ((u32)rows[k][t + 1][g] << 16)
                                       : rows[k][g][t] | ((u32)rows[k][g][t + 1] << 16);
    }
}

void Machine::store_matrices(Warp& w, const Ins& I, int pc, u32 m) {
  u8* const R = w.R;
  alignas(64) u64 a[32];
  addresses(R, I, I.o[8], I.x[5], a);
  int n = I.x[0];
  u16 rows[4][8][8];
  for (int k = 0; k < n; k++)
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = 2 * (l & 3);
      u32 v = ((u32*)(R + I.o[k]))[l];
      if (I.x[1]) {
        rows[k][t][g] = (u16)v;
        rows[k][t + 1][g] = (u16)(v >> 16);
      } else {
        rows[k][g][t] = (u16)v;
        rows[k][g][t + 1] = (u16)(v >> 16);
      }
    }
  for (int k = 0; k < n * 8; k++) {
    u8* p = at(w, I, pc, k, a[k], 16, SP_SHARED, true, false);
    if (p) memcpy(p, rows[k >> 3][k & 7], 16);
  }
}
