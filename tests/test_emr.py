"""`merge_method: emr` against the paper's formulas, written in float64 on whole models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.merge_methods import merge_state_dicts
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from merging import config_for, entries, forget_checkpoints, invoke, invoke_multi, merge, write_config
from models import make_model, make_tokenizer, perturbed, save
from reference import weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_pave import PaveError, load_task
from mergekit_pave.cli import main
from mergekit_pave.emr.restore import open_task, write
from mergekit_pave.plugin.phases import plan_merge

NAMES = ("tuned0", "tuned1", "tuned2")


def config_of(family, models=3, **more):
    config = {"merge_method": "emr", "base_model": str(family.base), "dtype": "float32"}
    return config | {"models": [{"model": str(model)} for model in family.tuned[:models]]} | more


def by_definition(base, models):
    """What the paper's formulas give: the shared change, and for each model its masks and its scale."""
    changes = [{name: (model[name].double() - base[name].double()) for name in base} for model in models]
    shared, masks = {}, [{} for _ in models]
    for name in base:
        of_all = torch.stack([change[name] for change in changes])
        sign = torch.sign(of_all.sum(0))
        agree = of_all * sign > 0
        shared[name] = sign * torch.where(agree, of_all.abs(), 0.0).max(0).values
        for i, of_model in enumerate(masks):
            of_model[name] = agree[i]
    scales = [
        sum(change[name].abs().sum() for name in base) / sum((mask[name] * shared[name]).abs().sum() for name in base)
        for change, mask in zip(changes, masks)
    ]
    return shared, masks, [scale.item() for scale in scales]


def task_file(out, name):
    """The masks, the tensors of its own, and the metadata of one model."""
    with safe_open(out / "emr" / f"{name}.safetensors", "np") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    masks = {key.removeprefix("mask."): tensor for key, tensor in tensors.items() if key.startswith("mask.")}
    return masks, {key.removeprefix("own.") for key in tensors if key.startswith("own.")}, metadata


def bits(packed, shape):
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(packed, bitorder="little")[:count].astype(bool)).reshape(shape)


