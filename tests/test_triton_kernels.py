"""The Triton kernels and their plain PyTorch twins against float64 formulas written here and against Hugging Face.

Every test runs on the twin in this process and on the kernel in a second one, where Triton's interpreter is switched
on before Triton is imported (`test_the_triton_code_in_a_fresh_process`). All fresh memory is filled with NaN.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from interpreted_run import outcomes_interpreted

from tandem.kernels.glu import glu, glu_backward_
from tandem.kernels.nf4 import NestedAbsmax, dequantize_nf4, from_quant_state
from tandem.kernels.reference import picks_triton, rows
from tandem.kernels.rms_norm import rms_norm, rms_norm_backward
from tandem.kernels.rope import qk_norm_rope, qk_norm_rope_backward, rope_, rope_tables
from tandem.kernels.row_copy import copy_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLS = [pytest.param("triton", id="interpreted") if INTERPRETED else pytest.param("torch", id="plain")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((33, 96), 0.0), ((1, 576), 0.0), ((2, 1), 0.0), ((3, 129), 1.0), ((1, 576), 1.0)]
EPS = 1e-5

impls = pytest.mark.parametrize("impl", IMPLS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The interpreter is slow: where casts in between play no part, float16 teaches nothing that bfloat16 does not.
fewer_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2] if INTERPRETED else DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def close(got: torch.Tensor, want: torch.Tensor, roundings: int, *, row: bool = False, size=None) -> bool:
    """Within so many roundings of the type, each up to a whole last place, as the interpreter cuts bfloat16 off.

    Relative to the element, or to `size`, or with `row` to the largest of its row, where terms of that size cancel.
    """
    last = torch.finfo(got.dtype).eps
    if got.dtype == torch.float32:
        roundings += 10  # sums of a few hundred terms in another order
    size = want.abs().amax(-1, keepdim=True) if row else (want if size is None else size.double()).abs()
    error = (got.double() - want.double()).abs()
    return bool((error <= roundings * last * size + torch.finfo(got.dtype).smallest_normal).all())


def guarded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of `[..., d]` inside a larger buffer, rows apart, and the mask of the buffer's other elements."""
    rows_, width = tensor.numel() // tensor.shape[-1], tensor.shape[-1]
    buffer = torch.full((rows_ + 2, width + 5), 7.0, dtype=tensor.dtype)
    inner = buffer[1:-1, 2 : 2 + width]
    inner.copy_(tensor.reshape(rows_, width))
    return inner, buffer


def untouched(inner: torch.Tensor, buffer: torch.Tensor) -> bool:
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[1:-1, 2 : 2 + inner.shape[-1]] = False
    return bool((buffer[outside] == 7.0).all())


# ---- RMSNorm


def norm64(h: torch.Tensor, weight: torch.Tensor, offset: float, eps: float = EPS) -> torch.Tensor:
    h = h.double()
    return h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


@impls
@dtypes
@pytest.mark.parametrize(("shape", "offset"), SHAPES, ids=str)
def test_rms_norm(impl, dtype, shape, offset) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    y, h = rms_norm(x, weight, EPS, offset=offset, impl=impl)
    assert h is x
    assert y.dtype == dtype
    assert close(y, norm64(x, weight, offset), 3)

    dy = torch.randn(shape).to(dtype)
    leaf = x.double().requires_grad_()
    (want,) = torch.autograd.grad(norm64(leaf, weight, offset), leaf, dy.double())
    dx = rms_norm_backward(dy, x, weight, EPS, offset=offset, impl=impl)
    if shape[-1] == 1:  # a row of one element has no gradient but for eps
        return
    assert close(dx, want, 2, row=True)
    before = torch.randn(shape).to(dtype)
    into, buffer = guarded(before)
    assert rms_norm_backward(dy, x, weight, EPS, offset=offset, into=into, impl=impl) is into
    assert close(into, before.double() + want, 2, row=True)
    assert untouched(into, buffer)


