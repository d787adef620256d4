// target = scale * (source + b^T a) over packed weights, whose layout linear.c describes, in one pass.
//
// a is [rank, k], b [rank, panels * PANEL] and scale [panels * PANEL], both as the panels' output features are.
// On the calling thread alone: that is one beside those of a running step.

#include "native.h"

#define INPUTS 4

// Inputs k to k + COUNT of one panel.
#define MERGE(COUNT)                                                                                          \
  static void merge_##COUNT(const float *source, const float *a, size_t k_size, const float *b, size_t width, \
                            int64_t rank, const float *scale, float *target) {                                \
    vec acc[COUNT][2];                                                                                        \
    for (int i = 0; i < COUNT; i++)                                                                           \
      for (int half = 0; half < 2; half++) acc[i][half] = load(source + i * PANEL + half * LANES);            \
    for (int64_t r = 0; r < rank; r++) {                                                                      \
      const vec b0 = load(b + r * width), b1 = load(b + r * width + LANES);                                   \
      for (int i = 0; i < COUNT; i++) {                                                                       \
        const vec value = splat(a[r * k_size + i]);                                                           \
        acc[i][0] += value * b0;                                                                              \
        acc[i][1] += value * b1;                                                                              \
      }                                                                                                       \
    }                                                                                                         \
    for (int i = 0; i < COUNT; i++)                                                                           \
      for (int half = 0; half < 2; half++)                                                                    \
        store(target + i * PANEL + half * LANES, acc[i][half] * load(scale + half * LANES));                  \
  }

MERGE(1)
MERGE(4)

void hotswap_merge(const float *source, const float *a, const float *b, const float *scale, float *target,
                   int64_t panels, int64_t k_size, int64_t rank) {
  const size_t width = panels * PANEL;
  for (int64_t p = 0; p < panels; p++) {
    const size_t panel = p * k_size * PANEL;
    int64_t k = 0;
    for (; k + INPUTS <= k_size; k += INPUTS)
      merge_4(source + panel + k * PANEL, a + k, k_size, b + p * PANEL, width, rank, scale + p * PANEL,
              target + panel + k * PANEL);
    for (; k < k_size; k++)
      merge_1(source + panel + k * PANEL, a + k, k_size, b + p * PANEL, width, rank, scale + p * PANEL,
              target + panel + k * PANEL);
  }
}
