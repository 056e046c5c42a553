// Block-scaled FP8 products on Hopper: C = A · Bᵀ with e4m3 values, float32 scales every 128 of K, float32 sums.
//
// One kernel for three operators, by SCHEDULE:
//   0  dense    A [M, K], B [N, K]                          -> C [M, N]
//   1  grouped  A [M, K], B [E, N, K], rows in groups        -> C [M, N], rows past the last group zero
//   2  outer    A [M, K], B [N, K], columns in groups       -> C [E, M, N]
//
// A block of threads stays on its multiprocessor and takes tile after tile. One warp is the producer: it asks the copy
// engine for 128 columns of A and B (and the scales of A's rows) at a time, STAGES ahead. Two warpgroups do the maths,
// each for 64 rows of the tile: four `wgmma` of 32 columns give the product over 128 columns in fresh registers, which
// are then multiplied by their scales and added to the sums. While one warpgroup adds, the tensor cores work for the
// other. The tensor cores keep fewer bits than float32 in their own sums: that is why the sums are not left there.
//
// Defines: SCHEDULE; WAVES (a tile has WAVES times 128 columns, which a warpgroup takes one after the other); STAGES;
// ROW_SCALES_B (1: a scale for each row of B and 128 columns, [V, N] as the copy engine sees it; 0: for 128 x 128);
// FLOAT_OUT (1: float32, 0: bfloat16); RASTER (rows of tiles that are walked together, for the L2).
//
// Leaves out: K in groups that are no multiples of 128, and C whose rows are no multiples of 16 bytes.

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

#define BLOCK_M 128
#define BLOCK_K 128
#define MATHS_WARPS 8
#define THREADS 384
#define WAVE_N 128
#define BLOCK_N (WAVES * WAVE_N)

#define A_BYTES (BLOCK_M * BLOCK_K)
#define B_BYTES (BLOCK_N * BLOCK_K)
#define A_SCALE_BYTES (BLOCK_M * 4)
#define B_SCALE_BYTES (ROW_SCALES_B * BLOCK_N * 4)
#define STAGE_BYTES (A_BYTES + B_BYTES + A_SCALE_BYTES + B_SCALE_BYTES)

// Shared memory: all A, all B (each at a multiple of 1024 bytes, as the swizzle needs), scales, barriers.
#define B_AT (STAGES * A_BYTES)
#define A_SCALE_AT (B_AT + STAGES * B_BYTES)
#define B_SCALE_AT (A_SCALE_AT + STAGES * A_SCALE_BYTES)
#define BARRIERS_AT (B_SCALE_AT + STAGES * B_SCALE_BYTES)

// With more sums there are no registers left to read the scales of B's rows ahead.
#define SCALES_LATE (ROW_SCALES_B && WAVES > 1)

// Eight of the 64 sums that a thread holds of a product of 64 x 128.
#define EIGHT(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])

#define WGMMA(add) \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " #add ", 0;\nwgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" \
        "%2, %3, %4, %5, %6, %7, %8, %9, " \
        "%10, %11, %12, %13, %14, %15, %16, %17, " \
        "%18, %19, %20, %21, %22, %23, %24, %25, " \
        "%26, %27, %28, %29, %30, %31, %32, %33, " \
        "%34, %35, %36, %37, %38, %39, %40, %41, " \
        "%42, %43, %44, %45, %46, %47, %48, %49, " \
        "%50, %51, %52, %53, %54, %55, %56, %57, " \
        "%58, %59, %60, %61, %62, %63, %64, %65}, " \
        "%0, %1, p, 1, 1;\n}\n" \
        : "+l"(a), "+l"(b), EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56))

// d = a · bᵀ (FIRST) or d += a · bᵀ over 32 columns.
template <bool FIRST>
__device__ __forceinline__ void wgmma(float (&d)[WAVE_N / 2], u64 a, u64 b) {
    if (FIRST) WGMMA(0);
    else WGMMA(1);
}

