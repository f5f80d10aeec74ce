"""Purification from Python: single weights, and a loaded model in place."""

import functools

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, make_architecture
from mergekit.merge_methods import merge_state_dicts
from merging import TOLERANCE, config_for, merge
from models import KINDS, make_model, model_config, read_rows
from reference import purified_alone, weights
from reference import purify as reference

from mergekit_pave import Covariance, PaveError, allocate_ranks, purify, purify_model

RATIO = 0.875


def load(kind, folder):
    return getattr(transformers, KINDS[kind].model).from_pretrained(folder, dtype=torch.float32)


def batches_of(folder, data, size=8, column="text"):
    """Tokenised rows as a user would make them, padded on the right."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [row[column] for row in read_rows(data)]
    for start in range(0, len(texts), size):
        yield tokenizer(texts[start : start + size], return_tensors="pt", padding=True, truncation=True, max_length=64)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("target", ["weights", "task_vector"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_loaded_model_is_purified_exactly(families, kind, target):
    family = families[kind]
    model, base = load(kind, family.tuned[0]), load(kind, family.base)
    before = state(model)
    rows = purify_model(
        model, batches_of(family.tuned[0], family.data[0]), rank_ratio=RATIO, base=base, target=target, quiet=True
    )
    source = [(family.data[0], "text", "text")]
    (expected,) = reference(kind, family.base, family.tuned[:1], source, lambda *_: RATIO, target=target, allocation="uniform")
    assert {row["tensor"] for row in rows} == expected.keys()
    for row in rows:
        wanted = expected[row["tensor"]]
        error = (model.get_parameter(row["tensor"]).double() - wanted.weight).norm().item()
        assert error <= TOLERANCE * wanted.removed_norm, row["tensor"]
        assert (row["components"], row["kept"], row["tokens"]) == (wanted.components, wanted.kept, wanted.tokens)
        assert row["energy_dropped"] == pytest.approx(wanted.energy_dropped, rel=1e-3)
        assert row["change_norm"] == pytest.approx(wanted.change_norm, rel=1e-4)
        if target == "weights":
            assert row["removed_norm"] == pytest.approx(wanted.removed_norm, rel=1e-3)
    after = state(model)
    assert_same({n: v for n, v in before.items() if n not in expected}, {n: v for n, v in after.items() if n not in expected})


def test_it_is_what_the_yaml_does(llama, tmp_path):
    """Purified in memory and merged by `merge_state_dicts`, against the command's way for the same samples."""
    pave = {"allocation": "uniform", "rank_ratio": RATIO, "exclude": ["k_proj"], "regularization": 0.1}
    config = config_for(llama, pave, weight=(0.7, 0.4))
    written = merge(config, tmp_path / "out")
    models = {"base": load("llama", llama.base)}
    for i in range(2):
        models[i] = load("llama", llama.tuned[i])
        batches = batches_of(llama.tuned[i], llama.data[i])
        purify_model(models[i], batches, rank_ratio=RATIO, exclude=["k_proj"], regularization=0.1, quiet=True)
    merged = merge_state_dicts(models, "task_arithmetic", base="base", parameters={"weight": {0: 0.7, 1: 0.4}})
    plain = merge({key: value for key, value in config.items() if key != "pave"}, tmp_path / "plain")
    assert written.keys() == merged.keys()
    for name, tensor in merged.items():
        removed = (written[name] - plain[name]).norm()
        assert (tensor - written[name]).norm() <= max(TOLERANCE * removed, 1e-6), name


@pytest.mark.parametrize("kind", ["deberta-v2-ForSequenceClassification", "vit-ForImageClassification"])
def test_inputs_that_are_not_aligned_with_tokens(tmp_path, kind):
    """DeBERTa projects relative positions, where padding cannot be told: one sample at a time. Images are never padded."""
    family = make_architecture(kind, tmp_path)
    model = load(kind, family.tuned[0])
    if ARCHITECTURES[kind].tokenizer == "image":
        from PIL import Image

        processor = transformers.AutoImageProcessor.from_pretrained(family.tuned[0])
        images = [Image.open(file) for file in sorted(family.data[0].rglob("*.png"))]
        batches, source = processor(images, return_tensors="pt"), (family.data[0], "image")
    else:
        batches, source = batches_of(family.tuned[0], family.data[0]), (family.data[0], "text", "text")
    rows = purify_model(model, batches, rank_ratio=RATIO, regularization=0.1, quiet=True)
    settings = {"allocation": "uniform", "regularization": 0.1}
    (expected,) = reference(kind, family.base, family.tuned[:1], [source], lambda *_: RATIO, **settings)
    assert len(rows) == len(expected)
    of_checkpoint = dict(zip(sorted(expected), sorted(expected)))
    model.save_pretrained(tmp_path / "purified")
    saved = weights(tmp_path / "purified")
    for name in of_checkpoint:
        assert (saved[name].double() - expected[name].weight).norm() <= TOLERANCE * expected[name].removed_norm, name


