"""Adapters beside their weights in one launch: the bits of a copy one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tandem.kernels.adapter_copy import AdapterCopies, Part


def parts(source: torch.dtype, target: torch.dtype, device: str = "cpu") -> tuple[list[Part], torch.Tensor]:
    """Matrices of several sizes, one of many tiles, side by side and one over the other in a buffer."""
    generator = torch.Generator().manual_seed(0)
    buffer = torch.full((400, 300), -7.0).to(target)
    made, row = [], 0
    for rows, columns, start, scale in ((16, 96, 0, 1.0), (90, 16, 200, 0.7), (3, 5, 8, 2.0), (120, 256, 32, 1 / 3)):
        matrix = torch.randn(rows, columns + 4, generator=generator).to(source)[:, 2 : columns + 2]
        made.append(Part(matrix.to(device), buffer[row : row + rows, start : start + columns], scale))
        row += rows
    moved = buffer.to(device)
    return [Part(s, moved[t.storage_offset() // 300 :, t.storage_offset() % 300 :][: s.shape[0], : s.shape[1]], c)
            for s, t, c in made], moved  # fmt: skip


def check(source: torch.dtype, target: torch.dtype, device: str, impl: str | None) -> None:
    made, buffer = parts(source, target, device)
    expected = buffer.clone()
    for one in made:
        offset = one.target.storage_offset()
        into = expected[offset // 300 :, offset % 300 :][: one.source.shape[0], : one.source.shape[1]]
        into.copy_((one.source.double() * torch.tensor(one.scale, dtype=torch.float32).double()).float())
    copies = AdapterCopies(made, impl=impl)
    assert (copies._table is not None) == (impl == "triton" or device == "cuda")
    copies.run()
    assert torch.equal(buffer, expected)
    for one in made:
        one.source.neg_()
    copies.run()
    held = expected[:229] != -7
    assert torch.equal(buffer[:229][held], -expected[:229][held]), "as they are when it runs"
    assert (buffer[229:] == -7).all()


TYPES = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]


@pytest.mark.parametrize(("source", "target"), TYPES, ids=str)
def test_pytorch_copies(source: torch.dtype, target: torch.dtype) -> None:
    check(source, target, "cpu", None)


def test_the_kernel_in_the_interpreter() -> None:
    # It cuts bfloat16 off, where a device rounds to nearest: here float16 stands for it.
    code = """
import torch, test_adapter_copy as t
for source, target in t.TYPES:
    narrow = [torch.float16 if one == torch.bfloat16 else one for one in (source, target)]
    t.check(*narrow, "cpu", "triton")
print("same")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("source", "target"), TYPES, ids=str)
def test_the_kernel_on_a_gpu(source: torch.dtype, target: torch.dtype) -> None:
    check(source, target, "cuda", None)


def test_what_does_not_fit_is_refused() -> None:
    one = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="is to be copied to"):
        AdapterCopies([Part(one, torch.zeros(4, 3), 1.0)])


def test_matrices_that_lie_the_other_way_are_copied_too() -> None:
    source, target = torch.randn(4, 3).t(), torch.zeros(4, 3).t()
    copies = AdapterCopies([Part(source, target, 2.0), Part(torch.ones(2, 2), torch.zeros(2, 2), 1.0)])
    copies.run()
    assert torch.equal(target, 2 * source)
