"""Attacks on `pave_report.json`: each is refused with an error for people, or the card and the page can be made of it."""

import json

import pytest
from matplotlib.figure import Figure
from test_page import emr_of, report_of, rows_of

from mergekit_pave.errors import PaveError
from mergekit_pave.report import card
from mergekit_pave.report.page import distances, drawing, fits, render, sections
from mergekit_pave.report.stored import read_report

OTHER_VALUES = [None, [], {}, -1, 1.5, True, "text", [[]], {"a": None}, 10**400, float("nan"), 1e300, "\ud800", "~nobody/x"]
OTHER_VALUES += ["a\x01b", "x" * 5000, f"a.{'9' * 5000}.b"]
GONE = object()


def whole() -> dict:
    """A report with everything that one can have."""
    rows = rows_of(2, 2)[:4]
    rows[0]["expert"] = 3
    report = json.loads(json.dumps(report_of(rows))) | {
        "format": 1,
        "weights": {"model.safetensors": "0123"},
        "not_purified": ["other"],
    }
    report["warnings"] = ["look"]
    report["models"]["someone/model-0"]["data"][0] |= {"name": "name", "data_files": {"train": ["a.jsonl"]}}
    report["models"]["someone/model-0"]["left_as_they_are"] = {"lm_head.weight": "vocabulary"}
    parameters = {"covariance": 0.5, "lambda": 1.0, "reduce_off_diagonal": 1.0}
    report["regmean"] = {
        "closed_form": [{"tensor": "layers.0.mlp.weight", "alignment": {"a": 0.5, "b": None}, **parameters}],
        "as_task_arithmetic": {"lm_head.weight": "vocabulary"},
        "weights": {"closed form": 900, "vocabulary": 100},
    }
    report["refined"] = {
        "settings": {"covariance": 0.5, "lambda": 1.0},
        "layers": [{"tensor": "layers.0.mlp.weight", "tokens": 100, "error_before": 0.5, "error_after": None}],
        "left": {"lm_head.weight": "vocabulary"},
    }
    report["emr"] = emr_of(2, base_only={"lm_head.bias": "not in someone/model-1"})
    return report


def places(value, path=()):
    """The path to every value in a report."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def changed(path: tuple, value) -> dict:
    """The report with another value at a place, or with none."""
    report = whole()
    holder = report
    for key in path[:-1]:
        holder = holder[key]
    if value is GONE:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return report


def read(folder, report) -> dict:
    (folder / "pave_report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    return read_report(str(folder))


def show(folder, report) -> None:
    card.section(report)
    render.write(folder / "page", "name", report, None, None)


def test_the_whole_one_is_shown(tmp_path):
    show(tmp_path, read(tmp_path, whole()))
    assert all((tmp_path / "page" / f"{name}.png").is_file() for name in ("kept-rank", "errors", "restored"))


SLOW = ("models", "settings")  # they have the most values


@pytest.mark.parametrize("key", [pytest.param(key, marks=pytest.mark.slow) if key in SLOW else key for key in whole()])
def test_any_value_of_another_shape(tmp_path, monkeypatch, key):
    """Also deep inside. Plots are not drawn here, as they take numbers that the check has passed."""
    monkeypatch.setattr(sections, "_purified", lambda _: [])
    monkeypatch.setattr(fits, "plot_errors", lambda _: [])
    monkeypatch.setattr(distances, "plot_distances", lambda _: drawing.Plot("restored", "", "", Figure()))
    refused = 0
    for path in [path for path in places(whole()) if path[0] == key]:
        for value in [GONE, *OTHER_VALUES]:
            try:
                report = read(tmp_path, changed(path, value))
            except PaveError as error:
                assert str(tmp_path / "pave_report.json") in str(error)
                refused += 1
            else:
                show(tmp_path, report)
    assert refused


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("purified", 0, "kept"), "60", r"purified\.0\.kept: Input should be a valid integer"),
        (("purified", 0, "change_norm"), GONE, r"purified\.0\.change_norm: Field required"),
        (("purified", 0, "components"), 0, r"purified\.0\.components: Input should be greater than 0"),
        (("purified", 0, "model"), "another", r"purified\.0\.model: another is not among the models"),
        (("models", "someone/model-0", "settings", "target"), "all", r"models\.someone/model-0\.settings\.target: "),
        (("refined", "layers", 0, "error_before"), -0.5, r"refined\.layers\.0\.error_before: Input should be greater"),
        (("refined", "layers"), GONE, r"refined\.layers: Field required"),
        (("emr", "models"), {}, r"emr\.models: Dictionary should have at least 1 item"),
        (
            ("emr", "models", "someone/model-0", "scale"),
            "0.9",
            r"emr\.models\.someone/model-0\.scale: Input should be a valid num",
        ),
        (("emr", "models", "someone/model-0", "agreed"), 1.5, r"emr\.models\.someone/model-0\.agreed: Input should be less than"),
        (("emr", "models", "someone/model-0", "distance"), GONE, r"emr\.models\.someone/model-0\.distance: Field required"),
        (
            ("emr", "models", "someone/model-0", "file"),
            "emr/a b; rm x.safetensors",
            r"emr\.models\.someone/model-0\.file: String",
        ),
        (("emr", "models", "someone/model-0", "file"), "../../a.safetensors", r"emr\.models\.someone/model-0\.file: String"),
        (("emr", "models", "someone/model-1", "own", 0), 3, r"emr\.models\.someone/model-1\.own\.0: Input should be a valid str"),
        (("weights",), ["model.safetensors"], "weights: Input should be a valid dictionary"),
        (("weights", "model.safetensors"), 3, r"weights\.model\.safetensors: Input should be a valid string"),
        (("versions", "mergekit-pave"), GONE, r"versions\.mergekit-pave: Field required"),
        (("versions", "torch"), 2, r"versions\.torch: Input should be a valid string"),
    ],
)
def test_the_first_wrong_place_is_named(tmp_path, path, value, message):
    with pytest.raises(PaveError, match=rf"is not a report of mergekit-pave, or a damaged one \({message}.*merge again"):
        read(tmp_path, changed(path, value))


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "[]", '"text"', '{"format": 1e999}'])
def test_no_report_at_all(tmp_path, text):
    with pytest.raises(PaveError, match=r"pave_report\.json (cannot be read|is not a report)"):
        read(tmp_path, text)


@pytest.mark.parametrize("index", ['{"weight_map": {"a": 3}}', '{"weight_map": {"a": [1]}}', '{"weight_map": []}', "[" * 100_000])
def test_a_damaged_index_beside_it(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(PaveError, match="was written by another merge, or changed since"):
        read(tmp_path, whole())


@pytest.mark.parametrize("header", [b"[]", b'{"a": 1}', b'{"a": {"data_offsets": [1]}}', b"[" * 100_000])
def test_damaged_weights_beside_it(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(PaveError, match="was written by another merge, or changed since"):
        read(tmp_path, whole())


def test_names_with_characters_that_xml_may_not_have(tmp_path):
    """A folder may be called so; the picture shows another sign for them."""
    rows = [row | {"model": "bell\x07\x00"} for row in rows_of(2, 1)]
    report = read(tmp_path, report_of(rows))
    show(tmp_path, report)
    assert "bell\ufffd\ufffd" in (tmp_path / "page" / "index.html").read_text()


def test_a_config_beside_it_that_somebody_changed(tmp_path, undrawn):
    for text in ("- a list", "{", "3", ""):
        page = render.write(tmp_path / "page", "name", read(tmp_path, whole()), None, text)
        assert "<html" in page.read_text()
