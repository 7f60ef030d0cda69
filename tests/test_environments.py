"""Episodes: turns, masks and limits with a scripted engine; exact tokens and log-probs with a small model."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import move_adapter, save_llama

from tandem.rewards.base import load_reward
from tandem.rewards.compose import score
from tandem.rl.chat import completion_text, encode, render
from tandem.rl.config import LoraConfig, ModelConfig
from tandem.rl.config_file import parse_config
from tandem.rl.errors import UserError
from tandem.rl.experience import policy_batch
from tandem.rl.lora import attach_lora
from tandem.rl.model import LanguageModel, load_model, load_tokenizer, with_sampling
from tandem.rl.packing import pack
from tandem.rl.samples import Completion, Episode, Group, Prompt, Sampling, Scored
from tandem.rl.step import sequence_log_probs
from tandem.rollout.chat_turns import ChatTurns
from tandem.rollout.environments import Environments, Step
from tandem.rollout.episodes import EpisodeEngine, EpisodeLimits
from tandem.rollout.stop_strings import StopStrings
from tandem.rollout.tool_calls import ParsedTurn, parse_turn
from tandem.rollout.tools import tools_of
from tandem.rollout.transformers_engine import TransformersEngine

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>"]
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops what an assistant thought once somebody answers, as templates of reasoning models do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = SPECIAL.index("<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per byte, and the special tokens of ChatML and Llama 3."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    made.chat_template = CHATML
    return made


def turns_of(tokenizer: Any, template: str = CHATML, stops: tuple[str, ...] = ("<|im_end|>",)) -> ChatTurns:
    def rendered(messages: Any, *, add_generation_prompt: bool, tools: Any) -> str:
        kwargs = {"chat_template": template} | ({"tools": tools} if tools else {})
        return render(tokenizer, messages, add_generation_prompt=add_generation_prompt, kwargs=kwargs)

    return ChatTurns(
        rendered,
        lambda text: encode(tokenizer, [text], rendered=True)[0],
        {SPECIAL.index(text): text for text in stops},
        reasons="</think>" in template,
    )


def parse_with(tokenizer: Any) -> Callable[[list[int]], ParsedTurn]:
    def parse(ids: list[int]) -> ParsedTurn:
        spoken = ids[:-1] if ids[-1] == END else ids
        return parse_turn(tokenizer.decode(spoken), completion_text(tokenizer, ids), "hermes")

    return parse


# Stop strings


def brute_force(tokenizer: Any, ids: list[int], stop: list[str]) -> int | None:
    """How many tokens there are once a stop string is complete, by decoding every beginning as a whole."""
    for count in range(1, len(ids) + 1):
        text = completion_text(tokenizer, ids[:count])
        if any(s in text for s in stop):
            return count
    return None


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("one two three", ["two"]),
        ("one two three", ["four", "e t"]),
        ("ab<|im_start|>cd", ["bc"]),
        ("naïve – 日本語 🙂 end", ["日本"]),
        ("naïve – 日本語 🙂 end", ["🙂 e"]),
        ("aaab", ["aab"]),
        ("x", ["x"]),
        ("nothing here", ["never"]),
        ("prom", ["ptprom", "om"]),
    ],
)
def test_stop_strings_are_found_with_the_token_that_completes_them(tokenizer, text, stop):
    prompt, ids = tokenizer.encode("a prompt"), tokenizer.encode(text)
    watch = StopStrings(lambda some: completion_text(tokenizer, some), prompt, stop)
    found = next((i + 1 for i, token in enumerate(ids) if watch.push(token)), None)
    assert found == brute_force(tokenizer, ids, stop)


def test_vllms_answer_tells_a_stop_string_from_the_length_limit():
    from types import SimpleNamespace

    from tandem.rollout.vllm_engine import group_of

    def truncated(ids: list[int], finish: str, reason: Any, stop: tuple[str, ...] = ("ab",)) -> bool:
        flat = SimpleNamespace(start_indices=list(range(len(ids))), token_ids=ids, logprobs=[-1.0] * len(ids))
        output = SimpleNamespace(index=0, token_ids=ids, logprobs=flat, finish_reason=finish, stop_reason=reason)
        sampling = Sampling(max_completion_length=3, stop_token_ids=(END,), stop=stop)
        return group_of(Prompt(0, [1], ""), SimpleNamespace(outputs=[output]), sampling).completions[0].truncated

    assert truncated([8, 9, 10], "length", None)
    assert not truncated([8, 9], "stop", "ab")
    assert not truncated([8, 9, 10], "stop", "ab")
    assert not truncated([8, END], "stop", END)
    assert truncated([8, 9, 10], "length", None, ())


# Answers between turns


def template_of_trl(name: str) -> str:
    import trl

    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of trl has no template {name}")
    return path.read_text(encoding="utf-8")


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = [{"role": "tool", "name": "f", "content": "7"}]
USER = [{"role": "user", "content": "go on"}]


@pytest.mark.parametrize(
    "messages", [TOOL, [*TOOL, *TOOL], USER, [*TOOL, *USER]], ids=["tool", "tools", "user", "both"]
)
@pytest.mark.parametrize("name", ["chatml", "qwen2_5", "llama3_1"])
def test_turns_joined_are_the_conversation_as_the_template_writes_it(tokenizer, name, messages):
    """The independent way: the whole history rendered and tokenised at once."""
    template = CHATML if name == "chatml" else template_of_trl(name)
    stop = "<|eot_id|>" if name == "llama3_1" else "<|im_end|>"
    turns = turns_of(tokenizer, template, (stop,))
    start = [{"role": "user", "content": "what?"}]
    spoken = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    if messages == USER:
        spoken = {"role": "assistant", "content": "well"}
    whole = tokenizer.apply_chat_template(
        [*start, spoken, *messages], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    before = tokenizer.apply_chat_template(start, chat_template=template, tokenize=False, add_generation_prompt=True)
    # What the model wrote, from the end of its prompt to its own end-of-turn token.
    said = whole[len(before) : whole.index(stop, len(before)) + len(stop)]
    ids = encode(tokenizer, [said], rendered=True)[0]
    joined = turns.prompt(start, None) + ids + turns.answer(messages, ids[-1], None)
    assert joined == encode(tokenizer, [whole], rendered=True)[0]
    # A turn that was cut gets its end from the template.
    cut = turns.prompt(start, None) + ids[:-1] + turns.answer(messages, None, None)
    assert cut == joined


def test_reasoning_that_the_template_keeps_for_tools_and_drops_for_users(tokenizer):
    turns = turns_of(tokenizer, template_of_trl("qwen3"))
    assert tokenizer.decode(turns.answer(TOOL, END, None)).startswith("\n<|im_start|>user\n<tool_response>\n7")
    with pytest.raises(UserError, match="rewrites an assistant's turn once a message of role 'user'"):
        turns.answer(USER, END, None)


def test_what_only_the_end_of_a_conversation_has_is_no_rewriting(tokenizer):
    """Phi-3's template ends every conversation that the model does not continue with an end of text."""
    ended = CHATML + "{% if not add_generation_prompt %}<s>{% endif %}"
    assert turns_of(tokenizer, ended).answer(USER, END, None) == turns_of(tokenizer).answer(USER, END, None)


