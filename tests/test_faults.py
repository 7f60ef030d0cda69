"""Faults that a run of days meets: each costs minutes at most, says what it is, and never changes the result.

Everything goes through `rl-train` in processes of their own. The table of faults is docs/faults.md.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_server import COUNT_GENERATIONS, RunServer
from safetensors.torch import load_file, save_file
from tiny_run import outcome, write_lines, write_place

from tandem.rl.checkpoint import damage
from tandem.rl.rollout_journal import read_journal
from tandem.rl.run_lock import run_lock

pytestmark = pytest.mark.injects(1)

LOSSES = """
CALLS = []

def mean_loss(tokens, algorithm, wrong=None):
    CALLS.append(1)
    loss = -(tokens.log_probs * tokens.advantages).mean()
    return loss * float("nan") if wrong and wrong(len(CALLS)) else loss

def nan_once(tokens, algorithm):
    return mean_loss(tokens, algorithm, lambda call: call == 2)

def nan_always(tokens, algorithm):
    return mean_loss(tokens, algorithm, lambda call: True)

def inf_gradient(tokens, algorithm):
    return (tokens.log_probs - tokens.log_probs.detach()).abs().sqrt().sum()
"""
JUMPING_CLOCK = """
import time
real, jumps = time.time, iter([0, 5e8, -9e8, 3e7, -1.7e9] * 100000)
time.time = lambda: real() + next(jumps)
"""


class Bench:
    """A finished run to compare with and to damage, and a server that starts others."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, RunServer(folder)
        self.config = write_place(folder)
        (folder / "losses.py").write_text(LOSSES)
        code, said = self.server.run("run", self.config, count=str(folder / "touches.txt"), no_report=True)
        assert code == 0, said
        self.run = folder / "runs" / "run"
        self.outcome = outcome(self.run)
        self.touches = [line.split(" ", 2)[1:] for line in (folder / "touches.txt").read_text().splitlines()]

    def copy(self, name: str) -> Path:
        """The finished run again, as if it had been stopped before its last checkpoint's step was evaluated."""
        return Path(shutil.copytree(self.run, self.folder / "runs" / name))

    def touch_of(self, event: str, name: str, nth: int = 1) -> int:
        """The number of the nth touch of a file."""
        found = [i for i, (e, path) in enumerate(self.touches, 1) if e == event and path.endswith(name)]
        return found[nth - 1]

    def killed(self, name: str, at: int) -> Path:
        code, said = self.server.run("run", self.config, f"run_name={name}", kill_at=at, no_report=True)
        assert code == -9, said
        return self.folder / "runs" / name

    def resumed(self, run: Path, *arguments: object, code: int = 0, **job: object) -> str:
        found, said = self.server.run("resume", run, *arguments, no_report=True, **job)
        assert found == code, said
        assert "Traceback" not in said
        return said

    def same_end(self, run: Path, *, but: tuple[str, ...] = ()) -> None:
        found = outcome(run)
        for part, value in self.outcome.items():
            if part == "files":
                assert not [name for name, content in value.items() if found[part].get(name) != content]
            elif part not in but:
                assert found[part] == value, part


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))


