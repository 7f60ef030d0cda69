"""The NF4 product against float64 sums over weights unpacked here, on the twin and, in a second process, the kernel.

Triton's interpreter cuts bfloat16 off where a GPU rounds, so the kernel is held to what such weights can differ by.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace

import pytest
import torch
from interpreted_run import outcomes_interpreted

from tandem.kernels.nf4_gemm import DTYPES, _split, default_config, nf4_linear
from tandem.kernels.reference import NF4_LEVELS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPL = "triton" if INTERPRETED else "torch"
modes = pytest.mark.parametrize("impl", [pytest.param(IMPL, id="interpreted" if INTERPRETED else "plain")])
OUTER = 32


def weight(
    part_rows: tuple[int, ...], width: int, *, nested: bool = True, dtype: torch.dtype = torch.bfloat16
) -> tuple[list, torch.Tensor]:
    """Arguments of `nf4_linear` from packed to offsets, and the weight `[out, in]` in float64, rounded to `dtype`."""
    torch.manual_seed(len(part_rows) * 1000 + width)
    rows, blocks = sum(part_rows), width // 64
    packed = torch.randint(0, 256, (rows * width // 2, 1), dtype=torch.uint8)
    nibbles = torch.stack((packed[:, 0] >> 4, packed[:, 0] & 15), dim=1).view(rows, width)
    levels = torch.tensor(NF4_LEVELS)[nibbles.long()]
    if not nested:
        scales = torch.rand(rows, blocks) * 0.1 + 0.01
        arguments = [packed, scales.view(-1), None, None, None]
    else:
        inner = torch.randint(0, 256, (rows * blocks,), dtype=torch.uint8)
        code2, offsets = torch.randn(256), torch.randn(len(part_rows))
        outer, pieces, first = [], [], 0
        for index, count in enumerate(part_rows):
            own = torch.rand(math.ceil(count * blocks / OUTER)) * 0.3
            # Element by element, as the format is defined: no vectorised code that could share a mistake.
            of_part = inner[first * blocks : (first + count) * blocks].tolist()
            pieces += [code2[level] * own[i // OUTER] + offsets[index] for i, level in enumerate(of_part)]
            outer.append(own)
            first += count
        scales = torch.stack(pieces).view(rows, blocks)
        arguments = [packed, inner, torch.cat(outer), code2, offsets]
    values = levels * scales.repeat_interleave(64, dim=1)
    return arguments, values.to(dtype).double()


def close(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Within one rounding of the result, and in the interpreter within a last place of every weight."""
    exact = x.double() @ w.t() + (0 if bias is None else bias.double())
    rounding = torch.finfo(x.dtype).eps / 2
    allowed = exact.abs() * rounding + 1e-5
    if INTERPRETED:
        allowed = allowed + x.double().abs() @ w.abs().t() * 2 * rounding
    return bool(((got.double() - exact).abs() <= allowed).all())


def numbers(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)


@modes
@pytest.mark.parametrize("splits", [1, 2] if INTERPRETED else [1, 2, 5])
@pytest.mark.parametrize("part_rows", [(96,), (65, 31), (70, 9, 20)], ids=str)
@pytest.mark.parametrize("rows", [1, 18])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_stacked_parts(impl, dtype, rows, part_rows, splits):
    arguments, w = weight(part_rows, 192, dtype=dtype)
    bias = torch.randn(sum(part_rows)).to(dtype)
    x = numbers(rows, 192, dtype)
    config = replace(default_config(rows), splits=splits)
    for b in (None, bias):
        got = nf4_linear(x, *arguments, part_rows, 64, OUTER, b, config=config, impl=impl)
        assert got.dtype == dtype
        assert close(got, x, w, b)


@modes
def test_scales_that_are_not_nested(impl):
    arguments, w = weight((40, 30), 192, nested=False)
    x = numbers(3, 192)
    assert close(nf4_linear(x, *arguments, (40, 30), impl=impl), x, w)


