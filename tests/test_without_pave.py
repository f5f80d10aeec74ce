"""The plugin where it has nothing to do, and where something around it is broken."""

import pytest
from merging import command, config_for, python, start, write_config

# Put before code: a module of this name cannot be imported, as if it were missing or broken.
BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names!r}:
            raise {error}
sys.meta_path.insert(0, Blocker())
"""


def test_output_is_identical_to_the_last_byte(llama, tmp_path):
    """Every file, with the plugin live and with PyTorch told not to load it."""
    config = write_config(config_for(llama, merge_method="ties", tokenizer={"source": "base"}), tmp_path / "config.yml")
    # mergekit lists models in the order of a set, which is another in every process unless hashes are fixed.
    fixed = {"PYTHONHASHSEED": "0"}
    live = start("mergekit-yaml", config, tmp_path / "live" / "out", **fixed)
    off = start("mergekit-yaml", config, tmp_path / "off" / "out", TORCH_DEVICE_BACKEND_AUTOLOAD="0", **fixed)
    told = live.communicate(timeout=300)[1] + off.communicate(timeout=300)[1]
    assert live.returncode == off.returncode == 0, told
    files = [
        {str(p.relative_to(tmp_path / side)): p.read_bytes() for p in (tmp_path / side).rglob("*") if p.is_file()}
        for side in ("live", "off")
    ]
    assert {"out/README.md", "out/mergekit_config.yml", "out/config.json", "out/model.safetensors"} <= files[0].keys()
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        assert files[0][name] == files[1][name], name


def test_importing_torch_stays_light():
    """The hook runs at every `import torch`; it may load nothing that torch did not."""
    done = python(
        "import sys, torch; heavy = ('transformers', 'mergekit', 'datasets', 'pydantic', 'scipy', 'click');"
        "print([name for name in heavy if name in sys.modules], 'mergekit_pave._autoload' in sys.modules)"
    )
    assert done.stdout.strip() == "[] True", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["mergekit"], "ModuleNotFoundError(name)"),
        (["datasets", "scipy", "pydantic", "huggingface_hub", "filelock"], "ModuleNotFoundError(name)"),
        (["datasets", "scipy", "transformers"], "OSError('a broken shared library')"),
    ],
    ids=["no-mergekit", "no-dependencies", "broken-dependencies"],
)
def test_torch_imports_whatever_is_missing(names, error):
    code = BLOCK.format(names=set(names), error=error) + "import torch; print(torch.ones(2).sum().item())"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2.0"
    assert done.stderr == ""


def test_another_mergekit_is_refused_clearly():
    """An unsupported version: torch imports, mergekit says what to install."""
    code = """
import importlib.metadata as metadata
real = metadata.version
metadata.version = lambda name: '0.3.0' if name == 'mergekit' else real(name)
import torch
print('torch is fine')
import mergekit.merge
"""
    done = python(code)
    assert done.stdout.strip() == "torch is fine"
    assert done.returncode != 0
    for words in ("mergekit>=0.1.5,<0.2", "0.3.0", "mergekit-pave"):
        assert words in done.stderr.replace("mergekit <0.2,>=0.1.5", "mergekit>=0.1.5,<0.2").replace(
            "<0.2,>=0.1.5", ">=0.1.5,<0.2"
        )


def test_mergekit_names_what_is_missing():
    """`datasets` is ours, not mergekit's: where it is gone mergekit says so, and does not ignore `pave:` from then on."""
    block = BLOCK.format(names={"datasets"}, error="ModuleNotFoundError(f'No module named {name}')")
    done = python(block + "import torch; print('torch'); import mergekit.merge; print('mergekit')")
    assert done.stdout.split() == ["torch"]
    assert "datasets" in done.stderr.splitlines()[-1]


# What a script of a user's does, and the plugin comes later than usual.
LATE = """
import mergekit.merge, mergekit.plan
from mergekit.config import MergeConfiguration
assert 'pave' not in MergeConfiguration.model_fields, 'the plugin was to be off'
import mergekit_pave
assert 'pave' in MergeConfiguration.model_fields
mergekit_pave.register()
plan, run_merge = mergekit.plan.MergePlanner._plan, mergekit.merge.run_merge
mergekit_pave.register()
mergekit_pave.register()
assert (plan, run_merge) == (mergekit.plan.MergePlanner._plan, mergekit.merge.run_merge)
import yaml, sys
from mergekit.options import MergeOptions
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
mergekit.merge.run_merge(config, sys.argv[2], MergeOptions(quiet=True))
"""


def test_importing_the_package_after_mergekit(llama, tmp_path):
    """Without the hook, and as often as one likes."""
    config = write_config(config_for(llama, {"cache_dir": str(tmp_path / "cache")}), tmp_path / "config.yml")
    done = command("python", "-c", LATE, config, tmp_path / "out", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "pave_report.json").is_file()
    assert (tmp_path / "out" / "README.md").read_text().count("### PAVE") == 1
    # Without a config source mergekit writes what `to_yaml` gives.
    assert "pave:" in (tmp_path / "out" / "mergekit_config.yml").read_text()
