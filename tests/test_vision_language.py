"""Vision-language models: texts alone leave the vision tower as it is, images with texts purify both towers."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from merging import TOLERANCE, config_for, entries, forget_checkpoints, merge, write_config
from models import make_rows, perturbed, read_rows, save, write_rows
from reference import purified_alone, weights
from safetensors.torch import load_file, save_file

from mergekit_pave.calibration.batches import encode, make_batches
from mergekit_pave.calibration.data import load_samples
from mergekit_pave.cli import main
from mergekit_pave.errors import PaveError
from mergekit_pave.settings import DEFAULT_CALIBRATION, Data

Image = pytest.importorskip("PIL.Image")

RATIO, SHIFT = 0.875, 0.1
TEXT = {
    "vocab_size": 340,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
VISION = {"hidden_size": 24, "intermediate_size": 40, "patch_size": 8}
# How a checkpoint on the Hub calls the modules of transformers' model, longest first.
STORED = {
    "gemma3": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "mistral3": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "qwen3_vl": {},
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def _model(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    qwen = {"depth": 3, "num_heads": 2, "out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2}
    ids = {"image_token_id": 330, "video_token_id": 331, "vision_start_token_id": 332, "vision_end_token_id": 333}
    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "mrope_interleaved": kind == "qwen3_vl"}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    if kind == "gemma3":
        config = transformers.Gemma3Config(
            text_config=TEXT | {"num_hidden_layers": 2, "query_pre_attn_scalar": 8, "sliding_window": 64},
            vision_config=VISION | layers | {"vision_use_head": False},
            mm_tokens_per_image=4,
            image_token_index=320,
            boi_token_index=321,
            eoi_token_index=322,
        )
        return transformers.Gemma3ForConditionalGeneration(config)
    if kind == "mistral3":
        config = transformers.Mistral3Config(
            text_config=TEXT | {"num_hidden_layers": 3, "model_type": "mistral"},
            vision_config=VISION | layers | {"model_type": "pixtral"},
            image_token_index=320,
        )
        return transformers.Mistral3ForConditionalGeneration(config)
    if kind == "qwen2_5_vl":
        config = transformers.Qwen2_5_VLConfig(
            text_config=TEXT | {"num_hidden_layers": 3, "rope_scaling": rope},
            vision_config=VISION | qwen | {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]},
            **ids,
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    config = transformers.Qwen3VLConfig(
        text_config=TEXT | {"num_hidden_layers": 2, "rope_scaling": rope},
        vision_config=VISION | qwen | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2]},
        **ids,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def _processor(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.ProcessorMixin:
    """Gemma 3's, small: four tokens for an image of 32 x 32."""
    special = ["<image_soft_token>", "<start_of_image>", "<end_of_image>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    names = dict(zip(("image_token", "boi_token", "eoi_token"), special))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=names,
    )
    images = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=CHAT)


