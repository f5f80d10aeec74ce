"""Which configs `mergekit-pave tune` tries, what it refuses to try, and how it writes the one that is best."""

import copy
import math

import pytest
import yaml
from mergekit.config import MergeConfiguration

from mergekit_pave.errors import PaveError
from mergekit_pave.planning.variants import Choice, combinations, default_combinations, in_full, make_variants, parse_choice
from mergekit_pave.planning.weights import Found, as_changes, search, weights_of
from mergekit_pave.report.page.labels import label_settings
from mergekit_pave.report.rewritten import rewrite

TEXT = """\
# The merge of my dreams
merge_method: ties            # or regmean?

# what both began as
base_model: ./base
models:
  - model: ./math
    parameters: {weight: 0.50, density: 0.9}  # as in the paper
  - model: ./code
    parameters:
      weight: 0.5
      density: 0.9

dtype: bfloat16

pave:   # measured
  # our data
  models:
    - model: ./math
      data: {path: "math.jsonl", text: 'on'}   # short
    - {model: ./code, data: {path: code.jsonl}}
# the end
"""


def content(**more):
    return yaml.safe_load(TEXT) | more


def tried(*choices, of=None):
    """The changes of all variants."""
    return [variant.changes for variant in variants(*choices, of=of)]


def variants(*choices, of=None):
    of = of or content()
    return make_variants(of, combinations(in_full(map(parse_choice, choices), of)))


def default(of):
    of = copy.deepcopy(of)
    config = MergeConfiguration.model_validate(copy.deepcopy(of))
    return [variant.changes for variant in make_variants(of, default_combinations(config, of))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parameters.lambda=0.6,1", Choice("parameters.lambda", [0.6, 1])),
        ("merge_method=ties,regmean", Choice("merge_method", ["ties", "regmean"])),
        ("pave.refine=false,true", Choice("pave.refine", [False, True])),
        ("parameters.lambda=[0.5, 1],[1, 0.5]", Choice("parameters.lambda", [[0.5, 1], [1, 0.5]])),
        ("pave.regularization={relative: 0.1},3", Choice("pave.regularization", [{"relative": 0.1}, 3])),
        ("chat_template='a, b',c", Choice("chat_template", ["a, b", "c"])),
        ("tokenizer.source=a=b", Choice("tokenizer.source", ["a=b"])),
    ],
)
def test_values_are_yaml_between_commas(text, expected):
    assert parse_choice(text) == expected


@pytest.mark.parametrize(
    "text", ["parameters.lambda", "parameters.lambda=", "=1", "a..b=1", "a=[1", "a=1], [2", "a=1 # 2", "a=1,,2"]
)
def test_what_is_no_list_of_values_is_refused(text):
    with pytest.raises(PaveError, match="--set"):
        parse_choice(text)


def test_every_combination_is_tried_after_the_config_as_it_is():
    found = tried("parameters.lambda=0.5,1.5", "pave.rank_ratio=0.9,1")
    assert found == [{}] + [{"parameters.lambda": a, "pave.rank_ratio": b} for a in (0.5, 1.5) for b in (0.9, 1)]


def test_a_variant_holds_what_it_sets_and_leaves_the_rest():
    original = content()
    _, variant = variants("models.1.parameters.weight=0.8", of=original)
    assert original == content()
    assert variant.content["models"][1]["parameters"] == {"weight": 0.8, "density": 0.9}
    assert variant.config.models[1].parameters["weight"] == 0.8
    assert variant.name == "models.1.parameters.weight=0.8"


@pytest.mark.parametrize(
    "choice",
    [
        "parameters.lambda=1",
        "pave.rank_ratio=0.984",
        "pave.refine=false",
        "parameters.normalize=true",
        "dtype=bfloat16",
        "models.0.parameters.weight=0.5",
    ],
)
def test_what_the_config_means_already_is_tried_once(choice):
    assert tried(choice) == [{}]


def test_missing_mappings_are_made():
    assert variants("parameters.lambda=0.5")[1].content["parameters"] == {"lambda": 0.5}
    assert variants("tokenizer.source=base")[1].content["tokenizer"] == {"source": "base"}


@pytest.mark.parametrize("refine", [True, {"covariance": 0.3}])
def test_settings_of_refining_may_be_set_where_it_is_switched_on(refine):
    config = content()
    config["pave"]["refine"] = refine
    _, variant = variants("pave.refine.lambda=1.4", of=config)
    assert variant.config.pave.refinement.lambda_ == 1.4
    assert variant.config.pave.refinement.covariance == (0.3 if isinstance(refine, dict) else 0.5)


def test_settings_of_refining_have_no_meaning_where_it_is_switched_off():
    found = tried("pave.refine.lambda=1,1.4", "pave.refine=false,true")
    assert found == [{}, {"pave.refine.lambda": 1, "pave.refine": True}, {"pave.refine.lambda": 1.4, "pave.refine": True}]


