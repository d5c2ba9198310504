/* Embedding, all layers and the final norm of a transformer for some new positions, in one call
 * (``cogview/modeling/transformer.py`` specifies them).
 *
 * Threads meet at barriers between the operations. Rows are processed in chunks, so that intermediate results stay in
 * the cache; every layer stores the keys and values of a chunk before the chunk attends. */
#include <omp.h>

#include "attention.h"
#include "linear.h"
#include "sampling.h"

enum { INTERFACE = 5, CHUNK_ROWS = 64 };
static const float NORM_EPSILON = 1e-5f / 64, SMALLEST = 1e-20f;

typedef struct {
    const float *weight, *bias;
} Norm;

typedef struct {
    Norm attention_norm;
    Linear query_key_value, output;
    Norm attention_output_norm, mlp_norm;
    Linear mlp_input, mlp_output;
    Norm mlp_output_norm;
} Layer;

typedef struct {
    const void *weight;                      /* (rows, width) */
    long format, rows;
    const int64_t *indices;                  /* (batch, queries) */
} Embedding;

typedef struct {
    const Layer *layers;
    Norm final_norm;
    Embedding tokens, positions;
    long num_layers, width;
    Attention attention;
    Store cache, prefix;                       /* of the first layer */
    long batch;
    float *x;                                /* (batch, queries, width): normalized output of the last layer */
    float *scratch;
} Call;

long cogview_interface(void) { return INTERFACE; }

/* Floats of scratch memory. */
long cogview_scratch(long width, long rows, long num_keys, long threads) {
    const long chunk = rows < CHUNK_ROWS ? rows : CHUNK_ROWS;
    return chunk * width * (1 + 3 + 1 + 4 + 4) + threads * (QUERIES_AT_ONCE * num_keys + LANES);
}

/* LayerNorm of x / max|x|, added to `to` if `add`, else written. */
static void normalize(const Norm *norm, const float *x, long width, int add, float *to) {
    const long whole = width / LANES * LANES;
    Vector most = {0};
    for (long k = 0; k < whole; k += LANES) most = larger(absolute(load(x + k)), most);
    float peak = largest(most);
    for (long k = whole; k < width; k++) peak = fabsf(x[k]) > peak ? fabsf(x[k]) : peak;
    if (peak < SMALLEST) peak = SMALLEST;
    const float factor = 1.0f / peak;
    Vector total = {0};
    for (long k = 0; k < whole; k += LANES) total += load(x + k);
    float mean = sum(total);
    for (long k = whole; k < width; k++) mean += x[k];
    mean = mean / width;
    Vector squares = {0};
    for (long k = 0; k < whole; k += LANES) {
        const Vector centred = (load(x + k) - mean) * factor;
        squares += centred * centred;
    }
    float variance = sum(squares);
    for (long k = whole; k < width; k++) variance += (x[k] - mean) * factor * ((x[k] - mean) * factor);
    const float scale = factor / sqrtf(variance / width + NORM_EPSILON);
    for (long k = 0; k < whole; k += LANES) {
        const Vector result = (load(x + k) - mean) * scale * load(norm->weight + k) + load(norm->bias + k);
        store(to + k, add ? load(to + k) + result : result);
    }
    for (long k = whole; k < width; k++) {
        const float result = (x[k] - mean) * scale * norm->weight[k] + norm->bias[k];
        to[k] = add ? to[k] + result : result;
    }
}

/* Whether each index has a row of the weight. */
static int is_within(const Embedding *embedding, long count) {
    for (long i = 0; i < count; i++)
        if (embedding->indices[i] < 0 || embedding->indices[i] >= embedding->rows) return 0;
    return 1;
}

