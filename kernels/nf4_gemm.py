"""x·Wᵀ with W in NF4, for the few rows of a decode step: the 4-bit bytes are read once and unpacked in registers.

The weights that are multiplied are bit for bit those that bitsandbytes unpacks: level·scale in float32, rounded to the
type of x. Two neighbouring inputs share a byte, so a tile of bytes gives two products: its high nibbles with the even
inputs of x, its low ones with the odd. W is the left operand: 64 of its rows fill the tensor cores where x has few.
A single row of x goes without tensor cores: unpacking is what takes the time, and there nothing has to be rearranged
for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tandem.kernels.nf4 import StackedScales, levels_on, write_nf4_stack
from tandem.kernels.reference import Impl, ceil_div, picks_triton
from tandem.kernels.split_inputs import turns_per_program

try:
    import triton
    import triton.language as tl
except ImportError:  # the twin answers where Triton does not exist
    triton = None

# Rows of x up to which this beats unpacking the weight for cuBLAS; callers switch.
BEST_UP_TO_ROWS = 64
MAX_PARTS = 3
DTYPES = (torch.bfloat16, torch.float16)
_BLOCK = 64


@dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        block_n: weight rows per program. block_m: rows of x per program, 1 without tensor cores, from 16 on with them.
        unroll: blocks of 64 inputs per turn.
        lookup: how a nibble becomes its level: `shuffle`, where every lane of a warp holds a level and gives it to
            whoever asks (half the instructions, but inline assembly), or `load` from a table of 64 bytes, which should
            go with one stage: more would stage the table in shared memory too. Off NVIDIA's devices it is `load`.
        splits: programs that share the inputs of a tile; None: as many as fill the device.
    """

    block_n: int = 64
    block_m: int = 16
    unroll: int = 2
    warps: int = 4
    stages: int = 3
    lookup: Literal["load", "shuffle"] = "shuffle"
    splits: int | None = None


# By rows of x; the fastest of `benchmarks/tune_nf4_gemm.py`.
_CONFIGS = (
    (1, Config(block_n=16, block_m=1, unroll=4, stages=1, splits=4)),
    (16, Config(block_n=128, block_m=16)),
    (32, Config(block_n=128, block_m=32)),
    (64, Config(block_n=128, block_m=64, unroll=1, stages=4, splits=4)),
)
# Takes 116 KiB of shared memory, and from Triton 3.6 on a B200 544 of 512 columns of tensor memory.
_LARGEST = Config(block_n=128, block_m=128, warps=8)
# Takes 74 KiB and fewer columns. Not tuned on any device.
_LARGEST_ELSEWHERE = Config(block_n=128, block_m=128, unroll=1, warps=8)
# Bytes of shared memory a block. Cards have 99, 163 or 227 KiB.
_ROOMY = 128 << 10


def default_config(rows: int, *, roomy: bool = True) -> Config:
    """The table's entry for so many rows of x; `roomy`: the device has what the largest tiles take, as an H100 has."""
    largest = _LARGEST if roomy else _LARGEST_ELSEWHERE
    return next((config for limit, config in _CONFIGS if rows <= limit), largest)


def _config_for(x: torch.Tensor) -> Config:
    """Asks the device only where the answer counts: a decode step has no time for it."""
    rows = x.shape[0]
    return default_config(rows, roomy=rows <= _CONFIGS[-1][0] or not x.is_cuda or _is_roomy())


def _is_roomy() -> bool:
    """Whether the current device has shared memory for the largest tiles, and no tensor memory that they exceed."""
    driver = triton.runtime.driver.active
    shared: int = driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"]
    target = driver.get_current_target()
    return shared >= _ROOMY and not (target.backend == "cuda" and target.arch >= 100)


def nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax2: torch.Tensor | None,
    code2: torch.Tensor | None,
    offsets: torch.Tensor | None,
    part_rows: Sequence[int],
    blocksize: int = 64,
    blocksize2: int = 256,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    config: Config | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """x·Wᵀ + bias, sums in float32; the same bits at every call. Safe under CUDA graph capture after a first call.

    W holds projections of one input, each quantised on its own, rows one behind the other.

    Args:
        x: `[M, in]` bfloat16 or float16, in a multiple of 64; W is rounded to the same type.
        packed: `out·in / 2` bytes, high nibble first.
        absmax: `[out·in / 64]` uint8, or float32 scales that are not nested; then absmax2, code2 and offsets are None.
        absmax2: `[Σ ceil(rows_i·in / 64 / 256)]` float32, those of each part behind the last. code2: `[256]` float32.
        offsets: `[parts]` float32. part_rows: rows of each part, at most 3, their sum is out.
        bias: `[out]`. out: a buffer `[M, out]` of the same type with unit stride along `out`.
        config: of the kernel; default by M.

    Returns:
        `[M, out]` in the type of x.

    Raises:
        ValueError: sizes or types that do not fit each other.
    """
    part_rows = tuple(part_rows)
    rows, width = sum(part_rows), x.shape[1]
    packed = packed.view(-1)
    _check(x, packed, absmax, absmax2, code2, offsets, part_rows, blocksize, blocksize2, bias)
    if out is None:
        out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    if tuple(out.shape) != (x.shape[0], rows) or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype}: {x.dtype} [{x.shape[0]}, {rows}] is needed")
    if not out.numel():
        return out
    scales = (absmax, absmax2, code2, offsets)
    if picks_triton(x, impl):
        _multiply_triton(x, packed, scales, part_rows, blocksize2, bias, out, config or _config_for(x))
        return out
    weight = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    write_nf4_stack(weight, packed, scales, part_rows, blocksize, blocksize2, impl=impl)
    product = x.float() @ weight.float().t()
    return out.copy_(product if bias is None else product + bias.float())