@impls
@dtypes
@pytest.mark.parametrize("place", ["new", "residual", "x"])
def test_rms_norm_with_residual(impl, dtype, place) -> None:
    x, residual, weight = torch.randn(2, 5, 96).to(dtype), torch.randn(2, 5, 96).to(dtype), torch.randn(96).to(dtype)
    total = x.double() + residual.double()
    h_out = {"new": None, "residual": residual, "x": x}[place]
    y, h = rms_norm(x, weight, EPS, residual=residual, h_out=h_out, impl=impl)
    assert h_out is None or h is h_out
    assert close(h, total, 1)
    # The norm sees the rounded sum, which is what the next layer sees.
    assert torch.equal(y, rms_norm(h.clone(), weight, EPS, impl=impl)[0])
    assert close(y, norm64(h, weight, 0.0), 3)


@impls
def test_rms_norm_uses_eps_and_survives_extreme_rows(impl) -> None:
    x = torch.randn(4, 96) * torch.tensor([1e-4, 1e15, 1.0, 0.0])[:, None]
    y, _ = rms_norm(x, torch.ones(96), EPS, impl=impl)
    want = norm64(x, torch.ones(96), 0.0)
    assert close(y, want, 3)
    assert not close(y, norm64(x, torch.ones(96), 0.0, eps=1e-9), 100)
    assert (y[3] == 0).all()


@impls
@dtypes
def test_rms_norm_as_hugging_face(impl, dtype) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = (torch.randn(7, 96) * 3).to(dtype)
    for module, offset in ((LlamaRMSNorm(96, eps=EPS), 0.0), (GemmaRMSNorm(96, eps=EPS), 1.0)):
        module.weight.data = torch.randn(96).to(dtype)
        y, _ = rms_norm(x, module.weight.detach(), EPS, offset=offset, impl=impl)
        want = module(x)
        if impl == "torch":
            assert torch.equal(y, want)
        elif dtype != torch.bfloat16:
            # Nearly always the same bits: the wrong order of casts moves a quarter of them.
            assert (y != want).float().mean() < (0.5 if dtype == torch.float32 else 0.02)
        assert close(y, want, 3)


# ---- RoPE


def turn64(x: torch.Tensor, angle: torch.Tensor, sign: float = 1.0) -> torch.Tensor:
    """Planes (i, i + R/2) as complex numbers times e^{±i·angle}."""
    half = angle.shape[1]
    plane = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    plane = plane * torch.exp(sign * 1j * angle.double())[:, None]
    return torch.cat((plane.real, plane.imag, x[..., 2 * half :].double()), dim=-1)


