/* Vectors of floats as wide as the processor's registers, and what the kernels compute with them.
 *
 * GCC's vector extensions compile to any processor. Sums run in a fixed order, so that a row has the same bits in any
 * batch and with any number of threads. */
#ifndef COGVIEW_VECTORS_H
#define COGVIEW_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES (VECTOR_BYTES / 4)

#define ALWAYS static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef float UnalignedVector __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef float FourVector __attribute__((vector_size(16)));
typedef float UnalignedFourVector __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t FourWords __attribute__((vector_size(16)));
typedef uint32_t UnalignedFourWords __attribute__((vector_size(16), aligned(2), may_alias));
typedef int32_t IntVector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t UintVector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfVector __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef int8_t ByteVector __attribute__((vector_size(VECTOR_BYTES / 4), aligned(1), may_alias));
typedef uint8_t UnsignedByteVector __attribute__((vector_size(VECTOR_BYTES / 4), aligned(1), may_alias));

/* Formats of weights, keys and values. */
enum { FLOAT32, BFLOAT16, INT8, INT4, FLOAT16 };

ALWAYS Vector broadcast(float x) { return x - (Vector){0}; }

ALWAYS Vector load(const float *p) { return *(const UnalignedVector *)p; }

ALWAYS void store(float *p, Vector x) { *(UnalignedVector *)p = x; }

/* The first `count` floats, then zeros. */
ALWAYS Vector load_some(const float *p, long count) {
    float part[LANES] = {0};
    memcpy(part, p, count * sizeof(float));
    return load(part);
}

/* a where the lanes of the mask are set, else b. */
ALWAYS Vector choose(IntVector mask, Vector a, Vector b) {
    return (Vector)(((IntVector)a & mask) | ((IntVector)b & ~mask));
}

ALWAYS Vector load_bfloat16(const uint16_t *p) {
    return (Vector)(__builtin_convertvector(*(const HalfVector *)p, UintVector) << 16);
}

/* Floats of LANES halves. */
ALWAYS Vector load_float16(const uint16_t *p) {
#if VECTOR_BYTES == 64
    return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif VECTOR_BYTES == 32 && defined(__F16C__)
    return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    const UintVector bits = __builtin_convertvector(*(const HalfVector *)p, UintVector);
    const UintVector exponents = bits & 0x7c00, mantissas = bits & 0x3ff;
    /* Subnormal numbers are whole multiples of 2^-24; 112 is the difference of the exponents' biases. */
    const Vector small = __builtin_convertvector((IntVector)mantissas, Vector) * 0x1p-24f;
    const Vector normal = (Vector)((exponents << 13) + (112u << 23) + (mantissas << 13));
    return (Vector)((UintVector)choose((IntVector)(exponents == 0), small, normal) | (bits & 0x8000) << 16);
#endif
}

ALWAYS Vector load_int8(const int8_t *p) {
#if VECTOR_BYTES == 64
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif VECTOR_BYTES == 32
    return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const ByteVector *)p, IntVector), Vector);
#endif
}

/* LANES bytes as whole numbers. */
ALWAYS IntVector load_bytes(const uint8_t *p) {
#if VECTOR_BYTES == 64
    return (IntVector)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif VECTOR_BYTES == 32
    return (IntVector)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return __builtin_convertvector(*(const UnsignedByteVector *)p, IntVector);
#endif
}

/* Values of a format, from the element `index` on. */
ALWAYS Vector load_as(const int format, const void *p, long index) {
    if (format == FLOAT32) return load((const float *)p + index);
    if (format == BFLOAT16) return load_bfloat16((const uint16_t *)p + index);
    if (format == FLOAT16) return load_float16((const uint16_t *)p + index);
    return load_int8((const int8_t *)p + index);
}

ALWAYS float from_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Round to the nearest bfloat16, ties to even. */
ALWAYS uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* not a number */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

ALWAYS float element_as(const int format, const void *p, long index) {
    if (format == FLOAT32) return ((const float *)p)[index];
    if (format == BFLOAT16) return from_bfloat16(((const uint16_t *)p)[index]);
    return ((const int8_t *)p)[index];
}

/* The first `count` values from `index` on, then zeros. */
ALWAYS Vector load_some_as(const int format, const void *p, long index, long count) {
    float part[LANES] = {0};
    if (format == FLOAT16) {
        uint16_t halves[LANES] = {0};
        memcpy(halves, (const uint16_t *)p + index, count * sizeof(uint16_t));
        return load_float16(halves);
    }
    for (long lane = 0; lane < count; lane++) part[lane] = element_as(format, p, index + lane);
    return load(part);
}

/* Sums of the lanes of four vectors, halves first: one sum does not depend on the other vectors. */
ALWAYS FourVector sum_four(Vector a, Vector b, Vector c, Vector d) {
#if VECTOR_BYTES == 64
    const __m512 x = (__m512)a, y = (__m512)b, z = (__m512)c, w = (__m512)d;
    const __m512 xy = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    const __m512 zw = _mm512_add_ps(_mm512_shuffle_f32x4(z, w, 0x44), _mm512_shuffle_f32x4(z, w, 0xee));
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(xy, zw, 0x88), _mm512_shuffle_f32x4(xy, zw, 0xdd));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4e));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    return (FourVector)_mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all));
#elif VECTOR_BYTES == 32
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    return (FourVector)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
    return (FourVector){(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]), (c[0] + c[2]) + (c[1] + c[3]),
                        (d[0] + d[2]) + (d[1] + d[3])};
#endif
}

ALWAYS float sum(Vector x) { return sum_four(x, x, x, x)[0]; }

ALWAYS Vector larger(Vector a, Vector b) { return choose(a > b, a, b); }

ALWAYS float largest(Vector x) {
    float result = x[0];
    for (int lane = 1; lane < LANES; lane++) result = x[lane] > result ? x[lane] : result;
    return result;
}

ALWAYS Vector absolute(Vector x) { return (Vector)((IntVector)x & 0x7fffffff); }

/* exp(x) to 2 units in the last place, 0 below -87 and infinite above 88.7. Range reduction and polynomial: Cephes, expf. */
ALWAYS Vector exponential(Vector x) {
    const Vector low = broadcast(-87.0f), high = broadcast(88.72f);
    const Vector clamped = choose(x < low, low, choose(x > high, high, x));
    const Vector shifted = clamped * 1.44269504088896341f + 12582912.0f; /* rounds to a whole number */
    const Vector exponent = shifted - 12582912.0f;
    Vector rest = clamped - exponent * 0.693359375f;
    rest = rest - exponent * -2.12194440e-4f;
    Vector result = broadcast(1.9875691500e-4f);
    result = result * rest + 1.3981999507e-3f;
    result = result * rest + 8.3334519073e-3f;
    result = result * rest + 4.1665795894e-2f;
    result = result * rest + 1.6666665459e-1f;
    result = result * rest + 5.0000001201e-1f;
    result = result * rest * rest + rest + 1.0f;
    /* The exponent is added in two halves: 2^128 has no float. */
    const IntVector whole = __builtin_convertvector(exponent, IntVector), half = whole >> 1;
    result = result * (Vector)((half + 127) << 23) * (Vector)((whole - half + 127) << 23);
    result = choose(x < low, (Vector){0}, result);
    result = choose(x > high, broadcast(INFINITY), result);
    return choose(x == x, result, x); /* not a number */
}

/* The tanh form of GELU: x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))). */
ALWAYS Vector gelu(Vector x) {
    const Vector inner = x * (1.0f + 0.044715f * x * x) * -1.5957691216057308f;
    return x / (1.0f + exponential(inner));
}

#endif
