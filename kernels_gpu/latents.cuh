// Rows of latents, which stand for keys and values (Palu, arXiv 2407.21118): written, and read into tiles of halves.
// See latent_rows.py.
#pragma once
#include "instructions.cuh"

constexpr int UNIT = 32;  // numbers of a block
constexpr float BEYOND_HALF = 65520.0f;  // this and larger numbers become infinite as halves

template <int BITS>
constexpr int BLOCK_BYTES = UNIT * BITS / 8;
template <int BITS, bool KEYS>
constexpr int WORDS = (BITS < 16) + KEYS;  // beside a row: scale and minimum, and of keys the position

struct Latents {
    u8* codes;            // [B, G, slots, blocks, BLOCK_BYTES]
    u32* sides;           // [B, G, slots, WORDS]
    i64 sequence, group;  // rows from one sequence, and from one group, to the next
    int rank;

    DEVICE i64 row(int b, int g, int slot) const { return b * sequence + g * group + slot; }
    DEVICE int blocks() const { return (rank + UNIT - 1) / UNIT; }
};

// The arguments of a kernel that takes such rows, and the same as Latents.
#define LATENTS(x) u8 *x##_codes, u32 *x##_sides, i64 x##_sequence, i64 x##_group, int x##_rank
#define GIVEN_LATENTS(x) Latents{x##_codes, x##_sides, x##_sequence, x##_group, x##_rank}

// Writes x [rank], or of keys [rank + 1] with the position, as a row. All threads of a block of whole warps call.
template <int BITS, bool KEYS>
DEVICE void write_latent(const Latents& rows, i64 row, const float* x, float (&shared)[WARP]) {
    u8* codes = rows.codes + row * rows.blocks() * BLOCK_BYTES<BITS>;
    u32* side = rows.sides + row * WORDS<BITS, KEYS>;
    if constexpr (BITS == 16) {
        for (int i = threadIdx.x; i < rows.blocks() * UNIT; i += blockDim.x)
            reinterpret_cast<u16*>(codes)[i] = i < rows.rank ? to_half(x[i]) : u16(0);
    } else {
        constexpr float MOST = (1 << BITS) - 1;
        float low = INFINITE, high = -INFINITE;
        bool odd = false;
        for (int i = threadIdx.x; i < rows.rank; i += blockDim.x)
            low = fminf(low, x[i]), high = fmaxf(high, x[i]), odd |= x[i] != x[i];
        odd = __syncthreads_or(odd);
        low = 0.0f - block_max(-low, shared), high = 0.0f + block_max(high, shared);  // never -0
        // So does a row whose largest number is beyond halves, to which rows are decoded.
        odd = odd || to_float(to_half((high - low) / MOST)) * MOST + to_float(to_half(low)) >= BEYOND_HALF;
        const u16 scale_bits = to_half(odd ? NOT_A_NUMBER : (high - low) / MOST);
        const u16 least_bits = to_half(odd ? NOT_A_NUMBER : low);
        const float scale = to_float(scale_bits), least = to_float(least_bits);
        const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
        const int lane = lane_id();
        for (int block = threadIdx.x / WARP; block < rows.blocks(); block += blockDim.x / WARP) {
            const int i = UNIT * block + lane;
            // fmaxf makes 0 of NaN.
            const float q = i < rows.rank ? fminf(fmaxf((x[i] - least) * inverse, 0.0f), MOST) : 0.0f;
            const int code = int(q + 0.5f);
            u8* to = codes + block * BLOCK_BYTES<BITS>;
            if constexpr (BITS == 4) {
                const int other = __shfl_down_sync(ALL, code, 16);
                if (lane < 16) to[lane] = u8(code | other << 4);
            } else {
                u32 crumbs = 0;
#pragma unroll
                for (int j = 0; j < 4; j++) crumbs |= u32(__shfl_sync(ALL, code, lane % 8 + 8 * j) & 3) << 2 * j;
                const u32 tops = __ballot_sync(ALL, code >= 4);
                if (lane < 8) to[lane] = u8(crumbs);
                if (lane == 0) *reinterpret_cast<u32*>(to + 8) = tops;
            }
        }
        if (threadIdx.x == 0) side[0] = u32(scale_bits) | u32(least_bits) << 16;
    }
    if (KEYS && threadIdx.x == 0) side[WORDS<BITS, KEYS> - 1] = u32(int(x[rows.rank]));
}

// -- tiles ------------------------------------------------------------------------------------------------------------

// Four codes, a byte each, as halves scale code + least; both of these twice in a word.
DEVICE uint2 halves_of(u32 codes, u32 scale, u32 least) {
    // 0x6400 | code is the half 1024 + code.
    const auto two = [&](u32 selector) {
        return times_plus(minus(__byte_perm(codes, 0x64646464u, selector), 0x64006400u), scale, least);
    };
    return make_uint2(two(0x4140), two(0x4342));
}

