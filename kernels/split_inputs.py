"""How many programs share the inputs of a tile, where a product has too few tiles to fill the device."""

from __future__ import annotations

import functools
import math

import torch

# Programs that a launch should have, per multiprocessor, before the inputs are no longer split among several.
_PROGRAMS = 2


def turns_per_program(
    turns: int, tiles: int, *, row_bytes: int, count: int, wanted: int | None, device: torch.device
) -> int:
    """Turns of a tile's inputs that one program takes.

    Args:
        turns: of a whole tile. tiles: of the product. row_bytes: of one row of the weight; count: rows of the input.
        wanted: programs per tile; None: as many as fill the device.
    """
    if wanted is None:
        # Partial sums are written and read, 8 bytes each: no more of them than bytes of weights.
        affordable = row_bytes // (8 * count)
        wanted = min(math.ceil(_PROGRAMS * _multiprocessors(device) / tiles), affordable)
    return math.ceil(turns / min(max(wanted, 1), turns))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
