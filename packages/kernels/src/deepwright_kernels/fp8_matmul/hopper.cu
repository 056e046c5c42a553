// Block-scaled FP8 products on Hopper: C = A · Bᵀ with e4m3 values, float32 scales every 128 of K, float32 sums.
//
// One kernel for three operators, by SCHEDULE:
//   0  dense    A [M, K], B [N, K]                          -> C [M, N]
//   1  grouped  A [M, K], B [E, N, K], rows in groups        -> C [M, N], rows past the last group zero
//   2  outer    A [M, K], B [N, K], columns in groups       -> C [E, M, N]
//
// A block of threads stays on its multiprocessor and takes tile after tile. One warp is the producer: it finds the next
// tile, says in shared memory which one it is, and asks for 128 columns of A and B and their scales at a time, STAGES
// ahead. Two teams of four warps do the maths, each for 64 rows of the tile: four `wgmma` of 32 columns give the product
// over 128 columns in fresh registers, which are then multiplied by their scales and added to the sums. While one team
// adds, the tensor cores work for the other. The tensor cores keep fewer bits than float32 in their own sums: that is
// why the sums are not left there.
//
// The teams write C in turns. The first time the second team waits for the first one; from then on it is as much behind
// as writing takes, so that one always computes while the other writes.
//
// Defines: SCHEDULE; WAVES (a tile has WAVES times 128 columns, which a team takes one after the other); STAGES;
// ROW_SCALES_B (1: a scale for each row of B and 128 columns; 0: for 128 x 128); FLOAT_OUT (1: float32, written from
// registers; 0: bfloat16, through shared memory and the copy engine); RASTER (rows of tiles that are walked together, for
// the L2).
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
#define B_SCALE_BYTES (ROW_SCALES_B ? BLOCK_N * 4 : 16)

// On its way out a team's part of a wave of C passes through two boxes of 64 rows of 128 bytes.
#define BOX_COLUMNS 64
#define BOX_BYTES (64 * 128)
#define TEAM_BOXES_BYTES (2 * BOX_BYTES)

// Shared memory: boxes of C, all A, all B (each at a multiple of 1024 bytes, as the swizzle needs), scales, barriers.
#define A_AT (FLOAT_OUT ? 0 : 2 * TEAM_BOXES_BYTES)
#define B_AT (A_AT + STAGES * A_BYTES)
#define A_SCALE_AT (B_AT + STAGES * B_BYTES)
#define B_SCALE_AT (A_SCALE_AT + STAGES * A_SCALE_BYTES)
#define TILES_AT (B_SCALE_AT + STAGES * B_SCALE_BYTES)
#define BARRIERS_AT (TILES_AT + STAGES * 16)

// With more sums there are no registers left to multiply row scales of A and B while the tensor cores work.
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

// The compiler must not move reads or writes of these registers across this point.
__device__ __forceinline__ void pin(float (&d)[WAVE_N / 2]) {
#pragma unroll
    for (int i = 0; i < WAVE_N / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory"); }

// Barriers 1 and 2: the turns of the two teams.
__device__ __forceinline__ void turn_wait(int team) {
    asm volatile("barrier.sync %0, 256;\n" ::"r"(team + 1) : "memory");
}

__device__ __forceinline__ void turn_pass(int team) {
    asm volatile("barrier.arrive %0, 256;\n" ::"r"((team ^ 1) + 1) : "memory");
}

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

// Scales of a tile's rows, those that exist: what lies beyond is never used for a value that is kept.
__device__ __forceinline__ void load_scales(const float* from, u32 to, u32 barrier, u32 bytes) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to), "l"(from),
        "r"(bytes), "r"(barrier)
        : "memory");
}

// Bytes of the scales of up to `most` of the rows after `row`, in whole units of 16 bytes, which their strides allow.
__device__ __forceinline__ u32 scale_bytes(int rows, int row, int most) {
    return min(most, max(0, (rows - row + 3) / 4 * 4)) * 4;
}

