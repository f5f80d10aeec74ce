"""Mixtures of experts: each expert of each architecture against a float64 reference that knows only PAVE's definition.

The reference routes every row through the model on its own, notes which tokens the router sent where, and computes by
hand what each expert's two projections see.
"""

import functools
import json
import logging
import math

import merging
import pytest
import reference
import torch
import transformers
from merging import config_for, entries, merge
from models import Family, make_rows, perturbed, read_rows, save, write_rows
from test_calibration import assert_same, by_layer, in_lockstep, job_for, texts, whole
from torch.nn.functional import silu

from mergekit_pave import PaveError
from mergekit_pave.calibration.architecture import describe
from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.calibration.blame import NotFiniteError
from mergekit_pave.calibration.estimate import estimate
from mergekit_pave.calibration.experts import projections, run_experts

EXPERTS = 4
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
DEEPSEEK = {
    "n_routed_experts": EXPERTS,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
NEXT = {
    "num_experts": EXPERTS,
    "head_dim": 8,
    "shared_expert_intermediate_size": 28,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
AFMOE = {
    "num_experts": EXPERTS,
    "head_dim": 8,
    "num_dense_layers": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "layer_types": ["full_attention", "sliding_attention"],
}
KINDS = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS}),
    "gpt_oss": ("GptOss", {"num_local_experts": EXPERTS, "head_dim": 8}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "qwen3_next": ("Qwen3Next", NEXT),
    "afmoe": ("Afmoe", AFMOE),  # mergekit merges a tensor for each expert
    "granitemoe": ("GraniteMoe", {"num_local_experts": EXPERTS}),
}


@pytest.fixture(scope="session")
def family_of(families, tmp_path_factory):
    """Makes the models of one architecture, once. The second model's data set has so few rows that experts go short."""

    @functools.cache
    def make(kind: str) -> Family:
        llama = families["llama"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(llama.base)
        name, more = KINDS[kind]
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), **COMMON | more)
        base = getattr(transformers, f"{name}ForCausalLM")(config)
        folder = tmp_path_factory.mktemp(kind)
        saved = []
        for place, model in {"base": base, "a": perturbed(base, 1), "b": perturbed(base, 2)}.items():
            # Where not every layer has experts, mergekit merges them only if they are stored as transformers holds them.
            model.save_pretrained(folder / place, save_original_format=kind != "deepseek_v3")
            tokenizer.save_pretrained(folder / place)
            saved.append(folder / place)
        few = write_rows(folder / "few.jsonl", make_rows("def return list index loop print value", 9, seed=3))
        return Family(kind, saved[0], tuple(saved[1:]), (llama.data[0], few))

    return make


def gated(kind, both):
    """The activation between an expert's two projections, written down for each layout."""
    if kind == "gpt_oss":
        gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = both.tensor_split(2, dim=1)
    return silu(gate) * up


def stored_in(kind, path, expert, projection):
    """The tensor of the output that holds an expert's matrix."""
    return f"{path}.{expert}.{projection}.weight" if kind == "afmoe" else f"{path}.{projection}"


def of_expert(tensor, expert):
    return tensor[expert] if tensor.dim() == 3 else tensor


