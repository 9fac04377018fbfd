#pragma once
#include "registers.h"

// Hopper's asynchronous instructions. What may still be in flight is done as late as the program allows it: a tensor
// copy when its mbarrier is waited for, a wgmma when its group is; so reading too early reads old values.
static const u64 PARAM_WINDOW = 3ull << 56;
struct Tensor {
  u64 base;
  int rank, esize, swizzle, nan;
  u32 box[5];
  u64 shape[5], stride[5];
};

static bool tensor_of(const Launch* L, u64 a, Tensor& t) {
  const u64* d =
      a >= PARAM_WINDOW && a < PARAM_WINDOW + (1ull << 32) ? (const u64*)(L->params + (a - PARAM_WINDOW)) : nullptr;
  if (!d || d[0] != 0x54454E534F524D41ull) return false;
  t.base = d[1];
  t.rank = d[2] & 255;
  t.esize = (d[2] >> 8) & 255;
  t.swizzle = (d[2] >> 16) & 255;
  t.nan = (d[2] >> 24) & 1;
  for (int k = 0; k < 5; k++) t.box[k] = (u32)(k & 1 ? d[3 + k / 2] >> 32 : d[3 + k / 2]);
  for (int k = 0; k < 5; k++) t.shape[k] = d[6 + k];
  t.stride[0] = t.esize;
  for (int k = 1; k < 5; k++) t.stride[k] = d[10 + k];
  return true;
}
static inline u64 swizzled(u64 a, int mode) {  // 1: 32 bytes, 2: 64, 3: 128
  return mode == 3 ? a ^ ((a >> 3) & 0x70) : mode == 2 ? a ^ ((a >> 3) & 0x30) : mode == 1 ? a ^ ((a >> 3) & 0x10) : a;
}
// (shared address, global address or 0, bytes, bytes beyond the edge) in pieces of 16 bytes
template <class F>
static void tensor_pieces(const Tensor& t, u64 smem, const s32* at, F f) {
  u64 rows = 1;
  for (int k = 1; k < t.rank; k++) rows *= t.box[k];
  u32 inner = t.box[0] * t.esize;
  for (u64 r = 0; r < rows; r++) {
    u64 rest = r, g = t.base;
    bool in = true;
    for (int k = 1; k < t.rank; k++) {
      s64 c = (s64)at[k] + rest % t.box[k];
      rest /= t.box[k];
      if (c < 0 || c >= (s64)t.shape[k]) in = false;
      else g += c * t.stride[k];
    }
    for (u32 b = 0; b < inner; b += 16) {
      u32 n = std::min<u32>(16, inner - b);
      s64 e = (s64)at[0] + b / t.esize;
      s64 have = in && e >= 0 && e < (s64)t.shape[0] ? std::min<s64>(n, ((s64)t.shape[0] - e) * t.esize) : 0;
      if (in && e < 0 && e + (s64)n / t.esize > 0) have = -1;  // a piece across the left edge: not emulated
      f(swizzled(smem + r * inner + b, t.swizzle), have > 0 ? g + e * t.esize : 0, n, have);
    }
  }
}

static inline void settle(MBar& b) {
  if (!b.pending && b.tx == 0) {
    b.phase++;
    b.pending = b.expected;
  }
}

// Where element (mn, k) of an operand lies in shared memory. Mode, as in the descriptor: 0 no swizzle, 1 one of 128
// bytes, 2 of 64, 3 of 32; sbo and lbo are its stride and leading offsets in bytes.
static inline u64 place(u64 descriptor, int mn, int k, int es, bool transposed) {
  auto field = [&](int at) { return ((descriptor >> at) & 0x3fff) << 4; };
  const u64 start = field(0), lbo = field(16), sbo = field(32);
  const int mode = descriptor >> 62, span = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
  u64 a = start;
  if (!transposed) {
    a += (u64)(mn >> 3) * sbo + (mn & 7) * span;
    a += mode ? k * es : (u64)(k * es / 16) * lbo + (k * es & 15);
  } else {
    const int per = span / es;
    a += (u64)(mn / per) * (mode ? lbo : sbo) + (u64)(k >> 3) * (mode ? sbo : lbo) + (k & 7) * span + (mn % per) * es;
  }
  return swizzled(a, mode ? 4 - mode : 0);
}

