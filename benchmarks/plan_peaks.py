"""What the plan says a GRPO run will take, against what it then takes: ten configurations, two steps each.

    python benchmarks/plan_peaks.py                     # on a GPU; makes its checkpoints itself, random ones
    python benchmarks/plan_peaks.py --predict h200      # without one: the predictions alone
    python benchmarks/plan_peaks.py --again FILE.json   # what today's plan says of what was measured

Sizes, lengths, LoRA ranks and weight formats differ. Every configuration is a run of `rl-train run` in a process of its
own: rollouts through vLLM with completions of full length, the trial of the largest pack, the update, sleep and wake
between them. What it leaves open is chosen as in any run; the prediction is the plan's for the sizes that were chosen,
on this card, as `rl-train plan` shows it. Projections are not kept "where memory is left" (train.projection_memory:
auto), which would fill any card: a configuration keeps them all or none.

Compared are, for each phase:

- reserved: the plan's peak without context, libraries and CUDA graphs, against the most that PyTorch's allocator held;
- peak_allocated: the same without the plan's "allocator's reserve", against the most that tensors held.

vLLM's KV pool counts while it is awake, and not while it sleeps. Both are figures of one process, so several
configurations run at once (`--together`, as many as the card holds); their seconds say nothing then. What PyTorch does
not hold can only be seen on the whole device: with `--together 1`, and nothing else on it, what the device holds at a
phase's end is compared with the whole prediction, too (`device`). Host memory is what the pool of offloaded inputs has
pinned. Errors are (predicted - measured) / measured.

Without a CUDA device the configurations run with a tiny model and through transformers, and nothing is compared: that
tries this program out. Writes `benchmarks/results/plan-peaks-DEVICE-DATE.json`, anew after every configuration.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpo_step
from random_checkpoint import SHAPES
from update import GIB, RESULTS, added_to, header, lines_of, result_path, store

LIMIT = 10.0
# Of a card, what configurations may need together by their plans.
USED = 0.9
# A CPU gets this part of the tokens.
_CPU_SHARE = 64


@dataclass(frozen=True)
class Case:
    """A configuration.

    Attributes:
        stored: the checkpoint's own format. rank: of the adapter, on all seven projections.
        prompts, generations: of a step. prompt, completion: tokens. settings: more of the config.
    """

    shape: str
    stored: str
    format: str
    rank: int
    prompts: int
    generations: int
    prompt: int
    completion: int
    settings: tuple[str, ...] = ()
    context: int = 40960

    @property
    def name(self) -> str:
        batch = f"{self.prompts}x{self.generations}x({self.prompt}+{self.completion})"
        return " ".join((self.shape, self.format, f"rank {self.rank}", batch, *self.settings))


_EAGER, _GRAPHS = "rollout.enforce_eager=true", "rollout.enforce_eager=false"
_KEPT = "train.projection_memory=save"
_HOST = "train.offload_activations=true"
# Those that take longest to start come first.
CASES = (
    Case("qwen3-0.6b", "bf16", "nf4", 64, 2, 4, 3840, 256, (_GRAPHS, "rollout.cudagraph_sizes=[1,2,4,8]")),
    Case("qwen3-8b", "nf4", "nf4", 8, 1, 2, 32512, 256, (_EAGER, _HOST)),
    Case("qwen3-8b", "nf4", "nf4", 32, 4, 8, 512, 512, (_EAGER, "train.max_tokens=8192")),
    Case("qwen3-8b", "nf4", "nf4", 16, 2, 4, 7936, 256, (_EAGER, "optim.optim=adamw_8bit")),
    Case("qwen3-4b", "bf16", "bf16", 64, 1, 4, 3840, 256, (_EAGER,)),
    Case("qwen3-4b", "bf16", "int4", 32, 2, 4, 768, 256, (_EAGER, _KEPT)),
    Case("qwen3-4b", "bf16", "nf4", 16, 1, 2, 16128, 256, (_EAGER,)),
    Case("llama-3.2-1b", "bf16", "bf16", 32, 1, 4, 7936, 256, (_EAGER, _KEPT)),
    Case("llama-3.2-1b", "bf16", "int4", 16, 4, 4, 1792, 256, (_EAGER, "train.attention_memory=recompute")),
    # Whose passes are recorded, with what they keep.
    Case("qwen3-0.6b", "bf16", "bf16", 8, 4, 8, 768, 256, (_EAGER, _KEPT, "train.max_tokens=2048")),
)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if arguments.worker == "device":
        print("\nDEVICE " + json.dumps(grpo_step.facts()))
    elif arguments.worker:
        work(int(arguments.worker), arguments.model)
    elif arguments.predict:
        predict(arguments)
    elif arguments.again:
        predict_again(arguments.again, argv)
    else:
        compare(arguments, argv)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = range(len(CASES))
    parser.add_argument("--cases", type=int, nargs="+", choices=numbers, default=list(numbers), metavar="NUMBER")
    parser.add_argument("--together", type=int, default=10, help="configurations that run at once")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one configuration")
    parser.add_argument("--predict", metavar="CARD", help="print the predictions for a card, and run nothing")
    parser.add_argument("--again", type=Path, metavar="FILE.json", help="put today's predictions into this result")
    parser.add_argument("--checkpoints", type=Path, help="folder for the checkpoints, which stay (default: none does)")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results)")
    parser.add_argument("--into", type=Path, metavar="FILE.json", help="add to this result, in place of the same cases")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.together < 1:
        parser.error("--together must be at least 1")
    return arguments


def compare(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Run the configurations; whatever is measured is stored at once."""
    device = next((json.loads(rest) for kind, rest in said("device", None, 120) if kind == "DEVICE"), None)
    if device is None:
        raise SystemExit("the device cannot be asked: try python -c 'import torch; torch.cuda.init()'")
    on_gpu = device["total_gib"] is not None
    result = header("plan_peaks.py", "plan-peaks", argv, device) | {"together": arguments.together, "rows": []}
    target = arguments.into or result_path(arguments.out or RESULTS, result)
    result = added_to(arguments.into, result, "plan_peaks.py", argv)
    result["rows"] = [one for one in result["rows"] if one["case"] not in arguments.cases]
    with (
        tempfile.TemporaryDirectory() as scratch,
        ThreadPoolExecutor(len(CASES)) as makers,
        ThreadPoolExecutor(arguments.together) as runs,
    ):
        folders = checkpoints(arguments.cases, arguments.checkpoints or Path(scratch), makers, on_gpu=on_gpu)
        room = Room(USED * device["total_gib"] if on_gpu else float("inf"))
        needs = {number: needed(number, device["total_gib"]) if on_gpu else 0.0 for number in arguments.cases}
        asked = [
            runs.submit(run_case, number, folders[key(CASES[number], on_gpu=on_gpu)], arguments, room, needs[number])
            for number in arguments.cases
        ]
        for done in as_completed(asked):
            one = done.result()
            print(json.dumps({k: v for k, v in one.items() if k not in ("items", "notes")}), flush=True)
            result["rows"].append(one)
            store(target, result | {"summary": summary(result["rows"])})
    print_table(result["rows"])
    print(json.dumps(summary(result["rows"])))
    print(target)


