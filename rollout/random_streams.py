"""A random stream per completion, so that what a prompt draws does not depend on its neighbours."""

from __future__ import annotations

import hashlib

import torch

from tandem.rl.samples import Prompt


def mixed(*numbers: int) -> int:
    """64 bits that depend on all of the integers."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def stream_of(prompt: Prompt) -> int:
    """The number by which a prompt's streams differ from those of others and of the same row in the same batch."""
    return mixed(prompt.index, prompt.draw) >> 2 if prompt.draw else prompt.index


def uniform_stream(seed: int, stream: int, sample: int, length: int) -> torch.Tensor:
    """`[length]` float64 numbers in [0, 1) that depend on the three integers alone."""
    generator = torch.Generator().manual_seed(mixed(seed, stream, sample) >> 1)
    return torch.rand(length, generator=generator, dtype=torch.float64)
