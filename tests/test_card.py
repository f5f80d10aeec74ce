"""The model card: what its PAVE section tells, its picture, and metadata that the Hub takes."""

import copy
import html
import http.server
import io
import itertools
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import browser
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt
from mergekit.card import generate_card
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from merging import config_for, entries, merge
from PIL import Image
from test_page import emr_of, report_of, rows_of

import mergekit_pave
from mergekit_pave.cache import entries as cached
from mergekit_pave.cli import main
from mergekit_pave.report.card import section, with_section
from mergekit_pave.report.licence import common_licence
from mergekit_pave.report.page import quick
from mergekit_pave.report.places import Grid


def hub_card(*models: str, base: str = "someone/base") -> str:
    """mergekit's own card for models that are not on this machine."""
    config = {"merge_method": "task_arithmetic", "base_model": base, "dtype": "float32"}
    config["models"] = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return generate_card(MergeConfiguration.model_validate(config), yaml.safe_dump(config), "merged")


def check_metadata(text: str) -> ModelCardData:
    """What the Hub asks of metadata, as far as it can be judged here; its own check is a request to it.

    The client parses the block with the very pattern that the Hub uses, refuses what is no mapping, and turns it into
    `ModelCardData`. Beyond that: the types and values that the Hub's documentation of a model card gives, and names that
    its own rule for names lets pass.
    """
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert block and isinstance(yaml.safe_load(block[1]), dict)
    card = ModelCard(text)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict() == yaml.safe_load(block[1])
    data = card.data
    assert data.library_name == "transformers"
    assert len(data.tags) == len(set(data.tags)) and all(isinstance(tag, str) for tag in data.tags)
    assert {"mergekit", "merge", "pave"} <= set(data.tags)
    for names in (data.base_model, data.datasets):
        assert names is None or (isinstance(names, list) and names and len(names) == len(set(names)))
        for name in names or ():
            validate_repo_id(name)
    assert data.get("base_model_relation") == ("merge" if data.base_model else None)
    assert data.license is None or isinstance(data.license, str)
    return data


def test_metadata_of_a_merge_from_the_hub():
    text = with_section(hub_card("someone/math", "other/code"), report_of(rows_of(2, 2)), licence={"license": "llama2"})
    data = check_metadata(text)
    assert set(data.base_model) == {"someone/base", "someone/math", "other/code"}
    assert data.base_model_relation == "merge"
    assert data.datasets == ["someone/texts"]
    assert data.license == "llama2"


def test_adapters_are_listed_once_and_paths_not_at_all():
    text = with_section(hub_card("someone/base+other/lora", "./here", base="someone/base"), report_of(rows_of(2, 2)))
    assert set(check_metadata(text).base_model) == {"someone/base", "other/lora"}
    text = with_section(hub_card("./there", "./here", base="../base"), report_of(rows_of(2, 2)))
    assert check_metadata(text).base_model is None
    assert "base_model:" not in text.split("---")[1]


def test_data_files_of_other_machines_are_no_data_sets(tmp_path):
    report = report_of(rows_of(2, 1))
    report["models"]["someone/model-0"]["data"] = [
        {"path": "data/math.jsonl", "split": "train"},
        {"path": "C:\\data\\math", "split": "train"},
        {"path": "json", "data_files": {"train": ["/home/me/a.jsonl", "b.jsonl"]}, "split": "train"},
        {"path": "a/folder/deep/below", "split": "train"},
    ]
    text = with_section(hub_card("someone/math"), report)
    assert check_metadata(text).datasets is None
    assert "math.jsonl / train" in text and "a.jsonl, b.jsonl / train" in text and "/home/me" not in text


