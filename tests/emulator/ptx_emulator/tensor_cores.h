// mma.sync: products in fp64, rounded once.
#pragma once
#include "registers.h"

// x[0]: 0 bf16, 1 f16, 2 tf32, 3 s8; x[1]: k; o: d0..3, a0..3, b0..1, c0..3 ; x[2]: f16 accumulators
void Machine::mma(Warp& w, const Ins& I) {
  u8* R = w.R;
  int K = I.x[1];
  static thread_local f64 A[16][32], B[32][8], C[16][8];
  int na = I.x[0] == 2 ? K / 2 : K / 4, nb = I.x[0] == 2 ? K / 4 : K / 8;
  for (int l = 0; l < 32; l++) {
    int g = l >> 2, t = l & 3;
    for (int r = 0; r < na; r++) {
      u32 v = ((u32*)(R + I.o[4 + r]))[l];
      if (I.x[0] == 2) A[g + 8 * (r & 1)][t + 4 * (r >> 1)] = bitcast<f32>(v & 0xffffe000u);
      else
        for (int h = 0; h < 2; h++) {
          u16 q = (u16)(v >> (16 * h));
          A[g + 8 * (r & 1)][2 * t + h + 8 * (r >> 1)] = I.x[0] ? f32_of_f16(q) : f32_of_bf16(q);
        }
    }
    for (int r = 0; r < nb; r++) {
      u32 v = ((u32*)(R + I.o[8 + r]))[l];
      if (I.x[0] == 2) B[t + 4 * r][g] = bitcast<f32>(v & 0xffffe000u);
      else
        for (int h = 0; h < 2; h++) {
          u16 q = (u16)(v >> (16 * h));
          B[2 * t + h + 8 * r][g] = I.x[0] ? f32_of_f16(q) : f32_of_bf16(q);
        }
    }
    if (I.x[2])
      for (int r = 0; r < 2; r++) {
        u32 v = ((u32*)(R + I.o[10 + r]))[l];
        for (int h = 0; h < 2; h++) C[g + 8 * r][2 * t + h] = f32_of_f16((u16)(v >> (16 * h)));
      }
    else
      for (int r = 0; r < 4; r++) C[g + 8 * (r >> 1)][2 * t + (r & 1)] = ((f32*)(R + I.o[10 + r]))[l];
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < K; k++) {
      f64 x = A[i][k];
      for (int j = 0; j < 8; j++) C[i][j] += x * B[k][j];
    }
  for (int l = 0; l < 32; l++) {
    int g = l >> 2, t = l & 3;
    if (I.x[2])
      for (int r = 0; r < 2; r++)
        ((u32*)(R + I.o[r]))[l] = (u32)f16_of(C[g + 8 * r][2 * t]) | ((u32)f16_of(C[g + 8 * r][2 * t + 1]) << 16);
    else
      for (int r = 0; r < 4; r++) ((f32*)(R + I.o[r]))[l] = canon((f32)C[g + 8 * (r >> 1)][2 * t + (r & 1)]);
  }
}
