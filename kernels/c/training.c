/* Forward and backward of the parts of training that wait for memory: norms, GELU, attention of short rows, and losses.
 *
 * Activations are float32 or bfloat16; everything is computed in float32. Sums over rows are kept by thread, each of
 * which has a fixed run of rows, so that a repeated call has the same bits. */
#include <omp.h>
#include <stdlib.h>

#include "vectors.h"

enum { INTERFACE = 1, QUERIES = VECTOR_BYTES == 64 ? 8 : 4, TILE = 2 };
static const float NORM_EPSILON = 1e-5f / 64, SMALLEST = 1e-20f;

long cogview_training_interface(void) { return INTERFACE; }

ALWAYS void store_bfloat16(uint16_t *p, Vector x) {
    const UintVector bits = (UintVector)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const UintVector unordered = bits >> 16 | 0x40;
    const UintVector is_number = (UintVector)(x == x);
    *(HalfVector *)p = __builtin_convertvector((rounded & is_number) | (unordered & ~is_number), HalfVector);
}

ALWAYS void store_as(const int format, void *p, long index, Vector x) {
    if (format == FLOAT32) store((float *)p + index, x);
    else store_bfloat16((uint16_t *)p + index, x);
}

ALWAYS void store_one_as(const int format, void *p, long index, float x) {
    if (format == FLOAT32) ((float *)p)[index] = x;
    else ((uint16_t *)p)[index] = to_bfloat16(x);
}

ALWAYS void add_to(float *p, Vector x) { store(p, load(p) + x); }

/* The largest of the lanes. */
ALWAYS float peak_of(Vector x) {
#if VECTOR_BYTES == 64
    return _mm512_reduce_max_ps((__m512)x);
#else
    return largest(x);
#endif
}

/* Rows of this thread. */
ALWAYS void share_of(long rows, long *first, long *end) {
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *first = rows * thread / threads;
    *end = rows * (thread + 1) / threads;
}

/* Statistics of a PB-relax norm: (x - mean) * scale is normalized (``layer_norm.py``). */
typedef struct {
    float mean, scale;
} Statistics;

ALWAYS Statistics statistics_of(const int format, const void *x, long first, long width) {
    Vector most = {0}, total = {0};
    for (long k = 0; k < width; k += LANES) most = larger(absolute(load_as(format, x, first + k)), most);
    float peak = peak_of(most);
    if (peak < SMALLEST) peak = SMALLEST;
    const float factor = 1.0f / peak;
    for (long k = 0; k < width; k += LANES) total += load_as(format, x, first + k) * factor; /* no sum overflows */
    const float mean = sum(total) / width * peak;
    Vector squares = {0};
    for (long k = 0; k < width; k += LANES) {
        const Vector centred = (load_as(format, x, first + k) - mean) * factor;
        squares += centred * centred;
    }
    return (Statistics){mean, factor / sqrtf(sum(squares) / width + NORM_EPSILON)};
}

/* Gradient of a norm for one row: `output` has that of the result, and `input` gets that of x, added to `added` if there
 * is one; `sums` has those of weight and bias. `scratch` has 2 x width floats. */
ALWAYS void norm_backward(const int format, const void *x, const int output_format, const void *output, long first,
                          long width, Statistics statistics, const float *weight, const float *added,
                          const int input_format, void *input, float *sums, float *scratch) {
    Vector total = {0}, products = {0};
    for (long k = 0; k < width; k += LANES) {
        const Vector normed = (load_as(format, x, first + k) - statistics.mean) * statistics.scale;
        const Vector gradient = load_as(output_format, output, first + k);
        const Vector weighted = gradient * load(weight + k);
        add_to(sums + k, gradient * normed);
        add_to(sums + width + k, gradient);
        total += weighted;
        products += weighted * normed;
        store(scratch + k, normed);
        store(scratch + width + k, weighted);
    }
    const float mean = sum(total) / width, projection = sum(products) / width;
    for (long k = 0; k < width; k += LANES) {
        const Vector centred = load(scratch + width + k) - mean - load(scratch + k) * projection;
        const Vector result = centred * statistics.scale;
        store_as(input_format, input, first + k, added ? load(added + first + k) + result : result);
    }
}

