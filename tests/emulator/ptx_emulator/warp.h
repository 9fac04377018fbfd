// One warp runs until a barrier, its end, or the end of its budget of instructions.
#pragma once
#include "blackwell.h"
#include "convert.h"
#include "hopper.h"
#include "memory.h"
#include "tensor_cores.h"
#include "warp_wide.h"

enum { RAN_OUT, HIT_BARRIER, FINISHED, YIELDED };

#define ADVANCE_ALL_OR_BLOCK(need_)                                                                    \
  {                                                                                                    \
    u32 need = (need_) & w.alive;                                                                      \
    if ((need & mask) != need) {                                                                       \
      w.entries.push_back(Entry{mask, pc, true});                                                      \
      int best = -1;                                                                                   \
      for (size_t k = 0; k < w.entries.size(); k++)                                                    \
        if (!w.entries[k].blocked && (best < 0 || w.entries[k].pc < w.entries[best].pc)) best = k;     \
      if (best >= 0) {                                                                                 \
        mask = w.entries[best].mask;                                                                   \
        pc = w.entries[best].pc;                                                                       \
        w.entries.erase(w.entries.begin() + best);                                                     \
        continue;                                                                                      \
      }                                                                                                \
      w.entries.pop_back();                                                                            \
      report(DIVERGED, pc, __builtin_ctz(mask), &w, 0, -1, -1, -1, "lanes of the mask do not arrive"); \
    }                                                                                                  \
  }

