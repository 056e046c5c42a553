// Absorbed decode over a paged latent cache for Hopper: wgmma on pages that the copy engine brings, two warpgroups.
//
// A block owns 64 rows (a row is one head of one query) and goes through the keys of one sequence after the other.
// 64 x 512 sums in float32 are as much as two warpgroups can hold in registers, so warpgroup 0 sums the left half of the
// latents and warpgroup 1 the right half. Keys come in pages of 64, two in shared memory at a time beside the queries
// (3 x 72 KiB). Warpgroup 0 scores the even page, warpgroup 1 the odd one, and each hands its weights to the other
// through the page's rope part, which nobody needs once the scores are there. So one's softmax runs while the other
// multiplies. Four more warps keep the copies going: each refills a quarter of the two pages as soon as its last reader
// is done.
//
// The pages of all sequences stand in one row, of which every group of blocks takes an equal share (`share_of`); what a
// group has of a sequence that it does not have as a whole is combined by a second kernel.
//
// Left out: FP8 latents, other widths than 512 + 64, other pages than 64.
//
// Defines: BLOCKS_T, POSITIONS_T, LENGTHS_T: int or long long, the integers of the three index tensors.

#include "wgmma.cuh"

constexpr int ROWS = 64, PAGE = 64, LATENT = 512, ROPE = 64;
constexpr int HALF = LATENT / 2;                       // what a warpgroup sums
constexpr int CHUNK = 64;                              // values of a row that a 128-byte swizzle covers
constexpr int CHUNKS = (LATENT + ROPE) / CHUNK, HALF_CHUNKS = HALF / CHUNK, ROPE_CHUNK = LATENT / CHUNK;
constexpr int CHUNK_BYTES = ROWS * CHUNK * 2, TILE_BYTES = CHUNKS * CHUNK_BYTES;
constexpr int WARPGROUP = 128, CONSUMERS = 2 * WARPGROUP, THREADS = 3 * WARPGROUP;
constexpr int SETUP = 3;                               // what a sequence costs beyond its pages, counted in pages
constexpr int SMALLEST = 6;                            // units of work below which sharing out costs more than it gives
constexpr float LOWEST = -1e30f;                       // below every score, and no NaN when subtracted from itself
constexpr u32 ALL = 0xffffffffu;
#define NOTHING __int_as_float(0xff800000)             // minus infinity

// Named barriers. 0 is __syncthreads.
enum { BOTH = 1, OWN = 2, EVEN_TOP = 4, ODD_WEIGHTS = 5, EVEN_WEIGHTS = 6 };

struct Shared {
  char queries[TILE_BYTES];
  char keys[2][TILE_BYTES];
  float top[2][ROWS];
  float sum[2][ROWS];
  u64 full[2][CHUNKS];
  u64 empty[2][2];  // [page][left or right half of the latents]
};

static_assert(sizeof(Shared) <= 3 * TILE_BYTES + 2048, "the host asks for too little shared memory");

// ---- barriers and copies

// What ordinary stores left in shared memory becomes visible to wgmma and the copy engine.
__device__ __forceinline__ void publish_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void copy_chunk(const Map* map, char* target, u64* full, int chunk, int slot) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(full)), "r"(CHUNK_BYTES)
               : "memory");
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(target)),
      "l"(map), "r"(chunk * CHUNK), "r"(slot), "r"(shared_address(full))
      : "memory");
}

// A line of memory into the L2.
__device__ __forceinline__ void fetch(const char* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// ---- wgmma

// clang-format off
#define F64(x, i) F16(x, i), F16(x, i + 16), F16(x, i + 32), F16(x, i + 48)
#define REGISTERS_128 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"
// clang-format on

// score (64 x 64) = queries (64 x 16) · keysᵀ, added to what is there unless `first`.
__device__ __forceinline__ void multiply_scores(float (&score)[32], u64 queries, u64 keys, bool first) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGISTERS_32 ", %32, %33, p, 1, 1, 0, 0; }\n"
      : F16(score, 0), F16(score, 16)
      : "l"(queries), "l"(keys), "r"((int)!first));
}

