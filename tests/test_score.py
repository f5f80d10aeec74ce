"""The share kept against the definition in float64: whole models by transformers alone, each row without padding."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, make_architecture
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from merging import config_for, forget_checkpoints, merge, write_config
from models import Family, make_rows, perturbed, read_rows, save, write_rows
from PIL import Image
from test_encoder_decoder import _model as make_seq2seq
from test_experts import family_of  # noqa: F401
from test_vision_language import pictured, pictures  # noqa: F401

from mergekit_pave import PaveError
from mergekit_pave.calibration import recorded
from mergekit_pave.calibration.data import load_samples
from mergekit_pave.cli import main
from mergekit_pave.config import PaveModel
from mergekit_pave.plugin.scoring import plan_scoring
from mergekit_pave.settings import DEFAULT_CALIBRATION
from mergekit_pave.tasks import scoring

SAMPLES, ROWS, SEED, LENGTH = 6, 10, 42, 16
TOPICS = ("sum add count equal number seven nine twelve apple coin", "def return list index loop print value string import")


@pytest.fixture
def everything_kept(monkeypatch):
    """All classes are kept, so that nothing but rounding can differ."""
    monkeypatch.setattr(recorded, "KEPT", 1 << 20)


def with_more_rows(family: Family) -> Family:
    """The family's first two fine-tunes, with data of which enough is left to score with."""
    folder = family.base.parent
    data = tuple(write_rows(folder / f"scored{i}.jsonl", make_rows(topic, 40, seed=i)) for i, topic in enumerate(TOPICS))
    return dataclasses.replace(family, tuned=family.tuned[:2], data=data)


