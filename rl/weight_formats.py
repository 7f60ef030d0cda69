"""How the rows of a linear weight are stored: NF4 as bitsandbytes packs it, int4 as Marlin does, FP8, or dense.

A format turns the projections of one input, row-concatenated, into a few named tensors, and writes any rows of them
back as a matrix. Formats hold no state: what is stored lies in the tensors alone.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tandem.kernels.fp8 import DTYPES as FP8_DTYPES
from tandem.kernels.fp8 import dequantize_fp8, quantize_fp8
from tandem.kernels.int4_marlin import DTYPES as INT4_DTYPES
from tandem.kernels.int4_marlin import dequantize_int4, quantize_marlin, stored_rows
from tandem.kernels.nf4 import DTYPES as NF4_DTYPES
from tandem.kernels.nf4 import NestedAbsmax, dequantize_nf4, stacked_scales
from tandem.kernels.reference import nested_absmax
from tandem.rl.errors import UserError, short

Tensors = Mapping[str, torch.Tensor]

# Weights that are on the device in their own type at a time, while they are quantised. A multiple of every block size.
_CHUNK = 1 << 22


class WeightFormat(Protocol):
    """One way to store a stacked weight.

    Attributes:
        name: as the store and its cache call it.
        main: the tensor that holds the weights themselves; the others are scales.
        lossy: whether making it takes arithmetic, so that the result is worth a cache.
    """

    name: str
    main: str
    lossy: bool

    def check(self, part: str, shape: tuple[int, int]) -> None:
        """Raises UserError where the projection `part` `[rows, in]` cannot be stored so."""
        ...

    def quantise(
        self, weights: Sequence[torch.Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Projections `[rows, in]`, on the host and in any floating type, as stored on `device`.

        dtype: what the model computes in; weights are rounded to it first.
        """
        ...

    def write_weight(self, tensors: Tensors, parts: Sequence[slice], rows: slice, out: torch.Tensor) -> None:
        """Fill `out` `[rows, in]`, whose rows may lie apart, in its floating type."""
        ...