@modes
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("unroll", [1, 2, 4])
def test_every_input_counts_once(impl, unroll, rows):
    """One-hot rows of x read single columns of W: a block skipped, doubled or shifted shows."""
    arguments, w = weight((33,), 192)
    picked = [0, 1, 62, 63, 64, 127, 128, 190, 191]
    x = torch.zeros(len(picked), 192, dtype=torch.bfloat16)
    x[torch.arange(len(picked)), picked] = 1
    config = replace(default_config(rows), unroll=unroll, splits=2)
    got = nf4_linear(x, *arguments, (33,), 64, OUTER, config=config, impl=impl).double()
    want = w[:, picked].t()
    assert ((got - want).abs() <= want.abs() * (2**-7 if INTERPRETED else 0)).all()


@modes
def test_strided_input_and_output(impl):
    arguments, w = weight((50,), 128)
    wide = numbers(4, 150)
    for first in (0, 1):  # an odd start is not aligned to pairs
        x = wide[:, first : first + 128]
        buffer = torch.full((4, 60), 7.0, dtype=torch.bfloat16)
        out = buffer[:, 5:55].fill_(torch.nan)
        for splits in (1, 2):
            config = replace(default_config(4), splits=splits)
            got = nf4_linear(x, *arguments, (50,), 64, OUTER, out=out, config=config, impl=impl)
            assert got is out
            assert close(out, x, w)
            assert (buffer[:, :5] == 7).all()
            assert (buffer[:, 55:] == 7).all()


@modes
def test_a_wrong_offset_or_scale_is_seen(impl):
    """What the comparison is worth: faults of the size of one part's offset, one outer scale, one nibble."""
    arguments, w = weight((40, 24), 128)
    x = numbers(2, 128)
    for which, fault in ((4, lambda t: t.flip(0)), (2, lambda t: t.roll(1)), (0, lambda t: (t >> 4) | (t << 4))):
        faulty = list(arguments)
        faulty[which] = fault(arguments[which])
        assert not close(nf4_linear(x, *faulty, (40, 24), 64, OUTER, impl=impl), x, w)


@modes
def test_no_rows(impl):
    arguments, _ = weight((8,), 64)
    assert nf4_linear(numbers(0, 64), *arguments, (8,), 64, OUTER, impl=impl).shape == (0, 8)


@pytest.mark.skipif(INTERPRETED, reason="the same code")
def test_what_does_not_fit_is_refused():
    arguments, _ = weight((40, 24), 128)
    x, parts = numbers(2, 128), (40, 24)

    def call(x=x, parts=parts, blocksize=64, bias=None, out=None, **changed):
        given = dict(zip(("packed", "absmax", "absmax2", "code2", "offsets"), arguments, strict=True)) | changed
        return nf4_linear(x, *given.values(), parts, blocksize, OUTER, bias, out)

    call()
    with pytest.raises(ValueError, match="bfloat16 or float16 matrix"):
        call(x=x.float())
    with pytest.raises(ValueError, match="96 inputs"):
        call(x=x[:, :96])
    with pytest.raises(ValueError, match="blocksize=128"):
        call(blocksize=128)
    with pytest.raises(ValueError, match="part_rows"):
        call(parts=(16, 16, 16, 16))
    with pytest.raises(ValueError, match="absmax2"):  # one long part has fewer outer scales than two
        call(absmax2=arguments[2][1:])
    with pytest.raises(ValueError, match="packed"):
        call(parts=(40, 25))
    with pytest.raises(ValueError, match="offsets"):
        call(offsets=None)
    with pytest.raises(ValueError, match="of no use"):
        call(absmax=torch.ones(128))
    with pytest.raises(ValueError, match="bias"):
        call(bias=torch.zeros(63))
    with pytest.raises(ValueError, match="out"):
        call(out=torch.zeros(2, 64))


@pytest.mark.skipif(INTERPRETED, reason="the same code")
def test_splits_cover_all_blocks_once():
    device = torch.device("cpu")
    for blocks in (1, 2, 7, 64, 192):
        for count in (1, 16, 64):
            for unroll in (1, 2, 4):
                config = replace(default_config(count), unroll=unroll)
                for tiles in (1, 64, 384):
                    per_program, splits = _split(blocks, count, tiles, config, device)
                    assert per_program % unroll == 0
                    assert (splits - 1) * per_program < blocks <= splits * per_program
    assert _split(64, 16, 384, default_config(16), device)[1] == 1
    assert _split(64, 16, 64, default_config(16), device)[1] > 1


@pytest.mark.skipif(INTERPRETED, reason="this is the other process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_triton_code_in_a_fresh_process():
    assert outcomes_interpreted(__file__) == {"passed": 34}
