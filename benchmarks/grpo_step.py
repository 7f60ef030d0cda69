"""Whole GRPO steps, rollout and update: Tandem, TRL with vLLM in its process, and Unsloth with vLLM, side by side.

    python benchmarks/random_checkpoint.py qwen3-8b /tmp/qwen3-8b --dtype bf16
    python benchmarks/grpo_step.py --model /tmp/qwen3-8b --prompts 8 --generations 8 --completion-tokens 4096
    python benchmarks/grpo_step.py --model /tmp/qwen3-8b --cap 24 --longest 65536

Every system runs in a process of its own, with the same prompts, rank 32 on all seven projections, a base in 4 bits
(-bf16: in bfloat16), and completions that only end at their full length, so that all sample equally many tokens. A step
is what its trainer does between two logs; `parts` are seconds where the system can be asked for them, and sum to
`seconds`. A step with short completions (`--warmup-tokens`), in which everything is compiled, comes first and counts as
a part of the start; the summary takes medians of the steps after it. `--cap` is held back by another process (see
device_watch.py), and `device_gib` is the peak of all that a system used of the device, its context included.
`allocated_gib` and `reserved_gib` are PyTorch's own peaks, in which vLLM's pool counts also while it sleeps; Tandem,
which resets them by phase, says its phases' peaks itself, without the pool while it sleeps.

With `--together` all systems start and warm up at once, which takes the time of one, and then measure in turn while the
others wait; what is in use on the device is then everybody's, and is not reported. `--into FILE` adds to a result that
is there.

By the sources of TRL 1.15 and vLLM 0.24, sleep mode discards vLLM's weights and TRL hands over new ones, but not the
scales of 4-bit weights: `trl` would then sample from another policy than it trains, which `logp_difference` (mean of
|engine - trainer|, nats) shows. trl-awake does without sleep mode.

With `--beside` other processes may use the device meanwhile: `device_gib` is then what the driver says of the system's
own process, and seconds say at most how long it takes. `--cap` holds nothing back then: Tandem chooses its sizes as it
would on a card of so much memory, and a step that takes more of the device has failed.

`--longest` instead takes one prompt of LENGTH - 2048 tokens with two completions of 2048 tokens each, with Tandem, up
to the first length that fails. Without a CUDA device, tandem and trl generate through transformers, which tries the
benchmark out. Writes `benchmarks/results/grpo-step-DEVICE-DATE.json`, anew after every step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from device_watch import DeviceWatch, OwnMemory
from turns import Ahead, Turn
from update import GIB, RANK, RESULTS, TARGETS, added_to, device_facts, header, lines_of, result_path, store

SYSTEMS = ("tandem", "tandem-int4", "tandem-fp8", "tandem-bf16", "trl", "trl-awake", "trl-bf16", "unsloth")
# PyTorch's allocator is left as a user has it, for Tandem as its command sets it; what PYTORCH_CUDA_ALLOC_CONF says for
# the others is stored with the result.
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
COLUMNS = ("step", "seconds", "parts", "tokens", "tokens_per_s", "logged", "error")
MEMORY = ("allocated_gib", "reserved_gib", "device_gib")
LONG_COMPLETION = 2048
_own_memory: OwnMemory | None = None
_LOGGED = (
    "loss",
    "grad_norm",
    "reward",
    "entropy",
    "completions/",
    "parity/",
    "sampling/",
    "step_time",
    "perf/",
    "memory/",
)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if arguments.worker == "device":
        print("\nDEVICE " + json.dumps(facts()))
    elif arguments.worker:
        work(arguments.worker, arguments)
    else:
        compare(arguments, argv)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint with its tokenizer")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["tandem", "trl", "unsloth"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--completion-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=2, help="measured steps")
    parser.add_argument(
        "--warmup-tokens", type=int, default=128, help="completions of the step before; 0: no such step"
    )
    parser.add_argument("--cap", type=float, default=0.0, metavar="GIB", help="memory of the device; 0: all of it")
    parser.add_argument("--longest", type=int, nargs="+", metavar="LENGTH", help="one step of tandem at each length")
    parser.add_argument(
        "--micro-batch", type=int, default=4, help="trl: completions in a forward pass (unsloth: a group)"
    )
    parser.add_argument("--vllm-share", type=float, help="trl (0.6), unsloth (0.9): share of the cap for vLLM")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="tandem: overrides of its config")
    parser.add_argument("--label", help="stored with every row")
    parser.add_argument("--timeout", type=float, default=560.0, help="seconds for one system")
    parser.add_argument("--together", action="store_true", help="start all systems at once, measure in turn")
    parser.add_argument("--gate", type=Path, help="with --together: measure once this file exists")
    parser.add_argument("--beside", action="store_true", help="others use the device, too: watch the own process")
    parser.add_argument("--into", type=Path, metavar="FILE.json", help="add to this result")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results)")
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=(*SYSTEMS, "device"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if min(arguments.prompts, arguments.steps, arguments.prompt_tokens, arguments.completion_tokens) < 1:
        parser.error("--prompts, --steps, --prompt-tokens and --completion-tokens must be at least 1")
    if arguments.generations < 2:
        parser.error("--generations must be at least 2: a group of one has no advantage")
    if arguments.longest and min(arguments.longest) <= LONG_COMPLETION:
        parser.error(f"every length of --longest must be more than the {LONG_COMPLETION} tokens that are sampled")
    if arguments.longest and arguments.together:
        parser.error("--longest is for one system: leave --together out")
    if arguments.cap and arguments.together:
        parser.error("--cap holds back the rest of the device from all others: leave --together out")
    if arguments.longest and not arguments.systems[0].startswith("tandem"):
        parser.error(f"--longest is for tandem, not for {arguments.systems[0]}")
    arguments.warmup_tokens = min(arguments.warmup_tokens, arguments.completion_tokens)
    completions = arguments.prompts * arguments.generations
    arguments.micro_batch = max(n for n in range(1, arguments.micro_batch + 1) if completions % n == 0)
    return arguments


def compare(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Run the systems one after the other; whatever is measured is stored at once."""
    device = next((json.loads(rest) for kind, rest in said("device", argv, 120) if kind == "DEVICE"), None)
    if device is None:
        raise SystemExit("the device cannot be asked: try python -c 'import torch; torch.cuda.init()'")
    result = header("grpo_step.py", "grpo-step", argv, device)
    result |= {"allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), "notes": {}, "rows": []}
    target = arguments.into or result_path(arguments.out or RESULTS, result)
    on_gpu, shared = device["total_gib"] is not None, arguments.together or arguments.beside
    with (
        tempfile.TemporaryDirectory() as folder,
        DeviceWatch(arguments.cap) if on_gpu and not shared else nullcontext() as watch,
    ):
        ahead = {}
        if arguments.together:
            for system in arguments.systems:
                place = Path(folder) / system
                lines = said(system, [*argv, "--turn", str(place)], arguments.timeout)
                ahead[system] = Ahead(lines, Turn(place))
            for process in ahead.values():
                process.wait_until_ready()
            print("all are ready", flush=True)
        while arguments.gate and ahead and not arguments.gate.exists():
            time.sleep(0.2)
        result = added_to(arguments.into, result, "grpo_step.py", argv)  # it may be written to until now
        for system, shape in jobs(arguments, argv):
            name = f"{system} {shape[-1]}" if arguments.longest else system
            failed = False
            if watch is not None:
                watch.peak_gib()
            lines = ahead[system].said() if ahead else said(system, [*argv, *shape], arguments.timeout)
            notes = result["notes"].setdefault(name, [])
            for one in rows_of(system, parse([*argv, *shape]), lines, watch, notes):
                print(json.dumps({k: v for k, v in one.items() if v is not None}), flush=True)
                result["rows"].append(one)
                store(target, result | {"summary": summary(result["rows"])})
                failed = failed or one["error"] is not None
            if arguments.longest and failed:
                break
    for line in summary(result["rows"]):
        print(json.dumps(line))
    print(target)


def jobs(arguments: argparse.Namespace, argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The systems with what is changed of the arguments: the last value of an option counts."""
    if not arguments.longest:
        yield from ((system, []) for system in arguments.systems)
        return
    for length in sorted(set(arguments.longest)):
        shape = ["--prompts", "1", "--generations", "2", "--completion-tokens", str(LONG_COMPLETION)]
        shape += ["--steps", str(arguments.steps if any(a.startswith("--steps") for a in argv) else 1)]
        shape += ["--warmup-tokens", "0"]
        yield arguments.systems[0], [*shape, "--prompt-tokens", str(length - LONG_COMPLETION)]


def rows_of(
    system: str,
    arguments: argparse.Namespace,
    lines: Iterator[tuple[str, str]],
    watch: DeviceWatch | None,
    notes: list[str],
) -> Iterator[dict[str, Any]]:
    """A row of each step as it ends, and one for what went wrong; before the first, one of the start."""
    error = None
    for kind, rest in lines:
        if kind in ("ROW", "START"):
            values = json.loads(rest)
            if watch is not None:
                values["device_gib"] = watch.peak_gib()
            elif arguments.cap and (taken := values.get("device_gib") or 0.0) > arguments.cap:
                values["error"] = f"{taken} GiB of the device, more than the cap of {arguments.cap:g}"
            yield row(system, arguments, **values)
        elif kind == "NOTE":
            notes.append(json.loads(rest))
        elif kind == "ERROR" or (kind == "FAILED" and error is None):
            error = json.loads(rest)
    if error is not None:
        peak = None if watch is None else watch.peak_gib()
        yield row(system, arguments, error=error, device_gib=peak)


def said(worker: str, argv: list[str], timeout: float) -> Iterator[tuple[str, str]]:
    """The lines of a worker, by their first word."""
    settings = (tandem_settings() if worker.startswith("tandem") else SETTINGS) | port_of_its_own()
    if worker == "unsloth":
        settings["UNSLOTH_VLLM_STANDBY"] = "1"
    for line in lines_of(worker, [*argv, "--worker", worker], timeout, script=__file__, settings=settings):
        kind, _, rest = line.partition(" ")
        if kind in ("DEVICE", "START", "ROW", "NOTE", "ERROR", "FAILED"):
            yield kind, rest


def tandem_settings() -> dict[str, str]:
    """Environment variables that Tandem's command sets for itself."""
    from tandem.rl.allocator import growing_segments

    return SETTINGS | growing_segments()


def port_of_its_own() -> dict[str, str]:
    """For a system that makes a process group, of one process: those that start at once would take the same port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def row(system: str, arguments: argparse.Namespace, **values: Any) -> dict[str, Any]:
    known = {
        "system": system,
        "label": arguments.label,
        "model": arguments.model.name,
        "cap_gib": arguments.cap or None,
    }
    shape = {
        name: getattr(arguments, name) for name in ("prompts", "generations", "prompt_tokens", "completion_tokens")
    }
    context = arguments.prompt_tokens + arguments.completion_tokens
    return known | shape | {"context": context} | dict.fromkeys((*COLUMNS, *MEMORY)) | values


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each system and shape: medians over its steps."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault((one["system"], one["context"], one["cap_gib"], one["label"]), []).append(one)
    found = []
    for (system, context, cap, label), group in groups.items():
        steps = [one for one in group if one["step"]]
        names = list(dict.fromkeys(name for one in steps for name in one["parts"]))
        parts = {name: statistics.median(one["parts"].get(name, 0.0) for one in steps) for name in names}
        rates = [one["tokens_per_s"] for one in steps if one["tokens_per_s"] is not None]
        peaks = [one["device_gib"] for one in group if one["device_gib"] is not None]
        apart = [one["logged"].get("sampling/sampling_logp_difference/mean") for one in steps]
        found.append(
            {
                "system": system, "context": context, "cap_gib": cap, "label": label, "steps": len(steps),
                "seconds": statistics.median(one["seconds"] for one in steps) if steps else None,
                "tokens_per_s": statistics.median(rates) if rates else None,
                "parts": {name: round(seconds, 3) for name, seconds in parts.items()},
                "device_gib": max(peaks, default=None),
                "logp_difference": max((value for value in apart if value is not None), default=None),
                "error": next((one["error"] for one in group if one["error"]), None),
            }
        )  # fmt: skip
    return found


# --- in a system's process --------------------------------------------------------------------------------------------


def work(system: str, arguments: argparse.Namespace) -> None:
    global _own_memory
    started = time.perf_counter()
    try:
        if arguments.beside and facts()["total_gib"] is not None:
            _own_memory = OwnMemory()
        {"tandem": tandem, "trl": trl, "unsloth": unsloth}[system.partition("-")[0]](system, arguments, started)
    except Exception as error:  # noqa: BLE001  # whatever it was belongs into the result
        report_error(error)


def report_error(error: Exception) -> None:
    """Hand an error over with the last places it came through, and end the process."""
    traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    say("ERROR", f"{type(error).__name__}: {str(error)[:1500]} (in {where})")
    raise SystemExit(1) from error


def say(kind: str, value: Any) -> None:
    """A line for the process that compares. Libraries print without a line's end, too."""
    print(f"\n{kind} {json.dumps(value)}", flush=True)


def say_start(arguments: argparse.Namespace, started: float) -> None:
    """A system is ready to be measured; returns when it may go on."""
    say("START", {"step": 0, "seconds": round(time.perf_counter() - started, 2)} | own_peaks())
    if arguments.turn:
        Turn(arguments.turn).wait()


class StepLines:
    """Says a row of each step. Tokens are those that the trainer counted itself: a system that changes the batch that
    it was given is found out.

    Args:
        warmed_up: called after the first step, which then is none of those that are measured.
    """

    def __init__(self, arguments: argparse.Namespace, warmed_up: Callable[[], None] | None = None) -> None:
        self._arguments, self._before, self._warmed_up = arguments, 0.0, warmed_up
        self._unmeasured = int(warmed_up is not None)

    def __call__(self, step: int, parts: dict[str, float], logged: dict[str, Any]) -> None:
        step -= self._unmeasured
        if step == 0 and self._warmed_up is not None:
            self._before = logged.get("num_tokens") or 0.0
            self._warmed_up()
            return
        asked = self._arguments
        seconds, sequences = sum(parts.values()), asked.prompts * asked.generations
        length, total = logged.get("completions/mean_length"), logged.get("num_tokens")
        tokens = None if total is None else round(total - self._before)
        self._before = total or 0.0
        expected = sequences * (asked.prompt_tokens + asked.completion_tokens)
        if tokens not in (None, expected):
            say("NOTE", f"step {step} had {tokens} tokens of prompts and completions, not {expected}")
        values = {
            "step": step,
            "seconds": round(seconds, 4),
            "parts": {name: round(value, 4) for name, value in parts.items()},
            "tokens": tokens,
            "tokens_per_s": None if length is None else round(length * sequences / seconds, 1),
            "logged": {name: value for name, value in logged.items() if name.startswith(_LOGGED) and is_number(value)},
        }
        say("ROW", values | own_peaks() | phase_peaks(logged))


def phase_peaks(logged: dict[str, Any]) -> dict[str, float]:
    """The highest of what Tandem logs of its phases; nothing of another trainer's log."""
    kinds = {"allocated_gib": "memory/peak_allocated/", "reserved_gib": "memory/reserved/"}
    found = {
        kind: [value for name, value in logged.items() if name.startswith(prefix)] for kind, prefix in kinds.items()
    }
    return {kind: round(max(values), 3) for kind, values in found.items() if values}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")


def own_peaks() -> dict[str, float]:
    """Peaks since the last call, in GiB: PyTorch's, and the process's where it is watched; nothing without a device."""
    import torch

    if not torch.cuda.is_available():
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    found = {"allocated_gib": round(allocated / GIB, 3), "reserved_gib": round(reserved / GIB, 3)}
    return found | ({"device_gib": _own_memory.peak_gib()} if _own_memory else {})


def questions(model: str, count: int, tokens: int) -> list[dict[str, str]]:
    """`count` prompts of random words, each of `tokens` tokens of the model's tokenizer, as rows of a data set.

    Only words that are one token behind a blank are used. A token that the tokenizer adds itself is one of `tokens`.

    Raises:
        ValueError: the tokenizer has no such words, or joins them to something else.
    """
    import random

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    draw = random.Random(0)
    ids = list(range(len(tokenizer)))
    draw.shuffle(ids)
    special = set(tokenizer.all_special_ids)
    words: list[str] = []
    for i in ids:
        word = tokenizer.decode([i]).strip()
        alone = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if i not in special and word.isascii() and word.isalnum() and alone == [i]:
            words.append(word)
        if len(words) == 4096:
            break
    if len(words) < 2:
        raise ValueError(f"the tokenizer of {model} has {len(words)} words of one token, too few to make prompts of")
    added = len(tokenizer(f" {words[0]}")["input_ids"]) - 1
    rows = [{"prompt": "".join(f" {word}" for word in draw.choices(words, k=tokens - added))} for _ in range(count)]
    for one in rows:
        found = len(tokenizer(one["prompt"])["input_ids"])
        if found != tokens:
            raise ValueError(f"a prompt of {tokens} tokens came out with {found}; this tokenizer joins words")
    return rows


def alternating(completions: list[Any], **columns: Any) -> list[float]:
    """A reward with a spread in every group, for a model that cannot earn one."""
    return [float(i % 2) for i in range(len(completions))]


def tandem(system: str, arguments: argparse.Namespace, started: float) -> None:
    from tandem.rl.console import Console
    from tandem.rl.trackers import NoTrackers

    class Notes(Console):
        def note(self, text: str) -> None:
            say("NOTE", text)

        def warn(self, text: str) -> None:
            say("NOTE", f"warning: {text}")

    class Rows(NoTrackers):
        def log(self, step: int, metrics: Any) -> None:
            parts = {name[5:]: value for name, value in metrics.items() if name.startswith("time/")}
            say_step(step, parts, dict(metrics))

    say_step = StepLines(arguments)
    with tempfile.TemporaryDirectory() as folder:
        card = arguments.cap if arguments.beside and arguments.cap else None
        run = FullLengthRun(tandem_config(system, arguments, folder), arguments.set, Notes(live=False), card_gib=card)
        if arguments.warmup_tokens:
            shorter = {"max_completion_length": arguments.warmup_tokens}
            warmup = changed(run.config, run_name="warm-up", train={"max_steps": 1}, rollout=shorter)
            run.trainer(warmup, NoTrackers()).fit()
        say_start(arguments, started)
        run.trainer(run.config, Rows()).fit()
        run.engine.close()


class FullLengthRun:
    """The run that `rl-train run` makes of a config; only the tokens that end a completion are left out.

    Args:
        card_gib: choose sizes as on a card of so much memory; None: as on the one that is here.
    """

    def __init__(
        self, settings: dict[str, Any], overrides: list[str], console: Any, *, card_gib: float | None = None
    ) -> None:
        import torch
        import yaml

        from tandem.rl.config_file import load_config
        from tandem.rl.inputs import prepare
        from tandem.rl.open_model import open_model

        path = Path(settings["output_dir"]) / "step.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        config = load_config(path, overrides)
        self.console, self.inputs = console, prepare(config, console)
        if card_gib is not None:
            config = sized_for(card_gib, config, self.inputs)
        torch.manual_seed(config.seed)
        self.lm, self.engine, _, self.config = open_model(config, self.inputs, console)

    def trainer(self, config: Any, trackers: Any) -> Any:
        """One that starts at step 0, with the adapter as it is by now."""
        from tandem.rl.checkpoint import State
        from tandem.rl.lora import trainable
        from tandem.rl.optim import make_optimizer
        from tandem.rl.rollout_journal import Mark, RolloutJournal, source_of
        from tandem.rl.stopping import Stopping
        from tandem.rl.trainer import Trainer

        config.run_dir.mkdir(parents=True)
        return Trainer(
            config,
            config.run_dir,
            lm=self.lm,
            engine=self.engine,
            data=self.inputs.data,
            judge=self.inputs.judge,
            stop_token_ids=(),
            optimizer=make_optimizer(trainable(self.lm), config.optim),
            state=State(),
            trackers=trackers,
            console=self.console,
            stopping=Stopping(),
            objective=self.inputs.objective,
            journal=RolloutJournal(config.run_dir, Mark(0, 0), source=source_of(config), note=self.console.note),
        )


def sized_for(card_gib: float, config: Any, inputs: Any) -> Any:
    """A config with what a run chooses on a card of this size; what a run fits to the memory that it finds is off."""
    import psutil

    from tandem.rl import open_model, plan
    from tandem.rl.console import Console
    from tandem.rl.plan_devices import find_device

    if config.train.projection_memory == "auto":
        config = plan.changed(config, {"train": {"projection_memory": "recompute"}})
    card = find_device(str(card_gib), host_gib=psutil.virtual_memory().available / GIB)
    return open_model.sized(config, config.rollout.engine, inputs, Console.silent(), card)


def changed(config: Any, *, run_name: str, **sections: dict[str, Any]) -> Any:
    """A config with other values in some sections."""
    values = {name: getattr(config, name).model_copy(update=update) for name, update in sections.items()}
    return config.model_copy(update=values | {"run_name": run_name})


def tandem_config(system: str, arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    import torch

    on_gpu = torch.cuda.is_available()
    is_quantised(system, arguments.model)
    model: dict[str, Any] = {"model_name_or_path": str(arguments.model.resolve())}
    if on_gpu and system == "tandem-fp8":
        model |= {"load_in_8bit": True}
    elif on_gpu and system != "tandem-bf16":
        model |= {"load_in_4bit": True, "weight_format": "int4" if system == "tandem-int4" else "nf4"}
    rows = {"model": model["model_name_or_path"], "tokens": arguments.prompt_tokens}
    return {
        "run_name": "step",
        "output_dir": folder,
        "model": model,
        "lora": {"r": RANK, "lora_alpha": RANK, "target_modules": TARGETS},
        "data": {
            "dataset_name": f"{Path(__file__).resolve()}:questions",
            "dataset_kwargs": rows | {"count": arguments.prompts * arguments.steps},
            "shuffle_dataset": False,
        },
        "rollout": {
            "engine": "vllm" if on_gpu else "transformers",
            "num_generations": arguments.generations,
            "max_completion_length": arguments.completion_tokens,
            "enforce_eager": False,  # one step stands for many
            "torch_compile": True,
        },
        "rewards": {"reward_funcs": [f"{Path(__file__).resolve()}:alternating"]},
        "train": {
            "max_steps": arguments.steps,
            "generation_batch_size": arguments.prompts * arguments.generations,
        },
        "optim": {"learning_rate": 1e-6},
        "parity": {"action": "warn"},
        "checkpoint": {"save_steps": 0},
    }


def is_quantised(system: str, model: Path) -> bool:
    """Whether the checkpoint has 4-bit weights.

    Raises:
        ValueError: it has, and the system is to run in bfloat16.
    """
    quantised = "quantization_config" in json.loads((model / "config.json").read_text(encoding="utf-8"))
    if quantised and system.endswith("-bf16"):
        raise ValueError(f"{model} is quantised, and {system} needs a bfloat16 checkpoint")
    return quantised


def steps_of_peer(arguments: argparse.Namespace) -> int:
    return arguments.steps + (1 if arguments.warmup_tokens else 0)


def set_length(trainer: Any, tokens: int) -> None:
    """TRL's trainer, or what Unsloth made of it, samples completions of so many tokens from now on."""
    trainer.max_completion_length = tokens
    if (vllm := getattr(trainer, "vllm_generation", None)) is not None:
        vllm.max_completion_length = tokens
    if (transformers := getattr(trainer, "generation_config", None)) is not None:
        transformers.max_new_tokens = transformers.min_new_tokens = tokens
    if (sampling := getattr(trainer.args, "vllm_sampling_params", None)) is not None:
        sampling.max_tokens = tokens


def run_peer(trainer: Any, arguments: argparse.Namespace, started: float, clock: Any) -> None:
    """The step with short completions, where there is one, and those that are measured."""
    from trl_steps import StepRows

    def warmed_up() -> None:
        set_length(trainer, arguments.completion_tokens)
        say_start(arguments, started)

    if arguments.warmup_tokens:
        set_length(trainer, arguments.warmup_tokens)
    else:
        say_start(arguments, started)
    lines = StepLines(arguments, warmed_up if arguments.warmup_tokens else None)
    trainer.add_callback(StepRows(clock, lines))
    trainer.train()


def shared_settings(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What TRL's config and Unsloth's have in common: the algorithm and the batch."""
    import torch

    return {
        "output_dir": folder,
        "per_device_train_batch_size": arguments.micro_batch,
        "gradient_accumulation_steps": arguments.prompts * arguments.generations // arguments.micro_batch,
        "num_generations": arguments.generations,
        "max_completion_length": arguments.completion_tokens,
        "max_steps": steps_of_peer(arguments),
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "temperature": 1.0,
        "loss_type": "dapo",
        "beta": 0.0,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": torch.cuda.is_available(),
    }


def vllm_share(arguments: argparse.Namespace, default: float) -> float:
    """vLLM's `gpu_memory_utilization`, which counts the whole device."""
    import torch

    _, total = torch.cuda.mem_get_info()
    room = arguments.cap * GIB if arguments.cap else torch.cuda.mem_get_info()[0]
    share = round((arguments.vllm_share or default) * room / total, 4)
    say("NOTE", f"gpu_memory_utilization={share}: {share * total / GIB:.1f} GiB")
    return share


def trl(system: str, arguments: argparse.Namespace, started: float) -> None:
    """As TRL's guide has it: QLoRA by `quantization_config` and `peft_config`, vLLM in the process with sleep mode."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, BitsAndBytesConfig
    from trl import GRPOConfig
    from trl_steps import TimedTrainer

    from tandem.rl.step_time import StepClock

    on_gpu = torch.cuda.is_available()
    quantised = is_quantised(system, arguments.model)
    quantization = None
    if on_gpu and system != "trl-bf16" and not quantised:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    length = arguments.prompt_tokens + arguments.completion_tokens
    own: dict[str, Any] = {"generation_kwargs": {"min_new_tokens": arguments.completion_tokens}, "use_cpu": True}
    if on_gpu:
        own = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_enable_sleep_mode": system != "trl-awake",
            "vllm_gpu_memory_utilization": vllm_share(arguments, 0.6),
            "vllm_max_model_length": -(-length // 128) * 128,
            "vllm_importance_sampling_mode": "token_truncate",
            "generation_kwargs": {"ignore_eos": True},
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
    init = {
        "dtype": "bfloat16" if on_gpu else "float32",
        "attn_implementation": "sdpa",
        "device_map": {"": 0} if on_gpu else None,
    }
    clock = StepClock(torch.cuda.synchronize if on_gpu else None)
    rows = questions(str(arguments.model), arguments.prompts * steps_of_peer(arguments), arguments.prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            model=str(arguments.model),
            args=GRPOConfig(**shared_settings(arguments, folder), **own, model_init_kwargs=init),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(arguments.model, padding_side="left"),
            reward_funcs=[alternating],
            quantization_config=quantization,
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM"),
            clock=clock,
        )
        run_peer(trainer, arguments, started, clock)


def unsloth(system: str, arguments: argparse.Namespace, started: float) -> None:
    """As Unsloth's notebooks have it, with its standby mode; whole steps only."""
    import unsloth  # noqa: F401, I001  # must come before trl and transformers
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from unsloth import FastLanguageModel
    from vllm import SamplingParams

    from tandem.rl.step_time import StepClock

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(arguments.model),
        max_seq_length=arguments.prompt_tokens + arguments.completion_tokens,
        load_in_4bit=True,
        fast_inference=True,
        max_lora_rank=RANK,
        gpu_memory_utilization=vllm_share(arguments, 0.9),
        dtype=torch.bfloat16,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        target_modules=TARGETS,
        lora_dropout=0,
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    # It wants whole groups in a forward pass, and would make the batch larger to have them.
    batch = {"per_device_train_batch_size": arguments.generations, "gradient_accumulation_steps": arguments.prompts}
    sampling = SamplingParams(
        temperature=1.0, top_p=1.0, top_k=-1, max_tokens=arguments.completion_tokens, ignore_eos=True
    )
    clock = StepClock(torch.cuda.synchronize)
    rows = questions(str(arguments.model), arguments.prompts * steps_of_peer(arguments), arguments.prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(**(shared_settings(arguments, folder) | batch), vllm_sampling_params=sampling),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            reward_funcs=[alternating],
        )
        run_peer(trainer, arguments, started, clock)


def facts() -> dict[str, Any]:
    """The CUDA device, or the processor where there is none."""
    import torch

    if torch.cuda.is_available():
        return device_facts()
    return {"device": f"CPU {platform.machine()}", "driver": None, "total_gib": None, "cores": os.cpu_count()}


if __name__ == "__main__":
    main()
