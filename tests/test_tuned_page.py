"""The page of `mergekit-pave tune`, its picture and its labels; and all pages of scores with hostile names, and in a browser."""

import html
import itertools
import math
import re

import browser
import pytest
from PIL import Image
from test_scores_shown import axes_of, per_cent, score_of

from mergekit_pave.errors import PaveError
from mergekit_pave.report.page import drawing, render, shares
from mergekit_pave.report.page.labels import label_settings
from mergekit_pave.report.page.tuned import write_tuned
from mergekit_pave.report.tuned import AS_IT_IS, tuned


def tuned_of(settings: list[dict], *models: str, by: str = "mean", **more) -> dict:
    levels = [0.5 + 0.3 * (7 * i % 20) / 20 for i in range(len(settings))]
    return tuned(
        [(of, score_of(*models, level=level, seed=i, **more)) for i, (of, level) in enumerate(zip(settings, levels))], by
    )


CONFIG = "merge_method: ties\nbase_model: ./base\nmodels:\n- model: ./base\n- model: ./math\n- model: ./code\n"


@pytest.mark.parametrize(
    "settings, labels",
    [
        ([{}], []),
        ([{"parameters.lambda": 0.6}, {"parameters.lambda": 1}], ["lambda 0.6", "lambda 1"]),
        (  # what all have alike is left out, but no label is empty
            [{"merge_method": "regmean", "pave.rank_ratio": ratio} for ratio in (1, 0.984)],
            ["rank_ratio 1", "rank_ratio 0.984"],
        ),
        ([{"merge_method": "regmean", "parameters.lambda": 1}, {"merge_method": "regmean"}], ["lambda 1", "regmean"]),
        ([{"merge_method": "ties"}, {"merge_method": "dare_ties"}], ["ties", "dare_ties"]),
        ([{"pave.refine": True}], ["refine true"]),
        (
            [{"parameters.lambda": 0.1 + 0.2}, {"pave.refine": {"lambda": 1.2}}, {"pave.refine": {}}],
            ["lambda 0.3", "refine.lambda 1.2", "refine {}"],
        ),
        ([{"models.1.parameters.weight": w} for w in (0.2, 0.4)], ["weight of math 0.2", "weight of math 0.4"]),
        (  # weights stand together, in the order of the models, also where one of them is alike in all
            [{f"models.{i}.parameters.weight": w for i, w in ((1, 0.5), (2, other))} for other in (0.1, 0.2)],
            ["weight 0.5 / 0.1", "weight 0.5 / 0.2"],
        ),
        (
            [{"models.1.parameters.weight": 1, "models.2.parameters.weight": 2}, {"parameters.weight": 3}],
            ["weight 1 / 2", "parameters.weight 3"],
        ),
        ([{"models.9.parameters.density": [1, 0.5]}], ["density of models.9 [1, 0.5]"]),
    ],
)
def test_labels_tell_what_differs(settings, labels):
    if settings == [{}]:
        assert label_settings(settings, CONFIG) == [AS_IT_IS]
    else:
        assert label_settings([{}, *settings], CONFIG) == [AS_IT_IS, *labels]


@pytest.mark.parametrize("config", [None, "", "- a list", "models: 3", "slices: []", "[", "models: [3]"])
def test_labels_without_a_config_to_read(config):
    settings = [{}, {"models.1.parameters.weight": 0.2}, {"models.1.parameters.weight": 0.3}]
    assert label_settings(settings, config) == [AS_IT_IS, "weight of models.1 0.2", "weight of models.1 0.3"]


