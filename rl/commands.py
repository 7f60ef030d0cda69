"""What the commands of `rl-train` do, in the order: read and check everything, then touch the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tandem.rl import distributed
from tandem.rl.checkpoint import State, latest_checkpoint, read_state, restore, whole_checkpoint
from tandem.rl.config import Config
from tandem.rl.config_file import load_run_config, save_config
from tandem.rl.console import Console
from tandem.rl.data_identity import keep_or_compare
from tandem.rl.errors import UserError
from tandem.rl.evaluate import eval_sampling, evaluate, training_sampling
from tandem.rl.experience import policy_batch, with_advantages
from tandem.rl.inputs import Inputs, prepare, prepare_replay
from tandem.rl.journal import drop_after, write_rollouts
from tandem.rl.lora import load_adapter, trainable
from tandem.rl.memory_metrics import MemoryMeter, planned_memory
from tandem.rl.model_identity import keep_model, model_facts, other_model
from tandem.rl.open_model import open_model, show_sizes
from tandem.rl.optim import make_optimizer
from tandem.rl.parity import check_engine
from tandem.rl.replay import fill, replay_config, survey
from tandem.rl.report import write_report
from tandem.rl.reward_errors import errors_in_words
from tandem.rl.rewards_command import show_protections
from tandem.rl.rollout_journal import Mark, RolloutJournal, source_of
from tandem.rl.run_folder import check_folder, locked, new_folder
from tandem.rl.run_length import total_steps
from tandem.rl.start_time import StartTime
from tandem.rl.stopping import Stopping
from tandem.rl.trackers import NoTrackers, Trackers, check_trackers
from tandem.rl.trainer import Trainer
from tandem.rl.training_data import longest_sequence
from tandem.rl.unscored import unscored_path


def run(config: Config, *, dry_run: bool, console: Console) -> bool:
    """`rl-train run`. Returns whether the run came to its end."""
    check_trackers(config.log)
    if dry_run:
        check_folder(config.run_dir)
        inputs = prepare(config, console)
        _show_plan(config, inputs, console)
        show_sizes(config, inputs, console)
        return True
    with _processes(config, console) as console:
        inputs = prepare(config, console)
        with new_folder(config, console) as config:
            if distributed.is_main():
                keep_or_compare(config.run_dir, inputs.data)
                keep_model(config.run_dir, model_facts(config.model))
            return _train(config, config.run_dir, inputs, State(), None, console)


def resume(
    run_dir: Path,
    config: Config,
    *,
    console: Console,
    accept_changed_data: bool = False,
    accept_changed_model: bool = False,
) -> bool:
    """`rl-train resume`: go on from the newest whole checkpoint, or from the start if there is none yet."""
    check_trackers(config.log)
    with _processes(config, console) as console, locked(run_dir, console):
        checkpoint = distributed.broadcast(whole_checkpoint(run_dir, console.warn) if distributed.is_main() else None)
        state = read_state(checkpoint) if checkpoint else State()
        inputs = prepare(config, console)
        if distributed.is_main():
            facts = model_facts(config.model)
            changed = other_model(run_dir, config.model, facts, console, accept_changes=accept_changed_model)
            changes = keep_or_compare(run_dir, inputs.data, accept_changes=accept_changed_data)
            for change in changes:
                console.warn(change)
            if changed or changes:
                _forget_generated(run_dir, state)
            keep_model(run_dir, facts)
            save_config(config, run_dir / "config.yaml")
        start = (
            f"resuming {run_dir} after step {state.step}"
            if checkpoint
            else f"{run_dir} has no checkpoint: from the start"
        )
        console.note(start)
        if state.step >= total_steps(config, inputs.data.num_rows):
            console.note(f"all its {state.step} steps are taken; for more: rl-train resume {run_dir} train.max_steps=N")
        return _train(config, run_dir, inputs, state, checkpoint, console, resumed=True)


def _forget_generated(run_dir: Path, state: State) -> None:
    """Drop what was generated and not learned from: another model's completions, or scored by other rows."""
    unscored_path(run_dir).unlink(missing_ok=True)
    learned = Mark(state.journal_rollouts, state.journal_bytes)
    RolloutJournal(run_dir, learned, source="").cut(learned)


