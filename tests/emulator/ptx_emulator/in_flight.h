// What asynchronous instructions have issued and not yet done, the barriers that count them, and tensor memory.
#pragma once
#include "lanes.h"

struct Ins;

struct Copy {
  u64 dst, src;
  u32 size, zero;
  int pc;
};
struct Product {  // a product of tensor cores that was issued
  const Ins* I;
  int pc, kind;       // 0 bf16, 1 f16, 2 tf32
  u32 phase, fences;  // the barriers that its program had passed, the proxy fences of its warp
  u64 a, b;           // descriptors of the operands in shared memory
  u32 regs[4][32];    // wgmma's left operand, where it comes from registers
  u32 d, shape;       // tcgen05's result in tensor memory, and its instruction descriptor
  bool accumulate;
};
struct Commit {  // products that arrive together at a barrier in shared memory
  u32 mbar;
  int pc;
  std::vector<Product> products;
};
struct TensorAccess {  // a load from tensor memory or a store that was issued
  const Ins* I;
  int pc;
  u32 at;
  std::vector<u32> values;
};
struct Cell {  // of tensor memory
  u32 value, wphase, rphase, rmask, completion;  // completion: 0 where a store wrote it, else the number of its commit
  s32 wpc;
  u16 wwarp, written;
};
enum { TENSOR_ROWS = 128, TENSOR_COLUMNS = 512 };
struct TensorMemory {
  std::vector<Cell> cells;  // by rows, which the manual calls lanes
  bool allocated[TENSOR_COLUMNS];
  bool relinquished;
  u32 completions;  // of commits
};
struct Bulk {  // a tensor copy into shared memory, between lo and hi
  u32 mbar;
  int pc, warp;
  std::vector<Copy> copies;
  u64 bytes;
  int nan_esize;
  u64 lo, hi;
};

struct MBar {
  u32 expected, pending;
  s64 tx;
  u32 phase;
  u32 completion;  // of the last commit that arrived
};
