"""Learning curves of one task with Tandem and with TRL: reward by samples and by seconds, and the held-out score.

    python benchmarks/learning_vs_trl.py --model /models/SmolLM2-135M-Instruct --seeds 0 1 2 --steps 40
    python benchmarks/learning_vs_trl.py --plot FILE.json          # only draws stored results again

Both read the task from one config (`--config`, else the demo's): the same prompts in the same order, reward functions
and weights, batch, learning rate, adapter and objective; Tandem as `rl-train run`, TRL as its GRPOTrainer. Each run has
a process of its own. `seconds` are those of training steps, without the start, evaluations and checkpoints;
`wall_seconds` are all. A held-out score comes from the same code for both, but TRL's model completes with transformers'
`generate`. `reached` is the first step at which the mean reward of the last 3 steps is at least `--target`. On a GPU
both generate with vLLM; where TRL cannot, it runs again with transformers, after all others, and its error is kept.
With `--together` runs are measured once all are ready: Tandem's start at once, which takes the time of one, then TRL's
one after the other; their `wall_seconds` are then not known, and `--timeout` counts from a run's start, its wait too.
Writes `benchmarks/results/learning-vs-trl-DEVICE-DATE.json`, anew after every run, and a plot beside it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_step import SETTINGS, facts, port_of_its_own, report_error, say
from plot_learning import draw
from turns import Ahead, Turn
from update import RESULTS, ROOT, header, lines_of, result_path, store

SYSTEMS = ("tandem", "trl")
WINDOW = 3
# Parts that happen between steps, or that only a benchmark asks for.
NOT_TRAINING = ("evaluate", "checkpoint")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if arguments.plot:
        for path in arguments.plot:
            draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
            print(path.with_suffix(".png"))
    elif arguments.worker == "device":
        say("DEVICE", facts())
    elif arguments.worker == "tandem":
        tandem(arguments, arguments.seeds[0])
    elif arguments.worker:
        try:
            trl(arguments, arguments.seeds[0])
        except Exception as error:  # noqa: BLE001  # whatever it was belongs into the result
            report_error(error)
    else:
        compare(arguments, argv)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint with its tokenizer")
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "arithmetic.yaml")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--eval-steps", type=int, default=5)
    parser.add_argument("--engine", choices=("vllm", "transformers"), help="of both (default: vllm on a GPU)")
    parser.add_argument("--target", type=float, default=1.0, help="reward that `reached` is about")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the config, for both")
    parser.add_argument("--vllm-share", type=float, default=0.3, help="trl: share of the device for vLLM")
    parser.add_argument("--together", action="store_true", help="start all runs first, then measure in turn")
    parser.add_argument("--gate", type=Path, help="with --together: measure once this file exists")
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--timeout", type=float, default=560.0, help="seconds for one run")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results)")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="FILE.json", help="draw these results, measure nothing")
    parser.add_argument("--worker", choices=(*SYSTEMS, "device"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.model is None and not arguments.plot and arguments.worker != "device":
        parser.error("--model is needed, or --plot with stored results")
    if min(arguments.steps, arguments.eval_steps) < 1:
        parser.error("--steps and --eval-steps must be at least 1")
    return arguments


def compare(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Run seed after seed, the systems in turn; whatever is measured is stored at once."""
    lines = lines_of("device", ["--worker", "device"], 120, script=__file__, settings=SETTINGS)
    device = next((json.loads(line.partition(" ")[2]) for line in lines if line.startswith("DEVICE ")), None)
    if device is None:
        raise SystemExit("the device cannot be asked: try python -c 'import torch; torch.cuda.init()'")
    result = header("learning_vs_trl.py", "learning-vs-trl", argv, device) | {"target": arguments.target, "rows": []}
    target = result_path(arguments.out or RESULTS, result)
    engine = arguments.engine or ("vllm" if device["total_gib"] is not None else "transformers")

    def keep(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        store(target, result | {"summary": summary(result["rows"])})
        print(json.dumps({k: v for k, v in row.items() if k not in ("curve", "scores")}), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        ahead = start_all(arguments, argv, engine, Path(folder)) if arguments.together else {}
        if ahead:
            print("all are ready", flush=True)
            while arguments.gate and not arguments.gate.exists():
                time.sleep(0.2)
        for seed, system in itertools.product(arguments.seeds, arguments.systems):
            place = Path(folder) / f"{system}-{seed}"
            keep(row_of(system, arguments, argv, seed, engine, place, ahead.get((system, seed))))
        # Last: beside no run that is measured, and none that is ready runs out of time meanwhile.
        for one in list(result["rows"]):
            if (one["system"], one["engine"]) == ("trl", "vllm") and one["error"] is not None:
                keep(row_of("trl", arguments, argv, one["seed"], "transformers", Path(folder) / f"trl-{one['seed']}"))
    for line in summary(result["rows"]):
        print(json.dumps(line))
    print(target)
    draw(result, target.with_suffix(".png"))
    print(target.with_suffix(".png"))


def start_all(
    arguments: argparse.Namespace, argv: list[str], engine: str, folder: Path
) -> dict[tuple[str, int], Ahead[str]]:
    """All runs by system and seed, ready or failed: Tandem's start at once, each of TRL's when all before it are ready.

    vLLM counts as its own what others take of the device while it measures, and then has none left for its cache.
    Tandem says how large the cache is; TRL gives a share of the device, and measures.
    """
    ahead: dict[tuple[str, int], Ahead[str]] = {}
    for system, seed in itertools.product(SYSTEMS, arguments.seeds):
        if system == "trl":
            for run in ahead.values():
                run.wait_until_ready()
        if system in arguments.systems:
            place = folder / f"{system}-{seed}"
            lines = lines_of_run(system, [*argv, "--turn", str(place)], seed, engine, place, arguments.timeout)
            ahead[system, seed] = Ahead(lines, Turn(place))
    for run in ahead.values():
        run.wait_until_ready()
    return ahead


def lines_of_run(system: str, argv: list[str], seed: int, engine: str, place: Path, timeout: float) -> Iterator[str]:
    """What the process of a run says. `place`: folder for the run folder of Tandem's."""
    command = [*argv, "--worker", system, "--seeds", str(seed), "--engine", engine, "--runs", str(place)]
    settings = {} if system == "tandem" else SETTINGS | port_of_its_own()
    return lines_of(system, command, timeout, script=__file__, settings=settings)


def row_of(
    system: str,
    arguments: argparse.Namespace,
    argv: list[str],
    seed: int,
    engine: str,
    place: Path,
    ahead: Ahead[str] | None = None,
) -> dict[str, Any]:
    steps, error, started = [], None, time.perf_counter()
    lines = lines_of_run(system, argv, seed, engine, place, arguments.timeout) if ahead is None else ahead.said()
    for line in lines:
        kind, _, rest = line.partition(" ")
        if kind == "ROW":
            steps.append(json.loads(rest))
        elif kind == "ERROR" or (kind == "FAILED" and error is None):
            error = json.loads(rest)
    wall = None if ahead else round(time.perf_counter() - started, 2)
    if system == "tandem":
        steps = steps_of(place / "run")
    return make_row(arguments, system, seed, engine, steps, wall_seconds=wall, error=error)


def overrides(arguments: argparse.Namespace, seed: int, engine: str) -> list[str]:
    """What is set beside the config, for both systems."""
    return [
        f"seed={seed}",
        f"model.model_name_or_path={arguments.model.resolve()}",
        f"train.max_steps={arguments.steps}",
        f"eval.eval_steps={arguments.eval_steps}",
        f"rollout.engine={engine}",
        "rollout.enforce_eager=false",  # as TRL's vLLM
        "rollout.torch_compile=true",
        "warmup.max_steps=0",
        "parity.action=warn",
        *arguments.set,
    ]


def make_row(
    arguments: argparse.Namespace, system: str, seed: int, engine: str, steps: list[dict[str, Any]], **values: Any
) -> dict[str, Any]:
    """One run's row.

    Args:
        steps: in order, each with `step`, `samples`, `seconds` of training since the step before, `parts`, and `reward`
            or `score`, or both; `apart`: of |engine - trainer|, in nats.
    """
    curve, scores, elapsed = [], [], 0.0
    parts: dict[str, float] = {}
    for one in steps:
        elapsed += one.get("seconds", 0.0)
        known = {"step": one["step"], "samples": one["samples"], "seconds": round(elapsed, 3)}
        if one.get("reward") is not None:
            apart = {"apart": one["apart"]} if one.get("apart") else {}
            curve.append(known | {"reward": one["reward"]} | apart)
        if one.get("score") is not None:
            scores.append(known | {"score": one["score"]})
        for name, seconds in one.get("parts", {}).items():
            parts[name] = parts.get(name, 0.0) + seconds
    return {
        "system": system, "engine": engine, "model": arguments.model.name, "seed": seed,
        "steps": steps[-1]["step"] if steps else 0,
        "score_before": scores[0]["score"] if scores else None,
        "score_after": scores[-1]["score"] if len(scores) > 1 else None,
        "seconds": round(elapsed, 3), "wall_seconds": None,
        "parts": {name: round(seconds, 3) for name, seconds in parts.items()},
        "reached": reached(curve, arguments.target),
        "curve": curve, "scores": scores, "error": None,
    } | values  # fmt: skip


def reached(curve: list[dict[str, Any]], target: float) -> dict[str, Any] | None:
    """The first point at which the mean reward of the last `WINDOW` steps is at least `target`."""
    for end in range(WINDOW, len(curve) + 1):
        if statistics.fmean(one["reward"] for one in curve[end - WINDOW : end]) >= target:
            return {name: curve[end - 1][name] for name in ("step", "samples", "seconds")}
    return None


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of each system and engine. A time to the target only where all seeds reached it."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault((one["system"], one["engine"]), []).append(one)
    found = []
    for (system, engine), group in groups.items():
        good = [one for one in group if one["error"] is None]
        line: dict[str, Any] = {"system": system, "engine": engine, "seeds": [one["seed"] for one in good]}
        for name in ("score_before", "score_after", "seconds", "wall_seconds"):
            values = [one[name] for one in good if one[name] is not None]
            line[name] = round(statistics.fmean(values), 4) if values else None
            line[f"{name}_deviation"] = round(statistics.stdev(values), 4) if len(values) > 1 else None
        for name in ("samples", "seconds"):
            points = [one["reached"][name] for one in good if one["reached"] is not None]
            whole = points and len(points) == len(good)
            line[f"{name}_to_target"] = round(statistics.fmean(points), 3) if whole else None
        line["error"] = next((one["error"] for one in group if one["error"]), None)
        found.append(line)
    return found


def training_seconds(parts: dict[str, float]) -> float:
    return sum(seconds for name, seconds in parts.items() if name not in NOT_TRAINING)


# --- Tandem -----------------------------------------------------------------------------------------------------------


def tandem(arguments: argparse.Namespace, seed: int) -> None:
    """The command that a user types; where runs start together, it waits once its engine is ready."""
    from tandem.rl import cli, commands

    if arguments.turn:
        open_model = commands.open_model

        def opened(*given: Any) -> Any:
            found = open_model(*given)
            Turn(arguments.turn).wait()
            return found

        commands.open_model = opened
    settings = [*overrides(arguments, seed, arguments.engine), f"output_dir={arguments.runs}", "run_name=run"]
    sys.argv = ["rl-train", "run", str(arguments.config), *settings]
    cli.main()


def steps_of(run: Path) -> list[dict[str, Any]]:
    """What a run folder says of every step and every evaluation."""
    from tandem.rl.config_file import load_run_config

    if not (run / "metrics.jsonl").is_file():
        return []
    config = load_run_config(run)
    per_step, found = samples_per_step(config), []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        parts = {name[5:]: value for name, value in record.items() if name.startswith("time/")}
        one = {"step": record["step"], "samples": round(record["step"] * per_step), "parts": parts}
        one |= {"seconds": training_seconds(parts), "reward": record.get("reward"), "score": record.get("eval/score")}
        apart = "parity/logp_difference/"
        found.append(one | {"apart": {k.removeprefix(apart): v for k, v in record.items() if k.startswith(apart)}})
    return found


def samples_per_step(config: Any) -> float:
    return config.generation_batch_size / (config.train.steps_per_generation * config.algorithm.num_iterations)


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl(arguments: argparse.Namespace, seed: int) -> None:
    """TRL's trainer on what the config says; rows of prompts come in the order in which Tandem draws them."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig
    from trl_steps import StepRows, TimedTrainer

    from tandem.rl.config_file import load_config
    from tandem.rl.console import Console
    from tandem.rl.inputs import prepare
    from tandem.rl.prompts import PromptSampler
    from tandem.rl.step_time import StepClock

    config = load_config(arguments.config, overrides(arguments, seed, arguments.engine))
    inputs = prepare(config, Console.silent())
    on_gpu = torch.cuda.is_available()
    prompts, per_step = inputs.data.prompts, samples_per_step(config)
    sampler = PromptSampler(len(prompts), seed=config.seed, shuffle=config.data.shuffle_dataset)
    drawn = sampler.take(0, arguments.steps * config.prompts_per_rollout)
    rows = [{"prompt": prompts[i].prompt, **prompts[i].columns} for i in drawn]
    clock = StepClock(torch.cuda.synchronize if on_gpu else None)

    def say_step(step: int, parts: dict[str, float], logged: dict[str, Any]) -> None:
        known = {"step": step, "samples": round(step * per_step), "parts": parts}
        say("ROW", known | {"seconds": training_seconds(parts), "reward": logged.get("reward")})

    class HeldOut(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.evaluate(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % arguments.eval_steps == 0 or state.global_step == arguments.steps:
                self.evaluate(state.global_step)

        def evaluate(self, step: int) -> None:
            if inputs.data.eval_prompts:
                with clock.part("evaluate"):
                    score = held_out_score(trainer, config, inputs, step)
                say("ROW", {"step": step, "samples": round(step * per_step), "score": score})

    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            model=config.model.model_name_or_path,
            args=GRPOConfig(**trl_settings(config, arguments.engine, folder, arguments.vllm_share)),
            train_dataset=Dataset.from_list(rows),
            processing_class=inputs.tokenizer,
            reward_funcs=[as_trl_calls(reward) for reward in inputs.judge.rewards],
            peft_config=LoraConfig(
                r=config.lora.r,
                lora_alpha=config.lora.alpha,
                lora_dropout=config.lora.lora_dropout,
                target_modules=config.lora.target_modules,
                use_rslora=config.lora.use_rslora,
                task_type="CAUSAL_LM",
            ),
            callbacks=[HeldOut(), StepRows(clock, say_step)],
            clock=clock,
        )
        if arguments.turn:
            Turn(arguments.turn).wait()
        trainer.train()


def as_trl_calls(reward: Any) -> Any:
    """The function behind a reward of the config, with its arguments and its name."""
    call = functools.partial(reward.function, **reward.kwargs)
    call.__name__ = reward.name  # type: ignore[attr-defined]
    return call


def trl_settings(config: Any, engine: str, folder: str, vllm_share: float) -> dict[str, Any]:
    """TRL's config with the values of Tandem's. TRL's own defaults hold for what makes it fast or slow, but for
    gradient checkpointing, which a model that is this small does not need."""
    import torch

    on_gpu = torch.cuda.is_available()
    algorithm, rollout, optim, train = config.algorithm, config.rollout, config.optim, config.train
    correction = algorithm.rollout_correction
    settings = {
        "output_dir": folder,
        "seed": config.seed,
        "per_device_train_batch_size": config.generation_batch_size // train.steps_per_generation,
        "steps_per_generation": train.steps_per_generation,
        "num_iterations": algorithm.num_iterations,
        "num_generations": rollout.num_generations,
        "max_completion_length": rollout.max_completion_length,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "loss_type": algorithm.loss_type,
        "importance_sampling_level": algorithm.importance_sampling_level,
        "epsilon": algorithm.epsilon,
        "epsilon_high": algorithm.epsilon_high,
        "beta": algorithm.beta,
        "scale_rewards": algorithm.scale_rewards,
        "mask_truncated_completions": algorithm.mask_truncated_completions,
        "reward_weights": [spec.weight for spec in config.rewards.reward_funcs],
        "max_steps": train.max_steps,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": optim.lr_scheduler_type,
        "warmup_steps": optim.warmup_steps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "adam_beta1": optim.adam_beta1,
        "adam_beta2": optim.adam_beta2,
        "adam_epsilon": optim.adam_epsilon,
        "optim": "adamw_torch",
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "model_init_kwargs": {
            "dtype": "bfloat16" if on_gpu else "float32",
            "device_map": {"": 0} if on_gpu else None,
        },
    }
    if engine == "vllm":
        settings |= {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": vllm_share,
            "vllm_importance_sampling_correction": correction != "none",
            "vllm_importance_sampling_mode": "token_truncate" if correction == "none" else correction,
            "vllm_importance_sampling_clip_max": algorithm.rollout_correction_max,
        }
    return settings


def held_out_score(trainer: Any, config: Any, inputs: Any, step: int) -> float:
    """The score of Tandem's own evaluation, of completions that transformers generates with TRL's model."""
    from tandem.rl.evaluate import eval_sampling, evaluate

    sampling = eval_sampling(config, tuple(trainer.eos_token_ids))
    engine = Generating(trainer)
    metrics, _ = evaluate(engine, inputs.data.eval_prompts, inputs.judge, sampling, step, config.eval.score)
    return metrics["eval/score"]


class Generating:
    """transformers' `generate` on a trainer's model, as an engine; the log-probs of its completions are all 0."""

    name = "generate"

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def generate(self, prompts: list[Any], sampling: Any, **_: Any) -> list[Any]:
        import torch
        from trl.models.utils import unwrap_model_for_generation

        from tandem.rl.samples import Group

        trainer, each = self._trainer, sampling.num_generations
        asked = [prompt for prompt in prompts for _ in range(each)]
        longest = max(len(prompt.ids) for prompt in asked)
        ids = torch.full((len(asked), longest), trainer.processing_class.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(asked):
            ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, longest - len(prompt.ids) :] = 1
        device = trainer.accelerator.device
        how = {"do_sample": False}
        if sampling.temperature > 0:
            how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        trainer.model.eval()
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model, torch.no_grad():
            found = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=sampling.max_completion_length,
                eos_token_id=list(sampling.stop_token_ids),
                pad_token_id=trainer.processing_class.pad_token_id,
                **how,
            )
        trainer.model.train()
        rows = [ended(one, sampling.stop_token_ids) for one in found[:, longest:].tolist()]
        return [Group(prompt, rows[i * each : (i + 1) * each]) for i, prompt in enumerate(prompts)]


def ended(ids: list[int], stop: tuple[int, ...]) -> Any:
    """A completion up to its first stop token."""
    from tandem.rl.samples import Completion

    end = next((i + 1 for i, token in enumerate(ids) if token in stop), None)
    kept = ids if end is None else ids[:end]
    return Completion(kept, [0.0] * len(kept), truncated=end is None)


if __name__ == "__main__":
    main()
