// The k tokens of most weight, by logits that blocks of threads have written. The last block of a KV head to finish
// chooses, so that no launch is spent on it and the others go on; where that would be long, choice.cu has more do it.
//
// Every RUN tokens have their maximum and their sum of exponentials noted, for each head. From these come the softmax
// and, for each run, a number that its best token reaches and one that none of its tokens exceeds. Where few are wanted,
// the m-th largest of the former bounds the choice from below, so that only runs whose latter reaches it are read token
// by token. Where many are, most runs would be: there all tokens are ranked, and how many have which rank, to a part in
// a hundred, is counted. What reaches the bound is listed, and the m best of the list are exactly those of all. What is
// noted does not depend on which block a token was scored by, so results do not depend on how many score.
//
// Macros: GROUP (query heads of a KV head), INTERLEAVED (how positions of logits go with tokens). The grid is
// (parts, H_kv, B), of THREADS threads where tokens are scored. Blocks that choose have dynamic shared memory of a bit
// for each position if there are no `marks`.
#pragma once
#include "selection.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int RUN = 16;
constexpr int FEW = GROUP > 1 ? 4 : 2;           // runs, or more, for each token that is wanted: they bound the choice
constexpr int STEP = 17;                         // bits that are left out of counted ranks: DIGITS are 32 octaves
constexpr int LOOK = 4;                          // bounds on their way to a thread
constexpr int OPEN = LOOK * THREADS;             // runs that are read after one look at the bounds
constexpr int READ = GROUP > 8 ? 1 : GROUP > 4 ? 2 : 4;  // runs on their way to a half warp
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

// What blocks of one launch find out of a KV head for those of the next.
struct Found {
    float high[GROUP], scale[GROUP], seen;  // see Chooser, and choose_components
    u32 top, base;
    int listed, done, count[DIGITS];        // ranks, counted by all blocks
};

// What is known and wanted of a KV head of a sequence.
struct Choice {
    float* logits;   // [GROUP, positions]; NaN has become -inf
    float2* runs;    // [GROUP, positions / RUN]: maximum, and the sum of exp(logit - maximum); 0 if that is -inf
    float* sums;     // [positions / RUN]: maximum of the logits' sum over heads; null if probabilities decide
    u32* ranks;      // [positions], scratch
    u64* listed;     // [positions], scratch
    u32* marks;      // [positions / 32], scratch; null: in shared memory
    Found* found;    // scratch; null: a launch that scores chooses, too
    int* rows;       // [k]: what is chosen
    float* weights;  // [GROUP, k]: its probabilities
    int* counts;     // [3]: how many stay; the sum of that over the calls that chose, and their number. Null: all stay
    int positions, k, local;
    float least;     // share of the k of those that stay beside the last `local`

    DEVICE Choice of(int kv_head) const {
        const i64 at = i64(kv_head) * positions;
        return {
            logits + GROUP * at, runs + GROUP * at / RUN, sums ? sums + at / RUN : nullptr, ranks + at, listed + at,
            marks ? marks + at / 32 : nullptr, found ? found + kv_head : nullptr, rows + i64(kv_head) * k,
            weights + i64(kv_head) * GROUP * k,
            counts ? counts + 3 * i64(kv_head) : nullptr, positions, k, local, least,
        };
    }
};

// The arguments of a kernel that ends with them, and the same for the calling block's KV head.
#define CHOICE float *logits, float2 *runs, float *sums, u32 *ranks, u64 *listed, u32 *marks, Found *found, int *rows, \
    float *weights, int *counts, int positions, int k, int local, float least
