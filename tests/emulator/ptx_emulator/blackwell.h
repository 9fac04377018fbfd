#pragma once
#include "hopper.h"

// Blackwell's tensor memory and its products (tcgen05). An address is a row, in the upper 16 bits, and a column of 32
// bits. As on Hopper everything is done as late as it may be: loads and stores when their warp waits for them, products
// when somebody waits for the barrier in shared memory at which their commit arrives.

// Where register r of a lane lies. Shape 1 has two halves of 16 rows, the second one x[2] columns farther.
static inline void place_register(const TensorAccess& t, int lane, int r, u32& row, u32& column) {
  const bool halves = t.I->x[0];
  row = (t.at >> 16) + (halves ? lane & 15 : lane);
  column = (t.at & 0xffff) + r + (halves && lane > 15 ? t.I->x[2] : 0);
}
// Row i of a product of M rows: with 64, sixteen lie in each quarter of the memory.
static inline u32 place_row(u32 at, int i, int M) { return (at >> 16) + (M == 64 ? i / 16 * 32 + i % 16 : i); }

static inline int rows_of(u32 shape) { return (shape >> 24 & 31) * 16; }
static inline int columns_of(u32 shape) { return (shape >> 17 & 63) * 8; }
static inline int depth_of(const Product& p) { return p.kind == 2 ? 8 : 16; }
static inline bool left_in_tensor_memory(const Product& p) { return p.I->x[1]; }

static bool covers(const Product& p, u32 at, u32 columns, u32 row, u32 column) {
  const u32 first = at & 0xffff, offset = row - (at >> 16);
  const bool inside = rows_of(p.shape) == 64 ? (offset & 16) == 0 && offset < 128 : offset < 128;
  return inside && column >= first && column < first + columns;
}
// Is there a product that is not complete and still writes the cell, or reads it as its left operand?
static const Product* pending(const Cta* c, u32 row, u32 column, bool as_operand) {
  auto uses = [&](const Product& p) {
    if (covers(p, p.d, columns_of(p.shape), row, column)) return true;
    return as_operand && left_in_tensor_memory(p) && covers(p, (u32)p.a, 8, row, column);
  };
  for (const auto& w : c->warps) {
    for (const auto& p : w.issued)
      if (uses(p)) return &p;
    for (const auto& k : w.commits)
      for (const auto& p : k.products)
        if (uses(p)) return &p;
  }
  return nullptr;
}

// The cell, where it is allocated.
Cell* Machine::cell(Warp& w, int pc, int lane, u32 row, u32 column, const char* what) {
  TensorMemory& t = w.cta->tensor;
  if (row < TENSOR_ROWS && column < TENSOR_COLUMNS && t.allocated[column])
    return &t.cells[row * TENSOR_COLUMNS + column];
  report(OOB_TENSOR, pc, lane, &w, (u64)row << 16 | column, -1, -1, -1, what);
  return nullptr;
}
// Does the warp know of what the cell holds: its own store, a product that it waited for, or a barrier since?
static bool known(const Warp& w, const Cell& e) {
  if (e.wphase < w.cta->phase) return true;
  return e.completion ? w.waited >= e.completion : e.wwarp == w.id;
}
static bool read_by_others(const Warp& w, const Cell& e, u32 phase) {
  return e.rphase == phase && (e.rmask & ~(1u << w.id));
}

void Machine::load_tensor(Warp& w, const TensorAccess& t) {
  Cta* c = w.cta;
  const s32* to = L->ext + t.I->ext;
  for (int r = 0; r < t.I->x[1]; r++)
    for (int lane = 0; lane < 32; lane++) {
      u32 row, column;
      place_register(t, lane, r, row, column);
      Cell* e = cell(w, t.pc, lane, row, column, "load");
      if (!e) continue;
      if (const Product* p = pending(c, row, column, false))
        report(ASYNC_PENDING, t.pc, lane, &w, t.at, p->pc, -1, c->linear, "the product was not waited for");
      else if (!e->written) {
        if (L->checks & CHECK_INIT) report(UNINIT_TENSOR, t.pc, lane, &w, t.at, -1, -1, -1, "load");
      } else if ((L->checks & CHECK_SHARED_RACE) && !known(w, *e))
        report(RACE_TENSOR, t.pc, lane, &w, t.at, e->wpc, e->wwarp, c->linear, "read after write");
      if (e->rphase != c->phase) {
        e->rphase = c->phase;
        e->rmask = 0;
      }
      e->rmask |= 1u << w.id;
      set_lane(w.R, to[r], 4, lane, e->value);
    }
}

