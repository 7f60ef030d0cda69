"""Whether engine and trainer compute the same policy: their log-probs of the same tokens side by side.

A sound pair differs by rounding. A broken one (an adapter that did not arrive, another temperature, shifted tokens)
trains on samples of a policy that the trainer takes for its own; the loss shows nothing of it, these numbers do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from tandem.kernels.linear_logprob import HeadOptions
from tandem.rl.config import AlgorithmConfig, Config, ParityConfig
from tandem.rl.errors import UserError
from tandem.rl.model import LanguageModel, with_sampling
from tandem.rl.packing import Pack, pack
from tandem.rl.policy_loss import LossValue, PolicyTokens
from tandem.rl.samples import Sequence as TokenSequence
from tandem.rl.step import Objective, PolicyBatch, log_probs_of_heads, sequence_log_probs

_WEIGHTS = "other weights, or a stale adapter: an update that did not reach the engine, a prefix cache from before it"
_SAMPLING = "another temperature, top-p or top-k, or log-probs taken before them"
_PLACES = "log-probs of other tokens: moved by one place, or of another part of the text"
# The likeliest first, unless one of the first three was found by trying it out (`explanation`).
_CAUSES = (
    _WEIGHTS,
    _SAMPLING,
    _PLACES,
    "another chat template or other token ids, so that the two do not read the same text",
    "precision: an fp8 KV cache, 4-bit kernels, bfloat16 beside float32 (model.dtype=float16 rounds finer)",
    "a defect of ours: please report it with these numbers",
)
# Temperatures that a mistaken engine may have used, beside no change at all.
_TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5)
_EXPLAINED_BY_TOKENS = 2048
_CHECKED_TOKENS = 4096


class LogProbDifference(NamedTuple):
    """Δ = trainer − engine over all sampled tokens: statistics of |Δ| in nats, and what e^Δ leaves of the sample.

    The effective sample size (Σw)²/Σw² of the importance ratios w is given as a share of the sample: 1 where all are
    equal. By sequence, w = e^ΣΔ; it falls with the length of completions, also where every token is sound.
    """

    mean: float
    median: float
    p99: float
    largest: float
    token_ess: float
    sequence_ess: float
    tokens: int
    sequences: int

    def within(self, *, median: float = 0.01, p99: float = 0.1) -> bool:
        """Whether both computed the same model: the limits are bfloat16's noise on trained weights."""
        return self.median <= median and self.p99 <= p99

    def metrics(self) -> dict[str, float]:
        return {
            "parity/logp_difference/mean": self.mean,
            "parity/logp_difference/median": self.median,
            "parity/logp_difference/p99": self.p99,
            "parity/logp_difference/max": self.largest,
            "parity/effective_sample_size/token": self.token_ess,
            "parity/effective_sample_size/sequence": self.sequence_ess,
        }

    def __str__(self) -> str:
        return (
            f"|Δ log-prob| mean {self.mean:.2g}, median {self.median:.2g}, p99 {self.p99:.2g}, max {self.largest:.2g}; "
            f"effective sample size {self.token_ess:.1%} of {self.tokens} tokens, "
            f"{self.sequence_ess:.1%} of {self.sequences} sequences"
        )


def difference(engine: Sequence[Sequence[float]], trainer: Sequence[torch.Tensor]) -> LogProbDifference:
    """Compare what an engine reported with the trainer's log-probs of the same tokens.

    Args:
        engine: a list per completion. trainer: one `[length]` tensor per completion; empty ones count nowhere.

    Raises:
        ValueError: their numbers or lengths differ, there is no token, or a number is not finite.
    """
    if len(engine) != len(trainer):
        raise ValueError(f"{len(engine)} completions and {len(trainer)} rows of trainer log-probs")
    for number, (theirs, own) in enumerate(zip(engine, trainer, strict=True)):
        if len(theirs) != own.numel():
            raise ValueError(
                f"completion {number}: {len(theirs)} log-probs from the engine, {own.numel()} from the trainer"
            )
    delta = _flat(trainer) - torch.tensor([value for row in engine for value in row], dtype=torch.float64)
    if not delta.numel() or not delta.isfinite().all():
        raise ValueError(f"{delta.numel()} differences, of which {(~delta.isfinite()).sum()} are not finite")
    lengths = torch.tensor([len(row) for row in engine if len(row)])
    numbers = torch.arange(len(lengths)).repeat_interleave(lengths)
    by_sequence = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, numbers, delta)
    ordered = delta.abs().sort().values  # torch.quantile refuses more than 2²⁴ values

    def quantile(share: float) -> float:
        return float(ordered[min(int(share * len(ordered)), len(ordered) - 1)])

    return LogProbDifference(
        mean=float(ordered.mean()),
        median=quantile(0.5),
        p99=quantile(0.99),
        largest=float(ordered[-1]),
        token_ess=effective_share(delta),
        sequence_ess=effective_share(by_sequence),
        tokens=len(ordered),
        sequences=len(lengths),
    )


