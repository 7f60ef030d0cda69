"""Engine against trainer: the statistics by hand, planted faults, and a run that stops on them and loses nothing."""

from __future__ import annotations

import io
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import move_adapter, save_llama, save_words

from tandem.rl import commands, open_model, step
from tandem.rl.checkpoint import latest_checkpoint, read_state
from tandem.rl.config import Config, LoraConfig, ModelConfig, ParityConfig
from tandem.rl.console import Console
from tandem.rl.errors import UserError
from tandem.rl.experience import policy_batch
from tandem.rl.lora import attach_lora, trainable
from tandem.rl.model import LanguageModel, load_model, load_tokenizer
from tandem.rl.packing import pack
from tandem.rl.parity import Limits, ParityError, ParityGate, check_engine, difference, effective_share
from tandem.rl.samples import Completion, Group, Prompt, Sampling, Scored
from tandem.rl.step import PolicyBatch, sequence_log_probs
from tandem.rollout.transformers_engine import TransformersEngine

WORDS = ["<pad>", "</s>", *(f"w{i}" for i in range(2, 48))]
Fault = Callable[[LanguageModel, list[Prompt], Sampling], list[Group]]


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_statistics_by_hand():
    engine = [[-1.0, -2.0], [], [-0.5, -3.0]]
    trainer = [torch.tensor([-1.1, -2.0]), torch.empty(0), torch.tensor([-0.1, -3.2])]
    found = difference(engine, trainer)
    assert found.mean == pytest.approx((0.1 + 0.0 + 0.4 + 0.2) / 4, abs=1e-6)
    assert found.median == pytest.approx(0.2, abs=1e-6)
    assert found.p99 == found.largest == pytest.approx(0.4, abs=1e-6)
    assert (found.tokens, found.sequences) == (4, 2)
    for shares, deltas in ((found.token_ess, [-0.1, 0.0, 0.4, -0.2]), (found.sequence_ess, [-0.1, 0.2])):
        weights = [math.exp(d) for d in deltas]
        assert shares == pytest.approx(sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights)), abs=1e-6)


def test_effective_sample_size():
    assert effective_share(torch.tensor([0.0, math.log(3)]).double()) == pytest.approx(0.8)
    assert effective_share(torch.full((5,), 1000.0).double()) == pytest.approx(1.0)
    assert effective_share(torch.tensor([1000.0, 0.0, 0.0, 0.0]).double()) == pytest.approx(0.25)


def test_numbers_that_cannot_be_compared_are_refused():
    engine = [[-1.0, -2.0]]
    assert difference(engine, [torch.tensor([-1.0, -2.0])]).largest == 0
    with pytest.raises(ValueError, match="completions and"):
        difference(engine, [])
    with pytest.raises(ValueError, match="from the trainer"):
        difference(engine, [torch.tensor([-1.0])])
    with pytest.raises(ValueError, match="1 are not finite"):
        difference(engine, [torch.tensor([-1.0, -math.inf])])


def test_limits_follow_the_type_unless_they_are_set():
    strict, loose, fp8 = (
        Limits.of(ParityConfig(), dtype, fp8_cache=cache)
        for dtype, cache in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
    )
    assert strict.mean < loose.mean < fp8.mean
    assert strict.p99 < loose.p99 < fp8.p99
    assert strict.token_ess > loose.token_ess > fp8.token_ess
    own = ParityConfig(max_mean=0.3, max_p99=2, min_token_ess=0.1, min_sequence_ess=0.2)
    assert Limits.of(own, torch.float32, fp8_cache=False) == Limits(0.3, 2, 0.1, 0.2)
    assert (strict.slack, loose.slack, fp8.slack) == (1, 5, 2)
    assert Limits.of(ParityConfig(max_p99=2), torch.bfloat16, fp8_cache=False).slack == 1, "one's own limit counts"
    found = difference([[-1.0, -1.0]], [torch.tensor([-1.0, -2.0])])  # mean 0.5, p99 1, ESS of tokens 0.82
    assert not Limits(0.51, 1.01, 0.8, 1.0).exceeded(found)
    for limits, word in (
        (Limits(0.49, 1.01, 0.8), "mean"),
        (Limits(0.51, 0.99, 0.8), "p99"),
        (Limits(1, 1, 0.9), "tok"),
    ):
        (text,) = limits.exceeded(found)
        assert word in text


