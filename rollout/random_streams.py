"""A random stream per completion, so that what a prompt draws does not depend on its neighbours."""

from __future__ import annotations

import hashlib

import torch


def uniform_stream(seed: int, prompt_index: int, sample: int, length: int) -> torch.Tensor:
    """`[length]` float64 numbers in [0, 1) that depend on the three integers alone."""
    digest = hashlib.blake2b(f"{seed}/{prompt_index}/{sample}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.rand(length, generator=generator, dtype=torch.float64)