def test_answers_bear_the_names_of_their_calls(tokenizer):
    """As gpt-oss and Gemma 4 write them, from the calls of the turn before."""
    named = (
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ messages[1].tool_calls[loop.index0 - 2].function.name }}: {{ m.content }}"
        "{% else %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endif %}"
        "<|im_end|>{% endfor %}"
    )
    answers = [*TOOL, {"role": "tool", "name": "g", "content": "8"}]
    assert tokenizer.decode(turns_of(tokenizer, named).answer(answers, END, None)) == "f: 7<|im_end|>g: 8<|im_end|>"


def test_a_header_that_ends_the_turn_before_is_not_written_twice(tokenizer):
    """GLM's turns end where the next one's header begins: the model stops with that header."""
    heads = (
        "{% for m in messages %}{{ '<s>' if m.role == 'user' else '<|pad|>' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|pad|>{% endif %}"
    )
    turns, header = turns_of(tokenizer, heads, ("<s>",)), SPECIAL.index("<s>")
    assert tokenizer.decode(turns.answer(USER, header, None)) == "go on<|pad|>"
    assert tokenizer.decode(turns.answer(USER, None, None)) == "<s>go on<|pad|>"


def test_template_that_forgets_is_refused(tokenizer):
    with pytest.raises(UserError, match="chat_template"):
        turns_of(tokenizer, FORGETFUL).answer(USER, END, None)


# The loop, with a scripted engine


class Script:
    """Says for each turn what `lines` says to the text of its prompt; notes every batch."""

    name = "script"

    def __init__(self, tokenizer: Any, line: Callable[[str], str], seconds: float = 0.0) -> None:
        self._tokenizer, self._line, self._seconds = tokenizer, line, seconds
        self.batches: list[int] = []
        self.prompts: list[Prompt] = []

    def generate(self, prompts: list[Prompt], sampling: Sampling, **more: Any) -> list[Group]:
        assert sampling.num_generations == 1
        time.sleep(self._seconds)
        self.batches.append(len(prompts))
        self.prompts += prompts
        return [Group(p, [self._completion(p, sampling)]) for p in prompts]

    def _completion(self, prompt: Prompt, sampling: Sampling) -> Completion:
        ids = self._tokenizer.encode(self._line(self._tokenizer.decode(prompt.ids)))
        ids = ids[: sampling.max_completion_length]
        return Completion(ids, [-float(i + 1) for i in range(len(ids))], ids[-1] != END)

    def load_adapter(self, version: int) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def play(
    tokenizer: Any,
    engine: Any,
    environments: Environments,
    rows: list[dict[str, Any]],
    *,
    size: int = 2,
    length: int = 400,
    prompt: str = "start",
    **limits: Any,
) -> list[Group]:
    messages = [{"role": "user", "content": prompt}]
    prompts = [Prompt(i, turns_of(tokenizer).prompt(messages, None), messages, row) for i, row in enumerate(rows)]
    player = EpisodeEngine(engine, environments, turns_of(tokenizer), parse_with(tokenizer), EpisodeLimits(**limits))
    return player.generate(prompts, Sampling(num_generations=size, max_completion_length=length, stop_token_ids=(END,)))


