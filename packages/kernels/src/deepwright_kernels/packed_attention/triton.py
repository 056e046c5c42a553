"""Causal attention over packed rows as Triton kernels: forward, and a backward without atomics.

Forward (after FlashAttention-2, Dao 2023): a program owns a tile of queries of one head and walks over the tiles of
keys they may see, with an online softmax. What a query may see is an interval of keys, so a tile's keys begin at the
smallest start and end at the largest end among its queries: keys of other documents are never loaded. Only a tile that
some query may not see whole is masked: a branch, so that the loads of one loop run ahead over both kinds.

Backward: one kernel owns a tile of queries (their gradient), a second a tile of keys (gradients of keys and values);
both recompute the weights from the log-sum-exp of the forward. That is seven matrix products where one kernel with
atomic additions makes five, and in exchange a sum has one order: the same bits in every run. The interval of queries
that see a key follows from the starts by a binary search, because starts never decrease along a row.

The tiles that a program walks over are loaded through tensor descriptors (Hopper's tensor memory accelerator; plain
loads elsewhere): one instruction a tile, which leaves the registers to the accumulators and fills with zeros what lies
outside. The tile that a program owns is loaded by pointers: from a descriptor the compiler would keep it in registers,
where the accumulators are, and not in shared memory. A key width that is no power of two (192) is split into the
largest power of two in it and the rest, so that no product is made with padding. Leaves out dropout and biases.

Shapes: B rows, S positions, H query heads, G key/value heads, K key width = E + F (the two parts), V value width.
In a kernel M is a tile of queries and N a tile of keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from .registration import register

LOG2_E = tl.constexpr(1.4426950408889634)
# A finite "nothing seen yet": with minus infinity, rows that a tile hides whole would need a branch against inf − inf.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _load(tensor, batch, row, head, column: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a tensor [B, S, heads, width]; zeros beyond its rows and its columns."""
    return tensor.load([batch, row, head, column]).reshape(ROWS, COLUMNS)


@triton.jit
def _load_own(row_ptr, row_R, stride, rows, width, column: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr):
    """The tile a program owns. Rows beyond the end repeat the last one: what they give is not stored."""
    column_C = column + tl.arange(0, COLUMNS)
    row_R = tl.minimum(row_R, rows - 1)
    if EXACT:
        return tl.load(row_ptr + row_R[:, None] * stride + column_C[None, :])
    else:
        return tl.load(row_ptr + row_R[:, None] * stride + column_C[None, :], mask=column_C[None, :] < width, other=0.0)


@triton.jit
def _store(row_ptr, row_R, stride, rows, width, tile_RC, column: tl.constexpr, COLUMNS: tl.constexpr):
    column_C = column + tl.arange(0, COLUMNS)
    tl.store(
        row_ptr + row_R[:, None] * stride + column_C[None, :],
        tile_RC.to(row_ptr.dtype.element_ty),
        mask=(row_R[:, None] < rows) & (column_C[None, :] < width),
    )


