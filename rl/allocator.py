"""How PyTorch takes a GPU's memory, where the user has not said it."""

from __future__ import annotations

import os
import platform


def growing_segments(kernel: str | None = None) -> dict[str, str]:
    """The environment variable that lets segments grow, so that hardly anything is lost between tensors: with PyTorch's
    default up to a third of what tensors take was reserved beside it on an H200 (benchmarks/plan_peaks.py), which no
    plan can foresee.

    PyTorch reads the variable before it first takes memory. vLLM knows it by this name and switches growing off for the
    pool of its sleep mode. Under WSL 2 the driver refuses such segments on many cards (pytorch/pytorch#192330): there
    PyTorch's default stays, as it does where the user has set it.

    Args:
        kernel: the operating system's release; None: the one that runs.
    """
    said = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys()
    if said or "microsoft" in (platform.release() if kernel is None else kernel).lower():
        return {}
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