// Bits 0 ... 3, each in a byte, as 4.
DEVICE u32 tops_of(u32 bits) { return ((bits & 15) * 0x00204081u & 0x01010101u) << 2; }

// What is copied at once: rows of 3 bits begin where words do.
template <int BITS>
struct PieceOf {
    using Type = uint4;
};
template <>
struct PieceOf<3> {
    using Type = u32;
};

// SLOTS rows on their way to shared memory, and there as halves [SLOTS, pitch].
template <int BITS, bool KEYS, int SLOTS>
struct Tile {
    using Piece = typename PieceOf<BITS>::Type;

    u16* halves;
    Piece* raw;  // [SLOTS, blocks, BLOCK_BYTES]; of BITS = 16 none: those are halves already
    u32* sides;  // [SLOTS, WORDS]
    int blocks;

    DEVICE int pitch() const { return UNIT * blocks + 8; }  // no two lanes of load_matrices meet in a bank
    DEVICE int position(int i) const { return int(sides[i * WORDS<BITS, KEYS> + WORDS<BITS, KEYS> - 1]); }

    // Asks for n rows from `row` on, and ends the set of copies.
    DEVICE void ask(const Latents& from, i64 row, int n) const {
        const int pieces = blocks * BLOCK_BYTES<BITS> / int(sizeof(Piece));
        const Piece* codes = reinterpret_cast<const Piece*>(from.codes) + row * pieces;
        if constexpr (BITS == 16) {
            for (int i = threadIdx.x; i < SLOTS * pieces; i += blockDim.x) {
                Piece* to = reinterpret_cast<Piece*>(halves + i / pieces * pitch()) + i % pieces;
                if (i < n * pieces) copy_ahead(to, codes + i);
                else *to = make_uint4(0, 0, 0, 0);
            }
        } else {
            for (int i = threadIdx.x; i < n * pieces; i += blockDim.x) copy_ahead(raw + i, codes + i);
        }
        const u32* side = from.sides + row * WORDS<BITS, KEYS>;
        for (int i = threadIdx.x; i < n * WORDS<BITS, KEYS>; i += blockDim.x) copy_ahead(sides + i, side + i);
        end_copies();
    }

    // What has come becomes halves, 0 in the rows from n on.
    DEVICE void decode(int n) const {
        if constexpr (BITS < 16) {
            for (int i = threadIdx.x; i < SLOTS * blocks * 4; i += blockDim.x) {
                const int row = i / (4 * blocks), eight = i % (4 * blocks);
                uint4 x = make_uint4(0, 0, 0, 0);
                if (row < n) x = eight_of(row, eight / 4, eight % 4);
                *reinterpret_cast<uint4*>(halves + row * pitch() + 8 * eight) = x;
            }
        }
    }

  private:
    // Numbers 8 part ... 8 part + 7 of a block.
    DEVICE uint4 eight_of(int row, int block, int part) const {
        constexpr int N = BLOCK_BYTES<BITS> / 4;
        const u32* from = reinterpret_cast<const u32*>(raw) + (row * blocks + block) * N;
        u32 low, high;
        if constexpr (BITS == 4) {
            low = from[2 * (part % 2)] >> 4 * (part / 2) & 0x0f0f0f0fu;
            high = from[2 * (part % 2) + 1] >> 4 * (part / 2) & 0x0f0f0f0fu;
        } else {
            const u32 tops = from[2] >> 8 * part;
            low = (from[0] >> 2 * part & 0x03030303u) | tops_of(tops);
            high = (from[1] >> 2 * part & 0x03030303u) | tops_of(tops >> 4);
        }
        const u32 both = sides[row * WORDS<BITS, KEYS>];
        const u32 scale = (both & 0xffff) | both << 16, least = both >> 16 | (both & 0xffff0000u);
        const uint2 a = halves_of(low, scale, least), b = halves_of(high, scale, least);
        return make_uint4(a.x, a.y, b.x, b.y);
    }
};

// Room for n of them from the front of shared memory.
template <class T>
DEVICE T* take(u8*& from, int n) {
    T* taken = reinterpret_cast<T*>(from);
    from += (n * int(sizeof(T)) + 15) / 16 * 16;
    return taken;
}

template <int BITS, bool KEYS, int SLOTS>
DEVICE Tile<BITS, KEYS, SLOTS> take_tile(u8*& from, int blocks) {
    Tile<BITS, KEYS, SLOTS> tile{};
    tile.blocks = blocks;
    tile.halves = take<u16>(from, SLOTS * tile.pitch());
    if constexpr (BITS < 16) {
        using Piece = typename PieceOf<BITS>::Type;
        tile.raw = take<Piece>(from, SLOTS * blocks * BLOCK_BYTES<BITS> / int(sizeof(Piece)));
    }
    tile.sides = take<u32>(from, SLOTS * WORDS<BITS, KEYS>);
    return tile;
}
