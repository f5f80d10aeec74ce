"""The plugin where it has nothing to do, and where something around it is broken."""

import os
import sys

import pytest
import torch
from commands import command, finish, fresh, python, start
from merging import config_for, write_config
from reference import weights

# Put before code: a module of this name cannot be imported, as if it were missing or broken.
BLOCK = """
import sys
for name in [name for name in sys.modules if name.split('.')[0] in {names!r}]:
    del sys.modules[name]
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names!r}:
            raise {error}
sys.meta_path.insert(0, Blocker())
"""


def test_output_is_identical_to_the_last_byte(llama, tmp_path):
    """Every file, with the plugin live and with PyTorch told not to load it."""
    config = write_config(config_for(llama, merge_method="ties", tokenizer={"source": "base"}), tmp_path / "config.yml")
    live = fresh("mergekit-yaml", config, tmp_path / "live" / "out")
    off = fresh("mergekit-yaml", config, tmp_path / "off" / "out", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    told = live.communicate(timeout=300)[1] + off.communicate(timeout=300)[1]
    assert live.returncode == off.returncode == 0, told
    files = [
        {str(p.relative_to(tmp_path / side)): p.read_bytes() for p in (tmp_path / side).rglob("*") if p.is_file()}
        for side in ("live", "off")
    ]
    assert {"out/README.md", "out/mergekit_config.yml", "out/config.json", "out/model.safetensors"} <= files[0].keys()
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        one, other = files[0][name], files[1][name]
        if name.endswith("README.md"):  # mergekit lists models in the order of a set, which is another in every process
            one, other = sorted(one.splitlines()), sorted(other.splitlines())
        assert one == other, name


def test_importing_torch_stays_light():
    """The hook runs at every `import torch`; it may load nothing that torch did not."""
    code = (
        "import sys, torch; heavy = ('transformers', 'mergekit', 'datasets', 'pydantic', 'scipy', 'click');"
        "print([name for name in heavy if name in sys.modules], 'mergekit_pave.hook.autoload' in sys.modules)"
    )
    done = finish(fresh("python", "-c", code))
    assert done.stdout.strip() == "[] True", done.stdout + done.stderr


def test_a_forked_command_begins_without_mergekit():
    """Or the tests below would tell nothing of what is imported first."""
    loaded = "[name for name in sys.modules if name.startswith('mergekit')]"
    done = python(f"import sys; print({loaded}); import torch; print({loaded})")
    before, after = done.stdout.splitlines()
    assert before == "[]" and "'mergekit_pave.hook.autoload'" in after, done.stderr
    done = python(f"import sys, torch; print({loaded})", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.stdout.strip() == "[]", done.stderr


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


# A plain config is none of our business; one with a block may not be merged as if there were none.
VALIDATE = """
import mergekit.merge
from mergekit.config import MergeConfiguration
config = {"merge_method": "linear", "models": [{"model": "a"}]}
assert MergeConfiguration.model_validate(config).pave is None
print("plain is fine")
MergeConfiguration.model_validate(config | {"pave": {"models": [{"model": "a", "data": {"path": "a.jsonl"}}]}})
"""


def test_another_mergekit_is_refused_clearly():
    """An unsupported version: without a block nothing changes, with one the user is told what to install."""
    code = """
import importlib.metadata as metadata
real = metadata.version
metadata.version = lambda name: '0.3.0' if name == 'mergekit' else real(name)
"""
    done = python(code + VALIDATE)
    assert done.stdout.strip() == "plain is fine"
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert "works with mergekit <0.2,>=0.1.5, but 0.3.0 is installed" in last
    assert "pip install" in last


def test_a_block_says_what_is_missing():
    """`greenlet` gone: without a block nothing changes, with one the user is told."""
    block = BLOCK.format(names={"greenlet"}, error="ModuleNotFoundError(f'No module named {name}')")
    done = python(block + VALIDATE)
    assert done.stdout.split() == ["plain", "is", "fine"]
    last = done.stderr.splitlines()[-1]
    assert "PaveError" in last
    assert "greenlet" in last


THEIRS = ["config", "plan", "merge", "common", "merge_methods", "merge_methods.registry", "io.tensor_writer"]
OURS = ["config", "core.purification", "methods.regmean", "methods.tsv", "methods.registry", "plugin.wrap"]


FIRST = ["mergekit_pave", *(f"mergekit.{name}" for name in THEIRS), *(f"mergekit_pave.{name}" for name in OURS)]


@pytest.mark.parametrize(
    ("run", "first"),
    [*((start, first) for first in FIRST), (fresh, "mergekit.config"), (fresh, "mergekit.merge_methods")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_field_and_the_methods_are_there_whatever_is_imported_first(run, first):
    code = (
        f"import {first}; from mergekit.config import MergeConfiguration as C; import mergekit.config as c;"
        "from mergekit import merge_methods as m; from mergekit.io.tensor_writer import TensorWriter;"
        "assert TensorWriter.finalize.removes_evidence;"
        "print(C.model_fields['pave'].metadata[0].func.__module__,"
        "[m.get(name).spec.name for name in ('regmean', 'tsv')], type(c), type(m))"
    )
    done = finish(run("python", "-c", code))
    expected = "mergekit_pave.hook.field ['regmean', 'tsv'] <class 'module'> <class 'module'>"
    assert done.stdout.strip() == expected, done.stderr


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


@pytest.mark.parametrize("error", ["ModuleNotFoundError(name)", "AttributeError('another mergekit')"])
def test_merge_methods_that_cannot_be_loaded_touch_nobody(error):
    """mergekit's own ones are there, and ours are unknown."""
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == 'mergekit_pave.methods.regmean':
            raise {error}
sys.meta_path.insert(0, Blocker())
from mergekit import merge_methods
print(merge_methods.get('ties').spec.name)
merge_methods.get('regmean')
"""
    done = python(code)
    assert done.stdout.strip() == "ties"
    assert done.stderr.splitlines()[-1] == "RuntimeError: Unimplemented merge method regmean"


def test_a_method_of_the_same_name_stays():
    """Another package's, or a later mergekit's: it is merged with as ever."""
    code = """
import sys
sys.modules['mergekit_pave.methods.registry'] = type(sys)('held back')
sys.modules['mergekit_pave.methods.registry'].add = lambda module: None
from mergekit import merge_methods
other = merge_methods.merge_method(merge_methods.get('linear').implementation, name='regmean')
merge_methods.register(other)
del sys.modules['mergekit_pave.methods.registry']
import mergekit_pave.methods.registry
mergekit_pave.methods.registry.add(merge_methods)
mergekit_pave.methods.registry.add(merge_methods)
print(merge_methods.get('regmean') is other, [m.spec.name for m in merge_methods.registered_methods()].count('tsv'))
"""
    done = python(code)
    assert done.stdout.strip() == "True 1", done.stderr


BREAK = """
import sys, types
broken = types.ModuleType('broken')
broken.add = lambda module: 1 / 0
for name in ('hook.field', 'methods.registry', 'hook.outputs', 'hook.refusals'):
    sys.modules['mergekit_pave.' + name] = broken
"""


def test_whatever_goes_wrong_while_something_is_added_breaks_nothing():
    code = f"""{BREAK}
import mergekit.merge, mergekit.moe.config, mergekit.scripts.merge_raw_pytorch
from mergekit import merge_methods
print(merge_methods.get('ties').spec.name, 'pave' in mergekit.config.MergeConfiguration.model_fields)
"""
    done = python(code)
    assert done.stdout.strip() == "ties False", done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("mergekit-pave could not extend mergekit.")]
    line = (
        "mergekit-pave could not extend mergekit.config (ZeroDivisionError: division by zero). Merges without a `pave:` block "
        "are not affected; see `mergekit-pave doctor` before you use one"
    )
    assert len(told) == 5 and line in told


def test_a_plain_merge_where_nothing_can_be_added(llama, tmp_path, monkeypatch):
    """It gives the weights that it gives without this package, and each warning once."""
    (tmp_path / "sitecustomize.py").write_text(BREAK)
    config = write_config(config_for(llama), tmp_path / "config.yml")
    broken = start("mergekit-yaml", config, tmp_path / "broken", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    off = start("mergekit-yaml", config, tmp_path / "off", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    told = broken.communicate(timeout=300)[1]
    off.communicate(timeout=300)
    assert broken.returncode == off.returncode == 0, told
    assert told.count("mergekit-pave could not extend mergekit.config (ZeroDivisionError: division by zero)") == 1
    one, other = (weights(tmp_path / side) for side in ("broken", "off"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)
