// Attention of a decode step to latents: a block takes a part of the slots of a group of KV heads, tile by tile. It
// rebuilds and turns the tile's keys, scores them, and adds up latents of values, weighted: o = B (sum of p h) + b is
// exact, because neither B nor b depends on the token. The last block of a group to finish joins the parts;
// rebuild_sums then takes them through the factor B of values.
//
// Macros: HEAD_DIM, GROUP (query heads of a KV head), KV_HEADS (of a block, at most WARPS), TILE (of a tile: 16, 32 or
// 64), RESIDENT (whether the factor of these heads lies in shared memory), K_BITS, V_BITS. Grid (parts, G SPLIT, B),
// where SPLIT blocks share the heads of a group; THREADS threads.
#include "rebuilding.cuh"
#include "softmax.cuh"

constexpr int HEADS = KV_HEADS * GROUP, HEAD_TILES = (HEADS + 15) / 16;  // query heads; in sixteens
constexpr int M = TILE >= 32 ? 2 : 1, N = GROUP > 4 && AT_ONCE > 4 ? 4 : AT_ONCE;  // of Rebuilt
constexpr int OF_HEAD = WARPS / KV_HEADS;                                 // warps
constexpr int ROW_PARTS = TILE / (16 * M);
constexpr int COLUMN_PARTS = OF_HEAD > ROW_PARTS ? OF_HEAD / ROW_PARTS : 1;  // of a head's numbers, each scored apart
constexpr int WEIGHTS_PITCH = TILE + 8;
constexpr int LEAST_ROWS = 128;  // of a part, if there are several
constexpr float LIFT = 10.0f;     // weights reach to 2^10: small ones are farther from where halves end

// The shared memory of a block; see shared_bytes of latent_ops.py.
struct Room {
    uint4* factor;  // [KV_HEADS, COLUMNS, blocks, lanes], if RESIDENT
    Tile<K_BITS, true, TILE> k;
    Tile<V_BITS, false, TILE> v;
    float2* turns;                   // [TILE, turns_pitch]
    float *queries, *scores;         // [HEADS, 8 COLUMNS], [COLUMN_PARTS, HEADS, TILE]
    float* squares;                  // [COLUMN_PARTS, KV_HEADS, TILE]
    float *sums, *high, *total, *less;  // [HEADS, sums_pitch]; [HEADS] of each
    u16* weights;                    // [16 HEAD_TILES, WEIGHTS_PITCH]

    DEVICE int sums_pitch() const { return v.pitch(); }
};

DEVICE Room take_room(int k_blocks, int v_blocks, int pairs) {
    extern __shared__ __align__(16) u8 shared[];
    u8* at = shared;
    Room room;
    room.factor = take<uint4>(at, RESIDENT * KV_HEADS * COLUMNS * k_blocks * WARP);
    room.k = take_tile<K_BITS, true, TILE>(at, k_blocks);
    room.v = take_tile<V_BITS, false, TILE>(at, v_blocks);
    room.turns = take<float2>(at, TILE * turns_pitch(pairs));
    room.queries = take<float>(at, HEADS * 8 * COLUMNS);
    room.scores = take<float>(at, COLUMN_PARTS * HEADS * TILE);
    room.squares = take<float>(at, COLUMN_PARTS * KV_HEADS * TILE);
    room.sums = take<float>(at, HEADS * room.sums_pitch());
    room.high = take<float>(at, HEADS), room.total = take<float>(at, HEADS), room.less = take<float>(at, HEADS);
    room.weights = take<u16>(at, 16 * HEAD_TILES * WEIGHTS_PITCH);
    return room;
}

// Where a block's part of a sequence begins, and what of it is written beside the sums.
struct Part {
    Latents k, v;
    i64 k_first, v_first;  // rows of slot 0
    float* scores;         // [HEADS, slots], or null: logits times log2(e)
    int slots;
};

// Queries [HEADS, D] in the order of rebuilt numbers, times what makes weights powers of two.
DEVICE void load_queries(const Room& room, const Factor& f, const float* q) {
    const float scale = rsqrtf(float(D)) * LOG2_E;
    for (int i = threadIdx.x; i < HEADS * 8 * COLUMNS; i += THREADS) {
        const int head = i / (8 * COLUMNS), j = i % (8 * COLUMNS);
        room.queries[i] = j < D ? q[head * D + place_of(f, j)] * scale : 0.0f;
    }
}

