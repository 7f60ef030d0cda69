"""`rl-train` from end to end, as a user runs it, on a random Llama of a few thousand weights.

What must be a process of its own (signals, resuming, what is imported) is one; the other commands go through the same
entry point, `tandem.rl.cli.main`, inside the test process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from run_server import RunServer
from tiny_model import save_llama

from tandem.rl import cli
from tandem.rl.allocator import growing_segments

RL_TRAIN = [sys.executable, "-c", "from tandem.rl.cli import main; main()"]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
STEPS = 12

REWARDS = """
import time

def low(completions, **columns):
    return [sum(int(w[1:]) < 48 for w in c.split()) / max(len(c.split()), 1) for c in completions]

def raises(completions, **columns):
    raise KeyError("no such answer")

def raises_late(completions, trainer_state, **columns):
    if trainer_state.global_step >= 2:
        raise RuntimeError("third batch")
    return [float(len(c)) for c in completions]

def short(completions, **columns):
    return [1.0]

def not_a_number(completions, **columns):
    return [float("nan")] * len(completions)

def slow(completions, **columns):
    time.sleep(0.2)
    return low(completions)
"""

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


class Done(NamedTuple):
    code: int
    out: str
    err: str


# --- what the commands work on ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, rewards and two configs that name them relative to themselves."""
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    write_lines(folder / "prompts.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(8)])
    write_lines(folder / "held_out.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(20, 24)])
    turns = [
        [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{90 - i % 3} w{i} w5"}]
        for i in range(12)
    ]
    write_lines(folder / "chats.jsonl", [{"messages": t} for t in turns])
    write_config(folder / "grpo.yaml", grpo_config())
    write_config(folder / "sft.yaml", sft_config())
    pairs = [{"prompt": f"w{i}", "chosen": f"w{50 + i % 7} w5", "rejected": f"w{60 + i % 5} w9 w9"} for i in range(16)]
    write_lines(folder / "pairs.jsonl", pairs)
    labelled = [
        {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
        for p in pairs
        for side in ("chosen", "rejected")
    ]
    write_lines(folder / "labelled.jsonl", labelled)
    write_config(folder / "dpo.yaml", dpo_config())
    return folder


def write_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "<user>", "<assistant>", *(f"w{i}" for i in range(96))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    save_llama(folder, len(words), max_position_embeddings=64, initializer_range=0.15)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_config(path: Path, config: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(config))


def grpo_config() -> dict[str, Any]:
    return {
        "run_name": "grpo",
        "model": {"model_name_or_path": "model", "device": "cpu"},
        "lora": {"r": 8},
        "data": {"dataset_name": "prompts.jsonl"},
        "eval": {"dataset_name": "held_out.jsonl", "num_generations": 16, "temperature": 1.0},
        "rollout": {"num_generations": 24, "max_completion_length": 3},
        "rewards": {"reward_funcs": ["rewards.py:low"]},
        "algorithm": {"beta": 0.001},
        "train": {"max_steps": STEPS, "generation_batch_size": 96},
        "optim": {"learning_rate": 0.02},
        "checkpoint": {"save_steps": 2, "save_total_limit": None},
        "warmup": {"max_steps": 2, "dataset_name": "chats.jsonl", "learning_rate": 0.001},
    }


def sft_config() -> dict[str, Any]:
    return {
        "run_name": "sft",
        "model": {"model_name_or_path": "model", "device": "cpu"},
        "lora": {"r": 8},
        "data": {"dataset_name": "chats.jsonl"},
        "eval": {"dataset_name": "chats.jsonl"},
        "algorithm": {"name": "sft"},
        "train": {"max_steps": 15, "per_device_train_batch_size": 6},
        "optim": {"learning_rate": 0.02},
    }


def dpo_config() -> dict[str, Any]:
    return {
        "run_name": "dpo",
        "model": {"model_name_or_path": "model", "device": "cpu"},
        "lora": {"r": 8},
        "data": {"dataset_name": "pairs.jsonl"},
        "eval": {"dataset_name": "pairs.jsonl"},
        "algorithm": {"name": "dpo"},
        "train": {"max_steps": 8, "per_device_train_batch_size": 8},
        "optim": {"learning_rate": 0.01},
        "checkpoint": {"save_steps": 4, "save_total_limit": None},
    }


def process(*arguments: object) -> Done:
    """As a user types it, imports and all."""
    done = subprocess.run(
        [*RL_TRAIN, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, env=ENVIRONMENT
    )
    return Done(done.returncode, done.stdout, done.stderr)


def here(*arguments: object) -> Done:
    """Run a command line in this process, with one thread as the other processes have."""
    import torch

    out, err, threads, code = io.StringIO(), io.StringIO(), torch.get_num_threads(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", ["rl-train", *map(str, arguments)])
        torch.set_num_threads(1)
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            torch.set_num_threads(threads)
    return Done(code, out.getvalue(), err.getvalue())


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run: Path) -> list[dict[str, Any]]:
    prefixes = ("step_time", "time/", "perf/")
    return [{k: v for k, v in line.items() if not k.startswith(prefixes)} for line in metrics(run)]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def checkpoint_files(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step_{step:06d}"
    return {name: (folder / name).read_bytes() for name in ("adapter_model.safetensors", "optimizer.safetensors")}


def assert_one_message(done: Done, *parts: str) -> None:
    assert done.code == 2, done
    assert "Traceback" not in done.out + done.err
    assert done.err.count("error: ") == 1, done.err
    for part in parts:
        assert part in done.err


# --- supervised fine-tuning -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft_run(place: Path) -> tuple[Path, Done]:
    done = here("run", place / "sft.yaml", f"output_dir={place / 'runs'}")
    assert done.code == 0, done.err
    return place / "runs" / "sft", done


@pytest.mark.parametrize(
    "said", [{}, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": ""}], ids=str
)
def test_a_gpu_s_memory_grows_unless_the_user_says_otherwise(said: dict[str, str]) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in names} | said
    code = f"import os; print({{k: v for k, v in os.environ.items() if k in {names}}}, 'torch' in sys.modules)"
    whole = f"import atexit, sys\nfrom tandem.rl.cli import main\natexit.register(lambda: exec({code!r}))\nmain()"
    done = subprocess.run([sys.executable, "-c", whole, "--help"], env=environment, capture_output=True, text=True)
    expected = said or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert done.stdout.strip().endswith(f"{expected} False"), done.stdout


@pytest.mark.parametrize(
    ("kernel", "grows"), [("6.8.0-49-generic", True), ("5.15.90.1-microsoft-standard-WSL2", False)]
)
def test_segments_do_not_grow_where_the_driver_refuses_it(
    monkeypatch: pytest.MonkeyPatch, kernel: str, grows: bool
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert ("PYTORCH_CUDA_ALLOC_CONF" in growing_segments(kernel)) is grows


def test_sft_learns_and_leaves_its_files(sft_run: tuple[Path, Done]) -> None:
    run, done = sft_run
    losses = [line["loss"] for line in metrics(run) if "loss" in line]
    assert len(losses) == 15
    assert losses[-1] < 0.5 * losses[0]
    facts = summary(run)
    assert facts["score_name"] == "held-out loss"
    assert facts["score_after"] < 0.5 * facts["score_before"]
    assert facts["steps"] == 15
    assert "step 15/15" in done.out
    assert str(run / "report.html") in done.out.replace("\n", "")
    assert "<html" in (run / "report.html").read_text().lower()


def test_adapter_is_peft_s(place: Path, sft_run: tuple[Path, Done]) -> None:
    """The model that peft loads by itself has the held-out loss that the run reported."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, sft_run[0] / "adapter").eval()
    total, count = 0.0, 0
    for line in (place / "chats.jsonl").read_text().splitlines():
        user, assistant = (m["content"] for m in json.loads(line)["messages"])
        prompt = tokenizer(f"<user> {user} <eos> <assistant>", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f"{assistant} <eos>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(float(log_probs[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        count += len(answer)
    assert total / count == pytest.approx(summary(sft_run[0])["score_after"], rel=1e-3)


def test_the_page_on_using_an_adapter_works_as_it_stands(
    sft_run: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    page = (Path(__file__).parents[1] / "docs" / "use-adapter.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    assert code.count("runs/sums/adapter") == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sums").mkdir(parents=True)
    shutil.copytree(sft_run[0] / "adapter", tmp_path / "runs" / "sums" / "adapter")
    with_adapter: dict[str, Any] = {}
    exec(code.partition("model.merge_and_unload")[0], with_adapter)
    after: dict[str, Any] = {}
    exec(code, after)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    inputs = after["inputs"]
    torch.testing.assert_close(merged(**inputs).logits, with_adapter["model"](**inputs).logits)
    with with_adapter["model"].disable_adapter():
        assert not torch.allclose(merged(**inputs).logits, with_adapter["model"](**inputs).logits, atol=1e-3)


def test_seed_governs_dropout(place: Path, tmp_path: Path) -> None:
    """Whatever drew random numbers before, the same seed drops the same units."""
    import torch

    adapters = []
    for name in ("one", "same"):
        torch.rand(7)
        options = [f"output_dir={tmp_path}", f"run_name={name}", "lora.lora_dropout=0.5"]
        done = here("run", place / "sft.yaml", *options, "train.max_steps=1", "eval.dataset_name=null")
        assert done.code == 0, done.err
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


# --- reinforcement learning -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grpo_run(place: Path) -> tuple[Path, Done]:
    done = process("run", place / "grpo.yaml", f"output_dir={place / 'runs'}")
    assert done.code == 0, done.err
    return place / "runs" / "grpo", done


def test_grpo_learns(grpo_run: tuple[Path, Done]) -> None:
    run, done = grpo_run
    rewards = [line["reward"] for line in metrics(run) if "reward" in line]
    assert len(rewards) == STEPS
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    scores = {line["step"]: line["eval/score"] for line in metrics(run) if "eval/score" in line}
    assert set(scores) == {0, STEPS}
    assert scores[STEPS] > scores[0] + 0.1
    facts = summary(run)
    assert (facts["score_before"], facts["score_after"]) == (scores[0], scores[STEPS])
    assert "step 2/2" in done.out, "the warm-up's steps are shown"
    assert f"step {STEPS}/{STEPS}" in done.out
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [f"step_{i:06d}" for i in range(2, 13, 2)]


def test_trainer_and_engine_agree(grpo_run: tuple[Path, Done]) -> None:
    lines = [line for line in metrics(grpo_run[0]) if "reward" in line]
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-3 for line in lines)


def test_rewards_on_record_are_the_function_s(grpo_run: tuple[Path, Done]) -> None:
    rows = [json.loads(line) for line in (grpo_run[0] / "rollouts" / "step_000003.jsonl").read_text().splitlines()]
    assert len(rows) == 96
    for row in rows:
        words = row["completion"].split()
        expected = sum(int(w[1:]) < 48 for w in words) / max(len(words), 1)
        assert row["rewards"]["low"] == pytest.approx(expected)
    logged = next(line["reward"] for line in metrics(grpo_run[0]) if line["step"] == 3 and "reward" in line)
    assert logged == pytest.approx(sum(row["reward"] for row in rows) / 96)


# --- stopping and resuming --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_run(place: Path) -> tuple[Path, Done]:
    """Ctrl-C once the third step is on the screen; the slow reward leaves time for it."""
    command = [*RL_TRAIN, "run", str(place / "grpo.yaml"), f"output_dir={place / 'runs'}", "run_name=stopped"]
    command += [f"rewards.reward_funcs=[{{function: '{place / 'rewards.py'}:slow', name: low}}]"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as running:
        assert running.stdout is not None
        seen = []
        for line in running.stdout:
            seen.append(line)
            if line.startswith(f"step  3/{STEPS}"):
                running.send_signal(signal.SIGINT)
                break
        out, err = running.communicate(timeout=60)
    return place / "runs" / "stopped", Done(running.returncode, "".join(seen) + out, err)


def test_one_interrupt_stops_with_a_checkpoint(stopped_run: tuple[Path, Done]) -> None:
    run, done = stopped_run
    assert done.code == 1, done
    assert "Traceback" not in done.err
    assert f"rl-train resume {run}" in done.out
    last = max(line["step"] for line in metrics(run))
    assert 3 <= last < STEPS
    assert (run / "checkpoints" / f"step_{last:06d}" / "state.json").is_file()
    assert not (run / "summary.json").exists()


def test_resumed_after_an_interrupt_is_as_uninterrupted(
    grpo_run: tuple[Path, Done], stopped_run: tuple[Path, Done], tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    shutil.copytree(stopped_run[0], run)
    code, said = RunServer(tmp_path).run("resume", run)
    assert code == 0, said
    assert_same_run(run, grpo_run[0])


def test_resumed_after_a_kill_is_as_uninterrupted(grpo_run: tuple[Path, Done], tmp_path: Path) -> None:
    """The folder as a kill during step 5 leaves it: later records than the newest checkpoint, a torn last line."""
    run = tmp_path / "killed"
    shutil.copytree(grpo_run[0], run)
    for folder in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    (run / "checkpoints" / ".step_000004.tmp").mkdir()
    for name in ("summary.json", "report.html"):
        (run / name).unlink()
    shutil.rmtree(run / "adapter")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    done = here("resume", run)
    assert done.code == 0, done.err
    assert "after step 2" in done.out
    assert_same_run(run, grpo_run[0])


def test_resuming_a_run_that_is_over_says_how_to_go_on(sft_run: tuple[Path, Done], tmp_path: Path) -> None:
    run = tmp_path / "sft"
    shutil.copytree(sft_run[0], run)
    done = here("resume", run)
    assert done.code == 0, done.err
    assert "all its 15 steps are taken" in done.out
    assert "train.max_steps=N" in done.out
    assert "are taken" not in here("resume", run, "train.max_steps=16").out


def assert_same_run(resumed: Path, through: Path) -> None:
    assert checkpoint_files(resumed, STEPS) == checkpoint_files(through, STEPS)
    name = "adapter/adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (through / name).read_bytes()
    assert timeless(resumed) == timeless(through)
    files = [sorted(p.name for p in (run / "rollouts").iterdir()) for run in (resumed, through)]
    assert files[0] == files[1]


def test_the_comparison_of_runs_can_fail(grpo_run: tuple[Path, Done]) -> None:
    files = [checkpoint_files(grpo_run[0], step) for step in (STEPS - 2, STEPS)]
    assert all(files[0][name] != files[1][name] for name in files[0])


# --- the other commands -----------------------------------------------------------------------------------------------


def test_saved_config_runs_and_a_taken_name_is_not_overwritten(grpo_run: tuple[Path, Done]) -> None:
    run = grpo_run[0]
    before = (run / "metrics.jsonl").read_bytes()
    overrides = ["train.max_steps=1", "warmup.max_steps=0", "eval.dataset_name=null", "algorithm.loss_type=bnpo"]
    done = here("run", run / "config.yaml", *overrides)
    assert done.code == 0, done.err
    second = run.with_name("grpo-2")
    assert [line["step"] for line in metrics(second)] == [1]
    assert (run / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(second)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_reused_rollouts_train_with_every_loss(place: Path, tmp_path: Path, loss_type: str) -> None:
    level = "sequence" if loss_type == "grpo" else "token"
    done = here(
        "run",
        place / "grpo.yaml",
        f"output_dir={tmp_path}",
        f"algorithm.loss_type={loss_type}",
        f"algorithm.importance_sampling_level={level}",
        "algorithm.num_iterations=2",
        "algorithm.beta=0.1",
        "train.steps_per_generation=2",
        "train.max_steps=7",  # no multiple of the four updates per rollout batch: the last batch is cut short
        "warmup.max_steps=0",
        "eval.dataset_name=null",
        "checkpoint.save_steps=0",
    )
    assert done.code == 0, done.err
    lines = metrics(tmp_path / "grpo")
    assert [line["step"] for line in lines] == [4, 7]
    assert all(line["grad_norm"] > 0 for line in lines)
    assert lines[1]["kl"] > 0
    assert lines[0]["sampling/sampling_logp_difference/max"] < 1e-3, "compared with the policy that sampled"
    assert summary(tmp_path / "grpo")["steps"] == 7


OBJECTIVES = [
    ["algorithm.loss_type=cispo", "algorithm.epsilon_high=2", "algorithm.entropy_coef=0.01"],
    ["algorithm.loss_type=sapo", "algorithm.top_entropy_quantile=0.5", "algorithm.rollout_correction=sequence_mask"],
    ["algorithm.loss_type=reinforce", "algorithm.advantage_estimator=rloo", "algorithm.kl_estimator=k1"],
    ["algorithm.importance_sampling_level=sequence_token", "algorithm.drop_uniform_groups=true"],
    ["algorithm.advantage_estimator=reinforce_plus_plus", "algorithm.kl_estimator=k2"],
    ["algorithm.multi_objective_aggregation=normalize_then_sum", "algorithm.rollout_correction=none"],
]


@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda o: o[0].partition("=")[2])
def test_objectives_train_from_the_command_line(place: Path, tmp_path: Path, options: list[str]) -> None:
    common = ["train.max_steps=2", "algorithm.beta=0.05", "warmup.max_steps=0", "eval.dataset_name=null"]
    done = here("run", place / "grpo.yaml", f"output_dir={tmp_path}", *common, *options)
    assert done.code == 0, done.err
    last = metrics(tmp_path / "grpo")[-1]
    assert last["step"] == 2
    assert last["grad_norm"] > 0
    assert ("kl" in last) == ("algorithm.kl_estimator=k1" not in options)


def test_a_users_own_loss_trains_and_its_faults_are_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def plain(tokens, algorithm):\n"
        "    return -(tokens.weights * tokens.advantages * tokens.log_probs).sum()\n"
        "def broken(tokens, algorithm):\n"
        "    return tokens.no_such_thing\n"
    )
    common = ["train.max_steps=1", "warmup.max_steps=0", "eval.dataset_name=null", "algorithm.beta=0"]

    def run(name: str, *options: str) -> Done:
        return here("run", place / "grpo.yaml", f"output_dir={tmp_path / name}", *common, *options)

    own = run("own", f"algorithm.loss={tmp_path}/own.py:plain")
    assert own.code == 0, own.err
    same = run("same", "algorithm.loss_type=reinforce", "algorithm.rollout_correction=none")
    assert same.code == 0, same.err
    first, second = metrics(tmp_path / "own" / "grpo")[-1], metrics(tmp_path / "same" / "grpo")[-1]
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-6)
    for spec, message in (("own.py:broken", "no_such_thing"), ("own.py:nothing", "has no 'nothing'")):
        done = run("bad", f"algorithm.loss={tmp_path}/{spec}")
        assert done.code == 2
        assert message in done.err
        assert "Traceback" not in done.err


PREFERENCES = ["sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "simpo", "orpo", "cpo", "kto"]


@pytest.mark.parametrize(("loss_type", "rows"), [*((name, "pairs") for name in PREFERENCES), ("kto", "labelled")])
def test_preferences_are_learned(place: Path, tmp_path: Path, monkeypatch, loss_type: str, rows: str) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    data = [f"{s}.dataset_name={place}/{rows}.jsonl" for s in ("data", "eval")]
    options = [f"output_dir={tmp_path}", f"preference.loss_type={loss_type}", *data]
    done = here("run", place / "dpo.yaml", *options)
    assert done.code == 0, done.err
    lines = metrics(tmp_path / "dpo")
    held_out = [line for line in lines if "eval/rewards/margins" in line]
    assert [line["step"] for line in held_out] == [0, 8]
    assert held_out[1]["eval/rewards/margins"] > held_out[0]["eval/rewards/margins"]
    assert held_out[1]["eval/loss"] < held_out[0]["eval/loss"]
    if loss_type != "kto":
        assert held_out[1]["eval/rewards/accuracies"] > 0.9
    steps = [line for line in lines if "rewards/margins" in line]
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} <= steps[0].keys()
    # A reference is computed once and read again by the next run.
    needs_reference = loss_type not in ("simpo", "orpo", "cpo")
    assert bool(list((tmp_path / "cache" / "reference").glob("*.safetensors"))) == needs_reference


def test_preference_tuning_resumes_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    through, cut = tmp_path / "through", tmp_path / "cut"
    assert here("run", place / "dpo.yaml", f"output_dir={through}").code == 0
    assert here("run", place / "dpo.yaml", f"output_dir={cut}", "train.max_steps=4").code == 0
    done = here("resume", cut / "dpo", "train.max_steps=8")
    assert done.code == 0, done.err
    name = "adapter/adapter_model.safetensors"
    assert (through / "dpo" / name).read_bytes() == (cut / "dpo" / name).read_bytes()


def test_online_dpo_learns_from_the_best_and_the_worst(place: Path, tmp_path: Path) -> None:
    options = ["algorithm.name=online_dpo", "train.max_steps=10", "warmup.max_steps=0", "optim.learning_rate=0.01"]
    done = here("run", place / "grpo.yaml", f"output_dir={tmp_path}", *options)
    assert done.code == 0, done.err
    lines = [line for line in metrics(tmp_path / "grpo") if "reward" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert sum(line["reward"] for line in lines[-3:]) > sum(line["reward"] for line in lines[:3]) + 0.15
    assert lines[-1]["rewards/margins"] > 0


def test_preference_mistakes_are_named(place: Path, tmp_path: Path) -> None:
    for options, message in (
        (["preference.label_smoothing=0.1", "preference.loss_type=hinge"], "label_smoothing"),
        (["preference.loss_type=kto", f"data.dataset_name={place}/prompts.jsonl"], "completion"),
        ([f"data.dataset_name={place}/prompts.jsonl"], "chosen"),
        (["preference.loss_type=sigmod"], "sigmoid"),
    ):
        done = here("run", place / "dpo.yaml", f"output_dir={tmp_path}", *options)
        assert done.code == 2, done.out
        assert message in done.err
        assert "Traceback" not in done.err


def test_smoothing_and_z_loss_train(place: Path, tmp_path: Path) -> None:
    options = ["algorithm.label_smoothing_factor=0.1", "algorithm.z_loss_coef=0.001", "train.max_steps=6"]
    done = here("run", place / "sft.yaml", f"output_dir={tmp_path}", *options)
    assert done.code == 0, done.err
    lines = [line for line in metrics(tmp_path / "sft") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_eval_of_a_run_scores_its_adapter(place: Path, grpo_run: tuple[Path, Done]) -> None:
    after, before = here("eval", grpo_run[0]), here("eval", place / "grpo.yaml")
    assert (after.code, before.code) == (0, 0), after.err + before.err
    assert printed_score(after) == pytest.approx(summary(grpo_run[0])["score_after"], abs=0.05)
    assert printed_score(after) > printed_score(before) + 0.1


def printed_score(done: Done) -> float:
    line = next(line for line in done.out.splitlines() if "eval/score" in line)
    return float(line.split()[-1])


def test_eval_needs_rewards_and_data(place: Path, sft_run: tuple[Path, Done]) -> None:
    assert_one_message(here("eval", sft_run[0]), "'sft'", "Fix: ")
    assert_one_message(here("eval", place / "grpo.yaml", "eval.dataset_name=null"), "eval.dataset_name")


def test_report_is_written_again(grpo_run: tuple[Path, Done]) -> None:
    path = grpo_run[0] / "report.html"
    path.unlink()
    done = here("report", grpo_run[0])
    assert done.code == 0, done.err
    assert str(path) in done.out.replace("\n", "")
    assert path.stat().st_size > 10_000


def test_check_samples_and_scores(place: Path) -> None:
    done = here("check", place / "grpo.yaml", "--prompts", "1", f"output_dir={place / 'unused'}")
    assert done.code == 0, done.err
    assert done.out.count(" tokens, ") == 24, "one panel for each of the prompt's completions"
    assert "reward low" in done.out
    assert not (place / "unused").exists()


@pytest.mark.parametrize("asks", ["model.device=cuda", "rollout.engine=vllm"])
def test_dry_run_says_that_a_gpu_is_missing(place: Path, asks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.rl.open_model.gpu_here", lambda: None)
    done = here("run", place / "grpo.yaml", "--dry-run", asks)
    assert done.code == 0, done.err
    assert "the config asks for a GPU" in done.out + done.err
    assert "asks for a GPU" not in "".join(here("run", place / "grpo.yaml", "--dry-run")[1:])


def test_an_adapters_folder_is_no_model(place: Path, sft_run: tuple[Path, Done]) -> None:
    adapter = sft_run[0] / "adapter"
    done = here("run", place / "grpo.yaml", "--dry-run", f"model.model_name_or_path={adapter}")
    assert_one_message(done, "is the folder of an adapter", f"lora.init_from={adapter}")


def test_dry_run_says_that_a_tracker_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does for a module that cannot be imported
    done = here("run", place / "grpo.yaml", "--dry-run", "log.report_to=[wandb]")
    assert done.code == 2
    assert "pip install 'tandem-rl[wandb]'" in done.err
    off = ["log.report_to=[wandb]", "log.wandb_mode=disabled"]
    assert here("run", place / "grpo.yaml", "--dry-run", *off).code == 0


def test_dry_run_shows_the_plan(place: Path) -> None:
    done = here("run", place / "grpo.yaml", "--dry-run", f"output_dir={place / 'unused'}")
    assert done.code == 0, done.err
    for part in ("8 to train on, 4 held out", "4 prompts × 24", "low", "optimiser steps"):
        assert part in done.out
    assert not (place / "unused").exists()


def test_dry_run_looks_for_the_columns_that_rewards_need(place: Path, tmp_path: Path) -> None:
    (tmp_path / "gold.py").write_text("def right(completions, gold):\n    return [1.0 for _ in completions]\n")
    write_lines(tmp_path / "gold.jsonl", [{"prompt": f"w{i}", "gold": "w1"} for i in range(8)])
    needs_gold = f"rewards.reward_funcs=[{tmp_path / 'gold.py'}:right]"
    done = here("run", place / "grpo.yaml", "--dry-run", needs_gold)
    assert_one_message(done, "'right' needs an argument 'gold'", "the data set has no further columns")
    learned = f"data.dataset_name={tmp_path / 'gold.jsonl'}"
    done = here("run", place / "grpo.yaml", "--dry-run", needs_gold, learned)
    assert_one_message(done, "'right' needs an argument 'gold'", "the evaluation data set has no further columns")
    assert here("run", place / "grpo.yaml", "--dry-run", needs_gold, learned, "eval.dataset_name=null").code == 0
    done = here("run", place / "grpo.yaml", "--dry-run", "rewards.reward_funcs=[math_answer]", learned)
    assert_one_message(done, "math_answer found none of the columns answer, solution", "columns are gold", "rename")


def test_dry_run_finds_what_a_run_would_stop_for(place: Path, tmp_path: Path) -> None:
    done = here("run", place / "grpo.yaml", "--dry-run", "model.device=cpu", "optim.optim=adamw_8bit")
    assert_one_message(done, "'adamw_8bit' needs a GPU", "optim.optim=adamw_torch")
    (tmp_path / "file").write_text("")
    done = here("run", place / "grpo.yaml", "--dry-run", f"output_dir={tmp_path / 'file' / 'runs'}")
    assert_one_message(done, "cannot be made", "is not a folder", "set output_dir")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.max_step=3", ("train.max_step", "did you mean 'train.max_steps'")),
        ("train.max_steps=many", ("train.max_steps", "'many'")),
        ("data.dataset_name=prompt.jsonl", ("data.dataset_name", "prompt.jsonl")),
        ("data.dataset_name=chats.jsonl", ("`prompt`", "`messages`")),
        ("warmup.dataset_name=prompts.jsonl", ("warmup.dataset_name", "`prompt`")),
        ("model.model_name_or_path=./no_model", ("no_model",)),
        ("rewards.reward_funcs=[rewards.py:lwo]", ("'lwo'", "did you mean 'low'")),
        ("rewards.reward_funcs=[rewards.py:raises]", ("KeyError", "no such answer", "rewards.py:")),
        ("rewards.reward_funcs=[rewards.py:short]", ("'short'", "returned 1 values for")),
        ("rewards.reward_funcs=[rewards.py:not_a_number]", ("'not_a_number'", "nan")),
        ("rewards.reward_funcs=[no_rewards.py:low]", ("no_rewards.py",)),
        ("train.per_device_train_batch_size=4", ("per_device_train_batch_size is 4", "train.generation_batch_size")),
        ("algorithm.name=gspo", ("gspo is algorithm.importance_sampling_level: sequence",)),
        ("rollout.use_vllm=true", ("unknown key 'rollout.use_vllm'", "rollout.engine: vllm", "docs/from-trl.md")),
        ("--train.max_steps=3", ("--train.max_steps is no option", "without dashes: train.max_steps=3")),
        ("--learning_rate=1e-5", ("--learning_rate is no option", "optim.learning_rate=1e-5")),
        ("model.model_name_or_path=nobody/no-model", ("nobody/no-model", "HF_HUB_OFFLINE")),
    ],
)
def test_a_mistake_is_one_message(place: Path, tmp_path: Path, override: str, parts: tuple[str, ...]) -> None:
    done = here("run", place / "grpo.yaml", f"output_dir={tmp_path}", "warmup.max_steps=1", override)
    assert_one_message(done, *parts)


def test_missing_config_and_run_folder(tmp_path: Path) -> None:
    assert_one_message(here("run", tmp_path / "none.yaml"), "none.yaml")
    assert_one_message(here("resume", tmp_path), "no config.yaml")
    assert_one_message(here("report", tmp_path / "none"), "no config.yaml")


def test_a_reward_that_fails_later_leaves_the_earlier_steps(place: Path, tmp_path: Path) -> None:
    done = here(
        "run",
        place / "grpo.yaml",
        f"output_dir={tmp_path}",
        "rewards.reward_funcs=[rewards.py:raises_late]",
        "warmup.max_steps=0",
        "eval.dataset_name=null",
    )
    assert_one_message(done, "RuntimeError", "third batch")
    run = tmp_path / "grpo"
    assert [line["step"] for line in metrics(run)] == [1, 2]
    assert (run / "checkpoints" / "step_000002" / "state.json").is_file()
    assert len(list((run / "rollouts").glob("step_*.jsonl"))) == 2


def test_config_errors_and_help_load_nothing_heavy(place: Path) -> None:
    script = (
        "import sys\nfrom tandem.rl.cli import main\n"
        "try:\n    main()\nfinally:\n    print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    for arguments, code in ((["--help"], 0), (["run", str(place / "grpo.yaml"), "train.max_step=3"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, env=ENVIRONMENT
        )
        assert done.returncode == code, done.stderr
        assert done.stdout.splitlines()[-1] == "[]", arguments