def replay(source: Path, config: Config, *, console: Console, accept_changed_model: bool = False) -> bool:
    """`rl-train replay`: train a new run from the journal of another one alone."""
    recorded = survey(source, console)
    config = replay_config(config, source, recorded)
    with _processes(config, console) as console:
        inputs = prepare_replay(config, recorded.prompts, console)
        facts = model_facts(config.model)
        other_model(source, config.model, facts, console, accept_changes=accept_changed_model)
        with new_folder(config, console, copied=("journal.jsonl",)) as config:
            console.note(f"{recorded.rollouts} rollouts from the journal of {source}")
            if distributed.is_main():
                fill(source, config.run_dir, config)
                keep_model(config.run_dir, facts)
            return _train(config, config.run_dir, inputs, State(), None, console)


@contextmanager
def _processes(config: Config, console: Console) -> Iterator[Console]:
    """Join the other processes of `torchrun`; only the first one talks."""
    distributed.start()
    try:
        ranks = distributed.world_size()
        if config.uses_rollouts and config.prompts_per_rollout < ranks:
            raise UserError(
                f"a rollout of {config.prompts_per_rollout} prompts cannot be shared by {ranks} processes",
                fix="raise train.generation_batch_size, or start fewer processes",
            )
        yield console if distributed.is_main() else Console.silent()
    finally:
        distributed.finish()


def evaluate_run(
    config: Config, run_dir: Path | None, *, console: Console, accept_changed_model: bool = False
) -> dict[str, float]:
    """`rl-train eval`: the held-out score of a run's adapter, or of a config's model as it is before training."""
    if config.eval.dataset_name is None:
        raise UserError("the config has no evaluation data", fix="set eval.dataset_name")
    if not config.uses_rollouts:
        raise UserError(
            f"algorithm.name is {config.algorithm.name!r}: there are no rewards to score completions with",
            fix="evaluate with a config whose rewards section says what is good",
        )
    inputs = prepare(config, console)
    if run_dir:
        other_model(run_dir, config.model, model_facts(config.model), console, accept_changes=accept_changed_model)
    own = run_dir is not None and config == load_run_config(run_dir)
    completions = len(inputs.data.eval_prompts) * config.eval.num_generations
    lm, engine, stop, config = open_model(config, inputs, console, completions=completions)
    checkpoint = latest_checkpoint(run_dir) if run_dir else None
    with closing(engine):
        if run_dir:
            load_adapter(lm, checkpoint or _last_adapter(run_dir))
        step = read_state(checkpoint).step if checkpoint else 0
        metrics, rows = evaluate(
            engine, inputs.data.eval_prompts, inputs.judge, eval_sampling(config, stop), step, config.eval.score
        )
    # Without a checkpoint it is not known after which step this is, and other data are no evaluation of the run's own.
    if run_dir and checkpoint and own:
        write_rollouts(run_dir, step, rows, kind="eval")
    elif run_dir:
        console.note("the completions are not kept in the run folder, beside those of the run's own evaluations")
    console.print_completions(rows, config.log.num_completions_to_print)
    console.table(
        f"Held-out evaluation of {run_dir or config.model.model_name_or_path}",
        [(k, f"{v:.4f}") for k, v in metrics.items()],
    )
    return metrics


