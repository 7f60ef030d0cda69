"""Which of transformers' attentions a model is built with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def with_attention(build: Callable[[str], Any]) -> Any:
    """The model that `build(attn_implementation)` gives with SDPA, or with its own attention where SDPA cannot do what
    that does (soft-caps, sinks).

    transformers left to choose would do the same, but for configs that name a package that may not be there.
    """
    try:
        model = build("sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return build("eager")
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # Some versions of transformers let Gemma 2 have SDPA, which leaves the soft-cap out.
        model.set_attn_implementation("eager")
    return model