class DenseFormat:
    """The weights themselves, in the compute type (bfloat16 on a GPU): `weight` `[out, in]`."""

    name, main, lossy = "bf16", "weight", False

    def check(self, part: str, shape: tuple[int, int]) -> None:
        """Every shape will do."""

    def quantise(
        self, weights: Sequence[torch.Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        rows = sum(weight.shape[0] for weight in weights)
        stacked = torch.empty(rows, weights[0].shape[1], dtype=dtype, device=device)
        for target, weight in zip(stacked.split([len(weight) for weight in weights]), weights, strict=True):
            # Rounded on the host: a wider type has no business on the device.
            target.copy_(weight.to(dtype))
        return {"weight": stacked}

    def write_weight(self, tensors: Tensors, parts: Sequence[slice], rows: slice, out: torch.Tensor) -> None:
        out.copy_(tensors["weight"][rows])


@dataclass(frozen=True)
class Nf4Weight:
    """A projection that a checkpoint holds in NF4 already, on the host.

    Attributes:
        packed: `[ceil(rows·in / 2)]` uint8.
        absmax: `[blocks]`, uint8 where `absmax2`, `code2` and `offset` are there (double quantisation), else float32.
    """

    shape: tuple[int, int]
    packed: torch.Tensor
    absmax: torch.Tensor
    absmax2: torch.Tensor | None = None
    code2: torch.Tensor | None = None
    offset: float = 0.0


class Nf4Format:
    """NF4 in blocks of 64, scales in 8 bits in blocks of 256; each part on its own, byte for byte as bitsandbytes does.

    Tensors: `packed` `[out·in/2, 1]` uint8; `absmax` `[out·in/64]` uint8; `absmax2` float32, ceil(blocks / 256) of each
    part one behind the other; `code2` `[256]` float32; `offsets` `[parts]` float32. Scales of a checkpoint that came
    without double quantisation stay as they are: then `absmax` is float32, and there are no others.
    """

    name, main, lossy = "nf4", "packed", True
    blocksize, blocksize2 = 64, 256

    def check(self, part: str, shape: tuple[int, int]) -> None:
        rows, columns = shape
        if rows * columns % self.blocksize:
            raise UserError(
                f"{part} has {rows}·{columns} = {rows * columns} weights",
                reason=f"NF4 scales blocks of {self.blocksize}, and a block would reach into the next projection",
                fix="load this model unquantised",
            )

    def quantise(
        self, weights: Sequence[torch.Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        from bitsandbytes.functional import quantize_4bit, quantize_blockwise

        tensors = self._allocate([weight.numel() for weight in weights], device, nested=True)
        packed, absmax = tensors["packed"], tensors["absmax"]
        tensors["code2"].copy_(_scale_levels())
        byte = block = outer = 0
        for i, weight in enumerate(weights):
            scales = torch.empty(weight.numel() // self.blocksize, dtype=torch.float32, device=device)
            for start, chunk in _chunks(weight.reshape(-1)):
                values, state = quantize_4bit(
                    chunk.to(dtype).to(device), blocksize=self.blocksize, compress_statistics=False, quant_type="nf4"
                )
                first = byte + start // 2
                packed[first : first + len(values)].copy_(values)
                first = start // self.blocksize
                scales[first : first + len(state.absmax)].copy_(state.absmax)
            # The scales' mean is over the whole weight, so this is the one thing that chunks cannot do.
            offset = scales.mean()
            inner, state2 = quantize_blockwise(scales - offset, code=tensors["code2"], blocksize=self.blocksize2)
            absmax[block : block + len(inner)].copy_(inner)
            tensors["absmax2"][outer : outer + len(state2.absmax)].copy_(state2.absmax)
            tensors["offsets"][i].copy_(offset)
            byte, block, outer = byte + weight.numel() // 2, block + len(inner), outer + len(state2.absmax)
        return tensors

    def adopt(self, name: str, parts: Sequence[Nf4Weight], *, device: torch.device) -> dict[str, torch.Tensor]:
        """Projections that are in NF4 already, byte for byte.

        Raises:
            UserError: some have double quantisation and some have not, or they use different tables for it.
        """
        codes = [part.code2 for part in parts if part.code2 is not None]
        if codes and (len(codes) < len(parts) or any(not torch.equal(code, codes[0]) for code in codes)):
            raise UserError(
                f"{name}: its projections are quantised in different ways",
                reason="they are one stacked weight here, with one kind of scales",
                fix="quantise the model anew from its bfloat16 checkpoint",
            )
        counts = [part.shape[0] * part.shape[1] for part in parts]
        tensors = self._allocate(counts, device, nested=bool(codes))
        _fill(tensors["packed"].view(-1), [part.packed for part in parts])
        _fill(tensors["absmax"], [part.absmax for part in parts])
        if codes:
            _fill(tensors["absmax2"], [part.absmax2 for part in parts if part.absmax2 is not None])
            tensors["code2"].copy_(codes[0])
            tensors["offsets"].copy_(torch.tensor([part.offset for part in parts], dtype=torch.float32))
        return tensors

    def write_weight(self, tensors: Tensors, parts: Sequence[slice], rows: slice, out: torch.Tensor) -> None:
        """See `WeightFormat`. `rows` must begin and end where a block does; whole parts do.

        Raises:
            ValueError: they do not.
        """
        columns = out.shape[1]
        for i, part in enumerate(parts):
            first, last = max(rows.start, part.start), min(rows.stop, part.stop)
            if first >= last:
                continue
            if first * columns % self.blocksize or last * columns % self.blocksize:
                raise ValueError(f"rows {first}:{last} of {columns} columns cut a block of {self.blocksize} weights")
            packed = tensors["packed"][first * columns // 2 : last * columns // 2]
            target = out[first - rows.start : last - rows.start]
            scales = self._scales(tensors, parts, i, columns, slice(first, last))
            if out.dtype in NF4_DTYPES:
                dequantize_nf4(packed, scales, target.shape, self.blocksize, target)
            else:
                target.copy_(dequantize_nf4(packed, scales, target.shape, self.blocksize, dtype=torch.float32))

    def quant_state(
        self, tensors: Tensors, parts: Sequence[slice], index: int, columns: int, dtype: torch.dtype
    ) -> Any:
        """One part as bitsandbytes describes it: a `QuantState` of views."""
        from bitsandbytes.functional import QuantState

        scales = self._scales(tensors, parts, index, columns, parts[index])
        shape = torch.Size((parts[index].stop - parts[index].start, columns))
        state: dict[str, Any] = {
            "shape": shape,
            "code": _levels(tensors["packed"].device),
            "blocksize": self.blocksize,
            "quant_type": "nf4",
            "dtype": dtype,
        }
        if not isinstance(scales, NestedAbsmax):
            return QuantState(scales, **state)
        inner = QuantState(scales.absmax2, code=scales.code2, blocksize=scales.blocksize2, dtype=torch.float32)
        return QuantState(scales.absmax, **state, offset=scales.offset, state2=inner)

    def _scales(
        self, tensors: Tensors, parts: Sequence[slice], index: int, columns: int, rows: slice
    ) -> NestedAbsmax | torch.Tensor:
        """Of these rows of a part: views where they are all of it."""
        stored = tensors["absmax"], tensors.get("absmax2"), tensors.get("code2"), tensors.get("offsets")
        counts = [one.stop - one.start for one in parts]
        scales = [own for _, own in stacked_scales(stored, counts, columns, self.blocksize, self.blocksize2)][index]
        here = slice(*((row - parts[index].start) * columns // self.blocksize for row in (rows.start, rows.stop)))
        if not isinstance(scales, NestedAbsmax):
            return scales[here]
        if here == slice(0, len(scales.absmax)):
            return scales
        return nested_absmax(scales.absmax, scales.absmax2, scales.code2, scales.offset, scales.blocksize2)[here]

    def _allocate(self, counts: Sequence[int], device: torch.device, *, nested: bool) -> dict[str, torch.Tensor]:
        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        total = sum(counts)
        tensors = {
            "packed": empty(total // 2, 1, dtype=torch.uint8),
            "absmax": empty(total // self.blocksize, dtype=torch.uint8 if nested else torch.float32),
        }
        if nested:
            outer = sum(_ceil(count // self.blocksize, self.blocksize2) for count in counts)
            tensors["absmax2"] = empty(outer, dtype=torch.float32)
            tensors["code2"] = empty(256, dtype=torch.float32)
            tensors["offsets"] = empty(len(counts), dtype=torch.float32)
        return tensors


class Int4Format:
    """int4 with a scale per 32 inputs, in the layout of vLLM's Marlin kernel; see `kernels/int4_marlin.py`.

    Tensors: `packed` `[in/16, 2·stored]` int32, `scales` `[in/32, stored]` bfloat16; stored is out, padded to whole
    tiles of Marlin with rows of zeros.
    """

    name, main, lossy = "int4", "packed", True

    def check(self, part: str, shape: tuple[int, int]) -> None:
        try:
            stored_rows(*shape)
        except ValueError as error:
            raise UserError(
                f"{part} is {shape[0]} × {shape[1]}", reason=str(error), fix="use format nf4 for this model"
            ) from error

    def quantise(
        self, weights: Sequence[torch.Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        packed, scales = quantize_marlin([weight.to(dtype) for weight in weights], device)
        return {"packed": packed, "scales": scales}

    def write_weight(self, tensors: Tensors, parts: Sequence[slice], rows: slice, out: torch.Tensor) -> None:
        if out.dtype in INT4_DTYPES:
            dequantize_int4(tensors["packed"], tensors["scales"], rows, out)
        else:
            out.copy_(dequantize_int4(tensors["packed"], tensors["scales"], rows))


class Fp8Format:
    """8-bit floating point with a power of two per output; see `kernels/fp8.py`.

    Tensors: `packed` `[out, in]` uint8, the bits of E4M3; `scales` `[out]` float32.
    """

    name, main, lossy = "fp8", "packed", True

    def check(self, part: str, shape: tuple[int, int]) -> None:
        """Every shape will do."""

    def quantise(
        self, weights: Sequence[torch.Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        packed = torch.empty(rows, columns, dtype=torch.uint8, device=device)
        scales = torch.empty(rows, dtype=torch.float32, device=device)
        row, most = 0, max(_CHUNK // columns, 1)
        for weight in weights:
            for start in range(0, len(weight), most):
                chunk = weight[start : start + most].to(dtype).to(device)
                here = slice(row, row + len(chunk))
                packed[here], scales[here] = quantize_fp8(chunk)
                row += len(chunk)
        return {"packed": packed, "scales": scales}

    def write_weight(self, tensors: Tensors, parts: Sequence[slice], rows: slice, out: torch.Tensor) -> None:
        packed, scales = tensors["packed"][rows], tensors["scales"][rows]
        if out.dtype in FP8_DTYPES:
            dequantize_fp8(packed, scales, out)
        else:
            out.copy_(dequantize_fp8(packed, scales))


NF4, DENSE = Nf4Format(), DenseFormat()
FORMATS: dict[str, WeightFormat] = {"nf4": NF4, "bf16": DENSE, "int4": Int4Format(), "fp8": Fp8Format()}


def weight_format(name: str) -> WeightFormat:
    """The format of this name.

    Raises:
        UserError: there is none, or what it needs is not installed.
    """
    if name not in FORMATS:
        raise UserError(f"weight format {short(name)}", fix=f"formats are {', '.join(FORMATS)}")
    if name == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("NF4 weights need bitsandbytes", fix="pip install 'tandem-rl[quantization]'")
    return FORMATS[name]


@functools.cache
def _levels(device: torch.device) -> torch.Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device=device)


@functools.cache
def _scale_levels() -> torch.Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map()


def _chunks(flat: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    return [(start, flat[start : start + _CHUNK]) for start in range(0, len(flat), _CHUNK)]


def _fill(target: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    for piece, part in zip(target.split([part.numel() for part in parts]), parts, strict=True):
        piece.copy_(part.reshape(-1))


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
