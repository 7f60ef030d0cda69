"""The Triton kernels on a CUDA device at real sizes: run by hand with `pytest -m gpu -s tests/test_triton_gpu.py`.

The oracle is the float64 twin on the device (`tests/test_triton_kernels.py` holds the twins to formulas of its own).
"""

from __future__ import annotations

import pytest
import torch

from tandem.kernels.glu import glu, glu_backward_
from tandem.kernels.nf4 import dequantize_nf4, from_quant_state
from tandem.kernels.reference import NF4_LEVELS, picks_triton
from tandem.kernels.rms_norm import rms_norm, rms_norm_backward
from tandem.kernels.rope import qk_norm_rope, qk_norm_rope_backward, rope_, rope_tables
from tandem.kernels.row_copy import copy_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOKENS, WIDTH, FFN, DIM = 8192, 4096, 12288, 128
HEADS = (32, 8)
EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * size).to(dtype)


def worst(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor | None = None) -> float:
    """The largest error in units of half a last place of the result's type, at the size of the row or at `size`."""
    assert got.isfinite().all()
    scale = want.abs().amax(-1, keepdim=True) if size is None else size.double().abs()
    half = torch.finfo(got.dtype).eps / 2
    return ((got.double() - want.double()).abs() / (half * scale + torch.finfo(got.dtype).smallest_normal)).max().item()


def limit(dtype: torch.dtype, roundings: int) -> float:
    return roundings + (20 if dtype == torch.float32 else 0.1)


@dtypes
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(TOKENS, WIDTH), (33, 96), (1, 576), (5, 5120), (3, 16384)], ids=str)
def test_rms_norm(dtype, offset, shape) -> None:
    x, residual, dy, into = (random(*shape, dtype=dtype) for _ in range(4))
    weight = random(shape[1], dtype=dtype)
    assert picks_triton(x)
    y, h = rms_norm(x, weight, EPS, offset=offset, residual=residual)
    assert torch.equal(h, x + residual)
    want, _ = rms_norm(h.double(), weight.double(), EPS, offset=offset)
    assert worst(y, want, want) <= limit(dtype, 3)
    alone, _ = rms_norm(h, weight, EPS, offset=offset)
    assert torch.equal(alone, y)

    grad = rms_norm_backward(dy.double(), h.double(), weight.double(), EPS, offset=offset)
    assert worst(rms_norm_backward(dy, h, weight, EPS, offset=offset), grad) <= limit(dtype, 1)
    grad += into.double()
    assert worst(rms_norm_backward(dy, h, weight, EPS, offset=offset, into=into), grad) <= limit(dtype, 1)


@dtypes
@pytest.mark.parametrize(
    "shape",
    [(TOKENS, HEADS[0], DIM, DIM), (TOKENS, HEADS[1], DIM, DIM), (33, 3, 96, 96), (5, 5, 256, 64), (1, 1, 8, 4)],
)
def test_rope_and_qk_norm(dtype, shape) -> None:
    tokens, heads, dim, rotary = shape
    inv_freq = 1e6 ** (-torch.arange(0, rotary, 2, device="cuda") / rotary)
    cos, sin = rope_tables(torch.randint(0, 131_072, (tokens,), device="cuda"), inv_freq)
    # Q as a slice of a QKV buffer whose other columns must stay as they are.
    qkv = random(tokens, heads * dim + 256, dtype=dtype)
    kept = qkv.clone()
    x = qkv[:, : heads * dim].unflatten(1, (heads, dim))
    before = kept[:, : heads * dim].unflatten(1, (heads, dim))
    rope_(x, cos, sin)
    assert worst(x, rope_(before.double(), cos, sin)) <= limit(dtype, 1)
    assert torch.equal(qkv[:, heads * dim :], kept[:, heads * dim :])
    back = rope_(x.double(), cos, sin, inverse=True)
    assert worst(rope_(x.clone(), cos, sin, inverse=True), back) <= limit(dtype, 1)

    weight = random(dim, dtype=dtype)
    dy = random(tokens, heads, dim, dtype=dtype)
    wide = (before.double(), weight.double(), EPS, cos, sin)
    for offset in (0.0, 1.0):
        y = qk_norm_rope(before, weight, EPS, cos, sin, offset=offset)
        assert worst(y, qk_norm_rope(*wide, offset=offset)) <= limit(dtype, 5)
        in_place = before.clone()
        qk_norm_rope(in_place, weight, EPS, cos, sin, offset=offset, out=in_place)
        assert torch.equal(in_place, y)
        dx = qk_norm_rope_backward(dy, before, weight, EPS, cos, sin, offset=offset)
        assert worst(dx, qk_norm_rope_backward(dy.double(), *wide, offset=offset)) <= limit(dtype, 1)
        in_place = dy.clone()
        qk_norm_rope_backward(in_place, before, weight, EPS, cos, sin, offset=offset, out=in_place)
        assert torch.equal(in_place, dx)