// out (64 x 256) += weights (64 x 16, registers) · latents (16 x 256).
__device__ __forceinline__ void multiply_values(float (&out)[128], const u32* weights, u64 latents) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " REGISTERS_128
      ", {%128, %129, %130, %131}, %132, p, 1, 1, 1; }\n"
      : F64(out, 0), F64(out, 64)
      : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(latents));
}

// The same with weights in shared memory.
__device__ __forceinline__ void multiply_values(float (&out)[128], u64 weights, u64 latents) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " REGISTERS_128 ", %128, %129, p, 1, 1, 0, 1; }\n"
      : F64(out, 0), F64(out, 64)
      : "l"(weights), "l"(latents));
}

// score = queries · pageᵀ, chunk by chunk as the copies arrive. `half`: which half of the latents comes first.
__device__ __forceinline__ void score_page(
    float (&score)[32], const char* queries, const char* page, u64* full, u32 parity, int half) {
  const u64 q = descriptor(queries, 16), k = descriptor(page, 16);
  wgmma_begin();
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    const int chunk = i == ROPE_CHUNK ? i : (i + half * HALF_CHUNKS) % ROPE_CHUNK;
    barrier_wait(full + chunk, parity);
#pragma unroll
    for (int step = 0; step < 4; step++) {
      const int offset = (chunk * CHUNK_BYTES + step * 32) >> 4;
      multiply_scores(score, q + offset, k + offset, i == 0 && step == 0);
    }
  }
  wgmma_commit();
}

// out += weights · half of the page's latents.
__device__ __forceinline__ void sum_values(float (&out)[128], const u32 (&weights)[16], const char* latents) {
  const u64 v = descriptor(latents, CHUNK_BYTES);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < 4; step++) multiply_values(out, weights + 4 * step, v + ((step * 16 * 128) >> 4));
  wgmma_commit();
}

__device__ __forceinline__ void sum_values(float (&out)[128], const char* weights, const char* latents) {
  const u64 p = descriptor(weights, 16), v = descriptor(latents, CHUNK_BYTES);
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < 4; step++) multiply_values(out, p + ((step * 32) >> 4), v + ((step * 16 * 128) >> 4));
  wgmma_commit();
}

// A warpgroup's 64 x 64 fragments to a swizzled tile; `fragment` is as wgmma takes them from registers.
__device__ __forceinline__ void store_tile(char* tile, const u32 (&fragment)[16]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int row = 16 * warp + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
  for (int step = 0; step < 4; step++) {
    const int column = 2 * step + lane / 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(tile) + row * 128 + ((column ^ row % 8) << 4)),
                 "r"(fragment[4 * step]), "r"(fragment[4 * step + 1]), "r"(fragment[4 * step + 2]),
                 "r"(fragment[4 * step + 3])
                 : "memory");
  }
}

__device__ __forceinline__ void to_fragment(u32 (&fragment)[16], const float* values) {
#pragma unroll
  for (int i = 0; i < 16; i++) fragment[i] = pack(values[2 * i], values[2 * i + 1]);
}

// ---- the parts of a block's work

// Where the queries lie: strides in values.
struct Queries {
  const bf16 *latent, *rope;
  int latent_query, latent_head, rope_query, rope_head;
};

// Rows first ... first + 63 of a sequence to shared memory as swizzled tiles, a row a warp. Beyond the last row there
// is a copy of it: no row has a part in another's result, and those are not written.
__device__ __forceinline__ void load_queries(char* tile, Queries q, int first, int rows, int heads) {
  constexpr int WARPS = CONSUMERS / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < ROWS / WARPS; i++) {
    const int row = i * WARPS + warp, real = min(first + row, rows - 1), query = real / heads, head = real % heads;
    const bf16* latent = q.latent + (long long)query * q.latent_query + (long long)head * q.latent_head;
    const bf16* rope = q.rope + (long long)query * q.rope_query + (long long)head * q.rope_head;
#pragma unroll
    for (int part = 0; part < 3; part++) {  // pieces of 16 bytes: 64 of the latent part and 8 of the rope part
      const int piece = part * 32 + lane;
      if (part == 2 && lane >= 8) continue;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                       shared_address(tile) + piece / 8 * CHUNK_BYTES + row * 128 + ((piece % 8 ^ row % 8) << 4)),
                   "l"(part < 2 ? latent + piece * 8 : rope + lane * 8)
                   : "memory");
    }
  }
}

