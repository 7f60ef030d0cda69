"""Two processes train as one does: the same loss and gradients, the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from run_server import RunServer
from safetensors.torch import load_file
from tiny_model import save_llama, save_words

from tandem.rl.distributed import interleave

STEPS = 3


# Fails on the second rank, at the second rollout, while there is a file `broken` beside it.
REWARD = """
import os, pathlib

def low(completions, trainer_state, **columns):
    broken = pathlib.Path(__file__).with_name("broken").exists()
    if broken and os.environ.get("RANK") == "1" and trainer_state.global_step == 2:
        raise ValueError("not yet")
    return [sum(w < 'w3' for w in t.split()) for t in completions]

def rare(completions):
    return [float(t.startswith("w4")) for t in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(48))]
    save_words(folder / "model", words, eos="<eos>", unk="<unk>")
    save_llama(folder / "model", len(words), initializer_range=0.15, bos_token_id=1)
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{30 - i} w{i}"} for i in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs = [{"prompt": f"w{i}", "chosen": f"w{20 + i} w5", "rejected": f"w{30 + i}"} for i in range(9)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> RunServer:
    return RunServer(tmp_path_factory.mktemp("server"))


# What a run differs in; the batches (3 groups, 5 examples) cannot be shared out evenly by two.
RUNS = {
    "grpo": {
        "algorithm": {"beta": 0.05, "num_iterations": 2, "scale_rewards": "batch", "entropy_coef": 0.01},
        "train": {"generation_batch_size": 12, "max_steps": 4},
    },
    # Of some batches nothing is left to learn from: neither momentum nor decay may move the weights then.
    "kl_in_reward": {
        "algorithm": {
            "beta": 0.05,
            "kl_estimator": "k1",
            "top_entropy_quantile": 0.5,
            "drop_uniform_groups": True,
            "loss_type": "dr_grpo",
        },
        "rewards": {"reward_funcs": ["reward.py:rare"]},
        "train": {"generation_batch_size": 12, "steps_per_generation": 3, "max_steps": 6},
        "optim": {"learning_rate": 0.01, "weight_decay": 0.5},
    },
    # Tries of one and two groups among them, so that a rank has nothing to generate; most groups have no signal.
    "dynamic_sampling": {
        "rollout": {"num_generations": 4, "max_completion_length": 4, "dynamic_sampling": True},
        "rewards": {"reward_funcs": ["reward.py:rare"]},
        "data": {"dataset_name": "rows.jsonl", "curriculum": {"enabled": True, "retry_probability": 0.5}},
        "train": {"generation_batch_size": 12, "max_steps": 4},
    },
    "online_dpo": {
        "algorithm": {"name": "online_dpo"},
        "train": {"generation_batch_size": 12, "max_steps": STEPS},
    },
    "sft": {
        "algorithm": {"name": "sft"},
        "train": {"per_device_train_batch_size": 5, "max_steps": STEPS},
    },
    "dpo": {
        "algorithm": {"name": "dpo"},
        "data": {"dataset_name": "pairs.jsonl"},
        "train": {"per_device_train_batch_size": 5, "max_steps": STEPS},
    },
}


# Started by `torchrun` itself; ranks of the other runs get the same variables from a process that imported all before.
BY_TORCHRUN = "grpo"


def train(place: Path, server: RunServer, name: str, processes: int, device: str = "cpu") -> Path:
    path = write_config(place, name, f"{name}-{device}-{processes}", device)
    if device == "cuda" or (name == BY_TORCHRUN and processes > 1):
        done = torchrun(place, processes, "run", path)
        code, said = done.returncode, done.stdout + done.stderr
    else:
        job = {"processes": processes, "environment": cache(place, processes)}
        code, said = server.run("run", path, no_report=processes > 1, **job)
    assert code == 0, said[-3000:]
    assert said.count("run folder") == 1, "one process talks"
    return place / "runs" / path.stem


def write_config(place: Path, name: str, run_name: str, device: str = "cpu") -> Path:
    config = {
        "run_name": run_name,
        "output_dir": str(place / "runs"),
        "model": {"model_name_or_path": "model", "device": device, "dtype": "float32"},
        "data": {"dataset_name": "rows.jsonl"},
        "rollout": {"num_generations": 4, "max_completion_length": 4},
        "rewards": {"reward_funcs": ["reward.py:low"]},
        "optim": {"learning_rate": 0.01},
        "warmup": {"max_steps": 1, "dataset_name": "rows.jsonl", "per_device_train_batch_size": 3},
        **RUNS[name],
    }
    if device == "cuda":  # one process alone would take vLLM
        config["rollout"] = {**config["rollout"], "engine": "transformers"}
    path = place / f"{run_name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def cache(place: Path, processes: int) -> dict[str, str]:
    return {"TANDEM_CACHE": str(place / f"c{processes}")}


