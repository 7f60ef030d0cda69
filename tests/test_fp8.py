"""8-bit floating-point weights: bytes against PyTorch's own conversion, products against float64; on the twins and, in
a second process, the kernels.

Triton's interpreter cuts bfloat16 off where a GPU rounds, so the kernel is held to what that can make of a product.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from interpreted_run import outcomes_interpreted

from tandem.kernels.fp8 import dequantize_fp8, quantize_fp8
from tandem.kernels.fp8_gemm import DTYPES, Config, fp8_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPL = "triton" if INTERPRETED else "torch"
modes = pytest.mark.parametrize("impl", [pytest.param(IMPL, id="interpreted" if INTERPRETED else "plain")])


def weights(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, columns, generator=draw) * torch.logspace(-6, 3, rows)[:, None]
    return made.bfloat16()


@modes
def test_every_byte_has_its_value(impl: str) -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    found = dequantize_fp8(codes[None], torch.ones(1), torch.empty(1, len(codes)), impl=impl)
    assert torch.equal(found[0], expected)
    assert torch.equal(dequantize_fp8(codes[None], torch.ones(1), impl=impl)[0].float(), expected), "exact in bfloat16"


def test_scales_are_powers_of_two_that_use_the_range() -> None:
    weight = weights(40, 96)
    packed, scales = quantize_fp8(weight)
    mantissas, _ = torch.frexp(scales)
    assert torch.equal(mantissas, torch.full_like(scales, 0.5))
    largest = weight.float().abs().amax(1) / scales
    assert bool((largest <= 448).all())
    assert bool((largest > 224).all())
    # Three bits of mantissa: half a unit in the last place is 1/16 of the value, below the smallest normal one 2⁻¹⁰.
    found = dequantize_fp8(packed, scales, torch.empty(weight.shape))
    error = (found - weight.float()).abs()
    assert bool((error <= torch.maximum(weight.float().abs() / 16, scales[:, None] * 2**-10)).all())
    assert torch.equal(dequantize_fp8(packed, scales).float(), found), "no bit is lost in bfloat16"


def test_powers_of_two_zeros_and_what_is_no_number() -> None:
    weight = torch.tensor([[448.0, -1.0], [896.0, 1.0], [0.0, 0.0], [-(2.0**-20), 2.0**-21]])
    packed, scales = quantize_fp8(weight)
    assert scales.tolist() == [1.0, 2.0, 1.0, 2.0**-28]
    assert torch.equal(dequantize_fp8(packed, scales, torch.empty(4, 2)), weight)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_fp8(torch.tensor([[1.0, float("nan")]]))


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_lie_apart_are_written(dtype: torch.dtype, impl: str) -> None:
    packed, scales = quantize_fp8(weights(7, 2500, seed=1)[:, :2500])
    buffer = torch.full((7, 2600), 7.0, dtype=dtype)
    dequantize_fp8(packed, scales, buffer[:, :2500], impl=impl)
    assert torch.equal(
        buffer[:, :2500], dequantize_fp8(packed, scales, torch.empty(7, 2500, dtype=dtype), impl="torch")
    )
    assert bool((buffer[:, 2500:] == 7).all())


@pytest.mark.parametrize("count", [1, 5, 16, 33, 70])
@pytest.mark.parametrize(("outputs", "width"), [(96, 256), (100, 200)])
@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize("dtype", DTYPES)
@modes
def test_products(dtype: torch.dtype, count: int, outputs: int, width: int, splits: int | None, impl: str) -> None:
    packed, scales = quantize_fp8(weights(outputs, width, seed=2))
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(3)).to(dtype)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(4)).to(dtype)
    exact = x.double() @ dequantize_fp8(packed, scales, impl="torch").double().t()
    size = x.double().abs() @ dequantize_fp8(packed, scales, impl="torch").double().abs().t()
    config = Config(block_n=32, block_m=16, block_k=64, splits=splits)
    for given in (None, bias):
        expected = exact if given is None else exact + given.double()
        found = fp8_linear(x, packed, scales, given, config=config, impl=impl)
        assert found.dtype == dtype
        # Sums in float32, rounded once, or cut off.
        half = torch.finfo(dtype).eps * expected.abs().clamp(min=torch.finfo(dtype).tiny) / 2
        bound = half * (2 if INTERPRETED else 1) + size * 2**-20
        assert bool(((found.double() - expected).abs() <= bound).all())


def test_what_does_not_fit_is_refused() -> None:
    packed, scales = quantize_fp8(weights(8, 16))
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    for bad in (
        lambda: dequantize_fp8(packed.int(), scales),
        lambda: dequantize_fp8(packed, scales[:4]),
        lambda: dequantize_fp8(packed, scales, torch.empty(8, 15)),
        lambda: fp8_linear(x.float(), packed, scales),
        lambda: fp8_linear(x[:, :8], packed, scales),
        lambda: fp8_linear(x, packed, scales, torch.ones(7)),
    ):
        with pytest.raises(ValueError, match="needed"):
            bad()


@pytest.mark.skipif(INTERPRETED, reason="this is the second process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_in_tritons_interpreter() -> None:
    assert outcomes_interpreted(__file__, "")["passed"] > 30