#define CHOSEN                                                                                                       \
    Choice{logits, runs, sums, ranks, listed, marks, found, rows, weights, counts, positions, k, local, least}.of( \
        kv_head_id()                                                                                                 \
    )

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
    float2 part[GROUP][WARP];            // maxima, and sums of exponentials, of a block's warps
    float high[GROUP], scale[GROUP];     // exp(logit - high) times scale is a probability
    Tally tally;
    u32 top, base;                       // no rank is above the one; below the other they are counted as one
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
    for (int first = threadIdx.x; first < runs; first += AHEAD * blockDim.x) {
        float2 run[AHEAD * GROUP];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                const int i = first + u * blockDim.x;
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
    for (int g = threadIdx.x; g < GROUP; g += blockDim.x) {
        float most = -INFINITE, sum = 0.0f;
        join_sums(most, sum, s.part[g], blockDim.x / WARP, 1);
        s.high[g] = most, s.scale[g] = fabsf(most) < INFINITE ? 1.0f / sum : 0.0f;
    }
    __syncthreads();
}

// fmaxf leaves out NaN, which an infinite maximum makes.
DEVICE float probability(const Chooser& s, int head, float logit) {
    return fmaxf(__expf(logit - s.high[head]) * s.scale[head], 0.0f);
}

// Numbers of all heads on their way.
struct Heads {
    float of[GROUP];
};

DEVICE Heads logits_at(const Choice& c, int position) {
    Heads x;
#pragma unroll
    for (int g = 0; g < GROUP; g++) x.of[g] = c.logits[i64(g) * c.positions + position];
    return x;
}

DEVICE u32 rank_of(const Choice& c, const Chooser& s, const Heads& logit) {
    float rank = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUP; g++) rank += c.sums ? logit.of[g] : probability(s, g, logit.of[g]);
    return min(order_of(rank), s.top);
}

// What the best token of a run reaches, and what none exceeds, by the heads' maxima, or that of their sums. A run in
// which not all are among the first n tokens bounds nothing.
DEVICE float2 bounds_of(const Choice& c, int n, int run, const Heads& high, const Chooser& s) {
    if (token_at(RUN * run + RUN - 1) >= n) return make_float2(-INFINITE, INFINITE);
    if (c.sums) return make_float2(high.of[0], high.of[0]);
    float least = 0.0f, most = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        const float p = probability(s, g, high.of[g]);
        least = fmaxf(least, p), most += p;
    }
    return make_float2(least, most);
}

// Sets what no rank is above, and where digits begin.
DEVICE void find_top(const Choice& c, int n, Chooser& s) {
    float top = -INFINITE;
    if (c.sums) {
        for (int i = threadIdx.x; i < runs_of(n); i += blockDim.x) top = fmaxf(top, c.sums[i]);
        top = block_max(top, &s.part[0][0].x);
    } else {
        top = 0.0f;
        for (int g = 0; g < GROUP; g++) top += s.scale[g];
    }
    constexpr u32 COUNTED = u32(DIGITS) << STEP;
    const u32 order = order_of(top);
    s.top = order, s.base = order > COUNTED ? order - COUNTED + 1 : 1;
    __syncthreads();
}

DEVICE void count_rank(Chooser& s, u32 base, u32 rank) {
    atomicAdd(&s.tally.count[(max(rank, base) - base) >> STEP], 1);
}

// A rank that is reached by those that are listed, the m best among them: the `left` best, so many bits above the bound,
// and those whose keys have more.
struct Bound {
    u32 rank;
    int left, bits;
};

// Counts what the best tokens of runs reach, of the first n; bounds take the place of what was noted of head 0: there
// after the next barrier, before which none is read.
DEVICE void count_runs(const Choice& c, int n, Chooser& s) {
    const auto load = [&](int i) {
        Heads high;
#pragma unroll
        for (int g = 0; g < GROUP; g++) high.of[g] = c.sums ? c.sums[i] : c.runs[i64(g) * (c.positions / RUN) + i].x;
        return high;
    };
    for_each<AHEAD>(runs_of(n), load, [&](int i, const Heads& high) {
        const float2 bounds = bounds_of(c, n, i, high, s);
        c.runs[i] = bounds;
        count_rank(s, s.base, min(order_of(bounds.x), s.top));
    });
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
            Heads logit[READ];
#pragma unroll
            for (int u = 0; u < READ; u++) {
                const int at = i + u * (THREADS / RUN) + half_warp;
                const int position = RUN * s.open[min(at, s.n_open - 1)] + int(threadIdx.x) % RUN;
                token[u] = at < s.n_open ? token_at(position) : n;
                logit[u] = logits_at(c, position);
            }
#pragma unroll
            for (int u = 0; u < READ; u++) {
                const u32 rank = token[u] < n ? rank_of(c, s, logit[u]) : 0;
                const int at = place_in(&s.n_listed, rank >= bound);
                if (rank >= bound) c.listed[at] = key_of(rank, token[u]);
            }
        }
        __syncthreads();
    }
}

