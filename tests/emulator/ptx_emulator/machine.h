// The program, the state of a launch, and the checks on every access to memory.
#pragma once
#include "in_flight.h"
#include "ops_enum.inc"

// ---- the program, the machine -------------------------------------------------------------------------------------
struct Ins {
  u16 op;
  u8 flags;
  u8 pad;
  s32 guard;
  s32 o[20];
  s64 imm;
  u8 x[12];
  s32 ext;
};  // 112 bytes
enum { GUARD_NOT = 1 };
enum { SP_GENERIC, SP_GLOBAL, SP_SHARED, SP_LOCAL };
enum { SEM_RELAXED = 1, SEM_ACQUIRE = 2, SEM_RELEASE = 4 };
enum { CHECK_MEM = 1, CHECK_SHARED_RACE = 2, CHECK_GLOBAL_RACE = 4, CHECK_INIT = 8, COUNT_MEMORY = 16 };
static const u64 SHARED_WINDOW = 1ull << 56, LOCAL_WINDOW = 2ull << 56;

enum Kind {
  OOB_GLOBAL = 1,
  MISALIGNED,
  OOB_SHARED,
  RACE_SHARED,
  RACE_GLOBAL_CTA,
  RACE_GLOBAL_GRID,
  UNINIT_SHARED,
  DIVERGED,
  DEADLOCK,
  TIMEOUT,
  ASSERT,
  TRAP,
  UNSUPPORTED,
  SHFL_INACTIVE,
  WW_SAME_INSTR,
  ATOMIC_MIX,
  ASYNC_PENDING,
  ARRIVE_MISMATCH,
  READ_ONLY,
  SAME_VALUE,
  PROXY_FENCE,
  OOB_TENSOR,
  RACE_TENSOR,
  UNINIT_TENSOR,
  LEFT_BEHIND
};
struct Report {
  s32 kind, pc, other_pc, lane, warp, other_warp;
  s64 cta, other_cta;
  u64 addr;
  s64 count;
  char text[64];
};
struct Range {
  u64 lo, hi;
};
typedef int (*MissCallback)(u64 addr, u64 size, u64* lo, u64* hi);

struct Launch {
  const Ins* code;
  s64 ncode;
  const s32* ext;
  const u8* image;
  s64 image_size;
  s64 regs_size;  // constants at the start of every register file
  const s32* specials;
  s64 nspecials;  // (kind, slot) pairs
  const u8* params;
  s64 params_size;
  s32 grid[3];
  s32 threads;
  s64 shared_size;
  s64 local_size;
  u64 seed;
  s32 checks;
  s32 resident;
  s32 quantum;
  s32 granule_shared, granule_global;
  Range* ranges;
  s64 nranges;
  MissCallback miss;
  Report* reports;
  s64 max_reports, nreports;
  u64* counts;
  u64* sectors;
  u64* requests;
  u64* conflicts;  // per instruction, or null
  u64 max_steps, steps;
  u64 sm_count;
};

struct ShShared {
  u32 wphase, rphase, rmask;
  s32 wpc, rpc;
  u16 wwarp;
  u16 pad;
  u32 wfences;  // the proxy fences of the writing warp before it wrote, or BY_ASYNC_PROXY
};
static const u32 BY_ASYNC_PROXY = ~0u;
struct ShGlobal {
  u32 wcta, wphase, rcta, rphase, rmask;
  s32 wpc, rpc;
  u16 wwarp;
  u16 watomic;
};
struct Entry {
  u32 mask;
  s32 pc;
  bool blocked;
};
struct Pub {
  u32 cta, phase;
  s32 warp;
  u32 at_phase;
  s32 by;
};

struct Cta;
struct Warp {
  u8* R;
  int id;
  u32 alive;
  std::vector<Entry> entries;
  int state;
  int bar_id;
  u32 bar_need;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  bool fenced;
  std::vector<u64> relaxed;
  Cta* cta;
  std::deque<std::vector<Copy>> bulk;
  std::vector<Copy> bulk_open;
  std::vector<Product> products;
  std::deque<std::vector<Product>> product_groups;
  std::vector<u32> fences;  // the phase of each proxy fence
  std::vector<Product> issued;  // of tcgen05, not yet committed
  std::deque<Commit> commits;
  std::vector<TensorAccess> tensor_loads, tensor_stores;
  u32 waited;  // the last completion of a commit that it knows of
};
enum { READY, AT_BARRIER, DONE };
struct Barrier {
  u32 arrived;
  u32 need;
};
struct Cta {
  u32 x, y, z, linear;
  std::vector<Warp> warps;
  u8* smem;
  std::vector<ShShared> shadow;
  u32 phase, base_phase;
  Barrier bars[16];
  std::vector<u8> local;
  int live;
  std::map<u32, MBar> mbars;
  std::vector<Bulk> in_flight;
  TensorMemory tensor;
  std::map<u32, std::vector<Pub>> known;
};