def _as_on_the_hub(folder: Path, kind: str) -> None:
    """The names that mergekit knows; transformers, saving anew, leaves a part of Gemma's out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if kind == "gemma3":
        old, new = "vision_tower.", "vision_tower.vision_model."
        tensors = {new + name.removeprefix(old) if name.startswith(old) else name: value for name, value in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def pictured(families, tmp_path_factory):
    """Families of vision-language models with texts, and with images that have texts, as data."""

    @cache
    def make(kind: str):
        llama, folder = families["llama"], tmp_path_factory.mktemp(kind)
        processor = _processor(transformers.AutoTokenizer.from_pretrained(llama.base))
        base = _model(kind)
        paths = [save(base, None, folder / "base"), *(save(perturbed(base, i), None, folder / f"tuned{i}") for i in (1, 2))]
        for path in paths:
            (processor if kind == "gemma3" else processor.tokenizer).save_pretrained(path)
            _as_on_the_hub(path, kind)
        return dataclasses.replace(llama, kind=kind, base=paths[0], tuned=tuple(paths[1:]))

    return make


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures, each with a caption and a question that shows where the picture stands."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = make_rows("sum add count equal number seven nine", 14, seed=4)
    lines = []
    for i, row in enumerate(rows):
        pixels = rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)
        (folder / "train").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "train" / f"{i:02}.png")
        placed = f"{row['question']} <start_of_image> {row['answer']}"
        lines.append({"file_name": f"{i:02}.png", "caption": row["question"], "placed": placed})
    (folder / "train" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def stored_name(kind: str, module: str) -> str:
    for own, stored in STORED[kind].items():
        if module.startswith(own):
            return f"{stored}{module.removeprefix(own)}.weight"
    return f"{module}.weight"


def layer_inputs(kind: str, folder: Path, samples: list[dict]) -> dict[str, torch.Tensor]:
    """By stored name, all inputs (rows, width) of every linear layer but the head, samples one by one in float64."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    kept: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rows = kept[stored_name(kind, name)] = []
            module.register_forward_hook(lambda m, args, out, rows=rows: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for sample in samples:
            model(**{name: value.double() if value.is_floating_point() else value for name, value in sample.items()})
    return {name: torch.cat(parts) for name, parts in kept.items() if parts}


def check(family, samples: list[dict], pave: dict, out: Path, which: int = 0) -> set[str]:
    """The tensors that agree with the reference; every other one is what mergekit alone writes."""
    weight = tuple(float(i == which) for i in range(2))
    plain = merge(config_for(family, weight=weight, dtype="float64"), out / "plain")
    pave = pave | {"rank_ratio": RATIO, "regularization": SHIFT, "allocation": "uniform"}
    written = merge(config_for(family, pave, weight=weight, dtype="float64"), out / "pave")
    seen = layer_inputs(family.kind, family.tuned[which], samples)
    source = weights(family.tuned[which])
    assert seen.keys() <= written.keys()
    for name, tensor in written.items():
        if name not in seen:
            assert torch.equal(tensor, plain[name]), name
            continue
        wanted = purified_alone(source[name], seen[name], RATIO, SHIFT)
        error = (tensor.double() - wanted).norm() / (wanted - source[name]).norm()
        assert error <= TOLERANCE, f"{name} is {error:.2e} of ||W'-W|| away from the reference"
    return set(seen)


def texts(family) -> list[dict]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.tuned[0])
    rows = read_rows(family.data[0])
    return [tokenizer(row["text"], truncation=True, max_length=100, return_tensors="pt").data for row in rows]


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_texts_purify_the_text_decoder_alone(pictured, tmp_path, caplog, kind):
    family = pictured(kind)
    pave = {"models": entries(family), "calibration": {"max_length": 100}, "cache_dir": str(tmp_path / "cache")}
    with caplog.at_level("INFO", logger="mergekit_pave"):
        purified = check(family, texts(family), pave, tmp_path)
    assert "loading it whole" not in caplog.text
    assert len(purified) == 7 * (3 if kind != "gemma3" else 2)
    vision = [line for line in caplog.text.splitlines() if "weights of 2 models, never called during calibration: " in line]
    assert len(vision) == 1 and vision[0].startswith("  left alone  ")
    report = json.loads((tmp_path / "pave" / "pave_report.json").read_text())
    left = report["models"][str(family.tuned[0])]["left_as_they_are"]
    never = {tensor for tensor, reason in left.items() if reason == "never called during calibration"}
    assert never and all("vis" in tensor or "projector" in tensor for tensor in never)
    rows = {row["tensor"] for row in report["purified"] if row["model"] == str(family.tuned[0])}
    assert rows == purified
    # Again, from the caches, which also tell beforehand what is left as it is.
    config = write_config(config_for(family, report["settings"] | pave), tmp_path / "plan.yml")
    forget_checkpoints()
    plan = json.loads(CliRunner().invoke(main, ["plan", "--json", str(config)]).stdout)["models"]
    assert all(found["decomposition"]["weights"] == 0 for found in plan.values())
    assert plan[str(family.tuned[0])]["left_as_they_are"] == left
    again = merge(config_for(family, report["settings"] | pave, weight=(1.0, 0.0), dtype="float64"), tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights(tmp_path / "pave").items())


