"""Runs on a GPU that are interrupted, killed or lose their engine: `pytest -m gpu -s tests/test_resume_gpu.py`.

Every run is a process of its own. With vLLM where it can be used, which takes some 30 s a run, else with the
transformers engine. `TANDEM_TEST_DEVICE=cpu` in front tries on a CPU what can be tried there, where the noise is zero.

Two runs that nothing happened to show how far apart the same run is from itself (`Bench.noise`). What was interrupted
and resumed may be apart twice as far, plus `FLOOR`. Losses can only be compared as long as the tokens are the same; one
that a rounding turned leads to another run, and `SAME` says how many completions must be the same nevertheless.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from device_memory import by_process, used_mib
from safetensors.torch import load_file
from tiny_model import save_llama, save_words
from tiny_run import write_lines

from tandem.rl.checkpoint import damage
from tandem.rollout.vllm_versions import refusal

DEVICE = os.environ.get("TANDEM_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.injects(1),
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 1 << 20
KV_MIB = 1024
# Nats; nats per token; a share; a share of the way that training has gone.
FLOOR = {"loss": 1e-3, "kl": 2e-4, "grad_norm": 0.02, "adapter": 0.02}
SAME = 0.9
REWARDS = """
def low(completions, **columns):
    return [sum(int(w[1:]) < 200 for w in c.split() if w[0] == "w") / max(len(c.split()), 1) for c in completions]
"""

# What a run's process does before `rl-train`: events come at a step of the engine within a rollout, counted from 1, or
# at an update after one.
HOOKS = """
import os, signal, subprocess, sys, time
import torch
from device_memory import used_mib
import tandem.rl.guarded_passes as passes
from tandem.rollout.{module} import {engine} as Engine

AT_STEP, AT_UPDATE, COUNTS, INSIDE = {{}}, {{}}, {{"generate": 0, "step": 0, "update": 0}}, []

def after(place, name, count, due, events):
    real = getattr(place, name)
    def wrapped(*arguments, **more):
        found = real(*arguments, **more)
        if due():
            COUNTS[count] += 1
            if event := events.get((COUNTS["generate"], COUNTS[count])):
                event()
        return found
    setattr(place, name, wrapped)

real_generate = Engine.generate
def generate(self, *arguments, **more):
    COUNTS.update(generate=COUNTS["generate"] + 1, step=0, update=0)
    INSIDE.append(1)
    try:
        return real_generate(self, *arguments, **more)
    finally:
        INSIDE.pop()
Engine.generate = generate

real_init = Engine.__init__
def built(self, *arguments, **more):
    real_init(self, *arguments, **more)
    used = 0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        used = used_mib(os.getpid())
    print("BUILT", round(used), flush=True)
Engine.__init__ = built

if Engine.name == "vllm":
    from vllm.v1.worker.gpu_worker import Worker
    after(Worker, "execute_model", "step", lambda: INSIDE, AT_STEP)
else:
    after(Engine, "_decode", "step", lambda: INSIDE, AT_STEP)
after(passes, "policy_backward", "update", lambda: COUNTS["generate"] and not INSIDE, AT_UPDATE)