def torchrun(place: Path, processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "tandem.rl.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | cache(place, processes)
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_same_run(place: Path, server: RunServer, name: str) -> None:
    same_run(*(train(place, server, name, n) for n in (1, 2)))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", RUNS)
def test_two_gpus_make_the_same_run(place: Path, server: RunServer, name: str) -> None:
    same_run(*(train(place, server, name, n, "cuda") for n in (1, 2)))


def same_run(one: Path, two: Path) -> None:
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    names = sorted(name for name in first if "lora_B" in name)
    flat = [torch.cat([run[name].double().flatten() for name in names]) for run in (first, second)]
    assert flat[0].abs().max() > 1e-3, "something was learned"
    # By norm: Adam divides by the gradient's own size, so where that is rounding noise, single weights may differ.
    assert (flat[0] - flat[1]).norm() < 1e-3 * flat[0].norm()
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert len(lines[0]) == len(lines[1])
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith(("time/", "perf", "step_time", "memory/device")):
                # A measure that is not known (yet) is None in both.
                assert a[key] == b[key] or b[key] == pytest.approx(a[key], rel=2e-3, abs=1e-4), key


def test_a_reward_that_fails_on_one_rank_loses_no_rank_s_completions(place: Path, server: RunServer) -> None:
    right = place / "runs" / "grpo-cpu-2"
    if not right.exists():
        train(place, server, "grpo", 2)
    (place / "broken").touch()
    path = write_config(place, "grpo", "wrong")
    done = torchrun(place, 2, "run", path)
    assert done.returncode != 0
    assert "not yet" in done.stderr
    run = place / "runs" / "wrong"
    kept = (run / "unscored.jsonl").read_text().splitlines()
    assert [json.loads(line)["group"] for line in kept] == [0] * 4 + [1] * 4 + [2] * 4
    assert (run / "checkpoints" / "step_000002").is_dir()
    (place / "broken").unlink()
    code, said = server.run("resume", run, processes=2, environment=cache(place, 2), no_report=True)
    assert code == 0, said[-3000:]
    assert "scoring 12 completions that were generated before" in said
    assert not (run / "unscored.jsonl").exists()
    for name in ("journal.jsonl", "adapter/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (right / name).read_bytes(), name


# Generating ends without memory on one rank.
FORGETFUL = """
import os
from tandem.rollout.transformers_engine import TransformersEngine

def low(completions):
    return [float(len(t)) for t in completions]

if os.environ.get("RANK") == "RANK_HERE":
    def full(*_):
        raise MemoryError("no room here")
    TransformersEngine._decode = full
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_memory_that_ends_on_one_rank_ends_the_run(place: Path, rank: str) -> None:
    """The others wait for that rank, so nothing may be done together any more, and torchrun ends them."""
    (place / "forgetful.py").write_text(FORGETFUL.replace("RANK_HERE", rank))
    config = write_config(place, "grpo", f"forgetful_{rank}")
    done = torchrun(place, 2, "run", config, "rewards.reward_funcs=[forgetful.py:low]", "warmup.max_steps=0")
    assert done.returncode != 0
    assert "out of memory while a single completion was generated: no room here" in done.stderr


def test_dealt_out_items_come_back_in_order() -> None:
    for count in range(7):
        for ranks in (1, 2, 3):
            parts = [list(range(r, count, ranks)) for r in range(ranks)]
            assert interleave(parts) == list(range(count))


@pytest.mark.parametrize(("processes", "code"), [("1", -6), ("2", 0)])
def test_a_rank_ends_before_what_is_left_of_its_process_group_can_abort_it(processes: str, code: int) -> None:
    """PyTorch's gloo group does so now and then where modules are cleared; one that always does stands in for it."""
    program = """
import atexit, os, sys
class Group:
    def __del__(self, abort=os.abort):
        abort()
sys.modules["left"] = left = type(sys)("left")
left.group, left.itself = Group(), left
del left, Group
atexit.register(print, "atexit has run")
from tandem.rl.cli import main
sys.argv = ["rl-train", "rewards", "--help"]
main()
"""
    environment = os.environ | {"WORLD_SIZE": processes}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, env=environment, check=False
    )
    assert done.returncode == code, done.stderr
    assert "atexit has run" in done.stdout
