"""One GRPO update (forward and backward of one packed batch) at several lengths: Tandem and its peers, side by side.

    python benchmarks/random_checkpoint.py qwen3-8b /tmp/qwen3-8b-nf4
    python benchmarks/update.py /tmp/qwen3-8b-nf4 --systems tandem trl unsloth --lengths 8192 32768 --cap-gib 23
    python benchmarks/update.py --plot FILE.json [FILE.json …]        # only draws stored results again

Every system runs in a process of its own, with the same NF4 base, rank 32 on all seven projections, bfloat16 and one
sequence of `length` tokens (64 of them prompt). `--cap-gib` limits the allocator, as a consumer card would.
The fastest of `--repeats` runs counts; the first, which also pins host memory and compiles, is stored beside it.
Writes `benchmarks/results/update-DEVICE-DATE.json`, anew after every measurement, and a plot beside it.

`tandem` runs the fused layers as `--offload`, `--attention` and `--groups` say. The systems beside it have one thing
changed: tandem-no-offload, tandem-save-attention and tandem-recompute (what the backward pass finds of attention),
tandem-no-projections (memory that is left keeps no projections), and tandem-plain, which runs the model's own forward
with checkpointing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from plot_update import GIB, draw, merged, ratios, slopes, summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What a system changes of the arguments.
VARIANTS: dict[str, dict[str, Any]] = {
    "tandem": {},
    "tandem-no-offload": {"offload": "off"},
    "tandem-recompute": {"attention": "recompute"},
    "tandem-save-attention": {"attention": "save"},
    "tandem-no-projections": {"projections": "recompute"},
}
SYSTEMS = (*VARIANTS, "tandem-plain", "trl", "trl-offload", "unsloth")
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "unsloth", "liger-kernel", "tandem-rl")
OFFLOAD = {"on": True, "off": False, "auto": None}
COLUMNS = (
    "seconds",
    "first_seconds",
    "repeats",
    "tokens_per_s",
    "peak_allocated_gib",
    "peak_reserved_gib",
    "device_used_gib",
    "host_gib",
    "gradient_norm",
    "error",
)
PROMPT, RANK = 64, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Loaded(NamedTuple):
    """A system ready to run: one update, what it trains, and the bytes of host memory that it has pinned by now."""

    step: Callable[[list[int]], None]
    parameters: list[Any]
    host_bytes: Callable[[], int | None]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser, arguments = parse(argv)
    if arguments.plot:
        try:
            print(replot(arguments.plot, arguments.out))
        except ValueError as error:
            parser.error(str(error))
    elif arguments.worker:
        work(arguments.worker, arguments)
    else:
        compare(arguments, argv)


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a checkpoint")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["tandem", "trl", "trl-offload", "unsloth"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--cap-gib", type=float, default=0.0, help="0: no cap")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--attention", choices=("auto", "save", "recompute"), default="auto", help="tandem")
    parser.add_argument("--projections", choices=("auto", "save", "recompute"), default="auto", help="tandem")
    parser.add_argument("--groups", type=int, default=None, help="tandem: attention by so many KV-head groups")
    parser.add_argument("--tile-rows", type=int, default=4096, help="tandem: rows that pass the MLP at a time")
    parser.add_argument("--offload", choices=tuple(OFFLOAD), default="auto", help="tandem: layer inputs in host memory")
    parser.add_argument("--label", help="stored with every row, to tell runs apart that are drawn together")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results; with --plot that of the file)")
    parser.add_argument("--timeout", type=float, default=500.0, help="seconds for one system")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="FILE.json", help="draw these results, measure nothing")
    parser.add_argument("--worker", choices=(*SYSTEMS, "device"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.plot and arguments.model is None and arguments.worker != "device":
        parser.error("the folder of a checkpoint is needed, or --plot with stored results")
    if arguments.repeats < 1 or min(arguments.lengths) <= PROMPT + 1:
        parser.error(f"--repeats must be at least 1 and every length more than {PROMPT + 1}")
    # Up to the first length that does not fit, so that a longer one is not tried after it.
    arguments.lengths = sorted(set(arguments.lengths))
    return parser, arguments


def compare(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Run the systems one after the other; whatever is measured is stored at once."""
    # Asked in another process, since one that has touched the device keeps some of its memory.
    said = dict(line.split(" ", 1) for line in lines_of("device", ["--worker", "device"], 120) if " " in line)
    if "DEVICE" not in said:
        raise SystemExit(f"no CUDA device to measure on:\n{json.loads(said.get('FAILED', 'null'))}")
    result = header("update.py", "update", argv, json.loads(said["DEVICE"]))
    result |= {"commands": [], "rows": [], "slopes": [], "ratios": []}
    target = result_path(arguments.out or RESULTS, result)
    for system in arguments.systems:
        result["commands"].append(command_line("update.py", [*argv, "--worker", system]))
        for one in run_worker(system, arguments, argv):
            print(json.dumps(one), flush=True)
            result["rows"].append(one)
            rows = result["rows"]
            store(target, result | {"slopes": slopes(rows), "ratios": ratios(rows)})
    result |= {"slopes": slopes(result["rows"]), "ratios": ratios(result["rows"])}
    print("\n".join(summary(result)))
    print(target)
    picture = target.with_suffix(".png")
    try:
        draw(result, picture)
    except ImportError as error:
        print(f"no plot ({error}); python benchmarks/update.py --plot {target.name} draws it where matplotlib is")
    else:
        print(picture)