def test_more_than_half_of_a_model_that_is_never_called_is_an_error(pictured, tmp_path):
    """Also when the covariances are in the cache already; and not where it is under `exclude`."""
    family = pictured("qwen3_vl")
    pave = {"models": entries(family), "calibration": {"max_length": 100}, "cache_dir": str(tmp_path / "cache")}
    for _ in range(2):
        with pytest.raises(PaveError, match=r"tuned1: 20 of 34 layers .* never called .*visual.*images.*pave\.exclude"):
            merge(config_for(family, pave), tmp_path / "out")
        assert not list((tmp_path / "out").glob("*.safetensors"))
    purified = check(family, texts(family), pave | {"exclude": ["visual"]}, tmp_path)
    assert len(purified) == 14


def test_nothing_but_layers_that_are_never_called_is_an_error(pictured, tmp_path):
    family = pictured("mistral3")
    pave = {"models": entries(family), "include": ["vision_tower"], "calibration": {"max_length": 100}}
    with pytest.raises(PaveError, match=r"tuned1: 14 of 14 layers to be purified were never called"):
        merge(config_for(family, pave), tmp_path / "out")


def data(pictures: Path, **how) -> dict:
    return {"path": str(pictures), "image": "image"} | how


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_checkpoints_with_the_names_that_transformers_has_now(pictured, tmp_path, kind):
    """As saved with `save_original_format=False`: the merge is that of the other form, under the names that it was given."""
    family = pictured(kind)
    given = merge(config_for(family, {}), tmp_path / "given")
    folders = []
    for folder in (family.base, *family.tuned):
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
        model.save_pretrained(tmp_path / folder.name, save_original_format=False)
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / folder.name)
        folders.append(tmp_path / folder.name)
    family = dataclasses.replace(family, base=folders[0], tuned=tuple(folders[1:]))
    written = merge(config_for(family, {}), tmp_path / "out")
    assert written.keys() == weights(family.base).keys() != given.keys()
    renamed = {_stored(kind, name): tensor for name, tensor in written.items()}
    assert renamed.keys() == given.keys()
    assert all((renamed[name] - tensor).norm() <= 1e-6 * tensor.norm() for name, tensor in given.items())


def _stored(kind: str, name: str) -> str:
    new = next((new for new in STORED[kind] if name.startswith(new)), "")
    return STORED[kind].get(new, "") + name.removeprefix(new)


@pytest.mark.parametrize("column", ["caption", "placed"])
def test_images_with_texts_purify_both_towers(pictured, pictures, tmp_path, caplog, column):
    family = pictured("gemma3")
    processor = transformers.AutoProcessor.from_pretrained(family.tuned[0])
    samples = []
    for line in map(json.loads, (pictures / "train" / "metadata.jsonl").read_text().splitlines()):
        image = Image.open(pictures / "train" / line["file_name"])
        # The chat template writes <s> itself.
        prompt = line["placed"] if column == "placed" else f"<user><start_of_image>{line['caption']}"
        samples.append(processor(text=[prompt], images=[image], return_tensors="pt").data)
    pave = {"models": [{"model": str(model), "data": data(pictures, text=column)} for model in family.tuned]}
    with caplog.at_level("INFO", logger="mergekit_pave"):
        purified = check(family, samples, pave | {"cache_dir": str(tmp_path / "cache")}, tmp_path)
    assert "loading it whole" not in caplog.text and "never called" not in caplog.text
    assert len(purified) == 2 * 7 + 2 * 6
    report = json.loads((tmp_path / "pave" / "pave_report.json").read_text())
    rows = {row["tensor"]: row["tokens"] for row in report["purified"] if row["model"] == str(family.tuned[0])}
    assert rows["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] == 14 * 16
    assert rows["language_model.model.layers.0.mlp.up_proj.weight"] == sum(len(s["input_ids"][0]) for s in samples)


def test_images_beside_texts_without_images(pictured, pictures, tmp_path, caplog):
    """Not every sample calls the vision tower; those that do catch up before the text decoder runs."""
    family = pictured("gemma3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.tuned[0])
    processor = transformers.AutoProcessor.from_pretrained(family.tuned[0])
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "sum"}, *read_rows(family.data[1])])
    samples = [tokenizer(row["text"], return_tensors="pt").data for row in read_rows(rows)]
    for line in map(json.loads, (pictures / "train" / "metadata.jsonl").read_text().splitlines()):
        image = Image.open(pictures / "train" / line["file_name"])
        samples.append(processor(text=[line["placed"]], images=[image], return_tensors="pt").data)
    both = [{"path": str(rows), "text": "text"}, data(pictures, text="placed")]
    pave = {"models": [{"model": str(model), "data": both} for model in family.tuned], "cache_dir": str(tmp_path / "cache")}
    with caplog.at_level("INFO", logger="mergekit_pave"):
        check(family, samples, pave, tmp_path)
    assert "loading it whole" not in caplog.text