@triton.jit
def _product(a_XE, a_XF, b_YE, b_YF, F: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ over both parts of the key width."""
    out_XY = tl.dot(a_XE, tl.trans(b_YE), input_precision=PRECISION)
    if F:
        out_XY = tl.dot(a_XF, tl.trans(b_YF), acc=out_XY, input_precision=PRECISION)
    return out_XY


@triton.jit
def _intervals(
    starts_ptr,
    positions_ptr,
    lengths_ptr,
    batch,
    row_M,
    rows,
    keys,
    offset,
    STARTS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """First and last key of each query, counted from the first key that was given."""
    row_M = tl.minimum(row_M, rows - 1)  # rows beyond the end do as the last one does, and are not stored
    if POSITIONS:
        last_M = tl.load(positions_ptr + batch.to(tl.int64) * rows + row_M).to(tl.int32)
        last_M = tl.minimum(last_M, tl.load(lengths_ptr + batch).to(tl.int32) - 1) - offset
        last_M = tl.minimum(last_M, keys - 1)
    else:
        last_M = row_M
    if STARTS:
        first_M = tl.load(starts_ptr + batch.to(tl.int64) * rows + row_M).to(tl.int32)
        first_M = tl.maximum(first_M - offset, 0)
    else:
        first_M = tl.zeros_like(last_M)
    return first_M, last_M


@triton.jit
def attention_forward_kernel(
    q_ptr,
    k_e,
    k_f,
    v,
    v_ptr,
    starts_ptr,
    positions_ptr,
    lengths_ptr,
    carry_ptr,
    carry_sums_ptr,
    out_ptr,
    sums_ptr,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    rows,
    keys,
    offset,
    heads,
    group,
    key_width,
    value_width,
    scale_log2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    STARTS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CARRY: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [B, S, H, V] and log-sum-exp [B, H, S].

    Training: query and key positions are rows. With positions: the keys are those from `offset` on of a context, what
    lies beyond a length may be anything, and with a carry the softmax goes on from an earlier result.
    """
    # The last tiles have the most keys: they go first, so that short ones fill the gaps at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    pair = tl.program_id(1)
    batch = pair // heads
    head = pair % heads
    row = tile * BLOCK_M
    row_M = row + tl.arange(0, BLOCK_M)
    first_M, last_M = _intervals(
        starts_ptr, positions_ptr, lengths_ptr, batch, row_M, rows, keys, offset, STARTS, POSITIONS
    )
    begin = tl.min(first_M, axis=0)
    end = tl.max(last_M, axis=0) + 1
    whole_begin = tl.max(first_M, axis=0)
    whole_end = tl.min(last_M, axis=0) + 1

    q_ptr += batch.to(tl.int64) * q_stride_b + row.to(tl.int64) * q_stride_s + head.to(tl.int64) * q_stride_h
    q_ME = _load_own(q_ptr, row_M - row, q_stride_s, rows - row, key_width, 0, E, EXACT)
    q_MF = _load_own(q_ptr, row_M - row, q_stride_s, rows - row, key_width, E, F, EXACT) if F else q_ME
    v_ptr += batch.to(tl.int64) * v_stride_b + (head // group).to(tl.int64) * v_stride_h
    column_V = tl.arange(0, V)
    out_place = ((batch.to(tl.int64) * rows + row) * heads + head) * value_width
    sums_place = pair.to(tl.int64) * rows + row_M
    if CARRY:
        carried_M = tl.load(carry_sums_ptr + sums_place, mask=row_M < rows, other=float("-inf"))
        top_M = tl.maximum(carried_M * LOG2_E, LOWEST)
        sum_M = tl.where(carried_M == float("-inf"), 0.0, 1.0)
        out_MV = tl.load(
            carry_ptr + out_place + (row_M - row)[:, None] * (heads * value_width) + column_V[None, :],
            mask=(row_M < rows)[:, None] & (column_V < value_width)[None, :],
            other=0.0,
        )
    else:
        top_M = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
        sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
        out_MV = tl.zeros((BLOCK_M, V), dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        k_NE = _load(k_e, batch, start, head // group, 0, BLOCK_N, E)
        k_NF = _load(k_f, batch, start, head // group, E, BLOCK_N, F) if F else k_NE
        score_MN = _product(q_ME, q_MF, k_NE, k_NF, F, PRECISION)
        if (start < whole_begin) | (start + BLOCK_N > whole_end):
            key_N = start + tl.arange(0, BLOCK_N)
            seen_MN = (key_N[None, :] >= first_M[:, None]) & (key_N[None, :] <= last_M[:, None])
            score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        # The online softmax (Milakov and Gimelshein 2018).
        new_top_M = tl.maximum(top_M, tl.max(score_MN, axis=1) * scale_log2)
        weight_MN = tl.exp2(score_MN * scale_log2 - new_top_M[:, None])
        shrink_M = tl.exp2(top_M - new_top_M)
        sum_M = sum_M * shrink_M + tl.sum(weight_MN, axis=1)
        out_MV = out_MV * shrink_M[:, None]
        if POSITIONS:
            # A weight of zero does not silence a NaN: values beyond the last key that is seen are not read.
            key_N = start + tl.arange(0, BLOCK_N)
            v_NV = tl.load(
                v_ptr + key_N.to(tl.int64)[:, None] * v_stride_s + column_V[None, :],
                mask=(key_N < end)[:, None] & (column_V < value_width)[None, :],
                other=0.0,
            )
        else:
            v_NV = _load(v, batch, start, head // group, 0, BLOCK_N, V)
        out_MV = tl.dot(weight_MN.to(v_NV.dtype), v_NV, acc=out_MV, input_precision=PRECISION)
        top_M = new_top_M
    out_MV = out_MV / tl.where(sum_M == 0.0, 1.0, sum_M)[:, None]
    _store(out_ptr + out_place, row_M - row, heads * value_width, rows - row, value_width, out_MV, 0, V)
    sums_M = tl.where(sum_M == 0.0, float("-inf"), (top_M + tl.log2(tl.where(sum_M == 0.0, 1.0, sum_M))) / LOG2_E)
    tl.store(sums_ptr + sums_place, sums_M, mask=row_M < rows)


@triton.jit
def query_gradient_kernel(
    k_e,
    k_f,
    v,
    q_ptr,
    grad_ptr,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    grad_stride_b,
    grad_stride_s,
    grad_stride_h,
    starts_ptr,
    out_ptr,
    sums_ptr,
    delta_ptr,
    dq_ptr,
    rows,
    heads,
    group,
    key_width,
    value_width,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    STARTS: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, and delta = Σ_v dout · out of each query, which the other kernel needs too."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    pair = tl.program_id(1)
    batch = pair // heads
    head = pair % heads
    row = tile * BLOCK_M
    row_M = row + tl.arange(0, BLOCK_M)
    first_M, last_M = _intervals(starts_ptr, sums_ptr, sums_ptr, batch, row_M, rows, rows, 0, STARTS, False)
    begin = tl.min(first_M, axis=0)
    end = tl.max(last_M, axis=0) + 1
    whole_begin = tl.max(first_M, axis=0)
    whole_end = tl.min(last_M, axis=0) + 1

    q_ptr += batch.to(tl.int64) * q_stride_b + row.to(tl.int64) * q_stride_s + head.to(tl.int64) * q_stride_h
    grad_ptr += batch.to(tl.int64) * grad_stride_b + row.to(tl.int64) * grad_stride_s
    grad_ptr += head.to(tl.int64) * grad_stride_h
    q_ME = _load_own(q_ptr, row_M - row, q_stride_s, rows - row, key_width, 0, E, EXACT)
    q_MF = _load_own(q_ptr, row_M - row, q_stride_s, rows - row, key_width, E, F, EXACT) if F else q_ME
    grad_MV = _load_own(grad_ptr, row_M - row, grad_stride_s, rows - row, value_width, 0, V, EXACT)
    first_row = (batch.to(tl.int64) * rows + row) * heads + head
    column_V = tl.arange(0, V)
    out_MV = tl.load(
        out_ptr + first_row * value_width + (row_M - row)[:, None] * (heads * value_width) + column_V[None, :],
        mask=(row_M < rows)[:, None] & (column_V < value_width)[None, :],
        other=0.0,
    )
    delta_M = tl.sum(grad_MV.to(tl.float32) * out_MV.to(tl.float32), axis=1)
    sums_place = pair.to(tl.int64) * rows + row_M
    tl.store(delta_ptr + sums_place, delta_M, mask=row_M < rows)
    sums_M = tl.load(sums_ptr + sums_place, mask=row_M < rows, other=0.0) * LOG2_E

    scale_log2 = scale * LOG2_E
    dq_ME = tl.zeros((BLOCK_M, E), dtype=tl.float32)
    dq_MF = tl.zeros((BLOCK_M, F), dtype=tl.float32) if F else sums_M
    for start in range(begin, end, BLOCK_N):
        k_NE = _load(k_e, batch, start, head // group, 0, BLOCK_N, E)
        k_NF = _load(k_f, batch, start, head // group, E, BLOCK_N, F) if F else k_NE
        v_NV = _load(v, batch, start, head // group, 0, BLOCK_N, V)
        score_MN = _product(q_ME, q_MF, k_NE, k_NF, F, PRECISION)
        dweight_MN = tl.dot(grad_MV, tl.trans(v_NV), input_precision=PRECISION)
        weight_MN = tl.exp2(score_MN * scale_log2 - sums_M[:, None])
        if (start < whole_begin) | (start + BLOCK_N > whole_end):
            key_N = start + tl.arange(0, BLOCK_N)
            seen_MN = (key_N[None, :] >= first_M[:, None]) & (key_N[None, :] <= last_M[:, None])
            weight_MN = tl.where(seen_MN, weight_MN, 0.0)
        dscore_MN = (weight_MN * (dweight_MN - delta_M[:, None])).to(k_NE.dtype)
        dq_ME = tl.dot(dscore_MN, k_NE, acc=dq_ME, input_precision=PRECISION)
        if F:
            dq_MF = tl.dot(dscore_MN, k_NF, acc=dq_MF, input_precision=PRECISION)
    dq_ptr += first_row * key_width
    _store(dq_ptr, row_M - row, heads * key_width, rows - row, key_width, dq_ME * scale, 0, E)
    if F:
        _store(dq_ptr, row_M - row, heads * key_width, rows - row, key_width, dq_MF * scale, E, F)


@triton.jit
def key_gradient_kernel(
    q_e,
    q_f,
    grad,
    k_ptr,
    v_ptr,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    ends_ptr,
    sums_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    rows,
    heads,
    group,
    key_width,
    value_width,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    STARTS: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv. Key n is seen by the queries n .. ends[n] - 1 of every head of its group."""
    tile = tl.program_id(0)  # the first keys are seen most, and go first
    kv_heads = heads // group
    batch = tl.program_id(1) // kv_heads
    kv_head = tl.program_id(1) % kv_heads
    begin = tile * BLOCK_N
    key_N = begin + tl.arange(0, BLOCK_N)
    if STARTS:
        end_N = tl.load(ends_ptr + batch.to(tl.int64) * rows + tl.minimum(key_N, rows - 1))
    else:
        end_N = tl.zeros_like(key_N) + rows
    # Tiles of queries that see every key here: none before the last key, none from the smallest end on.
    end = tl.max(end_N, axis=0)
    whole_begin = begin + BLOCK_N - 1
    whole_end = tl.min(end_N, axis=0)

    k_ptr += batch.to(tl.int64) * k_stride_b + begin.to(tl.int64) * k_stride_s + kv_head.to(tl.int64) * k_stride_h
    v_ptr += batch.to(tl.int64) * v_stride_b + begin.to(tl.int64) * v_stride_s + kv_head.to(tl.int64) * v_stride_h
    k_NE = _load_own(k_ptr, key_N - begin, k_stride_s, rows - begin, key_width, 0, E, EXACT)
    k_NF = _load_own(k_ptr, key_N - begin, k_stride_s, rows - begin, key_width, E, F, EXACT) if F else k_NE
    v_NV = _load_own(v_ptr, key_N - begin, v_stride_s, rows - begin, value_width, 0, V, EXACT)
    dk_NE = tl.zeros((BLOCK_N, E), dtype=tl.float32)
    dk_NF = tl.zeros((BLOCK_N, F), dtype=tl.float32) if F else end_N
    dv_NV = tl.zeros((BLOCK_N, V), dtype=tl.float32)
    scale_log2 = scale * LOG2_E
    steps = tl.cdiv(end - begin, BLOCK_M)
    for index in range(0, group * steps):
        head = kv_head * group + index // steps
        start = begin + index % steps * BLOCK_M
        q_ME = _load(q_e, batch, start, head, 0, BLOCK_M, E)
        q_MF = _load(q_f, batch, start, head, E, BLOCK_M, F) if F else q_ME
        grad_MV = _load(grad, batch, start, head, 0, BLOCK_M, V)
        query_M = start + tl.arange(0, BLOCK_M)
        place_M = (batch * heads + head).to(tl.int64) * rows + tl.minimum(query_M, rows - 1)
        sums_M = tl.load(sums_ptr + place_M) * LOG2_E
        delta_M = tl.load(delta_ptr + place_M)
        score_NM = _product(k_NE, k_NF, q_ME, q_MF, F, PRECISION)
        weight_NM = tl.exp2(score_NM * scale_log2 - sums_M[None, :])
        if (start < whole_begin) | (start + BLOCK_M > whole_end):
            seen_NM = (query_M[None, :] >= key_N[:, None]) & (query_M[None, :] < end_N[:, None])
            weight_NM = tl.where(seen_NM, weight_NM, 0.0)
        dv_NV = tl.dot(weight_NM.to(grad_MV.dtype), grad_MV, acc=dv_NV, input_precision=PRECISION)
        dweight_NM = tl.dot(v_NV, tl.trans(grad_MV), input_precision=PRECISION)
        dscore_NM = (weight_NM * (dweight_NM - delta_M[None, :])).to(q_ME.dtype)
        dk_NE = tl.dot(dscore_NM, q_ME, acc=dk_NE, input_precision=PRECISION)
        if F:
            dk_NF = tl.dot(dscore_NM, q_MF, acc=dk_NF, input_precision=PRECISION)
    first_row = (batch.to(tl.int64) * rows + begin) * kv_heads + kv_head
    dk_ptr += first_row * key_width
    dv_ptr += first_row * value_width
    _store(dk_ptr, key_N - begin, kv_heads * key_width, rows - begin, key_width, dk_NE * scale, 0, E)
    if F:
        _store(dk_ptr, key_N - begin, kv_heads * key_width, rows - begin, key_width, dk_NF * scale, E, F)
    _store(dv_ptr, key_N - begin, kv_heads * value_width, rows - begin, value_width, dv_NV, 0, V)


def widths(key_width: int, value_width: int) -> dict[str, int | bool]:
    """How a kernel cuts the widths: E and F for the keys, V for the values; EXACT where that leaves no column over."""
    e = max(16, 1 << (key_width.bit_length() - 1))
    f = 0 if key_width <= e else max(16, triton.next_power_of_2(key_width - e))
    v = max(16, triton.next_power_of_2(value_width))
    return {"E": e, "F": f, "V": v, "EXACT": e + f == key_width and v == value_width}


# BLOCK_M, BLOCK_N, num_warps, num_stages
TILES = {
    "forward": (64, 64, 4, 2),
    "query_gradient": (128, 32, 8, 3),
    "key_gradient": (32, 64, 4, 2),
}


def tiles(kernel: str, q_BSHK: Tensor, value_width: int) -> dict[str, int]:
    """Tile sizes of a kernel: "forward", "query_gradient" or "key_gradient"."""
    if not q_BSHK.is_cuda:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    if q_BSHK.dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    roomy = torch.cuda.get_device_capability(q_BSHK.device)[0] in (9, 10)  # 227 KiB of shared memory a processor
    if not roomy or q_BSHK.shape[-1] + value_width > 320:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2 if roomy else 1}
    block_m, block_n, warps, stages = TILES[kernel]
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def described(tensor_BSHC: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of `rows` positions and `columns` of one row's one head."""
    return TensorDescriptor(tensor_BSHC, list(tensor_BSHC.shape), list(tensor_BSHC.stride()), [1, rows, 1, columns])


def parts(tensor_BSHK: Tensor, rows: int, cut: dict[str, int | bool]) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Both parts of a key width; where there is no second part, its descriptor is not used."""
    return described(tensor_BSHK, rows, cut["E"]), described(tensor_BSHK, rows, cut["F"] or cut["E"])


def describable(tensor: Tensor) -> Tensor:
    """The tensor as descriptors take it: columns side by side, everything else at multiples of 16 bytes. A copy only
    where it is not so already, which no published model's is."""
    if not tensor.is_cuda:
        tensor = tensor.float()  # the interpreter's tl.dot multiplies the bits of bfloat16 as if they were integers
    step = 16 // tensor.element_size()
    strides = tensor.stride()
    if strides[-1] == 1 and not any(s % step or s == 0 for s in strides[:-1]) and tensor.data_ptr() % 16 == 0:
        return tensor
    width = tensor.shape[-1]
    return functional.pad(tensor, (0, -width % step))[..., :width] if width % step else tensor.contiguous().clone()


def ends_of(starts_BS: Tensor) -> Tensor:
    """The first query that does not see a key any more: key n is seen by the queries n .. ends[n] - 1, because query s
    sees it where starts[s] <= n <= s, and starts never decrease."""
    index_BS = torch.arange(starts_BS.shape[1], dtype=starts_BS.dtype, device=starts_BS.device).expand(starts_BS.shape)
    return torch.searchsorted(starts_BS.contiguous(), index_BS.contiguous(), right=True, out_int32=True)


def precision(tensor: Tensor) -> str:
    """float32 operands are multiplied as such, not as tf32."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def attend(
    q_BSHK: Tensor,
    k_BNGK: Tensor,
    v_BNGV: Tensor,
    starts_BS: Tensor | None,
    positions_BS: Tensor | None,
    lengths_B: Tensor | None,
    carry: tuple[Tensor, Tensor] | None,
    out_BSHV: Tensor,
    sums_BHS: Tensor,
    offset: int,
    scale: float,
) -> None:
    """Start the forward kernel, which fills out_BSHV and sums_BHS."""
    batch, rows, heads, key_width = q_BSHK.shape
    keys, kv_heads, value_width = v_BNGV.shape[1:]
    q, k, v = (describable(t) for t in (q_BSHK, k_BNGK, v_BNGV))
    options, cut = tiles("forward", q, value_width), widths(key_width, value_width)
    unused = sums_BHS
    attention_forward_kernel[(triton.cdiv(rows, options["BLOCK_M"]), batch * heads)](
        q,
        *parts(k, options["BLOCK_N"], cut),
        described(v, options["BLOCK_N"], cut["V"]),
        v,
        unused if starts_BS is None else starts_BS.contiguous(),
        unused if positions_BS is None else positions_BS.contiguous(),
        unused if lengths_B is None else lengths_B.contiguous(),
        *(carry or (unused, unused)),
        out_BSHV,
        sums_BHS,
        *q.stride()[:3],
        *v.stride()[:3],
        rows,
        keys,
        offset,
        heads,
        heads // kv_heads,
        key_width,
        value_width,
        scale * LOG2_E.value,
        **cut,
        STARTS=starts_BS is not None,
        POSITIONS=positions_BS is not None,
        CARRY=carry is not None,
        PRECISION=precision(q),
        **options,
    )


@torch.library.custom_op("deepwright::packed_attention", mutates_args=())
def _forward(
    q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, starts_BS: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q_BSHK.shape
    out = torch.empty((batch, rows, heads, v_BSGV.shape[-1]), dtype=q_BSHK.dtype, device=q_BSHK.device)
    sums_BHS = torch.empty((batch, heads, rows), dtype=torch.float32, device=q_BSHK.device)
    if out.numel():
        attend(q_BSHK, k_BSGK, v_BSGV, starts_BS, None, None, None, out, sums_BHS, 0, scale)
    return out, sums_BHS


@torch.library.custom_op("deepwright::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q_BSHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    starts_BS: Tensor | None,
    out_BSHV: Tensor,
    sums_BHS: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, heads, key_width = q_BSHK.shape
    kv_heads, value_width = v_BSGV.shape[2:]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q_BSHK, k_BSGK, v_BSGV))
    if not out_BSHV.numel():
        return dq, dk, dv
    grad, q, k, v = (describable(t) for t in (grad, q_BSHK, k_BSGK, v_BSGV))
    ends_BS = None if starts_BS is None else ends_of(starts_BS)
    delta_BHS = torch.empty_like(sums_BHS)
    cut = widths(key_width, value_width)
    shared = {**cut, "STARTS": starts_BS is not None, "PRECISION": precision(q)}
    sizes = (rows, heads, heads // kv_heads, key_width, value_width, scale)
    options = tiles("query_gradient", q, value_width)
    query_gradient_kernel[(triton.cdiv(rows, options["BLOCK_M"]), batch * heads)](
        *parts(k, options["BLOCK_N"], cut),
        described(v, options["BLOCK_N"], cut["V"]),
        q,
        grad,
        *q.stride()[:3],
        *grad.stride()[:3],
        sums_BHS if starts_BS is None else starts_BS.contiguous(),
        out_BSHV,
        sums_BHS,
        delta_BHS,
        dq,
        *sizes,
        **shared,
        **options,
    )
    options = tiles("key_gradient", q, value_width)
    key_gradient_kernel[(triton.cdiv(rows, options["BLOCK_N"]), batch * kv_heads)](
        *parts(q, options["BLOCK_M"], cut),
        described(grad, options["BLOCK_M"], cut["V"]),
        k,
        v,
        *k.stride()[:3],
        *v.stride()[:3],
        sums_BHS if ends_BS is None else ends_BS,
        sums_BHS,
        delta_BHS,
        dk,
        dv,
        *sizes,
        **shared,
        **options,
    )
    return dq, dk, dv


register(_forward, _backward)


def packed_attention(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, starts_BS: Tensor | None, scale: float) -> Tensor:
    """See the operator's docstring."""
    return _forward(q_BSHK, k_BSGK, v_BSGV, starts_BS, scale)[0]
