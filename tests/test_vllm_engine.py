"""The vLLM engine against a stand-in that computes as vLLM does: weights of the store, adapter from its own buffers,
prompts cached by the adapter's name. The engine and the parity check have to notice what is planted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import move_adapter, save_llama, save_words

from tandem.rl.config import LoraConfig, ModelConfig
from tandem.rl.errors import UserError
from tandem.rl.lora import attach_lora, load_adapter, save_adapter
from tandem.rl.model import LanguageModel, load_model, load_tokenizer, with_sampling
from tandem.rl.packing import pack
from tandem.rl.parity import difference
from tandem.rl.samples import Completion, Group, Prompt, Sampling, Sequence
from tandem.rl.step import sequence_log_probs
from tandem.rl.store import WeightStore
from tandem.rollout import vllm_engine
from tandem.rollout.choose_engine import open_engine
from tandem.rollout.engine import RolloutEngine
from tandem.rollout.policy_adapter import PolicyNames, Stacks, policy_parts
from tandem.rollout.transformers_engine import TransformersEngine
from tandem.rollout.vllm_engine import VllmEngine, group_of
from tandem.rollout.vllm_plan import VllmOptions

WORDS = ["<pad>", "</s>", *(f"w{i}" for i in range(2, 48))]
STOP = WORDS.index("</s>")
PROMPTS = [Prompt(i, ids, "") for i, ids in enumerate([[2, 3, 4], [9], [5, 6, 7, 8, 9, 10], [3, 3, 20]])]
SAMPLING = Sampling(num_generations=3, max_completion_length=10, stop_token_ids=(STOP, 7, 30), seed=5)
SLOTS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": STOP, "tie_word_embeddings": True}
    shape = {"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.25, "max_position_embeddings": 64}
    save_llama(path, len(WORDS), **heads, **shape)
    save_words(path, WORDS, eos="</s>", unk="<pad>", named=False)
    return path


@pytest.fixture
def lm(folder) -> LanguageModel:
    config = ModelConfig(model_name_or_path=str(folder), device="cpu")
    loaded = load_model(config, load_tokenizer(config))
    attach_lora(loaded, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"]), seed=0)
    move_adapter(loaded, seed=1, scale=0.3)
    return loaded


@pytest.fixture
def store(folder) -> WeightStore:
    return WeightStore.open(folder, format="bf16", device="cpu", dtype=torch.float32)


@dataclass
class Flat:
    """As vLLM's FlatLogprobs: the sampled token first at each position, here with another one behind it."""

    start_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, token: int, log_prob: float) -> None:
        self.start_indices.append(len(self.token_ids))
        self.token_ids += [token, 0]
        self.logprobs += [log_prob, -99.0]


