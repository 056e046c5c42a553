// The router on Hopper: eight lanes of a warp for each row, four rows a warp.
//
// Rows come in and scores go out in pieces of four experts, neighbouring lanes taking neighbouring pieces. On the way the
// scores are laid in shared memory, from where each lane takes VALUES neighbouring experts: a group of experts is then a
// lane or a few. Nothing is sorted: each lane knows its two best, and the TOP_K-th largest of these of all eight lanes is a
// threshold that at least TOP_K experts reach and hardly more. Those become keys of 64 bits (the score's bits, ordered,
// above the expert counted down, so that no two are equal), and each counts how many beat it. That number is its place in
// the result. Rows where more than CANDIDATES experts or fewer than TOP_K reach the threshold (many equal scores, or what is
// not a number) are settled by slower code.
//
// A warp asks for its next rows before it works on the present ones. Logits are not wanted again, so they are marked to
// leave the L2 first: the scores then take their place there instead of pushing out what is still to be written.
//
// Counts are added up in shared memory and then, by integer atomics, in memory: the sum does not depend on the order.
// For few rows (FEW) one cluster of blocks does everything: they add up each other's counts and write the sums, so that
// nothing has to be cleared by a launch of its own.
//
// Defined from outside: EXPERTS (a multiple of 32), GROUPS (1, 2, 4 or 8), TOP_GROUPS (fewer than GROUPS, or both 1),
// GROUP_BEST (1 or 2), TOP_K (at most 8), SIGMOID, NORMALISE, HAS_BIAS, THREADS, SHARING (blocks of a
// processor), FEW (0, or how many blocks there are).

typedef unsigned int u32;
typedef unsigned long long u64;

#define LANES 8                        // of a row
#define ROWS (32 / LANES)              // of a warp
#define PIECE 4                        // experts that are loaded at once
#define VALUES (EXPERTS / LANES)       // of a lane
#define PIECES (VALUES / PIECE)        // of a lane
#define LANES_OF_GROUP (LANES / GROUPS)
#define CANDIDATES 32                  // room for those of a row
#define MASKS ((VALUES + 31) / 32)
#define EVERYONE 0xffffffffu
#define LOG2_E 1.4426950408889634f
#define NOTHING __int_as_float(0xff800000)  // -inf

struct Warp {
    float scores[ROWS][EXPERTS];  // pieces in exchanged places, see `place_of`
    u64 keys[ROWS][CANDIDATES];
    int candidates[ROWS][CANDIDATES];  // their experts
    int chosen[ROWS][LANES];
};

// Where a piece of a row lies: sixteen bytes of 32 banks are spread for reading along lanes as well as across them.
__device__ __forceinline__ int place_of(int piece) { return (piece ^ (piece >> 3 & 7)) * PIECE; }

__device__ __forceinline__ int place_of_expert(int expert) { return place_of(expert / PIECE) + expert % PIECE; }

// Integers that compare as the floats do.
__device__ __forceinline__ int ordered(float value) {
    int bits = __float_as_int(value);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ __forceinline__ u64 key_of(float value, int expert) {
    return (u64)((u32)ordered(value) ^ 0x80000000u) << 32 | (u32)~expert;
}

__device__ __forceinline__ float exponential(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * LOG2_E));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// count += a > b, in two instructions.
__device__ __forceinline__ void add_if_greater(int& count, int a, int b) {
    asm("{ .reg .pred more; setp.gt.s32 more, %1, %2; @more add.s32 %0, %0, 1; }" : "+r"(count) : "r"(a), "r"(b));
}

__device__ __forceinline__ void add_if_greater(int& count, u64 a, u64 b) {
    asm("{ .reg .pred more; setp.gt.u64 more, %1, %2; @more add.s32 %0, %0, 1; }" : "+r"(count) : "l"(a), "l"(b));
}

// count += value >= least.
__device__ __forceinline__ void add_if_reached(int& count, float value, float least) {
    asm("{ .reg .pred reached; setp.ge.f32 reached, %1, %2; @reached add.s32 %0, %0, 1; }"
        : "+r"(count)
        : "f"(value), "f"(least));
}