def count(line: str) -> str:
    return f"turn {line.count('<|im_start|>assistant')}<|im_end|>"


class Echo:
    """Answers with what it heard, until it has heard enough."""

    def reset(self, enough: int) -> None:
        self.enough, self.heard = enough, []

    def step(self, message: dict) -> tuple[str, bool, float]:
        self.heard.append(message["content"])
        return f"heard {message['content']}", len(self.heard) >= self.enough, 0.5


class Calculator:
    """As TRL's users write it."""

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def reset(self, **row: Any) -> str | None:
        self.total = self.start
        return row.get("hint")

    def add(self, number: int) -> int:
        """Adds to the total.

        Args:
            number: what to add
        """
        self.total += number
        return self.total

    async def later(self) -> str:
        """Answers from an event loop."""
        return "later"

    def step(self, size: int) -> str:
        """A tool of this name is no step of ours.

        Args:
            size: how far
        """
        return "x" * size

    def _hidden(self) -> None: ...

    def get_reward(self) -> float:
        return float(self.total)


def test_completion_holds_all_turns_and_scores_only_what_was_sampled(tokenizer):
    (group,) = play(tokenizer, Script(tokenizer, count), Environments({None: Echo}), [{"enough": 2}])
    for completion in group.completions:
        assert tokenizer.decode(group.prompt.ids + completion.ids) == (
            "<|im_start|>user\nstart<|im_end|>\n<|im_start|>assistant\nturn 1<|im_end|>\n"
            "<|im_start|>user\nheard turn 1<|im_end|>\n<|im_start|>assistant\nturn 2<|im_end|>"
        )
        sampled = [t for t, m in zip(completion.ids, completion.sampled, strict=True) if m]
        assert tokenizer.decode(sampled) == "turn 1<|im_end|>turn 2<|im_end|>"
        own = [p for p, m in zip(completion.log_probs, completion.sampled, strict=True) if m]
        assert own == [-1.0, -2, -3, -4, -5, -6, -7] * 2
        assert not completion.truncated
        episode = completion.episode
        assert episode is not None
        assert (episode.reward, episode.turn_rewards, episode.turns, episode.ending) == (1.0, [0.5, 0.5], 2, "done")
        assert [m["role"] for m in episode.messages] == ["assistant", "user", "assistant"]
        assert episode.environment.heard == ["turn 1", "turn 2"]
    first, second = (c.episode.environment for c in group.completions)
    assert first is not second


def test_policy_batch_trains_on_sampled_tokens_alone(tokenizer):
    (group,) = play(tokenizer, Script(tokenizer, count), Environments({None: Echo}), [{"enough": 2}])
    rows = [Scored(group.prompt, c, 0, "", {}, 0.0) for c in group.completions]
    batch = policy_batch(rows, mask_truncated=True)
    for sequence, log_probs in zip(batch.sequences, batch.rollout_log_probs, strict=True):
        assert sequence.num_scored == len(log_probs) == 14
        assert all(p < 0 for p in log_probs)
    packed = pack(batch.sequences, 1000)
    assert [tokenizer.decode(p.targets) for p in packed] == [2 * "turn 1<|im_end|>turn 2<|im_end|>"]


def test_methods_are_tools_and_the_episode_ends_without_a_call(tokenizer):
    def line(text: str) -> str:
        said = text.count("<|im_start|>tool")
        calls = ['{"name": "add", "arguments": {"number": 4}}', '{"name": "later", "arguments": {}}', '{"name": "ad']
        return (f"<tool_call>{calls[said]}</tool_call>" if said < 3 else "4") + "<|im_end|>"

    engine = Script(tokenizer, line)
    environments = Environments({None: Calculator}, kwargs={"start": 3})
    (group,) = play(tokenizer, engine, environments, [{"answer": 7}], size=1)
    episode = group.completions[0].episode
    assert [m["content"] for m in episode.messages if m["role"] == "tool"][:2] == ["7", "later"]
    assert "not valid JSON" in episode.messages[5]["content"]
    assert (episode.calls, episode.failed_calls, episode.turns) == (3, 1, 4)
    assert (episode.reward, episode.ending) == (7.0, "done")
    shown = tokenizer.decode(group.prompt.ids)
    assert all(f'"name": "{name}"' in shown for name in ("add", "later", "step"))
    assert "_hidden" not in shown
    assert "get_reward" not in shown


