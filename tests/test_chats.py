"""Chats as data sets keep them: what a chat template is given, and what it makes of it."""

import json
from datetime import datetime
from pathlib import Path

import datasets
import pytest
import transformers
from models import write_rows
from transformers.utils import chat_template_utils

from mergekit_pave.calibration.batches import encode
from mergekit_pave.calibration.chats import read_chat, read_tools, render
from mergekit_pave.calibration.data import load_samples
from mergekit_pave.errors import PaveError
from mergekit_pave.settings import DEFAULT_CALIBRATION, Data

SHOWN = "{% for m in messages %}{{ m.role }}:{{ m.content | trim }};{% endfor %}"
TURNS = [{"role": "user", "content": "add one"}, {"role": "assistant", "content": "two"}]


def tokenizer_with(llama, template: str | None = SHOWN):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.tuned[0])
    tokenizer.chat_template = template
    tokenizer.model_max_length = 4096
    return tokenizer


def rendered(path: Path, tokenizer, **data) -> list[str]:
    """What the model reads of each row."""
    samples = load_samples([Data(path=str(path), **data)], DEFAULT_CALIBRATION, "data")
    return [
        tokenizer.decode(sample.inputs["input_ids"]) for sample in encode(samples, tokenizer, DEFAULT_CALIBRATION, None, "data")
    ]


def parquet(path: Path, rows: list[dict]) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def call(name: str, arguments: dict) -> dict:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


def schema(name: str, properties: dict) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


@pytest.mark.parametrize("form", ["parquet", "jsonl", "json text"])
def test_keys_of_other_rows_are_not_shown(llama, tmp_path, form):
    """A table gives every struct the keys of all, however deep; a template shows those that are there."""
    tokenizer = tokenizer_with(
        llama,
        "{{ tools | tojson }} {% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls else m.content }} {% endfor %}",
    )
    weather, sums = schema("weather", {"city": {"type": "string"}}), schema("sums", {"expr": {"enum": ["1+1"]}})
    rows = [
        {"messages": [TURNS[0], call("weather", {"city": "Bonn"})], "tools": [weather]},
        {"messages": [TURNS[0], call("sums", {"expr": "1+1"})], "tools": [sums, weather]},
    ]
    table = parquet(tmp_path / "chats.parquet", rows)
    if form == "jsonl":
        table = write_rows(tmp_path / "chats.jsonl", list(datasets.Dataset.from_parquet(str(table))))
    elif form == "json text":
        texts = [{key: json.dumps(cell) for key, cell in row.items()} for row in rows]
        table = write_rows(tmp_path / "chats.jsonl", texts)
    read = [load for load in rendered(table, tokenizer)]
    expected = [tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False) for row in rows]
    assert read == expected and "null" not in "".join(read)


def test_a_null_that_somebody_wrote_is_shown(llama, tmp_path):
    """JSON has no columns to fill: what is null there was written so."""
    tools = [{"name": "f", "enum": ["a", None], "default": None}]
    template = "{{ tools | tojson }}{% for m in messages %}{{ m.meta | tojson }}{% endfor %}"
    turns = [TURNS[0] | {"meta": {"seen": None}}]
    shown = '[{"name": "f", "enum": ["a", null], "default": null}]{"seen": null}'
    for tools_cell in (json.dumps(tools), [json.dumps(tool) for tool in tools]):
        path = write_rows(tmp_path / "chats.jsonl", [{"messages": json.dumps(turns), "tools": tools_cell}])
        assert rendered(path, tokenizer_with(llama, template)) == [shown]


def test_a_null_within_a_list_of_a_table_is_shown(llama, tmp_path):
    rows = [{"messages": TURNS, "tools": [{"name": "f", "enum": ["a", None], "default": None}]}]
    template = tokenizer_with(llama, "{{ tools | tojson }}")
    assert rendered(parquet(tmp_path / "chats.parquet", rows), template) == ['[{"name": "f", "enum": ["a", null]}]']


