// The interpreter: one warp at a time executes assembled PTX, an instruction for its 32 lanes at once.
//
// Warps of a CTA run independently between barriers, in an order drawn from the seed; several CTAs may be resident
// and interleaved. The README beside this folder says what the checks mean.
#include "warp.h"

void Machine::start(Cta* c, u32 linear) {
  c->linear = linear;
  c->x = linear % L->grid[0];
  c->y = linear / L->grid[0] % L->grid[1];
  c->z = linear / L->grid[0] / L->grid[1];
  int n = L->threads / 32;
  c->live = n;
  c->known.clear();
  c->mbars.clear();
  c->in_flight.clear();
  c->tensor = TensorMemory{};
  if (c->warps.empty()) {
    c->warps.resize(n);
    for (int k = 0; k < n; k++) c->warps[k].R = (u8*)aligned_alloc(64, (L->regs_size + 63) / 64 * 64);
    c->smem = (u8*)aligned_alloc(1024, std::max<s64>(1024, (L->shared_size + 1023) / 1024 * 1024));
    if (L->checks & (CHECK_SHARED_RACE | CHECK_INIT))
      c->shadow.assign((L->shared_size >> L->granule_shared) + 8, ShShared{});
    c->phase = 0;
    c->local.resize((size_t)L->threads * L->local_size);
    for (int k = 0; k < n; k++) memset(c->warps[k].R, 0xC5, L->regs_size);
  }
  memset(c->smem, 0xCB, L->shared_size);
  c->phase += 2;
  c->base_phase = c->phase - 1;  // that of tensor copies, which their mbarrier orders
  memset(c->bars, 0, sizeof c->bars);
  for (int k = 0; k < n; k++) {
    Warp& w = c->warps[k];
    w.id = k;
    w.alive = ~0u;
    w.state = READY;
    w.entries.assign(1, Entry{~0u, 0, false});
    w.cta = c;
    w.fenced = false;
    w.open.clear();
    w.groups.clear();
    w.relaxed.clear();
    w.bulk.clear();
    w.bulk_open.clear();
    w.products.clear();
    w.product_groups.clear();
    w.fences.clear();
    w.commits.clear();
    w.tensor_loads.clear();
    w.tensor_stores.clear();
    w.issued.clear();
    w.waited = 0;
    memcpy(w.R, L->image, L->image_size);
    for (s64 s = 0; s < L->nspecials; s++) {
      u32* d = (u32*)(w.R + L->specials[2 * s + 1]);
      for (u32 i = 0; i < 32; i++) {
        u32 t = k * 32 + i, v = 0;
        switch (L->specials[2 * s]) {
          case 0: v = t; break;
          case 1:
          case 2: v = 0; break;
          case 3: v = L->threads; break;
          case 4:
          case 5: v = 1; break;
          case 6: v = c->x; break;
          case 7: v = c->y; break;
          case 8: v = c->z; break;
          case 9: v = L->grid[0]; break;
          case 10: v = L->grid[1]; break;
          case 11: v = L->grid[2]; break;
          case 12: v = i; break;
          case 13: v = k; break;
          case 14: v = linear % L->sm_count; break;
          case 15: v = 1u << i; break;
          case 16: v = (1u << i) - 1; break;
          case 17: v = (u32)((2ull << i) - 1); break;
          case 18: v = ~(u32)((2ull << i) - 1); break;
          case 19: v = ~((1u << i) - 1); break;
          case 20: v = L->sm_count; break;
          case 21: v = n; break;
          case 22: v = L->shared_size; break;
        }
        d[i] = v;
      }
    }
  }
}
void Machine::release_barrier(Cta* c) {
  for (int b = 0; b < 16; b++) {
    Barrier& B = c->bars[b];
    if (!B.arrived) continue;
    u32 need = B.need ? B.need : (u32)c->live;
    if (B.arrived < need) continue;
    B.arrived = 0;
    c->phase++;
    for (auto& w : c->warps)
      if (w.state == AT_BARRIER && w.bar_id == b) w.state = READY;
  }
}
static void finish_cta(Machine* M, Cta* c) {
  for (auto& w : c->warps) flush_bulk(M, w, 0);
  M->leave_tensor(c);
}
int Machine::go() {
  u64 idle = 0;
  u64 total = (u64)L->grid[0] * L->grid[1] * L->grid[2];
  std::vector<u32> order(total);
  for (u64 k = 0; k < total; k++) order[k] = (u32)k;
  if (L->seed)
    for (u64 k = total; k > 1; k--) std::swap(order[k - 1], order[(next() >> 20) % k]);
  u64 started = 0;
  int slots = std::max(1, (int)std::min<u64>(L->resident, total));
  for (int k = 0; k < slots; k++) {
    pool.emplace_back(new Cta());
    start(pool.back().get(), order[started++]);
    resident.push_back(pool.back().get());
  }
  std::vector<Warp*> ready;
  while (!resident.empty() && !fatal) {
    ready.clear();
    for (auto* c : resident)
      for (auto& w : c->warps)
        if (w.state == READY) ready.push_back(&w);
    if (ready.empty()) {
      Warp* stuck = nullptr;
      for (auto* c : resident)
        for (auto& w : c->warps)
          if (w.state == AT_BARRIER) stuck = &w;
      report(DEADLOCK, stuck && !stuck->entries.empty() ? stuck->entries[0].pc - 1 : 0, 0, stuck, 0, -1, -1, -1,
             "no warp can run");
      break;
    }
    Warp* w = ready[L->seed ? below(ready.size()) : 0];
    Cta* c = w->cta;
    s64 budget = L->quantum > 0 ? 1 + below(L->quantum) : 1000000;
    u64 before = L->steps;
    int why = run(*w, budget);
    idle = why == YIELDED && L->steps - before < 8 ? idle + 1 : 0;
    if (idle > 2000000) {
      report(DEADLOCK, w->entries.empty() ? 0 : w->entries[0].pc, 0, w, 0, -1, -1, -1, "waits for ever");
      break;
    }
    if (why == FINISHED) c->live--;
    if (why == FINISHED || why == HIT_BARRIER) release_barrier(c);
    if (L->steps > L->max_steps) {
      report(TIMEOUT, w->entries.empty() ? 0 : w->entries[0].pc, 0, w, 0, -1, -1, -1, "step limit");
      break;
    }
    if (c->live == 0) {
      finish_cta(this, c);
      if (started < total) start(c, order[started++]);
      else resident.erase(std::find(resident.begin(), resident.end(), c));
    }
    if (why == YIELDED && !L->seed && ready.size() > 1) {  // fixed order, but nobody waits for ever
      for (size_t k = 1; k < ready.size() && !fatal; k++)
        if (ready[k]->state == READY && ready[k]->cta->live) {
          Cta* d = ready[k]->cta;
          int r = run(*ready[k], 1000000);
          if (r == FINISHED) d->live--;
          if (r == FINISHED || r == HIT_BARRIER) release_barrier(d);
          if (d->live == 0) {
            finish_cta(this, d);
            if (started < total) start(d, order[started++]);
            else resident.erase(std::find(resident.begin(), resident.end(), d));
            break;
          }
        }
    }
  }
  for (auto& kv : pages) free(kv.second);
  for (auto& c : pool) {
    for (auto& w : c->warps) free(w.R);
    free(c->smem);
  }
  return 0;
}

extern "C" int emu_run(Launch* L) {
  std::unique_ptr<Machine> M(new Machine());
  M->L = L;
  M->rng = L->seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  M->fatal = false;
  M->last_range = 0;
  for (int k = 0; k < 8; k++) M->next();
  memset(M->cache_key, 0xff, sizeof M->cache_key);
  M->ranges.assign(L->ranges, L->ranges + L->nranges);
  return M->go();
}
extern "C" int emu_sizes(int* ins, int* launch, int* report) {
  *ins = sizeof(Ins);
  *launch = sizeof(Launch);
  *report = sizeof(Report);
  return 0;
}