struct Machine {
  Launch* L;
  u64 rng;
  std::vector<std::unique_ptr<Cta>> pool;
  std::vector<Cta*> resident;
  std::unordered_map<u64, ShGlobal*> pages;
  ShGlobal* cache_page[256];
  u64 cache_key[256];
  std::unordered_map<u64, std::vector<Pub>> published;
  std::map<std::array<s32, 3>, Report*> seen;
  std::vector<Range> ranges;
  size_t last_range;
  bool fatal;
  u64 next() {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng * 0x2545F4914F6CDD1Dull;
  }
  u32 below(u32 n) { return (u32)((next() >> 33) % n); }

  Report* report(int kind, int pc, int lane, const Warp* w, u64 addr, int other_pc = -1, s64 other_warp = -1,
                 s64 other_cta = -1, const char* text = "") {
    auto key = std::array<s32, 3>{kind, pc, other_pc};
    auto it = seen.find(key);
    if (it != seen.end()) {
      if (it->second) it->second->count++;
      return it->second;
    }
    if (L->nreports >= L->max_reports) return seen[key] = nullptr;
    Report* r = &L->reports[L->nreports++];
    *r = Report{kind,      pc,   other_pc, lane, w ? w->id : -1, (s32)other_warp, w ? (s64)w->cta->linear : -1,
                other_cta, addr, 1,        {0}};
    snprintf(r->text, sizeof r->text, "%s", text);
    return seen[key] = r;
  }

  // -- global memory ------------------------------------------------------------------------------------------------
  bool inside(u64 a, u64 n) {
    if (last_range < ranges.size()) {
      Range& r = ranges[last_range];
      if (a >= r.lo && a + n <= r.hi) return true;
    }
    for (size_t k = 0; k < ranges.size(); k++)
      if (a >= ranges[k].lo && a + n <= ranges[k].hi) {
        last_range = k;
        return true;
      }
    if (L->miss) {
      Range r;
      if (L->miss(a, n, &r.lo, &r.hi)) {
        ranges.push_back(r);
        last_range = ranges.size() - 1;
        return true;
      }
    }
    return false;
  }
  ShGlobal* shadow(u64 a) {
    u64 key = a >> 12;
    u32 slot = key & 255;
    if (cache_key[slot] != key) {
      ShGlobal*& page = pages[key];
      if (!page) page = (ShGlobal*)calloc(4096 >> L->granule_global, sizeof(ShGlobal));
      cache_key[slot] = key;
      cache_page[slot] = page;
    }
    return cache_page[slot] + ((a & 4095) >> L->granule_global);
  }
  bool ordered(Cta* c, const Warp& w, u32 cta1, u32 phase, s32 warp) {  // was (cta1 - 1, phase, warp) released to w?
    auto it = c->known.find(cta1 - 1);
    if (it == c->known.end()) return false;
    for (auto& p : it->second)
      if ((phase < p.phase || (phase == p.phase && warp == p.warp)) && (p.by == w.id || p.at_phase < c->phase))
        return true;
    return false;
  }
  void track_global(Warp& w, int pc, int lane, u64 a, u32 n, bool write, bool atomic, bool silent = false) {
    Cta* c = w.cta;
    u32 me = c->linear + 1;
    u32 g = 1u << L->granule_global;
    for (u64 p = a & ~(u64)(g - 1); p < a + n; p += g) {
      ShGlobal* e = shadow(p);
      if (e->wcta && !(atomic && e->watomic)) {
        if (e->wcta != me) {
          if (!ordered(c, w, e->wcta, e->wphase, e->wwarp))
            report(silent                 ? SAME_VALUE
                   : atomic || e->watomic ? ATOMIC_MIX
                                          : RACE_GLOBAL_GRID,
                   pc, lane, &w, p, e->wpc, e->wwarp, e->wcta - 1, write ? "write after write" : "read after write");
        } else if (e->wwarp != w.id && e->wphase == c->phase)
          report(silent ? SAME_VALUE : RACE_GLOBAL_CTA, pc, lane, &w, p, e->wpc, e->wwarp, e->wcta - 1,
                 write ? "write after write" : "read after write");
      }
      if (write) {
        if (e->rcta) {
          if (e->rcta != me) {
            if (e->rcta == ~0u ? c->known.empty()
                               : !ordered(c, w, e->rcta, e->rphase, 31 - __builtin_clz(e->rmask | 1)))
              report(atomic ? ATOMIC_MIX : RACE_GLOBAL_GRID, pc, lane, &w, p, e->rpc, -1,
                     e->rcta == ~0u ? -1 : (s64)e->rcta - 1, "write after read");
          } else if (e->rphase == c->phase && (e->rmask & ~(1u << w.id)))
            report(RACE_GLOBAL_CTA, pc, lane, &w, p, e->rpc, __builtin_ctz(e->rmask & ~(1u << w.id)), me - 1,
                   "write after read");
        }
        if (!(atomic && e->wcta && !e->watomic && e->wcta != me)) {
          e->wcta = me;
          e->wphase = c->phase;
          e->wwarp = w.id;
          e->wpc = pc;
          e->watomic = atomic;
        }
      } else if (!atomic) {
        if (e->rcta == 0) {
          e->rcta = me;
          e->rphase = c->phase;
          e->rmask = 1u << w.id;
          e->rpc = pc;
        } else if (e->rcta != me) {
          e->rcta = ~0u;
          e->rpc = pc;
        } else {
          if (e->rphase != c->phase) {
            e->rphase = c->phase;
            e->rmask = 0;
          }
          e->rmask |= 1u << w.id;
          e->rpc = pc;
        }
      }
    }
  }
  void release(Warp& w, u64 a) {
    auto& at = published[a];
    Cta* c = w.cta;
    at.push_back(Pub{c->linear, c->phase, w.id, 0, 0});
    for (auto& kv : c->known)
      for (auto& p : kv.second)
        if (p.by == w.id || p.at_phase < c->phase) {
          bool have = false;
          for (auto& q : at)
            if (q.cta == p.cta && q.phase >= p.phase && (q.warp == p.warp || q.phase > p.phase)) {
              have = true;
              break;
            }
          if (!have) at.push_back(Pub{p.cta, p.phase, p.warp, 0, 0});
        }
  }
  void acquire(Warp& w, u64 a) {
    auto it = published.find(a);
    if (it == published.end()) return;
    Cta* c = w.cta;
    for (auto& p : it->second)
      if (p.cta != c->linear) {
        auto& v = c->known[p.cta];
        bool have = false;
        for (auto& q : v)
          if (q.phase == p.phase && q.warp == p.warp && (q.by == w.id || q.at_phase < c->phase)) have = true;
        if (!have) v.push_back(Pub{p.cta, p.phase, p.warp, c->phase, w.id});
      }
  }

