/* Linear layers y = x W^T + b with float32 sums, for weights in the order of their files.
 *
 * Float32, float16, bfloat16, int8 with a scale per output, or int4 with a scale and a zero point per group of inputs.
 * Weights become float32 as they are read. One output is a sum over its inputs in LANES partial sums, whatever the
 * number of rows, so that a row of a batch has the bits of the row alone. */
#ifndef COGVIEW_LINEAR_H
#define COGVIEW_LINEAR_H

#include "vectors.h"

typedef struct {
    long format, inputs, outputs, group;
    const void *weight;      /* (outputs, inputs); two int4 values per byte, the first in the low half */
    const uint16_t *scales;  /* bfloat16: (outputs) for int8, (groups, outputs, 2) with zero points for int4 */
    const float *bias;       /* (outputs), or NULL */
} Linear;

#if VECTOR_BYTES == 64 /* 32 registers */
enum { MOST_ROWS = 6, TILE_OUTPUTS = 4, FEW_ROWS = 2, FEW_ROWS_OUTPUTS = 8 };
#else /* 16 registers */
enum { MOST_ROWS = 3, TILE_OUTPUTS = 4, FEW_ROWS = 1, FEW_ROWS_OUTPUTS = 8 };
#endif
enum { PREFETCHED_ROWS = 2 }; /* more rows compute for longer than they read */
enum { BLOCK_BYTES = 24 << 10 }; /* of weights, which all rows use while they are in the first cache */

/* Outputs of a tile, from sums that the compiler keeps in registers. */
ALWAYS void finish(const int rows, const int outputs, Vector sums[8][8], const Linear *linear, long output, float *y) {
    if (outputs == 1) {
        const float scale = linear->format == INT8 ? from_bfloat16(linear->scales[output]) : 1.0f;
        const float bias = linear->bias ? linear->bias[output] : 0.0f;
        UNROLL for (int m = 0; m < rows; m++) y[m * linear->outputs + output] = sum(sums[m][0]) * scale + bias;
        return;
    }
    UNROLL for (int n = 0; n < outputs; n += 4) {
        FourVector scale = {1, 1, 1, 1}, bias = {0, 0, 0, 0};
        if (linear->format == INT8)
            for (int i = 0; i < 4; i++) scale[i] = from_bfloat16(linear->scales[output + n + i]);
        if (linear->bias) bias = *(const UnalignedFourVector *)(linear->bias + output + n);
        UNROLL for (int m = 0; m < rows; m++) {
            const FourVector four = sum_four(sums[m][n], sums[m][n + 1], sums[m][n + 2], sums[m][n + 3]);
            *(UnalignedFourVector *)(y + m * linear->outputs + output + n) = four * scale + bias;
        }
    }
}

/* Ask for the weights of the next tile, `lines` cache lines from `p` on, while this one is computed. A tile reads several
 * rows side by side, which the processor's prefetcher follows badly where a page holds more than one of them. A tile
 * of int4 weights leaves room in the first cache for the next one. */
enum { SECOND = 2, FIRST = 3 }; /* caches, as __builtin_prefetch names them */
ALWAYS void prefetch(const int cache, const int lines, const char *p) {
    UNROLL for (int line = 0; line < lines; line++) __builtin_prefetch(p + 64 * line, 0, cache);
}

/* `outputs` outputs from `output` on of `rows` rows. */
ALWAYS void tile(const int format, const int rows, const int outputs, const Linear *linear, const float *x, long output,
                 float *y) {
    const long inputs = linear->inputs, whole = inputs / LANES * LANES;
    const int bytes = format == FLOAT32 ? 4 : format == INT8 ? 1 : 2;
    const char *weight = (const char *)linear->weight + output * inputs * bytes, *next = weight + outputs * inputs * bytes;
    Vector sums[8][8];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int n = 0; n < outputs; n++) sums[m][n] = (Vector){0};
    for (long k = 0; k < whole; k += LANES) {
        Vector weights[8];
        if (rows <= PREFETCHED_ROWS) prefetch(SECOND, outputs * LANES * bytes / 64, next + k * outputs * bytes);
        UNROLL for (int n = 0; n < outputs; n++) weights[n] = load_as(format, weight, n * inputs + k);
        UNROLL for (int m = 0; m < rows; m++) {
            const Vector value = load(x + m * inputs + k);
            UNROLL for (int n = 0; n < outputs; n++) sums[m][n] += value * weights[n];
        }
    }
    if (whole < inputs) {
        for (int m = 0; m < rows; m++) {
            const Vector value = load_some(x + m * inputs + whole, inputs - whole);
            for (int n = 0; n < outputs; n++)
                sums[m][n] += value * load_some_as(format, weight, n * inputs + whole, inputs - whole);
        }
    }
    finish(rows, outputs, sums, linear, output, y);
}

