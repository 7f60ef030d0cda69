"""Memory that ends in the middle of a pass: the attempt leaves no trace, and the run goes on with less.

Faults are raised where they come in a run: in the forward or the backward pass of a pack, after others of the same step
have left their gradients. The oracle is a run that had the smaller size from its start.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from run_server import RunServer
from tiny_run import outcome, write_lines, write_place

from tandem.rl.packing import pack
from tandem.rl.plan import Longest
from tandem.rl.samples import Sequence
from tandem.rl.trial_update import WorstBatch

# A device that holds packs of so many tokens: a larger one fails in its backward pass, which is when gradients of the
# packs before it are there, or in its forward pass. Prints what fails.
SMALL_DEVICE = """
import torch
from tandem.rl import step
real = step.scored_hidden
def limited(lm, pack):
    where = WHERE if torch.is_grad_enabled() else "forward"
    def fail(grad=None):
        print("FAILS", where, pack.num_tokens, flush=True)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has no more")
    large = pack.num_tokens > LIMIT
    if large and where == "forward":
        real(lm, pack)
        torch.rand(3)
        fail()
    hidden = real(lm, pack)
    if large:
        hidden.register_hook(fail)
    return hidden
step.scored_hidden = limited
"""
# Nothing fits from the so-manieth update on.
GONE = """
import torch
from tandem.rl import guarded_passes
real, calls = guarded_passes.policy_backward, []
def gone(*arguments, **options):
    calls.append(1)
    real(*arguments, **options)
    if len(calls) >= FIRST:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has no more")
guarded_passes.policy_backward = gone
"""
UPDATE_ONLY = ("algorithm.beta=0", "train.steps_per_generation=1", "warmup.max_steps=0")


def small_device(limit: int, where: str = "backward") -> str:
    return SMALL_DEVICE.replace("LIMIT", str(limit)).replace("WHERE", repr(where))


class Place:
    """A folder with a tiny run to start, and a server that starts it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, RunServer(folder)
        self.config = write_place(folder)
        answers = [{"prompt": f"w{i}", "chosen": f" w{i + 1} w1", "rejected": f" w{i + 2}"} for i in range(8)]
        write_lines(folder / "pairs.jsonl", answers)

    def run(self, name: str, *overrides: str, code: int = 0, **job: Any) -> tuple[Path, str]:
        found, said = self.server.run("run", self.config, f"run_name={name}", *overrides, no_report=True, **job)
        assert found == code, said
        assert "Traceback" not in said
        return self.folder / "runs" / name, " ".join(said.split())

    def resume(self, run: Path, *overrides: str, **job: Any) -> str:
        code, said = self.server.run("resume", run, *overrides, no_report=True, **job)
        assert code == 0, said
        return " ".join(said.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("memory"))


def same_but_for_the_size(reduced: Path, small: Path) -> dict[str, Any]:
    """Two runs that learned the same, byte for byte; returns the state of the one whose packs were halved."""
    found, expected = outcome(reduced), outcome(small)
    for one, run in ((found, reduced), (expected, small)):
        # Each line of a journal names the config, of which the size is a part.
        lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        one["files"]["journal.jsonl"] = [line | {"source": "", "sha256": ""} for line in lines]
    assert found["files"].keys() == expected["files"].keys()
    assert not [name for name, content in expected["files"].items() if found["files"][name] != content]
    without = [{k: v for k, v in record.items() if k != "memory/halved"} for record in found["metrics"]]
    assert without == expected["metrics"]
    ours = ("reduced", "reduced_on", "halved")
    assert {k: v for k, v in found["state"].items() if k not in ours} == {
        k: v for k, v in expected["state"].items() if k not in ours
    }
    return found["state"]


# --- packs are halved -------------------------------------------------------------------------------------------------


def failures(said: str) -> list[int]:
    """Tokens of the packs that failed."""
    return [int(rest.split()[1]) for rest in said.split("FAILS ")[1:]]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_done_again_is_the_step_with_smaller_packs(place: Place, where: str) -> None:
    run, said = place.run(f"reduced_{where}", *UPDATE_ONLY, "train.max_tokens=20", patch=small_device(12, where))
    failed = failures(said)
    assert failed == [20]
    assert said.count("warning: out of memory in step 1 with a pack of 20 tokens: 2.50 GiB asked for") == 1
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["memory/halved"] for m in metrics if "loss" in m] == [1] * 6
    small, _ = place.run(f"small_{where}", *UPDATE_ONLY, "train.max_tokens=10")
    state = same_but_for_the_size(run, small)
    assert (state["halved"], state["reduced"], state["reduced_on"]) == (1, {"max_tokens": 10}, "cpu")


