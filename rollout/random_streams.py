"""A random stream per completion, so that what a prompt draws does not depend on its neighbours."""

from __future__ import annotations

import hashlib

import torch


def mixed(*numbers: int) -> int:
    """64 bits that depend on all of the integers."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def uniform_stream(seed: int, prompt_index: int, sample: int, length: int) -> torch.Tensor:
    """`[length]` float64 numbers in [0, 1) that depend on the three integers alone."""
    generator = torch.Generator().manual_seed(mixed(seed, prompt_index, sample) >> 1)
    return torch.rand(length, generator=generator, dtype=torch.float64)