def check(config: Config, *, num_prompts: int, console: Console) -> None:
    """`rl-train check`: sample and score a few completions and compare trainer and engine log-probs; no training."""
    inputs = prepare(config, console)
    if not config.uses_rollouts:
        _show_plan(config, inputs, console)
        return
    show_protections(inputs.judge.rewards, console)
    prompts = inputs.data.prompts[:num_prompts]
    completions = len(prompts) * config.rollout.num_generations
    lm, engine, stop, config = open_model(config, inputs, console, completions=completions)
    with closing(engine):
        started = time.perf_counter()
        groups = engine.generate(prompts, training_sampling(config, stop, config.seed))
        generated = time.perf_counter() - started
    scores = inputs.judge(groups, 0)
    rows = with_advantages(scores.rows, config)
    if said := errors_in_words(rows, "these completions"):
        console.warn(said)
    console.print_completions(rows, len(rows))
    tokens = sum(len(c.ids) for g in groups for c in g.completions)
    numbers, parity = check_engine(lm, config, policy_batch(rows, mask_truncated=False), engine=engine.name)
    facts = [
        ("prompts × completions", f"{len(prompts)} × {config.rollout.num_generations}"),
        # A few completions are not worth graphs, of which a run will have some.
        (f"tokens per second{', without graphs' * bool(config.rollout.enforce_eager)}", f"{tokens / generated:.0f}"),
        *numbers,
        *((f"seconds in {name}", f"{seconds:.3f}") for name, seconds in scores.seconds.items()),
    ]
    for name in config.reward_names():
        values = [v for row in rows if (v := row.rewards[name]) is not None]
        spread = (
            f"mean {sum(values) / len(values):.3f}, {min(values):.3g} … {max(values):.3g}"
            if values
            else "never applies"
        )
        facts.append((f"reward {name}", spread))
    console.table("Check", facts)
    if all(row.advantage == 0 for row in rows):
        console.warn("no group has a spread of rewards here, so nothing would be learned from these completions")
    if parity.failure is not None:
        if config.parity.action == "stop":
            raise parity.failure
        console.warn(str(parity.failure))
    if parity.note is not None:
        console.warn(parity.note)


def report(run_dir: Path, *, console: Console) -> Path:
    """`rl-train report`."""
    path = write_report(run_dir)
    console.note(f"report: {path}")
    return path


def _train(
    config: Config,
    run_dir: Path,
    inputs: Inputs,
    state: State,
    checkpoint: Path | None,
    console: Console,
    *,
    resumed: bool = False,
) -> bool:
    import torch

    journal = None
    if config.uses_rollouts and config.checkpoint.journal and distributed.is_main():
        learned = Mark(state.journal_rollouts, state.journal_bytes)
        journal = RolloutJournal(run_dir, learned, source=source_of(config), note=console.note)
    torch.manual_seed(config.seed)  # dropout draws from it; a resumed run gets its own state back below
    start = StartTime()
    start.done("imports and data")
    lm, engine, stop, config = open_model(config, inputs, console, start)
    optimizer = make_optimizer(trainable(lm), config.optim)
    if checkpoint:
        restore(checkpoint, lm, optimizer)
    resume_step = (state.step if checkpoint else -1) if resumed else None
    if resume_step is not None and distributed.is_main():
        drop_after(run_dir, resume_step)
    with (
        _trackers(config, run_dir, resume_step, console) as trackers,
        Stopping(quiet=not distributed.is_main()).on_signals() as stopping,
    ):
        trainer = Trainer(
            config,
            run_dir,
            lm=lm,
            engine=engine,
            data=inputs.data,
            judge=inputs.judge,
            stop_token_ids=stop,
            optimizer=optimizer,
            state=state,
            trackers=trackers,
            console=console,
            stopping=stopping,
            objective=inputs.objective,
            journal=journal,
            start=start,
        )
        started = time.perf_counter()
        finished = trainer.fit()
        elapsed = time.perf_counter() - started
        if finished:
            planned = planned_memory(config, engine.name, longest_sequence(config, inputs.data))
            memory = _memory(trainer.memory, planned)
            startup = {"startup_seconds": {name: round(seconds, 2) for name, seconds in start.parts.items()}}
            trackers.summary(_summary(config, run_dir, state) | startup | memory)
    engine.close()
    if not finished:
        console.note(f"stopped after step {state.step} with a checkpoint; go on with: rl-train resume {run_dir}")
        return False
    if distributed.is_main():
        _show_result(config, run_dir, state, write_report(run_dir), elapsed, console)
    return True


