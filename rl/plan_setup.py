"""What of a run decides about its memory, as the plan's modules pass it around."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tandem.rl.fused_layer import LayerPlan
from tandem.rl.plan_shape import AdapterShape, ModelShape

# Bytes by what they are for.
Items = dict[str, int]


@dataclass(frozen=True)
class Setup:
    """What of a config decides about memory, resolved for a GPU.

    Attributes:
        width: bytes of an activation. format: of the linear layers' weights.
        fused: layers with a hand-written backward pass; checkpointed: the model's own, recomputed; neither: kept whole.
        offload, attention, plan: as the config says; None and auto follow from the pack.
        restricted: log-probs of a nucleus, which are sorted.
        vllm: the engine that rollouts go through. graphs: batch sizes that it has CUDA graphs for.
    """

    shape: ModelShape
    adapter: AdapterShape
    width: int
    format: Literal["nf4", "int4", "fp8", "dense"]
    optim: str
    chunk: int
    fused: bool
    checkpointed: bool
    offload: bool | None
    plan: LayerPlan
    restricted: bool
    vllm: bool
    kv_width: int
    graphs: int

    @property
    def eager(self) -> bool:
        return not self.graphs
