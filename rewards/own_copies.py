"""Copies of what rewards get, so that a function which changes its arguments changes nothing for anybody else."""

from __future__ import annotations

import copy
import sys
from typing import Any

_IMMUTABLE = frozenset((str, int, float, bool, type(None), bytes, complex))


def own_copy(value: Any) -> Any:
    """A copy down to the last list, dict, set, array and tensor.

    Other objects (images, handles) are shared: copying them would cost more than it protects, and many cannot be.
    """
    kind = type(value)
    if kind is list:
        if _IMMUTABLE.issuperset(map(type, value)):  # long lists of numbers or strings, at C speed
            return value[:]
        return [own_copy(v) for v in value]
    if kind is dict:
        return {k: own_copy(v) for k, v in value.items()}
    if kind is tuple:
        return tuple(own_copy(v) for v in value)
    if isinstance(value, (dict, list)):  # OrderedDict, defaultdict
        return copy.deepcopy(value)
    if isinstance(value, (set, bytearray)):
        return copy.copy(value)
    return _copied_array(value)


def is_changed(value: Any, original: Any) -> bool:
    """Whether a function has changed its copy; only text, numbers and what holds them are looked at."""
    if type(value) is not type(original):
        return True
    if isinstance(value, (list, tuple)):
        if len(value) != len(original):
            return True
        # Items that are the same objects are equal without a look at them, NaN too.
        if _IMMUTABLE.issuperset(map(type, original)):
            return bool(value != original)
        return any(is_changed(a, b) for a, b in zip(value, original, strict=True))
    if isinstance(value, dict):
        return value.keys() != original.keys() or any(is_changed(value[k], v) for k, v in original.items())
    return type(value) in _IMMUTABLE and value is not original and value != original


def _copied_array(value: Any) -> Any:
    """Arrays and tensors copied; neither library is imported for it."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return value.copy()
    if torch is not None and isinstance(value, torch.Tensor):
        return value.clone()
    return value