// The compiler must not move reads or writes of the sums across this point.
__device__ __forceinline__ void pin(float (&d)[WAVE_N / 2]) {
#pragma unroll
    for (int i = 0; i < WAVE_N / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory"); }

// A tile of rows of 128 bytes with the 128-byte swizzle: eight rows are 1024 bytes apart from the next eight.
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | ((u64)1 << 16) | ((u64)(1024 >> 4) << 32) | ((u64)1 << 62);
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// A warp has read all it needs of a stage: the producer may fill it.
__device__ __forceinline__ void free_stage(u32 barrier, int lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

__device__ __forceinline__ void load_tile(const TensorMap& map, u32 to, u32 barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::
            "r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

__device__ __forceinline__ void load_tile_of(
    const TensorMap& map, u32 to, u32 barrier, int column, int row, int group) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];\n" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(group)
        : "memory");
}

__device__ __forceinline__ float load_shared(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(value) : "r"(address));
    return value;
}

__device__ __forceinline__ float2 load_shared_pair(u32 address) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
    return pair;
}

__device__ __forceinline__ u32 bfloat16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

struct Tile {
    int row, column;  // of C
    int group;
    int first, count;  // blocks of K: where they begin (in units of 128), how many
};

// The tile that is number `index`, or false past the last one. The whole warp must call it.
__device__ __forceinline__ bool find_tile(
    int index, int lane, int rows, int columns, int k, int groups, const int* ends, Tile& tile) {
    const int down = (rows + BLOCK_M - 1) / BLOCK_M;
    const int across = (columns + BLOCK_N - 1) / BLOCK_N;
    tile.group = 0;
#if SCHEDULE == 2
    tile.group = index / (down * across);
    if (tile.group >= groups) return false;
    index -= tile.group * down * across;
#else
    if (index >= down * across) return false;
#endif
    // RASTER rows of tiles are walked together, column by column, so that what runs at one time shares A and B.
    const int strip = index / (RASTER * across);
    const int height = min(RASTER, down - strip * RASTER);
    index -= strip * RASTER * across;
    tile.row = (strip * RASTER + index % height) * BLOCK_M;
    tile.column = index / height * BLOCK_N;
    tile.first = 0;
    tile.count = (k + BLOCK_K - 1) / BLOCK_K;
#if SCHEDULE == 1
    // The group of a row: how many groups end at it or before.
    for (int first = 0; first < groups; first += 32) {
        const bool before = first + lane < groups && ends[first + lane] <= tile.row;
        tile.group += __popc(__ballot_sync(0xFFFFFFFF, before));
    }
    if (tile.group >= groups) tile.count = 0;  // past the last group: zeros
#elif SCHEDULE == 2
    const int begin = tile.group == 0 ? 0 : min(k, ends[tile.group - 1]);
    tile.first = begin / BLOCK_K;
    tile.count = (min(k, ends[tile.group]) - begin + BLOCK_K - 1) / BLOCK_K;
#endif
    return true;
}

