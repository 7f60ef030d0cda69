"""Cards that a run can be planned for: memory as a process sees it, and the rates that its time is estimated from."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from tandem.rl.errors import UserError

GIB = 1 << 30
# A bare CUDA context, measured on an H100.
CONTEXT = GIB // 2


@dataclass(frozen=True)
class Device:
    """A card, by its data sheet.

    Attributes:
        memory_gib: what a process sees of it, in GiB.
        tflops: dense bfloat16 with float32 sums, in 10¹² operations per second.
        bandwidth: of its memory, GB/s. pcie: one way, with pinned memory, GB/s.
        host_gib: host memory that offloading may count on, in GiB; None: no limit.
    """

    name: str
    memory_gib: float
    tflops: float
    bandwidth: float
    pcie: float
    host_gib: float | None = None

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.memory_gib * GIB)

    @property
    def host(self) -> int | None:
        """Bytes."""
        return None if self.host_gib is None else int(self.host_gib * GIB)


# Consumer cards halve the rate of products that are summed in float32, which is how models are trained: the halved rate
# stands here. Memory is less than on the box where error correction takes its share.
_TABLE = (
    ("3090", 23.6, 71, 936, 25),
    ("3090-ti", 23.6, 80, 1008, 25),
    ("4070-ti-super", 15.6, 88, 672, 25),
    ("4080", 15.6, 97, 717, 25),
    ("4090", 23.5, 165, 1008, 25),
    ("5070-ti", 15.5, 88, 896, 50),
    ("5080", 15.5, 113, 960, 50),
    ("5090", 31.4, 209, 1792, 50),
    ("a10", 22.1, 125, 600, 25),
    ("a10g", 22.1, 70, 600, 25),
    ("a40", 44.4, 150, 696, 25),
    ("a6000", 47.4, 155, 768, 25),
    ("6000-ada", 47.4, 364, 960, 25),
    ("pro-6000", 94.9, 504, 1792, 50),
    ("l4", 22.0, 121, 300, 25),
    ("l40", 44.4, 181, 864, 25),
    ("l40s", 44.4, 362, 864, 25),
    ("a100", 79.2, 312, 2039, 25),
    ("a100-40", 39.4, 312, 1555, 25),
    ("h100", 79.2, 989, 3350, 50),
    ("h100-pcie", 79.2, 756, 2000, 50),
    ("h200", 139.8, 989, 4800, 50),
    ("b200", 178.4, 2250, 8000, 50),
)
DEVICES = {row[0]: Device(*row) for row in _TABLE}
# What vendors' names have around the part that tells cards apart.
_NOISE = re.compile(r"nvidia|geforce|tesla|quadro|rtx|laptop|gpu|hbm3e?|sxm\d?|generation|blackwell|\d+\s*gb", re.I)


def find_device(name: str, *, host_gib: float | None = None) -> Device:
    """A card by name (`4090`, `RTX 4090`, `NVIDIA A10G`), or by its memory in GiB, with the rates of the card that is
    nearest in memory.

    Raises:
        UserError: no such card.
    """
    key = _key(name)
    if key in DEVICES:
        return replace(DEVICES[key], host_gib=host_gib)
    gib = _number(name)
    if not name.strip() or (gib is not None and not 0 < gib <= 1024):
        raise UserError(
            f"--gpu is {name!r}, which is neither a card nor the memory of one",
            fix=f"use one of {', '.join(DEVICES)}, or give the card's memory in GiB, such as 24",
        )
    if gib is not None:
        like = min(DEVICES.values(), key=lambda one: abs(one.memory_gib - gib))
        return replace(like, name=f"{gib:g} GiB, rates of the {like.name}", memory_gib=gib, host_gib=host_gib)
    # A card's memory is also written behind its name.
    near = difflib.get_close_matches(key, DEVICES, n=4, cutoff=0.4)
    raise UserError(
        f"--gpu {name!r} is no card that is known here",
        reason=f"the nearest names are {', '.join(near)}" if near else "",
        fix=f"use one of {', '.join(DEVICES)}, or give the card's memory in GiB, such as 24",
    )


def local_device(*, index: int = 0, host_gib: float | None = None) -> Device:
    """The card in this machine: its own memory, and the rates of its row in the table or of the nearest in memory.

    Raises:
        UserError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "there is no GPU here to plan for", fix=f"name a card: --gpu {' | '.join(DEVICES)}, or its memory in GiB"
        )
    properties = torch.cuda.get_device_properties(index)
    total = properties.total_memory / GIB
    key = _key(properties.name)
    if key == "a100" and total < 60:
        key = "a100-40"
    row = DEVICES.get(key) or min(DEVICES.values(), key=lambda one: abs(one.memory_gib - total))
    label = properties.name if key in DEVICES else f"{properties.name}, rates of the {row.name}"
    return replace(row, name=label, memory_gib=total, host_gib=host_gib)


def gpu_here() -> Device | None:
    """This process's card with the memory that is free on it, and the host memory that is free for this process; None
    where there is no GPU."""
    import psutil
    import torch

    from tandem.rl import distributed

    if not torch.cuda.is_available():
        return None
    index = distributed.local_rank()
    free, _ = torch.cuda.mem_get_info(index)
    here = local_device(index=index, host_gib=psutil.virtual_memory().available / GIB / distributed.world_size())
    # This process's own context is on the card by now, and in the plan.
    return replace(here, memory_gib=min(here.memory_gib, (free + CONTEXT) / GIB))


def _key(name: str) -> str:
    words = re.split(r"[\s_-]+", _NOISE.sub(" ", name.lower()).strip())
    # The large A100 is the one that bears the name alone.
    joined = "-".join(word for word in words if word)
    if re.fullmatch(r"a100[\s_-]*(sxm4?|pcie)?[\s_-]*40\s*(gb)?", name.lower().strip()):
        return "a100-40"
    return joined.removesuffix("-80") if joined.startswith(("a100", "h100")) else joined


def _number(text: str) -> float | None:
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*(?:gib|gb|g)?", text.strip().lower())
    return float(match[1]) if match else None