class Lock:
    """Written as TRL's documentation shows environments: tools with Google-style docstrings, state on the object."""

    def __init__(self):
        self.code = ""
        self.reward = 0.0

    def reset(self, **kwargs) -> str | None:
        self.code = kwargs["code"]
        self.reward = 0.0
        self.tries = 0
        return " The lock has one digit."

    @property
    def open(self) -> bool:
        raise AssertionError("TRL never looks at properties")

    def turn(self, digit: str) -> str:
        """
        Turn the lock to a digit.

        Args:
            digit: The digit to try.

        Returns:
            What the lock does.
        """
        self.tries += 1
        if self.tries > 2:
            raise ValueError("The lock is jammed.")
        self.reward = 1.0 if digit == self.code else 0.0
        return "It opens." if self.reward else "Nothing happens."


def test_an_environment_and_its_reward_written_for_trl_run_unchanged(tokenizer):
    def reward_func(environments, **kwargs):
        return [environment.reward for environment in environments]

    def line(text: str) -> str:
        digit = text.count("<|im_start|>tool") + 1
        call = f'<tool_call>{{"name": "turn", "arguments": {{"digit": "{digit}"}}}}</tool_call>'
        return (call if digit < 4 and "opens" not in text else "done") + "<|im_end|>"

    rows = [{"code": "1"}, {"code": "2"}, {"code": "9"}]
    groups = play(tokenizer, Script(tokenizer, line), Environments({None: Lock}), rows)
    assert "start The lock has one digit." in tokenizer.decode(groups[0].prompt.ids)
    heard = [[m["content"] for m in g.completions[0].episode.messages if m["role"] == "tool"] for g in groups]
    assert heard[:2] == [["It opens."], ["Nothing happens.", "It opens."]]
    assert heard[2][:2] == ["Nothing happens."] * 2
    assert "The lock is jammed." in heard[2][2], "what a tool raises goes back to the model"
    scores = score(groups, [load_reward(reward_func)], tokenizer.decode, timeout=20)
    assert [row.reward for row in scores.rows] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_reset_may_add_to_the_prompt_and_rows_that_differ_share_its_beginning(tokenizer):
    texts = iter(["start 1", "start 2"])

    class Random(Echo):
        def reset(self) -> str:  # type: ignore[override]
            super().reset(1)
            return next(texts)[5:]

    engine = Script(tokenizer, count)
    (group,) = play(tokenizer, engine, Environments({None: Random}), [{}])
    assert tokenizer.decode(group.prompt.ids) == "<|im_start|>user\nstart "
    for completion, prompt in zip(group.completions, engine.prompts, strict=True):
        whole = group.prompt.ids + completion.ids
        assert whole[: len(prompt.ids)] == prompt.ids
        scored = [t for t, m in zip(completion.ids, completion.sampled, strict=True) if m]
        assert tokenizer.decode(scored) == "turn 1<|im_end|>"
    assert {tokenizer.decode(c.ids)[0] for c in group.completions} == {"1", "2"}


def test_limits_on_turns_and_tokens(tokenizer):
    def made(**options: Any) -> Completion:
        rows = [{"enough": 9}]
        return play(tokenizer, Script(tokenizer, count), Environments({None: Echo}), rows, **options)[0].completions[0]

    short = made(max_turns=3)
    assert (short.episode.ending, short.episode.turns, short.truncated) == ("turns", 3, False)
    assert short.ids[-1] == END
    assert short.episode.reward == 1.5
    # A turn has seven tokens and an answer thirty-two: of forty, one is left for the second turn.
    full = made(length=40)
    assert (full.episode.ending, full.truncated, len(full.ids), full.num_sampled) == ("tokens", True, 40, 8)
    # Here the answer would leave none, and is left out.
    without = made(length=39)
    assert (without.episode.ending, without.truncated, without.ids[-1]) == ("tokens", True, END)
    assert len(without.ids) == 7
    assert [m["role"] for m in without.episode.messages] == ["assistant"]
    # A turn that is cut by its own limit goes on after an end that was not sampled.
    cut = made(max_turn_tokens=3, max_turns=2)
    assert tokenizer.decode(cut.ids).startswith("tur<|im_end|>\n<|im_start|>user\nheard tur<|im_end|>")
    assert cut.num_sampled == 6


def test_a_last_turn_that_was_cut_is_not_done(tokenizer):
    environments = Environments({None: Calculator})
    endings = [
        play(tokenizer, Script(tokenizer, count), environments, [{}], max_turn_tokens=limit)[0].completions[0]
        for limit in (3, 7)
    ]
    assert [(e.episode.ending, e.truncated, e.episode.turns) for e in endings] == [
        ("tokens", True, 1),
        ("done", False, 1),
    ]