def test_parameters_have_no_meaning_for_a_method_without_them():
    found = variants("merge_method=ties,regmean", "parameters.covariance=0.2,0.7")
    assert [variant.changes for variant in found] == [
        {},
        {"merge_method": "regmean", "parameters.covariance": 0.2},
        {"merge_method": "regmean", "parameters.covariance": 0.7},
    ]
    assert found[1].content["models"][0] == {"model": "./math", "parameters": {"weight": 0.5}}, "density is of ties alone"
    assert found[0].content == content()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("samples=8", "--set samples: write in full what is meant: calibration.samples"),
        ("covariance=0.3", "write in full what is meant: refine.covariance"),  # ties has none
        ("lamda=1", "unknown key 'lamda'"),
        ("density=0.5", "has a density of its own; set models.0.parameters.density, models.1.parameters.density"),
        ("models.0.rank_ratio=0.5", "unknown key 'rank_ratio'.* in models.0"),
        ("lamda=1", "unknown key 'lamda'; did you mean 'lambda'"),
        ("paramters.lambda=1", "unknown key 'paramters'; did you mean 'parameters'"),
        ("parameters.lamda=1", "unknown parameter 'lamda'; did you mean 'lambda'"),
        ("models.0.parameters.wieght=1", "did you mean 'weight'"),
        ("models.0.paramters.weight=1", "did you mean 'parameters'.* in models.0"),
        ("models.2.parameters.weight=1", "models is a list; its entries have the numbers 0 to 1"),
        ("models.math.parameters.weight=1", "models is a list"),
        ("merge_method.name=1", "merge_method is a value"),
        ("merge_method=tise", "did you mean 'ties'"),
        ("pave.rank_ration=1", "did you mean 'rank_ratio'"),
        ("pave.rank_ratio=2", "pave.rank_ratio=2: pave.rank_ratio: must be a share"),
        ("pave.refine.lamda=2", "did you mean 'lambda'"),
        ("pave.models.0.data.path.x=2", "pave.models.0.data.path is 'math.jsonl' in the config, which has no keys"),
        ("parameters.density=0.5", "has a density of its own; set models.0.parameters.density, models.1.parameters.density"),
        ("parameters={lamda: 1}", "parameters.lamda: unknown parameter 'lamda'; did you mean 'lambda'"),
        ("models=[{model: ./math, paramters: {weight: 1}}]", "did you mean 'parameters'.* in models.0"),
        ("dtype=[1]", r"dtype=\[1\]: dtype: must be a text, not \[1\]"),
    ],
)
def test_what_nobody_would_read_is_refused(choice, message):
    with pytest.raises(PaveError, match=message):
        variants(choice)


@pytest.mark.parametrize(
    ("short", "key"),
    [
        ("lambda=0.6,0.8", "parameters.lambda"),
        ("rank_ratio=0.5", "pave.rank_ratio"),
        ("refine.lambda=1.4", "pave.refine.lambda"),
        ("refine={lambda: 1.4}", "pave.refine"),
        ("calibration.max_tokens=9", "pave.calibration.max_tokens"),
        ("merge_method=tsv", "merge_method"),
        ("tokenizer.source=base", "tokenizer.source"),
    ],
)
def test_a_key_may_be_as_short_as_the_table_shows_it(short, key):
    found = tried(short)
    assert [list(changes) for changes in found[1:]] == [[key]] * (len(found) - 1) and len(found) > 1


def test_names_of_the_table_can_be_typed_back():
    """Whatever else was tried: `lambda` alone is always the merge method's."""
    keys = ["parameters.lambda", "pave.refine.lambda", "pave.rank_ratio", "pave.models.0.rank_ratio", "pave.calibration.samples"]
    for together in ([key] for key in keys), [keys]:
        for group in together:
            value = 0.5 if "samples" not in group[0] else 3
            labels = label_settings([{}, *({key: value} for key in group)], TEXT)[1:]
            typed = [Choice(label.rpartition(" ")[0], [value]) for label in labels]
            assert [choice.key for choice in in_full(typed, content())] == group


def test_methods_that_are_tried_may_have_the_parameter():
    assert [list(changes) for changes in tried("merge_method=regmean", "covariance=0.3")[1:]] == [
        ["merge_method", "parameters.covariance"]
    ]


def test_a_key_that_is_given_short_and_in_full_is_given_twice():
    with pytest.raises(PaveError, match=r"--set parameters\.lambda is given twice"):
        tried("lambda=1", "parameters.lambda=2")


