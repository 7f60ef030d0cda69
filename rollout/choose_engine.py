"""Which engine a run gets: the best that works here, and a word on what it costs when that is not the best there is.

In order: vLLM on the trainer's weights; vLLM with a copy of its own, where there is room for one; the transformers
engine. An engine that was asked for by name is used or the run ends with the reason.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tandem.rl.errors import UserError, cause
from tandem.rl.model import LanguageModel
from tandem.rollout.engine import RolloutEngine
from tandem.rollout.restart import RestartingEngine
from tandem.rollout.transformers_engine import TransformersEngine
from tandem.rollout.vllm_engine import VllmEngine, copy_bytes, free_bytes
from tandem.rollout.vllm_plan import GIB, HEADROOM, VllmOptions
from tandem.rollout.vllm_versions import refusal

Say = Callable[[str], None]


def open_engine(
    kind: str,
    language_model: LanguageModel,
    *,
    store: Any,
    source: str | Path | None,
    load_in_4bit: bool,
    options: VllmOptions,
    max_in_flight: int | None = None,
    note: Say,
    warn: Say,
    why_not: Callable[[LanguageModel], str | None] | None = None,
    build: Callable[..., RolloutEngine] = VllmEngine,
) -> RolloutEngine:
    """The engine for `rollout.engine`.

    Args:
        kind: auto, vllm or transformers.
        store: the weights that the trainer computes with; None: the trainer's model has others (see `source`).
        source: the checkpoint that a copy would be loaded from, load_in_4bit: as NF4; None: none is the trainer's
            model, which has other rotations.
        note, warn: told what is used and what it costs.
        why_not, build: exchanged by tests.

    Raises:
        UserError: vLLM was asked for by name and cannot be used.
    """

    def fallback() -> RolloutEngine:
        return TransformersEngine(language_model, max_in_flight=max_in_flight, warn=warn)

    if kind == "transformers":
        return fallback()
    reason = (why_not or unusable)(language_model)
    if reason is None:
        engine, reason = _vllm(language_model, store, source, load_in_4bit, options, note, warn, build)
        if engine is not None:
            return engine
    if kind == "vllm":
        raise UserError("rollout.engine=vllm cannot be used", reason=reason, fix="set rollout.engine=transformers")
    if language_model.device.type == "cuda":
        warn(f"rollouts go through transformers, which generate several times slower than vLLM: {reason}")
    return fallback()


def unusable(language_model: LanguageModel) -> str | None:
    """Why no vLLM engine can be built here; None: one can."""
    if language_model.device.type != "cuda":
        return f"the model is on {language_model.device}, and the vLLM engine needs a CUDA device"
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and torch.distributed.get_world_size() > 1:
        return "vLLM inside the trainer's process serves one process, and this run has several"
    return refusal()


def _vllm(
    language_model: LanguageModel,
    store: Any,
    source: str | Path | None,
    load_in_4bit: bool,
    options: VllmOptions,
    note: Say,
    warn: Say,
    build: Callable[..., RolloutEngine],
) -> tuple[RolloutEngine | None, str]:
    """An engine, or the reason for none."""
    reason = "the model was loaded without a weight store"

    def shared() -> RolloutEngine:
        return build(language_model, store, options)

    def copied() -> RolloutEngine:
        quantization = "bitsandbytes" if load_in_4bit else None
        return build(language_model, None, options, source=source, source_quantization=quantization)

    if store is not None:
        engine, reason = _attempt(shared)
        if engine is not None:
            size = getattr(engine, "kv_cache_bytes", 0) / GIB
            note(
                f"rollouts go through vLLM on the trainer's own weights; its KV cache takes {size:.2f} GiB in rollouts"
            )
            return RestartingEngine(engine, shared, warn=warn), ""
    if store is not None and store.format not in ("nf4", "bf16"):
        return None, f"{reason}; and vLLM has no {store.format} of its own that would be the same weights"
    if source is None:
        return None, f"{reason}; and a copy from the checkpoint would have its own rotations (model.rope_scaling)"
    copy = copy_bytes(language_model)
    if free_bytes(language_model.device) < copy + HEADROOM:
        return None, f"{reason}; and there is no room for a copy of the weights ({copy / GIB:.2f} GiB)"
    engine, second = _attempt(copied)
    if engine is None:
        return None, f"{reason}; and with a copy of the weights: {second}"
    warn(f"vLLM holds a copy of the weights, {copy / GIB:.2f} GiB that training cannot use: {reason}")
    return RestartingEngine(engine, copied, warn=warn), ""


def _attempt(build: Callable[[], RolloutEngine]) -> tuple[RolloutEngine | None, str]:
    try:
        return build(), ""
    except UserError as error:
        reason = error.problem + (f" ({error.reason})" if error.reason else "")
    except Exception as error:  # noqa: BLE001  # vLLM fails in many ways; whichever it was is reported with its cause
        reason = cause(error)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, reason
