"""One GRPO update (forward and backward of one packed batch) at several lengths: Tandem and its peers, side by side.

    python benchmarks/random_checkpoint.py qwen3-8b /tmp/qwen3-8b-nf4
    python benchmarks/update.py /tmp/qwen3-8b-nf4 --systems tandem trl unsloth --lengths 8192 32768 --cap-gib 23

Every system runs in a process of its own, with the same NF4 base, rank 32 on all seven projections, bfloat16 and one
sequence of `length` tokens (64 of them prompt). `--cap-gib` limits the allocator, as a consumer card would.
The fastest of `--repeats` runs counts. Writes `benchmarks/results/update-DEVICE-DATE.json`.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SYSTEMS = ("tandem", "tandem-plain", "trl", "trl-offload", "unsloth")
COLUMNS = (
    "seconds",
    "tokens_per_s",
    "peak_allocated_gib",
    "peak_reserved_gib",
    "device_used_gib",
    "gradient_norm",
    "error",
)
PROMPT, RANK = 64, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--cap-gib", type=float, default=0.0, help="0: no cap")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--attention", default="keep", help="tandem: keep, recompute or offload")
    parser.add_argument("--groups", type=int, default=None, help="tandem: attention by so many KV-head groups")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--timeout", type=float, default=500.0, help="seconds for one system")
    parser.add_argument("--worker", choices=SYSTEMS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments)
        return
    rows: list[dict[str, Any]] = []
    for system in arguments.systems:
        rows += run_worker(system, arguments)
        for row in rows:
            if row["system"] == system:
                print(json.dumps(row), flush=True)
    write(rows, arguments)


def run_worker(system: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that a system's process prints; what went wrong with it is a row of its own."""
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    environment |= {"UNSLOTH_DISABLE_STATISTICS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", system]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=arguments.timeout)
        output, failed = done.stdout, done.returncode and done.stderr.strip()[-2000:]
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        failed = f"stopped after {arguments.timeout:.0f} s"
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    if failed:
        rows.append(row(system, arguments, None, error=failed))
    return rows


def row(system: str, arguments: argparse.Namespace, length: int | None, **values: Any) -> dict[str, Any]:
    empty = dict.fromkeys(COLUMNS)
    cap = arguments.cap_gib or None
    known = {"system": system, "model": Path(arguments.model).name, "length": length, "cap_gib": cap}
    return known | empty | values


