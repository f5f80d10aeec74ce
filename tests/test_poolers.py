"""Embedding models are often stored without the pooler that their class has: their vectors are means of hidden states."""

from pathlib import Path

from architectures import make_architecture
from safetensors.torch import load_file, save_file
from test_score import averaged, score, scored_config, with_more_rows


def without_pooler(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("pooler.")}
    save_file(tensors, path, {"format": "pt"})


def test_an_encoder_without_a_pooler_is_scored_like_one_with_it(tmp_path):
    family = with_more_rows(make_architecture("bert-Model", tmp_path))
    merged = averaged(family, tmp_path / "merged")
    (whole,) = score(scored_config(family, tmp_path / "whole"), merged)
    for folder in (family.base, *family.tuned, merged):
        without_pooler(folder)
    (bare,) = score(scored_config(family, tmp_path / "bare"), merged)
    assert bare["models"] == whole["models"]
