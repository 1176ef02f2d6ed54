// D2O: in a decode step the row that will be overwritten is merged into the one most like it; after a prompt all that
// go at once (what they are like is found in similarity.cu).
#include "extremes.cuh"
#include "merging.cuh"

constexpr int AHEAD = 4;  // rows on their way to a lane

// Cosines of the row in slot s with those of slots begin ... end - 1, s left out: the largest. 0 with a row of zeros.
// All threads of the block call and get it.
DEVICE Largest most_similar(const Rows& keys, int b, int h, int s, int begin, int end) {
    __shared__ Largest shared[WARP];
    const int group = threadIdx.x / LANES, in_warp = group % (WARP / LANES);
    float x[8] = {};
    load_piece<K_STORE>(keys, keys.row(b, h, s), x);
    const float length = sqrtf(sum_over<LANES>(dot(x, x)));
    Largest best = none_yet();
    for (int first = begin + group; first - in_warp < end; first += ROWS * AHEAD) {  // the same for a whole warp
        float y[AHEAD][8] = {};
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (first + i * ROWS < end) load_piece<K_STORE>(keys, keys.row(b, h, first + i * ROWS), y[i]);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int at = first + i * ROWS;
            const float product = sum_over<LANES>(dot(x, y[i]));
            const float lengths = length * sqrtf(sum_over<LANES>(dot(y[i], y[i])));
            if (at < end && at != s) best.meet(lengths > 0.0f ? product / lengths : 0.0f, at);
        }
    }
    return block_largest(best, shared);
}

// See Ops.merge. slot and threshold [B, H_kv]; best [B, H_kv, parts] and done [B, H_kv], zeros before and after, are
// scratch. Sequences whose slots lie outside the cache are left as they are. Grid (parts, H_kv, B): the last block of a
// head to finish merges, or with a shared threshold the last of a sequence for all heads.
KERNEL __launch_bounds__(THREADS, 8) merge(
    u8* k_codes, u16* k_scales, i64 k_sequence, i64 k_head, u8* v_codes, u16* v_scales, i64 v_sequence, i64 v_head,
    int slots, const int* slot, const int* stops, const int* heads, const int* active, float* threshold, float beta,
    float e, int normalised, int shared, Largest* best, int* done
) {
    const int part = blockIdx.x, parts = gridDim.x, h = blockIdx.y, n_head_kv = gridDim.y, b = blockIdx.z;
    const int head = heads[b], stop = stops[b];
    if (!active[b] || head < 0 || stop > slots) return;
    slot += b * n_head_kv, threshold += b * n_head_kv, best += i64(b) * n_head_kv * parts, done += b * n_head_kv;
    for (int i = 0; i < n_head_kv; i++) {
        if (slot[i] < 0 || slot[i] >= slots) return;
    }
    const Rows keys{k_codes, k_scales, k_sequence, k_head}, values{v_codes, v_scales, v_sequence, v_head};
    const int each = (max(stop - head, 0) + parts - 1) / parts, begin = head + part * each;
    const Largest found = most_similar(keys, b, h, slot[h], begin, min(begin + each, stop));
    if (threadIdx.x == 0) best[h * parts + part] = found;
    if (!is_last(done + (shared ? 0 : h), shared ? parts * n_head_kv : parts)) return;

    __shared__ Largest of_heads[WARP];
    const auto best_of = [&](int i) {
        Largest x = none_yet();
        for (int at = threadIdx.x; at < parts; at += THREADS) {
            const Largest of_part = best[i * parts + at];
            x.meet(of_part.value, of_part.where);
        }
        return block_largest(x, of_heads);
    };
    float mean = 0.0f;
    for (int i = 0; shared && i < n_head_kv; i++) mean += best_of(i).value / float(n_head_kv);
    for (int i = shared ? 0 : h; i < (shared ? n_head_kv : h + 1); i++) {
        const Largest like = best_of(i);
        const float u = shared ? mean : like.value, least = threshold[i];
        if (!(u > -INFINITE)) continue;  // there is none that may receive
        if (u >= least) {
            const Rule rule{e, normalised};
            const auto only = [&](int) { return Evicted{slot[i], like.value}; };
            merge_rows<K_STORE>(keys, b, i, like.where, 1, only, rule);
            merge_rows<V_STORE>(values, b, i, like.where, 1, only, rule);
        }
        __syncthreads();
        if (threadIdx.x == 0) threshold[i] = beta * u + (1.0f - beta) * least;
    }
}

// -- after a prompt ---------------------------------------------------------------------------------------------------

// Whether each of n evicted slots is merged: cosines [H_kv, n] -> receivers [H_kv, n], NOWHERE instead if its cosine is
// below the mean of all, which the threshold [H_kv] becomes; if shared, the mean of all heads' cosines. A block for
// each head.
KERNEL decide(const float* cosines, int n, int shared, float* threshold, int* receivers) {
    __shared__ float sums[WARP];
    const int h = blockIdx.x, heads = gridDim.x;
    const auto decisive = [&](int i) {
        if (!shared) return cosines[i64(h) * n + i];
        float sum = 0.0f;
        for (int of = 0; of < heads; of++) sum += cosines[i64(of) * n + i];
        return sum / float(heads);
    };
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += decisive(i);
    const float mean = block_sum(sum, sums) / float(n);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        if (!(decisive(i) >= mean)) receivers[i64(h) * n + i] = NOWHERE;
    }
    if (threadIdx.x == 0) threshold[h] = mean;
}

// Merges into kept slot j of head h all evicted ones whose receiver it is: kept [H_kv, m], evicted, cosines, receivers
// and the order of receivers [H_kv, n]. Grid (m, H_kv, 2).
KERNEL __launch_bounds__(THREADS, 8) merge_evicted(
    u8* k_codes, u16* k_scales, i64 k_sequence, i64 k_head, u8* v_codes, u16* v_scales, i64 v_sequence, i64 v_head,
    const int* kept, const int* evicted, const float* cosines, const int* receivers, const int* order, int n, float e,
    int normalised
) {
    const int h = blockIdx.y, into = kept[i64(h) * gridDim.x + blockIdx.x];
    evicted += i64(h) * n, cosines += i64(h) * n, receivers += i64(h) * n, order += i64(h) * n;
    const auto receiver = [&](int i) { return receivers[order[i]]; };
    const int first = count_below(receiver, n, into), count = count_below(receiver, n, into + 1) - first;
    if (count == 0) return;
    const auto list = [&](int i) { return Evicted{evicted[order[first + i]], cosines[order[first + i]]}; };
    const Rule rule{e, normalised};
    if (blockIdx.z == 0) {
        merge_rows<K_STORE>({k_codes, k_scales, k_sequence, k_head}, 0, h, into, count, list, rule);
    } else {
        merge_rows<V_STORE>({v_codes, v_scales, v_sequence, v_head}, 0, h, into, count, list, rule);
    }
}
