// Quantising bf16 activations to FP8 along their columns, transposed, and along their rows if asked, reading them once.
//
// A block of 256 threads owns a tile of 128 tokens and 128 columns. A thread keeps 8 neighbouring tokens of 8 neighbouring
// columns in registers, as pairs of bf16, from the loads to the last store: 16 bytes a load, and what it writes of a row of
// the result or of its transpose is 8 bytes that lie side by side. Maxima are taken of pairs, NaN kept; those of a row lie
// in 16 threads of a warp, those of a column in all warps, which exchange them through shared memory. A scale is divided
// out by one thread and passed on. The transpose goes through shared memory in words of 8 bytes, which are spread over
// the banks by exchanging their places within a row.
//
// With SWIGLU the tile is computed first, three times over: the gradients of gate and up, and the hidden values (of which
// only the columns are wanted), from gate, up and the hidden gradient, rounded to bf16 as separate operators would do.
// There a block takes one tile after the other, and a thread asks for what it needs of the next tile as soon as it holds its
// values of this one. They arrive in places of shared memory that are its own, so nobody waits for anybody, and memory is
// read while this tile is computed and written.
//
// Defines: SWIGLU, ROWS (whether rows are wanted as well), POWER_OF_TWO (round scales up to powers of two), BLOCKS (how
// many blocks share a multiprocessor).
//
// Leaves out: other inputs than bf16, rows that do not begin at multiples of 16 bytes, columns that are no multiple of 8.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define THREADS 256
#define TILE 128

struct Shared {
#if SWIGLU
    uint4 ahead[3][8][THREADS];  // 8 columns of each of a thread's tokens, of the next tile
#endif
    union {
        uint2 values[TILE][TILE / 8];  // a row of the transpose: 16 words of 8 tokens
        uint4 largest[THREADS / 32][TILE / 8];
    };
    float inverse[TILE];
};

struct Target {  // values and scales of one matrix
    unsigned char *values;
    float *scales;
    int stride, scale_stride;
};

__device__ u32 larger(u32 a, u32 b) {
    u32 result;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

__device__ u32 absolute(u32 pair) { return pair & 0x7FFF7FFF; }

__device__ float low(u32 pair) { return __uint_as_float(pair << 16); }

__device__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000); }

// Two e4m3 values, the first in the lower byte.
__device__ u32 e4m3(float first, float second) {
    u16 result;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(second), "f"(first));
    return result;
}

__device__ u32 four(float a, float b, float c, float d) { return __byte_perm(e4m3(a, b), e4m3(c, d), 0x5410); }

// amax / 448 with amax at least 1e-4; NaN and infinity stay.
__device__ float scale_of(u32 bf16_bits) {
    float amax = __uint_as_float(bf16_bits << 16);
    float scale = __fdiv_rn(amax < 1e-4f ? 1e-4f : amax, 448.0f);
#if POWER_OF_TWO
    // Adding all ones below the exponent carries into it unless the mantissa is zero.
    if ((bf16_bits & 0x7F80) != 0x7F80) scale = __uint_as_float((__float_as_uint(scale) + 0x7FFFFF) & 0x7F800000);
#endif
    return scale;
}

// x[p][j]: columns 2 j and 2 j + 1 of token p of this thread.
__device__ void store_rows(const u32 (&x)[8][4], Target to, int first_token, int first_column, int tokens) {
    int lane = threadIdx.x % 32, group = threadIdx.x % 16;
    int token = first_token + threadIdx.x / 16 * 8, column = first_column + group * 8;
    u32 largest[4];  // of tokens 2 q and 2 q + 1
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        u32 of[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 *pairs = x[2 * q + i];
            of[i] = larger(larger(absolute(pairs[0]), absolute(pairs[1])), larger(absolute(pairs[2]), absolute(pairs[3])));
        }
        largest[q] = larger(__byte_perm(of[0], of[1], 0x5410), __byte_perm(of[0], of[1], 0x7632));
    }
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2)
#pragma unroll
        for (int q = 0; q < 4; ++q)
            largest[q] = larger(largest[q], __shfl_xor_sync(0xFFFFFFFF, largest[q], distance));
    int mine = group % 8;  // the token whose scale this thread divides out
    u32 half = mine & 4 ? (mine & 2 ? largest[3] : largest[2]) : (mine & 2 ? largest[1] : largest[0]);
    float scale = scale_of(mine & 1 ? half >> 16 : half & 0xFFFF);
    float my_inverse = __frcp_rn(scale);
    if (group < 8 && token + mine < tokens)
        to.scales[(i64)(first_column / TILE) * to.scale_stride + token + mine] = scale;