def flip_a_bit(path: Path, seed: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(seed).randrange(len(content) // 2, len(content))] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


# --- the journal ------------------------------------------------------------------------------------------------------


def test_what_was_generated_is_not_generated_again(bench: Bench) -> None:
    """Killed when the third rollout lies in the journal and the only checkpoint has learned from two."""
    third = bench.touch_of("open", "journal.jsonl", 3)
    run = bench.killed("generated", third + 1)
    assert len(list(read_journal(run))) == 3
    said = bench.resumed(run, patch=COUNT_GENERATIONS)
    seeds = re.findall(r"GENERATES (-?\d+)", said)
    assert seeds == ["-1"], "only the evaluation at the end draws completions"
    bench.same_end(run)


def test_a_damaged_end_of_the_journal_is_generated_anew(bench: Bench) -> None:
    run = bench.killed("damaged_journal", bench.touch_of("open", "journal.jsonl", 3) + 1)
    flip_a_bit(run / "journal.jsonl")
    said = bench.resumed(run, patch=COUNT_GENERATIONS)
    assert "is damaged at byte" in said
    assert len(re.findall(r"GENERATES \d", said)) == 1
    bench.same_end(run)


@pytest.mark.injects(0)
def test_replay_gives_the_run_s_own_adapter_from_its_journal_alone(bench: Bench) -> None:
    run = bench.copy("recorded")
    for name in ("prompts.jsonl", "held_out.jsonl", "rewards.py"):
        (bench.folder / name).rename(bench.folder / f"away_{name}")
    try:
        code, said = bench.server.run("replay", run, no_report=True, patch=COUNT_GENERATIONS)
    finally:
        for name in ("prompts.jsonl", "held_out.jsonl", "rewards.py"):
            (bench.folder / f"away_{name}").rename(bench.folder / name)
    assert code == 0, said
    assert "GENERATES" not in said
    adapter = "adapter/adapter_model.safetensors"
    replay = run.with_name("recorded-replay")
    assert (replay / adapter).read_bytes() == (run / adapter).read_bytes()
    optimizer = "checkpoints/step_000006/optimizer.safetensors"
    assert (replay / optimizer).read_bytes() == (run / optimizer).read_bytes()

    code, said = bench.server.run("replay", run, "algorithm.loss_type=dr_grpo", "algorithm.beta=0.5", no_report=True)
    assert code == 0, said
    other = run.with_name("recorded-replay-2")
    assert (other / adapter).read_bytes() != (run / adapter).read_bytes()
    assert (other / "rollouts").is_dir()
    texts = [[row.text for row in r.rows] for r in read_journal(other)]
    assert texts == [[row.text for row in r.rows] for r in read_journal(run)]


@pytest.mark.injects(0)
def test_replays_compare_objectives_on_the_same_rollouts(bench: Bench) -> None:
    run = bench.copy("compared")
    texts = [[row.text for row in r.rows] for r in read_journal(run)]
    ways = ["loss_type=sapo", "importance_sampling_level=sequence", "name=online_dpo", "num_iterations=2"]
    adapters = {(run / "adapter" / "adapter_model.safetensors").read_bytes()}
    for number, way in enumerate(ways, 1):
        code, said = bench.server.run("replay", run, f"algorithm.{way}", no_report=True, patch=COUNT_GENERATIONS)
        assert code == 0, said
        assert "GENERATES" not in said
        made = run.with_name(f"compared-replay-{number}" if number > 1 else "compared-replay")
        adapters.add((made / "adapter" / "adapter_model.safetensors").read_bytes())
        assert [[row.text for row in r.rows] for r in read_journal(made)] == texts
        steps = 3 if way == "name=online_dpo" else 6
        assert json.loads((made / "summary.json").read_text())["steps"] == steps
    assert len(adapters) == 5


# --- checkpoints ------------------------------------------------------------------------------------------------------

SPOILT = {
    "truncated": lambda folder: cut(folder / "adapter_model.safetensors"),
    "bit flipped": lambda folder: flip_a_bit(folder / "optimizer.safetensors"),
    "file missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "list missing": lambda folder: (folder / "files.json").unlink(),
    "counters": lambda folder: (folder / "state.json").write_text('{"step": 6}'),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(bench: Bench, fault: str) -> None:
    run = bench.copy(f"checkpoint_{fault.replace(' ', '_')}")
    newest = run / "checkpoints" / "step_000006"
    SPOILT[fault](newest)
    assert damage(newest)
    said = " ".join(bench.resumed(run).split())
    assert "step_000006 is damaged" in said
    assert "going on from step_000004" in said
    assert f"resuming {run} after step 4" in said
    bench.same_end(run, but=("checkpoints",))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "damaged_step_000006",
        "step_000004",
        "step_000006",
    ]


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8])
def test_a_full_disk(bench: Bench, share: float) -> None:
    """No file may grow beyond a limit, from a few bytes to most of what the run's largest one needs."""
    largest = max(p.stat().st_size for p in bench.run.rglob("*") if p.is_file())
    name = f"full_{share}"
    code, said = bench.server.run(
        "run", bench.config, f"run_name={name}", file_limit=int(share * largest), no_report=True
    )
    assert code == 2, said
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    assert "cannot" in said
    assert "Fix: " in said
    run = bench.folder / "runs" / name
    if not (run / "config.yaml").exists():  # nothing could be started, and nothing is left
        assert not run.exists()
        return
    for checkpoint in (run / "checkpoints").glob("step_*"):
        assert damage(checkpoint) is None
    bench.resumed(run)
    bench.same_end(run)