// Tensor cores read by the async proxy: what a warp stored, they see after a fence between the proxies. Either the warp
// that wrote fences, and a barrier lies between, or the warp that multiplies fences after that barrier.
static bool fenced(const Warp& w, const Product& p, const ShShared& e) {
  if (e.wfences == BY_ASYNC_PROXY) return true;
  if (e.wwarp == w.id) return e.wfences < p.fences;
  const auto& writer = w.cta->warps[e.wwarp].fences;
  return (e.wfences < writer.size() && writer[e.wfences] < p.phase) ||
         (p.fences && w.fences[p.fences - 1] > e.wphase);
}

// An element of an operand as the product sees it, after the checks.
static f64 element(Machine* M, Warp& w, const Product& p, u64 descriptor, int mn, int k, bool transposed) {
  const Launch* L = M->L;
  const Cta* c = w.cta;
  const int kind = p.kind, es = kind == 2 ? 4 : 2;
  const u64 a = place(descriptor, mn, k, es, transposed);
  if (!M->shared_ok(w, p.pc, 0, a, es)) return 0;
  if (L->checks & (CHECK_SHARED_RACE | CHECK_INIT)) {
    const ShShared& e = c->shadow[a >> L->granule_shared];
    if ((L->checks & CHECK_INIT) && e.wphase < c->base_phase)
      M->report(UNINIT_SHARED, p.pc, 0, &w, a, -1, -1, -1, "operand of a product");
    else if ((L->checks & CHECK_SHARED_RACE) && e.wphase >= p.phase && e.wwarp != w.id)
      M->report(RACE_SHARED, p.pc, 0, &w, a, e.wpc, e.wwarp, c->linear, "operand of a product");
    else if ((L->checks & CHECK_SHARED_RACE) && !fenced(w, p, e))
      M->report(PROXY_FENCE, p.pc, 0, &w, a, e.wpc, e.wwarp, c->linear, "before the product");
  }
  for (const Bulk& b : c->in_flight)
    if (a < b.hi && a + es > b.lo)
      M->report(ASYNC_PENDING, p.pc, 0, &w, a, b.pc, b.warp, c->linear, "read before the copy was waited for");
  if (kind == 2) {
    u32 v;
    memcpy(&v, c->smem + a, 4);
    return bitcast<f32>(v & 0xffffe000u);
  }
  u16 v;
  memcpy(&v, c->smem + a, 2);
  return kind ? f32_of_f16(v) : f32_of_bf16(v);
}

static void multiply(Machine* M, Warp& w, const Product& p) {
  const Ins& I = *p.I;
  u8* R = w.R;
  const int kind = p.kind, K = I.x[1], N = I.x[2] * 8;
  static thread_local f64 A[16][16], B[16][256], C[16][256];
  const s32* d = M->L->ext + I.ext;
  if (I.x[3]) {
    for (int l = 0; l < 32; l++)
      for (int r = 0; r < 4; r++) {
        int g = l >> 2, t = l & 3;
        u32 v = p.regs[r][l];
        if (kind == 2) A[g + 8 * (r & 1)][t + 4 * (r >> 1)] = bitcast<f32>(v & 0xffffe000u);
        else
          for (int h = 0; h < 2; h++) {
            u16 q = (u16)(v >> (16 * h));
            A[g + 8 * (r & 1)][2 * t + h + 8 * (r >> 1)] = kind ? f32_of_f16(q) : f32_of_bf16(q);
          }
      }
  } else
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < K; k++)
        A[i][k] = element(M, w, p, p.a, 16 * (w.id & 3) + i, k, I.x[4]);
  for (int j = 0; j < N; j++)
    for (int k = 0; k < K; k++) B[k][j] = element(M, w, p, p.b, j, k, I.x[5]);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < N; j++) C[i][j] = 0;
  if (p.accumulate)
    for (int l = 0; l < 32; l++)
      for (int q = 0; q < N / 2; q++)
        C[(l >> 2) + 8 * ((q >> 1) & 1)][8 * (q >> 2) + 2 * (l & 3) + (q & 1)] = ((f32*)(R + d[q]))[l];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < K; k++) {
      f64 x = A[i][k];
      for (int j = 0; j < N; j++) C[i][j] += x * B[k][j];
    }
  for (int l = 0; l < 32; l++)
    for (int q = 0; q < N / 2; q++)
      ((f32*)(R + d[q]))[l] = canon((f32)C[(l >> 2) + 8 * ((q >> 1) & 1)][8 * (q >> 2) + 2 * (l & 3) + (q & 1)]);
}

