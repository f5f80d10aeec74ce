"""The architectures that are tested: for each a tiny configuration, its head, and its linear layers told by name.

Run as a program it writes them into architectures.md.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import transformers
from models import KINDS, Family, Kind, make_model, make_tokenizer, save_family, write_texts
from PIL import Image


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: as transformers calls it, `model_type`.
        head: the class is called `<prefix><head>`.
        prefix: see `head`.
        settings: what its configuration needs besides the common sizes.
        linears: the last parts of the names of its backbone's linear layers, as they are stored.
        within: what the names of all tensors in the backbone start with.
        tokenizer: whose tokenizer it gets, or "image" for an image model.
        transposed: as in `Kind`.
        converted: mergekit, with and without a block, writes it under the names of its modules.
        refused: mergekit alone fails on it.
    """

    name: str
    head: str
    prefix: str
    linears: str
    settings: dict = field(default_factory=dict)
    within: str = ""
    tokenizer: str = "llama"
    transposed: bool = False
    converted: bool = False
    refused: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}-{self.head}"

    @property
    def kind(self) -> Kind:
        names = "|".join(map(re.escape, self.linears.split()))
        return Kind(self.prefix + self.head, rf"^{re.escape(self.within)}(|.*\.)({names})\.weight$", self.transposed)


_LLAMA = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
_FC = "q_proj k_proj v_proj out_proj fc1 fc2"
_BERT = "query key value dense"


