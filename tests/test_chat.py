"""Chat templates: what becomes of messages, and which tokens the assistant wrote."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tandem.rl.chat import (
    assistant_examples,
    completion_text,
    prompt_ids,
    render,
    set_chat_template,
    stop_token_ids,
    with_system_prompt,
)
from tandem.rl.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The marker closes before the end-of-turn token.
CHATML_SHORT_MARKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops the reasoning of every turn but the last, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIALS = [
    "<|endoftext|>",
    "<|begin|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
TALK = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "It is four. "},
    {"role": "user", "content": "\nand three?"},
    {"role": "assistant", "content": "\n\nFive, née cinq 🙂"},
]


def make_tokenizer(template: str | None, *, bos: bool = False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    text = ["What is two plus two? It is four.\n\nFive is the answer to two and three.\n\n"] * 5
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=350, special_tokens=SPECIALS, initial_alphabet=alphabet)
    )
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", inner.token_to_id("<|begin|>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="<|begin|>")
    tokenizer.chat_template = template
    return tokenizer


def scored_text(tokenizer, ids: list[int], mask: list[bool]) -> list[str]:
    """The runs of scored tokens, decoded with their special tokens."""
    runs: list[list[int]] = []
    for i, (token, scored) in enumerate(zip(ids, mask, strict=True)):
        if scored and i and mask[i - 1]:
            runs[-1].append(token)
        elif scored:
            runs.append([token])
    return [tokenizer.decode(run) for run in runs]


def test_text_parts_are_the_text_that_they_make():
    parts = [{"role": m["role"], "content": [{"type": "text", "text": t} for t in m["content"]]} for m in TALK]
    for template in (LLAMA3, CHATML_SHORT_MARKS):
        tokenizer = make_tokenizer(template)
        assert prompt_ids(tokenizer, parts[:1]) == prompt_ids(tokenizer, TALK[:1])
        assert assistant_examples(tokenizer, parts) == assistant_examples(tokenizer, TALK)


def test_an_end_of_text_behind_the_last_turn_alone_is_no_rewriting():
    """Phi-3's template."""
    tokenizer = make_tokenizer(CHATML + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}")
    ((ids, mask),) = assistant_examples(tokenizer, TALK)
    ((without, mask_without),) = assistant_examples(make_tokenizer(CHATML), TALK)
    assert tokenizer.decode(ids) == tokenizer.decode(without) + "<|endoftext|>"
    # The last turn goes on to the end of text, over the line break before it.
    assert mask == [*mask_without[:-1], True, True]


def test_string_prompts_get_the_begin_token_and_no_system_prompt():
    tokenizer = make_tokenizer(CHATML, bos=True)
    ids = prompt_ids(tokenizer, "two plus", system_prompt="Be brief.")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "two plus"


@pytest.mark.parametrize(("template", "bos"), [(CHATML, False), (LLAMA3, True)])
def test_message_prompts_are_the_templates_own_tokens(template, bos):
    tokenizer = make_tokenizer(template, bos=bos)
    expected = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = prompt_ids(tokenizer, TALK[:1])
    assert ids == expected
    assert ids.count(tokenizer.bos_token_id) == int(bos)  # the template writes it: not a second time


def test_system_prompt_comes_first_unless_there_is_one():
    tokenizer = make_tokenizer(CHATML)
    text = tokenizer.decode(prompt_ids(tokenizer, TALK[:1], system_prompt="Be brief."))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    own = [{"role": "system", "content": "Mine."}, TALK[0]]
    assert with_system_prompt(own, "Be brief.") == own
    assert with_system_prompt(TALK, None) is TALK


def test_chat_template_kwargs_reach_the_template():
    tokenizer = make_tokenizer("{{ mode }}{{ messages[0]['content'] }}")
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "two"}], chat_template_kwargs={"mode": "plus "})
    assert tokenizer.decode(ids) == "plus two"


def test_conversation_without_template_is_refused_with_the_fix():
    with pytest.raises(UserError, match=r"model\.chat_template"):
        prompt_ids(make_tokenizer(None), TALK[:1])


@pytest.mark.parametrize("template", ["{{ raise_exception('no such role') }}", "{{ messages[0]['content'] + 1 }}"])
def test_template_errors_name_the_row_and_keep_the_cause(template):
    with pytest.raises(UserError, match=r"row 7: .*conversation of user") as caught:
        render(make_tokenizer(template), TALK[:1], row=7)
    assert caught.value.__cause__ is not None


