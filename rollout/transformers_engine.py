"""The embedded engine: batched sampling with transformers' own forward, on a CPU or a GPU, sharing the trainer's model.

A group's prompt is prefilled once and its cache copied for the group's completions; finished completions leave the
batch; every completion draws from a random stream of its own. Where memory ends, fewer are made at once.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tandem.kernels.sampling import draw, restrict
from tandem.rl.errors import OutOfMemory, is_out_of_memory
from tandem.rl.model import LanguageModel
from tandem.rl.samples import Completion, Group, Prompt, Sampling
from tandem.rollout.engine import OnGroup, Progress
from tandem.rollout.finished_groups import FinishedGroups
from tandem.rollout.random_streams import stream_of, uniform_stream
from tandem.rollout.stop_strings import StopStrings

# Rows leave the batch when this share of it is done: every removal copies the cache once.
_COMPACT_AT = 0.2


def _cache_name(backbone: Any) -> str:
    """What a model calls its cache, as argument and in its output.

    From transformers 5.24 on it is `cache`, and the former name gives a warning; a model with its own code may keep it.
    """
    return "cache" if "cache" in inspect.signature(backbone.forward).parameters else "past_key_values"


@dataclass
class _Request:
    """One completion in the making."""

    prompt: Prompt
    sample: int
    uniforms: torch.Tensor
    limit: int
    watch: StopStrings | None
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    truncated: bool = True

    @property
    def unfinished(self) -> bool:
        return self.truncated and len(self.ids) < self.limit

    def add(self, token: int, log_prob: float, stops: bool) -> None:
        self.ids.append(token)
        self.log_probs.append(log_prob)
        self.truncated = not (stops or (self.watch is not None and self.watch.push(token)))

    def begin_again(self, watch: StopStrings | None) -> None:
        self.ids.clear()
        self.log_probs.clear()
        self.watch = watch


class TransformersEngine:
    """Generates with the very modules that are trained: an updated adapter is in use at once, without a copy.

    Args:
        language_model: with the adapter attached or not.
        max_in_flight: completions generated at once; None: all of them.
        warn: told when memory ends and fewer are generated at once from then on.
    """

    name = "transformers"
    asleep_bytes = 0

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        max_in_flight: int | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._lm = language_model
        self._max_in_flight = max_in_flight
        self._warn = warn
        self._cache_name = _cache_name(language_model.backbone)

    def load_adapter(self, version: int) -> None:
        """Nothing to do: trainer and engine hold the same parameters."""

    def sleep(self) -> None:
        if self._lm.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Nothing was put away."""

    def close(self) -> None:
        """Nothing of its own to free."""

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        progress: Progress | None = None,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """See `RolloutEngine`.

        Raises:
            OutOfMemory: for a single completion.
        """
        size = sampling.num_generations
        requests = [self._request(p, k, sampling) for p in prompts for k in range(size)]
        members = [requests[i : i + size] for i in range(0, len(requests), size)]

        def made(place: int) -> Group:
            done = [Completion(one.ids, one.log_probs, one.truncated) for one in members[place]]
            return Group(prompts[place], done)

        groups = FinishedGroups(members, made, on_group)
        waiting = [one for one in requests if one.unfinished]
        while waiting:
            wave = waiting[: self._max_in_flight]
            failure = self._try(wave, sampling, groups)
            if failure is None:
                waiting = waiting[len(wave) :]
                if progress:
                    progress(len(requests) - len(waiting), len(requests))
                continue
            self._reduce(len(wave), failure)
            waiting = [one for one in waiting if one.unfinished]
            for one in wave:
                if one.unfinished:
                    one.begin_again(self._watch(one.prompt, sampling))
        return groups.all()

    def _try(self, wave: list[_Request], sampling: Sampling, groups: FinishedGroups) -> str | None:
        """What was asked for where memory has ended. When this returns, nothing holds on to the wave's cache."""
        try:
            self._generate_wave(wave, sampling, groups)
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return (str(error).strip().splitlines() or [type(error).__name__])[0]

    def _reduce(self, count: int, failure: str) -> None:
        """Half as many at once, from now on."""
        gc.collect()
        if self._lm.device.type == "cuda":
            torch.cuda.empty_cache()
        if count == 1:
            raise OutOfMemory(
                f"out of memory while a single completion was generated: {failure}",
                fix="lower rollout.max_completion_length or data.max_prompt_length, or set model.load_in_4bit=true",
            )
        self._max_in_flight = count // 2
        self._warn(
            f"out of memory while {count} completions were generated at once: {failure}. Those that are not finished "
            f"are begun again, and the run goes on, with rollout.max_in_flight={self._max_in_flight}"
        )

    def _request(self, prompt: Prompt, sample: int, sampling: Sampling) -> _Request:
        # Always of the full length, so that the prompt's own limit cuts a completion and changes nothing before.
        uniforms = uniform_stream(sampling.seed, stream_of(prompt), sample, sampling.max_completion_length)
        return _Request(prompt, sample, uniforms, sampling.longest(prompt), self._watch(prompt, sampling))

    def _watch(self, prompt: Prompt, sampling: Sampling) -> StopStrings | None:
        return StopStrings(self._text, prompt.ids, sampling.stop) if sampling.stop else None

    def _text(self, ids: list[int]) -> str:
        return str(self._lm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _generate_wave(self, requests: list[_Request], sampling: Sampling, groups: FinishedGroups) -> None:
        stop = torch.tensor(sorted(sampling.stop_token_ids), device=self._lm.device)
        batch = self._prefill(requests)
        for step in range(sampling.max_completion_length):
            tokens, log_probs = self._sample(batch.logits, batch.requests, step, sampling)
            stopped = torch.isin(tokens, stop)
            for request, token, log_prob, end in zip(
                batch.requests, tokens.tolist(), log_probs.tolist(), stopped.tolist(), strict=True
            ):
                if request.unfinished:
                    request.add(token, log_prob, end)
                    if not request.unfinished:
                        groups.finish(request)
            alive = [i for i, r in enumerate(batch.requests) if r.unfinished]
            if not alive or step + 1 == sampling.max_completion_length:
                return
            if len(alive) <= (1 - _COMPACT_AT) * len(batch.requests):
                tokens = batch.keep(alive, tokens)
            self._decode(batch, tokens)

    def _prefill(self, requests: list[_Request]) -> _Batch:
        """Run every distinct prompt once, then give each request a copy of its prompt's cache."""
        keys = [tuple(r.prompt.ids) for r in requests]
        row_of = {ids: row for row, ids in enumerate(dict.fromkeys(keys))}
        longest = max(map(len, row_of))
        device = self._lm.device
        ids = torch.full((len(row_of), longest), self._lm.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for prompt, row in row_of.items():
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = self._lm.backbone(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        rows = torch.tensor([row_of[key] for key in keys], device=device)
        cache = out[self._cache_name]
        cache.batch_select_indices(rows)
        return _Batch(
            requests=list(requests),
            cache=cache,
            mask=mask[rows],
            position=positions[rows, -1:],
            logits=self._lm.logits(out.last_hidden_state[:, -1])[rows],
        )

    def _decode(self, batch: _Batch, tokens: torch.Tensor) -> None:
        batch.mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], dim=1)
        batch.position = batch.position + 1
        out = self._lm.backbone(
            input_ids=tokens[:, None],
            attention_mask=batch.mask,
            position_ids=batch.position,
            use_cache=True,
            **{self._cache_name: batch.cache},
        )
        batch.logits = self._lm.logits(out.last_hidden_state[:, -1])

    @staticmethod
    def _sample(
        logits: torch.Tensor, requests: list[_Request], step: int, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[N]` tokens and their log-probs under the distribution that they were drawn from."""
        greedy = sampling.temperature == 0
        if not greedy:
            logits = restrict(logits / sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        log_probs = logits.log_softmax(-1)
        if greedy:
            tokens = log_probs.argmax(-1)
        else:
            tokens = draw(log_probs, torch.stack([r.uniforms[step] for r in requests]).to(log_probs.device))
        return tokens, log_probs.gather(-1, tokens[:, None])[:, 0]


@dataclass
class _Batch:
    """Rows being decoded together: prompts padded on the left, `[N, K]` mask, `[N, 1]` positions, `[N, V]` logits."""

    requests: list[_Request]
    cache: object
    mask: torch.Tensor
    position: torch.Tensor
    logits: torch.Tensor

    def keep(self, rows: list[int], tokens: torch.Tensor) -> torch.Tensor:
        """Drop all other rows; returns their last tokens."""
        index = torch.tensor(rows, device=tokens.device)
        self.requests = [self.requests[i] for i in rows]
        self.cache.batch_select_indices(index)  # type: ignore[attr-defined]
        self.mask, self.position = self.mask[index], self.position[index]
        return tokens[index]