/* Sum of the embeddings of a token and its position. */
static void embed(const Embedding *tokens, const Embedding *positions, long row, long width, float *x) {
    const long token = tokens->indices[row] * width, position = positions->indices[row] * width;
    const long whole = width / LANES * LANES, rest = width - whole;
    for (long k = 0; k < whole; k += LANES)
        store(x + k, load_as(tokens->format, tokens->weight, token + k) +
                         load_as(positions->format, positions->weight, position + k));
    if (rest == 0) return;
    const Vector last = load_some_as(tokens->format, tokens->weight, token + whole, rest) +
                        load_some_as(positions->format, positions->weight, position + whole, rest);
    memcpy(x + whole, &last, rest * sizeof(float));
}

/* A linear layer by all threads; `split` has room for the inputs of int4. */
static void linear_together(const Linear *linear, const float *x, long rows, int activate, float *y, float *split,
                            long thread, long threads) {
    if (linear->format == INT4) {
        for (long row = thread; row < rows; row += threads)
            split_pairs(x + row * linear->inputs, linear->inputs, split + row * linear->inputs);
        x = split;
#pragma omp barrier
    }
    linear_part(linear, x, rows, activate, y, thread, threads);
#pragma omp barrier
}

static Store layer_of(const Store *store, long layer) {
    Store result = *store;
    result.keys += layer * store->layer_bytes;
    result.values += layer * store->layer_bytes;
    result.key_scales += layer * store->scale_layer_bytes;
    result.value_scales += layer * store->scale_layer_bytes;
    return result;
}

static void attend_some(const int queries, const Attention *attention, const Store *cache, const Store *prefix, long row,
                        long head, long query, const float *q, long q_stride, float *scores, float *y, long y_stride) {
#define ATTEND(FORMAT, COUNT)                                                                                           \
    if (attention->format == FORMAT && queries == COUNT) {                                                              \
        if (attention->window)                                                                                          \
            attend_window(FORMAT, COUNT, attention, cache, prefix, row, head, query, q, q_stride, scores, y, y_stride); \
        else                                                                                                            \
            attend(FORMAT, COUNT, attention, cache, prefix, row, head, query, q, q_stride, scores, y, y_stride);        \
    }
    ATTEND(FLOAT32, 4)
    ATTEND(FLOAT32, 1)
    ATTEND(BFLOAT16, 4)
    ATTEND(BFLOAT16, 1)
    ATTEND(INT8, 4)
    ATTEND(INT8, 1)
#undef ATTEND
}

/* Attention of the rows from `first` on; each head of each run of at most four queries of a row is one piece of work. */
static void attend_chunk(const Call *call, const Store *cache, const Store *prefix, long first, long rows, const float *qkv,
                         float *y, float *scores, long thread, long threads) {
    const Attention *attention = &call->attention;
    const long width = call->width, size = attention->head_size, queries = attention->queries;
    long piece = 0;
    for (long row = 0; row < rows;) {
        const long batch_row = (first + row) / queries, query = (first + row) % queries;
        const long left = queries - query < rows - row ? queries - query : rows - row;
        const long last = query + QUERIES_AT_ONCE - 1;
        const int together = left >= QUERIES_AT_ONCE && (!attention->window || is_consecutive(attention, batch_row, query, last));
        const int count = together ? QUERIES_AT_ONCE : 1;
        for (long head = 0; head < attention->heads; head++, piece++) {
            if (piece % threads != thread) continue;
            attend_some(count, attention, cache, prefix, batch_row, head, query, qkv + row * 3 * width + head * size,
                        3 * width, scores, y + row * width + head * size, width);
        }
        row += count;
    }
}

static void store_chunk(const Call *call, const Store *cache, long first, long rows, const float *qkv, long thread,
                        long threads) {
    const Attention *attention = &call->attention;
    const long width = call->width, size = attention->head_size, queries = attention->queries;
    for (long row = thread; row < rows; row += threads) {
        const long batch_row = (first + row) / queries, query = (first + row) % queries;
        const long position = attention->write_positions
                                  ? attention->write_positions[first + row]
                                  : attention->num_keys - queries + query - attention->prefix_length;
        for (long head = 0; head < attention->heads; head++) {
            const float *key = qkv + row * 3 * width + width + head * size;
            store_keys_values(attention, cache, batch_row, head, position, key, key + width);
        }
    }
}