/* x + norm(branch), and its norm. `statistics` has four floats a row. Without a branch, x is only normalized. */
typedef struct {
    long format, rows, width;
    const float *x;
    const void *branch;                                      /* of `format` */
    const float *weight, *bias, *next_weight, *next_bias;    /* next: none for no second norm */
    float *total;                                            /* may be x where there is no branch */
    void *normed;                                            /* of `format` */
    Statistics *statistics;
    const float *d_total;                                    /* none for zeros */
    const void *d_normed;                                    /* of `format` */
    float *d_x;
    void *d_branch;                                          /* of `format` */
    float *sums;                                             /* (threads, 4, width): weight, bias, next weight and bias */
} Sandwich;

ALWAYS void sandwich_forward(const int format, const Sandwich *call) {
    long first, end;
    share_of(call->rows, &first, &end);
    const long width = call->width;
    for (long row = first; row < end; row++) {
        const long start = row * width;
        if (call->branch) {
            const Statistics found = statistics_of(format, call->branch, start, width);
            call->statistics[2 * row] = found;
            for (long k = 0; k < width; k += LANES) {
                const Vector normed = (load_as(format, call->branch, start + k) - found.mean) * found.scale;
                store(call->total + start + k,
                      load(call->x + start + k) + (normed * load(call->weight + k) + load(call->bias + k)));
            }
        }
        if (call->next_weight) {
            const Statistics found = statistics_of(FLOAT32, call->total, start, width);
            call->statistics[2 * row + 1] = found;
            for (long k = 0; k < width; k += LANES) {
                const Vector normed = (load(call->total + start + k) - found.mean) * found.scale;
                store_as(format, call->normed, start + k, normed * load(call->next_weight + k) + load(call->next_bias + k));
            }
        }
    }
}

ALWAYS void sandwich_backward(const int format, const Sandwich *call, float *scratch) {
    long first, end;
    share_of(call->rows, &first, &end);
    const long width = call->width;
    float *sums = call->sums + omp_get_thread_num() * 4 * width;
    memset(sums, 0, 4 * width * sizeof(float));
    for (long row = first; row < end; row++) {
        const long start = row * width;
        const float *d_total = call->d_total;
        if (call->d_normed) {
            norm_backward(FLOAT32, call->total, format, call->d_normed, start, width, call->statistics[2 * row + 1],
                          call->next_weight, call->d_total, FLOAT32, call->d_x, sums + 2 * width, scratch);
            d_total = call->d_x;
        }
        if (call->branch)
            norm_backward(format, call->branch, FLOAT32, d_total, start, width, call->statistics[2 * row], call->weight,
                          NULL, format, call->d_branch, sums, scratch);
    }
}

void cogview_sandwich(const Sandwich *call, int backward, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *scratch = backward ? malloc(2 * call->width * sizeof(float)) : NULL;
        if (call->format == FLOAT32) {
            if (backward) sandwich_backward(FLOAT32, call, scratch);
            else sandwich_forward(FLOAT32, call);
        } else {
            if (backward) sandwich_backward(BFLOAT16, call, scratch);
            else sandwich_forward(BFLOAT16, call);
        }
        free(scratch);
    }
}

/* The sigmoid of x to a few units in the last place, 0 below -87. Its exponential is that of ``vectors.h`` without the
 * powers of two that have no float. */
ALWAYS Vector sigmoid(Vector x) {
#if VECTOR_BYTES == 64
    const Vector clamped = (Vector)_mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(87.0f), (__m512)-x));
#else
    const Vector low = broadcast(-87.0f), high = broadcast(87.0f);
    const Vector clamped = choose(-x < low, low, choose(-x > high, high, -x));
