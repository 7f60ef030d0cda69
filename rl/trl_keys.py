"""Names that TRL, Unsloth and Hugging Face's trainer have for what a config calls otherwise or does not have.

Keys that keep their name are not here. The texts stand in the error for an unknown key and in the table of
docs/from-trl.md, which `make docs` writes.
"""

from __future__ import annotations

_NOT_NEEDED = "not needed"
_NONE = "nothing like it"

INSTEAD: dict[str, str] = {
    # Arguments of the trainer.
    "peft_config": "the section `lora`, with peft's names; only adapters are trained, never all weights",
    "quantization_config": "`model.load_in_4bit` or `model.load_in_8bit`",
    "model_init_kwargs": "`model.dtype`, `model.revision`, `model.trust_remote_code`",
    "processing_class": "the model's own tokenizer; `model.chat_template` replaces its template",
    "train_dataset": "`data.dataset_name`; a function of your own that returns the rows: `FILE.py:FUNCTION`",
    "eval_dataset": "`eval.dataset_name`",
    "environment_factory": "`environment.factory`",
    "rollout_func": f"{_NONE}; turns are an environment's or tools' (docs/environments.md)",
    "callbacks": _NONE,
    # The batch.
    "gradient_accumulation_steps": f"{_NOT_NEEDED}: `train.generation_batch_size` completions make a rollout, "
    "`train.steps_per_generation` optimiser steps learn from it, and `train.max_tokens` alone bounds the memory",
    "auto_find_batch_size": f"{_NOT_NEEDED}: `train.max_tokens` is chosen, and halved where memory ends",
    "per_device_eval_batch_size": f"{_NOT_NEEDED}: `rollout.max_in_flight` is chosen",
    "pad_to_multiple_of": f"{_NOT_NEEDED}: packs have no padding",
    "padding_free": f"{_NOT_NEEDED}: packs have no padding",
    "packing": f"{_NOT_NEEDED}: everything is packed, and attention stays within an example",
    "max_seq_length": "`model.max_length`",
    # Generation.
    "use_vllm": "`rollout.engine: vllm`; auto takes it on a GPU where vLLM is installed",
    "fast_inference": "`rollout.engine: vllm`; auto takes it on a GPU where vLLM is installed",
    "vllm_mode": f"{_NOT_NEEDED}: vLLM runs in the trainer's process, on the trainer's weights; there is no server",
    "vllm_server_base_url": "no server: vLLM runs in the trainer's process",
    "vllm_server_host": "no server: vLLM runs in the trainer's process",
    "vllm_server_port": "no server: vLLM runs in the trainer's process",
    "vllm_server_timeout": "no server: vLLM runs in the trainer's process",
    "vllm_group_port": "no server: vLLM runs in the trainer's process",
    "vllm_tensor_parallel_size": f"{_NONE}: one engine on one GPU",
    "vllm_enable_sleep_mode": f"{_NOT_NEEDED}: the engine's cache is given back between rollouts",
    "vllm_gpu_memory_utilization": "`rollout.kv_cache_gib`, which is chosen from the memory that is free",
    "gpu_memory_utilization": "`rollout.kv_cache_gib`, which is chosen from the memory that is free",
    "vllm_max_model_length": "`rollout.max_model_len`",
    "vllm_model_impl": _NONE,
    "vllm_structured_outputs_regex": f"{_NONE}; the reward `regex_match`",
    "use_transformers_paged": _NONE,
    "use_transformers_continuous_batching": _NONE,
    "transformers_continuous_batching_config": _NONE,
    "cache_implementation": _NONE,
    "min_p": f"{_NONE}: sampling has `temperature`, `top_p` and `top_k`, in engine and trainer alike",
    "repetition_penalty": f"{_NONE} in sampling; the reward `repetition_penalty`",
    "generation_kwargs": f"{_NONE}; `rollout.stop` and `rollout.stop_token_ids` are there",
    "num_generations_eval": "`eval.num_generations`",
    "max_tool_calling_iterations": "`environment.max_turns`, which counts the model's turns",
    # The objective.
    "vllm_importance_sampling_correction": "`algorithm.rollout_correction`; none turns it off",
    "vllm_importance_sampling_mode": "`algorithm.rollout_correction`; the default there is token_truncate",
    "vllm_importance_sampling_cap": "`algorithm.rollout_correction_max`",
    "vllm_importance_sampling_clip_max": "`algorithm.rollout_correction_max`",
    "vllm_importance_sampling_clip_min": "`algorithm.rollout_correction_min`",
    "off_policy_mask_threshold": f"{_NONE}; `algorithm.rollout_correction` can mask",
    "sync_ref_model": f"{_NONE}: the reference of `algorithm.beta` is the model with its adapter off",
    "ref_model_mixup_alpha": f"{_NONE}: the reference is the model with its adapter off",
    "ref_model_sync_steps": f"{_NONE}: the reference is the model with its adapter off",
    "use_adaptive_entropy": f"{_NONE}: `algorithm.entropy_coef` is constant",
    "entropy_coef_min": f"{_NONE}: `algorithm.entropy_coef` is constant",
    "entropy_coef_max": f"{_NONE}: `algorithm.entropy_coef` is constant",
    "entropy_coef_delta": f"{_NONE}: `algorithm.entropy_coef` is constant",
    "entropy_target": f"{_NONE}: `algorithm.entropy_coef` is constant",
    "vespo_k_pos": f"{_NONE}: no VESPO",
    "vespo_k_neg": f"{_NONE}: no VESPO",
    "vespo_lambda_pos": f"{_NONE}: no VESPO",
    "vespo_lambda_neg": f"{_NONE}: no VESPO",
    "router_aux_loss_coef": f"{_NONE}: no loss of a router",
    "disable_dropout": "`lora.lora_dropout`, 0 by default",
    # The optimiser, memory, numbers.
    "warmup_ratio": "`optim.warmup_steps`",
    "bf16": "`model.dtype: bfloat16`, the default on a GPU",
    "fp16": "`model.dtype: float16`",
    "gradient_checkpointing_kwargs": f"{_NOT_NEEDED}: see `train.offload_activations`",
    "use_gradient_checkpointing": "`train.gradient_checkpointing` and `train.offload_activations`, chosen on a GPU",
    "activation_offloading": "`train.offload_activations`",
    "use_liger_kernel": f"{_NOT_NEEDED}: log-probs never need all logits at once",
    "cast_lm_head_to_fp32": _NONE,
    "deepspeed": f"{_NONE}: one GPU, or processes of `torchrun` that each hold the model",
    "fsdp": f"{_NONE}: one GPU, or processes of `torchrun` that each hold the model",
    "ds3_gather_for_generation": f"{_NONE}: no DeepSpeed",
    # Records.
    "data_seed": "`seed`",
    "logging_strategy": "`log.logging_steps`",
    "eval_strategy": "`eval.eval_steps`",
    "save_strategy": "`checkpoint.save_steps`",
    "resume_from_checkpoint": "`rl-train resume RUN`",
    "push_to_hub": f"{_NONE}: the run's `adapter/` is a peft folder (docs/use-adapter.md)",
    "log_completions_hub_repo": f"{_NONE}: completions are in the run's `rollouts/`",
    "log_unique_prompts": f"{_NONE}: completions are in the run's `rollouts/`",
    "log_multimodal": f"{_NONE}: texts only",
    "remove_unused_columns": f"{_NOT_NEEDED}: every column reaches the rewards",
}
