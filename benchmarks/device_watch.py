"""A process beside a measured one: it holds back a part of the device's memory, and sees the peak of what is used.

Memory that another process holds is out of reach for all that a system allocates with (PyTorch, vLLM's own pools, the
driver), as it would be on a smaller card, and all of them see how much is free. A limit on PyTorch's allocator alone
says nothing to the others.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time

GIB = 1 << 30
_PERIOD = 0.02


class DeviceWatch:
    """Leaves `cap_gib` of the device free and watches it; the process ends with the `with` block.

    Args:
        cap_gib: what the measured process may use, its context included; 0: all that is free.

    Raises:
        RuntimeError: no device, or less free on it than the cap.
    """

    def __init__(self, cap_gib: float = 0.0) -> None:
        command = [sys.executable, __file__, str(cap_gib)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "READY":
            _, said = self._process.communicate()
            raise RuntimeError(f"device memory cannot be held back: {said.strip()[-1000:]}")

    def peak_gib(self) -> float:
        """The most that others have used at a time since the last call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def __enter__(self) -> DeviceWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)


class OwnMemory:
    """The peak of what this process alone uses of the device, context and vLLM's pools included, as the driver says.

    Raises:
        RuntimeError: the driver does not know this process, as in some containers.
    """

    def __init__(self) -> None:
        import pynvml
        import torch

        torch.zeros(1, device="cuda")
        pynvml.nvmlInit()
        # By its name: the driver numbers all devices, PyTorch those that this process may see.
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        self._nvml, self._device = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
        if self._now() is None:
            raise RuntimeError(f"the driver tells no memory of process {os.getpid()}")
        self._peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _now(self) -> int | None:
        known = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._device)
        return next((one.usedGpuMemory for one in known if one.pid == os.getpid()), None)

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self._now() or 0)
            time.sleep(_PERIOD)

    def peak_gib(self) -> float:
        """Since the last call."""
        found, self._peak = max(self._peak, self._now() or 0), 0
        return round(found / GIB, 3)


def main() -> None:
    import torch

    torch.cuda.init()
    torch.zeros(1, device="cuda")  # the context is made by now, and in what is held back
    free = torch.cuda.mem_get_info()[0]
    cap = float(sys.argv[1]) * GIB
    held = None
    if cap:
        if free < cap:
            raise SystemExit(f"{free / GIB:.2f} GiB are free, fewer than the cap of {cap / GIB:.2f}")
        held = torch.empty(int(free - cap), dtype=torch.uint8, device="cuda")
    start = torch.cuda.mem_get_info()[0]
    print("READY", flush=True)
    least = start
    asked = select.poll()
    asked.register(sys.stdin, select.POLLIN | select.POLLHUP)
    while True:
        least = min(least, torch.cuda.mem_get_info()[0])
        if not asked.poll(0):
            time.sleep(_PERIOD)
            continue
        if not sys.stdin.readline():
            break
        print(round((start - least) / GIB, 3), flush=True)
        least = torch.cuda.mem_get_info()[0]
    del held


if __name__ == "__main__":
    main()