def test_completion_text_keeps_spaces_and_drops_special_tokens():
    tokenizer = make_tokenizer(CHATML)
    text = "It is four . do n't ,  née 🙂"
    ids = tokenizer(text)["input_ids"] + [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert completion_text(tokenizer, ids) == text


def test_set_chat_template(tmp_path):
    tokenizer = make_tokenizer(None)
    (tmp_path / "t.jinja").write_text(CHATML_SHORT_MARKS)
    set_chat_template(tokenizer, tmp_path / "t.jinja")
    assert tokenizer.chat_template == CHATML_SHORT_MARKS


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (" \n", "empty"), ("{{ 1 }}\n{% for m in %}", "line 2"), (b"\xff\xfe\xff", "cannot read")],
)
def test_bad_chat_template_files_change_nothing(tmp_path, content, message):
    tokenizer, path = make_tokenizer(CHATML), tmp_path / "t.jinja"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        set_chat_template(tokenizer, path)
    assert tokenizer.chat_template == CHATML


def test_stop_tokens_are_those_that_the_template_writes():
    tokenizer = make_tokenizer(CHATML)
    eos, im_end, eot = (tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>", "<|eot_id|>"))
    assert stop_token_ids(tokenizer) == tuple(
        sorted({eos, im_end})
    )  # <|eot_id|> exists, but this template never ends so
    tokenizer.chat_template = LLAMA3
    assert stop_token_ids(tokenizer) == tuple(sorted({eos, eot}))
    tokenizer.chat_template = None
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=[9, 8])) == tuple(sorted({eos, 8, 9}))
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=9), extra=[11]) == tuple(sorted({eos, 9, 11}))
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=None)) == (eos,)


@pytest.mark.parametrize("extra", [-1, 10**6])
def test_stop_tokens_outside_the_vocabulary_are_refused(extra):
    with pytest.raises(UserError, match=str(extra)):
        stop_token_ids(make_tokenizer(CHATML), extra=[extra])


@pytest.mark.parametrize("template", [CHATML, CHATML_SHORT_MARKS])
def test_assistant_turns_are_scored_with_their_end_token(template):
    tokenizer = make_tokenizer(template)
    ((ids, mask),) = assistant_examples(tokenizer, TALK)
    assert ids == tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]
    # The second answer begins with line breaks that may share a token with the header's; what counts is the text.
    assert [t.lstrip("\n") for t in scored_text(tokenizer, ids, mask)] == [
        "It is four. <|im_end|>",
        "Five, née cinq 🙂<|im_end|>",
    ]


def test_a_template_without_end_token_ends_turns_by_its_line_break():
    tokenizer = make_tokenizer(PLAIN)
    ((ids, mask),) = assistant_examples(
        tokenizer, [{"role": "user", "content": "two"}, {"role": "assistant", "content": "four"}]
    )
    assert "".join(scored_text(tokenizer, ids, mask)).endswith("four\n")


def test_a_template_that_rewrites_history_gives_one_example_per_turn():
    tokenizer = make_tokenizer(FORGETFUL)
    talk = [
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "<think>hm</think>four"},
        {"role": "user", "content": "three?"},
        {"role": "assistant", "content": "<think>oh</think>five"},
    ]
    examples = assistant_examples(tokenizer, talk)
    assert [scored_text(tokenizer, *e) for e in examples] == [
        ["<think>hm</think>four<|im_end|>"],
        ["<think>oh</think>five<|im_end|>"],
    ]
    for i, (ids, mask) in enumerate(examples):  # each turn follows exactly what the model is shown when it writes it
        assert ids[: mask.index(True)] == prompt_ids(tokenizer, talk[: 2 * i + 1])


def test_a_turn_that_does_not_continue_its_prompt_is_refused():
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'")
    with pytest.raises(UserError, match=r"row 3: .*turn 1 .*<think>") as caught:
        assistant_examples(make_tokenizer(template), TALK, row=3)
    assert "generation" in caught.value.fix


def test_a_conversation_that_begins_with_the_assistant_is_refused():
    with pytest.raises(UserError, match=r"row 0: .*begins with an assistant"):
        assistant_examples(make_tokenizer(CHATML), TALK[1:], row=0)


def test_slow_tokenizers_are_refused_for_masks():
    slow = SimpleNamespace(is_fast=False, chat_template=CHATML, name_or_path="slow")
    with pytest.raises(UserError, match="fast tokenizer"):
        assistant_examples(slow, TALK)


def test_a_turn_that_ends_in_a_character_of_several_tokens_is_scored_whole():
    template = PLAIN.replace("m['content'] + '\n'", "m['content']")
    marked = template.replace(
        "{{ m['role'] + ': ' + m['content'] }}",
        "{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}",
    )
    assert "generation %}{{" in marked
    talk = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "four 🙂"},
        {"role": "user", "content": "!"},
    ]
    for each in (template, marked):
        tokenizer = make_tokenizer(each)
        ((ids, mask),) = assistant_examples(tokenizer, talk)
        assert "".join(scored_text(tokenizer, ids, mask)).strip() == "four 🙂"
