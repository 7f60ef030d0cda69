"""Decode speed, memory, phases and agreement of rollouts: stock vLLM with bitsandbytes, and ours in each weight format.

    python benchmarks/rollout.py /tmp/qwen3-8b --shape qwen3-8b                 # a random checkpoint is made if need be
    python benchmarks/rollout.py /tmp/qwen3-8b-8 --shape qwen3-8b --layers 8 --systems vllm-bnb tandem-nf4

Every system runs in a process of its own: the same checkpoint, CUDA graphs for exactly the batch sizes measured, an
adapter of rank 32 on all seven projections, and log-probs of the sampled tokens. `decode`: prompts of 64 random tokens
and 128 new ones; `tokens_per_s` is the whole call, `decode_tokens_per_s` what is left after the time of a call for one
token. `start`: seconds until the engine answers. `ledger`: bytes by kind. `phases`: medians over `--cycles` cycles of
sleep, wake, push and generate, and how far the device's memory drifted. `parity`: |difference of log-probs| of the
engine and the trainer, whose packs go through the fused layers; and beside that, of stock vLLM and transformers, on the
same weights and, where all start together, on the same adapter after an update.
`agreement`: share of prompts whose 64 greedy tokens are those of the stock engine on the same weights, for 64 prompts
(the fused 4-bit product) and for 96 (the weight unpacked for cuBLAS). A checkpoint with a tokenizer is asked questions,
others get random tokens.
`-uncompiled` captures CUDA graphs of vLLM's own kernels, without torch.compile (rollout.torch_compile=false);
`-unseeded` samples from one random stream (rollout.seed_per_completion=false); `-stock` rounds as stock vLLM
(rollout.numerics=stock).
With `--together` all systems start at once, which takes the time of one, and then measure in turn while the others
wait; what is in use on the device is then everybody's, and is not reported.
Writes `benchmarks/results/rollout-DEVICE-DATE.json`, anew after every system.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from asked import PROMPT, prompts, questions
from random_checkpoint import SHAPES, build
from turns import Turn
from update import GIB, RESULTS, TARGETS, command_line, device_facts, header, result_path, store

FORMATS = ("nf4", "int4", "fp8", "bf16")
SYSTEMS = (
    "vllm-bnb",
    "vllm-bf16",
    *(f"tandem-{one}{how}" for how in ("", "-uncompiled", "-unseeded") for one in FORMATS),
    "tandem-nf4-stock",
    "tandem-bf16-stock",
)
RANK, NEW, GREEDY = 32, 128, 64
AGREEMENT_BATCHES = (64, 96)
# The engine whose weights are the same, bit for bit.
TWINS = {
    "tandem-nf4": "vllm-bnb",
    "tandem-nf4-stock": "vllm-bnb",
    "tandem-bf16": "vllm-bf16",
    "tandem-bf16-stock": "vllm-bf16",
}
COLUMNS = (
    "kind",
    "batch",
    "seconds",
    "tokens_per_s",
    "decode_tokens_per_s",
    "what",
    "gib",
    "sleep_ms",
    "wake_ms",
    "push_ms",
    "drift_mib",
    "median",
    "p99",
    "largest",
    "share",
    "same_tokens",
    "error",
)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if arguments.worker == "device":
        print("FACTS " + json.dumps(device_facts()))
    elif arguments.worker == "checkpoint":
        make_checkpoint(arguments)
    elif arguments.worker:
        work(arguments.worker, arguments)
    else:
        compare(arguments, argv)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a bfloat16 checkpoint")
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), help="make a random checkpoint of this shape if there is none"
    )
    parser.add_argument("--layers", type=int, help="with --shape: so many layers only")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=[s for s in SYSTEMS if s != "vllm-bf16"])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="what is computed in")
    parser.add_argument("--asked", type=int, default=64, help="prompts whose log-probs are compared")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--kv-gib", type=float, default=8.0)
    parser.add_argument("--eager", action="store_true", help="no compilation and no graphs: tries the benchmark out")
    parser.add_argument("--timeout", type=float, default=420.0, help="seconds for one system")
    parser.add_argument("--together", action="store_true", help="start all systems at once, measure in turn")
    parser.add_argument("--gate", type=Path, help="with --together: measure once this file exists")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results)")
    parser.add_argument("--worker", choices=(*SYSTEMS, "device", "checkpoint"), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def compare(arguments: argparse.Namespace, argv: list[str]) -> None:
    found, error = run("device", argv, 120)
    if "FACTS" not in found:
        raise SystemExit(f"no CUDA device to measure on:\n{error}")
    result = header("rollout.py", "rollout", argv, found["FACTS"][0]) | {"commands": [], "rows": []}
    if not (arguments.model / "config.json").is_file():
        _, error = run("checkpoint", argv, arguments.timeout)
        if error:
            raise SystemExit(f"no checkpoint in {arguments.model}:\n{error}")
    target = result_path(arguments.out or RESULTS, result)
    with tempfile.TemporaryDirectory() as folder:

        def started(system: str) -> Worker:
            return Worker(system, [*argv, "--tokens", str(Path(folder) / f"{system}.json")])

        ahead = {system: started(system) for system in arguments.systems} if arguments.together else {}
        for worker in ahead.values():
            worker.wait_until(worker.turn.ready, arguments.timeout)
        if ahead:
            print("all are ready", flush=True)
        while arguments.gate and ahead and not arguments.gate.exists():
            time.sleep(0.2)
        for system in arguments.systems:
            tokens = Path(folder) / f"{system}.json"
            found, error = (ahead.get(system) or started(system)).result(arguments.timeout)
            rows = found.get("ROW", [])
            stock = Path(folder) / f"{TWINS.get(system)}.json"
            if stock.is_file() and tokens.is_file():
                rows += agreements(system, arguments, stock, tokens)
            if error:
                rows.append(row(system, arguments, error=error))
            for one in rows:
                print(json.dumps({k: v for k, v in one.items() if v is not None}), flush=True)
            result["commands"].append(command_line("rollout.py", [*argv, "--worker", system]))
            result["rows"] += rows
            store(target, result)
    print(target)


class Worker:
    """A system's process, which measures once `result` is asked for."""

    def __init__(self, name: str, argv: list[str]) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        self._root = Path(self._folder.name)
        self.turn = Turn(self._root)
        command = [sys.executable, __file__, *argv, "--worker", name, "--turn", str(self._root)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        with (self._root / "out").open("w") as stdout, (self._root / "err").open("w") as stderr:
            self._process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)

    def wait_until(self, file: Path, timeout: float) -> None:
        """Until `file` is there, the process has ended, or the time is over."""
        end = time.monotonic() + timeout
        while not file.exists() and self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)

    def result(self, timeout: float) -> tuple[dict[str, list[Any]], str | None]:
        """What the process printed, by the first word of the line, and what went wrong with it."""
        self.turn.give()
        try:
            code: int | None = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            code = None
        found: dict[str, list[Any]] = {}
        for line in (self._root / "out").read_text(encoding="utf-8", errors="replace").splitlines():
            kind, _, rest = line.partition(" ")
            if kind in ("ROW", "FACTS"):
                found.setdefault(kind, []).append(json.loads(rest))
        said = (self._root / "err").read_text(encoding="utf-8", errors="replace").strip()[-1500:]
        self._folder.cleanup()
        if code is None:
            return found, f"stopped after {timeout:.0f} s: {said}"
        return found, None if code == 0 else said or f"{self.name} ended with code {code}"