// Four bytes into shared memory; the barrier hears of it when they are there.
__device__ __forceinline__ void load_word(const float* from, u32 to, u32 barrier) {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], 4;\ncp.async.mbarrier.arrive.noinc.shared::cta.b64 [%2];\n" ::"r"(to),
        "l"(from), "r"(barrier)
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

// The same value, of which the compiler then knows that it is one for the warp: what follows from it stays in uniform
// registers, where `wgmma` wants its descriptors, and loops over it need no care for threads that part.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xFFFFFFFF, value, 0); }

struct Tile {
    int row, column, group;  // where it is in C
    int count;               // blocks of 128 of K; none: zeros
    int first;               // and where they begin
};

#define STOP -1  // instead of a count: there are no more tiles

__device__ __forceinline__ void announce(const Tile& tile, u32 to) {
    asm volatile(
        "st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(tile.row), "r"(tile.column), "r"(tile.group),
        "r"(tile.count)
        : "memory");
}

__device__ __forceinline__ void read_announced(Tile& tile, u32 from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(tile.row), "=r"(tile.column), "=r"(tile.group), "=r"(tile.count)
                 : "r"(from)
                 : "memory");
    tile.row = uniform(tile.row), tile.column = uniform(tile.column);
    tile.group = uniform(tile.group), tile.count = uniform(tile.count);
}

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

#if FLOAT_OUT
// A wave's sums to memory. A thread holds two neighbouring columns of every eight; two threads exchange theirs first, so
// that each writes 16 bytes.
__device__ __forceinline__ void store(
    const float (&sum)[WAVE_N / 2], float* out, int row, int column, int rows, int columns, int lane) {
    const int quarter = lane & 3;
    const bool odd = quarter & 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool inside = row + 8 * half < rows;
        const u64 start = (u64)(row + 8 * half) * columns;
#pragma unroll
        for (int j = 0; j < WAVE_N / 8; j += 2) {
            // Even threads end up with four columns of the first eight, odd ones with four of the second.
            const float a0 = sum[4 * j + 2 * half], a1 = sum[4 * j + 2 * half + 1];
            const float b0 = sum[4 * j + 4 + 2 * half], b1 = sum[4 * j + 5 + 2 * half];
            const float c0 = __shfl_xor_sync(0xFFFFFFFF, odd ? a0 : b0, 1);
            const float c1 = __shfl_xor_sync(0xFFFFFFFF, odd ? a1 : b1, 1);
            const float4 four = odd ? make_float4(c0, c1, b0, b1) : make_float4(a0, a1, c0, c1);
            const int at = column + 8 * (j + (quarter & 1)) + 4 * (quarter >> 1);
            if (inside && at < columns) *(float4*)(out + start + at) = four;
        }
    }
}
#else
// Barriers 3 and 4: the warps of a team.
__device__ __forceinline__ void team_sync(int team) {
    asm volatile("barrier.sync %0, 128;\n" ::"r"(team + 3) : "memory");
}

