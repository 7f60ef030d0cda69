"""Using the toolkit leaves every function and class of transformers, peft and trl as it was.

This file is also the script that a fresh interpreter runs: it snapshots the libraries, uses the toolkit, and compares.
Compared are the functions, classes and descriptors that modules and classes hold (by identity) and the code and
defaults of every function; a function of ours that appears anywhere in a library's class or module is reported too.
"""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from test_imports import SANDBOXED

ROOT = Path(__file__).parents[1]
LIBRARIES = ("transformers", "peft", "trl")
FOLDERS = ("rl", "rewards", "rollout", "kernels")

# Loaded before the snapshot, since what is loaded afterwards cannot be compared with an earlier state.
PRELOADED = (
    "transformers.cache_utils",
    "transformers.masking_utils",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "transformers.generation.logits_process",
    "transformers.integrations.sdpa_attention",
    "transformers.integrations.bitsandbytes",
    "transformers.loss.loss_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.optimization",
    "transformers.tokenization_utils_base",
    "transformers.tokenization_utils_tokenizers",
    "transformers.trainer",
    "peft.mapping_func",
    "peft.peft_model",
    "peft.tuners.lora.layer",
    "peft.tuners.lora.model",
    "peft.utils.save_and_load",
    "trl.trainer.dpo_trainer",
    "trl.trainer.grpo_trainer",
    "trl.trainer.sft_trainer",
)

Snapshot = dict[tuple[str, str], tuple[Any, ...]]


# --- what is compared -------------------------------------------------------------------------------------------------


def library_modules() -> list[tuple[str, ModuleType]]:
    found = [(n, m) for n, m in list(sys.modules.items()) if n.partition(".")[0] in LIBRARIES]
    return [(name, module) for name, module in found if isinstance(module, ModuleType)]


def functions_and_classes() -> Iterator[tuple[tuple[str, str], Any]]:
    """((holder, name), value) for module globals and class attributes that are functions, classes or descriptors."""
    seen: set[int] = set()
    for module_name, module in library_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, type) or callable(value):
                yield (module_name, name), value
            if isinstance(value, type) and value.__module__.partition(".")[0] in LIBRARIES and id(value) not in seen:
                seen.add(id(value))
                yield from class_attributes(value)


def class_attributes(cls: type) -> Iterator[tuple[tuple[str, str], Any]]:
    holder = f"{cls.__module__}.{cls.__qualname__}"
    for name, value in list(vars(cls).items()):
        if callable(value) or inspect.isdatadescriptor(value) or hasattr(value, "__get__"):
            yield (holder, name), value


def plain_function(value: Any) -> FunctionType | None:
    """The function inside a classmethod, staticmethod or property getter; None where there is none."""
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    return value if isinstance(value, FunctionType) else None


def snapshot() -> Snapshot:
    """The objects themselves are kept, so that none is freed and its address used again."""
    taken: Snapshot = {}
    for place, value in functions_and_classes():
        function = plain_function(value)
        taken[place] = (value, *((function.__code__, function.__defaults__) if function else ()))
    return taken


def differences(before: Snapshot) -> list[str]:
    """What was replaced or deleted since, and what of ours sits in a library's module or class now."""
    after, found = snapshot(), []
    for place, old in before.items():
        new = after.get(place)
        if new is None:
            found.append(f"deleted: {'.'.join(place)}")
        elif len(old) != len(new) or any(a is not b for a, b in zip(old, new, strict=True)):
            found.append(f"replaced: {'.'.join(place)}")
    for place, new in after.items():
        origin = getattr(plain_function(new[0]) or new[0], "__module__", None)
        if place not in before and isinstance(origin, str) and origin.partition(".")[0] in ("tandem", "__main__"):
            found.append(f"added: {'.'.join(place)}")
    return found


# --- what is done in between ------------------------------------------------------------------------------------------


def import_everything() -> list[str]:
    """Import every module of ours."""
    paths = sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))
    names = [".".join(("tandem", *p.relative_to(ROOT).with_suffix("").parts)) for p in paths]
    names = [name.removesuffix(".__init__") for name in names]
    return [name for name in names if name.rpartition(".")[2] not in SANDBOXED and imports(name)]


