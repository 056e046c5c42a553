// The router on Hopper: a warp for each row, everything about the row in the warp's registers.
//
// A lane holds VALUES neighbouring experts, so a group of experts is a few neighbouring lanes. The best TOP_K are found
// without sorting: the TOP_K-th largest of the lanes' maxima is a threshold that at least TOP_K experts reach and
// hardly more; those are compacted, one a lane, in the order of experts, and each counts how many beat it. That number
// is its place in the result. Equal scores: the lowest expert wins. Ties among groups or candidates are noticed (they
// are rare) and settled by slower code, and so are rows where more experts than lanes, or too few, reach the threshold
// (many equal scores, or what is not a number).
//
// Counts are added up in shared memory and then, by integer atomics, in memory: the sum does not depend on the order.
// For few rows (FEW) one cluster of blocks does everything: they add up each other's counts and write the sums, so that
// nothing has to be cleared by a launch of its own.
//
// Defined from outside: EXPERTS (a multiple of 32), GROUPS, TOP_GROUPS (fewer than GROUPS, or both 1), GROUP_BEST (1 or
// 2), TOP_K (at most 32), SIGMOID, NORMALISE, HAS_BIAS, THREADS, FEW (0, or how many blocks there are).

#define VALUES (EXPERTS / 32)
#define LANES_OF_GROUP (32 / GROUPS)
#define EVERYONE 0xffffffffu
#define LOG2_E 1.4426950408889634f
#define NOTHING __int_as_float(0xff800000)  // -inf

#define LEAST (-2147483647 - 1)  // below every ordered float

// Of a warp's row: every score, and the candidates with their experts; `ranked` are the chosen scores in order.
struct Row {
    float scores[EXPERTS];
    float candidates[32];
    int experts[32];
    float ranked[32];
};

// Integers that compare as the floats do, and back.
__device__ __forceinline__ int ordered(float value) {
    int bits = __float_as_int(value);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ __forceinline__ float float_of(int order) {
    return __int_as_float(order ^ ((order >> 31) & 0x7fffffff));
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

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(EVERYONE, x, step);
    return x;
}

// The sum over this lane and all lower ones.
__device__ __forceinline__ int running_sum(int x) {
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        asm volatile(
            "{ .reg .pred there; .reg .b32 lower; shfl.sync.up.b32 lower|there, %0, %1, 0, 0xffffffff;"
            " @there add.s32 %0, %0, lower; }"
            : "+r"(x)
            : "r"(step));
    }
    return x;
}

// count += a > b, in two instructions.
__device__ __forceinline__ void add_if_greater(int& count, float a, float b) {
    asm("{ .reg .pred more; setp.gt.f32 more, %1, %2; @more add.s32 %0, %0, 1; }" : "+r"(count) : "f"(a), "f"(b));
}

// 16 or 8 bytes at a time where the lane's values allow it.
#if VALUES % 4 == 0
#define PIECE 4
typedef float4 Piece;
#elif VALUES % 2 == 0
#define PIECE 2
typedef float2 Piece;
#else
#define PIECE 1
typedef float Piece;
#endif

__device__ __forceinline__ void load_row(float (&value)[VALUES], const float* from) {
#pragma unroll
    for (int v = 0; v < VALUES; v += PIECE) {
        Piece piece = *reinterpret_cast<const Piece*>(from + v);
        const float* part = reinterpret_cast<const float*>(&piece);
#pragma unroll
        for (int p = 0; p < PIECE; p++) value[v + p] = part[p];
    }
}

__device__ __forceinline__ void store_row(float* to, const float (&value)[VALUES]) {
#pragma unroll
    for (int v = 0; v < VALUES; v += PIECE) {
        Piece piece;
        float* part = reinterpret_cast<float*>(&piece);
#pragma unroll
        for (int p = 0; p < PIECE; p++) part[p] = value[v + p];
        *reinterpret_cast<Piece*>(to + v) = piece;
    }
}