def test_an_episode_beyond_its_time_has_no_further_turn(tokenizer, monkeypatch):
    """Of a clock that every step of the environment puts forward by 100 seconds."""
    late = 0.0

    class Clock:
        monotonic = staticmethod(lambda: time.monotonic() + late)

    class Tedious(Echo):
        def step(self, message: dict) -> tuple[str, bool, float]:
            nonlocal late
            late += 100
            return super().step(message)

    monkeypatch.setattr("tandem.rollout.episodes.time", Clock)
    engine, rows = Script(tokenizer, count), [{"enough": 9}]
    limits = {"size": 1, "max_turns": 9, "step_timeout": 10_000}
    (group,) = play(tokenizer, engine, Environments({None: Tedious}), rows, episode_timeout=250, **limits)
    episode = group.completions[0].episode
    assert (episode.ending, episode.turns, episode.reward) == ("time", 3, 1.5)
    assert tokenizer.decode(group.completions[0].ids).endswith("turn 3<|im_end|>")
    (group,) = play(tokenizer, engine, Environments({None: Tedious}), rows, **limits)
    assert group.completions[0].episode.turns == 9


def double(number: int) -> int:
    """Doubles a number.

    Args:
        number: what to double
    """
    if number == 13:
        time.sleep(1.5)
    return 2 * number


def test_tools_need_no_environment(tokenizer):
    """Rows have their own prompts; a tool that takes too long is an error that the model hears of, and it goes on."""

    def line(text: str) -> str:
        heard = text.count("<|im_start|>tool")
        number = 13 if "unlucky" in text else 4
        call = f'<tool_call>{{"name": "double", "arguments": {{"number": {number}}}}}</tool_call>'
        return ("that is all" if heard else call) + "<|im_end|>"

    environments = Environments({}, tools=[double])
    assert environments.common_schemas == [t.schema for t in tools_of([double]).values()]
    for word, answer in (("start", "8"), ("unlucky", "no result within 0.5 seconds")):
        engine = Script(tokenizer, line)
        (group,) = play(tokenizer, engine, environments, [{}], size=1, prompt=word, step_timeout=0.5)
        assert '"name": "double"' in tokenizer.decode(group.prompt.ids)
        episode = group.completions[0].episode
        called, told, last = episode.messages
        assert (called["role"], told["role"], last["content"]) == ("assistant", "tool", "that is all")
        assert answer in told["content"]
        assert (episode.ending, episode.turns, episode.calls) == ("done", 2, 1)
        assert episode.failed_calls == (word == "unlucky")
        assert episode.reward is None
        assert episode.environment is None


@pytest.mark.parametrize(
    "observation",
    [
        "go on",
        {"role": "user", "content": "go on"},
        [{"role": "user", "content": "go on"}],
    ],
)
def test_an_observation_is_a_text_a_message_or_messages(tokenizer, observation):
    class Answering(Echo):
        def reset(self) -> Any:  # type: ignore[override]
            super().reset(2)
            return [{"role": "system", "content": "rules"}, {"role": "user", "content": "begin"}]

        def step(self, message: dict) -> Any:
            self.heard.append(message)
            return observation, len(self.heard) == 2

    (group,) = play(tokenizer, Script(tokenizer, count), Environments({None: Answering}), [{}], size=1)
    assert tokenizer.decode(group.prompt.ids).startswith(
        "<|im_start|>system\nrules<|im_end|>\n<|im_start|>user\nbegin<|im_end|>\n"
    )
    assert tokenizer.decode(group.completions[0].ids) == (
        "turn 1<|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\nturn 2<|im_end|>"
    )


def test_the_engine_generates_for_ready_episodes_while_a_slow_environment_works(tokenizer):
    release, others = threading.Event(), []

    class Slow(Echo):
        def reset(self, enough: int, slow: bool) -> None:  # type: ignore[override]
            super().reset(enough)
            self.slow = slow

        def step(self, message: dict) -> tuple[str, bool, float]:
            if self.slow and not self.heard:
                release.wait(10)
            answer = super().step(message)
            if not self.slow:
                others.append(answer[1])
                if sum(others) == 3:
                    release.set()
            return answer

    engine = Script(tokenizer, count)
    rows = [{"enough": 3, "slow": i == 0} for i in range(4)]
    groups = play(tokenizer, engine, Environments({None: Slow}), rows, size=1)
    # Three episodes came to their end while the first one's step waited for just that.
    assert engine.batches == [4, 3, 3, 1, 1]
    assert [c.episode.ending for g in groups for c in g.completions] == ["done"] * 4


def test_fast_environments_stay_in_one_batch(tokenizer):
    engine = Script(tokenizer, count)
    play(tokenizer, engine, Environments({None: Echo}), [{"enough": 3}] * 6, size=2)
    assert engine.batches == [12, 12, 12]
    # No two turns draw from one random stream.
    assert len({p.index for p in engine.prompts}) == 36


