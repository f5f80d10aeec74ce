"""What calibration keeps in memory: hidden states, and of attention masks next to nothing; and that its estimate says so."""

import random
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from models import make_model, save
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from mergekit_pave.calibration.architecture import describe
from mergekit_pave.calibration.batches import Encoded
from mergekit_pave.calibration.job import Job, Runtime
from mergekit_pave.calibration.masks import PackedMask, packed_masks
from mergekit_pave.calibration.run import measure_in_lockstep, measure_whole

CPU = Runtime("cpu", False, True)
_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
_MIXED = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
CONFIGS = {
    "LlamaForCausalLM": transformers.LlamaConfig(**_SIZES),
    "MistralForCausalLM": transformers.MistralConfig(**_SIZES, sliding_window=100),
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig(**_SIZES, **_MIXED, sliding_window=100),
    "BertModel": transformers.BertConfig(**_SIZES),
    "ModernBertModel": transformers.ModernBertConfig(**_SIZES, local_attention=128),
    "T5ForConditionalGeneration": transformers.T5Config(
        vocab_size=128, d_model=128, d_ff=160, d_kv=16, num_layers=3, num_heads=4, decoder_start_token_id=0
    ),
}


def job_for(cls: str, folder: Path, lengths: list[int], batch_size: int = 8) -> Job:
    """Random token ids, all of which count."""
    save(make_model(cls, CONFIGS[cls]), None, folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    rng, encoded = random.Random(0), []
    for i, length in enumerate(lengths):
        inputs = {"input_ids": rng.choices(range(3, 128), k=length)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"][: length // 2]
        encoded.append(Encoded(f"row {i}", inputs, list(range(length)), list(range(len(inputs.get("decoder_input_ids", ()))))))
    return Job(
        "model", str(folder), config, describe(config, str(folder), False), encoded, batch_size, {"model": "model", "tokens": 0}
    )


def lengths(count: int, shortest: int, longest: int) -> list[int]:
    return [random.Random(i).randint(shortest, longest) for i in range(count)]


class Tracking(TorchDispatchMode):
    """Counts the bytes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                storage = value.untyped_storage()
                if storage._cdata not in self._live:
                    # What a file is mapped to is no memory of ours.
                    size = 0 if func is torch.ops.aten.set_.source_Storage else storage.nbytes()
                    self._live[storage._cdata] = size
                    self._now += size
                    self.peak = max(self.peak, self._now)
                    weakref.finalize(storage, self._forget, storage._cdata)
        return result

    def _forget(self, key: int) -> None:
        self._now -= self._live.pop(key)


def peak_of(job: Job) -> int:
    with Tracking() as tracking:
        for measured in measure_in_lockstep(job, CPU, job.batch_size):
            del measured
    return tracking.peak


@pytest.mark.parametrize("cls", ["LlamaForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM"])
@pytest.mark.parametrize(
    "of", [(200, 8, 40), (24, 200, 800), (16, 500, 500), (20, 30, 30)], ids=["short", "long", "cut at one length", "few"]
)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_estimate_is_what_calibration_takes(tmp_path, cls, of, batch_size):
    if batch_size == 1:
        of = (of[0] // 4, *of[1:])
    job = job_for(cls, tmp_path / "model", lengths(*of), batch_size)
    assert 1 / 1.3 < job.estimate("cpu").peak / peak_of(job) < 1.3


@pytest.mark.parametrize("cls", CONFIGS)
def test_more_samples_take_their_hidden_states_and_no_masks(tmp_path, cls):
    few, many = (job_for(cls, tmp_path / str(count), list(range(760, 760 + count)), batch_size=2) for count in (4, 24))
    more = many.estimate("cpu").peak - few.estimate("cpu").peak
    assert peak_of(many) - peak_of(few) < 1.3 * more


@pytest.mark.parametrize("cls", CONFIGS)
def test_packing_changes_no_bit(tmp_path, cls):
    job = job_for(cls, tmp_path / "model", lengths(6, 150, 300), batch_size=3)
    apart = frozenset()
    packed, whole = (
        {
            layer: covariance.matrix()
            for _, of_block in measure(job, CPU, 3, apart)
            for members, covariance in of_block
            for layer in members
        }
        for measure in (measure_in_lockstep, measure_whole)
    )
    assert packed.keys() == whole.keys() and packed
    assert all(torch.equal(matrix, whole[layer]) for layer, matrix in packed.items())


@pytest.fixture(params=["causal", "padded", "window", "biases", "float"])
def mask(request):
    """Masks of two samples as models have them."""
    i = torch.arange(150)
    made = (i[:, None] >= i).expand(2, 1, 150, 150)
    if request.param == "padded":
        made = made & (i < torch.tensor([120, 150])[:, None])[:, None, None]
    elif request.param == "window":
        made = made & (i[:, None] - i < 20)
    elif request.param == "biases":  # by distance, with one bias for all that is far, and both zeros
        made = (i[:, None] - i).clamp(-8, 8).float().expand(2, 3, 150, 150) * -0.5
    elif request.param == "float":
        made = torch.where(made, 0.0, torch.finfo(torch.bfloat16).min).bfloat16()
    return made


def test_a_packed_mask_is_the_mask(mask):
    packed = PackedMask.of(mask)
    assert isinstance(packed, PackedMask)
    assert sum(part.nbytes for run in packed._runs for part in run) < mask.numel() * mask.itemsize / 4
    assert (packed.shape, packed.dtype, packed.device, packed.dim()) == (mask.shape, mask.dtype, mask.device, 4)
    assert torch.equal(packed.full().contiguous().view(torch.uint8), mask.contiguous().view(torch.uint8))
    for use in (lambda m: m[:, :, :20], lambda m: m + m, lambda m: torch.where(m != 0, 1, 2), lambda m: m.to(torch.float64)):
        assert type(use(packed)) is torch.Tensor and torch.equal(use(packed), use(mask))
    query = torch.randn(2, 3, 150, 8, dtype=mask.dtype if mask.is_floating_point() else torch.float32)
    attended = (scaled_dot_product_attention(query, query, query, attn_mask=m) for m in (packed, mask))
    assert torch.equal(*attended)


def test_a_packed_mask_that_is_written_to(mask):
    packed, mask = PackedMask.of(mask), mask.clone()
    for written in (packed, mask):
        written[0, 0, 3, 5] = 1
        written.logical_not_()
    assert torch.equal(packed, mask)


@pytest.mark.parametrize("values", [torch.randn(1, 2, 200, 200), torch.ones(1, 1, 20, 20), torch.ones(8, 200, 200)])
def test_what_is_no_mask_stays_as_it_is(values):
    assert PackedMask.of(values) is values


def test_transformers_has_its_own_masks_back_however_the_pass_ends():
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    with pytest.raises(ZeroDivisionError), packed_masks():
        assert dict(ALL_MASK_ATTENTION_FUNCTIONS) != before
        1 / 0  # noqa: B018
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == before
