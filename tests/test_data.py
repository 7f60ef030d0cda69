"""Data sets: every source and format, every fault, and token-for-token equality with TRL's own preparation."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.rl.columns import check_columns
from tandem.rl.errors import UserError
from tandem.rl.examples import load_labelled, load_preferences, load_supervised
from tandem.rl.prompts import PromptSampler, load_prompts
from tandem.rl.rows import load_rows

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
CORPUS = "What is two plus two? It is four.\n\nFive is the answer to two and three. née 🙂 \\boxed{4} 12 + 3 ="
WORDS = CORPUS.split(" ")


def unmarked(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def forgetful(template: str) -> str:
    """The template with the reasoning of all turns but the last dropped, and without markers."""
    return unmarked(template).replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}"
        "{% set m = {'role': 'assistant', 'content': m['content'].split('|')[-1]} %}{% endif %}",
    )


@pytest.fixture(scope="module", params=[(CHATML, False), (LLAMA3, True)], ids=["chatml", "llama3"])
def tokenizer(request):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[*SPECIALS, "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    template, bos = request.param
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", inner.token_to_id("<|begin|>"))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="<|begin|>")
    made.chat_template = template
    return made


@pytest.fixture
def plain_template(tokenizer):
    """The same tokenizer with its template's generation markers taken out."""
    kept = tokenizer.chat_template
    tokenizer.chat_template = unmarked(kept)
    yield tokenizer
    tokenizer.chat_template = kept


def sentence(rng: random.Random, n: int = 6) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, n))).strip() or "two"


def talk(rng: random.Random, turns: int) -> list[dict[str, str]]:
    head = [{"role": "system", "content": sentence(rng)}] if rng.random() < 0.5 else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": sentence(rng)} for i in range(turns)]