def with_images(family: Family) -> Family:
    data = []
    for i in range(2):
        folder = family.base.parent / f"pictures{i}"
        folder.mkdir()
        rng = np.random.default_rng(i)
        for j in range(24):
            pixels = rng.integers(40 * i, 200, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{j:02}.png")
        data.append(folder)
    return dataclasses.replace(family, data=tuple(data))


def averaged(family: Family, folder: Path) -> Path:
    """The mean of the fine-tunes, as a model."""
    cls = getattr(transformers, transformers.AutoConfig.from_pretrained(family.base).architectures[0])
    models = [cls.from_pretrained(tuned) for tuned in family.tuned[:2]]
    merged = cls.from_pretrained(family.base)
    with torch.no_grad():
        for parameter, *others in zip(merged.parameters(), *(model.parameters() for model in models)):
            parameter.copy_(sum(others) / len(others))
    merged.save_pretrained(folder)
    for file in family.base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def scored_config(family: Family, cache: Path, columns: dict | None = None, **pave) -> dict:
    config = config_for(family, {"purify": False, "cache_dir": str(cache), "calibration": calibration()} | pave)
    for entry, data in zip(config["pave"]["models"], family.data):
        entry["data"] = {"path": str(data)} | (columns or {"text": "text"})
    return config


def calibration(**more) -> dict:
    return {"samples": SAMPLES, "max_length": LENGTH, "seed": SEED, "batch_size": 4} | more


def score(config: dict, *folders: Path, rows: int = ROWS, base: str | None = None) -> list[dict]:
    forget_checkpoints()
    scorer = plan_scoring(MergeConfiguration.model_validate(config), MergeOptions(quiet=True), rows, base)
    return [scorer.score(folder) for folder in folders]


def held_out(data: Path, used: set[str] = frozenset(), column: str = "text", rows: int = ROWS) -> list[dict]:
    """The rows that follow those in C in the same shuffle, each once, without any that is in C."""
    every = read_rows(data)
    order = np.random.default_rng(SEED).permutation(len(every))
    seen = {every[i][column] for i in order[:SAMPLES]} | set(used)
    found = []
    for i in order[SAMPLES:]:
        if every[i][column] not in seen and len(found) < rows:
            seen.add(every[i][column])
            found.append(every[i])
    return found


def in_calibration(family: Family, column: str = "text") -> set[str]:
    found = set()
    for data in family.data:
        every = read_rows(data)
        found |= {every[i][column] for i in np.random.default_rng(SEED).permutation(len(every))[:SAMPLES]}
    return found


def share(distances: list[float], of_base: list[float]) -> tuple[float, float]:
    """The share kept, and its error as that of a ratio of sums."""
    d, b = (np.array(values, dtype=np.float64) for values in (distances, of_base))
    kept = 1 - d.sum() / b.sum()
    influence = (d - (1 - kept) * b) / b.mean()
    return kept, influence.std(ddof=1) / math.sqrt(len(d))


def loaded(folder: Path, cls: str, **options) -> transformers.PreTrainedModel:
    return getattr(transformers, cls).from_pretrained(folder, dtype=torch.float64, **options).eval()


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum().item()


@torch.no_grad()
def language_reference(family: Family, merged: Path, cls: str, tokenizer, **options) -> dict[int, dict]:
    models = {name: loaded(path, cls, **options) for name, path in (("merged", merged), ("base", family.base))}
    found, drifts = {}, []
    for i in range(2):
        expert = loaded(family.tuned[i], cls, **options)
        sums: dict[str, list[float]] = {key: [] for key in ("merged", "base", "drift", "agreed", "places", "nats", "bytes")}
        for row in held_out(family.data[i], in_calibration(family)):
            ids = torch.tensor([tokenizer(row["text"], truncation=True, max_length=LENGTH)["input_ids"]])
            own, ours, base = (model(input_ids=ids).logits[0] for model in (expert, models["merged"], models["base"]))
            sums["merged"].append(kl(own, ours))
            sums["base"].append(kl(own, base))
            sums["drift"].append(kl(base, ours))
            sums["agreed"].append((own.argmax(-1) == ours.argmax(-1)).sum().item())
            sums["places"].append(ids.shape[1])
            loss = torch.nn.functional.cross_entropy(ours[:-1], ids[0, 1:], reduction="none")
            sums["nats"].append(loss[[token not in tokenizer.all_special_ids for token in ids[0, 1:].tolist()]].sum().item())
            sums["bytes"].append(len(tokenizer.decode(ids[0, 1:], skip_special_tokens=True).encode()))
        found[i] = sums
        drifts.append(sum(sums["drift"]) / sum(sums["places"]) / math.log(2))
    for i in range(2):
        found[i]["drift"] = drifts[1 - i]
    return found


def some(of_kind, quick: str) -> list:
    """The architectures of a kind. All but a few, which differ in what matters here, are slow only because there are many."""
    ids = [id for id, one in ARCHITECTURES.items() if of_kind(one)]
    assert set(quick.split()) <= set(ids)
    return [id if id in quick.split() else pytest.param(id, marks=pytest.mark.slow) for id in ids]


LANGUAGE_MODELS = some(
    lambda one: one.tokenizer in ("llama", "gpt2"),
    # A plain one; scores that are changed behind the head; another layout; a bias in the head; no attention mask; shared blocks
    "llama-ForCausalLM gemma2-ForCausalLM granite-ForCausalLM gpt2-LMHeadModel phi-ForCausalLM mamba-ForCausalLM "
    "zamba2-ForCausalLM",
)


@pytest.mark.parametrize("id", LANGUAGE_MODELS)
def test_language_models_are_scored_by_definition(id, tmp_path, everything_kept):
    family = with_more_rows(make_architecture(id, tmp_path))
    merged = averaged(family, tmp_path / "merged")
    (result,) = score(scored_config(family, tmp_path / "cache"), merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.base)
    reference = language_reference(family, merged, ARCHITECTURES[id].kind.model, tokenizer)
    shares = []
    for i, model in enumerate(map(str, family.tuned)):
        wanted, found = reference[i], result["models"][model]
        kept, error = share(wanted["merged"], wanted["base"])
        shares.append((kept, error))
        assert found["kept"] == pytest.approx(kept, abs=2e-4) and found["error"] == pytest.approx(error, rel=0.01)
        assert found["rows"] == ROWS and found["places"] == sum(wanted["places"]) and found["measure"] == "kl"
        assert found["agreement"] == pytest.approx(sum(wanted["agreed"]) / sum(wanted["places"]), abs=0.01)
        assert found["drift"] == pytest.approx(wanted["drift"], rel=1e-3)
        bits = sum(wanted["nats"]) / math.log(2) / sum(wanted["bytes"])
        assert found["bits_per_byte"]["merged"] == pytest.approx(bits, rel=1e-4)
        assert 0 < kept < 1, "a check of nothing"
    assert result["mean"]["kept"] == pytest.approx(np.mean([kept for kept, _ in shares]), abs=2e-4)
    assert result["mean"]["error"] == pytest.approx(math.hypot(*(error for _, error in shares)) / 2, rel=0.01)
    worst = min(range(2), key=lambda i: shares[i])
    assert result["worst"]["model"] == str(family.tuned[worst])


CLASSIFIERS = some(
    lambda one: "Classification" in one.head and one.tokenizer == "bert",
    "bert-ForSequenceClassification bert-ForTokenClassification deberta-v2-ForSequenceClassification",
)


@pytest.mark.parametrize("id", CLASSIFIERS)
def test_classifiers_are_scored_through_the_experts_own_head(id, tmp_path):
    family = with_more_rows(make_architecture(id, tmp_path))
    merged = averaged(family, tmp_path / "merged")
    (result,) = score(scored_config(family, tmp_path / "cache"), merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.base)
    cls = ARCHITECTURES[id].kind.model
    for i, model in enumerate(family.tuned):
        expert, others = loaded(model, cls), []
        for folder in (merged, family.base):
            other = loaded(model, cls)
            other.base_model.load_state_dict(loaded(folder, cls).base_model.state_dict())
            others.append(other)
        distances: list[list[float]] = [[], []]
        for row in held_out(family.data[i], in_calibration(family)):
            inputs = tokenizer(row["text"], truncation=True, max_length=LENGTH, return_tensors="pt")
            with torch.no_grad():
                own, *theirs = (one(**{k: v for k, v in inputs.items()}).logits[0] for one in (expert, *others))
            for of_row, logits in zip(distances, theirs):
                of_row.append(kl(own, logits))
        kept, error = share(*distances)
        found = result["models"][str(model)]
        assert found["kept"] == pytest.approx(kept, abs=1e-3) and found["error"] == pytest.approx(error, rel=0.02)
        assert found["bits_per_byte"] is None and found["measure"] == "kl"


def test_decoders_that_classify_are_scored_at_the_last_token(families, tmp_path):
    """They find it by the id of the padding behind it, which some have and others do not."""
    for padding in (None, 5):
        folder = tmp_path / str(padding)
        folder.mkdir()
        tokenizer = transformers.AutoTokenizer.from_pretrained(families["llama"].base)
        config = transformers.AutoConfig.from_pretrained(families["llama"].base, pad_token_id=padding, num_labels=3)
        torch.manual_seed(0)
        base = transformers.LlamaForSequenceClassification(config)
        tuned = tuple(save(perturbed(base, seed=i), tokenizer, folder / f"tuned{i}") for i in (1, 2))
        family = dataclasses.replace(families["llama"], base=save(base, tokenizer, folder / "base"), tuned=tuned)
        family = with_more_rows(family)
        merged = averaged(family, folder / "merged")
        (result,) = score(scored_config(family, folder / "cache"), merged)
        cls = "LlamaForSequenceClassification"
        expert, others = loaded(tuned[0], cls), []
        for model in (merged, family.base):
            other = loaded(tuned[0], cls)
            other.model.load_state_dict(loaded(model, cls).model.state_dict())
            others.append(other)
        distances: list[list[float]] = [[], []]
        for row in held_out(family.data[0], in_calibration(family)):
            ids = tokenizer(row["text"], truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                own, *theirs = (model(input_ids=ids).logits[0] for model in (expert, *others))
            for of_row, logits in zip(distances, theirs):
                of_row.append(kl(own, logits))
        assert result["models"][str(tuned[0])]["kept"] == pytest.approx(share(*distances)[0], abs=1e-3)


BARE = some(lambda one: one.head == "Model", "bert-Model mpnet-Model clip_vision_model-Model")
IMAGES = some(lambda one: one.head == "ForImageClassification", "vit-ForImageClassification")


@pytest.mark.parametrize("id", BARE)
def test_models_without_a_head_are_scored_by_the_angle_of_centred_features(id, tmp_path):
    family = make_architecture(id, tmp_path)
    of_images = ARCHITECTURES[id].tokenizer == "image"
    family = with_images(family) if of_images else with_more_rows(family)
    merged = averaged(family, tmp_path / "merged")
    (result,) = score(scored_config(family, tmp_path / "cache", {"image": "image"} if of_images else None), merged)
    for model in map(str, family.tuned):
        found = result["models"][model]
        assert found["measure"] == "cosine" and found["agreement"] is found["drift"] is found["bits_per_byte"] is None
    if of_images:
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.base)
    cls = ARCHITECTURES[id].kind.model
    for i, model in enumerate(family.tuned):
        features = []
        for folder in (model, merged, family.base):
            one, pooled = loaded(folder, cls), []
            for row in held_out(family.data[i], in_calibration(family)):
                inputs = tokenizer(row["text"], truncation=True, max_length=LENGTH, return_tensors="pt")
                with torch.no_grad():
                    pooled.append(one(**inputs).last_hidden_state[0].mean(0))
            features.append(torch.stack(pooled) - torch.stack(pooled).mean(0))
        own, *others = features
        distances = [(1 - torch.nn.functional.cosine_similarity(own, other)).tolist() for other in others]
        assert result["models"][str(model)]["kept"] == pytest.approx(share(*distances)[0], abs=1e-3)


@pytest.mark.parametrize("id", IMAGES)
def test_image_classifiers_are_scored(id, tmp_path):
    family = with_images(make_architecture(id, tmp_path))
    merged = averaged(family, tmp_path / "merged")
    results = score(scored_config(family, tmp_path / "cache", {"image": "image"}), merged, family.base, family.tuned[0])
    found = [result["models"][str(family.tuned[0])] for result in results]
    assert [one["measure"] for one in found] == ["kl"] * 3
    assert 0 < found[0]["kept"] < 1 and found[1]["kept"] == 0 and found[2]["kept"] == 1


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoder_models_are_scored_on_their_answers(kind, families, tmp_path, everything_kept):
    tokenizer = transformers.AutoTokenizer.from_pretrained(families["bert"].base)
    base = make_seq2seq(kind)
    tuned = tuple(save(perturbed(base, seed=i), tokenizer, tmp_path / f"tuned{i}") for i in (1, 2))
    family = dataclasses.replace(families["bert"], kind=kind, base=save(base, tokenizer, tmp_path / "base"), tuned=tuned)
    family = with_more_rows(family)
    merged = averaged(family, tmp_path / "merged")
    (result,) = score(scored_config(family, tmp_path / "cache", {"text": "question", "target": "answer"}), merged)
    cls = type(base).__name__
    every = read_rows(family.data[0])
    contents = {(row["question"], row["answer"]) for row in every}
    assert len(contents) == len(every), "rows differ, so the shuffle alone decides"
    expert, others = loaded(tuned[0], cls), [loaded(folder, cls) for folder in (merged, family.base)]
    distances: list[list[float]] = [[], []]
    for i in np.random.default_rng(SEED).permutation(len(every))[SAMPLES : SAMPLES + ROWS]:
        cut = {"truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        ids = tokenizer(every[i]["question"], **cut)["input_ids"]
        labels = tokenizer(text_target=every[i]["answer"], **cut)["input_ids"]
        with torch.no_grad():
            own, *theirs = (model(input_ids=ids, labels=labels).logits[0] for model in (expert, *others))
        for of_row, logits in zip(distances, theirs):
            of_row.append(kl(own, logits))
    found = result["models"][str(tuned[0])]
    assert found["kept"] == pytest.approx(share(*distances)[0], abs=1e-3)
    assert found["bits_per_byte"]["merged"] > 0


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_mixtures_are_scored(kind, family_of, tmp_path, everything_kept):  # noqa: F811
    family = with_more_rows(copied(family_of(kind), tmp_path))
    merged = averaged(family, tmp_path / "merged")
    (result,) = score(scored_config(family, tmp_path / "cache"), merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.base)
    cls = transformers.AutoConfig.from_pretrained(family.base).architectures[0]
    reference = language_reference(family, merged, cls, tokenizer, experts_implementation="eager")
    for i, model in enumerate(map(str, family.tuned)):
        assert result["models"][model]["kept"] == pytest.approx(share(reference[i]["merged"], reference[i]["base"])[0], abs=1e-3)


def test_images_with_texts_are_scored(pictured, pictures, tmp_path):  # noqa: F811
    family = pictured("gemma3")
    entry = {"path": str(pictures), "image": "image", "text": "caption"}
    config = scored_config(dataclasses.replace(family, data=family.data[:2]), tmp_path / "cache", calibration={"samples": 2})
    for model in config["pave"]["models"]:
        model["data"] = entry
    for result, wanted in zip(score(config, family.base, family.tuned[0], rows=6), (0, 1)):
        found = result["models"][str(family.tuned[0])]
        assert found["kept"] == wanted and found["measure"] == "kl"


@pytest.mark.parametrize("settings", [{"problem_type": "multi_label_classification"}, {"num_labels": 1}])
def test_labels_that_do_not_exclude_each_other_and_scores_that_are_no_labels(settings, families, tmp_path):
    family, models = families["bert"], []
    for name, folder in (("base", family.base), *((f"tuned{i}", model) for i, model in enumerate(family.tuned[:2]))):
        config = transformers.AutoConfig.from_pretrained(folder)
        for key, value in settings.items():
            setattr(config, key, value)
        torch.manual_seed(len(name))
        model = transformers.BertForSequenceClassification.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)
        models.append(save(model, transformers.AutoTokenizer.from_pretrained(folder), tmp_path / name))
    family = with_more_rows(dataclasses.replace(family, base=models[0], tuned=tuple(models[1:])))
    merged = averaged(family, tmp_path / "merged")
    (result,) = score(scored_config(family, tmp_path / "cache"), merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.base)
    cls = "BertForSequenceClassification"
    found = result["models"][str(family.tuned[0])]
    if "num_labels" in settings:
        assert found["measure"] == "cosine" and 0 < found["kept"] < 1
        return
    expert, distances = loaded(family.tuned[0], cls), ([], [])
    for folder, of_rows in zip((merged, family.base), distances):
        other = loaded(family.tuned[0], cls)
        other.bert.load_state_dict(loaded(folder, cls).bert.state_dict())
        for row in held_out(family.data[0], in_calibration(family)):
            inputs = tokenizer(row["text"], truncation=True, max_length=LENGTH, return_tensors="pt")
            with torch.no_grad():
                p, q = (model(**inputs).logits[0].sigmoid() for model in (expert, other))
            of_rows.append((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum().item())
    assert found["kept"] == pytest.approx(share(*distances)[0], abs=1e-3)


def test_the_base_keeps_nothing_and_an_expert_all_of_itself(families, tmp_path):
    family = with_more_rows(copied(families["llama"], tmp_path))
    base, expert = score(scored_config(family, tmp_path / "cache"), family.base, family.tuned[0])
    assert [of["kept"] for of in base["models"].values()] == [0, 0]
    of_itself = expert["models"][str(family.tuned[0])]
    assert (of_itself["kept"], of_itself["error"], of_itself["agreement"]) == (1, 0, 1)
    assert of_itself["bits_per_byte"]["merged"] == of_itself["bits_per_byte"]["expert"]


def copied(family: Family, folder: Path) -> Family:
    """The same models, with a folder for data of a test's own."""
    (folder / "own").mkdir()
    return dataclasses.replace(family, base=_copy(family.base, folder / "own/base"), tuned=family.tuned)


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_the_most_likely_tokens_and_a_few_others_are_enough(families, tmp_path, monkeypatch):
    family = with_more_rows(copied(families["llama"], tmp_path))
    merged, shares = averaged(family, tmp_path / "merged"), []
    for kept in (48, 1 << 20):
        monkeypatch.setattr(recorded, "KEPT", kept)
        (result,) = score(scored_config(family, tmp_path / f"cache{kept}"), merged)
        shares.append(result["models"][str(family.tuned[0])])
    few, whole = shares
    assert few["by_row"]["base"] != whole["by_row"]["base"], "a check of nothing"
    assert few["kept"] == pytest.approx(whole["kept"], abs=0.03)
    assert sum(few["by_row"]["base"]) == pytest.approx(sum(whole["by_row"]["base"]), rel=0.03)


def test_rows_are_held_out_and_no_content_counts_twice(families, tmp_path):
    """Of rows that repeat, or that are in the C of any model, none is scored."""
    family = with_more_rows(copied(families["llama"], tmp_path))
    first, second = (read_rows(data) for data in family.data)
    order = np.random.default_rng(SEED).permutation(len(first) + 30)
    in_c_of_second = [second[i] for i in np.random.default_rng(SEED).permutation(len(second))[:SAMPLES]]
    mixed = [dict(first[i % len(first)]) for i in range(len(first) + 30)]
    for i, row in zip(order[SAMPLES:], in_c_of_second):  # the very next rows are those that the other model was measured with
        mixed[i] = row
    write_rows(family.data[0], mixed)
    forget_checkpoints()
    config = MergeConfiguration.model_validate(scored_config(family, tmp_path / "cache"))
    scorer = plan_scoring(config, MergeOptions(quiet=True), ROWS)
    expert = scorer.scoring.experts[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.base)
    wanted = [row["text"] for row in held_out(family.data[0], in_calibration(family))]
    assert len(set(wanted)) == ROWS and not set(wanted) & in_calibration(family)
    assert sorted(sample.inputs["input_ids"] for sample in expert.rows.encoded) == sorted(
        tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in wanted
    )


def test_several_sources_and_streams_give_rows_that_calibration_has_not_seen(families, tmp_path):
    family = with_more_rows(copied(families["llama"], tmp_path))
    config = scored_config(family, tmp_path / "cache")
    entry = config["pave"]["models"][0]
    entry["data"] = [{"path": str(data), "text": "text", "streaming": stream} for data, stream in zip(family.data, (False, True))]
    forget_checkpoints()
    scorer = plan_scoring(MergeConfiguration.model_validate(config), MergeOptions(quiet=True), ROWS)
    rows = scorer.scoring.experts[0].rows.encoded
    assert {sum(str(data) in sample.origin for sample in rows) for data in family.data} == {ROWS // 2}
    seen = load_samples(config_of(config, 0).sources, DEFAULT_CALIBRATION.model_copy(update=calibration()), "any")
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.base)
    in_c = [tokenizer(sample.text, truncation=True, max_length=LENGTH)["input_ids"] for sample in seen]
    assert len(in_c) == SAMPLES and not [sample for sample in rows if sample.inputs["input_ids"] in in_c]


def test_models_with_the_same_data_are_scored_on_rows_of_their_own(families, tmp_path):
    """Their errors would not be independent."""
    family = with_more_rows(copied(families["llama"], tmp_path))
    config = scored_config(dataclasses.replace(family, data=(family.data[0],) * 2), tmp_path / "cache")
    forget_checkpoints()
    scorer = plan_scoring(MergeConfiguration.model_validate(config), MergeOptions(quiet=True), ROWS)
    first, second = ([sample.inputs["input_ids"] for sample in expert.rows.encoded] for expert in scorer.scoring.experts)
    assert len(first) == len(second) == ROWS and not [ids for ids in first if ids in second]


def test_a_merge_that_was_measured_on_the_rows_is_refused(families, tmp_path):
    family = with_more_rows(copied(families["llama"], tmp_path))
    config = scored_config(family, tmp_path / "cache") | {"merge_method": "regmean"}
    for model in config["models"]:
        model.pop("parameters")
    merge(config, tmp_path / "out")
    score(config, tmp_path / "out")
    score(scored_config(family, tmp_path / "cache", calibration=calibration(samples=SAMPLES + 1)), tmp_path / "out")
    for more in ({"samples": SAMPLES - 1}, {"seed": 7}):
        other = scored_config(family, tmp_path / "cache", calibration=calibration(**more))
        fails(other, tmp_path / "out", says=("was merged with 6 calibration samples", "mergekit_config.yml"))


def config_of(config: dict, number: int) -> PaveModel:
    return MergeConfiguration.model_validate(config).pave.models[number]


def test_what_was_run_is_not_run_again(families, tmp_path, monkeypatch):
    family = with_more_rows(copied(families["llama"], tmp_path))
    config, merged = scored_config(family, tmp_path / "cache"), averaged(family, tmp_path / "merged")
    ran = []
    run_over = scoring.run_over
    monkeypatch.setattr(scoring, "run_over", lambda subject, *more: (ran.append(subject.name), run_over(subject, *more)))
    (first,) = score(config, merged)
    experts, base = list(map(str, family.tuned)), str(family.base)
    assert sorted(ran) == sorted([*experts, base, base, str(merged)])
    ran.clear()
    assert score(config, merged) == [first] and ran == []
    (other,) = score(config, family.tuned[0])
    assert ran == [experts[0]] and other != first
    ran.clear()
    averaged(dataclasses.replace(family, tuned=(family.tuned[0], family.base)), merged)  # another merge in the same folder
    (again,) = score(config, merged)
    assert ran == [str(merged)] and again != first
    ran.clear()
    score(scored_config(family, tmp_path / "cache", calibration=calibration(seed=7)), merged)
    assert len(ran) == 5, "other rows"


def test_a_damaged_record_is_made_again(families, tmp_path):
    family = with_more_rows(copied(families["llama"], tmp_path))
    config = scored_config(family, tmp_path / "cache")
    (first,) = score(config, family.tuned[1])
    for file in (tmp_path / "cache").glob("*/*/recorded.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert score(config, family.tuned[1]) == [first]


@pytest.mark.parametrize("which", ["merged", "expert"])
def test_weights_that_cannot_be_read_in_parts_are_loaded_whole(which, families, tmp_path):
    family = with_more_rows(copied(families["bert"], tmp_path))
    merged = averaged(family, tmp_path / "merged")
    (wanted,) = score(scored_config(family, tmp_path / "cache"), merged)
    tuned = tuple(_copy(model, tmp_path / model.name) for model in family.tuned)
    folder = merged if which == "merged" else tuned[0]
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (found,) = score(scored_config(dataclasses.replace(family, tuned=tuned), tmp_path / "cache2"), merged)
    for one, other in zip(wanted["models"].values(), found["models"].values()):
        assert one["kept"] == pytest.approx(other["kept"], abs=1e-5)


def fails(config: dict, *folders: Path, rows: int = ROWS, base: str | None = None, says: tuple[str, ...]) -> None:
    with pytest.raises(PaveError) as caught:
        score(config, *folders, rows=rows, base=base)
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_bad_input_is_refused_before_a_model_runs(families, tmp_path, monkeypatch):
    family = with_more_rows(copied(families["llama"], tmp_path))
    monkeypatch.setattr(scoring, "run_over", lambda *_: pytest.fail("a model was run"))
    config = scored_config(family, tmp_path / "cache")
    few = scored_config(family, tmp_path / "cache", calibration=calibration(samples=36))
    fails(few, says=("pave.models[", "set calibration.samples to 30 at most", "Add rows"))
    fails({key: value for key, value in config.items() if key != "pave"}, says=("no `pave:` block",))
    no_base = {key: value for key, value in config.items() if key != "base_model"} | {"merge_method": "linear"}
    fails(no_base, says=("base_model", "--base"))
    fails(config, base=str(tmp_path / "nowhere"), says=("nowhere",))
    fails(config, families["bert"].base, says=("BertForSequenceClassification", "LlamaForCausalLM"))
    given = scored_config(family, tmp_path / "cache")
    del given["pave"]["models"][0]["data"]
    given["pave"]["models"][0]["purify"] = False
    fails(given, says=(str(family.tuned[0]), "needs `data`"))
    fails(config, tmp_path, says=("config.json",))


def test_another_vocabulary_is_refused(families, tmp_path):
    family = with_more_rows(copied(families["llama"], tmp_path))
    merged = averaged(family, tmp_path / "merged")
    tokenizer = json.loads((merged / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[40:42]
    swapped = {token: {one: vocabulary[other], other: vocabulary[one]}.get(token, id) for token, id in vocabulary.items()}
    tokenizer["model"]["vocab"] = swapped
    (merged / "tokenizer.json").write_text(json.dumps(tokenizer))
    for data in family.data:
        write_rows(data, [{"text": f"{one}{other}{one} {i}"} for i in range(40)])
    fails(scored_config(family, tmp_path / "cache"), merged, says=("token id", str(merged)))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_merge_without_a_tokenizer_is_shown_the_experts_tokens(kind, families, tmp_path):
    family = with_more_rows(copied(families[kind], tmp_path))
    merged = averaged(family, tmp_path / "merged")
    config = scored_config(family, tmp_path / "cache")
    (wanted,) = score(config, merged)
    for file in merged.glob("tokenizer*"):
        file.unlink()
    assert score(config, merged) == [wanted]


def test_a_model_that_is_not_finite_is_named(families, tmp_path):
    family = with_more_rows(copied(families["llama"], tmp_path))
    merged = averaged(family, tmp_path / "merged")
    model = transformers.LlamaForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(merged)
    fails(scored_config(family, tmp_path / "cache"), merged, says=(str(merged), "not finite"))


def test_a_base_that_the_expert_is_gives_no_share(families, tmp_path):
    family = with_more_rows(copied(families["llama"], tmp_path))
    family = dataclasses.replace(family, tuned=(_copy(family.base, tmp_path / "same"), family.tuned[1]))
    (result,) = score(scored_config(family, tmp_path / "cache"), family.tuned[1])
    assert result["models"][str(family.tuned[0])]["kept"] is None
    assert result["mean"] == {key: result["models"][str(family.tuned[1])][key] for key in ("kept", "error")}


def test_a_block_that_only_names_data_leaves_the_merge_as_it_is(families, tmp_path, caplog):
    family = with_more_rows(copied(families["llama"], tmp_path))
    config = scored_config(family, tmp_path / "cache")
    with_block = merge(config, tmp_path / "with")
    without = merge({key: value for key, value in config.items() if key != "pave"}, tmp_path / "without")
    assert with_block.keys() == without.keys() and all(torch.equal(with_block[name], without[name]) for name in without)
    assert "changes nothing of this merge" in caplog.text


def test_the_command_shows_and_keeps_what_it_measured(families, tmp_path):
    family = with_more_rows(copied(families["llama"], tmp_path))
    config = scored_config(family, tmp_path / "cache")
    merge(config, tmp_path / "one")
    merge(config | {"parameters": {"lambda": 0.5}}, tmp_path / "two")
    path = write_config(config, tmp_path / "config.yml")
    arguments = ["score", str(path), str(tmp_path / "one"), str(tmp_path / "two"), "--rows", "8", "--quiet"]
    forget_checkpoints()
    shown = CliRunner().invoke(main, [*arguments, "--card"])
    assert shown.exit_code == 0, shown.output
    assert "share kept" in shown.output and "more than one" in shown.output
    listed = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert set(listed) == {str(tmp_path / "one"), str(tmp_path / "two")}
    for folder, of_merge in listed.items():
        kept = json.loads(Path(folder, "pave_scores.json").read_text())
        assert {key: value for key, value in kept.items() if key != "weights"} == of_merge
        assert "### What it keeps" in Path(folder, "README.md").read_text()