def seen_by(kind, folder, data, limit=64):
    """{weight: {expert, or None for an ordinary layer: inputs (tokens, width)}} and the weights that route, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    seen: dict[str, dict] = {}

    def note(weight, expert, rows):
        seen.setdefault(weight, {}).setdefault(expert, []).append(rows)

    def experts_hook(path, module, args):
        hidden, index, _ = args
        for expert in range(EXPERTS):
            rows = torch.stack([hidden[t] for t in range(len(hidden)) if expert in index[t].tolist()] or [hidden[:0].sum(0)])
            rows = rows if expert in index else rows[:0]
            for name in ["gate_proj", "up_proj"] if kind == "afmoe" else ["gate_up_proj"]:
                note(stored_in(kind, path, expert, name), expert, rows)
            first = module.gate_up_proj[expert]
            both = rows @ first + module.gate_up_proj_bias[expert] if kind == "gpt_oss" else rows @ first.T
            note(stored_in(kind, path, expert, "down_proj"), expert, gated(kind, both))

    for name, module in model.model.named_modules(prefix="model"):
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda m, args, name=name: experts_hook(name, m, args))
        elif isinstance(module, torch.nn.Linear) and not name.endswith(("router", "router.layer", "router.gate", "mlp.gate")):
            module.register_forward_pre_hook(
                lambda m, args, name=name: note(f"{name}.weight", None, args[0].reshape(-1, args[0].shape[-1]))
            )
    with torch.no_grad():
        for row in read_rows(data):
            model(**{key: torch.tensor([ids]) for key, ids in tokenizer(row["text"], truncation=True, max_length=limit).items()})
    return {weight: {expert: torch.cat(parts) for expert, parts in of.items()} for weight, of in seen.items()}


def spectrum(weight, x):
    c = x.T @ x / len(x)
    c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    return c, *torch.linalg.svd(weight @ c, full_matrices=False)


@functools.cache
def seen_in(family):
    return [seen_by(family.kind, folder, data) for folder, data in zip(family.tuned, family.data)]


def expected(family, plain, min_tokens=64, ratio=0.875, allocation="spectral", seen=None):
    """Per model, {(weight, expert): (W' as stored, W as stored, rank kept)} of every matrix that is purified."""
    seen = seen or seen_in(family)
    results = [{} for _ in seen]
    for weight in seen[0]:
        for expert in seen[0][weight]:
            who = [i for i in range(len(seen)) if expert is None or len(seen[i][weight][expert]) >= min_tokens]
            turned = family.kind == "gpt_oss" and expert is not None
            found, shares = [], []
            for i in who:
                stored = of_expert(plain[i][weight], expert)
                matrix = stored.double().T if turned else stored.double()
                n = min(matrix.shape)
                found.append((i, matrix, *spectrum(matrix, seen[i][weight][expert])))
                shares.append(n - max(1, round(n * ratio)))
            drops = reference._allocate([(s / s[0]).tolist() for _, _, _, _, s, _ in found], shares, allocation)
            for (i, matrix, c, u, s, vt), drop, share in zip(found, drops, shares):
                if share:
                    r = len(s) - drop
                    low = torch.linalg.solve(c, (u[:, :r] * s[:r] @ vt[:r]).T).T
                    results[i][weight, expert] = (low.T, matrix.T, r) if turned else (low, matrix, r)
    return results


def median_tokens(family):
    """Half of the second model's experts saw fewer tokens."""
    counts = sorted(len(x) for of in seen_in(family)[1].values() for expert, x in of.items() if expert is not None)
    assert counts[0] < counts[len(counts) // 2] > 1
    return counts[len(counts) // 2]


def plain_merges(family, tmp_path):
    """What mergekit alone writes for each model: its weights, in the layout of the output."""
    models = range(len(family.tuned))
    return [
        merge(config_for(family, weight=tuple(float(i == j) for j in models), dtype="float64"), tmp_path / f"plain{i}")
        for i in models
    ]


def compare(written, wanted, plain):
    """Every matrix that is to be purified is W'; everything else is bit for bit the plain merge."""
    assert wanted and written.keys() == plain.keys()
    for name, tensor in written.items():
        rest = torch.ones(tensor.shape[:1] or (1,), dtype=torch.bool)
        for (weight, expert), (exact, stored, rank) in wanted.items():
            if weight != name:
                continue
            rest[expert if tensor.dim() == 3 else slice(None)] = False
            found = of_expert(tensor, expert)
            if rank == min(exact.shape):
                assert torch.equal(found, stored), name
                continue
            error = ((found - exact).norm() / (exact - stored).norm()).item()
            assert error <= merging.TOLERANCE, f"{name}[{expert}] is {error:.2e} of ||W'-W|| away from the reference"
        assert torch.equal(tensor.reshape(len(rest), -1)[rest], plain[name].reshape(len(rest), -1)[rest]), name


@pytest.mark.parametrize(("kind", "batch_size"), [*((kind, 7) for kind in KINDS), ("mixtral", 1), ("gpt_oss", 40)])
def test_every_expert_is_exact(family_of, tmp_path, cache, kind, batch_size):
    family = family_of(kind)
    plain = plain_merges(family, tmp_path)
    # In the second model half of the experts see fewer tokens.
    counts = [{(weight, expert): len(x) for weight, of in seen.items() for expert, x in of.items()} for seen in seen_in(family)]
    least = sorted(count for (_, expert), count in counts[1].items() if expert is not None)
    least = least[len(least) // 2]
    wanted = expected(family, plain, least)
    short = {key for key in wanted[0] if key not in wanted[1]}
    assert short, "some expert must see too few tokens, or this is no test of min_tokens"
    shared = [key for key in wanted[0] if key[1] is not None and key in wanted[1]]
    assert shared, "some expert must see enough tokens in both models"
    assert any(wanted[0][key][2] != wanted[1][key][2] for key in shared), "or this is no test of allocation"
    for i in range(2):
        pave = {"calibration": {"batch_size": batch_size, "min_tokens": least}}
        config = config_for(family, pave, weight=(float(i == 0), float(i == 1)), dtype="float64")
        written = merge(config, tmp_path / f"out{i}")
        compare(written, wanted[i], plain[i])
    report = json.loads((tmp_path / "out1" / "pave_report.json").read_text())
    for i, model in enumerate(map(str, family.tuned)):
        rows = {(row["tensor"], row.get("expert")): row for row in report["purified"] if row["model"] == model}
        assert rows.keys() == wanted[i].keys()
        assert all(row["kept"] == wanted[i][key][2] and row["tokens"] == counts[i][key] for key, row in rows.items())
        left = report["models"][model]["left_as_they_are"]
        routers = [
            tensor
            for tensor in left
            if tensor.endswith(("mlp.gate.weight", "router.weight", "router.layer.weight", "router.gate.weight"))
        ]
        assert routers and all(left[tensor] == "router" for tensor in routers)
        few = {tensor for tensor, reason in left.items() if "too few calibration tokens" in reason}
        missing = [key for key in counts[i] if key[1] is not None and key not in wanted[i]]
        assert few == {tensor if kind == "afmoe" else f"{tensor}[{expert}]" for tensor, expert in missing}


def test_experts_go_block_by_block(family_of, tmp_path, cache, caplog):
    with caplog.at_level(logging.INFO, "mergekit_pave"):
        merge(config_for(family_of("mixtral"), {}), tmp_path / "out")
    assert "loading it whole" not in caplog.text
    assert "weights of 2 models, of experts that saw too few tokens: model.layers.*.mlp.experts.gate_up_proj[*], " in caplog.text


def test_min_tokens_needs_no_new_calibration(family_of, tmp_path, cache, monkeypatch):
    family = family_of("qwen3_moe")
    plain = plain_merges(family, tmp_path)
    weight = (0.0, 1.0)
    median = median_tokens(family)
    for turn, least in enumerate((median, 1, median, 10**6)):
        pave = {"calibration": {"min_tokens": least}}
        written = merge(config_for(family, pave, weight=weight, dtype="float64"), tmp_path / f"out{turn}")
        compare(written, expected(family, plain, least)[1], plain[1])
        folders = list((cache / "covariance").iterdir())
        assert len([folder for folder in folders if folder.is_dir()]) == 2
    caches = [path.stat().st_mtime_ns for path in sorted((cache / "subspace").rglob("tail-*.safetensors"))]
    merge(config_for(family, {"calibration": {"min_tokens": median + 1}}, weight=weight), tmp_path / "again")
    assert caches and caches == [path.stat().st_mtime_ns for path in sorted((cache / "subspace").rglob("tail-*.safetensors"))]


def test_uncounted_tokens_never_reach_an_expert(family_of, tmp_path, cache):
    """With a budget each expert has as many tokens as were counted and routed to it, and no more."""
    family = family_of("mixtral")
    merge(config_for(family, {"calibration": {"max_tokens": 100, "min_tokens": 1}}), tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "pave_report.json").read_text())["purified"]
    for model in map(str, family.tuned):
        for layer in range(2):
            name = f"model.layers.{layer}.mlp.experts.down_proj"
            routed = sum(row["tokens"] for row in rows if row["tensor"] == name and row["model"] == model)
            assert routed == 2 * 100


def test_uniform_allocation_and_the_change_alone(family_of, tmp_path, cache):
    family = family_of("gpt_oss")
    plain = plain_merges(family, tmp_path)
    wanted = expected(family, plain, allocation="uniform")
    written = merge(config_for(family, {"allocation": "uniform"}, weight=(1.0, 0.0), dtype="float64"), tmp_path / "uniform")
    compare(written, wanted[0], plain[0])
    base = reference.weights(family.base)
    pave = {"allocation": "uniform", "target": "task_vector"}
    written = merge(config_for(family, pave, weight=(1.0, 0.0), dtype="float64"), tmp_path / "change")
    changed = {}
    for (weight, expert), (exact, stored, rank) in wanted[0].items():
        turn = (lambda x: x.T) if expert is not None else (lambda x: x)
        origin = base[weight].double() if expert is None else base[weight][expert].double()
        # What was taken from W lies in the dropped directions, and in all of them.
        directions = torch.linalg.svd(turn(stored - exact))[0][:, : min(exact.shape) - rank]
        low = turn(stored) - directions @ directions.T @ turn(stored - origin)
        changed[weight, expert] = (turn(low), stored, rank)
    compare(written, changed, plain[0])


def test_experts_that_mergekit_alone_would_lose(family_of, tmp_path, cache):
    """mergekit drops experts that only some layers have when each expert is stored by itself; a block makes it keep them."""
    family = family_of("deepseek_v3")
    folders = []
    for folder in (family.base, *family.tuned):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model = type(loaded)(loaded.config)  # what is loaded would be saved in the form in which it was found
        model.load_state_dict(loaded.state_dict())
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        folders.append(save(model, tokenizer, tmp_path / folder.name))
    split = Family(family.kind, folders[0], tuple(folders[1:]), family.data)
    lost = reference.weights(split.base).keys() - merge(config_for(split), tmp_path / "plain").keys()
    assert len(lost) == 3 * EXPERTS and all(".mlp.experts." in name for name in lost)
    seen = [{} for _ in split.tuned]
    for i, (model, known) in enumerate(zip(seen, seen_in(family))):
        for weight, of in known.items():
            for expert, x in of.items():
                path, _, projection = weight.rpartition(".")
                for part in {"gate_up_proj": ("gate_proj", "up_proj")}.get(projection, (projection,)):
                    model[weight if expert is None else f"{path}.{expert}.{part}.weight"] = {None: x}
        assert lost <= model.keys(), i
    # With weight 1 for one model and 0 for the other a plain merge would write that model.
    plain = [{name: tensor.double() for name, tensor in reference.weights(folder).items()} for folder in split.tuned]
    wanted = expected(split, plain, seen=seen)
    for i in range(2):
        config = config_for(split, {"calibration": {"min_tokens": 1}}, weight=(float(i == 0), float(i == 1)), dtype="float64")
        compare(merge(config, tmp_path / f"out{i}"), wanted[i], plain[i])
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out1", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_other_experts_are_refused(family_of, tmp_path, cache, monkeypatch):
    """A module of experts that does not compute what its marks say is found out before anything is stored."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    monkeypatch.setattr(MixtralExperts, "_apply_gate", lambda self, both: both.chunk(2, dim=-1)[0].relu())
    own = MixtralExperts.forward.__wrapped__
    monkeypatch.setattr(MixtralExperts, "forward", lambda self, *args: own(self, *args))
    with pytest.raises(PaveError, match="compute otherwise"):
        merge(config_for(family_of("mixtral"), {}), tmp_path / "out")
    # These come before, and samples are not remembered of files that have just been written.
    assert {path.parent.parent.name for path in cache.rglob("manifest.json")} - {"samples"} == {"comparison"}


@pytest.mark.parametrize("tokens", [3, 12, 60, 2000])
def test_the_estimate_bounds_the_cache(family_of, tmp_path, cache, tokens):
    family = family_of("mixtral")
    config = transformers.AutoConfig.from_pretrained(family.base)
    architecture = describe(config, str(family.base), False)
    pave = {"models": entries(family, 1), "calibration": {"max_tokens": tokens}, "keep_covariances": True}
    merge(config_for(family, pave, models=1), tmp_path / "out")
    files = list((cache / "covariance").rglob("*.safetensors"))
    stored = sum(math.prod(t.shape) * t.element_size() for file in files for t in reference.load_file(file).values())
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    counted = report["models"][str(family.tuned[0])]["tokens"]
    cost = estimate(architecture, [Encoded("", {"input_ids": [0] * counted}, list(range(counted)))], 1, 4)
    assert stored <= cost.cache
    assert cost.cache <= 4 * stored, "a bound that is far off is no help"


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "afmoe"])
def test_experts_block_by_block_are_the_same_as_whole(family_of, kind):
    job = job_for(family_of(kind).tuned[0], texts())
    one, other = by_layer(in_lockstep(job)), by_layer(whole(job))
    assert sum(".experts." in layer for layer in one) >= EXPERTS
    assert_same(one, other, 1e-12)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_experts_see_their_tokens_in_order(family_of, kind, share):
    """Bit for bit what a search for each expert's tokens gives, also where some experts get none or none that count."""
    model = transformers.AutoModelForCausalLM.from_pretrained(family_of(kind).base)
    experts = model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(50, 32, generator=generator), torch.rand(50, 2, generator=generator)
    chosen = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(50)])
    counted = torch.rand(50, generator=generator) < share
    seen = {}
    with torch.no_grad():
        found = run_experts(experts, hidden, chosen, weights, counted, lambda *of: seen.update({of[:2]: of[2]}))
        torch.testing.assert_close(found, experts(hidden, chosen, weights))
        if share == 1:
            assert torch.equal(run_experts(experts, hidden, chosen, weights, None, lambda *_: None), found)
    first, last = projections(experts)
    assert seen.keys() == {(name, expert) for name in (first, last) for expert in range(EXPERTS - 1)}
    for expert in range(EXPERTS - 1):
        tokens = torch.where(chosen == expert)[0]
        assert torch.equal(seen[first, expert], hidden[tokens[counted[tokens]]])
        assert len(seen[last, expert]) == counted[tokens].sum()


def test_an_expert_that_is_not_finite_is_named(family_of, tmp_path):
    """By the first of its layers that sees it, though all experts' inputs are looked at together."""
    family = family_of("mixtral")
    model = transformers.AutoModelForCausalLM.from_pretrained(family.tuned[0])
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[2, 3] = math.nan
    folder = save(model, transformers.AutoTokenizer.from_pretrained(family.base), tmp_path / "model")
    with pytest.raises(NotFiniteError) as caught:
        list(in_lockstep(job_for(folder, texts())))
    assert caught.value.layer == "model.layers.1.mlp.experts.down_proj.2"


def test_experts_may_be_left_alone(family_of, tmp_path, cache):
    family = family_of("mixtral")
    merge(config_for(family, {"exclude": ["experts"]}), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pave_report.json").read_text())
    assert len(report["purified"]) == 2 * 2 * 4  # q, k, v and o of two layers in two models
    assert not any("expert" in row for row in report["purified"])


def test_experts_that_no_memory_would_hold_are_described():
    """9 TB of them in one parameter, which is not even allocated."""
    settings = {"num_experts": 1 << 14, "hidden_size": 1 << 13, "moe_intermediate_size": 1 << 13, "num_hidden_layers": 1}
    config = transformers.Qwen3MoeConfig(vocab_size=8, architectures=["Qwen3MoeForCausalLM"], **settings)
    found = describe(config, "there", False)
    experts = found.linears["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.stored_shape == (1 << 14, 1 << 14, 1 << 13)
