"""Weights in 8-bit floating point (E4M3) with a power of two per output.

A power of two moves no bit of a mantissa: W = q·2ᵉ is exact in bfloat16, and (Σ q·x)·2ᵉ is Σ (q·2ᵉ)·x. So whoever
multiplies by the bytes and scales the sums computes with the very weights that others unpack first. Against a scale
that maps the largest weight to the largest byte, up to one of the 15 binades is given away, at the small end.
Format: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433).
"""

from __future__ import annotations

import torch

from tandem.kernels.reference import Impl, ceil_div, picks_triton, rows

try:
    import triton
    import triton.language as tl
except ImportError:  # the twins answer where Triton does not exist
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = 448.0  # of E4M3; the code behind it is NaN
_BLOCK = 2048


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` `[out, in]` as bytes and scales, each byte rounded to the nearest value, ties to even.

    Returns:
        packed `[out, in]` uint8, the bits of E4M3; scales `[out]` float32, powers of two (1 for a row of zeros).

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    wide = weight.float()
    largest = wide.abs().amax(1)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("a weight is NaN or infinite")
    # The smallest power of two that brings the row's largest weight to 448 or below.
    mantissa, exponent = torch.frexp(largest / LARGEST)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    scales = torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)
    return (wide / scales[:, None]).to(torch.float8_e4m3fn).view(torch.uint8), scales


def dequantize_fp8(
    packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor | None = None, *, impl: Impl | None = None
) -> torch.Tensor:
    """The weights, exact in bfloat16 and float32 wherever these have the exponent.

    Args:
        packed: `[out, in]` uint8, contiguous. scales: `[out]` float32.
        out: `[out, in]` bfloat16, float16 or float32 (default bfloat16); its rows may lie apart.

    Raises:
        ValueError: sizes or types that do not fit each other.
    """
    if out is None:
        out = torch.empty(packed.shape, dtype=torch.bfloat16, device=packed.device)
    check_fp8(packed, scales)
    if out.shape != packed.shape or out.dtype not in DTYPES:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype}: {tuple(packed.shape)} in one of {DTYPES} is needed")
    if not packed.numel():
        return out
    if picks_triton(out, impl):
        target = rows(out, written=True)
        grid = (packed.shape[0], ceil_div(packed.shape[1], _BLOCK))
        _dequantize_kernel[grid](
            packed, scales, target, packed.shape[1], target.stride(0), BLOCK=_BLOCK, num_warps=4
        )  # fmt: skip
        return out
    for start in range(0, len(packed), 1024):  # a part at a time, for the float32 in between
        part = slice(start, start + 1024)
        out[part] = (packed[part].view(torch.float8_e4m3fn).float() * scales[part, None]).to(out.dtype)
    return out


def check_fp8(packed: torch.Tensor, scales: torch.Tensor) -> None:
    """Raises ValueError unless the two belong together."""
    if packed.dim() != 2 or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(f"packed {tuple(packed.shape)} {packed.dtype}: a contiguous uint8 matrix is needed")
    if tuple(scales.shape) != (packed.shape[0],) or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(f"scales {tuple(scales.shape)} {scales.dtype}: [{packed.shape[0]}] float32 are needed")


if triton is not None:

    @triton.jit
    def e4m3_to_float(code):
        """float32 values of E4M3 bytes in int32, by integers alone: cards before Ada convert none."""
        low = code & 0x7F
        normal = ((low << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(low < 8, low.to(tl.float32) * 0.001953125, normal)  # subnormal: mantissa · 2⁻⁹
        return tl.where(code >= 128, -value, value)

    @triton.jit
    def _dequantize_kernel(packed, scales, out, width, out_stride, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        code = tl.load(packed + row * width + column, mask=inside, other=0).to(tl.int32)
        value = e4m3_to_float(code) * tl.load(scales + row)
        tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)
