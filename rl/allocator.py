"""How PyTorch takes a GPU's memory, where the user has not said it."""

from __future__ import annotations

import os

GROWING = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def use_growing_segments() -> None:
    """Let segments grow, so that hardly anything is lost between tensors: with PyTorch's default up to a third of what
    tensors take was reserved beside it on an H200 (benchmarks/plan_peaks.py), which no plan can foresee.

    PyTorch reads the variable before it first takes memory. vLLM knows it by this name and switches growing off for the
    pool of its sleep mode.
    """
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ.update(GROWING)