/* What turns the values 0 to 15 of a group into weights value * scale + shift. */
#if VECTOR_BYTES == 64
typedef Vector Int4Group; /* the sixteen weights */

ALWAYS Int4Group int4_group(float scale, float shift) {
    const Vector values = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return values * scale + shift;
}

/* The weights of the low four bits of each lane. */
ALWAYS Vector int4_weights(IntVector values, Int4Group group) {
    return (Vector)_mm512_permutexvar_ps((__m512i)values, (__m512)group);
}
#else
typedef struct {
    float scale, shift;
} Int4Group;

ALWAYS Int4Group int4_group(float scale, float shift) { return (Int4Group){scale, shift}; }

ALWAYS Vector int4_weights(IntVector values, Int4Group group) {
    return __builtin_convertvector(values & 15, Vector) * group.scale + group.shift;
}
#endif

/* The groups of `outputs` outputs from their scales and zero points. */
ALWAYS void int4_groups(const int outputs, const uint16_t *scales, Int4Group groups[8]) {
    float scale[8], shift[8];
    if (outputs % 4 == 0) {
        UNROLL for (int n = 0; n < outputs; n += 4) {
            const FourWords pairs = *(const UnalignedFourWords *)(scales + 2 * n);
            const FourVector four = (FourVector)(pairs << 16), zero = (FourVector)(pairs & 0xffff0000);
            *(UnalignedFourVector *)(scale + n) = four;
            *(UnalignedFourVector *)(shift + n) = zero - 8.0f * four;
        }
        /* Kept in memory: a broadcast from there leaves the port of the shuffles to the weights. */
        __asm__("" : "+m"(scale), "+m"(shift));
    } else {
        UNROLL for (int n = 0; n < outputs; n++) {
            scale[n] = from_bfloat16(scales[2 * n]);
            shift[n] = from_bfloat16(scales[2 * n + 1]) - 8.0f * scale[n];
        }
    }
    UNROLL for (int n = 0; n < outputs; n++) groups[n] = int4_group(scale[n], shift[n]);
}

/* The same for int4; of every 2 LANES inputs, x holds those with even indices first. */
ALWAYS void tile_int4(const int rows, const int outputs, const Linear *linear, const float *x, long output, float *y) {
    const long inputs = linear->inputs, group = linear->group, row_bytes = inputs >> 1;
    const uint8_t *weight = (const uint8_t *)linear->weight + output * row_bytes;
    const char *next = (const char *)weight + outputs * row_bytes;
    Vector sums[8][8];
    UNROLL for (int m = 0; m < rows; m++) UNROLL for (int n = 0; n < outputs; n++) sums[m][n] = (Vector){0};
    for (long start = 0; start < inputs; start += group) {
        const uint16_t *scales = linear->scales + (start / group * linear->outputs + output) * 2;
        Int4Group groups[8];
        if (rows <= PREFETCHED_ROWS) prefetch(FIRST, 1, (const char *)(scales + 2 * outputs));
        int4_groups(outputs, scales, groups);
        for (long k = start; k < start + group; k += 2 * LANES) {
            if (rows <= PREFETCHED_ROWS) {
                prefetch(FIRST, outputs * LANES / 64, next + (k >> 1) * outputs);
                UNROLL for (int n = 0; n < outputs; n++) {
                    const IntVector pairs = load_bytes(weight + n * row_bytes + (k >> 1));
                    const Vector even = int4_weights(pairs, groups[n]), odd = int4_weights(pairs >> 4, groups[n]);
                    UNROLL for (int m = 0; m < rows; m++) {
                        sums[m][n] += load(x + m * inputs + k) * even;
                        sums[m][n] += load(x + m * inputs + k + LANES) * odd;
                    }
                }
                continue;
            }
            Vector even[8], odd[8];
            UNROLL for (int n = 0; n < outputs; n++) {
                const IntVector pairs = load_bytes(weight + n * row_bytes + (k >> 1));
                even[n] = int4_weights(pairs, groups[n]);
                odd[n] = int4_weights(pairs >> 4, groups[n]);
            }
            UNROLL for (int m = 0; m < rows; m++) {
                const Vector first = load(x + m * inputs + k), second = load(x + m * inputs + k + LANES);
                UNROLL for (int n = 0; n < outputs; n++) sums[m][n] += first * even[n];
                UNROLL for (int n = 0; n < outputs; n++) sums[m][n] += second * odd[n];
            }
        }
    }
    finish(rows, outputs, sums, linear, output, y);
}

