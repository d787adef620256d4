// The two halves of a low-rank product for one or two tokens: along rows of the first matrix, then of the second.

#pragma once

#include "native.h"

#define MAX_RANK 1024
#define ROWS 4

static inline float sum(vec v) {
  float total = 0.0f;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

// hidden[t][r] = x[t] . a[r] for ROWS rows of a.
#define SHRINK(TOKENS, COUNT)                                                                               \
  static void shrink_##TOKENS##_##COUNT(const float *x, int64_t k_size, const float *a, float *hidden) {    \
    vec acc[TOKENS][COUNT] = {0};                                                                           \
    int64_t k = 0;                                                                                          \
    for (; k + LANES <= k_size; k += LANES)                                                                 \
      for (int t = 0; t < TOKENS; t++) {                                                                    \
        const vec value = load(x + t * k_size + k);                                                         \
        for (int r = 0; r < COUNT; r++) acc[t][r] += value * load(a + r * k_size + k);                      \
      }                                                                                                     \
    for (int t = 0; t < TOKENS; t++)                                                                        \
      for (int r = 0; r < COUNT; r++) {                                                                     \
        float total = sum(acc[t][r]);                                                                       \
        for (int64_t rest = k; rest < k_size; rest++) total += x[t * k_size + rest] * a[r * k_size + rest]; \
        hidden[t * MAX_RANK + r] = total;                                                                   \
      }                                                                                                     \
  }

// out[t] += hidden[t] @ b over `rank` rows of b.
#define EXPAND(TOKENS)                                                                                       \
  static void expand_##TOKENS(const float *hidden, int64_t rank, const float *b, int64_t width, float *out,  \
                              int64_t out_stride) {                                                          \
    int64_t n = 0;                                                                                           \
    for (; n + PANEL <= width; n += PANEL) {                                                                 \
      vec acc[TOKENS][2];                                                                                    \
      for (int t = 0; t < TOKENS; t++) {                                                                     \
        acc[t][0] = load(out + t * out_stride + n);                                                          \
        acc[t][1] = load(out + t * out_stride + n + LANES);                                                  \
      }                                                                                                      \
      for (int64_t r = 0; r < rank; r++) {                                                                   \
        const vec b0 = load(b + r * width + n), b1 = load(b + r * width + n + LANES);                        \
        for (int t = 0; t < TOKENS; t++) {                                                                   \
          const vec value = splat(hidden[t * MAX_RANK + r]);                                                 \
          acc[t][0] += value * b0;                                                                           \
          acc[t][1] += value * b1;                                                                           \
        }                                                                                                    \
      }                                                                                                      \
      for (int t = 0; t < TOKENS; t++) {                                                                     \
        store(out + t * out_stride + n, acc[t][0]);                                                          \
        store(out + t * out_stride + n + LANES, acc[t][1]);                                                  \
      }                                                                                                      \
    }                                                                                                        \
    for (int t = 0; t < TOKENS; t++)                                                                         \
      for (int64_t rest = n; rest < width; rest++)                                                           \
        for (int64_t r = 0; r < rank; r++)                                                                   \
          out[t * out_stride + rest] += hidden[t * MAX_RANK + r] * b[r * width + rest];                      \
  }