__device__ __forceinline__ void queries_loaded() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  publish_stores();
}

// The last page of a sequence may hold anything beyond its end, and 0 · NaN is NaN: make it zero. One warpgroup.
__device__ __forceinline__ void clear_rows(char* page, int from) {
  for (int i = threadIdx.x % WARPGROUP; i < (PAGE - from) * CHUNKS * 8; i += WARPGROUP) {
    const int row = from + i / (CHUNKS * 8), piece = i % (CHUNKS * 8);
    *(uint4*)(page + piece / 8 * CHUNK_BYTES + row * 128 + piece % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
  publish_stores();
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}

// A thread holds two rows of its warpgroup's 64, `row` and `row + 8`; of a fragment's values i, those with
// i / 2 % 2 = 1 belong to the second.
struct Pair {
  float a, b;
  __device__ __forceinline__ float operator[](int i) const { return i / 2 % 2 ? b : a; }
};

template <int N>
__device__ __forceinline__ void multiply(float (&x)[N], Pair factor) {
#pragma unroll
  for (int i = 0; i < N; i++) x[i] *= factor[i];
}

// Scores of a page that starts at key `start`; each row sees the keys before its limit.
__device__ __forceinline__ void hide(float (&score)[32], int start, int limit_a, int limit_b) {
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const int key = start + 8 * (i / 4) + threadIdx.x % 4 * 2 + i % 2;
    if (key >= (i / 2 % 2 ? limit_b : limit_a)) score[i] = NOTHING;
  }
}

__device__ __forceinline__ Pair highest(const float (&score)[32]) {
  Pair top = {NOTHING, NOTHING};
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    top.a = fmaxf(top.a, fmaxf(score[i], score[i + 1]));
    top.b = fmaxf(top.b, fmaxf(score[i + 2], score[i + 3]));
  }
  return {quad_max(top.a), quad_max(top.b)};
}

// score -> 2^((score - top) · scale); `sum` grows by each row's weights (of this thread's columns).
__device__ __forceinline__ void weigh(float (&score)[32], Pair top, float scale, Pair& sum) {
  const Pair shift = {top.a * scale, top.b * scale};
#pragma unroll
  for (int i = 0; i < 32; i++) {
    score[i] = power_of_two(fmaf(score[i], scale, -shift[i]));
    (i / 2 % 2 ? sum.b : sum.a) += score[i];
  }
}

// The shift of the exponents follows the highest score only when that has grown a lot (by 2^8 in weight): until then
// nothing that was summed has to be shrunk, and the end result is the same.
__device__ __forceinline__ Pair raise(Pair top, Pair seen, float slack) {
  return {seen.a > top.a + slack ? seen.a : top.a, seen.b > top.b + slack ? seen.b : top.b};
}

// Whether some row of this warp was shifted.
__device__ __forceinline__ bool moved(Pair before, Pair after) {
  return __any_sync(ALL, before.a != after.a || before.b != after.b);
}

__device__ __forceinline__ Pair shrink(Pair before, Pair after, float scale) {
  return {power_of_two((before.a - after.a) * scale), power_of_two((before.b - after.b) * scale)};
}

__device__ __forceinline__ void put(float* rows, int row, Pair x) {
  if (threadIdx.x % 4 == 0) rows[row] = x.a, rows[row + 8] = x.b;
}

__device__ __forceinline__ Pair get(const float* rows, int row) { return {rows[row], rows[row + 8]}; }

