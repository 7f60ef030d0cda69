"""A linear layer on the store's bytes as one opaque operator, for torch.compile and CUDA graphs.

`tandem::stored_linear` and `tandem::stored_fp8_linear` read NF4 and FP8 weights where they lie. Up to
`BEST_UP_TO_ROWS` inputs a fused kernel multiplies straight from the packed bytes; beyond that the weight is dequantised
into a scratch buffer that all layers share, and one matrix product follows. Which way is taken depends on the number of
rows alone, nothing waits for the device, and every address is fixed, so a captured graph stays valid.
`tandem::stored_int4_linear` is vLLM's Marlin product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tandem.kernels import fp8_gemm, nf4_gemm
from tandem.kernels.fp8 import dequantize_fp8
from tandem.kernels.int4_marlin import MarlinScratch, int4_linear
from tandem.kernels.nf4 import write_nf4_stack

BLOCK, OUTER_BLOCK = 64, 256
_library = torch.library.Library("tandem", "FRAGMENT")
_scratch: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def reserve_scratch(elements: int, device: torch.device, dtype: torch.dtype) -> int:
    """Make room for the largest weight; returns the buffer's bytes. To be called before graphs are captured."""
    device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
    have = _scratch.get((device, dtype))
    if have is None or have.numel() < elements:
        _scratch[device, dtype] = torch.empty(elements, dtype=dtype, device=device)
    return _scratch[device, dtype].nbytes


def release_scratch() -> None:
    """Give all scratch buffers back. Graphs that were captured with them must be gone."""
    _scratch.clear()


def stored_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax2: torch.Tensor | None,
    code2: torch.Tensor | None,
    offsets: torch.Tensor | None,
    part_rows: Sequence[int],
    bias: torch.Tensor | None,
    as_bitsandbytes: bool = False,
) -> torch.Tensor:
    """`x [..., in]` times the transposed weight `[out, in]`, plus `bias [out]`.

    Args:
        packed … offsets: an NF4 weight as the store keeps it (`rl.store`); the last three are None where the scales
            are float32 (no double quantisation).
        part_rows: outputs of each part, in order; each part was quantised on its own.
        as_bitsandbytes: as stock vLLM multiplies: always by the dequantised weight, and part by part.
    """
    rows = x.reshape(-1, x.shape[-1])
    few = rows.is_cuda and 0 < rows.shape[0] <= nf4_gemm.BEST_UP_TO_ROWS
    if few and _is_fused(rows) and not as_bitsandbytes:
        scales = absmax, absmax2, code2, offsets
        out = nf4_gemm.nf4_linear(rows, packed, *scales, tuple(part_rows), BLOCK, OUTER_BLOCK, bias=bias)
    else:
        weight = _scratch_matrix(sum(part_rows), x.shape[-1], x)
        write_nf4_stack(weight, packed, (absmax, absmax2, code2, offsets), part_rows, BLOCK, OUTER_BLOCK)
        if as_bitsandbytes:
            out = torch.cat([F.linear(rows, part) for part in weight.split(list(part_rows))], dim=-1)
            out = out if bias is None else out + bias
        else:
            out = F.linear(rows, weight, bias)
    return out.view(*x.shape[:-1], out.shape[-1])


def _is_fused(rows: torch.Tensor) -> bool:
    """The fused kernel knows two types, and rows of whole blocks."""
    return rows.dtype in nf4_gemm.DTYPES and rows.shape[1] % BLOCK == 0


def stored_fp8_linear(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`x [..., in]` on FP8 weights `[out, in]` with a scale per output (`kernels/fp8.py`)."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.is_cuda and 0 < rows.shape[0] <= fp8_gemm.BEST_UP_TO_ROWS and rows.dtype in fp8_gemm.DTYPES:
        out = fp8_gemm.fp8_linear(rows, packed, scales, bias)
    else:
        weight = _scratch_matrix(packed.shape[0], packed.shape[1], x)
        out = F.linear(rows, dequantize_fp8(packed, scales, weight), bias)
    return out.view(*x.shape[:-1], out.shape[-1])


def stored_int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    workspace: torch.Tensor,
    empty: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`x [..., in]` on int4 weights in Marlin's layout; `workspace` and `empty` as in `MarlinScratch`."""
    from vllm.scalar_type import scalar_types

    scratch = MarlinScratch(workspace, empty, scalar_types.uint4b8)
    return int4_linear(x, packed, scales, scratch, out_features, bias)


def _scratch_matrix(out_features: int, in_features: int, like: torch.Tensor) -> torch.Tensor:
    elements = out_features * in_features
    buffer = _scratch.get((like.device, like.dtype))
    if buffer is None or buffer.numel() < elements:
        # In a captured graph this would be memory of the graph's own, once per layer.
        assert not (like.is_cuda and torch.cuda.is_current_stream_capturing()), "reserve_scratch was not called"
        reserve_scratch(elements, like.device, like.dtype)
        buffer = _scratch[like.device, like.dtype]
    return buffer[:elements].view(out_features, in_features)


def _shape_of(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax2: torch.Tensor | None,
    code2: torch.Tensor | None,
    offsets: torch.Tensor | None,
    part_rows: Sequence[int],
    bias: torch.Tensor | None,
    as_bitsandbytes: bool = False,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(part_rows))


def _fp8_shape_of(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _int4_shape_of(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    workspace: torch.Tensor,
    empty: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


_library.define(
    "stored_linear(Tensor x, Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offsets, "
    "int[] part_rows, Tensor? bias, bool as_bitsandbytes=False) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "stored_int4_linear(Tensor x, Tensor packed, Tensor scales, Tensor workspace, Tensor empty, int out_features, "
    "Tensor? bias) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "stored_fp8_linear(Tensor x, Tensor packed, Tensor scales, Tensor? bias) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
# No gradients are asked of it: an autograd wrapper would only cost time per call.
_library.impl("stored_linear", stored_linear, "CompositeExplicitAutograd")
torch.library.register_fake("tandem::stored_linear", _shape_of, lib=_library)
_library.impl("stored_fp8_linear", stored_fp8_linear, "CompositeExplicitAutograd")
torch.library.register_fake("tandem::stored_fp8_linear", _fp8_shape_of, lib=_library)
_library.impl("stored_int4_linear", stored_int4_linear, "CompositeExplicitAutograd")
torch.library.register_fake("tandem::stored_int4_linear", _int4_shape_of, lib=_library)
