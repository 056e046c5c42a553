// Causal attention over packed rows for Hopper: forward, gradient of the queries, gradients of keys and values. wgmma on
// tiles that the copy engine brings, in blocks of three warpgroups: two compute, with 64 rows of the block's own 128
// each, and one that only copies what they walk over.
//
// A query sees the keys from its start up to itself. Starts do not decrease along a row, so what a tile of queries sees
// begins at its first query's start, and the queries that see a tile of keys end with those of its last key; only tiles
// that are not seen whole are masked. Every sum has one order: there are no atomic additions.
//
// Forward: a warpgroup issues the scores of the next tile and the values of this one together, and works on the next
// tile's softmax while the values are multiplied; the two warpgroups take turns at issuing, so that one's softmax runs
// under the other's products (FlashAttention-3, Shah et al. 2024).
//
// Backward: both kernels recompute the weights from the log-sum-exp. The rows of the products are the block's own rows,
// so that weights and score gradients go from the accumulators' registers straight into the next product.
//
// Left out: other dtypes than bfloat16, widths that are no multiple of 64.
//
// The forward also serves new tokens over a slice of a longer context: queries have positions, sequences lengths, the
// keys begin at `offset`, and with a carry the softmax goes on from the slices before.
//
// Defines: KEY_CHUNKS, VALUE_CHUNKS: the widths in units of 64 (at most 3 and 2, keys at least as wide as values).
// STARTS, POSITIONS, CARRY: whether there are such. FLOAT_OUT: the forward's result in float32, as a carry is.
// INDEX_T: int or long long, of starts, positions and lengths.

#include "wgmma.cuh"

constexpr int OWN = 128, HALF = 64, WARPGROUP = 128, THREADS = 3 * WARPGROUP;
constexpr int CONSUMER_WARPS = 2 * WARPGROUP / 32;
constexpr int CHUNK = 64, CHUNK_ROW = CHUNK * 2;  // 64 values of a row are the 128 bytes that a swizzle covers
constexpr int KEY_WIDTH = KEY_CHUNKS * CHUNK, VALUE_WIDTH = VALUE_CHUNKS * CHUNK;
constexpr int OWN_CHUNK = OWN * CHUNK_ROW, HALF_CHUNK = HALF * CHUNK_ROW;
constexpr int FORWARD_STAGES = 2, BACKWARD_STAGES = 3;
constexpr float LOWEST = -1e30f;  // below every score, and finite
constexpr float LOG2_E = 1.4426950408889634f;
constexpr u32 ALL = 0xffffffffu;
#define INFINITE __int_as_float(0x7f800000)

struct ForwardShared {
  char queries[KEY_CHUNKS * OWN_CHUNK];
  char keys[FORWARD_STAGES][KEY_CHUNKS * OWN_CHUNK];
  char values[FORWARD_STAGES][VALUE_CHUNKS * OWN_CHUNK];
  u64 own, keys_full[FORWARD_STAGES], keys_empty[FORWARD_STAGES], values_full[FORWARD_STAGES],
      values_empty[FORWARD_STAGES];
  int4 ranges[OWN / 32];  // of 32 queries: smallest and largest first key, smallest and largest last key
};

struct QueryShared {
  char queries[KEY_CHUNKS * OWN_CHUNK];
  char grads[VALUE_CHUNKS * OWN_CHUNK];
  char keys[BACKWARD_STAGES][KEY_CHUNKS * HALF_CHUNK];
  char values[BACKWARD_STAGES][VALUE_CHUNKS * HALF_CHUNK];
  u64 own, full[BACKWARD_STAGES], empty[BACKWARD_STAGES];
};

struct KeyShared {
  char keys[KEY_CHUNKS * OWN_CHUNK];
  char values[VALUE_CHUNKS * OWN_CHUNK];
  char queries[BACKWARD_STAGES][KEY_CHUNKS * HALF_CHUNK];
  char grads[BACKWARD_STAGES][VALUE_CHUNKS * HALF_CHUNK];
  float sums[BACKWARD_STAGES][HALF], deltas[BACKWARD_STAGES][HALF];
  u64 own, full[BACKWARD_STAGES], empty[BACKWARD_STAGES];
};

// ---- barriers and copies

__device__ __forceinline__ void start_barriers(u64* barriers, int count, int arrivals) {
  for (int i = 0; i < count; i++) barrier_start(barriers + i, arrivals);
}

// Barriers that were started become visible to everyone, the copy engine included.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// ROWS rows of one head, all chunks of its width; zeros beyond the last row. `full` expects the bytes already.
template <int CHUNKS, int ROWS>
__device__ __forceinline__ void copy_rows(const Map* map, char* target, u64* full, int batch, int row, int head) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
        "[%6];" ::"r"(shared_address(target + chunk * ROWS * CHUNK_ROW)),
        "l"(map), "r"(chunk * CHUNK), "r"(head), "r"(row), "r"(batch), "r"(shared_address(full))
        : "memory");
}