ALWAYS void any_tile(const int format, const int rows, const int outputs, const Linear *linear, const float *x,
                     long output, float *y) {
    if (format == INT4) {
        tile_int4(rows, outputs, linear, x, output, y);
    } else {
        tile(format, rows, outputs, linear, x, output, y);
    }
}

/* Outputs from `first` to `end` of `rows` rows, `columns` at a time. */
ALWAYS void stripe(const int format, const int rows, const int columns, const Linear *linear, const float *x, long first,
                   long end, float *y) {
    long output = first;
    for (; output + columns <= end; output += columns) any_tile(format, rows, columns, linear, x, output, y);
    for (; output < end; output++) any_tile(format, rows, 1, linear, x, output, y);
}

/* Outputs from `first` to `end` of all rows, in tiles of nearly equal numbers of rows. */
ALWAYS void block(const int format, const Linear *linear, const float *x, long rows, long first, long end, float *y) {
    const long tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (long number = 0, row = 0; number < tiles; number++) {
        const long count = rows / tiles + (number < rows % tiles);
        const float *from = x + row * linear->inputs;
        float *to = y + row * linear->outputs;
        if (count == 1) stripe(format, 1, FEW_ROWS_OUTPUTS, linear, from, first, end, to);
        if (count == 2) stripe(format, 2, FEW_ROWS >= 2 ? FEW_ROWS_OUTPUTS : TILE_OUTPUTS, linear, from, first, end, to);
        if (count == 3) stripe(format, 3, TILE_OUTPUTS, linear, from, first, end, to);
#if VECTOR_BYTES == 64
        if (count == 4) stripe(format, 4, TILE_OUTPUTS, linear, from, first, end, to);
        if (count == 5) stripe(format, 5, TILE_OUTPUTS, linear, from, first, end, to);
        if (count == 6) stripe(format, 6, TILE_OUTPUTS, linear, from, first, end, to);
#endif
        row += count;
    }
}

/* Of every 2 LANES values, put those with even indices first: the order of int4 tiles. */
static void split_pairs(const float *x, long count, float *result) {
    for (long start = 0; start < count; start += 2 * LANES)
        for (long lane = 0; lane < LANES; lane++) {
            result[start + lane] = x[start + 2 * lane];
            result[start + LANES + lane] = x[start + 2 * lane + 1];
        }
}

/* The part `number` of `parts` of a linear layer, with GELU if `activate`.
 *
 * x is (rows, inputs), after split_pairs for int4; y is (rows, outputs). */
static void linear_part(const Linear *linear, const float *x, long rows, int activate, float *y, long number,
                        long parts) {
    const long blocks = (linear->outputs + 7) / 8;
    const long start = blocks * number / parts * 8, last = blocks * (number + 1) / parts * 8;
    const long end = last < linear->outputs ? last : linear->outputs;
    const long half_bytes = linear->format == FLOAT32 ? 8 : linear->format == INT8 ? 2 : linear->format == INT4 ? 1 : 4;
    long step = BLOCK_BYTES * 2 / half_bytes / linear->inputs / 8 * 8;
    if (step < 8) step = 8;
    for (long first = start; first < end; first += step) {
        const long next = first + step < end ? first + step : end;
        if (linear->format == FLOAT32) block(FLOAT32, linear, x, rows, first, next, y);
        if (linear->format == FLOAT16) block(FLOAT16, linear, x, rows, first, next, y);
        if (linear->format == BFLOAT16) block(BFLOAT16, linear, x, rows, first, next, y);
        if (linear->format == INT8) block(INT8, linear, x, rows, first, next, y);
        if (linear->format == INT4) block(INT4, linear, x, rows, first, next, y);
        if (!activate) continue;
        for (long row = 0; row < rows; row++) {
            float *values = y + row * linear->outputs;
            long output = first;
            for (; output + LANES <= next; output += LANES) store(values + output, gelu(load(values + output)));
            for (; output < next; output++) values[output] = gelu(broadcast(values[output]))[0];
        }
    }
}

#endif