def imports(name: str) -> bool:
    """Import a module; False where it needs a package for GPUs that is not installed here."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("triton", "vllm"):
            return False
        raise
    return True


def use_everything(folder: Path) -> None:
    """A small piece of real use on a random model of a few thousand weights. Add each further way of use here."""
    model_folder = tiny_model(folder / "model")
    generate_and_step(model_folder)
    train_by_command(folder, model_folder)


def train_by_command(folder: Path, model_folder: Path) -> None:
    """A whole GRPO run of two steps with a warm-up, an evaluation, checkpoints and a report."""
    import io

    from tandem.rl.commands import run
    from tandem.rl.config_file import load_config
    from tandem.rl.console import Console

    (folder / "reward.py").write_text("def longest(completions, **columns): return [len(c) for c in completions]\n")
    (folder / "rows.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}\n{"prompt": "2+2=", "completion": "4"}\n')
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "output_dir": str(folder / "runs"),
                "model": {"model_name_or_path": str(model_folder), "device": "cpu"},
                "data": {"dataset_name": "rows.jsonl"},
                "eval": {"dataset_name": "rows.jsonl"},
                "warmup": {"max_steps": 1, "dataset_name": "rows.jsonl"},
                "rollout": {"num_generations": 2, "max_completion_length": 4},
                "rewards": {"reward_funcs": ["reward.py:longest"]},
                "algorithm": {"beta": 0.1},
                "train": {"max_steps": 2, "generation_batch_size": 4},
            }
        )
    )
    config = load_config(folder / "config.yaml")
    assert run(config, dry_run=False, console=Console(stdout=io.StringIO())), "the run was stopped"


def tiny_model(folder: Path) -> Path:
    """A random Llama with a word-level tokenizer of 16 words, as a folder that transformers can load."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", *"0123456789+-=?"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def generate_and_step(model_folder: Path) -> None:
    """Load, attach an adapter, generate, and add a policy gradient: all that touches the libraries' model classes."""
    from tandem.rl.config import AlgorithmConfig, LoraConfig, ModelConfig
    from tandem.rl.lora import attach_lora, trainable
    from tandem.rl.metrics import Meter
    from tandem.rl.model import load_model, load_tokenizer
    from tandem.rl.packing import pack
    from tandem.rl.samples import Prompt, Sampling, Sequence
    from tandem.rl.step import PolicyBatch, policy_backward
    from tandem.rollout.transformers_engine import TransformersEngine

    model = ModelConfig(model_name_or_path=str(model_folder), device="cpu")
    lm = load_model(model, load_tokenizer(model))
    attach_lora(lm, LoraConfig(r=2), seed=0)
    engine = TransformersEngine(lm)
    sampling = Sampling(num_generations=2, max_completion_length=4, stop_token_ids=(1,))
    groups = engine.generate([Prompt(index=0, ids=[3, 4, 5], prompt="123")], sampling)
    engine.close()
    drawn = groups[0].completions
    batch = PolicyBatch(
        sequences=[Sequence([3, 4, 5], c.ids, [True] * len(c.ids), family=0) for c in drawn],
        advantages=[1.0, -1.0],
        rollout_log_probs=[c.log_probs for c in drawn],
    )
    packs = pack(batch.sequences, 64)
    policy_backward(lm, packs, batch, AlgorithmConfig(), lm.head, Meter(), max_completion_length=4)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for _, p in trainable(lm)), "nothing was trained"


# --- proofs that a patch is seen --------------------------------------------------------------------------------------


def foreign(self: Any, *args: Any, **kwargs: Any) -> None:
    """Stands for a patch."""


def replace(holder: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute; what is returned puts the old one back."""
    before = vars(holder)[name] if name in vars(holder) else getattr(holder, name)
    setattr(holder, name, value)
    return lambda: setattr(holder, name, before)


def patch_method() -> Callable[[], None]:
    from transformers.models.llama.modeling_llama import LlamaAttention

    return replace(LlamaAttention, "forward", foreign)


def patch_class_of_a_module() -> Callable[[], None]:
    from transformers.models.llama import modeling_llama

    return replace(modeling_llama, "LlamaRMSNorm", type("FasterNorm", (modeling_llama.LlamaRMSNorm,), {}))


def patch_code() -> Callable[[], None]:
    from peft.tuners.lora.layer import Linear

    return replace(Linear.forward, "__code__", foreign.__code__)


def patch_default() -> Callable[[], None]:
    from transformers.cache_utils import DynamicCache

    function = DynamicCache.__init__
    return replace(function, "__defaults__", (*(function.__defaults__ or ())[:-1], "another"))


def patch_property() -> Callable[[], None]:
    from transformers import PreTrainedModel

    return replace(PreTrainedModel, "base_model", property(foreign))


def add_method() -> Callable[[], None]:
    import trl

    trainer: Any = trl.GRPOTrainer
    trainer.extra_step = foreign
    return lambda: delattr(trainer, "extra_step")


def delete_method() -> Callable[[], None]:
    from peft import PeftModel

    before = PeftModel.disable_adapter
    del PeftModel.disable_adapter
    return lambda: setattr(PeftModel, "disable_adapter", before)


def do_nothing() -> Callable[[], None]:
    return lambda: None


PATCHES = {
    do_nothing: [],
    patch_method: ["replaced: transformers.models.llama.modeling_llama.LlamaAttention.forward"],
    patch_class_of_a_module: ["replaced: transformers.models.llama.modeling_llama.LlamaRMSNorm"],
    patch_code: ["replaced: peft.tuners.lora.layer.Linear.forward"],
    patch_default: ["replaced: transformers.cache_utils.DynamicCache.__init__"],
    patch_property: ["replaced: transformers.modeling_utils.PreTrainedModel.base_model"],
    add_method: ["added: trl.trainer.grpo_trainer.GRPOTrainer.extra_step"],
    delete_method: ["deleted: peft.peft_model.PeftModel.disable_adapter"],
}


# --- the script and the tests -----------------------------------------------------------------------------------------


def main() -> None:
    """Print, as JSON, what the toolkit changed and what each planted patch is seen as."""
    for name in PRELOADED:
        importlib.import_module(name)
    before = snapshot()
    imported = import_everything()
    with tempfile.TemporaryDirectory() as folder:
        use_everything(Path(folder))
    report: dict[str, Any] = {
        "compared": len(before),
        "imported": imported,
        "changed": differences(before),
        "planted": {},
    }
    for patch in PATCHES:
        clean = snapshot()
        undo = patch()
        report["planted"][patch.__name__] = differences(clean)
        undo()
    print(json.dumps(report))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, cwd=ROOT, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_libraries_are_as_they_were(report: dict[str, Any]) -> None:
    assert report["compared"] > 10_000, "the snapshot is too small to mean anything"
    assert "tandem.rl.model" in report["imported"]
    assert report["changed"] == []


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_planted_patch_is_seen(report: dict[str, Any], patch: Callable[[], Callable[[], None]]) -> None:
    seen = report["planted"][patch.__name__]
    assert set(PATCHES[patch]) <= set(seen)
    if not PATCHES[patch]:
        assert seen == []


if __name__ == "__main__":
    main()
