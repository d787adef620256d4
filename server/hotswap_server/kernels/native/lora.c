// out[t, offset_m : offset_m + n_m] += (x[t] @ A[slot]^T) @ B[slot] for every token with an adapter.
//
// The members of one call share their input (q, k and v; gate and up), hence one pass over x. A is
// [slots, members, max_rank, k], B (scaled already) one table per member, [slots, max_rank, n_m], so that both
// products run along contiguous rows and rows beyond an adapter's rank are never touched. Neighbouring tokens of
// one adapter go in pairs, which halves the reading of its weights.

#include "lowrank.h"

#define MAX_TOKENS 2

#define UPDATE(TOKENS)                                                                                       \
  LOW_RANK(TOKENS)                                                                                           \
  static void update_##TOKENS(const float *x, int64_t k_size, const float *a, const float *b, int64_t rank,  \
                              int64_t width, float *out, int64_t out_stride) {                               \
    float hidden[TOKENS * MAX_RANK];                                                                         \
    shrink_all_##TOKENS(x, k_size, a, rank, hidden);                                                         \
    expand_all_##TOKENS(hidden, rank, b, width, out, out_stride);                                            \
  }

UPDATE(1)
UPDATE(2)

void hotswap_lora(const float *x, const float *a, const float *const *b, const int32_t *slots,
                  const int32_t *ranks, const int32_t *widths, const int32_t *offsets, float *out, int64_t tokens,
                  int64_t members, int64_t max_rank, int64_t k_size, int64_t out_stride, int64_t threads) {
  // Pairs at even positions only, so that which tokens pair does not depend on who computes them.
#pragma omp parallel for collapse(2) schedule(dynamic, 2) num_threads(threads)
  for (int64_t first = 0; first < tokens; first += MAX_TOKENS) {
    for (int64_t m = 0; m < members; m++) {
      const int64_t stop = first + MAX_TOKENS < tokens ? first + MAX_TOKENS : tokens;
      const int pair = stop - first == 2 && slots[first] == slots[first + 1];
      for (int64_t t = first; t < stop; t += pair ? 2 : 1) {
        const int64_t slot = slots[t];
        if (slot < 0) continue;
        const int64_t rank = ranks[slot * members + m];
        const float *shrink = a + (slot * members + m) * max_rank * k_size;
        const float *expand = b[m] + slot * max_rank * widths[m];
        float *target = out + t * out_stride + offsets[m];
        if (rank == 0) continue;
        if (pair)
          update_2(x + t * k_size, k_size, shrink, expand, rank, widths[m], target, out_stride);
        else
          update_1(x + t * k_size, k_size, shrink, expand, rank, widths[m], target, out_stride);
      }
    }
  }
}
