"""A model's config with rotations for longer contexts, before a model, an engine or a plan is made from it."""

from __future__ import annotations

from typing import Any

from tandem.rl.errors import UserError
from tandem.rl.model_config import RopeScaling


def stretched(config: Any, scaling: RopeScaling) -> Any:
    """`config` of transformers', changed in place as its users are told to write it into `config.json`: `rope_scaling`
    and a `max_position_embeddings` that is so many times the original one.

    Raises:
        UserError: the model cannot be stretched, or its context would be no longer than it is.
    """
    if scaling.factor is None:
        return config
    text = config.get_text_config()
    if (reason := obstacle(text)) is not None:
        raise UserError(
            f"model.rope_scaling cannot be applied to this {text.model_type} model",
            reason=reason,
            fix="leave model.rope_scaling out",
        )
    now = text.max_position_embeddings
    original = scaling.original_max_position_embeddings or now
    length = int(original * scaling.factor)
    if length <= now:
        raise UserError(
            f"model.rope_scaling makes the context {original:,} × {scaling.factor:g} = {length:,} tokens long",
            reason=f"the model's is {now:,} already",
            fix="raise model.rope_scaling.factor, or leave model.rope_scaling out",
        )
    given = scaling.model_dump(exclude_none=True)
    text.rope_parameters = {**text.rope_parameters, **given, "original_max_position_embeddings": original}
    text.max_position_embeddings = length
    return config


def obstacle(text: Any) -> str | None:
    """Why a model with this text config cannot be stretched; None: it can."""
    now = getattr(text, "rope_parameters", None)
    if not isinstance(now, dict) or not getattr(text, "max_position_embeddings", None):
        return "it has no rotations that depend on a position"
    if any(isinstance(value, dict) for value in now.values()):
        return "its layers have different rotations"
    kind = now.get("rope_type") or "default"
    return None if kind == "default" else f"its rotations are of the type {kind} already, and would be scaled twice"