def distance(found, expected, base):
    """‖found - expected‖ / ‖expected - base‖ over all tensors."""
    error = sum((found[name].double() - expected[name].double()).square().sum() for name in expected)
    return (error / sum((expected[name].double() - base[name].double()).square().sum() for name in expected)).sqrt().item()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_it_is_the_definition(families, tmp_path, kind):
    family = families[kind]
    merged = merge(config_of(family), tmp_path / "out")
    base, models = weights(family.base), [weights(model) for model in family.tuned]
    heads = {"classifier.weight", "classifier.bias"} & merged.keys()
    assert all(torch.equal(merged[name], base[name]) for name in heads) and bool(heads) is (kind == "bert")
    base = {name: base[name] for name in merged.keys() - heads}
    shared, masks, scales = by_definition(base, models)
    for name, tensor in base.items():
        assert (merged[name].double() - tensor.double() - shared[name]).abs().max() < 1e-6, name
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())["emr"]
    assert report["tensors"] == len(base) and report["base_only"].keys() == heads
    for i, (name, model) in enumerate(zip(NAMES, family.tuned)):
        found, own, metadata = task_file(tmp_path / "out", name)
        assert found.keys() == base.keys() and own == heads
        assert all(torch.equal(bits(found[key], base[key].shape), masks[i][key]) for key in base)
        assert float(metadata["scale"]) == pytest.approx(scales[i], rel=1e-6)
        assert metadata["model"] == str(model) and metadata["base"] == str(family.base)
        restored = {key: base[key].double() + scales[i] * masks[i][key] * shared[key] for key in base}
        told = report["models"][str(model)]
        assert told["scale"] == float(metadata["scale"])
        assert told["distance"] == pytest.approx(distance(restored, {key: models[i][key] for key in base}, base), rel=1e-5)
        agreed = sum(mask.sum().item() for mask in masks[i].values())
        assert told["agreed"] == pytest.approx(agreed / sum(map(torch.numel, base.values())))
        assert told["bytes"] == (tmp_path / "out" / told["file"]).stat().st_size
        assert sum(mask.nbytes for mask in found.values()) == sum(-(-tensor.numel() // 8) for tensor in base.values())


def test_sixteen_bits_need_no_rounding(llama, tmp_path):
    """Every entry of the merge is that of a model, or of the base."""
    merged = merge(config_of(llama, dtype="bfloat16"), tmp_path / "out")
    cast = [{name: tensor.bfloat16() for name, tensor in weights(folder).items()} for folder in (llama.base, *llama.tuned)]
    _, masks, scales = by_definition(cast[0], cast[1:])
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.stack([tensor == model[name] for model in cast]).any(0).all(), name
    for i, name in enumerate(NAMES):
        found, _, metadata = task_file(tmp_path / "out", name)
        assert all(torch.equal(bits(found[key], mask.shape), mask) for key, mask in masks[i].items())
        assert float(metadata["scale"]) == pytest.approx(scales[i], rel=1e-6)
        assert json.loads(metadata["config"])["dtype"] == "bfloat16"


def test_the_merge_may_be_written_in_another_precision(llama, tmp_path):
    """Masks are those of the models as they are, and the scale is for what is stored."""
    merged = merge(config_of(llama, out_dtype="float16"), tmp_path / "out")
    base, models = weights(llama.base), [weights(model) for model in llama.tuned]
    _, masks, _ = by_definition(base, models)
    stored = {name: tensor.double() - base[name].half().double() for name, tensor in merged.items()}
    for i, name in enumerate(NAMES):
        found, _, metadata = task_file(tmp_path / "out", name)
        assert all(torch.equal(bits(found[key], mask.shape), mask) for key, mask in masks[i].items())
        size = sum((models[i][key].double() - base[key].double()).abs().sum() for key in base)
        assert float(metadata["scale"]) == pytest.approx(size / sum((masks[i][key] * stored[key]).abs().sum() for key in base))
        assert json.loads(metadata["config"])["dtype"] == "float16"


def test_purified_models(llama, tmp_path, cache):
    """Each model is purified first. Distances are to the models as they were."""
    block = {"rank_ratio": 0.9, "allocation": "uniform"}
    merged = merge(config_of(llama, pave=block | {"models": entries(llama, 3)}), tmp_path / "out")
    base = weights(llama.base)
    purified = []
    for i, model in enumerate(llama.tuned):
        alone = config_of(llama, pave=block | {"models": [entries(llama, 3)[i]]}, merge_method="task_arithmetic")
        alone["models"] = [{"model": str(model), "parameters": {"weight": 1.0}}]
        purified.append(merge(alone, tmp_path / f"alone{i}"))
    shared, masks, scales = by_definition(base, purified)
    removed = [sum((p[name] - w[name]).norm() for name in base) for p, w in zip(purified, map(weights, llama.tuned))]
    assert min(removed) > 0.1
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    assert {row["model"] for row in report["purified"]} == set(map(str, llama.tuned))
    for name, tensor in merged.items():
        assert (tensor.double() - base[name].double() - shared[name]).abs().max() < 1e-5, name
    for i, model in enumerate(llama.tuned):
        told = report["emr"]["models"][str(model)]
        assert told["scale"] == pytest.approx(scales[i], rel=1e-3)
        restored = {key: base[key].double() + scales[i] * masks[i][key] * shared[key] for key in base}
        assert told["distance"] == pytest.approx(distance(restored, weights(model), base), rel=1e-3)


def test_one_model_agrees_with_itself(llama, tmp_path):
    merged = merge(config_of(llama, models=1), tmp_path / "out")
    model = weights(llama.tuned[0])
    assert all(torch.allclose(tensor, model[name], atol=1e-7) for name, tensor in merged.items())
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())["emr"]["models"][str(llama.tuned[0])]
    assert report["scale"] == pytest.approx(1, abs=1e-6) and report["distance"] < 1e-6


def test_a_model_that_equals_the_base(llama, tmp_path):
    shutil.copytree(llama.base, tmp_path / "same")
    config = config_of(llama, models=1)
    config["models"].append({"model": str(tmp_path / "same")})
    merge(config, tmp_path / "out")
    masks, _, metadata = task_file(tmp_path / "out", "same")
    assert float(metadata["scale"]) == 1 and not any(mask.any() for mask in masks.values())
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())["emr"]
    assert report["models"][str(tmp_path / "same")]["distance"] is None