// Whether this lane's group is among the TOP_GROUPS best.
__device__ __forceinline__ bool group_is_kept(const float (&biased)[VALUES], int lane) {
    float best = NOTHING, second = NOTHING;
#pragma unroll
    for (int v = 0; v < VALUES; v++) {
        second = fmaxf(second, fminf(best, biased[v]));
        best = fmaxf(best, biased[v]);
    }
#pragma unroll
    for (int step = 1; step < LANES_OF_GROUP; step <<= 1) {
        float other = __shfl_xor_sync(EVERYONE, best, step);
#if GROUP_BEST == 2
        float other_second = __shfl_xor_sync(EVERYONE, second, step);
        second = fmaxf(fminf(best, other), fmaxf(second, other_second));
#endif
        best = fmaxf(best, other);
    }
    float worth = GROUP_BEST == 2 ? best + second : best;
    int rest = ordered(worth), least = rest;
#pragma unroll
    for (int kept = 0; kept < TOP_GROUPS; kept++) {
        least = __reduce_max_sync(EVERYONE, rest);
        rest = rest == least ? LEAST : rest;
    }
    bool reaches = ordered(worth) >= least;
    if (__popc(__ballot_sync(EVERYONE, reaches)) == TOP_GROUPS * LANES_OF_GROUP) return reaches;
    int better = 0, group = lane / LANES_OF_GROUP;
    for (int other = 0; other < GROUPS; other++) {
        int its = __shfl_sync(EVERYONE, ordered(worth), other * LANES_OF_GROUP);
        better += its > ordered(worth) || (its == ordered(worth) && other < group);
    }
    return better < TOP_GROUPS;
}

// The same choice one maximum after the other, for rows that the threshold does not serve.
__device__ __noinline__ void choose_slowly(Row& shared, const float* bias, bool kept, int lane) {
    int first = lane * VALUES;
    unsigned int taken = 0;
    __syncwarp();
    for (int k = 0; k < TOP_K; k++) {
        int value = LEAST, where = 0;
        for (int v = VALUES - 1; v >= 0; v--) {
            float biased = shared.scores[first + v];
#if HAS_BIAS
            biased += bias[first + v];
#endif
            int here = ordered(kept ? biased : NOTHING);
            if (!(taken >> v & 1) && here >= value) value = here, where = v;
        }
        int highest = __reduce_max_sync(EVERYONE, value);
        if (lane == __ffs(__ballot_sync(EVERYONE, value == highest)) - 1) {
            shared.experts[k] = first + where;
            taken |= 1u << where;
        }
    }
    __syncwarp();
}

