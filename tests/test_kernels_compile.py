"""Every Triton kernel compiled, with the settings that its launch code takes, for cards on which no test has run it.

A kernel that needs more shared memory than a block of the card has fails at its first launch; an RTX 3090, 4090 or 5090
has less than half of an H100's. Compiling needs no GPU. Nothing is launched, so results are not looked at.
"""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from compile_only import Compiled, OutOfResources, compiling_for, empty, why_not

import tandem.kernels
from tandem.kernels.adapter_copy import AdapterCopies, Part
from tandem.kernels.attention_plan import merge
from tandem.kernels.fp8 import dequantize_fp8
from tandem.kernels.fp8_gemm import fp8_linear
from tandem.kernels.glu import glu, glu_backward_
from tandem.kernels.int4_marlin import GROUP, TILE_K, dequantize_int4
from tandem.kernels.linear_logprob import HeadOptions, linear_logprob
from tandem.kernels.nf4 import NestedAbsmax, dequantize_nf4
from tandem.kernels.nf4_gemm import Config, _config_for, default_config, nf4_linear
from tandem.kernels.rms_norm import rms_norm, rms_norm_backward
from tandem.kernels.rope import qk_norm_rope, qk_norm_rope_backward, rope_
from tandem.kernels.row_copy import copy_rows

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

BYTE, FLOAT, BRAIN, HALF = torch.uint8, torch.float32, torch.bfloat16, torch.float16
# Everything is compiled for one of the small cards; for the others every kernel, with what takes most shared memory.
ALL_OF = 89
Case = Callable[[], object]


def launches() -> list[tuple[str, Case, bool]]:
    """Name and call of every launch, and whether it is one of those that all cards get."""
    cases: list[tuple[str, Case, bool]] = []

    def add(name: str, call: Callable[..., object], *values: object, often: bool = True, **named: object) -> None:
        spelt = ", ".join([*map(str, values), *(f"{key}={value}" for key, value in named.items())])
        cases.append((f"{name}({spelt})", partial(call, *values, **named), often))

    for width in (576, 4096):
        add("norm", norm, width, BRAIN, 0.0, often=width == 4096)
        add("copies", copies, width, often=width == 4096)
    add("norm", norm, 5120, FLOAT, 1.0, often=False)
    for heads, dim, rotary in ((9, 64, 64), (32, 128, 128), (8, 128, 64), (8, 256, 256)):
        add("rope", rope, heads, dim, rotary, often=dim == 256)
    for kind, width in itertools.product(("swiglu", "geglu_tanh"), (1536, 12288)):
        add("gated", gated, kind, width, often=width == 12288 and kind == "swiglu")
    for dim, indexed in ((64, False), (128, True), (256, False), (256, True)):
        add("merged", merged, dim, indexed, often=dim == 256 and indexed)
    for nested, dtype, apart in itertools.product((True, False), (BRAIN, FLOAT), (False, True)):
        add("nf4", nf4, nested, dtype, apart, often=nested and dtype == BRAIN and apart)
    add("nf4", nf4, True, BRAIN, False, blocksize=4096, often=False)
    for dtype in (BRAIN, FLOAT):
        add("int4", int4, dtype, often=dtype == BRAIN)
        add("fp8", fp8, dtype, often=dtype == BRAIN)
    for rows in (1, 16, 32, 64, 65, 256):  # each takes other settings, or another type of its sums
        add("nf4_product", nf4_product, rows, 4096, often=rows in (1, 64, 65))
        add("nf4_product", nf4_product, rows, 576, parts=3, bias=True, often=False)
        add("nf4_product", nf4_product, rows, 4096, dtype=HALF, often=rows in (1, 64))
    for rows in (1, 64, 256):
        add("nf4_product", nf4_product, rows, 5120, nested=False, often=False)
    for rows, stages in ((1, 1), (16, 3), (64, 1)):  # as on other makers' cards
        add("nf4_product", nf4_product, rows, 4096, often=False, config=table(rows, stages))
    for rows in (1, 32, 64, 256):
        add("fp8_product", fp8_product, rows, 4096, often=rows == 64)
    add("fp8_product", fp8_product, 64, 576, bias=True, often=False)
    add("fp8_product", fp8_product, 32, 4096, dtype=HALF, often=False)
    add("norm", norm, 4096, HALF, 0.0, often=False)
    add("nf4", nf4, True, HALF, False, often=False)
    add("scores", scores, 151_936, None, HALF, often=False)
    add("scores", scores, 49_152, None, FLOAT, often=False)
    add("scores", scores, 151_936, None, BRAIN, often=False)
    add("scores", scores, 151_936, 30.0, BRAIN)
    return cases


