"""The section of a config that says which model is trained, and in which types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tandem.rl.sections import Number, Positive, Section


class RopeScaling(Section):
    """Longer contexts than the model was trained on, by Hugging Face's names. A model card says which values it was
    tested with (Qwen3: factor 4 from 32,768 positions); short texts lose a little by it."""

    rope_type: Literal["yarn", "linear"] = "yarn"
    """yarn: arXiv 2309.00071; linear: positions divided by the factor."""
    factor: Annotated[Number, Field(ge=1)] | None = None
    """So many times the original context; None: the model's rotations stay as they are."""
    original_max_position_embeddings: Positive | None = None
    """The context in tokens that is stretched; None: the one in the model's config."""
    beta_fast: Annotated[Number, Field(gt=0)] | None = None
    """yarn: rotations within the original context from which a dimension stays as it is; None: 32."""
    beta_slow: Annotated[Number, Field(gt=0)] | None = None
    """yarn: rotations up to which it is stretched whole; None: 1."""

    @model_validator(mode="after")
    def _fits_together(self) -> RopeScaling:
        curve = [name for name in ("beta_fast", "beta_slow") if getattr(self, name) is not None]
        alone = [*curve, *(["original_max_position_embeddings"] * (self.original_max_position_embeddings is not None))]
        if self.factor is None and (alone or self.rope_type != "yarn"):
            name = (alone or ["rope_type"])[0]
            raise ValueError(f"{name} is set without a factor: set model.rope_scaling.factor, or leave {name} out")
        if self.rope_type == "linear" and curve:
            raise ValueError(f"{curve[0]} is yarn's, and rope_type is linear: leave it out")
        return self


class ModelConfig(Section):
    """The base model. Its weights are frozen; only the LoRA adapter is trained."""

    model_name_or_path: str
    """Hub id, local folder, or `pkg://PACKAGE/FILE.gguf` for weights that an installed Python package carries."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto: bfloat16 on a GPU (float16 before Ampere), float32 on a CPU. float16
    rounds eight times finer than bfloat16, so that engine and trainer agree better; numbers end at 65,504, which some
    models exceed."""
    load_in_4bit: bool = False
    """Quantise the linear layers to 4 bits (QLoRA); made once and kept in Tandem's cache folder."""
    weight_format: Literal["nf4", "int4"] = "nf4"
    """Of load_in_4bit. nf4: bitsandbytes' NF4 with double quantisation; int4: groups of 32 in Marlin's layout, which is
    made for decoding."""
    load_in_8bit: bool = False
    """Keep the linear layers in 8-bit floating point (E4M3, a power of two per output), where there is room for that:
    half of bfloat16's memory. On a GPU it has been run on small models alone."""
    rope_scaling: RopeScaling = Field(default_factory=RopeScaling)
    """Stretches the model's context beyond what its config allows, for trainer and engine alike."""
    max_length: Positive | None = None
    """Longest prompt + completion in tokens; None: what the model's own config allows."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra variables for the chat template, for example `enable_thinking: false`."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you trust its author."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: the GPU if there is one."""

    @property
    def quantised_to(self) -> Literal["nf4", "int4", "fp8"] | None:
        """How the linear layers are to be stored; None: as the checkpoint has them."""
        return self.weight_format if self.load_in_4bit else "fp8" if self.load_in_8bit else None
