"""How much of vLLM's start a run makes up for: none, CUDA graphs of vLLM's own kernels, or compiling before these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tandem.rl.plan import Ledger, changed
from tandem.rl.plan_engine import BLOCK, sizes_for_prompts
from tandem.rl.plan_time import GRAPHS, VLLM_EAGER, Work, seconds_text

# Seconds that vLLM takes longer to start where it captures graphs, and where it compiles before that for the first time
# (an H200's host), and the share of decoding that compiling spares beside graphs (Qwen3-8B's shape, 8 to 64 sequences).
CAPTURING, COMPILING = 15.0, 35.0
COMPILED = 0.02
# Graphs of steps that compute prompts take memory: they are to spare a rollout this share of its decoding at least.
WORTH = 0.05


@dataclass(frozen=True)
class Start:
    """What a start spares a whole run.

    Attributes:
        graphs: seconds of decoding by graphs. compiled: by compiling, beside graphs.
        step: tokens of a rollout's first step, and its seconds on the host where no graph is replayed.
        sizes: batch sizes that let it replay one, which compiled code alone can; None: the usual ones.
    """

    graphs: float
    compiled: float
    step: tuple[int, float]
    sizes: list[int] | None

    @classmethod
    def of(cls, plan: Ledger, evaluated: int) -> Start | None:
        """None where the engine is another one, or is to round as stock vLLM, which compiles. A run whose length is not
        known is taken for a long one.

        Args:
            evaluated: completions of a held-out evaluation.
        """
        if not plan.setup.vllm or plan.config.rollout.numerics == "stock":
            return None
        steps, every = plan.config.train.max_steps, plan.config.eval.eval_steps
        plan = plan.again(changed(plan.config, {"rollout": {"enforce_eager": False}}))
        work, layers = plan.work, plan.shape.layers
        rollouts = math.inf if steps is None else steps / work.updates
        if evaluated and steps is not None:
            rollouts += 2 + (steps / every if every else 0)
        waves = -(-work.sequences // max(work.in_flight, 1))
        decoding = plan.seconds["rollout: completions"]
        tokens, seconds = first_step(work), layers * VLLM_EAGER
        sizes = sizes_for_prompts(work.in_flight, tokens)
        if waves * seconds < WORTH * decoding:
            sizes = None
        return cls(
            graphs=rollouts * waves * work.completion * layers * (VLLM_EAGER - GRAPHS),
            compiled=rollouts * (COMPILED * decoding + (waves * seconds if sizes else 0.0)),
            step=(tokens, seconds),
            sizes=sizes,
        )

    def choice(self, eager: bool | None, compiled: bool | None) -> dict[str, Any]:
        """What is left out, or captured; `eager` and `compiled`: as the config says."""
        if eager or (eager is None and self.graphs < CAPTURING):
            return {} if eager else {"enforce_eager": True}
        if compiled is False or (compiled is None and self.compiled < COMPILING):
            return {} if compiled is False else {"torch_compile": False}
        return {"cudagraph_sizes": self.sizes} if self.sizes else {}

    def reason(self, key: str) -> str:
        """Why `choice` has chosen this."""
        if key == "cudagraph_sizes":
            tokens, seconds = self.step
            return (
                f"the first step of a rollout has up to {tokens:,} tokens, for which the host takes "
                f"{seconds_text(seconds)} s without a graph"
            )
        what, takes, saved = "compiling", COMPILING, self.compiled
        if key == "enforce_eager":
            what, takes, saved = "capturing graphs", CAPTURING, self.graphs
        return f"{what} takes about {takes:.0f} s, and would spare this run {seconds_text(saved)} s of rollouts"


def first_step(work: Work) -> int:
    """Tokens that a rollout's first step computes: prompts once, and of every further completion of a group what does
    not fill a block of the cache."""
    group = -(-work.sequences // max(work.prompts, 1))
    prompts = -(-work.in_flight // group)
    return prompts * work.prompt + (work.in_flight - prompts) * min(BLOCK, work.prompt)
