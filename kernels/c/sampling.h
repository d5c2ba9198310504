/* Sampling of one id per row: temperature, top-k, min-p, and Gumbel noise for the ids that pass them; and its log
 * probability.
 *
 * ``cogview/generation/sampling.py`` specifies it. */
#ifndef COGVIEW_SAMPLING_H
#define COGVIEW_SAMPLING_H

#include "vectors.h"

enum { RADIX_BITS = 11, RADIX = 1 << RADIX_BITS, SUMMED_AT_ONCE = 32 };

/* A whole number in the order of floats: larger floats have larger numbers. */
ALWAYS uint32_t ordered(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

ALWAYS float from_ordered(uint32_t number) {
    const uint32_t bits = number & 0x80000000u ? number & 0x7fffffffu : ~number;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The k-th largest of `count` ordered numbers, found by its digits from the highest; the array is overwritten. */
static uint32_t kth_largest(uint32_t *numbers, long count, long k) {
    for (int shift = 32 - RADIX_BITS;; shift = shift > RADIX_BITS ? shift - RADIX_BITS : 0) {
        uint32_t counts[RADIX] = {0}, digit = RADIX - 1;
        for (long i = 0; i < count; i++) counts[numbers[i] >> shift & (RADIX - 1)]++;
        for (; k > counts[digit]; digit--) k -= counts[digit];
        long kept = 0;
        for (long i = 0; i < count; i++) {
            numbers[kept] = numbers[i];
            kept += (numbers[i] >> shift & (RADIX - 1)) == digit;
        }
        count = kept;
        if (shift == 0) return numbers[0]; /* those that remain are equal */
    }
}

/* SplitMix64. */
ALWAYS uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

ALWAYS float gumbel(uint64_t bits) {
    const double uniform = ((double)(mix(bits) >> 12) + 0.5) * 0x1p-52;
    return (float)-log(-log(uniform));
}

/* The index of the sampled id; `scratch` has room for twice the logits. */
static long sample_row(const float *logits, long count, float temperature, long top_k, float log_min_p, int64_t key,
                       const int64_t *mixed_ids, float *scratch) {
    const long whole = count / LANES * LANES;
    float *scaled = scratch;
    Vector largest_lanes = broadcast(-INFINITY);
    for (long i = 0; i < whole; i += LANES) {
        const Vector values = load(logits + i) / temperature;
        store(scaled + i, values);
        largest_lanes = larger(values, largest_lanes);
    }
    float most = largest(largest_lanes);
    for (long i = whole; i < count; i++) {
        scaled[i] = logits[i] / temperature;
        most = scaled[i] > most ? scaled[i] : most;
    }
    float smallest = most + log_min_p;
    long passed = 0;
    for (long i = 0; i < count; i++) passed += scaled[i] >= smallest;
    if (top_k > 0 && top_k < passed) {
        uint32_t *numbers = (uint32_t *)(scratch + count);
        for (long i = 0; i < count; i++) numbers[i] = ordered(scaled[i]);
        const float least = from_ordered(kth_largest(numbers, count, top_k));
        smallest = least > smallest ? least : smallest;
    }
    long best = 0;
    float highest = -INFINITY;
    for (long i = 0; i < count; i++) {
        if (!(scaled[i] >= smallest) || scaled[i] == -INFINITY) continue;
        const float score = scaled[i] + gumbel((uint64_t)(key ^ mixed_ids[i]));
        if (score > highest) highest = score, best = i;
    }
    return best;
}

/* log softmax at `index`. Blocks of vectors are summed in float32, the blocks in float64. */
static float log_probability(const float *logits, long count, long index) {
    const long whole = count / LANES * LANES, block = SUMMED_AT_ONCE * LANES;
    float last[LANES]; /* the logits that fill no vector, then minus infinity */
    for (int lane = 0; lane < LANES; lane++) last[lane] = whole + lane < count ? logits[whole + lane] : -INFINITY;
    Vector largest_lanes = load(last);
    for (long i = 0; i < whole; i += LANES) largest_lanes = larger(load(logits + i), largest_lanes);
    const float most = largest(largest_lanes);
    double total = sum(exponential(load(last) - most));
    for (long first = 0; first < whole; first += block) {
        const long end = first + block < whole ? first + block : whole;
        Vector part = {0};
        for (long i = first; i < end; i += LANES) part += exponential(load(logits + i) - most);
        total += sum(part);
    }
    return (float)((double)logits[index] - most - log(total));
}

#endif