def _check(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax2: torch.Tensor | None,
    code2: torch.Tensor | None,
    offsets: torch.Tensor | None,
    part_rows: tuple[int, ...],
    blocksize: int,
    blocksize2: int,
    bias: torch.Tensor | None,
) -> None:
    rows, width = sum(part_rows), x.shape[1]
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype}: a bfloat16 or float16 matrix is needed")
    if blocksize != _BLOCK or width % _BLOCK:
        raise ValueError(f"blocksize={blocksize}, {width} inputs: whole blocks of {_BLOCK} are needed")
    if blocksize2 < 1 or blocksize2 & (blocksize2 - 1):
        raise ValueError(f"blocksize2={blocksize2} is no power of two")
    if not 1 <= len(part_rows) <= MAX_PARTS or min(part_rows) < 1:
        raise ValueError(f"part_rows={part_rows}: from 1 to {MAX_PARTS} parts with rows are needed")
    blocks = width // _BLOCK
    outer = sum(math.ceil(count * blocks / blocksize2) for count in part_rows)
    nested = absmax.dtype == torch.uint8
    wanted = [
        ("packed", packed, torch.uint8, rows * width // 2),
        ("absmax", absmax, torch.uint8 if nested else torch.float32, rows * blocks),
    ]
    for name, tensor, count in (
        ("absmax2", absmax2, outer),
        ("code2", code2, 256),
        ("offsets", offsets, len(part_rows)),
    ):
        if (tensor is not None) != nested:
            raise ValueError(f"absmax in {absmax.dtype}: {name} is {'needed' if nested else 'of no use'}")
        if tensor is not None:
            wanted.append((name, tensor, torch.float32, count))
    for name, tensor, dtype, count in wanted:
        if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_contiguous():
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype}: {count} contiguous {dtype} are needed")
    if bias is not None and (tuple(bias.shape) != (rows,) or not bias.is_contiguous()):
        raise ValueError(f"bias {tuple(bias.shape)}: [{rows}] is needed")


def _split(blocks: int, count: int, tiles: int, config: Config, device: torch.device) -> tuple[int, int]:
    """Blocks of inputs per program, in whole turns, and programs per tile, for so many rows of x."""
    turns, row_bytes = math.ceil(blocks / config.unroll), blocks * _BLOCK // 2
    per_program = config.unroll * turns_per_program(
        turns, tiles, row_bytes=row_bytes, count=count, wanted=config.splits, device=device
    )
    return per_program, math.ceil(blocks / per_program)