def test_without_a_block_it_measures_nothing(llama, tmp_path):
    merge(config_of(llama), tmp_path / "without")
    block = {"models": [{"model": str(model), "purify": False} for model in llama.tuned]}
    merge(config_of(llama, pave=block), tmp_path / "with")
    for file in ("model.safetensors", *(f"emr/{name}.safetensors" for name in NAMES), "pave_report.json"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    assert "EMR" in (tmp_path / "without" / "README.md").read_text()


def test_mergekit_multi(llama, tmp_path):
    result = invoke_multi([config_of(llama) | {"name": "final"}], tmp_path / "multi")
    assert result.exit_code == 0, (result.output, result.exception)
    merge(config_of(llama), tmp_path / "out")
    found = tmp_path / "multi" / "final"
    assert (found / "emr" / "tuned1.safetensors").read_bytes() == (tmp_path / "out" / "emr" / "tuned1.safetensors").read_bytes()


@pytest.fixture(scope="module", params=["RobertaForMaskedLM", "RobertaForSequenceClassification"])
def classifiers(request, tmp_path_factory):
    """A base, and classifiers with two, three and one label; and their backbones."""
    folder, tokenizer = tmp_path_factory.mktemp("classifiers"), make_tokenizer("bert")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.15,
    }
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 66}
    base = make_model(request.param, transformers.RobertaConfig(**sizes))
    tuned = []
    for i, labels in enumerate((2, 3, 1)):
        model = make_model("RobertaForSequenceClassification", transformers.RobertaConfig(**sizes, num_labels=labels))
        model.roberta.load_state_dict(base.roberta.state_dict())
        tuned.append(save(perturbed(model, seed=i + 1), tokenizer, folder / f"task{i}"))
    return save(base, tokenizer, folder / "base"), tuned


def test_heads_are_kept_for_each_model(classifiers, tmp_path):
    """A masked language model has no head for classes; the head of another classifier may have another number of them."""
    base, tuned = classifiers
    config = {"merge_method": "emr", "base_model": str(base), "models": [{"model": str(m)} for m in tuned], "dtype": "float32"}
    result = invoke(config, tmp_path / "out", "--quiet")
    assert result.exit_code == 0, (result.output, result.exception)
    merged, of_base = weights(tmp_path / "out"), weights(base)
    assert merged.keys() == of_base.keys()
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())["emr"]
    for name in report["base_only"]:
        assert torch.equal(merged[name], of_base[name]) and not name.startswith("roberta.")
    shared = {name for name in merged if name not in report["base_only"]}
    models = [weights(model) for model in tuned]
    change, masks, scales = by_definition({name: of_base[name] for name in shared}, models)
    for i, model in enumerate(tuned):
        found, own, metadata = task_file(tmp_path / "out", model.name)
        assert found.keys() == shared and own == models[i].keys() - shared and own
        assert own == set(report["models"][str(model)]["own"])
        tensors = load_file(tmp_path / "out" / "emr" / f"{model.name}.safetensors")
        assert all(torch.equal(tensors[f"own.{name}"], models[i][name]) for name in own)
        assert float(metadata["scale"]) == pytest.approx(scales[i], rel=1e-6)
        restored = load_task(tmp_path / "out", model.name).state_dict()
        assert restored.keys() == models[i].keys()
        for name, tensor in restored.items():
            expected = models[i][name] if name in own else of_base[name] + scales[i] * masks[i][name] * change[name]
            assert torch.allclose(tensor.double(), expected.double(), atol=1e-6), name
        config = json.loads(metadata["config"])
        assert config["architectures"] == ["RobertaForSequenceClassification"]
        assert len(config.get("id2label", {0: 0, 1: 0})) == (2, 3, 1)[i]
    cls = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    loaded = cls.from_pretrained(tmp_path / "out").roberta.encoder.layer[0].output.dense.weight
    assert torch.equal(loaded, merged["roberta.encoder.layer.0.output.dense.weight"])


def test_a_decoder_that_classifies_keeps_its_head_though_the_base_has_one_as_large(families, tmp_path):
    """Two tasks with two labels each have nothing in common in their heads; a language model's head is shared."""
    llama, tokenizer = families["llama"], transformers.AutoTokenizer.from_pretrained(families["llama"].base)
    config = transformers.AutoConfig.from_pretrained(llama.base, num_labels=2)
    base = make_model("LlamaForSequenceClassification", config)
    models = [save(perturbed(base, seed=i + 1), tokenizer, tmp_path / f"task{i}") for i in range(2)]
    merged = {"merge_method": "emr", "base_model": str(save(base, tokenizer, tmp_path / "base")), "dtype": "float32"}
    merge(merged | {"models": [{"model": str(model)} for model in models]}, tmp_path / "out")
    for model in models:
        masks, own, _ = task_file(tmp_path / "out", model.name)
        assert own == {"score.weight"} and "score.weight" not in masks and "model.embed_tokens.weight" in masks
        assert torch.equal(load_task(tmp_path / "out", model.name).score.weight, weights(model)["score.weight"])
    merge(config_of(llama), tmp_path / "language")
    assert "lm_head.weight" in task_file(tmp_path / "language", "tuned0")[0]


