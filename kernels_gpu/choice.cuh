// The k tokens of most weight, by logits that blocks of threads have written: the last block of a KV head to finish
// chooses, so that no launch is spent on it and the others go on.
//
// Every RUN tokens have their maximum and their sum of exponentials noted, for each head. From these come the softmax
// and, for each run, a number that its best token reaches and one that none of its tokens exceeds. The m-th largest of
// the former bounds the choice from below, so that only runs whose latter reaches it are read token by token. What is
// noted does not depend on which block a token was scored by, so results do not depend on the grid.
//
// Macros: GROUP (query heads of a KV head), INTERLEAVED (how positions of logits go with tokens). The grid is
// (parts, H_kv, B), of THREADS threads, with dynamic shared memory of a bit for each position.
#pragma once
#include "selection.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int RUN = 16;
constexpr int LISTED = 2048;  // tokens that may be looked through in shared memory; more are where they lie
constexpr int LOOK = 4;                          // bounds on their way to a thread
constexpr int OPEN = LOOK * THREADS;             // runs that are read after one look at the bounds
constexpr int READ = GROUP > 8 ? 1 : 4;          // runs on their way to a half warp
constexpr int AHEAD = GROUP < 8 ? 8 / GROUP : 1;  // runs on their way to a thread that needs only what is noted of them

// Where a token's logit stands: in the 4-bit index 16 tokens share 16 words, of which each is one thread's.
DEVICE int token_at(int position) {
    return INTERLEAVED ? (position & ~127) | (position & 7) << 4 | (position >> 3 & 15) : position;
}
DEVICE int position_of(int token) {
    return INTERLEAVED ? (token & ~127) | (token & 15) << 3 | (token >> 4 & 7) : token;
}

// Runs in which the first n tokens stand.
DEVICE int runs_of(int n) { return INTERLEAVED ? (n + 127) / 128 * (128 / RUN) : (n + RUN - 1) / RUN; }

// What is known and wanted of a KV head of a sequence.
struct Choice {
    float* logits;   // [GROUP, positions]; NaN has become -inf
    float2* runs;    // [GROUP, positions / RUN]: maximum, and the sum of exp(logit - maximum); 0 if that is -inf
    float* sums;     // [positions / RUN]: maximum of the logits' sum over heads; null if probabilities decide
    u32* ranks;      // [positions], scratch
    int* rows;       // [k]: what is chosen
    float* weights;  // [GROUP, k]: its probabilities
    int* counts;     // [3]: how many stay; the sum of that over the calls that chose, and their number. Null: all stay
    int positions, k, local;
    float least;     // share of the k of those that stay beside the last `local`

    DEVICE Choice of(int kv_head) const {
        const i64 at = i64(kv_head) * positions;
        return {
            logits + GROUP * at, runs + GROUP * at / RUN, sums ? sums + at / RUN : nullptr, ranks + at,
            rows + i64(kv_head) * k, weights + i64(kv_head) * GROUP * k, counts ? counts + 3 * i64(kv_head) : nullptr,
            positions, k, local, least,
        };
    }
};

// The arguments of a kernel that ends with them, and the same for the calling block's KV head.
#define CHOICE float *logits, float2 *runs, float *sums, u32 *ranks, int *rows, float *weights, int *counts, \
    int positions, int k, int local, float least
#define CHOSEN Choice{logits, runs, sums, ranks, rows, weights, counts, positions, k, local, least}.of(kv_head_id())

DEVICE int kv_head_id() { return blockIdx.z * gridDim.y + blockIdx.y; }

// Notes the logits x of a head, of tokens in positions at ... at + N - 1. Lanes that differ in the bits STEPS share a run.
template <int... STEPS, int N>
DEVICE void put(const Choice& c, int head, int at, float (&x)[N]) {
    float high = -INFINITE, total = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = x[i] == x[i] ? x[i] : -INFINITE, high = fmaxf(high, x[i]);
    ((high = fmaxf(high, __shfl_xor_sync(ALL, high, STEPS))), ...);
    const float base = high == -INFINITE ? 0.0f : high;
#pragma unroll
    for (int i = 0; i < N; i++) total += __expf(x[i] - base);
    ((total += __shfl_xor_sync(ALL, total, STEPS)), ...);
    float* to = c.logits + i64(head) * c.positions + at;
    if constexpr (N == 1) *to = x[0];
    if constexpr (N == 2) *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
    if constexpr (N == 8) {
        reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
        reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
    if ((lane_id() & (STEPS | ...)) == 0) c.runs[(i64(head) * c.positions + at) / RUN] = make_float2(high, total);
}

// The same of the logits' sums over all heads.
template <int... STEPS, int N>
DEVICE void put_sums(const Choice& c, int at, const float (&x)[N]) {
    float high = -INFINITE;
#pragma unroll
    for (int i = 0; i < N; i++) high = fmaxf(high, x[i]);
    ((high = fmaxf(high, __shfl_xor_sync(ALL, high, STEPS))), ...);
    if ((lane_id() & (STEPS | ...)) == 0) c.sums[at / RUN] = high;
}

// -- the choice -------------------------------------------------------------------------------------------------------

// Shared memory, which scores no longer need.
struct Chooser {
    float part[GROUP][WARPS], high[GROUP], scale[GROUP];  // exp(logit - high) times scale is a probability
    Tally tally;
    u64 listed[LISTED];
    int open[OPEN], n_open, n_listed;
};

// A number of each head, of all threads, joined in s.part[head][0] by the thread that has the head's number.
template <class Join>
DEVICE void join_threads(float (&x)[GROUP], Chooser& s, const Join& join) {
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) x[g] = join(x[g], __shfl_xor_sync(ALL, x[g], step));
        if (lane_id() == 0) s.part[g][threadIdx.x / WARP] = x[g];
    }
    __syncthreads();
    if (threadIdx.x < GROUP)
        for (int warp = 1; warp < WARPS; warp++)
            s.part[threadIdx.x][0] = join(s.part[threadIdx.x][0], s.part[threadIdx.x][warp]);
}