// ---- wgmma

// The compiler does not know that a wait changes these registers: nothing that reads them may move before it.
template <int N>
__device__ __forceinline__ void settle(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

// clang-format off
#define G4(x, i) "=f"(x[i]), "=f"(x[i + 1]), "=f"(x[i + 2]), "=f"(x[i + 3])
#define G16(x, i) G4(x, i), G4(x, i + 4), G4(x, i + 8), G4(x, i + 12)
#define REGISTERS_64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define REGISTERS_96 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}"
// clang-format on

// out (64 x 128, or 64 x 64) = a (64 x 16) · bᵀ, both by rows in shared memory; the second adds to what is there.
__device__ __forceinline__ void begin_product(float (&out)[64], u64 a, u64 b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " REGISTERS_64 ", %64, %65, p, 1, 1, 0, 0; }\n"
      : G16(out, 0), G16(out, 16), G16(out, 32), G16(out, 48)
      : "l"(a), "l"(b));
}

__device__ __forceinline__ void begin_product(float (&out)[32], u64 a, u64 b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGISTERS_32 ", %32, %33, p, 1, 1, 0, 0; }\n"
      : G16(out, 0), G16(out, 16)
      : "l"(a), "l"(b));
}

__device__ __forceinline__ void add_product(float (&out)[64], u64 a, u64 b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " REGISTERS_64 ", %64, %65, p, 1, 1, 0, 0; }\n"
      : F16(out, 0), F16(out, 16), F16(out, 32), F16(out, 48)
      : "l"(a), "l"(b));
}

__device__ __forceinline__ void add_product(float (&out)[32], u64 a, u64 b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGISTERS_32 ", %32, %33, p, 1, 1, 0, 0; }\n"
      : F16(out, 0), F16(out, 16)
      : "l"(a), "l"(b));
}

// out (64 x 64, 128 or 192) += a (64 x 16, registers) · b (16 rows in shared memory).
__device__ __forceinline__ void multiply(float (&out)[32], const u32* a, u64 b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGISTERS_32 ", {%32, %33, %34, %35}, %36, p, 1, 1, 1; }\n"
      : F16(out, 0), F16(out, 16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void multiply(float (&out)[64], const u32* a, u64 b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " REGISTERS_64 ", {%64, %65, %66, %67}, %68, p, 1, 1, 1; }\n"
      : F16(out, 0), F16(out, 16), F16(out, 32), F16(out, 48)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void multiply(float (&out)[96], const u32* a, u64 b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 " REGISTERS_96 ", {%96, %97, %98, %99}, %100, p, 1, 1, 1; }\n"
      : F16(out, 0), F16(out, 16), F16(out, 32), F16(out, 48), F16(out, 64), F16(out, 80)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// out = own · walkedᵀ over a width of CHUNKS chunks: 64 rows of a tile of OWN rows, N / 32 · 64 rows of one of WALKED.
template <int CHUNKS, int WALKED, int N>
__device__ __forceinline__ void issue_products(float (&out)[N], const char* own, const char* walked) {
  const u64 a = descriptor(own, 16), b = descriptor(walked, 16);
  wgmma_begin();
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
    for (int step = 0; step < 4; step++) {
      const u64 left = a + ((chunk * OWN_CHUNK + step * 32) >> 4);
      const u64 right = b + ((chunk * WALKED * CHUNK_ROW + step * 32) >> 4);
      if (chunk == 0 && step == 0)
        begin_product(out, left, right);
      else
        add_product(out, left, right);
    }
  wgmma_commit();
}

// out += weights · walked, over the WALKED rows of a tile.
template <int WALKED, int N, int W>
__device__ __forceinline__ void issue_sums(float (&out)[N], const u32 (&weights)[W], const char* walked) {
  const u64 b = descriptor(walked, WALKED * CHUNK_ROW);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < WALKED / 16; step++) multiply(out, weights + 4 * step, b + ((step * 16 * CHUNK_ROW) >> 4));
  wgmma_commit();
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}

// ---- softmax of a tile. A thread has two rows, eight apart: values 4 i and 4 i + 1 of one, 4 i + 2 and 4 i + 3 of the
// other, at columns 8 i + 2 (lane % 4) and the one after.

template <int N>
__device__ __forceinline__ void mask(
    float (&score)[N], int start, const int (&first)[2], const int (&last)[2], float hidden) {
  const int column = start + threadIdx.x % 4 * 2;
  const int from[2] = {first[0] - column, first[1] - column}, to[2] = {last[0] - column, last[1] - column};
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int key = i / 4 * 8 + i % 2, r = i / 2 % 2;
    if (key > to[r] || (STARTS && key < from[r])) score[i] = hidden;
  }
}

