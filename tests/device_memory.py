"""Device memory of one process, whatever others do on the device."""

from __future__ import annotations

import shutil
import subprocess


def by_process() -> dict[int, int]:
    """MiB by process, as the driver knows them; those whose memory it does not tell are left out.

    In a container the driver may know processes by other numbers than they have there.
    """
    if not shutil.which("nvidia-smi"):
        return {}
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    pairs = (line.split(",") for line in said.splitlines() if line.count(",") == 1)
    return {int(pid): int(mib) for pid, mib in pairs if pid.strip().isdigit() and mib.strip().isdigit()}


def used_mib(pid: int) -> float:
    """MiB of a process, or of all of the device where the driver does not tell them apart."""
    import torch

    own = by_process().get(pid)
    if own is not None:
        return own
    free, total = torch.cuda.mem_get_info()
    return (total - free) / (1 << 20)