void Machine::store_tensor(Warp& w, const TensorAccess& t) {
  Cta* c = w.cta;
  for (int r = 0; r < t.I->x[1]; r++)
    for (int lane = 0; lane < 32; lane++) {
      u32 row, column;
      place_register(t, lane, r, row, column);
      Cell* e = cell(w, t.pc, lane, row, column, "store");
      if (!e) continue;
      if (const Product* p = pending(c, row, column, true))
        report(ASYNC_PENDING, t.pc, lane, &w, t.at, p->pc, -1, c->linear, "the product was not waited for");
      else if ((L->checks & CHECK_SHARED_RACE) && ((e->written && !known(w, *e)) || read_by_others(w, *e, c->phase)))
        report(RACE_TENSOR, t.pc, lane, &w, t.at, e->wpc, e->wwarp, c->linear, "write after another access");
      e->value = t.values[r * 32 + lane];
      e->wphase = c->phase;
      e->completion = 0;
      e->wpc = t.pc;
      e->wwarp = w.id;
      e->written = true;
    }
}

// What can be said when a product is issued: which cells it uses, and whether those are in use. One that would leave the
// allocated columns is reported and not carried out.
void Machine::issue_product(Warp& w, const Product& p) {
  Cta* c = w.cta;
  const int M = rows_of(p.shape), N = columns_of(p.shape);
  auto usable = [&](u32 at, int columns, bool write) {
    for (int i = 0; i < M; i++)
      for (int j = 0; j < columns; j++) {
        const u32 row = place_row(at, i, M), column = (at & 0xffff) + j;
        Cell* e = cell(w, p.pc, 0, row, column, write ? "result of a product" : "operand of a product");
        if (!e) return false;
        for (const auto& v : c->warps)
          for (const auto& t : v.tensor_stores) {
            const u32 from = t.at & 0xffff, more = t.I->x[1] + (t.I->x[0] ? t.I->x[2] : 0);
            if (row >> 5 == t.at >> 21 && column >= from && column < from + more)
              report(ASYNC_PENDING, p.pc, 0, &w, at, t.pc, v.id, c->linear, "the store was not waited for");
          }
        if (!(L->checks & CHECK_SHARED_RACE)) continue;
        if (e->written && e->wwarp != w.id && !known(w, *e))
          report(RACE_TENSOR, p.pc, 0, &w, at, e->wpc, e->wwarp, c->linear, "product after write");
        if (write && read_by_others(w, *e, c->phase))
          report(RACE_TENSOR, p.pc, 0, &w, at, -1, -1, -1, "product after read");
      }
    return true;
  };
  if (usable(p.d, N, true) && (!left_in_tensor_memory(p) || usable((u32)p.a, 8, false))) w.issued.push_back(p);
}

void Machine::multiply_tensor(Warp& w, const Product& p, u32 completion) {
  const int M = rows_of(p.shape), N = columns_of(p.shape), K = depth_of(p);
  const f64 sign_a = p.shape >> 13 & 1 ? -1 : 1, sign_b = p.shape >> 14 & 1 ? -1 : 1;
  static thread_local f64 B[16][256];
  for (int j = 0; j < N; j++)
    for (int k = 0; k < K; k++) B[k][j] = sign_b * element(this, w, p, p.b, j, k, p.shape >> 16 & 1);
  for (int i = 0; i < M; i++) {
    f64 a[16], sum[256];
    for (int k = 0; k < K; k++) {
      if (!left_in_tensor_memory(p)) a[k] = element(this, w, p, p.a, i, k, p.shape >> 15 & 1);
      else {
        const u32 at = (u32)p.a;
        const u32 column = (at & 0xffff) + (p.kind == 2 ? k : k / 2);
        Cell* e = cell(w, p.pc, 0, place_row(at, i, M), column, "operand of a product");
        if (e && !e->written && (L->checks & CHECK_INIT))
          report(UNINIT_TENSOR, p.pc, 0, &w, at, -1, -1, -1, "operand of a product");
        const u32 v = e ? e->value : 0;
        const u16 half = v >> (k & 1 ? 16 : 0);
        a[k] = p.kind == 2 ? bitcast<f32>(v & 0xffffe000u) : p.kind ? f32_of_f16(half) : f32_of_bf16(half);
      }
      a[k] *= sign_a;
    }
    Cell* to = cell(w, p.pc, 0, place_row(p.d, i, M), p.d & 0xffff, "result of a product");
    if (!to) return;
    for (int j = 0; j < N; j++) {
      if (p.accumulate && !to[j].written && (L->checks & CHECK_INIT))
        report(UNINIT_TENSOR, p.pc, 0, &w, p.d, -1, -1, -1, "what a product is added to");
      sum[j] = p.accumulate ? bitcast<f32>(to[j].value) : 0;
    }
    for (int k = 0; k < K; k++)
      for (int j = 0; j < N; j++) sum[j] += a[k] * B[k][j];
    for (int j = 0; j < N; j++) {
      to[j].value = bitcast<u32>(canon((f32)sum[j]));
      to[j].wphase = w.cta->phase;
      to[j].completion = completion;
      to[j].wpc = p.pc;
      to[j].wwarp = w.id;
      to[j].written = true;
    }
  }
}

