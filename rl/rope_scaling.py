"""A model's config with rotations for longer contexts, before a model, an engine or a plan is made from it."""

from __future__ import annotations

from typing import Any

from tandem.rl.errors import UserError
from tandem.rl.model_config import RopeScaling


def stretched(config: Any, scaling: RopeScaling) -> Any:
    """`config` of transformers', changed in place as its users are told to write it into `config.json`: `rope_scaling`
    and a `max_position_embeddings` that is so many times the original one.

    Raises:
        UserError: the model has rotations that are scaled already, other ones for different layers, or none.
    """
    if scaling.factor is None:
        return config
    text = config.get_text_config()
    now = getattr(text, "rope_parameters", None)
    given = scaling.model_dump(exclude_none=True)
    if not isinstance(now, dict) or any(isinstance(value, dict) for value in now.values()):
        raise UserError(
            f"model.rope_scaling cannot be applied to a {text.model_type} model",
            reason="it has no rotations, or other ones for different layers",
            fix="leave model.rope_scaling out",
        )
    if (kind := now.get("rope_type") or "default") != "default":
        raise UserError(
            f"model.rope_scaling.factor is {scaling.factor:g}, but the model's config has rotations of the type {kind} "
            "already",
            reason="they would be scaled twice",
            fix="leave model.rope_scaling out",
        )
    original = scaling.original_max_position_embeddings or text.max_position_embeddings
    text.rope_parameters = {**now, **given, "original_max_position_embeddings": original}
    text.max_position_embeddings = int(original * scaling.factor)
    return config