def test_a_larger_vocabulary_is_kept_or_brought_in_line(llama, tmp_path):
    """Without a `tokenizer` section the model keeps its own embedding; with one it gets the base's rows."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.tuned[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.tuned[0])
    tokenizer.add_tokens(["[new]"])
    model.resize_token_embeddings(len(tokenizer))
    save(model, tokenizer, tmp_path / "larger")
    config = config_of(llama, models=1)
    config["models"].append({"model": str(tmp_path / "larger")})
    merge(config, tmp_path / "kept")
    _, own, _ = task_file(tmp_path / "kept", "larger")
    assert "model.embed_tokens.weight" in own
    restored = load_task(tmp_path / "kept", "larger")
    of_merge = transformers.AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert of_merge("a [new] b").input_ids != tokenizer("a [new] b").input_ids
    for name, larger in (("larger", True), ("tuned0", False)):
        write(open_task(tmp_path / "kept", name), tmp_path / f"again-{name}", 10**9, quiet=True)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / f"again-{name}")
        assert len(again) == len(tokenizer) - (not larger)
        assert (again("a [new] b").input_ids == tokenizer("a [new] b").input_ids) is larger
    assert torch.equal(restored.get_input_embeddings().weight, model.get_input_embeddings().weight)
    merge(config | {"tokenizer": {"source": "base"}}, tmp_path / "in_line")
    masks, own, _ = task_file(tmp_path / "in_line", "larger")
    assert "model.embed_tokens.weight" in masks and not own
    rows = weights(llama.base)["model.embed_tokens.weight"].shape[0]
    assert not any(key.startswith("file.") for key in load_file(tmp_path / "in_line" / "emr" / "larger.safetensors"))
    assert load_task(tmp_path / "in_line", "larger").get_input_embeddings().weight.shape[0] == rows


def test_an_earlier_merge_in_the_folder(llama, tmp_path):
    """Its files go once the new weights are complete, and those of others stay."""
    merge(config_of(llama), tmp_path / "out")
    save_file({"x": torch.ones(2)}, tmp_path / "out" / "emr" / "mine.safetensors")
    merge(config_of(llama, models=1), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "emr").iterdir()} == {"tuned0.safetensors", "mine.safetensors"}
    merge(config_for(llama), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "emr").iterdir()} == {"mine.safetensors"}
    (tmp_path / "out" / "emr" / "mine.safetensors").unlink()
    merge(config_of(llama), tmp_path / "out")
    merge(config_for(llama), tmp_path / "out")
    assert not (tmp_path / "out" / "emr").exists()


def test_the_same_again(llama, tmp_path):
    for out in ("first", "second"):
        merge(config_of(llama), tmp_path / out)
    for name in NAMES:
        assert (tmp_path / "first" / "emr" / f"{name}.safetensors").read_bytes() == (
            tmp_path / "second" / "emr" / f"{name}.safetensors"
        ).read_bytes()


REFUSED = {
    "refine": ({"refine": True}, {}, "pave.refine: emr"),
    "vocabulary": ({"vocabulary": "counts"}, {}, "pave.vocabulary: emr"),
    "slices": (None, {"models": None, "slices": True}, "uses? whole models|takes whole models"),
    "union": (None, {"tokenizer": {"source": "union"}}, "source: base"),
    "padded": (None, {"tokenizer": {"source": "base", "pad_to_multiple_of": 64}}, "source: base"),
    "rounded base": (None, {"dtype": "bfloat16", "out_dtype": "float32"}, "set `dtype: float32`"),
    "otherwise rounded base": (None, {"dtype": "float16", "out_dtype": "bfloat16"}, "set `dtype: float32`"),
    "no base": (None, {"base_model": None}, "base"),
    "parameter": (None, {"parameters": {"weight": 1}}, "emr has no parameters; remove 'weight'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(llama, tmp_path, cache, case):
    block, changes, message = REFUSED[case]
    config = config_of(llama, models=2) | changes
    if config.get("slices"):
        sources = [{"model": str(model), "layer_range": [0, 2]} for model in llama.tuned[:2]]
        config["slices"] = [{"sources": sources}]
    if block:
        config["pave"] = block | {"purify": False, "models": entries(llama)}
    result = invoke({key: value for key, value in config.items() if value is not None}, tmp_path / "out", "--quiet")
    assert result.exit_code != 0
    assert not (tmp_path / "out").exists()
    with pytest.raises(Exception, match=message):
        raise result.exception if result.exit_code != 1 or "Error" not in result.output else PaveError(result.output)


def test_other_architectures_and_other_bases_are_refused(families, tmp_path):
    config = config_of(families["llama"], models=1) | {"base_model": str(families["gpt2"].base)}
    result = invoke(config, tmp_path / "out", "--quiet")
    assert result.exit_code == 1 and "is of the type llama" in result.output, (result.output, result.exception)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(llama, tmp_path):
    shutil.copytree(llama.tuned[0], tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    config = config_of(llama, models=1)
    config["models"].append({"model": str(tmp_path / "broken")})
    with pytest.raises(PaveError, match=r"up_proj\.weight of .*broken is not finite"):
        merge(config, tmp_path / "out")


def test_nothing_is_merged_where_masks_would_be_lost(llama, tmp_path):
    models = {"base": weights(llama.base), "tuned": weights(llama.tuned[0])}
    with pytest.raises(PaveError, match="masks are only written by a merge to a folder"):
        merge_state_dicts(models, "emr", base="base")
    config = MergeConfiguration.model_validate(config_of(llama))
    planner = MergePlanner(config, get_architecture_info(config, MergeOptions()), MergeOptions(), config.base_model.config())
    with pytest.raises(PaveError, match="only a merge that is written to a folder has masks"):
        planner._plan()
        list(Executor([task for _, task in planner._tensors], math_device="cpu", storage_device="cpu").run(quiet=True))


def test_a_plan_writes_nothing(llama, tmp_path):
    forget_checkpoints()
    plan = plan_merge(MergeConfiguration.model_validate(config_of(llama)), MergeOptions())
    assert [file.name for file in plan.emr.files] == list(NAMES)
    entries_of_model = sum(map(torch.numel, weights(llama.base).values()))
    assert plan.emr.size == pytest.approx(3 * entries_of_model / 8, rel=0.01)


def test_what_a_plan_says(classifiers, tmp_path):
    base, tuned = classifiers
    config = {"merge_method": "emr", "base_model": str(base), "models": [{"model": str(m)} for m in tuned]}
    result = CliRunner().invoke(main, ["plan", str(write_config(config, tmp_path / "emr.yml"))])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    left = 5 if "MaskedLM" in json.loads((base / "config.json").read_text())["architectures"][0] else 4
    assert lines[0] == f"{len(weights(base)) - left} of {len(weights(base))} tensors will be shared by emr."
    assert lines[1].startswith(f"Of the base model alone: {left} ")
    for line, model in zip(lines[2:5], tuned):
        assert line.startswith(f"emr/{model.name}.safetensors, about ") and f"will restore {model}, with " in line


def test_a_step_of_mergekit_multi_may_be_one_of_the_models(llama, tmp_path):
    step = config_for(llama) | {"name": "step"}
    config = config_of(llama, models=1)
    config["models"].append({"model": "step"})
    result = invoke_multi([step, config], tmp_path / "multi")
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads((tmp_path / "multi" / "final" / "pave_report.json").read_text())["emr"]["models"]
    assert len(report) == 2
    for model, told in report.items():
        restored = load_task(tmp_path / "multi" / "final", told["file"].removeprefix("emr/").removesuffix(".safetensors"))
        expected, base = weights(Path(model)), weights(llama.base)
        found = {name: tensor for name, tensor in restored.state_dict().items() if name in expected}
        assert distance(found, {name: expected[name] for name in found}, base) == pytest.approx(told["distance"], rel=1e-4)


def test_the_base_may_be_among_the_models_and_a_model_may_be_there_twice(llama, tmp_path):
    config = config_of(llama, models=2)
    config["models"].insert(0, {"model": str(llama.base)})
    shutil.copytree(llama.tuned[0], tmp_path / "TUNED0")
    config["models"].append({"model": str(tmp_path / "TUNED0")})
    merge(config, tmp_path / "out")
    names = {path.stem for path in (tmp_path / "out" / "emr").iterdir()}
    assert names == {"tuned0", "tuned1", "TUNED0-2"}
    first, second = (load_task(tmp_path / "out", name).state_dict() for name in ("tuned0", "TUNED0-2"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
