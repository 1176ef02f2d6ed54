// Keys or values of a prompt, rebuilt from their latents as rows of halves: macros HEAD_DIM, ROW_BITS, OF_KEYS, TILE.
#include "rebuilding.cuh"

constexpr int M = TILE >= 32 ? 2 : 1, N = AT_ONCE, ROW_PARTS = TILE / (16 * M);

// Slots 0 ... n - 1 of a sequence -> out [H_kv, span, d]; `heads` KV heads share a latent. Dynamic shared memory: a
// tile and its turns. Grid (n / TILE rounded up, G), THREADS threads.
KERNEL __launch_bounds__(THREADS, 1) rebuild(LATENTS(x), FACTOR, int heads, int seq, int n, u16* out, i64 span) {
    extern __shared__ __align__(16) u8 shared[];
    const Latents from = GIVEN_LATENTS(x);
    const Factor f = GIVEN_FACTOR;
    const int group = blockIdx.y, first = blockIdx.x * TILE, rows = min(TILE, n - first);
    u8* at = shared;
    const Tile<ROW_BITS, OF_KEYS, TILE> tile = take_tile<ROW_BITS, OF_KEYS, TILE>(at, from.blocks());
    float2* turns = OF_KEYS ? take<float2>(at, TILE * turns_pitch(f.pairs)) : nullptr;
    tile.ask(from, from.row(seq, group, first), rows);
    await_copies<0>();
    __syncthreads();
    tile.decode(rows);
    if constexpr (OF_KEYS) find_turns(tile, f, TILE, rows, turns);
    __syncthreads();
    for (int unit = threadIdx.x / WARP; unit < heads * ROW_PARTS; unit += WARPS) {
        const int head = group * heads + unit / ROW_PARTS, row = unit % ROW_PARTS * 16 * M;
        const float2* own_turns = OF_KEYS ? turns + row * turns_pitch(f.pairs) : nullptr;
        float less[2 * M];  // what a norm divides by needs the whole head, which is then rebuilt twice
#pragma unroll
        for (int i = 0; i < 2 * M; i++) less[i] = 1.0f;
#pragma unroll 1
        for (int again = f.norm ? 0 : 1; again < 2; again++) {
            float squares[2 * M] = {};
#pragma unroll 1
            for (int column = 0; column < COLUMNS; column += N) {
                const int columns = min(N, COLUMNS - column);
                Rebuilt<M, N> numbers;
                numbers.multiply(tile.halves + row * tile.pitch(), tile.pitch(),
                                 f.values + (i64(head) * COLUMNS + column) * tile.blocks * WARP, tile.blocks, columns);
                numbers.finish(f, head, column, columns, own_turns, squares);
                if (again) numbers.store(f, column, columns, less, rows - row, out + (head * span + first + row) * D);
            }
#pragma unroll
            for (int i = 0; i < 2 * M; i++) less[i] = 1.0f / sqrtf(sum_over<4>(squares[i]) / float(D) + f.eps);
        }
    }
}