// Scores become weights; the new top, the sum so far, and what earlier sums shrink by.
__device__ __forceinline__ void soften(
    float (&score)[64], float scale_log2, float (&top)[2], float (&sum)[2], float (&shrink)[2]) {
  float highest[2] = {score[0], score[2]};
#pragma unroll
  for (int i = 0; i < 64; i++) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], score[i]);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float higher = fmaxf(top[r], quad_max(highest[r]) * scale_log2);
    shrink[r] = power_of_two(top[r] - higher);
    top[r] = higher;
    sum[r] *= shrink[r];
  }
#pragma unroll
  for (int i = 0; i < 64; i++) {
    score[i] = power_of_two(fmaf(score[i], scale_log2, -top[i / 2 % 2]));
    sum[i / 2 % 2] += score[i];
  }
}

template <int N>
__device__ __forceinline__ void to_fragment(u32 (&fragment)[N], const float (&values)[2 * N]) {
#pragma unroll
  for (int i = 0; i < N; i++) fragment[i] = pack(values[2 * i], values[2 * i + 1]);
}

// A warpgroup's 64 rows, each times `factor`, to their place in global memory: through the tile `own` in shared memory,
// which the warpgroup does not need any more, so that rows are written whole. `place`: of the first row; none from `rows` on.
template <int WIDTH>
__device__ __forceinline__ void store_rows(
    char* own, const float (&values)[WIDTH / 2], const float (&factor)[2], bf16* place, int stride, int rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  named_sync(2 + threadIdx.x / WARPGROUP, WARPGROUP);
#pragma unroll
  for (int step = 0; step < WIDTH / 16; step++) {
    const int local = 16 * warp + lane / 8 % 2 * 8 + lane % 8, piece = 2 * (step % 4) + lane / 16;
    u32 part[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      part[i] = pack(values[8 * step + 2 * i] * factor[i % 2], values[8 * step + 2 * i + 1] * factor[i % 2]);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(own + step / 4 * OWN_CHUNK) + local * CHUNK_ROW + ((piece ^ local % 8) << 4)),
                 "r"(part[0]), "r"(part[1]), "r"(part[2]), "r"(part[3])
                 : "memory");
  }
  __syncwarp();
  constexpr int PIECES = WIDTH / 8;  // of 16 bytes in a row
#pragma unroll
  for (int i = lane; i < 16 * PIECES; i += 32) {
    const int local = 16 * warp + i / PIECES, piece = i % PIECES;
    if (local < rows)
      *(uint4*)(place + (long long)local * stride + piece * 8) =
          *(const uint4*)(own + piece / 8 * OWN_CHUNK + local * CHUNK_ROW + ((piece % 8 ^ local % 8) << 4));
  }
}

// First and last key that a query sees, counted from the first key that was given.
struct Queries {
  const INDEX_T *starts, *positions;
  int length, rows, keys, offset;

  __device__ __forceinline__ int first(int row) const {
    return STARTS ? max((int)starts[min(row, rows - 1)] - offset, 0) : 0;
  }
  __device__ __forceinline__ int last(int row) const {
    return POSITIONS ? min(min((int)positions[min(row, rows - 1)], length - 1) - offset, keys - 1) : row;
  }
};