// Highest logits and what makes exponentials probabilities: 0 if nothing, or something infinite, is highest.
DEVICE void find_softmax(const Choice& c, int n, Chooser& s) {
    const int runs = runs_of(n), span = c.positions / RUN;
    float high[GROUP], total[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; g++) high[g] = -INFINITE, total[g] = 0.0f;
#pragma unroll AHEAD
    for (int i = threadIdx.x; i < runs; i += THREADS)
#pragma unroll
        for (int g = 0; g < GROUP; g++) high[g] = fmaxf(high[g], c.runs[i64(g) * span + i].x);
    join_threads(high, s, [](float a, float b) { return fmaxf(a, b); });
    if (threadIdx.x < GROUP) s.high[threadIdx.x] = s.part[threadIdx.x][0];
    __syncthreads();
#pragma unroll AHEAD
    for (int i = threadIdx.x; i < runs; i += THREADS)
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            const float2 run = c.runs[i64(g) * span + i];
            total[g] += run.y * __expf(run.x - s.high[g]);
        }
    join_threads(total, s, [](float a, float b) { return a + b; });
    if (threadIdx.x < GROUP) {
        const int g = threadIdx.x;
        s.scale[g] = fabsf(s.high[g]) < INFINITE ? 1.0f / s.part[g][0] : 0.0f;
    }
    __syncthreads();
}

DEVICE float probability(const Chooser& s, int head, float logit) {
    return s.scale[head] > 0.0f ? __expf(logit - s.high[head]) * s.scale[head] : 0.0f;
}

DEVICE u32 rank_at(const Choice& c, const Chooser& s, int position) {
    float rank = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        const float logit = c.logits[i64(g) * c.positions + position];
        rank += c.sums ? logit : probability(s, g, logit);
    }
    return order_of(rank);
}

// What the best token of a run reaches, and what none exceeds. A run in which not all are among the first n tokens
// bounds nothing.
DEVICE float2 bounds_of(const Choice& c, int n, int run, const Chooser& s) {
    if (token_at(RUN * run + RUN - 1) >= n) return make_float2(-INFINITE, INFINITE);
    if (c.sums) return make_float2(c.sums[run], c.sums[run]);
    float least = 0.0f, most = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        const float p = probability(s, g, c.runs[i64(g) * (c.positions / RUN) + run].x);
        least = fmaxf(least, p), most += p;
    }
    return make_float2(least, most);
}

// Bounds take the place of what was noted of head 0: there after the next barrier, before which none is read. Returns a
// rank that m of the first n tokens reach.
DEVICE u32 find_bound(const Choice& c, int n, int m, Chooser& s) {
    const int runs = runs_of(n);
    for_each<AHEAD>(runs, [&](int i) { return bounds_of(c, n, i, s); }, [&](int i, float2 x) { c.runs[i] = x; });
    if (runs < m) return 0;
    const auto key = [&](int i) { return u64(order_of(c.runs[i].x)) << 32; };
    return u32(least_of_largest(runs, m, 2, s.tally, key) >> 32);
}

// Lists the tokens of the first n that reach the bound, and counts those that find no place.
DEVICE void list_tokens(const Choice& c, int n, u32 bound, Chooser& s) {
    const int runs = runs_of(n), half_warp = threadIdx.x / RUN;
    if (threadIdx.x == 0) s.n_listed = 0;
    for (int first = 0; first < runs; first += OPEN) {
        if (threadIdx.x == 0) s.n_open = 0;
        __syncthreads();
        bool open[LOOK];
#pragma unroll
        for (int u = 0; u < LOOK; u++) {
            const int i = first + u * THREADS + threadIdx.x;
            open[u] = i < runs && order_of(c.runs[i].y) >= bound;
        }
#pragma unroll
        for (int u = 0; u < LOOK; u++) {
            const int at = place_in(&s.n_open, open[u]);
            if (open[u]) s.open[at] = first + u * THREADS + threadIdx.x;
        }
        __syncthreads();
        for (int i = 0; i < s.n_open; i += READ * (THREADS / RUN)) {
            int token[READ];
            u32 rank[READ];
#pragma unroll
            for (int u = 0; u < READ; u++) {
                const int at = i + u * (THREADS / RUN) + half_warp;
                const int position = at < s.n_open ? RUN * s.open[at] + int(threadIdx.x) % RUN : 0;
                token[u] = at < s.n_open ? token_at(position) : n;
                rank[u] = token[u] < n ? rank_at(c, s, position) : 0;
            }
#pragma unroll
            for (int u = 0; u < READ; u++) {
                const bool wanted = token[u] < n && rank[u] >= bound;
                const int at = place_in(&s.n_listed, wanted);
                if (wanted && at < LISTED) s.listed[at] = key_of(rank[u], token[u]);
            }
        }
        __syncthreads();
    }
}

