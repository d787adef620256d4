// y[M, N] = x[M, K] @ w[N, K]^T + bias for skinny x: the decode step of a small batch.
//
// Weights are packed in panels of PANEL output features, w[N / PANEL][K][PANEL], so that a row of a panel is one
// or two cache lines. A panel is read from memory once and used for every row of x; while one block of rows is
// computed, the next panel is prefetched, so memory and arithmetic overlap.

#include "native.h"

// Rows by two vectors of accumulators, which with the weights' two and a splat fill the registers.
#if LANES == 16
#define MAX_ROWS 12
#else
#define MAX_ROWS 6
#endif
// Rows of x that stay in the second-level cache while all panels pass by.
#define ROW_BLOCK 96
// The passes over a panel that share the prefetching of the next one.
#define PREFETCHING_PASSES 3
#define CACHE_LINE 64

#define MICRO_KERNEL(ROWS)                                                                                     \
  static void panel_##ROWS(const float *restrict x, size_t ldx, const float *restrict w, size_t k_size,        \
                           float *restrict y, size_t ldy, const float *bias, const char *next, size_t stride,  \
                           int columns) {                                                                      \
    vec acc[ROWS][2];                                                                                          \
    for (int m = 0; m < ROWS; m++) {                                                                           \
      acc[m][0] = load(bias);                                                                                  \
      acc[m][1] = load(bias + LANES);                                                                          \
    }                                                                                                          \
    for (size_t k = 0; k < k_size; k++) {                                                                      \
      __builtin_prefetch(next + k * stride, 0, 2);                                                             \
      if (PANEL * sizeof(float) > CACHE_LINE) __builtin_prefetch(next + k * stride + CACHE_LINE, 0, 2);        \
      const vec w0 = load(w + k * PANEL), w1 = load(w + k * PANEL + LANES);                                    \
      _Pragma("GCC unroll 16") for (int m = 0; m < ROWS; m++) {                                                \
        const vec value = splat(x[m * ldx + k]);                                                               \
        acc[m][0] += value * w0;                                                                               \
        acc[m][1] += value * w1;                                                                               \
      }                                                                                                        \
    }                                                                                                          \
    for (int m = 0; m < ROWS; m++) {                                                                           \
      float *row = y + m * ldy;                                                                                \
      if (columns == PANEL) {                                                                                  \
        store(row, acc[m][0]);                                                                                 \
        store(row + LANES, acc[m][1]);                                                                         \
      } else {                                                                                                 \
        memcpy(row, acc[m], columns * sizeof(float));                                                          \
      }                                                                                                        \
    }                                                                                                          \
  }

MICRO_KERNEL(1)
MICRO_KERNEL(2)
MICRO_KERNEL(3)
MICRO_KERNEL(4)
MICRO_KERNEL(5)
MICRO_KERNEL(6)
#if MAX_ROWS == 12
MICRO_KERNEL(7)
MICRO_KERNEL(8)
MICRO_KERNEL(9)
MICRO_KERNEL(10)
MICRO_KERNEL(11)
MICRO_KERNEL(12)
#endif

typedef void (*panel_fn)(const float *, size_t, const float *, size_t, float *, size_t, const float *, const char *,
                         size_t, int);
static const panel_fn PANEL_FN[MAX_ROWS + 1] = {
    0,       panel_1, panel_2, panel_3, panel_4,  panel_5,  panel_6,
#if MAX_ROWS == 12
    panel_7, panel_8, panel_9, panel_10, panel_11, panel_12,
#endif
};

static const float ZEROS[PANEL];

int64_t hotswap_panel_width(void) { return PANEL; }

void hotswap_linear(const float *x, const float *w, const float *bias, float *y, int64_t m_size, int64_t n_size,
                    int64_t k_size, int64_t threads) {
  const int64_t panels = (n_size + PANEL - 1) / PANEL;
  const size_t panel_bytes = k_size * PANEL * sizeof(float);
#pragma omp parallel num_threads(threads)
  for (int64_t block = 0; block < m_size; block += ROW_BLOCK) {
    const int64_t rows = m_size - block < ROW_BLOCK ? m_size - block : ROW_BLOCK;
    const int64_t passes = (rows + MAX_ROWS - 1) / MAX_ROWS;
    const int64_t sharing = passes < PREFETCHING_PASSES ? passes : PREFETCHING_PASSES;
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < panels; p++) {
      const float *panel = w + p * k_size * PANEL;
      const int columns = (int)((p + 1) * PANEL <= n_size ? PANEL : n_size - p * PANEL);
      int64_t row = 0;
      for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t left = passes - pass;
        const int64_t count = (rows - row + left - 1) / left;
        // Later passes, and the last panel, prefetch the line that they read anyway.
        const int ahead = pass < sharing && p + 1 < panels;
        const char *next = (const char *)panel + (ahead ? panel_bytes + pass * (panel_bytes / sharing) : 0);
        const size_t stride = ahead ? PANEL * sizeof(float) / sharing : 0;
        PANEL_FN[count](x + (block + row) * k_size, k_size, panel, k_size, y + (block + row) * n_size + p * PANEL,
                        n_size, bias ? bias + p * PANEL : ZEROS, next, stride, columns);
        row += count;
      }
    }
  }
}
