"""Rows and samples: where they come from, what a template makes of them, and which are drawn."""

import bz2
import functools
import gzip
import http.server
import lzma
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import transformers
from models import write_rows

from mergekit_pave.calibration.batches import encode
from mergekit_pave.calibration.data import load_samples
from mergekit_pave.errors import PaveError
from mergekit_pave.settings import DEFAULT_CALIBRATION, Data


def texts(path, count: int | None = None, **data) -> list[str]:
    """The texts of the samples that are drawn."""
    return [sample.text for sample in drawn(path, count, **data) if sample.problem is None]


def drawn(path, count: int | None = None, **data):
    settings = DEFAULT_CALIBRATION.model_copy(update={"samples": count} if count else {})
    return load_samples([Data(path=str(path), **data)], settings, "data")


def rows_of(count: int, blank=lambda i: False) -> list[dict]:
    return [{"text": " " if blank(i) else f"row {i}"} for i in range(count)]


# --- blank rows


@pytest.mark.parametrize("streaming", [False, True])
def test_blank_rows_use_up_no_samples(tmp_path, streaming):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(500, lambda i: i % 5 < 2))
    found = texts(path, 100, streaming=streaming)
    assert len(found) == len(set(found)) == 100 and all(text.startswith("row") for text in found)


def test_replacements_follow_the_same_shuffle(tmp_path):
    """Data without blank rows gives the samples that it always gave; other data the next ones."""
    order = np.random.default_rng(DEFAULT_CALIBRATION.seed).permutation(300).tolist()
    full = write_rows(tmp_path / "full.jsonl", rows_of(300))
    assert texts(full, 50) == [f"row {i}" for i in sorted(order[:50])]
    gaps = write_rows(tmp_path / "gaps.jsonl", rows_of(300, lambda i: i in order[10:20]))
    assert texts(gaps, 50) == [f"row {i}" for i in sorted(order[:10] + order[20:60])]
    assert len(drawn(gaps, 50)) == 60


def test_what_blank_rows_leave_goes_to_other_data_sets(tmp_path):
    few = write_rows(tmp_path / "few.jsonl", [{"text": text} for text in ("few", "", "", "", "few")])
    many = write_rows(tmp_path / "many.jsonl", rows_of(100))
    settings = DEFAULT_CALIBRATION.model_copy(update={"samples": 20})
    samples = load_samples([Data(path=str(few)), Data(path=str(many))], settings, "data")
    usable = [sample.text for sample in samples if sample.problem is None]
    assert usable.count("few") == 2 and len(usable) == 20


@pytest.mark.parametrize("streaming", [False, True])
def test_mostly_blank_rows_are_an_error_and_not_all_read(llama, tmp_path, streaming):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(3000, lambda i: i % 10 > 0))
    samples = drawn(path, 20, streaming=streaming)
    assert len(samples) == 40
    with pytest.raises(PaveError, match=r"of 40 rows cannot be used: \d+ empty"):
        encode(samples, transformers.AutoTokenizer.from_pretrained(llama.base), DEFAULT_CALIBRATION, None, "data")