class Hanging(Echo):
    made = 0

    def __init__(self) -> None:
        Hanging.made += 1

    def step(self, message: dict) -> Any:
        time.sleep(0.4 if self.enough == 0 else 0)
        return super().step(message)


def test_a_step_beyond_its_time_ends_its_episode_alone(tokenizer):
    environments = Environments({None: Hanging})
    engine = Script(tokenizer, count)
    messages = [{"role": "user", "content": "start"}]
    player = EpisodeEngine(
        engine, environments, turns_of(tokenizer), parse_with(tokenizer), EpisodeLimits(step_timeout=0.1)
    )
    ids = turns_of(tokenizer).prompt(messages, None)
    prompts = [Prompt(0, ids, messages, {"enough": 0}), Prompt(1, ids, messages, {"enough": 1})]
    sampling = Sampling(num_generations=1, max_completion_length=400)
    hung, fine = (g.completions[0].episode for g in player.generate(prompts, sampling))
    assert (hung.ending, hung.reward) == ("time", None)
    assert (fine.ending, fine.reward) == ("done", 0.5)
    before = Hanging.made
    (again,) = player.generate(prompts[1:], sampling)
    assert again.completions[0].episode.environment is fine.environment
    assert Hanging.made == before, "an environment is reset and used again"
    assert hung.environment is not fine.environment


class Raising(Echo):
    def step(self, message: dict) -> Any:
        if self.enough == 0:
            raise KeyError("board")
        return super().step(message)


class Wordless(Echo):
    def step(self, message: dict) -> Any:
        return Step("", done=False)


class Lost(Echo):
    def step(self, message: dict) -> Any:
        return "higher"


class Mumbling(Echo):
    def step(self, message: dict) -> Any:
        return ["higher", "lower"], False


class Undecided(Echo):
    def step(self, message: dict) -> Any:
        return "higher", "no"


class Confused(Echo):
    def reset(self, enough: int) -> Any:  # type: ignore[override]
        return 5


class Vague(Echo):
    def step(self, message: dict) -> Any:
        return "higher", False, float("nan")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Raising, r"Raising.step raised KeyError: 'board' \(row 0, completion 0, turn 1\)"),
        (Wordless, "no observation"),
        (Lost, "not a Step"),
        (Mumbling, "not messages"),
        (Undecided, "'no' for done, not True or False"),
        (Confused, "reset returned 5, not None, a text or messages"),
        (Vague, "not a finite number"),
    ],
)
def test_faults_of_an_environment_are_named_or_end_their_episode(tokenizer, kind, words):
    rows = [{"enough": 0}]
    with pytest.raises(UserError, match=words):
        play(tokenizer, Script(tokenizer, count), Environments({None: kind}), rows)
    (group,) = play(tokenizer, Script(tokenizer, count), Environments({None: kind}), rows, stop_on_fault=False)
    assert [(c.episode.ending, c.episode.reward) for c in group.completions] == [("error", None)] * 2
    assert all(c.num_sampled == (0 if kind is Confused else 7) for c in group.completions)


def test_wrong_environments_are_refused(tokenizer):
    class Empty:
        def reset(self) -> None: ...

    for factory, words in ((Empty, "neither step"), (object, "no method reset"), (lambda: 1 / 0, "ZeroDivisionError")):
        with pytest.raises(UserError, match=words):
            Environments({None: factory})
    several = Environments({"a": Echo, "b": Calculator})
    with pytest.raises(UserError, match="'environment' is 'c'"):
        several.check_row(Prompt(0, [1], [{"role": "user", "content": ""}], {"environment": "c"}))
    with pytest.raises(UserError, match="string"):
        several.check_row(Prompt(0, [1], "text"))


def test_a_column_that_reset_needs_is_looked_for_before_anything_is_played():
    several = Environments({"a": Echo, "b": Calculator})
    chat = [{"role": "user", "content": ""}]
    with pytest.raises(UserError, match=r"Echo.reset needs an argument 'enough'(?s:.*)the columns prompt, enuogh"):
        several.check_row(Prompt(0, [1], chat, {"environment": "a", "enuogh": 1}))
    several.check_row(Prompt(0, [1], chat, {"environment": "a", "enough": 1}))
    several.check_row(Prompt(0, [1], chat, {"environment": "b"}))
    Environments({}, [double]).check_row(Prompt(0, [1], chat))


@pytest.mark.parametrize(
    ("ending", "words"), [("time", "environment.step_timeout"), ("error", "raised"), ("turns", "from step")]
)
def test_an_episode_without_its_reward_says_why(ending: str, words: str):
    episode = Episode(messages=[{"role": "assistant", "content": "a"}], turns=1, ending=ending)
    group = Group(Prompt(0, [1], [], {}), [Completion([1], [0.0], False, episode=episode)])
    with pytest.raises(UserError, match=words):
        score([group], [load_reward("environment")], lambda ids: "a", timeout=5)