// A wave's sums to memory by way of shared memory: the copy engine writes while the next tile is already computed.
__device__ __forceinline__ void store_by_copies(
    const float (&sum)[WAVE_N / 2], const TensorMap& map, u32 to, const Tile& tile, int column, int columns, int team,
    int warp, int lane) {
    const bool leader = warp % 4 == 0 && lane == 0;
    if (leader) asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
    team_sync(team);
#pragma unroll
    for (int box = 0; box < WAVE_N / BOX_COLUMNS; ++box) {
        // Lanes 0-7, 8-15, .. name the rows of the four 8 x 8 matrices: two of eight columns, then two of the next.
        const u32 box_at = to + box * BOX_BYTES + warp % 4 * 16 * 128;
        const int row = lane % 16;
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const float* d = sum + 4 * (8 * box + j);
            asm volatile(
                "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                    box_at + row * 128 + ((j + lane / 16) ^ (row & 7)) * 16),
                "r"(bfloat16_pair(d[0], d[1])), "r"(bfloat16_pair(d[2], d[3])), "r"(bfloat16_pair(d[4], d[5])),
                "r"(bfloat16_pair(d[6], d[7]))
                : "memory");
        }
    }
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
    team_sync(team);
    if (leader) {
        for (int box = 0; box < WAVE_N / BOX_COLUMNS; ++box) {
            const int at = column + box * BOX_COLUMNS;
            if (at >= columns) break;
            asm volatile(
#if SCHEDULE == 2
                "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];\n"
#else
                "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
#endif
                ::"l"(&map), "r"(to + box * BOX_BYTES), "r"(at), "r"(tile.row + team * 64), "r"(tile.group)
                : "memory");
        }
        asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) fp8_product(
    const __grid_constant__ TensorMap a_map,
    const __grid_constant__ TensorMap b_map,
#if !FLOAT_OUT
    const __grid_constant__ TensorMap out_map,
#endif
    const float* __restrict__ a_scale,
    const float* __restrict__ b_scale,
    const int* __restrict__ ends,
    float* __restrict__ out,
    int rows,
    int columns,
    int k,
    int groups,
    int a_scale_stride,
    int b_scale_stride) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    const u32 full = base + BARRIERS_AT, empty = full + 8 * STAGES;
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1 + (ROW_SCALES_B ? 0 : WAVES));
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
            if (lane == 0) {
                asm volatile("prefetch.tensormap [%0];\nprefetch.tensormap [%1];\n" ::"l"(&a_map), "l"(&b_map) : "memory");
            }
            int index = blockIdx.x;
            do {
                if (!find_tile(index, lane, rows, columns, k, groups, ends, tile)) tile.count = STOP;
                index += gridDim.x;
#if !ROW_SCALES_B
                const int scale_rows = (columns + 127) / 128, scale_columns = (k + 127) / 128;
                const int scale_row = tile.column / 128 + lane;
                const float* b_scale_at =
                    b_scale + (u64)(tile.group * scale_rows + min(scale_row, scale_rows - 1)) * scale_columns;
#endif
                const u32 a_scale_bytes = scale_bytes(rows, tile.row, BLOCK_M);
                const u32 b_scale_bytes = ROW_SCALES_B ? scale_bytes(columns, tile.column, BLOCK_N) : 0;
                for (int block = 0; block < max(tile.count, 1); ++block) {
                    barrier_wait(empty + 8 * stage, parity ^ 1);
                    const u32 ready = full + 8 * stage;
                    if (lane == 0) {
                        if (block == 0) announce(tile, base + TILES_AT + 16 * stage);
                        if (tile.count > 0) {
                            barrier_expect(ready, A_BYTES + B_BYTES + a_scale_bytes + b_scale_bytes);
                            const int along = tile.first + block;
                            load_tile(a_map, base + A_AT + stage * A_BYTES, ready, along * BLOCK_K, tile.row);
                            const u32 b_to = base + B_AT + stage * B_BYTES;
#if SCHEDULE == 1
                            load_tile_of(b_map, b_to, ready, along * BLOCK_K, tile.column, tile.group);
#else
                            load_tile(b_map, b_to, ready, along * BLOCK_K, tile.column);
#endif
                            load_scales(
                                a_scale + (u64)along * a_scale_stride + tile.row,
                                base + A_SCALE_AT + stage * A_SCALE_BYTES, ready, a_scale_bytes);
                            if (b_scale_bytes)
                                load_scales(
                                    b_scale + (u64)along * b_scale_stride + tile.column,
                                    base + B_SCALE_AT + stage * B_SCALE_BYTES, ready, b_scale_bytes);
                        } else {
                            barrier_arrive(ready);
                        }
                    }
#if !ROW_SCALES_B
                    if (lane < WAVES) {
                        if (tile.count > 0)
                            load_word(b_scale_at + block, base + B_SCALE_AT + stage * B_SCALE_BYTES + 4 * lane, ready);
                        else barrier_arrive(ready);
                    }
#endif
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
            } while (tile.count != STOP);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;\n");
        const int team = warp / 4;
        const int row_in_tile = team * 64 + warp % 4 * 16 + lane / 4;
        float sum[WAVES][WAVE_N / 2], fresh[WAVE_N / 2];
        if (team == 1) turn_pass(team);
        for (;;) {
            barrier_wait(full + 8 * stage, parity);
            read_announced(tile, base + TILES_AT + 16 * stage);
            if (tile.count == STOP) break;
            if (tile.count == 0) {
                free_stage(empty + 8 * stage, lane);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
#pragma unroll
            for (int w = 0; w < WAVES; ++w)
#pragma unroll
                for (int i = 0; i < WAVE_N / 2; ++i) sum[w][i] = 0.f;
            for (int block = 0; block < tile.count; ++block) {
                const u32 a_at = base + A_AT + stage * A_BYTES + team * 64 * BLOCK_K;
                const u32 b_at = base + B_AT + stage * B_BYTES;
                const u32 a_scale_at = base + A_SCALE_AT + stage * A_SCALE_BYTES + row_in_tile * 4;
                const u32 b_scale_at = base + B_SCALE_AT + stage * B_SCALE_BYTES;
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
                    const u32 pair_at = b_scale_at + (w * WAVE_N + lane % 4 * 2) * 4;
#if !SCALES_LATE
                    float scale[WAVE_N / 2];
#pragma unroll
                    for (int j = 0; j < WAVE_N / 8; ++j) {
                        const float2 b_two = load_shared_pair(pair_at + 32 * j);
                        scale[4 * j] = a_scale[0] * b_two.x, scale[4 * j + 1] = a_scale[0] * b_two.y;
                        scale[4 * j + 2] = a_scale[1] * b_two.x, scale[4 * j + 3] = a_scale[1] * b_two.y;
                    }
                    pin(scale);
#endif
#else
                    const float b_both = load_shared(b_scale_at + 4 * w);
                    const float scale0 = a_scale[0] * b_both, scale1 = a_scale[1] * b_both;
#endif
                    wgmma_wait();
                    pin(fresh);
                    if (w == WAVES - 1 && !SCALES_LATE) free_stage(empty + 8 * stage, lane);
#pragma unroll
                    for (int j = 0; j < WAVE_N / 8; ++j) {
#if SCALES_LATE
                        const float2 b_two = load_shared_pair(pair_at + 32 * j);
                        sum[w][4 * j] += fresh[4 * j] * (a_scale[0] * b_two.x);
                        sum[w][4 * j + 1] += fresh[4 * j + 1] * (a_scale[0] * b_two.y);
                        sum[w][4 * j + 2] += fresh[4 * j + 2] * (a_scale[1] * b_two.x);
                        sum[w][4 * j + 3] += fresh[4 * j + 3] * (a_scale[1] * b_two.y);
#elif ROW_SCALES_B
#pragma unroll
                        for (int i = 4 * j; i < 4 * j + 4; ++i) sum[w][i] += fresh[i] * scale[i];
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
            turn_wait(team);
#pragma unroll
            for (int w = 0; w < WAVES; ++w) {
                const int column = tile.column + w * WAVE_N;
#if FLOAT_OUT
                float* to = out + (SCHEDULE == 2 ? (u64)tile.group * rows * columns : 0);
                store(sum[w], to, tile.row + row_in_tile, column, rows, columns, lane);
#else
                store_by_copies(
                    sum[w], out_map, base + team * TEAM_BOXES_BYTES, tile, column, columns, team, warp, lane);
#endif
            }
            turn_pass(team);
        }
        if (!FLOAT_OUT && warp % 4 == 0 && lane == 0) asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
    }
}
