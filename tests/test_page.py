"""`mergekit-pave report`: what the page shows is what was done, it opens in a browser, and it overwrites nothing."""

import json
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import browser
import numpy as np
import pytest
import reference
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from merging import config_for, entries, forget_checkpoints, merge, write_config
from PIL import Image
from test_experts import family_of  # noqa: F401, a fixture

from mergekit_pave import cli
from mergekit_pave.planning.measured import measure
from mergekit_pave.plugin.phases import plan_merge
from mergekit_pave.report.page import distances, drawing, render
from mergekit_pave.report.stored import read_report


@pytest.fixture(scope="module")
def merged(families, tmp_path_factory):
    """A merge of three models, of which one is not purified: (its config, its folder, the reference)."""
    family = families["llama"]
    models = entries(family, 3)
    models[1] |= {"exclude": ["k_proj"], "target": "task_vector"}
    models[2] = {"model": str(family.tuned[2]), "purify": False}
    config = config_for(family, {"models": models, "regularization": 0.1, "rank_ratio": 0.9, "keep_covariances": True}, models=3)
    folder = tmp_path_factory.mktemp("page")
    config["pave"]["cache_dir"] = str(folder / "cache")
    merge(config, folder / "out")

    def ratio(i, tensor):
        return None if i == 2 or (i == 1 and "k_proj" in tensor) else 0.9

    sources = [(data, "text", "text") for data in family.data]
    targets = ["weights", "task_vector", "weights"]
    return (
        config,
        folder / "out",
        reference.purify("llama", family.base, family.tuned, sources, ratio, regularization=0.1, target=targets),
    )


@pytest.fixture(scope="module")
def whole(merged, tmp_path_factory) -> Path:
    """The folder of a report on a config."""
    folder = tmp_path_factory.mktemp("whole")
    written(write_config(merged[0], folder / "merge.yml"), "-o", folder / "page")
    return folder / "page"


def run(*arguments):
    forget_checkpoints()
    return CliRunner().invoke(cli.main, ["report", *map(str, arguments), "--quiet"])


def written(*arguments) -> str:
    """The page that a report has written."""
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return Path(re.search(r"written to (.*)", done.output)[1]).read_text()


def measured(config: dict):
    forget_checkpoints()
    options = MergeOptions(quiet=True)
    return measure(plan_merge(MergeConfiguration.model_validate(config), options), options)


@pytest.fixture(scope="module")
def seen(merged):
    """What the models and caches of that merge tell."""
    return measured(merged[0])


def test_a_config_gives_the_report_that_its_merge_wrote(merged, seen):
    assert json.loads(json.dumps(seen[0])) == read_report(str(merged[1]))


def test_interference_agrees_with_the_reference(merged, seen, llama):
    expected = merged[2]
    overlaps = {overlap.output: overlap for overlap in seen[1].overlaps}
    assert overlaps.keys() == expected[0].keys()
    plain = {model: reference.weights(model) for model in (llama.base, *llama.tuned)}
    for tensor, overlap in overlaps.items():
        assert overlap.models == [str(model) for model in llama.tuned]
        base = plain[llama.base][tensor].double()
        before = [plain[model][tensor].double() - base for model in llama.tuned]
        after = [expected[i][tensor].weight - base if tensor in expected[i] else before[i] for i in range(3)]
        for vectors, told in ((before, overlap.before), (after, overlap.after)):
            flat = np.stack([vector.numpy().ravel() for vector in vectors])
            length = np.linalg.norm(flat, axis=1)
            np.testing.assert_allclose(told.cosines(), flat @ flat.T / np.outer(length, length), atol=1e-5)
            conflicts = [[np.mean(a * b < 0) for b in flat] for a in flat]
            np.testing.assert_allclose(told.sign_conflicts(), conflicts, atol=1e-3)  # what is all but zero has either sign
        if 0 < expected[0][tensor].kept < expected[0][tensor].components:
            assert abs(overlap.before.cosines()[0, 2] - overlap.after.cosines()[0, 2]) > 1e-6