def test_section_of_a_merge(card_pictures, llama, tmp_path):
    """Data, ranks by projection, the picture, what was not purified, and how to make it again."""
    models = [*entries(llama, 2), {"model": str(llama.tuned[2]), "purify": False}]
    models[0]["rank_ratio"] = 0.75
    merge(config_for(llama, {"models": models}, models=3), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    check_metadata(text)
    told = text.split("### PAVE")[1]
    assert f"| {llama.tuned[2]} | not purified |" in told
    assert "For " + str(llama.tuned[0]) + ": `rank_ratio` 0.75" in told
    assert "](pave_ranks.png)" in told
    with Image.open(tmp_path / "out" / "pave_ranks.png") as picture:
        assert picture.width > 1000
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert re.search(rf"^\| {projection} \| (48|24) \| [\d.]+.* \| [\d.]+.* \|$", told, re.MULTILINE), projection
    command = re.search(r"pip install (.*)", told)[1].split()
    assert f"mergekit-pave=={mergekit_pave.__version__}" in command
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+", package) for package in command)
    assert "mergekit-yaml config.yml" in told and "relative paths in it start there" in told
    assert "Left as they are in each model: 7 not the weight of a linear layer; 2 vocabulary." in told


def test_ranks_are_those_of_the_report():
    rows = [row | {"kept": 100 + i % 3, "components": 128} for i, row in enumerate(rows_of(3, 1))]
    told = section(report_of(rows))
    of_projection = [row["kept"] for row in rows if "q_proj" in row["tensor"]]
    mean = sum(of_projection) / 3
    least, most = min(of_projection), max(of_projection)
    shown = f"{mean:.1f} ({least} to {most})" if least < most else str(least)
    assert f"| q_proj | 128 | {shown} |" in told


def test_without_matplotlib_there_is_no_picture_and_no_link(card_pictures, llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    merge(config_for(llama, {}), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "### PAVE" in text and "![" not in text
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_picture_that_cannot_be_drawn_does_not_fail_the_merge(card_pictures, llama, tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(quick, "ranks", broken)
    merge(config_for(llama, {}), tmp_path / "out")
    assert "![" not in (tmp_path / "out" / "README.md").read_text()
    assert "no fonts" in caplog.text


def grid_of(models: list[str], layers: int, projections: int = 3) -> Grid:
    """Shares from 0.8 to 1; one in the middle is missing."""
    values = np.linspace(0.8, 1, projections * layers).reshape(projections, layers)
    values.flat[values.size // 2] = np.nan if values.size > 1 else 0.8
    names = [f"mlp.{name}_proj" for name in "abcdefgh"[:projections]]
    return Grid("model.layers", names, list(range(layers)), dict.fromkeys(models, values))


@pytest.mark.parametrize(("models", "layers", "projections"), [(1, 1, 1), (1, 80, 1), (2, 8, 7), (5, 30, 3)])
def test_the_picture_shows_each_share_in_the_colour_that_the_page_gives_it(models, layers, projections):
    matplotlib = pytest.importorskip("matplotlib")
    grid = grid_of([f"someone/model{i}" for i in range(models)], layers, projections)
    shown = Image.open(io.BytesIO(quick.ranks(grid)))
    counts = dict(map(reversed, shown.getcolors(1 << 24)))
    low = min(np.nanmin(grid.values["someone/model0"]), 0.9999)
    for share in grid.values["someone/model0"].flat:
        if share > 0:
            wanted = np.array(matplotlib.colormaps["viridis"]((share - low) / (1 - low))[:3]) * 255
            near = sum(count for colour, count in counts.items() if abs(np.array(colour) - wanted).max() < 8)
            assert near > models * 200, share


def test_names_in_other_letters_are_drawn_by_matplotlib():
    assert quick.ranks(grid_of(["someone/数学", "someone/code"], 4)) is None
    assert quick.ranks(grid_of(["someone/Überläufer", "someone/код"], 4))[:4] == b"\x89PNG"


def test_published_covariances_are_named(llama, tmp_path, cache):
    merge(config_for(llama, {"keep_covariances": True}), tmp_path / "first")
    key = next(
        e.key for e in cached(cache) if e.kind == "covariance" and e.artefacts[0].manifest()["model"] == str(llama.tuned[0])
    )
    done = CliRunner().invoke(main, ["cache", "export", key, str(tmp_path / "published")])
    assert done.exit_code == 0, done.output
    first, second = entries(llama)
    models = [{"model": first["model"], "covariance": str(tmp_path / "published")}, second]
    merge(config_for(llama, {"models": models}), tmp_path / "out")
    told = (tmp_path / "out" / "README.md").read_text().split("### PAVE")[1]
    assert "data0.jsonl / train (covariances from published)" in told
    assert told.count("covariances from") == 1


def table_in(text: str, *head: str) -> list[list[str]]:
    """The rows of the table with a head in Markdown."""
    lines = text.split(f"| {' | '.join(head)} |\n")[1].splitlines()[1:]
    return [line.strip("| ").split(" | ") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]


EMR_HEAD = ("model", "file", "size", "scale (λᵢ)", "share of entries", "distance", "own tensors")


def test_what_emr_keeps_of_each_model():
    """Nothing was purified or measured: there are no tables of that. A model that equals the base has no distance."""
    report = report_of([]) | {
        "emr": emr_of(3, base_only={"lm_head.bias": "not in a", "lm_head.weight": "of another shape in a_b"})
    }
    report["not_purified"] = list(report["emr"]["models"])
    report["emr"]["models"]["someone/model-2"] |= {"distance": None, "own": ["a", "b", "c", "d", "e"]}
    told = section(report)
    assert table_in(told, *EMR_HEAD) == [
        ["model-0", "emr/model-0.safetensors", "1.5 MB", "0.9", "62.5 %", "0.4", "-"],
        ["model-1", "emr/model-1.safetensors", "1.5 MB", "0.91", "62.5 %", "0.41", "classifier.bias, classifier.weight"],
        ["model-2", "emr/model-2.safetensors", "1.5 MB", "0.92", "62.5 %", "-", "a, b, c and 2 more"],
    ]
    assert (
        "It is no model to use by itself" in told
        and "the base model's own, by reason: 1 not in a, 1 of another shape in a_b." in told
    )
    assert "mergekit-pave restore . model-0" in told and 'mergekit_pave.load_task(".", "model-0")' in told
    assert "Calibration" not in told and "purified" not in told and "](https://arxiv.org/abs/2405.17461)" in told
    assert re.findall("^#### (.*)", told, re.MULTILINE) == ["To reproduce"]


def test_emr_of_purified_models():
    report = report_of(rows_of(2, 2)) | {"not_purified": ["someone/model-2"]}
    told = section(report | {"emr": emr_of(3)})
    assert len(table_in(told, *EMR_HEAD)) == 3
    assert "With purified task vectors" in told and "with Wᵢ as it was before it was purified" in told
    assert "| someone/model-2 | not purified | - | - |" in told and "#### Ranks" in told
    assert "EMR" not in section(report)


NAMES = [
    "<b>bold",
    "<img src=x onerror=alert(1)>",
    "*a* and **b**",
    "_a_ and __b__, q_proj",
    "~~a~~ ~models",
    "[a](https:evil)",
    "![a](b.png)",
    "a|b",
    "D:\\\\Models\\<i>x",
    "`<b>```",
    "``a`<b>``",
    "a`b",
    "$x$ &amp; y",
    "模型 <模>",
    "# a",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name):
    """Of models, data, patterns and whatever a warning or a reason tells: none is Markdown or HTML."""
    report = copy.deepcopy(report_of([*rows_of(2, 1), *(row | {"model": name} for row in rows_of(2, 1))]))
    report["not_purified"] = [f"{name} too"]
    report["warnings"] = [f"{name}: look, `target: task_vector` is safer"]
    of_model = report["models"][name] = copy.deepcopy(report["models"]["someone/model-0"])
    of_model["data"] = [{"path": f"{name}.jsonl", "split": "train"}]
    of_model["settings"]["exclude"] = [f"{name} k_proj"]
    of_model["left_as_they_are"] = {"x": f"because of {name}"}
    report["regmean"] = {"closed_form": [], "as_task_arithmetic": {"x": f"unlike {name}"}}
    report["emr"] = emr_of(1, base_only={"x": f"not in {name}"})
    report["emr"]["models"][name] = report["emr"]["models"]["someone/model-0"] | {"own": [f"{name} own"]}
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(section(report))
    tags = set(re.findall(r"<(/?[a-z0-9]+)", page)) - {"img"}
    known = "h3 h4 p a code pre table thead tbody tr th td blockquote ul li strong"
    assert tags <= {slash + tag for tag in known.split() for slash in ("", "/")}, tags
    assert page.count("<img") == 0 and re.findall(r'<a href="([^"]*)"', page) == [
        f"https://arxiv.org/abs/{paper}" for paper in ("2510.14697", "2405.17461")
    ]
    shown = html.unescape(re.sub(r"</?[a-z][^>]*>", "", page))
    for told in (f"{name}: look, target: task_vector is safer", f"{name} too", f"{name}.jsonl / train", f"{name} k_proj"):
        assert told in shown, shown
    assert f"because of {name}" in shown and f"unlike {name}" in shown and f"For {name}: " in shown
    tables = [[len(re.findall("<t[hd]", row)) for row in table.split("<tr>")[1:]] for table in page.split("<table>")[1:]]
    assert f"{name} own" in shown and f"not in {name}" in shown
    assert len(tables) == 6 and all(len(set(cells)) == 1 for cells in tables)


# --- The licence -----------------------------------------------------------------------------------------------------


def folder_with(path: Path, metadata: dict | None) -> ModelReference:
    path.mkdir()
    if metadata is not None:
        (path / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# A model\n")
    return ModelReference.model_validate(str(path))


MIT, APACHE = {"license": "mit"}, {"license": "apache-2.0"}
NAMED = {"license": "other", "license_name": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}


@pytest.mark.parametrize(
    "cards, wanted",
    [
        ([MIT, MIT | {"tags": ["x"]}], MIT),
        ([MIT, APACHE], {}),
        ([MIT, {}], {}),
        ([MIT, None], {}),
        ([NAMED, NAMED], NAMED),
        ([NAMED, NAMED | {"license_name": "llama"}], {}),
        ([{"license": "other"}] * 2, {}),
        ([NAMED | {"license_link": "LICENSE"}] * 2, {}),
        ([{"license": ["mit", "gpl"]}] * 2, {}),
    ],
)
def test_licence_only_where_all_agree(tmp_path, cards, wanted):
    models = [folder_with(tmp_path / str(i), metadata) for i, metadata in enumerate(cards)]
    assert common_licence(models, None) == wanted


@pytest.mark.parametrize("metadata", ["tags: 5", "1: x", "self: 3", "eval_results: 3", "ignore_metadata_errors: false"])
def test_odd_metadata_of_an_input_is_no_licence(tmp_path, metadata):
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{metadata}\n---\n")
    found = common_licence([ModelReference.parse(str(tmp_path))], None)
    assert found in ({}, {"license": "mit"})


def test_a_card_that_fails_does_not_cost_the_rest(llama, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise KeyError("something")

    monkeypatch.setattr("mergekit_pave.plugin.wrap.with_section", fail)
    merge(config_for(llama, {}), tmp_path / "out")
    assert "could not be written" in caplog.text
    assert (tmp_path / "out" / "tokenizer.json").is_file() and "### PAVE" not in (tmp_path / "out" / "README.md").read_text()


def test_a_card_that_cannot_be_read_is_no_licence(tmp_path):
    model = folder_with(tmp_path / "a", MIT)
    (tmp_path / "a" / "README.md").write_text("---\nlicense: [\n---\n")
    assert common_licence([model], None) == {}
    (tmp_path / "a" / "README.md").write_bytes(b"\xff\xfe\x00")
    assert common_licence([model], None) == {}


def test_licences_of_the_hub_come_from_the_local_cache(tmp_path):
    """Of the revision that is merged, and of the adapter, too. Where a card is not there, nothing is asked."""
    for name, revision, licence in (("base", "a" * 40, MIT), ("lora", "b" * 40, MIT), ("base", "c" * 40, APACHE)):
        stored = tmp_path / f"models--someone--{name}"
        snapshot = stored / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (snapshot / "README.md").write_text(f"---\n{yaml.safe_dump(licence)}---\n")
        (stored / "refs").mkdir(exist_ok=True)
        (stored / "refs" / ("v2" if licence is APACHE else "main")).write_text(revision)

    def licence(*names: str) -> dict:
        return common_licence(map(ModelReference.model_validate, names), str(tmp_path))

    assert licence("someone/base", "someone/base+someone/lora") == MIT
    assert licence("someone/base@v2") == APACHE
    assert licence("someone/base@v2+someone/lora") == {}
    assert licence("someone/base", "someone/else") == {}


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine: cards by the path that is asked for, and what was asked."""
    cards, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            card = cards.get(self.path)
            if card is None:
                self.send_error(404)
            elif isinstance(card, int):
                time.sleep(card)
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(card.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        address = f"http://127.0.0.1:{server.server_address[1]}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        yield cards, asked
        server.shutdown()


def licence_of(folder, *names):
    return common_licence(map(ModelReference.model_validate, names), str(folder))


def test_the_hub_is_asked_for_cards_that_are_not_here(hub, tmp_path):
    """mergekit fetches weights and configs only; the card is that of the very commit that they are of."""
    cards, asked = hub
    snapshot = tmp_path / "models--someone--base" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--someone--base" / "refs").mkdir()
    (tmp_path / "models--someone--base" / "refs" / "main").write_text("a" * 40)
    before = sorted(tmp_path.rglob("*"))
    cards[f"/someone/base/resolve/{'a' * 40}/README.md"] = "---\nlicense: mit\n---\n"
    cards["/someone/math/resolve/v2/README.md"] = "---\nlicense: mit\n---\n"
    assert licence_of(tmp_path, "someone/base", "someone/math@v2") == MIT
    assert licence_of(tmp_path, "someone/base", "someone/math") == {}  # its main branch has no card
    assert len(asked) == 4 and sorted(tmp_path.rglob("*")) == before


def test_a_hub_that_does_not_answer_costs_the_licence_and_nothing_else(hub, tmp_path, monkeypatch, caplog):
    cards, asked = hub
    monkeypatch.setattr("mergekit_pave.report.licence._PATIENCE", 0.2)
    cards["/a/one/resolve/main/README.md"] = 2
    started = time.monotonic()
    assert licence_of(tmp_path, "a/one", "a/two", "a/three") == {}
    assert time.monotonic() - started < 1.5 and asked == ["/a/one/resolve/main/README.md"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert licence_of(tmp_path, "a/one") == {}
    assert len(asked) == 1 and not caplog.text


def test_licence_of_a_merge(llama, tmp_path):
    config = config_for(llama, {})
    for i, model in enumerate((llama.base, *llama.tuned[:2])):
        shutil.copytree(model, tmp_path / str(i))
        (tmp_path / str(i) / "README.md").write_text("---\nlicense: llama2\n---\n")
    config["base_model"] = str(tmp_path / "0")
    for i in range(2):
        config["models"][i]["model"] = config["pave"]["models"][i]["model"] = str(tmp_path / str(i + 1))
    merge(config, tmp_path / "out")
    assert check_metadata((tmp_path / "out" / "README.md").read_text()).license == "llama2"
    (tmp_path / "2" / "README.md").unlink()
    merge(config, tmp_path / "again")
    assert check_metadata((tmp_path / "again" / "README.md").read_text()).license is None


# --- As a page -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium here")
def test_the_card_renders(card_pictures, llama, tmp_path):
    merge(config_for(llama, {}), tmp_path / "out")
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    body = MarkdownIt("commonmark").enable("table").render(text)
    (tmp_path / "out" / "card.html").write_text(f'<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">{body}')
    with browser.chromium() as tab:
        tab.open(tmp_path / "out" / "card.html")
        assert tab.problems == []
        assert tab.evaluate("document.querySelectorAll('table').length") == 4
        assert tab.evaluate("document.images[0].naturalWidth") > 1000
        # Every row of a table has as many cells as its head.
        assert tab.evaluate(
            "[...document.querySelectorAll('table')].every(t => [...t.rows].every(r => r.cells.length == t.rows[0].cells.length))"
        )
