"""How much of vLLM's start a run makes up for: none, CUDA graphs of vLLM's own kernels, or compiling before these."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.rl.config import RolloutConfig
from tandem.rl.plan import Ledger, changed
from tandem.rl.plan_engine import BLOCK, IN_FLIGHT, sizes_for_prompts
from tandem.rl.plan_time import GRAPHS, VLLM_EAGER, Work, seconds_text

# Seconds that vLLM takes longer to start where it captures graphs, and where it compiles before that for the first
# time: 17 s for SmolLM2, 30 to 35 for Qwen3-8B's shape, on an H200's host with other starts beside
# (benchmarks/results/rollout-h200-*uncompiled-2026-11-30-*.json).
CAPTURING, COMPILING, COMPILING_WEIGHT = 15.0, 17.0, 2e-9
# The share of decoding that compiling spares beside graphs: on Qwen3-8B's shape 1.4%, 4.3% and -1.4% for 8, 32 and 64
# sequences (benchmarks/results/rollout-h200-own-kernels-2026-11-30-1519.json).
COMPILED = 0.014
# Graphs of steps that compute prompts take memory: they are to spare a rollout this share of its decoding at least.
WORTH = 0.05


@dataclass(frozen=True)
class Start:
    """What a start spares all rollouts that follow.

    Attributes:
        graphs: seconds of decoding by graphs. compiled: by compiling, beside graphs. compiling: seconds that it takes.
        step: tokens of a rollout's first step, and its seconds on the host where no graph is replayed.
        sizes: batch sizes that let it replay one, which compiled code alone can; None: the usual ones do, or it is not
            worth it.
    """

    graphs: float
    compiled: float
    compiling: float
    step: tuple[int, float]
    sizes: list[int] | None

    @classmethod
    def of(cls, plan: Ledger, *, evaluated: int = 0, completions: int | None = None) -> Start | None:
        """None where the engine is another one, or is to round as stock vLLM, which compiles.

        Args:
            evaluated: completions of a held-out evaluation.
            completions: all that are sampled; None: those of the config's whole run, and where its length is not known,
                those of a long one.
        """
        if not plan.setup.vllm or plan.config.rollout.numerics == "stock":
            return None
        plan = plan.again(changed(plan.config, {"rollout": {"enforce_eager": False}}))
        work, layers = plan.work, plan.shape.layers
        at_once = plan.config.rollout.max_in_flight or IN_FLIGHT
        waves = _waves(plan, evaluated, at_once) if completions is None else math.ceil(completions / at_once)
        decoding = plan.seconds["rollout: completions"] * min(work.in_flight / work.sequences, 1.0)
        tokens, seconds = first_step(work), layers * VLLM_EAGER
        sizes = sizes_for_prompts(at_once, tokens) if seconds >= WORTH * decoding else None
        return cls(
            graphs=waves * work.completion * layers * (VLLM_EAGER - GRAPHS),
            compiled=waves * (COMPILED * decoding + (seconds if sizes else 0.0)),
            compiling=COMPILING + COMPILING_WEIGHT * plan.shape.linear_elements,
            step=(tokens, seconds),
            sizes=sizes,
        )

    def left_out(self, rollout: RolloutConfig) -> dict[str, bool]:
        """What of a start is not worth its time, as far as `rollout` leaves it open."""
        if rollout.enforce_eager:
            return {}
        wanted = rollout.enforce_eager is False or rollout.torch_compile or rollout.cudagraph_sizes
        if not wanted and self.graphs < CAPTURING:
            return {"enforce_eager": True}
        return {"torch_compile": False} if rollout.torch_compile is None and self.compiled < self.compiling else {}

    def captured(self, rollout: RolloutConfig) -> dict[str, list[int]]:
        """Batch sizes to capture beside the usual ones, if there is memory for them."""
        if self.sizes is None or rollout.enforce_eager or rollout.torch_compile is False or rollout.cudagraph_sizes:
            return {}
        return {"cudagraph_sizes": self.sizes}

    def reason(self, key: str) -> str:
        """Why a key was chosen."""
        if key == "cudagraph_sizes":
            tokens, seconds = self.step
            return (
                f"the first step of a rollout has up to {tokens:,} tokens, for which the host takes "
                f"{seconds_text(seconds)} s without a graph"
            )
        what, takes, saved = "compiling", self.compiling, self.compiled
        if key == "enforce_eager":
            what, takes, saved = "capturing graphs", CAPTURING, self.graphs
        return f"{what} takes about {takes:.0f} s, and would spare {seconds_text(saved)} s of rollouts"


def _waves(plan: Ledger, evaluated: int, at_once: int) -> float:
    """How often a run's completions are begun together."""
    steps, every, work = plan.config.train.max_steps, plan.config.eval.eval_steps, plan.work
    if steps is None:
        return math.inf
    learned = steps / work.updates * math.ceil(work.sequences / max(work.in_flight, 1))
    evaluations = 2 + (steps / every if every else 0)
    return learned + evaluations * math.ceil(evaluated / at_once)


def first_step(work: Work) -> int:
    """Tokens that a rollout's first step computes: prompts once, and of every further completion of a group what does
    not fill a block of the cache."""
    group = -(-work.sequences // max(work.prompts, 1))
    prompts = -(-work.in_flight // group)
    return prompts * work.prompt + (work.in_flight - prompts) * min(BLOCK, work.prompt)