def test_experts(tmp_path):
    """Each expert on the tokens routed to it, here by the router's own hand; those that saw few stay as they are."""
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=1, head_dim=8,
    )  # fmt: skip
    model = make_model("MixtralForCausalLM", config).eval()
    ids = torch.randint(0, 64, (1, 60), generator=torch.Generator().manual_seed(0))
    seen = {}
    block = model.model.layers[0].mlp
    block.experts.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0], index=args[1]))
    with torch.no_grad():
        model(ids)
    before = state(model)
    counts = [int((seen["index"] == i).sum()) for i in range(4)]
    enough = sorted(counts)[-2]
    rows = purify_model(model, {"input_ids": ids}, rank_ratio=0.75, regularization=0.1, min_tokens=enough, quiet=True)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = {row["expert"]: row for row in rows if row["tensor"] == name}
    assert found.keys() == {i for i, count in enumerate(counts) if count >= enough}
    for i in range(4):
        if i not in found:
            assert torch.equal(model.get_parameter(name)[i], before[name][i])
            continue
        x = seen["hidden"].reshape(-1, 16)[(seen["index"] == i).any(-1)].double()
        wanted = purified_alone(before[name][i], x, 0.75, 0.1)
        assert (model.get_parameter(name)[i] - wanted).norm() <= TOLERANCE * (wanted - before[name][i]).norm()


def test_encoder_decoder_of_equal_lengths(tmp_path):
    """Cross-attention sees the encoder's tokens, self-attention the decoder's, even where there are as many."""
    config = transformers.BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = make_model("BartForConditionalGeneration", config).eval()
    draw = torch.Generator().manual_seed(0)
    ids = {name: torch.randint(3, 64, (2, 9), generator=draw) for name in ("input_ids", "decoder_input_ids")}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    batch = ids | {"attention_mask": mask, "decoder_attention_mask": torch.ones_like(mask)}
    tokens = {row["tensor"]: row["tokens"] for row in purify_model(model, batch, rank_ratio=0.75, quiet=True)}
    for tensor, count in tokens.items():
        of_encoder = ".encoder." in tensor or "encoder_attn.k" in tensor or "encoder_attn.v" in tensor
        assert count == (14 if of_encoder else 18), tensor
    with pytest.raises(ValueError, match="decoder_input_ids, the input of its decoder"):
        purify_model(model, {"input_ids": ids["input_ids"], "attention_mask": mask}, rank_ratio=0.75)


def test_the_model_is_left_as_it_was_but_for_its_weights(llama):
    model = load("llama", llama.tuned[0]).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert model.config.use_cache
    purify_model(model, batches_of(llama.tuned[0], llama.data[1]), quiet=True)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_fails_changes_nothing(llama):
    """The last layer's weight is not finite: no other layer sees it, and all others could have been purified."""
    model = load("llama", llama.tuned[0])
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[1, 1] = float("nan")
    before = state(model)
    with pytest.raises(PaveError, match=r"layers\.2\.mlp\.down_proj\.weight has values that are not finite"):
        purify_model(model, batches_of(llama.tuned[0], llama.data[1]), quiet=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) or "layers.2.mlp.down_proj" in name, name


def test_half_precision_that_overflows_is_told_as_such(llama):
    model = load("llama", llama.tuned[0]).half()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(60000)
    with pytest.raises(PaveError, match=r"layers\.1\.mlp\.down_proj .* overflow in float16.*run it in float32"):
        purify_model(model, batches_of(llama.tuned[0], llama.data[1]), quiet=True)


def test_a_bar_unless_quiet(llama, capfd):
    batch = next(batches_of(llama.tuned[0], llama.data[1]))
    purify_model(load("llama", llama.tuned[0]), batch)
    assert "Calibrating" in capfd.readouterr().err
    purify_model(load("llama", llama.tuned[0]), batch, quiet=True)
    assert "Calibrating" not in capfd.readouterr().err


