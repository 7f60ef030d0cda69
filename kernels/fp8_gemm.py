"""x·Wᵀ with W in 8-bit floating point, for the few rows of a decode step: the bytes are read once.

Every E4M3 value is a bfloat16 and a float16 value, so tensor cores multiply by the bytes as they are, and the power of
two of each output scales its sum (`kernels/fp8.py`). W is the left operand: its rows fill the tensor cores where x has
few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tandem.kernels.fp8 import check_fp8, dequantize_fp8
from tandem.kernels.reference import Impl, ceil_div, picks_triton
from tandem.kernels.split_inputs import turns_per_program

try:
    import triton
    import triton.language as tl

    from tandem.kernels.fp8 import e4m3_to_float
except ImportError:  # the twin answers where Triton does not exist
    triton = None

# Rows of x up to which the fused product is taken; beyond, the weight is unpacked for cuBLAS.
BEST_UP_TO_ROWS = 64
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Config:
    """How the work is cut: weight rows, rows of x and inputs per tile; splits: programs that share a tile's inputs,
    None: as many as fill the device."""

    block_n: int = 64
    block_m: int = 16
    block_k: int = 128
    warps: int = 4
    stages: int = 4
    splits: int | None = None


def default_config(count: int) -> Config:
    """By rows of x. Not tuned on any device yet."""
    return Config(block_m=next(size for size in (16, 32, 64) if count <= size or size == 64))


def fp8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    config: Config | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """x·Wᵀ + bias, sums in float32; the same bits at every call. Safe under CUDA graph capture after a first call.

    Args:
        x: `[M, in]` bfloat16 or float16. packed: `[out, in]` uint8; scales: `[out]` float32 (`quantize_fp8`). bias:
            `[out]`.

    Returns:
        `[M, out]` in the type of x.

    Raises:
        ValueError: sizes or types that do not fit each other.
    """
    check_fp8(packed, scales)
    outputs, width = packed.shape
    if x.dim() != 2 or x.dtype not in DTYPES or x.shape[1] != width:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype}: a bfloat16 or float16 matrix with {width} columns is needed")
    if bias is not None and (tuple(bias.shape) != (outputs,) or not bias.is_contiguous()):
        raise ValueError(f"bias {tuple(bias.shape)}: [{outputs}] is needed")
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if picks_triton(x, impl):
        _multiply_triton(x, packed, scales, bias, out, config or default_config(x.shape[0]))
        return out
    product = x.float() @ dequantize_fp8(packed, scales, impl=impl).float().t()
    return out.copy_(product if bias is None else product + bias.float())


def _multiply_triton(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Config,
) -> None:
    if x.stride(1) != 1:
        x = x.contiguous()
    (count, width), outputs = x.shape, packed.shape[0]
    turns = ceil_div(width, config.block_k)
    tiles = ceil_div(outputs, config.block_n), ceil_div(count, config.block_m)
    per_program = turns_per_program(
        turns, tiles[0] * tiles[1], row_bytes=width, count=count, wanted=config.splits, device=x.device
    )
    splits = ceil_div(turns, per_program)
    # Sums of one program each, added in a fixed order. In a captured graph this is graph memory.
    sums = out if splits == 1 else torch.empty(splits, count, outputs, dtype=torch.float32, device=x.device)
    _gemm_kernel[(tiles[0], splits, tiles[1])](
        x, packed, scales, scales if bias is None else bias, sums,
        count, outputs, width, per_program, x.stride(0), count * outputs,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, BLOCK_K=config.block_k,
        EVEN=width % config.block_k == 0, BIAS=bias is not None and splits == 1, WIDE=not x.is_cuda,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        total = sums.sum(0)
        out.copy_(total if bias is None else total.add_(bias))


if triton is not None:

    @triton.jit(do_not_specialize=["count", "per_program"])
    def _gemm_kernel(
        x, packed, scales, bias, out,
        count, outputs, width, per_program, x_stride, split_stride,
        BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
        EVEN: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """`[BLOCK_N]` outputs of `[BLOCK_M]` rows of x over `per_program` tiles of inputs."""
        output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        # Beyond the last row the last one is read again: loads without masks, results that nobody stores.
        row = tl.minimum(output, outputs - 1)
        token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        inputs = tl.arange(0, BLOCK_K)
        bytes_at = packed + row.to(tl.int64)[:, None] * width + inputs[None, :]
        x_at = x + tl.minimum(token, count - 1).to(tl.int64)[None, :] * x_stride + inputs[:, None]
        begin = tl.program_id(1) * per_program
        end = tl.minimum(begin + per_program, tl.cdiv(width, BLOCK_K))
        sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for turn in range(begin, end):
            at = turn * BLOCK_K
            if EVEN:
                code = tl.load(bytes_at + at)
                tile = tl.load(x_at + at)
            else:
                inside = at + inputs < width
                code = tl.load(bytes_at + at, mask=inside[None, :], other=0)
                tile = tl.load(x_at + at, mask=inside[:, None], other=0.0)
            value = e4m3_to_float(code.to(tl.int32))
            if WIDE:  # for the interpreter, which takes bfloat16 for integers
                sums = tl.dot(value, tile.to(tl.float32), sums)
            else:
                sums = tl.dot(value.to(tile.dtype), tile, sums)
        sums *= tl.load(scales + row)[:, None]
        if BIAS:
            sums += tl.load(bias + row).to(tl.float32)[:, None]
        inside = (output < outputs)[:, None] & (token < count)[None, :]
        target = tl.program_id(1).to(tl.int64) * split_stride + token.to(tl.int64)[None, :] * outputs
        tl.store(out + target + output[:, None], sums.to(out.dtype.element_ty), mask=inside)