def run(worker: str, argv: list[str], timeout: float) -> tuple[dict[str, list[Any]], str | None]:
    return Worker(worker, argv).result(timeout)


def agreements(system: str, arguments: argparse.Namespace, stock: Path, own: Path) -> list[dict[str, Any]]:
    """Share of prompts with the same greedy tokens, for each number of prompts."""
    expected, found = json.loads(stock.read_text())["greedy"], json.loads(own.read_text())["greedy"]
    rows = []
    for batch, answers in found.items():
        pairs = list(zip(expected[batch], answers, strict=True))
        equal = sum(a == b for a, b in pairs) / len(answers)
        first = [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) for a, b in pairs]
        shared = statistics.fmean(first)
        rows.append(row(system, arguments, kind="agreement", batch=int(batch), share=equal, same_tokens=shared))
    return rows


def row(system: str, arguments: argparse.Namespace, **values: Any) -> dict[str, Any]:
    known = {"system": system, "model": arguments.model.name, "layers": arguments.layers}
    sizes = {"prompt_tokens": PROMPT, "new_tokens": NEW, "cycles": arguments.cycles, "kv_gib": arguments.kv_gib}
    return known | sizes | dict.fromkeys(COLUMNS) | values


def say(system: str, arguments: argparse.Namespace, **values: Any) -> None:
    print("\nROW " + json.dumps(row(system, arguments, **values)), flush=True)