def effective_share(log_ratios: torch.Tensor) -> float:
    """(Σw)²/(n·Σw²) of w = exp(`log_ratios` `[n]`), taken in logarithms so that no ratio overflows."""
    log_share = 2 * log_ratios.logsumexp(0) - (2 * log_ratios).logsumexp(0) - math.log(len(log_ratios))
    return min(float(log_share.exp()), 1.0)


@dataclass(frozen=True)
class Limits:
    """What a sound pair stays within.

    Attributes:
        mean, p99: of |Δ|, in nats. token_ess, sequence_ess: shares.
        slack: how many times mean and p99 may be beyond where only rounding is left to explain it: a policy that has
            moved fast, or completions of a few tokens behind one prompt, make much of a last place.
    """

    mean: float
    p99: float
    token_ess: float
    sequence_ess: float = 0.0
    slack: float = 1.0

    @classmethod
    def of(cls, config: ParityConfig, dtype: torch.dtype, *, fp8_cache: bool) -> Limits:
        """The configured limits; where there is none, those of the type that the model computes in. With one of one's
        own there is no slack."""
        usual = cls(0.15, 1.5, 0.5, slack=2) if fp8_cache else _BY_TYPE.get(dtype, _BY_TYPE[torch.bfloat16])
        own = (config.max_mean, config.max_p99) != (None, None)
        return cls(
            mean=usual.mean if config.max_mean is None else config.max_mean,
            p99=usual.p99 if config.max_p99 is None else config.max_p99,
            token_ess=usual.token_ess if config.min_token_ess is None else config.min_token_ess,
            sequence_ess=config.min_sequence_ess,
            slack=1.0 if own else usual.slack,
        )

    def broken(self, found: LogProbDifference) -> bool:
        """Whether it is beyond what rounding could explain."""
        return bool(replace(self, mean=self.slack * self.mean, p99=self.slack * self.p99).exceeded(found))

    def exceeded(self, found: LogProbDifference) -> list[str]:
        """What is beyond its limit, in words; nothing if all is well."""
        texts = []
        for name, value, limit in (("mean", found.mean, self.mean), ("p99", found.p99, self.p99)):
            if value > limit:
                texts.append(f"{name} of |Δ log-prob| {value:.2g} (limit {limit:g})")
        for name, value, limit in (
            ("tokens", found.token_ess, self.token_ess),
            ("sequences", found.sequence_ess, self.sequence_ess),
        ):
            if value < limit:
                texts.append(f"effective sample size {value:.1%} of the {name} (limit {limit:.0%})")
        return texts


_BY_TYPE = {
    torch.float32: Limits(0.001, 0.01, 0.99),
    torch.float64: Limits(0.001, 0.01, 0.99),
    torch.bfloat16: Limits(0.05, 0.5, 0.8, slack=5),
    torch.float16: Limits(0.01, 0.1, 0.95, slack=5),
}


class ParityError(UserError):
    """Engine and trainer do not compute the same policy."""


@dataclass(frozen=True)
class Comparison:
    """One look at engine and trainer.

    Attributes:
        found: the numbers; None: they could not be had, or there was nothing to compare.
        failure: what to raise if they are beyond a limit. note: what to say if rounding explains that, the first time.
    """

    found: LogProbDifference | None = None
    failure: ParityError | None = None
    note: str | None = None

    @property
    def metrics(self) -> dict[str, float]:
        return {} if self.found is None else self.found.metrics()