// A warp waits for this phase of a barrier: the commits are carried out that complete it, and those of the same warp
// before them, for products follow one another in the order in which they were issued.
void Machine::complete_products(Warp& waiting, MBar& b, u32 mbar, u32 parity) {
  Cta* c = waiting.cta;
  for (auto& w : c->warps)
    while ((b.phase & 1) == parity) {
      auto arrives = [&](const Commit& k) { return k.mbar == mbar; };
      if (std::none_of(w.commits.begin(), w.commits.end(), arrives)) break;
      Commit k = std::move(w.commits.front());
      w.commits.pop_front();
      const u32 completion = ++c->tensor.completions;
      for (auto& p : k.products) multiply_tensor(w, p, completion);
      auto it = c->mbars.find(k.mbar);
      if (it == c->mbars.end() || !it->second.pending) {
        report(ARRIVE_MISMATCH, k.pc, 0, &w, k.mbar, -1, -1, -1, "commit: no arrival is expected here");
        continue;
      }
      it->second.pending--;
      it->second.completion = completion;
      settle(it->second);
    }
}

// o[0] where the address goes in shared memory, o[1] columns
void Machine::allocate(Warp& w, const Ins& I, int pc, u32 m) {
  const int lane = __builtin_ctz(m);
  const u32 n = get_lane(w.R, I.o[1], 4, lane);
  TensorMemory& t = w.cta->tensor;
  if (n < 32 || n > TENSOR_COLUMNS || (n & (n - 1)) || t.relinquished) {
    report(OOB_TENSOR, pc, lane, &w, n, -1, -1, -1,
           t.relinquished ? "the permit was given up" : "32 to 512 columns, a power of 2");
    fatal = true;
    return;
  }
  std::vector<u32> free;
  for (u32 at = 0; at < TENSOR_COLUMNS; at += n)
    if (std::none_of(t.allocated + at, t.allocated + at + n, [](bool taken) { return taken; })) free.push_back(at);
  if (free.empty()) {
    report(DEADLOCK, pc, lane, &w, n, -1, -1, -1, "no such columns of tensor memory are free");
    fatal = true;
    return;
  }
  const u32 at = free[L->seed ? below(free.size()) : 0];  // on a GPU other programs may have the columns before
  if (t.cells.empty()) t.cells.resize(TENSOR_ROWS * TENSOR_COLUMNS);
  for (u32 row = 0; row < TENSOR_ROWS; row++)
    for (u32 column = at; column < at + n; column++) t.cells[row * TENSOR_COLUMNS + column] = Cell{0xCBCBCBCBu};
  std::fill_n(t.allocated + at, n, true);
  alignas(64) u64 a[32];
  addresses(w.R, I, I.o[0], I.x[5], a);
  if (u8* p = this->at(w, I, pc, lane, a[lane], 4, SP_SHARED, true, false)) memcpy(p, &at, 4);
}

// o[0] address, o[1] columns
void Machine::give_back(Warp& w, const Ins& I, int pc, u32 m) {
  const int lane = __builtin_ctz(m);
  const u32 at = get_lane(w.R, I.o[0], 4, lane), n = get_lane(w.R, I.o[1], 4, lane);
  TensorMemory& t = w.cta->tensor;
  for (u32 column = at; column < at + n; column++) {
    if (!cell(w, pc, lane, 0, column, "given back")) return;
    for (u32 row = 0; row < TENSOR_ROWS; row += 16)
      if (const Product* p = pending(w.cta, row, column, true))
        report(ASYNC_PENDING, pc, lane, &w, at, p->pc, -1, w.cta->linear, "given back before the product is complete");
    for (u32 row = 0; row < TENSOR_ROWS && (L->checks & CHECK_SHARED_RACE); row++)
      if (read_by_others(w, t.cells[row * TENSOR_COLUMNS + column], w.cta->phase))
        report(RACE_TENSOR, pc, lane, &w, at, -1, -1, -1, "given back after read");
    t.allocated[column] = false;
  }
}

