"""The calibration pass: the same numbers however it is run, whatever the rows look like, and clear words where it cannot."""

import dataclasses
import functools
import itertools
import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import merging
import pytest
import torch
import transformers
from commands import command, finish, fresh, in_two, start
from models import make_rows, read_rows, save, write_rows

from mergekit_pave.cache import Artefact, require_space
from mergekit_pave.calibration import drawing, lockstep, run
from mergekit_pave.calibration.architecture import describe
from mergekit_pave.calibration.batches import Batch, Encoded, encode, make_batches
from mergekit_pave.calibration.counts import count_tokens
from mergekit_pave.calibration.data import load_samples, share_evenly
from mergekit_pave.calibration.drawing import default_tokens, draw_positions, to_run
from mergekit_pave.calibration.forward import runner
from mergekit_pave.calibration.job import Job, Runtime
from mergekit_pave.calibration.models import inference_dtype
from mergekit_pave.calibration.observe import DivergedError, Observer
from mergekit_pave.calibration.run import calibrate, measure_in_lockstep, measure_whole
from mergekit_pave.calibration.stored import StoredCovariances
from mergekit_pave.calibration.use import NoUse
from mergekit_pave.calibration.weights import Checkpoint, StreamedModel, UnknownWeightError
from mergekit_pave.errors import PaveError
from mergekit_pave.settings import DEFAULT_CALIBRATION, Data

CPU = Runtime("cpu", False, True)


def in_lockstep(job: Job):
    return measurements(measure_in_lockstep(job, CPU, job.batch_size))


def measurements(measured):
    """Those of all blocks."""
    for _, of_block in measured:
        yield from of_block


ABOUT = {"model": "model", "tokens": 0}  # what its manifest needs


def whole(job: Job):
    return measurements(measure_whole(job, CPU, job.batch_size))


def job_for(folder: Path, samples: list[str], batch_size: int = 4, max_tokens: int = 65536) -> Job:
    config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text, truncation=True) for text in samples]
    counted = draw_positions([len(row["input_ids"]) for row in rows], max_tokens, seed=0)
    encoded = [Encoded(f"row {i}", dict(row), places) for i, (row, places) in enumerate(zip(rows, counted))]
    return Job("model", str(folder), config, describe(config, str(folder), False), encoded, batch_size, ABOUT)


def texts(count: int = 11) -> list[str]:
    return [row["text"] for row in make_rows("sum add count equal number seven nine twelve", count, seed=5)]