// mask |= bit where value >= least: never for what is not a number.
__device__ __forceinline__ void mark_if_reached(u32& mask, float value, float least, u32 bit) {
    asm("{ .reg .pred reached; setp.ge.f32 reached, %1, %2; @reached or.b32 %0, %0, %3; }"
        : "+r"(mask)
        : "f"(value), "f"(least), "r"(bit));
}

__device__ __forceinline__ u64 leaves_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ float4 read_once(const float* from, u64 policy) {
    float4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(from), "l"(policy));
    return x;
}

// Of two pairs of a best and a second best, the pair of both.
__device__ __forceinline__ void join(float& best, float& second, float other_best, float other_second) {
    second = fmaxf(fminf(best, other_best), fmaxf(second, other_second));
    best = fmaxf(best, other_best);
}

// Whether this lane's group is among the TOP_GROUPS best; best and second are those of the lane.
__device__ __forceinline__ bool group_is_kept(float best, float second, int lane_of_row) {
#pragma unroll
    for (int step = 1; step < LANES_OF_GROUP; step *= 2) {
        float other = __shfl_xor_sync(EVERYONE, best, step);
        float other_second = GROUP_BEST == 2 ? __shfl_xor_sync(EVERYONE, second, step) : NOTHING;
        join(best, second, other, other_second);
    }
    int worth = ordered(GROUP_BEST == 2 ? best + second : best), better = 0, group = lane_of_row / LANES_OF_GROUP;
#pragma unroll
    for (int difference = 1; difference < GROUPS; difference++) {
        // The highest bit in which two groups differ says which one is lower: it wins when both are worth the same.
        int bit = difference >= 4 ? 2 : difference >= 2 ? 1 : 0;
        int its = __shfl_xor_sync(EVERYONE, worth, difference * LANES_OF_GROUP);
        add_if_greater(better, its, worth - (group >> bit & 1));
    }
    return better < TOP_GROUPS;
}

// The TOP_K-th largest of the row's lanes' best and second best, of those that are kept; -inf if there are not so many.
__device__ __forceinline__ float threshold(float best, float second, bool kept) {
#if TOP_GROUPS < GROUPS && 2 * TOP_GROUPS * LANES_OF_GROUP == TOP_K
    float least = kept ? second : -NOTHING;  // all of them
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) least = fminf(least, __shfl_xor_sync(EVERYONE, least, step));
    return least;
#else
    best = kept ? best : NOTHING, second = kept ? second : NOTHING;
    int reach_best = 1 + (second >= best), reach_second = 2;
#pragma unroll
    for (int difference = 1; difference < LANES; difference++) {
        float other = __shfl_xor_sync(EVERYONE, best, difference);
        float other_second = __shfl_xor_sync(EVERYONE, second, difference);
        add_if_reached(reach_best, other, best);
        add_if_reached(reach_best, other_second, best);
        add_if_reached(reach_second, other, second);
        add_if_reached(reach_second, other_second, second);
    }
    float most = reach_best >= TOP_K ? best : reach_second >= TOP_K ? second : NOTHING;
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) most = fmaxf(most, __shfl_xor_sync(EVERYONE, most, step));
    return most;
#endif
}

// Every choice by a search for the best of what is left, for rows that the threshold does not serve. Where `wanted` is
// not set the lanes only take part in the exchange.
__device__ __noinline__ void choose_slowly(Warp& shared, const float* bias, bool wanted, bool kept, int row, int lane_of_row) {
    u32 taken[MASKS] = {};
    __syncwarp();
    for (int k = 0; k < TOP_K; k++) {
        u64 best = 0;
        int where = 0;
        for (int v = 0; v < VALUES; v++) {
            int expert = lane_of_row * VALUES + v;
            float value = shared.scores[row][place_of_expert(expert)];
#if HAS_BIAS
            value += bias[expert];
#endif
            u64 key = kept && !(taken[v / 32] >> v % 32 & 1) ? key_of(value, expert) : 0;
            if (key > best) best = key, where = v;
        }
        u64 highest = best;
        for (int step = 1; step < LANES; step *= 2) {
            u64 other = __shfl_xor_sync(EVERYONE, highest, step);
            highest = other > highest ? other : highest;
        }
        if (wanted && best == highest) {
            taken[where / 32] |= 1u << where % 32;
            shared.chosen[row][k] = lane_of_row * VALUES + where;
        }
    }
    __syncwarp();
}