def _trackers(config: Config, run_dir: Path, resume_step: int | None, console: Console) -> Trackers:
    if not distributed.is_main():
        return NoTrackers()
    return Trackers(config, run_dir, resume_step=resume_step, warn=console.warn)


def _last_adapter(run_dir: Path) -> Path:
    """Of a run without checkpoints. Beside one it may be older: a resumed run writes it again only at its end."""
    if (run_dir / "adapter" / "adapter_model.safetensors").is_file():
        return run_dir / "adapter"
    raise UserError(f"{run_dir} has neither an adapter nor a checkpoint yet", fix="evaluate after the first checkpoint")


def _show_plan(config: Config, inputs: Inputs, console: Console) -> None:
    data = inputs.data
    held_out = data.eval_prompts or data.eval_examples or data.eval_answers or ()
    facts: list[tuple[str, str]] = [
        ("model", config.model.model_name_or_path),
        ("algorithm", config.algorithm.name),
        ("rows", f"{data.num_rows} to train on, {len(held_out)} held out"),
        ("optimiser steps", str(total_steps(config, data.num_rows))),
    ]
    if data.prompts:
        lengths = [len(p.ids) for p in data.prompts]
        facts += [
            ("completions per rollout", f"{config.prompts_per_rollout} prompts × {config.rollout.num_generations}"),
            ("prompt tokens", f"{min(lengths)} … {max(lengths)}"),
            ("rewards", ", ".join(config.reward_names())),
            ("first prompt", inputs.tokenizer.decode(data.prompts[0].ids)),
        ]
    else:
        examples = data.answers.sequences if data.answers else data.examples
        lengths = [e.num_tokens for e in examples]
        facts += [
            ("tokens per example", f"{min(lengths)} … {max(lengths)}"),
            ("first example", inputs.tokenizer.decode(examples[0].prompt_ids + examples[0].completion_ids)),
        ]
    console.table("Plan (nothing was trained)", facts)


def _summary(config: Config, run_dir: Path, state: State) -> dict[str, Any]:
    before, after = state.scores.get(0), state.scores.get(state.step)
    return {
        "score_name": {"sft": "held-out loss", "dpo": "held-out margin"}.get(
            config.algorithm.name, config.eval.score or "reward"
        ),
        "score_before": before,
        "score_after": after,
        "steps": state.step,
        "num_tokens": state.num_tokens,
        "seconds": round(state.seconds, 3),
        "tokens_per_second": round(state.num_tokens / state.seconds, 1) if state.seconds else None,
        "skipped_updates": state.skipped_updates,
        "halved_packs": state.halved,
        "adapter": str(run_dir / "adapter"),
    }


def _memory(measured: MemoryMeter, planned: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The highest that each phase took of a GPU, and what the plan says, in GiB; nothing on a CPU."""
    found = measured.summary()
    return {"memory": {"measured": found, "planned": planned}} if found else {}


def _show_result(
    config: Config, run_dir: Path, state: State, report_path: Path, elapsed: float, console: Console
) -> None:
    facts = _summary(config, run_dir, state)

    def number(value: float | None) -> str:
        return "not measured" + missing if value is None else f"{value:.3f}"

    missing = "" if config.eval.dataset_name else " (no eval.dataset_name)"
    parts = " (prompt and completion, rollout and update)" if config.uses_rollouts else ""
    console.summary(
        [
            (f"{facts['score_name']} before", number(facts["score_before"])),
            (f"{facts['score_name']} after", number(facts["score_after"])),
            ("steps", str(state.step)),
            ("time", f"{elapsed:.0f} s; {state.seconds:.0f} s in all training steps"),
            ("tokens per second", f"{facts['tokens_per_second'] or 0:.0f}{parts}"),
            ("run", str(run_dir)),
            ("report", str(report_path)),
            ("adapter", facts["adapter"]),
        ]
    )