def tables(tokens: int, rotary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions = torch.randint(0, 100_000, (tokens,))
    inv_freq = 1.0 / 10_000 ** (torch.arange(0, rotary, 2) / rotary)
    cos, sin = rope_tables(positions, inv_freq)
    return positions.float()[:, None] * inv_freq, cos, sin


# tokens, heads, head dimension, rotary dimension
HEADS = [(1, 1, 96, 96), (7, 2, 32, 32), (4, 5, 48, 12), (3, 40, 128, 128)]


@impls
@fewer_dtypes
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_rope(impl, dtype, shape) -> None:
    tokens, heads, dim, rotary = shape
    angle, cos, sin = tables(tokens, rotary)
    x = torch.randn(tokens, heads, dim).to(dtype)
    # The heads lie inside a wider buffer, as Q does in QKV, with a gap between tokens.
    flat, buffer = guarded(x.flatten(1))
    view = flat.unflatten(1, (heads, dim))
    assert rope_(view, cos, sin, impl=impl) is view
    assert close(view, turn64(x, angle), 1, row=True)
    assert not close(view, turn64(x, angle, -1.0), 8, row=True)
    assert torch.equal(view[..., rotary:], x[..., rotary:])
    rope_(view, cos, sin, inverse=True, impl=impl)
    assert close(view, x, 3, row=True)
    assert untouched(flat, buffer)
    full = x.clone()
    rope_(full, torch.cat((cos, cos), 1), torch.cat((sin, sin), 1), rotary_dim=rotary, impl=impl)
    assert close(full, turn64(x, angle), 1, row=True)


@impls
def test_rope_backward_is_the_transpose(impl) -> None:
    cos, sin = rope_tables(torch.tensor([3, 70_000, 5]), torch.rand(8), scaling=1.3)
    x, y = torch.randn(3, 2, 20), torch.randn(3, 2, 20)
    turned = rope_(x.clone(), cos, sin, impl=impl).double()
    back = rope_(y.clone(), cos, sin, inverse=True, impl=impl).double()
    assert torch.allclose((turned * y).sum(), (x * back).sum(), rtol=1e-5)
    assert torch.allclose(turned[..., :16].norm(), x[..., :16].double().norm() * 1.3, rtol=1e-5)


def qk64(x: torch.Tensor, weight: torch.Tensor, offset: float, angle: torch.Tensor) -> torch.Tensor:
    return turn64(norm64(x, weight, offset), angle)


@impls
@fewer_dtypes
@pytest.mark.parametrize(("shape", "offset"), zip([*HEADS, HEADS[2]], [1, 0, 0, 1, 1], strict=True), ids=str)
def test_qk_norm_rope(impl, dtype, shape, offset) -> None:
    tokens, heads, dim, rotary = shape
    angle, cos, sin = tables(tokens, rotary)
    x, weight = torch.randn(tokens, heads, dim).to(dtype), torch.randn(dim).to(dtype)
    want = qk64(x, weight, offset, angle)
    y = qk_norm_rope(x, weight, EPS, cos, sin, offset=offset, impl=impl)
    assert close(y, want, 4, row=True)
    flat, buffer = guarded(x.flatten(1))
    in_place = flat.unflatten(1, (heads, dim))
    qk_norm_rope(in_place, weight, EPS, cos, sin, offset=offset, out=in_place, impl=impl)
    assert torch.equal(in_place, y)
    assert untouched(flat, buffer)

    dy = torch.randn(tokens, heads, dim).to(dtype)
    leaf = x.double().requires_grad_()
    (grad,) = torch.autograd.grad(qk64(leaf, weight, offset, angle), leaf, dy.double())
    dx = qk_norm_rope_backward(dy, x, weight, EPS, cos, sin, offset=offset, impl=impl)
    assert close(dx, grad, 3, row=True)
    flat, buffer = guarded(dy.flatten(1))
    in_place = flat.unflatten(1, (heads, dim))
    qk_norm_rope_backward(in_place, x, weight, EPS, cos, sin, offset=offset, out=in_place, impl=impl)
    assert torch.equal(in_place, dx)
    assert untouched(flat, buffer)


@impls
def test_tables_may_be_rounded(impl) -> None:
    """They are read as they are, to the last bit, and multiplied in float32."""
    _, cos, sin = tables(4, 32)
    rounded = cos.bfloat16(), sin.bfloat16()
    same = tuple(table.float() for table in rounded)
    x, weight = torch.randn(4, 3, 32).bfloat16(), torch.randn(32).bfloat16()
    turned = rope_(x.clone(), *rounded, impl=impl)
    assert torch.equal(turned, rope_(x.clone(), *same, impl=impl))
    assert not torch.equal(turned, rope_(x.clone(), cos, sin, impl=impl))
    y = qk_norm_rope(x, weight, EPS, *rounded, impl=impl)
    assert torch.equal(y, qk_norm_rope(x, weight, EPS, *same, impl=impl))
    dx = qk_norm_rope_backward(y, x, weight, EPS, *rounded, impl=impl)
    assert torch.equal(dx, qk_norm_rope_backward(y, x, weight, EPS, *same, impl=impl))


@impls
def test_rope_as_qwen3(impl) -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

    config = Qwen3Config(hidden_size=64, num_attention_heads=2, head_dim=32)
    module, norm = Qwen3RotaryEmbedding(config), Qwen3RMSNorm(32, eps=EPS)
    norm.weight.data = torch.randn(32)
    positions = torch.tensor([0, 1, 7, 131_071, 262_143])
    x = torch.randn(5, 2, 32)
    full_cos, full_sin = module(x, positions[None])
    cos, sin = rope_tables(positions, module.inv_freq, module.attention_scaling)
    assert torch.equal(cos, full_cos[0, :, :16])
    assert torch.equal(sin, full_sin[0, :, :16])
    want, _ = apply_rotary_pos_emb(norm(x), norm(x), full_cos[0], full_sin[0], unsqueeze_dim=1)
    got = qk_norm_rope(x, norm.weight.detach(), EPS, cos, sin, impl=impl)
    assert close(got, want.detach(), 2, row=True)
    two_steps = rope_(rms_norm(x, norm.weight.detach(), EPS, impl=impl)[0], full_cos[0], full_sin[0], impl=impl)
    assert close(two_steps, want.detach(), 2, row=True)


# ---- GLU


def glu64(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    gate, up = gate.double(), up.double()
    if kind == "swiglu":
        return gate / (1 + torch.exp(-gate)) * up
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


@impls
@fewer_dtypes
@pytest.mark.parametrize("kind", ["swiglu", "geglu_tanh"])
@pytest.mark.parametrize("shape", [(9, 96), (1, 2049), (2, 1), (3, 576)], ids=str)
def test_glu(impl, dtype, kind, shape) -> None:
    gate, up, dh = ((torch.randn(shape) * size).to(dtype) for size in (3, 1, 1))
    want = glu64(gate, up, kind)
    h = glu(gate, up, kind, impl=impl)
    assert h.dtype == dtype
    # Far left act(gate) is gate times a tiny σ whose exponent carries the rounding: relative to gate·up, not to itself.
    assert close(h, want, 3, size=gate * up)

    leaves = (gate.double().requires_grad_(), up.double().requires_grad_())
    dgate, dup = torch.autograd.grad(glu64(*leaves, kind), leaves, dh.double())
    for recompute_h in (False, True):
        (g, g_buffer), (u, u_buffer), (d, d_buffer) = guarded(gate), guarded(up), guarded(dh)
        glu_backward_(d, g, u, kind, recompute_h=recompute_h, impl=impl)
        assert close(g, dgate, 3, size=dh * up)
        assert close(u, dup, 3, size=dh * gate)
        assert torch.equal(d, h if recompute_h else dh)
        assert untouched(g, g_buffer)
        assert untouched(u, u_buffer)
        assert untouched(d, d_buffer)


@impls
def test_glu_takes_halves_of_one_buffer_and_extreme_gates(impl) -> None:
    both = torch.randn(5, 2 * 40)
    both[:, :4] = torch.tensor([200.0, -200.0, 88.0, -104.0])
    gate, up = both[:, :40], both[:, 40:]
    for kind, act in (("swiglu", torch.nn.functional.silu), ("geglu_tanh", hf_gelu_tanh())):
        h = glu(gate, up, kind, impl=impl)
        assert close(h, act(gate) * up, 4, size=gate * up)
        work = both.clone()
        glu_backward_(torch.ones(5, 40), work[:, :40], work[:, 40:], kind, impl=impl)
        assert work.isfinite().all()
        assert close(work[:, 40:], act(gate), 4, size=gate)
    out = glu(gate, up, "swiglu", out=gate, impl=impl)
    assert out is gate


def hf_gelu_tanh():
    from transformers.activations import ACT2FN

    return ACT2FN["gelu_pytorch_tanh"]


# ---- NF4


def stored(exact: torch.Tensor, dtype: torch.dtype, impl: str) -> torch.Tensor:
    """float32 values in `dtype`; Triton's interpreter may cut bfloat16 off where a device rounds to nearest."""
    if dtype == torch.bfloat16 and impl == "triton" and interpreter_cuts_off():
        return (exact.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return exact.to(dtype)


def interpreter_cuts_off() -> bool:
    """Read off a sum that is right in the middle of the last place: 1 + 1.5·2⁻⁷ lies between 1 + 2⁻⁷ and 1 + 2·2⁻⁷."""
    x, residual = torch.ones(1, 2, dtype=torch.bfloat16), torch.full((1, 2), 1.5 * 2**-7, dtype=torch.bfloat16)
    _, h = rms_norm(x, torch.ones(2, dtype=torch.bfloat16), EPS, residual=residual, impl="triton")
    assert h[0, 0].item() in (1 + 2**-7, 1 + 2 * 2**-7)
    return h[0, 0].item() == 1 + 2**-7


@impls
@dtypes
@pytest.mark.parametrize("nested", [False, True], ids=["scales", "nested"])
@pytest.mark.parametrize(("shape", "blocksize"), [((96, 576), 64), ((33, 10), 64), ((2, 4096), 4096), ((3, 2), 128)])
def test_nf4_bit_for_bit_as_bitsandbytes(impl, dtype, nested, shape, blocksize) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
    # For the sizes that its C++ code does not do, bitsandbytes has PyTorch compile others: 13 s for the same values.
    with nullcontext() if INTERPRETED else torch.compiler.set_stance("force_eager"):
        packed, state = functional.quantize_4bit(
            weight, blocksize=blocksize, quant_type="nf4", compress_statistics=nested
        )
        want = functional.dequantize_4bit(packed, state)
        if dtype == torch.bfloat16:
            state.dtype = torch.float32
            exact = functional.dequantize_4bit(packed, state)
            assert torch.equal(exact.to(dtype), want)
            state.dtype = dtype
            want = stored(exact, dtype, impl)
    ours = from_quant_state(state)
    assert isinstance(ours.absmax, NestedAbsmax) == nested
    got = ours.dequantize(packed, impl=impl)
    assert got.dtype == dtype
    assert torch.equal(got, want)

    count = weight.numel()
    buffer = torch.full((count + 9,), torch.nan, dtype=dtype)
    view = ours.dequantize(packed, buffer, impl=impl)
    assert view.data_ptr() == buffer.data_ptr()
    assert torch.equal(view, want)
    assert buffer[count:].isnan().all()

    wide = torch.full((shape[0] + 2, shape[1] + 3), torch.nan, dtype=dtype)
    view = ours.dequantize(packed, wide[: shape[0], : shape[1]], impl=impl)
    assert torch.equal(view, want)
    assert torch.equal(wide[: shape[0], : shape[1]], want)
    assert wide[shape[0] :].isnan().all()
    assert wide[:, shape[1] :].isnan().all()


@impls
@pytest.mark.parametrize("count", [1, 63, 65, 4097])
def test_nf4_by_hand(impl, count) -> None:
    """An odd number of weights, every level, many outer blocks: element by element from the definition."""
    nibbles = torch.randint(0, 16, (count + count % 2,))
    packed = (nibbles[::2] * 16 + nibbles[1::2]).to(torch.uint8)
    blocks = math.ceil(count / 32)
    nested = NestedAbsmax(
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        torch.rand(math.ceil(blocks / 16)),
        torch.randn(256),
        torch.tensor(0.37),
        blocksize2=16,
    )
    got = dequantize_nf4(packed, nested, (count,), 32, dtype=torch.float32, impl=impl)
    levels = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803]
    levels += [0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    for i in range(count):
        scale = nested.code2[int(nested.absmax[i // 32])].item() * nested.absmax2[i // 32 // 16].item() + 0.37
        assert got[i].item() == pytest.approx(levels[nibbles[i]] * scale, rel=1e-5, abs=1e-6)


def test_nf4_refuses_what_does_not_fit() -> None:
    packed, absmax = torch.zeros(32, dtype=torch.uint8), torch.ones(1)
    for arguments, word in (
        ((packed, absmax, (65,)), "bytes"),
        ((packed, absmax.double(), (64,)), "absmax"),
        ((packed, absmax, (64,), 48), "blocksize"),
        ((packed, absmax, (64,), 32), "absmax"),
        ((packed, absmax, (64,), 64, torch.empty(63)), "out"),
        ((packed, absmax, (8, 8), 64, torch.empty(8, 9)[:, 1:].t()), "out"),
        ((packed, absmax, (8, 8), 64, torch.empty(9, 9)[:, 1:]), "out"),
        ((packed, absmax, (64,), 64, None, torch.float64), "dtype"),
    ):
        with pytest.raises(ValueError, match=word):
            dequantize_nf4(*arguments)
    with pytest.raises(ValueError, match="fp4"):
        from_quant_state(SimpleNamespace(quant_type="fp4"))


# ---- Copies of rows that lie apart


@impls
@dtypes
@pytest.mark.parametrize(("rows_", "width"), [(7, 96), (1, 1), (3, 2049), (5, 4100), (0, 8)])
def test_copy_rows(impl, dtype, rows_, width) -> None:
    x = torch.randn(rows_, width + 3).to(dtype)[:, 1 : width + 1]
    buffer = torch.full((rows_ + 1, width + 5), torch.nan, dtype=dtype)
    view = buffer[:rows_, 2 : width + 2]
    assert copy_rows(view, x, impl=impl) is view
    assert torch.equal(view, x)
    assert buffer[rows_:].isnan().all()
    assert buffer[:, :2].isnan().all()
    assert buffer[:, width + 2 :].isnan().all()


def test_copy_rows_refuses_what_does_not_fit() -> None:
    x = torch.zeros(4, 6)
    for out, word in ((torch.zeros(4, 5), "not alike"), (x.double(), "not alike"), (torch.zeros(6, 4).t(), "rows")):
        with pytest.raises(ValueError, match=word):
            copy_rows(out, x)


# ---- Rows, dispatch, and the other process


@impls
def test_rows_beyond_two_to_the_31(impl) -> None:
    """The third row starts 2³¹ elements behind the first; the address space is reserved, but hardly any is touched."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs memory that is reserved without being backed")
    # Python names the flag from 3.12 on.
    lazily = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    stride, width = 2**30, 64
    size = 2 * (2 * stride + width)
    memory = mmap.mmap(-1, size, flags=lazily)
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided((3, width), (stride, 1))
    near, up, weight = torch.randn(3, width).half(), torch.randn(3, width).half(), torch.randn(width).half()

    far.copy_(near)
    assert torch.equal(rms_norm(far, weight, EPS, impl=impl)[0], rms_norm(near, weight, EPS, impl=impl)[0])
    grads = [rms_norm_backward(up, near, weight, EPS, into=x, impl=impl) for x in (near.clone(), far)]
    assert torch.equal(*grads)

    far.copy_(near)
    gates, ups = (near.clone(), far), (up.clone(), up.clone())
    for g, u in zip(gates, ups, strict=True):
        glu_backward_(torch.ones_like(up), g, u, "swiglu", impl=impl)
    assert torch.equal(*gates)
    assert torch.equal(*ups)

    far.copy_(near)
    _, cos, sin = tables(3, 32)
    heads = [rope_(x.unflatten(1, (2, 32)), cos, sin, impl=impl) for x in (near.clone(), far)]
    assert torch.equal(*heads)
    results = [qk_norm_rope(x, weight[:32], EPS, cos, sin, impl=impl) for x in heads]
    assert torch.equal(*results)


@impls
def test_nothing_to_do(impl) -> None:
    x, cos = torch.empty(0, 8), torch.empty(0, 2)
    assert rms_norm(x, torch.ones(8), EPS, residual=x, impl=impl)[0].shape == (0, 8)
    assert rms_norm_backward(x, x, torch.ones(8), EPS, impl=impl).shape == (0, 8)
    assert glu(x, x, "swiglu", impl=impl).shape == (0, 8)
    glu_backward_(x, x, x, "swiglu", impl=impl)
    assert rope_(x.view(0, 2, 4), cos, cos, impl=impl).shape == (0, 2, 4)
    packed = torch.empty(0, dtype=torch.uint8)
    assert dequantize_nf4(packed, torch.empty(0), (0, 8), impl=impl).shape == (0, 8)


def test_arguments_that_do_not_fit() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    cos = torch.randn(2, 4)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, weight[:4], EPS)
    with pytest.raises(ValueError, match="residual"):
        rms_norm(x, weight, EPS, residual=x[:1])
    with pytest.raises(ValueError, match="kind"):
        glu(x, x, "relu")
    with pytest.raises(ValueError, match="unlike gate"):
        glu(x, x.half(), "swiglu")
    with pytest.raises(ValueError, match="rotary dimension 16"):
        rope_(x, torch.randn(2, 8), torch.randn(2, 8), rotary_dim=16)
    with pytest.raises(ValueError, match="T = 2"):
        rope_(x, cos[:1], cos[:1])
    with pytest.raises(ValueError, match="float64"):
        picks_triton(x.double(), "triton")
    with pytest.raises(ValueError, match="'cuda'"):
        picks_triton(x, "cuda")
    assert not picks_triton(x)


def test_rows_is_a_view_or_says_that_it_cannot_be() -> None:
    x = torch.randn(4, 6, 10)
    assert rows(x[:, :, 2:7]).data_ptr() == x[:, :, 2:].data_ptr()
    crossed = x.transpose(0, 1)
    assert torch.equal(rows(crossed), crossed.reshape(24, 10))
    with pytest.raises(ValueError, match="no row view"):
        rows(crossed, written=True)


def test_no_triton_is_needed_without_a_device() -> None:
    """Where Triton cannot be imported, the modules load and the twins answer."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from tandem.kernels import glu, nf4, rms_norm, rope\n"
        "print(rms_norm.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0)[0].sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "4.0", done.stderr


@pytest.mark.skipif(INTERPRETED, reason="this is the other process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_triton_code_in_a_fresh_process() -> None:
    outcomes = outcomes_interpreted(__file__)
    assert outcomes["passed"] > 80
    assert "skipped" not in outcomes or importlib.util.find_spec("bitsandbytes") is None
