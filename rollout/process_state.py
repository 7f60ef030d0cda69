"""What an inference engine changes in the process around it, put back.

vLLM reseeds every random generator, sets the precision of float32 products, moves to a CUDA stream of its own, writes
environment variables and switches cuDNN's attention off at import, and talks a lot. It also freezes the garbage
collector's heap, until it is shut down. That is left as it is: collections need not look through what lives as long as
the run, and asking whether a heap is frozen walks through every object of it (70 ms for half a million).
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

try:
    from triton import knobs
except ImportError:  # no Triton here, or one from before 3.4
    knobs = None


@contextmanager
def preserved(environment: Mapping[str, str] | None = None, *, quiet: Sequence[str] = ()) -> Iterator[None]:
    """Leave the process as it was found: random states, float32 precision, default type and device, the current
    CUDA stream, environment variables, which attention PyTorch may take, and what Triton does when it compiles.

    Args:
        environment: variables set while this is open, where the user has not set them.
        quiet: loggers that say errors only while this is open.
    """
    before = _snapshot()
    loggers = [logging.getLogger(name) for name in quiet]
    levels = [logger.level for logger in loggers]
    os.environ.update({k: v for k, v in (environment or {}).items() if k not in os.environ})
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        _restore(before)


@contextmanager
def attention_preserved() -> Iterator[None]:
    """Leave it as it was which attention PyTorch may take. With vLLM's import cuDNN's is switched off, which is
    the fastest for long sequences (docs/kernels.md)."""
    before = _attention()
    try:
        yield
    finally:
        _set_attention(before)


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Run on another CUDA stream; everything before is finished when it starts, and it is when this closes.

    Args:
        stream: None (a CPU): nothing happens.
    """
    if stream is None:
        yield
        return
    torch.cuda.synchronize(stream.device)
    before = torch.cuda.current_stream(stream.device)
    # Not `torch.cuda.stream(…)`: vLLM follows `set_stream` to know where it is.
    torch.cuda.set_stream(stream)
    try:
        yield
    finally:
        torch.cuda.synchronize(stream.device)
        torch.cuda.set_stream(before)


def _snapshot() -> dict[str, Any]:
    # `is_available` and `device_count` may ask the driver anew, which can take longer than waking the engine.
    cuda = torch.cuda.is_initialized()
    return {
        "environment": dict(os.environ),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda else None,
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "stream": torch.cuda.current_stream() if cuda else None,
        "attention": _attention(),
        "compiling": _compiling(),
    }


def _compiling() -> tuple[Any, bool] | None:
    return None if knobs is None else (knobs.runtime.jit_post_compile_hook, knobs.autotuning.print)


def _attention() -> dict[str, bool]:
    cuda = torch.backends.cuda
    return {
        "cudnn": cuda.cudnn_sdp_enabled(),
        "flash": cuda.flash_sdp_enabled(),
        "mem_efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }


def _set_attention(enabled: dict[str, bool]) -> None:
    for name, value in enabled.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(value)


def _restore(state: dict[str, Any]) -> None:
    if knobs is not None and _compiling() != state["compiling"]:
        # vLLM warns of every kernel that is compiled once it is up, and takes the trainer's for its own. Triton writes
        # its knobs to the environment, which is therefore put back behind them.
        knobs.runtime.jit_post_compile_hook, knobs.autotuning.print = state["compiling"]
    for name in os.environ.keys() - state["environment"].keys():
        del os.environ[name]
    os.environ.update(state["environment"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    torch.set_float32_matmul_precision(state["precision"])
    torch.set_default_dtype(state["dtype"])
    if torch.get_default_device() != state["device"]:
        torch.set_default_device(state["device"])
    if state["stream"] is not None and torch.cuda.current_stream() != state["stream"]:
        torch.cuda.synchronize()
        torch.cuda.set_stream(state["stream"])
    _set_attention(state["attention"])
