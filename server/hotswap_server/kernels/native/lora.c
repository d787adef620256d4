// out[t, offset_m : offset_m + n_m] += (x[t] @ A[slot]^T) @ B[slot] for every token with an adapter.
//
// The members of one call share their input (q, k and v; gate and up), hence one pass over x. A is
// [slots, members, max_rank, k], B (scaled already) one table per member, [slots, max_rank, n_m], so that both
// products run along contiguous rows and rows beyond an adapter's rank are never touched. Neighbouring tokens of
// one adapter go in pairs, which halves the reading of its weights.

#include "native.h"

#define MAX_RANK 1024
#define MAX_TOKENS 2
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

#define UPDATE(TOKENS)                                                                                       \
  SHRINK(TOKENS, 4)                                                                                          \
  SHRINK(TOKENS, 1)                                                                                          \
  EXPAND(TOKENS)                                                                                             \
  static void update_##TOKENS(const float *x, int64_t k_size, const float *a, const float *b, int64_t rank,  \
                              int64_t width, float *out, int64_t out_stride) {                               \
    float hidden[TOKENS * MAX_RANK];                                                                         \
    int64_t r = 0;                                                                                           \
    for (; r + ROWS <= rank; r += ROWS) shrink_##TOKENS##_4(x, k_size, a + r * k_size, hidden + r);          \
    for (; r < rank; r++) shrink_##TOKENS##_1(x, k_size, a + r * k_size, hidden + r);                        \
    expand_##TOKENS(hidden, rank, b, width, out, out_stride);                                                \
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
