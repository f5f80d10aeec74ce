"""Configs for the tiny models, and the ways to run them in process; see `commands` for real commands."""

from pathlib import Path

import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts import multimerge, run_yaml
from models import Family
from reference import Purified, weights

TOLERANCE = 1e-4  # of ||W' - W||, as promised


def config_for(family: Family, pave: dict | None = None, *, models: int = 2, weight: tuple = (), **more) -> dict:
    """A task_arithmetic config over a family's first models. `pave` gets an entry for each model that it lists none of."""
    weight = weight or (0.5,) * models
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(family.base),
        "models": [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(family.tuned[:models], weight)],
        "dtype": "float32",
    } | more
    if pave is not None:
        config["pave"] = {"rank_ratio": 0.875, "models": entries(family, models)} | pave
    return config


def entries(family: Family, models: int = 2, **more) -> list[dict]:
    """`pave.models`, with each model's own text column; `more` goes into every `data`."""
    pairs = zip(family.tuned[:models], family.data)
    return [{"model": str(model), "data": {"path": str(path), "text": "text"} | more} for model, path in pairs]


def merge(config: dict, out: Path, **options) -> dict[str, torch.Tensor]:
    """Run a merge in process and return what it wrote."""
    forget_checkpoints()
    options = MergeOptions(**{"quiet": True} | options)
    run_merge(MergeConfiguration.model_validate(config), str(out), options, config_source=yaml.safe_dump(config))
    return weights(out)


def forget_checkpoints() -> None:
    """mergekit keeps opened checkpoints for the life of the process; a test may rewrite one."""
    LoaderCache().loaders.clear()


def invoke(config: dict, out: Path, *options: str) -> Result:
    """`mergekit-yaml` in process."""
    forget_checkpoints()
    path = write_config(config, Path(out).parent / f"{Path(out).name}.yml")
    return CliRunner().invoke(run_yaml.main, [str(path), str(out), *options])


def invoke_multi(configs: list[dict], folder: Path, *options: str) -> Result:
    """`mergekit-multi` in process, with the steps' outputs in `folder` and the final one in `folder/final`."""
    forget_checkpoints()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "steps.yml"
    path.write_text(yaml.safe_dump_all(configs))
    arguments = [str(path), "-I", str(folder), "--out-path", str(folder / "final"), "--quiet", *options]
    return CliRunner().invoke(multimerge.main, arguments)


def write_config(config: dict, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def assert_exact(written: dict[str, torch.Tensor], expected: dict[str, Purified], plain: dict[str, torch.Tensor]) -> None:
    """Purified tensors agree with the reference; every other one is, bit for bit, what mergekit alone writes."""
    assert expected, "a check of nothing"
    assert written.keys() == plain.keys()
    errors = {}
    for name, tensor in written.items():
        if name not in expected:
            assert torch.equal(tensor, plain[name]), f"{name} is not to be purified, yet it differs from the plain merge"
            continue
        wanted = expected[name]
        if wanted.kept == wanted.components:  # allocation took nothing from this one
            assert torch.equal(tensor, plain[name]), name
            errors[name] = 0.0
            continue
        errors[name] = (tensor.double() - wanted.weight).norm().item() / wanted.removed_norm
    assert errors.keys() == expected.keys()
    worst = max(errors, key=errors.get)
    assert errors[worst] <= TOLERANCE, f"{worst} is {errors[worst]:.2e} of ||W'-W|| away from the reference"