def say(content: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


# --- sources ---------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "two?", "answer": 2}, {"prompt": 'née 🙂,\n"three"', "answer": 3}]


def write(folder, kind: str, rows: list[dict]):
    """The rows as a source of the given kind; the name that loads them."""
    if kind == "jsonl":
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif kind == "json-lines":
        path = folder / "lines.json"
        path.write_text("\n".join(json.dumps(r) for r in rows))
    elif kind == "json":
        path = folder / "rows.json"
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        path = folder / "rows.csv"
        datasets.Dataset.from_list(rows).to_csv(path)
    elif kind == "parquet":
        path = folder / "rows.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "saved":
        path = folder / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == "saved-splits":
        path = folder / "splits"
        parts = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
        datasets.DatasetDict(parts).save_to_disk(path)
    elif kind == "folder":
        path = folder / "files"
        path.mkdir(exist_ok=True)
        write(path, "jsonl", rows)
        (path / "rows.jsonl").rename(path / "train.jsonl")
        write(path, "jsonl", rows[:1])
        (path / "rows.jsonl").rename(path / "test.jsonl")
    else:
        path = folder / "make.py"
        path.write_text(f"def rows(split):\n    return {rows!r}[: 1 if split == 'test' else None]\n")
        return f"{path}:rows"
    return str(path)


KINDS = ["jsonl", "json-lines", "json", "csv", "parquet", "saved", "saved-splits", "folder", "function"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_rows(tmp_path, kind):
    name = write(tmp_path, kind, ROWS)
    assert list(load_rows(name)) == ROWS
    assert list(load_rows(name, max_examples=1)) == ROWS[:1]
    assert list(load_rows(name, max_examples=99)) == ROWS


@pytest.mark.parametrize("kind", ["saved-splits", "folder", "function"])
def test_splits(tmp_path, kind):
    name = write(tmp_path, kind, ROWS)
    assert list(load_rows(name, split="test")) == ROWS[:1]


@pytest.mark.parametrize("kind", ["saved-splits", "folder"])
def test_a_missing_split_names_the_existing_ones(tmp_path, kind):
    with pytest.raises(UserError, match=r"(?s)'valid'.*train.*test"):
        load_rows(write(tmp_path, kind, ROWS), split="valid")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder", "function"])
def test_a_changed_file_gives_its_new_rows(tmp_path, kind, monkeypatch):
    """Same size and same time of change: what caches go by must not matter."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    name = write(tmp_path, kind, ROWS)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    for path in files:
        os.utime(path, (10**9, 10**9))
    assert load_rows(name)[0]["answer"] == 2
    write(tmp_path, kind, [{"prompt": "two?", "answer": 7}, ROWS[1]])
    for path in files:
        os.utime(path, (10**9, 10**9))
    assert load_rows(name)[0]["answer"] == 7


def test_local_sources_leave_nothing_in_the_shared_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for kind in KINDS:
        load_rows(write(tmp_path, kind, ROWS))
    assert not cache.exists() or not any(p.is_file() for p in cache.rglob("*"))


def test_rows_of_different_keys_and_types_stay_as_written(tmp_path):
    rows = [
        {"prompt": say("a"), "answer": 1},
        {"prompt": [*say("b"), {"role": "tool", "content": "4", "name": "sum"}], "answer": "x", "extra": {"k": [1]}},
    ]
    loaded = load_rows(write(tmp_path, "jsonl", rows))
    assert [r["answer"] for r in loaded] == [1, "x"]
    assert [r["extra"] for r in loaded] == [None, {"k": [1]}]


def test_a_function_gets_its_arguments_and_may_return_a_generator_or_a_dataset(tmp_path):
    (tmp_path / "helper_of_rows.py").write_text("def text(i): return f'row {i}'\n")
    source = tmp_path / "many.py"
    source.write_text(
        "import datasets, dataclasses\n"
        "@dataclasses.dataclass\nclass Row:\n    prompt: str\n"
        "def lazy(n, **kwargs):\n"
        "    from helper_of_rows import text\n"
        "    for i in range(n): yield {'prompt': text(i), 'split': kwargs['split']}\n"
        "def no_split(n=1): return [dataclasses.asdict(Row('x'))] * n\n"
        "def ready(): return datasets.Dataset.from_dict({'prompt': ['d']})\n"
        "def streamed(): return ready().to_iterable_dataset()\n"
        "def dictionary(): return datasets.DatasetDict(train=ready())\n"
    )
    rows = load_rows(f"{source}:lazy", split="dev", kwargs={"n": 2})
    assert list(rows) == [{"prompt": "row 0", "split": "dev"}, {"prompt": "row 1", "split": "dev"}]
    assert len(load_rows(f"{source}:no_split", kwargs={"n": 3})) == 3
    for name in ("ready", "streamed", "dictionary"):
        assert list(load_rows(f"{source}:{name}")) == [{"prompt": "d"}]


FUNCTION_FAULTS = {
    "def rows():\n    x = 1\n    return [{}['prompt']]\n": r"bad\.py:3: KeyError",
    "import no_such_module_anywhere\n": r"bad\.py:1: ModuleNotFoundError",
    "def rows(:\n": r"bad\.py:1: SyntaxError",
    "import sys\ndef rows(): sys.exit(3)\n": r"bad\.py:2: SystemExit",
    "def rows():\n    yield {'prompt': 'a'}\n    raise RuntimeError('gone')\n": r"bad\.py:3: RuntimeError: gone",
    "def rows(): return 5\n": "returned 5",
    "def rows(): return 'abc'\n": "returned 'abc'",
    "def rows(): return None\n": "returned None",
    "def rows(): return ['a']\n": "row 0 .*'a', not a dict",
    "def rows(): return {'prompt': ['a']}\n": "not a dict of columns",
    "def rows(): return [{1: 'a'}]\n": "not a dict of columns",
    "def rows(): return [{'prompt': 'a'}, {'prompt': object()}]\n": "row 1 .*object.* is no data",
    "def rows(): return [{'prompt': {1, 2}}]\n": "of type set is no data",
    "def rows(): return [{'prompt': '\\ud800'}]\n": "do not form columns.*surrogates",
    "def rows(): return []\n": "no rows",
    "def row(): return []\n": "(?s)no function 'rows'.*did you mean 'row'",
    "def rows(n): return []\n": "(?s)cannot be called with.*'n'",
    "rows = 3\n": "no function 'rows'",
}


@pytest.mark.parametrize(("source", "message"), FUNCTION_FAULTS.items())
def test_what_goes_wrong_in_a_function_is_reported(tmp_path, source, message):
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(UserError, match=message):
        load_rows(f"{path}:rows")


FILE_FAULTS = {
    "a.jsonl": ('{"prompt": 1}\n{"prompt": }\n', "line 2: not valid JSON"),
    "b.jsonl": ('{"prompt": 1}\n\n[1]\n', r"line 3 is \[1\], not an object"),
    "c.json": ('{"a": [1,\n 2}', "line 2: not valid JSON"),
    "d.json": ('[{"prompt": "x"}, 3]', "row 1 of .* is 3"),
    "e.jsonl": ("", "no rows"),
    "f.json": ("[]", "no rows"),
    "g.csv": ("prompt,answer\na,1\nb,2,3\n", "line 3: 3 fields, but the header has 2"),
    "h.csv": ("prompt,answer\na\n", "line 2: 1 fields"),
    "i.csv": ("", "is empty"),
    "j.csv": ("prompt,answer\n", "no rows"),
    "k.csv": ('prompt,answer\n"a,1\n', "not valid CSV"),
    "l.parquet": ("not parquet", "cannot read .*Parquet"),
    "m.jsonl": (b'{"prompt": "\xff"}', "cannot read .*UnicodeDecodeError"),
    "n.txt": ("x", "unknown file type"),
    "o.py": ("x", "without a function"),
}


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_unreadable_files_are_reported_with_their_line(tmp_path, name):
    content, message = FILE_FAULTS[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_rows(str(tmp_path / name))


def test_missing_files_name_the_nearest_one(tmp_path):
    write(tmp_path, "jsonl", ROWS)
    with pytest.raises(UserError, match=r"(?s)no file.*did you mean .*rows\.jsonl"):
        load_rows(str(tmp_path / "row.jsonl"))
    with pytest.raises(UserError, match="no file"):
        load_rows(f"{tmp_path}/none.py:rows")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load split 'train' of folder"):
        load_rows(str(tmp_path / "empty"))


def test_an_unreachable_hub_is_reported_with_cause_and_fix(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"(?s)eval\.dataset_name.*'someone/something'.*reach.*local file"):
        load_rows("someone/something", what="eval.dataset_name")


def test_hub_data_sets_get_config_and_split(monkeypatch):
    calls = []

    def fake(*args, **kwargs):
        calls.append((args, kwargs))
        if kwargs["split"] == "nosplit":
            raise ValueError("Unknown split \"nosplit\". Should be one of ['train'].")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert list(load_rows("gsm8k", config_name="main", split="test")) == ROWS
    assert calls == [(("gsm8k", "main"), {"split": "test"})]
    with pytest.raises(UserError, match=r"Should be one of \['train'\]"):
        load_rows("gsm8k", split="nosplit")


def test_arguments_for_a_source_that_takes_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="takes no dataset_kwargs"):
        load_rows(write(tmp_path, "jsonl", ROWS), kwargs={"n": 1})


# --- columns ---------------------------------------------------------------------------------------------------------

A = say("four", "assistant")
GOOD = [
    ("rl", {"prompt": "x"}),
    ("rl", {"prompt": say("x"), "answer": None}),
    ("rl", {"prompt": [*say("x"), *A, *say("4", "tool")]}),
    ("rl", {"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
    ("rl", {"prompt": [*say("x"), {"role": "assistant", "content": None, "tool_calls": ["c"]}, *say("4", "tool")]}),
    ("sft", {"messages": say("x") + A}),
    ("sft", {"prompt": "x", "completion": "y"}),
    ("sft", {"prompt": say("x"), "completion": A}),
    ("sft", {"prompt": "id of it", "messages": say("x") + A}),
    ("sft", {"text": "x"}),
    ("sft", {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}),
    ("preference", {"prompt": "x", "chosen": "y", "rejected": "z"}),
    ("preference", {"prompt": say("x"), "chosen": A, "rejected": A}),
    ("preference", {"chosen": say("x") + A, "rejected": say("x") + A}),
    ("preference", {"prompt": "x", "chosen": say("x") + A, "rejected": say("x") + A}),
    ("labelled", {"prompt": "x", "completion": "y", "label": True}),
    ("labelled", {"prompt": say("x"), "completion": A, "label": False}),
    ("labelled", {"prompt": "x", "chosen": "y", "rejected": "z"}),
    ("labelled", {"prompt": "x", "chosen": say("x") + A, "rejected": say("x") + A}),
]


@pytest.mark.parametrize(("kind", "row"), GOOD)
def test_right_rows_pass(kind, row):
    check_columns(datasets.Dataset.from_list([row] * 3, on_mixed_types="use_json"), kind)


MISSING = [
    ("rl", {"question": "x", "answer": "y"}, "rename `question` to `prompt`"),
    ("rl", {"Prompt": "x"}, "rename `Prompt` to `prompt`"),
    ("rl", {"promt": "x"}, "rename `promt` to `prompt`"),
    ("rl", {"foo": "x", "bar": "y"}, "columns are `foo`, `bar`(?s:.*)FUNCTION"),
    (
        "sft",
        {"instruction": "x", "output": "y"},
        "rename `instruction` to `prompt` and rename `output` to `completion`",
    ),
    ("sft", {"prompt": "x", "response": "y"}, "Fix: rename `response` to `completion`"),
    ("preference", {"question": "x", "chosen": "y", "rejected": "z"}, None),
    ("preference", {"prompt": "x", "accepted": "y", "rejected": "z"}, "rename `accepted` to `chosen`"),
]


@pytest.mark.parametrize(("kind", "row", "message"), MISSING)
def test_missing_columns_name_the_nearest(kind, row, message):
    data = datasets.Dataset.from_list([row])
    if message is None:  # an implicit prompt is allowed
        check_columns(data, kind)
        return
    with pytest.raises(UserError, match=message):
        check_columns(data, kind)


WRONG = [
    ("rl", {"prompt": "x"}, {"prompt": None}, "row 1, column 'prompt': no value: None"),
    ("rl", {"prompt": "x"}, {"prompt": " \n"}, "row 1, .*an empty string"),
    ("rl", {"prompt": "x"}, {"prompt": 5}, "row 1, .*int instead of a string or a list of messages: 5"),
    ("rl", {"prompt": "x"}, {"prompt": say("x")}, "row 1 mixes strings and messages"),
    ("rl", {"prompt": say("x")}, {"prompt": []}, "row 1, .*an empty list of messages"),
    ("rl", {"prompt": say("x")}, {"prompt": say("x") + A}, "row 1, .*ends with an assistant turn"),
    (
        "rl",
        {"prompt": [{"from": "human", "value": "x"}]},
        {"prompt": [{"from": "gpt", "value": "x"}]},
        "row 1, .*ends with an assistant",
    ),
    ("rl", {"prompt": say("x")}, {"prompt": [{"content": "x"}]}, "row 1, .*message 0 has no role"),
    ("rl", {"prompt": say("x")}, {"prompt": [*say("x"), {"role": "user"}]}, "row 1, .*message 1 has no content"),
    ("rl", {"prompt": say("x")}, {"prompt": [{"role": "user", "content": 3}]}, "message 0 has content of type int"),
    ("rl", {"prompt": say("x")}, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "type 'image'"),
    ("rl", {"prompt": say("x")}, {"prompt": ["x"]}, "message 0 is str, not a mapping"),
    ("sft", {"messages": A}, {"messages": "x"}, "row 1, .*a string instead of a list of messages"),
    ("sft", {"text": "x"}, {"text": say("x")}, "row 1, .*a list instead of a string"),
    ("sft", {"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": ""}, "row 1, column 'completion'"),
    ("sft", {"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": A}, "row 1 mixes"),
    (
        "preference",
        {"prompt": "x", "chosen": "y", "rejected": "z"},
        {"prompt": "x", "chosen": "y", "rejected": A},
        "row 1 mixes",
    ),
    (
        "labelled",
        {"prompt": "x", "chosen": "y", "rejected": "z"},
        {"prompt": "x", "chosen": "y", "rejected": ""},
        "row 1",
    ),
]


@pytest.mark.parametrize(("kind", "good", "bad", "message"), WRONG)
def test_the_first_wrong_row_is_named(kind, good, bad, message):
    with pytest.raises(UserError, match=message):
        check_columns(datasets.Dataset.from_list([good, bad, bad], on_mixed_types="use_json"), kind, "data.x")


def test_wrong_rows_are_found_beyond_the_first_batch():
    rows = [{"prompt": "x"}] * 2345 + [{"prompt": None}]
    with pytest.raises(UserError, match="row 2345"):
        check_columns(datasets.Dataset.from_list(rows), "rl")


# --- prompts ---------------------------------------------------------------------------------------------------------


def trl_prompt_ids(tokenizer, prompts, **kwargs):
    from trl.trainer.grpo_trainer import GRPOTrainer

    stand_in = SimpleNamespace(
        processing_class=tokenizer,
        _is_vlm=False,
        environment_factories=None,
        tools=None,
        chat_template=None,
        chat_template_kwargs=kwargs,
    )
    return GRPOTrainer._tokenize_prompts(stand_in, prompts)[0]


@pytest.mark.parametrize("conversational", [False, True])
def test_prompts_are_trls_own_tokens(tokenizer, conversational):
    rng = random.Random(0)
    prompts = [talk(rng, rng.choice([1, 3])) if conversational else sentence(rng) for _ in range(40)]
    rows = [{"prompt": p, "answer": i} for i, p in enumerate(prompts)]
    loaded, dropped = load_prompts(datasets.Dataset.from_list(rows), tokenizer)
    assert [p.ids for p in loaded] == trl_prompt_ids(tokenizer, prompts)
    assert [p.prompt for p in loaded] == prompts
    assert [(p.index, p.columns) for p in loaded] == [(i, {"answer": i}) for i in range(40)]
    assert dropped == 0


def test_system_prompt_and_template_variables(tokenizer):
    rows = datasets.Dataset.from_list([{"prompt": say("two?")}])
    (prompt,), _ = load_prompts(rows, tokenizer, system_prompt="Be brief.")
    assert [prompt.ids] == trl_prompt_ids(tokenizer, [say("Be brief.", "system") + say("two?")])
    assert prompt.prompt == say("two?")  # rewards get the row as it was written


def test_keys_that_only_other_rows_have_do_not_appear(tokenizer):
    rows = [{"prompt": say("x")}, {"prompt": [{"role": "user", "content": "y", "name": "Ann"}]}]
    loaded, _ = load_prompts(datasets.Dataset.from_list(rows), tokenizer)
    assert [p.prompt for p in loaded] == [r["prompt"] for r in rows]


def test_long_prompts_are_dropped_and_counted(tokenizer):
    rows = [{"prompt": "two " * n} for n in (1, 30, 2, 40)]
    data = datasets.Dataset.from_list(rows)
    everything, _ = load_prompts(data, tokenizer)
    lengths = [len(p.ids) for p in everything]
    kept, dropped = load_prompts(data, tokenizer, max_prompt_length=lengths[2])
    assert [p.index for p in kept] == [0, 2]
    assert dropped == 2
    with pytest.raises(
        UserError, match=rf"all 4 prompts .*(?s:.*)longest {lengths[3]}(?s:.*)max_prompt_length to {lengths[3]}"
    ):
        load_prompts(data, tokenizer, max_prompt_length=1)


# --- order -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 30),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
    sizes=st.lists(st.integers(0, 70), max_size=8),
    start=st.integers(0, 100),
)
def test_sampler_reads_the_same_stream_from_anywhere(rows, seed, shuffle, sizes, start):
    whole = PromptSampler(rows, seed=seed, shuffle=shuffle).take(0, start + sum(sizes))
    sampler, position = PromptSampler(rows, seed=seed, shuffle=shuffle), start
    for n in sizes:
        assert sampler.take(position, n) == whole[position : position + n]
        position += n
    for epoch in range(len(whole) // rows):  # every row once per epoch
        assert Counter(whole[epoch * rows : (epoch + 1) * rows]) == Counter(range(rows))


def test_sampler_orders_differ_by_epoch_and_seed():
    sampler, other = PromptSampler(50, seed=1, shuffle=True), PromptSampler(50, seed=2, shuffle=True)
    orders = [sampler.take(50 * e, 50) for e in range(4)] + [other.take(0, 50), list(range(50))]
    assert len({tuple(o) for o in orders}) == len(orders)
    assert PromptSampler(5, seed=1, shuffle=False).take(3, 7) == [3, 4, 0, 1, 2, 3, 4]


def test_sampler_order_is_pinned():
    """Resumed runs need the order of the run that wrote the checkpoint, under any version and machine."""
    draw = random.Random("7-1").random
    keys = [draw() for _ in range(6)]
    expected = sorted(range(6), key=keys.__getitem__)
    assert PromptSampler(6, seed=7, shuffle=True).take(6, 6) == expected == PINNED_ORDER


PINNED_ORDER = [5, 3, 1, 0, 4, 2]


def test_sampler_needs_rows():
    with pytest.raises(ValueError, match="at least one row"):
        PromptSampler(0, seed=0, shuffle=True)


# --- supervised ------------------------------------------------------------------------------------------------------


def trl_sft(tokenizer, rows, *, completion_only=True, assistant_only=False, max_length=None):
    """(ids, labels) as TRL's SFT trainer prepares them."""
    from trl.trainer.sft_trainer import SFTTrainer

    stand_in = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=completion_only)
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=assistant_only,
        max_length=max_length,
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    data = datasets.Dataset.from_list(rows)
    prepared = SFTTrainer._prepare_dataset(stand_in, data, tokenizer, args, False, None, "train")
    return [(row["input_ids"], row["labels"]) for row in prepared]


def labels(sequence) -> tuple[list[int], list[int]]:
    ids = sequence.prompt_ids + sequence.completion_ids
    scored = [False] * len(sequence.prompt_ids) + sequence.mask
    return ids, [i if s else -100 for i, s in zip(ids, scored, strict=True)]


def unpredicted_first(pairs):
    """TRL labels the first token too, and its loss then shifts that label away."""
    return [(ids, [-100, *lab[1:]]) for ids, lab in pairs]


def supervised_rows(shape: str) -> list[dict]:
    rng = random.Random(shape)
    make = {
        "text": lambda: {"text": sentence(rng, 12) + rng.choice(["", "<|endoftext|>"])},
        "strings": lambda: {
            "prompt": sentence(rng),
            "completion": " " + sentence(rng) + rng.choice(["", "<|endoftext|>"]),
        },
        "merging": lambda: {"prompt": sentence(rng) + " ", "completion": sentence(rng)},
        "turns": lambda: {"prompt": talk(rng, rng.choice([1, 3])), "completion": say(sentence(rng), "assistant")},
        "messages": lambda: {"messages": talk(rng, rng.choice([2, 4]))},
    }[shape]
    return [make() for _ in range(30)]


@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("shape", ["text", "strings", "merging", "turns"])
def test_supervised_examples_are_trls_own_tokens(tokenizer, shape, completion_only, max_length):
    rows = supervised_rows(shape)
    sequences, cut = load_supervised(
        datasets.Dataset.from_list(rows), tokenizer, completion_only_loss=completion_only, max_length=max_length
    )
    expected = trl_sft(tokenizer, rows, completion_only=completion_only, max_length=max_length)
    assert [labels(s) for s in sequences] == unpredicted_first(expected)
    whole = trl_sft(tokenizer, rows, completion_only=completion_only)
    assert cut == (0 if max_length is None else sum(len(ids) > max_length for ids, _ in whole))
    assert all(s.mask[0] for s in sequences)  # the unscored head is the prompt


@pytest.mark.parametrize("max_length", [None, 30])
def test_assistant_masks_are_trls_own(tokenizer, max_length):
    rows = supervised_rows("messages")
    sequences, _ = load_supervised(datasets.Dataset.from_list(rows), tokenizer, max_length=max_length)
    expected = trl_sft(tokenizer, rows, assistant_only=True, max_length=max_length)
    assert [labels(s) for s in sequences] == unpredicted_first(expected)


def test_masks_without_markers_equal_those_with(plain_template):
    rows = supervised_rows("messages")
    data = datasets.Dataset.from_list(rows)
    by_prefixes, _ = load_supervised(data, plain_template)
    plain = plain_template.chat_template
    plain_template.chat_template = CHATML if "im_start" in plain else LLAMA3
    by_markers, _ = load_supervised(data, plain_template)
    assert by_prefixes == by_markers
    assert any(sum(not m for m in s.mask) > 3 for s in by_prefixes)  # user turns between the scored ones


def test_whole_conversations_can_be_scored(tokenizer):
    rows = supervised_rows("messages")
    sequences, _ = load_supervised(datasets.Dataset.from_list(rows), tokenizer, assistant_only_loss=False)
    assert [labels(s) for s in sequences] == unpredicted_first(trl_sft(tokenizer, rows))


def test_tool_output_inside_a_completion_carries_no_loss(tokenizer):
    completion = [*say("call", "assistant"), *say("secret", "tool"), *say("four", "assistant")]
    data = datasets.Dataset.from_list([{"prompt": say("two?"), "completion": completion}])
    (sequence,), _ = load_supervised(data, tokenizer)
    scored = tokenizer.decode([i for i, m in zip(sequence.completion_ids, sequence.mask, strict=True) if m])
    assert "call" in scored
    assert "four" in scored
    assert "secret" not in scored
    (sequence,), _ = load_supervised(data, tokenizer, assistant_only_loss=False)
    assert all(sequence.mask)


def test_turns_of_the_prompt_carry_no_loss_where_history_is_rewritten(tokenizer):
    """The turn of the prompt is longer as the model wrote it than the prompt is with its reasoning dropped."""
    kept = tokenizer.chat_template
    prompt = [*say("two?"), *say("hm" * 50 + "|four", "assistant"), *say("and three?")]
    completion = [*say("oh|call", "assistant"), *say("secret", "tool"), *say("five", "assistant")]
    data = datasets.Dataset.from_list([{"prompt": prompt, "completion": completion}])
    scored = []
    try:
        for template in (forgetful(kept), kept):
            tokenizer.chat_template = template
            for s in load_supervised(data, tokenizer)[0]:
                ids = [i for i, m in zip(s.completion_ids, s.mask, strict=True) if m]
                scored.append(tokenizer.decode(ids, skip_special_tokens=True))
    finally:
        tokenizer.chat_template = kept
    assert scored == ["oh|call", "five", "oh|callfive"]


def test_sharegpt_conversations_become_roles(tokenizer):
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    rows = supervised_rows("messages")
    shared = [
        {"conversations": [{"from": speakers[m["role"]], "value": m["content"]} for m in r["messages"]]} for r in rows
    ]
    expected, _ = load_supervised(datasets.Dataset.from_list(rows), tokenizer)
    assert load_supervised(datasets.Dataset.from_list(shared), tokenizer)[0] == expected


def test_examples_without_anything_scored_are_dropped_and_counted(tokenizer):
    rows = [{"messages": say("two?")}, {"messages": say("two?") + A}]
    sequences, dropped = load_supervised(datasets.Dataset.from_list(rows), tokenizer)
    assert len(sequences) == dropped == 1
    with pytest.raises(UserError, match="none of the 1 examples"):
        load_supervised(datasets.Dataset.from_list(rows[:1]), tokenizer)


def test_rewritten_history_becomes_one_example_per_turn(tokenizer, caplog):
    kept = tokenizer.chat_template
    rows = [{"messages": say("a") + say("hm|four", "assistant") + say("b") + say("oh|five", "assistant")}]
    try:
        tokenizer.chat_template = forgetful(kept)
        sequences, _ = load_supervised(datasets.Dataset.from_list(rows), tokenizer)
    finally:
        tokenizer.chat_template = kept
    assert len(sequences) == 2
    assert ["hm|four" in tokenizer.decode(s.completion_ids) for s in sequences] == [True, False]
    assert "hm" not in tokenizer.decode(sequences[1].prompt_ids)
    assert "1 of 1 conversations became one example per assistant turn" in caplog.text


def test_prompts_whose_tokens_merge_with_the_completion_are_reported(tokenizer, caplog):
    load_supervised(datasets.Dataset.from_list([{"prompt": "is two ", "completion": "plus two"}]), tokenizer)
    assert "in 1 of 1 rows the prompt's last tokens change" in caplog.text
    caplog.clear()
    load_supervised(datasets.Dataset.from_list([{"prompt": "is two", "completion": " plus two"}]), tokenizer)
    assert not caplog.text


# --- preferences -----------------------------------------------------------------------------------------------------


def trl_dpo(tokenizer, rows, max_length=None):
    """(ids, completion mask) of chosen and rejected as TRL's DPO trainer and its collator prepare them."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    stand_in = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    prepared = DPOTrainer._prepare_dataset(stand_in, datasets.Dataset.from_list(rows), tokenizer, args, "train")
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length)
    pairs = []
    for row in prepared:
        batch = collator([row])
        real = batch["attention_mask"].bool()
        pairs.append(
            tuple(
                (batch["input_ids"][k][real[k]].tolist(), batch["completion_mask"][k][real[k]].tolist()) for k in (0, 1)
            )
        )
    return pairs


def preference_rows(shape: str) -> list[dict]:
    rng = random.Random(shape)

    def row():
        prompt, answers = talk(rng, 3), (sentence(rng) + " yes", sentence(rng) + " no")
        if shape == "strings":
            return {"prompt": sentence(rng), "chosen": " " + answers[0], "rejected": " " + answers[1]}
        if shape == "merging":
            # The space merges with a word that follows, but not with a space: with either answer, both, or none.
            first, second = (rng.choice(["", " "]) for _ in range(2))
            return {"prompt": sentence(rng) + " ", "chosen": first + answers[0], "rejected": second + answers[1]}
        if shape == "implicit strings":
            head = sentence(rng) + " so"
            return {"chosen": f"{head} X {answers[0]}", "rejected": f"{head} Y {answers[1]}"}
        chosen, rejected = (say(a, "assistant") for a in answers)
        if shape == "implicit":
            return {"chosen": prompt + chosen, "rejected": prompt + rejected}
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    return [row() for _ in range(30)]


@pytest.mark.parametrize("max_length", [None, 40, 75])
@pytest.mark.parametrize("shape", ["strings", "merging", "implicit strings", "turns", "implicit"])
def test_preference_pairs_are_trls_own_tokens(tokenizer, shape, max_length):
    rows = preference_rows(shape)
    expected = trl_dpo(tokenizer, rows, max_length)
    if not expected:
        with pytest.raises(UserError, match="none of the 30 pairs"):
            load_preferences(datasets.Dataset.from_list(rows), tokenizer, max_length=max_length)
        return
    pairs = load_preferences(datasets.Dataset.from_list(rows), tokenizer, max_length=max_length)

    def flat(s):
        return s.prompt_ids + s.completion_ids, [0] * len(s.prompt_ids) + [int(m) for m in s.mask]

    assert [tuple(flat(s) for s in pair) for pair in pairs] == expected
    for chosen, rejected in pairs:
        assert chosen.prompt_ids == rejected.prompt_ids
        assert chosen.family == rejected.family == chosen.unit == rejected.unit >= 0
    if max_length is None:
        assert [chosen.unit for chosen, _ in pairs] == list(range(30))


def test_a_string_prompt_beside_whole_conversations_is_implied(tokenizer):
    rows = preference_rows("implicit")
    expected = load_preferences(datasets.Dataset.from_list(rows), tokenizer)
    named = [{"prompt": "whatever", **r} for r in rows]
    assert load_preferences(datasets.Dataset.from_list(named), tokenizer) == expected


def test_pairs_without_room_for_an_answer(tokenizer, caplog):
    rows = [{"prompt": "two " * n, "chosen": "x", "rejected": "y"} for n in (1, 50)]
    (pair,) = load_preferences(datasets.Dataset.from_list(rows), tokenizer, max_length=12)
    assert pair[0].unit == 0
    assert "1 of 2 pairs dropped" in caplog.text
    with pytest.raises(UserError, match="none of the 1 pairs"):
        load_preferences(datasets.Dataset.from_list(rows[1:]), tokenizer, max_length=12)


def test_pairs_that_do_not_begin_alike_are_refused(tokenizer):
    rows = [{"chosen": say("a") + A, "rejected": say("b") + A}]
    with pytest.raises(UserError, match="row 0: no prompt is left"):
        load_preferences(datasets.Dataset.from_list(rows), tokenizer)


def test_pairs_without_a_common_first_token_share_no_family(tokenizer):
    """Without a begin token, the first letter of a prompt can merge with each answer's own word."""
    (pair,) = load_preferences(
        datasets.Dataset.from_list([{"prompt": " t", "chosen": "wo", "rejected": "hree"}]), tokenizer
    )
    begins_alike = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert (pair[0].prompt_ids == pair[1].prompt_ids) is begins_alike
    assert [s.family for s in pair] == ([0, 0] if begins_alike else [-1, -1])
    assert [s.unit for s in pair] == [0, 0]
    assert [tokenizer.decode(s.prompt_ids + s.completion_ids, skip_special_tokens=True) for s in pair] == [
        " two",
        " three",
    ]


@pytest.mark.parametrize("shape", ["strings", "turns", "implicit"])
def test_pairs_are_taken_apart_for_kto(tokenizer, shape):
    """In TRL's own order, which shows beyond the first thousand."""
    from trl.data_utils import extract_prompt, unpair_preference_dataset

    rows = preference_rows(shape)
    rows += rows[:1] * (1001 - len(rows)) if shape == "strings" else []
    pairs = datasets.Dataset.from_list(rows)
    apart = unpair_preference_dataset(pairs.map(extract_prompt) if shape == "implicit" else pairs)
    labelled = load_labelled(pairs, tokenizer)
    assert labelled == load_labelled(apart, tokenizer)
    assert [good for _, good in labelled].count(True) == len(rows) == len(labelled) / 2


def test_row_variables_and_tools_reach_the_template(tokenizer):
    kept = tokenizer.chat_template
    rows = [
        {"messages": say("a") + A, "tools": json.dumps([{"name": "sum"}]), "chat_template_kwargs": {"mood": "calm"}},
        {"messages": say("b") + A, "tools": None, "chat_template_kwargs": None},
    ]
    try:
        tokenizer.chat_template = "{{ mood }}{% for t in tools or [] %}{{ t.name }}{% endfor %}|" + kept
        data = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
        sequences, _ = load_supervised(data, tokenizer, chat_template_kwargs={"mood": "glad"})
    finally:
        tokenizer.chat_template = kept
    assert [tokenizer.decode(s.prompt_ids).split("|")[0] for s in sequences] == ["calmsum", "glad"]


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("tools", "[{", "row 0, column 'tools' is no JSON"),
        ("tools", '{"name": "sum"}', "row 0, column 'tools' is {'name': 'sum'}, not a list"),
        ("chat_template_kwargs", "[1]", r"row 0, column 'chat_template_kwargs' is \[1\], not a dict"),
    ],
)
def test_template_variables_that_cannot_be_read_are_refused(tokenizer, column, value, words):
    data = datasets.Dataset.from_list([{"messages": say("a") + A, column: value}])
    with pytest.raises(UserError, match=words):
        load_supervised(data, tokenizer)