static void flush_bulk(Machine* M, Warp& w, size_t keep) {
  while (w.bulk.size() > keep) {
    for (auto& k : w.bulk.front()) memcpy((void*)k.dst, w.cta->smem + k.src, k.size);
    w.bulk.pop_front();
  }
}
bool Machine::hopper(Warp& w, const Ins& I, int pc, u32 m) {
  u8* R = w.R;
  Cta* c = w.cta;
  int lane = __builtin_ctz(m);
  alignas(64) u64 a[32];
  if (I.op != OP_wgmma) addresses(R, I, I.o[0], I.x[5], a);
  switch (I.op) {
    case OP_mbar_init: {
      u32 n = get_lane(R, I.o[1], 4, lane);
      c->mbars[(u32)a[lane]] = MBar{n, n, 0, 0};
      if (L->checks & (CHECK_SHARED_RACE | CHECK_INIT)) track_shared(w, pc, lane, a[lane], 8, true);
      return true;
    }
    case OP_mbar_inval: c->mbars.erase((u32)a[lane]); return true;
    case OP_mbar_arrive: {
      auto it = c->mbars.find((u32)a[lane]);
      if (it == c->mbars.end()) {
        report(ARRIVE_MISMATCH, pc, lane, &w, a[lane], -1, -1, -1, "no mbarrier here");
        return true;
      }
      for (u32 rest = m; rest; rest &= rest - 1) {
        u32 n = I.o[1] >= 0 ? get_lane(R, I.o[1], 4, __builtin_ctz(rest)) : 1;
        MBar& b = it->second;
        if (I.x[1]) b.tx += n;
        if (I.x[0]) {
          u32 arrivals = I.x[1] ? 1 : n;
          if (b.pending < arrivals)
            report(ARRIVE_MISMATCH, pc, lane, &w, a[lane], -1, -1, -1, "more arrivals than expected");
          else b.pending -= arrivals;
        }
        settle(b);
      }
      return true;
    }
    case OP_mbar_try_wait: {
      auto it = c->mbars.find((u32)a[lane]);
      if (it == c->mbars.end()) {
        report(ARRIVE_MISMATCH, pc, lane, &w, a[lane], -1, -1, -1, "no mbarrier here");
        fatal = true;
        return false;
      }
      u32 parity = get_lane(R, I.o[2], 4, lane) & 1;
      MBar& b = it->second;
      complete_products(w, b, (u32)a[lane], parity);
      if ((b.phase & 1) == parity) {
        auto& list = c->in_flight;
        for (size_t k = 0; k < list.size();) {
          if (list[k].mbar != (u32)a[lane]) {
            k++;
            continue;
          }
          for (auto& q : list[k].copies) {
            memcpy(c->smem + q.dst, (void*)q.src, q.size - q.zero);
            if (list[k].nan_esize)
              for (u32 z = q.size - q.zero; z < q.size; z += list[k].nan_esize) {
                u32 v = list[k].nan_esize == 2 ? 0x7fff : 0x7fffffff;
                memcpy(c->smem + q.dst + z, &v, list[k].nan_esize);
              }
            else memset(c->smem + q.dst + q.size - q.zero, 0, q.zero);
            if (L->checks & (CHECK_SHARED_RACE | CHECK_INIT))
              for (u64 p = q.dst >> L->granule_shared; p << L->granule_shared < q.dst + q.size; p++) {
                c->shadow[p].wphase = c->base_phase;
                c->shadow[p].wwarp = w.id;
                c->shadow[p].wpc = list[k].pc;
                c->shadow[p].wfences = BY_ASYNC_PROXY;
              }
          }
          b.tx -= list[k].bytes;
          list.erase(list.begin() + k);
        }
        settle(b);
      }
      bool done = (b.phase & 1) != parity;
      if (!done) return false;
      w.waited = std::max(w.waited, b.completion);
      u32* d = (u32*)(R + I.o[1]);
      *d |= m;
      return true;
    }
    case OP_tma_load:
    case OP_tma_store: {
      bool load = I.op == OP_tma_load;
      Tensor t;
      if (!tensor_of(L, get_lane(R, I.o[1], 8, lane), t)) {
        report(UNSUPPORTED, pc, lane, &w, get_lane(R, I.o[1], 8, lane), -1, -1, -1,
               "tensor map that is no kernel argument");
        fatal = true;
        return false;
      }
      s32 at_[5] = {0};
      for (int k = 0; k < t.rank; k++) at_[k] = (s32)get_lane(R, I.o[3 + k], 4, lane);
      u64 smem = a[lane];
      Bulk bulk{0, pc, w.id, {}, 0, load && t.nan ? t.esize : 0, ~0ull, 0};
      std::vector<Copy> out;
      if (smem & (t.swizzle == 3 ? 127 : 15))
        report(MISALIGNED, pc, lane, &w, smem, -1, -1, -1, "tile in shared memory");
      tensor_pieces(t, smem, at_, [&](u64 s, u64 g, u32 n, s64 have) {
        if (have < 0) {
          report(UNSUPPORTED, pc, lane, &w, s, -1, -1, -1, "a tile across the left edge");
          fatal = true;
          return;
        }
        bulk.bytes += n;
        bulk.lo = std::min(bulk.lo, s);
        bulk.hi = std::max(bulk.hi, s + n);
        if (!shared_ok(w, pc, lane, s, n)) return;
        if (have && (L->checks & CHECK_MEM) && !inside(g, have)) {
          report(OOB_GLOBAL, pc, lane, &w, g, -1, -1, -1, load ? "tensor read" : "tensor write");
          return;
        }
        if (have && (L->checks & CHECK_GLOBAL_RACE)) track_global(w, pc, lane, g, have, !load, false);
        if (load) {
          if (L->checks & CHECK_SHARED_RACE)
            for (u64 p = s >> L->granule_shared; p << L->granule_shared < s + n; p++) {
              ShShared& e = c->shadow[p];
              if (e.rphase == c->phase && (e.rmask & ~(1u << w.id)))
                report(RACE_SHARED, pc, lane, &w, s, e.rpc, __builtin_ctz(e.rmask & ~(1u << w.id)), c->linear,
                       "tensor copy over what is being read");
            }
          bulk.copies.push_back(Copy{s, have ? g : (u64)c->smem, n, (u32)(n - have), pc});
        } else {
          if (L->checks & (CHECK_SHARED_RACE | CHECK_INIT)) track_shared(w, pc, lane, s, n, false);
          if (have) out.push_back(Copy{g, s, (u32)have, 0, pc});
        }
      });
      if (fatal) return false;
      if (load) {
        bulk.mbar = (u32)get_lane(R, I.o[2], I.x[6] == 8 ? 8 : 4, lane);
        c->in_flight.push_back(std::move(bulk));
      } else w.bulk_open.insert(w.bulk_open.end(), out.begin(), out.end());
      return true;
    }
    case OP_tma_commit:
      w.bulk.emplace_back(std::move(w.bulk_open));
      w.bulk_open.clear();
      return true;
    case OP_tma_wait: flush_bulk(this, w, (size_t)I.imm); return true;
    case OP_fence_proxy: w.fences.push_back(c->phase); return true;
    case OP_wgmma_fence: return true;
    case OP_wgmma: {
      Product p;
      p.I = &I;
      p.pc = pc;
      p.kind = I.x[0];
      p.phase = c->phase;
      p.fences = w.fences.size();
      p.b = get_lane(R, I.o[1], 8, lane);
      p.a = I.x[3] ? 0 : get_lane(R, I.o[2], 8, lane);
      if (I.x[3])
        for (int r = 0; r < 4; r++) memcpy(p.regs[r], R + I.o[2 + r], 128);
      p.accumulate = (*(u32*)(R + I.o[0]) >> lane) & 1;
      w.products.push_back(p);
      return true;
    }
    case OP_wgmma_commit: {
      w.product_groups.emplace_back(std::move(w.products));
      w.products.clear();
      return true;
    }
    case OP_wgmma_wait: {
      while (w.product_groups.size() > (size_t)I.imm) {
        for (auto& p : w.product_groups.front()) multiply(this, w, p);
        w.product_groups.pop_front();
      }
      return true;
    }
  }
  return blackwell(w, I, pc, m);
}
