"""Sums and thin products are exact whatever a process has set for its models, whatever the inputs' magnitude, on any device."""

import contextlib
import logging
import threading

import pytest
import torch
from merging import config_for, merge
from models import make_model, model_config
from test_in_memory import batches_of, load

from mergekit_pave import Covariance, PaveError, allocate_ranks, purify, purify_model
from mergekit_pave.core.exact import float32_products, float64_device
from mergekit_pave.core.projection import coefficients, drop_components

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings() -> list[str]:
    backends = torch.backends
    places = [backends, backends.cudnn, backends.cuda.matmul, backends.mkldnn, backends.mkldnn.matmul]
    return [place.fp32_precision for place in places]


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.mkldnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def by_matmul_precision():
    torch.set_float32_matmul_precision("medium")
    yield


@contextlib.contextmanager
def by_backend():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield


@contextlib.contextmanager
def by_all_backends():
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    yield


FASTER = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "medium": by_matmul_precision,
    "backend": by_backend,
    "all backends": by_all_backends,
}


@pytest.mark.parametrize("faster", FASTER.values(), ids=FASTER)
def test_sums_and_thin_products_are_the_same_bits(faster):
    rows, weight, base = draw(5000, 96), draw(64, 96, seed=1), draw(64, 96, seed=2)
    directions = torch.linalg.qr(draw(64, 8, seed=3)).Q

    def results():
        along = coefficients(weight, directions, base)
        out = torch.empty_like(weight)
        norms = drop_components(weight, directions, along, base, out=out)
        covariance = Covariance.from_rows(rows)
        return [covariance.gram, along, out, purify(weight, covariance, 60)], norms

    expected, norms = results()
    with faster():
        before = settings()
        found, other_norms = results()
        assert settings() == before
        assert torch.is_autocast_enabled("cpu") == isinstance(faster(), torch.autocast)
    assert norms == other_norms
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("faster", FASTER.values(), ids=FASTER)
def test_a_process_may_ask_for_less_only_of_its_model(llama, faster):
    """Purified with the covariances of a model that ran under these settings: what differs is what its layers saw."""
    seen, weights = [], []
    real = torch.nn.Linear.forward

    def forward(self, x):
        seen.append(real(self, x).dtype)
        return real(self, x)

    batches = list(batches_of(llama.tuned[0], llama.data[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", forward)
        for context in (contextlib.nullcontext, faster):
            model = load("llama", llama.tuned[0])
            before = model.model.layers[0].self_attn.q_proj.weight.clone()
            with context():
                purify_model(model, batches, rank_ratio=0.875, quiet=True)
            weights.append(model.model.layers[0].self_attn.q_proj.weight)
    # The first layer's input is a norm of embeddings: no product, so the same in every precision.
    assert (weights[1] - weights[0]).norm() <= 1e-5 * (weights[0] - before).norm()
    if isinstance(faster(), torch.autocast):
        assert seen[-1] == faster().fast_dtype


def test_settings_return_whoever_leaves_last():
    torch.set_float32_matmul_precision("medium")
    before, entered, leave = settings(), threading.Barrier(2), threading.Event()

    def work():
        with float32_products(CPU):
            entered.wait()
            leave.wait()

    with float32_products(CPU):
        thread = threading.Thread(target=work)
        thread.start()
        entered.wait()
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    leave.set()
    thread.join()
    assert settings() == before
    with pytest.raises(ZeroDivisionError), float32_products(CPU):
        1 / 0  # noqa: B018
    assert settings() == before


def test_a_setting_that_follows_another_does_so_afterwards():
    by_all_backends().__enter__()
    with float32_products(CPU):
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_in_inference_mode(families, kind):
    """Also with parameters and inputs that were made in it."""
    folder, data = families[kind].tuned[0], families[kind].data[0]
    expected, made_before = load(kind, folder), load(kind, folder)
    batches = list(batches_of(folder, data))
    purify_model(expected, batches, rank_ratio=0.875, quiet=True)
    with torch.inference_mode():
        made_inside, own = made_anew(kind, folder), list(batches_of(folder, data))
        assert next(made_inside.parameters()).is_inference()
        assert next(iter(own[0].values())).is_inference()
        purify_model(made_before, own, rank_ratio=0.875, quiet=True)
        purify_model(made_inside, own, rank_ratio=0.875, quiet=True)
        again = made_anew(kind, folder)
    purify_model(again, batches, rank_ratio=0.875, quiet=True)
    for model in (made_before, made_inside, again):
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name


def made_anew(kind, folder):
    """`load` gives parameters that know of no inference mode."""
    loaded = load(kind, folder)
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    return model


def test_a_merge_in_inference_mode(llama, tmp_path, cache):
    expected = merge(config_for(llama, {"cache_dir": str(tmp_path / "one")}), tmp_path / "out")
    with torch.inference_mode():
        found = merge(config_for(llama, {"cache_dir": str(tmp_path / "two")}), tmp_path / "inside")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("tokens", [20, 5000])
def test_inputs_of_any_finite_size(scale, tokens):
    """What is removed does not depend on the inputs' unit, as the regularisation is relative."""
    rows, weight = draw(tokens, 64) * torch.logspace(0, -2, 64), draw(96, 64, seed=1).double()
    expected = purify(weight, Covariance.from_rows(rows), 56)
    found = purify(weight, Covariance.from_rows(rows * scale), 56)
    assert (found - expected).norm() <= 1e-5 * (expected - weight).norm()


def test_one_huge_value_among_many_chunks():
    rows = draw(6000, 32)
    rows[4000, 3] = 3e19
    gram = Covariance.from_rows(rows).gram
    torch.testing.assert_close(gram, rows.double().mT @ rows.double(), rtol=1e-6, atol=0)


def test_a_sum_that_is_not_finite_is_told():
    for tokens in (4, 3000):
        with pytest.raises(ValueError, match="second moment is not finite"):
            Covariance.from_rows(torch.full((tokens, 8), 1e200, dtype=torch.float64))
    model = make_model("LlamaForCausalLM", model_config("llama", 64)).double()
    last = model.model.layers[-1].mlp  # no layer sees what comes after it
    with torch.no_grad():
        last.up_proj.weight *= 1e160
    ids = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    with pytest.raises(PaveError, match=r"the inputs of model\.layers\.2\.mlp\.down_proj are too large to be squared"):
        purify_model(model, {"input_ids": ids}, quiet=True)
    with torch.no_grad():
        last.up_proj.weight *= 1e-160
        last.down_proj.weight *= 1e200
    with pytest.raises(PaveError, match=r"layers\.2\.mlp\.down_proj\.weight cannot be decomposed: .*too large"):
        purify_model(model, {"input_ids": ids}, quiet=True)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_ranks_of_values_that_are_not_finite(odd):
    with pytest.raises(ValueError, match="tail of model 1 has values that are not finite"):
        allocate_ranks([[0.1, 0.2], [0.3, odd]], [1, 1], [2, 2])


def test_a_device_without_float64_is_found_by_trying(caplog):
    """The meta device computes nothing; it is asked once and told once."""
    float64_device.cache_clear()
    with caplog.at_level(logging.INFO, "mergekit_pave"):
        assert float64_device(torch.device("meta")) == CPU
        assert float64_device(torch.device("meta")) == CPU
        assert float64_device(CPU) == CPU
    assert [record.message for record in caplog.records] == ["meta has no float64: sums and decompositions are done on the CPU"]