class ParityGate:
    """Compares rollouts of one run with the trainer, and holds due ones against the limits.

    Args:
        engine: its name. head: the trainer's, with the run's temperature.
    """

    def __init__(self, lm: LanguageModel, config: Config, head: HeadOptions, *, engine: str) -> None:
        self._lm, self._config, self._head = lm, config, head
        self._action, self._every = config.parity.action, config.parity.check_steps
        fp8_cache = engine == "vllm" and config.rollout.kv_cache_dtype == "fp8"
        self.limits = Limits.of(config.parity, lm.dtype, fp8_cache=fp8_cache)
        self._last: int | None = None
        self._noted = False

    def _range(self, found: LogProbDifference | None) -> str:
        """What to try where numbers cannot be compared, as they cannot where one is not finite."""
        if found is not None or self._lm.dtype != torch.float16:
            return ""
        return "If numbers are not finite, set model.dtype=bfloat16: float16 ends at 65,504. "

    def due(self, step: int) -> bool:
        """Whether the rollout after `step` optimiser steps is to be held against the limits: the first one always."""
        if self._action == "off":
            return False
        return self._last is None or step // self._every > self._last // self._every

    def regular(self, step: int) -> bool:
        """Whether it would also be due in a run that was never interrupted, for one optimiser step per rollout."""
        return step % self._every == 0

    def compare(
        self, batch: PolicyBatch, trainer: Sequence[torch.Tensor], *, step: int = 0, place: str = "", kept: str = ""
    ) -> Comparison:
        """Compare a rollout's log-probs.

        Args:
            trainer: `[scored tokens]` per sequence of the batch. step: optimiser steps done so far.
            place, kept: for the message: where in the run this is, and what is not lost.
        """
        engine = batch.rollout_log_probs
        if self._action == "off" or not any(engine):
            return Comparison()
        due, found = self.due(step), None
        try:
            found = difference(engine, trainer)
            problems = self.limits.exceeded(found) if due else []
        except ValueError as error:  # numbers that cannot be compared are wrong at any step
            problems = [str(error)]
        if due:
            self._last = step
        if not problems:
            return Comparison(found)
        evidence = explanation(self._lm, self._config, self._head, batch.sequences, engine)
        if found is None or evidence or self.limits.broken(found):
            return Comparison(found, _failure(problems, evidence, found, place, kept + self._range(found)))
        note = None if self._noted else _rounding(problems, found, place)
        self._noted = True
        return Comparison(found, note=note)


def check_engine(
    lm: LanguageModel, config: Config, batch: PolicyBatch, *, engine: str
) -> tuple[list[tuple[str, str]], Comparison]:
    """Compare an engine with the trainer on some completions; the numbers also as rows of a table.

    Args:
        batch: completions of the engine with its log-probs. engine: its name.
    """
    rollout = config.rollout
    head = with_sampling(
        lm.head,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        chunk_size=config.train.logprob_chunk_size,
    )
    own, _ = sequence_log_probs(lm, pack(batch.sequences, _CHECKED_TOKENS), len(batch.sequences), head)
    result = ParityGate(lm, config, head, engine=engine).compare(batch, own, place="in these completions")
    found = result.found
    if found is None:
        return [], result
    spread = f"mean {found.mean:.2g}, median {found.median:.2g}, p99 {found.p99:.2g}, largest {found.largest:.2g} nats"
    sizes = f"{found.token_ess:.1%} by token, {found.sequence_ess:.1%} by completion"
    return [("trainer against rollout log-probs", spread), ("effective sample size", sizes)], result


def _rounding(problems: Sequence[str], found: LogProbDifference, place: str) -> str:
    return (
        f"engine and trainer are further apart than usual{place and ' '}{place}: {', '.join(problems)}. No fault that "
        "can be tried out explains it, so that it is taken for rounding, and the run goes on; look at parity/* in the "
        f"metrics. A limit of your own (parity.max_mean) stops it. All numbers: {found}"
    )


def _failure(
    problems: Sequence[str], evidence: Evidence | None, found: LogProbDifference | None, place: str, kept: str
) -> ParityError:
    """What is beyond its limit, what was measured, the likely causes in order, and what to do."""
    ordered = dict.fromkeys((*([evidence.cause] if evidence else []), *_CAUSES))
    causes = "\n".join(f"  {number}. {cause}" for number, cause in enumerate(ordered, 1))
    measured = f"{evidence.text}.\n" if evidence else ""
    return ParityError(
        f"engine and trainer do not compute the same policy{place and ' '}{place}: {', '.join(problems)}",
        reason=f"{measured}The likely causes, the likeliest first:\n{causes}\nAll numbers: {found or 'none'}",
        fix=f"{kept}Correct the cause, or, if the mismatch is known and wanted, raise the limits (parity.max_mean, "
        "parity.max_p99, parity.min_token_ess) or set parity.action=warn",
    )