def test_a_turn_whose_content_is_null_in_json_says_nothing(llama, tmp_path, caplog):
    silent = json.dumps([{"role": "user", "content": None}])
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": cell} for cell in (silent, *[json.dumps(TURNS)] * 3)])
    with caplog.at_level("WARNING", logger="mergekit_pave"):
        assert len(rendered(path, tokenizer_with(llama))) == 3
    assert "skipped 1 of 4 rows: 1 empty" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "add one"}],
        [{"type": "text", "text": "add"}, {"type": "text", "text": " one"}],
        [{"text": "add "}, {"text": "one"}],
        [{"type": "input_text", "text": "add one", "image": None}],
        ["add ", "one"],
        {"type": "text", "text": "add one"},
    ],
)
@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet"])
def test_parts_of_text_are_joined(llama, tmp_path, name, content):
    rows = [{"messages": [{"role": "user", "content": content}]}] * 3
    path = (parquet if name.endswith("parquet") else write_rows)(tmp_path / name, rows)
    assert rendered(path, tokenizer_with(llama)) == ["user:add one;"] * 3


def test_texts_and_parts_in_one_chat(llama, tmp_path):
    chat = [{"role": "user", "content": [{"type": "text", "text": "add one"}]}, TURNS[1]]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": chat}] * 2)
    assert rendered(path, tokenizer_with(llama)) == ["user:add one;assistant:two;"] * 2


@pytest.mark.parametrize("part", [{"type": "image", "url": "a.png"}, {"type": "image", "text": ""}, {"type": "text"}, 3])
def test_a_part_that_is_no_text_makes_a_bad_row(llama, tmp_path, caplog, part):
    spoilt = [{"role": "user", "content": [{"type": "text", "text": "look"}, part]}]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": json.dumps(chat)} for chat in (TURNS, spoilt, TURNS)])
    with caplog.at_level("WARNING", logger="mergekit_pave"):
        assert len(rendered(path, tokenizer_with(llama))) == 2
    kind = part["type"] if isinstance(part, dict) else "int"
    assert f"skipped 1 of 3 rows: 1 (content with a part that is no text but {kind!r})" in caplog.text


def test_a_template_that_reads_only_parts_gets_parts(llama, tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ part.text }}{% endfor %};{% endfor %}"
    )
    chats = [TURNS, [{"role": "user", "content": [{"type": "text", "text": "add one"}]}, TURNS[1]]]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": json.dumps(chat)} for chat in chats])
    assert rendered(path, tokenizer_with(llama, template)) == ["user:add one;assistant:two;"] * 2


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%Y-%m-%d') }}",
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}",
    ],
)
def test_the_day_is_always_the_same(llama, tmp_path, monkeypatch, template):
    """A key of what was measured must not change at midnight."""
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": TURNS}])
    tokenizer = tokenizer_with(llama, template + SHOWN)
    today = rendered(path, tokenizer)

    class Later(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 3, 4)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert "2031" in tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert rendered(path, tokenizer) == today
    assert "2024" in today[0] and "user:add one;" in today[0]
    assert "2031" in tokenizer.apply_chat_template(TURNS, tokenize=False)


SHAREGPT = [
    {"from": "system", "value": "be brief", "weight": None},
    {"from": "human", "value": "add one", "weight": 0},
    {"from": "gpt", "value": "two", "weight": 1},
]


@pytest.mark.parametrize("column", ["conversations", "messages", "chat"])
@pytest.mark.parametrize("written", [False, True])
def test_chats_of_from_and_value(llama, tmp_path, column, written):
    cell = json.dumps(SHAREGPT) if written else SHAREGPT
    path = write_rows(tmp_path / "chats.jsonl", [{"id": "a", column: cell}])
    named = {"messages": column} if column == "chat" else {}
    assert rendered(path, tokenizer_with(llama), **named) == ["system:be brief;user:add one;assistant:two;"]