__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// The value at the same place in another block's shared memory.
__device__ __forceinline__ unsigned int value_of(const unsigned int* own, int block) {
    unsigned int value, address = (unsigned int)__cvta_generic_to_shared(own);
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

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS) route(
    const float* __restrict__ logits,
    const float* __restrict__ bias,
    long long* __restrict__ experts,
    float* __restrict__ weights,
    float* __restrict__ scores,
    unsigned long long* __restrict__ counts,
    int tokens,
    float scaling) {
    __shared__ __align__(16) Row row_of_warp[THREADS / 32];
    __shared__ unsigned int counted[EXPERTS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = lane * VALUES;
    Row& shared = row_of_warp[warp];
    asm volatile("" : "+r"(lane), "+r"(first));  // kept in registers: the compiler would compute them again at each use
    for (int expert = threadIdx.x; expert < EXPERTS; expert += THREADS) counted[expert] = 0;
    __syncthreads();

#if HAS_BIAS
    float correction[VALUES];
    load_row(correction, bias + first);
#endif
    // Neighbouring rows go to different blocks, so that few rows still use many processors.
    int rows = gridDim.x * (THREADS / 32);
    for (int row = warp * gridDim.x + blockIdx.x; row < tokens; row += rows) {
        float score[VALUES];
        load_row(score, logits + (long long)row * EXPERTS + first);
#if SIGMOID
#pragma unroll
        for (int v = 0; v < VALUES; v++) score[v] = reciprocal(1.0f + exponential(-score[v]));
#else
        float highest_of_lane = score[0], sum = 0.0f;
#pragma unroll
        for (int v = 1; v < VALUES; v++) highest_of_lane = fmaxf(highest_of_lane, score[v]);
        float highest = float_of(__reduce_max_sync(EVERYONE, ordered(highest_of_lane)));
#pragma unroll
        for (int v = 0; v < VALUES; v++) {
            score[v] = exponential(score[v] - highest);
            sum += score[v];
        }
        float share = 1.0f / sum_of_warp(sum);
#pragma unroll
        for (int v = 0; v < VALUES; v++) score[v] *= share;
#endif
        store_row(scores + (long long)row * EXPERTS + first, score);
        store_row(shared.scores + first, score);

        float biased[VALUES], lane_best = NOTHING;
#pragma unroll
        for (int v = 0; v < VALUES; v++) {
#if HAS_BIAS
            biased[v] = score[v] + correction[v];
#else
            biased[v] = score[v];
#endif
            lane_best = fmaxf(lane_best, biased[v]);
        }
#if TOP_GROUPS < GROUPS
        bool kept = group_is_kept(biased, lane);
#else
        const bool kept = true;
#endif
        // Equal maxima leave together, so the threshold may be lower than the TOP_K-th: still one that TOP_K reach.
        int best = kept ? ordered(lane_best) : LEAST, threshold = 0;
#pragma unroll
        for (int k = 0; k < TOP_K; k++) {
            threshold = __reduce_max_sync(EVERYONE, best);
            best = best == threshold ? LEAST : best;
        }
        // Lanes of dropped groups have no candidate: nothing reaches what is not a number.
        float reached = kept ? float_of(threshold) : __int_as_float(0x7fffffff);
        int mine = 0;
#pragma unroll
        for (int v = 0; v < VALUES; v++) mine += biased[v] >= reached;
        int through = running_sum(mine), found = __shfl_sync(EVERYONE, through, 31);

        int place = TOP_K;  // where this lane's candidate goes; TOP_K and more: nowhere
        if (found >= TOP_K && found <= 32) {
            float* next = shared.candidates + (through - mine);
#pragma unroll
            for (int v = 0; v < VALUES; v++) {
                if (biased[v] >= reached) {
                    *next = biased[v];
                    *reinterpret_cast<int*>(next + 32) = first + v;
                    next++;
                }
            }
            __syncwarp();
            float own = shared.candidates[lane];
            place = 0;
#pragma unroll 4
            for (int other = 0; other < found; other++) add_if_greater(place, shared.candidates[other], own);
            unsigned int places = __reduce_or_sync(EVERYONE, lane < found ? 1u << place : 0);
            if (places != EVERYONE >> (32 - found)) {  // equal candidates share a place: the earlier expert goes first
                for (int other = 0; other < min(lane, found); other++) place += shared.candidates[other] == own;
            }
            if (lane >= found) place = TOP_K;
        } else {
            choose_slowly(shared, bias, kept, lane);
            place = lane;
        }

        bool chosen = place < TOP_K;
        int expert = chosen ? shared.experts[lane] : 0;
        float weight = shared.scores[expert];
#if NORMALISE
        // Every lane adds up in the order of the result: the sum does not depend on where candidates lie.
        if (chosen) shared.ranked[place] = weight;
        __syncwarp();
        float total = 1e-20f;
#pragma unroll
        for (int k = 0; k < TOP_K; k++) total += shared.ranked[k];
        weight *= reciprocal(total);
#endif
        if (chosen) {
            experts[(long long)row * TOP_K + place] = expert;
            weights[(long long)row * TOP_K + place] = weight * scaling;
            atomicAdd(&counted[expert], 1u);
        }
        __syncwarp();
    }
#if FEW
    wait_for_cluster();
    for (int expert = blockIdx.x * THREADS + threadIdx.x; expert < EXPERTS; expert += FEW * THREADS) {
        unsigned int sum = 0;
        for (int block = 0; block < FEW; block++) sum += value_of(&counted[expert], block);
        counts[expert] = sum;
    }
    wait_for_cluster();  // no block may leave while others read from it
#else
    __syncthreads();
    for (int expert = threadIdx.x; expert < EXPERTS; expert += THREADS) {
        if (counted[expert]) atomicAdd(&counts[expert], (unsigned long long)counted[expert]);
    }
#endif
}