def work(system: str, arguments: argparse.Namespace) -> None:
    """Load a system and run its lengths until one does not fit."""
    if system == "unsloth":
        import unsloth  # noqa: F401  # must come before transformers
    import torch

    if arguments.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.cap_gib * 2**30 / total)
    step, parameters = (tandem if system.startswith("tandem") else peer)(system, arguments)
    for length in arguments.lengths:
        ids = torch.randint(10, 150_000, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        try:
            values = measure(step, ids, parameters, arguments.repeats)
        except torch.OutOfMemoryError as error:
            values = {"error": f"out of memory: {str(error)[:160]}"}
        print("ROW " + json.dumps(row(system, arguments, length, **values)), flush=True)
        if "error" in values:
            break
        gc.collect()
        torch.cuda.empty_cache()


def measure(step: Callable[[list[int]], None], ids: list[int], parameters: list[Any], repeats: int) -> dict[str, float]:
    import torch

    seconds = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        for p in parameters:
            p.grad = None
        torch.cuda.synchronize()
        started = time.perf_counter()
        step(ids)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    free, total = torch.cuda.mem_get_info()
    norm = sum(float(p.grad.float().norm()) ** 2 for p in parameters if p.grad is not None) ** 0.5
    return {
        "seconds": round(min(seconds), 4),
        "tokens_per_s": round(len(ids) / min(seconds)),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "device_used_gib": round((total - free) / 2**30, 3),
        "gradient_norm": norm,
    }


def tandem(system: str, arguments: argparse.Namespace) -> tuple[Callable[[list[int]], None], list[Any]]:
    """Ours: `tandem` through the fused layers, `tandem-plain` through the model's own forward with checkpointing."""
    from types import SimpleNamespace

    from tandem.rl.config import AlgorithmConfig, LoraConfig, ModelConfig
    from tandem.rl.lora import attach_lora, trainable
    from tandem.rl.metrics import Meter
    from tandem.rl.model import load_model, with_sampling
    from tandem.rl.packing import pack
    from tandem.rl.samples import Sequence
    from tandem.rl.step import PolicyBatch, policy_backward

    lm = load_model(ModelConfig(model_name_or_path=arguments.model, dtype="bfloat16"), SimpleNamespace(pad_token_id=0))
    attach_lora(lm, LoraConfig(r=RANK, target_modules=TARGETS), seed=0)
    if system == "tandem":
        from tandem.rl.fused_layer import FusedLayers, Plan

        FusedLayers(Plan(groups=arguments.groups, attention=arguments.attention)).attach(lm)
    else:
        lm.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    head = with_sampling(lm.head, temperature=1.0, top_k=0, top_p=1.0, chunk_size=512)
    algorithm = AlgorithmConfig(loss_type="grpo", rollout_correction="none")

    def step(ids: list[int]) -> None:
        answer = ids[PROMPT:]
        sequences = [Sequence(ids[:PROMPT], answer, [True] * len(answer))]
        batch = PolicyBatch(sequences, [0.7], [[0.0] * len(answer)])
        packs = pack(sequences, len(ids))
        policy_backward(lm, packs, batch, algorithm, head, Meter(), max_completion_length=len(answer))

    return step, [p for _, p in trainable(lm)]


def peer(system: str, arguments: argparse.Namespace) -> tuple[Callable[[list[int]], None], list[Any]]:
    """TRL's GRPOTrainer on a transformers + peft model or on Unsloth's, fed with a fixed batch."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = (unsloth_model if system == "unsloth" else trl_model)(system, arguments)
    longest = max(arguments.lengths)
    config = GRPOConfig(
        output_dir="/tmp/update-benchmark",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_generations=2,
        max_completion_length=longest - PROMPT,
        bf16=True,
        report_to="none",
        beta=0.0,
        loss_type="grpo",
        max_steps=10,
    )
    trainer = GRPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["w5 w6"] * 8}),
        processing_class=tokenizer,
        reward_funcs=[lambda completions, **columns: [0.0] * len(completions)],
    )
    trainer.model.train()
    if system == "trl-offload":
        trainer.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False}, offload=True)
    if system == "unsloth":
        trainer.model.for_training(use_gradient_checkpointing="unsloth")
    trainer.current_gradient_accumulation_steps = 1

    def step(ids: list[int]) -> None:
        row_of = torch.tensor([ids], device="cuda")
        count = torch.tensor(len(ids) - PROMPT, device="cuda")
        inputs = {
            "prompt_ids": row_of[:, :PROMPT],
            "prompt_mask": torch.ones_like(row_of[:, :PROMPT]),
            "completion_ids": row_of[:, PROMPT:],
            "completion_mask": torch.ones_like(row_of[:, PROMPT:]),
            "advantages": torch.tensor([0.7], device="cuda"),
            "num_items_in_batch": count,
            "max_left_pad": 0,
            "logits_to_keep": len(ids) - PROMPT,
            "old_per_token_logps": None,
            "ref_per_token_logps": None,
        }
        trainer._prepare_inputs = lambda batch: inputs
        trainer.training_step(trainer.model, inputs, count)

    return step, [p for p in trainer.model.parameters() if p.requires_grad]


def trl_model(system: str, arguments: argparse.Namespace):
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa"
    )
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:  # what the preparation raised to float32 would cost TRL time and memory
            parameter.data = parameter.data.to(torch.bfloat16)
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, settings), AutoTokenizer.from_pretrained(arguments.model)


def unsloth_model(system: str, arguments: argparse.Namespace):
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        arguments.model, max_seq_length=max(arguments.lengths), load_in_4bit=True, dtype=torch.bfloat16
    )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, target_modules=TARGETS, lora_dropout=0, use_gradient_checkpointing="unsloth"
    )
    return model, tokenizer


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    import torch

    device = torch.cuda.get_device_name()
    versions = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "trl", "unsloth", "tandem-rl"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    command = "python benchmarks/update.py " + " ".join(sys.argv[1:])
    result = {"bench": "update", "device": device, "versions": versions, "command": command, "rows": rows}
    date = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d-%H%M")
    target = arguments.out / f"update-{device.split()[1].lower()}-{date}.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
