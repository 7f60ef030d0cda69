"""Triton's kernels compiled by their own launch code for a card that is not there, and launched nowhere.

Triton asks its active driver which card to compile for and how to launch; the stand-in here names any card and launches
nothing. So the settings that are compiled are those that the launch code chooses, and what they need can be compared
with what the card has.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.errors import OutOfResources
except ImportError:
    triton = None
    OutOfResources = RuntimeError

# Bytes of shared memory that a block may have, by compute capability (CUDA C Programming Guide, technical
# specifications): A100; RTX 3090; RTX 4090 and L4; H100 and H200; B200; RTX 5090.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# Triton keeps what it has compiled by the number of the device; one that no real device has is never asked for again.
_DEVICES = itertools.count(1_000)


class Compiled(NamedTuple):
    """What Triton says of a kernel: module and name, capability, bytes of shared memory, warps and stages."""

    kernel: str
    capability: int
    shared: int
    num_warps: int
    num_stages: int

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_MEMORY[self.capability]

    def __str__(self) -> str:
        return (
            f"{self.kernel} for sm_{self.capability}: {self.shared:,} of {SHARED_MEMORY[self.capability]:,} bytes of "
            f"shared memory with {self.num_warps} warps and {self.num_stages} stages"
        )


class OnCuda(torch.Tensor):
    """A CPU tensor that says that it is on a GPU, where launch code takes other settings for the interpreter."""

    is_cuda = True


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Memory that nobody has touched takes no room, so it may be as wide as a model's."""
    return torch.empty(*shape, dtype=dtype).as_subclass(OnCuda)


class _Driver:
    """Answers what `triton.runtime.jit` and `triton.compiler` ask of a driver before and at a launch."""

    def __init__(self, capability: int, found: list[Compiled]) -> None:
        self._device, self._target = next(_DEVICES), GPUTarget("cuda", capability, 32)
        self._found, self.utils = found, self

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self._target.arch]}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        """Module, function, registers, spills, threads. Of a module that is None, nothing has to be unloaded."""
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Made before Triton looks at what the kernel needs, so those that it refuses are recorded too."""
        kernel = f"{source.fn.fn.__module__}.{source.fn.fn.__name__}"
        settings = metadata.shared, metadata.num_warps, metadata.num_stages
        self._found.append(Compiled(kernel, self._target.arch, *settings))
        return lambda *launch: None


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Compiled]]:
    """Inside, every new launch of a kernel compiles it for such a card and adds it to the list."""
    found: list[Compiled] = []
    config = triton.runtime.driver
    before = config._active
    with tempfile.TemporaryDirectory() as cache:
        environment = mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache)
        # PyTorch for CPUs has no CUDA version, by which launch code knows NVIDIA's devices.
        version = mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0")
        config.set_active(_Driver(capability, found))
        try:
            with environment, version:
                yield found
        finally:
            config._active = before


def why_not() -> str | None:
    """The reason why nothing can be compiled here, if there is one."""
    if triton is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter compiles nothing"
    if "nvidia" not in triton.backends.backends:
        return "this Triton has no compiler for NVIDIA's cards"
    if not hasattr(triton.runtime.driver, "_active"):
        return f"Triton {triton.__version__} keeps its active driver elsewhere"
    return None