def replot(paths: list[Path], out: Path | None) -> Path:
    """Draw stored results; the picture of several files bears the first one's name and how many others are in it."""
    more = f"-and-{len(paths) - 1}-more" if len(paths) > 1 else ""
    target = (out or paths[0].parent) / f"{paths[0].stem}{more}.png"
    draw(merged(paths), target)
    return target


def run_worker(system: str, arguments: argparse.Namespace, argv: list[str]) -> Iterator[dict[str, Any]]:
    """The rows that a system's process prints, as it prints them; what went wrong with it is a row of its own."""
    lengths, begun, failure = set(), None, None
    for line in lines_of(system, [*argv, "--worker", system], arguments.timeout):
        kind, _, rest = line.partition(" ")
        if kind == "ROW":
            one = json.loads(rest)
            lengths.add(one["length"])
            yield one
        elif kind == "BEGIN":
            begun = int(rest)
        elif kind == "FAILED":
            failure = json.loads(rest)
    if failure is not None:
        yield row(system, arguments, None if begun in lengths else begun, error=failure)


def lines_of(
    system: str,
    arguments: list[str],
    timeout: float,
    *,
    script: str | None = None,
    settings: dict[str, str] | None = None,
) -> Iterator[str]:
    """Output of a script in a process of its own, line by line, and a line FAILED with the reason if it fails.

    Output goes through files, not pipes: a grandchild that outlives a stopped process would hold a pipe open.

    Args:
        script: None: this one. settings: environment variables; None: those of an update, whose segments can grow.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "WANDB_MODE": "disabled"}
    environment |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if settings is None else settings
    command = worker_command(arguments) if script is None else [sys.executable, script, *arguments]
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        with stdout.open("w") as out, stderr.open("w") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        try:
            with stdout.open(encoding="utf-8", errors="replace") as file:
                rest, ended, stopped = "", False, False
                while not ended:
                    # Asked before reading: what is there by the end is then read, too.
                    ended = process.poll() is not None
                    *whole, rest = (rest + file.read()).split("\n")
                    yield from whole
                    if not ended and time.monotonic() > deadline:
                        process.kill()
                        process.wait()
                        stopped = True
                    elif not ended:
                        time.sleep(0.1)
            if stopped:
                yield f"FAILED {json.dumps(f'stopped after {timeout:.0f} s')}"
            elif process.returncode:
                said = stderr.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
                yield f"FAILED {json.dumps(said or f'{system} ended with code {process.returncode}')}"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def worker_command(arguments: list[str]) -> list[str]:
    return [sys.executable, __file__, *arguments]


def row(system: str, arguments: argparse.Namespace, length: int | None, **values: Any) -> dict[str, Any]:
    known = {"system": system, "label": arguments.label, "model": Path(arguments.model).name, "length": length}
    return known | {"cap_gib": arguments.cap_gib or None} | dict.fromkeys(COLUMNS) | values


def work(system: str, arguments: argparse.Namespace) -> None:
    """Load a system and run its lengths until one does not fit."""
    if system == "device":
        print("DEVICE", json.dumps(device_facts()))
        return
    if system == "unsloth":
        import unsloth  # noqa: F401  # must come before transformers
    import torch

    if arguments.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.cap_gib * GIB / total)
    loaded = (tandem if system.startswith("tandem") else peer)(system, arguments)
    for length in arguments.lengths:
        # Libraries print without a line's end, too.
        print(f"\nBEGIN {length}", flush=True)
        ids = torch.randint(10, 150_000, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        try:
            values = measure(loaded, ids, arguments.repeats)
        except torch.OutOfMemoryError as error:
            values = {"error": f"out of memory: {str(error)[:160]}"}
        print("\nROW " + json.dumps(row(system, arguments, length, **values)), flush=True)
        if values["error"]:
            break
        gc.collect()
        torch.cuda.empty_cache()


def measure(loaded: Loaded, ids: list[int], repeats: int) -> dict[str, Any]:
    import torch

    seconds = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        for p in loaded.parameters:
            p.grad = None
        torch.cuda.synchronize()
        started = time.perf_counter()
        loaded.step(ids)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    free, total = torch.cuda.mem_get_info()
    norm = sum(float(p.grad.float().norm()) ** 2 for p in loaded.parameters if p.grad is not None) ** 0.5
    host = loaded.host_bytes()
    return {
        "seconds": round(min(seconds), 4),
        "first_seconds": round(seconds[0], 4),
        "repeats": repeats,
        "tokens_per_s": round(len(ids) / min(seconds)),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "device_used_gib": round((total - free) / GIB, 3),
        "host_gib": None if host is None else round(host / GIB, 3),
        "gradient_norm": norm if math.isfinite(norm) else None,
        # A time without a gradient says nothing.
        "error": None if math.isfinite(norm) and norm > 0 else f"the gradient's norm is {norm}",
    }


def pinned_bytes() -> int | None:
    """Host memory that torch's own pinned allocator holds; None where this torch does not say."""
    import torch

    stats = getattr(torch.cuda, "host_memory_stats", None)
    if stats is None:
        return None
    return max((value for name, value in stats().items() if name.endswith("_bytes.current")), default=0)