// Values beyond the last key that is seen may be anything, and 0 · NaN is NaN: make them zero. Each warpgroup does it
// for itself, before it reads them.
__device__ __forceinline__ void clear_values(char* values, int from) {
  for (int i = threadIdx.x % WARPGROUP; i < (OWN - max(from, 0)) * VALUE_CHUNKS * 8; i += WARPGROUP) {
    const int row = max(from, 0) + i / (VALUE_CHUNKS * 8), piece = i % (VALUE_CHUNKS * 8);
    *(uint4*)(values + piece / 8 * OWN_CHUNK + row * CHUNK_ROW + piece % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  named_sync(2 + threadIdx.x / WARPGROUP, WARPGROUP);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) packed_attention_forward(
    const __grid_constant__ Map q_map, const __grid_constant__ Map k_map, const __grid_constant__ Map v_map,
    const INDEX_T* starts, const INDEX_T* positions, const INDEX_T* lengths, const float* carry,
    const float* carry_sums, void* out, float* sums, int rows, int keys, int offset, int heads, int group,
    float scale_log2) {
  extern __shared__ __align__(1024) char raw[];
  ForwardShared& shared = *(ForwardShared*)raw;
  // The last tiles have the most keys: they go first, so that short ones fill the gaps at the end.
  const int row = (gridDim.x - 1 - blockIdx.x) * OWN, batch = blockIdx.y / heads, head = blockIdx.y % heads;
  const int warpgroup = threadIdx.x / WARPGROUP;
  const Queries sight = {
      starts + (long long)batch * rows, positions + (long long)batch * rows, POSITIONS ? (int)lengths[batch] : rows,
      rows, keys, offset};

  if (threadIdx.x == 0) {
    start_barriers(&shared.own, 1, 1);
    start_barriers(shared.keys_full, FORWARD_STAGES, 1);
    start_barriers(shared.values_full, FORWARD_STAGES, 1);
    start_barriers(shared.keys_empty, FORWARD_STAGES, CONSUMER_WARPS);
    start_barriers(shared.values_empty, FORWARD_STAGES, CONSUMER_WARPS);
    publish_barriers();
  }
  if (POSITIONS && threadIdx.x < OWN) {  // padding has position 0: nothing here grows along a row
    const int first = sight.first(row + threadIdx.x), last = sight.last(row + threadIdx.x);
    const int4 range = make_int4(
        __reduce_min_sync(ALL, first), __reduce_max_sync(ALL, first), __reduce_min_sync(ALL, last),
        __reduce_max_sync(ALL, last));
    if (threadIdx.x % 32 == 0) shared.ranges[threadIdx.x / 32] = range;
  }
  __syncthreads();
  int begin = sight.first(row), end = min(row + OWN, rows);
  if (POSITIONS) {
    const int4 *r = shared.ranges;
    begin = min(min(r[0].x, r[1].x), min(r[2].x, r[3].x));
    end = max(max(r[0].w, r[1].w), max(r[2].w, r[3].w)) + 1;
  }
  const int tiles = max((end - begin + OWN - 1) / OWN, 1);

  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      barrier_expect(&shared.own, sizeof(shared.queries));
      copy_rows<KEY_CHUNKS, OWN>(&q_map, shared.queries, &shared.own, batch, row, head);
      for (int tile = 0; tile < tiles; tile++) {
        const int stage = tile % FORWARD_STAGES, start = begin + tile * OWN;
        const u32 parity = tile / FORWARD_STAGES % 2 ^ 1;
        barrier_wait(&shared.keys_empty[stage], parity);
        barrier_expect(&shared.keys_full[stage], sizeof(shared.keys[0]));
        copy_rows<KEY_CHUNKS, OWN>(
            &k_map, shared.keys[stage], &shared.keys_full[stage], batch, start, head / group);
        barrier_wait(&shared.values_empty[stage], parity);
        barrier_expect(&shared.values_full[stage], sizeof(shared.values[0]));
        copy_rows<VALUE_CHUNKS, OWN>(
            &v_map, shared.values[stage], &shared.values_full[stage], batch, start, head / group);
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  const int mine = warpgroup - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool speaker = lane == 0;
  const int my_row = row + mine * HALF;
  int my_rows[2], last[2], first[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    my_rows[r] = my_row + warp * 16 + r * 8 + lane / 4;
    last[r] = sight.last(my_rows[r]);
    first[r] = sight.first(my_rows[r]);
  }
  // What every query of the warpgroup sees.
  int whole_begin = sight.first(my_row + HALF - 1), whole_end = my_row + 1;
  if (POSITIONS) {
    const int4 *r = shared.ranges + 2 * mine;
    whole_begin = max(r[0].y, r[1].y);
    whole_end = min(r[0].z, r[1].z) + 1;
  }
  char* queries = shared.queries + mine * HALF_CHUNK;

  float score[64], mixed[VALUE_WIDTH / 2], top[2] = {LOWEST, LOWEST}, sum[2] = {0.f, 0.f}, shrink[2];
  u32 weights[32];
#pragma unroll
  for (int i = 0; i < VALUE_WIDTH / 2; i++) mixed[i] = 0.f;
  const int stride = heads * VALUE_WIDTH;
  const long long place = (((long long)batch * rows + my_row) * heads + head) * VALUE_WIDTH;
  if (CARRY) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (my_rows[r] >= rows) continue;
      const float carried = carry_sums[(long long)blockIdx.y * rows + my_rows[r]];
      top[r] = fmaxf(carried * LOG2_E, LOWEST);
      sum[r] = carried > -INFINITE && lane % 4 == 0 ? 1.f : 0.f;  // of a row's four threads one has it
      const float2* from = (const float2*)(carry + place + (long long)(my_rows[r] - my_row) * stride) + lane % 4;
#pragma unroll
      for (int i = 0; i < VALUE_WIDTH / 8; i++) {
        const float2 pair = from[4 * i];
        mixed[4 * i + 2 * r] = pair.x;
        mixed[4 * i + 2 * r + 1] = pair.y;
      }
    }
  }

  if (mine == 1) named_arrive(1, 2 * WARPGROUP);  // the first warpgroup issues first
  barrier_wait(&shared.own, 0);
  barrier_wait(&shared.keys_full[0], 0);
  named_sync(1 + mine, 2 * WARPGROUP);
  issue_products<KEY_CHUNKS, OWN>(score, queries, shared.keys[0]);
  named_arrive(2 - mine, 2 * WARPGROUP);
  wgmma_wait<0>();
  settle(score);
  if (speaker) barrier_arrive(&shared.keys_empty[0]);
  if (begin < whole_begin || begin + OWN > whole_end) mask(score, begin, first, last, -INFINITE);
  soften(score, scale_log2, top, sum, shrink);
  if (CARRY) {
#pragma unroll
    for (int i = 0; i < VALUE_WIDTH / 2; i++) mixed[i] *= shrink[i / 2 % 2];
  }
  to_fragment(weights, score);

  for (int tile = 1; tile < tiles; tile++) {
    const int stage = tile % FORWARD_STAGES, start = begin + tile * OWN, before = (tile - 1) % FORWARD_STAGES;
    barrier_wait(&shared.keys_full[stage], tile / FORWARD_STAGES % 2);
    named_sync(1 + mine, 2 * WARPGROUP);
    issue_products<KEY_CHUNKS, OWN>(score, queries, shared.keys[stage]);
    barrier_wait(&shared.values_full[before], (tile - 1) / FORWARD_STAGES % 2);
    issue_sums<OWN>(mixed, weights, shared.values[before]);
    named_arrive(2 - mine, 2 * WARPGROUP);
    wgmma_wait<1>();
    settle(score);
    if (speaker) barrier_arrive(&shared.keys_empty[stage]);
    if (start < whole_begin || start + OWN > whole_end) mask(score, start, first, last, -INFINITE);
    soften(score, scale_log2, top, sum, shrink);
    wgmma_wait<0>();
    settle(mixed);
    if (speaker) barrier_arrive(&shared.values_empty[before]);
#pragma unroll
    for (int i = 0; i < VALUE_WIDTH / 2; i++) mixed[i] *= shrink[i / 2 % 2];
    to_fragment(weights, score);
  }
  const int final = (tiles - 1) % FORWARD_STAGES;
  barrier_wait(&shared.values_full[final], (tiles - 1) / FORWARD_STAGES % 2);
  if (POSITIONS) clear_values(shared.values[final], end - begin - (tiles - 1) * OWN);
  issue_sums<OWN>(mixed, weights, shared.values[final]);
#pragma unroll
  for (int r = 0; r < 2; r++) sum[r] = quad_sum(sum[r]);
  wgmma_wait<0>();
  settle(mixed);
  if (mine == 0) named_sync(1, 2 * WARPGROUP);  // the other's last arrival

#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (my_rows[r] < rows && lane % 4 == 0)
      sums[(long long)blockIdx.y * rows + my_rows[r]] =
          POSITIONS && sum[r] == 0.f ? -INFINITE : (top[r] + log2f(sum[r])) / LOG2_E;
    shrink[r] = POSITIONS && sum[r] == 0.f ? 0.f : 1.f / sum[r];
  }
  if (FLOAT_OUT) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (my_rows[r] >= rows) continue;
      float2* to = (float2*)((float*)out + place + (long long)(my_rows[r] - my_row) * stride) + lane % 4;
#pragma unroll
      for (int i = 0; i < VALUE_WIDTH / 8; i++)
        to[4 * i] = make_float2(mixed[4 * i + 2 * r] * shrink[r], mixed[4 * i + 2 * r + 1] * shrink[r]);
    }
  } else {
    store_rows<VALUE_WIDTH>(queries, mixed, shrink, (bf16*)out + place, stride, rows - my_row);
  }
}