def test_names_of_who_speaks(llama, tmp_path):
    names = ["human", "user", "gpt", "assistant", "system", "function_call", "observation", "tool", "Human"]
    path = write_rows(tmp_path / "chats.jsonl", [{"conversations": [{"from": name, "value": "x"} for name in names]}])
    shown = ["user", "user", "assistant", "assistant", "system", "assistant", "tool", "tool", "user"]
    assert rendered(path, tokenizer_with(llama)) == ["".join(f"{name}:x;" for name in shown)]


def test_messages_come_before_conversations(llama, tmp_path):
    path = write_rows(tmp_path / "chats.jsonl", [{"conversations": SHAREGPT, "messages": TURNS}])
    assert rendered(path, tokenizer_with(llama)) == ["user:add one;assistant:two;"]


def test_prompts_and_completions(llama, tmp_path):
    tokenizer = tokenizer_with(llama)
    texts = [
        {"prompt": "add one ", "completion": "two"},
        {"prompt": "", "completion": "seven"},
        {"prompt": "", "completion": None},
    ]
    path = write_rows(tmp_path / "texts.jsonl", texts)
    assert rendered(path, tokenizer) == ["<s>add one two", "<s>seven"]
    path = write_rows(tmp_path / "chats.jsonl", [{"prompt": TURNS[:1], "completion": TURNS[1:]}])
    assert rendered(path, tokenizer) == ["user:add one;assistant:two;"]
    path = write_rows(tmp_path / "mixed.jsonl", [{"prompt": "add one", "completion": TURNS[1:]}])
    with pytest.raises(PaveError, match=r"1 of 1 rows cannot be used: 1 \(of prompt and completion one is a text"):
        rendered(path, tokenizer)
    samples = load_samples([Data(path=str(tmp_path / "texts.jsonl"), target="completion")], DEFAULT_CALIBRATION, "data")
    assert [(sample.text, sample.target) for sample in samples if not sample.problem] == [("add one ", "two")]


@pytest.mark.parametrize(
    "cell", ["hello", '{"role": "user"}', "[1]", [{"speaker": "me", "value": "x"}], [{"from": "gpt"}, {"value": "x"}]]
)
def test_what_is_no_chat(llama, tmp_path, cell):
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": cell}] * 2)
    with pytest.raises(PaveError, match=r"2 of 2 rows cannot be used: 2 \(no list of \{role, content\} or \{from, value\}"):
        rendered(path, tokenizer_with(llama))


def test_chats_without_turns_are_blank(llama, tmp_path, caplog):
    silent = json.dumps([{"role": "user", "content": " "}])
    cells = [json.dumps(TURNS), "[]", "", None, silent, "null", *[json.dumps(TURNS)] * 4]
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": cell} for cell in cells])
    with caplog.at_level("WARNING", logger="mergekit_pave"):
        assert len(rendered(path, tokenizer_with(llama))) == 5
    assert "skipped 5 of 10 rows: 5 empty" in caplog.text


def test_what_is_read_as_people_write_it():
    """Names of who speaks in any case, numbers, tools that are each written as JSON."""
    turns = [{"from": "Human", "value": 7}, {"from": "GPT", "value": ["se", "ven"]}]
    assert read_chat(turns) == [{"role": "user", "content": "7"}, {"role": "assistant", "content": "seven"}]
    tools = ['{"name": "add", "default": null}', {"name": "sub", "default": None}]
    assert read_tools(tools) == [{"name": "add", "default": None}, {"name": "sub"}]
    with pytest.raises(ValueError, match="from 'narrator', which is none of system, user"):
        read_chat([{"from": "narrator", "value": "once"}])


@pytest.mark.parametrize("shown", ["%d %b %Y", "%-d.%-m.%y", "%A, %B %e", "100%% %H:%M:%S"])
def test_how_a_date_is_written(llama, shown):
    tokenizer = tokenizer_with(llama, "{{ strftime_now('" + shown + "') }}" + SHOWN)
    assert render(tokenizer, TURNS).startswith(datetime(2024, 7, 26).strftime(shown))
