"""int4 in Marlin's layout: against the layout as the tensor cores' fragments define it, and the error of other scales.

The kernel runs in a second process under Triton's interpreter, which cuts bfloat16 off where a GPU rounds: bitwise
equality is asked of scales whose products are exact, one last place of the others.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from interpreted_run import outcomes_interpreted

from tandem.kernels.int4_marlin import (
    dequantize_int4,
    pack_codes,
    pack_scales,
    quantize_int4,
    quantize_marlin,
    stored_rows,
    unpack_codes,
    unpack_scales,
)
from tandem.kernels.reference import NF4_LEVELS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPL = "triton" if INTERPRETED else "torch"
modes = pytest.mark.parametrize("impl", [pytest.param(IMPL, id="interpreted" if INTERPRETED else "plain")])
once = pytest.mark.skipif(INTERPRETED, reason="the same code")


def gaussian(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + width)).bfloat16()


def values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(code − 8)·scale in float64, rounded to bfloat16."""
    exact = (codes.double() - 8) * scales.double().repeat_interleave(32, dim=1)
    return exact.float().bfloat16()  # 4 × 8 bits: float32 holds the product


def random_weight(rows: int, width: int, *, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales; `exact`: scales of four bits, so that products need no rounding."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (rows, width), dtype=torch.uint8, generator=generator)
    if exact:
        steps = torch.randint(-15, 16, (rows, width // 32), generator=generator)
        return codes, (steps * 2.0**-9).bfloat16()
    return codes, torch.randn(rows, width // 32, generator=generator).bfloat16() * 0.01


@once
def test_codes_lie_where_the_tensor_cores_want_them():
    """mma.m16n8k16: of a 16 × 8 operand lane l holds column l // 4, rows 2·(l % 4) + {0, 1, 8, 9}.

    A lane reads four words, one per 16 outputs, each with two such operands (8 outputs each). The conversion to
    bfloat16 takes nibbles i and i + 4 as one register: rows 0 and 1 of an operand, then rows 8 and 9.
    """
    codes, _ = random_weight(192, 48, exact=True)
    packed = pack_codes(codes)
    assert packed.shape == (3, 384)
    assert packed.dtype == torch.int32
    for tile in range(3):
        for block in range(3):
            for lane in range(32):
                for fragment in range(4):
                    word = int(packed[tile, block * 128 + lane * 4 + fragment]) & 0xFFFFFFFF
                    for operand in range(2):
                        n = block * 64 + fragment * 16 + operand * 8 + lane // 4
                        for register in range(2):
                            for half in range(2):
                                k = tile * 16 + 2 * (lane % 4) + 8 * register + half
                                nibble = operand * 2 + register + 4 * half
                                assert (word >> (4 * nibble)) & 15 == codes[n, k]


@once
def test_scales_lie_where_the_lanes_read_them():
    """Lane l reads 8 neighbouring scales: those of column l // 4 of the block's eight operands."""
    scales = torch.arange(2 * 128.0).view(128, 2)
    packed = pack_scales(scales)
    for group in range(2):
        for block in range(2):
            for column in range(8):
                for operand in range(8):
                    assert (
                        packed[group, block * 64 + column * 8 + operand]
                        == scales[block * 64 + operand * 8 + column, group]
                    )


@once
@pytest.mark.parametrize("shape", [(64, 32), (128, 576), (960, 64)], ids=str)
def test_packing_is_undone_exactly(shape):
    codes, scales = random_weight(*shape, exact=False)
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)
    assert torch.equal(unpack_scales(pack_scales(scales)), scales)


@modes
@pytest.mark.parametrize(
    "rows", [None, slice(64, 192), slice(0, 64), slice(3, 130), slice(191, 192), slice(70, 70)], ids=str
)
@pytest.mark.parametrize("width", [64, 192])
def test_rows_are_what_the_definition_says(impl, rows, width):
    for exact in (True, False):
        codes, scales = random_weight(192, width, exact=exact)
        want = values(codes, scales)[rows or slice(None)]
        got = dequantize_int4(pack_codes(codes), pack_scales(scales), rows, impl=impl)
        if exact or not INTERPRETED:
            assert torch.equal(got, want)
        else:
            assert ((got.float() - want.float()).abs() <= want.float().abs() * 2**-7).all()


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_into_a_part_of_a_wider_buffer(impl, dtype):
    codes, scales = random_weight(128, 192, exact=True)
    buffer = torch.full((52, 200), 7.0, dtype=dtype)
    out = buffer[1:-1, 3:195].fill_(torch.nan)
    got = dequantize_int4(pack_codes(codes), pack_scales(scales), slice(50, 100), out, impl=impl)
    assert got is out
    assert torch.equal(out, values(codes, scales)[50:100].to(dtype))
    buffer[1:-1, 3:195] = 7
    assert (buffer == 7).all()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def absmax_error(weight: torch.Tensor) -> float:
    """Of the common choice, scale = max|w| / 7."""
    groups = weight.float().view(-1, 32)
    scale = (groups.abs().amax(1, keepdim=True) / 7).bfloat16().float()
    return relative((groups / scale).round().clamp(-8, 7) * scale, groups)


def nf4_error(weight: torch.Tensor) -> float:
    groups = weight.float().view(-1, 64)
    scale = groups.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS)
    nearest = ((groups / scale)[..., None] - levels).abs().argmin(-1)
    return relative(levels[nearest] * scale, groups)


@once
def test_error_on_gaussian_weights():
    weight = gaussian(256, 1024)
    codes, scales = quantize_int4(weight)
    ours = relative(values(codes, scales), weight)
    assert ours <= 0.085
    assert ours < 0.9 * absmax_error(weight)
    assert ours < nf4_error(weight)


@once
def test_scales_are_near_the_best_there_are():
    groups = gaussian(40, 32)
    codes, scales = quantize_int4(groups)
    ours = (values(codes, scales).double() - groups.double()).square().sum(1)
    largest = groups.double().abs().amax(1)
    fine = torch.linspace(-0.25, 0.25, 4001, dtype=torch.float64)
    fine = fine[fine != 0]
    candidates = (largest[:, None] * fine)[:, :, None]
    steps = (groups.double()[:, None, :] / candidates).round().clamp(-8, 7)
    best = (steps * candidates - groups.double()[:, None, :]).square().sum(2).amin(1)
    assert ours.sum() < 1.06 * best.sum()


@once
def test_unusual_groups():
    weight = torch.zeros(6, 64, dtype=torch.bfloat16)
    weight[1, 5] = 3.0  # alone in its group
    weight[2, :32] = 0.5
    weight[3, 40] = -1e-38
    weight[4, 0], weight[4, 1] = 1e38, -1e38
    weight[5] = torch.arange(-32, 32) / 8
    codes, scales = quantize_int4(weight)
    got = values(codes, scales).float()
    assert got.isfinite().all()
    assert (got[0] == 0).all()
    assert got[1, 5] == 3.0
    assert got[1].count_nonzero() == 1
    assert torch.equal(got[2], weight[2].float())
    assert abs(got[4, 0] / 1e38 - 1) < 0.13
    assert abs(got[4, 1] / 1e38 + 1) < 0.13
    for bad in (torch.nan, torch.inf):
        weight[0, 0] = bad
        with pytest.raises(ValueError, match="not finite"):
            quantize_int4(weight)


@once
@pytest.mark.parametrize("part_rows", [(576, 192, 192), (96,), (64, 64)], ids=str)
def test_parts_are_stacked_each_as_if_alone(part_rows):
    parts = [gaussian(rows, 192) for rows in part_rows]
    packed, scales = quantize_marlin(parts, "cpu")
    stored = stored_rows(sum(part_rows), 192)
    assert packed.shape == (12, 2 * stored)
    assert scales.shape == (6, stored)
    assert packed.is_contiguous()
    assert scales.is_contiguous()
    first = 0
    for part in parts:
        rows = slice(first, first + part.shape[0])
        assert torch.equal(dequantize_int4(packed, scales, rows), values(*quantize_int4(part)))
        first = rows.stop
    assert (dequantize_int4(packed, scales, slice(first, stored)) == 0).all()


@once
def test_chunks_change_nothing(monkeypatch):
    weight = gaussian(128, 128)
    whole = quantize_int4(weight)
    packed, scales = pack_codes(whole[0]), pack_scales(whole[1])
    want = dequantize_int4(packed, scales, slice(10, 120))
    monkeypatch.setattr("tandem.kernels.int4_marlin._CHUNK", 300)
    assert all(torch.equal(a, b) for a, b in zip(quantize_int4(weight), whole, strict=True))
    assert torch.equal(dequantize_int4(packed, scales, slice(10, 120)), want)


@once
def test_shapes_that_marlin_takes():
    assert stored_rows(6144, 4096) == 6144
    assert stored_rows(960, 576) == 1024  # 64 inputs at a time: 128 outputs
    assert stored_rows(576, 1536) == 576
    assert stored_rows(1, 128) == 64
    for shape in ((64, 32), (64, 96), (64, 0), (0, 128)):
        with pytest.raises(ValueError, match="multiple of 64 inputs"):
            stored_rows(*shape)


@once
def test_what_does_not_fit_is_refused():
    codes, scales = random_weight(64, 64, exact=True)
    packed, factors = pack_codes(codes), pack_scales(scales)
    with pytest.raises(ValueError, match="multiple of 32 columns"):
        quantize_int4(torch.zeros(4, 48))
    with pytest.raises(ValueError, match="share one input"):
        quantize_marlin([torch.zeros(64, 64), torch.zeros(64, 128)], "cpu")
    with pytest.raises(ValueError, match="no range"):
        dequantize_int4(packed, factors, slice(0, 65))
    with pytest.raises(ValueError, match="no range"):
        dequantize_int4(packed, factors, slice(0, 64, 2))
    with pytest.raises(ValueError, match="contiguous int32"):
        dequantize_int4(packed.float(), factors)
    with pytest.raises(ValueError, match="scales"):
        dequantize_int4(packed, factors.float())
    with pytest.raises(ValueError, match="scales"):
        dequantize_int4(packed, factors[:1])
    for out in (torch.zeros(64, 32), torch.zeros(64, 64).half(), torch.zeros(64, 64).bfloat16().t()):
        with pytest.raises(ValueError, match="out"):
            dequantize_int4(packed, factors, out=out)


@pytest.mark.skipif(INTERPRETED, reason="this is the other process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_triton_code_in_a_fresh_process():
    assert outcomes_interpreted(__file__) == {"passed": 14}