def test_bad_rows_are_not_blank(llama, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": ["a"] if i % 3 else ["b", "c"]} for i in range(100)])
    samples = drawn(path, 10)
    assert len(samples) == 10 and all("no text but a list" in sample.problem for sample in samples)


def test_rows_with_an_empty_target_are_replaced(tmp_path):
    rows = [{"text": f"row {i}", "answer": "x" if i % 3 else ""} for i in range(90)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert len(texts(path, 30, target="answer")) == 30


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["lines.txt", "lines.txt.gz", "folder"])
def test_blank_lines_are_no_rows(tmp_path, name, streaming):
    path = tmp_path / name
    written = ("one\n\n \n\n\ntwo\n\t\n" * 2).encode()
    if name == "folder":
        path.mkdir()
        (path / "lines.txt").write_bytes(written)
    else:
        path.write_bytes(gzip.compress(written) if name.endswith("gz") else written)
    samples = drawn(path, streaming=streaming)
    assert sorted(sample.text for sample in samples) == ["one", "one", "two", "two"]
    if not streaming:  # what is told of a row names its line
        assert [sample.origin.split()[1] for sample in samples] == ["0", "5", "7", "12"]
    (tmp_path / "blank.txt").write_text("\n \n\n")
    with pytest.raises(PaveError, match="has no rows"):
        drawn(tmp_path / "blank.txt", streaming=streaming)


# --- templates


def test_templates_look_into_columns(tmp_path):
    rows = [
        {"translation": {"en": "two", "de": "zwei"}, "answers": {"text": ["a", "b"]}, "score": 0.256, "n": 3},
        {"translation": {"en": "one", "de": None}, "answers": {"text": ["c"]}, "score": 0.5, "n": None},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert texts(path, text="{translation[en]} = {translation[de]}") == ["two = zwei", "one = "]
    assert texts(path, text="{answers[text][0]} {score:.2f} {n}!") == ["a 0.26 3!", "c 0.50 !"]
    assert texts(path, text="{{{n}}} {translation[en]!r}") == ["{3} 'two'", "{} 'one'"]


def test_places_that_a_row_does_not_have(tmp_path):
    rows = [{"answers": {"text": ["a"]}}, {"answers": {"text": []}}, {"answers": None}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    problems = [sample.problem for sample in drawn(path, text="{answers[text][0]}")]
    assert problems == [None, "(column 'answers[text]' has no '0')", "empty"]
    (first, *_) = drawn(path, text="{answers[txt]}")
    assert first.problem == "(column 'answers' has no 'txt' but text)"
    (first, *_) = drawn(path, text="{answers[text]}")
    assert first.problem == "(column 'answers[text]' holds no text but a list)"


def test_a_format_that_a_cell_does_not_fit_names_the_column(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"n": 1.5, "a": {"b": "one"}}, {"n": None, "a": {"b": "two"}}])
    problems = [sample.problem for sample in drawn(path, text="{n:.2f} {a[b]}")]
    assert problems == [None, "(column 'n' is empty, which the format '.2f' does not fit)"]
    (first, *_) = drawn(path, text="{n} {a[b]:.2f}")
    assert first.problem == "(column 'a[b]' holds text, which the format '.2f' does not fit)"
    (first, *_) = drawn(path, text="{n:d}")
    assert first.problem == "(column 'n' holds a number, which the format 'd' does not fit)"


def test_a_column_whose_name_looks_like_a_path(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"a.b": "dot", "a[b]": "bracket", "a": {"b": "in"}}])
    assert texts(path, text="{a.b} {a[b]}") == ["dot bracket"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{question.__class__}", ["no column 'question.__class__'", "{question[__class__]}"]),
        ("{question[x].y}", ["no column"]),
        ("{missing[en]}", ["no column 'missing'", "question"]),
        ('{"q": "{question}"}', ["{{ or }}"]),
        ("\\frac{1}{2} {question}", ["{{ or }}"]),
        ("{question} }", ["not a valid template", "{{ or }}"]),
        ("{question", ["not a valid template", "{{ or }}"]),
        ("{{question}}", ["no column", "{{ or }}"]),
        ("{question:{answer}}", ["not a valid template"]),
        ("{}", ["'{}'", "{} names no column", "{question}"]),
        ("{question} {}", ["{} names no column"]),
        ("{question!x}", ["{question}", "unknown conversion !x"]),
    ],
)
def test_templates_that_cannot_be(tmp_path, text, words):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "one", "answer": "two"}])
    with pytest.raises(PaveError) as refused:
        drawn(path, text=text)
    assert all(word in str(refused.value) for word in ["data.text", *words])
    assert "\n" not in str(refused.value)


def test_attributes_are_never_read(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"question": {"b": "one"}}])
    (sample,) = drawn(path, text="{question[__class__]}")
    assert sample.problem == "(column 'question' has no '__class__' but b)"


