/* Attention of new positions over a cache of keys and values.
 *
 * Keys and values are float32, bfloat16, or int8 with a scale per position and head. Rows may share the keys and values
 * of a prefix. Hidden keys before the first visible one are skipped, so that padding on the left changes no bit.
 *
 * With a window, a query attends to its last keys and to pivots before them (``kernels/window_mask.py`` specifies it),
 * and no other keys are read. */
#ifndef COGVIEW_ATTENTION_H
#define COGVIEW_ATTENTION_H

#include "vectors.h"

/* Keys or values of a layer, (rows, heads, positions, head size); strides in elements. */
typedef struct {
    char *keys, *values;
    char *key_scales, *value_scales;  /* (rows, heads, positions, 1), or NULL */
    long row_stride, head_stride, scale_row_stride, scale_head_stride;
    long layer_bytes, scale_layer_bytes;      /* from a layer to the next; 0: all layers use the same */
} Store;

typedef struct {
    long format, scale_format, heads, head_size;
    long num_keys, prefix_length, queries;     /* queries of a row, in all chunks */
    const int64_t *prefix_rows;                /* row of the prefix store of each row, or NULL */
    const int64_t *write_positions;            /* (rows, queries), or NULL to write the last of num_keys */
    const float *bias;                         /* (rows or 1, 1, queries or 1, num_keys), or NULL */
    long bias_row_stride, bias_query_stride;
    long window, num_pivots;                   /* window: 0 for all keys; else the bias is that of the keys alone */
    const int64_t *pivots;                     /* (rows, num_pivots): ascending, then -1 */
    const float *pivot_bias;
} Attention;

enum { QUERIES_AT_ONCE = 4, KEYS_AT_ONCE = 4, VECTORS_AT_ONCE = 4 };

ALWAYS long larger_of(long a, long b) { return a > b ? a : b; }

ALWAYS long smaller_of(long a, long b) { return a < b ? a : b; }

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

/* Keys and values of a head from one store: the positions from `first` to before `end`, or those that `index` lists
 * there, less `shift`. The score of the entry s is at `offset` + s. */
typedef struct {
    const char *keys, *values, *key_scales, *value_scales;
    const int64_t *index;
    long first, end, shift, offset;
} Segment;

static Segment segment_of(const Attention *attention, const Store *store, long row, long head, long first, long end,
                          long offset) {
    const long at = (row * store->row_stride + head * store->head_stride) * bytes_of(attention->format);
    const long scale = (row * store->scale_row_stride + head * store->scale_head_stride) * bytes_of(attention->scale_format);
    return (Segment){.keys = store->keys + at, .values = store->values + at, .key_scales = store->key_scales + scale,
                     .value_scales = store->value_scales + scale, .first = first, .end = end, .offset = offset};
}

