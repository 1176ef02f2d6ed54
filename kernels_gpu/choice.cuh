// The k tokens of most weight, by logits that blocks of threads have written: the last block of a KV head to finish
// chooses, so that no launch is spent on it and the others go on.
//
// Every RUN tokens have their maximum and their sum of exponentials noted, for each head. From these come the softmax
// and, for each run, a number that its best token reaches and one that none of its tokens exceeds. Where few are wanted,
// the m-th largest of the former bounds the choice from below, so that only runs whose latter reaches it are read token by
// token. Where many are, most runs would be, and their bound would be loose: all tokens are read, and how many have which
// rank, to a part in a hundred, is counted. Tokens that reach the bound are listed, and the m best of the list are exactly
// those of all. What is noted does not depend on which block a token was scored by, so results do not depend on the grid.
//
// Macros: GROUP (query heads of a KV head), INTERLEAVED (how positions of logits go with tokens). The grid is
// (parts, H_kv, B), of THREADS threads, with dynamic shared memory of a bit for each position if there are no `marks`.
#pragma once
#include "selection.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int RUN = 16;
constexpr int FEW = 4;                           // or more runs for each token that is wanted: its best one bounds others
constexpr int STEP = 17;  // bits that are left out where ranks are counted, so that DIGITS are 32 octaves below the largest
constexpr int LOOK = 4;                          // bounds on their way to a thread
constexpr int OPEN = LOOK * THREADS;             // runs that are read after one look at the bounds
constexpr int READ = GROUP > 8 ? 1 : 4;          // runs on their way to a half warp
constexpr int AHEAD = GROUP < 8 ? 8 / GROUP : 1;  // runs on their way to a thread that needs only what is noted of them
constexpr int FOURS = GROUP > 4 ? 1 : 4 / GROUP;  // times four tokens on their way to a thread, with all heads
constexpr int RANKED = 4;                        // the same of their ranks

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
    u64* listed;     // [positions], scratch
    u32* marks;      // [positions / 32], scratch; null: in shared memory
    int* rows;       // [k]: what is chosen
    float* weights;  // [GROUP, k]: its probabilities
    int* counts;     // [3]: how many stay; the sum of that over the calls that chose, and their number. Null: all stay
    int positions, k, local;
    float least;     // share of the k of those that stay beside the last `local`

    DEVICE Choice of(int kv_head) const {
        const i64 at = i64(kv_head) * positions;
        return {
            logits + GROUP * at, runs + GROUP * at / RUN, sums ? sums + at / RUN : nullptr, ranks + at, listed + at,
            marks ? marks + i64(kv_head) * ((positions + 31) / 32) : nullptr, rows + i64(kv_head) * k,
            weights + i64(kv_head) * GROUP * k, counts ? counts + 3 * i64(kv_head) : nullptr, positions, k, local, least,
        };
    }
};

// The arguments of a kernel that ends with them, and the same for the calling block's KV head.
#define CHOICE float *logits, float2 *runs, float *sums, u32 *ranks, u64 *listed, u32 *marks, int *rows, float *weights, \
    int *counts, int positions, int k, int local, float least
#define CHOSEN                                                                                                \
    Choice{logits, runs, sums, ranks, listed, marks, rows, weights, counts, positions, k, local, least}.of(kv_head_id())

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
    float2 part[GROUP][WARPS];           // maxima, and sums of exponentials
    float high[GROUP], scale[GROUP];     // exp(logit - high) times scale is a probability
    Tally tally;
    u32 top;                             // no rank is above it
    int open[OPEN], n_open, n_listed;
};

// Joins a head's maximum and sum of exponentials with others, which stand beside it.
DEVICE void join_sums(float& high, float& total, const float2* others, int n, int apart) {
    const float before = high;
    for (int i = 0; i < n; i++) high = fmaxf(high, others[i * apart].x);
    const float base = high == -INFINITE ? 0.0f : high;
    total *= __expf(before - base);
    for (int i = 0; i < n; i++) total += others[i * apart].y * __expf(others[i * apart].x - base);
}