class Room:
    """Device memory that is lent out; who needs more than all of it gets all."""

    def __init__(self, gib: float) -> None:
        self._all = self._free = gib
        self._changed = threading.Condition()

    @contextmanager
    def lent(self, gib: float) -> Iterator[None]:
        """Wait for `gib`, and have them."""
        gib = min(gib, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= gib)
            self._free -= gib
        try:
            yield
        finally:
            with self._changed:
                self._free += gib
                self._changed.notify_all()


def checkpoints(
    numbers: list[int], folder: Path, makers: ThreadPoolExecutor, *, on_gpu: bool
) -> dict[tuple[str, str, int], Path]:
    """Folders of random checkpoints, one for each shape and format; they are being made, all at the same time."""
    found = {}
    for number in numbers:
        shape, stored, context = one = key(CASES[number], on_gpu=on_gpu)
        if one not in found:
            found[one] = folder / f"{shape}-{stored}-{context}"
            makers.submit(make_checkpoint, one, found[one])
    return found


def key(case: Case, *, on_gpu: bool) -> tuple[str, str, int]:
    return (case.shape, case.stored, case.context) if on_gpu else ("tiny", "bf16", case.context)


def make_checkpoint(one: tuple[str, str, int], target: Path) -> None:
    """Make it, and say beside it when it is whole or what went wrong."""
    shape, stored, context = one
    target.parent.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("random_checkpoint.py")
    command = [sys.executable, str(script), shape, str(target), "--dtype", stored, "--context", str(context)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    word = "failed" if done.returncode else "ready"
    beside = target.with_suffix(".part")
    beside.write_text(done.stderr.strip()[-1000:], encoding="utf-8")
    beside.replace(target.with_name(f"{target.name}.{word}"))


def wait_for(checkpoint: Path) -> None:
    """Until it is whole. Raises RuntimeError: it could not be made."""
    ready, failed = (checkpoint.with_name(f"{checkpoint.name}.{word}") for word in ("ready", "failed"))
    while not ready.exists():
        if failed.exists():
            raise RuntimeError(f"no checkpoint {checkpoint.name}: {failed.read_text(encoding='utf-8')}")
        time.sleep(0.1)


def run_case(number: int, checkpoint: Path, arguments: argparse.Namespace, room: Room, gib: float) -> dict[str, Any]:
    """The row of a configuration, or what went wrong with it."""
    row: dict[str, Any] = {"case": number, "name": CASES[number].name, "error": None}
    notes: list[str] = []
    with room.lent(gib):
        for kind, rest in said(str(number), checkpoint, arguments.timeout):
            if kind == "CASE":
                row |= json.loads(rest)
            elif kind == "NOTE":
                notes.append(json.loads(rest))
            elif kind == "ERROR" or (kind == "FAILED" and row["error"] is None):
                row["error"] = json.loads(rest)
    if arguments.together > 1:
        for measured in row.get("measured_gib", {}).values():
            del measured["device"]  # which is that of all of them
    return row | errors(row) | {"notes": notes}


def said(worker: str, model: Path | None, timeout: float) -> Iterator[tuple[str, str]]:
    """The lines of a worker, by their first word."""
    given = ["--worker", worker, *(["--model", str(model)] if model else [])]
    for line in lines_of(worker, given, timeout, script=__file__, settings=grpo_step.tandem_settings()):
        kind, _, rest = line.partition(" ")
        if kind in ("DEVICE", "CASE", "NOTE", "ERROR", "FAILED"):
            yield kind, rest


def errors(row: dict[str, Any]) -> dict[str, Any]:
    """Percent of what was measured, by phase and kind; empty where nothing was."""
    predicted, measured = row.get("predicted_gib") or {}, row.get("measured_gib") or {}
    found = {
        phase: {kind: percent(predicted[phase][kind], size) for kind, size in measured[phase].items()}
        for phase in predicted
        if phase in measured
    }
    return {"error_percent": found} if found else {}


def percent(predicted: float, measured: float) -> float | None:
    return round(100 * (predicted - measured) / measured, 1) if measured else None


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many peaks were compared and are within the limit, and the worst."""
    found: dict[str, Any] = {"configurations": len(rows), "failed": sum(bool(one["error"]) for one in rows)}
    for kind in ("reserved", "peak_allocated", "device"):
        by_phase = {
            (one["name"], phase): of_phase[kind]
            for one in rows
            for phase, of_phase in (one.get("error_percent") or {}).items()
            if of_phase.get(kind) is not None
        }
        worst = max(by_phase, key=lambda place: abs(by_phase[place]), default=None)
        found[kind] = {
            "peaks": len(by_phase),
            f"within_{LIMIT:.0f}_percent": sum(abs(error) <= LIMIT for error in by_phase.values()),
            "worst": None if worst is None else [*worst, by_phase[worst]],
        }
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    """Reserved, then allocated; host memory where some is taken."""
    kinds = ("reserved", "peak_allocated")
    print("| configuration | phase | " + " | ".join(f"{kind}: predicted | measured | error" for kind in kinds) + " |")
    print("|---" * (2 + 3 * len(kinds)) + "|")
    for one in sorted(rows, key=lambda row: row["case"]):
        if one["error"]:
            print(f"| {one['name']} | {one['error'][:200]} |")
        for phase, found in (one.get("error_percent") or {}).items():
            cells = [one["name"], phase]
            for kind in kinds:
                predicted, measured = one["predicted_gib"][phase][kind], one["measured_gib"][phase][kind]
                error = "" if found[kind] is None else f"{found[kind]:+.1f}%"
                cells += [f"{predicted:.2f}", f"{measured:.2f}", error]
            print("| " + " | ".join(cells) + " |")
        if host := one.get("host_gib"):
            print(f"| {one['name']} | host | {host['predicted']:.2f} | {host['measured']:.2f} |")


# --- in a configuration's process -------------------------------------------------------------------------------------


def settings_of(
    case: Case, model: Path, folder: str, *, on_gpu: bool, steps: int = 2
) -> tuple[dict[str, Any], list[str]]:
    """The config of a configuration, and what is set beside it."""
    share = 1 if on_gpu else _CPU_SHARE
    shape = argparse.Namespace(
        model=model,
        prompts=case.prompts,
        generations=case.generations,
        prompt_tokens=max(case.prompt // share, 4),
        completion_tokens=max(case.completion // share, 4),
        steps=2,
    )
    settings = grpo_step.tandem_config("tandem-bf16" if case.format == "bf16" else "tandem", shape, folder)
    overrides = ["train.projection_memory=recompute", f"lora.r={case.rank}", f"lora.lora_alpha={case.rank}"]
    if on_gpu:
        overrides.append("rollout.engine=vllm")
        if case.format != "bf16":
            overrides += ["model.load_in_4bit=true", f"model.weight_format={case.format}"]
    # bitsandbytes' optimisers want a GPU.
    return settings, [*overrides, *(one for one in case.settings if on_gpu or not one.startswith("optim."))]


def work(number: int, model: Path) -> None:
    from tandem.rollout.vllm_versions import refusal

    try:
        # A run asks so, too; it takes most of the time of a start, and needs no checkpoint.
        refusal()
        wait_for(model)
        measure(CASES[number], model, time.perf_counter())
    except Exception as error:  # noqa: BLE001  # whatever it was belongs into the result
        grpo_step.report_error(error)


def measure(case: Case, model: Path, started: float) -> None:
    """Run two steps, and say what was predicted and what they took."""
    import torch

    from tandem.rl.console import Console
    from tandem.rl.trackers import NoTrackers

    class Notes(Console):
        def note(self, text: str) -> None:
            grpo_step.say("NOTE", text)

        def warn(self, text: str) -> None:
            grpo_step.say("NOTE", f"warning: {text}")

    class Seconds(NoTrackers):
        def log(self, step: int, metrics: Any) -> None:
            seconds.append(round(metrics["step_time"], 2))

    seconds: list[float] = []
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        settings, overrides = settings_of(case, model, folder, on_gpu=on_gpu)
        run = grpo_step.FullLengthRun(settings, overrides, Notes(live=False))
        start = round(time.perf_counter() - started, 1)
        trainer = run.trainer(run.config, Seconds())
        trainer.fit()
        found: dict[str, Any] = {"start_seconds": start, "step_seconds": seconds, "engine": run.engine.name}
        if on_gpu:
            found |= compared(run, trainer.memory.summary())
        grpo_step.say("CASE", found)
        run.engine.close()


def compared(run: Any, measured: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Predicted, and beside it what was measured by phase, in GiB."""
    # The largest pack is tried first, and need not come in these steps.
    update = {kind: max(measured[p][kind] for p in ("update", "trial")) for kind in measured["update"]}
    plan = plan_of(run.config, run.inputs.data)
    host = {"predicted": round(sum(plan.host.values()) / GIB, 3), "measured": round(run.lm.fused.host_bytes / GIB, 3)}
    return {
        "predicted_gib": predictions(plan),
        "measured_gib": {"update": update, "rollout": measured["rollout"]},
        "kv_pool_gib": round(run.engine.asleep_bytes / GIB, 3),
        "host_gib": host if any(host.values()) else None,
        **facts_of(plan),
    }


def plan_of(config: Any, data: Any) -> Any:
    """The plan of a run's config, whose sizes are all set, on the whole card."""
    from tandem.rl.plan import ledger
    from tandem.rl.plan_devices import local_device
    from tandem.rl.plan_shape import read_shape
    from tandem.rl.training_data import longest_sequence

    return ledger(read_shape(config.model), config, local_device(), longest_sequence(config, data))


def predictions(plan: Any) -> dict[str, dict[str, float]]:
    """GiB by phase and kind."""
    phases = {"update": plan.training(), "rollout": plan.rollout()}
    return {name: {kind: round(size / GIB, 3) for kind, size in phase.sizes.items()} for name, phase in phases.items()}


def facts_of(plan: Any) -> dict[str, Any]:
    items = {"update": plan.training().items, "rollout": plan.rollout().items}
    return {
        "pack_tokens": plan.pack,
        "moment": plan.peak_pack.moment,
        "items": {phase: {name: round(size / GIB, 3) for name, size in one.items()} for phase, one in items.items()},
    }


# --- without a GPU ----------------------------------------------------------------------------------------------------


def predict(arguments: argparse.Namespace) -> None:
    """Print what the plan says of every configuration on a card."""
    for number in arguments.cases:
        plan = plan_on(CASES[number], arguments.predict)
        found = {"case": number, "name": CASES[number].name, **predictions(plan), "host_gib": plan.host}
        print(json.dumps(found))
        for phase, items in facts_of(plan)["items"].items():
            print(f"  {phase}: " + ", ".join(f"{name} {size:.2f}" for name, size in items.items()))


def predict_again(path: Path, argv: list[str]) -> None:
    """Today's predictions in the place of those that a result was measured beside, for the cards' own sizes."""
    result = added_to(path, {}, "plan_peaks.py", argv)
    card = result["device"].split()[1].lower()
    for one in result["rows"]:
        case = CASES[one["case"]]
        if one["error"] or one["name"] != case.name:
            continue
        plan = plan_on(case, card)
        one |= {"predicted_gib": predictions(plan), **facts_of(plan)}
        one |= errors(one)
    store(path, result | {"summary": summary(result["rows"])})
    print_table(result["rows"])


def needed(number: int, total_gib: float) -> float:
    """GiB that a configuration takes of a card of this size, by its plan."""
    return max(sums["device"] for sums in predictions(plan_on(CASES[number], str(total_gib))).values())


def plan_on(case: Case, card: str) -> Any:
    """The plan of a configuration with the sizes that it gets on a card; nothing of its checkpoint is needed."""
    import yaml

    from tandem.rl.config_file import load_config
    from tandem.rl.plan import Longest
    from tandem.rl.plan_devices import find_device
    from tandem.rl.plan_shape import read_shape
    from tandem.rl.plan_sizing import choose_sizes

    with tempfile.TemporaryDirectory() as folder:
        sizes = SHAPES[case.shape] | {"max_position_embeddings": case.context}
        if case.stored == "nf4":
            sizes["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        Path(folder, "config.json").write_text(json.dumps(sizes), encoding="utf-8")
        settings, overrides = settings_of(case, Path(folder), folder, on_gpu=True)
        Path(folder, "step.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        config = load_config(Path(folder, "step.yaml"), overrides)
        shape, longest = read_shape(config.model), Longest(case.prompt, case.completion)
        return choose_sizes(shape, config, find_device(card, host_gib=128), longest=longest).plan


if __name__ == "__main__":
    main()
