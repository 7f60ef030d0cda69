"""An engine that dies is built anew once and changes nothing; what it dies of again stops the run with a checkpoint.

The stand-in for vLLM generates as the transformers engine does and keeps a worker process, without which it cannot: a
death is that of the process, met as a broken pipe, or an exception out of its core.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from run_server import RunServer
from tiny_run import outcome, write_place

from tandem.rl.checkpoint import damage
from tandem.rl.errors import UserError
from tandem.rl.samples import Prompt, Sampling
from tandem.rollout.choose_engine import open_engine
from tandem.rollout.restart import EngineDied, RestartingEngine
from tandem.rollout.vllm_plan import VllmOptions

ENGINE = """
import functools, subprocess
import tandem.rl.open_model as opened
from tandem.rollout.transformers_engine import TransformersEngine

DEATHS, CALLS = {deaths}, []

class Engine(TransformersEngine):
    name, built = "vllm", 0

    def __init__(self, lm, store, options, **more):
        super().__init__(lm)
        Engine.built += 1
        self.number, self.awake, self.version = Engine.built, True, 0
        self.worker = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        print("BUILT", self.number, flush=True)

    def meet(self, doing):
        CALLS.append(doing)
        death = DEATHS.get(f"{{doing}} {{CALLS.count(doing)}}")
        if death == "killed":
            self.worker.kill()
            self.worker.wait()
        if death == "raises":
            raise RuntimeError("EngineCore encountered an issue")
        self.worker.stdin.write(b"x")
        self.worker.stdin.flush()
        assert self.worker.stdout.read(1) == b"x"

    def generate(self, prompts, sampling, **more):
        assert self.awake
        self.meet("generate")
        print("GENERATES", self.number, self.version, sampling.seed, flush=True)
        groups = super().generate(prompts, sampling, **more)
        self.meet("finish")
        return groups

    def load_adapter(self, version):
        self.meet("load")
        self.version = version

    def sleep(self):
        self.meet("sleep")
        self.awake = False

    def wake(self):
        self.meet("wake")
        self.awake = True

    def close(self):
        self.worker.kill()
        self.worker.communicate()
        print("CLOSED", self.number, flush=True)

opened.open_engine = functools.partial(opened.open_engine, why_not=lambda lm: None, build=Engine)
"""


class Bench:
    """A run that no engine died in, and a server that starts others."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, RunServer(folder)
        self.config = write_place(folder)
        raw = yaml.safe_load(self.config.read_text())
        raw["rollout"]["engine"] = "vllm"
        self.config.write_text(yaml.safe_dump(raw))
        code, said = self.run("run", {})
        assert code == 0, said
        self.outcome = outcome(folder / "runs" / "run")

    def run(self, name: str, deaths: dict[str, str]) -> tuple[int, str]:
        patch = ENGINE.format(deaths=deaths)
        return self.server.run("run", self.config, f"run_name={name}", patch=patch, no_report=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("restart"))


@pytest.mark.injects(1)
@pytest.mark.parametrize(
    "death",
    [
        {"generate 2": "killed"},
        {"finish 2": "raises"},  # completions were made, and are made again
        {"generate 4": "raises"},  # in an evaluation
        {"wake 3": "killed"},
        {"sleep 2": "killed"},
        {"load 3": "raises"},
    ],
    ids=str,
)
def test_a_dead_engine_is_built_anew_and_changes_nothing(bench: Bench, death: dict[str, str]) -> None:
    name = "_".join(next(iter(death)).split())
    code, said = bench.run(name, death)
    assert code == 0, said
    assert said.count("the vllm engine died") == 1
    assert ("BrokenPipeError" if "killed" in death.values() else "EngineCore encountered an issue") in said
    events = re.findall(r"(BUILT|CLOSED) (\d)", said)
    assert events == [("BUILT", "1"), ("CLOSED", "1"), ("BUILT", "2"), ("CLOSED", "2")]
    found = outcome(bench.folder / "runs" / name)
    assert found == bench.outcome
    # The new engine serves the adapter of the step that it was built at.
    versions = [int(v) for v in re.findall(r"GENERATES \d (\d) \d", said)]
    assert versions == sorted(versions)
    assert set(versions) == {0, 2, 4}


@pytest.mark.injects(2)
@pytest.mark.parametrize(
    ("deaths", "step"),
    [
        ({"generate 2": "killed", "generate 3": "raises"}, 0),
        ({"generate 3": "killed", "generate 4": "raises"}, 2),
        ({"load 1": "raises", "sleep 3": "raises"}, 4),  # found dead by the evaluation
    ],
    ids=str,
)
def test_a_second_death_stops_with_a_checkpoint(bench: Bench, deaths: dict[str, str], step: int) -> None:
    name = "twice_" + "_".join(deaths).replace(" ", "_")
    code, said = bench.run(name, deaths)
    text = " ".join(said.split())
    assert code == 1, said
    assert "Traceback" not in said
    assert "error: the vllm engine died again after it was built anew" in text
    assert "EngineCore encountered an issue" in text.partition("error: ")[2]
    run = bench.folder / "runs" / name
    assert f"a checkpoint after step {step} is kept: rl-train resume {run}" in text
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert newest.name == f"step_{step:06d}"
    assert damage(newest) is None
    code, said = bench.server.run("resume", run, patch=ENGINE.format(deaths={}), no_report=True)
    assert code == 0, said
    found = outcome(run)
    assert {k: v for k, v in found.items() if k != "checkpoints"} == {
        k: v for k, v in bench.outcome.items() if k != "checkpoints"
    }