def test_spectra_and_covariances_agree_with_the_reference(seen, llama):
    _, found = seen
    sources = {str(model): (model, (data, "text", "text")) for model, data in zip(llama.tuned, llama.data)}
    assert len(found.spectra) == 3 * 7 + 3 * 6  # all layers, there are but three
    for one in found.spectra:
        model, source = sources[one.model]
        x = reference.layer_inputs("llama", model, source, 64)[one.output.removesuffix(".weight")].numpy()
        weight = reference.weights(model)[one.output].double().numpy()
        values = np.linalg.svd(weight @ (x.T @ x / len(x) + 0.1 * np.eye(x.shape[1])), compute_uv=False)
        np.testing.assert_allclose(one.values, values / values[0], rtol=1e-4)
        assert one.components == len(values)
    # q, k and v see one input, gate and up another; of the second model k is not purified.
    assert sorted(len(one.outputs) for one in found.inputs) == sorted(3 * [3, 1, 2, 1] + 3 * [2, 1, 2, 1])
    for one in found.inputs:
        model, source = sources[one.model]
        x = reference.layer_inputs("llama", model, source, 64)[one.outputs[0].removesuffix(".weight")].numpy()
        values = np.linalg.eigvalsh(x.T @ x / len(x))
        assert (one.tokens, one.width) == x.shape
        assert one.effective_rank == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)
        assert one.condition == pytest.approx((values[-1] + 0.1) / (values[0] + 0.1), rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_spectra_of_transposed_weights_and_of_experts(families, family_of, tmp_path, cache, kind):  # noqa: F811
    """The energy below the cut, by a full decomposition here, is what the merge has told by the tail alone."""
    family = families[kind] if kind in families else family_of(kind)
    config = config_for(family, {"rank_ratio": 0.8, "keep_covariances": True})
    merge(config, tmp_path / "out")
    report, found = measured(config)
    rows = {(row["model"], row["output"], row.get("expert")): row for row in report["purified"]}
    assert {(one.model, one.output) for one in found.spectra} == {(model, output) for model, output, _ in rows}
    for one in found.spectra:
        row = rows[one.model, one.output, one.expert]
        squares = one.values**2
        assert len(squares) == row["components"]
        assert squares[row["kept"] :].sum() / squares.sum() == pytest.approx(row["energy_dropped"], rel=1e-4)
        assert row["tokens"] == max(row["tokens"] for key, row in rows.items() if key[:2] == (one.model, one.output))


def test_the_page_of_a_config_has_everything(merged, whole):
    config, _, _ = merged
    page = (whole / "index.html").read_text()
    pictures = {"kept-rank", "energy", "removed", "interference", "pairs", "covariances", "spectra-0", "spectra-1", "spectra-2"}
    assert {file.name for file in whole.iterdir()} == {"index.html", *(f"{name}.png" for name in pictures)}
    for name in pictures:
        assert f'href="{name}.png"' in page
        shown = Image.open(whole / f"{name}.png")
        assert shown.width > 1000 and len(set(shown.convert("L").resize((60, 60)).tobytes())) > 20
    assert page.count("<svg") == len(pictures)
    for words in ("task_arithmetic", "mergekit-pave==", "not purified", "task_vector", "k_proj", "21 of 30"):
        assert words in page, words
    assert yaml.safe_dump(config).splitlines()[0] in page
    assert "is no longer in the cache" not in page


def test_the_page_stands_alone(whole):
    page = (whole / "index.html").read_text()
    assert not re.search(r"""<script|<link rel="stylesheet|@import|src=["']?http|url\(["']?http""", page)
    identities = re.findall(r'\bid="([^"]+)"', page)
    assert len(identities) == len(set(identities))
    for reference_to in re.findall(r'(?:href="|url\()#([^")]+)', page):
        assert reference_to in identities


def test_pictures_have_the_colours_of_the_page(whole):
    """Of what is drawn in light colours nothing is left, and every picture is well-formed and says what it is."""
    pictures = re.findall(r"<svg.*?</svg>", (whole / "index.html").read_text(), re.DOTALL)
    assert len(pictures) == 9
    colours = set()
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert (
            root.attrib["role"] == "img" and root.attrib["aria-label"] and root.attrib.keys() == {"role", "aria-label", "viewBox"}
        )
        assert not any(colour in picture for colour in drawing.THEMED)
        assert "fill: currentColor" in picture
        colours |= {variable for variable in drawing.THEMED.values() if f": {variable}" in picture}
        assert not re.search("<metadata|xmlns|ns0:", picture)
    assert colours == set(drawing.THEMED.values())


def test_an_output_needs_nothing_but_its_json(merged, tmp_path, undrawn):
    """Not even the models: it may have been made on another machine."""
    _, out, _ = merged
    (tmp_path / "out").mkdir()
    shutil.copy(out / "pave_report.json", tmp_path / "out")
    page = written(tmp_path / "out")
    folder = tmp_path / "out" / "pave_report"
    assert {file.name for file in folder.iterdir()} == {"index.html", "kept-rank.png", "energy.png", "removed.png"}
    assert "Made from pave_report.json alone" in page
    shutil.copy(out / "mergekit_config.yml", tmp_path / "out")
    assert "merge_method: task_arithmetic" in written(tmp_path / "out")


def test_without_covariances_the_cached_tails_are_shown(merged, seen, tmp_path, undrawn):
    config, out, _ = merged
    shutil.copytree(out.parent / "cache", tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "covariance")
    other = config | {"pave": config["pave"] | {"cache_dir": str(tmp_path / "cache")}}
    full = {(one.model, one.output): one for one in seen[1].spectra}
    _, found = measured(other)
    assert not found.inputs and found.overlaps
    for one in found.spectra:
        assert 0 < len(one.values) < one.components
        np.testing.assert_allclose(one.values, full[one.model, one.output].values[-len(one.values) :], rtol=1e-6)
    page = written(write_config(other, tmp_path / "merge.yml"))
    assert "Only the cached tail is shown" in page and "Covariances are not shown" in page
    assert not (tmp_path / "cache" / "covariance").exists()


def test_what_would_take_too_long_is_left_out_and_said(merged, tmp_path, monkeypatch, undrawn):
    from mergekit_pave.planning import measured as module

    monkeypatch.setattr(module, "_OPERATIONS", 1.0)
    monkeypatch.setattr(module, "spectrum", None)
    monkeypatch.setattr(module, "condition", None)
    page = written(write_config(merged[0], tmp_path / "merge.yml"))
    for what in ("Spectra", "Covariances"):
        assert f"{what} of model.layers are not shown: the weights are so large that one layer takes too long." in page
    assert "no longer in the cache" not in page
    assert {file.name for file in (tmp_path / "pave_report").glob("*.png")}.isdisjoint({"spectra-0.png", "covariances.png"})


def test_caches_that_are_not_full_are_an_error(llama, tmp_path, cache):
    done = run(write_config(config_for(llama, {}), tmp_path / "merge.yml"))
    assert done.exit_code == 1 and "42 of 42 decompositions are not in the cache" in done.output
    assert "mergekit-pave calibrate" in done.output
    assert not cache.exists() and not (tmp_path / "pave_report").exists()


def test_a_folder_that_is_no_purified_merge(tmp_path):
    done = run(tmp_path)
    assert done.exit_code == 1 and "has no pave_report.json" in done.output
    (tmp_path / "pave_report.json").write_text("{")
    done = run(tmp_path)
    assert done.exit_code == 1 and "pave_report.json cannot be read" in done.output


def test_without_matplotlib_it_says_how_to_install_it(merged, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run(merged[1], "-o", tmp_path / "page")
    assert done.exit_code == 1
    assert done.output.strip().splitlines() == [
        "Error: the report is drawn with matplotlib, which is not installed: pip install 'mergekit-pave[report]'"
    ]


def test_nothing_of_others_is_overwritten(merged, tmp_path, undrawn):
    _, out, _ = merged
    (tmp_path / "index.html").write_text("mine")
    done = run(out, "-o", tmp_path)
    assert done.exit_code == 1 and "index.html is not from an earlier report" in done.output
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"] and (tmp_path / "index.html").read_text() == "mine"
    (tmp_path / "index.html").unlink()
    (tmp_path / "energy.png").write_text("mine, too")
    done = run(out, "-o", tmp_path)
    assert done.exit_code == 1 and "energy.png is not from" in done.output
    assert [file.name for file in tmp_path.iterdir()] == ["energy.png"]
    done = run(out, "-o", tmp_path / "energy.png")
    assert done.exit_code == 1 and "is a file" in done.output


def test_a_report_takes_the_place_of_an_earlier_one(merged, tmp_path, monkeypatch):
    _, out, _ = merged
    first = written(out, "-o", tmp_path / "page")
    (tmp_path / "page" / "notes.txt").write_text("mine")
    write_bytes = Path.write_bytes

    def failing(path, data):
        write_bytes(path, data[:100])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", failing)
    done = run(out, "-o", tmp_path / "page")
    assert done.exit_code == 1 and "no space left" in done.output
    monkeypatch.undo()
    assert (tmp_path / "page" / "index.html").read_text() == first
    assert not [file for file in (tmp_path / "page").iterdir() if file.name.startswith(".")]
    assert written(out, "-o", tmp_path / "page") == first
    assert (tmp_path / "page" / "notes.txt").read_text() == "mine"


def rows_of(layers: int, models: int, stacks: tuple[str, ...] = ("model.layers",)) -> list[dict]:
    rng = np.random.default_rng(0)
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    names = [f"{stack}.{layer}.{p}.weight" for stack in stacks for layer in range(layers) for p in projections]
    return [
        {
            "tensor": name,
            "output": name,
            "model": f"someone/model-{model}",
            "components": 8192,
            "kept": 8192 - int(rng.integers(0, 300)),
            "energy_dropped": float(rng.uniform(0, 1e-4)),
            "removed_norm": float(rng.uniform(0.1, 3)),
            "change_norm": 1.0,
            "tokens": 65536,
        }
        for name in names
        for model in range(models)
    ]


def report_of(rows: list[dict]) -> dict:
    settings = {"rank_ratio": 0.984, "allocation": "spectral", "regularization": {"relative": 0.01}, "target": "weights"}
    settings |= {"exclude": [], "include": []}
    source = {
        "data": [{"path": "someone/texts", "split": "train"}],
        "covariance": None,
        "settings": settings,
        "calibration": {"samples": 256, "seed": 42},
        "samples": 256,
        "tokens": 65536,
        "left_as_they_are": {},
    }
    return {
        "versions": {"mergekit-pave": "0.1.0"},
        "settings": settings,
        "models": {model: source for model in dict.fromkeys(row["model"] for row in rows)},
        "not_purified": [],
        "warnings": [],
        "tensors": len(rows) + 5,
        "purified": rows,
    }


def emr_of(models: int, **more) -> dict:
    """The section on a merge by `emr`. Each model differs from the others; the second has a head of its own."""
    of_models = {
        f"someone/model-{i}": {
            "file": f"emr/model-{i}.safetensors",
            "bytes": 1_500_000 + i,
            "scale": 0.9 + i / 100,
            "distance": 0.4 + i / 100,
            "agreed": 0.625,
            "own": ["classifier.bias", "classifier.weight"] if i == 1 else [],
        }
        for i in range(models)
    }
    return {"tensors": 12, "base_only": {}, "models": of_models} | more


def test_what_emr_restores(tmp_path, undrawn):
    """A section with its table and its picture; nothing is told of calibration or purification that was not done."""
    report = report_of([]) | {"emr": emr_of(3, base_only={"lm_head.bias": "not in a"}), "tensors": 14, "warnings": ["look"]}
    report["not_purified"] = list(report["emr"]["models"])
    page = render.write(tmp_path / "page", "merged", report, None, "merge_method: emr").read_text()
    assert {file.name for file in (tmp_path / "page").iterdir()} == {"index.html", "restored.png"}
    rows = [re.findall("<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page)]
    for i, own in enumerate(("-", "classifier.bias, classifier.weight", "-")):
        file = f"emr/model-{i}.safetensors"
        assert [f"model-{i}", file, "1.5 MB", f"{0.9 + i / 100:.3g}", "62.5 %", f"{0.4 + i / 100:.3g}", own] in rows
    assert "mergekit-pave restore OUT model-0" in page and ["not in a", "1"] in rows and "Look here.</b> look" in page
    assert "<b>12 of 14</b><span>tensors shared through masks" in page and "<b>0.42</b><span>distance of a restored" in page
    assert "No model was purified." in page and "Merged, but not purified" not in page and "setting</th>" not in page
    purified = report_of(rows_of(2, 2)) | {"emr": report["emr"], "not_purified": ["someone/model-2"]}
    page = render.write(tmp_path / "both", "merged", purified, None, "merge_method: emr").read_text()
    assert all(f'id="{key}"' in page for key in ("restored", "models", "kept")) and "not purified: someone/model-2" in page


def test_bars_are_the_distances_of_the_restored_models():
    models = emr_of(4)["models"]
    models["someone/model-2"]["distance"], models["someone/model-3"]["distance"] = None, 1.5
    panel = distances.plot_distances(models).figure.axes[0]
    assert [bar.get_width() for bar in panel.patches] == pytest.approx([0.4, 0.41, 0.0, 1.5])
    assert [label.get_text() for label in panel.get_yticklabels()] == [f"model-{i}" for i in range(4)]
    assert {"0.4", "0.41", "equals the base model", "1.5"} <= {text.get_text() for text in panel.texts}
    assert panel.get_xlim()[1] > 1.5 and panel.get_ylim()[0] > panel.get_ylim()[1]


def test_letters_that_the_font_has_not(tmp_path, recwarn):
    """Names of models may have any; matplotlib warns of each that it cannot draw, which says nothing to our reader."""
    rows = [row | {"model": name} for name in ("模型/数学", "모델 ཨ ", "モデル") for row in rows_of(2, 1)]
    page = render.write(tmp_path / "page", "合并", report_of(rows), None, None).read_text()
    assert "数学" in page and "モデル" in page
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


@pytest.mark.parametrize("layers, models", [(80, 2), (12, 12)])
def test_large_models_make_no_large_page(layers, models, tmp_path):
    page = render.write(tmp_path / "page", "large", report_of(rows_of(layers, models)), None, None)
    text = page.read_text()
    assert len(text) < 1_500_000
    assert text.count("</") + text.count("/>") < 9000
    assert all(Image.open(file).height < 6000 for file in page.parent.glob("*.png"))


def test_towers_and_decoders_have_pictures_of_their_own(tmp_path, undrawn):
    rows = rows_of(4, 2, ("model.language_model.layers", "model.visual.blocks"))
    render.write(tmp_path / "page", "two towers", report_of(rows), None, None)
    names = {file.stem for file in (tmp_path / "page").glob("*.png")}
    assert {"kept-rank-model-language-model-layers", "kept-rank-model-visual-blocks"} <= names and len(names) == 6


def test_text_in_names_is_text(tmp_path):
    rows = [row | {"model": "<script>alert(1)</script> & $co"} for row in rows_of(2, 1, ('a"><script>b', "$x$"))]
    page = render.write(tmp_path / "page", "<b>bold</b>", report_of(rows), None, None).read_text()
    assert "<script" not in page and "<b>bold" not in page and "&lt;script&gt;" in page
    assert "$x$" in page and "$co" in page


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium here")
def test_in_a_browser(whole, tmp_path):
    """No error on the console, and nothing that cannot be loaded, wide or narrow, light or dark; and it would be noticed."""
    with browser.chromium() as tab:
        for dark in (False, True):
            for width in (1200, 390):
                tab.open(whole / "index.html", dark=dark, width=width)
                assert tab.problems == []
                assert tab.evaluate("document.querySelectorAll('figure svg').length") == 9
                # Pictures scroll within themselves; the page does not.
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
                assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == (
                    "rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)"
                )
                ink = tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
                assert ink == tab.evaluate("getComputedStyle(document.body).color")
        page = (whole / "index.html").read_text()
        broken = page.replace("</main>", "<img src=gone.png><script>console.error('planted')</script>")
        (tmp_path / "broken.html").write_text(broken)
        tab.open(tmp_path / "broken.html")
        assert any("planted" in problem for problem in tab.problems)
        assert any("ERR_FILE_NOT_FOUND" in problem for problem in tab.problems)
