"""What people and scripts are told of the settings that were tried."""

import json

import pytest

from mergekit_pave.report.page.labels import label_settings
from mergekit_pave.report.tuned import as_text, is_within_noise, shown, tuned


def score(rows, base=(2.0, 2.0, 2.0, 2.0)):
    """A score of two models, of whose rows these are the distances."""
    models = {}
    for name, of_model in zip(("./models/math", "./models/code"), rows):
        kept = 1 - sum(of_model) / sum(base) if sum(base) else None
        models[name] = {"rows": 4, "kept": kept, "error": 0.01, "by_row": {"merged": list(of_model), "base": list(base)}}
    shares = [model["kept"] for model in models.values() if model["kept"] is not None]
    mean = {"kept": sum(shares) / 2, "error": 0.01} if shares else None
    worst = {"model": "./models/code", "kept": min(shares), "error": 0.01} if shares else None
    return {"base": "./base", "rows": 4, "models": models, "mean": mean, "worst": worst}


PLAIN = ({}, score([[1.0, 1.1, 0.9, 1.0], [1.0, 1.1, 0.9, 1.0]]))
BETTER = ({"parameters.lambda": 1.2}, score([[0.5, 0.6, 0.4, 0.5], [0.9, 1.0, 0.8, 0.9]]))
ALIKE = ({"parameters.lambda": 1.1}, score([[0.9, 0.2, 0.8, 0.11], [0.9, 1.0, 0.8, 0.9]]))
EVEN = ({"pave.refine": {"lambda": 1}}, score([[0.8, 0.9, 0.7, 0.8], [0.8, 0.9, 0.7, 0.8]]))
ALL = [PLAIN, ALIKE, EVEN, BETTER]


def table(settings):
    return as_text(tuned(settings, "mean"), label_settings([changes for changes, _ in settings], None))


def test_settings_are_compared_on_the_same_rows():
    result = tuned(ALL, "mean")
    assert result["best"] == 3
    assert result["settings"][3]["better_than_plain"] == {"value": pytest.approx(0.15), "error": pytest.approx(0, abs=1e-9)}
    assert result["settings"][3]["behind_best"]["value"] == 0
    assert [is_within_noise(setting) for setting in result["settings"]] == [False, True, False, True]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_worst_model_may_choose_another_setting():
    assert tuned(ALL, "worst")["best"] == 2


def test_the_table_has_the_config_as_it_is_first_and_then_the_best():
    lines = table(ALL).splitlines()
    assert lines[0] == "Share kept of each model: 0 % is ./base, 100 % the model, on 4 held-out rows of each."
    assert lines[2].split() == ["setting", "mean", "worst", "behind", "the", "best", "math", "code"]
    starts = ["the config as it is", "lambda 1.2", "lambda 1.1", "refine.lambda 1"]
    assert [line.startswith(start) for line, start in zip(lines[3:7], starts)] == [True] * 4
    assert " best " in lines[4] and "*" in lines[5] and "*" not in lines[6]
    assert lines[-2] == "Best by the mean: lambda 1.2, 15.0 ± 0.0 points above the config as it is."
    assert lines[-1].startswith("* as good as the best")


def test_the_table_says_if_nothing_is_better():
    assert "Nothing that was tried is better than the config as it is" in table([BETTER, PLAIN])


def test_models_that_equal_their_base_cannot_be_compared():
    nothing = score([[0.0] * 4, [0.0] * 4], base=(0.0,) * 4)
    text = table([({}, nothing), ({"dtype": "float16"}, nothing)])
    assert "nothing can be told apart" in text


def test_one_row_tells_nothing_about_its_error():
    one = score([[1.0], [1.0]], base=(2.0,))
    result = tuned([({}, one), ({"dtype": "float16"}, score([[0.5], [1.0]], base=(2.0,)))], "mean")
    assert result["settings"][0]["behind_best"] == {"value": pytest.approx(0.125), "error": None}
    assert is_within_noise(result["settings"][0])


def test_settings_are_shown_as_they_are_given():
    assert shown({"a.b": 0.5, "c": [1, {"d": True}], "e": "on"}) == "a.b=0.5 c=[1, {d: true}] e='on'"