# --- the wrapper alone ------------------------------------------------------------------------------------------------


class Scripted:
    """An engine that does as it is told: one outcome per call, an exception to raise or a value."""

    name = "scripted"

    def __init__(self, *outcomes: Any, closes: Exception | None = None) -> None:
        self.outcomes, self.closes, self.calls = list(outcomes), closes, []

    def _do(self, *call: Any) -> Any:
        self.calls.append(call)
        result = self.outcomes.pop(0) if self.outcomes else None
        if isinstance(result, BaseException):
            raise result
        return result

    def generate(self, prompts: Any, sampling: Any, *, progress: Any = None) -> Any:
        return self._do("generate", prompts, sampling, progress)

    def load_adapter(self, version: int) -> None:
        self._do("load", version)

    def sleep(self) -> None:
        self._do("sleep")

    def wake(self) -> None:
        self._do("wake")

    def close(self) -> None:
        self.calls.append(("close",))
        if self.closes:
            raise self.closes


def building(*engines: Scripted | Exception) -> Callable[[], Any]:
    left = list(engines)

    def build() -> Any:
        made = left.pop(0)
        if isinstance(made, Exception):
            raise made
        return made

    return build


PROMPTS, SAMPLING = [Prompt(0, [1], "")], Sampling(1, 1)


def test_the_second_engine_gets_the_same_call_and_the_last_adapter() -> None:
    said: list[str] = []
    first, second = Scripted(None, ValueError("broken")), Scripted(None, "groups")
    engine = RestartingEngine(first, building(second), warn=said.append)
    engine.load_adapter(7)
    assert engine.generate(PROMPTS, SAMPLING) == "groups"
    assert first.calls[-1] == ("close",)
    assert second.calls == [("load", 7), ("generate", PROMPTS, SAMPLING, None)]
    assert len(said) == 1
    assert "ValueError: broken while generating (" in said[0]
    assert "test_restart.py:" in said[0]
    engine.close()
    engine.close()
    assert second.calls[-1] == ("close",)


def test_a_wrong_request_is_no_death() -> None:
    engine = RestartingEngine(Scripted(UserError("too long")), building(), warn=pytest.fail)
    with pytest.raises(UserError, match="too long"):
        engine.generate(PROMPTS, SAMPLING)


def test_an_interrupt_is_no_death() -> None:
    engine = RestartingEngine(Scripted(KeyboardInterrupt()), building(), warn=pytest.fail)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize("error", [UserError("too little memory for the KV cache"), MemoryError("none")])
def test_what_cannot_be_built_anew_is_dead(error: Exception) -> None:
    engine = RestartingEngine(Scripted(ValueError("first")), building(error), warn=lambda text: None)
    with pytest.raises(EngineDied, match="cannot be built anew") as stopped:
        engine.wake()
    assert str(error) in stopped.value.reason
    assert "ValueError: first" in stopped.value.reason


def test_a_dead_engine_that_cannot_be_closed_is_left() -> None:
    said: list[str] = []
    first = Scripted(ValueError("first"), closes=OSError("no answer"))
    engine = RestartingEngine(first, building(Scripted(None, None)), warn=said.append)
    engine.wake()
    assert "could not be closed: OSError: no answer" in said[1]


def test_what_an_engine_died_with_holds_no_memory() -> None:
    """The next engine allocates from what the dead one lets go of, and its frames hold tensors."""

    class Dying(Scripted):
        def wake(self) -> None:
            held = torch.zeros(1)
            alive.append(weakref.ref(held))
            try:
                raise OSError("out of memory")
            except OSError as error:
                raise RuntimeError("core is gone") from error

        def close(self) -> None:
            alive.append(alive[0]())

    alive: list[Any] = []
    engine = RestartingEngine(Dying(), building(Scripted()), warn=lambda text: None)
    engine.wake()
    assert alive[1] is None


def test_what_died_outside_a_rollout_is_built_in_the_next_one() -> None:
    second = Scripted()
    engine = RestartingEngine(Scripted(ValueError()), building(second), warn=lambda text: None)
    engine.sleep()
    engine.load_adapter(3)
    assert second.calls == []
    engine.wake()
    assert second.calls == [("load", 3), ("wake",)]


@pytest.mark.parametrize("room", [True, False], ids=["with a copy", "on the store"])
def test_engines_that_can_be_built_anew_are_wrapped(room: bool) -> None:
    made: list[tuple] = []

    def build(*arguments: Any, **more: Any) -> Scripted:
        made.append((arguments, more))
        return Scripted(ValueError("dead")) if len(made) == 1 else Scripted()

    lm = SimpleNamespace(
        device=torch.device("cpu"), causal_lm=SimpleNamespace(get_memory_footprint=lambda: 1), name="lm"
    )
    engine = open_engine(
        "vllm",
        lm,  # type: ignore[arg-type]
        store=None if room else "store",
        source="folder",
        load_in_4bit=True,
        options=VllmOptions(),
        note=lambda text: None,
        warn=lambda text: None,
        why_not=lambda lm: None,
        build=build,
    )
    engine.wake()
    assert len(made) == 2
    assert made[0] == made[1], "the second is built from what the first was"
    assert json.dumps(made[0][1]) == json.dumps(
        {"source": "folder", "source_quantization": "bitsandbytes"} if room else {}
    )
