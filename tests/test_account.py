"""What a merge says at its end: one block of at most ten lines, whatever was done and however many models there are."""

import logging

import pytest
from merging import config_for, invoke, merge
from test_page import emr_of

from mergekit_pave.report.account import account
from mergekit_pave.report.emr import emr_warnings
from mergekit_pave.report.summary import complete


def row(model: str, tensor: str, removed: float) -> dict:
    numbers = {"components": 100, "kept": 98, "energy_dropped": 1e-6, "removed_norm": removed, "change_norm": 1.0, "tokens": 500}
    return {"tensor": tensor, "output": tensor, "model": model} | numbers


def report_of(models: int, **more) -> dict:
    """Of a merge that purified two tensors of each model."""
    names = [f"./experts/model{i}" for i in range(models)]
    left = {"vision.0.a.weight": "never called during calibration", "vision.1.b.weight": "equal to the base model's"}
    header = {"tensors": 5, "models": {name: {"left_as_they_are": dict(left)} for name in names}, "warnings": [], **more}
    tensors = ("layers.0.q.weight", "layers.1.q.weight")
    rows = [[row(name, tensor, 0.1 * (i + 1)) for tensor in tensors] for i, name in enumerate(names)]
    return complete(header, ((name, {"rows": of, "left_as_they_are": {}}) for name, of in zip(names, rows)))


REGMEAN = {
    "closed_form": [{"tensor": "layers.0.q.weight", "alignment": {"./a": 0.5, "./b": 0.7}}],
    "as_task_arithmetic": {"norm.weight": "not the weight of a linear layer"},
    "weights": {"closed form": 900, "not the weight of a linear layer": 100},
}
VOCABULARY = {"merged": [{"tensor": "lm_head.weight", "rows": 320, "shown": 320, "by": "predictions", "tokens": {}}], "left": {}}
REFINED = {"layers": [{"tensor": "layers.0.q.weight", "error_before": 0.4, "error_after": 0.2}], "left": {}}


def test_few_models_have_a_line_each():
    told = account(report_of(3), "./merged", "mergekit-pave score config.yml ./merged").splitlines()
    assert told == [
        "PAVE: ./merged is merged",
        "  purified    2 of 5 tensors",
        "              model0  kept 98.0 % of its rank, removed 0.1 x its change",
        "              model1  kept 98.0 % of its rank, removed 0.2 x its change",
        "              model2  kept 98.0 % of its rank, removed 0.3 x its change",
        "  left alone  3 weights of 3 models, never called during calibration: vision.*.a.weight; 3 weights of 3 models, equal "
        "to the base model's: vision.*.b.weight",
        "  report      ./merged/pave_report.json; as a page: mergekit-pave report ./merged",
        "  next        mergekit-pave score config.yml ./merged",
    ]


@pytest.mark.parametrize("models", [1, 2, 3, 4, 5, 30])
def test_never_more_than_ten_lines(models):
    more = {"regmean": REGMEAN, "vocabulary": VOCABULARY, "refined": REFINED}
    for given in ({}, more):
        told = account(report_of(models, **given), "./merged", "next").splitlines()
        assert len(told) <= 10 and told[-1].split() == ["next", "next"]
    words = {line[:12].strip() for line in told}
    assert words >= {"purified", "regmean", "vocabulary", "refined", "left alone", "report"}
    assert "  regmean     1 of 5 tensors in closed form (90 % of the weights), alignment with a 0.50, b 0.70; as" in "\n".join(
        told
    )


def test_a_merge_by_emr():
    """Each model has a line: how close to it the restored one is. Then how to get one back."""
    report = {"tensors": 14, "models": {}, "purified": [], "warnings": [], "emr": emr_of(3)}
    report["emr"]["models"]["someone/model-2"]["distance"] = None
    assert account(report, "./my merge", "next").splitlines() == [
        "PAVE: ./my merge is merged",
        "  emr         12 of 14 tensors shared through masks; 3 files of 4.5 MB in ./my merge/emr",
        "              model-0  restored, it differs by 0.4 x its change",
        "              model-1  restored, it differs by 0.41 x its change; 2 tensors of its own kept",
        "              model-2  equals the base model",
        "  restore     mergekit-pave restore './my merge' model-0 -o ./model-0-again; likewise model-1, model-2",
        "  report      ./my merge/pave_report.json; as a page: mergekit-pave report './my merge'",
        "  next        next",
    ]


@pytest.mark.parametrize("purified", [0, 1, 3, 30])
@pytest.mark.parametrize("models", [1, 2, 3, 4, 5, 30])
def test_never_more_than_ten_lines_by_emr(models, purified):
    told = account(report_of(purified, emr=emr_of(models)), "./merged", "next")
    lines = told.splitlines()
    assert len(lines) <= 10
    assert {line[:12].strip() for line in lines} >= {"emr", "restore", "report", "next"} | ({"purified"} if purified else set())
    if models == 30:
        assert (
            "30 files of 45 MB in ./merged/emr; restored, they differ by 0.4 x (model-0) to 0.69 x (model-29) their change; "
            "2 tensors of their own kept\n"
        ) in told
        assert "restore ./merged model-0 -o ./model-0-again; likewise 29 others\n" in told


