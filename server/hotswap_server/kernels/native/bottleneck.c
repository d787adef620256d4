// Bottleneck adapters (Houlsby et al., 2019) after a sub-layer, in place, for every token with an adapter:
// x[t] = residual * x[t] + up_bias + act(input @ down^T + down_bias) @ up, with `up` and its bias scaled already.
//
// down and up are [slots, max_size, hidden_size], so that both products run along contiguous rows and rows beyond an
// adapter's size are never touched. A size of 0 leaves the token alone. Neighbouring tokens of one adapter go in
// pairs, as in lora.c.

#include "lowrank.h"

#define MAX_TOKENS 2

// As in interface.py.
enum activation { RELU, GELU, GELU_NEW, SILU, TANH, SIGMOID, LEAKY_RELU };
enum layout { HOULSBY, PFEIFFER, PARALLEL };

static float activate(float v, int32_t kind) {
  switch (kind) {
    case RELU:
      return v > 0.0f ? v : 0.0f;
    case GELU:
      return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case GELU_NEW:
      return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case SILU:
      return v / (1.0f + expf(-v));
    case TANH:
      return tanhf(v);
    case SIGMOID:
      return 1.0f / (1.0f + expf(-v));
    default:
      return v > 0.0f ? v : 0.01f * v;
  }
}

#define ADAPT(TOKENS)                                                                                           \
  LOW_RANK(TOKENS)                                                                                              \
  static void adapt_##TOKENS(const float *stream, float *x, const float *down, const float *down_bias,          \
                             const float *up, const float *up_bias, int64_t size, int32_t activation,           \
                             int32_t layout, int32_t residual, int64_t hidden_size) {                           \
    const int64_t count = TOKENS * hidden_size;                                                                 \
    float both[layout == PFEIFFER ? count : 1];                                                                 \
    if (layout == PFEIFFER)                                                                                     \
      for (int64_t i = 0; i < count; i++) both[i] = x[i] + stream[i];                                           \
    const float *input = layout == HOULSBY ? x : layout == PARALLEL ? stream : both;                            \
    float hidden[TOKENS * MAX_RANK];                                                                            \
    shrink_all_##TOKENS(input, hidden_size, down, size, hidden);                                                \
    for (int t = 0; t < TOKENS; t++) {                                                                          \
      for (int64_t r = 0; r < size; r++)                                                                        \
        hidden[t * MAX_RANK + r] = activate(hidden[t * MAX_RANK + r] + down_bias[r], activation);               \
      for (int64_t i = 0; i < hidden_size; i++)                                                                 \
        x[t * hidden_size + i] = (residual ? x[t * hidden_size + i] : 0.0f) + up_bias[i];                       \
    }                                                                                                           \
    expand_all_##TOKENS(hidden, size, up, hidden_size, x, hidden_size);                                         \
  }

ADAPT(1)
ADAPT(2)

void hotswap_bottleneck(const float *stream, float *x, const float *down, const float *down_bias, const float *up,
                        const float *up_bias, const int32_t *slots, const int32_t *sizes,
                        const int32_t *activations, const int32_t *layouts, const int32_t *residuals,
                        int64_t tokens, int64_t max_size, int64_t hidden_size, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t first = 0; first < tokens; first += MAX_TOKENS) {
    const int64_t stop = first + MAX_TOKENS < tokens ? first + MAX_TOKENS : tokens;
    const int pair = stop - first == 2 && slots[first] == slots[first + 1];
    for (int64_t t = first; t < stop; t += pair ? 2 : 1) {
      const int64_t slot = slots[t];
      if (slot < 0 || sizes[slot] == 0) continue;
      const int64_t weights = slot * max_size * hidden_size;
      (pair ? adapt_2 : adapt_1)(stream + t * hidden_size, x + t * hidden_size, down + weights,
                                 down_bias + slot * max_size, up + weights, up_bias + slot * hidden_size,
                                 sizes[slot], activations[slot], layouts[slot], residuals[slot], hidden_size);
    }
  }
}
