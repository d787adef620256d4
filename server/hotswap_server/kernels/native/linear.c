// y[M, N] = x[M, K] @ w[N, K]^T + bias for skinny x: the decode step of a small batch.
//
// Weights are packed in panels of 16 output features, w[N / 16][K][16], so that a row of a panel is one cache
// line. A panel is read from memory once and used for every row of x; while one block of rows is computed, the
// next panel is prefetched, so memory and arithmetic overlap. Six rows by two vectors fill the 16 registers
// of AVX2.

#include "native.h"

#define MAX_ROWS 6
// Rows of x that stay in the second-level cache while all panels pass by.
#define ROW_BLOCK 96

#define MICRO_KERNEL(ROWS, PREFETCH_EVERY)                                                                     \
  static void panel_##ROWS(const float *restrict x, size_t ldx, const float *restrict w, size_t k_size,        \
                           float *restrict y, size_t ldy, const float *bias, const float *next, int columns) { \
    vec acc[ROWS][2];                                                                                          \
    for (int m = 0; m < ROWS; m++) {                                                                           \
      acc[m][0] = load(bias);                                                                                  \
      acc[m][1] = load(bias + 8);                                                                              \
    }                                                                                                          \
    for (size_t k = 0; k < k_size; k++) {                                                                      \
      if (next && k % PREFETCH_EVERY == 0) __builtin_prefetch(next + k / PREFETCH_EVERY * PANEL, 0, 2);        \
      const vec w0 = load(w + k * PANEL), w1 = load(w + k * PANEL + 8);                                        \
      _Pragma("GCC unroll 8") for (int m = 0; m < ROWS; m++) {                                                 \
        const vec value = splat(x[m * ldx + k]);                                                               \
        acc[m][0] += value * w0;                                                                               \
        acc[m][1] += value * w1;                                                                               \
      }                                                                                                        \
    }                                                                                                          \
    for (int m = 0; m < ROWS; m++) {                                                                           \
      float *row = y + m * ldy;                                                                                \
      if (columns == PANEL) {                                                                                  \
        store(row, acc[m][0]);                                                                                 \
        store(row + 8, acc[m][1]);                                                                             \
      } else {                                                                                                 \
        memcpy(row, acc[m], columns * sizeof(float));                                                          \
      }                                                                                                        \
    }                                                                                                          \
  }

// A block of up to three passes over a panel prefetches the next one evenly.
MICRO_KERNEL(1, 1)
MICRO_KERNEL(2, 1)
MICRO_KERNEL(3, 1)
MICRO_KERNEL(4, 2)
MICRO_KERNEL(5, 3)
MICRO_KERNEL(6, 3)

typedef void (*panel_fn)(const float *, size_t, const float *, size_t, float *, size_t, const float *,
                         const float *, int);
static const panel_fn PANEL_FN[MAX_ROWS + 1] = {0, panel_1, panel_2, panel_3, panel_4, panel_5, panel_6};

static const float ZEROS[PANEL];

void hotswap_linear(const float *x, const float *w, const float *bias, float *y, int64_t m_size, int64_t n_size,
                    int64_t k_size, int64_t threads) {
  const int64_t panels = (n_size + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
  for (int64_t block = 0; block < m_size; block += ROW_BLOCK) {
    const int64_t rows = m_size - block < ROW_BLOCK ? m_size - block : ROW_BLOCK;
    const int64_t passes = (rows + MAX_ROWS - 1) / MAX_ROWS;
    const size_t stride = (k_size * PANEL / passes) & ~(size_t)(PANEL - 1);
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < panels; p++) {
      const float *panel = w + p * k_size * PANEL;
      const int columns = (int)((p + 1) * PANEL <= n_size ? PANEL : n_size - p * PANEL);
      int64_t row = 0;
      for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t left = passes - pass;
        const int64_t count = (rows - row + left - 1) / left;
        const float *next = pass < 3 && p + 1 < panels ? panel + k_size * PANEL + pass * stride : 0;
        PANEL_FN[count](x + (block + row) * k_size, k_size, panel, k_size, y + (block + row) * n_size + p * PANEL,
                        n_size, bias ? bias + p * PANEL : ZEROS, next, columns);
        row += count;
      }
    }
  }
}
