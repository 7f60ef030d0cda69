"""NF4 weights back to bfloat16, float16 or float32 in one pass, bit for bit as bitsandbytes does it.

Two weights share a byte, high nibble first. A block of consecutive weights has one float32 scale; with double
quantisation the scales themselves are 8 bits: code2[absmax]·absmax2[block // 256] + offset.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tandem.kernels.reference import NF4_LEVELS, Impl, ceil_div, nested_absmax, nf4_into, picks_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # the twins answer where Triton does not exist
    triton = None

_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Packed bytes per program: 4096 weights.
_TILE = 2048


@dataclass(frozen=True)
class NestedAbsmax:
    """Scales in 8 bits (double quantisation).

    Attributes:
        absmax: `[blocks]` uint8. absmax2: `[ceil(blocks / blocksize2)]` float32. code2: `[256]` float32.
        offset: one float32, on the same device, so that nobody waits for the device to read it.
        blocksize2: scales that share an entry of absmax2.
    """

    absmax: torch.Tensor
    absmax2: torch.Tensor
    code2: torch.Tensor
    offset: torch.Tensor
    blocksize2: int = 256


# absmax, absmax2, code2, offsets of a stacked weight
StackedScales = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Nf4State:
    """All that a packed NF4 weight needs beside its bytes: scales, shape, weights per scale, type to return."""

    absmax: torch.Tensor | NestedAbsmax
    shape: tuple[int, ...]
    blocksize: int = 64
    dtype: torch.dtype = torch.bfloat16

    def dequantize(
        self, packed: torch.Tensor, out: torch.Tensor | None = None, *, impl: Impl | None = None
    ) -> torch.Tensor:
        """`dequantize_nf4` with these values."""
        return dequantize_nf4(packed, self.absmax, self.shape, self.blocksize, out, self.dtype, impl=impl)


def from_quant_state(state: Any) -> Nf4State:
    """The same weight as bitsandbytes describes it; tensors are shared, not copied.

    Args:
        state: a `bitsandbytes.functional.QuantState`, or anything with its attributes.

    Raises:
        ValueError: another 4-bit type than NF4.
    """
    if state.quant_type != "nf4":
        raise ValueError(f"quant_type={state.quant_type!r}: only nf4 can be read")
    absmax: torch.Tensor | NestedAbsmax = state.absmax
    inner = state.state2
    if inner is not None:
        offset = torch.as_tensor(state.offset, dtype=torch.float32, device=state.absmax.device)
        absmax = NestedAbsmax(state.absmax, inner.absmax, inner.code, offset, inner.blocksize)
    return Nf4State(absmax, tuple(state.shape), state.blocksize, state.dtype)


def stacked_scales(
    scales: StackedScales, part_rows: Sequence[int], width: int, blocksize: int = 64, blocksize2: int = 256
) -> Iterator[tuple[slice, torch.Tensor | NestedAbsmax]]:
    """Rows and scales of each part of a stacked weight `[sum(part_rows), width]`, whose parts were quantised apart.

    Args:
        scales: absmax `[blocks]` of all parts, and with double quantisation absmax2 (those of each part behind the
            last), code2 and offsets `[parts]`, else None three times.
    """
    absmax, absmax2, code2, offsets = scales
    row = block = outer = 0
    for index, count in enumerate(part_rows):
        blocks = count * width // blocksize
        inner = absmax.view(-1)[block : block + blocks]
        end = outer + math.ceil(blocks / blocksize2)
        if absmax2 is None or code2 is None or offsets is None:
            yield slice(row, row + count), inner
        else:
            yield slice(row, row + count), NestedAbsmax(inner, absmax2[outer:end], code2, offsets[index], blocksize2)
        row, block, outer = row + count, block + blocks, end


def write_nf4_stack(
    out: torch.Tensor,
    packed: torch.Tensor,
    scales: StackedScales,
    part_rows: Sequence[int],
    blocksize: int = 64,
    blocksize2: int = 256,
    *,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Dequantise a whole stacked weight into `out` `[sum(part_rows), width]`. See `stacked_scales`."""
    width, flat = out.shape[1], packed.view(-1)
    for rows, own in stacked_scales(scales, part_rows, width, blocksize, blocksize2):
        piece = flat[rows.start * width // 2 : rows.stop * width // 2]
        dequantize_nf4(piece, own, (rows.stop - rows.start, width), blocksize, out[rows], impl=impl)
    return out


def dequantize_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor | NestedAbsmax,
    shape: Sequence[int],
    blocksize: int = 64,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Unpack a weight.

    Args:
        packed: ceil(n / 2) bytes in any contiguous form (another storage type is read as bytes), n = prod(shape).
        absmax: `[ceil(n / blocksize)]` float32, or `NestedAbsmax`. blocksize: weights per scale.
        out: a contiguous buffer with room for n elements, reused from weight to weight, of which only the first n are
            written; or a matrix `[*shape]` that is a part of a wider buffer, with unit stride along its rows.
        dtype: of the result. Default: that of `out`, else bfloat16.

    Returns:
        `[*shape]`, a view of `out` where it was given.

    Raises:
        ValueError: sizes or types that do not fit each other.
    """
    count = math.prod(shape)
    dtype = dtype or (torch.bfloat16 if out is None else out.dtype)
    packed = packed.contiguous().view(-1).view(torch.uint8)
    _check(packed, absmax, tuple(shape), blocksize, out, dtype)
    if out is not None and not out.is_contiguous():
        return _dequantize_into_rows(packed, absmax, blocksize, out, impl)
    buffer = torch.empty(count, dtype=dtype, device=packed.device) if out is None else out.view(-1)[:count]
    if count and picks_triton(buffer, impl):
        _dequantize_triton(packed, absmax, blocksize, buffer, width=count, row_stride=count)
    elif count:
        if isinstance(absmax, NestedAbsmax):
            scales = nested_absmax(absmax.absmax, absmax.absmax2, absmax.code2, absmax.offset, absmax.blocksize2)
        else:
            scales = absmax
        nf4_into(buffer, packed[: (count + 1) // 2], scales.view(-1), blocksize)
    return buffer.view(*shape)


def _dequantize_into_rows(
    packed: torch.Tensor, absmax: torch.Tensor | NestedAbsmax, blocksize: int, out: torch.Tensor, impl: Impl | None
) -> torch.Tensor:
    height, width = out.shape
    # A block that crosses the end of a row would be written in two places.
    if height and picks_triton(out, impl) and width % blocksize == 0:
        _dequantize_triton(packed, absmax, blocksize, out, width=width, row_stride=out.stride(0))
        return out
    return out.copy_(dequantize_nf4(packed, absmax, out.shape, blocksize, dtype=out.dtype, impl=impl))


def _check(
    packed: torch.Tensor,
    absmax: torch.Tensor | NestedAbsmax,
    shape: tuple[int, ...],
    blocksize: int,
    out: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    count = math.prod(shape)
    if blocksize not in _BLOCKSIZES:
        raise ValueError(f"blocksize={blocksize} is none of {_BLOCKSIZES}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is none of {DTYPES}")
    if packed.numel() < (count + 1) // 2:
        raise ValueError(f"{packed.numel()} bytes hold no {count} weights of 4 bits")
    blocks = math.ceil(count / blocksize)
    scales = absmax.absmax if isinstance(absmax, NestedAbsmax) else absmax
    kind = torch.uint8 if isinstance(absmax, NestedAbsmax) else torch.float32
    if scales.numel() < blocks or scales.dtype != kind or not scales.is_contiguous():
        raise ValueError(f"absmax {tuple(scales.shape)} {scales.dtype}: {blocks} contiguous {kind} scales are needed")
    if isinstance(absmax, NestedAbsmax):
        # A power of two divides by a shift, and bitsandbytes knows no others.
        if absmax.blocksize2 & (absmax.blocksize2 - 1) or absmax.absmax2.numel() * absmax.blocksize2 < blocks:
            raise ValueError(
                f"{absmax.absmax2.numel()} outer scales of {absmax.blocksize2} do not cover {blocks} blocks"
            )
        if absmax.code2.numel() != 256 or absmax.offset.numel() != 1:
            raise ValueError(f"code2 has {absmax.code2.numel()} entries, offset {absmax.offset.numel()}: not 256 and 1")
    if out is not None:
        fits = out.numel() >= count if out.is_contiguous() else tuple(out.shape) == shape and _has_rows(out)
        if not fits or out.dtype != dtype:
            raise ValueError(
                f"out {tuple(out.shape)} {out.dtype}, strides {out.stride()}: a contiguous {dtype} buffer of {count} "
                f"is needed, or a matrix {shape} with unit stride along its rows"
            )


def _has_rows(matrix: torch.Tensor) -> bool:
    return matrix.dim() == 2 and matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


@functools.cache
def levels_on(device: torch.device) -> torch.Tensor:
    """The sixteen levels, `[16]` float32."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def _dequantize_triton(
    packed: torch.Tensor,
    absmax: torch.Tensor | NestedAbsmax,
    blocksize: int,
    out: torch.Tensor,
    *,
    width: int,
    row_stride: int,
) -> None:
    """Writes all of `out`: rows of `width`, `row_stride` apart."""
    blocks = max(_TILE // (blocksize // 2), 1)
    levels = levels_on(packed.device)
    if isinstance(absmax, NestedAbsmax):
        scales, outer, code, offset, size = (
            absmax.absmax, absmax.absmax2, absmax.code2, absmax.offset, absmax.blocksize2
        )  # fmt: skip
    else:
        scales, outer, code, offset, size = absmax, levels, levels, levels, 1
    # Without fused multiply-add: bitsandbytes rounds the nested product before it adds the offset.
    _dequantize_kernel[(ceil_div(out.numel(), blocks * blocksize),)](
        packed, scales, outer, code, offset, levels, out, out.numel(), (out.numel() + 1) // 2, width, row_stride,
        NESTED=isinstance(absmax, NestedAbsmax), OUTER_SIZE=size, BLOCKS=blocks, BYTES=blocksize // 2,
        ROWS=width < out.numel(), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _dequantize_kernel(
        packed, scales, outer, code, offset, levels, out, count, byte_count, width, row_stride,
        NESTED: tl.constexpr, OUTER_SIZE: tl.constexpr, BLOCKS: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        # Weights of one embedding can pass 2³¹.
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        present = block * (2 * BYTES) < count
        if NESTED:
            level = tl.load(scales + block, mask=present, other=0).to(tl.int32)
            scale = tl.load(code + level) * tl.load(outer + block // OUTER_SIZE, mask=present, other=0.0)
            scale += tl.load(offset)
        else:
            scale = tl.load(scales + block, mask=present, other=0.0)
        byte = block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        pair = tl.load(packed + byte, mask=byte < byte_count, other=0).to(tl.int32)
        high = tl.load(levels + (pair >> 4)) * scale[:, None]
        low = tl.load(levels + (pair & 15)) * scale[:, None]
        both = tl.reshape(tl.join(high, low), (BLOCKS, 2 * BYTES)).to(out.dtype.element_ty)
        first = block * (2 * BYTES)
        place = first[:, None] + tl.arange(0, 2 * BYTES)[None, :]
        inside = place < count
        if ROWS:  # whole blocks in every row
            place += (first // width * (row_stride - width))[:, None]
        tl.store(out + place, both, mask=inside)
