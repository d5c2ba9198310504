/* Attention of new positions over a cache of keys and values.
 *
 * Keys and values are float32, bfloat16, or int8 with a scale per position and head. Rows may share the keys and values
 * of a prefix. Hidden keys before the first visible one are skipped, so that padding on the left changes no bit. */
#ifndef COGVIEW_ATTENTION_H
#define COGVIEW_ATTENTION_H

#include "vectors.h"

/* Keys or values of a layer, (rows, heads, positions, head size); strides in elements. */
typedef struct {
    char *keys, *values;
    char *key_scales, *value_scales;  /* (rows, heads, positions, 1), or NULL */
    long row_stride, head_stride, scale_row_stride, scale_head_stride;
} Store;

typedef struct {
    long format, scale_format, heads, head_size;
    long num_keys, prefix_length, queries;     /* queries of a row, in all chunks */
    const int64_t *prefix_rows;                /* row of the prefix store of each row, or NULL */
    const int64_t *write_positions;            /* (rows, queries), or NULL to write the last of num_keys */
    const float *bias;                         /* (rows or 1, 1, queries or 1, num_keys), or NULL */
    long bias_row_stride, bias_query_stride;
} Attention;

enum { ELEMENT_BYTES_FLOAT32 = 4, ELEMENT_BYTES_BFLOAT16 = 2, ELEMENT_BYTES_INT8 = 1, QUERIES_AT_ONCE = 4 };

ALWAYS long bytes_of(const int format) { return format == FLOAT32 ? 4 : format == BFLOAT16 ? 2 : 1; }