def tandem(system: str, arguments: argparse.Namespace) -> Loaded:
    """Ours: through the fused layers, or as `tandem-plain` through the model's own forward with checkpointing."""
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
    host_bytes: Callable[[], int | None] = pinned_bytes
    if system in VARIANTS:
        from tandem.rl.fused_layer import FusedLayers, LayerPlan

        options = vars(arguments) | VARIANTS[system]
        sizes = options["tile_rows"], options["groups"], options["attention"], options["projections"]
        plan = LayerPlan(*sizes, split_adapters=True)  # as in RL
        fused = FusedLayers(plan, offload=OFFLOAD[options["offload"]]).attach(lm)
        host_bytes = lambda: fused.host_bytes  # noqa: E731
    else:
        lm.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    head = with_sampling(lm.head, temperature=1.0, top_k=0, top_p=1.0, chunk_size=1024)
    algorithm = AlgorithmConfig(loss_type="grpo", rollout_correction="none")

    def step(ids: list[int]) -> None:
        answer = ids[PROMPT:]
        sequences = [Sequence(ids[:PROMPT], answer, [True] * len(answer))]
        batch = PolicyBatch(sequences, [0.7], [[0.0] * len(answer)])
        packs = pack(sequences, len(ids))
        meter = Meter()
        policy_backward(lm, packs, batch, algorithm, head, meter, max_completion_length=len(answer))
        meter.result()  # a trainer's step logs, and so do the peers'

    return Loaded(step, [p for _, p in trainable(lm)], host_bytes)


def peer(system: str, arguments: argparse.Namespace) -> Loaded:
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
    trainer: Any = GRPOTrainer(
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

    return Loaded(step, [p for p in trainer.model.parameters() if p.requires_grad], pinned_bytes)


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


def device_facts() -> dict[str, Any]:
    """Name, driver and memory of the device."""
    import torch

    driver = None
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
        driver = done.stdout.strip() or done.stderr.strip() or None
    total = torch.cuda.get_device_properties(0).total_memory
    return {"device": torch.cuda.get_device_name(0), "driver": driver, "total_gib": round(total / GIB, 2)}


def header(script: str, bench: str, argv: list[str], device: dict[str, Any]) -> dict[str, Any]:
    """What every result says about its run: benchmark, device, versions, date, command."""
    versions: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    date = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
    return {"bench": bench, **device, "date": date, "versions": versions, "command": command_line(script, argv)}


def command_line(script: str, argv: list[str]) -> str:
    """As it would be typed; where the result was put does not belong to it."""
    kept = [word for i, word in enumerate(argv) if word != "--out" and (i == 0 or argv[i - 1] != "--out")]
    return " ".join(["python", f"benchmarks/{script}", *kept])


def added_to(into: Path | None, result: dict[str, Any], script: str, argv: list[str]) -> dict[str, Any]:
    """The result in the file that is to be added to, with this command, too; `result` where there is none."""
    if into is None or not into.exists():
        return result
    found: dict[str, Any] = json.loads(into.read_text(encoding="utf-8"))
    found.setdefault("more_commands", []).append(command_line(script, argv))
    return found


def result_path(folder: Path, result: dict[str, Any]) -> Path:
    """FOLDER/BENCH-DEVICE-DATE.json, DEVICE being what is left of the name without maker, memory and form."""
    words = result["device"].replace("-", " ").split()
    kept = [w for w in words if w not in ("NVIDIA", "GeForce", "PCIe") and not w.startswith(("HBM", "SXM"))]
    name = "-".join(w for w in kept if not w.endswith("GB")).lower()
    date = datetime.datetime.fromisoformat(result["date"])
    target = folder / f"{result['bench']}-{name}-{date:%Y-%m-%d-%H%M}.json"
    # A second run within a minute must not take the first one's place.
    return target.with_stem(f"{target.stem}{date:%S}") if target.exists() else target


def store(target: Path, result: dict[str, Any]) -> None:
    """Written beside and renamed, so that a run that is cut off leaves a whole file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    beside.replace(target)


if __name__ == "__main__":
    main()