class FakeLLM:
    """vLLM in small: one model on the store's weights, LoRA from buffers, a prefix cache, sleep."""

    def __init__(self, api: FakeApi, model: str, **arguments: Any) -> None:
        assert (Path(model) / "config.json").is_file()
        self.api, self.arguments = api, arguments
        self.model = api.store.causal_lm()
        self.prefixes: dict[tuple, torch.Tensor] = {}
        self.asleep = self.shut = False
        self.llm_engine = SimpleNamespace(engine_core=self)
        adapted = set(arguments["lora_target_modules"])
        self.stacks = {}
        for name, one in api.store.linears.items():
            if adapted & {part.rpartition(".")[2] for part in one.parts}:
                rows = [r.stop - r.start for r in one.parts.values()]
                self.stacks[name] = Stacks(
                    tuple(torch.ones(1, 1, SLOTS, one.in_features) for _ in rows),
                    tuple(torch.ones(1, 1, count, SLOTS) for count in rows),
                )

    def collective_rpc(self, method: str, args: tuple) -> list:
        assert method == "policy_stacks"
        return [self.stacks]

    def sleep(self, level: int) -> None:
        assert level == 1
        assert not self.asleep, "vLLM does not survive a second sleep"
        self.asleep = True
        self.prefixes.clear()

    def wake_up(self) -> None:
        assert self.asleep, "vLLM does not survive a second wake_up"
        self.asleep = False

    def shutdown(self) -> None:
        self.shut = True

    @torch.no_grad()
    def _log_probs(self, ids: list[int]) -> torch.Tensor:
        """Of the token after `ids`, through the weights with the buffers' products added."""
        base = {}
        for name, one in self.api.store.linears.items():
            for i, part in enumerate(one.parts):
                if name in self.stacks:
                    weight = self.model.get_submodule(part).weight
                    base[part] = weight.detach().clone()
                    weight += self.stacks[name].b[i][0, 0] @ self.stacks[name].a[i][0, 0]
        out = self.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        for part, weight in base.items():
            self.model.get_submodule(part).weight.copy_(weight)
        return out

    def generate(self, prompts, params, *, use_tqdm, lora_request) -> list:
        assert not self.asleep
        self.api.requests.append((lora_request, list(params)))
        bar = use_tqdm(total=len(prompts), desc="") if use_tqdm else None
        outputs = []
        for prompt, one in zip(prompts, params, strict=True):
            ids = prompt["prompt_token_ids"]
            outputs.append(SimpleNamespace(outputs=[self._complete(ids, one, k, lora_request) for k in range(one.n)]))
            if bar:
                bar.update(one.n)
        return outputs

    def _complete(self, prompt: list[int], params, index: int, request) -> SimpleNamespace:
        own = params.seed is not None
        generator = torch.Generator().manual_seed(params.seed + index) if own else torch.default_generator
        flat, ids = Flat(), []
        for step in range(params.max_tokens):
            if step == 0:
                key = (request.lora_name, *prompt)
                if key not in self.prefixes:
                    self.prefixes[key] = self._log_probs(prompt)
                log_probs = self.prefixes[key]
            else:
                log_probs = self._log_probs(prompt + ids)
            if params.temperature > 0:
                log_probs = (log_probs / params.temperature).log_softmax(-1)
            greedy = params.temperature == 0
            token = int(log_probs.argmax() if greedy else torch.multinomial(log_probs.exp(), 1, generator=generator))
            ids.append(token)
            flat.add(token, float(log_probs[token]))
            if token in params.stop_token_ids:
                break
        reason = "stop" if ids[-1] in params.stop_token_ids else "length"
        return SimpleNamespace(index=index, token_ids=tuple(ids), logprobs=flat, finish_reason=reason)


class FakeApi:
    worker, SamplingParams, LoRARequest = "worker", SimpleNamespace, None

    def __init__(self) -> None:
        self.requests: list = []
        self.LoRARequest = lambda name, number, path: SimpleNamespace(lora_name=name, number=number, path=path)

    def LLM(self, model: str, **arguments: Any) -> FakeLLM:
        self.llm = FakeLLM(self, model, **arguments)
        return self.llm

    def sharing(self, store, *, stock_numerics):
        from contextlib import contextmanager

        @contextmanager
        def share():
            self.store, self.stock_numerics = store, stock_numerics
            yield {"quantization": "shared"}

        return share()


@pytest.fixture
def engine(lm, store, tmp_path, monkeypatch) -> VllmEngine:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    api = FakeApi()
    made = VllmEngine(lm, store, VllmOptions(max_num_seqs=16, sleep_above=0), api=api)
    made.api = api
    return made


def trainer(lm: LanguageModel, groups: list[Group], temperature: float = 1.0) -> list[torch.Tensor]:
    head = with_sampling(lm.head, temperature=temperature, top_k=0, top_p=1.0, chunk_size=5)
    pairs = [(g.prompt, c) for g in groups for c in g.completions]
    sequences = [Sequence(p.ids, c.ids, [True] * len(c.ids), family=p.index) for p, c in pairs]
    return sequence_log_probs(lm, pack(sequences, 40), len(sequences), head)[0]


def reported(groups: list[Group]) -> list[list[float]]:
    return [c.log_probs for g in groups for c in g.completions]


def agree(lm: LanguageModel, groups: list[Group], **options) -> bool:
    return difference(reported(groups), trainer(lm, groups, **options)).within(median=1e-4, p99=1e-3)


def test_it_is_a_rollout_engine(engine, lm):
    assert isinstance(engine.name, str)
    for name in ("generate", "load_adapter", "sleep", "wake", "close"):
        assert callable(getattr(engine, name)), name
        assert hasattr(RolloutEngine, name)
    groups = engine.generate(PROMPTS, SAMPLING)
    assert [g.prompt for g in groups] == PROMPTS
    assert all(len(g.completions) == 3 for g in groups)
    for completion in (c for g in groups for c in g.completions):
        assert len(completion.ids) == len(completion.log_probs) <= 10
        assert completion.truncated == (completion.ids[-1] not in SAMPLING.stop_token_ids)
        assert not set(completion.ids[:-1]) & set(SAMPLING.stop_token_ids)
    assert engine.generate([], SAMPLING) == []