#endif
    const Vector shifted = clamped * 1.44269504088896341f + 12582912.0f; /* rounds to a whole number */
    const Vector exponent = shifted - 12582912.0f;
    const Vector rest = clamped - exponent * 0.693359375f - exponent * -2.12194440e-4f;
    Vector power = broadcast(1.9875691500e-4f);
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    /* The lowest bits of `shifted` are the exponent. */
    const Vector divisor = 1.0f + power * (Vector)(((UintVector)shifted + 127) << 23);
#if VECTOR_BYTES == 64
    const Vector near = (Vector)_mm512_rcp14_ps((__m512)divisor);
    const Vector result = near + near * (1.0f - divisor * near); /* a step of Newton's method: faster than a division */
#else
    const Vector result = 1.0f / divisor;
#endif
    return choose(x < broadcast(-87.0f), (Vector){0}, result);
}

ALWAYS void gelu_forward(const int format, const void *x, const float *bias, long first, long end, long width, void *y) {
    for (long row = first; row < end; row++)
        for (long k = 0; k < width; k += LANES) {
            const Vector z = load_as(format, x, row * width + k) + load(bias + k);
            store_as(format, y, row * width + k, z * sigmoid(z * (1.0f + 0.044715f * z * z) * 1.5957691216057308f));
        }
}

ALWAYS void gelu_backward(const int format, const void *x, const float *bias, const void *d_y, long first, long end,
                          long width, void *d_x, float *sums) {
    memset(sums, 0, width * sizeof(float));
    for (long row = first; row < end; row++)
        for (long k = 0; k < width; k += LANES) {
            const Vector z = load_as(format, x, row * width + k) + load(bias + k);
            const Vector gate = sigmoid(z * (1.0f + 0.044715f * z * z) * 1.5957691216057308f);
            const Vector slope = (1.0f + 3 * 0.044715f * z * z) * 1.5957691216057308f;
            const Vector result = load_as(format, d_y, row * width + k) * (gate + z * gate * (1.0f - gate) * slope);
            store_as(format, d_x, row * width + k, result);
            add_to(sums + k, result);
        }
}

/* GELU of x + bias, or, where d_y is given, the gradients of x, and of the bias in `sums` (threads, width). */
void cogview_gelu(long format, const void *x, const float *bias, const void *d_y, long rows, long width, void *y,
                  float *sums, int threads) {
#pragma omp parallel num_threads(threads)
    {
        long first, end;
        share_of(rows, &first, &end);
        float *own = sums + (d_y ? omp_get_thread_num() * width : 0);
        if (format == FLOAT32) {
            if (d_y) gelu_backward(FLOAT32, x, bias, d_y, first, end, width, y, own);
            else gelu_forward(FLOAT32, x, bias, first, end, width, y);
        } else {
            if (d_y) gelu_backward(BFLOAT16, x, bias, d_y, first, end, width, y, own);
            else gelu_forward(BFLOAT16, x, bias, first, end, width, y);
        }
    }
}

/* Causal attention of rows of any lengths that follow each other in qkv (positions, 3, heads, size). */
typedef struct {
    long format, rows, heads, size, longest;
    const int64_t *starts, *lengths;
    const void *qkv;
    void *mixed;                                             /* (positions, heads, size) */
    float *log_sums;                                         /* (positions, heads): log of the sum of exp of scores */
    const void *d_mixed;
    void *d_qkv;
} PackedAttention;

/* c = a b, or c + a b, for QUERIES rows of a; b has `vectors` x LANES columns. */
ALWAYS void multiply(const int vectors, const int add, long depth, const float *a, long a_stride, const float *b,
                     long b_stride, float *c, long c_stride) {
    Vector sums[QUERIES][TILE];
    UNROLL for (int row = 0; row < QUERIES; row++)
        UNROLL for (int part = 0; part < vectors; part++)
            sums[row][part] = add ? load(c + row * c_stride + part * LANES) : (Vector){0};
    for (long k = 0; k < depth; k++) {
        Vector values[TILE];
        UNROLL for (int part = 0; part < vectors; part++) values[part] = load(b + k * b_stride + part * LANES);
        UNROLL for (int row = 0; row < QUERIES; row++) {
            const Vector factor = broadcast(a[row * a_stride + k]);
            UNROLL for (int part = 0; part < vectors; part++) sums[row][part] += factor * values[part];
        }
    }
    UNROLL for (int row = 0; row < QUERIES; row++)
        UNROLL for (int part = 0; part < vectors; part++) store(c + row * c_stride + part * LANES, sums[row][part]);
}