__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// The value at the same place in another block's shared memory.
__device__ __forceinline__ u32 value_of(const u32* own, int block) {
    u32 value, address = (u32)__cvta_generic_to_shared(own);
    asm volatile(
        "{ .reg .b32 theirs; mapa.shared::cluster.u32 theirs, %1, %2; ld.shared::cluster.u32 %0, [theirs]; }"
        : "=r"(value)
        : "r"(address), "r"(block));
    return value;
}

#if FEW
#define CLUSTER __cluster_dims__(FEW, 1, 1)
#else
#define CLUSTER
#endif

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, SHARING) route(
    const float* __restrict__ logits,
    const float* __restrict__ bias,
    long long* __restrict__ experts,
    float* __restrict__ weights,
    float* __restrict__ scores,
    u64* __restrict__ counts,
    int tokens,
    float scaling) {
    extern __shared__ __align__(16) unsigned char memory[];
    u32* counted = reinterpret_cast<u32*>(memory);
    float* correction = reinterpret_cast<float*>(memory) + EXPERTS;  // the bias, its pieces placed as those of a row
    Warp& shared = reinterpret_cast<Warp*>(memory + 8 * EXPERTS)[threadIdx.x / 32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / LANES, lane_of_row = lane % LANES;

    // Neighbouring rows go to different blocks, so that few rows still use many processors.
    int stride = gridDim.x * (THREADS / 32) * ROWS, first = (warp * gridDim.x + blockIdx.x) * ROWS;
    u64 policy = leaves_first();
    float4 ahead[PIECES];
    auto fetch = [&](int token) {
        const float* from = logits + (long long)min(token, tokens - 1) * EXPERTS + lane_of_row * PIECE;
#pragma unroll
        for (int j = 0; j < PIECES; j++) ahead[j] = read_once(from + j * LANES * PIECE, policy);
    };
    if (first < tokens) fetch(first + row);

    for (int expert = threadIdx.x; expert < EXPERTS; expert += THREADS) {
        counted[expert] = 0;
#if HAS_BIAS
        correction[place_of_expert(expert)] = bias[expert];
#endif
    }
    __syncthreads();

    for (; first < tokens; first += stride) {
        // Rows past the last one do again what the last one does, but are not counted.
        int token = min(first + row, tokens - 1);
        float score[VALUES];
#pragma unroll
        for (int j = 0; j < PIECES; j++) *reinterpret_cast<float4*>(score + j * PIECE) = ahead[j];
        if (first + stride < tokens) fetch(first + stride + row);

#if SIGMOID
#pragma unroll
        for (int v = 0; v < VALUES; v++) score[v] = reciprocal(1.0f + exponential(-score[v]));
#else
        float highest = score[0], sum = 0.0f;
#pragma unroll
        for (int v = 1; v < VALUES; v++) highest = fmaxf(highest, score[v]);
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(EVERYONE, highest, step));
#pragma unroll
        for (int v = 0; v < VALUES; v++) {
            score[v] = exponential(score[v] - highest);
            sum += score[v];
        }
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(EVERYONE, sum, step);
        float share = 1.0f / sum;
#pragma unroll
        for (int v = 0; v < VALUES; v++) score[v] *= share;
#endif
        float* to = scores + (long long)token * EXPERTS + lane_of_row * PIECE;
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
            float4 piece = *reinterpret_cast<float4*>(score + j * PIECE);
            *reinterpret_cast<float4*>(to + j * LANES * PIECE) = piece;
            *reinterpret_cast<float4*>(shared.scores[row] + place_of(j * LANES + lane_of_row)) = piece;
        }
        __syncwarp();

        float (&biased)[VALUES] = score;  // from here on neighbouring experts
        float best = NOTHING, second = NOTHING;
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
            int place = place_of(lane_of_row * PIECES + j);
            float4 piece = *reinterpret_cast<const float4*>(shared.scores[row] + place);
#if HAS_BIAS
            float4 add = *reinterpret_cast<const float4*>(correction + place);
            piece.x += add.x, piece.y += add.y, piece.z += add.z, piece.w += add.w;
#endif
            *reinterpret_cast<float4*>(biased + j * PIECE) = piece;
            float high = fmaxf(piece.x, piece.y), low = fminf(piece.x, piece.y);
            join(high, low, fmaxf(piece.z, piece.w), fminf(piece.z, piece.w));
            join(best, second, high, low);
        }