def _language_models() -> list[Architecture]:
    def entry(name: str, prefix: str, linears: str = _LLAMA, head: str = "ForCausalLM", **settings) -> Architecture:
        return Architecture(name, head, prefix, linears, settings)

    return [
        entry("llama", "Llama"),
        entry("mistral", "Mistral"),
        entry("qwen2", "Qwen2"),
        entry("qwen3", "Qwen3", head_dim=8),
        entry("gemma2", "Gemma2", head_dim=8),
        entry("gemma3_text", "Gemma3", head_dim=8),
        entry("phi", "Phi", "q_proj k_proj v_proj self_attn.dense fc1 fc2"),
        entry("phi3", "Phi3", "qkv_proj o_proj gate_up_proj down_proj"),
        Architecture("gpt2", "LMHeadModel", "GPT2", "c_attn c_proj c_fc", tokenizer="gpt2", transposed=True),
        Architecture("gptj", "ForCausalLM", "GPTJ", "q_proj k_proj v_proj out_proj fc_in fc_out", {"rotary_dim": 4}),
        entry("opt", "OPT", _FC, ffn_dim=64, word_embed_proj_dim=32),
        entry("olmo2", "Olmo2"),
        entry("granite", "Granite"),
        entry("stablelm", "StableLm"),
        entry("smollm3", "SmolLM3"),
        entry("glm4", "Glm4", "q_proj k_proj v_proj o_proj gate_up_proj down_proj", head_dim=8),
        entry("starcoder2", "Starcoder2", "q_proj k_proj v_proj o_proj c_fc c_proj"),
        entry("exaone4", "Exaone4", sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
        # dt_proj is not called as a layer, for the scan reads its weight; so it stays as it is.
        entry("mamba", "Mamba", "in_proj x_proj out_proj"),
        # Its attention blocks share one set of weights, beside small adapters of their own.
        entry(
            "zamba2",
            "Zamba2",
            "in_proj out_proj linear q_proj k_proj v_proj o_proj gate_up_proj down_proj 0.0 0.1 1.0 1.1",
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            hybrid_layer_ids=[1, 3],
            num_mem_blocks=1,
            num_key_value_heads=4,
            adapter_rank=16,
            n_mamba_heads=4,
            mamba_d_state=8,
            mamba_ngroups=1,
        ),
        entry(
            "lfm2",
            "Lfm2",
            "q_proj k_proj v_proj out_proj in_proj w1 w2 w3",
            layer_types=["conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
        ),
        entry(
            "qwen3_next",
            "Qwen3Next",
            f"{_LLAMA} in_proj_qkvz in_proj_ba linear_attn.out_proj",
            layer_types=["linear_attention", "full_attention"],
            mlp_only_layers=[0, 1],
            head_dim=8,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        ),
    ]


def _encoders() -> list[Architecture]:
    backbones = [
        ("bert", "Bert", _BERT, "bert.", {}),
        ("roberta", "Roberta", _BERT, "roberta.", {"max_position_embeddings": 66}),
        ("distilbert", "DistilBert", "q_lin k_lin v_lin out_lin lin1 lin2", "distilbert.", {"hidden_dim": 64}),
        (
            "deberta-v2",
            "DebertaV2",
            "query_proj key_proj value_proj dense",
            "deberta.",
            {
                "relative_attention": True,
                "pos_att_type": ["c2p", "p2c"],
                "position_buckets": 16,
                "max_relative_positions": 64,
                "share_att_key": True,
                "norm_rel_ebd": "layer_norm",
            },
        ),
        ("electra", "Electra", f"{_BERT} embeddings_project", "electra.", {"embedding_size": 16}),
        ("modernbert", "ModernBert", "Wqkv Wo Wi", "model.", {}),
    ]
    headed = [
        Architecture(name, head, prefix, linears, settings, within, tokenizer="bert")
        for name, prefix, linears, within, settings in backbones
        for head in ("ForSequenceClassification", "ForTokenClassification")
    ]
    # Backbones alone, as models for embeddings are: nothing goes before the names of their tensors.
    bare = [
        Architecture(
            name, "Model", prefix, linears, settings, tokenizer="bert", refused=name in ("bert", "roberta", "distilbert")
        )
        for name, prefix, linears, _, settings in [
            *backbones,
            ("xlm-roberta", "XLMRoberta", _BERT, "", {"max_position_embeddings": 66}),
            ("mpnet", "MPNet", "q k v o dense", "", {"max_position_embeddings": 66}),
        ]
    ]
    return headed + bare


def _image_models() -> list[Architecture]:
    dinov2, dinov3 = f"{_BERT} fc1 fc2", "q_proj k_proj v_proj o_proj up_proj down_proj"
    return [
        Architecture("vit", "ForImageClassification", "ViT", _BERT, within="vit.", tokenizer="image"),
        Architecture("dinov2", "ForImageClassification", "Dinov2", dinov2, {"mlp_ratio": 2}, "dinov2.", tokenizer="image"),
        Architecture("dinov3_vit", "Model", "DINOv3ViT", dinov3, tokenizer="image", converted=True),
        Architecture("clip_vision_model", "Model", "CLIPVision", _FC, tokenizer="image"),
        # The attention of the pooling head reads the weight of its layer out_proj, which stays as it is, too.
        Architecture(
            "siglip_vision_model",
            "Model",
            "SiglipVision",
            _FC.replace("out_proj", "self_attn.out_proj"),
            tokenizer="image",
        ),
    ]


ARCHITECTURES = {architecture.id: architecture for architecture in (*_language_models(), *_encoders(), *_image_models())}
KINDS |= {id: architecture.kind for id, architecture in ARCHITECTURES.items()}


def make_architecture(id: str, folder: Path) -> Family:
    """A base model and two fine-tunes, like `make_family`."""
    architecture = ARCHITECTURES[id]
    if architecture.tokenizer == "image":
        processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
        data = tuple(_write_images(folder / f"images{i}", seed=i) for i in range(2))
    else:
        processor = make_tokenizer(architecture.tokenizer)
        data = write_texts(folder)[:2]
    base = make_model(architecture.kind.model, _config(architecture, processor))
    return save_family(id, base, processor, data, folder)


def _config(architecture: Architecture, processor) -> transformers.PretrainedConfig:
    cls = getattr(transformers, architecture.kind.model).config_class
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.15}
    if architecture.tokenizer == "image":
        sizes |= {"image_size": 16, "patch_size": 4}
    else:
        sizes |= {"vocab_size": len(processor), "max_position_embeddings": 64}
        special = {f"{name}_token_id": min(i, 2) for i, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
        sizes |= {"num_key_value_heads": 2} | special
    if "mlp_ratio" not in architecture.settings:
        sizes["intermediate_size"] = 64
    return cls(**sizes | architecture.settings)


def _write_images(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for i in range(12):
        path = folder / "train" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Smooth, as pictures are: large patches of colour, and a little noise.
        coarse = rng.integers(0, 255, (5, 6, 3)).repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray((0.8 * coarse + 0.2 * rng.integers(0, 255, coarse.shape)).astype(np.uint8)).save(path)
    return folder


TABLE = Path(__file__).parent / "architectures.md"
_START, _END = "<!-- tested: written by tests/architectures.py -->\n", "<!-- end of tested -->\n"


def with_table(text: str) -> str:
    """The text of architectures.md with the table as it should be; architectures that differ in nothing else share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    heads: dict[tuple[str, str], list[str]] = {}
    for architecture in ARCHITECTURES.values():
        heads.setdefault((architecture.name, architecture.linears), []).append(f"`{architecture.head}`")
    for (name, linears), names in heads.items():
        rows.setdefault((", ".join(names), linears), []).append(f"`{name}`")
    lines = ["| architecture | head | linear layers purified |", "|---|---|---|"]
    for (head, linears), names in rows.items():
        lines.append(f"| {', '.join(names)} | {head} | {' '.join(f'`{linear}`' for linear in linears.split())} |")
    # Here, for only the table needs them.
    from test_encoder_decoder import LINEARS
    from test_experts import KINDS
    from test_vision_language import STORED

    others = {"Mixtures of experts": KINDS, "Encoder-decoder models": {kind.split("-")[0] for kind in LINEARS}}
    for label, kinds in (others | {"Vision-language models": STORED}).items():
        lines += ["", f"{label}: {', '.join(f'`{kind}`' for kind in sorted(kinds))}."]
    before, rest = text.split(_START)
    return before + _START + "\n".join(lines) + "\n" + _END + rest.split(_END)[1]


if __name__ == "__main__":
    TABLE.write_text(with_table(TABLE.read_text()))