/* The same for any number of columns that LANES divides. */
ALWAYS void multiply_all(const int add, long depth, const float *a, long a_stride, const float *b, long b_stride,
                         long columns, float *c, long c_stride) {
    long column = 0;
    for (; column + TILE * LANES <= columns; column += TILE * LANES)
        multiply(TILE, add, depth, a, a_stride, b + column, b_stride, c + column, c_stride);
    for (; column < columns; column += LANES)
        multiply(1, add, depth, a, a_stride, b + column, b_stride, c + column, c_stride);
}

/* c += a^T b for QUERIES rows of a and b: `count` rows of c of `size` columns. */
ALWAYS void add_outer(long count, const float *a, long a_stride, const float *b, long size, float *c) {
    for (long part = 0; part < size; part += LANES) {
        Vector rows[QUERIES];
        UNROLL for (int row = 0; row < QUERIES; row++) rows[row] = load(b + row * size + part);
        for (long key = 0; key < count; key++) {
            Vector result = load(c + key * size + part);
            UNROLL for (int row = 0; row < QUERIES; row++) result += broadcast(a[row * a_stride + key]) * rows[row];
            store(c + key * size + part, result);
        }
    }
}

/* Values of one head as float32 (padded, size), zeros after `length`, times `factor`. */
ALWAYS void read_head(const int format, const void *from, long first, long stride, long length, long padded, long size,
                      float factor, float *to) {
    for (long row = 0; row < length; row++)
        for (long k = 0; k < size; k += LANES)
            store(to + row * size + k, load_as(format, from, first + row * stride + k) * factor);
    memset(to + length * size, 0, (padded - length) * size * sizeof(float));
}

/* Transpose a matrix whose sides LANES divides: each stage interleaves the first half of a block's rows with the other. */
static void transpose(const float *from, long rows, long columns, float *to) {
    IntVector low, high;
    for (int lane = 0; lane < LANES; lane++) {
        low[lane] = lane / 2 + lane % 2 * LANES;
        high[lane] = low[lane] + LANES / 2;
    }
    for (long row = 0; row < rows; row += LANES)
        for (long column = 0; column < columns; column += LANES) {
            Vector block[LANES], next[LANES];
            UNROLL for (int one = 0; one < LANES; one++) block[one] = load(from + (row + one) * columns + column);
            UNROLL for (int stage = 1; stage < LANES; stage *= 2) {
                UNROLL for (int one = 0; one < LANES / 2; one++) {
                    next[2 * one] = __builtin_shuffle(block[one], block[one + LANES / 2], low);
                    next[2 * one + 1] = __builtin_shuffle(block[one], block[one + LANES / 2], high);
                }
                UNROLL for (int one = 0; one < LANES; one++) block[one] = next[one];
            }
            UNROLL for (int one = 0; one < LANES; one++) store(to + (column + one) * rows + row, block[one]);
        }
}

/* Floats of scratch memory of a thread. */
static long attention_scratch(long padded, long size) { return padded * size * 8 + 2 * QUERIES * padded; }