#pragma unroll
    for (int p = 0; p < 8; ++p) {
        float inverse = __shfl_sync(0xFFFFFFFF, my_inverse, (lane & 16) + p);
        uint2 word;
        word.x = four(low(x[p][0]) * inverse, high(x[p][0]) * inverse, low(x[p][1]) * inverse, high(x[p][1]) * inverse);
        word.y = four(low(x[p][2]) * inverse, high(x[p][2]) * inverse, low(x[p][3]) * inverse, high(x[p][3]) * inverse);
        if (token + p < tokens && column < to.stride)
            *(uint2 *)(to.values + (i64)(token + p) * to.stride + column) = word;
    }
}

__device__ void store_columns(
    const u32 (&x)[8][4], Target to, int first_token, int first_column, int columns, Shared &shared
) {
    int thread = threadIdx.x, group = thread % 16, octet = thread / 16;
    u32 largest[4];
#if SWIGLU
    __syncthreads();  // what is written below was read as another transpose before
#endif
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        largest[j] = absolute(x[0][j]);
#pragma unroll
        for (int p = 1; p < 8; ++p) largest[j] = larger(largest[j], absolute(x[p][j]));
        largest[j] = larger(largest[j], __shfl_xor_sync(0xFFFFFFFF, largest[j], 16));
    }
    if (thread % 32 < 16) shared.largest[thread / 32][group] = make_uint4(largest[0], largest[1], largest[2], largest[3]);
    __syncthreads();
    if (thread < TILE) {
        u32 bits = 0;  // of bf16, not negative: they order as integers, NaN above all
#pragma unroll
        for (int warp = 0; warp < THREADS / 32; ++warp) bits = max(bits, (u32)((u16 *)shared.largest[warp])[thread]);
        float scale = scale_of(bits);
        shared.inverse[thread] = __frcp_rn(scale);
        if (first_column + thread < columns)
            to.scales[(i64)(first_token / TILE) * to.scale_stride + first_column + thread] = scale;
    }
    __syncthreads();
    float inverse[8];
    *(float4 *)inverse = *(float4 *)&shared.inverse[group * 8];
    *(float4 *)(inverse + 4) = *(float4 *)&shared.inverse[group * 8 + 4];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        float y[8];
#pragma unroll
        for (int p = 0; p < 8; ++p) y[p] = (c % 2 ? high(x[p][c / 2]) : low(x[p][c / 2])) * inverse[c];
        shared.values[group * 8 + c][octet ^ group] =
            make_uint2(four(y[0], y[1], y[2], y[3]), four(y[4], y[5], y[6], y[7]));
    }
    __syncthreads();
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
        int row = pass * 32 + thread / 8, chunk = thread % 8;
        uint4 words = *(uint4 *)&shared.values[row][(2 * chunk) ^ (row / 8 & ~1)];
        if (row / 8 & 1) words = make_uint4(words.z, words.w, words.x, words.y);
        if (first_column + row < columns && first_token + chunk * 16 < to.stride)
            *(uint4 *)(to.values + (i64)(first_column + row) * to.stride + first_token + chunk * 16) = words;
    }
}

#if SWIGLU

// A thread's place in a tile of a matrix: its first token and column.
struct Place {
    int token, column;
};

__device__ Place place(int tile, int across) {
    return {tile / across * TILE + (int)threadIdx.x / 16 * 8, tile % across * TILE + (int)threadIdx.x % 16 * 8};
}

// Ask for 8 columns of a token; zeros outside the matrix.
__device__ void fetch(uint4 *to, const u16 *from, int stride, int token, int column, int tokens, int columns) {
    bool inside = token < tokens && column < columns;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"((u32)__cvta_generic_to_shared(to)),
                 "l"(inside ? from + (i64)token * stride + column : from), "r"(inside ? 16 : 0)
                 : "memory");
}

__device__ void arrived() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

__device__ u32 rounded(float first, float second) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

__device__ float sigmoid(float x) {
    float power, result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
    return result;
}