def test_keys_that_only_other_rows_tools_have_do_not_reach_the_template(tokenizer):
    def row(name: str, argument: str) -> dict:
        properties = {argument: {"type": "string", "description": "What."}}
        call = {"type": "function", "function": {"name": name, "arguments": {argument: "x", "limit": None}}}
        return {
            "messages": [*say("q"), {"role": "assistant", "content": "", "tool_calls": [call]}, *A],
            "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}],
            "chat_template_kwargs": {f"own_{name}": True},
        }

    kept = tokenizer.chat_template
    rows = [row("search", "query"), row("weather", "city")]
    try:
        tokenizer.chat_template = "{{ [tools, messages[1].tool_calls, own_search is defined] | tojson }}|" + kept
        structs = datasets.Dataset(datasets.table.InMemoryTable(pyarrow.Table.from_pylist(rows)))
        as_json = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
        heads = [
            [tokenizer.decode(s.prompt_ids).split("|")[0] for s in load_supervised(data, tokenizer)[0]]
            for data in (structs, as_json)
        ]
    finally:
        tokenizer.chat_template = kept
    assert "city" not in heads[0][0]
    assert "query" not in heads[0][1]
    assert [head.endswith("true]") for head in heads[0]] == [True, False]
    # An Arrow struct does not tell a written None from a key that is another row's; JSON does.
    assert ["limit" in head for column in heads for head in column] == [False, False, True, True]


def test_a_tokenizer_without_end_token_is_refused(tokenizer):
    kept = tokenizer.eos_token
    try:
        tokenizer.eos_token = None
        with pytest.raises(UserError, match="no end token"):
            load_supervised(datasets.Dataset.from_list([{"text": "two"}]), tokenizer)
    finally:
        tokenizer.eos_token = kept


def test_importing_data_is_light():
    heavy = ["torch", "datasets", "transformers", "trl", "jinja2", "pandas", "numpy"]
    ours = "tandem.rl.rows, tandem.rl.prompts, tandem.rl.examples, tandem.rl.chat"
    code = f"import sys, {ours}; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