// ---- gradients

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Σ of the products of eight pairs of bfloat16.
__device__ __forceinline__ float dot(uint4 a, uint4 b) {
  return low(a.x) * low(b.x) + high(a.x) * high(b.x) + low(a.y) * low(b.y) + high(a.y) * high(b.y) +
         low(a.z) * low(b.z) + high(a.z) * high(b.z) + low(a.w) * low(b.w) + high(a.w) * high(b.w);
}

// Scores of 64 queries and 64 keys become weights; a row is a query.
__device__ __forceinline__ void weigh(
    float (&score)[32], int start, bool ragged, const int (&first)[2], const int (&last)[2], float scale_log2,
    const float (&sum)[2]) {
#pragma unroll
  for (int i = 0; i < 32; i++) score[i] = power_of_two(fmaf(score[i], scale_log2, -sum[i / 2 % 2]));
  if (ragged) mask(score, start, first, last, 0.f);
}

// The same where a row is a key, seen by the queries key ... end - 1.
__device__ __forceinline__ void weigh_keys(
    float (&score)[32], int start, bool ragged, const int (&key)[2], const int (&end)[2], float scale_log2,
    const float* sums) {
  const float2* my_sums = (const float2*)sums + threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float2 sum = my_sums[4 * i];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      score[4 * i + 2 * r] = power_of_two(fmaf(score[4 * i + 2 * r], scale_log2, -sum.x));
      score[4 * i + 2 * r + 1] = power_of_two(fmaf(score[4 * i + 2 * r + 1], scale_log2, -sum.y));
    }
  }
  if (ragged) {
    const int column = start + threadIdx.x % 4 * 2;
    const int from[2] = {key[0] - column, key[1] - column}, to[2] = {end[0] - column, end[1] - column};
#pragma unroll
    for (int i = 0; i < 32; i++)
      if (i / 4 * 8 + i % 2 < from[i / 2 % 2] || i / 4 * 8 + i % 2 >= to[i / 2 % 2]) score[i] = 0.f;
  }
}

