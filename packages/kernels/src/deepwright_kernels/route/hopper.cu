// The router on Hopper: a warp for each row, everything about the row in the warp's registers.
//
// A lane holds VALUES neighbouring experts, so a group of experts is a few neighbouring lanes. The best TOP_K are found
// without sorting: the TOP_K-th largest of the lanes' maxima is a threshold that at least TOP_K experts reach and
// hardly more; those are compacted, one a lane, in the order of experts, and each counts how many beat it. That number
// is its place in the result. Where more experts than lanes reach the threshold (many equal scores), a slower loop
// takes one maximum after the other. Equal scores: the lowest expert wins, in both.
//
// Counts are added up in shared memory and then, by integer atomics, in memory: the sum does not depend on the order.
// For few rows (FEW) one cluster of blocks does everything: they add up each other's counts and write the sums, so that
// nothing has to be cleared by a launch of its own.
//
// Defined from outside: EXPERTS (a multiple of 32), GROUPS, TOP_GROUPS (fewer than GROUPS, or both 1), GROUP_BEST (1 or
// 2), TOP_K (at most 32), SIGMOID, NORMALISE, HAS_BIAS, THREADS, FEW (0, or how many
// blocks there are).

#define VALUES (EXPERTS / 32)
#define LANES_OF_GROUP (32 / GROUPS)
#define EVERYONE 0xffffffffu
#define LOG2_E 1.4426950408889634f
#define NOTHING __int_as_float(0xff800000)  // -inf

struct Candidate {
    float biased, score;
    int expert;
};

// Integers that compare as the floats do, and back.
__device__ __forceinline__ int ordered(float value) {
    int bits = __float_as_int(value);
    return bits ^ ((bits >> 31) & 0x7fffffff);
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
    int better = 0, group = lane / LANES_OF_GROUP;
#pragma unroll
    for (int other = 0; other < GROUPS; other++) {
        float its_worth = __shfl_sync(EVERYONE, worth, other * LANES_OF_GROUP);
        better += its_worth > worth || (its_worth == worth && other < group);
    }
    return better < TOP_GROUPS;
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
    __shared__ Candidate candidates_of_warp[THREADS / 32][32];
    __shared__ unsigned int counted[EXPERTS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Candidate* candidates = candidates_of_warp[warp];
    int first = lane * VALUES;
    for (int expert = threadIdx.x; expert < EXPERTS; expert += THREADS) counted[expert] = 0;
    __syncthreads();

#if HAS_BIAS
    float correction[VALUES];
    load_row(correction, bias + first);
#endif
    // Neighbouring rows go to different blocks, so that few rows still use many processors.
    int row = warp * gridDim.x + blockIdx.x, rows = gridDim.x * (THREADS / 32);
    float score[VALUES], next[VALUES];
    if (row < tokens) load_row(next, logits + (long long)row * EXPERTS + first);
    for (; row < tokens; row += rows) {
#pragma unroll
        for (int v = 0; v < VALUES; v++) score[v] = next[v];
        if (row + rows < tokens) load_row(next, logits + (long long)(row + rows) * EXPERTS + first);
#if SIGMOID
#pragma unroll
        for (int v = 0; v < VALUES; v++) score[v] = reciprocal(1.0f + exponential(-score[v]));
#else
        int highest = ordered(score[0]);
#pragma unroll
        for (int v = 1; v < VALUES; v++) highest = max(highest, ordered(score[v]));
        highest = __reduce_max_sync(EVERYONE, highest);
        float top = __int_as_float(highest ^ ((highest >> 31) & 0x7fffffff)), sum = 0.0f;
#pragma unroll
        for (int v = 0; v < VALUES; v++) {
            score[v] = exponential(score[v] - top);
            sum += score[v];
        }
        float share = 1.0f / sum_of_warp(sum);
#pragma unroll
        for (int v = 0; v < VALUES; v++) score[v] *= share;
#endif
        store_row(scores + (long long)row * EXPERTS + first, score);

        float biased[VALUES], lane_best;
#pragma unroll
        for (int v = 0; v < VALUES; v++) {
#if HAS_BIAS
            biased[v] = score[v] + correction[v];
#else
            biased[v] = score[v];
#endif
            // What is not a number becomes the least one: TOP_K experts are found in any case.
            biased[v] = fmaxf(biased[v], -3.4028234e38f);
        }
#if TOP_GROUPS < GROUPS
        bool kept = group_is_kept(biased, lane);
#pragma unroll
        for (int v = 0; v < VALUES; v++) biased[v] = kept ? biased[v] : NOTHING;
#endif
        lane_best = biased[0];
#pragma unroll
        for (int v = 1; v < VALUES; v++) lane_best = fmaxf(lane_best, biased[v]);

        // Equal maxima leave together, so the threshold may be lower than the TOP_K-th: still one that TOP_K reach.
        int best = ordered(lane_best), threshold_bits = 0;
#pragma unroll
        for (int k = 0; k < TOP_K; k++) {
            threshold_bits = __reduce_max_sync(EVERYONE, best);
            best = best == threshold_bits ? (int)0x80000000 : best;
        }
        float threshold = threshold_bits == (int)0x80000000
                              ? NOTHING
                              : __int_as_float(threshold_bits ^ ((threshold_bits >> 31) & 0x7fffffff));
        int mine = 0;
#pragma unroll
        for (int v = 0; v < VALUES; v++) mine += biased[v] >= threshold;
        int before = mine;
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) {
            int lower = __shfl_up_sync(EVERYONE, before, step);
            before += lane >= step ? lower : 0;
        }
        int found = __shfl_sync(EVERYONE, before, 31);
        before -= mine;

        int place = TOP_K;  // where this lane's candidate goes; TOP_K: nowhere
        if (found <= 32) {
#pragma unroll
            for (int v = 0; v < VALUES; v++) {
                if (biased[v] >= threshold) {
                    candidates[before] = Candidate{biased[v], score[v], first + v};
                    before++;
                }
            }
            __syncwarp();
            if (lane < found) {
                float own = candidates[lane].biased;
                place = 0;
                for (int other = 0; other < found; other++) {
                    float its = candidates[other].biased;
                    place += its > own || (its == own && other < lane);
                }
            }
        } else {
            unsigned int taken = 0;
            for (int k = 0; k < TOP_K; k++) {
                int value = (int)0x80000000, where = 0;
#pragma unroll
                for (int v = VALUES - 1; v >= 0; v--) {
                    int here = ordered(biased[v]);
                    if (!(taken >> v & 1) && here >= value) value = here, where = v;
                }
                int highest_value = __reduce_max_sync(EVERYONE, value);
                int winner = __ffs(__ballot_sync(EVERYONE, value == highest_value)) - 1;
                if (lane == winner) {
#pragma unroll
                    for (int v = 0; v < VALUES; v++) {
                        if (v == where) candidates[k] = Candidate{biased[v], score[v], first + v};
                    }
                    taken |= 1u << where;
                }
            }
            __syncwarp();
            place = lane;
        }

        bool chosen = place < TOP_K;
        float weight = chosen ? candidates[lane].score : 0.0f;
        int expert = candidates[lane].expert;
#if NORMALISE
        // Every lane adds up in the order of the result: the sum does not depend on where candidates lie.
        float ranked = 0.0f;
        __syncwarp();
        if (chosen) candidates[place].score = weight;
        __syncwarp();
#pragma unroll
        for (int k = 0; k < TOP_K; k++) ranked += candidates[k].score;
        weight = weight / (ranked + 1e-20f);
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