// The end of a program: nothing is in flight, and nothing stays allocated.
void Machine::leave_tensor(Cta* c) {
  for (auto& w : c->warps) {
    for (auto* list : {&w.tensor_loads, &w.tensor_stores})
      for (auto& t : *list) report(LEFT_BEHIND, t.pc, 0, &w, t.at, -1, -1, -1, "an access that is not waited for");
    for (auto& p : w.issued) report(LEFT_BEHIND, p.pc, 0, &w, p.d, -1, -1, -1, "a product without a commit");
    for (auto& k : w.commits) report(LEFT_BEHIND, k.pc, 0, &w, k.mbar, -1, -1, -1, "a commit that is not waited for");
  }
  for (u32 column = 0; column < TENSOR_COLUMNS; column++)
    if (c->tensor.allocated[column])
      report(LEFT_BEHIND, L->ncode - 1, 0, &c->warps[0], column, -1, -1, -1, "columns that stay allocated");
}

bool Machine::blackwell(Warp& w, const Ins& I, int pc, u32 m) {
  u8* R = w.R;
  const int lane = __builtin_ctz(m);
  switch (I.op) {
    case OP_tensor_alloc: allocate(w, I, pc, m); return true;
    case OP_tensor_dealloc: give_back(w, I, pc, m); return true;
    case OP_tensor_relinquish: w.cta->tensor.relinquished = true; return true;
    case OP_tensor_ld:
    case OP_tensor_st: {
      const s32* registers = L->ext + I.ext;
      TensorAccess t{&I, pc, (u32)(get_lane(R, I.o[0], 4, lane) + I.imm), {}};
      if (t.at >> 16 != 32u * (w.id & 3)) {
        report(OOB_TENSOR, pc, lane, &w, t.at, -1, -1, -1, "a warp reaches its own quarter of the rows");
        return true;
      }
      for (int r = 0; r < I.x[1]; r++)
        for (int k = 0; k < 32; k++) {
          if (I.op == OP_tensor_st) t.values.push_back(get_lane(R, registers[r], 4, k));
          else set_lane(R, registers[r], 4, k, 0xC5C5C5C5u);
        }
      (I.op == OP_tensor_st ? w.tensor_stores : w.tensor_loads).push_back(std::move(t));
      return true;
    }
    case OP_tensor_wait:
      if (I.x[0]) {
        for (auto& t : w.tensor_stores) store_tensor(w, t);
        w.tensor_stores.clear();
      } else {
        for (auto& t : w.tensor_loads) load_tensor(w, t);
        w.tensor_loads.clear();
      }
      return true;
    case OP_tensor_mma: {  // o: result, left operand or its descriptor, right one's, instruction descriptor, add
      Product p{};
      p.I = &I;
      p.pc = pc;
      p.phase = w.cta->phase;
      p.fences = w.fences.size();
      p.d = (u32)get_lane(R, I.o[0], 4, lane) + (u32)I.imm;
      p.a = I.x[1] ? (u32)get_lane(R, I.o[1], 4, lane) + (u32)(I.imm >> 32) : get_lane(R, I.o[1], 8, lane);
      p.b = get_lane(R, I.o[2], 8, lane);
      p.shape = get_lane(R, I.o[3], 4, lane);
      p.accumulate = (*(u32*)(R + I.o[4]) >> lane) & 1;
      // Bits 4 to 5 say what the sums are, 7 to 12 what the operands: both alike here, and sums of fp32.
      const u32 left = p.shape >> 7 & 7, right = p.shape >> 10 & 7;
      const bool types = (p.shape >> 4 & 3) == 1 && left == right && (I.x[0] ? left == 2 : left < 2);
      const bool sizes = (rows_of(p.shape) == 64 || rows_of(p.shape) == 128) && columns_of(p.shape) <= 256;
      // Of a descriptor in shared memory the interpreter knows version 1, no base offset, and the swizzles of Hopper.
      auto plain = [](u64 d) { return (d >> 46 & 7) == 1 && !(d >> 49 & 15) && !(d >> 61 & 1); };
      if (!types || !sizes || (p.shape & 15) || !plain(p.b) || (!I.x[1] && !plain(p.a))) {
        report(UNSUPPORTED, pc, lane, &w, p.shape, -1, -1, -1, "descriptors of a product");
        fatal = true;
        return false;
      }
      p.kind = I.x[0] ? 2 : left == 0;
      issue_product(w, p);
      return true;
    }
    case OP_tensor_commit: {
      alignas(64) u64 a[32];
      addresses(R, I, I.o[0], I.x[5], a);
      w.commits.push_back(Commit{(u32)a[lane], pc, std::move(w.issued)});
      w.issued.clear();
      return true;
    }
  }
  report(UNSUPPORTED, pc, lane, &w, 0);
  fatal = true;
  return false;
}