  // -- shared memory ------------------------------------------------------------------------------------------------
  bool shared_ok(Warp& w, int pc, int lane, u64 a, u32 n) {
    if (a + n <= (u64)L->shared_size) return true;
    report(OOB_SHARED, pc, lane, &w, a);
    return false;
  }
  void track_shared(Warp& w, int pc, int lane, u64 a, u32 n, bool write, bool atomic = false, bool silent = false) {
    Cta* c = w.cta;
    u32 g = L->granule_shared;
    u32 mine = 1u << w.id;
    for (u64 p = a >> g; p << g < a + n; p++) {
      ShShared& e = c->shadow[p];
      if (L->checks & CHECK_SHARED_RACE) {
        if (e.wphase == c->phase && e.wwarp != w.id && !(atomic && e.pad) && !silent)
          report(RACE_SHARED, pc, lane, &w, p << g, e.wpc, e.wwarp, c->linear,
                 write ? "write after write" : "read after write");
        if (write && e.rphase == c->phase && (e.rmask & ~mine))
          report(RACE_SHARED, pc, lane, &w, p << g, e.rpc, __builtin_ctz(e.rmask & ~mine), c->linear,
                 "write after read");
      }
      if (write) {
        e.wphase = c->phase;
        e.wwarp = w.id;
        e.wpc = pc;
        e.pad = atomic;
        e.wfences = w.fences.size();
      } else {
        if ((L->checks & CHECK_INIT) && e.wphase < c->base_phase) report(UNINIT_SHARED, pc, lane, &w, p << g);
        if (e.rphase != c->phase) {
          e.rphase = c->phase;
          e.rmask = 0;
        }
        e.rmask |= mine;
        e.rpc = pc;
      }
    }
    if (write) return;
    for (const Bulk& k : c->in_flight)
      if (a < k.hi && a + n > k.lo)
        report(ASYNC_PENDING, pc, lane, &w, a, k.pc, k.warp, c->linear, "read before the copy was waited for");
    if (!c->warps.empty())
      for (auto& v : w.cta->warps) {
        for (auto& k : v.open)
          if (k.dst < a + n && a < k.dst + k.size)
            report(ASYNC_PENDING, pc, lane, &w, a, k.pc, v.id, c->linear, "read before the copy was waited for");
        for (auto& gr : v.groups)
          for (auto& k : gr)
            if (k.dst < a + n && a < k.dst + k.size)
              report(ASYNC_PENDING, pc, lane, &w, a, k.pc, v.id, c->linear, "read before the copy was waited for");
      }
  }
  // The memory behind a lane's address, after the checks; null where it may not be touched.
  inline u8* at(Warp& w, const Ins& I, int pc, int lane, u64 a, u32 n, int space, bool write, bool atomic,
                const u8* value = nullptr) {
    if (space == SP_GENERIC) {
      if (a >= LOCAL_WINDOW && a < LOCAL_WINDOW + (1ull << 32)) {
        a -= LOCAL_WINDOW;
        space = SP_LOCAL;
      } else if (a >= SHARED_WINDOW && a < SHARED_WINDOW + (1ull << 32)) {
        a -= SHARED_WINDOW;
        space = SP_SHARED;
      } else space = SP_GLOBAL;
    }
    if (a & (n - 1)) {
      report(MISALIGNED, pc, lane, &w, a);
      return nullptr;
    }
    if (space == SP_GLOBAL) {
      if ((L->checks & CHECK_MEM) && !inside(a, n)) {
        report(OOB_GLOBAL, pc, lane, &w, a, -1, -1, -1, write ? "write" : "read");
        return nullptr;
      }
      if (L->checks & CHECK_GLOBAL_RACE)
        track_global(w, pc, lane, a, n, write, atomic, value && !memcmp(value, (void*)a, n));
      return (u8*)a;
    }
    if (space == SP_SHARED) {
      if (!shared_ok(w, pc, lane, a, n)) return nullptr;
      if (L->checks & (CHECK_SHARED_RACE | CHECK_INIT))
        track_shared(w, pc, lane, a, n, write, atomic, value && !memcmp(value, w.cta->smem + a, n));
      return w.cta->smem + a;
    }
    if (a + n > (u64)L->local_size) {
      report(OOB_SHARED, pc, lane, &w, a, -1, -1, -1, "local");
      return nullptr;
    }
    return w.cta->local.data() + (size_t)(w.id * 32 + lane) * L->local_size + a;
  }
  void finish(Warp& w, std::vector<Copy>& group) {
    for (auto& k : group) {
      if (L->checks & (CHECK_SHARED_RACE | CHECK_INIT)) track_shared(w, k.pc, 0, k.dst, k.size, true);
      memcpy(w.cta->smem + k.dst, (void*)k.src, k.size - k.zero);
      memset(w.cta->smem + k.dst + k.size - k.zero, 0, k.zero);
    }
    group.clear();
  }
  void count_memory(const Ins& I, int pc, const u64* a, u32 m, u32 n, int space);
  int run(Warp& w, s64 budget);
  void atomic(Warp& w, const Ins& I, int pc, u32 m);
  void mma(Warp& w, const Ins& I);
  bool hopper(Warp& w, const Ins& I, int pc, u32 m);
  bool blackwell(Warp& w, const Ins& I, int pc, u32 m);
  Cell* cell(Warp& w, int pc, int lane, u32 row, u32 column, const char* what);
  void load_tensor(Warp& w, const TensorAccess& t);
  void store_tensor(Warp& w, const TensorAccess& t);
  void issue_product(Warp& w, const Product& p);
  void multiply_tensor(Warp& w, const Product& p, u32 completion);
  void complete_products(Warp& w, MBar& b, u32 mbar, u32 parity);
  void allocate(Warp& w, const Ins& I, int pc, u32 m);
  void give_back(Warp& w, const Ins& I, int pc, u32 m);
  void leave_tensor(Cta* c);
  void load_parameter(Warp& w, const Ins& I, int pc, u32 m);
  void pack(Warp& w, const Ins& I, int pc, u32 m);
  void unpack(Warp& w, const Ins& I, int pc, u32 m);
  void load(Warp& w, const Ins& I, int pc, u32 m);
  void store(Warp& w, const Ins& I, int pc, u32 m);
  void copy_async(Warp& w, const Ins& I, int pc, u32 m);
  void load_matrices(Warp& w, const Ins& I, int pc, u32 m);
  void store_matrices(Warp& w, const Ins& I, int pc, u32 m);
  void shuffle(Warp& w, const Ins& I, int pc, u32 m);
  void vote(Warp& w, const Ins& I, int pc, u32 m);
  void match(Warp& w, const Ins& I, int pc, u32 m);
  void reduce_warp(Warp& w, const Ins& I, int pc, u32 m);
  void start(Cta* c, u32 linear);
  void release_barrier(Cta* c);
  int go();
};