// Four tokens' logits.
struct Four {
    float4 of[GROUP];
};

// Times four of the first n tokens: those that are a block's, of several.
DEVICE Range share_of(int n, int at, int blocks) {
    const int fours = RUN / 4 * runs_of(n), own = (fours + blocks - 1) / blocks;
    return {min(fours, at * own), min(fours, (at + 1) * own)};
}

// Ranks a share of the first n tokens, others 0, and counts the ranks.
template <bool SUMS>
DEVICE void count_ranks(const Choice& c, int n, Range fours, Chooser& s) {
    const u32 top = s.top, base = s.base;
    const auto load = [&](int i) {
        Four x;
#pragma unroll
        for (int g = 0; g < GROUP; g++) x.of[g] = reinterpret_cast<const float4*>(c.logits + i64(g) * c.positions)[i];
        return x;
    };
    for_each<FOURS>(fours, load, [&](int i, const Four& x) {
        float rank[4] = {};
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            const float logit[4] = {x.of[g].x, x.of[g].y, x.of[g].z, x.of[g].w};
#pragma unroll
            for (int t = 0; t < 4; t++) rank[t] += SUMS ? logit[t] : probability(s, g, logit[t]);
        }
        u32 order[4];
#pragma unroll
        for (int t = 0; t < 4; t++) order[t] = min(order_of<SUMS>(rank[t]), top);
        if (token_at(4 * i + 3) >= n)
#pragma unroll
            for (int t = 0; t < 4; t++) order[t] = token_at(4 * i + t) < n ? order[t] : 0;
#pragma unroll
        for (int t = 0; t < 4; t++) count_rank(s, base, order[t]);
        reinterpret_cast<uint4*>(c.ranks)[i] = make_uint4(order[0], order[1], order[2], order[3]);
    });
}

DEVICE void count_ranks(const Choice& c, int n, Range fours, Chooser& s) {
    if (c.sums) count_ranks<true>(c, n, fours, s);
    else count_ranks<false>(c, n, fours, s);
}

// Lists the tokens of a share that reach the bound, by their ranks.
DEVICE void list_by_ranks(const Choice& c, Range fours, u32 bound, int* n_listed) {
    for (int first = fours.begin + threadIdx.x; first - int(threadIdx.x) < fours.end; first += RANKED * blockDim.x) {
        uint4 x[RANKED];
        u32 reach = 0;
#pragma unroll
        for (int u = 0; u < RANKED; u++)
            x[u] = reinterpret_cast<const uint4*>(c.ranks)[min(first + u * int(blockDim.x), fours.end - 1)];
#pragma unroll
        for (int u = 0; u < RANKED; u++) {
            const u32 rank[4] = {x[u].x, x[u].y, x[u].z, x[u].w};
#pragma unroll
            for (int t = 0; t < 4; t++)
                reach |= u32(rank[t] >= bound && first + u * int(blockDim.x) < fours.end) << (4 * u + t);
        }
        // Few are listed, which are read again, so that no thread looks at all of its own once more.
        for (int at = places_in(n_listed, __popc(reach)); reach; reach &= reach - 1, at++) {
            const u32 which = __ffs(int(reach)) - 1;
            const int position = 4 * (first + which / 4 * blockDim.x) + which % 4;
            c.listed[at] = key_of(c.ranks[position], token_at(position));
        }
    }
}

// By what was counted of m runs or more.
DEVICE Bound bound_by_runs(int m, Chooser& s) {
    find_digit(m, s.tally);
    const u32 rank = s.tally.digit > 0 ? s.base + (u32(s.tally.digit) << STEP) : 1;
    return {rank, m, 64 - __clz(int(s.top - rank))};
}

