// Shared by the CPU kernels: 8-wide float vectors that the compiler maps to AVX2 or NEON.

#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PANEL 16

typedef float vec __attribute__((vector_size(32), aligned(4)));

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec splat(float x) { return (vec){x, x, x, x, x, x, x, x}; }