def make_checkpoint(arguments: argparse.Namespace) -> None:
    """A random bfloat16 checkpoint; the tokens do not need a tokenizer."""
    import torch

    if not arguments.shape:
        raise SystemExit("there is no config.json, and no --shape to make one of")
    torch.manual_seed(0)
    build(arguments.shape, arguments.layers, context=32768).save_pretrained(arguments.model, max_shard_size="4GB")


class Stock:
    """vLLM as it is, with the sizes, switches and the (empty) adapter of ours."""

    def __init__(self, arguments: argparse.Namespace, quantization: str | None) -> None:
        import torch

        from tandem.rollout.vllm_engine import ENVIRONMENT, engine_arguments, load_api

        os.environ.update(ENVIRONMENT)
        self.api = load_api()
        cache = int(arguments.kv_gib * GIB)
        device = torch.device("cuda")
        dtype = getattr(torch, arguments.dtype)
        given = engine_arguments(options(arguments, ["stock"]), 1024, cache, RANK, TARGETS, dtype, device)
        self.llm = self.api.LLM(str(arguments.model), **given, quantization=quantization, worker_cls=self.api.worker)
        self.llm.collective_rpc("policy_stacks", args=(8,))
        self.request = self.api.LoRARequest("policy@0", 1, "/unused")

    def load_adapter(self, folder: Path) -> None:
        self.request = self.api.LoRARequest("policy@1", 1, str(folder), load_inplace=True)
        self.llm.llm_engine.add_lora(self.request)

    def generate(self, prompts: list[Any], sampling: Any) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self._outputs(prompts, sampling)]

    def greedy(self, arguments: argparse.Namespace, batch: int) -> list[list[int]]:
        return self.generate(questions(arguments.model, batch, seed=2), sampling(GREEDY, temperature=0.0))

    def scored(self, prompts: list[Any], sampling: Any) -> list[tuple[list[int], list[int], list[float]]]:
        """Prompt, completion and its log-probs."""
        found = []
        for prompt, output in zip(prompts, self._outputs(prompts, sampling), strict=True):
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            found.append((prompt.ids, ids, [completion.logprobs[i][t].logprob for i, t in enumerate(ids)]))
        return found

    def _outputs(self, prompts: list[Any], sampling: Any) -> list[Any]:
        params = self.api.SamplingParams(
            seed=sampling.seed,
            temperature=sampling.temperature,
            max_tokens=sampling.max_completion_length,
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )
        asked = [{"prompt_token_ids": prompt.ids} for prompt in prompts]
        return self.llm.generate(asked, params, use_tqdm=False, lora_request=self.request)


class Ours:
    """The engine on a store, with the trainer's model beside it."""

    def __init__(self, arguments: argparse.Namespace, format: str, how: list[str]) -> None:
        from types import SimpleNamespace

        import torch

        from tandem.kernels.linear_logprob import HeadOptions
        from tandem.rl.config import LoraConfig
        from tandem.rl.fused_layer import FusedLayers, LayerPlan
        from tandem.rl.lora import attach_lora
        from tandem.rl.model import LanguageModel
        from tandem.rl.store import WeightStore
        from tandem.rollout.vllm_engine import VllmEngine

        dtype = getattr(torch, arguments.dtype)
        self.store = WeightStore.open(arguments.model, format=format, device="cuda", dtype=dtype)
        self.used_by_store = used()
        tokenizer = SimpleNamespace(pad_token_id=0)
        model, device = self.store.causal_lm(), torch.device("cuda")
        self.lm = LanguageModel(model, tokenizer, device, dtype, HeadOptions(), 1024)
        attach_lora(self.lm, LoraConfig(r=RANK, target_modules=TARGETS), seed=0)
        FusedLayers(LayerPlan(split_adapters=True), offload=False).attach(self.lm)
        if arguments.tokens:
            move(self.lm, 0.01)
            self.lm.model.save_pretrained(f"{arguments.tokens.with_suffix('')}-adapter", save_embedding_layers=False)
            move(self.lm, 0.0)
        self.used_by_trainer = used()
        self.engine = VllmEngine(self.lm, self.store, options(arguments, how))

    def generate(self, prompts: list[Any], sampling: Any) -> list[list[int]]:
        return [group.completions[0].ids for group in self.engine.generate(prompts, sampling)]

    def greedy(self, arguments: argparse.Namespace, batch: int) -> list[list[int]]:
        return self.generate(questions(arguments.model, batch, seed=2), sampling(GREEDY, temperature=0.0))