// Scores of the tile's keys, in COLUMN_PARTS parts. values: those of the block's first head.
DEVICE void score_keys(const Room& room, const Factor& f, const uint4* values, int first_head) {
    const int head = threadIdx.x / WARP / OF_HEAD, lane = lane_id();
    if (head >= KV_HEADS) return;
#pragma unroll 1
    for (int unit = threadIdx.x / WARP % OF_HEAD; unit < ROW_PARTS * COLUMN_PARTS; unit += OF_HEAD) {
        const int row = unit % ROW_PARTS * 16 * M, part = unit / ROW_PARTS;
        const int end = (part + 1) * COLUMNS / COLUMN_PARTS;
        float sums[GROUP][2 * M] = {}, squares[2 * M] = {};
#pragma unroll 1
        for (int column = part * COLUMNS / COLUMN_PARTS; column < end; column += N) {
            const int n = min(N, end - column);
            Rebuilt<M, N> keys;
            keys.multiply(room.k.halves + row * room.k.pitch(), room.k.pitch(),
                          values + (head * COLUMNS + column) * room.k.blocks * WARP, room.k.blocks, n);
            keys.finish(f, first_head + head, column, n, room.turns + row * turns_pitch(f.pairs), squares);
#pragma unroll
            for (int h = 0; h < GROUP; h++)
                keys.score(room.queries + ((head * GROUP + h) * COLUMNS + column) * 8, n, sums[h]);
        }
#pragma unroll
        for (int i = 0; i < 2 * M; i++) {
            const int slot = row + 8 * i + lane / 4;
#pragma unroll
            for (int h = 0; h < GROUP; h++) {
                const float sum = sum_over<4>(sums[h][i]);
                if (lane % 4 == 0) room.scores[(part * HEADS + head * GROUP + h) * TILE + slot] = sum;
            }
            const float square = sum_over<4>(squares[i]);
            if (lane % 4 == 0) room.squares[(part * KV_HEADS + head) * TILE + slot] = square;
        }
    }
}

// Weights of n slots from `slot` on, and what they do to the sums so far. A warp takes a query head at a time.
DEVICE void weigh(const Room& room, const Factor& f, const Part& from, int slot, int n) {
    constexpr int EACH = (TILE + WARP - 1) / WARP;
#pragma unroll 1
    for (int head = threadIdx.x / WARP; head < HEADS; head += WARPS) {
        const float before = room.high[head];
        float score[EACH], highest = before, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = lane_id() + WARP * i;
            score[i] = -INFINITE;
            if (at >= n) continue;
            float product = 0.0f, squares = 0.0f;
#pragma unroll
            for (int part = 0; part < COLUMN_PARTS; part++) {
                product += room.scores[(part * HEADS + head) * TILE + at];
                squares += room.squares[(part * KV_HEADS + head / GROUP) * TILE + at];
            }
            score[i] = f.norm ? product / sqrtf(squares / float(D) + f.eps) : product;
            if (from.scores) from.scores[i64(head) * from.slots + slot + at] = score[i];
            highest = fmaxf(highest, score[i]);
        }
        highest = max_over(highest);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = lane_id() + WARP * i;
            const float weight = power_of_2(score[i] - highest + LIFT);
            sum += weight;
            if (at < TILE) room.weights[head * WEIGHTS_PITCH + at] = to_half(weight);
        }
        sum = sum_over(sum);
        __syncwarp();
        if (lane_id() == 0) {
            const float less = power_of_2(before - highest);
            room.less[head] = less, room.high[head] = highest, room.total[head] = room.total[head] * less + sum;
        }
    }
}

// The sums of all query heads, as they are less now, grow by the tile's latents of values times weights.
DEVICE void add_values(const Room& room) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    for (int column = threadIdx.x / WARP * 16; column < UNIT * room.v.blocks; column += WARPS * 16) {
#pragma unroll 1
        for (int tile = 0; tile < HEAD_TILES; tile++) {
            float x[2][4] = {};
            const auto pair = [&](int part, int row) {
                return reinterpret_cast<float2*>(room.sums + (16 * tile + g + 8 * row) * room.sums_pitch() + column +
                                                 8 * part + 2 * t);
            };
#pragma unroll
            for (int row = 0; row < 2; row++) {
                if (16 * tile + g + 8 * row >= HEADS) continue;
                const float less = room.less[16 * tile + g + 8 * row];
#pragma unroll
                for (int part = 0; part < 2; part++) {
                    const float2 sum = *pair(part, row);
                    x[part][2 * row] = sum.x * less, x[part][2 * row + 1] = sum.y * less;
                }
            }
#pragma unroll
            for (int k = 0; k < TILE; k += 16) {
                u32 a[4], b[4];
                load_square<false>(room.weights + 16 * tile * WEIGHTS_PITCH + k, WEIGHTS_PITCH, a);
                load_square<true>(room.v.halves + k * room.v.pitch() + column, room.v.pitch(), b);
                multiply_tiles(x[0], a, {b[0], b[1]});
                multiply_tiles(x[1], a, {b[2], b[3]});
            }
#pragma unroll
            for (int row = 0; row < 2; row++) {
                if (16 * tile + g + 8 * row >= HEADS) continue;
#pragma unroll
                for (int part = 0; part < 2; part++)
                    *pair(part, row) = make_float2(x[part][2 * row], x[part][2 * row + 1]);
            }
        }
    }
}

