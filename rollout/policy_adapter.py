"""The adapter on its way to an engine: what it consists of, and copies into the engine's own buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tandem.rl.errors import UserError

# vLLM's number for the one adapter that it serves.
POLICY_ID = 1
# Adapters that are scaled at a time: their product exists in float32 beside them.
_CHUNK = 32


class LoraPart(NamedTuple):
    """One adapted linear layer: `a [r, in]`, `b [out, r]`, and the factor of their product."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class Stacks(NamedTuple):
    """An engine's buffers of one stacked layer, by part: a `[slots, 1, R, in]`, b `[slots, 1, out, R]`, R ≥ r."""

    a: Sequence[torch.Tensor]
    b: Sequence[torch.Tensor]


def policy_parts(causal_lm: Any) -> dict[str, LoraPart]:
    """The active adapter of a peft-wrapped model by Hugging Face module name; empty where there is none.

    Raises:
        UserError: something that an engine with plain LoRA on linear layers does not compute.
    """
    found = {}
    head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    for name, module in causal_lm.named_modules():
        if type(module).__name__ == "ModulesToSaveWrapper":
            raise _not_served(name, "is trained as a whole (modules_to_save)")
        if not hasattr(module, "lora_A"):
            continue
        active = [key for key in module.active_adapters if key in module.lora_A]
        if module.merged or len(active) > 1:
            raise _not_served(name, "has merged or several active adapters")
        if module is head or module is embedding or getattr(module, "lora_embedding_A", None):
            raise _not_served(name, "adapts the head or the embedding")
        if not active or module.disable_adapters:
            continue
        key = active[0]
        if key in getattr(module, "lora_variant", {}) or module.lora_B[key].bias is not None:
            raise _not_served(name, "has a variant of LoRA or a bias in its adapter")
        found[name] = LoraPart(module.lora_A[key].weight, module.lora_B[key].weight, float(module.scaling[key]))
    return found


def _not_served(name: str, what: str) -> UserError:
    return UserError(
        f"{name} {what}",
        reason="the vLLM engine computes plain LoRA on the decoder's linear layers",
        fix="leave it out of lora.target_modules, or set rollout.engine=transformers",
    )


def buffer_rank(rank: int, allowed: Iterable[int]) -> int:
    """The smallest rank that an engine has buffers of and that holds `rank`.

    Raises:
        UserError: none does.
    """
    fitting = [one for one in allowed if one >= rank]
    if not fitting:
        raise UserError(
            f"lora.r={rank} is more than vLLM serves ({max(allowed)})",
            fix="use a smaller rank, or set rollout.engine=transformers",
        )
    return min(fitting)


@dataclass(frozen=True)
class _Copy:
    source: torch.Tensor
    target: torch.Tensor
    scale: float


class InPlacePush:
    """Copies the trainer's adapter into an engine's buffers, whose addresses captured graphs hold.

    Everything outside the adapter is zero: parts without one, and the rows beyond its rank.

    Args:
        parts: the adapter by Hugging Face module name.
        layers: stacked layers by the engine's name: the Hugging Face names of their parts, in order.
        stacks: the engine's buffers by the same name.

    Raises:
        RuntimeError: the buffers have no place for a part, or another shape.
    """

    def __init__(
        self,
        parts: Mapping[str, LoraPart],
        layers: Mapping[str, Sequence[str]],
        stacks: Mapping[str, Stacks],
    ) -> None:
        self._copies: list[_Copy] = []
        homeless = set(parts)
        for layer, names in layers.items():
            present = [name for name in names if name in parts]
            if not present and layer not in stacks:
                continue
            stack = stacks.get(layer)
            if stack is None or not len(stack.a) == len(stack.b) == len(names):
                have = "no buffers" if stack is None else f"buffers for {len(stack.a)} parts"
                raise RuntimeError(f"the engine has {have} for {layer}, which consists of {', '.join(names)}")
            homeless -= set(names)
            for name, a, b in zip(names, stack.a, stack.b, strict=True):
                if name in parts:
                    self._copies += _copies(name, parts[name], a, b)
        if homeless:
            raise RuntimeError(f"the engine has no place for the adapters of {', '.join(sorted(homeless))}")
        with torch.inference_mode():
            for stack in stacks.values():
                for buffer in (*stack.a, *stack.b):
                    buffer.zero_()

    @torch.inference_mode()
    def __call__(self) -> None:
        """Copy the adapter as it is now. Returns when the device has been told, not when it is done."""
        plain = [c for c in self._copies if c.scale == 1.0]
        scaled = [c for c in self._copies if c.scale != 1.0]
        if plain:
            torch._foreach_copy_([c.target for c in plain], [c.source.detach() for c in plain])
        for start in range(0, len(scaled), _CHUNK):
            chunk = scaled[start : start + _CHUNK]
            # In the master's type, so that it is rounded once.
            products = torch._foreach_mul([c.source.detach() for c in chunk], [c.scale for c in chunk])
            torch._foreach_copy_([c.target for c in chunk], products)


def _copies(name: str, part: LoraPart, a: torch.Tensor, b: torch.Tensor) -> list[_Copy]:
    rank, width = part.a.shape
    height = part.b.shape[0]
    if a.shape[-1] != width or b.shape[-2] != height or a.shape[-2] < rank or b.shape[-1] < rank:
        raise RuntimeError(
            f"the adapter of {name} is a [{rank}, {width}], b [{height}, {rank}]; "
            f"the engine's buffers are a {tuple(a.shape)}, b {tuple(b.shape)}"
        )
    return [_Copy(part.a, a[0, 0, :rank], 1.0), _Copy(part.b, b[0, 0, :, :rank], part.scale)]


class PolicyNames:
    """A name for every state of the policy, never used twice: prefix caches know an adapter by its name."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def new(self, version: int) -> str:
        """`policy@{version}`; when that has been given out for other weights, with a number behind it."""
        name, number = f"policy@{version}", 1
        while name in self._used:
            number += 1
            name = f"policy@{version}#{number}"
        self._used.add(name)
        return name