static void store_one(const Attention *attention, const float *x, char *to, char *scale_to) {
    const long size = attention->head_size;
    if (attention->format == FLOAT32) memcpy(to, x, size * sizeof(float));
    if (attention->format == BFLOAT16)
        for (long i = 0; i < size; i++) ((uint16_t *)to)[i] = to_bfloat16(x[i]);
    if (attention->format != INT8) return;
    float most = 0;
    for (long i = 0; i < size; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    float scale = most / 127;
    if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;
    if (attention->scale_format == BFLOAT16) {
        ((uint16_t *)scale_to)[0] = to_bfloat16(scale);
        scale = from_bfloat16(((uint16_t *)scale_to)[0]);
    } else {
        ((float *)scale_to)[0] = scale;
    }
    for (long i = 0; i < size; i++) {
        const float rounded = nearbyintf(x[i] / scale);
        ((int8_t *)to)[i] = (int8_t)(rounded > 127 ? 127 : rounded < -127 ? -127 : rounded);
    }
}

/* Store the key and value of a head at a position of its row. */
static void store_keys_values(const Attention *attention, const Store *cache, long row, long head, long position,
                              const float *key, const float *value) {
    const long element = bytes_of(attention->format), scale = bytes_of(attention->scale_format);
    const long at = (row * cache->row_stride + head * cache->head_stride + position * attention->head_size) * element;
    const long scale_at = (row * cache->scale_row_stride + head * cache->scale_head_stride + position) * scale;
    store_one(attention, key, cache->keys + at, cache->key_scales + scale_at);
    store_one(attention, value, cache->values + at, cache->value_scales + scale_at);
}

/* Keys and values of a head from one store: `count` positions. */
typedef struct {
    const char *keys, *values, *key_scales, *value_scales;
    long count;
} Segment;

static Segment segment_of(const Attention *attention, const Store *store, long row, long head, long count) {
    const long at = (row * store->row_stride + head * store->head_stride) * bytes_of(attention->format);
    const long scale = (row * store->scale_row_stride + head * store->scale_head_stride) * bytes_of(attention->scale_format);
    return (Segment){store->keys + at, store->values + at, store->key_scales + scale, store->value_scales + scale, count};
}

/* Scores of `queries` queries from the key `first` on, whose index among all keys is `offset` + `first`. */
ALWAYS void scores_of(const int format, const int queries, const Attention *attention, const Segment *segment, long first,
                      const float *q, long query_stride, float *scores, long offset) {
    const long size = attention->head_size, whole = size / LANES * LANES;
    const float factor = 1.0f / sqrtf((float)size);
    for (long s = first; s < segment->count; s++) {
        Vector sums[QUERIES_AT_ONCE];
        UNROLL for (int t = 0; t < queries; t++) sums[t] = (Vector){0};
        for (long k = 0; k < whole; k += LANES) {
            const Vector key = load_as(format, segment->keys, s * size + k);
            UNROLL for (int t = 0; t < queries; t++) sums[t] += load(q + t * query_stride + k) * key;
        }
        if (whole < size) {
            const Vector key = load_some_as(format, segment->keys, s * size + whole, size - whole);
            UNROLL for (int t = 0; t < queries; t++)
                sums[t] += load_some(q + t * query_stride + whole, size - whole) * key;
        }
        const float scale =
            format == INT8 ? factor * element_as(attention->scale_format, segment->key_scales, s) : factor;
        UNROLL for (int t = 0; t < queries; t++) scores[t * attention->num_keys + offset + s] = sum(sums[t]) * scale;
    }
}

/* Add weights times values of the keys from `first` on to (queries, head size); scores hold the weights. */
ALWAYS void mix_values(const int format, const int queries, const Attention *attention, const Segment *segment,
                       long first, const float *scores, long offset, float *y, long y_stride) {
    const long size = attention->head_size, whole = size / LANES * LANES;
    for (long k = 0; k < size; k += LANES) {
        Vector sums[QUERIES_AT_ONCE];
        const long count = k < whole ? LANES : size - k;
        UNROLL for (int t = 0; t < queries; t++) sums[t] = load_some(y + t * y_stride + k, count);
        for (long s = first; s < segment->count; s++) {
            const float scale = format == INT8 ? element_as(attention->scale_format, segment->value_scales, s) : 1.0f;
            const Vector value = k < whole ? load_as(format, segment->values, s * size + k)
                                           : load_some_as(format, segment->values, s * size + k, count);
            UNROLL for (int t = 0; t < queries; t++) {
                const float weight = scores[t * attention->num_keys + offset + s] * scale;
                sums[t] = weight == 0 ? sums[t] : sums[t] + value * weight; /* hidden values may be not a number */
            }
        }
        UNROLL for (int t = 0; t < queries; t++)
            for (long lane = 0; lane < count; lane++) y[t * y_stride + k + lane] = sums[t][lane];
    }
}

/* Turn scores from `first` to `end` into exp(score - maximum), 0 elsewhere; return 1 / their sum. */
static float softmax_weights(float *scores, long first, long end) {
    const long whole = first + (end - first) / LANES * LANES;
    float most = -INFINITY;
    for (long s = first; s < end; s++) most = scores[s] > most ? scores[s] : most;
    Vector total = {0};
    for (long s = first; s < whole; s += LANES) {
        const Vector weights = exponential(load(scores + s) - most);
        store(scores + s, weights);
        total += weights;
    }
    float rest = 0;
    for (long s = whole; s < end; s++) {
        scores[s] = exponential(broadcast(scores[s] - most))[0];
        rest += scores[s];
    }
    return 1.0f / (sum(total) + rest);
}

/* Attention of `queries` consecutive queries of a row and head; `query` is the index of the first in its row. */
ALWAYS void attend(const int format, const int queries, const Attention *attention, const Store *cache, const Store *prefix,
                   long row, long head, long query, const float *q, long q_stride, float *scores, float *y,
                   long y_stride) {
    const long num_keys = attention->num_keys, length = attention->prefix_length;
    Segment segments[2];
    if (length) segments[0] = segment_of(attention, prefix, attention->prefix_rows[row], head, length);
    segments[1] = segment_of(attention, cache, row, head, num_keys - length);
    const float *bias = attention->bias ? attention->bias + row * attention->bias_row_stride : NULL;
    long begin[QUERIES_AT_ONCE], end[QUERIES_AT_ONCE], from = num_keys, until = 0;
    for (int t = 0; t < queries; t++) {
        begin[t] = 0;
        end[t] = num_keys - attention->queries + query + t + 1; /* causal */
        if (bias) {
            const float *mine = bias + (query + t) * attention->bias_query_stride;
            for (end[t] = num_keys; end[t] > 1 && mine[end[t] - 1] == -INFINITY; end[t]--) {}
            while (begin[t] < end[t] - 1 && mine[begin[t]] == -INFINITY) begin[t]++;
        }
        if (begin[t] < from) from = begin[t];
        if (end[t] > until) until = end[t];
    }
    for (int part = length ? 0 : 1; part < 2; part++) {
        const long offset = part ? length : 0, first = from > offset ? from - offset : 0;
        if (until - offset < segments[part].count) segments[part].count = until - offset;
        scores_of(format, queries, attention, &segments[part], first, q, q_stride, scores, offset);
    }
    float inverse[QUERIES_AT_ONCE];
    for (int t = 0; t < queries; t++) {
        float *mine = scores + t * num_keys;
        if (bias)
            for (long s = begin[t]; s < end[t]; s++) mine[s] += bias[(query + t) * attention->bias_query_stride + s];
        inverse[t] = softmax_weights(mine, begin[t], end[t]);
        for (long s = from; s < begin[t]; s++) mine[s] = 0;
        for (long s = end[t]; s < until; s++) mine[s] = 0;
        memset(y + t * y_stride, 0, attention->head_size * sizeof(float));
    }
    for (int part = length ? 0 : 1; part < 2; part++) {
        const long offset = part ? length : 0, first = from > offset ? from - offset : 0;
        mix_values(format, queries, attention, &segments[part], first, scores, offset, y, y_stride);
    }
    for (int t = 0; t < queries; t++)
        for (long k = 0; k < attention->head_size; k++) y[t * y_stride + k] *= inverse[t];
}

#endif