def test_rows_choose_among_several_environments(tokenizer):
    environments = Environments({"echo": Echo, "sums": Calculator})
    rows = [{"environment": "echo", "enough": 1}, {"environment": "sums"}]
    groups = play(tokenizer, Script(tokenizer, count), environments, rows, size=1)
    kinds = [type(g.completions[0].episode.environment) for g in groups]
    assert kinds == [Echo, Calculator]
    assert "add" not in tokenizer.decode(groups[0].prompt.ids)
    assert "add" in tokenizer.decode(groups[1].prompt.ids)


def test_environments_stay_in_their_process(tokenizer):
    (group,) = play(tokenizer, Script(tokenizer, count), Environments({None: Echo}), [{"enough": 1}])
    sent = pickle.loads(pickle.dumps(group.completions[0]))
    assert sent.episode.environment is None
    assert sent.ids == group.completions[0].ids
    assert group.completions[0].episode.environment is not None


def test_config_takes_the_environments_own_reward_where_no_other_is_named():
    raw = {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}}
    config = parse_config(raw | {"environment": {"factory": "game.py:Game"}})
    assert config.reward_names() == ["environment"]
    with pytest.raises(UserError, match=r"environment\.factory is missing"):
        parse_config(raw | {"rewards": {"reward_funcs": ["environment"]}})
    with pytest.raises(UserError, match="section environment is for rollouts"):
        parse_config(raw | {"environment": {"factory": "g.py:G"}, "algorithm": {"name": "sft"}})


# A small real model