int Machine::run(Warp& w, s64 budget) {
  u8* const R = w.R;
  const Ins* const code = L->code;
  Cta* const c = w.cta;
  size_t best0 = 0;
  for (size_t k = 1; k < w.entries.size(); k++)
    if (w.entries[k].blocked < w.entries[best0].blocked ||
        (w.entries[k].blocked == w.entries[best0].blocked && w.entries[k].pc < w.entries[best0].pc))
      best0 = k;
  u32 mask = w.entries[best0].mask;
  s32 pc = w.entries[best0].pc;
  w.entries.erase(w.entries.begin() + best0);
  u64* const counts = L->counts;
  const bool counting = L->checks & COUNT_MEMORY;
  s64 steps = 0;
#define LEAVE(code_)                             \
  {                                              \
    w.entries.push_back(Entry{mask, pc, false}); \
    L->steps += steps;                           \
    return code_;                                \
  }
  for (;;) {
    if (!w.entries.empty()) {
      int best = -1;
      bool merged = false;
      for (size_t k = 0; k < w.entries.size(); k++) {
        if (w.entries[k].pc == pc) {
          mask |= w.entries[k].mask;
          w.entries.erase(w.entries.begin() + k);
          merged = true;
          break;
        }
        if (!w.entries[k].blocked && (best < 0 || w.entries[k].pc < w.entries[best].pc)) best = k;
      }
      if (merged) continue;
      if (best >= 0 && w.entries[best].pc < pc) {
        std::swap(w.entries[best].mask, mask);
        std::swap(w.entries[best].pc, pc);
        continue;
      }
    }
    if (++steps > budget) LEAVE(RAN_OUT);
    const Ins& I = code[pc];
    u32 m = mask;
    if (I.guard >= 0) {
      u32 g = *(u32*)(R + I.guard);
      m &= I.flags & GUARD_NOT ? ~g : g;
    }
    if (!m) {
      pc++;
      continue;
    }
    if (counts) counts[pc]++;
    switch (I.op) {
#include "ops_cases.inc"
      case OP_nop: break;
      case OP_bra: {
        u32 stay = mask & ~m;
        if (stay) {
          w.entries.push_back(Entry{stay, pc + 1, false});
          mask = m;
        }
        pc = (s32)I.imm;
        continue;
      }
      case OP_brx: {  // o[0] index register; ext: count, targets
        const u32* ix = (const u32*)(R + I.o[0]);
        u32 left = m, stay = mask & ~m;
        if (stay) w.entries.push_back(Entry{stay, pc + 1, false});
        u32 pick = ix[__builtin_ctz(left)], same = 0;
        for (int i = 0; i < 32; i++)
          if (((left >> i) & 1)) {
            if (ix[i] == pick) same |= 1u << i;
          }
        for (u32 rest = left & ~same; rest;) {
          u32 q = ix[__builtin_ctz(rest)], s = 0;
          for (int i = 0; i < 32; i++)
            if (((rest >> i) & 1) && ix[i] == q) s |= 1u << i;
          w.entries.push_back(Entry{s, L->ext[I.ext + q], false});
          rest &= ~s;
        }
        mask = same;
        pc = L->ext[I.ext + pick];
        continue;
      }
      case OP_ret: {
        w.alive &= ~m;
        mask &= ~m;
        if (mask) break;
        if (w.entries.empty()) {
          w.state = DONE;
          L->steps += steps;
          return FINISHED;
        }
        for (auto& e : w.entries) e.blocked = false;
        size_t k = 0;
        for (size_t q = 1; q < w.entries.size(); q++)
          if (w.entries[q].pc < w.entries[k].pc) k = q;
        mask = w.entries[k].mask;
        pc = w.entries[k].pc;
        w.entries.erase(w.entries.begin() + k);
        continue;
      }
      case OP_trap:
        report(TRAP, pc, __builtin_ctz(m), &w, 0);
        fatal = true;
        LEAVE(YIELDED);
      case OP_assertfail:
        report(ASSERT, pc, __builtin_ctz(m), &w, get_lane(R, I.o[0], 8, __builtin_ctz(m)));
        fatal = true;
        LEAVE(YIELDED);
      case OP_ldparam:
        load_parameter(w, I, pc, m);
        break;
      case OP_clock: {
        u64 t = L->steps + steps;
        for (int i = 0; i < 32; i++)
          if ((m >> i) & 1) set_lane(R, I.o[0], I.x[0], i, t);
        break;
      }
      case OP_movpred: {
        u32* d = (u32*)(R + I.o[0]);
        u32 s = *(u32*)(R + I.o[1]);
        *d = (*d & ~m) | (s & m);
        break;
      }
      case OP_notpred: {
        u32* d = (u32*)(R + I.o[0]);
        u32 s = ~*(u32*)(R + I.o[1]);
        *d = (*d & ~m) | (s & m);
        break;
      }
      case OP_andpred: {
        u32* d = (u32*)(R + I.o[0]);
        u32 s = *(u32*)(R + I.o[1]) & *(u32*)(R + I.o[2]);
        *d = (*d & ~m) | (s & m);
        break;
      }
      case OP_orpred: {
        u32* d = (u32*)(R + I.o[0]);
        u32 s = *(u32*)(R + I.o[1]) | *(u32*)(R + I.o[2]);
        *d = (*d & ~m) | (s & m);
        break;
      }
      case OP_xorpred: {
        u32* d = (u32*)(R + I.o[0]);
        u32 s = *(u32*)(R + I.o[1]) ^ *(u32*)(R + I.o[2]);
        *d = (*d & ~m) | (s & m);
        break;
      }
      case OP_pack:
        pack(w, I, pc, m);
        break;
      case OP_unpack:
        unpack(w, I, pc, m);
        break;
      case OP_cvt: convert(R, I, m); break;
      case OP_cvta: {
        alignas(64) u64 t[32];
        for (int i = 0; i < 32; i++) t[i] = get_lane(R, I.o[1], I.x[1], i) + (u64)I.imm;
        if (I.x[0] == 8) put<u64>(R + I.o[0], t, m);
        else
          for (int i = 0; i < 32; i++)
            if ((m >> i) & 1) set_lane(R, I.o[0], 4, i, t[i]);
        break;
      }
      case OP_ld:
        load(w, I, pc, m);
        if (I.x[6] && L->resident > 1) {
          pc++;
          LEAVE(YIELDED);
        }
        break;
      case OP_st:
        store(w, I, pc, m);
        break;
      case OP_atom:
      case OP_red:
        atomic(w, I, pc, m);
        if (L->resident > 1 && (next() & 1024)) {
          pc++;
          LEAVE(YIELDED);
        }
        break;
      case OP_membar:
        w.fenced = true;
        for (u64 a : w.relaxed) acquire(w, a);
        w.relaxed.clear();
        break;
      case OP_cpasync:
        copy_async(w, I, pc, m);
        break;
      case OP_cpasync_commit:
        w.groups.emplace_back(std::move(w.open));
        w.open.clear();
        break;
      case OP_cpasync_wait: {
        if (I.imm < 0) {
          w.groups.emplace_back(std::move(w.open));
          w.open.clear();
        }
        while ((s64)w.groups.size() > std::max<s64>(I.imm, 0)) {
          finish(w, w.groups.front());
          w.groups.pop_front();
        }
        break;
      }
      case OP_ldmatrix:
        load_matrices(w, I, pc, m);
        break;
      case OP_stmatrix:
        store_matrices(w, I, pc, m);
        break;
      case OP_shfl:
        ADVANCE_ALL_OR_BLOCK(((u32*)(R + I.o[5]))[__builtin_ctz(m)]);
        shuffle(w, I, pc, m);
        break;
      case OP_vote:
      case OP_ballot:
        ADVANCE_ALL_OR_BLOCK(((u32*)(R + I.o[2]))[__builtin_ctz(m)]);
        vote(w, I, pc, m);
        break;
      case OP_activemask: {
        alignas(64) u32 t[32];
        for (int i = 0; i < 32; i++) t[i] = mask;
        put<u32>(R + I.o[0], t, m);
        break;
      }
      case OP_elect: {
        u32 lead = __builtin_ctz(m);
        alignas(64) u32 t[32];
        for (int i = 0; i < 32; i++) t[i] = lead;
        if (I.o[0] >= 0) put<u32>(R + I.o[0], t, m);
        u32* d = (u32*)(R + I.o[1]);
        *d = (*d & ~m) | (1u << lead);
        break;
      }
      case OP_match_any:
      case OP_match_all:
        ADVANCE_ALL_OR_BLOCK(((u32*)(R + I.o[3]))[__builtin_ctz(m)]);
        match(w, I, pc, m);
        break;
      case OP_redux:
        ADVANCE_ALL_OR_BLOCK(((u32*)(R + I.o[2]))[__builtin_ctz(m)]);
        reduce_warp(w, I, pc, m);
        break;
      case OP_tensor_alloc:
      case OP_tensor_dealloc:
      case OP_tensor_ld:
      case OP_tensor_st:
      case OP_tensor_wait:
        ADVANCE_ALL_OR_BLOCK(~0u);
        blackwell(w, I, pc, m);
        if (fatal) LEAVE(YIELDED);
        break;
      case OP_mma:
        if (m != ~0u) { ADVANCE_ALL_OR_BLOCK(~0u); }
        mma(w, I);
        break;
      case OP_barwarp: {
        u32 member = I.o[0] >= 0 ? ((u32*)(R + I.o[0]))[__builtin_ctz(m)] : ~0u;
        ADVANCE_ALL_OR_BLOCK(member);
        break;
      }
      case OP_bar:
      case OP_bararrive: {  // imm id (or o[0] register), o[1] thread count slot or -1
        ADVANCE_ALL_OR_BLOCK(~0u);
        w.bar_id = I.o[0] >= 0 ? (int)get_lane(R, I.o[0], 4, __builtin_ctz(m)) : (int)I.imm;
        w.bar_need = I.o[1] >= 0 ? (u32)get_lane(R, I.o[1], 4, __builtin_ctz(m)) / 32 : 0;
        pc++;
        w.fenced = false;
        Barrier& b = c->bars[w.bar_id & 15];
        b.arrived++;
        b.need = w.bar_need;
        if (I.op == OP_bararrive) {
          release_barrier(c);
          continue;
        }
        w.state = AT_BARRIER;
        LEAVE(HIT_BARRIER);
      }
      case OP_nanosleep: pc++; LEAVE(YIELDED);
      default:
        if (hopper(w, I, pc, m)) break;
        LEAVE(YIELDED);  // the instruction is tried again
    }
    pc++;
  }
}