// Two rows of sums (eight apart) of a wave to memory. A thread holds two neighbouring columns of every eight; groups of
// four threads exchange theirs first, so that each writes 16 bytes.
__device__ __forceinline__ void store(
    const float (&sum)[WAVE_N / 2], void* out, int row, int column, int rows, int columns, int lane) {
    const int quarter = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool inside = row + 8 * half < rows;
        const u64 start = (u64)(row + 8 * half) * columns;
#if FLOAT_OUT
#pragma unroll
        for (int j = 0; j < WAVE_N / 8; j += 2) {
            // Even threads end up with four columns of the first eight, odd ones with four of the second.
            const float a0 = sum[4 * j + 2 * half], a1 = sum[4 * j + 2 * half + 1];
            const float b0 = sum[4 * j + 4 + 2 * half], b1 = sum[4 * j + 5 + 2 * half];
            const bool odd = quarter & 1;
            const float c0 = __shfl_xor_sync(0xFFFFFFFF, odd ? a0 : b0, 1);
            const float c1 = __shfl_xor_sync(0xFFFFFFFF, odd ? a1 : b1, 1);
            const float4 four = odd ? make_float4(c0, c1, b0, b1) : make_float4(a0, a1, c0, c1);
            const int at = column + 8 * (j + (quarter & 1)) + 4 * (quarter >> 1);
            if (inside && at < columns) *(float4*)((float*)out + start + at) = four;
        }
#else
#pragma unroll
        for (int j = 0; j < WAVE_N / 8; j += 4) {
            u32 v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                v[i] = bfloat16_pair(sum[4 * (j + i) + 2 * half], sum[4 * (j + i) + 2 * half + 1]);
            // Transpose the four threads' 4 x 4 pairs: first between neighbours, then two apart.
            const bool odd = quarter & 1, upper = quarter & 2;
            const u32 x0 = __shfl_xor_sync(0xFFFFFFFF, odd ? v[0] : v[1], 1);
            const u32 x1 = __shfl_xor_sync(0xFFFFFFFF, odd ? v[2] : v[3], 1);
            const u32 p0 = odd ? x0 : v[0], p1 = odd ? v[1] : x0;
            const u32 p2 = odd ? x1 : v[2], p3 = odd ? v[3] : x1;
            const u32 y0 = __shfl_xor_sync(0xFFFFFFFF, upper ? p0 : p2, 2);
            const u32 y1 = __shfl_xor_sync(0xFFFFFFFF, upper ? p1 : p3, 2);
            const uint4 eight = upper ? make_uint4(y0, y1, p2, p3) : make_uint4(p0, p1, y0, y1);
            const int at = column + 8 * (j + quarter);
            if (inside && at < columns) *(uint4*)((unsigned short*)out + start + at) = eight;
        }
#endif
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) fp8_product(
    const __grid_constant__ TensorMap a_map,
    const __grid_constant__ TensorMap b_map,
    const __grid_constant__ TensorMap a_scale_map,
    const __grid_constant__ TensorMap b_scale_map,
    const float* __restrict__ b_scale,
    const int* __restrict__ ends,
    void* __restrict__ out,
    int rows,
    int columns,
    int k,
    int groups) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    const u32 full = base + BARRIERS_AT, empty = full + 8 * STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, MATHS_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;\n" ::: "memory");
    }
    __syncthreads();

    int stage = 0;
    u32 parity = 0;
    Tile tile;
    if (warp >= MATHS_WARPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;\n");
        if (warp == MATHS_WARPS) {
            for (int index = blockIdx.x; find_tile(index, lane, rows, columns, k, groups, ends, tile);
                 index += gridDim.x) {
                if (lane == 0) {
                    for (int block = tile.first; block < tile.first + tile.count; ++block) {
                        barrier_wait(empty + 8 * stage, parity ^ 1);
                        const u32 ready = full + 8 * stage;
                        barrier_expect(ready, STAGE_BYTES);
                        load_tile(a_map, base + stage * A_BYTES, ready, block * BLOCK_K, tile.row);
                        const u32 b_to = base + B_AT + stage * B_BYTES;
#if SCHEDULE == 1
                        load_tile_of(b_map, b_to, ready, block * BLOCK_K, tile.column, tile.group);
#else
                        load_tile(b_map, b_to, ready, block * BLOCK_K, tile.column);
#endif
                        load_tile(a_scale_map, base + A_SCALE_AT + stage * A_SCALE_BYTES, ready, tile.row, block);
#if ROW_SCALES_B
                        load_tile(b_scale_map, base + B_SCALE_AT + stage * B_SCALE_BYTES, ready, tile.column, block);
#endif
                        if (++stage == STAGES) stage = 0, parity ^= 1;
                    }
                }
                __syncwarp();
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;\n");
        const int team = warp / 4;
        const int row_in_tile = team * 64 + warp % 4 * 16 + lane / 4;
        float sum[WAVES][WAVE_N / 2], fresh[WAVE_N / 2];
        for (int index = blockIdx.x; find_tile(index, lane, rows, columns, k, groups, ends, tile);
             index += gridDim.x) {
#pragma unroll
            for (int w = 0; w < WAVES; ++w)
#pragma unroll
                for (int i = 0; i < WAVE_N / 2; ++i) sum[w][i] = 0.f;
#if !ROW_SCALES_B
            // Scales of B are read one block ahead.
            const int scale_rows = (columns + 127) / 128, scale_columns = (k + 127) / 128;
            const float* b_scale_at[WAVES];
            float b_scale_next[WAVES];
#pragma unroll
            for (int w = 0; w < WAVES; ++w) {
                const float* at = b_scale + (u64)(tile.group < groups ? tile.group : 0) * scale_rows * scale_columns;
                b_scale_at[w] = at + (u64)min((tile.column + w * WAVE_N) / 128, scale_rows - 1) * scale_columns;
                b_scale_next[w] = __ldg(b_scale_at[w]);
            }
#endif
            for (int block = 0; block < tile.count; ++block) {
                const u32 a_at = base + stage * A_BYTES + team * 64 * BLOCK_K;
                const u32 b_at = base + B_AT + stage * B_BYTES;
                const u32 a_scale_at = base + A_SCALE_AT + stage * A_SCALE_BYTES + row_in_tile * 4;
#if !ROW_SCALES_B
                float b_scale_now[WAVES];
#pragma unroll
                for (int w = 0; w < WAVES; ++w) {
                    b_scale_now[w] = b_scale_next[w];
                    if (block + 1 < tile.count) b_scale_next[w] = __ldg(b_scale_at[w] + block + 1);
                }
#endif
                barrier_wait(full + 8 * stage, parity);
                const float a_scale[2] = {load_shared(a_scale_at), load_shared(a_scale_at + 32)};
#pragma unroll
                for (int w = 0; w < WAVES; ++w) {
                    pin(fresh);
                    wgmma_begin();
                    const u64 a = descriptor(a_at), b = descriptor(b_at + w * WAVE_N * BLOCK_K);
#pragma unroll
                    for (int step = 0; step < BLOCK_K / 32; ++step) {
                        if (step == 0) wgmma<true>(fresh, a, b);
                        else wgmma<false>(fresh, a + 2 * step, b + 2 * step);
                    }
                    wgmma_commit();
#if ROW_SCALES_B
                    const u32 b_pair_at = base + B_SCALE_AT + stage * B_SCALE_BYTES + (w * WAVE_N + lane % 4 * 2) * 4;
#if !SCALES_LATE
                    float2 b_pair[WAVE_N / 8];
#pragma unroll
                    for (int j = 0; j < WAVE_N / 8; ++j) b_pair[j] = load_shared_pair(b_pair_at + 32 * j);
#endif
#else
                    const float scale0 = a_scale[0] * b_scale_now[w], scale1 = a_scale[1] * b_scale_now[w];
#endif
                    wgmma_wait();
                    pin(fresh);
                    if (w == WAVES - 1 && !SCALES_LATE) free_stage(empty + 8 * stage, lane);
#pragma unroll
                    for (int j = 0; j < WAVE_N / 8; ++j) {
#if ROW_SCALES_B
#if SCALES_LATE
                        const float2 b_two = load_shared_pair(b_pair_at + 32 * j);
#else
                        const float2 b_two = b_pair[j];
#endif
                        sum[w][4 * j] += fresh[4 * j] * (a_scale[0] * b_two.x);
                        sum[w][4 * j + 1] += fresh[4 * j + 1] * (a_scale[0] * b_two.y);
                        sum[w][4 * j + 2] += fresh[4 * j + 2] * (a_scale[1] * b_two.x);
                        sum[w][4 * j + 3] += fresh[4 * j + 3] * (a_scale[1] * b_two.y);
#else
                        sum[w][4 * j] += fresh[4 * j] * scale0;
                        sum[w][4 * j + 1] += fresh[4 * j + 1] * scale0;
                        sum[w][4 * j + 2] += fresh[4 * j + 2] * scale1;
                        sum[w][4 * j + 3] += fresh[4 * j + 3] * scale1;
#endif
                    }
                    if (w == WAVES - 1 && SCALES_LATE) free_stage(empty + 8 * stage, lane);
                }
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            void* to = out;
            if (SCHEDULE == 2) to = (char*)out + (u64)tile.group * rows * columns * (FLOAT_OUT ? 4 : 2);
#pragma unroll
            for (int w = 0; w < WAVES; ++w)
                store(sum[w], to, tile.row + row_in_tile, tile.column + w * WAVE_N, rows, columns, lane);
        }
    }
}