def test_models_that_are_restored_badly_are_warned_of():
    emr = emr_of(5)
    names = list(emr["models"])
    for name, change in zip(names, ({"distance": 1.25}, {"distance": 0.999, "scale": 2.0}, {"scale": 2.5}, {"distance": 1.0})):
        emr["models"][name] |= change
    report = {"emr": emr, "purified": [row(names[3], "a", 1.0)]}
    first, second, third = emr_warnings(report)
    assert first.startswith(f"{names[0]}: restored, it is 1.25 times as far from the model as the base model is")
    assert second.startswith(f"{names[2]}: its scale is 2.5, so at most 40 % of its change")
    assert third.startswith(f"{names[3]}: restored, it is as far from the model as the base model is, also by what purification")
    emr["models"]["someone/model-4"] |= {"distance": None, "scale": 1.0}
    assert emr_warnings(report) == [first, second, third]


def test_of_many_models_the_range_is_told():
    told = account(report_of(30), "./merged", "next")
    assert (
        "  purified    2 of 5 tensors of 30 models, which keep 98.0 % of their rank; removed 0.1 x (model0) to 3 x (model29) "
        "their change, in 20 above 1 x\n"
    ) in told
    assert "  warnings    20: see above, and the report\n" in told


def test_warnings_of_many_models_are_few_lines(llama, tmp_path, cache, caplog, monkeypatch):
    monkeypatch.setattr("mergekit_pave.tasks.report._WARNINGS", 2)
    merge(config_for(llama, {}, models=3), tmp_path / "out")
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("the removed part is" in message for message in logged) == 1
    assert logged[-1].startswith("and 2 warnings of the same kind; pave_report.json has all")


def following_of(caplog) -> str:
    return caplog.messages[-1].splitlines()[-1].split(maxsplit=1)[1]


def test_what_to_type_next(llama, tmp_path, cache, caplog):
    """The config that mergekit-yaml was given, also with --quiet; from Python the copy that mergekit writes."""
    config = config_for(llama, {"purify": False}, merge_method="regmean")
    out = tmp_path / "my model"
    assert invoke(config, out, "--quiet").exit_code == 0
    assert following_of(caplog) == f"mergekit-pave score '{out}.yml' '{out}'"
    merge(config, tmp_path / "out")
    assert following_of(caplog) == f"mergekit-pave score {tmp_path}/out/mergekit_config.yml {tmp_path}/out"
    del config["base_model"]
    merge(config, tmp_path / "out", write_model_card=False)
    assert following_of(caplog) == f"mergekit-pave score CONFIG {tmp_path}/out --base MODEL"


@pytest.fixture
def bare(llama, tmp_path, monkeypatch):
    """A config that names its models as `tuned0`, from the folder that they are in."""
    monkeypatch.chdir(llama.base.parent)
    config = config_for(llama, {"purify": False}, merge_method="regmean")
    config["base_model"] = llama.base.name
    for entry in config["models"] + config["pave"]["models"]:
        entry["model"] = entry["model"].rpartition("/")[2]
    return config


def test_bare_names_are_refused_before_a_merge_whose_card_would_fail(bare, tmp_path, cache):
    refused = invoke(bare, tmp_path / "out")
    assert refused.exit_code == 1 and not (tmp_path / "out").exists() and not cache.exists()
    for words in ("base, tuned0, tuned1: ", "Write ./base in the config", "--no-write-model-card"):
        assert words in refused.output
    assert invoke(bare, tmp_path / "out", "--no-write-model-card").exit_code == 0


def test_bare_names_are_mergekits_affair_without_a_block(bare, tmp_path):
    del bare["pave"]
    bare["parameters"] = {"covariance": 0}
    failed = invoke(bare, tmp_path / "out")
    assert failed.exit_code == 1 and (tmp_path / "out" / "model.safetensors").exists() and "./base" not in failed.output


def test_bare_names_are_fine_where_the_hub_answers(bare, tmp_path, cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.repo_exists", lambda *args, **kwargs: False)
    assert invoke(bare, tmp_path / "out").exit_code == 0


def test_paths_are_never_asked_about(bare, tmp_path, cache):
    write = {"base_model": "./base", "models": [entry | {"model": f"./{entry['model']}"} for entry in bare["models"]]}
    models = [entry | {"model": f"./{entry['model']}"} for entry in bare["pave"]["models"]]
    assert invoke(bare | write | {"pave": bare["pave"] | {"models": models}}, tmp_path / "out").exit_code == 0