def test_every_pass_of_a_run_is_guarded(place: Place) -> None:
    """Warm-up, log-probs of the old and of the reference policy, update; packs of forty tokens come down to five."""
    run, said = place.run("all_reduced", patch=small_device(8))
    assert failures(said) == [40, 20, 10]
    size = json.loads((run / "checkpoints/step_000006/state.json").read_text())["reduced"]["max_tokens"]
    small, _ = place.run("all_small", f"train.max_tokens={size}")
    found, expected = outcome(run), outcome(small)
    assert found["files"].keys() == expected["files"].keys()
    # The warm-up of one run has larger packs, whose sums are taken in another order.
    a, b = ([m for m in one["metrics"] if "loss" in m] for one in (found, expected))
    assert len(a) == len(b) > 0
    assert all(m["loss"] == pytest.approx(n["loss"], abs=1e-5) for m, n in zip(a, b, strict=True))


# The embedded engine's cache, of which some completions at once are too much, from the so-manieth token on.
SMALL_CACHE = """
import torch
from tandem.rollout.transformers_engine import TransformersEngine
real, calls = TransformersEngine._decode, []
def limited(self, batch, tokens):
    calls.append(1)
    if len(calls) >= FIRST and len(batch.requests) > MOST:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has no more")
    real(self, batch, tokens)
TransformersEngine._decode = limited
"""