// dq, and delta = Σ dout · out of each query, which the other kernel needs too.
extern "C" __global__ void __launch_bounds__(THREADS, 1) packed_attention_query_gradient(
    const __grid_constant__ Map q_map, const __grid_constant__ Map grad_map, const __grid_constant__ Map k_map,
    const __grid_constant__ Map v_map, const INDEX_T* starts, const bf16* out, const float* sums, float* delta,
    bf16* dq, int rows, int heads, int group, float scale) {
  extern __shared__ __align__(1024) char raw[];
  QueryShared& shared = *(QueryShared*)raw;
  const int row = (gridDim.x - 1 - blockIdx.x) * OWN, batch = blockIdx.y / heads, head = blockIdx.y % heads;
  const INDEX_T* my_starts = starts + (long long)batch * rows;
  const int begin = STARTS ? (int)my_starts[row] : 0, end = min(row + OWN, rows);
  const int tiles = (end - begin + HALF - 1) / HALF;
  const int warpgroup = threadIdx.x / WARPGROUP;

  if (threadIdx.x == 0) {
    start_barriers(&shared.own, 1, 1);
    start_barriers(shared.full, BACKWARD_STAGES, 1);
    start_barriers(shared.empty, BACKWARD_STAGES, CONSUMER_WARPS);
    publish_barriers();
  }
  __syncthreads();

  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) {
      barrier_expect(&shared.own, sizeof(shared.queries) + sizeof(shared.grads));
      copy_rows<VALUE_CHUNKS, OWN>(&grad_map, shared.grads, &shared.own, batch, row, head);
      copy_rows<KEY_CHUNKS, OWN>(&q_map, shared.queries, &shared.own, batch, row, head);
      for (int tile = 0; tile < tiles; tile++) {
        const int stage = tile % BACKWARD_STAGES, start = begin + tile * HALF;
        u64* full = &shared.full[stage];
        barrier_wait(&shared.empty[stage], tile / BACKWARD_STAGES % 2 ^ 1);
        barrier_expect(full, sizeof(shared.keys[0]) + sizeof(shared.values[0]));
        copy_rows<KEY_CHUNKS, HALF>(&k_map, shared.keys[stage], full, batch, start, head / group);
        copy_rows<VALUE_CHUNKS, HALF>(&v_map, shared.values[stage], full, batch, start, head / group);
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  const int mine = warpgroup - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool speaker = lane == 0;
  const int my_row = row + mine * HALF;
  char *queries = shared.queries + mine * HALF_CHUNK, *grads = shared.grads + mine * HALF_CHUNK;
  const int whole_begin = STARTS ? (int)my_starts[min(my_row + HALF - 1, rows - 1)] : 0;
  int last[2], first[2];
  float sum[2], my_delta[2];
  barrier_wait(&shared.own, 0);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int local = warp * 16 + r * 8 + lane / 4;
    last[r] = my_row + local;
    const int real = min(last[r], rows - 1);
    first[r] = STARTS ? (int)my_starts[real] : 0;
    sum[r] = sums[(long long)blockIdx.y * rows + real] * LOG2_E;
    const bf16* my_out = out + (((long long)batch * rows + real) * heads + head) * VALUE_WIDTH;
    float total = 0.f;
#pragma unroll
    for (int piece = lane % 4; piece < VALUE_WIDTH / 8; piece += 4)
      total += dot(
          *(const uint4*)(my_out + piece * 8),
          *(const uint4*)(grads + piece / 8 * OWN_CHUNK + local * CHUNK_ROW + ((piece % 8 ^ local % 8) << 4)));
    my_delta[r] = quad_sum(total);
    if (last[r] < rows && lane % 4 == 0) delta[(long long)blockIdx.y * rows + last[r]] = my_delta[r];
  }

  const float scale_log2 = scale * LOG2_E;
  float score[32], slope[32], gradient[KEY_WIDTH / 2];
  u32 fragment[16];
#pragma unroll
  for (int i = 0; i < KEY_WIDTH / 2; i++) gradient[i] = 0.f;
  barrier_wait(&shared.full[0], 0);
  issue_products<KEY_CHUNKS, HALF>(score, queries, shared.keys[0]);
  issue_products<VALUE_CHUNKS, HALF>(slope, grads, shared.values[0]);
  wgmma_wait<0>();
  settle(score);
  settle(slope);
  weigh(score, begin, begin < whole_begin || begin + HALF > my_row + 1, first, last, scale_log2, sum);
#pragma unroll
  for (int i = 0; i < 32; i++) score[i] *= slope[i] - my_delta[i / 2 % 2];
  to_fragment(fragment, score);
  for (int tile = 1; tile < tiles; tile++) {
    const int stage = tile % BACKWARD_STAGES, before = (tile - 1) % BACKWARD_STAGES, start = begin + tile * HALF;
    barrier_wait(&shared.full[stage], tile / BACKWARD_STAGES % 2);
    issue_products<KEY_CHUNKS, HALF>(score, queries, shared.keys[stage]);
    issue_products<VALUE_CHUNKS, HALF>(slope, grads, shared.values[stage]);
    issue_sums<HALF>(gradient, fragment, shared.keys[before]);
    wgmma_wait<2>();
    settle(score);
    weigh(score, start, start < whole_begin || start + HALF > my_row + 1, first, last, scale_log2, sum);
    wgmma_wait<1>();
    settle(slope);
#pragma unroll
    for (int i = 0; i < 32; i++) score[i] *= slope[i] - my_delta[i / 2 % 2];
    wgmma_wait<0>();
    settle(gradient);
    if (speaker) barrier_arrive(&shared.empty[before]);
    to_fragment(fragment, score);
  }
  issue_sums<HALF>(gradient, fragment, shared.keys[(tiles - 1) % BACKWARD_STAGES]);
  wgmma_wait<0>();
  settle(gradient);
  const float scales[2] = {scale, scale};
  store_rows<KEY_WIDTH>(
      queries, gradient, scales, dq + (((long long)batch * rows + my_row) * heads + head) * KEY_WIDTH,
      heads * KEY_WIDTH, rows - my_row);
}