@dataclass
class Recorder:
    """An objective that keeps the log-probs that it is given, pack by pack, and is otherwise `objective`."""

    objective: Objective
    log_probs: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, tokens: PolicyTokens, algorithm: AlgorithmConfig) -> LossValue:
        self.log_probs.append(tokens.log_probs.detach())
        return self.objective(tokens, algorithm)

    def by_sequence(self, packs: Sequence[Pack], num_sequences: int, device: torch.device) -> list[torch.Tensor]:
        """One tensor per sequence of the batch; empty for those that no pack held."""
        rows = [torch.empty(0, device=device)] * num_sequences
        for one, values in zip(packs, self.log_probs, strict=True):
            for index, part in zip(one.sequences, values.split(one.counts), strict=True):
                rows[index] = part
        return rows


class Evidence(NamedTuple):
    """What was found by trying it out, in words, and which of the causes it speaks for."""

    text: str
    cause: str


def explanation(
    lm: LanguageModel,
    config: Config,
    head: HeadOptions,
    sequences: Sequence[TokenSequence],
    engine: Sequence[Sequence[float]],
) -> Evidence | None:
    """What makes the trainer agree best with the engine after all, of the faults that can be tried out; None: nothing.

    Two forward passes over the first few sequences, without gradients. Only worth it once something is wrong.

    Args:
        head: the trainer's, with the run's temperature. engine: log-probs of the sequences' scored tokens.
    """
    chosen: list[int] = []
    budget = _EXPLAINED_BY_TOKENS
    for index, sequence in enumerate(sequences):
        if len(engine[index]) and (not chosen or sequence.num_tokens <= budget):
            chosen.append(index)
            budget -= sequence.num_tokens
    few, theirs = [sequences[i] for i in chosen], [engine[i] for i in chosen]

    def own(*options: HeadOptions) -> list[list[torch.Tensor]]:
        made = log_probs_of_heads(lm, pack(few, _EXPLAINED_BY_TOKENS), len(few), [*options])
        return [log_probs for log_probs, _ in made]

    chunk = config.train.logprob_chunk_size
    others = [
        with_sampling(lm.head, temperature=temperature, top_k=0, top_p=1.0, chunk_size=chunk)
        for temperature in _TEMPERATURES
        if temperature != head.temperature or head.restricted
    ]
    as_it_is, *at_others = own(head, *others)
    before = _mean_difference(theirs, as_it_is)
    tried = [(_mean_difference(a, b), text, _PLACES) for text, a, b in _shifted(theirs, as_it_is)]
    with lm.model.disable_adapter():
        tried.append((_mean_difference(theirs, *own(head)), "with the adapter switched off", _WEIGHTS))
    for other, log_probs in zip(others, at_others, strict=True):
        text = f"at temperature {other.temperature:g}{' without top-p and top-k' if head.restricted else ''}"
        tried.append((_mean_difference(theirs, log_probs), text, _SAMPLING))
    # Anything that moves numbers nearer by chance does not do so by a factor of five. Where rounding is a part of the
    # difference, it stays when the fault is found.
    factor = 5 if lm.dtype in (torch.float32, torch.float64) else 2
    value, text, cause = min(tried)
    if value >= before / factor:
        return None
    return Evidence(f"{text} the two agree ({value:.2g} instead of {before:.2g} nats on average)", cause)


def _shifted(
    engine: Sequence[Sequence[float]], trainer: Sequence[torch.Tensor]
) -> Iterator[tuple[str, list[Sequence[float]], list[torch.Tensor]]]:
    """The engine's log-probs one place early and one place late."""
    yield "moved by one token (the engine's are late)", [row[1:] for row in engine], [row[:-1] for row in trainer]
    yield "moved by one token (the engine's are early)", [row[:-1] for row in engine], [row[1:] for row in trainer]


def _mean_difference(engine: Sequence[Sequence[float]], trainer: Sequence[torch.Tensor]) -> float:
    """Mean of |Δ| over finite values; infinite where there is none."""
    delta = _flat(trainer) - torch.tensor([value for row in engine for value in row], dtype=torch.float64)
    kept = delta[delta.isfinite()].abs()
    return float(kept.mean()) if len(kept) else math.inf


def _flat(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([row.detach().double().reshape(-1) for row in rows]).cpu() if rows else torch.empty(0).double()