/* 0, or 1 if a token and 2 if a position has no embedding: nothing is computed then. */
int cogview_layers(const Call *call, int threads) {
    const long width = call->width, all = call->batch * call->attention.queries;
    if (!is_within(&call->tokens, all)) return 1;
    if (!is_within(&call->positions, all)) return 2;
    const long chunk = all < CHUNK_ROWS ? all : CHUNK_ROWS;
#pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), count = omp_get_num_threads();
        float *normed = call->scratch, *qkv = normed + chunk * width, *mixed = qkv + 3 * chunk * width;
        float *inner = mixed + chunk * width, *split = inner + 4 * chunk * width;
        float *scores = split + 4 * chunk * width + thread * (QUERIES_AT_ONCE * call->attention.num_keys + LANES);
        for (long row = thread; row < all; row += count)
            embed(&call->tokens, &call->positions, row, width, call->x + row * width);
#pragma omp barrier
        for (long number = 0; number < call->num_layers; number++) {
            const Layer *layer = call->layers + number;
            const Store cache = layer_of(&call->cache, number), prefix = layer_of(&call->prefix, number);
            for (long first = 0; first < all; first += chunk) {
                const long rows = all - first < chunk ? all - first : chunk;
                float *x = call->x + first * width;
                for (long row = thread; row < rows; row += count)
                    normalize(&layer->attention_norm, x + row * width, width, 0, normed + row * width);
#pragma omp barrier
                linear_together(&layer->query_key_value, normed, rows, 0, qkv, split, thread, count);
                store_chunk(call, &cache, first, rows, qkv, thread, count);
#pragma omp barrier
                attend_chunk(call, &cache, &prefix, first, rows, qkv, mixed, scores, thread, count);
#pragma omp barrier
                linear_together(&layer->output, mixed, rows, 0, normed, split, thread, count);
                for (long row = thread; row < rows; row += count) {
                    float *stream = x + row * width, *branch = normed + row * width;
                    normalize(&layer->attention_output_norm, branch, width, 1, stream);
                    normalize(&layer->mlp_norm, stream, width, 0, branch);
                }
#pragma omp barrier
                linear_together(&layer->mlp_input, normed, rows, 1, inner, split, thread, count);
                linear_together(&layer->mlp_output, inner, rows, 0, normed, split, thread, count);
                for (long row = thread; row < rows; row += count)
                    normalize(&layer->mlp_output_norm, normed + row * width, width, 1, x + row * width);
#pragma omp barrier
            }
        }
        for (long row = thread; row < all; row += count)
            normalize(&call->final_norm, call->x + row * width, width, 0, call->x + row * width);
    }
    return 0;
}

/* One linear layer; `scratch` has rows x inputs floats for int4. */
void cogview_linear(const Linear *linear, const float *x, long rows, float *y, float *scratch, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const long thread = omp_get_thread_num(), count = omp_get_num_threads();
        for (long first = 0; first < rows; first += CHUNK_ROWS) {
            const long some = rows - first < CHUNK_ROWS ? rows - first : CHUNK_ROWS;
            linear_together(linear, x + first * linear->inputs, some, 0, y + first * linear->outputs,
                            scratch + first * linear->inputs, thread, count);
        }
    }
}

/* One id for each row of logits (rows, count), and its log probability by the logits `scored`; `scratch` has 2 x count
 * floats for each thread. */
void cogview_sample(const float *logits, const float *scored, long rows, long count, float temperature, long top_k,
                    float log_min_p, const int64_t *keys, const int64_t *mixed_ids, int64_t *chosen,
                    float *log_probabilities, float *scratch, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        chosen[row] = sample_row(logits + row * count, count, temperature, top_k, log_min_p, keys[row], mixed_ids,
                                 scratch + omp_get_thread_num() * 2 * count);
        log_probabilities[row] = log_probability(scored + row * count, count, chosen[row]);
    }
}
