// out[t, offset_m : offset_m + n_m] += (x[t] @ A[slot]^T) @ B[slot] for every token with an adapter.
//
// The members of one call share their input (q, k and v; gate and up), hence one shrink. A is
// [slots, members, max_rank, k], B (scaled already) one table per member, [slots, max_rank, n_m], so that both
// passes run along contiguous rows and rows beyond an adapter's rank are never touched.

#include "native.h"

#define MAX_RANK 1024

void hotswap_lora(const float *x, const float *a, const float *const *b, const int32_t *slots,
                  const int32_t *ranks, const int32_t *widths, const int32_t *offsets, float *out, int64_t tokens,
                  int64_t members, int64_t max_rank, int64_t k_size, int64_t out_stride, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t slot = slots[t];
    if (slot < 0) continue;
    const float *row = x + t * k_size;
    for (int64_t m = 0; m < members; m++) {
      const int64_t rank = ranks[slot * members + m];
      float hidden[MAX_RANK];
      const float *shrink = a + (slot * members + m) * max_rank * k_size;
      for (int64_t r = 0; r < rank; r++) {
        float sum = 0.0f;
        const float *weights = shrink + r * k_size;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < k_size; k++) sum += row[k] * weights[k];
        hidden[r] = sum;
      }
      const int64_t width = widths[m];
      const float *expand = b[m] + slot * max_rank * width;
      float *target = out + t * out_stride + offsets[m];
      for (int64_t r = 0; r < rank; r++) {
        const float value = hidden[r];
        const float *weights = expand + r * width;
#pragma omp simd
        for (int64_t n = 0; n < width; n++) target[n] += value * weights[n];
      }
    }
  }
}
