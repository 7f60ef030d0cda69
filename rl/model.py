"""The language model: one frozen base, loaded once, with its tokenizer and its head described as data.

Trainer and embedded rollout engine share this object. The transformer body runs through Hugging Face's own forward;
the head is applied by `tandem.kernels.linear_logprob`, which never holds all logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tandem.kernels.linear_logprob import HeadAdapter, HeadOptions, head_logits
from tandem.kernels.pack_layout import Family, PackLayout
from tandem.kernels.packed_attention import packed_attention
from tandem.rl.adapters import active_adapter
from tandem.rl.attention_choice import with_attention
from tandem.rl.config import ModelConfig
from tandem.rl.distributed import local_rank
from tandem.rl.errors import UserError
from tandem.rl.library_imports import collector_off
from tandem.rl.rope_scaling import stretched
from tandem.rl.store import WeightStore
from tandem.rl.weights import resolve_model

PACKED = "tandem_packed"

# The layout of the pack that this thread computes, for models that do not hand it on to their attention.
_LAYOUT: ContextVar[PackLayout | None] = ContextVar("pack_layout", default=None)


@dataclass
class LanguageModel:
    """A causal language model and what is needed to run it.

    Attributes:
        model: transformers' model, wrapped by peft once an adapter is attached.
        tokenizer: its tokenizer, with a pad token.
        device, dtype: where and in what type it computes.
        head: how logits follow from hidden states (scale and soft-cap; temperature is set by the caller).
        max_length: longest sequence in tokens.
        fused: layers with a hand-written backward pass that packs go through, once attached (`rl.fused_layer`).
        checkpoints: recomputation of the model's own layers, once attached (`rl.checkpoint_offload`).
        store: the weights, where the model is made of views of them (`rl.store`).
        notes: what the user should be told of the loading.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    head: HeadOptions
    max_length: int
    fused: Any = None
    checkpoints: Any = None
    store: WeightStore | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def causal_lm(self) -> Any:
        """The `...ForCausalLM` instance, inside peft's wrapper if there is one."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def backbone(self) -> Any:
        """The body without the head."""
        return self.causal_lm.get_decoder()

    @property
    def head_weight(self) -> torch.Tensor:
        """`[V, d]`, frozen; an adapter on the head is not in it."""
        return self._base_head.weight

    @property
    def head_bias(self) -> torch.Tensor | None:
        return getattr(self._base_head, "bias", None)

    @property
    def head_adapter(self) -> HeadAdapter | None:
        """LoRA on the head as it stands now; None where there is none or it is switched off.

        Raises:
            UserError: the head's adapter is not plain LoRA, or has dropout.
        """
        head = self.causal_lm.get_output_embeddings()
        if not hasattr(head, "lora_A"):
            return None
        adapter = active_adapter(head, _not_plain)
        return None if adapter is None else HeadAdapter(*adapter)

    @property
    def _base_head(self) -> Any:
        head = self.causal_lm.get_output_embeddings()
        return head.get_base_layer() if hasattr(head, "lora_A") else head

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[N, d]` -> `[N, V]` float32 logits, soft-capped and scaled as the model does, temperature 1."""
        return head_logits(hidden, self.head_weight, self.head_bias, self.head, self.head_adapter)

    def packed_hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, layout: PackLayout) -> torch.Tensor:
        """Last hidden states `[T, d]` of a pack `[T]`. Must run inside `packed()`."""
        if self.fused is not None:
            return self.fused.hidden(input_ids, position_ids, layout)
        saving = nullcontext() if self.checkpoints is None else self.checkpoints.saving(len(input_ids))
        with saving, LayoutInUse(layout):
            out = self.backbone(
                input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, packed_layout=layout
            )
        return out.last_hidden_state[0]

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Attention by pack layout while this is open; the model's own attention before and after.

        Fused layers go by the layout anyway, and telling every module of a small model takes as long as a layer.
        """
        if self.fused is not None:
            yield
            return
        before = self.causal_lm.config._attn_implementation
        self.causal_lm.set_attn_implementation(PACKED)
        try:
            yield
        finally:
            self.causal_lm.set_attn_implementation(before)


def current_layout() -> PackLayout | None:
    return _LAYOUT.get()


class LayoutInUse:
    """Packed attention goes by `layout` while this is open, in this thread. May be opened again."""

    def __init__(self, layout: PackLayout | None) -> None:
        self._layout = layout
        self._tokens: list[Token[PackLayout | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_LAYOUT.set(self._layout))

    def __exit__(self, *_error: object) -> None:
        _LAYOUT.reset(self._tokens.pop())


def load_model(config: ModelConfig, tokenizer: Any, *, shared: bool = False) -> LanguageModel:
    """Load the base model: on a weight store where its weights are quantised here or `shared` with an engine.

    A model that no store can hold is loaded by transformers, if that can give what the config asks for; `notes` of the
    result say so.

    Raises:
        UserError: the model cannot be found or loaded, or its head does something that we do not compute.
    """
    _register_packed_attention()
    device = _device(config)
    dtype = _dtype(config, device)
    source = resolve_model(config.model_name_or_path)
    model = store = None
    notes: list[str] = []
    if device.type == "cpu" and dtype.itemsize == 2:
        notes.append(
            f"model.dtype is {config.dtype}, which most CPUs emulate, ten times slower than float32: leave model.dtype "
            "out here"
        )
    if (shared or config.quantised_to) and not config.trust_remote_code:
        try:
            store = WeightStore.open(
                source,
                format=_store_format(config, source),
                device=device,
                dtype=dtype,
                revision=config.revision,
                rope_scaling=config.rope_scaling,
            )
            model = store.causal_lm()
            notes += store.notes
        except UserError as error:
            if config.quantised_to not in (None, "nf4"):  # which transformers cannot load
                raise
            store = None
            notes.append(f"trainer and engine cannot share weights: {error.problem}")
    if model is None:
        model = _loaded(config, source, device, dtype)
    model.requires_grad_(False)
    model.eval()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    loaded = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        head=_head_options(model),
        max_length=min(config.max_length or limit, limit),
        store=store,
        notes=notes,
    )
    _check_head(loaded)
    return loaded


def _store_format(config: ModelConfig, source: str) -> str:
    if config.quantised_to:
        return config.quantised_to
    given = Path(source) / "config.json"
    quantised = given.is_file() and "quantization_config" in json.loads(given.read_text(encoding="utf-8"))
    return "nf4" if quantised else "bf16"


def _loaded(config: ModelConfig, source: str, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {}
    where = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if config.load_in_4bit:
        options["quantization_config"] = _nf4(dtype)
    if config.load_in_4bit or device.type == "cuda":
        options["device_map"] = {"": str(device)}
    try:
        if config.rope_scaling.factor is not None:
            options["config"] = stretched(AutoConfig.from_pretrained(source, **where), config.rope_scaling)
        return with_attention(
            lambda attention: AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,  # a pickle runs code when it is read
                attn_implementation=attention,
                **where,
                **options,
            )
        )
    except UserError:
        raise
    except Exception as error:  # a damaged file makes the libraries raise anything; reported with its cause
        raise UserError(
            f"cannot load the model {config.model_name_or_path!r}: {_first_lines(error)}",
            fix="give a hub id, a local folder in Hugging Face's format or pkg://PACKAGE/FILE.gguf; "
            "without access to a hub, download the model first and give its folder",
        ) from error


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer, with a pad token (its end token where it has none) and the config's chat template.

    Raises:
        UserError: it cannot be found or loaded.
    """
    from tandem.rl.chat import set_chat_template

    source = resolve_model(config.model_name_or_path)
    try:
        with collector_off():  # imports half of transformers
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # a damaged file makes the libraries raise anything; reported with its cause
        raise UserError(
            f"cannot load the tokenizer of {config.model_name_or_path!r}: {_first_lines(error)}",
            fix="the model's folder must hold its tokenizer files (tokenizer.json, tokenizer_config.json)"
            if Path(source).is_dir()
            else "check the hub id and the connection (HF_HUB_OFFLINE forbids it), or give the folder of a model",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template:
        set_chat_template(tokenizer, config.chat_template)
    return tokenizer


def _register_packed_attention() -> None:
    """Offer our attention under a name, through transformers' public registry; nobody gets it who does not ask.

    No mask function is registered beside it: transformers then builds no mask, which is what a pack needs.
    """
    with collector_off():
        from transformers import AttentionInterface

    AttentionInterface.register(PACKED, _attention_for_transformers)


def _attention_for_transformers(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **kwargs
):
    """transformers' attention signature: `[1, H, T, D]` in, (`[1, T, H, D]`, no weights) out."""
    layout = kwargs.get("packed_layout") or current_layout()
    if layout is None:
        raise RuntimeError(
            f"no pack's layout reached {type(module).__name__}, which does not pass keyword arguments on: packs must "
            "go through LanguageModel.packed_hidden and be recomputed by CheckpointedLayers"
        )
    if kwargs.get("s_aux") is not None or dropout:
        raise RuntimeError(f"{type(module).__name__} uses attention sinks or dropout, which packing does not compute")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    width = value.shape[-1]
    if width != query.shape[-1]:  # as in DeepSeek's latent attention; zeros behind the values stay zeros
        value = torch.nn.functional.pad(value, (0, query.shape[-1] - width))
    out = packed_attention(query[0], key[0], value[0], layout, scale=scale, window=window, softcap=softcap)
    return out[..., :width].transpose(0, 1).unsqueeze(0).contiguous(), None


def _device(config: ModelConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "model.device is cuda, but torch sees no GPU", fix="set model.device=auto, or install a CUDA torch"
        )
    if config.device == "auto":
        return torch.device(f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    return torch.device(f"cuda:{local_rank()}" if config.device == "cuda" else "cpu")


def _dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        if device.type != "cuda":
            return torch.float32  # the others are emulated on most CPUs
        # int4's scales are bfloat16, also where a card computes in it slowly.
        has = torch.cuda.get_device_capability(device) >= (8, 0) or config.quantised_to == "int4"
        return torch.bfloat16 if has else torch.float16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]


def _nf4(dtype: torch.dtype) -> Any:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.load_in_4bit needs bitsandbytes", fix="pip install 'tandem-rl[quantization]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _head_options(model: Any) -> HeadOptions:
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = 1.0 / divisor
    return HeadOptions(
        scale=1.0 if scale is None else float(scale), softcap=getattr(config, "final_logit_softcapping", None)
    )


def _not_plain(what: str, fix: str) -> UserError:
    return UserError(
        f"the model's head {what}",
        reason="log-probs are not computed with that",
        fix=f"use {fix} there, or leave the head out of lora.target_modules",
    )


@torch.no_grad()
def _check_head(loaded: LanguageModel) -> None:
    """Our head against the model's own on a few tokens: a model that does something else there is refused, not trained
    wrongly."""
    ids = torch.arange(1, 9, device=loaded.device)[None] % loaded.head_weight.shape[0]
    own = loaded.causal_lm(input_ids=ids, use_cache=False).logits[0].float()
    ours = loaded.logits(loaded.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    own = own[:, : ours.shape[1]]
    if own.isnan().any():
        half = loaded.dtype == torch.float16
        raise UserError(
            f"{type(loaded.causal_lm).__name__} computes something that is no number in {str(loaded.dtype)[6:]}",
            reason="its hidden states exceed 65,504, where float16 ends" if half else "its weights may be damaged",
            fix="set model.dtype=bfloat16" if half else "load the checkpoint anew",
        )
    error = (own.log_softmax(-1) - ours.log_softmax(-1)).abs().max().item()
    tolerance = 1e-3 if loaded.dtype == torch.float32 else 0.25
    if not error <= tolerance:
        raise UserError(
            f"{type(loaded.causal_lm).__name__} computes its logits in a way that is not known here "
            f"(log-probs differ by {error:.3g})",
            reason="log-probs would not be the model's",
            fix="use a model whose head is linear, with an optional scale and soft-cap",
        )


@torch.no_grad()
def check_packing(lm: LanguageModel) -> None:
    """Two short sequences in one pack against the same alone, through the model's own forward.

    Raises:
        UserError: the model cannot run packs, or computes something else in them.
    """
    name, length = type(lm.causal_lm).__name__, 8
    ids = torch.arange(1, 2 * length + 1, device=lm.device) % lm.head_weight.shape[0]
    alone = [lm.backbone(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in ids.split(length)]
    layout = PackLayout([Family((0, length)), Family((length, 2 * length))])
    fix = "use a model that attends through transformers' attention interface, without sinks or recurrent state"
    try:
        with lm.packed():
            packed = lm.packed_hidden(ids, torch.arange(length, device=lm.device).repeat(2), layout).split(length)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{name} cannot run several sequences in one row: {_first_lines(error)}", fix=fix) from error
    # The mean, because rounding can send a single token to another expert.
    errors = [
        ((a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1).clamp_min(1e-6)).mean().item()
        for a, b in zip(packed, alone, strict=True)
    ]
    tolerance = 1e-3 if lm.dtype == torch.float32 else 0.1
    if not all(error <= tolerance for error in errors):
        raise UserError(
            f"{name} computes something else when several sequences share a row (hidden states differ by "
            f"{max(errors):.2g} of their size)",
            reason="their tokens would see each other",
            fix=fix,
        )


def _first_lines(error: BaseException, most: int = 3) -> str:
    return " ".join(str(error).strip().splitlines()[:most]) or type(error).__name__


def with_sampling(head: HeadOptions, *, temperature: float, top_k: int, top_p: float, chunk_size: int) -> HeadOptions:
    """The head's options for the distribution that completions are drawn from."""
    return replace(head, temperature=temperature, top_k=top_k, top_p=top_p, chunk_size=chunk_size)