// Marks the m best of the first n tokens.
DEVICE void mark_best(const Choice& c, int n, int m, u32* marks, Chooser& s) {
    for (int i = threadIdx.x; i < (n + 31) / 32; i += THREADS) marks[i] = 0;
    list_tokens(c, n, find_bound(c, n, m, s), s);
    if (s.n_listed <= LISTED) {
        const u64 least = least_of_largest(s.n_listed, m, ALL_DIGITS, s.tally, [&](int i) { return s.listed[i]; });
        for (int i = threadIdx.x; i < s.n_listed; i += THREADS)
            if (s.listed[i] >= least) mark(marks, int(~u32(s.listed[i])));
        return;
    }
    const int positions = RUN * runs_of(n);
#pragma unroll 1
    for (int i = threadIdx.x; i < positions; i += THREADS) c.ranks[i] = token_at(i) < n ? rank_at(c, s, i) : 0;
    const auto key = [&](int i) { return token_at(i) < n ? key_of(c.ranks[i], token_at(i)) : 0; };
    const u64 least = least_of_largest(positions, m, ALL_DIGITS, s.tally, key);
    for (int i = threadIdx.x; i < positions; i += THREADS)
        if (token_at(i) < n && key(i) >= least) mark(marks, token_at(i));
}

// A weight to the power of the share of the queries that was seen, in quarters.
DEVICE float temper(float weight, float seen) {
    const float quarters = floorf(4.0f * seen + 0.5f), half = sqrtf(weight);
    return quarters >= 4.0f ? weight : quarters == 3.0f ? half * sqrtf(half) : quarters == 2.0f ? half : sqrtf(half);
}

// Of the k rows of a text of n > k tokens those that stay become the first, in order, and are counted. A thread knows all
// of a row before others come to stand in its place.
DEVICE void keep_heavy(const Choice& c, int n, Chooser& s, float seen) {
    const auto own = [&](int i) {
        float total = 0.0f;
#pragma unroll
        for (int g = 0; g < GROUP; g++) total += c.weights[i64(g) * c.k + i];
        return temper(total, seen);
    };
    float sum = 0.0f;
    for (int i = threadIdx.x; i < c.k; i += THREADS) sum += own(i);
    sum = sum_over(sum);
    __syncthreads();
    if (lane_id() == 0) s.part[0][threadIdx.x / WARP] = sum;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < WARPS; warp++) total += s.part[0][warp];
    int kept = 0;
    for (int first = 0; first < c.k; first += THREADS) {
        const int i = first + threadIdx.x, row = i < c.k ? c.rows[i] : -1;
        float weight[GROUP];
#pragma unroll
        for (int g = 0; g < GROUP; g++) weight[g] = i < c.k ? c.weights[i64(g) * c.k + i] : 0.0f;
        const bool stays = i < c.k && (own(i) >= c.least * total || row >= n - c.local);
        const int at = kept + sum_before(stays, s.tally.warps);
        if (stays) {
            c.rows[at] = row;
#pragma unroll
            for (int g = 0; g < GROUP; g++) c.weights[i64(g) * c.k + at] = weight[g];
        }
        kept += __syncthreads_count(stays);
    }
    if (threadIdx.x == 0) c.counts[0] = kept, c.counts[1] += kept, c.counts[2]++;
}

// Chooses k of the first n tokens, if all blocks that had some of them have come here. All threads of a block call. seen:
// see choose_components, wanted if there are counts.
DEVICE void choose(const Choice& c, int n, int blocks, int* done, Chooser& s, float seen = 1.0f) {
    extern __shared__ u32 marks[];
    if (!is_last(done, blocks)) return;
    find_softmax(c, n, s);
    const int chosen = min(n, c.k), m = c.k - c.local;
    const bool all = n <= c.k;
    for (int i = threadIdx.x; i < chosen; i += THREADS)
        if (all || i >= m) c.rows[i] = n - chosen + i;
    if (!all && m > 0) {
        mark_best(c, n - c.local, m, marks, s);
        __syncthreads();
        write_marked(marks, (n - c.local + 31) / 32, 0, c.rows, s.tally.warps);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < chosen; i += THREADS) {
        const int position = position_of(c.rows[i]);
#pragma unroll
        for (int g = 0; g < GROUP; g++)
            c.weights[i64(g) * c.k + i] = probability(s, g, c.logits[i64(g) * c.positions + position]);
    }
    if (!c.counts) return;
    if (!all) keep_heavy(c, n, s, seen);
    else if (threadIdx.x == 0) c.counts[0] = n;
}