@dtypes
@pytest.mark.parametrize("kind", ["swiglu", "geglu_tanh"])
@pytest.mark.parametrize("shape", [(TOKENS // 2, FFN), (33, 96), (1, 2049)], ids=str)
def test_glu(dtype, kind, shape) -> None:
    both = random(shape[0], 2 * shape[1], dtype=dtype, size=3)
    gate, up = both.chunk(2, dim=1)
    dh = random(*shape, dtype=dtype)
    h = glu(gate, up, kind)
    wide_gate, wide_up, wide_dh = gate.double(), up.double(), dh.double()
    assert worst(h, glu(wide_gate, wide_up, kind), gate.double() * up.double()) <= limit(dtype, 3)
    sizes = (dh.double() * up.double(), dh.double() * gate.double())
    glu_backward_(wide_dh, wide_gate, wide_up, kind)
    glu_backward_(dh, gate, up, kind, recompute_h=True)
    assert torch.equal(dh, h)
    assert worst(gate, wide_gate, sizes[0]) <= limit(dtype, 2)
    assert worst(up, wide_up, sizes[1]) <= limit(dtype, 2)


@dtypes
@pytest.mark.parametrize("nested", [False, True], ids=["scales", "nested"])
@pytest.mark.parametrize(
    ("shape", "blocksize"), [((FFN, WIDTH), 64), ((33, 10), 64), ((577, 96), 128), ((4096, 3), 4096)]
)
def test_nf4_bit_for_bit_as_bitsandbytes(dtype, nested, shape, blocksize) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random(*shape, dtype=dtype, size=0.02)
    packed, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=nested)
    want = functional.dequantize_4bit(packed, state)
    ours = from_quant_state(state)
    assert torch.equal(ours.dequantize(packed), want)
    assert torch.equal(ours.dequantize(packed, impl="torch"), want)
    buffer = torch.full((weight.numel() + 64,), torch.nan, dtype=dtype, device="cuda")
    assert torch.equal(ours.dequantize(packed, buffer), want)
    assert buffer[weight.numel() :].isnan().all()
    wide = torch.full((shape[0] + 8, shape[1] + 24), torch.nan, dtype=dtype, device="cuda")
    assert torch.equal(ours.dequantize(packed, wide[: shape[0], : shape[1]]), want)
    assert wide[shape[0] :].isnan().all()
    assert wide[:, shape[1] :].isnan().all()


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(TOKENS, WIDTH), (33, 129)])
def test_copy_rows(dtype, rows, width) -> None:
    x = random(rows, width + 32, dtype=dtype)[:, :width]
    buffer = torch.full((rows, width + 96), torch.nan, dtype=dtype, device="cuda")
    assert torch.equal(copy_rows(buffer[:, :width], x), x)
    assert buffer[:, width:].isnan().all()


def test_beyond_two_to_the_31() -> None:
    """The last row of each result, where offsets need 64 bits, against the same rows alone."""
    needed = 20 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip("needs 20 GiB of free device memory")
    torch.use_deterministic_algorithms(False)  # filling such buffers takes longer than the kernels
    rows_, last = 2**31 // WIDTH + 3, slice(-2, None)
    x = torch.zeros(rows_, WIDTH, dtype=torch.bfloat16, device="cuda")
    tail, weight = random(2, WIDTH), random(WIDTH)
    x[last] = tail
    y = rms_norm(x, weight, EPS)[0]
    assert torch.equal(y[last], rms_norm(tail, weight, EPS)[0])
    rms_norm_backward(x, x, weight, EPS, into=y)
    alone = rms_norm_backward(tail, tail, weight, EPS, into=rms_norm(tail, weight, EPS)[0])
    assert torch.equal(y[last], alone)
    cos, sin = rope_tables(torch.arange(rows_, device="cuda"), torch.rand(DIM // 2, device="cuda"))
    rope_(y.view(rows_, -1, DIM), cos, sin)
    assert torch.equal(y[last], rope_(alone.clone().view(2, -1, DIM), cos[last], sin[last]).view(2, -1))
    y.copy_(x)
    glu_backward_(x, y, y.roll(1, 0), "swiglu", recompute_h=True)
    gate = tail.clone()
    glu_backward_(tail.clone(), gate, torch.stack((torch.zeros_like(tail[0]), tail[0])), "swiglu")
    assert torch.equal(y[last], gate)
    del x, y

    count = 2**31 + 4096
    packed = torch.zeros(count // 2, dtype=torch.uint8, device="cuda")
    packed[-32:] = 0x2F
    absmax = torch.ones(count // 64, device="cuda")
    absmax[-1] = 3.0
    weight = dequantize_nf4(packed, absmax, (count,))
    high, low = (torch.tensor(NF4_LEVELS[i] * 3.0).bfloat16() for i in (0x2, 0xF))
    assert torch.equal(weight[-64:].cpu(), torch.stack((high, low)).repeat(32))
    assert (weight[2**31 - 8 : 2**31 + 8] == -1.0).all()