def test_a_rollout_without_memory_is_generated_in_smaller_waves(place: Place) -> None:
    free, _ = place.run("free_rollout", *UPDATE_ONLY)
    small, said = place.run("small_rollout", *UPDATE_ONLY, patch=cache_of(5))
    assert said.count("warning: out of memory while 16 completions were generated at once") == 1
    rewards = [
        [json.loads(line)["reward"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for run in (free, small)
    ]
    assert len(rewards[0]) == 6
    assert rewards[0] == rewards[1]


def test_a_rollout_without_any_memory_ends_the_run_with_a_checkpoint(place: Place) -> None:
    run, said = place.run("no_rollout", *UPDATE_ONLY, code=2, patch=cache_of(0, first=9))
    assert "error: out of memory while a single completion was generated" in said
    assert "a checkpoint from before this step is kept" in said
    place.resume(run)
    assert (run / "checkpoints" / "step_000006").is_dir()


def cache_of(most: int, *, first: int = 5) -> str:
    return SMALL_CACHE.replace("FIRST", str(first)).replace("MOST", str(most))


PHASES = {
    "sft": ("algorithm.name=sft", "data.dataset_name=examples.jsonl", "train.per_device_train_batch_size=8"),
    "dpo": (
        "algorithm.name=dpo",
        "algorithm.beta=0",
        "data.dataset_name=pairs.jsonl",
        "train.per_device_train_batch_size=4",
    ),
}


@pytest.mark.parametrize("name", PHASES)
def test_what_dropout_drew_is_drawn_again(place: Place, name: str) -> None:
    """The attempt that failed has used up random numbers, of the packs before it and of its own."""
    phase = (*PHASES[name], "lora.lora_dropout=0.5", "warmup.max_steps=0", "eval.dataset_name=null")
    run, said = place.run(f"{name}_reduced", *phase, "train.max_tokens=16", patch=small_device(8, "backward"))
    assert failures(said) == [16]
    state = json.loads(next((run / "checkpoints").glob("step_000006/state.json")).read_text())
    small, _ = place.run(f"{name}_small", *phase, f"train.max_tokens={state['reduced']['max_tokens']}")
    adapter = "adapter/adapter_model.safetensors"
    assert (run / adapter).read_bytes() == (small / adapter).read_bytes()
    optimizer = "checkpoints/step_000006/optimizer.safetensors"  # and the random state
    assert (run / optimizer).read_bytes() == (small / optimizer).read_bytes()


def test_a_resumed_run_does_not_try_again_what_did_not_fit(place: Place) -> None:
    run, _ = place.run("first_half", *UPDATE_ONLY, "train.max_tokens=20", patch=small_device(12))
    said = place.resume(run, "train.max_steps=8", patch=small_device(12))
    assert "FAILS" not in said
    assert "out of memory" not in said
    # On another card it may fit.
    for path in (run / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        path.write_text(json.dumps(state | {"reduced_on": "another card"}))
        (path.parent / "files.json").write_text(json.dumps(manifest_of(path.parent)))
    said = place.resume(run, "train.max_steps=10", patch=small_device(12))
    assert "reduced on another card are forgotten: this is cpu" in said
    assert failures(said) == [20]


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    files = [path for path in checkpoint.iterdir() if path.name != "files.json"]
    return {p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in files}


# --- nothing helps ----------------------------------------------------------------------------------------------------


def test_where_nothing_helps_the_run_ends_with_a_checkpoint_and_can_go_on(place: Place) -> None:
    sound, _ = place.run("sound", *UPDATE_ONLY)
    run, said = place.run("gone", *UPDATE_ONLY, code=2, patch=GONE.replace("FIRST", "3"))
    assert "out of memory in step 3: 2.50 GiB asked for" in said
    assert "is a single sequence, which cannot be cut" in said
    assert "shorten rollout.max_completion_length" in said
    assert (run / "checkpoints" / "step_000002").is_dir()
    said = place.resume(run)
    assert "after step 2" in said
    assert "out of memory" not in said
    same_but_for_the_size(run, sound)


# --- the largest pack, tried first -----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["rl", "sft"])
def test_a_trial_changes_no_byte(place: Place, phase: str) -> None:
    """Not even with dropout, whose random numbers the trial draws too."""
    chosen = (*PHASES["sft"], "lora.lora_dropout=0.5", "eval.dataset_name=null") if phase == "sft" else ()
    tried, said = place.run(f"tried_{phase}", *chosen, "train.worst_case_first=true", "train.max_steps=4")
    plain, unsaid = place.run(f"plain_{phase}", *chosen, "train.max_steps=4")
    # Two groups an update: a prompt of two words, four answers of three, of which the last predicts nothing.
    tokens = 20 if phase == "rl" else 16  # eight examples of a word, a word and an end
    assert f"the largest pack that can come, of {tokens} tokens, fits" in said
    assert "largest pack" not in unsaid
    if phase == "rl":
        same_but_for_the_size(tried, plain)
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step_000004/optimizer.safetensors"):
        assert (tried / name).read_bytes() == (plain / name).read_bytes()


@pytest.mark.parametrize("max_tokens", [1, 29, 30, 64, 100, 333, 4096])
@pytest.mark.parametrize(("prompt", "completion"), [(10, 20), (1, 1), (25, 5)])
@pytest.mark.parametrize("shared", [True, False])
def test_the_trial_s_pack_is_the_fullest_there_can_be(max_tokens, prompt, completion, shared) -> None:
    """As full as `max_tokens`, unless the batch has fewer tokens or one sequence more; never fuller."""
    one = WorstBatch(Longest(prompt, completion), 12, 4, shared).pack(max_tokens)
    batch = [Sequence([0] * prompt, [1] * completion, [True] * completion, family=i // 4) for i in range(12)]
    (whole,) = pack(batch, 1 << 20, share_prefix=shared)
    alone = prompt + completion - 1
    assert one.num_tokens == max(alone, min(max_tokens, whole.num_tokens))
    # And it contains a sequence of full length.
    assert max(one.position_ids) == alone - 1


def test_memory_that_ends_ends_in_the_trial(place: Place) -> None:
    """Nothing is generated before it, and what the trial has found is kept."""
    run, said = place.run("tried_small", *UPDATE_ONLY, "train.worst_case_first=true", patch=small_device(12))
    assert "warning: out of memory in the trial of the largest pack" in said
    assert said.index("fits") < said.index("held-out score after 0 steps")
    assert failures(said) == [40, 20]
    state = json.loads((run / "checkpoints/step_000006/state.json").read_text())
    small, _ = place.run("tried_oracle", *UPDATE_ONLY, f"train.max_tokens={state['reduced']['max_tokens']}")
    same_but_for_the_size(run, small)
    never, said = place.run("tried_never", "train.worst_case_first=true", patch=small_device(1), code=2)
    assert "out of memory in the trial of the largest pack: 2.50 GiB asked for" in said
    assert not never.exists(), "a run that fails before its first step leaves no folder"