def test_a_real_full_disk(bench: Bench, tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        code, said = bench.server.run(
            "run", bench.config, "run_name=tmpfs", f"output_dir={tmp_path}/runs", no_report=True
        )
        assert code == 2, said
        assert "No space left" in said
        assert "Traceback" not in said
        run = Path(shutil.copytree(tmp_path / "runs" / "tmpfs", bench.folder / "runs" / "tmpfs"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    bench.resumed(run)
    bench.same_end(run)


@pytest.mark.parametrize("where", ["prompts.jsonl", "/proc/runs"])
def test_a_folder_that_cannot_be_written(bench: Bench, where: str) -> None:
    code, said = bench.server.run("run", bench.config, f"output_dir={bench.folder / where}", no_report=True)
    assert code == 2, said
    assert "cannot be made" in said
    assert "Traceback" not in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_cannot_be_written_from_the_start(bench: Bench, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, said = bench.server.run("run", bench.config, f"output_dir={small_disk}/runs", no_report=True)
    assert code == 2, said
    assert "cannot be made" in said
    assert "Read-only file system" in said
    assert "Traceback" not in said


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_one_bad_update_is_skipped_and_counted(bench: Bench) -> None:
    code, said = bench.server.run(
        "run", bench.config, "run_name=nan_once", "algorithm.loss=losses.py:nan_once", no_report=True
    )
    assert code == 0, said
    assert "the update is skipped" in said
    run = bench.folder / "runs" / "nan_once"
    assert json.loads((run / "summary.json").read_text())["skipped_updates"] == 1
    assert all("NaN" not in line for line in (run / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("loss", "says"),
    [("nan_always", "the loss is not finite either"), ("inf_gradient", "the loss is finite")],
)
def test_a_run_that_learns_nothing_stops_with_a_diagnosis(bench: Bench, loss: str, says: str) -> None:
    options = [f"run_name={loss}", f"algorithm.loss=losses.py:{loss}", "optim.max_skipped_updates=3"]
    code, said = bench.server.run("run", bench.config, *options, "warmup.max_steps=0", no_report=True)
    assert code == 2, said
    assert "4 updates in a row were skipped" in said, "the rollout's updates are finished first"
    assert says in said
    run = bench.folder / "runs" / loss
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    state = json.loads((checkpoint / "state.json").read_text())
    assert (state["step"], state["skipped_updates"], state["skipped_in_a_row"]) == (4, 4, 0)
    assert damage(checkpoint) is None
    bench.resumed(run, "algorithm.loss=null")
    assert json.loads((run / "summary.json").read_text())["steps"] == 6
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "eval/score" in r] == [0, 4, 6], "what was due when it stopped is made up for"


# --- the world around -------------------------------------------------------------------------------------------------


def test_changed_data_are_refused_with_both_fingerprints(bench: Bench) -> None:
    run = bench.killed("changed", bench.touch_of("open", "journal.jsonl", 3) + 1)
    before = json.loads((run / "data.json").read_text())["data"]["sha256"]
    rows = (bench.folder / "prompts.jsonl").read_text()
    try:
        write_lines(bench.folder / "prompts.jsonl", [{"prompt": f"w{i} w{i}"} for i in range(5)])
        left = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
        said = bench.resumed(run, code=2)
        assert {p: p.read_bytes() for p in left} == left
        hashes = re.findall(r"[0-9a-f]{64}", said)
        assert len(hashes) == 2
        assert hashes[0] != hashes[1] == before
        assert "data.dataset_name" in said
        assert "--changed-data" in said
        said = bench.resumed(run, "--changed-data", patch=COUNT_GENERATIONS)
        assert "have changed" in said
        assert len(re.findall(r"GENERATES \d", said)) == 1, "what the old rows were scored by is not learned from"
        assert "resuming" in bench.resumed(run, "train.max_steps=7"), "the new data are the run's own now"
    finally:
        (bench.folder / "prompts.jsonl").write_text(rows)


@pytest.mark.injects(0)
def test_data_that_are_switched_on_later_are_known_from_then_on(bench: Bench) -> None:
    run = bench.copy("switched_on")
    recorded = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({"data": recorded["data"]}))
    bench.resumed(run, "eval.dataset_name=null", "warmup.max_steps=0")
    bench.resumed(run, f"eval.dataset_name={bench.folder / 'held_out.jsonl'}")
    held_out = (bench.folder / "held_out.jsonl").read_text()
    try:
        write_lines(bench.folder / "held_out.jsonl", [{"prompt": "w9"}])
        assert "eval.dataset_name have changed" in bench.resumed(run, code=2)
    finally:
        (bench.folder / "held_out.jsonl").write_text(held_out)


def test_a_run_that_goes_on_has_not_ended(bench: Bench) -> None:
    """Killed on the way to more steps: what is left of its first end is not taken for what it is now."""
    run = bench.copy("goes_on")
    code, said = bench.server.run("resume", run, "train.max_steps=12", "checkpoint.save_steps=2", kill_at=60)
    assert code == -9, said
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert newest.name > "step_000006"
    code, said = bench.server.run("report", run)
    assert code == 0, said
    assert "of 12</div>" in (run / "report.html").read_text()
    old = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for path in newest.iterdir():
        if path.suffix == ".safetensors" and path.name.startswith("adapter"):
            assert path.read_bytes() != old
    code, said = bench.server.run("eval", run)
    assert code == 0, said
    lines = (run / "rollouts" / f"eval_{newest.name.removeprefix('step_')}.jsonl").read_text().splitlines()
    # The same completions from a run that has nothing but the newest checkpoint.
    (run / "adapter" / "adapter_model.safetensors").unlink()
    assert bench.server.run("eval", run)[0] == 0
    again = run / "rollouts" / f"eval_{newest.name.removeprefix('step_')}.jsonl"
    assert again.read_text().splitlines() == lines


@pytest.mark.injects(0)
def test_an_evaluation_on_other_data_is_not_the_run_s_own(bench: Bench) -> None:
    run = bench.copy("other_eval")
    kept = {path.name: path.read_bytes() for path in (run / "rollouts").iterdir()}
    code, said = bench.server.run("eval", run, f"eval.dataset_name={bench.folder / 'prompts.jsonl'}")
    assert code == 0, said
    assert "not kept" in said
    assert {path.name: path.read_bytes() for path in (run / "rollouts").iterdir()} == kept
    (run / "rollouts" / "eval_000006.jsonl").unlink()
    assert bench.server.run("eval", run)[0] == 0
    assert {path.name: path.read_bytes() for path in (run / "rollouts").iterdir()} == kept


@pytest.fixture
def other_weights(bench: Bench) -> Iterator[str]:
    """Other weights under the path that the runs know; gives what was recorded of the ones before."""
    weights = bench.folder / "model" / "model.safetensors"
    before = weights.read_bytes()
    tensors = load_file(weights)
    name = next(name for name in tensors if "q_proj" in name)
    save_file(tensors | {name: tensors[name] * 1.5}, weights, metadata={"format": "pt"})
    yield json.loads((bench.run / "model.json").read_text())["model.safetensors"]
    weights.write_bytes(before)


def test_other_weights_under_the_same_path_are_refused(bench: Bench, other_weights: str) -> None:
    run = bench.copy("other_weights")
    left = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for command in ("resume", "replay", "eval"):
        code, said = bench.server.run(command, run, no_report=True)
        assert (code, "Traceback" in said) == (2, False), said
        ((now, before),) = re.findall(r"model.safetensors: (.*); the run was started with (.*)", said)
        assert now != before == other_weights
        assert "--changed-model" in said
        assert {p: p.read_bytes() for p in left} == left
    assert not run.with_name("other_weights-replay").exists()
    for command in ("replay", "eval"):
        code, said = bench.server.run(command, run, "--changed-model", no_report=True)
        assert code == 0, said
        assert "has changed" in said


def test_another_model_is_taken_where_it_is_meant(bench: Bench) -> None:
    """What the old one has generated is not learned from then."""
    run = bench.killed("meant", bench.touch_of("open", "journal.jsonl", 3) + 1)
    recorded = json.loads((run / "model.json").read_text())
    settings = bench.folder / "model" / "config.json"
    before = settings.read_text()
    try:
        settings.write_text(json.dumps({**json.loads(before), "rms_norm_eps": 1e-3}))
        said = bench.resumed(run, "--changed-model", patch=COUNT_GENERATIONS)
        assert "config.json: sha256" in said
        assert len(re.findall(r"GENERATES \d", said)) == 1
        now = json.loads((run / "model.json").read_text())
        assert [name for name in recorded if recorded[name] != now[name]] == ["config.json"]
        bench.resumed(run, "train.max_steps=7")  # it is the run's own model now
    finally:
        settings.write_text(before)


@pytest.mark.injects(0)
def test_a_model_that_has_moved_is_the_same(bench: Bench, tmp_path: Path) -> None:
    moved = shutil.copytree(bench.folder / "model", tmp_path / "moved", copy_function=shutil.copyfile)
    said = bench.resumed(bench.copy("moved"), f"model.model_name_or_path={moved}", "train.max_steps=7")
    assert "base model" not in said


@pytest.mark.injects(0)
def test_a_run_without_a_record_of_its_model_goes_on_and_has_one(bench: Bench) -> None:
    run = bench.killed("unrecorded", bench.touch_of("open", "journal.jsonl", 3) + 1)
    (run / "model.json").unlink()
    assert "cannot be told" in " ".join(bench.resumed(run).split())
    bench.same_end(run)


def test_jumps_of_the_clock_change_nothing(bench: Bench) -> None:
    code, said = bench.server.run("run", bench.config, "run_name=clock", patch=JUMPING_CLOCK, no_report=True)
    assert code == 0, said
    bench.same_end(bench.folder / "runs" / "clock")
    lines = [json.loads(line) for line in (bench.folder / "runs" / "clock" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["step_time"] < 60 for line in lines if "step_time" in line)


def test_a_second_process_in_the_folder_is_refused(bench: Bench) -> None:
    import os

    run = bench.copy("twice")
    with run_lock(run):
        said = bench.resumed(run, code=2)
    assert f"in use by process {os.getpid()} on " in said
    bench.resumed(run)


def test_a_reward_that_ends_its_process_ends_no_more_than_that(bench: Bench) -> None:
    """As the kernel's out-of-memory killer would: what was journalled and saved before is there."""
    (bench.folder / "deadly.py").write_text(
        "import os\nCALLS = []\ndef low(completions, **columns):\n    CALLS.append(1)\n"
        "    if len(CALLS) == 5:\n        os._exit(137)\n    return [float(len(c)) for c in completions]\n"
    )
    options = [
        "run_name=deadly",
        "train.max_steps=12",
        "rewards.reward_funcs=[deadly.py:low]",
        "eval.dataset_name=null",
    ]
    code, said = bench.server.run("run", bench.config, *options, no_report=True)
    assert code == 137, said
    run = bench.folder / "runs" / "deadly"
    assert len(list(read_journal(run))) == 4
    assert "resuming" in bench.resumed(run)
    assert json.loads((run / "summary.json").read_text())["steps"] == 12


RECORD_SYNCS = """
import os, pathlib
fsync, rename = os.fsync, pathlib.Path.rename
def place(handle):
    return os.readlink(f"/proc/self/fd/{handle}")
def synced(handle):
    print("SYNC", place(handle), os.fstat(handle).st_size, flush=True)
    return fsync(handle)
def renamed(self, target):
    if "/checkpoints/step_" in str(target):
        print("RENAME", target, os.path.getsize(pathlib.Path(target).parents[1] / "metrics.jsonl"), flush=True)
    return rename(self, target)
os.fsync, pathlib.Path.rename = synced, renamed
"""


@pytest.mark.injects(0)
def test_what_a_checkpoint_relies_on_is_on_the_disk_before_it(bench: Bench) -> None:
    """A power cut right after a checkpoint: its metrics, its rollouts and the journal must not be younger than it."""
    code, said = bench.server.run("run", bench.config, "run_name=synced", patch=RECORD_SYNCS, no_report=True)
    assert code == 0, said
    run = bench.folder / "runs" / "synced"
    size_on_disk: dict[str, int] = {}
    checkpoints = 0
    for line in said.splitlines():
        word, _, rest = line.partition(" ")
        path, _, size = rest.rpartition(" ")
        if word == "SYNC":
            size_on_disk[path] = int(size)
        elif word == "RENAME":
            checkpoints += 1
            assert size_on_disk[str(run / "metrics.jsonl")] == int(size)
            journal = json.loads((run / "checkpoints" / Path(path).name / "state.json").read_text())["journal_bytes"]
            assert size_on_disk[str(run / "journal.jsonl")] == journal
            beside = str(Path(path).with_name(f".{Path(path).name}.tmp"))
            for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json"):
                assert f"{beside}/{name}" in size_on_disk
    assert checkpoints == 2
    assert f"{run / 'checkpoints'}" in size_on_disk