/* Scores of `queries` queries and `keys` keys of a segment from `entry` on: four sums at a time. */
ALWAYS void scores_of_keys(const int format, const int queries, const int keys, const int indexed,
                           const Attention *attention, const Segment *segment, const float *q, long query_stride,
                           long entry, float *scores) {
    const long size = attention->head_size, whole = size / LANES * LANES;
    const float factor = 1.0f / sqrtf((float)size);
    long s[KEYS_AT_ONCE];
    UNROLL for (int n = 0; n < keys; n++) s[n] = indexed ? segment->index[entry + n] - segment->shift : entry + n;
    Vector sums[QUERIES_AT_ONCE][KEYS_AT_ONCE];
    UNROLL for (int t = 0; t < queries; t++) UNROLL for (int n = 0; n < keys; n++) sums[t][n] = (Vector){0};
    for (long k = 0; k < whole; k += LANES) {
        UNROLL for (int n = 0; n < keys; n++) {
            const Vector key = load_as(format, segment->keys, s[n] * size + k);
            UNROLL for (int t = 0; t < queries; t++) sums[t][n] += load(q + t * query_stride + k) * key;
        }
    }
    if (whole < size) {
        for (int n = 0; n < keys; n++) {
            const Vector key = load_some_as(format, segment->keys, s[n] * size + whole, size - whole);
            for (int t = 0; t < queries; t++)
                sums[t][n] += load_some(q + t * query_stride + whole, size - whole) * key;
        }
    }
    FourVector scale = {factor, factor, factor, factor};
    if (format == INT8)
        UNROLL for (int n = 0; n < keys; n++)
            scale[n] = factor * element_as(attention->scale_format, segment->key_scales, s[n]);
    float *to = scores + segment->offset + entry;
    UNROLL for (int t = 0; t < queries; t++, to += attention->num_keys) {
        if (keys == 4) {
            const FourVector four = sum_four(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
            *(UnalignedFourVector *)to = four * scale;
        } else {
            to[0] = sum(sums[t][0]) * scale[0];
        }
    }
}

/* Scores of `queries` queries and the keys of a segment. */
ALWAYS void scores_of(const int format, const int queries, const int indexed, const Attention *attention,
                      const Segment *segment, const float *q, long query_stride, float *scores) {
    long entry = segment->first;
    for (; entry + KEYS_AT_ONCE <= segment->end; entry += KEYS_AT_ONCE)
        scores_of_keys(format, queries, KEYS_AT_ONCE, indexed, attention, segment, q, query_stride, entry, scores);
    for (; entry < segment->end; entry++)
        scores_of_keys(format, queries, 1, indexed, attention, segment, q, query_stride, entry, scores);
}

/* Add weights times values of a segment to `vectors` vectors of (queries, head size) from the element `k` on. */
ALWAYS void mix_vectors(const int format, const int queries, const int indexed, const int vectors,
                        const Attention *attention, const Segment *segment, const float *scores, long k, float *y,
                        long y_stride) {
    const long size = attention->head_size;
    Vector sums[QUERIES_AT_ONCE][VECTORS_AT_ONCE];
    UNROLL for (int t = 0; t < queries; t++)
        UNROLL for (int v = 0; v < vectors; v++) sums[t][v] = load(y + t * y_stride + k + v * LANES);
    for (long entry = segment->first; entry < segment->end; entry++) {
        const long s = indexed ? segment->index[entry] - segment->shift : entry;
        const float scale = format == INT8 ? element_as(attention->scale_format, segment->value_scales, s) : 1.0f;
        UNROLL for (int t = 0; t < queries; t++) {
            const float weight = scores[t * attention->num_keys + segment->offset + entry] * scale;
            if (weight == 0) continue; /* hidden values may be not a number */
            UNROLL for (int v = 0; v < vectors; v++)
                sums[t][v] += load_as(format, segment->values, s * size + k + v * LANES) * weight;
        }
    }
    UNROLL for (int t = 0; t < queries; t++)
        UNROLL for (int v = 0; v < vectors; v++) store(y + t * y_stride + k + v * LANES, sums[t][v]);
}

/* Add weights times values of a segment to (queries, head size); scores hold the weights. */
ALWAYS void mix_values(const int format, const int queries, const int indexed, const Attention *attention,
                       const Segment *segment, const float *scores, float *y, long y_stride) {
    const long size = attention->head_size, whole = size / LANES * LANES, count = size - whole;
    long k = 0;
    for (; k + VECTORS_AT_ONCE * LANES <= whole; k += VECTORS_AT_ONCE * LANES)
        mix_vectors(format, queries, indexed, VECTORS_AT_ONCE, attention, segment, scores, k, y, y_stride);
    for (; k < whole; k += LANES)
        mix_vectors(format, queries, indexed, 1, attention, segment, scores, k, y, y_stride);
    for (long entry = count ? segment->first : segment->end; entry < segment->end; entry++) {
        const long s = indexed ? segment->index[entry] - segment->shift : entry;
        const float scale = format == INT8 ? element_as(attention->scale_format, segment->value_scales, s) : 1.0f;
        const Vector value = load_some_as(format, segment->values, s * size + whole, count);
        for (int t = 0; t < queries; t++) {
            const float weight = scores[t * attention->num_keys + segment->offset + entry] * scale;
            if (weight == 0) continue;
            const Vector sum = load_some(y + t * y_stride + whole, count) + value * weight;
            for (long lane = 0; lane < count; lane++) y[t * y_stride + whole + lane] = sum[lane];
        }
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
    Segment segments[2];
    if (length)
        segments[0] = segment_of(attention, prefix, attention->prefix_rows[row], head, from, smaller_of(until, length), 0);
    segments[1] = segment_of(attention, cache, row, head, larger_of(from - length, 0), until - length, length);
    for (int part = length ? 0 : 1; part < 2; part++)
        scores_of(format, queries, 0, attention, &segments[part], q, q_stride, scores);
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
    for (int part = length ? 0 : 1; part < 2; part++)
        mix_values(format, queries, 0, attention, &segments[part], scores, y, y_stride);
    for (int t = 0; t < queries; t++)
        for (long k = 0; k < attention->head_size; k++) y[t * y_stride + k] *= inverse[t];
}

/* Index of a query among the keys of its row. */
static long column_of(const Attention *attention, long row, long query) {
    if (!attention->write_positions) return attention->num_keys - attention->queries + query;
    return attention->prefix_length + attention->write_positions[row * attention->queries + query];
}

/* Whether the queries from `first` to `last` of a row are at consecutive columns; they ascend. */
static int is_consecutive(const Attention *attention, long row, long first, long last) {
    return column_of(attention, row, last) - column_of(attention, row, first) == last - first;
}

/* Number of pivots before a column. */
static long pivots_before(const int64_t *pivots, long count, long column) {
    long low = 0;
    while (low < count) {
        const long middle = (low + count) / 2;
        if (pivots[middle] >= 0 && pivots[middle] < column) low = middle + 1;
        else count = middle;
    }
    return low;
}

/* Keys that some query of a group attends to: `before` pivots, then the columns from `begin` to before `end`. */
typedef struct {
    const int64_t *pivots;
    const float *pivot_bias, *bias;            /* of the row; bias of all its columns, or NULL */
    long num_pivots, before, begin, end;
} Reach;

static float bias_of(const Reach *reach, long column) { return reach->bias ? reach->bias[column] : 0; }

/* Turn the scores of the query at the column `own` into weights, 0 for keys that it does not attend to; return 1 /
 * their sum. The keys that it attends to are made consecutive meanwhile, so that the other queries change no bit. */
static float window_weights(const Reach *reach, long window, long own, float *scores) {
    const long before = reach->before, begin = reach->begin, stop = before + own + 1 - begin;
    const long border = larger_of(own - window + 1, begin), gap = border - begin; /* the columns of the gap: pivots alone */
    long kept = 0, columns[QUERIES_AT_ONCE];
    float moved[QUERIES_AT_ONCE];
    for (long p = before; p < reach->num_pivots && reach->pivots[p] >= 0 && reach->pivots[p] < border; p++, kept++) {
        columns[kept] = before + reach->pivots[p] - begin;
        moved[kept] = scores[columns[kept]] + reach->pivot_bias[p] + bias_of(reach, reach->pivots[p]);
    }
    const long skip = gap - kept;
    for (long p = before - 1; p >= 0; p--)
        scores[skip + p] = scores[p] + reach->pivot_bias[p] + bias_of(reach, reach->pivots[p]);
    memcpy(scores + skip + before, moved, kept * sizeof(float));
    if (reach->bias) {
        for (long column = border; column < own; column++) scores[before + column - begin] += reach->bias[column];
        scores[stop - 1] += reach->bias[own] == -INFINITY ? 0 : reach->bias[own]; /* in padding, too */
    }
    long from = skip;
    while (!before && from < stop - 1 && scores[from] == -INFINITY) from++;
    const float inverse = softmax_weights(scores, from, stop);
    for (long s = skip; s < from; s++) scores[s] = 0;
    memcpy(moved, scores + skip + before, kept * sizeof(float));
    memmove(scores, scores + skip, before * sizeof(float));
    for (long s = before; s < before + gap; s++) scores[s] = 0;
    for (long p = 0; p < kept; p++) scores[columns[p]] = moved[p];
    for (long s = stop; s < before + reach->end - begin; s++) scores[s] = 0;
    return inverse;
}

/* Window attention of `queries` queries at consecutive columns of a row and head. */
ALWAYS void attend_window(const int format, const int queries, const Attention *attention, const Store *cache,
                          const Store *prefix, long row, long head, long query, const float *q, long q_stride,
                          float *scores, float *y, long y_stride) {
    const long length = attention->prefix_length, first = column_of(attention, row, query), end = first + queries;
    const float *bias = attention->bias ? attention->bias + row * attention->bias_row_stride : NULL;
    const int64_t *pivots = attention->pivots + row * attention->num_pivots;
    long begin = larger_of(first - attention->window + 1, 0);
    while (bias && begin < first && bias[begin] == -INFINITY) begin++;
    const long before = pivots_before(pivots, attention->num_pivots, begin);
    const long shared = pivots_before(pivots, before, length), offset = before - begin;
    const Reach reach = {pivots, attention->pivot_bias + row * attention->num_pivots, bias, attention->num_pivots,
                         before, begin, end};
    Segment listed[2], recent[2];
    if (length) {
        const long prefix_row = attention->prefix_rows[row];
        listed[0] = segment_of(attention, prefix, prefix_row, head, 0, shared, 0);
        recent[0] = segment_of(attention, prefix, prefix_row, head, begin, smaller_of(end, length), offset);
    }
    listed[1] = segment_of(attention, cache, row, head, shared, before, 0);
    recent[1] = segment_of(attention, cache, row, head, larger_of(begin - length, 0), end - length, offset + length);
    listed[0].index = listed[1].index = pivots;
    listed[1].shift = length;
    for (int part = length ? 0 : 1; part < 2; part++)
        scores_of(format, queries, 1, attention, &listed[part], q, q_stride, scores);
    for (int part = length ? 0 : 1; part < 2; part++)
        scores_of(format, queries, 0, attention, &recent[part], q, q_stride, scores);
    float inverse[QUERIES_AT_ONCE];
    for (int t = 0; t < queries; t++) {
        inverse[t] = window_weights(&reach, attention->window, first + t, scores + t * attention->num_keys);
        memset(y + t * y_stride, 0, attention->head_size * sizeof(float));
    }
    for (int part = length ? 0 : 1; part < 2; part++)
        mix_values(format, queries, 1, attention, &listed[part], scores, y, y_stride);
    for (int part = length ? 0 : 1; part < 2; part++)
        mix_values(format, queries, 0, attention, &recent[part], scores, y, y_stride);
    for (int t = 0; t < queries; t++)
        for (long k = 0; k < attention->head_size; k++) y[t * y_stride + k] *= inverse[t];
}

#endif