def table(rows: int, stages: int) -> Config:
    block_n, block_m = (16, 1) if rows == 1 else (128, rows)
    return Config(block_n=block_n, block_m=block_m, stages=stages, lookup="load")


# ---- One call of launch code each


def norm(width: int, dtype: torch.dtype, offset: float) -> None:
    x, weight = empty(4, width, dtype=dtype), empty(width, dtype=dtype)
    rms_norm(x, weight, 1e-6, offset=offset, impl="triton")
    rms_norm(x, weight, 1e-6, offset=offset, residual=x, impl="triton")
    rms_norm_backward(x, x, weight, 1e-6, offset=offset, impl="triton")
    rms_norm_backward(x, x, weight, 1e-6, offset=offset, into=x, impl="triton")


def copies(width: int) -> None:
    copy_rows(empty(4, width + 16)[:, :width], empty(4, width), impl="triton")
    for dtype in (FLOAT, BRAIN):
        part = Part(empty(16, width, dtype=dtype), empty(16, width), 2.0)
        AdapterCopies([part] * 2, impl="triton").run()


def rope(heads: int, dim: int, rotary: int) -> None:
    x, cos, weight = empty(4, 2 * heads, dim)[:, heads:], empty(4, rotary // 2, dtype=BRAIN), empty(dim)
    for inverse in (False, True):
        rope_(x, cos, cos, inverse=inverse, impl="triton")
    for offset in (0.0, 1.0):
        qk_norm_rope(x, weight, 1e-6, cos, cos, offset=offset, impl="triton")
    qk_norm_rope_backward(x, x, weight, 1e-6, cos, cos, impl="triton")


def gated(kind: str, width: int) -> None:
    both = empty(4, 2 * width)
    gate, up, dh = both[:, :width], both[:, width:], empty(4, width)
    glu(gate, up, kind, impl="triton")
    for recompute_h in (False, True):
        glu_backward_(dh, gate, up, kind, recompute_h=recompute_h, impl="triton")


def merged(dim: int, indexed: bool) -> None:
    out, lse = empty(64, 8, dim), empty(8, 64, dtype=FLOAT)
    rows = torch.arange(32) if indexed else slice(16, 48)
    merge(out, lse, empty(32, 8, dim), empty(8, 32, dtype=FLOAT), rows, impl="triton")


def nf4(nested: bool, dtype: torch.dtype, apart: bool, blocksize: int = 64) -> None:
    shape = (64, 4096)
    blocks = math.prod(shape) // blocksize
    scales = empty(blocks, dtype=FLOAT)
    if nested:
        outer = empty(math.ceil(blocks / 256), dtype=FLOAT)
        scales = NestedAbsmax(empty(blocks, dtype=BYTE), outer, empty(256, dtype=FLOAT), empty(1, dtype=FLOAT))
    out = empty(64, 4096 + 16 * apart, dtype=dtype)[:, :4096]
    dequantize_nf4(empty(math.prod(shape) // 2, dtype=BYTE), scales, shape, blocksize, out, impl="triton")


def nf4_product(
    count: int,
    width: int,
    nested: bool = True,
    parts: int = 1,
    bias: bool = False,
    config: Config | None = None,
    dtype: torch.dtype = BRAIN,
) -> None:
    part_rows = (width,) * parts
    rows, blocks = sum(part_rows), width // 64
    scales = (empty(rows * blocks, dtype=FLOAT), None, None, None)
    if nested:
        outer = empty(parts * math.ceil(width * blocks / 256), dtype=FLOAT)
        inner = empty(rows * blocks, dtype=BYTE)
        scales = (inner, outer, empty(256, dtype=FLOAT), empty(parts, dtype=FLOAT))
    packed = empty(rows * width // 2, dtype=BYTE)
    added = empty(rows, dtype=dtype) if bias else None
    nf4_linear(empty(count, width, dtype=dtype), packed, *scales, part_rows, bias=added, config=config, impl="triton")


def int4(dtype: torch.dtype) -> None:
    packed = empty(4096 // TILE_K, 2 * 512, dtype=torch.int32)
    dequantize_int4(packed, empty(4096 // GROUP, 512), out=empty(512, 4096, dtype=dtype), impl="triton")


def fp8(dtype: torch.dtype) -> None:
    dequantize_fp8(empty(64, 5120, dtype=BYTE), empty(64, dtype=FLOAT), empty(64, 5120, dtype=dtype), impl="triton")


def fp8_product(count: int, width: int, bias: bool = False, dtype: torch.dtype = BRAIN) -> None:
    packed, scales = empty(width, width, dtype=BYTE), empty(width, dtype=FLOAT)
    fp8_linear(empty(count, width, dtype=dtype), packed, scales, empty(width) if bias else None, impl="triton")


def scores(vocabulary: int, softcap: float | None, dtype: torch.dtype) -> None:
    """The head itself is PyTorch's product, so eight hidden states do."""
    hidden, weight = torch.zeros(2, 8, dtype=dtype, requires_grad=True), torch.zeros(vocabulary, 8, dtype=dtype)
    bias = None if softcap is None else torch.zeros(vocabulary, dtype=dtype)
    options = HeadOptions(temperature=0.9, softcap=softcap)
    found = linear_logprob(hidden, weight, torch.zeros(2).long(), bias=bias, options=options, impl="triton")
    found.log_probs.sum().backward(retain_graph=True)
    sum(one.sum() for one in found).backward()


# ---- The tests


def launched() -> set[str]:
    """Module and name of every kernel that launch code starts."""
    modules = [f"{tandem.kernels.__name__}.{one.name}" for one in pkgutil.iter_modules(tandem.kernels.__path__)]
    return {
        f"{module}.{name}"
        for module in modules
        for name, value in vars(importlib.import_module(module)).items()
        if name.endswith("_kernel") and value.__module__ == module
    }


@pytest.mark.parametrize("capability", [80, 86, ALL_OF, 90, 100, 120])
def test_kernels_compile_and_fit(capability: int) -> None:
    faults: list[str] = []
    found: list[Compiled] = []
    with compiling_for(capability) as compiled:
        for name, call, often in launches():
            if not often and capability != ALL_OF:
                continue
            compiled.clear()
            try:
                call()
            except Exception as error:  # noqa: BLE001  # every fault of a card is to be seen at once
                faults.append(f"{name}: {type(error).__name__}: {error}")
            faults += [f"{name}: {one}" for one in compiled if not one.fits]
            found += compiled
    assert not faults, "\n".join(faults)
    assert launched() <= {one.kernel for one in found}


def test_a_kernel_that_does_not_fit_is_seen() -> None:
    with compiling_for(ALL_OF) as compiled, pytest.raises(OutOfResources, match="shared memory"):
        nf4_product(65, 4096, config=default_config(65))
    assert [one.fits for one in compiled] == [False]


@pytest.mark.parametrize("rows", [1, 16, 32, 64, 65, 1000])
def test_what_was_tuned_is_what_an_h100_gets(rows: int) -> None:
    with compiling_for(90):
        assert _config_for(empty(rows, 64)) == default_config(rows)


def test_the_stand_in_leaves_no_trace() -> None:
    driver = importlib.import_module("triton").runtime.driver
    before = driver._active, torch.version.cuda
    with compiling_for(ALL_OF):
        assert driver.active.get_current_target().arch == ALL_OF
    assert (driver._active, torch.version.cuda) == before
