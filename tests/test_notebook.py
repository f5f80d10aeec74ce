"""`examples/first_merge.ipynb`: made from its script, and executed as a reader would."""

import json
import os
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest
import yaml

SCRIPT = Path(__file__).parents[1] / "examples/first_merge.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def test_notebook_is_made_from_its_script():
    script, notebook = jupytext.read(SCRIPT), nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    made, kept = ([(cell.cell_type, cell.source) for cell in each.cells] for each in (script, notebook))
    assert made == kept, "make it again: jupytext --to ipynb examples/first_merge.py"
    assert notebook.metadata.kernelspec == script.metadata.kernelspec
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
def test_notebook(tmp_path, monkeypatch, cache):
    """Every cell, by a kernel whose shell does not have the commands on its path."""
    scripts = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != scripts))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the package is here already
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "reader"
    folder.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.execute(notebook, cwd=str(folder), timeout=300)

    def said(start: str) -> str:
        """What the cell that begins so has put out."""
        (cell,) = (cell for cell in notebook.cells if cell.source.startswith(start))
        return "".join(output.get("text") or output.data.get("text/html", "") for output in cell.outputs)

    assert "ERROR" not in said("%pip")
    assert f"{scripts}/mergekit-yaml\n{scripts}/mergekit-pave\n" in said("import html")
    assert json.loads((folder / "merged/pave_report.json").read_text())["refined"]["layers"]
    scores = json.loads((folder / "merged/pave_scores.json").read_text())
    assert scores["models"].keys() == {"./recipes", "./forecasts"}
    assert scores["mean"]["kept"] > 0.3, "the tiny models are worth nothing"
    assert f"{scores['mean']['kept']:.1%}".replace("%", "") in said("!mergekit-pave score")
    for page in ("def show", 'show("tuned'):
        assert "srcdoc=" in said(page) and "&lt;svg" in said(page)
    assert f"{scores['mean']['kept']:.1%}".replace("%", "") in said("!mergekit-pave tune")
    best = yaml.safe_load((folder / "best.yml").read_text())
    assert best["models"] == [{"model": "./recipes"}, {"model": "./forecasts"}]