SLICES = """\
merge_method: ties
base_model: ./base
parameters: {density: 0.5}
slices:
- sources:
  - {model: ./math, layer_range: [0, 2], parameters: {weight: 1}}
  - {model: ./base, layer_range: [0, 2]}
- parameters: {weight: 0.5}
  sources:
  - {model: ./code, layer_range: [2, 4]}
  - {model: ./base, layer_range: [2, 4]}
"""


def test_parameters_that_slices_override_are_refused():
    config = yaml.safe_load(SLICES)
    with pytest.raises(PaveError, match=r"set slices.0.sources.0.parameters.weight, slices.1.sources.0.parameters.weight"):
        variants("parameters.weight=0.3", of=config)
    assert len(variants("parameters.density=0.3", of=config)) == 2
    del config["slices"][1]["parameters"]
    assert len(variants("parameters.weight=0.3", of=config)) == 2


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("rank_ratio=0.9", {"rank_ratio": 0.5}),
        ("regularization={relative: 0.1}", {"regularization": 3}),
        ("calibration.samples=3", {"calibration": {"samples": 8}}),
        ("calibration={samples: 3}", {"calibration": {"samples": 8}}),
    ],
)
def test_settings_of_the_block_that_each_model_overrides_are_refused(key, own):
    config = content()
    config["pave"]["models"][0] |= own
    assert len(variants(f"pave.{key}", of=config)) == 2
    config["pave"]["models"][1] |= own
    with pytest.raises(PaveError, match=r"of its own; set pave.models.0.*, pave.models.1."):
        variants(f"pave.{key}", of=config)
    config["pave"] |= {"data": {"path": "all.jsonl"}, "models": config["pave"]["models"][:1]}
    assert len(variants(f"pave.{key}", of=config)) == 2, "the model that is not listed has none of its own"


def test_what_each_model_has_of_its_own_is_not_tried_by_default():
    config = content()
    for entry in config["models"]:
        entry["parameters"]["lambda"] = 0.5
    for entry in config["pave"]["models"]:
        entry["rank_ratio"] = 0.9
    assert default(config) == [{}, *({"pave.refine": {"lambda": scale}} for scale in (1, 1.2, 1.4))]


def test_settings_of_refining_are_refused_where_the_config_switches_it_off():
    config = content()
    config["pave"]["refine"] = False
    with pytest.raises(PaveError, match="refine is False in the config"):
        variants("pave.refine.lambda=1.4", of=config)


def test_a_key_is_chosen_once():
    with pytest.raises(PaveError, match="dtype is given twice"):
        variants("dtype=float32", "dtype=float16")


def test_what_is_tried_by_default():
    scales = [0.6, 0.8, 1.0, 1.2]
    plain = [{"parameters.lambda": scale, "pave.rank_ratio": ratio} for scale in scales for ratio in (1, 0.984)]
    plain.remove({"parameters.lambda": 1.0, "pave.rank_ratio": 0.984})
    assert default(content()) == [{}, *plain, *({"pave.refine": {"lambda": scale}} for scale in (1, 1.2, 1.4))]


def test_what_is_tried_by_default_starts_at_the_lambda_of_the_config():
    found = default(content(parameters={"lambda": 0.5}))
    assert [changes.get("parameters.lambda") for changes in found[1:8:2]] == [0.3, 0.4, 0.5, 0.6]
    assert not any("parameters.lambda" in changes for changes in default(content(parameters={"lambda": [0.5, 1]})))


def test_by_default_nothing_is_tried_that_cannot_be_done():
    config = content(merge_method="model_stock")
    config["pave"] |= {"purify": False}
    config["pave"]["models"][0] = {"model": "./math", "covariance": "./covariances"}
    assert default(config) == [{}]


def test_by_default_a_refined_merge_is_compared_with_what_it_starts_from():
    config = content()
    config["pave"] |= {"purify": False, "refine": {"covariance": 0.3}}
    found = default(config)
    assert found[1] == {"parameters.lambda": 0.6, "pave.refine": False}
    assert found[5:] == [{"pave.refine": {"covariance": 0.3, "lambda": scale}} for scale in (1, 1.4)]


def test_the_best_config_is_written_as_a_person_would():
    best = variants(
        "parameters.lambda=1.2", "models.0.parameters.weight=0.7", "pave.refine.lambda=1.4", "pave.models.1.target=task_vector"
    )
    written = rewrite(TEXT, best[1].content, "a table\n\nof two lines")
    changed = [
        ("weight: 0.50, density: 0.9} ", "weight: 0.7, density: 0.9}  "),
        ("regmean?\n", "regmean?\nparameters: {lambda: 1.2}\n"),
        ("our data\n", "our data\n  refine: {lambda: 1.4}\n"),
        ("path: code.jsonl}}", "path: code.jsonl}, target: task_vector}"),
    ]
    expected = TEXT
    for old, new in changed:
        expected = expected.replace(old, new)
    assert written == "# Written by `mergekit-pave tune`.\n# a table\n#\n# of two lines\n\n" + expected
    assert yaml.safe_load(written) == best[1].content


