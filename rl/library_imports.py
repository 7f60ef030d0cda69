"""Importing large libraries without what costs time on the way and is of no use."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

# PyTorch's own switch: functions that are decorated with `torch.compile` stay plain ones.
_NO_COMPILER = "TORCHDYNAMO_DISABLE"


@contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection while libraries are imported: nearly all that they make is kept, and the collector would
    look through it again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def import_peft() -> ModuleType:
    """peft. To be called once the model is loaded.

    peft imports bitsandbytes wherever that is installed. On import, bitsandbytes hands its fallbacks for devices that
    have no kernels of their own to `torch.compile`, which loads PyTorch's compiler. A run that computes with it on such
    a device has imported it with its model; in all others the fallbacks are never called.
    """
    if "peft" in sys.modules or "bitsandbytes" in sys.modules or _NO_COMPILER in os.environ:
        import peft

        return peft
    os.environ[_NO_COMPILER] = "1"
    try:
        with collector_off():
            import peft
    finally:
        del os.environ[_NO_COMPILER]
    return peft