def test_what_vllm_is_built_with(engine, lm):
    arguments = engine.api.llm.arguments
    assert arguments["lora_target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert (arguments["max_lora_rank"], arguments["max_loras"]) == (8, 1)
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["max_model_len"] == lm.max_length == 64
    assert arguments["quantization"] == "shared"
    assert arguments["dtype"] == "float32"
    assert engine.api.stock_numerics is False


def test_an_engine_that_rounds_as_stock_vllm_is_asked_for(lm, store, tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    api = FakeApi()
    VllmEngine(lm, store, VllmOptions(max_num_seqs=16, stock_numerics=True), api=api)
    assert api.stock_numerics is True
    assert api.store is store


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_engine_and_trainer_agree_before_and_after_updates(engine, lm, temperature):
    sampling = Sampling(3, 10, temperature=temperature, stop_token_ids=(STOP,), seed=3)
    for version in range(1, 4):
        groups = engine.generate(PROMPTS, sampling)
        assert agree(lm, groups, temperature=temperature or 1.0)
        move_adapter(lm, seed=10 + version, scale=0.3)
        engine.load_adapter(version)
        assert not agree(lm, groups, temperature=temperature or 1.0), "the update is too small to test anything"
    assert [r.lora_name for r, _ in engine.api.requests] == ["policy@0", "policy@1", "policy@2"]


def test_greedy_tokens_are_those_of_the_transformers_engine(engine, lm):
    sampling = Sampling(2, 8, temperature=0.0, stop_token_ids=(STOP,))
    ours, theirs = engine.generate(PROMPTS, sampling), TransformersEngine(lm).generate(PROMPTS, sampling)
    assert [[c.ids for c in g.completions] for g in ours] == [[c.ids for c in g.completions] for g in theirs]
    assert [[c.truncated for c in g.completions] for g in ours] == [
        [c.truncated for c in g.completions] for g in theirs
    ]
    assert engine.api.requests[0][1][0].n == 1, "vLLM refuses groups of greedy completions"


def test_one_random_stream_for_a_call(lm, store, tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    api = FakeApi()
    engine = VllmEngine(lm, store, VllmOptions(max_num_seqs=16, seed_per_completion=False), api=api)
    before = torch.get_rng_state()

    def ids(prompts: list[Prompt], seed: int) -> list[list[int]]:
        sampling = Sampling(3, 10, seed=seed)
        return [c.ids for g in engine.generate(prompts, sampling) for c in g.completions]

    first = ids(PROMPTS, 1)
    assert ids(PROMPTS, 1) == first
    assert ids(PROMPTS, 2) != first
    assert ids(PROMPTS[:1], 1) == first[:3], "the stand-in samples completion after completion"
    assert ids(PROMPTS[1:2], 1) != first[3:6], "other prompts draw other numbers"
    assert {one.seed for _, params in api.requests for one in params} == {None}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_completion_depends_on_its_prompt_its_number_and_the_seed(engine):
    def ids(prompts, **changes) -> dict:
        groups = engine.generate(prompts, Sampling(3, 10, stop_token_ids=(STOP,), **changes))
        return {g.prompt.index: [c.ids for c in g.completions] for g in groups}

    whole = ids(PROMPTS, seed=1)
    assert ids(PROMPTS[2:], seed=1) == {k: whole[k] for k in (2, 3)}
    assert ids(PROMPTS, seed=2) != whole
    assert ids([replace(PROMPTS[2], draw=1)], seed=1) != {2: whole[2]}
    seeds = [p.seed + k for _, params in engine.api.requests[:1] for p in params for k in range(p.n)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_restored_adapter_is_noticed_without_being_told(engine, lm, tmp_path):
    save_adapter(lm, tmp_path / "adapter")
    move_adapter(lm, seed=9, scale=0.3)
    engine.load_adapter(4)
    load_adapter(lm, tmp_path / "adapter")
    assert agree(lm, engine.generate(PROMPTS, SAMPLING))
    assert engine.api.requests[-1][0].lora_name == "policy@4#2"


# Planted faults


def test_a_wrong_scale_is_caught(engine, lm):
    for stack in engine.api.llm.stacks.values():
        for b in stack.b:
            b.mul_(3 / 5)
    assert not agree(lm, engine.generate(PROMPTS, SAMPLING))


def test_a_stale_prefix_is_caught(engine, lm, monkeypatch):
    engine.generate(PROMPTS, SAMPLING)
    monkeypatch.setattr(PolicyNames, "new", lambda self, version: "policy")
    engine.load_adapter(1)
    engine.generate(PROMPTS, SAMPLING)
    move_adapter(lm, seed=2, scale=0.3)
    engine.load_adapter(2)
    assert not agree(lm, engine.generate(PROMPTS, SAMPLING))


def test_log_probs_of_other_tokens_are_caught(engine, lm):
    groups = engine.generate(PROMPTS, SAMPLING)
    shifted = [
        Group(g.prompt, [Completion(c.ids, [c.log_probs[0], *c.log_probs[:-1]], c.truncated) for c in g.completions])
        for g in groups
    ]
    assert not agree(lm, shifted)
    own = trainer(lm, groups)
    with pytest.raises(ValueError, match="completions and"):
        difference(reported(groups), own[1:])
    with pytest.raises(ValueError, match="from the trainer"):
        difference(reported(groups), [row[1:] for row in own])
    groups[0].completions[0].log_probs[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        difference(reported(groups), own)


def output(ids=(4, 5), scored=(4, 5), reason="length", index=0) -> SimpleNamespace:
    flat = Flat()
    for token in scored:
        flat.add(token, -1.0)
    return SimpleNamespace(index=index, token_ids=ids, logprobs=flat, finish_reason=reason)


def test_answers_of_vllm_that_make_no_sense_are_refused():
    one = Sampling(1, 4)
    assert group_of(PROMPTS[0], SimpleNamespace(outputs=[output()]), one).completions[0].ids == [4, 5]
    for wrong, message in [
        (output(scored=(5, 4)), "not those of the 2 sampled"),
        (output(scored=(4,)), "1 log-probs"),
        (output(reason="abort"), "gave a completion up: abort"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            group_of(PROMPTS[0], SimpleNamespace(outputs=[wrong]), one)
    with pytest.raises(RuntimeError, match="1 completions of prompt 0, not 2"):
        group_of(PROMPTS[0], SimpleNamespace(outputs=[output()]), Sampling(2, 4))
    swapped = SimpleNamespace(outputs=[output((4,), (4,), index=1), output((5,), (5,), index=0)])
    assert [c.ids for c in group_of(PROMPTS[0], swapped, Sampling(2, 4)).completions] == [[5], [4]]


# Phases, limits, choice


def test_a_small_cache_stays_through_the_update(lm, store, tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    for limit, sleeps in ((1 << 40, False), (0, True)):
        engine = VllmEngine(lm, store, VllmOptions(max_num_seqs=16, sleep_above=limit), api=FakeApi())
        engine.sleep()
        assert (engine.asleep_bytes > 0) == engine._llm.asleep == sleeps
        engine.wake()
        assert len(engine.generate(PROMPTS, SAMPLING)) == len(PROMPTS)
        engine.close()


def test_sleep_and_wake_may_be_called_twice_and_generate_wants_it_awake(engine):
    engine.wake()
    assert engine.asleep_bytes == 0
    engine.sleep()
    engine.sleep()
    assert engine.asleep_bytes == engine.kv_cache_bytes > 0, "PyTorch goes on counting what vLLM gave back"
    with pytest.raises(RuntimeError, match="asleep"):
        engine.generate(PROMPTS, SAMPLING)
    engine.load_adapter(1)
    engine.wake()
    engine.wake()
    assert engine.asleep_bytes == 0
    assert len(engine.generate(PROMPTS, SAMPLING)) == len(PROMPTS)
    engine.close()
    engine.close()
    assert engine.api.llm.shut


def test_too_long_a_prompt_is_an_error_before_vllm_sees_it(engine):
    with pytest.raises(UserError, match="a prompt of 60 tokens and a completion of 10 are 70 tokens"):
        engine.generate([Prompt(0, [2] * 60, "")], SAMPLING)
    assert engine.api.requests == []


def test_progress_counts_completions(engine):
    seen = []
    engine.generate(PROMPTS, SAMPLING, progress=lambda done, asked: seen.append((done, asked)))
    assert seen == [(3, 12), (6, 12), (9, 12), (12, 12)]
    greedy = Sampling(2, 4, temperature=0.0)
    engine.generate(PROMPTS, greedy, progress=lambda done, asked: seen.append((done, asked)))
    assert seen[-1] == (8, 8)


def test_an_adapter_on_the_head_is_refused(folder, lm):
    assert set(policy_parts(lm.causal_lm)) == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    import peft

    config = ModelConfig(model_name_or_path=str(folder), device="cpu")
    headed = load_model(config, load_tokenizer(config))
    headed.model = peft.get_peft_model(headed.model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UserError, match="lm_head adapts the head"):
        policy_parts(headed.causal_lm)


STORE = SimpleNamespace(format="nf4")


def choose(lm, kind="auto", *, store=STORE, source="folder", build=None, why=None):
    said: list[str] = []
    engine = open_engine(
        kind,
        lm,
        store=store,
        source=source,
        load_in_4bit=True,
        options=VllmOptions(),
        note=lambda text: said.append(f"note: {text}"),
        warn=lambda text: said.append(f"warning: {text}"),
        why_not=lambda _: why,
        build=build or (lambda *a, **k: SimpleNamespace(name="vllm", kv_cache_bytes=3 << 30)),
    )
    return engine.name, said


def test_the_best_engine_that_works_is_chosen_and_its_price_named(lm, monkeypatch):
    name, said = choose(lm)
    assert (name, len(said)) == ("vllm", 1)
    assert "3.00 GiB" in said[0]

    def only_a_copy(lm, store, options, **keywords):
        if store is not None:
            raise RuntimeError("the engine builds something else")
        assert keywords == {"source": "folder", "source_quantization": "bitsandbytes"}
        return SimpleNamespace(name="vllm")

    name, said = choose(lm, build=only_a_copy)
    assert name == "vllm"
    assert said[0].startswith("warning: vLLM holds a copy of the weights, 0.00 GiB")
    assert "builds something else" in said[0]

    with pytest.raises(UserError, match="a copy from the checkpoint would have its own rotations"):
        choose(lm, "vllm", build=only_a_copy, source=None)

    def nothing(*_, **__):
        raise ValueError("no kernel image")

    others = SimpleNamespace(format="fp8")
    with pytest.raises(UserError, match="vLLM has no fp8 of its own that would be the same weights"):
        choose(lm, "vllm", store=others, build=only_a_copy)
    assert choose(lm, build=nothing) == ("transformers", []), "on a CPU nobody expects vLLM"
    with pytest.raises(UserError, match="no kernel image"):
        choose(lm, "vllm", build=nothing)
    monkeypatch.setattr("tandem.rollout.choose_engine.free_bytes", lambda _: 0)
    with pytest.raises(UserError, match="no room for a copy"):
        choose(lm, "vllm", build=only_a_copy)
    with pytest.raises(UserError, match=r"only 0\.24\.0 has been tried"):
        choose(lm, "vllm", why="vLLM 9 is installed, and only 0.24.0 has been tried")
    assert choose(lm, "transformers", build=nothing)[0] == "transformers"


def test_without_a_gpu_vllm_is_not_even_looked_for(lm, monkeypatch):
    monkeypatch.setattr(vllm_engine, "load_api", lambda: pytest.fail("vLLM was imported"))
    silent = {"note": print, "warn": print}
    made = open_engine("auto", lm, store=None, source="", load_in_4bit=False, options=VllmOptions(), **silent)
    assert isinstance(made, TransformersEngine)
    with pytest.raises(UserError, match="needs a CUDA device"):
        open_engine("vllm", lm, store=None, source="", load_in_4bit=False, options=VllmOptions(), **silent)


@pytest.mark.parametrize(
    ("eager", "compiled", "expected"),
    [
        (True, True, None),
        (False, True, {"custom_ops": ["all"]}),
        (False, False, {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}),
    ],
)
def test_graphs_need_no_compiler(eager: bool, compiled: bool, expected: dict[str, Any] | None) -> None:
    options = VllmOptions(max_num_seqs=4, enforce_eager=eager, torch_compile=compiled)
    given = vllm_engine.engine_arguments(options, 64, 1 << 20, 8, ["q_proj"], torch.bfloat16, torch.device("cpu"))
    assert given.get("enforce_eager", False) == eager
    if expected is None:
        assert "compilation_config" not in given
    else:
        sizes = {"cudagraph_specialize_lora": False, "cudagraph_capture_sizes": [1, 2, 4]}
        assert given["compilation_config"] == sizes | expected


def test_vllms_own_kernels_round_as_the_trainer_and_a_stock_engine_keeps_its_choice() -> None:
    def given(**changes: Any) -> dict[str, Any]:
        options = VllmOptions(max_num_seqs=4, **changes)
        return vllm_engine.engine_arguments(options, 64, 1 << 20, 8, [], torch.bfloat16, torch.device("cpu"))

    norms = given()["kernel_config"]["ir_op_priority"]
    assert norms == {"rms_norm": ["vllm_c"], "fused_add_rms_norm": ["vllm_c"]}
    stock = given(stock_numerics=True)
    assert "kernel_config" not in stock
    assert "custom_ops" not in stock["compilation_config"]