def options(arguments: argparse.Namespace, how: list[str]) -> Any:
    from tandem.rollout.vllm_plan import VllmOptions

    return VllmOptions(
        max_model_len=1024,
        max_num_seqs=max(arguments.batches),
        kv_cache_gib=arguments.kv_gib,
        enforce_eager=arguments.eager,
        torch_compile="uncompiled" not in how,
        seed_per_completion="unseeded" not in how,
        stock_numerics="stock" in how,
        cudagraph_sizes=tuple(sorted(arguments.batches)),
    )


def work(system: str, arguments: argparse.Namespace) -> None:
    import torch

    started = time.perf_counter()
    torch.cuda.init()
    family, format, *how = system.split("-")
    quantization = "bitsandbytes" if format == "bnb" else None
    made: Any = Stock(arguments, quantization) if family == "vllm" else Ours(arguments, format, how)
    made.generate(prompts(2, seed=1), sampling(4))
    say(system, arguments, kind="start", seconds=round(time.perf_counter() - started, 1))
    Turn(arguments.turn).wait()
    if not arguments.together:
        say(system, arguments, kind="ledger", what="device, all", gib=used() / GIB)
    for batch in arguments.batches:
        say(system, arguments, kind="decode", batch=batch, **decode(made, batch))
    if isinstance(made, Stock):
        if arguments.tokens:
            greedy = {str(batch): made.greedy(arguments, batch) for batch in AGREEMENT_BATCHES}
            asked = questions(arguments.model, arguments.asked, seed=5)
            found = {"greedy": greedy, "first step": made.scored(asked, sampling(GREEDY))}
            if adapters := sorted(arguments.tokens.parent.glob("*-adapter")):
                made.load_adapter(adapters[0])
                found["after an update"] = made.scored(asked, sampling(GREEDY))
            arguments.tokens.write_text(json.dumps(found))
        return
    if arguments.tokens:
        greedy = {str(batch): made.greedy(arguments, batch) for batch in AGREEMENT_BATCHES}
        arguments.tokens.write_text(json.dumps({"greedy": greedy}))
    if not arguments.together:
        ledger(system, arguments, made)
    parities(system, arguments, made, "first step")
    move(made.lm, 0.01)
    made.engine.load_adapter(1)
    parities(system, arguments, made, "after an update")
    say(system, arguments, kind="phases", **phases(made, arguments.cycles))
    parities(system, arguments, made, "after the cycles")


def sampling(tokens: int, temperature: float = 1.0) -> Any:
    from tandem.rl.samples import Sampling

    return Sampling(max_completion_length=tokens, temperature=temperature)


def decode(made: Any, batch: int) -> dict[str, Any]:
    """The better of two calls. Prompts are new ones every time, or the prefix cache would answer."""
    import torch

    def seconds(tokens: int, seed: int) -> float:
        asked = prompts(batch, seed=seed)
        torch.cuda.synchronize()
        started = time.perf_counter()
        answers = made.generate(asked, sampling(tokens))
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
        assert all(len(answer) == tokens for answer in answers)
        return elapsed

    first = min(seconds(1, 1000 * batch + i) for i in (1, 2))
    whole = min(seconds(NEW, 1000 * batch + i) for i in (3, 4))
    return {
        "seconds": round(whole, 4),
        "tokens_per_s": round(batch * NEW / whole, 1),
        "decode_tokens_per_s": round(batch * (NEW - 1) / (whole - first), 1),
    }


def ledger(system: str, arguments: argparse.Namespace, made: Ours) -> None:
    sizes = {f"store: {kind}": size for kind, size in made.store.ledger().items()}
    masters = sum(p.nbytes for p in made.lm.model.parameters() if p.requires_grad)
    stacks = made.engine._llm.collective_rpc("policy_stacks", args=(8,))[0]
    buffers = sum(t.nbytes for stack in stacks.values() for t in (*stack.a, *stack.b))
    awake = used()
    made.engine.sleep()
    asleep = used()
    made.engine.wake()
    sizes |= {
        "adapter: float32 masters": masters,
        "adapter: engine's buffers": buffers,
        "context and libraries": made.used_by_store - sum(v for k, v in made.store.ledger().items() if "host" not in k),
        "engine beside weights, adapter and KV cache": asleep - made.used_by_trainer - buffers,
        "KV cache": awake - asleep,
        "device, asleep": asleep,
    }
    for what, size in sizes.items():
        say(system, arguments, kind="ledger", what=what, gib=size / GIB)