# --- where rows come from

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def zstd(written: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(written)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("rows.jsonl.zst", LINES),
        ("rows.jsonl.bz2", bz2.compress(LINES)),
        ("rows.jsonl.xz", lzma.compress(LINES)),
        ("rows.JSON.GZ", gzip.compress(b'[{"text": "one"}, {"text": "two"}]', mtime=0)),
        ("rows.ndjson", LINES),
        ("rows.tsv", b"n\ttext\n1\tone\n2\ttwo\n"),
        ("rows.tsv.gz", gzip.compress(b"n\ttext\n1\tone\n2\ttwo\n", mtime=0)),
        ("rows.csv.zst", b"n,text\n1,one\n2,two\n"),
        ("rows.txt.gz", gzip.compress(b"one\ntwo\n", mtime=0)),
        ("rows[1] *.jsonl", LINES),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_endings(tmp_path, name, written, streaming):
    (tmp_path / name).write_bytes(zstd(written) if name.endswith(".zst") else written)
    (tmp_path / "rows1 x.jsonl").write_text('{"text": "other"}')  # what the last name would match as a pattern
    assert sorted(texts(tmp_path / name, streaming=streaming)) == ["one", "two"]


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.jsonl.zip", "rows.gz", "rows.jsonl.bak"])
def test_an_ending_that_nobody_knows(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(LINES)
    with pytest.raises(PaveError, match=r"data\.path: the ending of rows.* is not that of a known format: \.jsonl .*\.gz"):
        drawn(name)


def test_patterns(tmp_path, monkeypatch):
    for i, name in enumerate(("a/one.jsonl", "a/two.jsonl", "b/c/three.jsonl", "notes/x.md", "notes/x.txt")):
        write_rows(tmp_path / name, [{"text": f"row {i}"}])
    monkeypatch.chdir(tmp_path)
    for streaming in (False, True):
        assert sorted(texts("a/*.jsonl", streaming=streaming)) == ["row 0", "row 1"]
        assert sorted(texts("**/*.jsonl", streaming=streaming)) == ["row 0", "row 1", "row 2"]
        assert texts(tmp_path / "b" / "c" / "t*", streaming=streaming) == ["row 2"]
    with pytest.raises(PaveError, match=r"there is no file that matches a/\*\.csv"):
        drawn("a/*.csv")
    with pytest.raises(PaveError, match=r"notes/\* matches notes/x\.md, whose format is unknown or differs"):
        drawn("notes/*")
    with pytest.raises(PaveError, match=r"data_files goes with"):
        drawn("a/*.jsonl", data_files="x")


@pytest.fixture
def url(tmp_path, monkeypatch):
    """A folder of this machine as others reach it."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "rows.jsonl.gz").write_bytes(gzip.compress(LINES))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("streaming", [False, True])
def test_urls(url, tmp_path, streaming):
    assert sorted(texts(f"{url}/rows.jsonl.gz", streaming=streaming)) == ["one", "two"]
    assert sorted(texts(f"{url}/rows.jsonl.gz?download=true", streaming=streaming)) == ["one", "two"]
    assert sorted(texts(f"file://{tmp_path}/served/*.jsonl.gz", streaming=streaming)) == ["one", "two"]
    with pytest.raises(PaveError, match=r"cannot load .*none\.jsonl"):
        drawn(f"{url}/none.jsonl", streaming=streaming)
    with pytest.raises(PaveError, match=r"the ending of .*/rows is not that of a known format"):
        drawn(f"{url}/rows", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_that_were_saved(tmp_path, streaming):
    train = datasets.Dataset.from_list(rows_of(10))
    test = datasets.Dataset.from_list([{"text": "test"}])
    train.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "several"))
    read = functools.partial(texts, streaming=streaming)
    everything = [row["text"] for row in train]
    assert read(tmp_path / "single") == read(tmp_path / "several") == read(tmp_path / "several" / "train") == everything
    assert read(tmp_path / "several", split="test") == ["test"]
    assert read(tmp_path / "several", split="train[:20%]+test") == ["row 0", "row 1", "test"]
    assert read(tmp_path / "single", split="train[8:]") == ["row 8", "row 9"]
    for name in ("single", "several"):
        with pytest.raises(PaveError, match=rf"cannot load .*{name} \(split 'valid'\): Unknown split .valid"):
            read(tmp_path / name, split="valid")
    with pytest.raises(PaveError, match="was saved by `save_to_disk`; data_files goes with"):
        read(tmp_path / "single", data_files="*.arrow")


# --- special tokens that a text has itself


def ids_of(path, tokenizer, **data) -> list[list[int]]:
    return [sample.inputs["input_ids"] for sample in encode(drawn(path, **data), tokenizer, DEFAULT_CALIBRATION, None, "data")]


def test_a_text_that_begins_with_bos_gets_one(llama, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.base)
    rows = [{"text": "<s>add one two</s>", "b": "<s>seven"}, {"text": "add one", "b": "nine"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    exported, plain = ids_of(path, tokenizer)
    assert exported == tokenizer("<s>add one two</s>", add_special_tokens=False)["input_ids"]
    assert plain == tokenizer("add one")["input_ids"] and plain[0] == 1 != plain[1]
    exported, plain = ids_of(path, tokenizer, text="text", text_pair="b")
    assert exported == tokenizer("<s>add one two</s>", "<s>seven", add_special_tokens=False)["input_ids"]
    assert exported.count(1) == 2 and plain == tokenizer("add one", "nine")["input_ids"]


def test_texts_that_begin_with_bos_are_cut_like_others(llama, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.base)
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"{start}{'seven ' * 500}"} for start in ("", "<s>")])
    plain, exported = ids_of(path, tokenizer)
    assert plain == exported and len(plain) == tokenizer.model_max_length


def test_a_last_token_of_its_own_that_is_cut_off(families, tmp_path):
    """No sample is longer than it may be."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(families["bert"].base)
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "seven nine[SEP]seven nine"}])
    whole = len(ids_of(path, tokenizer)[0])
    for length in range(4, whole + 2):
        tokenizer.model_max_length = length
        assert length - 1 <= len(ids_of(path, tokenizer)[0]) <= length or len(ids_of(path, tokenizer)[0]) == whole


