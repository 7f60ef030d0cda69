"""int4 weights in the layout of vLLM's Marlin kernel: made, multiplied by, and read back by the trainer.

Every 32 neighbouring inputs of one output share a bfloat16 scale; a weight is (code − 8)·scale, rounded to bfloat16 as
Marlin's kernel does. Codes lie in tiles of 16 inputs × 64 outputs, in the order in which the lanes of a warp feed them
to the tensor cores. With n = 64·block + 16·n54 + 8·n3 + n20 and k = 16·tile + 8·k3 + 2·k21 + k0:

    packed[tile, block·128 + n20·16 + k21·4 + n54]   holds the code at nibble k0·4 + n3·2 + k3 (0 is the lowest),
    scales[k // 32, block·64 + n20·8 + n54·2 + n3]   holds its scale.

Rows are padded with zero weights to what Marlin's thread tiles divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tandem.kernels.reference import Impl, ceil_div, picks_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # the twins answer where Triton does not exist
    triton = None

GROUP = 32
TILE_K, TILE_N = 16, 64
DTYPES = (torch.bfloat16, torch.float32)
# Scales tried for every group, as parts of the one that puts the largest weight on code 0; 8/7 puts it on code 15.
_SHRINK = (0.74, 0.79, 0.84, 0.88, 0.92, 0.96, 1.0, 1.05, 1.1, 8 / 7)
# Weights quantised at a time: a handful of float32 temporaries of this size.
_CHUNK = 1 << 22
# Tiles of 16 inputs per program of the kernel: rows of 128 weights are written.
_TILES = 8


def stored_rows(out_features: int, in_features: int) -> int:
    """Rows that are stored for a weight `[out_features, in_features]`: Marlin takes 64 outputs × 128 inputs at a time,
    or 128 × 64.

    Raises:
        ValueError: no padding of the rows helps.
    """
    if out_features < 1 or in_features < 64 or in_features % 64:
        raise ValueError(
            f"a weight of {out_features} outputs and {in_features} inputs: Marlin needs a multiple of 64 inputs"
        )
    step = 64 if in_features % 128 == 0 else 128
    return (out_features + step - 1) // step * step


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of least squared error: a search over shrunken scales, then one least-squares step.

    Args:
        weight: `[out, in]`, any float type, in a multiple of 32.

    Returns:
        `[out, in]` uint8 codes from 0 to 15, and `[out, in / 32]` bfloat16 scales. A scale is negative where the
        largest weight of its group is positive: 8 steps lie below zero and 7 above.

    Raises:
        ValueError: not a matrix, an input count that 32 does not divide, or a weight that is not finite.
    """
    if weight.dim() != 2 or weight.shape[1] % GROUP:
        raise ValueError(f"weight {tuple(weight.shape)}: a matrix with a multiple of {GROUP} columns is needed")
    rows, width = weight.shape
    codes = torch.empty(rows, width, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, width // GROUP, dtype=torch.bfloat16, device=weight.device)
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    step = max(_CHUNK // max(width, 1), 1)
    for start in range(0, rows, step):
        groups = weight[start : start + step].float().reshape(-1, GROUP)
        scale = _best_scale(groups)
        finite &= groups.isfinite().all()
        codes[start : start + step] = _codes(groups, scale).add_(8).to(torch.uint8).view(-1, width)
        scales[start : start + step] = scale.view(-1, width // GROUP)
    if not finite:
        raise ValueError(f"weight {tuple(weight.shape)} holds values that are not finite")
    return codes, scales


def _codes(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`[groups, 32]` steps from −8 to 7, as floats."""
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)  # nothing but zeros, or too small for bfloat16
    return (groups / divisor[:, None]).round_().clamp_(-8, 7)


def _best_scale(groups: torch.Tensor) -> torch.Tensor:
    """`[groups]` float32 scales that bfloat16 can hold."""
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))[:, 0]
    best = (largest * (-1 / 8)).bfloat16().float()  # stands where squares overflow
    least = torch.full_like(largest, torch.inf)
    for factor in _SHRINK:
        scale = (largest * (-factor / 8)).bfloat16().float()
        best, least = _keep_better(groups, scale, best, least)
    steps = _codes(groups, best)
    fitted = (groups * steps).sum(1) / steps.square().sum(1).clamp_min_(1)
    return _keep_better(groups, fitted.bfloat16().float(), best, least)[0]


def _keep_better(
    groups: torch.Tensor, scale: torch.Tensor, best: torch.Tensor, least: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    error = _codes(groups, scale).mul_(scale[:, None]).sub_(groups).square_().sum(1)
    better = error < least
    return torch.where(better, scale, best), torch.where(better, error, least)


def quantize_marlin(parts: Sequence[torch.Tensor], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """One Marlin weight from the weights of projections that share their input, rows one behind the other.

    Args:
        parts: `[out_i, in]` each; quantised on `device` one after the other.

    Returns:
        packed `[in / 16, 2·stored]` int32 and scales `[in / 32, stored]` bfloat16 on `device`, stored =
        `stored_rows(Σ out_i, in)`.

    Raises:
        ValueError: the parts differ in their inputs, or as `stored_rows` and `quantize_int4` do.
    """
    widths = {part.shape[1] for part in parts}
    if len(widths) != 1:
        raise ValueError(f"parts {[tuple(part.shape) for part in parts]} do not share one input")
    width = widths.pop()
    total = stored_rows(sum(part.shape[0] for part in parts), width)
    codes = torch.full((total, width), 8, dtype=torch.uint8, device=device)
    scales = torch.zeros(total, width // GROUP, dtype=torch.bfloat16, device=device)
    start = 0
    for part in parts:
        stop = start + part.shape[0]
        codes[start:stop], scales[start:stop] = quantize_int4(part.to(device))
        start = stop
    return pack_codes(codes), pack_scales(scales)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """`[n, k]` uint8 codes, n in whole 64, k in whole 16 -> `[k / 16, 2n]` int32 in Marlin's order."""
    n, k = codes.shape
    # n: block, n54, n3, n20 · k: tile, k3, k21, k0
    split = codes.view(n // TILE_N, 4, 2, 8, k // TILE_K, 2, 4, 2)
    nibbles = split.permute(4, 0, 3, 6, 1, 7, 2, 5).reshape(k // TILE_K, 2 * n, 4, 2)
    return (nibbles[..., 0] | (nibbles[..., 1] << 4)).view(torch.int32).squeeze(-1)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_codes`."""
    tiles, words = packed.shape
    pairs = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1)
    # tile, block, n20, k21, n54, k0, n3, k3
    split = nibbles.view(tiles, words // 128, 8, 4, 4, 2, 2, 2)
    return split.permute(1, 4, 6, 2, 0, 7, 3, 5).reshape(words // 2, tiles * TILE_K)


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """`[n, groups]` -> `[groups, n]`, the 64 of a block as 8 × 8 turned over."""
    n, groups = scales.shape
    return scales.t().reshape(groups, n // TILE_N, 8, 8).transpose(2, 3).reshape(groups, n)


def unpack_scales(scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_scales`."""
    groups, n = scales.shape
    return scales.view(groups, n // TILE_N, 8, 8).transpose(2, 3).reshape(groups, n).t().contiguous()


def dequantize_int4(
    packed: torch.Tensor,
    scales: torch.Tensor,
    rows: slice | None = None,
    out: torch.Tensor | None = None,
    *,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Rows of the weight, as Marlin multiplies by them.

    Args:
        packed: `[in / 16, 2·stored]` int32. scales: `[in / 32, stored]` bfloat16.
        rows: which; any bounds without a step, default all that are stored.
        out: `[rows, in]` bfloat16, or float32 that holds the same values; may be strided, with unit stride along `in`.

    Returns:
        `[rows, in]`: `out`, or a new bfloat16 matrix.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    width, stored = packed.shape[0] * TILE_K, packed.shape[1] // 2
    start, stop = _range(rows, stored)
    _check(packed, scales)
    if out is None:
        out = torch.empty(stop - start, width, dtype=torch.bfloat16, device=packed.device)
    if tuple(out.shape) != (stop - start, width) or out.stride(1) != 1 or out.dtype not in DTYPES:
        raise ValueError(
            f"out {tuple(out.shape)} {out.dtype}, strides {out.stride()}: [{stop - start}, {width}] of one of {DTYPES} "
            "with unit stride along its rows is needed"
        )
    if start == stop:
        return out
    if picks_triton(out, impl):
        _dequantize_triton(packed, scales, start, stop, out)
    else:
        _dequantize_plain(packed, scales, start, stop, out)
    return out


def _range(rows: slice | None, stored: int) -> tuple[int, int]:
    start, stop = (0, stored) if rows is None else (rows.start or 0, stored if rows.stop is None else rows.stop)
    if not 0 <= start <= stop <= stored or (rows is not None and rows.step not in (None, 1)):
        raise ValueError(f"rows {rows} are no range within {stored} stored rows")
    return start, stop


def _check(packed: torch.Tensor, scales: torch.Tensor) -> None:
    tiles, words = packed.shape
    if packed.dtype != torch.int32 or words % (2 * TILE_N) or not packed.is_contiguous():
        raise ValueError(f"packed {tuple(packed.shape)} {packed.dtype}: contiguous int32 [in / 16, 2·rows] is needed")
    wanted = (tiles * TILE_K // GROUP, words // 2)
    if tiles % 2 or scales.dtype != torch.bfloat16 or tuple(scales.shape) != wanted or not scales.is_contiguous():
        raise ValueError(f"scales {tuple(scales.shape)} {scales.dtype}: contiguous bfloat16 {wanted} are needed")


def _dequantize_plain(packed: torch.Tensor, scales: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> None:
    tiles, width = packed.shape[0], out.shape[1]
    first, last = start // TILE_N, (stop + TILE_N - 1) // TILE_N
    step = max(_CHUNK // (TILE_N * width), 1)
    for block in range(first, last, step):
        end = min(block + step, last)
        codes = unpack_codes(packed[:, block * 128 : end * 128])
        factor = unpack_scales(scales[:, block * TILE_N : end * TILE_N].contiguous())
        # One product of two bfloat16 numbers, rounded once.
        values = (codes.bfloat16() - 8).view(-1, tiles // 2, GROUP) * factor[:, :, None]
        low, high = max(start, block * TILE_N), min(stop, end * TILE_N)
        out[low - start : high - start] = values.view(-1, width)[low - block * TILE_N : high - block * TILE_N]


def _dequantize_triton(packed: torch.Tensor, scales: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> None:
    tiles, stored = packed.shape[0], scales.shape[1]
    first, last = start // TILE_N, (stop + TILE_N - 1) // TILE_N
    _dequantize_kernel[(ceil_div(tiles, _TILES), last - first)](
        packed, scales, out, tiles, stored, start, stop, out.stride(0), TILES=_TILES, num_warps=4,
    )  # fmt: skip


@dataclass(frozen=True)
class MarlinScratch:
    """What vLLM's kernel wants beside the weight. Its locks are left at zero, so launches of one stream may share it.

    Attributes:
        workspace: `[multiprocessors]` int32 zeros. empty: `[0]` int32, for zero points and orders that do not exist.
        quant_type: vLLM's name of the type: unsigned 4 bits with 8 taken off.
    """

    workspace: torch.Tensor
    empty: torch.Tensor
    quant_type: Any

    @classmethod
    def on(cls, device: torch.device | str) -> MarlinScratch:
        """Make it once, before CUDA graphs are captured, outside of memory that sleeps."""
        from vllm.scalar_type import scalar_types

        device = torch.device(device)
        count = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(
            torch.zeros(count, dtype=torch.int32, device=device),
            torch.empty(0, dtype=torch.int32, device=device),
            scalar_types.uint4b8,
        )


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    scratch: MarlinScratch,
    out_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x·Wᵀ + bias with vLLM's Marlin kernel, sums in float32.

    Args:
        x: `[..., in]` bfloat16 on CUDA. packed, scales: of `quantize_marlin`. bias: `[out_features]` in plain order.

    Returns:
        `[..., out_features]` bfloat16.
    """
    from vllm import _custom_ops as ops

    size_k, size_n = packed.shape[0] * TILE_K, packed.shape[1] // 2
    tokens = x.reshape(-1, size_k).contiguous()
    out = ops.marlin_gemm(
        tokens,
        None,  # c: a new output
        packed,
        None,  # bias: added below, Marlin wants it permuted
        scales,
        None,  # scales of 8-bit inputs
        None,  # global scale
        scratch.empty,  # zero points
        scratch.empty,  # group of every input
        scratch.empty,  # order of the inputs
        scratch.workspace,
        scratch.quant_type,
        size_m=tokens.shape[0],
        size_n=size_n,
        size_k=size_k,
        is_k_full=True,
        use_atomic_add=False,  # any order of sums would not repeat bit for bit
        use_fp32_reduce=True,
        is_zp_float=False,
    )
    if size_n != out_features:
        out = out[:, :out_features].contiguous()
    if bias is not None:
        out = out + bias
    return out.view(*x.shape[:-1], out_features)


if triton is not None:

    @triton.jit
    def _dequantize_kernel(
        packed, scales, out, tiles, stored, start, stop, row_stride, TILES: tl.constexpr
    ):  # fmt: skip
        """64 rows × TILES·16 inputs. Words are read as they lie and turned in registers, rows written whole."""
        block = start // 64 + tl.program_id(1)
        tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
        present = tile < tiles
        word = tl.arange(0, 128)
        words = tl.load(
            packed + (tile[:, None] * (2 * stored) + block * 128 + word[None, :]), mask=present[:, None], other=0
        )
        # tile, n20, k21, n54 -> row of 32 (n54, n20), tile, k21
        words = tl.permute(tl.reshape(words, (TILES, 8, 4, 4)), (3, 1, 0, 2))
        words = tl.reshape(words, (32, TILES, 4))
        n54 = tl.arange(0, 32) // 8
        n20 = tl.arange(0, 32) % 8
        place = tl.program_id(0) * (TILES * 16) + tl.arange(0, TILES * 16)
        for n3 in tl.static_range(2):
            at = (tile // 2)[None, :] * stored + (block * 64 + n20 * 8 + n54 * 2 + n3)[:, None]
            scale = tl.load(scales + at, mask=present[None, :], other=0.0).to(tl.float32)[:, :, None]
            # [32, tile, k21] for each of k3 and k0. The product of 4 and 8 bits is exact, and rounded by the cast.
            a = ((((words >> (n3 * 8)) & 15) - 8).to(tl.float32) * scale).to(tl.bfloat16)
            b = ((((words >> (n3 * 8 + 16)) & 15) - 8).to(tl.float32) * scale).to(tl.bfloat16)
            c = ((((words >> (n3 * 8 + 4)) & 15) - 8).to(tl.float32) * scale).to(tl.bfloat16)
            d = ((((words >> (n3 * 8 + 20)) & 15) - 8).to(tl.float32) * scale).to(tl.bfloat16)
            near = tl.reshape(tl.join(a, b), (32, TILES, 8))
            far = tl.reshape(tl.join(c, d), (32, TILES, 8))
            both = tl.permute(tl.join(near, far), (0, 1, 3, 2))
            values = tl.reshape(both, (32, TILES * 16))
            row = block * 64 + n54 * 16 + n3 * 8 + n20
            inside = ((row >= start) & (row < stop))[:, None] & (place < tiles * 16)[None, :]
            target = (row - start).to(tl.int64)[:, None] * row_stride + place[None, :]
            tl.store(out + target, values.to(out.dtype.element_ty), mask=inside)