def parities(system: str, arguments: argparse.Namespace, made: Ours, what: str) -> None:
    """The engine against the trainer, and against transformers on the trainer's model; and what stock vLLM has sampled
    with this adapter, against transformers on the same."""
    from tandem.rl.samples import Sampling

    def compare(name: str, rows: list[Any], scored: list[Any]) -> None:
        say(system, arguments, kind="parity", what=name, **spread([r[2] for r in rows], scored))

    groups = made.engine.generate(
        questions(arguments.model, arguments.asked, seed=5), Sampling(max_completion_length=GREEDY, seed=3)
    )
    rows = [(g.prompt.ids, g.completions[0].ids, g.completions[0].log_probs) for g in groups]
    compare(what, rows, trainer_log_probs(made.lm, rows))
    stock = arguments.tokens.parent / f"{TWINS.get(system)}.json" if arguments.tokens else None
    theirs = json.loads(stock.read_text()).get(what) if stock is not None and stock.is_file() else None
    if theirs:
        scored = transformers_log_probs(made.lm.model, rows)
        compare(f"{what}: engine against transformers", rows, scored)
        beside = transformers_log_probs(made.lm.model, theirs)
        compare(f"{what}: {TWINS[system]} against transformers, same weights", theirs, beside)
        alone = transformers_log_probs(made.lm.model, rows, one_by_one=True)
        once = [(*row[:2], one.tolist()) for row, one in zip(rows, alone, strict=True)]
        compare(f"{what}: transformers, batched against one by one", once, scored)


def trainer_log_probs(lm: Any, rows: list[Any]) -> list[Any]:
    """As the trainer scores rollouts: packed, through the fused layers, with float32 logits."""
    from tandem.rl.model import with_sampling
    from tandem.rl.packing import pack
    from tandem.rl.samples import Sequence
    from tandem.rl.step import sequence_log_probs

    sequences = [Sequence(prompt, ids, [True] * len(ids)) for prompt, ids, _ in rows]
    head = with_sampling(lm.head, temperature=1.0, top_k=0, top_p=1.0, chunk_size=1024)
    return sequence_log_probs(lm, pack(sequences, 4096, share_prefix=False), len(sequences), head)[0]


def transformers_log_probs(model: Any, rows: list[Any], *, one_by_one: bool = False) -> list[Any]:
    """Log-probs of the completions: each on its own, or those of one length in batches of 16, where sums are ordered
    differently and nothing else is."""
    import torch

    found: dict[int, Any] = {}
    lengths: dict[tuple[int, int], list[int]] = {}
    for number, (prompt, completion, _) in enumerate(rows):
        lengths.setdefault((len(prompt), number if one_by_one else len(completion)), []).append(number)
    batches = [(key[0], many[i : i + 16]) for key, many in lengths.items() for i in range(0, len(many), 16)]
    with torch.no_grad():
        for start, numbers in batches:
            ids = torch.tensor([[*rows[n][0], *rows[n][1]] for n in numbers]).cuda()
            logits = model(input_ids=ids).logits[:, start - 1 : -1].float()
            chosen = logits.log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0].cpu()
            found |= dict(zip(numbers, chosen, strict=True))
    return [found[number] for number in range(len(rows))]


def spread(engine: list[list[float]], trainer: list[Any]) -> dict[str, float]:
    from tandem.rl.parity import difference

    found = difference(engine, trainer)
    return {"median": found.median, "p99": found.p99, "largest": found.largest}


def phases(made: Ours, cycles: int) -> dict[str, Any]:
    import torch

    times: dict[str, list[float]] = {"sleep_ms": [], "wake_ms": [], "push_ms": []}
    history = []
    for cycle in range(cycles):
        for name, call in (
            ("sleep_ms", made.engine.sleep),
            ("wake_ms", made.engine.wake),
            ("push_ms", lambda cycle=cycle: made.engine.load_adapter(10 + cycle)),
        ):
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - started) * 1e3)
        made.generate(prompts(8, seed=cycle), sampling(8))
        history.append(used())
    drift = (history[-1] - history[min(1, len(history) - 1)]) / (1 << 20)
    return {name: round(statistics.median(values), 2) for name, values in times.items()} | {"drift_mib": drift}


def move(lm: Any, size: float) -> None:
    """An update that shows: random B."""
    import torch

    generator = torch.Generator(device="cuda").manual_seed(1)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cuda") * size)


def used() -> int:
    """Bytes of the device in use, once PyTorch has given back what it does not need."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


if __name__ == "__main__":
    main()
