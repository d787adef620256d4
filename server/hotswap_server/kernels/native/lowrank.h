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

// hidden[t][r] = x[t] . a[r] for COUNT rows of a.
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

// out[t] += hidden[t] @ b for COUNT rows of b. A few rows at a time: memory is read best along few streams.
#define EXPAND(TOKENS, COUNT)                                                                               \
  static void expand_##TOKENS##_##COUNT(const float *hidden, const float *b, int64_t width, float *out,     \
                                        int64_t out_stride) {                                               \
    int64_t n = 0;                                                                                          \
    for (; n + LANES <= width; n += LANES) {                                                                \
      vec rows[COUNT];                                                                                      \
      for (int r = 0; r < COUNT; r++) rows[r] = load(b + r * width + n);                                    \
      for (int t = 0; t < TOKENS; t++) {                                                                    \
        vec acc = load(out + t * out_stride + n);                                                           \
        for (int r = 0; r < COUNT; r++) acc += splat(hidden[t * MAX_RANK + r]) * rows[r];                   \
        store(out + t * out_stride + n, acc);                                                               \
      }                                                                                                     \
    }                                                                                                       \
    for (int t = 0; t < TOKENS; t++)                                                                        \
      for (int64_t rest = n; rest < width; rest++)                                                          \
        for (int r = 0; r < COUNT; r++)                                                                     \
          out[t * out_stride + rest] += hidden[t * MAX_RANK + r] * b[r * width + rest];                     \
  }

// Both halves for any number of rows: shrink_all_TOKENS and expand_all_TOKENS.
#define LOW_RANK(TOKENS)                                                                                    \
  SHRINK(TOKENS, 4)                                                                                      \
  SHRINK(TOKENS, 1)                                                                                         \
  EXPAND(TOKENS, 4)                                                                                      \
  EXPAND(TOKENS, 1)                                                                                         \
  static void shrink_all_##TOKENS(const float *x, int64_t k_size, const float *a, int64_t rank,             \
                                  float *hidden) {                                                          \
    int64_t r = 0;                                                                                          \
    for (; r + ROWS <= rank; r += ROWS) shrink_##TOKENS##_4(x, k_size, a + r * k_size, hidden + r);  \
    for (; r < rank; r++) shrink_##TOKENS##_1(x, k_size, a + r * k_size, hidden + r);                   \
  }                                                                                                         \
  static void expand_all_##TOKENS(const float *hidden, int64_t rank, const float *b, int64_t width,         \
                                  float *out, int64_t out_stride) {                                         \
    int64_t r = 0;                                                                                          \
    for (; r + ROWS <= rank; r += ROWS)                                                                     \
      expand_##TOKENS##_4(hidden + r, b + r * width, width, out, out_stride);                        \
    for (; r < rank; r++) expand_##TOKENS##_1(hidden + r, b + r * width, width, out, out_stride);       \
  }