IDS = torch.ones(2, 5, dtype=torch.long)
BATCH = {"input_ids": IDS, "attention_mask": IDS}
WRONG = {
    "no mask": ({"batches": {"input_ids": IDS}}, "attention_mask: padding must not count"),
    "lists": ({"batches": {"input_ids": [[1, 2]]}}, "return_tensors='pt'"),
    "no ids": ({"batches": {"attention_mask": IDS}}, "must have input_ids; it has attention_mask"),
    "no batches": ({"batches": []}, "no batches"),
    "mask of another shape": ({"batches": {"input_ids": IDS, "attention_mask": IDS[:1]}}, r"shape \(2, 5\).*not \(1, 5\)"),
    "ratio": ({"rank_ratio": 1.5}, "0 < x <= 1, not 1.5"),
    "nothing to drop": ({"rank_ratio": 1.0}, "no weight would be purified"),
    "one string": ({"include": "mlp"}, "lists of parts"),
    "include": ({"include": ["norm"]}, "'norm' is part of no linear weight's name"),
    "exclude": ({"exclude": ["nowhere"]}, "'nowhere' is part of no parameter's name"),
    "target": ({"target": "weight"}, "'weights' or 'task_vector', not 'weight'"),
    "no base": ({"target": "task_vector"}, "needs base"),
    "another base": ({"base": {}}, "base: model.layers.0.self_attn.q_proj.weight is missing"),
    "regularization": ({"regularization": {"relativ": 0.1}}, "regularization: .*relativ"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_mistakes(llama, given, message):
    model = load("llama", llama.tuned[0])
    before = state(model)
    with pytest.raises(ValueError, match=message):
        purify_model(model, **({"batches": BATCH} | given))
    assert_same(state(model), before)


def test_models_that_cannot_be_purified_in_memory():
    config = model_config("llama", 64)
    with pytest.raises(ValueError, match="must be one of transformers, not Linear"):
        purify_model(torch.nn.Linear(4, 4), BATCH)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"q_proj\.weight is not in memory"):
        purify_model(model, BATCH)
    model = make_model("LlamaForCausalLM", config)
    model.model.layers[0].mlp.up_proj.base_layer = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="merge them into its weights"):
        purify_model(model, BATCH)


def test_single_weights():
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    covariance, weight = Covariance.from_rows(draw(50, 24)), draw(40, 24)
    by_default = purify(weight, covariance, 20)
    assert torch.equal(by_default, purify(weight, covariance, 20, shift=0.01 * covariance.mean_diagonal()))
    with pytest.raises(ValueError, match=r"shape \(24, 40\) has inputs 40 wide, the covariance is for 24; .*weight\.T"):
        purify(weight.T, covariance, 20)
    with pytest.raises(ValueError, match=r"float matrix .*not torch.float32 of shape \(2, 40, 24\)"):
        purify(torch.stack([weight, weight]), covariance, 20)
    with pytest.raises(ValueError, match="between 1 and 24"):
        purify(weight, covariance, 25)
    with pytest.raises(ValueError, match="not finite"):
        purify(weight * float("inf"), covariance, 20)
    with pytest.raises(ValueError, match="every input is zero"):
        purify(weight, Covariance.from_rows(torch.zeros(4, 24)), 20)
    with pytest.raises(ValueError, match=r"rows must be a float matrix .*\(2, 5, 24\)"):
        Covariance.from_rows(draw(2, 5, 24))
    with pytest.raises(ValueError, match="not finite"):
        Covariance.from_rows(torch.full((2, 3), float("nan")))


def test_ranks_of_what_does_not_fit():
    tails = [[0.1, 0.2], [0.3, 0.4]]
    assert allocate_ranks(tails, [1, 1], [2, 2]) == [2, 0]
    with pytest.raises(ValueError, match="2 tails, 1 shares and 2 caps"):
        allocate_ranks(tails, [1], [2, 2])
    with pytest.raises(ValueError, match="add up to more than the caps"):
        allocate_ranks(tails, [2, 2], [1, 2])
    with pytest.raises(ValueError, match="tail of model 1 has 2 values, fewer than its cap 3"):
        allocate_ranks(tails, [1, 1], [2, 3])