// This warp's last wgmma that reads a half page is done.
__device__ __forceinline__ void release(u64* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

// One half of every second page, those that this warp has, into its place as soon as that is free. `known`: the blocks
// of the first 32 of those pages, one a lane; `used`: how often the place was filled before.
__device__ __forceinline__ void bring_pages(
    Shared& s, const Map* map, const BLOCKS_T* blocks, int known, int first, int last, int odd, int side, int& used) {
  const int lane = threadIdx.x % 32;
  // The rope part carries weights to the other warpgroup: it comes free with the half that one reads.
  const int begin = side * HALF_CHUNKS, chunks = HALF_CHUNKS + (side != odd);
  for (int page = first + odd, round = 0; page < last; page += 2, round++, used++) {
    if (round % 32 == 0 && round > 0) known = page + 2 * lane < last ? (int)blocks[page + 2 * lane] : 0;
    const int slot = __shfl_sync(ALL, known, round % 32) * PAGE;
    if (lane == 0) {
      if (used > 0) barrier_wait(&s.empty[odd][side], (used - 1) & 1);
      for (int i = 0; i < chunks; i++) {
        const int chunk = i < HALF_CHUNKS ? begin + i : ROPE_CHUNK;
        copy_chunk(map, s.keys[odd] + chunk * CHUNK_BYTES, &s.full[odd][chunk], chunk, slot);
      }
    }
    __syncwarp();
  }
}

struct Range {
  int first, last;       // pages
  int end, low;          // keys: some row sees up to `end`, every row sees up to `low`
  int limit_a, limit_b;  // of this thread's rows
  float scale, slack;    // of the scores, times log2(e); by how much they may grow unnoticed
};

// Scores of the page that this warpgroup owns and that starts at key `start`.
__device__ __forceinline__ void own_scores(
    Shared& s, float (&score)[32], const Range& r, int start, u32 parity, int odd) {
  if (start + PAGE > r.end) {
    for (int chunk = 0; chunk < CHUNKS; chunk++) barrier_wait(&s.full[odd][chunk], parity);
    clear_rows(s.keys[odd], r.end - start);
    named_sync(OWN + odd, WARPGROUP);
  }
  score_page(score, s.queries, s.keys[odd], s.full[odd], parity, odd);
  wgmma_wait<0>();
  if (start + PAGE > r.low) hide(score, start, r.limit_a, r.limit_b);
}

// Warpgroup 0: scores even pages, sums the left half. Its weights are shifted by the top of all pages so far; if the
// odd page then raises that for some row, what it left for warpgroup 1 is written again.
__device__ __forceinline__ void left(
    Shared& s, float (&out)[128], const Range& r, int row, u32& parity, Pair& top, Pair& sum) {
  char* even_weights = s.keys[0] + ROPE_CHUNK * CHUNK_BYTES;
  char* odd_weights = s.keys[1] + ROPE_CHUNK * CHUNK_BYTES;
  for (int page = r.first; page < r.last; page += 2, parity ^= 1) {
    const bool odd = page + 1 < r.last;
    float score[32];
    u32 fragment[16];
    own_scores(s, score, r, page * PAGE, parity, 0);
    const Pair even_top = raise(top, highest(score), r.slack);
    put(s.top[0], row, even_top);
    named_arrive(EVEN_TOP, CONSUMERS);
    if (moved(top, even_top)) {
      const Pair factor = shrink(top, even_top, r.scale);
      sum = {sum.a * factor.a, sum.b * factor.b};
      multiply(out, factor);
    }
    weigh(score, even_top, r.scale, sum);
    to_fragment(fragment, score);
    sum_values(out, fragment, s.keys[0]);
    store_tile(even_weights, fragment);
    publish_stores();

    top = even_top;
    if (odd) {
      named_sync(ODD_WEIGHTS, CONSUMERS);
      top = get(s.top[1], row);
    }
    const bool again = moved(even_top, top);
    const Pair factor = shrink(even_top, top, r.scale);
    if (again) {
      sum = {sum.a * factor.a, sum.b * factor.b};
      multiply(score, factor);
      u32 shrunk[16];
      to_fragment(shrunk, score);
      store_tile(even_weights, shrunk);
      publish_stores();
    }
    named_arrive(EVEN_WEIGHTS, CONSUMERS);
    wgmma_wait<0>();
    release(&s.empty[0][0]);
    if (again) multiply(out, factor);
    if (odd) {
      sum_values(out, odd_weights, s.keys[1]);
      wgmma_wait<0>();
      release(&s.empty[1][0]);
    }
  }
}

// Warpgroup 1: scores odd pages, sums the right half.
__device__ __forceinline__ void right(
    Shared& s, float (&out)[128], const Range& r, int row, u32& parity, Pair& top, Pair& sum) {
  char* even_weights = s.keys[0] + ROPE_CHUNK * CHUNK_BYTES;
  char* odd_weights = s.keys[1] + ROPE_CHUNK * CHUNK_BYTES;
  for (int page = r.first; page < r.last; page += 2) {
    const bool odd = page + 1 < r.last;
    float score[32];
    u32 fragment[16];
    Pair seen;
    if (odd) {
      own_scores(s, score, r, (page + 1) * PAGE, parity, 1);
      seen = highest(score);
      parity ^= 1;
    }
    named_sync(EVEN_TOP, CONSUMERS);
    Pair both_top = get(s.top[0], row);
    if (odd) both_top = raise(both_top, seen, r.slack);
    const Pair factor = shrink(top, both_top, r.scale);
    sum = {sum.a * factor.a, sum.b * factor.b};
    if (odd) {
      weigh(score, both_top, r.scale, sum);
      to_fragment(fragment, score);
      store_tile(odd_weights, fragment);
      put(s.top[1], row, both_top);
      publish_stores();
      named_arrive(ODD_WEIGHTS, CONSUMERS);
    }
    if (moved(top, both_top)) multiply(out, factor);
    top = both_top;
    if (odd) sum_values(out, fragment, s.keys[1] + HALF_CHUNKS * CHUNK_BYTES);
    named_sync(EVEN_WEIGHTS, CONSUMERS);
    sum_values(out, even_weights, s.keys[0] + HALF_CHUNKS * CHUNK_BYTES);
    if (odd) {
      wgmma_wait<1>();
      release(&s.empty[1][1]);
    }
    wgmma_wait<0>();
    release(&s.empty[0][1]);
  }
}

// Pages of a sequence; a length that the table of blocks cannot hold is cut.
__device__ __forceinline__ int cached(const LENGTHS_T* lengths, int sequence, int table) {
  return (int)max(0ll, min((long long)lengths[sequence], (long long)table * PAGE));
}

__device__ __forceinline__ int pages(int keys) { return (keys + PAGE - 1) / PAGE; }

// The pages of all sequences stand in one row, each sequence preceded by SETUP units for what it costs beyond its
// pages. A group of blocks (one for each row tile) takes `quota` units of that row, from `begin` to `end`.
struct Share {
  int quota, begin, end;
  int sequence, start;  // the sequence that `begin` lies in, and where that starts
};

// Units of four sequences a lane, 128 a warp, from sequence `first` on. The loads are under way together.
__device__ __forceinline__ void units_of(int (&units)[4], int first, const LENGTHS_T* lengths, int batch, int table) {
  first += threadIdx.x % 32 * 4;
#pragma unroll
  for (int i = 0; i < 4; i++) units[i] = first + i < batch ? pages(cached(lengths, first + i, table)) + SETUP : 0;
}

// A whole warp computes it; the same in each.
__device__ __forceinline__ Share share_of(int group, int groups, const LENGTHS_T* lengths, int batch, int table) {
  const int lane = threadIdx.x % 32;
  int total = 0, most = 0, units[4];
  for (int i = 0; i < batch; i += 128) {
    units_of(units, i, lengths, batch, table);
    total += units[0] + units[1] + units[2] + units[3];
    most = max(most, max(max(units[0], units[1]), max(units[2], units[3])));
  }
  total = __reduce_add_sync(ALL, total), most = __reduce_max_sync(ALL, most);
  Share share;
  share.quota = max((total + groups - 1) / groups, SMALLEST);
  // Better a little more than an equal share when that leaves equal sequences whole.
  const int whole = (share.quota + most - 1) / most * most;
  if ((long long)whole * 16 <= (long long)share.quota * 17) share.quota = whole;
  share.begin = (int)min((long long)group * share.quota, (long long)total);
  share.end = (int)min((long long)share.begin + share.quota, (long long)total);
  share.sequence = batch, share.start = total;
  if (share.begin == total) return share;
  int base = 0;
  for (int i = 0; i < batch; i += 128) {
    units_of(units, i, lengths, batch, table);
    const int mine = units[0] + units[1] + units[2] + units[3];
    int after = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(ALL, after, step);
      if (lane >= step) after += before;
    }
    const u32 beyond = __ballot_sync(ALL, base + after > share.begin);
    if (beyond) {
      int start = base + after - mine, sequence = i + lane * 4;
#pragma unroll
      for (int k = 0; k < 3; k++) {
        if (sequence == i + lane * 4 + k && start + units[k] <= share.begin) start += units[k], sequence++;
      }
      const int found = __ffs(beyond) - 1;
      share.sequence = __shfl_sync(ALL, sequence, found), share.start = __shfl_sync(ALL, start, found);
      return share;
    }
    base += __shfl_sync(ALL, after, 31);
  }
  return share;
}

