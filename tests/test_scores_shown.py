"""What a merge keeps, as people see it: in the terminal, in pave_scores.json, in the model card, and on pages."""

import html
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from markdown_it import MarkdownIt
from merging import config_for, forget_checkpoints, merge, write_config
from PIL import Image
from test_card import NAMES
from test_damaged_reports import GONE, OTHER_VALUES, places
from test_page import report_of, rows_of
from test_score import scored_config, with_more_rows

from mergekit_pave import cli
from mergekit_pave.core.score import Distances, kept, mean_more, worst_more
from mergekit_pave.errors import PaveError
from mergekit_pave.report.page import drawing, render, shares
from mergekit_pave.report.score import Scored, summarise
from mergekit_pave.report.score_card import add_to_card
from mergekit_pave.report.scores import as_text
from mergekit_pave.report.stored import read_scores, write_scores

CARD = "---\ntags:\n- merge\n---\n# A merge\n\nText *of* somebody.  \n"


def score_of(
    *models: str, level: float = 0.6, rows: int = 6, seed: int = 0, features: bool = False, equal: tuple = (), unfit: tuple = ()
) -> dict:
    """The score of a made-up merge that keeps about `level` of each model, and nothing of those that equal the base model.

    Args:
        unfit: models that predict their rows worse than the base model does.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, model in enumerate(models or ("./math", "./code")):
        base = torch.linspace(1, 3, rows, dtype=torch.float64) * (i + 1)
        merged = base * (1 - level + 0.1 * torch.rand(rows, generator=generator, dtype=torch.float64))
        if model in equal:
            merged, base = torch.zeros(2, rows, dtype=torch.float64)
        losses = torch.tensor([[2.0], [4.0 if model in unfit else 1.0], [3.0]]).double()
        nats = dict(zip(("merged", "expert", "base"), losses * torch.ones(rows)))
        classes = None if features else (torch.full((rows,), 9.0), nats, 0.2 * base)
        agreed, nats, drift = classes or (None, None, None)
        found[model] = Scored("token" if classes else "row", 10 * rows, Distances(merged, base), agreed, nats, drift, 8 * rows)
    return summarise("./base", found)


def per_cent(value: float, error: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} ± {100 * error:.1f} %"


# --- The terminal ----------------------------------------------------------------------------------------------------


def test_one_merge_has_a_line_for_each_model():
    score = score_of("./models/math", "./models/code")
    lines = as_text({"./out": score}).splitlines()
    assert re.split(r"  +", lines[0]) == ["model", "share kept", "top-1 agreement", "bits per byte", "drift"]
    for line, (model, of_model) in zip(lines[1:3], score["models"].items()):
        bits = [nats / math.log(2) / 8 for nats in (2, 1, 3)]
        shown = [Path(model).name, per_cent(of_model["kept"], of_model["error"]), "90.0 %"]
        shown += ["{:.3f} ({:.3f}, {:.3f})".format(*bits), f"{of_model['drift']:.3f}"]
        assert re.split(r"  +", line) == shown
    assert lines[3].split() == ["mean", *per_cent(*[score["mean"][key] for key in ("kept", "error")]).split()]
    assert lines[4].startswith(f"worst ({Path(score['worst']['model']).name})")
    below = "\n".join(lines[5:])
    for heading in ("share kept", "top-1 agreement", "bits per byte", "drift"):
        assert f"\n{heading} " in below
    assert "6 rows" in " ".join(below.split()) and "skill" in below
    assert max(map(len, lines)) <= 120


def test_columns_without_figures_are_not_there():
    text = as_text({"./out": score_of("./math", features=True)})
    assert "cosine" in text and not re.search("top-1|bits|drift|mean|worst", text)


def test_the_error_of_a_single_row_is_not_known():
    score = score_of(rows=1)
    assert "±" not in as_text({"./out": score}).split("share kept  ")[0]
    assert re.search(r"more than out +- +[+-]\d+\.\d %\n", as_text({"./out": score, "./other": score_of(rows=1, level=0.3)}))


def test_a_model_that_equals_the_base_model_has_no_share():
    text = as_text({"./out": score_of("./math", "./code", equal=("./math",))})
    assert re.search(r"^math +- ", text, re.MULTILINE) and "nothing to keep" in text
    text = as_text({"./out": score_of("./math", "./code", equal=("./math", "./code"))})
    assert re.search(r"^mean +-$", text, re.MULTILINE) and re.search(r"^worst +-$", text, re.MULTILINE)


def test_a_model_that_predicts_its_own_rows_worse_than_the_base_is_warned_of(merged, tmp_path, undrawn):
    """In the terminal once, whatever the number of merges; in the card and on the page as well."""
    name = "./a*b"
    score = score_of(name, "./code", unfit=(name,))
    told = f"{name} predicts its own held-out rows worse than the base model does (0.721 and 0.541 bits per byte)"
    for scores in ({"./out": score}, {"./out": score, "./other": score}):
        assert " ".join(as_text(scores).split()).count(f"Warning: {told}") == 1
    assert "Warning" not in as_text({"./out": score_of()})
    out = copy_of(merged, tmp_path / "out")
    add_to_card(str(out), score)
    shown = "".join(token.content for token in MarkdownIt().parse((out / "README.md").read_text()))
    assert f"Warning: {told}".replace("a*b", r"a\*b") in shown
    assert told in html.unescape(render.write(tmp_path / "page", "out", None, None, None, score).read_text())


def test_what_is_merged_is_called_a_model(undrawn, tmp_path):
    """Only mixtures have experts."""
    for score in (score_of(), score_of(features=True), score_of(equal=("./math",), unfit=("./math",))):
        page = render.write(tmp_path / "page", "out", None, None, None, score).read_text()
        assert "expert" not in (as_text({"./out": score}) + page).lower()


def test_several_merges_are_compared_on_the_same_rows():
    scores = {
        f"./runs/{name}": score_of(level=level, seed=i) for i, (name, level) in enumerate([("a", 0.5), ("b", 0.7), ("c", 0.4)])
    }
    lines = as_text(scores).splitlines()
    assert lines[0].split() == ["share", "kept", "a", "b", "c"]
    of_rows = [
        [
            Distances(*(torch.tensor(model["by_row"][key]).double() for key in ("merged", "base")))
            for model in score["models"].values()
        ]
        for score in scores.values()
    ]
    for kind, more in (("mean", mean_more), ("worst", worst_more)):
        (line,) = [line for line in lines if line.startswith(f"  {kind}, more than a")]
        assert re.split(r"  +", line.strip())[1:] == ["-", *(per_cent(*more(other, of_rows[0]), "+") for other in of_rows[1:])]
    math_lines = [line for line in lines if line.startswith("  math ")]
    assert len(math_lines) == 4  # share, agreement, bits, drift
    assert [cell.split()[0] for cell in re.split(r"  +", math_lines[0].strip())[1:]] == [
        f"{100 * kept(distances[0]).value:.1f}" for distances in of_rows
    ]


def test_thirty_models_have_thirty_lines():
    text = as_text({"./out": score_of(*(f"org{i}/model" for i in range(30)))})
    assert all(re.search(rf"^org{i}/model  ", text, re.MULTILINE) for i in range(30))


# --- pave_scores.json ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(families, tmp_path_factory):
    """The folder of a plain merge. Nobody may write there."""
    folder = tmp_path_factory.mktemp("scored") / "out"
    merge(config_for(families["llama"]), folder)
    return folder


def copy_of(merged: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in merged.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_scores_are_read_back_as_they_were(merged, tmp_path):
    out, score = copy_of(merged, tmp_path / "out"), score_of()
    write_scores(str(out), score)
    assert read_scores(str(out)) == score
    assert json.loads((out / "pave_scores.json").read_text())["weights"].keys() == {"model.safetensors"}
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "pave_scores.json").write_bytes((out / "pave_scores.json").read_bytes())
    assert read_scores(str(tmp_path / "alone")) == score  # somebody sent it


def test_scores_of_other_weights_are_refused(llama, merged, tmp_path):
    out = copy_of(merged, tmp_path / "out")
    write_scores(str(out), score_of())
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[:-4] + b"abcd")
    with pytest.raises(PaveError, match=r"pave_scores\.json is not of the weights beside it.*Score again"):
        read_scores(str(out))
    done = CliRunner().invoke(cli.main, ["report", str(out)])
    assert done.exit_code == 1 and "is not of the weights beside it" in done.output
    (out / "model.safetensors").unlink()
    (out / "pytorch_model.bin").write_bytes(b"others")
    with pytest.raises(PaveError, match=r"not of all weights beside it: pytorch_model\.bin"):
        read_scores(str(out))


def test_a_new_merge_removes_scores_and_picture(llama, merged, tmp_path):
    out = copy_of(merged, tmp_path / "out")
    write_scores(str(out), score_of())
    add_to_card(str(out), score_of())
    (out / "notes.txt").write_text("mine")
    render.write(out / "pave_report", "out", None, None, None, read_scores(str(out)))
    assert {"pave_scores.json", "pave_scores.png", "pave_report"} <= {path.name for path in out.iterdir()}
    merge(config_for(llama, weight=(0.3, 0.3)), out)
    left = {path.name for path in out.iterdir()}
    assert "notes.txt" in left and not [name for name in left if "pave" in name]
    assert "What it keeps" not in (out / "README.md").read_text()


def test_a_new_merge_without_a_card_leaves_no_scores_in_the_old_one(llama, merged, tmp_path):
    out = copy_of(merged, tmp_path / "out")
    before = (out / "README.md").read_bytes()
    add_to_card(str(out), score_of())
    merge(config_for(llama, weight=(0.3, 0.3)), out, write_model_card=False)
    assert (out / "README.md").read_bytes().rstrip() == before.rstrip()


def whole() -> dict:
    return json.loads(json.dumps(score_of("./math", "./code") | {"weights": {"model.safetensors": "0123"}}))


def changed(path: tuple, value) -> dict:
    score = holder = whole()
    for key in path[:-1]:
        holder = holder[key]
    if value is GONE:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return score


def test_any_value_of_another_shape_is_refused_or_shown(tmp_path, undrawn):
    """Also deep inside."""
    (tmp_path / "README.md").write_text(CARD)
    refused = shown = 0
    for path in [path for path in places(whole()) if not (path[-2:-1] in (("merged",), ("base",)) and path[-1] > 0)]:
        for value in [GONE, *OTHER_VALUES]:
            (tmp_path / "pave_scores.json").write_text(json.dumps(changed(path, value)))
            try:
                score = read_scores(str(tmp_path))
            except PaveError as error:
                assert str(tmp_path / "pave_scores.json") in str(error)
                refused += 1
            else:
                as_text({"./out": score})
                render.write(tmp_path / "page", "name", None, None, None, score)
                shown += 1
    assert refused > 200 and shown > 50


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("models", "./math", "kept"), "0.7", r"models\.\./math\.kept: Input should be a valid number"),
        (("models", "./math", "agreement"), 1.5, r"models\.\./math\.agreement: Input should be less than"),
        (("models", "./code", "measure"), "l2", r"models\.\./code\.measure: Input should be"),
        (("models",), {}, "models: Dictionary should have at least 1 item"),
        (("worst", "model"), "./law", r"worst\.model: \./law is not among the models"),
        (("weights",), GONE, "weights: Field required"),
        (("format",), 7, "has format 7, which a later mergekit-pave wrote"),
    ],
)
def test_the_first_wrong_place_is_named(tmp_path, path, value, message):
    (tmp_path / "pave_scores.json").write_text(json.dumps(changed(path, value)))
    with pytest.raises(PaveError, match=message):
        read_scores(str(tmp_path))


def test_a_folder_that_was_never_scored(tmp_path):
    with pytest.raises(PaveError, match=r"has no pave_scores\.json, which `mergekit-pave score"):
        read_scores(str(tmp_path))


# --- The card --------------------------------------------------------------------------------------------------------


def test_the_section_is_replaced_and_all_else_stays(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(CARD)
    add_to_card(str(tmp_path), score_of(level=0.3))
    first = card.read_bytes()
    assert first.startswith(CARD.encode()) and first.count(b"### What it keeps") == 1
    with Image.open(tmp_path / "pave_scores.png") as picture:
        assert picture.width > 1000
    card.write_bytes(first + b"\nMore text.\n")
    score = score_of(level=0.8)
    add_to_card(str(tmp_path), score)
    second = card.read_bytes()
    assert second.startswith(CARD.encode()) and second.endswith(b"-->\n\nMore text.\n")
    assert second.count(b"### What it keeps") == 1 and per_cent(*list(score["mean"].values())).encode() in second
    add_to_card(str(tmp_path), score)
    assert card.read_bytes() == second
    add_to_card(str(tmp_path), score_of(level=0.3))
    assert card.read_bytes() == first + b"\nMore text.\n"


@pytest.mark.parametrize("text", [b"", b"no end of line", b"a\r\nb\r\n", b"\xff\xfe not UTF-8\n"])
def test_other_cards_stay_as_they_are(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text)
    for _ in range(2):
        add_to_card(str(tmp_path), score_of())
        written = (tmp_path / "README.md").read_bytes()
        assert written.startswith(text) and b"| math |" in written
        assert written.count(b"\n") == (written.count(b"\r\n") or written.count(b"\n"))


def test_no_card_is_an_error(tmp_path):
    with pytest.raises(PaveError, match=r"has no README\.md to put the scores into"):
        add_to_card(str(tmp_path), score_of())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["begin", "end", "twice"])
def test_a_section_that_somebody_cut_is_not_guessed_at(tmp_path, what):
    card = tmp_path / "README.md"
    card.write_text(CARD)
    add_to_card(str(tmp_path), score_of())
    (tmp_path / "pave_scores.png").unlink()
    text = card.read_text()
    begin, end = re.findall("<!--.*?-->", text)
    card.write_text({"begin": text.replace(begin, ""), "end": text.replace(end, ""), "twice": text + text}[what])
    before = card.read_bytes()
    with pytest.raises(PaveError, match="whose begin or end is missing, or several"):
        add_to_card(str(tmp_path), score_of())
    assert card.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_without_matplotlib_the_card_has_the_table_alone(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(CARD)
    add_to_card(str(tmp_path), score_of())
    assert "](pave_scores.png)" in (tmp_path / "README.md").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    add_to_card(str(tmp_path), score_of())
    text = (tmp_path / "README.md").read_text()
    assert "| math |" in text and "![" not in text
    assert not (tmp_path / "pave_scores.png").exists()  # it is of an earlier score


@pytest.mark.parametrize("name", [*NAMES, "<!-- End of what it keeps -->", "two\nlines"])
def test_names_are_shown_as_they_are(tmp_path, monkeypatch, name):
    """None is Markdown or HTML, in the card or on the page."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "README.md").write_text("# A merge\n")
    score = score_of("./math", name)
    for _ in range(2):
        add_to_card(str(tmp_path), score)
    text = (tmp_path / "README.md").read_text()
    assert text.count("-->") == 2
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    page = re.sub("<!--.*?-->", "", page)
    assert set(re.findall(r"<(/?[a-z0-9]+)", page)) <= {
        s + t for t in ["h1", "h3", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"] for s in ("", "/")
    }
    short = " ".join(name.split())
    shown = html.unescape(re.sub(r"</?[a-z][^>]*>", "", page))
    assert short.rpartition("/")[2] in shown
    rows = [len(re.findall("<t[hd]", row)) for row in page.split("<tr>")[1:]]
    assert len(set(rows)) == 1


# --- The page --------------------------------------------------------------------------------------------------------


def run(*arguments) -> str:
    forget_checkpoints()
    done = CliRunner().invoke(cli.main, [*map(str, arguments), "--quiet"])
    assert done.exit_code == 0, done.output
    return done.output


def test_from_a_merge_to_its_page(families, llama, tmp_path, undrawn):
    """A plain merge has a page of its score alone; one with a block has the section beside all others."""
    family = with_more_rows(llama)
    config = scored_config(family, tmp_path / "cache")
    path = write_config(config, tmp_path / "merge.yml")
    merge({key: value for key, value in config.items() if key != "pave"}, tmp_path / "plain")
    pave = config["pave"] | {"purify": True, "rank_ratio": 0.9}
    merge(config | {"pave": pave}, tmp_path / "purified")
    before = (tmp_path / "purified" / "README.md").read_text()
    told = run("score", path, tmp_path / "plain", tmp_path / "purified", "--rows", 6, "--card")
    assert "more than plain" in told
    for name in ("plain", "purified"):
        score = read_scores(str(tmp_path / name))
        page = Path(run("report", tmp_path / name).strip().removeprefix("written to ")).read_text()
        assert f"<h1>{name}</h1>" in page and ">What it keeps</h2>" in page
        for of_model in score["models"].values():
            assert per_cent(of_model["kept"], of_model["error"]) in page
        assert (tmp_path / name / "pave_report" / "share-kept.png").is_file()
        assert ("Kept rank" in page) == (name == "purified")
        assert ("How it was measured" in page) == (name == "plain")
    card = (tmp_path / "purified" / "README.md").read_text()
    assert card.startswith(before) and "### What it keeps" in card


def test_a_folder_with_neither_report_nor_scores(tmp_path):
    done = CliRunner().invoke(cli.main, ["report", str(tmp_path)])
    assert done.exit_code == 1 and "has no pave_report.json" in done.output and "mergekit-pave score" in done.output


def test_a_report_of_nothing_with_scores(tmp_path, undrawn):
    report = report_of([])
    page = render.write(tmp_path / "page", "name", report, None, None, score_of()).read_text()
    assert "How it was measured" in page and "PAVE" not in page


def test_thirty_models_on_a_page(tmp_path):
    score = score_of(*(f"someone/model-{i}" for i in range(30)))
    text = render.write(tmp_path / "page", "many", report_of(rows_of(2, 2)), None, None, score).read_text()
    assert text.count(">model-29<") >= 2  # in the picture and in the table
    assert len(text) < 600_000 and Image.open(tmp_path / "page" / "share-kept.png").height < 3000


# --- Pictures --------------------------------------------------------------------------------------------------------


def axes_of(plot: drawing.Plot):
    (axes,) = plot.figure.axes
    return axes


def test_the_picture_of_a_score_has_the_whole_scale():
    plot = shares.plot_score(score_of("./math", "./code", "./law", equal=("./law",)))
    left, right = axes_of(plot).get_xlim()
    assert left < 0 and right > 1 and "left edge" not in plot.caption
    assert [label.get_text() for label in axes_of(plot).get_yticklabels()] == ["math", "code", "law"]


@pytest.mark.parametrize("share", [-3.0, -9e8, -1e99])
def test_what_is_far_out_does_not_squeeze_the_others(share):
    score = score_of()
    score["models"]["./math"] |= {"kept": share, "error": abs(share)}
    score["mean"] = {"kept": share / 2, "error": 1.0}
    plot = shares.plot_score(score)
    assert axes_of(plot).get_xlim()[0] > -1.2 and "left edge" in plot.caption
    assert drawing.png(plot).startswith(b"\x89PNG")
    assert max(map(len, as_text({"./out": score}).splitlines())) <= 120


def test_nonsense_from_others_makes_no_huge_picture(tmp_path):
    score = score_of()
    score["models"]["./math"] |= {"kept": 1e99, "error": 1e149}
    score["mean"] = {"kept": 1e99, "error": 1e149}
    (tmp_path / "a.png").write_bytes(drawing.png(shares.plot_score(score)))
    assert Image.open(tmp_path / "a.png").width < 3000