#if TOP_GROUPS < GROUPS
        bool kept = group_is_kept(best, second, lane_of_row);
#else
        const bool kept = true;
#endif
        // Lanes of dropped groups have no candidate: nothing reaches what is not a number.
        float least = threshold(best, second, kept);
        if (!kept) least = __int_as_float(0x7fffffff);

        u32 reached[MASKS] = {};
#pragma unroll
        for (int v = 0; v < VALUES; v++) mark_if_reached(reached[v / 32], biased[v], least, 1u << v % 32);
        int mine = 0;
#pragma unroll
        for (int m = 0; m < MASKS; m++) mine += __popc(reached[m]);
        int through = mine;  // of this lane and the row's lower ones
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) {
            int lower = __shfl_up_sync(EVERYONE, through, step, LANES);
            if (lane_of_row >= step) through += lower;
        }
        int found = __shfl_sync(EVERYONE, through, LANES - 1, LANES);
        bool served = found >= TOP_K && found <= CANDIDATES;
        if (served) {
            int* next = shared.candidates[row] + (through - mine);
#pragma unroll
            for (int m = 0; m < MASKS; m++)
                for (u32 left = reached[m]; left; left &= left - 1)
                    *next++ = lane_of_row * VALUES + m * 32 + __ffs(left) - 1;
        }
        __syncwarp();
        int most = __reduce_max_sync(EVERYONE, served ? found : 0);
        // Slots without a candidate hold zero, which no key is: all beat it.
#pragma unroll
        for (int slot = lane_of_row; slot < CANDIDATES; slot += LANES) {
            if (slot >= 2 * LANES && most <= 2 * LANES) break;
            bool there = served && slot < found;
            int expert = there ? shared.candidates[row][slot] : 0, place = place_of_expert(expert);
            float value = shared.scores[row][place];
#if HAS_BIAS
            value += correction[place];
#endif
            shared.keys[row][slot] = there ? key_of(value, expert) : 0;
        }
        __syncwarp();
        for (int from = 0; from < most; from += 2 * LANES) {
            u64 low = shared.keys[row][from + lane_of_row], high = shared.keys[row][from + LANES + lane_of_row];
            int place_of_low = 0, place_of_high = 0;
#pragma unroll 2
            for (int other = 0; other < most; other += 2) {
                ulonglong2 its = *reinterpret_cast<const ulonglong2*>(shared.keys[row] + other);
                add_if_greater(place_of_low, its.x, low);
                add_if_greater(place_of_low, its.y, low);
                add_if_greater(place_of_high, its.x, high);
                add_if_greater(place_of_high, its.y, high);
            }
            if (low && place_of_low < TOP_K) shared.chosen[row][place_of_low] = (int)~(u32)low;
            if (high && place_of_high < TOP_K) shared.chosen[row][place_of_high] = (int)~(u32)high;
        }
        if (__any_sync(EVERYONE, !served)) choose_slowly(shared, bias, !served, kept, row, lane_of_row);
        __syncwarp();

        bool here = lane_of_row < TOP_K;
        int expert = here ? shared.chosen[row][lane_of_row] : 0;
        float weight = here ? shared.scores[row][place_of_expert(expert)] : 0.0f;
#if NORMALISE
        float total = weight;
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) total += __shfl_xor_sync(EVERYONE, total, step);
        weight *= reciprocal(total + 1e-20f);
#endif
        if (here) {
            experts[(long long)token * TOP_K + lane_of_row] = expert;
            weights[(long long)token * TOP_K + lane_of_row] = weight * scaling;
            if (first + row < tokens) atomicAdd(&counted[expert], 1u);
        }
        __syncwarp();
    }
#if FEW
    wait_for_cluster();
    for (int expert = blockIdx.x * THREADS + threadIdx.x; expert < EXPERTS; expert += FEW * THREADS) {
        u32 sum = 0;
        for (int block = 0; block < FEW; block++) sum += value_of(&counted[expert], block);
        counts[expert] = sum;
    }
    wait_for_cluster();  // no block may leave while others read from it
#else
    __syncthreads();
    for (int expert = threadIdx.x; expert < EXPERTS; expert += THREADS) {
        if (counted[expert]) atomicAdd(&counts[expert], (u64)counted[expert]);
    }
#endif
}