def cells(page: str) -> list[list[str]]:
    """The rows of the first table of a page, as they are read."""
    table = page.split("<table>")[1].split("</table>")[0]
    return [[html.unescape(cell) for cell in re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in table.split("<tr>")[1:]]


@pytest.mark.parametrize("by", ["mean", "worst"])
def test_the_table_of_settings(tmp_path, by, undrawn):
    result = tuned_of([{}, *({"parameters.lambda": value} for value in (0.6, 0.8, 1))], by=by)
    page = write_tuned(tmp_path / "page", "merge.yml", result, CONFIG).read_text()
    head, *rows = cells(page)
    assert head == [
        "setting",
        "mean",
        "worst",
        f"{by}, above as it is",
        f"{by}, behind the best",
        "bits per byte",
        "math",
        "code",
    ]
    found = {row[0]: row for row in rows}
    names = [AS_IT_IS, "lambda 0.6", "lambda 0.8", "lambda 1"]
    assert rows[0][0] == AS_IT_IS and found.keys() == set(names)
    for name, setting in zip(names, result["settings"]):
        score = setting["score"]
        wanted = [per_cent(score[key]["kept"], score[key]["error"]) for key in ("mean", "worst")]
        wanted.append("-" if name == AS_IT_IS else per_cent(*setting["better_than_plain"].values(), "+"))
        best = setting is result["settings"][result["best"]]
        wanted.append("best" if best else per_cent(*setting["behind_best"].values()))
        wanted.append(f"{2 / math.log(2) / 8:.3f}")
        wanted += [per_cent(model["kept"], model["error"]) for model in score["models"].values()]
        assert [cell.removesuffix(" *") for cell in found[name][1:]] == wanted
    ordered = [float(row[head.index(by)].split()[0]) for row in rows[1:]]
    assert ordered == sorted(ordered, reverse=True)
    assert f"Best by the {by}: lambda 0.8, " in page and "parameters.lambda=0.8" in page
    assert (tmp_path / "page" / "share-kept.png").is_file()


def test_a_config_that_is_the_best_already(tmp_path, undrawn):
    same = score_of()
    page = write_tuned(tmp_path / "page", "merge.yml", tuned([({}, same), ({"parameters.lambda": 1}, same)], "mean"), None)
    assert "Nothing that was tried is better than the config as it is" in page.read_text()
    assert cells(page.read_text())[2][4].endswith(" *") and "as good as the best" in page.read_text()


def test_settings_of_which_nothing_is_known(tmp_path):
    result = tuned_of([{}, {"parameters.lambda": 1}], "./math", rows=1)
    assert "±" not in str(cells(write_tuned(tmp_path / "one", "name", result, None).read_text()))
    result = tuned_of([{}, {"parameters.lambda": 1}], "./math", equal=("./math",))
    page = write_tuned(tmp_path / "two", "name", result, None).read_text()
    assert "nothing can be told apart" in page and cells(page)[1][1:] == ["-", "-", "-", "best", "0.361", "-"]


def test_pages_of_others_are_not_overwritten(tmp_path, undrawn):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(PaveError, match=r"index\.html is not from an earlier report"):
        write_tuned(tmp_path, "name", tuned_of([{}]), None)
    assert (tmp_path / "index.html").read_text() == "mine"


MANY = [
    {},
    *(
        {"merge_method": m, "parameters.lambda": v, "pave.rank_ratio": r}
        for m in ("ties", "regmean")
        for v in (0.6, 0.8, 1)
        for r in (1, 0.9)
    ),
]
MANY += [{f"models.{i}.parameters.weight": 0.3 + 0.1 * ((i + k) % 4) for i in range(8)} for k in range(7)]


def test_twenty_settings_of_eight_models_can_be_read(tmp_path):
    """No label touches another, and none is cut."""
    names = [f"model-with-a-longer-name-{i}" for i in range(8)]
    result = tuned_of(MANY, *(f"./{name}" for name in names))
    plot = shares.plot_settings(label_settings(MANY, None), [setting["score"] for setting in result["settings"]], "mean")
    drawing.png(plot)
    boxes = [label.get_window_extent() for label in axes_of(plot).get_yticklabels()]
    assert len(boxes) == 20 and not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert not any("…" in label.get_text() for label in axes_of(plot).get_yticklabels())
    assert axes_of(plot).get_window_extent().width > 0.55 * plot.figure.bbox.width
    (legend,) = plot.figure.legends
    assert legend.get_window_extent().width < plot.figure.bbox.width
    assert [text.get_text() for text in legend.get_texts()] == ["mean", *names]


HOSTILE = "<script>alert(1)</script> & $co\x07"


def test_text_in_names_is_text_on_pages(tmp_path):
    score = score_of(HOSTILE, "\"'><img src=x>", "模型/数学", "x" * 5000) | {"base": HOSTILE}
    pages = [render.write(tmp_path / "score", "<b>bold</b>", None, None, "merge_method: <i>x</i>", score)]
    settings = tuned([({}, score), ({"merge_method": "<script>alert(2)"}, score), ({"a.<u>b": HOSTILE}, score)], "worst")
    pages.append(write_tuned(tmp_path / "tuned", "<b>bold</b>", settings, "models: [{model: <i>}]"))
    for page in pages:
        text = page.read_text()
        assert not re.search("<script|<b>bold|<img|<i>|<u>", text) and "数学" in text
        assert Image.open(page.with_name("share-kept.png")).width < 3000


def test_nothing_to_show_can_be_drawn():
    score = score_of("./math", equal=("./math",))
    for plot in (shares.plot_score(score), shares.plot_settings(["a", "b"], [score, score], "mean")):
        assert drawing.png(plot).startswith(b"\x89PNG") and drawing.svg(plot)


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium here")
def test_in_a_browser(tmp_path):
    """No error on the console, wide or narrow, light or dark; the page does not scroll sideways."""
    names = [f"./model-{i}" for i in range(8)]
    pages = [
        render.write(tmp_path / "score", "merged", None, None, CONFIG, score_of(*names)),
        write_tuned(tmp_path / "tuned", "merge.yml", tuned_of(MANY, *names), CONFIG),
    ]
    with browser.chromium() as tab:
        for page in pages:
            for dark in (False, True):
                for width in (1200, 390):
                    tab.open(page, dark=dark, width=width)
                    assert tab.problems == []
                    assert tab.evaluate("document.querySelectorAll('figure svg').length") == 1
                    assert tab.evaluate("document.documentElement.scrollWidth") <= width
                    ink = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
                    assert ink == tab.evaluate("getComputedStyle(document.body).color")