ALWAYS void attend_forward(const int format, const PackedAttention *call, long row, long head, float *scratch) {
    const long size = call->size, width = call->heads * size, length = call->lengths[row];
    const long padded = (length + LANES - 1) / LANES * LANES, start = call->starts[row];
    float *q = scratch, *k = q + padded * size, *v = k + padded * size, *k_t = v + padded * size;
    float *scores = k_t + padded * size, *mixed = scores + QUERIES * padded;
    const long first = start * 3 * width + head * size;
    read_head(format, call->qkv, first, 3 * width, length, padded, size, 1.0f / sqrtf(size), q);
    read_head(format, call->qkv, first + width, 3 * width, length, padded, size, 1.0f, k);
    read_head(format, call->qkv, first + 2 * width, 3 * width, length, padded, size, 1.0f, v);
    transpose(k, padded, size, k_t);
    for (long query = 0; query < length; query += QUERIES) {
        const long seen = query + QUERIES, columns = (seen + LANES - 1) / LANES * LANES;
        multiply_all(0, size, q + query * size, size, k_t, padded, columns, scores, padded);
        for (long one = 0; one < QUERIES; one++) {
            float *own = scores + one * padded;
            const long last = query + one;
            for (long key = last + 1; key < columns; key++) own[key] = -INFINITY;
            Vector most = broadcast(-INFINITY), total = {0};
            for (long key = 0; key < columns; key += LANES) most = larger(load(own + key), most);
            const float peak = peak_of(most);
            for (long key = 0; key < columns; key += LANES) {
                const Vector weight = exponential(load(own + key) - peak);
                store(own + key, weight);
                total += weight;
            }
            const float all = sum(total);
            for (long key = 0; key < columns; key += LANES) store(own + key, load(own + key) * (1.0f / all));
            if (last < length) call->log_sums[(start + last) * call->heads + head] = peak + logf(all);
        }
        multiply_all(0, seen < padded ? seen : padded, scores, padded, v, size, size, mixed, size);
        for (long one = 0; one < QUERIES && query + one < length; one++)
            for (long k = 0; k < size; k += LANES)
                store_as(format, call->mixed, (start + query + one) * width + head * size + k, load(mixed + one * size + k));
    }
}

ALWAYS void attend_backward(const int format, const PackedAttention *call, long row, long head, float *scratch) {
    const long size = call->size, width = call->heads * size, length = call->lengths[row];
    const long padded = (length + LANES - 1) / LANES * LANES, start = call->starts[row], area = padded * size;
    float *q = scratch, *k = q + area, *v = k + area, *k_t = v + area, *v_t = k_t + area, *d_mixed = v_t + area;
    float *d_k = d_mixed + area, *d_v = d_k + area, *weights = d_v + area, *d_scores = weights + QUERIES * padded;
    const long first = start * 3 * width + head * size, out = start * width + head * size;
    const float factor = 1.0f / sqrtf(size);
    read_head(format, call->qkv, first, 3 * width, length, padded, size, factor, q);
    read_head(format, call->qkv, first + width, 3 * width, length, padded, size, 1.0f, k);
    read_head(format, call->qkv, first + 2 * width, 3 * width, length, padded, size, 1.0f, v);
    read_head(format, call->d_mixed, out, width, length, padded, size, 1.0f, d_mixed);
    transpose(k, padded, size, k_t);
    transpose(v, padded, size, v_t);
    memset(d_k, 0, 2 * area * sizeof(float));
    for (long query = 0; query < length; query += QUERIES) {
        const long seen = query + QUERIES < padded ? query + QUERIES : padded;
        const long columns = (seen + LANES - 1) / LANES * LANES;
        multiply_all(0, size, q + query * size, size, k_t, padded, columns, weights, padded);
        multiply_all(0, size, d_mixed + query * size, size, v_t, padded, columns, d_scores, padded);
        for (long one = 0; one < QUERIES; one++) {
            float *own = weights + one * padded, *d_own = d_scores + one * padded;
            const long last = query + one;
            if (last >= length) {
                memset(own, 0, columns * sizeof(float));
                memset(d_own, 0, columns * sizeof(float));
                continue;
            }
            const float log_sum = call->log_sums[(start + last) * call->heads + head];
            for (long key = last + 1; key < columns; key++) own[key] = -INFINITY;
            /* The sum of weights times their gradients equals that of outputs times theirs. */
            Vector total = {0};
            for (long key = 0; key < columns; key += LANES) {
                const Vector weight = exponential(load(own + key) - log_sum);
                store(own + key, weight);
                total += weight * load(d_own + key);
            }
            const float mean = sum(total);
            for (long key = 0; key < columns; key += LANES)
                store(d_own + key, load(own + key) * (load(d_own + key) - mean));
        }
        add_outer(seen, d_scores, padded, q + query * size, size, d_k);
        add_outer(seen, weights, padded, d_mixed + query * size, size, d_v);
        /* The queries of this block are not needed any more: their gradients take their memory. */
        multiply_all(0, seen, d_scores, padded, k, size, size, q + query * size, size);
    }
    for (long one = 0; one < length; one++)
        for (long part = 0; part < size; part += LANES) {
            const long to = first + one * 3 * width + part;
            store_as(format, call->d_qkv, to, load(q + one * size + part) * factor);
            store_as(format, call->d_qkv, to + width, load(d_k + one * size + part));
            store_as(format, call->d_qkv, to + 2 * width, load(d_v + one * size + part));
        }
}

