"""What a pass can still do with less memory once packs cannot be cut any smaller: one measure after the other.

Each is a key of the section `train` with its new value. They change memory, time and the order of sums, and nothing
else. From the one that costs least time to the one that costs most:
layers' inputs wait in host memory; attention runs forward once more; fewer rows pass the MLP at a time; each KV head
runs alone; fewer rows of logits exist at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tandem.rl.checkpoint_offload import CheckpointedLayers
from tandem.rl.model import LanguageModel

# Fewer rows save nothing that counts beside a layer's weights.
LEAST_TILE, LEAST_CHUNK = 256, 128


def next_measure(lm: LanguageModel, rows: int, chunk_size: int) -> dict[str, Any]:
    """The next measure for packs of `rows` tokens, as {key: value}; empty where none is left.

    Args:
        chunk_size: rows of logits that exist at a time.
    """
    return _of_layers(lm, rows) or _halved("logprob_chunk_size", min(chunk_size, rows), LEAST_CHUNK)


def spare(lm: LanguageModel) -> dict[str, Any]:
    """What to give up before packs are cut, because it was taken of memory that was thought to be left over."""
    return {"projection_memory": "recompute"} if lm.fused is not None and lm.fused.layers_kept else {}


def take_measures(lm: LanguageModel, values: dict[str, Any]) -> None:
    """Run `lm`'s layers by these keys; others are left alone. Nothing that is set already is made larger."""
    if values.get("gradient_checkpointing") and lm.fused is None and lm.checkpoints is None:
        CheckpointedLayers(offload=False).attach(lm)
    layers = lm.checkpoints if lm.fused is None else lm.fused
    if values.get("offload_activations") and layers is not None:
        layers.offload = True
    if lm.fused is None:
        return
    plan = lm.fused.plan
    lm.fused.plan = replace(
        plan,
        attention=values.get("attention_memory", plan.attention),
        tile_rows=min(values.get("mlp_tile_rows", plan.tile_rows), plan.tile_rows),
        groups=values.get("kv_head_groups", plan.groups),
        projections=values.get("projection_memory", plan.projections),
    )


def _of_layers(lm: LanguageModel, rows: int) -> dict[str, Any]:
    if lm.fused is None:
        if lm.checkpoints is None:
            return {"gradient_checkpointing": True} if lm.causal_lm.supports_gradient_checkpointing else {}
        return {} if _offloads(lm.checkpoints) else {"offload_activations": True}
    plan, heads = lm.fused.plan, lm.fused.kv_heads
    if not _offloads(lm.fused):
        return {"offload_activations": True}
    if plan.attention != "recompute":
        return {"attention_memory": "recompute"}
    if fewer := _halved("mlp_tile_rows", min(plan.tile_rows, rows), LEAST_TILE):
        return fewer
    return {"kv_head_groups": heads} if plan.groups_for(rows, heads) < heads else {}


def _offloads(layers: Any) -> bool:
    """Whether the packs in question go to host memory already; of themselves they do so once they are large."""
    return layers.offload is True or (layers.offload is None and layers.host is not None)


def _halved(key: str, value: int, least: int) -> dict[str, Any]:
    return {key: max(value // 2, least)} if value > least else {}
