"""`data: generated`: models write their own calibration text. And `data` that holds for the whole block."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from click.testing import CliRunner
from merging import assert_exact, config_for, entries, forget_checkpoints, invoke, merge, write_config
from models import KINDS, Family, make_model, make_tokenizer, model_config, perturbed, save, write_rows
from reference import purify
from test_encoder_decoder import seq2seq  # noqa: F401
from test_vision_language import pictured  # noqa: F401

from mergekit_pave.calibration.generation import Generation
from mergekit_pave.calibration.starts import find_start
from mergekit_pave.cli import main

CALIBRATION = {"samples": 20, "max_length": 24}


def generated(family: Family, models: int = 2, **more) -> dict:
    """A config with a block that says little more than that models write their own text."""
    pave = {"data": "generated", "rank_ratio": 0.875, "calibration": CALIBRATION} | more
    return config_for(family, models=models) | {"pave": pave}


def written(cache: Path, model: Path) -> list[list[int]]:
    """The token ids of each text of a model that the cache has."""
    texts = []
    for manifest in sorted((cache / "generated").glob("*/*/manifest.json")):
        if json.loads(manifest.read_text())["model"] == str(model):
            tensors = safetensors.torch.load_file(manifest.parent / "tokens.safetensors")
            texts += [part.tolist() for part in tensors["tokens"].split(tensors["lengths"].tolist())]
    return texts


def run(command: str, config: dict, folder: Path, *arguments: str) -> str:
    forget_checkpoints()
    path = write_config(config, folder / "config.yml")
    result = CliRunner().invoke(main, [command, str(path), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def batches(monkeypatch) -> list[tuple[str, int]]:
    """Which batches of texts are written, by model, while a test runs."""
    found, texts = [], Generation._texts

    def noted(self, model, number):
        found.append((Path(self.name).name, number))
        return texts(self, model, number)

    monkeypatch.setattr(Generation, "_texts", noted)
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_are_purified_with_what_they_write(families, kind, tmp_path, cache):
    family = families[kind]
    start = {"llama": "<user>", "gpt2": "<|endoftext|>"}[kind]  # the user's turn of its chat template, and BOS
    tokenizer = transformers.AutoTokenizer.from_pretrained(family.base)
    config = generated(family) | {"dtype": "float64"}
    config["models"] = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(family.tuned, (1.0, 0.0))]
    merged = merge(config, tmp_path / "out")
    sources = []
    for number, model in enumerate(family.tuned[:2]):
        texts = written(cache, model)[:20]
        assert all(tokenizer.decode(text).startswith(start) and len(text) <= 24 for text in texts)
        assert len(set(map(tuple, texts))) == 20
        sources.append((write_rows(tmp_path / f"{number}.jsonl", [{"ids": text} for text in texts]), "ids", "ids"))
    expected = purify(kind, family.base, family.tuned[:2], sources, lambda *_: 0.875)[0]
    plain = merge({key: value for key, value in config.items() if key != "pave"}, tmp_path / "plain")
    assert_exact(merged, expected, plain)

    card, report = (tmp_path / "out" / "README.md").read_text(), json.loads((tmp_path / "out" / "pave_report.json").read_text())
    kept = {"llama": "chat", "gpt2": "bos"}[kind]
    assert [model["data"] for model in report["models"].values()] == 2 * [[{"generated": kept}]]
    assert "written by the model itself" in card and "datasets:" not in card


def test_texts_are_kept_and_the_same_seed_gives_the_same(llama, tmp_path, cache, monkeypatch, batches):
    """Also whatever other random numbers were drawn, and merge methods draw the same ones as without texts to write."""
    config = generated(llama) | {"merge_method": "dare_linear", "parameters": {"density": 0.5}}
    first = merge(config, tmp_path / "first", random_seed=7)
    assert batches == [(name, number) for name in ("tuned0", "tuned1") for number in range(3)]
    assert same(merge(config, tmp_path / "again", random_seed=7), first)
    assert len(batches) == 6

    monkeypatch.setenv("MERGEKIT_PAVE_CACHE", str(tmp_path / "other-cache"))
    torch.rand(5)
    assert same(merge(config, tmp_path / "anew", random_seed=7), first)
    assert written(tmp_path / "other-cache", llama.tuned[0]) == written(cache, llama.tuned[0])
    other = generated(llama, calibration=CALIBRATION | {"seed": 1})
    run("calibrate", other, tmp_path)
    texts = set(map(tuple, written(tmp_path / "other-cache", llama.tuned[0])))
    assert len(texts) == 48


def test_what_was_stopped_goes_on_and_more_texts_add_to_those_that_are_there(llama, tmp_path, cache, monkeypatch, batches):
    config, store = generated(llama), Generation._store

    def stopped(self, artefact, texts):
        if artefact.folder.name == "00002":
            raise KeyboardInterrupt
        store(self, artefact, texts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Generation, "_store", stopped)
        merge(config, tmp_path / "out")
    assert len(written(cache, llama.tuned[0])) == 16
    merge(config, tmp_path / "out")
    assert batches == [("tuned0", n) for n in (0, 1, 2, 2)] + [("tuned1", n) for n in (0, 1, 2)]

    before, number = written(cache, llama.tuned[0]), len(batches)
    run("calibrate", generated(llama, calibration=CALIBRATION | {"samples": 30}), tmp_path)
    assert batches[number:] == [("tuned0", 3), ("tuned1", 3)]
    assert written(cache, llama.tuned[0])[:24] == before


def test_damaged_texts_are_written_again(llama, tmp_path, cache, batches):
    run("calibrate", generated(llama), tmp_path)
    before, file = written(cache, llama.tuned[0]), next((cache / "generated").glob("*/00001/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    run("calibrate", generated(llama), tmp_path)
    assert len(batches) == 7 and written(cache, llama.tuned[0]) == before


def test_plan_says_what_is_to_be_written_and_writes_nothing(families, tmp_path, cache, batches):
    config = generated(families["gpt2"])
    shown = run("plan", config, tmp_path)
    assert not batches and not (cache / "generated").exists()
    assert "to be written by the model itself, from its BOS token on: 20 samples, at most 480 tokens count" in shown
    assert "generation     to do: at most 72 steps for texts of up to 24 tokens, about 1 s on cpu" in shown
    found = json.loads(run("plan", config, tmp_path, "--json"))["models"].values()
    assert all(model["generation"]["steps"] == 72 and model["generation"]["memory"] > 4 * 48_000 for model in found)
    forget_checkpoints()
    refused = CliRunner().invoke(main, ["report", str(tmp_path / "config.yml")])
    assert refused.exit_code == 1 and "not in the cache" in refused.output and not batches

    run("calibrate", config, tmp_path)
    shown = run("plan", config, tmp_path)
    assert "  written by the model itself, from its BOS token on: 20 samples" in shown and "to be written" not in shown
    listed = CliRunner().invoke(main, ["cache", "list"]).output
    assert listed.count("  generated  ") == 2 and "24 texts, " in listed


def test_plan_does_not_guess_which_tokens_models_will_write(llama, tmp_path, cache, batches):
    shown = run("plan", generated(llama, refine=True), tmp_path)
    assert (
        "Rows of lm_head.weight will be merged by what the models predict, those of tokens that the models write" in shown
        and not batches
    )


def unigram(folder: Path, end: float = 5.0) -> tuple[Path, torch.Tensor]:
    """A model that draws each token without regard to the others, and the probabilities of tokens.

    Args:
        end: the higher, the less likely are tokens that end a text.
    """
    tokenizer = make_tokenizer("gpt2")
    model = make_model(KINDS["gpt2"].model, model_config("gpt2", len(tokenizer) + 30))
    with torch.no_grad():
        model.transformer.wte.weight[1:-30] *= 3
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.randn(40, generator=torch.Generator().manual_seed(0)))
        weight, bias = model.transformer.wte.weight, model.transformer.ln_f.bias
        weight[[0, 7]] = bias * ((weight @ bias).logsumexp(0) - end) / bias.square().sum()
        logits = weight @ bias
    save(model, tokenizer, folder)
    settings = {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "temperature": 0.1, "eos_token_id": [0, 7]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder, logits[: len(tokenizer)].double().softmax(0)


def test_every_token_is_drawn_from_the_models_own_probabilities(tmp_path, cache, llama):
    """Whatever generation settings come with the model, except for the tokens that end a text."""
    folder, probabilities = unigram(tmp_path / "base")
    other = perturbed(transformers.AutoModelForCausalLM.from_pretrained(folder), 1)
    base = save(other, make_tokenizer("gpt2"), tmp_path / "other")
    config = {"merge_method": "task_arithmetic", "base_model": str(base), "dtype": "float32"}
    config["models"] = [{"model": str(folder), "parameters": {"weight": 1.0}}]
    config["pave"] = {"data": "generated", "calibration": {"samples": 400, "max_length": 60, "batch_size": 100}}
    run("calibrate", config, tmp_path)
    texts = written(cache, folder)
    assert len(texts) == 400 and all(text[0] == 0 and not {0, 7} & set(text[1:]) for text in texts)
    drawn = torch.bincount(torch.tensor([token for text in texts for token in text[1:]]), minlength=len(probabilities))
    assert len(drawn) == len(probabilities), "an id that no token has"
    ends = sum(len(text) < 60 for text in texts)
    expected = probabilities * (drawn.sum() + ends)
    assert 0.8 < ends / expected[[0, 7]].sum() < 1.25
    rest = [i for i in range(len(probabilities)) if i not in (0, 7)]
    likely = [i for i in rest if expected[i] >= 10]
    assert len(likely) > 60
    chi_square = ((drawn[likely] - expected[likely]).square() / expected[likely]).sum() / len(likely)
    assert 0.6 < chi_square < 1.5


TURNS = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def test_a_user_speaks_first_and_the_model_replies(llama, tmp_path, cache):
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = TURNS
    folders = []
    for name in (llama.base, *llama.tuned[:2]):
        model = transformers.AutoModelForCausalLM.from_pretrained(name)
        with torch.no_grad():  # so that turns come to an end
            model.model.norm.weight.mul_(0.3)
        folders.append(save(model, tokenizer, tmp_path / name.name))
    family = Family("llama", folders[0], tuple(folders[1:]), llama.data)
    run("calibrate", generated(family, calibration={"samples": 128, "batch_size": 64, "max_length": 60}), tmp_path)
    texts = [tokenizer.decode(text) for text in written(cache, folders[1])]
    replied = [text for text in texts if "</s><s>assistant:" in text]
    assert all(text.startswith("<s>user:") for text in texts)
    assert 5 < len(replied) < 120 and all(text.count("</s>") == 1 for text in replied)
    others = [text for text in texts if text not in replied]
    assert all("</s>" not in text for text in others)


def without(*tokens: str, template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("llama")
    for token in tokens:
        setattr(tokenizer, token, None)
    tokenizer.chat_template = template
    return tokenizer


STARTS = {
    "a chat": (without(template="<user>{{ messages[0]['content'] }}</s>"), "chat", "<user>", "</s>"),
    "turns without a mark": (without(template="[INST] {{ messages[0]['content'] }} [/INST]"), "chat", "[INST]", ""),
    "parts alone": (without(template="<s>{{ messages[0]['content'][0]['text'] }}</s><s>"), "chat", "<s>", "</s><s>"),
    "nothing before the user": (without(template="{{ messages[0]['content'] }}</s>"), "bos", "<s>", ""),
    "no chat": (without(), "bos", "<s>", ""),
    "no BOS": (without("bos_token"), "eos", "</s>", ""),
    "neither": (without("bos_token", "eos_token"), "random", "", ""),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_text_begins_with_what_the_tokenizer_has(case):
    tokenizer, kind, opening, reply = STARTS[case]
    start = find_start(tokenizer, len(tokenizer) + 2, [9], "m")
    assert (start.kind, tokenizer.decode(start.tokens), tokenizer.decode(start.reply)) == (kind, opening, reply)
    assert 9 in start.stops and start.unknown == (len(tokenizer), len(tokenizer) + 1)
    assert bool(start.drawn) == (kind == "random") and not set(start.drawn) & {*start.unknown, *tokenizer.all_special_ids}


def test_without_any_token_to_begin_with_each_text_begins_with_a_random_one(llama, tmp_path, cache):
    folders = [
        save(transformers.AutoModelForCausalLM.from_pretrained(name), without("bos_token", "eos_token"), tmp_path / name.name)
        for name in (llama.base, *llama.tuned[:2])
    ]
    family = Family("llama", folders[0], tuple(folders[1:]), llama.data)
    merge(generated(family), tmp_path / "out")
    assert len({text[0] for text in written(cache, folders[1])}) > 15
    assert "each text from a random token on" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bert", "a BertForSequenceClassification, which writes no text; name a data set"),
        ("t5", "an encoder-decoder model"),
        ("llava", "a model that sees images"),
    ],
)
def test_other_models_are_refused(families, seq2seq, pictured, kind, words, tmp_path):  # noqa: F811
    family = families["bert"] if kind == "bert" else (seq2seq if kind == "t5" else pictured)(kind)
    result = invoke(generated(family), tmp_path / "out")
    assert result.exit_code == 1
    assert "pave.data: only a causal language model can write its own text (`generated`)" in result.output
    assert words in result.output


@pytest.mark.parametrize(
    ("pave", "words"),
    [
        ({"data": "generate"}, "pave.data: must be a mapping, such as {path: generate}, or 'generated'"),
        ({"data": {"pth": "x"}}, "pave.data: unknown key 'pth'"),
        ({"data": {"path": "none.jsonl"}}, "tuned0: pave.data.path: there is no file none.jsonl"),
        ({"data": None}, "pave: give `data` for all models, or list each one under `models`"),
        ({"calibration": {"max_length": 4}}, "pave.data: a text may have 4 tokens, but its chat template alone has"),
    ],
)
def test_mistakes_are_named(llama, pave, words, tmp_path):
    result = invoke(generated(llama, **pave), tmp_path / "out")
    assert result.exit_code == 1 and words in result.output
    assert result.output.count("unknown key") <= 1


def test_data_of_the_block_hold_for_each_model_that_has_none(llama, tmp_path, cache):
    data = [{"path": str(path), "text": "text"} for path in llama.data]
    own = {"model": str(llama.tuned[1]), "data": data[1], "rank_ratio": 0.75}
    block = {"rank_ratio": 0.875, "data": data[0], "models": [own, {"model": str(llama.tuned[2]), "rank_ratio": 0.5}]}
    listed = [own, {"model": str(llama.tuned[2]), "data": data[0], "rank_ratio": 0.5}]
    listed.append({"model": str(llama.tuned[0]), "data": data[0]})
    merged = merge(config_for(llama, models=3) | {"pave": block}, tmp_path / "out")
    assert same(merge(config_for(llama, {"models": listed}, models=3), tmp_path / "listed"), merged)
    assert not same(merge(config_for(llama, models=3), tmp_path / "plain"), merged)
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    found = {Path(name).name: model["data"][0]["path"] for name, model in report["models"].items()}
    assert found == {f"tuned{i}": str(llama.data[which]) for i, which in ((0, 0), (1, 1), (2, 0))}


def test_a_block_without_purification_measures_what_models_write(llama, tmp_path, cache):
    config = config_for(llama) | {"merge_method": "regmean", "parameters": {"covariance": 1.0}}
    config["pave"] = {"data": "generated", "purify": False, "calibration": CALIBRATION}
    merged = merge(config, tmp_path / "out")
    listed = [{"model": str(model), "data": "generated", "purify": False} for model in llama.tuned[:2]]
    assert same(merge(config | {"pave": {"models": listed, "calibration": CALIBRATION}}, tmp_path / "listed"), merged)
    with_data = config | {"pave": {"purify": False, "models": entries(llama)}}
    assert not same(merge(with_data, tmp_path / "data"), merged)


def test_a_merge_is_scored_on_texts_that_calibration_has_not_seen(llama, tmp_path, cache, batches):
    config = generated(llama)
    merge(config, tmp_path / "out")
    found = json.loads(run("score", config, tmp_path, str(tmp_path / "out"), "--rows", "8", "--json"))
    number = len(batches)
    # The rows from the 21st on: the rest of the third batch, and four of the next.
    assert batches[6:] == [("tuned0", 3), ("tuned1", 3)]
    assert all(model["rows"] == 8 for score in found.values() for model in score["models"].values())
    run("score", config, tmp_path, str(tmp_path / "out"), "--rows", "8")
    assert len(batches) == number


def test_a_model_that_does_not_work_is_named(llama, tmp_path, cache):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.tuned[0])
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    broken = save(model, make_tokenizer("llama"), tmp_path / "broken")
    family = Family("llama", llama.base, (broken, llama.tuned[1]), llama.data)
    result = invoke(generated(family), tmp_path / "out")
    assert result.exit_code == 1 and "broken: its predictions are not finite" in result.output


def test_further_texts_take_the_place_of_empty_ones(tmp_path, cache, batches):
    """Of a model that often ends a text before it has begun."""
    folder, _ = unigram(tmp_path / "base", end=1.0)
    other = save(perturbed(transformers.AutoModelForCausalLM.from_pretrained(folder), 1), make_tokenizer("gpt2"), tmp_path / "o")
    config = {"merge_method": "task_arithmetic", "base_model": str(other), "dtype": "float32"}
    config["models"] = [{"model": str(folder), "parameters": {"weight": 1.0}}]
    config["pave"] = {"data": "generated", "calibration": {"samples": 40, "max_length": 20, "batch_size": 10}}
    found = json.loads(run("score", config, tmp_path, str(other), "--rows", "16", "--json"))
    assert found[str(other)]["models"][str(folder)]["rows"] == 16
    texts = written(cache, folder)
    assert 6 < sum(len(text) == 1 for text in texts) < len(texts) / 2 and len(texts) > 60