void cogview_packed_attention(const PackedAttention *call, int backward, int threads) {
    const long padded = (call->longest + LANES - 1) / LANES * LANES, pieces = call->rows * call->heads;
#pragma omp parallel num_threads(threads)
    {
        float *scratch = aligned_alloc(64, (attention_scratch(padded, call->size) + 16) * sizeof(float) / 64 * 64 + 64);
#pragma omp for schedule(dynamic, 4)
        for (long piece = 0; piece < pieces; piece++) {
            const long row = piece / call->heads, head = piece % call->heads;
            if (call->format == FLOAT32) {
                if (backward) attend_backward(FLOAT32, call, row, head, scratch);
                else attend_forward(FLOAT32, call, row, head, scratch);
            } else {
                if (backward) attend_backward(BFLOAT16, call, row, head, scratch);
                else attend_forward(BFLOAT16, call, row, head, scratch);
            }
        }
        free(scratch);
    }
}

/* Cross-entropy of one row; `exponentials` has `count` floats. With `write` the logits become the weighted gradient. */
ALWAYS float loss_of(const int format, void *logits, long first, long count, long target, float weight, int write,
                     float *exponentials) {
    const long whole = count / LANES * LANES;
    Vector most = broadcast(-INFINITY), total = {0};
    for (long k = 0; k < whole; k += LANES) most = larger(load_as(format, logits, first + k), most);
    float peak = largest(most);
    for (long k = whole; k < count; k++) {
        const float value = element_as(format, logits, first + k);
        peak = value > peak ? value : peak;
    }
    const float wanted = element_as(format, logits, first + target) - peak;
    for (long k = 0; k < whole; k += LANES) {
        const Vector value = exponential(load_as(format, logits, first + k) - peak);
        store(exponentials + k, value);
        total += value;
    }
    float all = sum(total);
    for (long k = whole; k < count; k++) {
        exponentials[k] = expf(element_as(format, logits, first + k) - peak);
        all += exponentials[k];
    }
    const float loss = logf(all) - wanted;
    if (write) {
        const float factor = weight / all;
        for (long k = 0; k < whole; k += LANES) store_as(format, logits, first + k, load(exponentials + k) * factor);
        for (long k = whole; k < count; k++) store_one_as(format, logits, first + k, exponentials[k] * factor);
        store_one_as(format, logits, first + target, expm1f(-loss) * weight);
    }
    return loss;
}

/* Losses of rows of logits, `stride` elements apart. */
void cogview_losses(long format, void *logits, long rows, long count, long stride, const int64_t *targets,
                    const float *weights, int write, float *losses, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *exponentials = malloc((count + LANES) * sizeof(float));
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++)
            losses[row] = format == FLOAT32 ? loss_of(FLOAT32, logits, row * stride, count, targets[row], weights[row],
                                                      write, exponentials)
                                            : loss_of(BFLOAT16, logits, row * stride, count, targets[row], weights[row],
                                                      write, exponentials);
        free(exponentials);
    }
}