// By what was counted of all tokens: those that have a larger digit than the m-th best are among the m.
DEVICE Bound bound_by_ranks(int m, Chooser& s) {
    find_digit(m, s.tally);
    if (s.tally.digit > 0) return {s.base + (u32(s.tally.digit) << STEP), m - s.tally.above, 32 + STEP};
    return {1, m, 64};
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
    for (int i = threadIdx.x; i < c.k; i += blockDim.x) sum += own(i);
    const float total = block_sum(sum, &s.part[0][0].x);
    int kept = 0;
    for (int first = 0; first < c.k; first += blockDim.x) {
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

// Tokens that are chosen by what they weigh, beside the last `local`: 0 if all of the first n are.
DEVICE int wanted(const Choice& c, int n) { return n > c.k ? c.k - c.local : 0; }

// Chooses, of the first n tokens, the best of those that are listed. All threads of a block call; what it shares is there
// before.
DEVICE void settle(const Choice& c, int n, int n_listed, const Bound& bound, Chooser& s, float seen) {
    extern __shared__ u32 shared_marks[];
    const int chosen = min(n, c.k), m = wanted(c, n), words = (n - c.local + 31) / 32;
    for (int i = threadIdx.x; i < chosen; i += blockDim.x)
        if (n <= c.k || i >= m) c.rows[i] = n - chosen + i;
    if (m > 0) {
        u32* marks = c.marks ? c.marks : shared_marks;
        for (int i = threadIdx.x; i < words; i += blockDim.x) marks[i] = 0;
        const auto key = [&](int i) { return c.listed[i]; };
        const u64 least = least_of_largest(n_listed, bound.left, u64(bound.rank) << 32, bound.bits, s.tally, key);
        for_each<4>(n_listed, key, [&](int, u64 its) {
            if (its >= least) mark(marks, int(~u32(its)));
        });
        __syncthreads();
        write_marked(marks, words, 0, c.rows, s.tally.warps);
    }
    __syncthreads();
    const auto load = [&](int i) { return logits_at(c, position_of(c.rows[i])); };
    for_each<AHEAD>(chosen, load, [&](int i, const Heads& logit) {
#pragma unroll
        for (int g = 0; g < GROUP; g++) c.weights[i64(g) * c.k + i] = probability(s, g, logit.of[g]);
    });
    if (!c.counts) return;
    if (n > c.k) keep_heavy(c, n, s, seen);
    else if (threadIdx.x == 0) c.counts[0] = n;
}

// Chooses k of the first n tokens, if all blocks that had some of them have come here and no launch follows that does.
// All threads of a block call. seen: see choose_components, wanted if there are counts.
DEVICE void choose(const Choice& c, int n, int blocks, int* done, Chooser& s, float seen = 1.0f) {
    if (c.found) {
        if (blockIdx.x > 0) return;
        for (int i = threadIdx.x; i < DIGITS; i += blockDim.x) c.found->count[i] = 0;
        if (threadIdx.x == 0) c.found->seen = seen, c.found->listed = c.found->done = 0;
        return;
    }
    if (!is_last(done, blocks)) return;
    if (threadIdx.x == 0) s.n_listed = 0;
    find_softmax(c, n, s);
    Bound bound{};
    if (const int m = wanted(c, n); m > 0) {
        const int few = n - c.local;
        find_top(c, few, s);
        clear_digits(s.tally);
        if (FEW * m <= runs_of(few)) {
            count_runs(c, few, s);
            bound = bound_by_runs(m, s);
            list_by_runs(c, few, bound.rank, s);
        } else {
            const Range all = share_of(few, 0, 1);
            count_ranks(c, few, all, s);
            bound = bound_by_ranks(m, s);
            list_by_ranks(c, all, bound.rank, &s.n_listed);
            __syncthreads();
        }
    }
    settle(c, n, s.n_listed, bound, s, seen);
}