def test_few_samples_of_many_blank_rows(llama, tmp_path):
    """As many as are wanted are enough, however many blank rows were between them."""
    path = write_rows(tmp_path / "rows.jsonl", rows_of(400, lambda i: i % 5 > 1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.base)
    for seed in range(40):
        settings = DEFAULT_CALIBRATION.model_copy(update={"samples": 4, "seed": seed})
        samples = load_samples([Data(path=str(path))], settings, "data")
        assert len(encode(samples, tokenizer, settings, None, "data")) == 4


def test_tokens_at_both_ends(families, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(families["bert"].base)
    rows = [{"text": "[CLS]seven[SEP]", "b": "nine[SEP]"}, {"text": "seven", "b": "nine"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    exported, plain = ids_of(path, tokenizer)
    assert exported == plain == tokenizer("seven")["input_ids"]
    exported, plain = encode(drawn(path, text="text", text_pair="b"), tokenizer, DEFAULT_CALIBRATION, None, "data")
    assert exported.inputs == plain.inputs == dict(tokenizer("seven", "nine"))


def test_targets_get_one_bos_too(llama, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.base)
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "add", "answer": "<s>two"}, {"text": "add", "answer": "two"}])
    samples = drawn(path, target="answer")
    encoded = encode(samples, tokenizer, DEFAULT_CALIBRATION, None, "data", shift=lambda labels: labels)
    exported, plain = (sample.inputs["decoder_input_ids"] for sample in encoded)
    assert exported == plain == tokenizer("two")["input_ids"]