COMMENTED = """\
merge_method: ties  # or not
# about lambda
parameters:
  density: 0.5
  # between
  lambda: 2
  # the last parameter
# about the models
models:
  - model: ./math
    parameters:
      density: 0.9  # much
      # about weight
      weight: 0.5
  # about code
  - {model: ./code}
pave:
  # our block
  refine:
    lambda: 2
  # about our models
  models: []
# the end
"""


@pytest.mark.parametrize(
    ("path", "value", "gone", "instead"),
    [
        (("parameters", "lambda"), None, "  lambda: 2\n  # the", "  # the"),
        (("parameters", "density"), None, "  density: 0.5\n", ""),
        (("parameters",), None, "parameters:\n  density: 0.5\n  # between\n  lambda: 2\n  # the", "  # the"),
        (("models", 0, "parameters", "density"), None, "      density: 0.9  # much\n", ""),
        (
            ("models", 0, "parameters"),
            {},
            "parameters:\n      density: 0.9  # much\n      # about weight\n      weight: 0.5\n",
            "parameters: {}\n",
        ),
        (("pave", "refine"), None, "  refine:\n    lambda: 2\n", ""),
        (("pave", "refine"), False, "  refine:\n    lambda: 2\n", "  refine: false\n"),
        (("merge_method",), "regmean", "merge_method: ties  # or", "merge_method: regmean # or"),
    ],
)
def test_the_comment_behind_what_is_taken_away_or_replaced_stays(path, value, gone, instead):
    wanted = yaml.safe_load(COMMENTED)
    at = wanted
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    assert gone in COMMENTED
    assert rewrite(COMMENTED, wanted, "").split("\n", 2)[2] == COMMENTED.replace(gone, instead)


def test_ends_of_lines_stay():
    wanted = content(parameters={"lambda": math.nan})
    written = rewrite(TEXT.replace("\n", "\r\n"), wanted, "one\ntwo")
    assert written == rewrite(TEXT, wanted, "one\ntwo").replace("\n", "\r\n")
    assert "parameters: {lambda: .nan}\r\n" in written


def test_the_table_of_an_earlier_tuning_is_replaced():
    once = rewrite(TEXT, content(), "old\nolder")
    assert rewrite(once, content(), "new") == "# Written by `mergekit-pave tune`.\n# new\n\n" + TEXT


def test_texts_and_numbers_that_yaml_reads_in_several_ways_are_written_as_they_were_meant():
    wanted = content(chat_template="yes", parameters={"lambda": 1e-05, "normalize": False})
    assert yaml.safe_load(rewrite(TEXT, wanted, "")) == wanted


def test_parameters_that_are_taken_away_leave_the_rest():
    best = variants("merge_method=regmean")[1]
    written = rewrite(TEXT, best.content, "")
    assert yaml.safe_load(written) == best.content
    assert "parameters: {weight: 0.50}" in written and "# as in the paper" in written


def test_parts_that_stand_for_several_are_set_one_by_one():
    text = "merge_method: linear\nmodels:\n- {model: a, parameters: &same {weight: 1}}\n- {model: b, parameters: *same}\n"
    best = make_variants(yaml.safe_load(text), [{"models.0.parameters.weight": 2}])[1]
    assert [model.parameters["weight"] for model in best.config.models] == [2, 1]
    with pytest.raises(PaveError, match="cannot be changed in place"):
        rewrite(text, best.content, "")


def test_weights_are_searched_one_after_the_other():
    target = {0: 0.7, 2: 0.25}
    tried = []

    def value_of(weights):
        tried.append(weights)
        return -sum(abs(math.log(weights[i] / target[i])) for i in target)

    start = Found({0: 0.5, 2: 0.5}, value_of({0: 0.5, 2: 0.5}))
    *_, best = search(start, value_of)
    assert best.weights == {0: 0.7, 2: 0.297}
    assert len(tried) <= 1 + 2 * 2 * 2
    assert as_changes(best.weights) == {"models.0.parameters.weight": 0.7, "models.2.parameters.weight": 0.297}


def test_weights_are_those_of_the_config_or_the_default_of_its_method():
    config = MergeConfiguration.model_validate(content())
    assert weights_of(config) == {0: 0.5, 1: 0.5}
    models = [{"model": "./base"}, {"model": "./math"}, {"model": "./code", "parameters": {"weight": 2}}]
    config = MergeConfiguration.model_validate(content(merge_method="regmean", models=models))
    assert weights_of(config) == {1: 0.5, 2: 2}
    models[1]["parameters"] = {"weight": [0, 1]}
    with pytest.raises(PaveError, match=r"models.1.parameters.weight is \[0, 1\]"):
        weights_of(MergeConfiguration.model_validate(content(models=models)))