@pytest.fixture(scope="module")
def lm(tokenizer, tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("model")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": END, "bos_token_id": 1}
    save_llama(folder, len(tokenizer), **heads, intermediate_size=64, initializer_range=0.3)
    tokenizer.save_pretrained(folder)
    section = ModelConfig(model_name_or_path=str(folder), device="cpu")
    loaded = load_model(section, load_tokenizer(section))
    attach_lora(loaded, LoraConfig(r=4), seed=0)
    move_adapter(loaded, seed=1)
    return loaded


def test_trainer_and_engine_agree_on_every_sampled_token_of_every_turn(lm, tokenizer):
    engine = TransformersEngine(lm)
    groups = play(tokenizer, engine, Environments({None: Echo}), [{"enough": 3}] * 3, size=3, max_turn_tokens=9)
    completions = [(g.prompt, c) for g in groups for c in g.completions]
    assert {c.episode.turns for _, c in completions} == {3}
    rows = [Scored(p, c, i // 3, "", {}, 0.0) for i, (p, c) in enumerate(completions)]
    batch = policy_batch(rows, mask_truncated=False)
    head = with_sampling(lm.head, temperature=1.0, top_k=0, top_p=1.0, chunk_size=7)
    for share in (True, False):
        own, _ = sequence_log_probs(lm, pack(batch.sequences, 300, share_prefix=share), len(rows), head)
        for trainer, rollout in zip(own, batch.rollout_log_probs, strict=True):
            assert len(rollout) > 9
            torch.testing.assert_close(trainer, torch.tensor(rollout), rtol=0, atol=2e-5)
    # The same by a plain forward over the whole conversation, without our packing or masks.
    prompt, completion = completions[0]
    ids = prompt.ids + completion.ids
    with torch.no_grad():
        log_probs = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for j, (token, value, sampled) in enumerate(
        zip(completion.ids, completion.log_probs, completion.sampled, strict=True)
    ):
        if sampled:
            assert float(log_probs[len(prompt.ids) + j - 1, token]) == pytest.approx(value, abs=2e-5)
    again = play(tokenizer, engine, Environments({None: Echo}), [{"enough": 3}] * 3, size=3, max_turn_tokens=9)
    assert [c.ids for g in again for c in g.completions] == [c.ids for _, c in completions]


@pytest.mark.parametrize("in_flight", [None, 5])
def test_stop_strings_end_completions_of_the_embedded_engine(lm, tokenizer, in_flight):
    prompts = [Prompt(i, tokenizer.encode(text), text) for i, text in enumerate(["ab", "hello", "日本"])]
    plain = Sampling(num_generations=20, max_completion_length=24, stop_token_ids=(END,))
    free = [c for g in TransformersEngine(lm).generate(prompts, plain) for c in g.completions]
    # Pairs of characters that really come up, so that texts stop across the border of two tokens.
    texts = [completion_text(tokenizer, c.ids) for c in free]
    pairs = sorted({t[i : i + 2] for t in texts for i in range(len(t) - 1) if t[i : i + 2].isascii()})
    stop = tuple(pairs[::25])
    sampling = Sampling(num_generations=20, max_completion_length=24, stop_token_ids=(END,), stop=stop)
    engine = TransformersEngine(lm, max_in_flight=in_flight)
    made = [c for g in engine.generate(prompts, sampling) for c in g.completions]
    ended = 0
    for before, after in zip(free, made, strict=True):
        place = brute_force(tokenizer, before.ids, list(stop))
        assert after.ids == before.ids[:place]
        assert after.truncated == (before.truncated if place is None else False)
        assert len(after.log_probs) == len(after.ids)
        ended += place is not None and place < len(before.ids)
    assert 5 < ended < len(made)


GAME = """
class Game:
    def reset(self, secret):
        self.secret, self.turns = secret, 0
        return f"Guess {secret}."

    def step(self, message):
        self.turns += 1
        return "no", self.turns == 2, float(len(message["content"]))


def games(split="train"):
    return [{"secret": i} for i in range(4)]


def seen(completions, environments, episodes):
    assert [e.secret for e in environments] and all(len(m) == 3 for m in completions)
    return [float(e.turns) for e in episodes]
"""


def test_a_run_trains_on_episodes(lm, tmp_path):
    """From the config to the journal: rows without prompts, the environment's reward by name, rewards that look in."""
    from tandem.rl.commands import run
    from tandem.rl.console import Console
    from tandem.rl.journal import read_rollouts

    (tmp_path / "game.py").write_text(GAME)
    sections = {
        "model": {"model_name_or_path": lm.causal_lm.name_or_path, "device": "cpu"},
        "output_dir": str(tmp_path / "runs"),
        "data": {"dataset_name": f"{tmp_path}/game.py:games"},
        "eval": {"dataset_name": f"{tmp_path}/game.py:games", "temperature": 1.0},
        "environment": {"factory": f"{tmp_path}/game.py:Game", "max_turn_tokens": 4},
        "rollout": {"num_generations": 4, "max_completion_length": 60, "stop": ["qq"]},
        "rewards": {"reward_funcs": ["environment", {"function": f"{tmp_path}/game.py:seen", "weight": 0}]},
        "train": {"max_steps": 1, "generation_batch_size": 8},
    }
    config = parse_config(sections)
    assert run(config, dry_run=False, console=Console.silent())
    (file,) = sorted((config.run_dir / "rollouts").glob("step_*.jsonl"))
    records = read_rollouts(file)
    assert len(records) == 8
    for record in records:
        assert record["rewards"]["seen"] == 2.0
        assert record["prompt"][-1]["content"].startswith("Guess ")
        assert "user\nno" in record["completion"]
    assert len({record["reward"] for record in records}) > 1


def test_episodes_are_sampled_until_their_rewards_differ(lm, tmp_path):
    """Tries, a curriculum, and a reward that looks into environments while others play."""
    from tandem.rl.commands import run
    from tandem.rl.console import Console
    from tandem.rl.rollout_journal import read_journal

    game = GAME.replace('float(len(message["content"]))', 'float(len(message["content"])) * (self.secret > 1)')
    game = game.replace("[e.secret for e in environments]", "all(e.secret is not None for e in environments)")
    (tmp_path / "game.py").write_text(game)
    sections = {
        "model": {"model_name_or_path": lm.causal_lm.name_or_path, "device": "cpu"},
        "output_dir": str(tmp_path / "runs"),
        "data": {"dataset_name": f"{tmp_path}/game.py:games", "curriculum": {"enabled": True, "min_visits": 1}},
        "environment": {"factory": f"{tmp_path}/game.py:Game", "max_turn_tokens": 4},
        "rollout": {"num_generations": 4, "max_completion_length": 60, "dynamic_sampling": True},
        "train": {"max_steps": 2, "generation_batch_size": 8},
    }
    seen = {"function": f"{tmp_path}/game.py:seen", "weight": 0, "scope": "group"}
    config = parse_config(sections | {"rewards": {"reward_funcs": ["environment", seen]}})
    assert run(config, dry_run=False, console=Console.silent())
    rollouts = list(read_journal(config.run_dir))
    assert len(rollouts) == 2
    for rollout in rollouts:
        assert [row.rewards["seen"] for row in rollout.rows] == [2.0] * 8
        assert {row.prompt.index for row in rollout.rows} <= {2, 3}, "the others' rewards are all 0"
    assert sum(rollout.logged["sampling/generated"] for rollout in rollouts) > 4
    assert {index for rollout in rollouts for index, share in rollout.visits if share == 0.0} >= {0, 1}


def test_a_prompts_own_limit_cuts_and_changes_nothing_before(lm, tokenizer):
    prompt = Prompt(0, tokenizer.encode("ab"), "ab")
    sampling = Sampling(num_generations=4, max_completion_length=12)
    engine = TransformersEngine(lm)
    (whole,) = engine.generate([prompt], sampling)
    (cut,) = engine.generate([Prompt(0, prompt.ids, "ab", limit=5)], sampling)
    assert [c.ids for c in cut.completions] == [c.ids[:5] for c in whole.completions]
    assert all(c.truncated for c in cut.completions)