def _multiply_triton(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: StackedScales,
    part_rows: tuple[int, ...],
    blocksize2: int,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Config,
) -> None:
    absmax, absmax2, code2, offsets = scales
    (count, width), rows = x.shape, out.shape[1]
    if x.stride(1) != 1 or x.stride(0) % 2 or x.data_ptr() % 4:
        x = x.contiguous()
    pairs = x.view(torch.int32)  # two neighbours at once
    blocks = width // _BLOCK
    first = part_rows[0]
    second = first + part_rows[1] if len(part_rows) > 1 else rows
    outer1 = math.ceil(first * blocks / blocksize2)
    outer2 = outer1 + (math.ceil(part_rows[1] * blocks / blocksize2) if len(part_rows) > 1 else 0)
    tiles_n, tiles_m = ceil_div(rows, config.block_n), ceil_div(count, config.block_m)
    per_program, splits = _split(blocks, count, tiles_n * tiles_m, config, x.device)
    # Sums of one program each, added in a fixed order by a second kernel. In a captured graph this is graph memory.
    sums = out if splits == 1 else torch.empty(splits, count, rows, dtype=torch.float32, device=x.device)
    levels = levels_on(x.device)
    shuffle = config.lookup == "shuffle" and x.is_cuda and torch.version.cuda is not None
    nested = (tensor if tensor is not None else levels for tensor in (absmax2, code2, offsets))
    kernel = _vector_kernel if config.block_m == 1 else _gemm_kernel
    kernel[(tiles_n, splits, tiles_m)](
        pairs, packed, absmax, *nested, levels, out if bias is None else bias, sums,
        count, rows, blocks, per_program, pairs.stride(0), sums.stride(-2), count * rows,
        first, second, outer1, outer2,
        OUTER=blocksize2, BLOCK_N=config.block_n, BLOCK_M=config.block_m, UNROLL=config.unroll,
        EVEN=blocks % per_program == 0 and per_program % config.unroll == 0,
        NESTED=absmax2 is not None, BIAS=bias is not None and splits == 1, SHUFFLE=shuffle,
        HALF=x.dtype == torch.float16, WIDE=not x.is_cuda,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if splits > 1:
        _sum_kernel[(ceil_div(rows, 512), count)](
            sums, out if bias is None else bias, out, rows, out.stride(0), count * rows, splits,
            BIAS=bias is not None, BLOCK=512, num_warps=4,
        )  # fmt: skip


if triton is not None:

    @triton.jit
    def _outer_scales(row, absmax2, offsets, blocks, row1, row2, outer1, outer2):
        """Of the part that each row belongs to: its offset, its outer scales, and the row's first block in it."""
        part = (row >= row1).to(tl.int32) + (row >= row2).to(tl.int32)
        offset = tl.load(offsets + part)
        inner_block = (row - tl.where(part == 2, row2, tl.where(part == 1, row1, 0))) * blocks
        outer = absmax2 + tl.where(part == 2, outer2, tl.where(part == 1, outer1, 0))
        return offset, outer, inner_block

    @triton.jit
    def _own_level(levels, SHUFFLE: tl.constexpr):
        """The level that this lane holds for its warp, where they are shuffled."""
        if SHUFFLE:
            lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
            return tl.load(levels + (lane & 15))
        return 0.0

    @triton.jit
    def _level(nibble, levels, mine, SHUFFLE: tl.constexpr):
        """float32 levels of the low four bits."""
        if SHUFFLE:
            # Lanes in two halves of 16: the lane asked is the nibble, higher bits are not looked at.
            return tl.inline_asm_elementwise(
                "shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;", "=f,f,r", [mine, nibble],
                dtype=tl.float32, is_pure=True, pack=1,
            )  # fmt: skip
        return tl.load(levels + (nibble & 15))

    # Their values differ from call to call and would only have the same code compiled again.
    @triton.jit(do_not_specialize=["count", "per_program"])
    def _gemm_kernel(
        x, packed, absmax, absmax2, code2, offsets, levels, bias, out,
        count, rows, blocks, per_program, x_stride, out_stride, split_stride, row1, row2, outer1, outer2,
        OUTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, EVEN: tl.constexpr,
        NESTED: tl.constexpr, BIAS: tl.constexpr, SHUFFLE: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """`[BLOCK_N]` outputs of `[BLOCK_M]` rows of x over `per_program` blocks of 64 inputs."""
        TYPE: tl.constexpr = tl.float16 if HALF else tl.bfloat16
        out_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        # Beyond the last row the last one is read again: loads without masks, results that nobody stores.
        row = tl.minimum(out_row, rows - 1)
        if NESTED:
            offset, outer, inner_block = _outer_scales(row, absmax2, offsets, blocks, row1, row2, outer1, outer2)
        token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        byte = tl.arange(0, 32)
        row_block = row.to(tl.int64) * blocks
        bytes_at = packed + row_block[:, None] * 32 + byte[None, :]
        x_at = x + tl.minimum(token, count - 1).to(tl.int64)[None, :] * x_stride + byte[:, None]
        mine = _own_level(levels, SHUFFLE)
        begin = tl.program_id(1) * per_program
        end = tl.minimum(begin + per_program, blocks)
        sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for turn in range(begin, end, UNROLL):
            for step in tl.static_range(UNROLL):
                block = turn + step
                if not EVEN:
                    block = tl.minimum(block, end - 1)
                pair = tl.load(bytes_at + block * 32)
                both = tl.load(x_at + block * 32)
                if not EVEN:  # a turn that reaches too far multiplies by zeros
                    both = tl.where(turn + step < end, both, 0)
                inner = tl.load(absmax + row_block + block)
                if NESTED:
                    # Without fused multiply-add: bitsandbytes rounds the product before it adds the offset.
                    scale = tl.load(code2 + inner.to(tl.int32)) * tl.load(outer + (inner_block + block) // OUTER)
                    scale += offset
                else:
                    scale = inner
                nibbles = pair.to(tl.int32)
                high = (_level(nibbles >> 4, levels, mine, SHUFFLE) * scale[:, None]).to(TYPE)
                low = (_level(nibbles, levels, mine, SHUFFLE) * scale[:, None]).to(TYPE)
                even = both.to(tl.int16).to(TYPE, bitcast=True)
                odd = (both >> 16).to(tl.int16).to(TYPE, bitcast=True)
                if WIDE:  # for the interpreter, which takes bfloat16 for integers
                    sums = tl.dot(high.to(tl.float32), even.to(tl.float32), sums)
                    sums = tl.dot(low.to(tl.float32), odd.to(tl.float32), sums)
                else:
                    sums = tl.dot(high, even, sums)
                    sums = tl.dot(low, odd, sums)
        if BIAS:
            sums += tl.load(bias + row).to(tl.float32)[:, None]
        inside = (out_row < rows)[:, None] & (token < count)[None, :]
        target = tl.program_id(1).to(tl.int64) * split_stride + token.to(tl.int64)[None, :] * out_stride
        tl.store(out + target + out_row[:, None], sums.to(out.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["count", "per_program"])
    def _vector_kernel(
        x, packed, absmax, absmax2, code2, offsets, levels, bias, out,
        count, rows, blocks, per_program, x_stride, out_stride, split_stride, row1, row2, outer1, outer2,
        OUTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, UNROLL: tl.constexpr, EVEN: tl.constexpr,
        NESTED: tl.constexpr, BIAS: tl.constexpr, SHUFFLE: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """`[BLOCK_N]` outputs of one row of x a program: as `_gemm_kernel`, the products summed where they are made."""
        TYPE: tl.constexpr = tl.float16 if HALF else tl.bfloat16
        out_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.minimum(out_row, rows - 1)
        if NESTED:
            offset, outer, inner_block = _outer_scales(row, absmax2, offsets, blocks, row1, row2, outer1, outer2)
        token = tl.program_id(2)
        byte = tl.arange(0, 32)
        step = tl.arange(0, UNROLL)
        row_block = row.to(tl.int64) * blocks
        bytes_at = packed + row_block[:, None, None] * 32 + byte[None, None, :]
        x_at = x + token.to(tl.int64) * x_stride + byte[None, :]
        mine = _own_level(levels, SHUFFLE)
        begin = tl.program_id(1) * per_program
        end = tl.minimum(begin + per_program, blocks)
        products = tl.zeros((BLOCK_N, UNROLL, 32), dtype=tl.float32)
        for turn in range(begin, end, UNROLL):
            block = turn + step
            if not EVEN:
                block = tl.minimum(block, end - 1)
            pair = tl.load(bytes_at + block[None, :, None] * 32)
            both = tl.load(x_at + block[:, None] * 32)
            if not EVEN:
                both = tl.where((turn + step < end)[:, None], both, 0)
            inner = tl.load(absmax + row_block[:, None] + block[None, :])
            if NESTED:
                outer_at = outer[:, None] + (inner_block[:, None] + block[None, :]) // OUTER
                scale = tl.load(code2 + inner.to(tl.int32)) * tl.load(outer_at) + offset[:, None]
            else:
                scale = inner
            nibbles = pair.to(tl.int32)
            high = (_level(nibbles >> 4, levels, mine, SHUFFLE) * scale[:, :, None]).to(TYPE).to(tl.float32)
            low = (_level(nibbles, levels, mine, SHUFFLE) * scale[:, :, None]).to(TYPE).to(tl.float32)
            if HALF:
                even = both.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
                odd = (both >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
            else:  # the upper half of a float32
                even = (both << 16).to(tl.float32, bitcast=True)
                odd = ((both >> 16) << 16).to(tl.float32, bitcast=True)
            products = tl.fma(high, tl.broadcast_to(even[None, :, :], products.shape), products)
            products = tl.fma(low, tl.broadcast_to(odd[None, :, :], products.shape), products)
        sums = tl.sum(tl.sum(products, axis=2), axis=1)
        if BIAS:
            sums += tl.load(bias + row).to(tl.float32)
        target = tl.program_id(1).to(tl.int64) * split_stride + token.to(tl.int64) * out_stride
        tl.store(out + target + out_row, sums.to(out.dtype.element_ty), mask=out_row < rows)

    @triton.jit(do_not_specialize=["splits"])
    def _sum_kernel(
        sums, bias, out, rows, out_stride, split_stride, splits, BIAS: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        token = tl.program_id(1).to(tl.int64)
        inside = row < rows
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        at = sums + token * rows + row
        for _ in range(splits):
            total += tl.load(at, mask=inside, other=0.0)
            at += split_stride
        if BIAS:
            total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + token * out_stride + row, total.to(out.dtype.element_ty), mask=inside)
