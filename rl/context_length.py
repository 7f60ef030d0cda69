"""Whether what is learned from fits into the model's context, before anything is generated."""

from __future__ import annotations

from tandem.rl.config import Config, ModelConfig
from tandem.rl.console import Console
from tandem.rl.errors import UserError
from tandem.rl.rope_scaling import obstacle, stretched
from tandem.rl.training_data import TrainingData, longest_sequence
from tandem.rl.weights import resolve_model


def check_context(config: Config, data: TrainingData, console: Console) -> None:
    """Positions that a model was never trained on give nonsense, or no number at all.

    Episodes are not looked at: they end where the context does.

    Raises:
        UserError: the longest prompt and a completion of full length are longer than what the model takes.
    """
    context, may_grow = _context(config.model)
    longest = longest_sequence(config, data)
    prompt, completion = longest.prompt, longest.completion
    total = prompt + completion
    if context is None or total <= context or config.environment.enabled:
        return
    if not config.uses_rollouts:
        console.warn(
            f"the longest example has {total} tokens, and the model takes {context}: set model.max_length={context}, "
            "which cuts or leaves out what is longer"
        )
        return
    ways = []
    if prompt < context:
        ways.append(f"set rollout.max_completion_length={context - prompt}")
    if completion < context:
        ways.append(f"set data.max_prompt_length={context - completion}, which leaves longer prompts out")
    ways = ways or ["shorten both"]
    if may_grow:
        ways.append("stretch the context with model.rope_scaling.factor")
    raise UserError(
        f"a prompt of {prompt} tokens and rollout.max_completion_length {completion} are {total} tokens",
        reason=f"the model takes {context}",
        fix=", or ".join(ways),
    )


def _context(model: ModelConfig) -> tuple[int | None, bool]:
    """Tokens that the model takes by its config.json and `model.max_length`, None where neither says; and whether
    `model.rope_scaling` would give it more."""
    from transformers import AutoConfig

    source = resolve_model(model.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(
            source, revision=model.revision, trust_remote_code=model.trust_remote_code
        ).get_text_config()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return model.max_length, False  # what is wrong with the model is said when it is loaded
    config = stretched(config, model.rope_scaling)
    limit, own = getattr(config, "max_position_embeddings", None), model.max_length
    binds = limit is not None and (own is None or limit < own)
    return min((one for one in (limit, own) if one), default=None), binds and obstacle(config) is None