// h = silu(g) · u; given dh: du = dh · silu(g) and dg = dh · u · σ(g) · (1 + g · (1 − σ(g))).
__device__ void differentiate(float &grad, float &gate, float &up) {
    float s = sigmoid(gate), silu = gate * s;
    float grad_gate = grad * up * s * (1.0f + gate * (1.0f - s));
    up = silu * up;
    gate = grad * silu;
    grad = grad_gate;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp8_tile(
    const u16 *grad_TI, const u16 *gate_up_TJ, unsigned char *rows, float *row_scales, unsigned char *columns_,
    float *column_scales, unsigned char *hidden_columns, float *hidden_scales, int tokens, int hidden, int grad_stride,
    int gate_up_stride, int rows_stride, int row_scales_stride, int columns_stride, int column_scales_stride,
    int hidden_scales_stride
) {
    extern __shared__ uint4 memory[];
    Shared &shared = *(Shared *)memory;
    int across = hidden / TILE, tiles = across * ((tokens + TILE - 1) / TILE);
    Target to_rows = {rows, row_scales, rows_stride, row_scales_stride};
    Target to_columns = {columns_, column_scales, columns_stride, column_scales_stride};
    Target to_hidden = {hidden_columns, hidden_scales, columns_stride, hidden_scales_stride};
    auto fetch_all = [&](Place at, int p) {
        fetch(&shared.ahead[0][p][threadIdx.x], grad_TI, grad_stride, at.token + p, at.column, tokens, hidden);
        fetch(&shared.ahead[1][p][threadIdx.x], gate_up_TJ, gate_up_stride, at.token + p, at.column, tokens, hidden);
        fetch(&shared.ahead[2][p][threadIdx.x], gate_up_TJ + hidden, gate_up_stride, at.token + p, at.column, tokens, hidden);
    };
    for (int p = 0; p < 8; ++p) fetch_all(place(blockIdx.x, across), p);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        int first_token = tile / across * TILE, first = tile % across * TILE;
        bool more = tile + gridDim.x < tiles;
        Place next = place(tile + gridDim.x, across);
        u32 grad_gate[8][4], grad_up[8][4], h[8][4];
        arrived();
#pragma unroll
        for (int p = 0; p < 8; ++p) {
            uint4 grads = shared.ahead[0][p][threadIdx.x], gates = shared.ahead[1][p][threadIdx.x];
            uint4 ups = shared.ahead[2][p][threadIdx.x];
            const u32 *pairs[3] = {&grads.x, &gates.x, &ups.x};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float a[2] = {low(pairs[0][j]), high(pairs[0][j])};
                float b[2] = {low(pairs[1][j]), high(pairs[1][j])};
                float c[2] = {low(pairs[2][j]), high(pairs[2][j])};
#pragma unroll
                for (int i = 0; i < 2; ++i) differentiate(a[i], b[i], c[i]);
                grad_gate[p][j] = rounded(a[0], a[1]);
                grad_up[p][j] = rounded(b[0], b[1]);
                h[p][j] = rounded(c[0], c[1]);
            }
            if (more) fetch_all(next, p);
        }
        store_columns(h, to_hidden, first_token, first, hidden, shared);
        store_rows(grad_up, to_rows, first_token, hidden + first, tokens);
        store_columns(grad_up, to_columns, first_token, hidden + first, 2 * hidden, shared);
        store_rows(grad_gate, to_rows, first_token, first, tokens);
        store_columns(grad_gate, to_columns, first_token, first, 2 * hidden, shared);
    }
}

#else

__device__ void load(u32 (&x)[8][4], const u16 *from, int stride, int first_token, int first_column, int tokens, int columns) {
    int token = first_token + threadIdx.x / 16 * 8, column = first_column + threadIdx.x % 16 * 8;
#pragma unroll
    for (int p = 0; p < 8; ++p) {
        uint4 words = make_uint4(0, 0, 0, 0);
        asm volatile(
            "{.reg .pred inside;\n"
            "setp.ne.u32 inside, %5, 0;\n"
            "@inside ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}\n"
            : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
            : "l"(from + (i64)(token + p) * stride + column), "r"((u32)(token + p < tokens && column < columns)));
        x[p][0] = words.x, x[p][1] = words.y, x[p][2] = words.z, x[p][3] = words.w;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp8_tile(
    const u16 *x_TK, unsigned char *rows, float *row_scales, unsigned char *columns_, float *column_scales, int tokens,
    int width, int x_stride, int rows_stride, int row_scales_stride, int columns_stride, int column_scales_stride
) {
    __shared__ Shared shared;
    int across = (width + TILE - 1) / TILE;
    int first_token = blockIdx.x / across * TILE, first_column = blockIdx.x % across * TILE;
    u32 x[8][4];
    load(x, x_TK, x_stride, first_token, first_column, tokens, width);
#if ROWS
    store_rows(x, {rows, row_scales, rows_stride, row_scales_stride}, first_token, first_column, tokens);
#endif
    store_columns(
        x, {columns_, column_scales, columns_stride, column_scales_stride}, first_token, first_column, width, shared);
}

#endif