// dk and dv. Key n is seen by the queries n ... ends[n] - 1 of every head of its group.
extern "C" __global__ void __launch_bounds__(THREADS, 1) packed_attention_key_gradient(
    const __grid_constant__ Map q_map, const __grid_constant__ Map grad_map, const __grid_constant__ Map k_map,
    const __grid_constant__ Map v_map, const int* ends, const float* sums, const float* delta, bf16* dk, bf16* dv,
    int rows, int heads, int group, float scale) {
  extern __shared__ __align__(1024) char raw[];
  KeyShared& shared = *(KeyShared*)raw;
  const int kv_heads = heads / group, batch = blockIdx.y / kv_heads, kv_head = blockIdx.y % kv_heads;
  const int row = blockIdx.x * OWN;  // the first keys are seen most, and go first
  const int* my_ends = ends + (long long)batch * rows;
  const int end = STARTS ? my_ends[min(row + OWN - 1, rows - 1)] : rows;
  const int steps = (end - row + HALF - 1) / HALF, tiles = group * steps;
  const int warpgroup = threadIdx.x / WARPGROUP;

  if (threadIdx.x == 0) {
    start_barriers(&shared.own, 1, 1);
    start_barriers(shared.full, BACKWARD_STAGES, 2);
    start_barriers(shared.empty, BACKWARD_STAGES, CONSUMER_WARPS);
    publish_barriers();
  }
  __syncthreads();

  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x < 32) {
      if (threadIdx.x == 0) {
        barrier_expect(&shared.own, sizeof(shared.keys) + sizeof(shared.values));
        copy_rows<KEY_CHUNKS, OWN>(&k_map, shared.keys, &shared.own, batch, row, kv_head);
        copy_rows<VALUE_CHUNKS, OWN>(&v_map, shared.values, &shared.own, batch, row, kv_head);
      }
      for (int tile = 0; tile < tiles; tile++) {
        const int stage = tile % BACKWARD_STAGES, start = row + tile % steps * HALF;
        const int head = kv_head * group + tile / steps;
        u64* full = &shared.full[stage];
        barrier_wait(&shared.empty[stage], tile / BACKWARD_STAGES % 2 ^ 1);
        if (threadIdx.x == 0) {
          barrier_expect(full, sizeof(shared.queries[0]) + sizeof(shared.grads[0]));
          copy_rows<KEY_CHUNKS, HALF>(&q_map, shared.queries[stage], full, batch, start, head);
          copy_rows<VALUE_CHUNKS, HALF>(&grad_map, shared.grads[stage], full, batch, start, head);
        }
#pragma unroll
        for (int i = threadIdx.x; i < HALF; i += 32) {
          const long long place = ((long long)batch * heads + head) * rows + min(start + i, rows - 1);
          shared.sums[stage][i] = sums[place] * LOG2_E;
          shared.deltas[stage][i] = delta[place];
        }
        __syncwarp();
        if (threadIdx.x == 0) barrier_arrive(full);
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  const int mine = warpgroup - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const bool speaker = lane == 0;
  const int my_row = row + mine * HALF;
  char *keys = shared.keys + mine * HALF_CHUNK, *values = shared.values + mine * HALF_CHUNK;
  const int whole_end = STARTS ? my_ends[min(my_row, rows - 1)] : rows;
  int key[2], my_end[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    key[r] = my_row + warp * 16 + r * 8 + lane / 4;
    my_end[r] = STARTS ? my_ends[min(key[r], rows - 1)] : rows;
  }

  const float scale_log2 = scale * LOG2_E;
  float score[32], slope[32], key_gradient[KEY_WIDTH / 2], value_gradient[VALUE_WIDTH / 2];
  u32 fragment[16];
#pragma unroll
  for (int i = 0; i < KEY_WIDTH / 2; i++) key_gradient[i] = 0.f;
#pragma unroll
  for (int i = 0; i < VALUE_WIDTH / 2; i++) value_gradient[i] = 0.f;
  barrier_wait(&shared.own, 0);
  barrier_wait(&shared.full[0], 0);
  issue_products<KEY_CHUNKS, HALF>(score, keys, shared.queries[0]);
  wgmma_wait<0>();
  settle(score);
  weigh_keys(score, row, true, key, my_end, scale_log2, shared.sums[0]);
  for (int tile = 0, stage = 0;;) {
    to_fragment(fragment, score);
    issue_products<VALUE_CHUNKS, HALF>(slope, values, shared.grads[stage]);
    issue_sums<HALF>(value_gradient, fragment, shared.grads[stage]);
    wgmma_wait<0>();
    settle(slope);
    settle(value_gradient);
    const float2* my_deltas = (const float2*)shared.deltas[stage] + lane % 4;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float2 shift = my_deltas[4 * i];
#pragma unroll
      for (int r = 0; r < 2; r++)
        // From the weights as the products see them, in bfloat16, and in their place: registers are what is short.
        fragment[2 * i + r] = pack(
            low(fragment[2 * i + r]) * (slope[4 * i + 2 * r] - shift.x),
            high(fragment[2 * i + r]) * (slope[4 * i + 2 * r + 1] - shift.y));
    }
    if (++tile == tiles) break;

    const int before = stage, start = row + tile % steps * HALF;
    stage = tile % BACKWARD_STAGES;
    barrier_wait(&shared.full[stage], tile / BACKWARD_STAGES % 2);
    issue_products<KEY_CHUNKS, HALF>(score, keys, shared.queries[stage]);
    issue_sums<HALF>(key_gradient, fragment, shared.queries[before]);
    wgmma_wait<1>();
    settle(score);
    const bool ragged = start < my_row + HALF - 1 || start + HALF > whole_end;
    weigh_keys(score, start, ragged, key, my_end, scale_log2, shared.sums[stage]);
    wgmma_wait<0>();
    settle(key_gradient);
    if (speaker) barrier_arrive(&shared.empty[before]);
  }
  issue_sums<HALF>(key_gradient, fragment, shared.queries[(tiles - 1) % BACKWARD_STAGES]);
  wgmma_wait<0>();
  settle(key_gradient);
  const float scales[2] = {scale, scale}, ones[2] = {1.f, 1.f};
  const long long place = ((long long)batch * rows + my_row) * kv_heads + kv_head;
  store_rows<KEY_WIDTH>(keys, key_gradient, scales, dk + place * KEY_WIDTH, kv_heads * KEY_WIDTH, rows - my_row);
  store_rows<VALUE_WIDTH>(values, value_gradient, ones, dv + place * VALUE_WIDTH, kv_heads * VALUE_WIDTH, rows - my_row);
}