def by_layer(measured) -> dict[str, torch.Tensor]:
    return {layer: covariance.matrix() for members, covariance in measured for layer in members}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys() and one
    for layer, matrix in one.items():
        assert (matrix - other[layer]).norm() <= tolerance * matrix.norm(), layer


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_block_by_block_is_the_same_as_whole(families, kind):
    job = job_for(families[kind].tuned[0], texts())
    assert_same(by_layer(in_lockstep(job)), by_layer(whole(job)), 1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_padding_and_batch_size_change_nothing_but_rounding(families, kind):
    alone = by_layer(in_lockstep(job_for(families[kind].tuned[0], texts(), batch_size=1)))
    for size in (3, 64):
        assert_same(alone, by_layer(in_lockstep(job_for(families[kind].tuned[0], texts(), batch_size=size))), 1e-5)


def test_one_block_at_a_time_is_loaded(llama):
    job = job_for(llama.tuned[0], texts())
    streamed = StreamedModel(job.architecture.cls, job.config, Checkpoint(job.folder), torch.float32, "cpu")
    layers = streamed.model.model.layers
    most = []

    def loaded() -> list[int]:
        return [i for i, layer in enumerate(layers) if not any(p.is_meta for p in layer.parameters())]

    for layer in layers:
        layer.register_forward_hook(lambda *_: most.append(loaded()))
    batches = make_batches(job.encoded, 4)
    assert len(batches) > 1
    with torch.no_grad():
        stops = list(lockstep.run_in_lockstep(streamed, batches, runner(streamed.model, unpadded=False)))
    assert [stop.path for stop in stops] == [None, "model.layers.0", "model.layers.1", "model.layers.2"]
    assert most == [[i] for i in range(3) for _ in batches]
    assert all(p.is_meta for p in streamed.model.parameters())


def test_a_weight_that_another_module_uses_is_never_missed(llama, monkeypatch):
    """PyTorch multiplies with a matrix that is not there, and gives what happens to lie in memory."""
    cls = transformers.LlamaModel
    forward = cls.forward

    @functools.wraps(forward)
    def crossed(self, input_ids, **more):
        embedded = self.embed_tokens(input_ids)
        query = self.layers[1].self_attn.q_proj.weight
        assert query.device == embedded.device and query.shape == (48, 48)  # to ask costs nothing
        return forward(self, inputs_embeds=embedded + torch.nn.functional.linear(embedded, query), **more)

    monkeypatch.setattr(cls, "forward", crossed)
    job = job_for(llama.tuned[0], texts())
    with pytest.raises(UnknownWeightError, match=r"layers\.1\.self_attn\.q_proj\.weight is used by another module"):
        list(in_lockstep(job))
    assert_same(by_layer(measurements(run._measure(job, CPU, None, NoUse()))), by_layer(whole(job)), 1e-12)


def test_a_weight_that_a_module_keeps_elsewhere_is_never_missed(llama, monkeypatch):
    """As recurrent layers of PyTorch keep a list of all of their weights."""
    init = transformers.LlamaModel.__init__

    @functools.wraps(init)
    def keeping(self, config):
        init(self, config)
        self.kept = [{"weight": self.norm.weight}]

    monkeypatch.setattr(transformers.LlamaModel, "__init__", keeping)
    job = job_for(llama.tuned[0], texts())
    with pytest.raises(UnknownWeightError, match="LlamaModel keeps weights, or values made of them, in a place of its own"):
        list(in_lockstep(job))
    assert_same(by_layer(measurements(run._measure(job, CPU, None, NoUse()))), by_layer(whole(job)), 1e-12)


def test_a_weight_without_values_gives_none(llama):
    job = job_for(llama.tuned[0], texts())
    streamed = StreamedModel(transformers.LlamaForCausalLM, job.config, Checkpoint(job.folder), torch.float32, "cpu")
    weight, x = streamed.model.lm_head.weight, torch.ones(48)
    for use in (lambda: x @ weight.T, lambda: weight[0], lambda: weight.data, lambda: x.copy_(weight[0]), lambda: +weight):
        with pytest.raises(UnknownWeightError, match="lm_head"):
            use()
    with pytest.raises(UnknownWeightError, match="lm_head"):
        torch.zeros_like(weight, device="cpu")[:] = weight
    assert (weight.dim(), weight.dtype, weight.device.type, weight.is_meta) == (2, torch.float32, "cpu", True)


@pytest.mark.parametrize(
    "own, device, runs_in",
    [
        ("float16", "cuda", torch.bfloat16),
        ("float16", "mps", torch.bfloat16),
        ("bfloat16", "cuda:1", torch.bfloat16),
        ("float32", "cuda", torch.float32),
        (None, "cuda", torch.float32),
        ("float16", "cpu", torch.float32),
        ("bfloat16", "cpu", torch.float32),
    ],
)
def test_the_precision_that_a_model_runs_in(own, device, runs_in):
    assert inference_dtype(transformers.LlamaConfig(dtype=own), device) == runs_in


def test_layers_with_one_input_are_measured_once(llama):
    groups = [members for members, _ in in_lockstep(job_for(llama.tuned[0], texts()))]
    layer = "model.layers.1"
    assert [f"{layer}.self_attn.{name}_proj" for name in "qkv"] in groups
    assert [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"] in groups
    assert len(groups) == 4 * 3


def test_a_block_that_is_called_again_and_again(tmp_path, families):
    """ALBERT has one block, called for every layer: its moments are sums over all calls."""
    config = transformers.AlbertConfig(
        vocab_size=320, embedding_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(families["bert"].base)
    folder = save(transformers.AlbertForSequenceClassification(config), tokenizer, tmp_path / "albert")
    job = job_for(folder, texts())
    calibrate(job, Artefact(tmp_path / "cache"), CPU)
    expected = by_layer(whole(job))
    tokens = sum(sample.length for sample in job.encoded)
    for layer, matrix in expected.items():
        covariance = StoredCovariances(Artefact(tmp_path / "cache")).load([layer])
        assert (covariance.matrix() - matrix).norm() <= 1e-6 * matrix.norm()
        if "attention" in layer:
            assert covariance.tokens == 3 * tokens
    manifest = Artefact(tmp_path / "cache").manifest()
    assert {path.name for path in (tmp_path / "cache").glob("*.safetensors")} == manifest["files"].keys()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_model_that_pads_its_inputs_itself_is_refused(tmp_path, families, batch_size):
    """Longformer, to whole windows: nobody could tell that padding from tokens."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LongformerConfig(vocab_size=320, attention_window=32, max_position_embeddings=130, **shape)
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(families["bert"].base)
    folder = save(transformers.LongformerForSequenceClassification(config), tokenizer, tmp_path / "longformer")
    with pytest.raises(PaveError, match=r"LongformerForSequenceClassification pads its inputs by itself.*purify: false"):
        calibrate(job_for(folder, texts(), batch_size), Artefact(tmp_path / "cache"), CPU)


def test_a_model_is_run_on_a_few_samples_where_few_tokens_count():
    lengths = [100] * 200
    run = to_run(lengths, budget=60, seed=1)
    assert sum(run) == 64 and run != [True] * 64 + [False] * 136  # at random
    assert run == to_run(lengths, 60, seed=1) != to_run(lengths, 60, seed=2)
    assert sum(to_run(lengths, 2000, seed=1)) == 80  # with four times as many tokens as count
    assert all(to_run(lengths, 5000, seed=1)) and all(to_run([3, 2], 60, seed=1))


def test_what_is_not_run_is_counted_all_the_same(llama, monkeypatch):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.tuned[0])
    samples = load_samples([Data(path=str(llama.data[0]))], DEFAULT_CALIBRATION, "data")
    settings = DEFAULT_CALIBRATION.model_copy(update={"max_tokens": 20})
    monkeypatch.setattr(drawing, "_SPREAD", 2)
    encoded = encode(samples, tokenizer, settings, None, "data")
    ran = [sample for sample in encoded if sample.tokens]
    assert 0 < len(ran) < len(encoded) == len(samples)
    assert sum(sample.tokens for sample in encoded) == 20 and sum(sample.length for sample in ran) >= 80
    counts = count_tokens(encoded, tokenizer).of_use["input_ids"]
    assert counts.sum() == sum(sample.length for sample in encoded)
    job = dataclasses.replace(job_for(llama.tuned[0], texts()), encoded=encoded)
    assert job.run == ran and {covariance.tokens for _, covariance in in_lockstep(job)} == {20}


def test_wide_layers_and_many_experts_get_more_tokens(llama):
    def tokens_of(config):
        return default_tokens(describe(config, "", False))

    config = transformers.AutoConfig.from_pretrained(llama.base)
    assert tokens_of(config) == 2048
    config.intermediate_size = 8 * 3000
    assert tokens_of(config) == 3000
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_local_experts": 64, "num_experts_per_tok": 4, "architectures": ["MixtralForCausalLM"]}
    assert tokens_of(transformers.MixtralConfig(vocab_size=320, num_key_value_heads=2, **shape, **experts)) == 256 * 16


def test_token_budget_is_drawn_evenly():
    drawn = draw_positions([3, 50, 1000], 60, seed=1)
    assert [len(places) for places in drawn] == [3, 29, 28]
    assert drawn[0] == [0, 1, 2]
    for places, length in zip(drawn, (3, 50, 1000)):
        assert places == sorted(set(places)) and places[-1] < length
    assert drawn == draw_positions([3, 50, 1000], 60, seed=1) != draw_positions([3, 50, 1000], 60, seed=2)


def test_only_drawn_tokens_enter(llama):
    job = job_for(llama.tuned[0], texts(), max_tokens=20)
    for _, covariance in in_lockstep(job):
        assert covariance.tokens == 20


def test_shares_never_exceed_sizes_or_budget():
    rng = random.Random(0)
    for _ in range(200):
        sizes = [rng.randint(0, 30) for _ in range(rng.randint(1, 6))]
        budget = rng.randint(0, 100)
        shares = share_evenly(sizes, budget)
        assert sum(shares) == min(budget, sum(sizes)) and all(a <= b for a, b in zip(shares, sizes))
        full = [share for share, size in zip(shares, sizes) if share < size]
        assert not full or max(full) - min(full) <= 1


def encode_rows(llama, tmp_path: Path, rows: list[dict], **data) -> list[Encoded]:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    samples = load_samples([Data(path=str(path), **data)], DEFAULT_CALIBRATION, "data")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.tuned[0])
    return encode(samples, tokenizer, DEFAULT_CALIBRATION, None, "data")


def test_rows_that_cannot_be_used_are_skipped_and_counted(llama, tmp_path, caplog):
    rows = [{"text": text} for text in ("seven", "", None, "nine", "   ", "twelve", "eleven")]
    with caplog.at_level("WARNING", logger="mergekit_pave"):
        encoded = encode_rows(llama, tmp_path, rows)
    assert [sample.origin.split()[1] for sample in encoded] == ["0", "3", "5", "6"]
    assert "skipped 3 of 7 rows: 3 empty" in caplog.text


def test_too_many_bad_rows_are_an_error(llama, tmp_path):
    rows = [{"text": ["a", "list"]}] * 4 + [{"text": ["one"]}]
    with pytest.raises(PaveError, match=r"5 of 5 rows cannot be used: 5 \(column 'text' holds no text but a list\)"):
        encode_rows(llama, tmp_path, rows)


def test_long_rows_are_cut(llama, tmp_path):
    (sample,) = encode_rows(llama, tmp_path, [{"text": "seven " * 5000}])
    assert sample.length == 64  # what the tokenizer allows


def test_chats_with_system_turns_and_tools(llama, tmp_path):
    template = (
        "{% if tools %}[{{ tools | length }} tools]{% endif %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.tool_calls is defined %}!{% endif %};{% endfor %}"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama.tuned[0])
    tokenizer.chat_template = template
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    rows = [{"chat": turns, "tools": json.dumps([{"name": "f"}])}, {"chat": [*turns, call], "tools": ""}]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    samples = load_samples([Data(path=str(path), messages="chat")], DEFAULT_CALIBRATION, "data")
    decoded = [
        tokenizer.decode(sample.inputs["input_ids"]) for sample in encode(samples, tokenizer, DEFAULT_CALIBRATION, None, "data")
    ]
    # A table gives every turn the key tool_calls; only the turn that has one may show it.
    assert decoded == ["[1 tools]system:be brief;user:hi;", "system:be brief;user:hi;assistant:!;"]


def test_several_data_sets_are_sampled_evenly(tmp_path):
    few = write_rows(tmp_path / "few.jsonl", [{"text": f"few {i}"} for i in range(3)])
    many = write_rows(tmp_path / "many.jsonl", [{"question": f"many {i}"} for i in range(100)])
    sources = [Data(path=str(few)), Data(path=str(many), text="Q: {question}")]
    settings = DEFAULT_CALIBRATION.model_copy(update={"samples": 20})
    samples = [sample.text for sample in load_samples(sources, settings, "data")]
    assert sum(text.startswith("few") for text in samples) == 3
    assert sum(text.startswith("Q: many") for text in samples) == 17 == len(set(samples)) - 3
    assert samples == [sample.text for sample in load_samples(sources, settings, "data")]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "txt", "json"])
def test_file_formats(tmp_path, suffix):
    import pandas

    path = tmp_path / f"rows.{suffix}"
    frame = pandas.DataFrame({"text": ["seven", "nine"]})
    if suffix == "csv":
        frame.to_csv(path, index=False)
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        path.write_text("seven\nnine\n" if suffix == "txt" else json.dumps(frame.to_dict("records")))
    assert [sample.text for sample in load_samples([Data(path=str(path))], DEFAULT_CALIBRATION, "data")] == ["seven", "nine"]


def test_streaming_and_folders(tmp_path):
    write_rows(tmp_path / "set" / "train.jsonl", [{"text": f"row {i}"} for i in range(50)])
    settings = DEFAULT_CALIBRATION.model_copy(update={"samples": 5})
    for streaming in (False, True):
        data = Data(path=str(tmp_path / "set"), data_files="*.jsonl", streaming=streaming)
        samples = load_samples([data], settings, "data")
        assert len({sample.text for sample in samples}) == 5


def test_another_encoding_is_told(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("für alle Fälle\n".encode("latin-1") * 3)
    with pytest.raises(PaveError, match=r"latin\.txt.*UTF-8"):
        load_samples([Data(path=str(path))], DEFAULT_CALIBRATION, "data")


def test_out_of_memory_is_answered_with_settings(llama, tmp_path, monkeypatch):
    def greedy(streamed, batches, run, begin):
        yield torch.empty(1 << 60)  # the allocator's own refusal

    monkeypatch.setattr(run, "run_in_lockstep", greedy)
    with pytest.raises(PaveError, match=r"ran out of memory on cpu.*batch_size: 2 would save about .*max_tokens"):
        calibrate(job_for(llama.tuned[0], texts()), Artefact(tmp_path / "cache" / "key"), CPU)
    assert not (tmp_path / "cache" / "key").exists()


def test_an_interrupt_leaves_nothing(llama, tmp_path, monkeypatch):
    original, seen = run.distributed.add_up, itertools.count()

    def interrupted(measured):
        if next(seen) == 2:
            raise KeyboardInterrupt
        return original(measured)

    monkeypatch.setattr(run.distributed, "add_up", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(job_for(llama.tuned[0], texts()), Artefact(tmp_path / "cache" / "key"), CPU)
    assert [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")] == []


_LIMITED = """
import resource, sys, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
runpy.run_module("mergekit_pave", run_name="__main__")
"""


def test_a_full_disk_is_told_and_leaves_nothing_half_written(llama, tmp_path, cache):
    """A limit on file size stands for the full disk: a write fails midway."""
    path = merging.write_config(merging.config_for(llama, {"keep_covariances": True}), tmp_path / "config.yml")
    for data in llama.data[:2]:  # so that the library's own cache of them is written already
        load_samples([Data(path=str(data))], DEFAULT_CALIBRATION, "data")
    result = command("python", "-c", _LIMITED, "9000", "calibrate", path)
    assert result.returncode == 1 and "cannot be written" in result.stderr and "cache_dir" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(cache.rglob("*.safetensors")) and not list(cache.rglob("manifest.json"))


def test_an_empty_file_is_told(tmp_path):
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(PaveError, match=r"data\.path: .*none\.jsonl is empty"):
        load_samples([Data(path=str(tmp_path / "none.jsonl"))], DEFAULT_CALIBRATION, "data")


def test_too_little_space_is_told_before_anything_runs(tmp_path):
    with pytest.raises(PaveError, match=r"may need 70 TB.*cache_dir"):
        require_space(tmp_path / "a" / "b", 70 * 10**12)


_TOGETHER = """
import sys
from pathlib import Path
from mergekit_pave.calibration import distributed
distributed.start()
rank = distributed.rank()
assert distributed.lowest(5 - rank) == 4
assert distributed.together(lambda: rank) == rank
def work():
    if rank == 1:
        raise ValueError("only here")
try:
    distributed.together(work)
except ValueError as error:
    Path(sys.argv[1], f"{rank}.txt").write_text(f"failed: {error}")
distributed.stop()
"""


def test_what_fails_in_one_process_fails_in_all(tmp_path):
    """Or the others would wait for it, or add up sums of different layers."""
    script = tmp_path / "together.py"
    script.write_text(_TOGETHER)
    results = in_two("python", script, tmp_path)
    assert [result.returncode for result in results] == [0, 0], results
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["failed: only here"] * 2


def test_two_processes_give_the_numbers_of_one(llama, tmp_path, cache):
    kept = {"cache_dir": str(tmp_path / "one"), "keep_covariances": True}  # as several processes always do
    path = merging.write_config(merging.config_for(llama, kept), tmp_path / "one.yml")
    assert command("mergekit-pave", "calibrate", path).returncode == 0
    path = merging.write_config(merging.config_for(llama, {"cache_dir": str(tmp_path / "two")}), tmp_path / "two.yml")
    result = finish(fresh("torchrun", "--nproc_per_node", "2", "-m", "mergekit_pave", "calibrate", path))
    assert result.returncode == 0, result.stderr
    folders = sorted((tmp_path / "one" / "covariance").glob("[!.]*"))
    assert len(folders) == 2
    for folder in folders:
        one, two = Artefact(folder), Artefact(tmp_path / "two" / "covariance" / folder.name)
        assert two.is_intact()
        for layer, entry in one.manifest()["layers"].items():
            assert two.manifest()["layers"][layer]["tokens"] == entry["tokens"]
            expected, found = StoredCovariances(one).load([layer]).matrix(), StoredCovariances(two).load([layer]).matrix()
            assert (expected - found).norm() <= 1e-5 * expected.norm(), layer
        predicted = [StoredCovariances(artefact).predicted() for artefact in (one, two)]
        assert (predicted[0] - predicted[1]).norm() <= 1e-5 * predicted[0].norm()
    tails = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("tail-*.safetensors")}
    assert tails == {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("tail-*.safetensors")} != set()


@pytest.mark.slow
def test_twenty_kills_end_in_the_undisturbed_result(llama, tmp_path, cache):
    rows = [row for path in llama.data for row in read_rows(path)] * 40
    data = str(write_rows(tmp_path / "many.jsonl", rows))
    entries = [{"model": str(model), "data": {"path": data}} for model in llama.tuned[:2]]
    settings = {"models": entries, "calibration": {"samples": 2000, "batch_size": 1}}

    def config(name: str) -> Path:
        pave = settings | {"cache_dir": str(tmp_path / name)}
        return merging.write_config(merging.config_for(llama, pave), tmp_path / f"{name}.yml")

    began = time.monotonic()
    undisturbed = command("mergekit-yaml", config("undisturbed"), tmp_path / "undisturbed-out")
    assert undisturbed.returncode == 0, undisturbed.stderr
    duration = time.monotonic() - began
    expected = merging.weights(tmp_path / "undisturbed-out")
    rng = random.Random(0)
    killed = 0
    while killed < 20:
        process = start("mergekit-yaml", config("killed"), tmp_path / "killed-out")
        try:
            process.wait(timeout=rng.uniform(0.3, 1) * duration)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.communicate()
        if process.returncode == 0:  # start over, so that later kills find work, too
            shutil.rmtree(tmp_path / "killed")
    result = command("mergekit-yaml", config("killed"), tmp_path / "killed-out")
    assert result.returncode == 0, result.stderr
    found = merging.weights(tmp_path / "killed-out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_images_go_through_the_image_processor(tmp_path):
    """Also for a model whose checkpoint has other names than its modules, which only transformers' own loader knows."""
    image = pytest.importorskip("PIL.Image")
    import numpy as np

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    folder = save(transformers.ViTForImageClassification(config), processor, tmp_path / "vit")
    rng = np.random.default_rng(0)
    for i in range(7):
        path = tmp_path / "pictures" / "train" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    samples = load_samples([Data(path=str(tmp_path / "pictures"), image="image")], DEFAULT_CALIBRATION, "data")
    architecture = describe(config, str(folder), False)
    encoded = encode(samples, processor, DEFAULT_CALIBRATION, architecture.positions, "data")
    job = Job("vit", str(folder), transformers.AutoConfig.from_pretrained(folder), architecture, encoded, 3, ABOUT)
    calibrate(job, Artefact(tmp_path / "cache"), CPU)
    expected = by_layer(whole(job))
    assert len(expected) == 12  # six layers in each of two blocks
    for layer, matrix in expected.items():
        covariance = StoredCovariances(Artefact(tmp_path / "cache")).load([layer])
        assert (covariance.matrix() - matrix).norm() <= 1e-6 * matrix.norm()
        assert covariance.tokens == 7 * 17  # sixteen patches and the class token


class _Pair(torch.nn.Module):
    """Two layers, called with the inputs that `calls` names for each batch."""

    def __init__(self, calls):
        super().__init__()
        self.q, self.k = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        self.calls = iter(calls)

    def get_input_embeddings(self):
        return None

    def forward(self, x):
        inputs = {"x": x, "y": x.flip(0) + 1}
        for call in next(self.calls):
            getattr(self, call[0])(inputs[call[1]])


@pytest.mark.parametrize(
    "calls",
    [
        [["qx", "kx", "qy"]],
        [["qx", "kx", "ky"]],
        [["qx", "kx"], ["qx", "kx", "qy", "ky", "qy"]],
        [["qx", "kx"], ["qx"]],
        [["qx", "kx"], ["kx"], ["qx", "kx"]],
        [["qx", "kx"], ["qx", "ky"]],
    ],
)
def test_layers_that_share_only_some_inputs_are_measured_apart(calls):
    """First it is noticed, whenever that is; then each layer has what it alone has seen."""
    batches = [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(len(calls))]

    def observe(apart):
        model = _Pair(calls)
        observer = Observer(model, ["q", "k"], "pair", apart, unpadded=True)
        with observer.watching() as begin:
            for x in batches:
                begin(Batch({}, (), ["row"]))
                model(x)
        return {layer: covariance for layers, covariance in observer.take() for layer in layers}

    with pytest.raises(DivergedError) as raised:
        observe(frozenset())
    found = observe(frozenset({raised.value.role}))
    for layer, covariance in found.items():
        seen = [x if call[1] == "x" else x.flip(0) + 1 for x, of in zip(batches, calls) for call in of if call[0] == layer]
        rows = torch.cat(seen).double()
        assert covariance.tokens == len(rows)
        assert torch.allclose(covariance.matrix().double(), rows.T @ rows / len(rows), atol=1e-5)
    assert found.keys() == {"q", "k"}


def test_more_tokens_count_where_they_are_not_stored(llama):
    job = job_for(llama.tuned[0], texts(40), max_tokens=60)
    more = job.with_more_counted(seed=1)
    assert [sample.origin for sample in more.encoded] == [sample.origin for sample in job.run]
    assert more.about["tokens"] == sum(sample.tokens for sample in more.encoded) == 4 * 60
    whole = job_for(llama.tuned[0], texts(4), max_tokens=60).with_more_counted(seed=1)
    assert all(sample.tokens == sample.length for sample in whole.encoded)