def busy():
    \"\"\"The device computes on until somebody ends this.\"\"\"
    print("MIDDLE", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(512, 512, device=device)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        (a @ a).sum().item()
    print("NOT GIVEN UP", flush=True)

def noticed():
    print("MIDDLE", flush=True)
    subprocess.run(["kill", "-TERM", str(os.getpid())], check=True)
    busy()

def dies():
    raise RuntimeError("planted: the engine's core is gone")

def forbid():
    from tandem.rollout.transformers_engine import TransformersEngine
    def generate(*arguments, **more):
        raise AssertionError("a replay generates nothing")
    Engine.generate = TransformersEngine.generate = generate

{events}
sys.argv = ["rl-train", *sys.argv[1:]]
from tandem.rl import cli
cli.main()
"""


def write_place(folder: Path, device: str, engine: str) -> Path:
    """A random model with head size 64, data and a config whose sizes do not depend on how much memory is free."""
    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(600))]
    save_words(folder / "model", words, eos="<eos>", unk="<unk>")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_llama(folder / "model", len(words), **shape, max_position_embeddings=256, initializer_range=0.05)
    (folder / "rewards.py").write_text(REWARDS)
    write_lines(folder / "prompts.jsonl", [{"prompt": " ".join(f"w{i + k}" for k in range(20))} for i in range(40)])
    vllm = {"max_model_len": 128, "kv_cache_gib": KV_MIB / 1024, "enforce_eager": True} if engine == "vllm" else {}
    config: dict[str, Any] = {
        "run_name": "run",
        "output_dir": str(folder / "runs"),
        "model": {"model_name_or_path": "model", "device": device},
        "lora": {"r": 8},
        "data": {"dataset_name": "prompts.jsonl"},
        "rollout": {"engine": engine, "num_generations": 4, "max_completion_length": 8, "max_in_flight": 16, **vllm},
        "rewards": {"reward_funcs": ["rewards.py:low"]},
        "algorithm": {"beta": 0.01},
        "train": {
            "max_steps": 8,
            "generation_batch_size": 16,
            "steps_per_generation": 2,
            "max_tokens": 2048,
            "mlp_tile_rows": 4096,
            "kv_head_groups": 1,
            "offload_activations": False,
            "attention_memory": "save",
            "projection_memory": "save",
        },
        "optim": {"learning_rate": 0.001, "lr_scheduler_type": "linear"},
        "checkpoint": {"save_steps": 4, "save_total_limit": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


@dataclass
class Distance:
    """How far two runs are apart.

    Attributes:
        rollouts: the first so many have the same completions. completions: share of the same ones, by rollout.
        apart: the largest difference by metric, over the steps of these rollouts; of the adapters, where all are the
            same, as a share of what training has moved.
    """

    rollouts: int
    completions: list[float]
    apart: dict[str, float] = field(default_factory=dict)

    def within(self, noise: Distance) -> bool:
        return all(value <= 2 * noise.apart.get(name, 0.0) + FLOOR[name] for name, value in self.apart.items())


class Bench:
    """Starts runs on a device with an engine, and compares them with one that nothing happened to."""

    def __init__(self, folder: Path, device: str, engine: str) -> None:
        self.folder, self.device, self.engine = folder, device, engine
        self.config = write_place(folder, device, engine)
        for name in ("plain", "again"):
            code, said = self.finish(self.start("run", self.config, f"run_name={name}"))
            assert code == 0, said
        self.plain = folder / "runs" / "plain"
        self.noise = self.distance(folder / "runs" / "again")
        print(f"the same run twice: {self.noise}")
        assert self.noise.completions[0] >= SAME, "not even the first rollout, before any update, is the same"

    def start(self, *arguments: object, events: str = "") -> subprocess.Popen[bytes]:
        module, engine = {
            "vllm": ("vllm_engine", "VllmEngine"),
            "transformers": ("transformers_engine", "TransformersEngine"),
        }[self.engine]
        script = self.folder / f"run_{time.monotonic_ns()}.py"
        script.write_text(HOOKS.format(module=module, engine=engine, events=events))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"TANDEM_CACHE": str(self.folder / "cache"), "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
        )
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with script.with_suffix(".log").open("wb") as log:
            command = [sys.executable, str(script), *map(str, arguments)]
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    @staticmethod
    def said(process: subprocess.Popen[bytes]) -> str:
        assert isinstance(process.args, list)
        return Path(process.args[1]).with_suffix(".log").read_text(errors="replace")

    def finish(self, process: subprocess.Popen[bytes], seconds: float = 400) -> tuple[int, str]:
        """Exit code and what was printed."""
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = 124
        return code, self.said(process)

    def distance(self, run: Path) -> Distance:
        """From `plain`. What must be the same on any device is compared here: the data's order and the counters."""
        mine, theirs = rollouts(run), rollouts(self.plain)
        assert [r.order for r in mine] == [r.order for r in theirs]
        assert counters(run) == counters(self.plain)
        shares = []
        for a, b in zip(mine, theirs, strict=True):
            shares.append(sum(x == y for x, y in zip(a.tokens, b.tokens, strict=True)) / len(a.tokens))
        same = next((i for i, share in enumerate(shares) if share < 1), len(shares))
        found = Distance(same, shares)
        steps = list(zip(metrics(run), metrics(self.plain), strict=True))
        assert [a["step"] for a, _ in steps] == [b["step"] for _, b in steps]
        for name in FLOOR.keys() - {"adapter"}:
            pairs = [(a[name], b[name]) for a, b in steps[:same]]
            found.apart[name] = max((abs(a - b) / (b if name == "grad_norm" else 1) for a, b in pairs), default=0.0)
        if same == len(shares):
            found.apart["adapter"] = adapters_apart(run, self.plain)
        return found

    def check(self, run: Path, *, generated: int) -> None:
        """Judge a run that came to its end; `generated`: number of the first rollout drawn after the disturbance."""
        found = self.distance(run)
        print(f"{run.name}: {found}")
        assert found.completions[generated] >= SAME
        assert found.within(self.noise), (found, self.noise)

    def resumed(self, run: Path, *, generated: int, events: str = "") -> None:
        code, said = self.finish(self.start("resume", run, events=events))
        assert code == 0, said
        self.check(run, generated=generated)


@dataclass
class Rollout:
    order: tuple[Any, ...]
    tokens: list[list[int]]


def rollouts(run: Path) -> list[Rollout]:
    """The journal, read by hand: rows and places in the stream, and tokens."""
    rows = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    found = []
    for number in sorted({row["rollout"] for row in rows}):
        own = [row for row in rows if row["rollout"] == number]
        order = (own[0]["position"], own[0]["used"], own[0]["step"], [(r["group"], r["prompt_index"]) for r in own])
        found.append(Rollout(order, [row["completion_ids"] for row in own]))
    return found


def newest(run: Path) -> Path:
    found = sorted((run / "checkpoints").iterdir())[-1]
    assert damage(found) is None
    return found


def counters(run: Path) -> dict[str, Any]:
    """Of the newest checkpoint, without what depends on the sampled tokens or the time."""
    state = json.loads((newest(run) / "state.json").read_text())
    return {k: v for k, v in state.items() if k not in ("seconds", "num_tokens", "journal_bytes", "scores", "watch")}


def metrics(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def adapters_apart(a: Path, b: Path) -> float:
    """Norm of the difference of the trained B matrices, which begin at zero, over their norm."""
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (a, b))
    names = [name for name in second if "lora_B" in name]
    difference = math.fsum(float((first[name] - second[name]).double().square().sum()) for name in names)
    return math.sqrt(difference / math.fsum(float(second[name].double().square().sum()) for name in names))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    engine = "vllm" if DEVICE == "cuda" and refusal() is None else "transformers"
    return Bench(tmp_path_factory.mktemp("resume"), DEVICE, engine)


@pytest.fixture
def vllm(bench: Bench) -> Bench:
    if bench.engine != "vllm":
        pytest.skip("needs vLLM: no other engine is built anew")
    return bench


# In the third of four rollouts: steps 0 to 4 are done, and the checkpoint of step 4 is the newest that was due.
IN_THE_MIDDLE = {"generation": "AT_STEP[3, 4] = noticed", "update": "AT_UPDATE[3, 2] = noticed"}


@pytest.mark.parametrize("phase", IN_THE_MIDDLE)
def test_a_notice_leaves_a_checkpoint_and_the_run_goes_on_as_undisturbed(bench: Bench, phase: str) -> None:
    run = bench.folder / "runs" / phase
    code, said = bench.finish(bench.start("run", bench.config, f"run_name={phase}", events=IN_THE_MIDDLE[phase]))
    assert code == 1, said
    assert "MIDDLE" in said
    assert "NOT GIVEN UP" not in said
    assert "Traceback" not in said
    assert f"stopped after step 4 with a checkpoint; go on with: rl-train resume {run}" in " ".join(said.split())
    assert newest(run).name == "step_000004"
    assert len(rollouts(run)) == (2 if phase == "generation" else 3)
    forgetful = shutil.copytree(run, run.with_name(f"{phase}_forgetful"))
    bench.resumed(run, generated=2)
    if phase == "update":
        moments_are_needed(bench, forgetful)


def moments_are_needed(bench: Bench, run: Path) -> None:
    """A resume that loses the optimiser's moments is seen by the same comparison: it can fail."""
    lose = "import tandem.rl.commands as c\nreal = c.restore\nc.restore = lambda *a: (real(*a), a[2].state.clear())"
    code, said = bench.finish(bench.start("resume", run, events=lose))
    assert code == 0, said
    moved = adapters_apart(run, bench.plain)
    print(f"without the optimiser's moments: {bench.distance(run)}, adapters {moved:.4f} apart")
    assert moved > FLOOR["adapter"]


def test_a_kill_in_mid_generation_leaves_nothing_on_the_device(bench: Bench) -> None:
    run = bench.folder / "runs" / "killed"
    process = bench.start("run", bench.config, f"run_name={run.name}", events="AT_STEP[4, 4] = busy")
    before = memory(bench, process.pid)
    try:
        wait_for(lambda: "MIDDLE" in bench.said(process) or process.poll() is not None, 400)
        assert process.poll() is None, bench.said(process)
        told_apart = process.pid in by_process()
        during = memory(bench, process.pid)
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    def left() -> float:
        known = by_process()
        return sum(known.get(pid, 0) for pid in family) if told_apart else memory(bench, process.pid) - before

    wait_for(lambda: left() <= 64 and not any(map(psutil.pid_exists, family)), 30)
    print(f"MiB in mid-generation {during:.0f}, after the kill {left():.0f}; of the process alone: {told_apart}")
    assert left() <= (0 if told_apart else 64)
    assert not [pid for pid in family if psutil.pid_exists(pid)]
    if bench.engine == "vllm":
        assert during >= (0 if told_apart else before) + KV_MIB
    assert newest(run).name == "step_000004"
    bench.resumed(run, generated=3)


def memory(bench: Bench, pid: int) -> float:
    return 0.0 if bench.device == "cpu" else used_mib(pid)


def wait_for(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.5)


def test_a_replay_needs_the_journal_alone(bench: Bench) -> None:
    with put_away(bench.folder / "prompts.jsonl"), put_away(bench.folder / "rewards.py"):
        code, said = bench.finish(bench.start("replay", bench.plain, events="forbid()"))
    assert code == 0, said
    run = bench.folder / "runs" / "plain-replay"
    found = bench.distance(run)
    print(f"replay: {found}")
    assert found.rollouts == len(found.completions) == 4
    assert found.within(bench.noise), (found, bench.noise)


@contextmanager
def put_away(path: Path) -> Iterator[None]:
    aside = path.rename(path.with_name(f"{path.name}.away"))
    try:
        yield
    finally:
        aside.rename(path)


def test_a_dead_vllm_engine_is_built_anew_once(vllm: Bench) -> None:
    run = vllm.folder / "runs" / "died"
    code, said = vllm.finish(vllm.start("run", vllm.config, f"run_name={run.name}", events="AT_STEP[3, 4] = dies"))
    assert code == 0, said
    assert said.count("the vllm engine died") == 1
    assert "planted" in said
    assert "could not be closed" not in said
    first, second = map(int, re.findall(r"BUILT (\d+)", said))
    print(f"device memory in use with the first engine {first} MiB, with the second {second} MiB")
    assert second <= first + KV_MIB / 2, "what the dead engine held was not given back"
    vllm.check(run, generated=2)


def test_a_vllm_engine_that_dies_again_stops_the_run_with_a_checkpoint(vllm: Bench) -> None:
    run = vllm.folder / "runs" / "died_twice"
    events = "AT_STEP[3, 4] = AT_STEP[4, 2] = dies"  # its fourth call is the third rollout, tried again
    code, said = vllm.finish(vllm.start("run", vllm.config, f"run_name={run.name}", events=events))
    text = " ".join(said.split())
    assert code == 1, said
    assert "Traceback" not in said.rpartition("error: ")[2]
    assert "error: the vllm engine died again after it was built anew" in text
    assert f"a checkpoint after step 4 is kept: rl-train resume {run}" in text
    assert newest(run).name == "step_000004"
    vllm.resumed(run, generated=2)