// Highest logits and what makes exponentials probabilities: 0 if nothing, or something infinite, is highest.
DEVICE void find_softmax(const Choice& c, int n, Chooser& s) {
    const int runs = runs_of(n), span = c.positions / RUN;
    float high[GROUP], total[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; g++) high[g] = -INFINITE, total[g] = 0.0f;
    for (int first = threadIdx.x; first < runs; first += AHEAD * THREADS) {
        float2 run[AHEAD * GROUP];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                const int i = first + u * THREADS;
                run[u * GROUP + g] = i < runs ? c.runs[i64(g) * span + i] : make_float2(-INFINITE, 0.0f);
            }
#pragma unroll
        for (int g = 0; g < GROUP; g++) join_sums(high[g], total[g], run + g, AHEAD, GROUP);
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        const float most = max_over(high[g]);
        const float sum = sum_over(total[g] * __expf(high[g] - (most == -INFINITE ? 0.0f : most)));
        if (lane_id() == 0) s.part[g][threadIdx.x / WARP] = make_float2(most, sum);
    }
    __syncthreads();
    for (int g = threadIdx.x; g < GROUP; g += THREADS) {
        float most = -INFINITE, sum = 0.0f;
        join_sums(most, sum, s.part[g], WARPS, 1);
        s.high[g] = most, s.scale[g] = fabsf(most) < INFINITE ? 1.0f / sum : 0.0f;
    }
    __syncthreads();
}

DEVICE float probability(const Chooser& s, int head, float logit) {
    return s.scale[head] > 0.0f ? __expf(logit - s.high[head]) * s.scale[head] : 0.0f;
}

// A token's rank with another head.
DEVICE float with_head(const Choice& c, const Chooser& s, float rank, int head, float logit) {
    return rank + (c.sums ? logit : probability(s, head, logit));
}

DEVICE u32 rank_at(const Choice& c, const Chooser& s, int position) {
    float rank = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUP; g++) rank = with_head(c, s, rank, g, c.logits[i64(g) * c.positions + position]);
    return min(order_of(rank), s.top);
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

// Sets what no rank is above.
DEVICE void find_top(const Choice& c, int n, Chooser& s) {
    float top = -INFINITE;
    if (c.sums) {
        for (int i = threadIdx.x; i < runs_of(n); i += THREADS) top = fmaxf(top, c.sums[i]);
        top = block_max(top, &s.part[0][0].x);
    } else {
        top = 0.0f;
        for (int g = 0; g < GROUP; g++) top += s.scale[g];
    }
    s.top = order_of(top);
    __syncthreads();
}

// Ranks that are counted as one, DIGITS - 1 the largest; far below them are all that have digit 0.
DEVICE void count_rank(Chooser& s, u32 rank) {
    atomicAdd(&s.tally.count[DIGITS - 1 - min(DIGITS - 1, int((s.top - rank) >> STEP))], 1);
}

// The least rank, of tokens, that has the digit which was found.
DEVICE u32 least_counted(const Chooser& s) {
    const u32 below = u32(DIGITS - s.tally.digit) << STEP;
    return s.tally.digit > 0 && s.top > below ? s.top - below + 1 : 1;
}

// A rank that m of the first n tokens reach, by what is noted of m or more runs; bounds take the place of what was noted
// of head 0: there after the next barrier, before which none is read.
DEVICE u32 bound_by_runs(const Choice& c, int n, int m, Chooser& s) {
    clear_digits(s.tally);
    for_each<AHEAD>(runs_of(n), [&](int i) { return bounds_of(c, n, i, s); }, [&](int i, float2 x) {
        c.runs[i] = x;
        count_rank(s, min(order_of(x.x), s.top));
    });
    find_digit(m, s.tally);
    return least_counted(s);
}

// Lists the tokens of the first n that reach the bound, by their runs.
DEVICE void list_by_runs(const Choice& c, int n, u32 bound, Chooser& s) {
    const int runs = runs_of(n), half_warp = threadIdx.x / RUN;
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
                const int at = place_in(&s.n_listed, rank[u] >= bound);
                if (rank[u] >= bound) c.listed[at] = key_of(rank[u], token[u]);
            }
        }
        __syncthreads();
    }
}

// Four tokens' logits.
struct Four {
    float4 of[GROUP];
};