def test_only_mean_and_p99_have_slack():
    found = difference([[-1.0, -1.0]], [torch.tensor([-1.0, -2.0])])  # mean 0.5, p99 1, ESS of tokens 0.82
    assert not Limits(0.11, 0.21, 0.8, slack=5).broken(found)
    for limits in (Limits(0.09, 1, 0.8, slack=5), Limits(1, 0.19, 0.8, slack=5), Limits(1, 1, 0.9, slack=5)):
        assert limits.broken(found)


# --- planted faults ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    save_llama(folder / "model", len(WORDS), max_position_embeddings=64, initializer_range=0.2)
    save_words(folder / "model", WORDS, eos="</s>", unk="<pad>", named=False)
    (folder / "rewards.py").write_text(
        "def low(completions, **_):\n    return [float(c.count('w1')) for c in completions]\n"
    )
    rows = [{"prompt": f"w{i} w{i + 1}"} for i in range(2, 10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def lm(place: Path) -> LanguageModel:
    config = ModelConfig(model_name_or_path=str(place / "model"), device="cpu")
    loaded = load_model(config, load_tokenizer(config))
    attach_lora(loaded, LoraConfig(r=4), seed=0)
    move_adapter(loaded, seed=1)
    return loaded


def with_log_probs(groups: list[Group], change: Callable[[list[float]], list[float]]) -> list[Group]:
    return [
        Group(g.prompt, [Completion(c.ids, change(c.log_probs), c.truncated) for c in g.completions]) for g in groups
    ]


def sound(lm: LanguageModel, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
    return TransformersEngine(lm).generate(prompts, sampling)


def hot(lm: LanguageModel, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
    """Draws, and reports, at temperature 0.7 in place of 1."""
    fields = dict(sampling.__dict__) | {"temperature": 0.7}
    return TransformersEngine(lm).generate(prompts, Sampling(**fields))


def late(lm: LanguageModel, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
    """Every token has the log-prob of the one before it."""
    return with_log_probs(sound(lm, prompts, sampling), lambda row: [0.0, *row[:-1]])


def early(lm: LanguageModel, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
    return with_log_probs(sound(lm, prompts, sampling), lambda row: [*row[1:], 0.0])


def without_adapter(lm: LanguageModel, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
    """No update ever reaches it."""
    with lm.model.disable_adapter():
        return sound(lm, prompts, sampling)


def of_another_prompt(lm: LanguageModel, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
    """Reads the template's first token twice."""
    read = [Prompt(p.index, [p.ids[0], *p.ids], p.prompt, p.columns) for p in prompts]
    groups = sound(lm, read, sampling)
    return [Group(p, g.completions) for p, g in zip(prompts, groups, strict=True)]


def not_a_number(lm: LanguageModel, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
    return with_log_probs(sound(lm, prompts, sampling), lambda row: [math.nan, *row[1:]])


def grpo(place: Path, output: Path, **sections: Any) -> Config:
    base: dict[str, Any] = {
        "run_name": "run",
        "output_dir": str(output),
        "model": {"model_name_or_path": str(place / "model"), "device": "cpu"},
        "lora": {"r": 4},
        "data": {"dataset_name": str(place / "prompts.jsonl")},
        "rollout": {"num_generations": 8, "max_completion_length": 6},
        "rewards": {"reward_funcs": [f"{place / 'rewards.py'}:low"]},
        "train": {"max_steps": 4, "generation_batch_size": 32},
        "optim": {"learning_rate": 0.05},
        "checkpoint": {"save_steps": 0},
    }
    return Config.model_validate(
        {k: {**base.get(k, {}), **v} if isinstance(v, dict) else v for k, v in {**base, **sections}.items()}
    )


def batch_of(lm: LanguageModel, config: Config, fault: Fault) -> tuple[PolicyBatch, list[torch.Tensor]]:
    """Completions with the log-probs that a fault reports, and the trainer's."""
    batch = policy_batch(scored(lm, config, fault), mask_truncated=False)
    return batch, sequence_log_probs(lm, pack(batch.sequences, 4096), len(batch.sequences), lm.head)[0]


def look(lm: LanguageModel, config: Config, fault: Fault) -> tuple[list[tuple[str, str]], UserError | None]:
    batch = policy_batch(scored(lm, config, fault), mask_truncated=False)
    facts, result = check_engine(lm, config, batch, engine="transformers")
    return facts, result.failure


def scored(lm: LanguageModel, config: Config, fault: Fault) -> list[Scored]:
    prompts = [Prompt(i, [2 + i, 9, 17], "") for i in range(4)]
    rollout = config.rollout
    sampling = Sampling(
        num_generations=6, max_completion_length=12, temperature=rollout.temperature, top_p=rollout.top_p, seed=3
    )
    groups = fault(lm, prompts, sampling)
    return [Scored(g.prompt, c, n, "", {}, 0.0) for n, g in enumerate(groups) for c in g.completions]


def test_a_sound_engine_is_far_within_the_limits(lm, place, tmp_path):
    for rollout in ({}, {"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}):
        facts, failure = look(lm, grpo(place, tmp_path, rollout=rollout), sound)
        assert failure is None
        assert facts[1][1].startswith("100.0% by token")


def rounded(size: float) -> Fault:
    """Log-probs that are off by noise, as bfloat16's are."""

    def fault(lm: LanguageModel, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        draw = random.Random(0)
        return with_log_probs(sound(lm, prompts, sampling), lambda row: [x + draw.gauss(0, size) for x in row])

    return fault


@pytest.mark.parametrize(("size", "fails"), [(0.03, False), (0.2, False), (0.6, True)])
def test_what_only_rounding_explains_goes_on_and_is_said_once(lm, place, tmp_path, monkeypatch, size, fails):
    """With bfloat16's limits on a float32 model, whose own noise is far below."""
    monkeypatch.setattr(Limits, "of", lambda *_, **__: Limits(0.05, 0.5, 0.8, slack=5))
    config = grpo(place, tmp_path)
    batch, own = batch_of(lm, config, rounded(size))
    gate = ParityGate(lm, config, lm.head, engine="transformers")
    looks = [gate.compare(batch, own, step=number, place="at step 1") for number in (0, 10, 20)]
    assert [(one.failure is not None) for one in looks] == [fails] * 3
    assert [one.note is not None for one in looks] == [size == 0.2, False, False]
    if size == 0.2:
        assert "further apart than usual at step 1: mean of |Δ log-prob| 0.1" in looks[0].note
        assert "taken for rounding" in looks[0].note


def test_all_causes_are_tried_out_in_two_passes(lm, place, tmp_path, monkeypatch):
    """With the adapter and without it: at 131,072 tokens each takes 20 s."""
    config, passes, real = grpo(place, tmp_path), [], step.scored_hidden
    batch, own = batch_of(lm, config, hot)
    monkeypatch.setattr(step, "scored_hidden", lambda lm, one: passes.append(one) or real(lm, one))
    found = ParityGate(lm, config, lm.head, engine="transformers").compare(batch, own)
    assert found.failure is not None
    assert len(passes) == 2


def test_a_fault_that_explains_a_small_difference_stops_all_the_same(lm, place, tmp_path, monkeypatch):
    monkeypatch.setattr(Limits, "of", lambda *_, **__: Limits(0.001, 0.01, 0.1, slack=1000))
    _, failure = look(lm, grpo(place, tmp_path), hot)
    assert failure is not None
    assert "at temperature 0.7 the two agree" in failure.reason
    assert look(lm, grpo(place, tmp_path), of_another_prompt)[1] is None


@pytest.mark.parametrize(
    ("fault", "evidence", "first"),
    [
        (hot, "at temperature 0.7 the two agree", "another temperature"),
        (late, "moved by one token (the engine's are late) the two agree", "log-probs of other tokens"),
        (early, "moved by one token (the engine's are early) the two agree", "log-probs of other tokens"),
        (without_adapter, "with the adapter switched off the two agree", "other weights"),
        (of_another_prompt, None, "other weights"),
    ],
)
def test_a_fault_is_caught_and_what_explains_it_is_named(lm, place, tmp_path, fault, evidence, first):
    """What was found by trying is the first of the causes, and each stands there once."""
    _, failure = look(lm, grpo(place, tmp_path), fault)
    assert failure is not None
    assert "mean of |Δ log-prob|" in failure.problem
    assert ("the two agree" in failure.reason) == (evidence is not None)
    assert evidence is None or evidence in failure.reason
    causes = re.findall(r"^  (\d)\. (.*)", failure.reason, re.M)
    assert [number for number, _ in causes] == ["1", "2", "3", "4", "5", "6"]
    assert causes[0][1].startswith(first)
    usual = ("other weights", "another temperature", "log-probs of other", "another chat", "precision", "a defect")
    assert [text for _, text in causes if not text.startswith(first)] == [
        next(text for _, text in causes if text.startswith(start)) for start in usual if start != first[: len(start)]
    ]
    assert "parity.max_mean" in failure.fix


def test_log_probs_from_before_the_nucleus_are_named(lm, place, tmp_path):
    config = grpo(place, tmp_path, rollout={"top_p": 0.6})

    def raw(lm: LanguageModel, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        return sound(lm, prompts, Sampling(**(dict(sampling.__dict__) | {"top_p": 1.0})))

    _, failure = look(lm, config, raw)
    assert failure is not None
    assert "at temperature 1 without top-p and top-k the two agree" in failure.reason


# --- in a run ---------------------------------------------------------------------------------------------------------


class Engine(TransformersEngine):
    """The embedded engine with a fault."""

    def __init__(self, lm: LanguageModel, fault: Fault) -> None:
        super().__init__(lm)
        self._fault, self.calls = fault, 0

    def generate(self, prompts: list[Prompt], sampling: Sampling, **more: Any) -> list[Group]:
        self.calls += 1
        return self._fault(self._lm, prompts, sampling)


def train(config: Config, monkeypatch, fault: Fault = sound, *, resume: Path | None = None) -> tuple[str, str]:
    """Standard output and error of a run, or of its resumption, whose engine has the fault."""
    monkeypatch.setattr(open_model, "open_engine", lambda wanted, lm, **_: Engine(lm, fault))
    monkeypatch.setattr(commands, "write_report", lambda run_dir: run_dir)  # charts take longer than these runs
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err, live=False)
    if resume is not None:
        assert commands.resume(resume, config, console=console)
    else:
        assert commands.run(config, dry_run=False, console=console)
    return out.getvalue(), err.getvalue()


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


class Stale:
    """From the second rollout on, completions of the adapter as it was before the first update."""

    def __init__(self) -> None:
        self._old: list[torch.Tensor] | None = None

    def __call__(self, lm: LanguageModel, prompts: list[Prompt], sampling: Sampling) -> list[Group]:
        parameters = [p.data for _, p in trainable(lm)]
        if self._old is None:
            self._old = [p.clone() for p in parameters]
        now = [p.clone() for p in parameters]
        for parameter, old in zip(parameters, self._old, strict=True):
            parameter.copy_(old)
        groups = sound(lm, prompts, sampling)
        for parameter, new in zip(parameters, now, strict=True):
            parameter.copy_(new)
        return groups


# One optimiser step per rollout takes the log-probs of the step itself; several use those stored before them.
WAYS = [{"steps_per_generation": 1}, {"steps_per_generation": 2}]


@pytest.mark.parametrize("way", WAYS, ids=["own", "stored"])
def test_a_stale_adapter_stops_the_run_and_nothing_is_lost(place, tmp_path, monkeypatch, way):
    config = grpo(place, tmp_path, train=way, parity={"check_steps": 2})
    with pytest.raises(ParityError, match="at step 3") as stopped:
        train(config, monkeypatch, Stale())
    run = tmp_path / "run"
    assert f"rl-train resume {run}" in stopped.value.fix
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    state = read_state(checkpoint)
    assert state.step == 2
    assert state.position == 4 * 2 // way["steps_per_generation"], (
        "the rollout that was not learned from is drawn again"
    )
    assert (run / "rollouts" / "step_000003.jsonl").is_file(), "the evidence"
    # The numbers of the steps before it were logged, none for it.
    assert [r["step"] for r in records(run)] == ([1, 2] if way["steps_per_generation"] == 1 else [2])


@pytest.mark.parametrize("way", WAYS, ids=["own", "stored"])
def test_a_repaired_run_ends_as_if_nothing_had_been(place, tmp_path, monkeypatch, way):
    whole = grpo(place, tmp_path / "whole", train=way)
    train(whole, monkeypatch)
    broken = grpo(place, tmp_path / "broken", train=way)
    with pytest.raises(ParityError, match="at step 1"):
        train(broken, monkeypatch, late)
    train(broken, monkeypatch, resume=tmp_path / "broken" / "run")
    one, two = (adapter(tmp_path / name / "run" / "adapter") for name in ("whole", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(tensor.abs().max() > 0.01 for name, tensor in one.items() if "lora_B" in name), "something was learned"


@pytest.mark.parametrize("way", WAYS, ids=["own", "stored"])
def test_the_numbers_are_logged_in_every_step_and_cost_no_forward_pass(place, tmp_path, monkeypatch, way):
    passes = 0
    hidden = LanguageModel.packed_hidden

    def counted(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return hidden(self, *arguments, **keywords)

    monkeypatch.setattr(LanguageModel, "packed_hidden", counted)
    counts = {}
    for action in ("stop", "off"):
        passes = 0
        train(grpo(place, tmp_path / action, train=way, parity={"action": action}), monkeypatch)
        counts[action] = passes
    assert counts["stop"] == counts["off"] > 0
    on, off = (records(tmp_path / action / "run") for action in ("stop", "off"))
    for record in on:
        assert record["parity/logp_difference/max"] < 1e-4
        assert record["parity/effective_sample_size/token"] == pytest.approx(1, abs=1e-6)
        assert record["parity/logp_difference/max"] >= record["parity/logp_difference/p99"] > 0
        assert record["sampling/sampling_logp_difference/mean"] >= 0
        if way["steps_per_generation"] == 1:  # the same tokens, gathered in another way
            mean = record["sampling/sampling_logp_difference/mean"]
            assert record["parity/logp_difference/mean"] == pytest.approx(mean, rel=1e-9)
    assert not any(key.startswith("parity/") for record in off for key in record)


def test_warn_says_so_and_goes_on(place, tmp_path, monkeypatch):
    config = grpo(place, tmp_path, train={"max_steps": 3}, parity={"action": "warn", "check_steps": 2})
    _, err = train(config, monkeypatch, late)
    assert err.count("do not compute the same policy") == 2
    for number in (1, 3):
        assert f"at step {number}:" in err
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3]


def test_off_lets_anything_pass(place, tmp_path, monkeypatch):
    config = grpo(place, tmp_path, train={"max_steps": 2}, parity={"action": "off"})
    assert "do not compute" not in train(config, monkeypatch, late)[1]


def test_a_number_that_is_none_stops_the_run(place, tmp_path, monkeypatch):
    for dtype in ("float32", "float16"):
        with pytest.raises(ParityError, match="not finite") as error:
            train(grpo(place, tmp_path / dtype, model={"dtype": dtype}), monkeypatch, not_a_number)
        assert ("set model.dtype=bfloat16" in str(error.value)) == (dtype == "float16")


def test_online_dpo_is_held_to_it_too(place, tmp_path, monkeypatch):
    algorithm = {"name": "online_dpo"}
    with pytest.raises(ParityError, match="at step 1"):
        train(grpo(place, tmp_path / "late", algorithm=algorithm), monkeypatch, late)
    config = grpo(place, tmp_path / "sound", algorithm=algorithm, parity={"check_steps": 2})
    train(config, monkeypatch)
    logged = [r["step"] for r in records(tmp_path / "sound" / "run") if "parity/logp_difference/mean" in r]
    assert logged == [1, 3]


def test_groups_without_signal_leave_nothing_to_compare(place, tmp_path, monkeypatch):
    (tmp_path / "same.py").write_text("def same(completions, **_):\n    return [1.0] * len(completions)\n")
    config = grpo(
        place,
        tmp_path,
        rewards={"reward_funcs": [f"{tmp_path / 'same.py'}:same"]},
        algorithm={"drop_uniform_groups": True},
        train={"max_steps": 2},
    )
    train(config, monkeypatch, late)
    assert not any(key.startswith("parity/") for record in records(tmp_path / "run") for key in record)


def test_check_shows_the_numbers_and_stops_at_a_fault(place, tmp_path, monkeypatch):
    config, out = grpo(place, tmp_path), io.StringIO()
    closed = []
    monkeypatch.setattr(Engine, "close", lambda self: closed.append(self))
    monkeypatch.setattr(open_model, "open_engine", lambda wanted, lm, **_: Engine(lm, sound))
    commands.check(config, num_prompts=2, console=Console(out, io.StringIO(), live=False, width=200))
    assert "trainer against rollout log-probs" in out.getvalue()
    assert "100.0% by token" in out.getvalue()
    monkeypatch.setattr(open_model, "open_engine", lambda wanted, lm, **_: Engine(lm, hot))
    with pytest.raises(UserError, match=r"at temperature 0\.7 the two agree"):
        commands.check(config, num_prompts=2, console=Console(out, io.StringIO(), live=False, width=200))
    assert len(closed) == 2, "what an engine holds of the card is given back"