// What a group does of one sequence.
struct Piece {
  int length, first, last;  // pages
  bool here;                // is there anything to do
  bool starts, ends;        // the sequence's first and last pages are in it
};

__device__ __forceinline__ Piece piece_of(const Share& share, int sequence, int start, int length) {
  Piece piece;
  const int count = pages(length);
  piece.length = length;
  piece.first = max(0, share.begin - start - SETUP);
  piece.last = max(0, min(count, share.end - start - SETUP));
  piece.here = count == 0 ? start >= share.begin : piece.first < piece.last;
  piece.starts = piece.first == 0, piece.ends = piece.last == count;
  return piece;
}

// Which keys the rows of a tile see.
__device__ __forceinline__ void look(
    Range& r, const Piece& piece, const POSITIONS_T* positions, int first_row, int rows, int heads) {
  r.end = 0, r.low = piece.length;
  for (int query = first_row / heads; query <= (min(first_row + ROWS, rows) - 1) / heads; query++) {
    const int limit = (int)min((long long)piece.length, (long long)positions[query] + 1);
    r.end = max(r.end, limit), r.low = min(r.low, limit);
  }
  // The compiler must see that a warp goes one way as a whole, or it lets one wgmma wait for the other.
  r.end = __shfl_sync(ALL, r.end, 0), r.low = __shfl_sync(ALL, r.low, 0);
  r.first = __shfl_sync(ALL, piece.first, 0);
  r.last = __shfl_sync(ALL, min(piece.last, pages(r.end)), 0);
}