// Ranks all tokens of the first n, others 0. Returns a rank that m of them reach, and few more.
DEVICE u32 bound_by_ranks(const Choice& c, int n, int m, Chooser& s) {
    clear_digits(s.tally);
    const auto load = [&](int i) {
        Four x;
#pragma unroll
        for (int g = 0; g < GROUP; g++) x.of[g] = reinterpret_cast<const float4*>(c.logits + i64(g) * c.positions)[i];
        return x;
    };
    for_each<FOURS>(RUN / 4 * runs_of(n), load, [&](int i, const Four& x) {
        float rank[4] = {};
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            const float logit[4] = {x.of[g].x, x.of[g].y, x.of[g].z, x.of[g].w};
#pragma unroll
            for (int t = 0; t < 4; t++) rank[t] = with_head(c, s, rank[t], g, logit[t]);
        }
        u32 order[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            order[t] = token_at(4 * i + t) < n ? min(order_of(rank[t]), s.top) : 0;
            if (order[t] > 0) count_rank(s, order[t]);
        }
        reinterpret_cast<uint4*>(c.ranks)[i] = make_uint4(order[0], order[1], order[2], order[3]);
    });
    find_digit(m, s.tally);
    return least_counted(s);
}

// Lists the tokens of the first n that reach the bound, by their ranks.
DEVICE void list_by_ranks(const Choice& c, int n, u32 bound, Chooser& s) {
    const int fours = RUN / 4 * runs_of(n);
    for (int first = 0; first < fours; first += RANKED * THREADS) {
        uint4 x[RANKED];
        int reach = 0;
#pragma unroll
        for (int u = 0; u < RANKED; u++) {
            const int i = first + u * THREADS + threadIdx.x;
            x[u] = i < fours ? reinterpret_cast<const uint4*>(c.ranks)[i] : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < RANKED; u++)
            reach += (x[u].x >= bound) + (x[u].y >= bound) + (x[u].z >= bound) + (x[u].w >= bound);
        int at = places_in(&s.n_listed, reach);
#pragma unroll
        for (int u = 0; u < RANKED; u++) {
            const u32 rank[4] = {x[u].x, x[u].y, x[u].z, x[u].w};
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const int token = token_at(4 * (first + u * THREADS + threadIdx.x) + t);
                if (rank[t] >= bound) c.listed[at++] = key_of(rank[t], token);
            }
        }
    }
    __syncthreads();
}

// Marks the m best of the first n tokens.
DEVICE void mark_best(const Choice& c, int n, int m, u32* marks, Chooser& s) {
    for (int i = threadIdx.x; i < (n + 31) / 32; i += THREADS) marks[i] = 0;
    if (threadIdx.x == 0) s.n_listed = 0;
    find_top(c, n, s);
    u32 bound;
    if (FEW * m <= runs_of(n)) bound = bound_by_runs(c, n, m, s), list_by_runs(c, n, bound, s);
    else bound = bound_by_ranks(c, n, m, s), list_by_ranks(c, n, bound, s);
    const auto key = [&](int i) { return c.listed[i]; };
    const u64 least = least_of_largest(s.n_listed, m, u64(bound) << 32, u64(s.top) << 32 | ALL, s.tally, key);
    for_each<4>(s.n_listed, key, [&](int, u64 its) {
        if (its >= least) mark(marks, int(~u32(its)));
    });
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
    __syncthreads();
    for (int i = threadIdx.x; i < c.k; i += THREADS) sum += own(i);
    const float total = block_sum(sum, &s.part[0][0].x);
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
    extern __shared__ u32 shared_marks[];
    if (!is_last(done, blocks)) return;
    find_softmax(c, n, s);
    const int chosen = min(n, c.k), m = c.k - c.local;
    const bool all = n <= c.k;
    for (int i = threadIdx.x; i < chosen; i += THREADS)
        if (all || i >= m) c.rows[i] = n - chosen + i;
    if (!all && m > 0) {
        u32* marks = c.marks ? c.marks : shared_marks;
        mark_best(c, n - c.local, m, marks, s);
        __syncthreads();
        write_marked(marks, (n - c.local + 31) / 32, 0, c.rows, s.tally.warps);
    }
    __syncthreads();
    struct Logits {
        float of[GROUP];
    };
    const auto load = [&](int i) {
        Logits x;
        const int position = position_of(c.rows[i]);
#pragma unroll
        for (int g = 0; g < GROUP; g++) x.of[g] = c.logits[i64(g) * c.positions + position];
        return x;
    };
    for_each<AHEAD>(chosen, load, [&](int i, const Logits& x) {
#pragma unroll
        for (int g = 0; g < GROUP; g++) c.weights[i64(g) * c.k + i] = probability(s, g, x.of[g]);
    });
    if (!c.counts) return;
    if (!all) keep_heavy(c, n, s, seen);
    else if (threadIdx.x == 0) c.counts[0] = n;
}