// Slots begin ... end - 1 with the queries that are loaded. All threads of the block call.
DEVICE void read(const Room& room, const Factor& f, const uint4* values, int first_head, const Part& from, int begin,
                 int end) {
    if (begin >= end) return;
    room.k.ask(from.k, from.k_first + begin, min(TILE, end - begin));
    for (int slot = begin; slot < end; slot += TILE) {
        const int n = min(TILE, end - slot), next = slot + TILE;
        await_copies<0>();
        __syncthreads();
        room.k.decode(n);
        find_turns(room.k, f, TILE, n, room.turns);
        room.v.ask(from.v, from.v_first + slot, n);
        __syncthreads();
        score_keys(room, f, values, first_head);
        __syncthreads();
        if (next < end) room.k.ask(from.k, from.k_first + next, min(TILE, end - next));
        else end_copies();
        weigh(room, f, from, slot, n);
        await_copies<1>();
        __syncthreads();
        if constexpr (V_BITS < 16) {
            room.v.decode(n);
            __syncthreads();
        }
        add_values(room);
    }
    __syncthreads();
}

// Latents of values that `parts` blocks have added up, joined and divided by the sum of weights.
DEVICE void join(const float* sums, const float2* ends, int parts, int width, float* joined, float2* totals) {
    for (int i = threadIdx.x; i < HEADS * width; i += THREADS) {
        const int head = i / width;
        float highest = LOWEST, total = 0.0f, x = 0.0f;
#pragma unroll 8
        for (int part = 0; part < parts; part++) highest = fmaxf(highest, ends[part * HEADS + head].x);
#pragma unroll 8
        for (int part = 0; part < parts; part++) {
            const float2 its = ends[part * HEADS + head];
            const float weight = power_of_2(its.x - highest);
            total += weight * its.y, x += weight * sums[i64(part) * HEADS * width + i];
        }
        joined[i] = x / total;
        if (i % width == 0) totals[head] = make_float2(highest, total * power_of_2(-LIFT));
    }
}

// Row b of q [B, H_q, d] sees slots first[b] ... stop[b] - 1; if there are far queries, those see 0 ... far_stop[b] - 1
// besides. joined [B, H_q, v blocks UNIT] and totals [B, H_q] are for rebuild_sums; scores [B, H_q, slots] may be null.
KERNEL __launch_bounds__(THREADS, 1) attend(
    LATENTS(k), LATENTS(v), FACTOR, int split, const float* q, const float* far, float* sums, float2* ends, int* done,
    float* joined, float2* totals, float* scores, int slots, const int* firsts, const int* stops, const int* far_stops
) {
    const Latents k = GIVEN_LATENTS(k), v = GIVEN_LATENTS(v);
    const Factor f = GIVEN_FACTOR;
    const int b = blockIdx.z, part = blockIdx.x, group = blockIdx.y / split, width = UNIT * v.blocks();
    const int first = firsts[b], far_count = far ? far_stops[b] : 0, count = far_count + max(0, stops[b] - first);
    const int each = max(LEAST_ROWS, (count + int(gridDim.x) - 1) / int(gridDim.x));
    const int step = (each + TILE - 1) / TILE * TILE, parts = max(1, (count + step - 1) / step);
    const i64 block = i64(b) * gridDim.y + blockIdx.y, query = block * HEADS;
    if (part >= parts) return;
    if (count == 0) {
        if (threadIdx.x < HEADS) totals[query + threadIdx.x] = make_float2(LOWEST, 0.0f);
        return;
    }

    const Room room = take_room(k.blocks(), v.blocks(), f.pairs);
    const int first_head = blockIdx.y * KV_HEADS, of_head = COLUMNS * k.blocks() * WARP;
    const uint4* values = f.values + i64(first_head) * of_head;
    if constexpr (RESIDENT) {
        for (int i = threadIdx.x; i < KV_HEADS * of_head; i += THREADS) copy_ahead(room.factor + i, values + i);
        values = room.factor;
    }
    for (int i = threadIdx.x; i < HEADS * room.sums_pitch(); i += THREADS) room.sums[i] = 0.0f;
    for (int i = threadIdx.x; i < 16 * HEAD_TILES * WEIGHTS_PITCH; i += THREADS) room.weights[i] = 0;
    if (threadIdx.x < HEADS) room.high[threadIdx.x] = LOWEST, room.total[threadIdx.x] = 0.0f;

    float* own_scores = scores ? scores + query * slots : nullptr;
    const Part from{k, v, k.row(b, group, 0), v.row(b, group, 0), own_scores, slots};
    const int begin = part * step, end = min(count, begin + step);
    const int near = first - far_count;  // slot of row 0, of those that are not far
#pragma unroll 1
    for (int is_near = begin >= far_count; is_near < 2; is_near++) {
        load_queries(room, f, (is_near ? q : far) + query * D);
        const int from_slot = is_near ? near + max(begin, far_count) : begin;
        read(room, f, values, first_head, from, from_slot, is_near ? near + end : min(end, far_count));
    }

    const i64 place = block * gridDim.x;
    float* own = sums + (place + part) * HEADS * width;
    for (int i = threadIdx.x; i < HEADS * width; i += THREADS)
        own[i] = room.sums[i / width * room.sums_pitch() + i % width];
    if (threadIdx.x < HEADS)
        ends[(place + part) * HEADS + threadIdx.x] =
            make_float2(room.high[threadIdx.x], room.total[threadIdx.x]);
    if (is_last(done + block, parts))
        join(sums + place * HEADS * width, ends + place * HEADS, parts, width, joined + query * width, totals + query);
}
