"""What people and scripts are told of the settings that were tried."""

import json
import re

import pytest

from mergekit_pave.report.page.labels import label_settings
from mergekit_pave.report.tuned import as_text, is_within_noise, shown, tuned


def score(rows, base=(2.0, 2.0, 2.0, 2.0), bits=None):
    """A score of two models, of whose rows these are the distances.

    Args:
        bits: of the merge on the rows of each model, in bits per byte.
    """
    models = {}
    for name, of_model in zip(("./models/math", "./models/code"), rows):
        kept = 1 - sum(of_model) / sum(base) if sum(base) else None
        models[name] = {"rows": 4, "kept": kept, "error": 0.01, "by_row": {"merged": list(of_model), "base": list(base)}}
        models[name]["bits_per_byte"] = bits and {"merged": bits[name], "expert": 1.0, "base": 3.0}
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


def bits(math, code):
    return {"./models/math": math, "./models/code": code}


def test_of_settings_alike_the_one_with_the_lowest_loss_is_named():
    rows = [[0.5, 0.6, 0.4, 0.5], [0.9, 1.0, 0.8, 0.9]]
    alike = [[0.5, 0.2, 0.4, 0.91], [0.9, 1.0, 0.8, 0.9]]
    worse = [[1.0, 1.1, 0.9, 1.0], [1.0, 1.1, 0.9, 1.0]]
    settings = [
        ({}, score(worse, bits=bits(1.0, 1.0))),  # the lowest loss of all, but far behind
        ({"parameters.lambda": 1.2}, score(rows, bits=bits(2.2, 2.4))),
        ({"parameters.lambda": 1.1}, score(alike, bits=bits(2.3, 2.2))),
    ]
    lines = table(settings).splitlines()
    assert re.split("  +", lines[2])[3:5] == ["behind the best", "bits per byte"]
    assert [re.split("  +", line.replace(" *", ""))[4] for line in lines[3:6]] == ["1.000", "2.300", "2.250"]
    assert lines[-1] == "Of these and the best the lowest loss has lambda 1.1: 2.250 bits per byte, the mean of the models."
    assert [setting["bits_per_byte"] for setting in tuned(settings, "mean")["settings"]] == pytest.approx([1.0, 2.3, 2.25])


def test_models_without_a_loss_have_no_such_column():
    assert "bits" not in table(ALL)
    assert tuned(ALL, "mean")["settings"][0]["bits_per_byte"] is None


def test_a_model_that_does_not_fit_its_data_is_warned_of():
    own = score([[1.0] * 4, [1.0] * 4], bits=bits(2.0, 2.0))
    own["models"]["./models/code"]["bits_per_byte"]["expert"] = 3.5
    text = table([({}, own), ({"dtype": "float16"}, own)])
    assert text.count("Warning") == 1
    assert "./models/code predicts its own held-out rows worse than the base model does (3.500 and 3.000 bits per byte)" in text


def test_settings_are_shown_as_they_are_given():
    assert shown({"a.b": 0.5, "c": [1, {"d": True}], "e": "on"}) == "a.b=0.5 c=[1, {d: true}] e='on'"