// grid: groups x row tiles. A group's piece that is a whole sequence goes to `out` [B, Q · H, 512]. Of others `partial`
// [2 · groups, Q · H, 512] holds the output and `weight` [2 · groups, Q · H] log2 of the sum of 2^score: in the group's
// second place if the piece starts its sequence, else in the first. `plan` [B, 2]: first and last group of a sequence.
extern "C" __global__ void __launch_bounds__(THREADS, 1) mla_decode(
    const __grid_constant__ Map map, const bf16* q_latent, const bf16* q_rope, const BLOCKS_T* blocks,
    const POSITIONS_T* positions, const LENGTHS_T* lengths, bf16* out, float* partial, float* weight, int2* plan,
    int batch, int queries, int heads, int table, int groups, int latent_batch, int latent_query, int latent_head,
    int rope_batch, int rope_query, int rope_head, float scale) {
  extern __shared__ __align__(1024) char raw[];
  Shared& s = *(Shared*)raw;
  asm volatile("griddepcontrol.launch_dependents;");  // mla_combine may come in as blocks of this kernel go
  const int rows = queries * heads, tiles = (rows + ROWS - 1) / ROWS;
  const int first_row = blockIdx.x % tiles * ROWS, block_group = blockIdx.x / tiles;

  if (threadIdx.x == 0) {
    for (int odd = 0; odd < 2; odd++) {
      for (int chunk = 0; chunk < CHUNKS; chunk++) barrier_start(&s.full[odd][chunk], 1);
      for (int side = 0; side < 2; side++) barrier_start(&s.empty[odd][side], WARPGROUP / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // Which sequence is whose is known only after the lengths. Until then the positions come nearer, and the table's row
  // that would be this group's if all sequences were equally long.
  if (threadIdx.x * 128 < batch * queries * (int)sizeof(POSITIONS_T)) fetch((const char*)positions + threadIdx.x * 128);
  if (threadIdx.x < 4 && threadIdx.x * 128 < table * (int)sizeof(BLOCKS_T)) {
    fetch((const char*)(blocks + (long long)block_group * batch / groups * table) + threadIdx.x * 128);
  }
  const Share share = share_of(block_group, groups, lengths, batch, table);
  __syncthreads();
  const int warp = __shfl_sync(ALL, threadIdx.x / 32, 0), group = warp / 4, lane = threadIdx.x % 32;
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    int used = 0;
    for (int sequence = share.sequence, start = share.start; start < share.end; sequence++) {
      const Piece piece = piece_of(share, sequence, start, cached(lengths, sequence, table));
      start += pages(piece.length) + SETUP;
      if (!piece.here) continue;
      const int odd = warp / 2 % 2, side = warp % 2, first = piece.first + odd + 2 * lane;
      const BLOCKS_T* mine = blocks + (long long)sequence * table;
      const int known = first < piece.last ? (int)mine[first] : 0;  // asked for beside the positions, not after them
      Range r;
      look(r, piece, positions + (long long)sequence * queries, first_row, rows, heads);
      bring_pages(s, &map, mine, known, r.first, r.last, odd, side, used);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");

  const int row = warp % 4 * 16 + lane / 4;
  u32 parity = 0;
  for (int sequence = share.sequence, start = share.start; start < share.end; sequence++) {
    const Piece piece = piece_of(share, sequence, start, cached(lengths, sequence, table));
    if (threadIdx.x == 0 && first_row == 0 && piece.here && piece.starts) {
      const int last_unit = start + max(SETUP + pages(piece.length) - 1, 0);
      plan[sequence] = make_int2(block_group, piece.length > 0 ? last_unit / share.quota : block_group);
    }
    start += pages(piece.length) + SETUP;
    if (!piece.here) continue;
    named_sync(BOTH, CONSUMERS);  // the last piece's output has left the queries' place
    const Queries q = {q_latent + (long long)sequence * latent_batch, q_rope + (long long)sequence * rope_batch,
                       latent_query, latent_head, rope_query, rope_head};
    load_queries(s.queries, q, first_row, rows, heads);
    const POSITIONS_T* position = positions + (long long)sequence * queries;
    Range r;
    look(r, piece, position, first_row, rows, heads);
    r.scale = scale, r.slack = 8.0f / scale;
    r.limit_a = (int)min((long long)piece.length, (long long)position[min(first_row + row, rows - 1) / heads] + 1);
    r.limit_b = (int)min((long long)piece.length, (long long)position[min(first_row + row + 8, rows - 1) / heads] + 1);
    queries_loaded();
    Pair top = {LOWEST, LOWEST}, sum = {0.0f, 0.0f};
    float total[128];
#pragma unroll
    for (int i = 0; i < 128; i++) total[i] = 0.0f;
    if (r.first < r.last) {
      named_sync(BOTH, CONSUMERS);
      if (group == 0) {
        left(s, total, r, row, parity, top, sum);
      } else {
        right(s, total, r, row, parity, top, sum);
      }
    }
    sum = {quad_sum(sum.a), quad_sum(sum.b)};
    put(s.sum[group], row, sum);
    named_sync(BOTH, CONSUMERS);
    const Pair other = get(s.sum[1 - group], row);
    sum = {sum.a + other.a, sum.b + other.b};
    multiply(total, {sum.a > 0.0f ? 1.0f / sum.a : 0.0f, sum.b > 0.0f ? 1.0f / sum.b : 0.0f});

    if (piece.starts && piece.ends) {
      // Through the queries' place, which is free now, so that whole lines are written.
      char* staged = s.queries + group * HALF_CHUNKS * CHUNK_BYTES;
#pragma unroll
      for (int chunk = 0; chunk < HALF_CHUNKS; chunk++) {
        u32 fragment[16];
        to_fragment(fragment, total + 32 * chunk);
        store_tile(staged + chunk * CHUNK_BYTES, fragment);
      }
      named_sync(OWN + group, WARPGROUP);
      constexpr int PIECES = HALF / 8;
      bf16* target = out + ((long long)sequence * rows + first_row) * LATENT + group * HALF;
#pragma unroll 4
      for (int i = threadIdx.x % WARPGROUP; i < ROWS * PIECES; i += WARPGROUP) {
        const int to = i / PIECES, part = i % PIECES;
        if (first_row + to < rows) {
          *(uint4*)(target + to * LATENT + part * 8) =
              *(const uint4*)(staged + part / 8 * CHUNK_BYTES + to * 128 + ((part % 8 ^ to % 8) << 4));
        }
      }
    } else {
      const long long place = (2ll * block_group + piece.starts) * rows + first_row;
      float* target = partial + place * LATENT + group * HALF + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 128; i += 2) {
        const int to = row + i / 2 % 2 * 8;
        if (first_row + to < rows) *(float2*)(target + to * LATENT + i / 4 * 8) = make_float2(total[i], total[i + 1]);
      }
      if (group == 1 && lane % 4 == 0) {
        if (first_row + row < rows) weight[place + row] = sum.a > 0.0f ? top.a * scale + __log2f(sum.a) : NOTHING;
        if (first_row + row + 8 < rows) {
          weight[place + row + 8] = sum.b > 0.0f ? top.b * scale + __log2f(sum.b) : NOTHING;
        }
      }
    }
  }
}

// grid: sequences x slices. The outputs of sequences that several groups share: each part by its share of the whole
// sum. A block takes every so many rows of its sequence; one half of it the even parts, the other the odd ones.
extern "C" __global__ void __launch_bounds__(2 * LATENT / 4) mla_combine(
    const float* partial, const float* weight, const int2* plan, bf16* out, int rows) {
  asm volatile("griddepcontrol.wait;" ::: "memory");  // until mla_decode is done
  __shared__ float4 halves[LATENT / 4];
  __shared__ float sums[LATENT / 4];
  const int half = threadIdx.x / (LATENT / 4), column = threadIdx.x % (LATENT / 4);
  const int2 groups = plan[blockIdx.x];
  if (groups.x == groups.y) return;
  const int parts = groups.y - groups.x + 1;
  for (int row = blockIdx.y; row < rows; row += gridDim.y) {
    // The first group's second place, then the other groups' first ones.
    const long long first = (2ll * groups.x + 1) * rows + row, second = (2ll * groups.x + 2) * rows + row;
    float top = NOTHING;
#pragma unroll 8
    for (int part = 0; part < parts; part++) {
      top = fmaxf(top, weight[part == 0 ? first : second + 2ll * (part - 1) * rows]);
    }
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float sum = 0.0f;
    if (top > NOTHING) {
#pragma unroll 8
      for (int part = half; part < parts; part += 2) {
        const long long place = part == 0 ? first : second + 2ll * (part - 1) * rows;
        const float share = power_of_two(weight[place] - top);
        const float4 values = *(const float4*)(partial + place * LATENT + column * 4);
        total.x += share * values.x, total.y += share * values.y;
        total.z += share * values.z, total.w += share * values.w;
        sum += share;
      }
    }
    __syncthreads();  // the last row's halves have been read
    if (half == 1) halves[column] = total, sums[column] = sum;
    __syncthreads();
    if (half == 1) continue;
    const float4 other = halves[column];
    sum += sums[column];
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    *(uint2*)(out + ((long long)blockIdx.x * rows + row) * LATENT + column * 4) =
        make_uint2(pack((total.x + other.x) * inverse, (total.y + other.y) * inverse),
                   pack((total.z + other.z) * inverse, (total.w + other.w) * inverse));
  }
}