def test_samples_that_are_too_long_with_their_image_are_skipped(pictured, pictures):
    family = pictured("gemma3")
    processor = transformers.AutoProcessor.from_pretrained(family.tuned[0])
    samples = load_samples([Data(**data(pictures, text="caption"))], DEFAULT_CALIBRATION, "data")
    whole = encode(samples, processor, DEFAULT_CALIBRATION, 128, "data")
    assert len(whole) == 14 and len(make_batches(whole, 1)) == 14
    limit = sorted(sample.length for sample in whole)[9]
    some = encode(samples, processor, DEFAULT_CALIBRATION.model_copy(update={"max_length": limit}), 128, "data")
    assert {sample.origin for sample in some} == {sample.origin for sample in whole if sample.length <= limit}
    with pytest.raises(PaveError, match=r"14 of 14 rows cannot be used: 14 longer with the image than the 5 tokens"):
        encode(samples, processor, DEFAULT_CALIBRATION.model_copy(update={"max_length": 5}), 128, "data")


def test_a_text_that_begins_with_bos_gets_one(pictured, pictures):
    processor = transformers.AutoProcessor.from_pretrained(pictured("gemma3").tuned[0])

    def ids(text: str) -> list[list[int]]:
        samples = load_samples([Data(**data(pictures, text=text))], DEFAULT_CALIBRATION, "data")
        return [sample.inputs["input_ids"] for sample in encode(samples, processor, DEFAULT_CALIBRATION, 128, "data")]

    plain = ids("placed")
    assert plain == ids("<s>{placed}") and all(row.count(1) == 1 == row[0] for row in plain)


def test_a_text_without_a_place_for_its_image(pictured, pictures):
    family = pictured("gemma3")
    processor = transformers.AutoProcessor.from_pretrained(family.tuned[0])
    processor.chat_template = None
    samples = load_samples([Data(**data(pictures, text="caption"))], DEFAULT_CALIBRATION, "data")
    with pytest.raises(PaveError, match=r"14 refused by the processor .*the model has no chat template.*'<start_of_image>'"):
        encode(samples, processor, DEFAULT_CALIBRATION, 128, "data")


def test_wrong_kinds_of_samples_are_told(families, pictured, pictures, tmp_path):
    forget_checkpoints()
    gemma, llama = pictured("gemma3"), families["llama"]

    def refused(family, how: dict, match: str) -> None:
        pave = {"models": [{"model": str(model), "data": how} for model in family.tuned[:2]]}
        with pytest.raises(PaveError, match=match):
            merge(config_for(family, pave), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(gemma, data(pictures), r"tuned1\]\.data\.text: missing.*image together with a text")
    refused(llama, data(pictures, text="caption"), r"tuned0\]\.data\.image: the model takes no images")
    refused(gemma, data(pictures, messages="caption"), r"give only one of messages, image")
    refused(gemma, data(pictures, text="caption", text_pair="placed"), r"text_pair does not go with image")
    refused(gemma, data(pictures, text="words"), r"tuned1\]\.data\.text: .*no column 'words'.*caption")
