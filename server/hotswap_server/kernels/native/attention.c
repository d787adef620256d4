// Attention of single query tokens over a paged key-value cache (Kwon et al., "Efficient Memory Management for
// Large Language Model Serving with PagedAttention", 2023), grouped-query, with a running softmax.
//
// Pages are [pages, kv_heads, page_size, head_dim]: one head's keys of a page are contiguous.

#include "native.h"

#define MAX_HEAD_DIM 512

static inline float dot(const float *a, const float *b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// One query head against one sequence's pages.
static void attend(const float *q, const float *keys, const float *values, const int32_t *pages, int64_t first,
                   int64_t length, int64_t head_offset, int64_t page_stride, int64_t page_size, int64_t head_dim,
                   float scale, float softcap, float *out) {
  float acc[MAX_HEAD_DIM];
  for (int64_t d = 0; d < head_dim; d++) acc[d] = 0.0f;
  float best = -INFINITY, total = 0.0f;
  for (int64_t start = first - first % page_size; start < length; start += page_size) {
    const int64_t offset = pages[start / page_size] * page_stride + head_offset;
    const int64_t begin = first > start ? first - start : 0;
    const int64_t end = length - start < page_size ? length - start : page_size;
    for (int64_t t = begin; t < end; t++) {
      float score = dot(q, keys + offset + t * head_dim, head_dim) * scale;
      if (softcap > 0.0f) score = softcap * tanhf(score / softcap);
      if (score > best) {
        const float shrink = expf(best - score);
        total *= shrink;
        for (int64_t d = 0; d < head_dim; d++) acc[d] *= shrink;
        best = score;
      }
      const float weight = expf(score - best);
      const float *value = values + offset + t * head_dim;
      total += weight;
      for (int64_t d = 0; d < head_dim; d++) acc[d] += weight * value[d];
    }
  }
  const float inverse = 1.0f / total;
  for (int64_t d = 0; d < head_dim; d++) out[d] = acc[d] * inverse;
}

// q and out: [rows, heads, head_dim], with q's strides given in floats. context: [rows], the tokens each row sees.
void hotswap_paged_attention(const float *q, int64_t q_row_stride, int64_t q_head_stride, const float *keys,
                             const float *values, const int32_t *block_table, int64_t table_stride,
                             const int32_t *context, float *out, int64_t rows, int64_t heads, int64_t kv_heads,
                             int64_t head_dim, int64_t page_size, int64_t window, float scale, float softcap,
                             int64_t threads) {
  const int64_t group = heads / kv_heads;
  const int64_t page_stride = kv_heads * page_size * head_dim;
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
      const int64_t length = context[row];
      const int64_t first = window > 0 && length > window ? length - window : 0;
      for (int64_t g = 0; g < group; g++) {
        const int64_t head = kv_head * group + g;
        attend(q + row * q_row_stride + head * q_head_stride, keys, values, block_table + row * table_stride,
               first, length, kv_head * page_size * head_dim, page_stride, page_size, head_dim, scale, softcap,
               out + (row * heads + head) * head_dim);
      }
    }
  }
}

// given: [tokens, kv_heads, head_dim], with its strides in floats; each row goes to its token's page and offset.
void hotswap_write_cache(const float *given, int64_t row_stride, int64_t head_stride, float *cache,
                         const int64_t *pages, const int64_t *offsets, int64_t tokens, int64_t kv_heads,
                         int64_t page_size, int64_t head_dim) {
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < kv_heads; h++)
      memcpy(cache + ((pages[t] * kv_heads + h) * page_size + offsets[t]) * head_dim,
             given + t * row_stride + h * head_stride, head_dim * sizeof(float));
}
